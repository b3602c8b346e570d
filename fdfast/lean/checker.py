"""How one proof is checked, so that the verdict `proved` means what it says.

Three walls, each of which would do against most cheating:

1. `screen`: the proof text may hold one term. Words that begin a command, options, holes and
   attributes are refused.
2. **Attempt.** Lean compiles a file that we write: header, statement, proof. Nothing follows the
   proof, so there is nothing for an unclosed comment or string to swallow. Any error ends the
   check. This is the only process that reads the proof text; from what it prints we take the
   wording of a failure and nothing else.
3. **Audit.** A fresh Lean imports the compiled theorem and prints its full type and its axioms. No
   text of the proof is in that process, so nothing in the proof can print into its answer. The type
   must be, to the letter and with every implicit argument and universe shown, the type that the
   statement has in a third file, compiled without the proof (and kept for the next attempts at it).
   The axioms must be in the toolchain's allow-list, which is empty for the base library.

Why a comparison of printed types and not a re-statement in the audit's file: a header may define
things, and then the compiled theorem cannot be imported next to the header itself.

The kernel has checked the term in step 2; the options that would keep it from that are refused in
step 1, in headers too. What a *header* defines is the caller's word: it is screened for
metaprograms, not judged.

No fault of the machine is a verdict. A process or job that somebody else killed, a job that does
not reach Lean, a library that is gone, a run without proof text that brings Lean down: each is
tried once more in a new process, then it is a MachineError. The clock runs only while Lean works on
the check; loading Lean, and a run that was lost, are not counted.
"""

import json
import re
import secrets
import signal
import tempfile
import threading
import time
from pathlib import Path

from fdfast.errors import MachineError
from fdfast.lean.folder import private_folder
from fdfast.lean.process import Finished, LeanProcess
from fdfast.lean.screen import refuse_context, refuse_proof, refuse_text
from fdfast.lean.statement import complete_header, parse_statement
from fdfast.lean.toolchain import Toolchain
from fdfast.lean.verdict import Kind, Message, Verdict

Record = dict[str, object]

_PRINTED_NAME = re.compile(r"@?(?P<name>[^\s:{]+?)(?:\.\{[^}]*\})? : ")
_AXIOMS = re.compile(r"'.*' depends on axioms: \[(?P<axioms>[^\]]*)\]\Z", re.DOTALL)
# With these a printed type is complete: nothing is abbreviated, left out or in somebody's notation.
_PRINT_ALL = "".join(
    f"set_option {option}\n"
    for option in ("pp.all true", "pp.deepTerms true", "pp.maxSteps 100000000", "pp.oneline false")
)
_MAX_STATEMENT_TYPES = 4096
_STATEMENT_TYPES: dict[tuple[Toolchain, str, str], str] = {}
_PROOF = "the proof"  # the one stage that reads the proof text
# The signals by which a program can end through what it does itself; any other came from outside.
_OWN_SIGNALS = {
    *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),
    *(signal.SIGTRAP, signal.SIGSYS, signal.SIGXFSZ),
}
_WARM_UP_S = 120.0
_WARM: set[Toolchain] = set()


class _Stop(Exception):  # noqa: N818 - it carries a verdict out of nested calls, it is no error
    """The check is over with this verdict."""

    def __init__(self, kind: Kind, reason: str, messages: tuple[Message, ...] = ()) -> None:
        super().__init__(reason)
        self.verdict = Verdict(kind, messages, reason)


class Checker:
    """The checks of one thread: it holds one Lean process and starts another when that is lost."""

    def __init__(
        self,
        lean: Toolchain,
        *,
        timeout_s: float,
        memory_bytes: int,
        cancel: threading.Event | None = None,
    ) -> None:
        self._lean = lean
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._cancel = cancel
        self._left_s = 0.0
        self._process: LeanProcess | None = None

    def close(self) -> None:
        """End the Lean process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def verify(self, formal_statement: str, proof: str, header: str) -> Verdict:
        """Run the three walls in order."""
        self._left_s = self._timeout_s
        statement, name = parse_statement(formal_statement)
        header = complete_header(self._lean, header)
        reason = refuse_text(statement) or refuse_context(header) or refuse_proof(proof)
        if reason:
            return Verdict("rejected", reason=reason)
        try:
            with private_folder() as folder:
                printed = self._statement_type(header, statement, name)
                module, messages = self._attempt(Path(folder), header, statement, proof)
                self._audit(Path(folder), module, printed)
            return Verdict("proved", messages)
        except _Stop as stop:
            return stop.verdict
        except OSError as error:
            raise MachineError(
                f"lean: cannot use the folder {tempfile.gettempdir()} ({error.strerror or error});"
                " free disk space or set TMPDIR"
            ) from error

    def _statement_type(self, header: str, statement: str, name: str) -> str:
        """The statement's type as Lean prints it with a hole for the proof."""
        key = (self._lean, header, statement)
        if (known := _STATEMENT_TYPES.get(key)) is not None:
            return known
        text = f"{header}{statement}\nsorry\n{_PRINT_ALL}"
        with private_folder() as folder:
            _write(Path(folder) / "Statement.lean", f"{text}#check @{name}\n")
            finished, records = self._run(Path(folder), "the statement", "Statement.lean")
        if finished.status != 0:
            said = _one_line(_first_error(records))
            raise _Stop("rejected", f"the statement does not elaborate: {said}")
        line = text.count("\n") + 1
        printed = [str(record["data"]) for record in records if _place(record)[0] == line]
        if len(printed) != 1 or _PRINTED_NAME.match(printed[0]) is None:
            raise _Stop("rejected", "the statement does not declare a theorem of its name")
        if len(_STATEMENT_TYPES) >= _MAX_STATEMENT_TYPES:
            _STATEMENT_TYPES.clear()
        return _STATEMENT_TYPES.setdefault(key, printed[0])

    def _attempt(
        self, folder: Path, header: str, statement: str, proof: str
    ) -> tuple[str, tuple[Message, ...]]:
        """Compile statement and proof; return the module's name and what Lean said of the proof."""
        module = f"Attempt_{secrets.token_hex(8)}"
        above = f"{header}{statement}\n"
        _write(folder / f"{module}.lean", f"{above}{proof}\n")
        arguments = ("-o", f"{module}.olean", f"{module}.lean")
        finished, records = self._run(folder, _PROOF, *arguments)
        messages = tuple(_message(record, above.count("\n")) for record in records)
        if finished.status != 0:
            error = next(message for message in messages if message.severity == "error")
            reason = f"{error.line}:{error.column}: {_one_line(error.text)}"
            raise _Stop("failed", reason, messages)
        return module, messages

    def _audit(self, folder: Path, module: str, printed: str) -> None:
        """Judge type and axioms of the compiled theorem, in a process without the proof text."""
        match = _PRINTED_NAME.match(printed)
        assert match is not None
        name = match["name"]
        prelude = "prelude\n" if self._lean.kind == "embedded" else ""
        # The axioms first: with the options set, their names would carry universes.
        axioms = f"{prelude}import {module}\n#print axioms {name}\n"
        text = f"{axioms}{_PRINT_ALL}#check @{name}\n"
        _write(folder / "Audit.lean", text)
        finished, records = self._run(folder, "the audit", "Audit.lean")
        if finished.status != 0 and not (folder / f"{module}.olean").is_file():
            raise MachineError(f"lean: {folder} was emptied during a check; set TMPDIR")
        said = {_place(record)[0]: str(record["data"]) for record in records}
        if finished.status != 0 or said.get(text.count("\n")) != printed:
            raise _Stop("rejected", "the proof changes what the statement says")
        answer = said.get(axioms.count("\n"), "")
        if answer == f"'{name}' does not depend on any axioms":
            return
        if (found := _AXIOMS.fullmatch(answer)) is None:
            raise _Stop("rejected", "Lean does not tell the axioms of the proof")
        used = {axiom.strip() for axiom in found["axioms"].split(",")}
        if "sorryAx" in used:
            raise _Stop("rejected", "sorry")
        if refused := sorted(used - self._lean.allowed_axioms):
            raise _Stop("rejected", f"the proof uses the axiom {', '.join(refused)}")

    def _run(self, folder: Path, stage: str, *arguments: str) -> tuple[Finished, list[Record]]:
        """Run Lean in `folder`; unless it ends by itself with status 0 or 1, the check is over.

        Raises:
            MachineError: a fault of the machine, twice.
        """
        try:
            return self._run_once(folder, stage, *arguments)
        except MachineError:
            self.close()
            return self._run_once(folder, stage, *arguments)

    def _run_once(self, folder: Path, stage: str, *arguments: str) -> tuple[Finished, list[Record]]:
        process = self._ready()
        began = time.monotonic()
        finished = process.run(
            ["--json", *arguments],
            folder=folder,
            lean_path=self._lean.lean_path(folder),
            deadline=began + self._left_s,
            memory_bytes=self._memory_bytes,
            cancel=self._cancel,
        )
        if finished.end == "timeout":
            raise _Stop("timeout", f"Lean was still busy after {self._timeout_s:g} s ({stage})")
        if finished.end == "cancelled":
            raise _Stop("timeout", "cancelled")
        if finished.end == "memory":
            limit = f"{self._memory_bytes / 2**20:.0f} MiB"
            reason = f"Lean went over its memory limit of {limit} ({stage})"
            if stage == _PROOF:
                raise _Stop("crashed", reason)
            raise MachineError(f"lean: {reason}, without any proof; raise memory_bytes")
        # Not splitlines(): Lean prints U+2028 and the like as they are, inside a JSON string.
        lines = finished.stdout.split("\n")
        records = [record for line in lines if (record := _record(line)) is not None]
        if finished.cut and not _first_error(records):
            records.append({"severity": "error", "data": "Lean's messages are longer than 1 MiB"})
        if finished.status == 0 or (finished.status == 1 and _first_error(records)):
            if finished.status == 1:
                self._require_library()
            self._left_s -= time.monotonic() - began
            return finished, records
        _probe_disk(folder)
        said = _one_line(finished.stderr) or "no word on stderr"
        kind = "signal" if finished.status < 0 else "status"
        reason = f"Lean ended with {kind} {abs(finished.status)} ({stage}): {said}"
        if stage == _PROOF and (finished.status > 0 or -finished.status in _OWN_SIGNALS):
            raise _Stop("crashed", reason)
        raise MachineError(f"lean: {reason}; free memory, then run `fdfast lean doctor`")

    def _ready(self) -> LeanProcess:
        """The Lean process, loaded.

        The first one of a program also does a little work, lest a proof's time go into reading the
        rest of Lean's 230 MB from disk.
        """
        if self._process is not None and self._process.usable:
            return self._process
        self.close()
        self._process = process = self._lean.start()
        if self._lean in _WARM:
            return process
        with private_folder() as folder:
            text = f"{self._lean.default_header}theorem t (a : Prop) (h : a) : a := h\n"
            _write(Path(folder) / "Warm.lean", text)
            finished = process.run(
                ["--json", "Warm.lean"],
                folder=Path(folder),
                lean_path=self._lean.lean_path(),
                deadline=time.monotonic() + _WARM_UP_S,
                cancel=self._cancel,
            )
        if finished.end == "cancelled":
            raise _Stop("timeout", "cancelled")
        if (finished.end, finished.status) != ("exit", 0):
            self._require_library()
            said = _one_line(finished.stderr or finished.stdout) or "no word"
            raise MachineError(
                f"lean: Lean does not prove a theorem of ours ({finished.end},"
                f" status {finished.status}: {said}); run `fdfast lean doctor`"
            )
        _WARM.add(self._lean)
        return process

    def _require_library(self) -> None:
        """Raise MachineError if a module that a header may import is gone."""
        for module in sorted(self._lean.modules or ()):
            files = [folder / f"{module}.olean" for folder in self._lean.library_dirs]
            if not any(file.is_file() for file in files):
                raise MachineError(
                    f"lean: the compiled base library {files[0]} is gone;"
                    " run again, which compiles it anew"
                )


