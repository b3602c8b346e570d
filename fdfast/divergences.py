"""The divergences between teacher T and student S: one table, used by every backend, test and page.

Each is a sum over outcomes v of f(t_v, s_v), with t = log p_T and s = log p_S. With w_v = df/ds_v,
the gradient by the student's logits is dz_v = w_v - p_S(v) * sum_u w_u, whichever divergence it is.
Legend: ... any leading shape, V outcomes (the vocabulary, or the K kept ones and a tail).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Divergence:
    """One row of the table: `terms(t, s, alpha)` gives f(t_v, s_v), shape (..., V); the texts say
    the same in print.
    """

    name: str
    code: int  # what the C++ and Triton kernels switch on
    needs_alpha: bool
    formula: str
    gradient: str
    source: str
    terms: Callable[[Tensor, Tensor, float], Tensor]


def _weighted(log_p_V: Tensor, difference_V: Tensor) -> Tensor:
    """exp(log_p) * difference with 0 * inf = 0, in the value and in the gradient."""
    absent_V = log_p_V == NEG_INF
    return log_p_V.exp() * difference_V.masked_fill(absent_V, 0.0)


def _log_mixture(t_V: Tensor, s_V: Tensor, alpha: float) -> Tensor:
    """Log(alpha p_T + (1 - alpha) p_S); an outcome that neither can reach gets 0, for its weight is
    0.
    """
    nowhere_V = (t_V == NEG_INF) & (s_V == NEG_INF)
    t_V, s_V = t_V.masked_fill(nowhere_V, 0.0), s_V.masked_fill(nowhere_V, 0.0)
    return torch.logaddexp(t_V + math.log(alpha), s_V + math.log1p(-alpha))


def _forward_kl(t_V: Tensor, s_V: Tensor, alpha: float) -> Tensor:
    return _weighted(t_V, t_V - s_V)


def _reverse_kl(t_V: Tensor, s_V: Tensor, alpha: float) -> Tensor:
    return _weighted(s_V, s_V - t_V)


def _jsd(t_V: Tensor, s_V: Tensor, alpha: float) -> Tensor:
    m_V = _log_mixture(t_V, s_V, alpha)
    return alpha * _weighted(t_V, t_V - m_V) + (1 - alpha) * _weighted(s_V, s_V - m_V)


def _skew_kl(t_V: Tensor, s_V: Tensor, alpha: float) -> Tensor:
    return _weighted(t_V, t_V - _log_mixture(t_V, s_V, alpha))


TABLE: dict[str, Divergence] = {
    row.name: row
    for row in (
        Divergence(
            name="forward_kl",
            code=0,
            needs_alpha=False,
            formula="KL(T||S) = sum p_T (t - s)",
            gradient="p_S - p_T  (truncated: M p_S - p_T 1[K])",
            source="Feedback Distillation (2026), 2605.30861; Hinton (2015), arXiv 1503.02531",
            terms=_forward_kl,
        ),
        Divergence(
            name="reverse_kl",
            code=1,
            needs_alpha=False,
            formula="KL(S||T) = sum p_S (s - t)",
            gradient="p_S (s - t - KL(S||T))",
            source="MiniLLM, Gu et al. (2023), eq. 1, arXiv 2306.08543",
            terms=_reverse_kl,
        ),
        Divergence(
            name="jsd",
            code=2,
            needs_alpha=True,
            formula="a KL(T||M) + (1-a) KL(S||M),  M = a T + (1-a) S",
            gradient="(1-a) p_S (s - m - KL(S||M))",
            source="GKD, Agarwal et al. (2023), eq. 1, arXiv 2306.13649",
            terms=_jsd,
        ),
        Divergence(
            name="skew_kl",
            code=3,
            needs_alpha=True,
            formula="KL(T||M),  M = a T + (1-a) S",
            gradient="(1-a) p_S (E_S[p_T/p_M] - p_T/p_M)",
            source="DistiLLM, Ko et al. (2024), eq. 3, arXiv 2402.03898",
            terms=_skew_kl,
        ),
    )
}

TAILS = ("truncate", "bucket", "renormalize")
