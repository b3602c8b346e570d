"""Statistics of rows whose vocabulary lies on several ranks: each rank's own, merged.

A chunk of tokens costs one all-gather of 5 to 9 float64 numbers a token, and one all-reduce: of 2
numbers with a TeacherHidden, of K with a TeacherTopK, none without a teacher. Its logits stay in
the workspace meanwhile, so nothing is projected twice.
Legend: R tokens of a chunk, V this rank's columns, K top-k, W ranks, F numbers of a token.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fdfast.cpu.blocks import call
from fdfast.cpu.head_terms import HeadStats, fill_topk, head_math
from fdfast.divergences import NEG_INF
from fdfast.types import HeadOptions, TeacherTopK


def fill_sliced_statistics(
    stats: HeadStats,
    student_RV: Tensor,
    teacher_RV: Tensor | None,
    targets_R: Tensor,
    teacher: TeacherTopK | None,
    options: HeadOptions,
) -> None:
    """`fill_statistics` over the vocabulary of all ranks; a collective.

    Args:
        stats: of the chunk; written.
        student_RV: raw logits of this rank's columns; replaced by z.
        teacher_RV: those of a TeacherHidden, or None.
        targets_R: of the chunk, global ids.
        teacher: of the chunk, if it is a TeacherTopK; global ids.
        options: the op's.
    """
    ranks = options.vocabulary_slice
    assert ranks is not None
    bucket = teacher is not None and options.tail == "bucket"
    own = _own_statistics(student_RV, options)
    target = _Owned(targets_R[:, None] - ranks.first, student_RV)
    facts = [*own.norm_N2.T, own.entropy_N, own.argmax_N + float(ranks.first)]
    facts.append(target.values(student_RV)[:, 0])
    if teacher_RV is not None:
        tempered = replace(options, temperature=options.teacher_temperature)
        facts += [*_own_statistics(teacher_RV, tempered).norm_N2.T]
    topk = None if teacher is None else _Owned(teacher.ids - ranks.first, student_RV)
    if topk is not None and bucket:
        facts += [*topk.norm_of_others(student_RV).T]
    facts_WFR = ranks.gather(torch.stack(facts))

    _merge_student(stats, facts_WFR[:, :5])
    others_R2, _ = merged_norm(facts_WFR[:, 5:7]) if facts_WFR.shape[1] > 5 else (None, None)
    if teacher_RV is not None:
        assert others_R2 is not None
        stats.teacher_norm_N2.copy_(others_R2)
        _fill_divergence(stats, student_RV, teacher_RV, options)
    if teacher is not None and topk is not None:
        z_RK = topk.values(student_RV)
        ranks.add_up(z_RK)
        tail_R2 = torch.zeros_like(stats.norm_N2) if others_R2 is None else others_R2
        fill_topk(stats, z_RK, tail_R2, teacher, options)


class _Owned:
    """The columns among some ids of each row, (R, K) relative to this rank, that it holds."""

    def __init__(self, columns_RK: Tensor, z_RV: Tensor) -> None:
        R, V = z_RV.shape
        self.inside_RK = (columns_RK >= 0) & (columns_RK < V)
        flat_RK = columns_RK + torch.arange(R)[:, None] * V
        self.flat = flat_RK[self.inside_RK]

    def values(self, z_RV: Tensor) -> Tensor:
        """z of the columns it holds, 0 at the others, (R, K) float64: their sum over ranks is z."""
        values_RK = torch.zeros(self.inside_RK.shape, dtype=torch.float64)
        values_RK[self.inside_RK] = z_RV.view(-1)[self.flat].double()
        return values_RK

    def norm_of_others(self, z_RV: Tensor) -> Tensor:
        """Log-sum-exp, as (max, log_sum), of the columns that are not among the ids, (R, 2)."""
        norm_R2 = torch.zeros(len(z_RV), 2, dtype=torch.float64)
        z_flat = z_RV.view(-1)
        kept = z_flat[self.flat]
        z_flat[self.flat] = NEG_INF
        call("row_norms", z_RV.dtype, z_RV, *z_RV.shape, torch.get_num_threads(), norm_R2)
        z_flat[self.flat] = kept
        return norm_R2


def _own_statistics(logits_RV: Tensor, options: HeadOptions) -> HeadStats:
    """Norm, entropy and argmax as if this rank's columns were all; raw logits become z."""
    own = HeadStats.empty(len(logits_RV), None)
    call(
        "head_stats",
        logits_RV.dtype,
        logits_RV,
        None,
        *logits_RV.shape,
        torch.zeros(len(logits_RV), dtype=torch.int64),  # a target that nobody looks at
        head_math(options),
        torch.get_num_threads(),
        own.norm_N2,
        own.teacher_norm_N2,
        own.logprobs_N,
        own.entropy_N,
        own.divergence_N,
        own.center_N,
        own.argmax_N,
    )
    return own


def merged_norm(norms_W2R: Tensor) -> tuple[Tensor, Tensor]:
    """The norm over all ranks, (R, 2), and each rank's share of its sum, (W, R).

    A rank with nothing but -inf says {-inf, 0}, as csrc does, and adds nothing.
    """
    max_WR, log_sum_WR = norms_W2R.unbind(1)
    max_R = max_WR.amax(0)
    sum_WR = torch.where(max_WR == NEG_INF, 0.0, (log_sum_WR + (max_WR - max_R)).exp())
    total_R = torch.where(max_R == NEG_INF, 1.0, sum_WR.sum(0))
    return torch.stack([max_R, total_R.log()], 1), sum_WR / total_R


def _merge_student(stats: HeadStats, facts_W5R: Tensor) -> None:
    """Norm, entropy, argmax and the targets' log-probabilities of all ranks together, into
    `stats`.

    A rank's entropy is log_sum - sum p (z - max) with its own p and max; the sum moves to the
    common max by max_w - max, and counts by the rank's share.
    """
    max_WR, log_sum_WR, entropy_WR, argmax_WR, target_WR = facts_W5R.unbind(1)
    norm_R2, share_WR = merged_norm(facts_W5R[:, :2])
    max_R, log_sum_R = norm_R2.unbind(1)
    weighted_WR = (log_sum_WR - entropy_WR) + (max_WR - max_R)
    weighted_R = torch.where(share_WR == 0, 0.0, share_WR * weighted_WR).sum(0)
    stats.norm_N2.copy_(norm_R2)
    stats.entropy_N.copy_(log_sum_R - weighted_R)
    stats.logprobs_N.copy_((target_WR.sum(0) - max_R) - log_sum_R)
    lowest_R = torch.where(max_WR == max_R, argmax_WR, float("inf")).amin(0)
    stats.argmax_N.copy_(lowest_R)


def _fill_divergence(
    stats: HeadStats, student_RV: Tensor, teacher_RV: Tensor, options: HeadOptions
) -> None:
    """The divergence and its center: this rank's terms under the common norms, added up."""
    ranks = options.vocabulary_slice
    assert ranks is not None
    sums_2R = torch.zeros(2, len(student_RV), dtype=torch.float64)
    call(
        "head_divergence",
        student_RV.dtype,
        student_RV,
        teacher_RV,
        *student_RV.shape,
        head_math(options),
        torch.get_num_threads(),
        stats.norm_N2,
        stats.teacher_norm_N2,
        *sums_2R,
    )
    ranks.add_up(sums_2R)
    stats.divergence_N.copy_(sums_2R[0])
    stats.center_N.copy_(sums_2R[1])
