"""A running Lean: started once, it forks for every job.

Each job has a session of its own, a deadline and a memory limit.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from fdfast.errors import MachineError
from fdfast.lean._child import CANNOT_RUN

OUTPUT_CAP_BYTES = 1 << 20
MEMORY_LIMIT_BYTES = 2 << 30
_START_TIMEOUT_S = 120.0
_POLL_S = 0.02  # between two looks at memory and cancellation; the end of a job wakes us earlier
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

End = Literal["exit", "timeout", "memory", "cancelled"]


@dataclass(frozen=True)
class Finished:
    """How a job ended.

    Attributes:
        end: `exit` (by itself; see `status`), `timeout`, `memory` (over the limit) or `cancelled`.
        status: the exit status, or minus the signal that ended it.
        stdout: what it wrote, at most OUTPUT_CAP_BYTES; bytes that are no UTF-8 are replaced.
        stderr: likewise.
        cut: whether it wrote more than that.
    """

    end: End
    status: int
    stdout: str
    stderr: str
    cut: bool


class LeanProcess:
    """One Lean that runs one job at a time; a context manager.

    It belongs to the thread that starts it: when that thread ends, the kernel kills the process. A
    job writes its output into files of its folder, so nothing it prints can block it or us. The
    pipe on which we hear how the job ended is closed in the job before Lean sees the proof.
    """

    def __init__(self, program: Sequence[str]) -> None:
        """Start the process; `program` is the command line, without our process id.

        Raises:
            MachineError: it cannot be started, or says that Lean cannot be loaded.
        """
        self._buffer = b""
        with tempfile.TemporaryFile() as stderr:
            try:
                self._process = subprocess.Popen(
                    [*program, str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8"},
                    start_new_session=True,
                )
            except OSError as error:
                raise MachineError(
                    f"lean: cannot start a process ({error}); free memory or raise `ulimit -u`,"
                    " then run `fdfast lean doctor`"
                ) from error
            try:
                if self._next_line(time.monotonic() + _START_TIMEOUT_S) != "ready":
                    raise MachineError(_cannot_load(stderr))
            except BaseException:  # KeyboardInterrupt too: nobody else could end the process
                self.close()
                raise

    def run(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        lean_path: str = "",
        deadline: float,
        memory_bytes: int = MEMORY_LIMIT_BYTES,
        cancel: threading.Event | None = None,
    ) -> Finished:
        """Run Lean with these arguments in `folder`, to its end or to `deadline` (of
        `time.monotonic()`).

        Raises:
            MachineError: this process, not the job, was killed from outside; or the job did not get
                as far as Lean.
            OSError: `folder` cannot be written.
        """
        files = [folder / f"output.{name}" for name in ("stdout", "stderr")]
        job = {
            "arguments": list(arguments),
            "folder": str(folder),
            "lean_path": lean_path,
            "stdout": str(files[0]),
            "stderr": str(files[1]),
        }
        for file in files:  # ours to make, so that no earlier job's output is taken for this one's
            file.write_bytes(b"")
        try:
            self._send(json.dumps(job) + "\n")
            pid = self._answer("pid", time.monotonic() + _START_TIMEOUT_S)
            end = self._watch(pid, deadline, memory_bytes, cancel)
            self._kill_job(pid)  # also after its own end: it may have left children
            status = self._answer("end", time.monotonic() + _START_TIMEOUT_S)
            self._send("\n")
        except (
            BaseException
        ):  # above all KeyboardInterrupt: the job must not go on; it dies with its parent
            self.close()
            raise
        outputs = [_read(file) for file in files]
        cut = any(len(output) > OUTPUT_CAP_BYTES for output in outputs)
        stdout, stderr = (o[:OUTPUT_CAP_BYTES].decode(errors="replace") for o in outputs)
        if (end, status) == ("exit", CANNOT_RUN):
            raise MachineError(
                f"lean: a job does not start in {folder} ({stderr.strip()[:300] or 'no word'});"
                " free disk space or raise `ulimit -n`, then run `fdfast lean doctor`"
            )
        return Finished(end, status, stdout, stderr, cut)

    def close(self) -> None:
        """Kill the process and its job."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(
                self._process.pid, signal.SIGKILL
            )  # the job gets its parent's death as SIGKILL
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    @property
    def usable(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _watch(
        self, pid: int, deadline: float, memory_bytes: int, cancel: threading.Event | None
    ) -> End:
        """Wait until the job ends or must be ended."""
        while True:
            # Before the first wait too: a short job would be over before anybody looked.
            if _resident_bytes(pid) > memory_bytes:
                return "memory"
            remaining = deadline - time.monotonic()
            if self._wait(min(_POLL_S, max(remaining, 0.0))):
                return "exit"
            if cancel is not None and cancel.is_set():
                return "cancelled"
            if remaining <= 0:
                return "timeout"

    def _kill_job(self, pid: int) -> None:
        """Kill the job's group, and the job itself in case it has no group of its own yet."""
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)

    def _send(self, text: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error

    def _answer(self, word: str, deadline: float) -> int:
        """The number in the next line, which begins with `word`."""
        found, _, number = self._next_line(deadline).partition(" ")
        if found != word:
            raise self._died()
        return int(number)

    def _died(self) -> MachineError:
        return MachineError(
            "lean: the process that holds Lean was killed from outside; free memory, then run again"
        )

    def _next_line(self, deadline: float) -> str:
        """The next line of the process, "" at its end or at the deadline."""
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or (self._wait(remaining) and not self._fill()):
                return ""
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def _wait(self, seconds: float) -> bool:
        """Whether there is something to read within this time."""
        assert self._process.stdout is not None
        if self._buffer:
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def _fill(self) -> bool:
        assert self._process.stdout is not None
        chunk = os.read(self._process.stdout.fileno(), 1 << 12)
        self._buffer += chunk
        return bool(chunk)


def _cannot_load(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    said = stderr.read(300).decode(errors="replace").strip() or "it does not start"
    return (
        f"lean: Lean's library cannot be loaded ({said}); it needs Linux x86-64 with glibc >= 2.35:"
        " `pip install --force-reinstall 'fdfast[lean]'`, then `fdfast lean doctor`"
    )


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(OUTPUT_CAP_BYTES + 1)


def _resident_bytes(pid: int) -> int:
    """A process's resident set, 0 once it has ended.

    RLIMIT_AS is no use: Lean reserves gigabytes of address space for stacks.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
