"""What a check of one proof can end in."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["proved", "failed", "timeout", "crashed", "rejected"]


@dataclass(frozen=True)
class Message:
    """One message of Lean.

    Attributes:
        severity: `error`, `warning` or `information`.
        line: the line in the proof text, from 1; 0 when Lean points at the statement.
        column: the column in that line, from 0, in characters.
        text: Lean's words, without `file:line:column`.
    """

    severity: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.severity}: {self.text}"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one proof.

    Attributes:
        kind: `proved`: the kernel accepts the proof of exactly this statement, without axioms that
            are not allowed. `failed`: Lean says no; `messages` say why. `timeout`: Lean was still
            busy at the deadline. `crashed`: the proof brought Lean down or over its memory limit.
            `rejected`: the text is no honest proof of the statement; `reason` says why.
        messages: what Lean said of the proof, in order.
        reason: one line; empty for `proved`.
    """

    kind: Kind
    messages: tuple[Message, ...] = ()
    reason: str = ""

    @property
    def proved(self) -> bool:
        """Whether the statement is proved."""
        return self.kind == "proved"

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind
