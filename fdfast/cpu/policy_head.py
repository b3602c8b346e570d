"""policy_head on the CPU: PyTorch's GEMMs on bounded blocks, the elementwise part fused in C++
(csrc/).

Two ways, as on the GPU:
- *recompute* (`policy_head_fwd`, `policy_head_bwd`), for any upstream gradient. Forward: a chunk of
tokens meets the
  whole vocabulary, so every statistic of a row is exact and final at once. Backward: blocks of
  tokens x vocabulary are projected again; the gradient of a vocabulary block is finished before the
  next begins, so its float32 sum needs no second copy of the weight. 6 GEMMs with a TeacherHidden,
  4 without.
- *token chunk* (`policy_head_loss_fwd`), where the loss of a token is known from the token alone: a
chunk's logits
  become its dlogits in place, and nothing is projected twice. 4 GEMMs with a TeacherHidden, 3
  without.

Memory beside inputs, gradients and N-sized outputs: the workspace of the options. A bfloat16 or
float16 `hidden` holds its gradient once more in float32 while it is summed.
Legend: M tokens, N trained ones, D hidden, V vocabulary, R tokens of a chunk, B vocabulary columns
of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fdfast.cpu.blocks import RowBlocks, TileBlocks, hidden_rows, tile_shape
from fdfast.cpu.gemm import Gemms, fast_gemms
from fdfast.cpu.grad_sums import Gradients, GradSums
from fdfast.cpu.head_terms import (
    GradTerms,
    HeadStats,
    Upstream,
    fill_statistics,
    filter_threshold,
)
from fdfast.cpu.policy_head_group import fill_sliced_statistics
from fdfast.reference import statistics_dtype
from fdfast.types import Head, HeadOptions, TeacherTopK

# The filter's second sweep sees logits that differ by a rounding; this much of the bound is kept
# for it.
FILTER_MARGIN = 1e-3
# With fewer tokens a chunk, reading and writing a float32 sum of the whole weight's gradient costs
# more than projecting again.
MIN_CHUNK_TOKENS = 64


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
    gemms = _gemms(student, teacher, options)
    blocks = _row_blocks(student, teacher, options, rows_N, gemms)
    # A workspace that is too small for the backward pass is an error before any work is done.
    tile_shape(
        student,
        blocks.teacher,
        len(targets_N),
        blocks.dtype,
        gemms,
        options.workspace_bytes - gemms.scratch_bytes,
        copies=_filter_copies(options),
    )
    stats = HeadStats.empty(len(targets_N), teacher)
    fill = fill_statistics if options.vocabulary_slice is None else fill_sliced_statistics
    with fast_gemms(gemms.onednn):
        for rows in blocks.chunks():
            student_RV, teacher_RV = blocks.project(rows)
            topk = _topk_rows(teacher, rows)
            fill(stats.rows(rows), student_RV, teacher_RV, targets_N[rows], topk, options)
    return _fields(stats, teacher, blocks.dtype), stats


def policy_head_bwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
    stats: HeadStats,
    upstream: Upstream,
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
        upstream: gradients of logprobs, entropy and divergence, each (N,).
        needs: which of hidden, weight and bias want a gradient.
    """
    terms = GradTerms(targets_N, teacher, stats, upstream, options)
    sums = GradSums(student, needs, rows_N)
    threshold_N = total_N = kept_N = torch.zeros(len(targets_N), dtype=torch.float64)
    filtered = options.grad_filter is not None
    ranks = options.vocabulary_slice
    first = 0 if ranks is None else ranks.first  # targets and top-k ids are global
    gemms = _gemms(student, teacher, options)
    with fast_gemms(gemms.onednn):
        if filtered:
            blocks_of_rows = _row_blocks(student, teacher, options, rows_N, gemms)
            threshold_N, total_N = _filter_thresholds(terms, blocks_of_rows, options)
            del blocks_of_rows
        blocks = TileBlocks(
            student,
            teacher if isinstance(teacher, Head) else None,
            rows_N,
            dtype=sums.dtype,
            gemms=gemms,
            workspace_bytes=options.workspace_bytes - gemms.scratch_bytes,
            copies=_filter_copies(options),
        )
        for block in blocks.vocabulary_blocks():
            heads = blocks.converted(block)
            sum_BD = sums.weight_block(block)
            for rows in blocks.chunks():
                hidden_RD = hidden_rows(student, rows_N, rows, gemms.operands)
                student_RB, teacher_RB = blocks.project(rows, hidden_RD, heads)
                dlogits_RB = terms.apply(
                    student_RB,
                    teacher_RB,
                    rows,
                    first=first + block.start,
                    operands=sums.dtype if filtered else gemms.operands,
                )
                columns = None
                if filtered:
                    columns, kept_R = _active_columns(dlogits_RB, threshold_N[rows])
                    kept_N[rows] += kept_R
                sums.add(dlogits_RB, columns, hidden_RD, heads[0][0], sum_BD, rows)
                sums.add_bias(dlogits_RB, block)
            sums.finish(block, sum_BD)
            del heads, sum_BD  # before the next block's are made
    if ranks is not None and sums.hidden_MD is not None:
        ranks.add_up(sums.hidden_MD)
    return *sums.results(), _dropped(kept_N, total_N, sums.dtype)


