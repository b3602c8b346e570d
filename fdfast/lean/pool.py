"""`LeanPool`: Lean processes that are kept and checked with, from threads and from asyncio."""

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple, Self

from fdfast.errors import InputError
from fdfast.lean.backend import Backend, FileBackend
from fdfast.lean.checker import Checker, forget_statements
from fdfast.lean.filecheck import Checked, check_file
from fdfast.lean.repl_backend import ReplBackend
from fdfast.lean.run import Run
from fdfast.lean.statement import complete_header, parse_statement
from fdfast.lean.toolchain import Toolchain, find_lean
from fdfast.lean.verdict import Verdict

_MIN_MEMORY_MB = 128  # Lean alone, without a proof, takes half of it
_MAX_MEMORY_MB = 1 << 30  # a pebibyte, so that bytes fit 64 bits with room
_MAX_WORKERS = 4096


class Attempt(NamedTuple):
    """One proof to check: the arguments of `verify`, and in `context` the prover's own lemmas."""

    formal_statement: str
    proof: str
    header: str = ""
    context: str = ""


Item = Attempt | tuple[str, str, str]


@dataclass(frozen=True)
class _Settings:
    """What a pool is made with; this is what goes into a pickle."""

    workers: int
    timeout_s: float
    memory_mb: int
    header: str
    toolchain: Toolchain
    level: Literal[1, 2]


