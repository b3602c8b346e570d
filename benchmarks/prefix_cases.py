"""Passes of a group through a model: packed with shared prefixes, packed apart, and padded.

The model is two layers of SmolLM2-135M's shape, without an LM head: that is policy_head's.
Legend: P prompt tokens, G completions of a prompt, S tokens of a completion, T tokens of a pack.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.targets import Target
from fdfast.models import hidden_states
from fdfast.packing import PrefixTree

OURS, APART, PADDED = "ours", "packed, nothing shared", "padded"
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS = 2, 576, 1536, 9, 3
VOCAB = 1000
GRID = tuple(itertools.product((256, 1024), (4, 8, 16), (64, 256)))
NOTHING = ((0, 8, 256), (24, 4, 1024))  # nothing to share, and too little to be worth it
PASSES = ("teacher forward", "student forward and backward")
GRID_MEAN = "geometric mean over the grid"
TARGETS = (
    *(Target(f"{GRID_MEAN}, {name}", OURS, "time over limit", 1 / 0.9, "") for name in PASSES),
    *(Target(f"{GRID_MEAN}, {name}", OURS, "memory over limit", 1 / 0.95, "") for name in PASSES),
    *(
        Target(f"{name}, {P} + {G} x {S}", OURS, "time", 1.05, APART)
        for name in PASSES
        for P, G, S in NOTHING
    ),
)


@dataclass(frozen=True)
class Case:
    """One pass over one group."""

    pass_name: str
    P: int
    G: int
    S: int

    @property
    def name(self) -> str:
        """As the targets call it."""
        return f"{self.pass_name}, {self.P} + {self.G} x {self.S}"

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.pass_name == PASSES[1]

    @property
    def token_limit(self) -> float:
        """Tokens apart over tokens shared, G(P + S) / (P + GS): what sharing can save in all that
        is done token by token.
        """
        return self.G * (self.P + self.S) / (self.P + self.G * self.S)

    @property
    def flop_limit(self) -> float:
        """The same in operations of layers and attention."""
        apart = self._flops(self.G * (self.P + self.S), self.G * _triangle(self.P + self.S))
        pairs = _triangle(self.P) + self.G * (self.S * self.P + _triangle(self.S))
        return apart / self._flops(self.P + self.G * self.S, pairs)

    def _flops(self, tokens: int, pairs: int) -> float:
        head = HIDDEN // HEADS
        weights = HIDDEN * (2 * HIDDEN + 2 * KEY_HEADS * head) + 3 * HIDDEN * INTERMEDIATE
        # Flash attention's backward pass is five products for the forward's two.
        linear, attention = (3.0, 3.5) if self.trains else (1.0, 1.0)
        return linear * 2 * weights * tokens + attention * 4 * HIDDEN * pairs

    def sequences(self) -> list[list[int]]:
        """Prompts and completions of random tokens, the same for every contender."""
        generator = torch.Generator().manual_seed(0)
        prompt, *completions = (
            torch.randint(VOCAB, (n,), generator=generator).tolist()
            for n in (self.P, *[self.S] * self.G)
        )
        return [prompt + completion for completion in completions]

    def run(self, contender: str) -> Callable[[], Tensor]:
        """A pass, ready to go; it returns what the LM head would read, for the completions."""
        sequences = self.sequences()
        masks = [[i >= max(self.P, 1) for i in range(self.P + self.S)]] * self.G
        if contender == PADDED:
            hidden = functools.partial(_padded, torch.tensor(sequences), max(self.P, 1))
        else:
            ratio = 1e9 if contender == APART else 1.05
            hidden = functools.partial(_packed, sequences, masks, ratio)

        def run() -> Tensor:
            made = model()
            if not self.trains:
                with torch.no_grad():
                    return hidden(made)
            made.zero_grad(set_to_none=False)  # gradients stay: they are no part of a peak
            out = hidden(made)
            out.square().sum().backward()
            return out.detach()

        return run


def all_cases(*, quick: bool) -> list[Case]:
    """Every pass over every group; of a trial, the smallest."""
    groups = (GRID[0], NOTHING[0]) if quick else (*GRID, *NOTHING)
    return [Case(name, *group) for name in PASSES for group in groups]


@functools.cache
def model() -> Any:
    """The model, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


def _packed(
    sequences: list[list[int]], masks: list[list[bool]], min_ratio: float, made: Any
) -> Tensor:
    """The tree is built in every pass, as a trainer builds it."""
    tree = PrefixTree.from_sequences(sequences, masks, min_ratio=min_ratio)
    return hidden_states(made, tree)


def _padded(ids_BL: Tensor, first: int, made: Any) -> Tensor:
    """All of one length, so there is no padding to waste: the best of what padding can give."""
    hidden: Tensor = made.model(ids_BL, use_cache=False).last_hidden_state
    return hidden[:, first - 1 : -1].flatten(0, 1)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
