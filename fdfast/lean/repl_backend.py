"""The backend over leanprover-community/repl: imports stay warm, and two pools keep apart what
reads proofs and what judges them.

An attempt runs in a worker of the first pool, which then pickles the environment it reached. The
audit opens the pickle in a worker of the second pool, which never is sent a proof, and asks there
for type and axioms. So a frame that the code under check prints can end that check, and the probe
after each answer finds it; it cannot become a verdict.

Opening a pickle checks it: the REPL re-adds every declaration in it through the kernel, and ends
with `(kernel)` on stderr where that refuses. So says its source; it was not run against its binary
here, but against a stand-in for it that has the embedded Lean compile what it is sent.
"""

import secrets
from pathlib import Path

from fdfast._replio import Answer, Pool
from fdfast.errors import InputError, MachineError
from fdfast.lean import repl
from fdfast.lean.backend import OWN_SIGNALS, Output, Said, twice
from fdfast.lean.run import PROOF, Run, Stage, Stop, one_line, said_on_stderr
from fdfast.lean.toolchain import Toolchain

# A file that is not there: the answer names it, so it holds the secret that the pool puts in.
_PROBE = repl.File("/%s.lean").to_json()
_IMPORT_TIMEOUT_S = 600.0
_SEVERITIES = {"info": "information"}  # the REPL's word, and that of `lean --json`


class _GarbledError(MachineError):
    """An answer that is none of the REPL's own."""


class _EndedStop(Stop):
    """The worker ended by itself while it had the proof."""


