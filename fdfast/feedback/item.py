"""One attempt, as a feedback provider sees it."""

from dataclasses import dataclass

from fdfast.data.problems import Problem
from fdfast.lean import Verdict
from fdfast.rollout import ToolCall


@dataclass(frozen=True)
class FeedbackItem:
    """An attempt to give feedback on.

    Attributes:
        problem: what was attempted.
        attempt: the model's answer; with tools its last turn.
        verdict: Lean's, or None if Lean was not asked.
        truncated: whether the attempt ran into a limit before it came to an end.
        tools: names of the tools that the model could call.
        tool_calls: those it made, in order.
        proof: what the verdict is about, where that is not the attempt's own proof: a file's.
    """

    problem: Problem
    attempt: str
    verdict: Verdict | None = None
    truncated: bool = False
    tools: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    proof: str = ""
