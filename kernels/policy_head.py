"""policy_head in Triton: the launchers. The kernels are in policy_head_sweep, _merge, _settle,
_grad and _filter.

Forward: one sweep keeps every statistic online; jsd and skew_kl against a teacher's hidden states
sweep twice. Backward, the *recompute* way: for each vocabulary block that fits the workspace a
kernel recomputes the tiles and writes dlogits (in the dtype of 16-bit inputs, else float32), then
PyTorch's GEMMs add to the hidden states' gradient and finish the block of the weight's, both summed
in float32. GEMM units (2 N D V): 2 forward (4 for jsd, skew_kl; 1 without TeacherHidden), 2 or 1 to
recompute, 2 for the gradients (1 for a frozen weight).

Forward results depend neither on the tokens beside a token nor on timing. The gradients are
deterministic; their GEMMs are the library's, whose order of sums may change with N.
Legend: M tokens, N trained tokens, D hidden, V vocabulary, K top-k, S splits, R tokens of a chunk,
B columns of a block.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fdfast.divergences import TABLE
from fdfast.kernels import launch
from fdfast.kernels.policy_head_backward import policy_head_bwd
from fdfast.kernels.policy_head_merge import MERGED, _merge_kernel, _sum_splits_kernel
from fdfast.kernels.policy_head_settle import _settle_kernel
from fdfast.kernels.policy_head_sweep import PARTIALS, _sweep_kernel
from fdfast.kernels.tile_math import NEG
from fdfast.kernels.topk_gradient import TopKGradient, topk_divergence
from fdfast.types import Head, HeadOptions, TeacherTopK

__all__ = ["HeadStats", "can_chunk", "policy_head_bwd", "policy_head_fwd"]

MERGE_BLOCK = 64  # tokens a program of the small kernels
TOPK_BLOCK = 4  # likewise, where each token brings its K
NO_LOGIT = NEG.value / 2  # a kernel's logit below this is -inf


@dataclass
class HeadStats:
    """What the forward pass keeps for the backward pass: N-sized, float64."""

    merged_RN: Tensor  # rows of _merge_kernel
    norm_N2: Tensor  # of it: the student's log-sum-exp as (max, log_sum)
    entropy_N: Tensor  # of it
    center_N: Tensor  # the constant in the divergence's gradient
    topk: TopKGradient | None = None


def can_chunk(student: Head, needs: tuple[bool, bool, bool], options: HeadOptions) -> bool:
    """Never: the token-chunk way has no kernel yet, policy_head_loss takes the op and its
    backward.
    """
    return False


def policy_head_fwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
) -> tuple[tuple[Tensor, ...], HeadStats]:
    """logprobs, entropy, divergence, teacher_mass (float32), argmax, each (N,); and what backward
    wants.

    Args:
        student: hidden (M, D), weight (V, D), bias (V,).
        targets_N: of the trained tokens.
        teacher: hidden (M, D_T) and its head, or ids and logprobs (N, K) of the trained tokens.
        options: everything that is no tensor.
        rows_N: which of the M tokens are trained; None for all.
    """
    full = teacher if isinstance(teacher, Head) else None
    topk = teacher if isinstance(teacher, TeacherTopK) else None
    launch.check_dtypes("policy_head", *student, *(full or ()))
    N, device = len(targets_N), targets_N.device
    kind = "single" if full is None else "pair"
    kind = launch.tile_kind(kind, softcap=options.logit_softcap is not None)
    tile = launch.tile_for(kind, student, full)
    merged_RN = torch.zeros(MERGED, N, dtype=torch.float64, device=device)
    argmax_N = torch.zeros(N, dtype=torch.int64, device=device)
    stats = HeadStats(merged_RN, merged_RN[0:2].T, merged_RN[3], center_N=merged_RN.new_zeros(N))
    K = 0 if topk is None else topk.ids.shape[1]
    z_NK = merged_RN.new_zeros(N, K)
    num_splits = triton.cdiv(len(student.weight_VD), tile.split_v)
    # Partial statistics and the settled ones; sorted ids, their order (int64) and their logits.
    token_bytes = 4 * (PARTIALS + 2) * num_splits + (K > 0) * (4 * num_splits + 40 * K) + 64
    with launch.on_device(targets_N):
        step = launch.token_chunk(N, token_bytes, options.workspace_bytes, tile.block_n)
        for start in range(0, N, max(step, 1)):
            chunk = slice(start, min(start + step, N))
            heads = (
                launch.chunk_of(student, rows_N, chunk)[0],
                launch.chunk_of(full, rows_N, chunk)[0],
            )
            rows_R = None if rows_N is None else rows_N[chunk]
            merged_RR, argmax_R, z_RK = _sweep(
                heads,
                targets_N[chunk],
                None if topk is None else topk.ids[chunk],
                options,
                rows_R,
                tile,
            )
            merged_RN[:, chunk], argmax_N[chunk] = merged_RR, argmax_R
            if z_RK is not None:
                z_NK[chunk] = z_RK
            elif full is not None and TABLE[options.divergence].needs_alpha:
                settled_2R = _settle(heads, merged_RR, options, rows_R)
                merged_RN[6, chunk], stats.center_N[chunk] = settled_2R
    divergence_N, mass_N = merged_RN[6], merged_RN.new_ones(N)
    if full is not None and options.divergence == "reverse_kl":
        stats.center_N = divergence_N
    if topk is not None:
        mass_N = topk.logprobs.double().exp().sum(1)
        divergence_N, stats.topk = topk_divergence(
            topk, z_NK, merged_RN[8:10], merged_RN[:2], options
        )
    fields = (merged_RN[2], merged_RN[3], divergence_N, mass_N)
    return (*(x.to(torch.float32) for x in fields), argmax_N), stats


def _sweep(
    heads: tuple[Head | None, Head | None],
    targets_R: Tensor,
    ids_RK: Tensor | None,
    options: HeadOptions,
    rows_R: Tensor | None,
    tile: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One sweep and its merge: (MERGED, R) and, at ids, logits (R, K), float64; argmax (R,)."""
    student, teacher = heads
    assert student is not None
    R, V = len(targets_R), len(student.weight_VD)
    num_splits = triton.cdiv(V, tile.split_v)
    device = targets_R.device
    part_PSR = torch.empty(PARTIALS, num_splits, R, dtype=torch.float32, device=device)
    best_SR = torch.empty(num_splits, R, dtype=torch.int32, device=device)
    z_target_R = torch.empty(R, dtype=torch.float32, device=device)
    sorted_RK = first_SR = z_RK = order_RK = None
    K = 0
    if ids_RK is not None:
        K = ids_RK.shape[1]
        sorted_RK, order_RK = ids_RK.to(torch.int32).sort(1)
        begins_S = torch.arange(num_splits, dtype=torch.int32, device=device) * tile.split_v
        first_RS = torch.searchsorted(sorted_RK, begins_S.repeat(R, 1), out_int32=True)
        first_SR = first_RS.T.contiguous()
        z_RK = torch.empty(R, K, dtype=torch.float32, device=device)
    merged_RR = torch.zeros(MERGED, R, dtype=torch.float64, device=device)
    argmax_R = torch.zeros(R, dtype=torch.int64, device=device)
    flags = {
        "HAS_TEACHER": teacher is not None,
        "HAS_TOPK": K > 0,
        "BY_STUDENT": options.divergence == "reverse_kl",
    }
    _sweep_kernel[(triton.cdiv(R, tile.block_n) * num_splits,)](
        targets_ptr=targets_R,
        ids_ptr=sorted_RK,
        first_ptr=first_SR,
        part_ptr=part_PSR,
        best_ptr=best_SR,
        z_target_ptr=z_target_R,
        z_topk_ptr=z_RK,
        N=R,
        K=K,
        num_splits=num_splits,
        SPLIT_V=tile.split_v,
        **flags,
        **launch.only(
            _sweep_kernel, launch.gemm_arguments(student, teacher, rows_R, options, tile)
        ),
    )
    block_n = MERGE_BLOCK if K == 0 else TOPK_BLOCK
    _merge_kernel[(triton.cdiv(R, block_n),)](
        part_PSR,
        best_SR,
        z_target_R,
        sorted_RK,
        z_RK,
        merged_RR,
        argmax_R,
        R,
        K,
        num_splits,
        **flags,
        BLOCK_N=block_n,
        BLOCK_K=triton.next_power_of_2(max(K, 1)),
    )
    if z_RK is None or order_RK is None:
        return merged_RR, argmax_R, None
    z_RK = z_RK.masked_fill(z_RK <= NO_LOGIT, float("-inf")).double()
    return merged_RR, argmax_R, torch.empty_like(z_RK).scatter_(1, order_RK, z_RK)