def can_chunk(student: Head, needs: tuple[bool, bool, bool], options: HeadOptions) -> bool:
    """Whether the token-chunk way stays in its workspace.

    A filter gathers columns of whole rows. A weight narrower than the sums wants a copy of itself
    in their dtype, beside which there must be room for MIN_CHUNK_TOKENS.
    """
    if options.grad_filter is not None:
        return False
    dtype = statistics_dtype(student.hidden_ND, student.weight_VD)
    copy = _weight_sum_bytes(student, needs)
    row_bytes = 2 * dtype.itemsize * sum(student.weight_VD.shape)  # of student and teacher
    tokens = min(MIN_CHUNK_TOKENS, len(student.hidden_ND))
    return not copy or copy + tokens * row_bytes <= options.workspace_bytes // 8 * 7


def _weight_sum_bytes(student: Head, needs: tuple[bool, bool, bool]) -> int:
    """Bytes of the sum of the weight's gradient where the gradient itself is too narrow for it."""
    dtype = statistics_dtype(student.hidden_ND, student.weight_VD)
    if not needs[1] or student.weight_VD.dtype == dtype:
        return 0
    return student.weight_VD.numel() * dtype.itemsize


def policy_head_loss_fwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
    token_loss: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor, ...], Gradients]:
    """The sum of a loss of each token, the fields of policy_head_fwd, and the loss's
    gradients.

    Args:
        student: as policy_head_fwd.
        targets_N: likewise.
        teacher: likewise.
        options: likewise.
        rows_N: likewise.
        token_loss: (logprobs, entropy, divergence, which of the N tokens) -> loss of each of them;
            differentiable.
        needs: which of hidden, weight and bias want a gradient.
    """
    gemms = _gemms(student, teacher, options)
    reserved = _weight_sum_bytes(student, needs)
    blocks = _row_blocks(student, teacher, options, rows_N, gemms, reserved_bytes=reserved)
    stats = HeadStats.empty(len(targets_N), teacher)
    sums = GradSums(student, needs, rows_N)
    total = torch.zeros((), dtype=blocks.dtype)
    everything = slice(0, len(student.weight_VD))
    weight_sum_VD = sums.weight_block(everything)
    with fast_gemms(gemms.onednn):
        for rows in blocks.chunks():
            student_RV, teacher_RV = blocks.project(rows)
            chunk, topk = stats.rows(rows), _topk_rows(teacher, rows)
            fill_statistics(chunk, student_RV, teacher_RV, targets_N[rows], topk, options)
            loss, upstream = _upstream(chunk, rows, token_loss, blocks.dtype)
            total += loss
            terms = GradTerms(targets_N[rows], topk, chunk, upstream, options)
            dlogits_RV = terms.apply(
                student_RV, teacher_RV, slice(None), tempered=True, operands=gemms.operands
            )
            hidden_RD = hidden_rows(student, rows_N, rows, gemms.operands)
            sums.add(dlogits_RV, None, hidden_RD, student.weight_VD, weight_sum_VD, rows)
            sums.add_bias(dlogits_RV, everything)
    sums.finish(everything, weight_sum_VD)
    fields = _fields(stats, teacher, blocks.dtype)
    return total, fields, sums.results()