class ReplBackend:
    """The REPL of a project."""

    root = "_root_."  # an opened pickle is still inside the header's namespaces

    def __init__(self, lean: Toolchain, *, workers: int, memory_bytes: int) -> None:
        self._attempts = _start(lean, workers, memory_bytes, _PROBE)
        self._audits = _start(lean, max(1, workers // 2), memory_bytes, b"")

    def warm_up(self, run: Run, header: str) -> None:
        """Nothing: the pool sends a header to a worker before any clock runs."""

    def statement(self, run: Run, header: str, text: str, compiled: Path | None = None) -> Output:
        """Run the text in the header's environment, in a worker that never holds a proof."""
        assert compiled is None
        return twice(lambda: self._statement(run, header, text))

    def _statement(self, run: Run, header: str, text: str) -> Output:
        command = repl.Command(text).to_json()
        stage: Stage = "the statement"
        return _output(run.ask(self._audits, [command], stage, header=_header(header))[0], stage)

    def attempt(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        """Run the text in the header's environment, and pickle the environment after it."""
        try:
            return self._attempt_again(run, header, text, compiled)
        except _GarbledError as error:  # in two workers, so it is no leftover of an earlier proof
            raise Stop("rejected", "the proof prints into the answers of the REPL") from error

    def _attempt_again(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        """Attempt; a crash in one worker can be its own, one in a sound worker is the proof's."""
        try:
            return twice(lambda: self._attempt(run, header, text, compiled))
        except _EndedStop:
            ours = f"theorem fdfast_{secrets.token_hex(8)} (a : Prop) (h : a) : a := h"
            command = repl.Command(ours).to_json()
            stage: Stage = "the statement"
            head = _header(header)
            answer = run.ask(
                self._attempts, [command], stage, header=head, timeout_s=_IMPORT_TIMEOUT_S
            )[0]
            _output(answer, stage)
            return twice(lambda: self._attempt(run, header, text, compiled))

    def _attempt(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        commands = [
            repl.Command(text).to_json(),
            repl.PickleEnvironment(str(compiled)).to_json(),
        ]
        said, pickled = run.ask(self._attempts, commands, PROOF, header=_header(header), chain=True)
        output = _output(said, PROOF)
        if output.failed:
            return output
        if pickled.end == "forged":
            raise _GarbledError("lean: the REPL gave an answer too many")
        if pickled.end != "answer" or isinstance(_read(pickled), repl.Error):
            raise MachineError(
                f"lean: the REPL cannot write {compiled} ({_how(pickled)}); free disk space or set"
                " TMPDIR"
            )
        return output

    def audit(self, run: Run, header: str, text: str, compiled: Path) -> Output:
        """Open the pickle in a worker that never held a proof, and run the commands there."""
        return twice(lambda: self._audit(run, text, compiled))

    def _audit(self, run: Run, text: str, compiled: Path) -> Output:
        stage: Stage = "the audit"
        commands = [
            repl.UnpickleEnvironment(str(compiled)).to_json(),
            repl.Command(text).to_json(),
        ]
        opened, said = run.ask(self._audits, commands, stage, chain=True)
        if opened.end == "crashed" and "(kernel)" in said_on_stderr(opened):
            raise Stop("rejected", f"the kernel refuses the proof: {said_on_stderr(opened)}")
        if opened.end != "answer" or isinstance(_read(opened), repl.Error):
            raise MachineError(f"lean: the REPL cannot read {compiled} ({_how(opened)})")
        return _output(said, stage)

    def replay(self, run: Run, compiled: Path) -> None:
        """Not offered: `leanchecker` reads compiled files, and the REPL writes pickles."""
        raise InputError("level 2 wants compiled files; take find_lean(backend='lean')")

    def pids(self) -> list[int]:
        """The REPLs."""
        return [*self._attempts.pids(), *self._audits.pids()]

    def stats(self) -> dict[str, int]:
        """The sums over both pools; see `Pool.stats`."""
        both = self._attempts.stats(), self._audits.stats()
        return {name: sum(stats[name] for stats in both) for name in both[0]}

    def close(self) -> None:
        """End every process."""
        self._attempts.close()
        self._audits.close()


def _start(lean: Toolchain, workers: int, memory_bytes: int, probe: bytes) -> Pool:
    return Pool(
        [str(lean.origin)],
        workers=workers,
        env=dict(lean.environment),
        cwd=str(lean.folder),
        start_timeout_s=_IMPORT_TIMEOUT_S,
        memory_bytes=memory_bytes,
        # A REPL never frees a state; at half of the limit it makes way for a fresh one, so that a
        # proof always has the other half.
        recycle_bytes=memory_bytes // 2,
        probe=probe,
        max_restarts=3,
    )


def _header(header: str) -> bytes:
    """The header as the pool takes it; never empty, so that no command has to import `Init`."""
    return (header if header.strip() else "import Init\n").encode()


def _output(answer: Answer, stage: Stage) -> Output:
    """What the REPL said to a command.

    Raises:
        Stop: the proof ended the worker.
        MachineError: the worker ended without being the proof's fault, or its answer is garbled.
    """
    if answer.end == "answer":
        response = _read(answer)
        if isinstance(response, repl.Error):
            return Output(True, (Said("error", 0, 0, response.message),))
        said = tuple(_said(message) for message in response.messages)
        return Output(any(each.severity == "error" for each in said), said)
    if answer.end == "header":
        words = one_line(bytes(answer.raw).decode(errors="replace"))
        raise InputError(
            f"header: the REPL cannot run it ({words}); `lake build` in the project, or change it"
        )
    if answer.end == "forged":
        raise _GarbledError(f"lean: the REPL gave an answer too many during {stage}")
    if stage == PROOF and answer.end == "overflow":
        raise Stop("crashed", "the proof makes Lean say more than the pool reads")
    if stage == PROOF and _own_fault(answer.status):
        raise _EndedStop("crashed", f"Lean ended ({_how(answer)})")
    raise MachineError(
        f"lean: the REPL ended during {stage} ({_how(answer)}); free memory, then run"
        " `fdfast lean doctor`"
    )


def _own_fault(status: int | None) -> bool:
    """Whether a program ends so by what it does itself."""
    return status is not None and (status >= 0 or -status in OWN_SIGNALS)


def _said(message: repl.ReplMessage) -> Said:
    severity = _SEVERITIES.get(message.severity, message.severity)
    return Said(severity, message.pos.line, message.pos.column, message.data)


def _read(answer: Answer) -> repl.CommandResponse | repl.Error:
    try:
        return repl.read_command(answer.json())
    except (ValueError, MachineError) as error:
        raise _GarbledError(f"lean: an answer of the REPL is garbled ({error})") from error


def _how(answer: Answer) -> str:
    """How an answer came to its end, for people."""
    said: list[str] = [answer.end]
    if answer.status is not None:
        said = [*said, f"status {answer.status}"]
    if answer.end == "answer":
        said = [*said, one_line(bytes(answer.raw).decode(errors="replace"))]
    return ", ".join([*said, said_on_stderr(answer)])
