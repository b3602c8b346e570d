"""Rollouts on the theorem set: ours with transformers and with vLLM against plain scripts of each,
and continuous batching against lock-step where one tool in eight is slow.

`make bench BENCH="--only rollout"` runs it alone. Contenders take turns, each in a fresh process
that loads and warms up first. Without .venv-vllm (`make test-vllm`) the rows of vLLM say so.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.rollout_cases import ROOT, TURNS, VLLM_PYTHON, Case, all_cases, python_of
from benchmarks.rollout_worker import ENVIRONMENT

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(0)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case by case, turn by turn, all contenders; on the CPU alone so far."""
    quick = metafunc.config.getoption("quick")
    cases = all_cases(quick=quick) if metafunc.config.getoption("device") == "cpu" else []
    items = [
        (case, turn, contender)
        for case in cases
        for turn in range(1 if quick else TURNS)
        for contender in case.contenders
    ]
    ids = [f"{case.name}-{turn}-{contender}" for case, turn, contender in items]
    metafunc.parametrize(("case", "turn", "contender"), items, ids=ids)


def bench_turn(
    benchmark: Any, request: pytest.FixtureRequest, case: Case, turn: int, contender: str
) -> None:
    info = benchmark.extra_info
    info |= {"case": case.name, "shape": case.shape, "contender": contender, "note": ""}
    python = python_of(contender, sys.executable)
    if python == str(VLLM_PYTHON) and not VLLM_PYTHON.exists():
        info["note"] = "cannot: no .venv-vllm here (make test-vllm)"
        benchmark.pedantic(lambda: None, rounds=1)  # a row without a time
        return
    quick = str(int(request.config.getoption("quick")))
    command = [python, "-W", "ignore", "-m", "benchmarks.rollout_worker"]
    done = benchmark.pedantic(
        lambda: subprocess.run(
            [*command, case.name, contender, str(turn), quick],
            check=True,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        ),
        rounds=1,
    )
    info |= json.loads(done.stdout.splitlines()[-1])
