"""One optimizer step without generation: ours against TRL's SDPO trainer and its GRPOTrainer.

`make bench BENCH="--only trainer"` runs it alone. Contenders take turns, each in a fresh process
that loads the model and takes a step before the one that is measured.
"""

import sys
from typing import Any

import pytest

from benchmarks import turns
from benchmarks.peers import lacking
from benchmarks.trainer_cases import (
    CONTENDERS,
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
    turns.parametrize(metafunc, all_cases, lambda case: CONTENDERS, TURNS)


def bench_turn(
    benchmark: Any, request: pytest.FixtureRequest, case: Case, turn: int, contender: str
) -> None:
    info = benchmark.extra_info
    info |= {"case": case.name, "shape": case.shape, "contender": contender, "note": ""}
    if contender.startswith(TRL) and (why := lacking("trl")):
        turns.without_time(benchmark, f"cannot run here: {why}")
        return
    quick = str(int(request.config.getoption("quick")))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.trainer_worker"]
    found = turns.run_worker(
        benchmark, [*command, case.name, contender, str(turn), quick], {"HF_HUB_OFFLINE": "1"}
    )
    other = _first.setdefault((case.name, turn), found)
    assert disagreement(found, other) <= TOLERANCE, f"{contender}: {found}, the first: {other}"
    info |= found
