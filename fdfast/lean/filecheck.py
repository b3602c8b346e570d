"""Compiling a whole Lean file and giving Lean's messages: what an agent's check tool stands on.

No verdict: whether a proof counts is `checker`'s to say.
"""

import secrets
import tempfile
from dataclasses import dataclass
from typing import Protocol

from fdfast.errors import InputError, MachineError
from fdfast.lean.backend import Backend
from fdfast.lean.folder import private_folder
from fdfast.lean.run import Run, Stop
from fdfast.lean.screen import refuse_text
from fdfast.lean.statement import complete_header, import_section
from fdfast.lean.toolchain import Toolchain
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
    """Anything that compiles the text of a file, from any thread, as `LeanPool.check_file` does.

    It raises MachineError where Lean cannot be run; what is wrong with the file is in `Checked`.
    """

    def __call__(self, text: str, timeout_s: float) -> Checked:
        """Compile `text`, for at most `timeout_s` seconds."""
        ...


def check_file(lean: Toolchain, backend: Backend, run: Run, text: str) -> Checked:
    """Compile a text; one without imports gets the default header of this Lean.

    Raises:
        MachineError: a fault of the machine, twice.
        CancelledError: the run was cancelled.
    """
    if reason := refuse_text(text):
        return Checked((Message("error", 1, 0, reason),))
    try:
        whole = complete_header(lean, text)
        lines_added = whole.count("\n") - text.count("\n") - (not text.endswith("\n"))
        header, body = _split_imports(whole)
        backend.warm_up(run, header)
        with private_folder() as folder:
            compiled = folder / f"File_{secrets.token_hex(8)}.olean"
            output = backend.attempt(run, header, body, compiled)
    except InputError as error:  # of its imports
        return Checked((Message("error", 1, 0, str(error)),))
    except Stop as stop:
        return Checked(stop.verdict.messages, stop.verdict.reason)
    except OSError as error:
        raise MachineError(
            f"lean: cannot use the folder {tempfile.gettempdir()} ({error.strerror or error});"
            " free disk space or set TMPDIR"
        ) from error
    above = header.count("\n") - lines_added
    last = max(text.count("\n") + (not text.endswith("\n")), 1)  # Lean was given one newline more
    last += text.endswith("\n")
    return Checked(
        tuple(
            Message(said.severity, min(max(above + said.line, 1), last), said.column, said.text)
            for said in output.said
        )
    )


def _split_imports(text: str) -> tuple[str, str]:
    """The lines that import, and what stands below them."""
    end = import_section(text).end
    end += len(text[end:]) - len(text[end:].lstrip(" \t"))
    end += text[end : end + 1] == "\n"
    return text[:end], text[end:]
