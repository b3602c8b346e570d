"""What every loss returns, and the names of its metrics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfast.types import PolicyHead

# Metrics bear TRL's names; these are verl's for the ones that mean the same there.
VERL_NAMES = {
    "loss": "actor/loss",
    "policy_loss": "actor/pg_loss",
    "kl": "actor/kl_loss",
    "entropy": "actor/entropy",
    "ppo_kl": "actor/ppo_kl",
    "clip_ratio/region_mean": "actor/pg_clipfrac",
    "grad_norm": "actor/grad_norm",
    "learning_rate": "actor/lr",
    "reward": "critic/rewards/mean",
    "completions/mean_length": "response_length/mean",
    "completions/max_length": "response_length/max",
    "completions/min_length": "response_length/min",
    "completions/clipped_ratio": "response_length/clip_ratio",
    "time/rollout": "timing_s/gen",
    "time/verify": "timing_s/reward",
    "time/update": "timing_s/update_actor",
    "time/weight_sync": "timing_s/update_weights",
    "time/step": "timing_s/step",
}


@dataclass(frozen=True)
class LossOutput:
    """A loss and what was seen on the way.

    Attributes:
        loss: scalar, the statistics dtype; differentiable. Summed over micro-batches and ranks it
            is the whole loss.
        metrics: name -> scalar without gradient, means over this call's trained tokens (or
            sequences), TRL's names.
        head: every per-token output, shape of `targets`, without gradient (for a loss of your own
            take `policy_head`).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    head: PolicyHead


def verl_names(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same metrics under verl's names; one that verl does not have keeps its own."""
    return {VERL_NAMES.get(name, name): value for name, value in metrics.items()}


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """The sum over trained positions; what stands at the others, NaN too, does not count."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean over trained positions, without gradient; 0 where there are none."""
    return masked_sum(x.detach(), mask) / mask.sum().clamp(min=1)


def normalizer(given: Tensor | float | None, local: Tensor, name: str) -> Tensor | float:
    """The global count that a sum is divided by: the caller's, else this call's own; at least 1."""
    if given is None:
        return local.clamp(min=1)
    if not isinstance(given, Tensor) and not given > 0:
        raise ValueError(
            f"{name} must be positive, the count over all micro-batches and ranks; got {given}"
        )
    return given
