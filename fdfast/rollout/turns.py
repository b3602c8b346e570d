"""Trajectories in the making, and what follows a turn: the next one, tools, or the end.

Every engine samples the turns in its own way; what lies between them is here, once.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from fdfast.interrupts import wait_for as wait
from fdfast.rollout.tool_calls import Call
from fdfast.rollout.tool_turns import ToolTurns
from fdfast.rollout.trajectory import End, SamplingOptions, ToolCall, Tools, Trajectory

# A turn's calls are carried out one after the other, each within its tool's time limit.
MAX_CALLS = 8

MakeTools = Callable[[int], Tools]
OnEnd = Callable[[int, Trajectory], None]
WaitFor = Literal["nobody", "one", "all"]


def end_ids(generation_config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a turn: the model's own and the tokenizer's."""
    ends = generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return sorted({*ends, tokenizer.eos_token_id} - {None})


@dataclass
class Draft:
    """A trajectory in the making.

    Attributes:
        number: its prompt's place.
        prompt_ids: the prompt.
        tools: what it may call; None: nothing.
        ids: all that follows the prompt so far.
        logprobs: see `Trajectory`.
        wrote: see `Trajectory`.
        turn_start: where in `ids` the present turn begins.
        told_ids: what was read before it, tools' answers.
        num_sampled: ids that the model wrote.
        rounds: turns that ended in calls.
        tool_calls: see `Trajectory`.
        waited_s: see `Trajectory`.
    """

    number: int
    prompt_ids: list[int]
    tools: Tools | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    wrote: list[bool] = field(default_factory=list)
    turn_start: int = 0
    told_ids: list[int] = field(default_factory=list)
    num_sampled: int = 0
    rounds: int = 0
    tool_calls: list[ToolCall] = field(default_factory=list)
    waited_s: float = 0.0

    def add_sampled(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """The model wrote these."""
        self.ids += ids
        self.logprobs += logprobs
        self.wrote += [True] * len(ids)
        self.num_sampled += len(ids)

    def add_told(self, ids: Sequence[int]) -> None:
        """The model reads these, and a new turn begins."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.wrote += [False] * len(ids)
        self.turn_start, self.told_ids = len(self.ids), list(ids)


class Turns:
    """Ends turns: tools are called in threads of their own meanwhile. A context manager.

    Attributes:
        idle_s: seconds in which nothing was sampled, since all waited for tools.

    Args:
        tokenizer: of the model.
        end_ids: tokens that end a turn.
        options: how it is sampled.
        make_tools: the tools of prompt number n; None: there are none.
        on_end: told of each trajectory as it ends, in this thread.
        max_tool_threads: calls carried out at once.

    Raises:
        InputError: there are tools, and the chat template has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Sequence[int],
        options: SamplingOptions,
        *,
        make_tools: MakeTools | None = None,
        on_end: OnEnd | None = None,
        max_tool_threads: int = 8,
    ) -> None:
        self.tokenizer, self.end_ids, self.options = tokenizer, frozenset(end_ids), options
        self.make_tools, self.on_end = make_tools, on_end
        self.tool_turns = None if make_tools is None else ToolTurns(tokenizer, end_ids)
        self.threads = ThreadPoolExecutor(max_tool_threads, thread_name_prefix="tool")
        self.waiting: dict[Future[list[ToolCall]], tuple[Draft, float]] = {}
        self.done: dict[int, Trajectory] = {}
        self.idle_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error nobody waits for a tool that still runs; whoever holds Lean ends it.
        self.threads.shutdown(wait=kind is None, cancel_futures=True)

    def begin(self, number: int, prompt_ids: Sequence[int]) -> Draft:
        """A trajectory before its first token."""
        tools = None if self.make_tools is None else self.make_tools(number)
        return Draft(number, list(prompt_ids), tools)

    def tokens_left(self, draft: Draft) -> int:
        """That the model may still write."""
        return self.options.max_completion_length - draft.num_sampled

    def end_turn(self, draft: Draft, *, stopped: bool) -> bool:
        """A turn has ended, by an end token, a stop string (`stopped`) or max_completion_length.

        Returns:
            Whether the draft waits for tools; else it is done.
        """
        stopped = stopped or draft.ids[-1] in self.end_ids
        full = not self.tokens_left(draft)
        calls: list[Call] = []
        if self.tool_turns is not None and stopped:
            # With the special tokens, which may be the marks of a call.
            assert draft.tools is not None
            calls = self.tool_turns.read_calls(
                self._text(draft, skip_special_tokens=False),
                draft.tools.schemas,
                draft.told_ids or draft.prompt_ids,
            )
        if len(calls) > MAX_CALLS:
            fault = f"not carried out: a turn may have {MAX_CALLS} calls; make fewer"
            calls = [*calls[:MAX_CALLS], Call("", "", fault)]
        if calls and not full and draft.rounds < self.options.max_tool_calling_iterations:
            draft.rounds += 1
            future = self.threads.submit(_carry_out, draft, calls)
            self.waiting[future] = (draft, time.monotonic())
            return True
        end: End = "stop" if stopped else "length"
        if calls:  # nobody carries them out
            end = "length" if full else "tool_limit"
        self._finish(draft, end)
        return False

    def cut_off(self, draft: Draft) -> None:
        """The engine has no room for another token of this draft: it is done."""
        self._finish(draft, "length")

    def returned(self, wait_for: WaitFor) -> list[Draft]:
        """The drafts whose tools have answered, by number.

        Args:
            wait_for: nobody, one, or all of those that wait.

        Raises:
            MachineError: a tool met a fault of the machine.
        """
        if wait_for != "nobody":
            begun = time.monotonic()
            wait(self.waiting, return_when=FIRST_COMPLETED if wait_for == "one" else ALL_COMPLETED)
            self.idle_s += time.monotonic() - begun
        drafts = []
        for future in [future for future in self.waiting if future.done()]:
            draft, since = self.waiting.pop(future)
            draft.waited_s += time.monotonic() - since
            calls = future.result()
            draft.tool_calls += calls
            assert self.tool_turns is not None
            told = self.tool_turns.ids(
                calls,
                ended=draft.ids[-1] in self.end_ids,
                max_tokens=self.options.max_tool_tokens,
            )
            draft.add_told(told)
            drafts.append(draft)
        return sorted(drafts, key=lambda draft: draft.number)

    def trajectories(self) -> list[Trajectory]:
        """All that are done, by number."""
        return [self.done[number] for number in sorted(self.done)]

    def _finish(self, draft: Draft, end: End) -> None:
        trajectory = Trajectory(
            draft.ids,
            draft.logprobs,
            draft.wrote,
            self._text(draft, skip_special_tokens=True),
            end,
            draft.tool_calls,
            draft.waited_s,
            prompt_ids=draft.prompt_ids,
        )
        self.done[draft.number] = trajectory
        if self.on_end is not None:
            self.on_end(draft.number, trajectory)

    def _text(self, draft: Draft, *, skip_special_tokens: bool) -> str:
        ids = draft.ids[draft.turn_start :]
        if ids and ids[-1] in self.end_ids:
            ids.pop()
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


def _carry_out(draft: Draft, calls: list[Call]) -> list[ToolCall]:
    """The calls of one turn, one after the other: the second may need what the first wrote."""
    assert draft.tools is not None
    answered = []
    for call in calls:
        if call.fault:
            output, ok, seconds = call.fault, False, 0.0
        else:
            result = draft.tools.call(call.name, call.arguments)
            output, ok, seconds = result.text, result.ok, result.seconds
        answered.append(
            ToolCall(call.name, call.arguments, output, ok, seconds, position=len(draft.ids))
        )
    return answered
