"""What a rollout engine is asked and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fdfast.lean.tools import ToolResult
from fdfast.lean.verdict import Verdict

End = Literal["stop", "length", "tool_limit"]


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; TRL's names.

    Attributes:
        max_completion_length: tokens that the model writes at most, over all its turns.
        temperature: > 0; 0 is greedy.
        top_p: nucleus; 1 is off.
        top_k: 0 is off.
        stop_strings: text that ends a completion; it stays part of it.
        max_tool_calling_iterations: turns that may end in tool calls.
        max_tool_tokens: of the answers to a turn's calls; longer ones are cut in the middle, with a
            note.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: tuple[str, ...] = ()
    max_tool_calling_iterations: int = 8
    max_tool_tokens: int = 1024


class Tools(Protocol):
    """What one trajectory may call: `fdfast.lean.tools.Toolbox`, or the like."""

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """As chat templates take them; the prompt was made with them."""
        ...

    def call(self, name: str, arguments: str) -> ToolResult:
        """Carry out a call as the model wrote it, from any thread."""
        ...


class ToolSource(Protocol):
    """Makes the tools of a batch: `Toolboxes`, or the like."""

    def __call__(self, number: int) -> Tools:
        """Those of attempt number n, which begins."""
        ...

    def close(self, number: int) -> Mapping[str, str]:
        """It has ended; the Lean files that it has written, path -> text: what it submits."""
        ...


@dataclass(frozen=True)
class ToolCall:
    """A call and its answer.

    Attributes:
        name: of the tool, as the model wrote it; "" where what it wrote is no call.
        arguments: JSON, as the model wrote it.
        output: what the model was shown, before a turn's answers were cut to their limit.
        ok: whether the call could be carried out.
        seconds: how long it took.
        position: how many ids of the trajectory stood before the answer.
    """

    name: str
    arguments: str
    output: str
    ok: bool
    seconds: float
    position: int


@dataclass(frozen=True)
class Trajectory:
    """One rollout: the ids that were sampled are the ids that are trained.

    Attributes:
        ids: all that follows the prompt: sampled ids, end tokens included, and between turns the
            tools' answers as the chat template writes them. Never decoded and encoded again.
        logprobs: of each sampled id, under the softmax of the logits over the temperature (1 for
            greedy), before top_p and top_k; 0 for what the model did not write.
        wrote: for each id, whether the model wrote it: these are trained, the others attended.
        text: the last turn, without special tokens: the answer.
        end: `stop`: an end token or a stop string; `length`: max_completion_length; `tool_limit`:
            the calls of a turn after the last that may have some.
        tool_calls: in order.
        waited_s: how long the trajectory waited for tools.
        prompt_ids: what it follows.
        verdict: Lean's; None where nobody asked.
        proof: what the verdict is about: a proof, with the lemmas above it.
    """

    ids: list[int]
    logprobs: list[float]
    wrote: list[bool]
    text: str
    end: End
    tool_calls: list[ToolCall] = field(default_factory=list)
    waited_s: float = 0.0
    prompt_ids: list[int] = field(default_factory=list)
    verdict: Verdict | None = None
    proof: str = ""

    @property
    def truncated(self) -> bool:
        """Whether it ran into a limit before it came to an end."""
        return self.end != "stop"

    @property
    def num_sampled(self) -> int:
        """Ids that the model wrote."""
        return sum(self.wrote)
