"""Rollouts on the theorem set: ours with transformers and with vLLM against plain scripts of each,
and continuous batching against lock-step where one tool in eight is slow.

`make bench BENCH="--only rollout"` runs it alone. Contenders take turns, each in a fresh process
that loads and warms up first. Without .venv-vllm (`make test-vllm`) the rows of vLLM say so.
"""

import sys
from typing import Any

import pytest

from benchmarks import turns
from benchmarks.rollout_cases import ROOT, TURNS, VLLM_PYTHON, Case, all_cases, python_of
from benchmarks.rollout_worker import ENVIRONMENT

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(0)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    turns.parametrize(metafunc, all_cases, lambda case: case.contenders, TURNS)


def bench_turn(
    benchmark: Any, request: pytest.FixtureRequest, case: Case, turn: int, contender: str
) -> None:
    info = benchmark.extra_info
    info |= {"case": case.name, "shape": case.shape, "contender": contender, "note": ""}
    python = python_of(contender, sys.executable)
    if python == str(VLLM_PYTHON) and not VLLM_PYTHON.exists():
        turns.without_time(benchmark, "cannot: no .venv-vllm here (make test-vllm)")
        return
    quick = str(int(request.config.getoption("quick")))
    command = [python, "-W", "ignore", "-m", "benchmarks.rollout_worker"]
    info |= turns.run_worker(
        benchmark,
        [*command, case.name, contender, str(turn), quick],
        ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    )
