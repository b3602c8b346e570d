"""Rollouts with a Hugging Face model: continuous batching with its KV cache.

A trajectory that waits for its tools leaves the batch, the others go on, and whoever comes back or
is next in line takes the free place. What all prompts begin with passes through the model once, and
so does a prompt that is attempted several times.
Legend: B rows of the batch, L positions, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError
from fdfast.interrupts import go_on
from fdfast.rollout.kv_cache import KVCache, forward
from fdfast.rollout.sampling import sample
from fdfast.rollout.trajectory import SamplingOptions, Trajectory
from fdfast.rollout.turns import Draft, MakeTools, OnEnd, Turns, WaitFor, end_ids

# A shorter beginning is not worth a pass of its own.
MIN_SHARED = 8


def _has_windows(config: Any) -> bool:
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    windows = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    return any(kind != "full_attention" for kind in kinds) if kinds else bool(windows)


def _check_layers(model: Any) -> None:
    """Every layer keeps keys and values.

    Raises:
        InputError: one keeps something else.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if other := kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise InputError(
            f"{type(model).__name__}: its layers of kind {', '.join(sorted(other))} keep no keys "
            "and values of every token, which rollouts of several turns need; take backend vllm "
            "for it (use_vllm=true)"
        )


class HFEngine:
    """Samples from the very model that is trained.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        batch_size: trajectories decoded at once.
        continuous: whether the batch goes on while some wait for their tools; else all wait.
        max_tool_threads: calls carried out at once.

    Raises:
        InputError: a layer of the model keeps something else than keys and values.
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
        _check_layers(model)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.continuous, self.max_tool_threads = continuous, max_tool_threads
        self.end_ids = end_ids(model.generation_config, tokenizer)
        self.idle_s = 0.0

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        seed: int,
        first: int = 0,
        tools: MakeTools | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Trajectory]:
        """One trajectory a prompt, in order; the same seed gives the same ones (with tools, as far
        as these answer the same). See `Engine.generate`.

        Raises:
            InputError: the model's cache or the chat template does not do.
            MachineError: a tool met a fault of the machine.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with Turns(
                self.tokenizer,
                self.end_ids,
                options,
                make_tools=tools,
                on_end=on_end,
                max_tool_threads=self.max_tool_threads,
            ) as turns:
                seen = _Batch(self, turns, seed, first).run(prompts)
                self.idle_s = turns.idle_s
                return seen
        finally:
            self.model.train(was_training)

    def update_weights(self, model: Any) -> None:
        """Nothing to do: it samples from the trained model itself."""

    def sleep(self) -> None:
        """Nothing to do: it holds no memory between calls."""

    def close(self) -> None:
        """Nothing to do."""


@dataclass
class _Row:
    """A place in the batch."""

    draft: Draft
    generator: torch.Generator  # its own: what it draws does not depend on who else is there
    pending: list[int]  # ids that the cache does not hold yet
    cache: KVCache = field(default_factory=KVCache)


