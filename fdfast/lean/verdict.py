"""What a check of one proof can end in, and the ladder it has climbed.

Three rungs, each with what it does not see:

* 0, **messages**: Lean compiled statement and proof without an error. The code under check speaks
  in that process, and a hole or an axiom can be silent there. Nothing is rewarded for this rung.
* 1, **audited**: a second process, which reads the compiled result and no proof text, found that
  the theorem has the statement's type to the letter and stands on allowed axioms alone. A compiled
  result that was made without the kernel, by code that ran during the check, would pass.
* 2, **replayed**: the kernel checked every declaration of the compiled result anew, in a process
  of its own.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["proved", "failed", "timeout", "crashed", "rejected"]
Level = Literal[0, 1, 2]


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
        level: the rung on which the check ended: 0 messages (and the screen before them), 1 the
            audit, 2 the replay.
    """

    kind: Kind
    messages: tuple[Message, ...] = ()
    reason: str = ""
    level: Level = 0

    @property
    def proved(self) -> bool:
        """Whether the statement is proved: what a reward may be given for.

        Never by messages alone: it takes level 1.
        """
        return self.kind == "proved" and self.level >= 1

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" if self.reason else self.kind
