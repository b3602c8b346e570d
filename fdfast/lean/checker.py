"""How one proof is checked, so that the verdict `proved` means what it says.

Walls, each of which would do against most cheating; `verdict` names the rungs:

1. `screen`: the proof text may hold one term. Words that begin a command, options, holes and
   attributes are refused.
2. **Attempt** (rung 0). Lean compiles what we write: header, statement, proof. Nothing follows the
   proof, so there is nothing for an unclosed comment or string to swallow. Any error ends the
   check. This is the only process that reads the proof text; from what it prints we take the
   wording of a failure and nothing else.
   Lemmas that the prover put above the statement are screened likewise (`submission`).
3. **Audit** (rung 1). Another process reads the compiled theorem and prints its full type and its
   axioms. No text of the proof is in that process, so nothing in the proof can print into its
   answer. The type must be, to the letter and with every implicit argument and universe shown, the
   type that the statement has when it is compiled without the proof (which is kept for the next
   attempts at it). The axioms must be in the toolchain's allow-list, which is empty for the base
   library.
4. **Replay** (rung 2), where it is asked for: the kernel checks the compiled file anew.

Why a comparison of printed types and not a re-statement in the audit: a header may define things,
and then the compiled theorem cannot be imported next to the header itself.

The kernel has checked the term in step 2; the options that would keep it from that are refused in
step 1, in headers too. What a *header* defines is the caller's word: it is screened for
metaprograms, not judged.
"""

import re
import secrets
import tempfile
from concurrent.futures import Future
from pathlib import Path

from fdfast.errors import MachineError
from fdfast.lean.backend import Backend, Output
from fdfast.lean.folder import private_folder
from fdfast.lean.run import Run, Stop, one_line
from fdfast.lean.screen import refuse_context, refuse_proof, refuse_text
from fdfast.lean.statement import complete_header, parse_statement
from fdfast.lean.submission import refuse_helpers
from fdfast.lean.toolchain import Toolchain
from fdfast.lean.verdict import Level, Message, Verdict

_PRINTED_NAME = re.compile(r"@?(?P<name>[^\s:{]+?)(?:\.\{[^}]*\})? : ")
_AXIOMS = re.compile(r"'.*' depends on axioms: \[(?P<axioms>[^\]]*)\]\Z", re.DOTALL)
# With these a printed type is complete, whatever the header sets: nothing is abbreviated, left out
# or in somebody's notation, and what the printer cannot print appears as the raw term.
_PRINT_ALL = "".join(
    f"set_option {option}\n"
    for option in (
        *("pp.all true", "pp.explicit true", "pp.universes true", "pp.funBinderTypes true"),
        *("pp.piBinderTypes true", "pp.letVarTypes true", "pp.unicode.fun false"),
        *("pp.raw false", "pp.exprSizes false"),
        *("pp.fullNames true", "pp.privateNames true", "pp.notation false", "pp.proofs true"),
        *("pp.deepTerms true", "pp.maxSteps 100000000", "pp.oneline false", "pp.rawOnError true"),
        *("maxRecDepth 1000000", "format.width 1000000000", "format.indent 0"),
    )
)
# What `pp.rawOnError` shall keep Lean from printing: it stands for any term at all.
_UNPRINTABLE = "failed to pretty print"
# An opened pickle still has the header's options and open namespaces; an axiom is named in full,
# and a private one as what it is.
_PRINT_NAMES = "".join(
    f"set_option pp.{option}\n"
    for option in ("all false", "universes false", "fullNames true", "privateNames true")
)
_MAX_STATEMENT_TYPES = 4096
_STATEMENT_TYPES: dict[tuple[Toolchain, str, str], Future[str]] = {}


class Checker:
    """The checks with one toolchain and backend; any number of threads may use it at once."""

    def __init__(self, lean: Toolchain, backend: Backend, *, level: Level) -> None:
        self._lean = lean
        self._backend = backend
        self._level = level

    def verify(
        self, run: Run, formal_statement: str, proof: str, header: str, context: str
    ) -> Verdict:
        """Run the walls in order.

        Raises:
            InputError: see `fdfast.lean.verify`.
            MachineError: a fault of the machine, twice.
            CancelledError: the run was cancelled.
        """
        statement, name = parse_statement(formal_statement)
        header = complete_header(self._lean, header)
        reason = refuse_text(statement) or refuse_context(header) or refuse_helpers(context)
        if reason := reason or refuse_proof(proof):
            return Verdict("rejected", reason=reason)
        try:
            self._backend.warm_up(run, header)
            printed = self._statement_type(run, header, statement, name)
            with private_folder() as folder:
                compiled = folder / f"Attempt_{secrets.token_hex(8)}.olean"
                above = f"{context}\n{statement}\n" if context else f"{statement}\n"
                messages = self._attempt(run, header, above, proof, compiled)
                self._audit(run, header, printed, compiled)
                if self._level == 2:
                    self._backend.replay(run, compiled)
            return Verdict("proved", messages, level=self._level)
        except Stop as stop:
            return stop.verdict
        except OSError as error:
            raise MachineError(
                f"lean: cannot use the folder {tempfile.gettempdir()} ({error.strerror or error});"
                " free disk space or set TMPDIR"
            ) from error

    def _statement_type(self, run: Run, header: str, statement: str, name: str) -> str:
        """The statement's type as Lean prints it with a hole for the proof.

        Several attempts at one statement ask for it once: the first computes it, the others wait.
        """
        key = (self._lean, header, statement)
        if len(_STATEMENT_TYPES) >= _MAX_STATEMENT_TYPES:
            _STATEMENT_TYPES.clear()
        mine: Future[str] = Future()
        known = _STATEMENT_TYPES.setdefault(key, mine)
        if known is not mine and _tells(known, run):
            return known.result()
        try:
            printed = self._print_statement(run, header, statement, name)
        except BaseException as error:
            _STATEMENT_TYPES.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result(printed)
        return printed

    def _print_statement(self, run: Run, header: str, statement: str, name: str) -> str:
        text = f"{statement}\nsorry\n{_PRINT_ALL}"
        output = self._backend.statement(run, header, f"{text}#check @{name}\n")
        line = text.count("\n") + 1
        if any(said.startswith("Ambiguous term") for said in output.at(line)):
            # `open Nat` above `theorem add_comm`: the full name tells ours from the others.
            name = f"_root_.{self._namespace(run, header, statement)}{name}"
            output = self._backend.statement(run, header, f"{text}#check @{name}\n")
        if output.failed:
            said = one_line(output.first_error())
            raise Stop("rejected", f"the statement does not elaborate: {said}")
        printed = output.at(line)
        if len(printed) != 1 or _PRINTED_NAME.match(printed[0]) is None:
            raise Stop("rejected", "the statement does not declare a theorem of its name")
        if _UNPRINTABLE in printed[0]:
            raise Stop("rejected", "Lean cannot print the statement's type in full")
        if "_root_." in printed[0] and not self._backend.root:
            # The header's `open` makes a name ambiguous, which it is not to the audit.
            return self._print_outside(run, header, statement, printed[0])
        return printed[0].removeprefix("_root_.")

    def _print_outside(self, run: Run, header: str, statement: str, printed: str) -> str:
        """The statement's type as the audit prints it: outside the header."""
        match = _PRINTED_NAME.match(printed.removeprefix("_root_."))
        assert match is not None
        with private_folder() as folder:
            compiled = folder / f"Statement_{secrets.token_hex(8)}.olean"
            output = self._backend.statement(run, header, f"{statement}\nsorry\n", compiled)
            text = f"{_PRINT_ALL}#check @{match['name']}\n"
            if not output.failed:
                output = self._backend.audit(run, header, text, compiled)
        outside = output.at(text.count("\n"))
        if output.failed or len(outside) != 1 or not outside[0].startswith(match.group()):
            raise Stop("rejected", "the statement's type cannot be printed outside its header")
        return outside[0]

    def _namespace(self, run: Run, header: str, statement: str) -> str:
        """The namespace that the statement stands in, with a dot at its end; "" for none."""
        place = f"fdfast_{secrets.token_hex(8)}"
        text = f"{statement}\nsorry\n{_PRINT_ALL}axiom {place} : Prop\n"
        output = self._backend.statement(run, header, f"{text}#check @{place}\n")
        match = _PRINTED_NAME.match("".join(output.at(text.count("\n") + 1)))
        if output.failed or match is None:
            raise Stop("rejected", "the statement's name is ambiguous in its header")
        return match["name"].removesuffix(place)

    def _attempt(
        self, run: Run, header: str, above: str, proof: str, compiled: Path
    ) -> tuple[Message, ...]:
        """Compile lemmas, statement and proof; return what Lean said of the proof."""
        output = self._backend.attempt(run, header, f"{above}{proof}\n", compiled)
        messages = _messages(output, above.count("\n"))
        if output.failed:
            error = next(message for message in messages if message.severity == "error")
            reason = f"{error.line}:{error.column}: {one_line(error.text)}"
            raise Stop("failed", reason, messages)
        return messages

    def _audit(self, run: Run, header: str, printed: str, compiled: Path) -> None:
        """Judge type and axioms of the compiled theorem, in a process without the proof text."""
        match = _PRINTED_NAME.match(printed)
        assert match is not None
        name = self._backend.root + match["name"]
        # The axioms first: with the options set, their names would carry universes.
        axioms = f"{_PRINT_NAMES}#print axioms {name}\n"
        text = f"{axioms}{_PRINT_ALL}#check @{name}\n"
        output = self._backend.audit(run, header, text, compiled)
        # An opened pickle has the header's `open`, which can make our own name ambiguous.
        found = [said.removeprefix("_root_.") for said in output.at(text.count("\n"))]
        if output.failed or _UNPRINTABLE in printed or found != [printed]:
            reason = "the proof changes what the statement says"
            raise Stop("rejected", reason, level=1)
        said = output.at(axioms.count("\n"))
        names = (match["name"], f"_root_.{match['name']}")
        if said in [[f"'{name}' does not depend on any axioms"] for name in names]:
            return
        if len(said) != 1 or (listed := _AXIOMS.fullmatch(said[0])) is None:
            raise Stop("rejected", "Lean does not tell the axioms of the proof", level=1)
        used = {axiom.strip().removeprefix("_root_.") for axiom in listed["axioms"].split(",")}
        if "sorryAx" in used:
            raise Stop("rejected", "sorry", level=1)
        if refused := sorted(used - self._lean.allowed_axioms):
            reason = f"the proof uses the axiom {', '.join(refused)}"
            raise Stop("rejected", reason, level=1)


def forget_statements() -> None:
    """Forget every statement's type: in a forked child, whose parent may be computing some."""
    _STATEMENT_TYPES.clear()


def _tells(known: Future[str], run: Run) -> bool:
    """Whether a computation by another check, once it is done, tells what ours would.

    Not so when it was cancelled, ran out of time, or met a fault of the machine.
    """
    try:
        error = run.wait_for(known)
    except TimeoutError:  # it is another pool's, whose limit is larger
        return False
    return error is None or (isinstance(error, Stop) and error.verdict.kind == "rejected")


def _messages(output: Output, lines_above: int) -> tuple[Message, ...]:
    """What Lean said, with its places in the proof text."""
    return tuple(
        Message(said.severity, max(said.line - lines_above, 0), said.column, said.text)
        for said in output.said
    )
