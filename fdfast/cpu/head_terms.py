"""What is N-sized in policy_head on the CPU: statistics of the rows, coefficients of their
gradients.

Legend: N trained tokens, V vocabulary, K top-k, R tokens of a chunk, B vocabulary columns of a
block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fdfast import _cpu
from fdfast.cpu.blocks import call
from fdfast.divergences import NEG_INF, TABLE
from fdfast.reference import divergence_on_topk
from fdfast.token_loss import Upstream
from fdfast.types import Head, HeadOptions, TeacherTopK

# A filter's sums have roundings, and a second sweep sees logits that differ by one; this much of
# the bound is kept for them.
FILTER_MARGIN = 1e-3


@dataclass
class TopKGradient:
    """The divergence to a TeacherTopK, by dz: at its K tokens, and what multiplies p_S at every
    other.
    """

    log_p_NK: Tensor
    dz_NK: Tensor
    coef_N: Tensor


@dataclass
class HeadStats:
    """What the forward pass finds out about each token: N-sized, float64.

    Attributes:
        norm_N2: the student's log-sum-exp as (max, log_sum).
        teacher_norm_N2: the teacher's.
        logprobs_N: of the targets.
        entropy_N: nats.
        divergence_N: nats.
        center_N: the constant in the divergence's gradient, see csrc.
        argmax_N: int64.
        topk: with a TeacherTopK.
    """

    norm_N2: Tensor
    teacher_norm_N2: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    divergence_N: Tensor
    center_N: Tensor
    argmax_N: Tensor
    topk: TopKGradient | None

    @classmethod
    def empty(cls, N: int, teacher: Head | TeacherTopK | None) -> "HeadStats":
        """Zeros for N tokens."""

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        topk = None
        if isinstance(teacher, TeacherTopK):
            shape = teacher.ids.shape
            topk = TopKGradient(log_p_NK=new(*shape), dz_NK=new(*shape), coef_N=new(N))
        return cls(
            norm_N2=new(N, 2),
            teacher_norm_N2=new(N, 2),
            logprobs_N=new(N),
            entropy_N=new(N),
            divergence_N=new(N),
            center_N=new(N),
            argmax_N=torch.zeros(N, dtype=torch.int64),
            topk=topk,
        )

    def rows(self, rows: slice) -> "HeadStats":
        """Views of some tokens' statistics."""
        topk = self.topk
        if topk is not None:
            topk = TopKGradient(topk.log_p_NK[rows], topk.dz_NK[rows], topk.coef_N[rows])
        return HeadStats(
            norm_N2=self.norm_N2[rows],
            teacher_norm_N2=self.teacher_norm_N2[rows],
            logprobs_N=self.logprobs_N[rows],
            entropy_N=self.entropy_N[rows],
            divergence_N=self.divergence_N[rows],
            center_N=self.center_N[rows],
            argmax_N=self.argmax_N[rows],
            topk=topk,
        )


def head_math(options: HeadOptions) -> _cpu.HeadMath:
    """The options as the C++ extension takes them."""
    return _cpu.HeadMath(
        divergence=TABLE[options.divergence].code,
        alpha=options.alpha,
        temperature=options.temperature,
        teacher_temperature=options.teacher_temperature,
        softcap=options.logit_softcap or 0.0,
    )


def fill_statistics(
    stats: HeadStats,
    student_RV: Tensor,
    teacher_RV: Tensor | None,
    targets_R: Tensor,
    teacher: TeacherTopK | None,
    options: HeadOptions,
) -> None:
    """Statistics of a chunk from its raw logits, which become z, into `stats`.

    Args:
        stats: of the chunk; written.
        student_RV: raw logits; replaced by z.
        teacher_RV: those of a TeacherHidden, or None.
        targets_R: of the chunk.
        teacher: of the chunk, if it is a TeacherTopK.
        options: the op's.
    """
    threads = torch.get_num_threads()
    call(
        "head_stats",
        student_RV.dtype,
        student_RV,
        teacher_RV,
        *student_RV.shape,
        targets_R,
        head_math(options),
        threads,
        stats.norm_N2,
        stats.teacher_norm_N2,
        stats.logprobs_N,
        stats.entropy_N,
        stats.divergence_N,
        stats.center_N,
        stats.argmax_N,
    )
    if teacher is None:
        return
    z_RK = student_RV.gather(1, teacher.ids)
    tail_norm_R2 = torch.zeros_like(stats.norm_N2)
    if options.tail == "bucket":  # the rest of the vocabulary, for a moment without the K tokens
        student_RV.scatter_(1, teacher.ids, NEG_INF)
        call("row_norms", student_RV.dtype, student_RV, *student_RV.shape, threads, tail_norm_R2)
        student_RV.scatter_(1, teacher.ids, z_RK)
    fill_topk(stats, z_RK.double(), tail_norm_R2, teacher, options)


