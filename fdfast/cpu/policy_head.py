"""policy_head on the CPU: PyTorch's GEMMs on bounded blocks, the elementwise part fused in C++
(csrc/policy_head.cpp).

Forward: a chunk of tokens meets the whole vocabulary, so every statistic of a row is exact and
final at once.
Backward: blocks of tokens x vocabulary are projected again; the gradient of a vocabulary block is
finished before the
next begins, so its float32 sum needs no second copy of the weight. With a grad filter one more
sweep finds, for each
token, the size below which entries may be dropped.

Memory beside inputs, gradients and N-sized outputs: the workspace of the options. A bfloat16 or
float16 `hidden`
holds its gradient once more in float32 while it is summed.
Legend: N trained tokens, D hidden, V vocabulary, K top-k, R tokens of a chunk, B vocabulary columns
of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfast import _cpu
from fdfast.cpu.blocks import RowBlocks, TileBlocks, call, hidden_rows, tile_shape
from fdfast.divergences import NEG_INF, TABLE
from fdfast.reference import divergence_on_topk, statistics_dtype
from fdfast.types import Head, HeadOptions, TeacherTopK

# The filter's second sweep sees logits that differ by a rounding; this much of the bound is kept
# back for it.
FILTER_MARGIN = 1e-3


@dataclass
class HeadStats:
    """What the forward pass keeps for the backward pass: N-sized, float64."""

    norm_N2: Tensor  # the student's log-sum-exp as (max, log_sum)
    teacher_norm_N2: Tensor
    entropy_N: Tensor
    center_N: Tensor  # the constant in the divergence's gradient, see csrc
    topk: "TopKGradient | None" = None


@dataclass
class TopKGradient:
    """The divergence to a TeacherTopK, by dz: at its K tokens, and what multiplies p_S at every
    other.
    """

    log_p_NK: Tensor
    dz_NK: Tensor
    coef_N: Tensor


def _head_math(options: HeadOptions) -> _cpu.HeadMath:
    return _cpu.HeadMath(
        divergence=TABLE[options.divergence].code,
        alpha=options.alpha,
        temperature=options.temperature,
        teacher_temperature=options.teacher_temperature,
        softcap=options.logit_softcap or 0.0,
    )


def _filter_copies(options: HeadOptions) -> int:
    """Tensors of a block's shape that a filter makes: magnitudes, the gathered ones, those in
    float64.
    """
    return 0 if options.grad_filter is None else 4


def policy_head_fwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
) -> tuple[tuple[Tensor, ...], HeadStats]:
    """logprobs, entropy, divergence, teacher_mass (float32 or float64), argmax, each (N,); and what
    backward wants.

    Args:
        student: hidden (M, D), weight (V, D), bias (V,).
        targets_N: of the trained tokens.
        teacher: hidden (M, D_T) and its head, or ids and logprobs (N, K) of the trained tokens.
        options: everything that is no tensor.
        rows_N: which of the M tokens are trained; None for all.
    """
    N, V = len(targets_N), len(student.weight_VD)
    dtype = statistics_dtype(student.hidden_ND, student.weight_VD)
    math = _head_math(options)
    logprobs_N, divergence_N, mass_N = (torch.zeros(N, dtype=torch.float64) for _ in range(3))
    stats = HeadStats(
        norm_N2=mass_N.new_zeros(N, 2),
        teacher_norm_N2=mass_N.new_zeros(N, 2),
        entropy_N=mass_N.new_zeros(N),
        center_N=mass_N.new_zeros(N),
    )
    argmax_N = torch.zeros(N, dtype=torch.int64)
    topk = teacher if isinstance(teacher, TeacherTopK) else None
    if topk is not None:
        z_NK, tail_norm_N2 = mass_N.new_zeros(topk.ids.shape), mass_N.new_zeros(N, 2)
    blocks = RowBlocks(
        student,
        teacher if isinstance(teacher, Head) else None,
        rows_N,
        dtype=dtype,
        workspace_bytes=options.workspace_bytes,
    )
    # A workspace that is too small for the backward pass is an error before any work is done.
    tile_shape(
        student,
        blocks.teacher,
        N,
        dtype,
        options.workspace_bytes,
        copies=_filter_copies(options),
    )
    threads = torch.get_num_threads()
    for rows in blocks.chunks():
        R = rows.stop - rows.start
        student_RV, teacher_RV = blocks.project(rows)
        call(
            "head_stats",
            dtype,
            student_RV,
            teacher_RV,
            R,
            V,
            targets_N[rows],
            math,
            threads,
            stats.norm_N2[rows],
            stats.teacher_norm_N2[rows],
            logprobs_N[rows],
            stats.entropy_N[rows],
            divergence_N[rows],
            stats.center_N[rows],
            argmax_N[rows],
        )
        if topk is not None:
            z_NK[rows] = student_RV.gather(1, topk.ids[rows]).double()
            student_RV.scatter_(1, topk.ids[rows], NEG_INF)
            call("row_norms", dtype, student_RV, R, V, threads, tail_norm_N2[rows])
    mass_N.fill_(1.0)
    if topk is not None:
        mass_N = topk.logprobs.double().exp().sum(1)
        divergence_N, stats.topk = _topk_divergence(topk, z_NK, tail_norm_N2, stats, options)
    fields = (logprobs_N, stats.entropy_N, divergence_N, mass_N)
    return (*(x.to(dtype) for x in fields), argmax_N), stats


@torch.enable_grad()
def _topk_divergence(
    teacher: TeacherTopK, z_NK: Tensor, tail_norm_N2: Tensor, stats: HeadStats, options: HeadOptions
) -> tuple[Tensor, TopKGradient]:
    """The divergence through K tokens and a tail, (N,), and its gradient by the logits; all
    float64.

    With w = d(divergence)/d(log p) and W their sum, dz_v = w_v - p_v W at the K tokens, and every
    token of the tail has
    its share p_v / p_tail of w_tail: dz_v = p_v (w_tail / p_tail - W).
    """
    max_N1, log_sum_N1 = stats.norm_N2[:, :1], stats.norm_N2[:, 1:]
    s_NK = ((z_NK - max_N1) - log_sum_N1).requires_grad_()
    s_tail_N = (tail_norm_N2[:, 0] - max_N1[:, 0]) + (tail_norm_N2[:, 1] - log_sum_N1[:, 0])
    s_tail_N.requires_grad_()
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
    p_NK, p_tail_N = s_NK.detach().exp(), s_tail_N.detach().exp()
    total_N = w_NK.sum(1) + w_tail_N
    tail_share_N = torch.where(p_tail_N > 0, w_tail_N / p_tail_N, 0.0)
    gradient = TopKGradient(
        log_p_NK=s_NK.detach(), dz_NK=w_NK - p_NK * total_N[:, None], coef_N=tail_share_N - total_N
    )
    return divergence_N.detach(), gradient


class _GradTerms:
    """dlogits of any block from the upstream gradients: see head_grads in csrc/policy_head.hpp."""

    def __init__(
        self,
        targets_N: Tensor,
        teacher: Head | TeacherTopK | None,
        stats: HeadStats,
        grads: tuple[Tensor, Tensor, Tensor],
        math: _cpu.HeadMath,
    ) -> None:
        g_logprobs_N, g_entropy_N, g_divergence_N = (g.double().contiguous() for g in grads)
        self.targets_N, self.stats, self.math = targets_N, stats, math
        self.coef_target_N = g_logprobs_N
        self.coef_p_N = -g_logprobs_N - g_entropy_N * stats.entropy_N
        self.coef_plogp_N = -g_entropy_N
        self.coef_divergence_N = g_divergence_N
        self.topk_ids_NK: Tensor | None = None
        self.topk_dz_NK: Tensor | None = None
        if stats.topk is not None:
            assert isinstance(teacher, TeacherTopK)
            log_p_NK = stats.topk.log_p_NK
            direct_NK = self.coef_p_N[:, None] + self.coef_plogp_N[:, None] * log_p_NK.clamp(
                min=-1e300
            )
            self.topk_ids_NK = teacher.ids.contiguous()
            self.topk_dz_NK = (
                log_p_NK.exp() * direct_NK + g_divergence_N[:, None] * stats.topk.dz_NK
            )
            self.coef_p_N = self.coef_p_N + g_divergence_N * stats.topk.coef_N

    def apply(self, student_RB: Tensor, teacher_RB: Tensor | None, rows: slice, first: int) -> None:
        """Replace raw logits of the student's block, from column `first` on, by their gradient."""
        stats, ids_NK, dz_NK = self.stats, self.topk_ids_NK, self.topk_dz_NK
        call(
            "head_grads",
            student_RB.dtype,
            student_RB,
            teacher_RB,
            *student_RB.shape,
            first,
            self.math,
            torch.get_num_threads(),
            stats.norm_N2[rows],
            stats.teacher_norm_N2[rows],
            stats.center_N[rows],
            self.coef_p_N[rows],
            self.coef_plogp_N[rows],
            self.coef_divergence_N[rows],
            self.targets_N[rows],
            self.coef_target_N[rows],
            None if ids_NK is None else ids_NK[rows],
            None if dz_NK is None else dz_NK[rows],
            0 if ids_NK is None else ids_NK.shape[1],
        )


