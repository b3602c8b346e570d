"""A pool of worker processes behind one epoll loop, built from csrc/replio/.

A worker is any program that reads commands on stdin and answers on stdout. Bytes go in and come out
as they are; an answer stays in C++ memory until it is asked for. All times are in seconds on a
monotonic clock, all sizes in bytes. Every method may be called from any thread; none holds the GIL
while it waits, and Ctrl-C interrupts a wait of the main thread.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

Mode = Literal["repl", "once"]
End = Literal[
    "answer",
    "timeout",
    "memory",
    "crashed",
    "cancelled",
    "header",
    "overflow",
    "forged",
    "unavailable",
]

class Answer:
    """How a command ended and what its worker said; the buffer protocol gives `raw` uncopied.

    Attributes:
        ticket: of the command, from `Pool.submit`.
        end: `answer`; or `timeout`, `memory`, `overflow` (the worker was killed for its time, its
            memory or the length of its answer), `crashed` (it ended during the command; in mode
            "once": by a signal), `forged` (the probe's answer lacked the secret), `header` (the
            header gave no environment; `raw` is its answer), `unavailable` (no worker can be
            started; `stderr` says why) or `cancelled`.
        status: exit status of the worker, or minus the signal, where it ended with this command;
            None where it lives on, or where somebody else has reaped it.
        seconds: from the command's first byte to its answer, without the probe.
        queued_s: from `submit` to the command's first byte.
        pid: of the worker; 0 where there was none.
        shared: whether the answer is that of another ticket with the same command.
        raw: what the worker printed, without the blank line. Where `end` is not `answer`: as far
            as it had come; of `forged`, the frame that claims to be the answer.
        stderr: the tail of what it said there since its last answer.
    """

    @property
    def ticket(self) -> int: ...
    @property
    def end(self) -> End: ...
    @property
    def status(self) -> int | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def queued_s(self) -> float: ...
    @property
    def pid(self) -> int: ...
    @property
    def shared(self) -> bool: ...
    @property
    def raw(self) -> bytes: ...
    @property
    def stderr(self) -> bytes: ...
    def json(self) -> Any:
        """`raw` as `json.loads` gives it; parsed at the first call, then the same object.

        Raises:
            ValueError: it is no JSON or no UTF-8, or it is nested deeper than 512; the message
                gives the byte offset and an excerpt.
        """

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Pool:
    """Workers that run commands; a context manager.

    Each ticket is answered exactly once, whatever happens to the workers. A command that its worker
    dies under is not tried again; one that a dead worker had not begun to read is. Workers are
    started when a command needs them. Each has a process group of its own, is killed with all that
    it started, and dies with this process. In a child made by fork() every method raises
    RuntimeError.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        mode: Mode = "repl",
        workers: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        timeout_s: float = 60.0,
        start_timeout_s: float = 120.0,
        ready: bytes = b"",
        memory_bytes: int = 0,
        recycle_bytes: int = 0,
        recycle_after: int = 0,
        poll_s: float = 0.02,
        answer_bytes: int = 256 << 20,
        stderr_bytes: int = 64 << 10,
        queue_bytes: int = 256 << 20,
        depth: int = 1,
        cache_bytes: int = 0,
        probe: bytes = b"",
        max_restarts: int = 5,
    ) -> None:
        """Make the pool; no process is started yet.

        Args:
            argv: the worker's program (looked up in PATH) and its arguments.
            mode: "repl": a worker lives, a command is written as its bytes and a blank line, and
                its answer is all up to the next blank line. "once": each command has a process, its
                bytes are the input, its answer is all of stdout at the process's end.
            workers: processes at once.
            env: the workers' whole environment; None: ours, as it is now.
            cwd: the workers' folder; "": ours.
            timeout_s: of a command, from its first byte on.
            start_timeout_s: of a header command, and of a fresh worker's `ready` line.
            ready: a line that a fresh worker prints before it takes commands; b"": none.
            memory_bytes: resident set of a worker and its descendants (pages that they share count
                for each), looked at every `poll_s` while it works; over it the worker is killed.
                0: no limit.
            recycle_bytes: a worker with more than this after an answer is replaced. 0: never.
            recycle_after: likewise after so many commands. 0: never.
            poll_s: between two looks at a worker's memory, at least 0.001.
            answer_bytes: a worker that prints more for one answer is killed.
            stderr_bytes: how much of the tail of stderr an answer keeps.
            queue_bytes: `submit` waits while commands and unfetched answers would hold more; and no
                command is begun while unfetched answers alone do, unless a thread is in `wait`.
            depth: commands in a worker's pipe at once.
            cache_bytes: of commands and answers kept for identical commands under the same header.
                0: only identical commands in flight are answered once.
            probe: a command that follows each answer with %s replaced by a fresh secret of 128
                bits; where the next frame lacks the secret, the answer is `forged` and the worker
                is replaced. Needs depth 1. b"": frames that nobody asked for are seen only when the
                worker has nothing to do, and it is replaced.
            max_restarts: starts in a row that fail (the program can't be run, `ready` does not
                come, or it ends before it reads a command) until all that is queued ends as
                `unavailable`; between them 0.05 s, doubling up to 2 s.

        Raises:
            InputError: an argument breaks its rule.
            MachineError: no thread or descriptor is left.
        """

    def submit(
        self,
        commands: Sequence[bytes],
        *,
        header: bytes = b"",
        timeout_s: float | None = None,
        unique: bool = False,
        chain: bool = False,
        block: bool = True,
    ) -> list[int]:
        """Queue commands and give their tickets, consecutive numbers from 0 on.

        Args:
            commands: each without a blank line and a newline at its ends (mode "repl").
            header: Lean source (`import Mathlib\nopen Nat`) in whose environment the commands are
                run (mode "repl"): a worker that does not hold it is first sent {"cmd": header}, and
                its `env` becomes the first field of each command, which must be a JSON object.
            timeout_s: of each of these, instead of the pool's.
            unique: never answered from another ticket's answer: for commands with effects.
            chain: the commands go to one worker, one after another and nothing between; the `env`
                of each answer becomes the first field of the next command, a JSON object. After one
                that gave no env the rest end as `header`, after a cancelled one as `cancelled`.
                Implies `unique`.
            block: wait for room under `queue_bytes`; else raise.

        Raises:
            InputError: a command breaks the framing, or the pool is closed.
            BlockingIOError: no room, and `block` is false. Nothing was queued.
        """

    def next(self, timeout_s: float | None = None) -> Answer | None:
        """The answer that was finished first of those that nobody has fetched.

        None at the timeout, or when no ticket is outstanding.
        """

    def wait(self, ticket: int, timeout_s: float | None = None) -> Answer | None:
        """The answer of this ticket; meanwhile `next` and `ready` do not give it to others.

        None at the timeout, or when it has been fetched.

        Raises:
            InputError: `submit` never gave this ticket.
        """

    def ready(self) -> list[Answer]:
        """All answers that can be fetched now, in order of completion."""

    def fileno(self) -> int:
        """An eventfd that is readable while `ready` would give something, for event loops."""

    def cancel(self, tickets: Sequence[int]) -> int:
        """End tickets as `cancelled`, and say how many of them were not answered yet.

        A command that was queued is dropped, the worker of a running one is killed, unless other
        tickets share the command.
        """

    def stats(self) -> dict[str, int]:
        """Counts since the start, and the pool's state now.

        submitted, answered, shared: tickets. queued, running: commands. unfetched: answers.
        held_bytes: of commands and unfetched answers. starts, restarts, failed_starts, recycled:
        workers. requeued: commands that a worker died before reading. headers: header commands
        sent. crashed, forged, killed_timeout, killed_memory, killed_overflow, killed_cancelled:
        commands by how they ended. unsolicited: workers replaced because they printed unasked.
        workers_alive; rss_bytes: of those and their descendants.
        """

    def pids(self) -> list[int]:
        """The living workers' process ids."""

    def close(self) -> None:
        """Kill all workers and reap them; idempotent.

        Outstanding tickets end as `cancelled`; answers can still be fetched.
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
