"""The launchers of policy_head's forward kernels, and what they make of a chunk of tokens.

Legend: N trained tokens, D hidden, V vocabulary, K top-k, S splits, P parts of kept logits, R
tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fdfast.kernels import launch
from fdfast.kernels.policy_head_merge import MERGED, _merge_kernel, _sum_splits_kernel
from fdfast.kernels.policy_head_pair import _pair_kl_kernel
from fdfast.kernels.policy_head_settle import _settle_kernel
from fdfast.kernels.policy_head_sweep import PARTIALS, _sweep_kernel
from fdfast.kernels.tile_math import NEG
from fdfast.kernels.tiles import Tile
from fdfast.kernels.topk_gradient import TopKGradient, topk_divergence
from fdfast.types import Head, HeadOptions, TeacherTopK

MERGE_BLOCK = 64  # tokens a program of the small kernels
TOPK_BLOCK = 4  # likewise, where each token brings its K
PAIR_ELEMENTS = 1024  # of a step of the kernels that read the kept logits
NO_LOGIT = NEG.value / 2  # a kernel's logit below this is -inf


@dataclass
class HeadStats:
    """What the forward pass keeps for the backward pass: N-sized, float64."""

    merged_RN: Tensor  # rows of _merge_kernel
    norm_N2: Tensor  # of it: the student's log-sum-exp as (max, log_sum)
    entropy_N: Tensor  # of it
    center_N: Tensor  # the constant in the divergence's gradient
    topk: TopKGradient | None = None


@dataclass
class Kept:
    """The logits of a chunk as the token-chunk way stores them: see policy_head_pair."""

    base_RV: Tensor  # float16 or float32
    delta_RV: Tensor | None  # likewise; None for float32 without a TeacherHidden
    ref_2PR: Tensor  # float32
    part_v: int  # columns of a part
    split_v: int  # columns of a split

    def arguments(self) -> dict[str, Any]:
        """What the kernels that read it share."""
        R, V = self.base_RV.shape
        return {
            "base_ptr": self.base_RV,
            "delta_ptr": self.delta_RV,
            "ref_ptr": self.ref_2PR,
            "N": R,
            "V": V,
            "num_parts": self.ref_2PR.shape[1],
            "num_splits": self.num_splits,
            "stride_bn": self.base_RV.stride(0),
            "PARTS_OF_SPLIT": self.split_v // self.part_v,
            "BLOCK_N": self.block_n,
            "PART_V": self.part_v,
        }

    @property
    def num_splits(self) -> int:
        """Of the vocabulary."""
        return -(-self.base_RV.shape[1] // self.split_v)

    @property
    def block_n(self) -> int:
        """Tokens a program of those kernels."""
        return 64 if launch.INTERPRETING else max(PAIR_ELEMENTS // self.part_v, 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Of those kernels."""
        return (-(-len(self.base_RV) // self.block_n), self.num_splits)


def sweep_bytes(V: int, K: int, tile: Tile) -> int:
    """What the sweep of one token holds: partial statistics and the settled ones; sorted ids, their
    order (int64) and their logits.
    """
    num_splits = -(-V // tile.split_v)
    return 4 * (PARTIALS + 2) * num_splits + (K > 0) * (4 * num_splits + 40 * K) + 64


def finish(
    merged_RN: Tensor,
    center_N: Tensor,
    z_NK: Tensor | None,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
) -> tuple[tuple[Tensor, ...], HeadStats]:
    """logprobs, entropy, divergence and teacher_mass, float32, and what the gradient wants."""
    stats = HeadStats(merged_RN, merged_RN[0:2].T, merged_RN[3], center_N)
    divergence_N, mass_N = merged_RN[6], torch.ones_like(merged_RN[6])
    if isinstance(teacher, Head) and options.divergence == "reverse_kl":
        stats.center_N = divergence_N
    if isinstance(teacher, TeacherTopK):
        assert z_NK is not None
        mass_N = teacher.logprobs.double().exp().sum(1)
        divergence_N, stats.topk = topk_divergence(
            teacher, z_NK, merged_RN[8:10], merged_RN[:2], options
        )
    fields = (merged_RN[2], merged_RN[3], divergence_N, mass_N)
    return tuple(x.to(torch.float32) for x in fields), stats


def kept_arguments(kept: Kept | None) -> dict[str, Any]:
    """Where the sweep stores the logits under its names; None is nowhere."""
    if kept is None:
        absent = dict.fromkeys(("base_ptr", "delta_ptr", "ref_ptr"))
        return {**absent, "num_parts": 0, "stride_bn": 0, "KEEPS": False}
    names = ("base_ptr", "delta_ptr", "ref_ptr", "num_parts", "stride_bn")
    return {**{name: kept.arguments()[name] for name in names}, "KEEPS": True}


def sweep(
    heads: tuple[Head | None, Head | None],
    targets_R: Tensor,
    ids_RK: Tensor | None,
    options: HeadOptions,
    rows_R: Tensor | None,
    tile: Tile,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One sweep and its merge: (MERGED, R) and, at ids, logits (R, K), float64; argmax (R,).

    Args:
        heads: of student and teacher.
        targets_R: of the chunk.
        ids_RK: of a TeacherTopK.
        options: the op's.
        rows_R: which rows of the heads' hidden states; None for all.
        tile: of the sweep.
        kept: where to store the logits, for the token-chunk way.
    """
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
    arguments = launch.gemm_arguments(student, teacher, rows_R, options, tile)
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
        **kept_arguments(kept),
        **flags,
        **launch.only(_sweep_kernel, arguments),
    )
    if kept is not None and teacher is not None:
        _pair_kl_kernel[kept.grid](
            part_ptr=part_PSR,
            BY_STUDENT=flags["BY_STUDENT"],
            **kept.arguments(),
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


def settle(
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
