"""Compiling a whole Lean file and giving Lean's messages: what an agent's check tool stands on.

No verdict: whether a proof counts is `check.verify`'s to say.
"""

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fdfast.errors import InputError, MachineError
from fdfast.lean.folder import private_folder
from fdfast.lean.process import MEMORY_LIMIT_BYTES, Finished
from fdfast.lean.statement import complete_header
from fdfast.lean.toolchain import Toolchain, find_lean
from fdfast.lean.verdict import Message


@dataclass(frozen=True)
class Checked:
    """What Lean says of a file.

    Attributes:
        messages: in order; lines are the file's, from 1.
        unfinished: why Lean did not come to the end of the file; "" if it did.
    """

    messages: tuple[Message, ...]
    unfinished: str = ""


class FileCheck(Protocol):
    """Anything that compiles the text of a file, from any thread.

    It raises MachineError where Lean cannot be run; what is wrong with the file is in `Checked`.
    """

    def __call__(self, text: str, timeout_s: float) -> Checked:
        """Compile `text`, for at most `timeout_s` seconds."""
        ...


class ProcessCheck:
    """A `FileCheck` with a Lean process of its own for every file."""

    def __init__(
        self, toolchain: Toolchain | None = None, *, memory_bytes: int = MEMORY_LIMIT_BYTES
    ) -> None:
        self._lean = toolchain or find_lean()
        self._memory_bytes = memory_bytes

    def __call__(self, text: str, timeout_s: float) -> Checked:
        """See `FileCheck`. A text without imports gets the default header of this Lean."""
        try:
            whole = complete_header(self._lean, text)
        except InputError as error:
            return Checked((Message("error", 1, 0, str(error)),))
        above = whole[: len(whole) - len(text) - (not text.endswith("\n"))]
        try:
            with private_folder() as name, self._lean.start() as process:
                folder = Path(name)
                (folder / "File.lean").write_text(whole, encoding="utf-8", newline="")
                finished = process.run(
                    ["--json", "File.lean"],
                    folder=folder,
                    lean_path=self._lean.lean_path(folder),
                    deadline=time.monotonic() + timeout_s,
                    memory_bytes=self._memory_bytes,
                )
        except OSError as error:
            raise MachineError(
                f"lean: cannot use the folder of temporary files ({error.strerror or error});"
                " free disk space or set TMPDIR"
            ) from error
        messages = read_messages(finished.stdout, above.count("\n"))
        return Checked(messages, _unfinished(finished, timeout_s, self._memory_bytes))


def _unfinished(finished: Finished, timeout_s: float, memory_bytes: int) -> str:
    if finished.end == "timeout":
        return f"Lean was still busy after {timeout_s:g} s"
    if finished.end == "memory":
        return f"Lean went over its memory limit of {memory_bytes >> 20} MiB"
    if finished.status in (-signal.SIGKILL, -signal.SIGTERM):
        raise MachineError("lean: the process was killed from outside; free memory, then try again")
    if finished.status not in (0, 1):
        kind = "signal" if finished.status < 0 else "status"
        return f"Lean crashed with {kind} {abs(finished.status)}"
    return "Lean's messages are longer than 1 MiB" if finished.cut else ""


def read_messages(stdout: str, lines_above: int) -> tuple[Message, ...]:
    """Lean's JSON lines as messages, with `lines_above` taken off their line numbers."""
    found = []
    for line in stdout.split("\n"):  # splitlines() would split at U+2028 inside a message
        try:
            record = json.loads(line) if line.startswith("{") else None
        except ValueError:  # the last line may be cut
            continue
        if not isinstance(record, dict) or not isinstance(record.get("data"), str):
            continue
        place = record.get("pos")
        if not isinstance(place, dict):
            place = {}
        found.append(
            Message(
                str(record.get("severity", "information")),
                max(int(place.get("line", 0)) - lines_above, 0),
                int(place.get("column", 0)),
                record["data"],
            )
        )
    return tuple(found)
