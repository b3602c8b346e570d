"""Jobs of the fork server `_child.py`: what is sent to it, and how a job ended.

A job writes its output into files of its folder, so nothing it prints can block a pipe or pass for
an answer.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fdfast._replio import Answer, Pool
from fdfast.errors import MachineError
from fdfast.lean._child import CANNOT_RUN
from fdfast.lean.run import one_line, said_on_stderr

OUTPUT_CAP_BYTES = 1 << 20
START_TIMEOUT_S = 120.0
_CHILD = Path(__file__).with_name("_child.py")
# What the server itself holds: Python, and the initialised library.
_HOLDER_BYTES = {True: 128 << 20, False: 16 << 20}


class Finished(NamedTuple):
    """How a job ended.

    Attributes:
        status: the exit status, or minus the signal that ended it.
        stdout: what it wrote, at most OUTPUT_CAP_BYTES; bytes that are no UTF-8 are replaced.
        stderr: likewise.
        cut: whether it wrote more than that.
    """

    status: int
    stdout: str
    stderr: str
    cut: bool


@dataclass(frozen=True)
class Job:
    """One run of Lean.

    Attributes:
        folder: where it runs, and where its output goes.
        arguments: Lean's.
        lean_path: LEAN_PATH.
        program: the program to run; "" for the library of the server.
        replay: a compiled file whose declarations the library's kernel shall check anew, in place
            of a run of Lean; "" otherwise.
    """

    folder: Path
    arguments: tuple[str, ...] = ()
    lean_path: str = ""
    program: str = ""
    replay: str = ""

    def command(self) -> bytes:
        """Return what the server is sent, and make the files for the output.

        They are ours to make, so that no earlier job's output is taken for this one's.

        Raises:
            OSError: `folder` cannot be written.
        """
        record: dict[str, str | list[str]] = {
            "arguments": list(self.arguments),
            "folder": str(self.folder),
            "lean_path": self.lean_path,
            "program": self.program,
            "replay": self.replay,
        }
        for name, file in self._outputs().items():
            file.write_bytes(b"")
            record[name] = str(file)
        return json.dumps(record).encode()

    def finished(self, answer: Answer) -> Finished:
        """Read how the job ended from the server's answer and the files.

        Raises:
            MachineError: the server, not the job, was killed; or the job did not reach Lean.
        """
        if answer.end != "answer":
            raise MachineError(
                "lean: the process that holds Lean was killed from outside"
                f" ({answer.end}, status {answer.status}: {said_on_stderr(answer)});"
                " free memory, then run again"
            )
        status = int(answer.json()["status"])
        outputs = [_read(file) for file in self._outputs().values()]
        cut = any(len(output) > OUTPUT_CAP_BYTES for output in outputs)
        stdout, stderr = (o[:OUTPUT_CAP_BYTES].decode(errors="replace") for o in outputs)
        if status == CANNOT_RUN:
            raise MachineError(
                f"lean: a job does not start in {self.folder} ({one_line(stderr) or 'no word'});"
                " free disk space or raise `ulimit -n`, then run `fdfast lean doctor`"
            )
        return Finished(status, stdout, stderr, cut)

    def _outputs(self) -> dict[Literal["stdout", "stderr"], Path]:
        return {"stdout": self.folder / "output.stdout", "stderr": self.folder / "output.stderr"}


def start_servers(
    library: Path | None,
    environment: Mapping[str, str],
    *,
    workers: int,
    memory_bytes: int = 0,
) -> Pool:
    """Start a pool of fork servers.

    Args:
        library: libleanshared.so, to be loaded once; None for jobs that name their program.
        environment: the jobs' environment.
        workers: how many, so how many jobs run at once.
        memory_bytes: the largest resident set of a job; 0 is no limit.
    """
    arguments = () if library is None else (str(library),)
    return Pool(
        [sys.executable, "-I", "-S", str(_CHILD), *arguments],
        workers=workers,
        env=environment,
        ready=b"ready",
        start_timeout_s=START_TIMEOUT_S,
        memory_bytes=memory_bytes and memory_bytes + _HOLDER_BYTES[library is not None],
        max_restarts=3,
    )


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(OUTPUT_CAP_BYTES + 1)