def _gemms(student: Head, teacher: Head | TeacherTopK | None, options: HeadOptions) -> Gemms:
    heads = [student, teacher] if isinstance(teacher, Head) else [student]
    dtype = statistics_dtype(student.hidden_ND, student.weight_VD)
    return Gemms.choose(heads, dtype, options.workspace_bytes)


def _row_blocks(
    student: Head,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
    gemms: Gemms,
    *,
    reserved_bytes: int = 0,
) -> RowBlocks:
    ranks = options.vocabulary_slice
    return RowBlocks(
        student,
        teacher if isinstance(teacher, Head) else None,
        rows_N,
        dtype=statistics_dtype(student.hidden_ND, student.weight_VD),
        gemms=gemms,
        workspace_bytes=options.workspace_bytes - gemms.scratch_bytes - reserved_bytes,
        agree=int if ranks is None else ranks.least,
    )


def _topk_rows(teacher: Head | TeacherTopK | None, rows: slice) -> TeacherTopK | None:
    if not isinstance(teacher, TeacherTopK):
        return None
    return TeacherTopK(teacher.ids[rows], teacher.logprobs[rows])


def _fields(
    stats: HeadStats, teacher: Head | TeacherTopK | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    mass_N = torch.ones_like(stats.logprobs_N)
    if isinstance(teacher, TeacherTopK):
        mass_N = teacher.logprobs.double().exp().sum(1)
    fields = (stats.logprobs_N, stats.entropy_N, stats.divergence_N, mass_N)
    return (*(x.to(dtype) for x in fields), stats.argmax_N)


def _upstream(
    chunk: HeadStats,
    rows: slice,
    token_loss: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Upstream]:
    """The chunk's summed loss and its gradients by logprobs, entropy and divergence."""
    outputs = (chunk.logprobs_N, chunk.entropy_N, chunk.divergence_N)
    leaves = tuple(x.to(dtype, copy=True).requires_grad_() for x in outputs)
    with torch.enable_grad():
        loss = token_loss(leaves[0], leaves[1], leaves[2], rows).sum()
    if not loss.requires_grad:  # no output reaches it
        return loss, tuple(torch.zeros_like(x) for x in leaves)  # type: ignore[return-value]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads  # type: ignore[return-value]


def _filter_copies(options: HeadOptions) -> int:
    """Tensors of a block's shape that a filter makes: magnitudes, the gathered ones, those in
    float64.
    """
    return 0 if options.grad_filter is None else 4


def _filter_thresholds(
    terms: GradTerms, blocks: RowBlocks, options: HeadOptions
) -> tuple[Tensor, Tensor]:
    """For each token the size below which |dlogits| may be dropped, and the sum of |dlogits|, (N,)
    float64.
    """
    assert options.grad_filter is not None
    threshold_N, total_N = torch.zeros(2, blocks.num_tokens, dtype=torch.float64)
    for rows in blocks.chunks():
        student_RV, teacher_RV = blocks.project(rows)
        dlogits_RV = terms.apply(student_RV, teacher_RV, rows, operands=blocks.dtype)
        share = options.grad_filter * (1 - FILTER_MARGIN)
        threshold_N[rows], total_N[rows] = filter_threshold(dlogits_RV, share)
    return threshold_N, total_N


def _active_columns(dlogits_RB: Tensor, threshold_R: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that some row needs, and the |dlogits| that they keep of each row, (R,) float64."""
    magnitude_RB = dlogits_RB.abs()
    needed_RB = magnitude_RB >= threshold_R[:, None].to(dlogits_RB.dtype)
    columns = needed_RB.any(0).nonzero().squeeze(1)
    return columns, magnitude_RB[:, columns].sum(1, dtype=torch.float64)


def _dropped(kept_N: Tensor, total_N: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - kept / total; a token whose gradient is 0 loses nothing."""
    return torch.where(total_N > 0, 1.0 - kept_N / total_N, 0.0).clamp(min=0.0).to(dtype)
