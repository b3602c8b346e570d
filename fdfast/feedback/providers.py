"""The feedback sources that need no other model: a constant text, Lean's own words, a known proof.

Source: Feedback Distillation (2026), arXiv 2605.30861, its list of feedback sources.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fdfast.data.problems import Problem
from fdfast.errors import InputError
from fdfast.lean import Verdict

# A proof that fails in thirty places is mended at the first few, and the head of a message says it.
MAX_MESSAGES = 3
MAX_MESSAGE_CHARACTERS = 500


class FeedbackProvider(Protocol):
    """What the teacher is told about an attempt; "" for nothing."""

    def __call__(self, problem: Problem, attempt: str, verdict: Verdict | None) -> str:
        """Feedback on `attempt` at `problem`, on which Lean said `verdict` (None: Lean was not
        asked).
        """


@dataclass(frozen=True)
class Constant:
    """The same text for every attempt: "Be concise.", say."""

    text: str

    def __call__(self, problem: Problem, attempt: str, verdict: Verdict | None) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Verifier:
    """The attempt and what Lean said of it; of a proof, that it is one."""

    def __call__(self, problem: Problem, attempt: str, verdict: Verdict | None) -> str:
        """Lean's verdict in words, with the attempt it is about."""
        if verdict is None:
            raise InputError("feedback 'verifier' wants Lean's verdict; the task must be 'lean'")
        attempt = attempt.strip() or "(nothing)"
        if verdict.proved:
            return f"This proof is correct:\n{attempt}"
        said = [
            f"line {m.line}: {m.text[:MAX_MESSAGE_CHARACTERS]}"
            for m in verdict.messages[:MAX_MESSAGES]
        ]
        lines = "\n".join(said) or verdict.reason or verdict.kind
        return f"An earlier attempt was:\n{attempt}\nLean answered ({verdict.kind}):\n{lines}"


@dataclass(frozen=True)
class Solution:
    """A known correct proof."""

    def __call__(self, problem: Problem, attempt: str, verdict: Verdict | None) -> str:
        """The data set's proof of this problem."""
        if problem.theorem is None or not problem.theorem.proof:
            raise InputError(
                f"feedback 'solution': problem {problem.name} has no field 'proof' in its data set"
            )
        return f"A correct proof is:\n{problem.theorem.proof}"


PROVIDERS: dict[str, Callable[[str], FeedbackProvider]] = {
    "constant": Constant,
    "verifier": lambda text: Verifier(),
    "solution": lambda text: Solution(),
}


def feedback_provider(name: str, text: str = "") -> FeedbackProvider:
    """The provider of that name; `text` is the constant's.

    Raises:
        InputError: no such provider, or a constant without text.
    """
    if name not in PROVIDERS:
        raise InputError(f"feedback must be one of {', '.join(PROVIDERS)}; got {name!r}")
    if name == "constant" and not text:
        raise InputError("feedback 'constant' wants feedback_text, the sentence for the teacher")
    return PROVIDERS[name](text)
