"""The keys and values of sequences that are decoded together, while some join and some leave.

Rows are padded to one length, on the left or after a beginning that all share, so that every step
appends one column to all.
Legend: B rows, K key heads, L positions, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError


@dataclass
class KVCache:
    """A batch of rows.

    Attributes:
        layers: for each layer keys and values, (B, K, L, E).
        mask_BL: 1 where there is a token, 0 where a row is padded.
    """

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    mask_BL: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """B."""
        return 0 if self.mask_BL is None else len(self.mask_BL)

    @property
    def num_columns(self) -> int:
        """L."""
        return 0 if self.mask_BL is None else self.mask_BL.shape[1]

    def take(self, rows: Sequence[int]) -> "KVCache":
        """The cache of some rows, without columns in which all of them are padded; a row that is
        named twice is there twice.
        """
        if self.mask_BL is None or not rows:
            return KVCache()
        index = torch.tensor(rows, device=self.mask_BL.device)
        mask_BL = self.mask_BL[index]
        start = int(mask_BL.any(0).int().argmax())
        layers = [(k[index][:, :, start:], v[index][:, :, start:]) for k, v in self.layers]
        return KVCache(layers, mask_BL[:, start:])

    def join(self, other: "KVCache") -> "KVCache":
        """The rows of both, padded to the longer."""
        if self.mask_BL is None or other.mask_BL is None:
            return other if self.mask_BL is None else self
        length = max(self.mask_BL.shape[1], other.mask_BL.shape[1])
        ours, theirs = self._padded(length), other._padded(length)
        assert ours.mask_BL is not None
        assert theirs.mask_BL is not None
        layers = [
            (torch.cat([k, other_k]), torch.cat([v, other_v]))
            for (k, v), (other_k, other_v) in zip(ours.layers, theirs.layers, strict=True)
        ]
        return KVCache(layers, torch.cat([ours.mask_BL, theirs.mask_BL]))

    def _padded(self, length: int) -> "KVCache":
        assert self.mask_BL is not None
        extra = length - self.mask_BL.shape[1]
        if not extra:
            return self
        pad = torch.nn.functional.pad
        layers = [(pad(k, (0, 0, extra, 0)), pad(v, (0, 0, extra, 0))) for k, v in self.layers]
        return KVCache(layers, pad(self.mask_BL, (extra, 0)))


def forward(model: Any, cache: KVCache, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, KVCache]:
    """Let rows go on by some tokens, padded on the left: after a cache, in its middle.

    Args:
        model: a causal LM of transformers.
        cache: of B rows, or empty where they begin.
        ids_BL: (B, L) int64.
        mask_BL: (B, L), 1 at real tokens; the last is one.

    Returns:
        The logits (B, V) float32 after the last token of each row, and the longer cache.

    Raises:
        InputError: the model keeps something else than keys and values.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    before_BL = mask_BL[:, :0] if cache.mask_BL is None else cache.mask_BL
    whole_BL = torch.cat([before_BL, mask_BL], 1)
    positions_BL = (whole_BL.cumsum(1) - 1).clamp(min=0)[:, before_BL.shape[1] :]
    past: Any = DynamicCache()
    for key, value in cache.layers:
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value  # as they are: update() would copy them
        past.layers.append(layer)
    output = model(
        input_ids=ids_BL,
        attention_mask=whole_BL,
        position_ids=positions_BL,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
    )
    layers = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in past.layers]
    if any(k is None or k.dim() != 4 or k.shape[2] != whole_BL.shape[1] for k, _ in layers):
        raise InputError(
            f"{type(model).__name__}: some of its layers keep no keys and values of every token, "
            "which rollouts of several turns need; take backend vllm for it"
        )
    return output.logits[:, -1].float(), KVCache(layers, whole_BL)  # type: ignore[arg-type]
