"""The pool of REPL workers in its process: event loops, signals, forks, deaths, no leftovers."""

import asyncio
import gc
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fdfast._replio import Pool
from fdfast.errors import InputError, MachineError
from tests.replio_pools import PATIENCE_S, alive, eventually
from tests.replio_workers import WORKER, ask, script, wait


def test_an_event_loop_hears_of_answers() -> None:
    async def all_of(pool: Pool, tickets: list[int]) -> dict[int, bytes]:
        loop, seen, done = asyncio.get_running_loop(), dict[int, bytes](), asyncio.Event()

        def fetch() -> None:
            seen.update({answer.ticket: answer.raw for answer in pool.ready()})
            if len(seen) == len(tickets):
                done.set()

        loop.add_reader(pool.fileno(), fetch)
        await asyncio.wait_for(done.wait(), PATIENCE_S)
        loop.remove_reader(pool.fileno())
        return seen

    with Pool(["cat"], workers=2) as pool:
        for _ in range(3):
            commands = [b"%d" % i for i in range(500)]
            tickets = pool.submit(commands)
            seen = asyncio.run(all_of(pool, tickets))
            assert seen == dict(zip(tickets, commands, strict=True))
        assert pool.ready() == []


@pytest.mark.parametrize("call", ["pool.next()", "pool.wait(0)", "pool.submit([b'x' * 100])"])
def test_ctrl_c_interrupts_a_wait(call: str) -> None:
    code = (
        "import os, sys, threading\n"
        "from fdfast._replio import Pool\n"
        "with Pool(['sleep', '60'], queue_bytes=100) as pool:\n"
        "    pool.submit([b'y' * 100])\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), 2)).start()\n"
        f"    try: {call}\n"
        "    except KeyboardInterrupt: print('interrupted')\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "import sys, types\nsys.path.insert(0, '.')\n" + LIGHT + code],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout == "interrupted\n", done
    assert time.monotonic() - began < 20


# The extension without torch, which fdfast itself imports and which takes seconds.
LIGHT = (
    "fdfast = types.ModuleType('fdfast'); fdfast.__path__ = [sys.path[0] + '/fdfast']\n"
    "sys.modules['fdfast'] = fdfast\n"
)


def _in_a_child(pool: Pool, pipe: Any) -> None:
    said = []
    for call in (pool.next, pool.ready, pool.pids, pool.close, lambda: pool.submit([b"x"])):
        try:
            call()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    with Pool(["cat"]) as own:
        said.append(ask(own, b"mine").raw.decode())
    pipe.send(said)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_in_a_forked_child_the_pool_is_refused_and_the_parents_lives_on() -> None:
    context = multiprocessing.get_context("fork")
    with script() as pool:
        [ticket] = pool.submit([b"sleep 0.5"])
        ours, theirs = context.Pipe()
        child = context.Process(target=_in_a_child, args=(pool, theirs))
        child.start()
        said = ours.recv()
        child.join(PATIENCE_S)
        assert child.exitcode == 0
        assert said.pop() == "mine"
        assert all(re.fullmatch(r"Pool: process \d+ was forked off .*", line) for line in said), (
            said
        )
        assert wait(pool, ticket).raw == b"sleep 0.5"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_keeps_no_pipe_open() -> None:
    """Else the end of a command's input would never come."""
    context = multiprocessing.get_context("fork")
    code = "import sys, time; time.sleep(0.3); print(len(sys.stdin.read()))"
    with Pool([sys.executable, "-SEc", code], mode="once") as pool:
        [ticket] = pool.submit([b"x" * (2 << 20)])  # more than a pipe holds
        assert eventually(lambda: pool.stats()["running"] == 1)
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        try:
            answer = pool.wait(ticket, 20)
            assert answer is not None
            assert answer.raw == b"%d\n" % (2 << 20)
        finally:
            child.kill()
            child.join()


@pytest.mark.parametrize("how", ["pool", "interpreter"])
def test_a_parent_that_is_killed_or_just_ends_leaves_nothing_behind(how: str) -> None:
    """Neither its workers nor what they have started."""
    code = (
        "import signal, time\n"
        "from fdfast._replio import Pool\n"
        f"pool = Pool([sys.executable, '-SEc', {WORKER!r}], workers=2)\n"
        "tickets = pool.submit([b'fork', b'hang'])\n"
        "child = pool.wait(tickets[0]).raw.decode()\n"
        "print(*pool.pids(), child.split()[1], flush=True)\n"
        + ("signal.pause()\n" if how == "pool" else "sys.exit()\n")
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", "import sys, types\nsys.path.insert(0, '.')\n" + LIGHT + code],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    if how == "pool":
        assert all(map(alive, pids))
        parent.kill()
    parent.wait(PATIENCE_S)
    parent.stdout.close()
    assert eventually(lambda: not any(map(alive, pids))), [pid for pid in pids if alive(pid)]


def test_closing_answers_all_and_leaves_no_process() -> None:
    pool = script(workers=2)
    tickets = pool.submit([b"hang", b"fork", b"x"])
    assert wait(pool, tickets[1]).raw.startswith(b"child ")
    pids = pool.pids()
    waiting = threading.Thread(target=lambda: ends.append(wait(pool, tickets[0]).end))
    ends: list[str] = []
    waiting.start()
    pool.close()
    pool.close()
    waiting.join()
    assert ends == ["cancelled"]
    last = pool.next()
    assert last is not None
    assert last.end == "cancelled"
    assert pool.next() is None
    assert pool.pids() == []
    assert not any(map(alive, pids))
    with pytest.raises(InputError, match="closed"):
        pool.submit([b"x"])


def _descriptors_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_pools_and_restarts_leave_no_descriptor_and_no_thread() -> None:
    def use() -> None:
        with script(workers=2) as pool:
            pool.fileno()
            for ticket in pool.submit([b"a", b"die 1", b"b", b"die 2", b"c"]):
                wait(pool, ticket)
        Pool(["cat"]).submit([b"dropped"])
        with Pool(["/nonexistent"], max_restarts=1) as pool:
            ask(pool, b"x")

    use()
    gc.collect()
    before = _descriptors_and_threads()
    for _ in range(5):
        use()
    gc.collect()
    assert _descriptors_and_threads() == before


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def test_a_hundred_thousand_commands_leave_no_memory_behind() -> None:
    with Pool(["cat"], workers=4) as pool:

        def batch(number: int) -> None:
            tickets = pool.submit(
                [b'{"cmd": "theorem t_%d_%d : True"}' % (number, i) for i in range(1000)]
            )
            for _ in tickets:
                answer = pool.next(PATIENCE_S)
                assert answer is not None
                assert answer.end == "answer"

        for number in range(5):
            batch(number)
        before = _resident_mib()
        for number in range(5, 105):
            batch(number)
        assert _resident_mib() - before < 20


def test_machine_errors_are_told_from_the_callers() -> None:
    assert not issubclass(MachineError, InputError)
    code = (
        "import os, resource\n"
        "from fdfast._replio import Pool\n"
        "from fdfast.errors import MachineError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 1,) * 2)\n"
        "try: Pool(['cat'])\n"
        "except MachineError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sys, types\nsys.path.insert(0, '.')\n" + LIGHT + code],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert re.match(r"Pool: \w+: Too many open files; raise `ulimit -n`", done.stdout), done
