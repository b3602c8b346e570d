"""Pools on the fake REPL for tests, held to have answered everything once and to leave nothing."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fdfast._replio import Answer, Pool
from tests.fake_repl import fake_repl

PATIENCE_S = 60.0  # what never takes so long, on the busiest machine
PROBE = b'{"cmd": "fake[say=%s]"}'
MIB = 1 << 20


@contextlib.contextmanager
def pool_of(*arguments: str, **options: Any) -> Iterator[Pool]:
    """A pool on the fake REPL that leaves no process behind and has answered everything once."""
    mark = f"FDFAST_TEST_POOL={os.urandom(16).hex()}"
    name, value = mark.split("=")
    options.setdefault("timeout_s", PATIENCE_S)
    env = {"PATH": os.environ["PATH"], name: value}
    with Pool([str(fake_repl()), *arguments], env=env, **options) as pool:
        yield pool
        assert pool.next(0) is None
        stats = pool.stats()
        assert stats["submitted"] == stats["answered"], stats
    assert eventually(lambda: not processes_with(mark)), processes_with(mark)


def processes_with(mark: str) -> list[int]:
    """The living processes with this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def eventually(holds: Callable[[], object], seconds: float = PATIENCE_S) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ask(pool: Pool, *commands: bytes, **options: Any) -> list[Answer]:
    """The answers, in the order of the commands."""
    answers = [pool.wait(ticket, PATIENCE_S) for ticket in pool.submit(commands, **options)]
    assert None not in answers
    return answers  # type: ignore[return-value]


def assert_answers(answer: Answer, number: int) -> None:
    """It is the whole and honest answer to the command with that id."""
    assert answer.end == "answer", (answer.end, answer.status, answer.stderr)
    assert answer.json()["id"] == number
