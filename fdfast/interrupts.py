"""How work ends before it is done.

Ctrl-C and SIGTERM end a run between two changes of its state, never inside one. They strike the
main thread alone; what works beside it (`trainer.pipeline`) looks, wherever it may take long,
whether it is still wanted. (An exception raised in a thread from outside would strike between a
lock's taking and its `with` too, and does not end a wait.)
"""

import concurrent.futures
import contextlib
import signal
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ALL_COMPLETED, Future
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
# How long a wait goes on before it looks whether it is still wanted.
_PATIENCE_S = 0.1


class EndedError(KeyboardInterrupt):
    """What a thread works for has ended: it leaves its work where it is, as at Ctrl-C."""


# Of this thread; none has one of its own accord.
_ending: ContextVar[threading.Event | None] = ContextVar("_ending", default=None)


def ends_with(event: threading.Event) -> None:
    """Have this thread's work end, at the next `go_on`, once the event is set."""
    _ending.set(event)


def go_on() -> None:
    """Whether this thread's work is still wanted.

    Raises:
        EndedError: it is not.
    """
    ending = _ending.get()
    if ending is not None and ending.is_set():
        raise EndedError


def patience(seconds: float | None) -> float | None:
    """How much of a wait of so many seconds, None for no end, to wait before asking again.

    Raises:
        EndedError: this thread's work is no longer wanted.
    """
    go_on()
    if _ending.get() is None:
        return seconds
    return _PATIENCE_S if seconds is None else min(seconds, _PATIENCE_S)


def wait_for(futures: Collection[Future[Any]], *, return_when: str = ALL_COMPLETED) -> None:
    """`concurrent.futures.wait`, in any thread.

    Raises:
        EndedError: this thread's work is no longer wanted.
    """
    while True:
        done, left = concurrent.futures.wait(
            futures, timeout=patience(None), return_when=return_when
        )
        if not left or (done and return_when != ALL_COMPLETED):
            return


def result_of(future: Future[T]) -> T:
    """A future's result, waited for in any thread.

    Raises:
        EndedError: this thread's work is no longer wanted.
    """
    wait_for([future])
    return future.result()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that both save the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done, then raise KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = {s: signal.signal(s, hold) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt
