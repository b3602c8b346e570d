"""What a backend does for a check: compile a statement, compile an attempt, audit what came of it.

`FileBackend` does it with files and one Lean process each; `repl_backend.ReplBackend` with the
REPL's environments. Both keep apart what reads the proof text and what judges.

No fault of the machine is a verdict. A process that somebody else killed, a job that does not reach
Lean, a library that is gone, a run without proof text that brings Lean down: each is tried once
more, in a new process where the old one is lost, then it is a MachineError.
"""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from fdfast.errors import InputError, MachineError
from fdfast.lean.folder import private_folder
from fdfast.lean.jobs import Finished, Job, start_servers
from fdfast.lean.run import PROOF, Run, Stage, Stop, one_line
from fdfast.lean.statement import imports_of
from fdfast.lean.toolchain import Toolchain

# The signals by which a program can end through what it does itself; any other came from outside.
OWN_SIGNALS = {
    *(signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),
    *(signal.SIGTRAP, signal.SIGSYS, signal.SIGXFSZ),
}
_WARM_UP_S = 600.0
_WARM: set[tuple[Toolchain, str]] = set()
_Result = TypeVar("_Result")


class Said(NamedTuple):
    """One message of Lean, with its place in the text that the backend was given."""

    severity: str
    line: int
    column: int
    text: str


@dataclass(frozen=True)
class Output:
    """What Lean said of a text, and whether it refused it."""

    failed: bool
    said: tuple[Said, ...]

    def first_error(self) -> str:
        """The text of the first error, "" if there is none."""
        return next((said.text for said in self.said if said.severity == "error"), "")

    def at(self, line: int) -> list[str]:
        """The messages that begin in this line."""
        return [said.text for said in self.said if said.line == line]


