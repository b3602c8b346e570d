"""The GRPO family's loss of each token and its gradient, in one small kernel.

The formulas and their sources are in fdfast/reference.py (token_objective, k3). The gradient by
log p is what `policy_head`'s backward takes as the upstream gradient of `logprobs`, so one backward
of the head serves policy gradient and distillation together.
Legend: N tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdfast.kernels import launch
from fdfast.kernels.tile_math import clamp, expm1

CLIPPED = tl.constexpr(0)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
_FAMILY = {"cispo": CISPO.value, "sapo": SAPO.value}
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
BLOCK_N = 1024


@triton.jit
def _token_objective_kernel(
    log_ratio_ptr,  # (N,) float32
    advantages_ptr,  # (N,) float32
    logprobs_ptr,  # (N,) float32
    ref_logprobs_ptr,  # (N,) float32, or None
    loss_ptr,  # (N,) float32, written
    by_ratio_ptr,  # (N,) float32, written: d loss / d log_ratio
    by_logprob_ptr,  # (N,) float32, written: d loss / d logprobs, log_ratio held fixed
    N,
    epsilon,
    epsilon_high,
    tau_pos,
    tau_neg,
    beta,
    FAMILY: tl.constexpr,
    HAS_REF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N tokens; reads 12 to 16 bytes a token and writes 12."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    ratio_n = tl.exp(tl.load(log_ratio_ptr + offs_n, mask=mask_n, other=0.0))
    advantage_n = tl.load(advantages_ptr + offs_n, mask=mask_n, other=0.0)
    logprob_n = tl.load(logprobs_ptr + offs_n, mask=mask_n, other=0.0)
    by_ratio_n = tl.zeros((BLOCK_N,), tl.float32)
    by_logprob_n = tl.zeros((BLOCK_N,), tl.float32)
    if FAMILY == CISPO:
        by_logprob_n = -clamp(ratio_n, 0.0, epsilon_high) * advantage_n
        loss_n = by_logprob_n * logprob_n
    elif FAMILY == SAPO:
        tau_n = tl.where(advantage_n > 0.0, tau_pos, tau_neg)
        gate_n = tl.sigmoid(tau_n * (ratio_n - 1.0))
        loss_n = -advantage_n * gate_n * 4.0 / tau_n
        by_ratio_n = -4.0 * advantage_n * gate_n * (1.0 - gate_n) * ratio_n
    else:
        clipped_n = clamp(ratio_n, 1.0 - epsilon, 1.0 + epsilon_high)
        plain_n = ratio_n * advantage_n
        is_clipped_n = plain_n > clipped_n * advantage_n  # never of NaN
        loss_n = -tl.where(is_clipped_n, clipped_n * advantage_n, plain_n)
        by_ratio_n = tl.where(is_clipped_n, 0.0, -plain_n)
    if HAS_REF:
        toward_n = tl.load(ref_logprobs_ptr + offs_n, mask=mask_n, other=0.0) - logprob_n
        grown_n = expm1(toward_n)
        loss_n += beta * (grown_n - toward_n)
        by_logprob_n -= beta * grown_n
    tl.store(loss_ptr + offs_n, loss_n, mask=mask_n)
    tl.store(by_ratio_ptr + offs_n, by_ratio_n, mask=mask_n)
    tl.store(by_logprob_ptr + offs_n, by_logprob_n, mask=mask_n)


def token_objective_fwd(
    loss_type: str,
    log_ratio: Tensor,
    advantages: Tensor,
    logprobs: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token, before masks and normalisation, and its two partial derivatives.

    Args:
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo or sapo.
        log_ratio: log r, broadcastable to logprobs: (B, L), or (B, 1) for one ratio a sequence.
        advantages: A, broadcastable to logprobs.
        logprobs: log p of the policy, (B, L).
        ref_logprobs: of the reference policy, (B, L), for beta * k3; None: no such term.
        beta: its weight.
        epsilon: the lower clip range.
        epsilon_high: the upper clip range; for cispo the cap itself.
        sapo_temperature_pos: tau where A > 0.
        sapo_temperature_neg: tau where A <= 0.

    Returns:
        loss, d loss / d log_ratio and d loss / d logprobs (log_ratio held fixed), each (B, L)
        float32. Where log_ratio = logprobs - old_logprobs the gradient by log p is their sum.

    Raises:
        ValueError: no such loss.
    """
    if loss_type not in _FAMILY and loss_type not in CLIPPED_LOSSES:
        known = ", ".join((*CLIPPED_LOSSES, *_FAMILY))
        raise ValueError(f"token_objective: loss_type must be one of {known}; got {loss_type!r}")

    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.float32).expand(logprobs.shape).contiguous()

    given = [flat(x) for x in (log_ratio, advantages, logprobs)]
    ref = None if ref_logprobs is None else flat(ref_logprobs)
    written = [torch.empty_like(given[0]) for _ in range(3)]
    N = logprobs.numel()
    if N:
        with launch.on_device(logprobs):
            _token_objective_kernel[(triton.cdiv(N, BLOCK_N),)](
                *given,
                ref,
                *written,
                N,
                epsilon,
                epsilon_high,
                sapo_temperature_pos,
                sapo_temperature_neg,
                beta,
                FAMILY=_FAMILY.get(loss_type, CLIPPED.value),
                HAS_REF=ref is not None,
                BLOCK_N=BLOCK_N,
            )
    return written[0], written[1], written[2]


def token_objective_bwd(
    grad_loss: Tensor, by_log_ratio: Tensor, by_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients by log_ratio and logprobs, (B, L), from the upstream one of the loss."""
    return grad_loss * by_log_ratio, grad_loss * by_logprobs