class _Batch:
    """The scheduler of one `generate`."""

    def __init__(self, engine: HFEngine, turns: Turns, seed: int, first: int) -> None:
        self.engine, self.turns, self.options = engine, turns, turns.options
        self.seed, self.first = seed, first
        self.device = next(engine.model.parameters()).device
        self.rows: list[_Row] = []  # that are decoded, in the order of the cache
        self.cache = KVCache()
        self.waiting: dict[int, _Row] = {}
        self.shared = KVCache()  # one row: what all prompts begin with

    def run(self, prompts: Sequence[Sequence[int]]) -> list[Trajectory]:
        """Until all are done."""
        self._share(prompts)
        queue = list(enumerate(prompts))[::-1]
        back: list[_Row] = []
        while queue or back or self.rows or self.waiting:
            go_on()
            # Whoever waits keeps its cache, so there is a limit to them.
            may_begin = bool(queue) and len(self.waiting) < 4 * self.engine.batch_size
            back += self._returned(idle=not (self.rows or back or may_begin))
            fresh: list[_Row] = []
            while (back or may_begin) and len(self.rows) + len(fresh) < self.engine.batch_size:
                fresh.append(back.pop(0) if back else self._new_row(*queue.pop()))
                may_begin = may_begin and bool(queue)
            self._admit(fresh)
            self._step()
        return self.turns.trajectories()

    def _new_row(self, number: int, prompt: Sequence[int]) -> _Row:
        draft = self.turns.begin(number, prompt)
        place = self.first + number
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63)
        return _Row(draft, generator, list(prompt)[self.shared.num_columns :])

    def _share(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute what all prompts begin with; each keeps a token of its own."""
        # The padding after it would count in a window.
        if len(prompts) < 2 or _has_windows(self.engine.model.config):
            return
        # Whatever these two share, all do.
        first, last = min(prompts, key=list), max(prompts, key=list)
        most = min(map(len, prompts)) - 1
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        prefix = [token for token, _ in itertools.islice(same, most)]
        if len(prefix) >= MIN_SHARED:
            ids_1L = self._tensor([prefix])
            _, self.shared = forward(self.engine.model, KVCache(), ids_1L, torch.ones_like(ids_1L))

    def _returned(self, *, idle: bool) -> list[_Row]:
        """The rows whose tools have answered; waited for where there is nothing else to do."""
        wait_for: WaitFor = "one" if idle else "nobody"
        rows = []
        for draft in self.turns.returned(wait_for if self.engine.continuous else "all"):
            row = self.waiting.pop(draft.number)
            row.pending += draft.told_ids
            rows.append(row)
        return rows

    def _admit(self, rows: list[_Row]) -> None:
        """Compute what the cache does not hold of new rows, and let them join."""
        new = [row for row in rows if not row.cache.num_rows]
        back = [row for row in rows if row.cache.num_rows]
        if new:
            different = {tuple(row.pending): None for row in new}  # a dict keeps their order
            places = {pending: place for place, pending in enumerate(different)}
            logits, cache = self._prefill([*different])
            every = [places[tuple(row.pending)] for row in new]
            if len(different) < len(new):
                logits, cache = logits[every], cache.take(every)
            self._advance(new, cache, logits)
        for row in back:
            ids_1L = self._tensor([row.pending])
            logits, cache = forward(self.engine.model, row.cache, ids_1L, torch.ones_like(ids_1L))
            row.cache = KVCache()
            self._advance([row], cache, logits)

    def _prefill(self, pendings: list[tuple[int, ...]]) -> tuple[Tensor, KVCache]:
        """Prompts after what they share, padded on the left."""
        longest = max(map(len, pendings))
        pad = self.engine.tokenizer.pad_token_id or 0
        ids = [[pad] * (longest - len(pending)) + [*pending] for pending in pendings]
        mask = [[0] * (longest - len(pending)) + [1] * len(pending) for pending in pendings]
        cache = self.shared.take([0] * len(pendings))
        return forward(self.engine.model, cache, self._tensor(ids), self._tensor(mask))

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
            row.draft.add_sampled([tokens[place]], [logprobs[place]])
            row.pending = [tokens[place]]
            if self._goes_on(row, cache, place):
                staying.append(place)
        self.cache = self.cache.join(cache if len(staying) == len(rows) else cache.take(staying))
        self.rows += [rows[place] for place in staying]

    def _goes_on(self, row: _Row, cache: KVCache, place: int) -> bool:
        """Whether the row's turn goes on; else it is done, or it waits for its tools."""
        draft = row.draft
        ended = draft.ids[-1] in self.engine.end_ids
        stopped = not ended and self._stopped(draft)
        if not (ended or stopped) and self.turns.tokens_left(draft):
            return True
        if self.turns.end_turn(draft, stopped=stopped):
            row.cache = cache.take([place])
            self.waiting[draft.number] = row
        return False

    def _stopped(self, draft: Draft) -> bool:
        """Whether the last token completed a stop string: it lies in the last few tokens."""
        stops = self.options.stop_strings
        if not stops:
            return False
        # A token is a byte at least; one more for a character that the window cuts.
        window = max(len(stop.encode()) for stop in stops) + 4
        start = max(draft.turn_start, len(draft.ids) - window)
        text = self.engine.tokenizer.decode(draft.ids[start:], skip_special_tokens=True)
        return any(stop in text for stop in stops)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)
