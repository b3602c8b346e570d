"""One attempt, as a feedback provider sees it."""

from dataclasses import dataclass

from fdfast.data.problems import Problem
from fdfast.lean import Verdict


@dataclass(frozen=True)
class FeedbackItem:
    """An attempt to give feedback on.

    Attributes:
        problem: what was attempted.
        attempt: all that the model wrote.
        verdict: Lean's, or None if Lean was not asked.
        truncated: whether the attempt ran into its length limit.
        tools: names of the tools that the model could call.
        trace: the tool calls and their outputs, as text.
    """

    problem: Problem
    attempt: str
    verdict: Verdict | None = None
    truncated: bool = False
    tools: tuple[str, ...] = ()
    trace: str = ""