def _settle(
    heads: tuple[Head | None, Head | None],
    merged_RR: Tensor,
    options: HeadOptions,
    rows_R: Tensor | None,
) -> Tensor:
    """jsd or skew_kl and its center, (2, R) float64."""
    student, teacher = heads
    assert student is not None
    assert teacher is not None
    tile = launch.tile_for("settle", student, teacher)
    R = merged_RR.shape[1]
    num_splits = triton.cdiv(len(student.weight_VD), tile.split_v)
    part_2SR = torch.empty(2, num_splits, R, dtype=torch.float32, device=merged_RR.device)
    settled_2R = merged_RR.new_empty(2, R)
    _settle_kernel[(triton.cdiv(R, tile.block_n) * num_splits,)](
        row_ptr=launch.row_constants(merged_RR),
        part_ptr=part_2SR,
        N=R,
        num_splits=num_splits,
        alpha=options.alpha,
        rest=1.0 - options.alpha,
        IS_JSD=options.divergence == "jsd",
        SPLIT_V=tile.split_v,
        **launch.only(
            _settle_kernel, launch.gemm_arguments(student, teacher, rows_R, options, tile)
        ),
    )
    grid = (triton.cdiv(R, MERGE_BLOCK), 2)
    _sum_splits_kernel[grid](part_2SR, settled_2R, R, num_splits, BLOCK_N=MERGE_BLOCK)
    return settled_2R
