"""What the loss of each token is made of.

Legend: B sequences, L positions, n some tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """What the loss of each token is made of beside its log-probability, (B, L) or, of some tokens,
    (n,).
    """

    weights: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampling: Tensor | None
    entropy_weight: Tensor

    def at(self, positions: Tensor) -> "Tokens":
        """Of some tokens, by their positions in the flattened (B, L)."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.flatten()[positions]

        weights, advantages = (
            self.weights.flatten()[positions],
            self.advantages.flatten()[positions],
        )
        rest = (pick(self.old), pick(self.ref), pick(self.sampling))
        return Tokens(weights, advantages, *rest, self.entropy_weight)


def for_each_token(values: Tensor, trained: Tensor) -> Tensor:
    """(B,) or (B, L) -> (B, L), 0 where masked: what stands there, NaN too, must reach no sum."""
    values = values[:, None] if values.dim() == 1 else values
    return torch.where(trained, values, 0.0)
