"""The divergence to a TeacherTopK and its gradient by the student's logits: N x K numbers, float64.

Plain PyTorch, for any backend that has the logits at the ids and the norm of the others.
Legend: N tokens, K top-k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfast.reference import divergence_on_topk
from fdfast.types import HeadOptions, TeacherTopK


@dataclass
class TopKGradient:
    """d(divergence)/dz: dz_NK at the ids, and coef_N * p_S at every other token."""

    log_p_NK: Tensor
    dz_NK: Tensor
    coef_N: Tensor


@torch.enable_grad()
def topk_divergence(
    teacher: TeacherTopK, z_NK: Tensor, tail_2N: Tensor, norm_2N: Tensor, options: HeadOptions
) -> tuple[Tensor, TopKGradient]:
    """The divergence through K tokens and a tail, (N,), and its gradient.

    With w = d(divergence)/d(log p) and W their sum, dz_v = w_v - p_v W at the ids. Each other token
    has its share p_v / p_tail of w_tail, so dz_v = p_v (w_tail / p_tail - W).

    Args:
        teacher: ids and log-probabilities (N, K).
        z_NK: the student's tempered logits at the ids, float64; -inf where forbidden.
        tail_2N: (max, log_sum) of the others, float64; (-inf, 0) where there is none.
        norm_2N: (max, log_sum) of all.
        options: divergence, alpha and tail.
    """
    s_NK = ((z_NK - norm_2N[0][:, None]) - norm_2N[1][:, None]).requires_grad_()
    s_tail_N = ((tail_2N[0] - norm_2N[0]) + (tail_2N[1] - norm_2N[1])).requires_grad_()
    divergence_N = divergence_on_topk(
        options.divergence,
        teacher.logprobs.double(),
        s_NK,
        s_tail_N,
        alpha=options.alpha,
        tail=options.tail,
    )
    w_NK, w_tail_N = torch.autograd.grad(
        divergence_N.sum(), (s_NK, s_tail_N), allow_unused=True, materialize_grads=True
    )
    total_N = w_NK.sum(1) + w_tail_N
    log_p_NK, p_tail_N = s_NK.detach(), s_tail_N.detach().exp()
    share_N = torch.where(p_tail_N > 0, w_tail_N / p_tail_N, 0.0)
    dz_NK = w_NK - log_p_NK.exp() * total_N[:, None]
    return divergence_N.detach(), TopKGradient(log_p_NK, dz_NK, share_N - total_N)
