"""A LeanPool serves threads, tasks and processes at once, and ends with whoever holds it."""

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fdfast.errors import InputError
from fdfast.lean import Attempt, LeanPool, Toolchain, find_lean
from fdfast.lean.checker import Checker
from fdfast.lean.run import Run

GOOD = "theorem good (a : Prop) (h : a) : a :="
SLOW = Attempt(GOOD, "h " * 60_000)  # many seconds of work for Lean


@pytest.fixture(scope="module")
def pool() -> Iterator[LeanPool]:
    with LeanPool(workers=2, timeout_s=20.0, toolchain=find_lean(backend="embedded")) as pool:
        yield pool


def numbered(number: int) -> Attempt:
    """A theorem of its own, proved if the number is even."""
    statement = f"theorem n{number} (a : Prop) (h : a) : a :="
    return Attempt(statement, "h" if number % 2 == 0 else f"nosuch{number}")


def assert_own(number: int, kind: str, reason: str) -> None:
    """The verdict is the one on `numbered(number)`."""
    assert kind == ("proved" if number % 2 == 0 else "failed")
    assert reason == ("" if number % 2 == 0 else f"1:0: Unknown identifier `nosuch{number}`")


def run_python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return False


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < until, [pid for pid in pids if is_running(pid)]
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    found, queue = [], [pid]
    while queue:
        for tasks in Path(f"/proc/{queue.pop()}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                queue += (new := [int(child) for child in tasks.read_text().split()])
                found += new
    return found


def test_check_many_keeps_the_order_and_as_completed_tells_the_place(pool: LeanPool) -> None:
    attempts = [numbered(number) for number in range(12)]
    for number, verdict in enumerate(pool.check_many(attempts)):
        assert_own(number, verdict.kind, verdict.reason)
    seen = dict(pool.as_completed([tuple(attempt) for attempt in attempts]))
    assert sorted(seen) == list(range(12))
    for number, verdict in seen.items():
        assert_own(number, verdict.kind, verdict.reason)
    assert pool.check_many([]) == []


def test_whoever_turns_away_from_as_completed_cancels_the_rest(pool: LeanPool) -> None:
    attempts = [*[SLOW] * 3, Attempt(GOOD, "sorry"), *[SLOW] * 3]
    for number, verdict in pool.as_completed(attempts):
        assert (number, verdict.kind) == (3, "rejected")
        break
    start = time.monotonic()
    assert pool.check(*numbered(2)).proved
    assert time.monotonic() - start < 10


def test_many_threads_share_a_pool(pool: LeanPool) -> None:
    with ThreadPoolExecutor(8) as threads:
        verdicts = threads.map(lambda number: pool.check(*numbered(number)), range(24))
        for number, verdict in enumerate(verdicts):
            assert_own(number, verdict.kind, verdict.reason)


def test_attempts_at_one_statement_compile_it_once(pool: LeanPool) -> None:
    pool.check(*numbered(0))
    before = pool.stats()["submitted"]
    attempts = [Attempt("theorem once (a : Prop) (h : a) : a :=", "h")] * 6
    assert all(verdict.proved for verdict in pool.check_many(attempts))
    assert pool.stats()["submitted"] - before == 1 + 6 * 2  # each is compiled and audited


def test_a_check_that_waits_for_anothers_statement_keeps_its_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered, release = threading.Event(), threading.Event()
    real = Checker._print_statement

    def slow(self: Checker, run: Run, header: str, statement: str, name: str) -> str:
        if not entered.is_set():
            entered.set()
            assert release.wait(60)
        return real(self, run, header, statement, name)

    monkeypatch.setattr(Checker, "_print_statement", slow)
    statement = "theorem waited_for (a : Prop) (h : a) : a :="
    with (
        LeanPool(workers=1, timeout_s=60.0) as patient,
        LeanPool(workers=1, timeout_s=1.0) as hasty,
        ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(patient.check, statement, "h")
        try:
            assert entered.wait(60)
            assert hasty.check(statement, "h").proved
            assert not first.done()
        finally:
            release.set()
        assert first.result().proved


def test_a_check_that_waits_for_anothers_statement_can_be_cancelled() -> None:
    run = Run(60.0, 0)
    timer = threading.Timer(0.2, run.cancel)
    timer.start()
    began = time.monotonic()
    with pytest.raises(CancelledError):
        run.wait_for(Future())
    assert time.monotonic() - began < 10
    timer.join()


def test_asyncio_gets_the_same_verdicts(pool: LeanPool) -> None:
    async def check() -> None:
        verdicts = await pool.acheck_many([numbered(number) for number in range(6)])
        for number, verdict in enumerate(verdicts):
            assert_own(number, verdict.kind, verdict.reason)
        assert (await pool.acheck(GOOD, "h")).proved

    asyncio.run(check())


def test_a_cancelled_task_ends_its_check(pool: LeanPool) -> None:
    async def check() -> None:
        killed = pool.stats()["killed_cancelled"]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.acheck(*SLOW), 0.5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.acheck_many([SLOW] * 5), 0.5)
        start = time.monotonic()
        assert (await pool.acheck(GOOD, "h")).proved
        assert time.monotonic() - start < 10
        assert pool.stats()["killed_cancelled"] >= killed + 2

    asyncio.run(check())


def test_an_input_error_comes_before_any_check(pool: LeanPool) -> None:
    before = pool.stats()["submitted"]
    with pytest.raises(InputError, match="formal_statement must begin with `theorem NAME`"):
        pool.check_many([numbered(0), Attempt("def x :=", "h")])
    with pytest.raises(InputError, match="header imports Mathlib"):
        pool.check_many([numbered(0), Attempt(GOOD, "h", "import Mathlib\n")])
    assert pool.stats()["submitted"] == before


def test_the_pools_header_stands_above_what_brings_none() -> None:
    header = "namespace Mine\ntheorem two {a : Prop} (x : a) : And a a := ⟨x, x⟩\n"
    with LeanPool(workers=1, header=header) as pool:
        assert pool.check("theorem t (a : Prop) (h : a) : And a a :=", "two h").proved
        attempts = [Attempt(GOOD, "(two h).left"), Attempt(GOOD, "(two h).left", "namespace X\n")]
        assert [verdict.kind for verdict in pool.check_many(attempts)] == ["proved", "failed"]


def test_closing_cancels_what_other_threads_check() -> None:
    pool = LeanPool(workers=1, timeout_s=60)
    assert pool.check(GOOD, "h").proved
    pids = pool.pids()
    assert len(pids) == 1
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(pool.check, *SLOW), threads.submit(pool.check_many, [SLOW] * 3)]
        time.sleep(0.5)
        pool.close()
        for future in running:
            with pytest.raises(CancelledError):
                future.result(timeout=10)
    assert_gone(pids)
    pool.close()
    with pytest.raises(RuntimeError, match=r"^LeanPool: the pool is closed; make another$"):
        pool.check(GOOD, "h")
    assert (pool.pids(), pool.stats()) == ([], {})


