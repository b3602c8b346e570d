"""Drivers of a Lean REPL on the fake one, against peers, Python loops and a bare C++ loop; the
parent's memory; and checks of real proofs.

`make bench` runs it, `make bench BENCH="--only replio"` it alone. Contenders take turns, so that a
busy neighbour hits all alike; first every contender gets small and large answers right: pytest's -x
stops at the first that does not, before anything is timed.
"""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import replio_lean
from benchmarks.replio_cases import (
    LEAN,
    LEAN_MESSAGES,
    LEAN_PROCESSES,
    MEMORY,
    MEMORY_COMMANDS,
    MEMORY_WORKERS,
    OURS,
    Case,
    Contender,
    all_cases,
    all_contenders,
    wrong_contenders,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # peers warn of what is not ours to mend
    pytest.mark.timeout(0),
]

ROOT = Path(__file__).parent.parent
WARM_UP = 8  # commands
PROVERS = {
    OURS: replio_lean.ours,
    LEAN_PROCESSES: functools.partial(replio_lean.processes, check=replio_lean.both_walls),
    LEAN_MESSAGES: functools.partial(replio_lean.processes, check=replio_lean.messages_alone),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case by case, turn by turn, all contenders. None on a GPU: there is nothing for it here."""
    quick = metafunc.config.getoption("quick")
    here = metafunc.config.getoption("device") == "cpu"
    if metafunc.function is bench_turn:
        items = [
            (case, contender, turn)
            for case in (all_cases(quick=quick) if here else ())
            for turn in range(case.turns)
            for contender in all_contenders()
            if turn < contender.turns_of(case)
        ]
        ids = [f"{case.name}-{turn}-{contender.name}" for case, contender, turn in items]
        metafunc.parametrize(("case", "contender", "turn"), items, ids=ids)
    elif metafunc.function is bench_real_lean:
        turns = range((1 if quick else 3) if here else 0)
        metafunc.parametrize(("turn", "name"), [(t, name) for t in turns for name in PROVERS])
    elif metafunc.function is bench_small_cases_are_right:
        metafunc.parametrize("contender", all_contenders() if here else [], ids=lambda c: c.name)
    else:
        metafunc.parametrize("num_commands", [MEMORY_COMMANDS // (20 if quick else 1)] * here)


def bench_small_cases_are_right(contender: Contender) -> None:
    assert wrong_contenders([contender]) == []


def bench_turn(benchmark: Any, case: Case, contender: Contender, turn: int) -> None:
    info = benchmark.extra_info
    info |= {"case": case.name, "shape": case.shape, "contender": contender.name}
    info |= {"workers": contender.workers, "note": contender.lacks and f"cannot: {contender.lacks}"}
    if contender.lacks:
        benchmark.pedantic(lambda: None, rounds=1)  # a row without a time
        return
    texts = case.make(contender.commands_of(case))
    if len(texts) < case.num_commands:
        info["note"] = f"{len(texts)} a pass"
    driver = contender.start()
    try:
        if len(texts) > 1:
            driver.run([f"-- warm up {i}" for i in range(WARM_UP)])
            driver.run(texts[:1])
        done = benchmark.pedantic(driver.run, (texts,), rounds=1)
    finally:
        driver.close()
    info |= per_thousand(len(texts), done.wall_s, done.cpu_s)
    seconds = sorted(done.latencies_s)
    info |= {"p50_us": 1e6 * seconds[len(seconds) // 2]}
    info |= {"p99_us": 1e6 * seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)]}


def bench_memory_of_the_parent(benchmark: Any, num_commands: int) -> None:
    info = benchmark.extra_info
    info |= {"case": MEMORY, "shape": f"{num_commands:,} small commands, raw frames"}
    info |= {"contender": OURS, "workers": MEMORY_WORKERS, "note": ""}
    command = [sys.executable, "-m", "benchmarks.replio_memory", str(num_commands)]
    done = benchmark.pedantic(
        lambda: subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT), rounds=1
    )
    found = json.loads(done.stdout)
    info |= per_thousand(num_commands, found["wall_s"], found["cpu_s"])
    info["grown_mib"] = found["grown_mib"]


def bench_real_lean(benchmark: Any, request: pytest.FixtureRequest, turn: int, name: str) -> None:
    statements = 2 if request.config.getoption("quick") else 8
    items = replio_lean.attempts(statements, turn)
    info = benchmark.extra_info
    info |= {"case": LEAN, "contender": name, "workers": replio_lean.WORKERS, "note": ""}
    info["shape"] = f"{replio_lean.ATTEMPTS} attempts at each of {statements} statements"
    PROVERS[name](items[:2])  # loads Lean
    start = time.perf_counter()
    proved = benchmark.pedantic(PROVERS[name], (items,), rounds=1)
    info |= per_thousand(len(items), time.perf_counter() - start)
    assert proved == len(items), f"{name} finds {proved} of {len(items)} right proofs right"


def per_thousand(count: int, wall_s: float, cpu_s: float | None = None) -> dict[str, float]:
    """Seconds of so many commands as seconds of a thousand, and how many there are a second."""
    found = {"per_s": count / wall_s, "wall_s": 1000 * wall_s / count}
    return found if cpu_s is None else found | {"cpu_s": 1000 * cpu_s / count}
