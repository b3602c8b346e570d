"""One check as its backend sees it: the commands it asks of a pool, its clock, its cancellation.

The clock runs only while a worker works on a command of the check: what a command waits for a
worker, or a worker for its start, is not counted.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Literal

from fdfast._replio import Answer, Pool
from fdfast.errors import MachineError
from fdfast.lean.verdict import Kind, Level, Message, Verdict

Stage = Literal["the statement", "the proof", "the audit", "the replay"]
# The one stage that reads the proof text, so the one whose crash is the proof's.
PROOF: Stage = "the proof"


class Stop(Exception):  # noqa: N818 - it carries a verdict out of nested calls, it is no error
    """The check is over with this verdict."""

    def __init__(
        self, kind: Kind, reason: str, messages: tuple[Message, ...] = (), level: Level = 0
    ) -> None:
        super().__init__(reason)
        self.verdict = Verdict(kind, messages, reason, level)


class Run:
    """The commands of one check."""

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._timeout_s = timeout_s
        self._left_s = timeout_s
        self._cancelled = False
        self._lock = threading.Lock()
        self._asked: tuple[Pool, list[int]] | None = None

    def cancel(self) -> None:
        """End the check from any thread: its `ask` raises CancelledError, now or when called."""
        with self._lock:
            self._cancelled = True
            if self._asked is not None:
                pool, tickets = self._asked
                pool.cancel(tickets)

    def wait_for(self, known: Future[str]) -> BaseException | None:
        """`known.exception()`, for at most the check's time.

        Raises:
            TimeoutError: it is not done by then.
            CancelledError: `cancel` was called.
        """
        until = time.monotonic() + self._left_s
        while not known.done() and time.monotonic() < until:
            with self._lock:
                if self._cancelled:
                    raise CancelledError
            wait([known], timeout=min(0.1, self._left_s))
        return known.exception(timeout=0)

    def ask(
        self,
        pool: Pool,
        commands: Sequence[bytes],
        stage: Stage,
        *,
        header: bytes = b"",
        chain: bool = False,
        timeout_s: float | None = None,
    ) -> list[Answer]:
        """Return the answers to the commands, whose `end` is `answer`, `crashed`, `forged`,
        `overflow` or `header`.

        Args:
            pool: who is asked.
            commands: in order; each is carried out, also where another check asks the same.
            stage: for messages.
            header: see `Pool.submit`.
            chain: see `Pool.submit`.
            timeout_s: another limit than what is left of the check's time, which then stands still.

        Raises:
            Stop: time or memory ran out.
            MachineError: no worker starts, or memory ran out without any proof.
            CancelledError: `cancel` was called, or the pool was closed.
        """
        limit_s = self._left_s if timeout_s is None else timeout_s
        if limit_s <= 0:
            raise self._timeout(stage)
        tickets = pool.submit(commands, header=header, timeout_s=limit_s, unique=True, chain=chain)
        with self._lock:
            self._asked = (pool, tickets)
            if self._cancelled:
                pool.cancel(tickets)
        try:
            answers = [_wait(pool, ticket) for ticket in tickets]
        except BaseException:  # above all KeyboardInterrupt: nobody waits for the answers any more
            pool.cancel(tickets)
            raise
        finally:
            with self._lock:
                self._asked = None
        for answer in answers:
            if timeout_s is None:
                self._left_s -= answer.seconds
            self._judge(answer, stage)
        return answers

    def _judge(self, answer: Answer, stage: Stage) -> None:
        if answer.end == "timeout":
            raise self._timeout(stage)
        if answer.end == "cancelled":
            raise CancelledError
        if answer.end == "memory":
            limit = f"{self.memory_bytes / 2**20:.0f} MiB"
            reason = f"Lean went over its memory limit of {limit} ({stage})"
            if stage == PROOF:
                raise Stop("crashed", reason)
            raise MachineError(f"lean: {reason}, without any proof; raise memory_mb")
        if answer.end == "unavailable":
            raise MachineError(
                f"lean: no worker starts ({said_on_stderr(answer)}); run `fdfast lean doctor`"
            )

    def _timeout(self, stage: Stage) -> Stop:
        return Stop("timeout", f"Lean was still busy after {self._timeout_s:g} s ({stage})")


def _wait(pool: Pool, ticket: int) -> Answer:
    answer = pool.wait(ticket)
    assert answer is not None  # no timeout was given
    return answer


def said_on_stderr(answer: Answer) -> str:
    """Return in one line what the worker wrote last on stderr."""
    return one_line(answer.stderr.decode(errors="replace")) or "no word on stderr"


def one_line(text: str) -> str:
    """Return the beginning of a text as one line."""
    return " ".join(text[:2000].split())[:240]