class Backend(Protocol):
    """One way to run Lean; every method may be called from many threads at once.

    All raise `Stop` with a verdict, `MachineError` after a second try, `OSError` for a folder that
    cannot be written, and `CancelledError`.
    """

    # What the audit must put before the theorem's name.
    root: str

    def warm_up(self, run: Run, header: str) -> None:
        """Have read from disk what a check with this header needs, before any clock runs.

        Raises:
            InputError: what the header imports is not there.
        """

    def statement(self, run: Run, header: str, text: str, compiled: Path | None = None) -> Output:
        """Compile text that holds no proof, into the file `compiled` if it is given.

        Only a backend whose `root` is empty is asked for the file.
        """

    def attempt(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        """Compile text that holds the proof, into the file `compiled`."""

    def audit(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        """Run commands over what `attempt` compiled, in a process that never held a proof."""

    def replay(self, run: Run, compiled: Path) -> None:
        """Have the kernel check anew what `attempt` compiled; Stop where it refuses."""

    def pids(self) -> list[int]:
        """The living workers."""

    def stats(self) -> dict[str, int]:
        """The sums of `Pool.stats` over all pools."""

    def close(self) -> None:
        """End every process."""


def twice(work: Callable[[], _Result]) -> _Result:
    """Do what a fault of the machine may have spoilt once more."""
    try:
        return work()
    except MachineError:
        return work()


class FileBackend:
    """The embedded Lean, or a project's `lean`: each text is a file and a run of its own."""

    root = ""

    def __init__(self, lean: Toolchain, *, workers: int, memory_bytes: int) -> None:
        self._lean = lean
        self._program = "" if lean.kind == "embedded" else str(lean.origin)
        self._pool = start_servers(
            lean.origin if lean.kind == "embedded" else None,
            dict(lean.environment),
            workers=workers,
            memory_bytes=memory_bytes,
        )

    def warm_up(self, run: Run, header: str) -> None:
        """Check a theorem of ours, lest a proof's time go into reading hundreds of MB from disk."""
        imports = imports_of(header)
        if (self._lean, imports) in _WARM:
            return
        text = f"{imports}theorem t (a : Prop) (h : a) : a := h\n"
        with private_folder() as folder:
            output = self._compile(run, "the statement", text, folder, "Warm", _WARM_UP_S)
        if output.failed:
            said = one_line(output.first_error())
            if self._lean.folder is not None and imports.strip() not in ("", "prelude"):
                raise InputError(
                    f"header: {self._lean.folder} cannot import what it asks for ({said});"
                    " `lake build` there, or change the header"
                )
            raise MachineError(
                f"lean: Lean does not prove a theorem of ours ({said}); run `fdfast lean doctor`"
            )
        _WARM.add((self._lean, imports))

    def statement(self, run: Run, header: str, text: str, compiled: Path | None = None) -> Output:
        """Compile the header and the text, in a folder of their own if no file is named."""
        stage: Stage = "the statement"
        if compiled is None:
            with private_folder() as folder:
                output = self._compile(run, stage, header + text, folder, "Statement")
        else:
            folder, module = compiled.parent, compiled.stem
            output = self._compile(run, stage, header + text, folder, module, keep=True)
        if _above(output, header):
            self._try_again_without_proof(run, header)
        return _below(output, header)

    def attempt(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        """Compile the header and the text into an .olean."""
        module, folder = compiled.stem, compiled.parent
        try:
            output = self._compile(run, PROOF, header + text, folder, module, keep=True)
        except Stop as stop:
            if stop.verdict.kind == "crashed":
                self._try_again_without_proof(run, header)
            raise
        if _above(output, header):
            self._try_again_without_proof(run, header)
        return _below(output, header)

    def _try_again_without_proof(self, run: Run, header: str) -> None:
        """Raise MachineError where Lean, with the same imports, fails without the proof too."""
        _WARM.discard((self._lean, imports_of(header)))
        self.warm_up(run, header)

    def audit(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        """Import the .olean, and nothing of the header, which it holds."""
        first = "prelude\n" if imports_of(header).startswith("prelude\n") else ""
        above = f"{first}import {compiled.stem}\n"
        output = self._compile(run, "the audit", above + text, compiled.parent, "Audit")
        if wrong := _above(output, above):
            raise MachineError(
                f"lean: the audit cannot import {compiled} ({one_line(wrong)}); set TMPDIR"
            )
        return _below(output, above)

    def replay(self, run: Run, compiled: Path) -> None:
        """Run `leanchecker` over the .olean, or the embedded library's own replay."""
        folder = compiled.parent
        path = self._lean.lean_path(folder)
        if self._lean.leanchecker is None:
            job = Job(folder, lean_path=path, replay=str(compiled))
        else:
            job = Job(folder, (compiled.stem,), path, str(self._lean.leanchecker))
        finished = twice(lambda: self._run(run, "the replay", job))
        if finished.status:
            if not compiled.is_file():
                raise MachineError(f"lean: {folder} was emptied during a check; set TMPDIR")
            said = one_line(finished.stderr or finished.stdout) or "no word"
            raise Stop("rejected", f"the kernel refuses the compiled proof: {said}", level=2)

    def pids(self) -> list[int]:
        """The fork servers."""
        return self._pool.pids()

    def stats(self) -> dict[str, int]:
        """See `Pool.stats`."""
        return self._pool.stats()

    def close(self) -> None:
        """End every process."""
        self._pool.close()

    def _compile(
        self,
        run: Run,
        stage: Stage,
        text: str,
        folder: Path,
        module: str,
        timeout_s: float | None = None,
        keep: bool = False,
    ) -> Output:
        """Run Lean on a file of this name; what is not to be kept is only read."""
        (folder / f"{module}.lean").write_text(text, encoding="utf-8", newline="")
        into = ("-o", f"{module}.olean") if keep else ()
        arguments = ("--json", *into, f"{module}.lean")
        job = Job(folder, arguments, self._lean.lean_path(folder), self._program)
        return twice(lambda: self._output(self._run(run, stage, job, timeout_s), stage, folder))

    def _run(self, run: Run, stage: Stage, job: Job, timeout_s: float | None = None) -> Finished:
        answer = run.ask(self._pool, [job.command()], stage, timeout_s=timeout_s)[0]
        finished = job.finished(answer)
        if finished.status in (0, 1):
            return finished
        _probe_disk(job.folder)
        said = one_line(finished.stderr) or "no word on stderr"
        kind = "signal" if finished.status < 0 else "status"
        reason = f"Lean ended with {kind} {abs(finished.status)} ({stage}): {said}"
        if stage == PROOF and (finished.status > 0 or -finished.status in OWN_SIGNALS):
            raise Stop("crashed", reason)
        raise MachineError(f"lean: {reason}; free memory, then run `fdfast lean doctor`")

    def _output(self, finished: Finished, stage: Stage, folder: Path) -> Output:
        """Lean's JSON lines; a status of 1 without an error among them is a crash."""
        # Not splitlines(): Lean prints U+2028 and the like as they are, inside a JSON string.
        lines = finished.stdout.split("\n")
        said = [record for line in lines if (record := _record(line)) is not None]
        output = Output(finished.status != 0, tuple(said))
        if finished.status == 0 or output.first_error():
            if finished.status:
                self._require_library()
            return output
        if finished.cut:
            said.append(Said("error", 0, 0, "Lean's messages are longer than 1 MiB"))
            return Output(True, tuple(said))
        _probe_disk(folder)
        words = one_line(finished.stderr) or "no word on stderr"
        reason = f"Lean ended with status 1 ({stage}): {words}"
        if stage == PROOF:
            raise Stop("crashed", reason)
        raise MachineError(f"lean: {reason}; free memory, then run `fdfast lean doctor`")

    def _require_library(self) -> None:
        """Raise MachineError if a module that a header may import is gone."""
        for module in sorted(self._lean.modules or ()):
            files = [folder / f"{module}.olean" for folder in self._lean.library_dirs]
            if not any(file.is_file() for file in files):
                raise MachineError(
                    f"lean: the compiled base library {files[0]} is gone;"
                    " run again, which compiles it anew"
                )


def _above(output: Output, above: str) -> str:
    """The first error in the lines of `above`, "" if there is none."""
    errors = (said for said in output.said if said.severity == "error")
    return next((said.text for said in errors if said.line <= above.count("\n")), "")


def _below(output: Output, above: str) -> Output:
    """The output with its places counted from the text below `above`."""
    lines = above.count("\n")
    said = (s._replace(line=max(s.line - lines, 0)) for s in output.said)
    return Output(output.failed, tuple(said))


def _probe_disk(folder: Path) -> None:
    """Write a megabyte, lest a full disk pass for a proof that crashes Lean.

    The OSError of a full disk becomes a MachineError.
    """
    probe = folder / "probe"
    probe.write_bytes(b"\1" * (1 << 20))
    probe.unlink()


def _record(line: str) -> Said | None:
    """One of Lean's JSON lines, or None for anything else on its output."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:  # the output cap may cut the last line
        return None
    if not isinstance(record, dict) or not isinstance(record.get("data"), str):
        return None
    place = record.get("pos")
    place = place if isinstance(place, dict) else {}
    severity = str(record.get("severity", "information"))
    return Said(severity, int(place.get("line", 0)), int(place.get("column", 0)), record["data"])