def test_a_pickled_pool_is_its_settings(pool: LeanPool) -> None:
    pool.check(GOOD, "h")
    code = (
        "import pickle, sys\n"
        "with pickle.loads(bytes.fromhex(sys.stdin.read())) as pool:\n"
        f"    print(pool.check({GOOD!r}, 'h'), pool.toolchain.kind, len(pool.pids()))\n"
    )
    process = run_python(code)
    out, err = process.communicate(pickle.dumps(pool).hex(), timeout=60)
    assert (out, err) == ("proved embedded 1\n", "")


FORK = f"""
import concurrent.futures, contextlib, os, sys, threading, time
from fdfast.lean import LeanPool
pool = LeanPool(workers=1)
assert pool.check({GOOD!r}, "h").proved
def check_slowly():
    with contextlib.suppress(concurrent.futures.CancelledError):
        pool.check({GOOD!r}, "h " * 60_000)
threading.Thread(target=check_slowly).start()
time.sleep(0.3)
mine = pool.pids()
child = os.fork()
if child == 0:
    assert pool.pids() == []
    assert pool.check({GOOD!r}, "h").proved
    assert pool.pids() and not set(pool.pids()) & set(mine)
    print("child", flush=True)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert pool.pids() == mine
pool.close()
print("parent", flush=True)
"""