def _probe_disk(folder: Path) -> None:
    """Write a megabyte, lest a full disk pass for a proof that crashes Lean.

    The OSError of a full disk becomes a MachineError.
    """
    probe = folder / "probe"
    probe.write_bytes(b"\1" * (1 << 20))
    probe.unlink()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _one_line(text: str) -> str:
    return " ".join(text[:2000].split())[:240]


def _record(line: str) -> Record | None:
    """One of Lean's JSON lines, or None for anything else on its output."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # the output cap may cut the last line
        return None
    return record if isinstance(record, dict) and isinstance(record.get("data"), str) else None


def _first_error(records: list[Record]) -> str:
    """The text of the first error, "" if there is none."""
    return next((str(r["data"]) for r in records if r.get("severity") == "error"), "")


def _place(record: Record) -> tuple[int, int]:
    """Line and column of a record in its file, (0, 0) if it has none."""
    place = record.get("pos")
    if not isinstance(place, dict):
        return 0, 0
    return int(place.get("line", 0)), int(place.get("column", 0))


def _message(record: Record, lines_above: int) -> Message:
    """A record as a message with its place in the proof text."""
    line, column = _place(record)
    severity = str(record.get("severity", "information"))
    return Message(severity, max(line - lines_above, 0), column, str(record["data"]))
