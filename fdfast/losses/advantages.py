"""Advantages of a group of generations, by TRL's option names.

Legend: B sequences.
"""

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, num_generations: int, *, scale_rewards: str = "group"
) -> Tensor:
    """Rewards minus their group's mean, scaled: (B,) with the generations of a prompt side by side
    -> (B,).

    Args:
        rewards: (B,) floating, B a multiple of num_generations.
        num_generations: generations a prompt.
        scale_rewards: group: divide by the group's standard deviation (Shao et al. 2024, arXiv
            2402.03300); batch: by the whole batch's (arXiv 2508.08221); none: not at all (Dr. GRPO,
            Liu et al. 2025, arXiv 2503.20783).

    Raises:
        ValueError: sizes do not fit or no such scale.
    """
    if rewards.dim() != 1 or num_generations < 1 or len(rewards) % num_generations:
        raise ValueError(
            "group_advantages: rewards must have shape (B,), B a multiple of num_generations; "
            f"got {tuple(rewards.shape)} and {num_generations}"
        )
    grouped = rewards.view(-1, num_generations)
    centred = grouped - grouped.mean(1, keepdim=True)
    if scale_rewards == "none":
        return centred.flatten()
    if scale_rewards == "group":
        std = grouped.std(1, keepdim=True) if num_generations > 1 else torch.zeros_like(centred)
    elif scale_rewards == "batch":
        std = rewards.std() if len(rewards) > 1 else rewards.new_zeros(())
    else:
        raise ValueError(
            f"group_advantages: scale_rewards must be group, batch or none; got {scale_rewards!r}"
        )
    return (centred / (std + 1e-4)).flatten()
