"""Drawing the next token of each row, each from its own random numbers.

Legend: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fdfast.rollout.trajectory import SamplingOptions


def sample(
    logits_BV: Tensor, options: SamplingOptions, generators: Sequence[torch.Generator]
) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-probability before top_k and top_p.

    Args:
        logits_BV: (B, V) float32.
        options: how to sample.
        generators: B, on the CPU; each gives one number.
    """
    greedy = options.temperature == 0
    logprobs_BV = (logits_BV if greedy else logits_BV / options.temperature).log_softmax(-1)
    if greedy:
        tokens_B = logprobs_BV.argmax(-1)
    else:
        ranked_BV, order_BV = logprobs_BV.exp().sort(dim=-1, descending=True, stable=True)
        below_BV = ranked_BV.cumsum(-1)
        kept_BV = below_BV - ranked_BV < options.top_p  # the one that crosses it is kept
        if options.top_k:
            kept_BV[:, options.top_k :] = False
        masses_BV = torch.where(kept_BV, ranked_BV, 0.0).double().cumsum(-1)
        drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
        drawn_B1 = torch.stack(drawn).to(logits_BV.device).unsqueeze(1) * masses_BV[:, -1:]
        place_B1 = torch.searchsorted(masses_BV, drawn_B1, right=True)
        last_B1 = kept_BV.sum(-1, keepdim=True) - 1  # lest a rounded sum leads past the kept
        tokens_B = order_BV.gather(1, torch.minimum(place_B1, last_B1)).squeeze(1)
    chosen = logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    return tokens_B.tolist(), chosen.tolist()
