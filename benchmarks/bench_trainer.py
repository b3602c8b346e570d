"""One optimizer step without generation: ours against TRL's SDPO trainer and its GRPOTrainer.

`make bench BENCH="--only trainer"` runs it alone. Contenders take turns, each in a fresh process
that loads the model and takes a step before the one that is measured.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.peers import lacking
from benchmarks.trainer_cases import (
    CONTENDERS,
    ROOT,
    TOLERANCE,
    TRL,
    TURNS,
    Case,
    all_cases,
    disagreement,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(0)]
_first: dict[tuple[str, int], dict[str, Any]] = {}  # of a case and turn: who was first


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case by case, turn by turn, all contenders; on the CPU alone so far."""
    quick = metafunc.config.getoption("quick")
    cases = all_cases(quick=quick) if metafunc.config.getoption("device") == "cpu" else []
    items = [
        (case, turn, contender)
        for case in cases
        for turn in range(1 if quick else TURNS)
        for contender in CONTENDERS
    ]
    ids = [f"{case.name}-{turn}-{contender}" for case, turn, contender in items]
    metafunc.parametrize(("case", "turn", "contender"), items, ids=ids)


def bench_turn(
    benchmark: Any, request: pytest.FixtureRequest, case: Case, turn: int, contender: str
) -> None:
    info = benchmark.extra_info
    info |= {"case": case.name, "shape": case.shape, "contender": contender, "note": ""}
    if contender.startswith(TRL) and (why := lacking("trl")):
        info["note"] = f"cannot run here: {why}"
        benchmark.pedantic(lambda: None, rounds=1)  # a row without a time
        return
    quick = str(int(request.config.getoption("quick")))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trainer_worker"]
    done = benchmark.pedantic(
        lambda: subprocess.run(
            [*command, case.name, contender, str(turn), quick],
            check=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        ),
        rounds=1,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    other = _first.setdefault((case.name, turn), found)
    assert disagreement(found, other) <= TOLERANCE, f"{contender}: {found}, the first: {other}"
    info |= found