class LeanPool:
    """Lean processes that check proofs, several at a time; a context manager.

    They start at the first check and are kept. Every method may be called from any thread. A pool
    that is sent to another process (spawn) arrives as its settings; in a forked child it starts
    processes of its own. When the process that holds it ends, even by `kill -9`, so do they.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout_s: float = 30.0,
        memory_mb: int = 2048,
        header: str = "",
        toolchain: Toolchain | None = None,
        level: Literal[1, 2] = 1,
    ) -> None:
        """Make the pool; no process starts yet.

        Args:
            workers: how many Lean processes; more than the machine has cores gains nothing. With
                the REPL half as many again audit what these compile.
            timeout_s: the time that Lean may work on one check, in seconds.
            memory_mb: the largest resident set of one Lean, in MiB.
            header: what stands above a theorem whose check brings no header.
            toolchain: the Lean to use; None is `find_lean()`.
            level: the rung of the ladder in `verdict` that a proof must reach.

        Raises:
            InputError: an argument is off, or the toolchain cannot replay for level 2.
            MachineError: there is no Lean.
        """
        for name, value, most in (
            ("workers", workers, _MAX_WORKERS),
            ("memory_mb", memory_mb, _MAX_MEMORY_MB),
        ):
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"LeanPool: {name} must be a whole number; got {value}")
            if value > most:
                raise InputError(f"LeanPool: {name} must be at most {most}; got {value}")
        if workers < 1:
            raise InputError(f"LeanPool: workers must be at least 1; got {workers}")
        if not timeout_s > 0:
            raise InputError(f"LeanPool: timeout_s must be more than 0; got {timeout_s}")
        if memory_mb < _MIN_MEMORY_MB:
            raise InputError(f"LeanPool: memory_mb must be at least 128; got {memory_mb}")
        if level not in (1, 2):
            raise InputError(f"LeanPool: level must be 1 (audit) or 2 (replay); got {level}")
        lean = toolchain or find_lean()
        if level == 2 and lean.no_replay:
            raise InputError(
                f"LeanPool: level 2 wants a replay, which is not there: {lean.no_replay}"
            )
        complete_header(lean, header)
        self._state: _Running | None
        self._start(_Settings(workers, timeout_s, memory_mb, header, lean, level))

    @property
    def toolchain(self) -> Toolchain:
        """The Lean in use."""
        return self._settings.toolchain

    def check(
        self, formal_statement: str, proof: str, header: str | None = None, context: str = ""
    ) -> Verdict:
        """Check one proof; see `fdfast.lean.verify`.

        Args:
            formal_statement: see there.
            proof: see there.
            header: see there; None is the pool's own.
            context: lemmas and definitions of the prover's, which are judged and not trusted; see
                `submission`.

        Raises:
            InputError: the statement has not that form, or the header imports what is not there.
            MachineError: Lean cannot be run here. That is never a verdict.
            CancelledError: the pool was closed.
        """
        attempt = self._complete(Attempt(formal_statement, proof, header or "", context))
        return self._running().check(self._new_run(), attempt)

    def check_many(self, attempts: Sequence[Item]) -> list[Verdict]:
        """Check many proofs; the verdicts come in the order of the attempts.

        A malformed statement is found before the first check.
        """
        verdicts = dict(self.as_completed(attempts))
        return [verdicts[number] for number in range(len(attempts))]

    def as_completed(self, attempts: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Check many proofs; yield the place of each in `attempts` and its verdict as it comes.

        Checks that are still running when the caller turns away are cancelled.
        """
        complete = [self._complete(Attempt(*attempt)) for attempt in attempts]
        running = self._running()
        runs = [self._new_run() for _ in complete]
        places: dict[Future[Verdict], int] = {}
        try:
            for number, (run, attempt) in enumerate(zip(runs, complete, strict=True)):
                places[running.threads.submit(running.check, run, attempt)] = number
            for future in as_completed(places):
                yield places[future], future.result()
        finally:
            for future, run in zip(places, runs, strict=False):
                if not future.cancel():
                    run.cancel()

    async def acheck(
        self, formal_statement: str, proof: str, header: str | None = None, context: str = ""
    ) -> Verdict:
        """`check` for asyncio; a cancelled task cancels the check."""
        attempt = self._complete(Attempt(formal_statement, proof, header or "", context))
        running, run = self._running(), self._new_run()
        future = running.threads.submit(running.check, run, attempt)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            run.cancel()
            raise

    async def acheck_many(self, attempts: Sequence[Item]) -> list[Verdict]:
        """`check_many` for asyncio."""
        complete = [self._complete(Attempt(*attempt)) for attempt in attempts]
        tasks = [asyncio.ensure_future(self.acheck(*attempt)) for attempt in complete]
        try:
            return [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def check_file(self, text: str, timeout_s: float | None = None) -> Checked:
        """Compile a whole file and return Lean's messages; no verdict on any proof in it.

        It is what `Toolbox` takes for its check.

        Args:
            text: the file's; without imports it gets the default header of this Lean.
            timeout_s: for Lean's work, in seconds; None is the pool's.

        Raises:
            InputError: timeout_s is not positive.
            MachineError: Lean cannot be run here.
            CancelledError: the pool was closed.
        """
        limit_s = self._settings.timeout_s if timeout_s is None else timeout_s
        if not limit_s > 0:
            raise InputError(f"check_file: timeout_s must be more than 0; got {timeout_s}")
        return self._running().check_file(self._new_run(limit_s), text)

    def pids(self) -> list[int]:
        """The living worker processes."""
        with self._lock:
            return [] if self._state is None else self._state.backend.pids()

    def stats(self) -> dict[str, int]:
        """What the workers have done; see `fdfast._replio.Pool.stats`. Empty before a check."""
        with self._lock:
            return {} if self._state is None else self._state.backend.stats()

    def close(self) -> None:
        """End every process; checks in other threads raise CancelledError."""
        with self._lock:
            self._closed = True
            state, self._state = self._state, None
        if state is not None:
            state.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> _Settings:
        return self._settings

    def __setstate__(self, settings: _Settings) -> None:
        self._start(settings)

    def _start(self, settings: _Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._state = None
        self._closed = False
        _POOLS.add(self)

    def _forked(self) -> None:
        """Be a fresh pool in a forked child; the parent's processes are the parent's."""
        self._lock = threading.Lock()
        if self._state is not None:
            self._state.forget()
            self._state = None

    def _running(self) -> "_Running":
        with self._lock:
            if self._closed:
                raise RuntimeError("LeanPool: the pool is closed; make another")
            if self._state is None:
                self._state = _Running(self._settings)
                # Not a method of ours, which would keep the pool alive.
                weakref.finalize(self, self._state.close)
            return self._state

    def _new_run(self, timeout_s: float | None = None) -> Run:
        return Run(timeout_s or self._settings.timeout_s, self._settings.memory_mb << 20)

    def _complete(self, attempt: Attempt) -> Attempt:
        """The attempt with the header that it gets, found good as far as Lean is not needed."""
        parse_statement(attempt.formal_statement)
        header = attempt.header or self._settings.header
        complete_header(self._settings.toolchain, header)
        return attempt._replace(header=header)


class _Running:
    """The processes and threads of a pool. A thread holds one check, and mostly waits."""

    def __init__(self, settings: _Settings) -> None:
        self.backend = start_backend(
            settings.toolchain, workers=settings.workers, memory_bytes=settings.memory_mb << 20
        )
        self._lean = settings.toolchain
        self._checker = Checker(settings.toolchain, self.backend, level=settings.level)
        # Twice as many, so that a worker need not wait for Python between two checks.
        self.threads = ThreadPoolExecutor(2 * settings.workers, thread_name_prefix="lean-check")
        self._pid = os.getpid()
        self._closing = False

    def check(self, run: Run, attempt: Attempt) -> Verdict:
        with self._cancelled_by_close():
            return self._checker.verify(run, *attempt)

    def check_file(self, run: Run, text: str) -> Checked:
        with self._cancelled_by_close():
            return check_file(self._lean, self.backend, run, text)

    @contextlib.contextmanager
    def _cancelled_by_close(self) -> Iterator[None]:
        """What goes wrong because the pool is closed meanwhile is a cancellation."""
        try:
            yield
        except (RuntimeError, InputError) as error:
            if self._closing:
                raise CancelledError from error
            raise

    def close(self) -> None:
        """End everything; called from a finalizer too, so in any thread: it waits for none."""
        if os.getpid() == self._pid:
            self._closing = True
            self.backend.close()  # first: it ends what the threads wait for
            self.threads.shutdown(wait=False, cancel_futures=True)

    def forget(self) -> None:
        self._pid = -1


def start_backend(lean: Toolchain, *, workers: int, memory_bytes: int) -> Backend:
    """Start the processes of a toolchain."""
    if lean.kind == "repl":
        return ReplBackend(lean, workers=workers, memory_bytes=memory_bytes)
    return FileBackend(lean, workers=workers, memory_bytes=memory_bytes)


_POOLS: "weakref.WeakSet[LeanPool]" = weakref.WeakSet()


def _after_fork() -> None:
    forget_statements()
    for pool in _POOLS:
        pool._forked()


os.register_at_fork(after_in_child=_after_fork)