def fill_topk(
    stats: HeadStats,
    z_NK: Tensor,
    tail_norm_N2: Tensor,
    teacher: TeacherTopK,
    options: HeadOptions,
) -> None:
    """The divergence through K tokens and a tail, and its gradient by the logits; all float64.

    With w = d(divergence)/d(log p) and W their sum, dz_v = w_v - p_v W at the K tokens, and every
    token of the tail has its share p_v / p_tail of w_tail: dz_v = p_v (w_tail / p_tail - W).
    """
    assert stats.topk is not None
    max_N1, log_sum_N1 = stats.norm_N2[:, :1], stats.norm_N2[:, 1:]
    with torch.enable_grad():
        s_NK = ((z_NK - max_N1) - log_sum_N1).requires_grad_()
        tail_N = (tail_norm_N2[:, 0] - max_N1[:, 0]) + (tail_norm_N2[:, 1] - log_sum_N1[:, 0])
        s_tail_N = tail_N.requires_grad_()
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
    stats.divergence_N.copy_(divergence_N.detach())
    stats.topk.log_p_NK.copy_(s_NK.detach())
    stats.topk.dz_NK.copy_(w_NK - p_NK * total_N[:, None])
    stats.topk.coef_N.copy_(tail_share_N - total_N)


class GradTerms:
    """dlogits of any block from upstream gradients: see head_grads in csrc/policy_head.hpp.

    Args:
        targets_N: of these tokens.
        teacher: theirs.
        stats: theirs.
        upstream: theirs.
        options: the op's.
    """

    def __init__(
        self,
        targets_N: Tensor,
        teacher: Head | TeacherTopK | None,
        stats: HeadStats,
        upstream: Upstream,
        options: HeadOptions,
    ) -> None:
        g_logprobs_N, g_entropy_N, g_divergence_N = (g.double().contiguous() for g in upstream)
        self.targets_N, self.stats, self.math = targets_N, stats, head_math(options)
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

    def apply(
        self,
        student_RB: Tensor,
        teacher_RB: Tensor | None,
        rows: slice,
        *,
        first: int = 0,
        tempered: bool = False,
        operands: torch.dtype,
    ) -> Tensor:
        """The student's block, from column `first` on, replaced by the gradient by its raw logits,
        (R, B) in `operands`.

        Args:
            student_RB: raw logits, or z if `tempered`.
            teacher_RB: likewise, or None.
            rows: which tokens.
            first: the block's first column.
            tempered: see student_RB.
            operands: the dtype of the logits, or bfloat16 for float32 ones: the gradient is then
                rounded into the first half of each row.
        """
        narrow = operands != student_RB.dtype
        stats, ids_NK, dz_NK = self.stats, self.topk_ids_NK, self.topk_dz_NK
        call(
            "head_grads",
            student_RB.dtype,
            student_RB,
            teacher_RB,
            *student_RB.shape,
            first,
            tempered,
            narrow,
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
        return first_half(student_RB, operands) if narrow else student_RB


def first_half(x_RB: Tensor, narrow: torch.dtype) -> Tensor:
    """The rows that csrc rounded in place."""
    return x_RB.view(narrow)[:, : x_RB.shape[1]]


def narrowed(x_RB: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`: itself, or rounded to bfloat16 in place."""
    if x_RB.dtype == dtype:
        return x_RB
    call("narrow_rows", x_RB.dtype, x_RB, *x_RB.shape, torch.get_num_threads())
    return first_half(x_RB, dtype)


@dataclass
class Filter:
    """What a grad filter may leave out of each token's dlogits, and what it left.

    Attributes:
        threshold_N: |dlogits| below it may be dropped: they sum to at most the filter's share.
        total_N: the sum of |dlogits|.
        kept_N: of those that were not dropped.
        needed_N: how many are not below the threshold, int64.
    """

    threshold_N: Tensor
    total_N: Tensor
    kept_N: Tensor
    needed_N: Tensor

    @classmethod
    def empty(cls, N: int) -> "Filter":
        """Of N tokens."""
        threshold_N, total_N, kept_N = torch.zeros(3, N, dtype=torch.float64)
        return cls(threshold_N, total_N, kept_N, torch.zeros(N, dtype=torch.int64))

    def measure(self, dlogits_RV: Tensor, rows: slice, share: float) -> None:
        """Thresholds of some tokens from all of their dlogits."""
        call(
            "row_thresholds",
            dlogits_RV.dtype,
            dlogits_RV,
            *dlogits_RV.shape,
            share * (1 - FILTER_MARGIN),
            torch.get_num_threads(),
            self.threshold_N[rows],
            self.total_N[rows],
            self.needed_N[rows],
        )

    def is_worth(self, rows: slice, vocabulary: int, most: float) -> bool:
        """Whether these tokens need at most `most` of their dlogits; if not, all of them are
        kept.
        """
        needed_R = self.needed_N[rows]
        if needed_R.sum() <= most * vocabulary * len(needed_R):
            return True
        self.kept_N[rows] = self.total_N[rows]
        return False

    def dropped(self, dtype: torch.dtype) -> Tensor:
        """1 - kept / total, (N,); a token whose gradient is 0 loses nothing."""
        share_N = torch.where(self.total_N > 0, 1.0 - self.kept_N / self.total_N, 0.0)
        return share_N.clamp(min=0.0).to(dtype)
