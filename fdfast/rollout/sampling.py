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
        drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in generators]
        drawn_B1 = torch.stack(drawn).to(logits_BV.device).unsqueeze(1)
        if options.top_p < 1 or options.top_k:
            tokens_B1 = _draw_from_the_nucleus(logprobs_BV.exp(), drawn_B1, options)
        else:
            tokens_B1 = _draw(logprobs_BV.exp(), drawn_B1)
        tokens_B = tokens_B1.squeeze(1)
    chosen = logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    return tokens_B.tolist(), chosen.tolist()


def _draw(weights_BV: Tensor, drawn_B1: Tensor) -> Tensor:
    """The place (B, 1) at which the weights' running sum passes a share drawn from [0, 1)."""
    masses_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    place_B1 = torch.searchsorted(masses_BV, drawn_B1 * masses_BV[:, -1:], right=True)
    # Lest a rounded product leads past the last that weighs something.
    return torch.minimum(place_B1, (masses_BV < masses_BV[:, -1:]).sum(-1, keepdim=True))


def _draw_from_the_nucleus(probs_BV: Tensor, drawn_B1: Tensor, options: SamplingOptions) -> Tensor:
    """Likewise from the most probable tokens alone."""
    ranked_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = ranked_BV.cumsum(-1) - ranked_BV < options.top_p  # the one that crosses it is kept
    if options.top_k:
        kept_BV[:, options.top_k :] = False
    place_B1 = _draw(torch.where(kept_BV, ranked_BV, 0.0), drawn_B1)
    return order_BV.gather(1, place_B1)