def test_a_forked_child_gets_processes_of_its_own() -> None:
    process = run_python(FORK)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("child\nparent\n", "", 0)


def test_a_pool_that_nobody_closed_ends_with_the_program() -> None:
    code = (
        "from fdfast.lean import LeanPool\n"
        "pool = LeanPool()\n"
        f"pool.check_many([({GOOD!r}, 'h', '')] * 3)\n"
        "print(*pool.pids())\n"
    )
    process = run_python(code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert_gone([int(pid) for pid in out.split()])


def test_a_pool_that_nobody_holds_ends_its_processes() -> None:
    pool = LeanPool(workers=1)
    pool.check(GOOD, "h")
    pids = pool.pids()
    del pool
    assert_gone(pids)


@pytest.mark.parametrize("kind", ["embedded", "lean", "repl"])
def test_nothing_outlives_a_killed_parent(leans: dict[str, Toolchain], kind: str) -> None:
    code = (
        "import pickle, sys\n"
        "pool = pickle.loads(bytes.fromhex(sys.stdin.readline()))\n"
        f"assert pool.check({GOOD!r}, 'h').proved\n"
        "print('ready', flush=True)\n"
        f"pool.check_many([({GOOD!r}, 'h ' * 60_000, '')] * 4)\n"
    )
    parent = run_python(code)
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(pickle.dumps(LeanPool(toolchain=leans[kind], timeout_s=600)).hex() + "\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    pids = descendants(parent.pid)
    assert len(pids) >= 4, pids  # two workers, and a job of each
    parent.kill()
    parent.communicate()
    assert_gone(pids)


@pytest.mark.parametrize("call", ["check(*slow)", "check_many([slow] * 4)"])
def test_ctrl_c_ends_the_check_and_its_processes(call: str) -> None:
    code = (
        "from fdfast.lean import LeanPool\n"
        f"slow = ({GOOD!r}, 'h ' * 60_000)\n"
        "pool = LeanPool(timeout_s=60)\n"
        f"pool.check({GOOD!r}, 'h')\n"
        "print(*pool.pids(), flush=True)\n"
        f"pool.{call}\n"
    )
    process = run_python(code)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.7)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert_gone(pids)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": 0}, "LeanPool: workers must be at least 1; got 0"),
        ({"timeout_s": 0}, "LeanPool: timeout_s must be more than 0; got 0"),
        ({"timeout_s": float("nan")}, "LeanPool: timeout_s must be more than 0; got nan"),
        ({"memory_mb": 1}, "LeanPool: memory_mb must be at least 128; got 1"),
        ({"workers": 1.5}, "LeanPool: workers must be a whole number; got 1.5"),
        ({"workers": True}, "LeanPool: workers must be a whole number; got True"),
        ({"workers": 1 << 40}, "LeanPool: workers must be at most 4096; got 1099511627776"),
        ({"memory_mb": 200.5}, "LeanPool: memory_mb must be a whole number; got 200.5"),
        ({"memory_mb": 1 << 50}, "LeanPool: memory_mb must be at most 1073741824; got 1125899"),
        ({"header": "module\nimport FdBase"}, "header begins with `module`, and a module cannot"),
        ({"level": 0}, r"LeanPool: level must be 1 \(audit\) or 2 \(replay\); got 0"),
        ({"header": "import Mathlib"}, "header imports Mathlib, which the embedded Lean does not"),
    ],
)
def test_settings_that_cannot_be_are_an_input_error(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        LeanPool(**settings)  # type: ignore[arg-type]


def test_threads_do_not_pile_up() -> None:
    before = threading.active_count()
    with LeanPool(workers=1) as pool:
        pool.check_many([numbered(number) for number in range(8)])
        assert threading.active_count() - before <= 2
    until = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < until
        time.sleep(0.01)