def _filter_thresholds(
    terms: _GradTerms,
    student: Head,
    teacher: Head | None,
    options: HeadOptions,
    rows_N: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """For each token the size below which |dlogits| may be dropped, and the sum of |dlogits|, (N,)
    float64.
    """
    assert options.grad_filter is not None
    blocks = RowBlocks(
        student, teacher, rows_N, dtype=dtype, workspace_bytes=options.workspace_bytes
    )
    threshold_N, total_N = torch.zeros(2, blocks.num_tokens, dtype=torch.float64)
    for rows in blocks.chunks():
        dlogits_RV, teacher_RV = blocks.project(rows)
        terms.apply(dlogits_RV, teacher_RV, rows, 0)
        share = options.grad_filter * (1 - FILTER_MARGIN)
        call(
            "row_thresholds",
            dtype,
            dlogits_RV,
            *dlogits_RV.shape,
            share,
            torch.get_num_threads(),
            threshold_N[rows],
            total_N[rows],
        )
    return threshold_N.to(dtype), total_N


def policy_head_bwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
    stats: HeadStats,
    grads: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of hidden (M, D), weight and bias (None where not needed); the dropped share of
    |dlogits|, (N,).

    Args:
        student: as in the forward pass.
        targets_N: likewise.
        teacher: likewise.
        options: likewise.
        rows_N: likewise.
        stats: what the forward pass returned.
        grads: upstream gradients of logprobs, entropy and divergence, each (N,).
        needs: which of hidden, weight and bias want a gradient.
    """
    dtype = statistics_dtype(student.hidden_ND, student.weight_VD)
    hidden_MD, weight_VD, bias_V = student
    full_teacher = teacher if isinstance(teacher, Head) else None
    terms = _GradTerms(targets_N, teacher, stats, grads, _head_math(options))
    dhidden_MD = torch.zeros_like(hidden_MD, dtype=dtype) if needs[0] else None
    dweight_VD = (
        torch.zeros_like(weight_VD, memory_format=torch.contiguous_format) if needs[1] else None
    )
    dbias_V = None
    if needs[2] and bias_V is not None:
        dbias_V = torch.zeros_like(bias_V, dtype=dtype)
    filtered = options.grad_filter is not None
    threshold_N = total_N = kept_N = torch.zeros(len(targets_N), dtype=torch.float64)
    if filtered:
        threshold_N, total_N = _filter_thresholds(
            terms, student, full_teacher, options, rows_N, dtype
        )
    blocks = TileBlocks(
        student,
        full_teacher,
        rows_N,
        dtype=dtype,
        workspace_bytes=options.workspace_bytes,
        copies=_filter_copies(options),
    )
    for block in blocks.vocabulary_blocks():
        heads = blocks.widened(block)
        weight_BD = heads[0][0]
        sum_BD = None
        if dweight_VD is not None:  # summed in place where its dtype allows
            sum_BD = dweight_VD[block].to(dtype)
        for rows in blocks.chunks():
            hidden_RD = hidden_rows(student, rows_N, rows, dtype)
            dlogits_RB, teacher_RB = blocks.project(rows, hidden_RD, heads)
            terms.apply(dlogits_RB, teacher_RB, rows, block.start)
            columns = None
            if filtered:
                magnitude_RB = dlogits_RB.abs()
                columns = (magnitude_RB >= threshold_N[rows, None]).any(0).nonzero().squeeze(1)
                kept_N[rows] += magnitude_RB[:, columns].sum(1, dtype=torch.float64)
                del magnitude_RB
            _add_products(
                dlogits_RB, columns, hidden_RD, weight_BD, sum_BD, dhidden_MD, rows_N, rows
            )
            if dbias_V is not None:
                dbias_V[block] += dlogits_RB.sum(0)
        if dweight_VD is not None and sum_BD is not None and dweight_VD.dtype != dtype:
            dweight_VD[block] = sum_BD
        del heads, weight_BD, sum_BD  # before the next block's are made
    dropped_N = torch.zeros_like(kept_N)
    if filtered:  # a token whose gradient is 0 loses nothing
        dropped_N = torch.where(total_N > 0, 1.0 - kept_N / total_N, 0.0).clamp(min=0.0)
    if dhidden_MD is not None:
        dhidden_MD = dhidden_MD.to(hidden_MD.dtype)
    if dbias_V is not None and bias_V is not None:
        dbias_V = dbias_V.to(bias_V.dtype)
    return dhidden_MD, dweight_VD, dbias_V, dropped_N.to(dtype)


def _add_products(
    dlogits_RB: Tensor,
    columns: Tensor | None,
    hidden_RD: Tensor,
    weight_BD: Tensor,
    sum_BD: Tensor | None,
    dhidden_MD: Tensor | None,
    rows_N: Tensor | None,
    rows: slice,
) -> None:
    """dweight += dlogits.T @ hidden and dhidden += dlogits @ weight, on the named columns only
    (None for all).
    """
    if columns is not None:
        dlogits_RB, weight_BD = dlogits_RB[:, columns], weight_BD[columns]
    if sum_BD is not None and columns is None:
        sum_BD.addmm_(dlogits_RB.T, hidden_RD)
    elif sum_BD is not None and columns is not None:
        sum_BD.index_add_(0, columns, dlogits_RB.T @ hidden_RD)
    if dhidden_MD is not None and rows_N is None:
        dhidden_MD[rows].addmm_(dlogits_RB, weight_BD)
    elif dhidden_MD is not None and rows_N is not None:
        dhidden_MD.index_add_(0, rows_N[rows], dlogits_RB @ weight_BD)
