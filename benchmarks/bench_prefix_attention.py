"""Packs with shared prefixes against the same packs without sharing and against padding.

`make bench` runs it, `make bench BENCH="--only prefix_attention"` it alone. Contenders take turns,
one pass each; first all must give the same hidden states.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import FREED_AT_ONCE_BYTES, timed
from benchmarks.prefix_cases import APART, OURS, PADDED, Case, all_cases

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(0)]

ROOT = Path(__file__).parent.parent
TURNS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case by case, turn by turn, all contenders; on the CPU alone so far."""
    quick = metafunc.config.getoption("quick")
    cases = all_cases(quick=quick) if metafunc.config.getoption("device") == "cpu" else []
    if metafunc.function is bench_turn:
        items = [
            (case, turn, name)
            for case in cases
            for turn in range(1 if quick else TURNS)
            for name in (OURS, APART, PADDED)
        ]
        ids = [f"{case.name}-{turn}-{name}" for case, turn, name in items]
        metafunc.parametrize(("case", "turn", "name"), items, ids=ids)
    elif metafunc.function is bench_hidden_states_are_alike:
        metafunc.parametrize("case", cases[:1])
    else:
        metafunc.parametrize("_once", [0] * bool(cases))


def bench_hidden_states_are_alike(case: Case) -> None:
    hidden = {name: case.run(name)() for name in (OURS, APART, PADDED)}
    for name in (OURS, APART):
        torch.testing.assert_close(hidden[name], hidden[PADDED], rtol=1e-4, atol=1e-4)


def bench_turn(benchmark: Any, case: Case, turn: int, name: str) -> None:
    info = benchmark.extra_info
    info |= {"case": case.name, "contender": name}
    info |= {"token_limit": case.token_limit, "flop_limit": case.flop_limit}
    run = case.run(name)
    if turn == 0:
        run()
    benchmark.pedantic(lambda: info.update(timed(run, "cpu")), rounds=1)


def bench_memory(benchmark: Any, request: pytest.FixtureRequest, _once: int) -> None:
    quick = str(int(request.config.getoption("quick")))
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.prefix_memory", quick]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(FREED_AT_ONCE_BYTES)}
    done = benchmark.pedantic(
        lambda: subprocess.run(
            command, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment
        ),
        rounds=1,
    )
    benchmark.extra_info["peaks"] = [json.loads(line) for line in done.stdout.splitlines()]
