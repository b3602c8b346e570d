"""The feedback sources that need no other model: a constant text, Lean's own words, a known proof.

Source: Feedback Distillation (2026), arXiv 2605.30861, its list of feedback sources.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fdfast.data.problems import Problem, proof_text
from fdfast.errors import InputError
from fdfast.feedback.item import FeedbackItem
from fdfast.feedback.ledger import FeedbackCounters
from fdfast.lean import Verdict

# A proof that fails in thirty places is mended at the first few, and the head of a message says it.
MAX_MESSAGES = 3
MAX_MESSAGE_CHARACTERS = 500


class FeedbackProvider(Protocol):
    """What the teacher is told about attempts."""

    @property
    def counters(self) -> FeedbackCounters | None:
        """What it has done so far; None where there is nothing to count."""

    @property
    def last_failure(self) -> str:
        """Why an attempt got no feedback, the latest; "" if all did."""

    def feedback_many(self, items: Sequence[FeedbackItem]) -> list[str | None]:
        """Feedback on each attempt, in order: "" for nothing to say, None for an attempt that is to
        be left out since its feedback failed.
        """


class PerAttempt(ABC):
    """A provider that looks at one attempt at a time, and never fails."""

    counters: FeedbackCounters | None = None
    last_failure: str = ""

    @abstractmethod
    def __call__(self, problem: Problem, attempt: str, verdict: Verdict | None) -> str:
        """Feedback on `attempt` at `problem`, on which Lean said `verdict` (None: Lean was not
        asked).
        """

    def feedback_many(self, items: Sequence[FeedbackItem]) -> list[str | None]:
        """Feedback on each attempt, in order."""
        return [self(i.problem, i.proof or proof_text(i.attempt), i.verdict) for i in items]


@dataclass(frozen=True)
class Constant(PerAttempt):
    """The same text for every attempt: "Be concise.", say."""

    text: str

    def __call__(self, problem: Problem, attempt: str, verdict: Verdict | None) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Verifier(PerAttempt):
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
class Solution(PerAttempt):
    """A known correct proof."""

    def __call__(self, problem: Problem, attempt: str, verdict: Verdict | None) -> str:
        """The data set's proof of this problem."""
        if problem.theorem is None or not problem.theorem.proof:
            raise InputError(
                f"feedback 'solution': problem {problem.name} has no field 'proof' in its data set"
            )
        return f"A correct proof is:\n{problem.theorem.proof}"


class WithFallback:
    """A provider whose failures another one takes over.

    Args:
        provider: asked first.
        fallback: asked about the attempts on which the first one failed.
    """

    def __init__(self, provider: FeedbackProvider, fallback: FeedbackProvider) -> None:
        self.provider, self.fallback = provider, fallback
        self.counters, self.last_failure = provider.counters, ""

    def feedback_many(self, items: Sequence[FeedbackItem]) -> list[str | None]:
        """Feedback on each attempt, in order; None where both failed."""
        texts = self.provider.feedback_many(items)
        self.last_failure = self.provider.last_failure
        failed = [index for index, text in enumerate(texts) if text is None]
        if not failed:
            return texts
        others = self.fallback.feedback_many([items[index] for index in failed])
        for index, text in zip(failed, others, strict=True):
            texts[index] = text
        if self.counters is not None:
            self.counters.fallback += sum(text is not None for text in others)
        self.last_failure = self.fallback.last_failure or self.last_failure
        return texts


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
        raise InputError("feedback 'constant' wants feedback.text, the sentence for the teacher")
    return PROVIDERS[name](text)
