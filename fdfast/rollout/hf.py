"""Rollouts with a Hugging Face model: continuous batching with its KV cache.

A trajectory that waits for its tools leaves the batch, the others go on, and whoever comes back or
is next in line takes the free place.
Legend: B rows of the batch, L positions, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fdfast.rollout.kv_cache import KVCache, forward
from fdfast.rollout.sampling import sample
from fdfast.rollout.tool_turns import Call, ToolTurns, read_calls
from fdfast.rollout.trajectory import End, SamplingOptions, ToolCall, Tools, Trajectory

MakeTools = Callable[[int], Tools]


class HFEngine:
    """Samples from the very model that is trained.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        batch_size: trajectories decoded at once.
        continuous: whether the batch goes on while some wait for their tools; else all wait.
        max_tool_threads: calls carried out at once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        continuous: bool = True,
        max_tool_threads: int = 8,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.continuous, self.max_tool_threads = continuous, max_tool_threads
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.end_ids = sorted({*ends, tokenizer.eos_token_id} - {None})

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        seed: int,
        tools: MakeTools | None = None,
    ) -> list[Trajectory]:
        """One trajectory a prompt, in order; the same seed gives the same ones (with tools, as far
        as these answer the same).

        Args:
            prompts: token ids, none empty.
            options: how to sample.
            seed: of the whole call; the caller's random state is left as it was.
            tools: makes the tools of prompt number n; None: there are none.

        Raises:
            InputError: the model's cache or the chat template does not do.
            MachineError: a tool met a fault of the machine.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with ThreadPoolExecutor(self.max_tool_threads, thread_name_prefix="tool") as threads:
                batch = _Batch(self, options, threads)
                return batch.run([_Row(n, list(p), seed, tools) for n, p in enumerate(prompts)])
        finally:
            self.model.train(was_training)


@dataclass
class _Row:
    """A trajectory in the making."""

    number: int
    prompt: list[int]
    seed: int
    make_tools: MakeTools | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    wrote: list[bool] = field(default_factory=list)
    turn_start: int = 0
    num_sampled: int = 0
    rounds: int = 0
    tool_calls: list[ToolCall] = field(default_factory=list)
    waited_s: float = 0.0
    cache: KVCache = field(default_factory=KVCache)
    pending: list[int] = field(default_factory=list)  # ids that the cache does not hold yet

    def __post_init__(self) -> None:
        self.pending = list(self.prompt)
        # Its own: what it draws does not depend on who else is in the batch.
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
        self.tools = self.make_tools(self.number) if self.make_tools else None

    def wrote_token(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.wrote.append(True)
        self.num_sampled += 1
        self.pending = [token]

    def was_told(self, ids: list[int]) -> None:
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.wrote += [False] * len(ids)
        self.pending += ids
        self.turn_start = len(self.ids)


class _Batch:
    """The scheduler of one `generate`."""

    def __init__(
        self, engine: HFEngine, options: SamplingOptions, threads: ThreadPoolExecutor
    ) -> None:
        self.engine, self.options, self.threads = engine, options, threads
        self.device = next(engine.model.parameters()).device
        self.rows: list[_Row] = []  # that are decoded, in the order of the cache
        self.cache = KVCache()
        self.waiting: dict[Future[list[ToolCall]], tuple[_Row, float]] = {}
        self.done: dict[int, Trajectory] = {}
        self.turns: ToolTurns | None = None

    def run(self, queue: list[_Row]) -> list[Trajectory]:
        """Until all are done."""
        if any(row.tools for row in queue):
            self.turns = ToolTurns(self.engine.tokenizer)
        queue.reverse()
        back: list[_Row] = []
        try:
            while queue or back or self.rows or self.waiting:
                back += self._returned()
                fresh: list[_Row] = []
                while (back or queue) and len(self.rows) + len(fresh) < self.engine.batch_size:
                    fresh.append(back.pop(0) if back else queue.pop())
                self._admit(fresh)
                self._step()
        finally:
            for future in self.waiting:
                future.cancel()
        return [self.done[number] for number in sorted(self.done)]

    def _returned(self) -> list[_Row]:
        """The rows whose tools have answered; waited for where there is nothing else to do."""
        if not self.waiting:
            return []
        if not self.engine.continuous:
            wait(self.waiting)
        elif not self.rows:
            wait(self.waiting, return_when=FIRST_COMPLETED)
        finished = [future for future in self.waiting if future.done()]
        rows = []
        for future in finished:
            row, since = self.waiting.pop(future)
            row.waited_s += time.monotonic() - since
            calls = future.result()
            row.tool_calls += calls
            assert self.turns is not None
            row.was_told(
                self.turns.ids(
                    [call.output for call in calls],
                    ended=row.ids[-1] in self.engine.end_ids,
                    max_tokens=self.options.max_tool_tokens,
                )
            )
            rows.append(row)
        return sorted(rows, key=lambda row: row.number)

    def _admit(self, rows: list[_Row]) -> None:
        """Compute what the cache does not hold of new rows, and let them join."""
        new = [row for row in rows if not row.cache.num_rows]
        for group in ([new] if new else []) + [[row] for row in rows if row.cache.num_rows]:
            longest = max(len(row.pending) for row in group)
            pad = self.engine.tokenizer.pad_token_id or 0
            ids = [[pad] * (longest - len(row.pending)) + row.pending for row in group]
            mask = [[0] * (longest - len(row.pending)) + [1] * len(row.pending) for row in group]
            cache = group[0].cache if len(group) == 1 else KVCache()
            logits, cache = forward(self.engine.model, cache, self._tensor(ids), self._tensor(mask))
            for row in group:
                row.cache = KVCache()
            self._advance(group, cache, logits)

    def _step(self) -> None:
        """One token for every row."""
        if not self.rows:
            return
        rows, cache = self.rows, self.cache
        self.rows, self.cache = [], KVCache()
        ids_B1 = self._tensor([row.pending for row in rows])
        logits, cache = forward(self.engine.model, cache, ids_B1, torch.ones_like(ids_B1))
        self._advance(rows, cache, logits)

    def _advance(self, rows: list[_Row], cache: KVCache, logits_BV: Tensor) -> None:
        """Sample a token for each row; those that go on join the batch."""
        tokens, logprobs = sample(logits_BV, self.options, [row.generator for row in rows])
        staying = []
        for place, row in enumerate(rows):
            row.wrote_token(tokens[place], logprobs[place])
            if self._goes_on(row, cache, place):
                staying.append(place)
        self.cache = self.cache.join(cache if len(staying) == len(rows) else cache.take(staying))
        self.rows += [rows[place] for place in staying]

    def _goes_on(self, row: _Row, cache: KVCache, place: int) -> bool:
        """Whether the row's turn goes on; else it is done, or it waits for its tools."""
        ended = row.ids[-1] in self.engine.end_ids
        stopped = not ended and self._stopped(row)
        full = row.num_sampled >= self.options.max_completion_length
        if not (ended or stopped or full):
            return True
        calls = read_calls(self._text(row)) if row.tools and (ended or stopped) else []
        if calls and not full and row.rounds < self.options.max_tool_rounds:
            row.rounds += 1
            row.cache = cache.take([place])
            future = self.threads.submit(_carry_out, row, calls)
            self.waiting[future] = (row, time.monotonic())
            return False
        end: End = "tool_limit" if calls and not full else "stop" if ended or stopped else "length"
        self.done[row.number] = Trajectory(
            row.ids, row.logprobs, row.wrote, self._text(row), end, row.tool_calls, row.waited_s
        )
        return False

    def _text(self, row: _Row) -> str:
        text: str = self.engine.tokenizer.decode(
            row.ids[row.turn_start :], skip_special_tokens=True
        )
        return text

    def _stopped(self, row: _Row) -> bool:
        """Whether the last token completed a stop string: it lies in the last few tokens."""
        stops = self.options.stop_strings
        if not stops:
            return False
        # A token is a byte at least; one more for a character that the window cuts.
        window = max(len(stop.encode()) for stop in stops) + 4
        start = max(row.turn_start, len(row.ids) - window)
        text = self.engine.tokenizer.decode(row.ids[start:], skip_special_tokens=True)
        return any(stop in text for stop in stops)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)


def _carry_out(row: _Row, calls: list[Call]) -> list[ToolCall]:
    """The calls of one turn, one after the other: the second may need what the first wrote."""
    assert row.tools is not None
    answered = []
    for call in calls:
        if call.fault:
            output, ok, seconds = call.fault, False, 0.0
        else:
            result = row.tools.call(call.name, call.arguments)
            output, ok, seconds = result.text, result.ok, result.seconds
        answered.append(
            ToolCall(call.name, call.arguments, output, ok, seconds, position=len(row.ids))
        )
    return answered
