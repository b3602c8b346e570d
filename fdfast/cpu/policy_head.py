"""policy_head on the CPU: PyTorch's GEMMs on bounded blocks, the elementwise part fused in C++
(csrc/).

Two ways, as on the GPU:
- *recompute* (`policy_head_fwd`, `policy_head_bwd`), for any upstream gradient. Forward: a chunk of
  tokens meets the whole vocabulary, so every statistic of a row is exact and final at once.
  Backward: blocks of tokens x vocabulary are projected again; the gradient of a vocabulary block is
  finished before the next begins, so its float32 sum needs no second copy of the weight. 6 GEMMs
  with a TeacherHidden, 4 without.
- *token chunk* (`policy_head_loss_fwd`), where the loss of a token is known from the token alone: a
  chunk's logits become its dlogits in place, and nothing is projected twice. 4 GEMMs with a
  TeacherHidden, 3 without.

A grad filter replaces the two last GEMMs by sums over the dlogits that it keeps, entry by entry:
each token has its own few, and the columns that some token of a chunk needs are most of them. Where
a filter would keep so many that GEMMs are faster, it keeps all. In the recompute way it wants one
more sweep, since a threshold is of a whole row: there it saves time only without a TeacherHidden.

Memory beside inputs, gradients and N-sized outputs: the workspace of the options. A bfloat16 or
float16 `hidden` holds its gradient once more in float32 while it is summed.
Legend: M tokens, N trained ones, D hidden, V vocabulary, R tokens of a chunk, B vocabulary columns
of a block.
"""

import torch
from torch import Tensor

from fdfast.cpu.blocks import RowBlocks, TileBlocks, converted, hidden_rows, slices, tile_shape
from fdfast.cpu.gemm import Gemms, fast_gemms
from fdfast.cpu.grad_sums import Gradients, GradSums
from fdfast.cpu.head_terms import (
    Filter,
    GradTerms,
    HeadStats,
    fill_statistics,
    narrowed,
)
from fdfast.cpu.policy_head_group import fill_sliced_statistics
from fdfast.reference import statistics_dtype
from fdfast.token_loss import ChunkLoss, Upstream, loss_and_upstream
from fdfast.types import Head, HeadOptions, TeacherTopK

# The share of dlogits above which leaving out the others costs more time than it saves: a GEMM is
# faster an entry, in bfloat16 the most.
MOST_NEEDED = {torch.float64: 0.4, torch.float32: 0.4, torch.bfloat16: 0.25}
# With fewer tokens a chunk, reading and writing a float32 sum of the whole weight's gradient costs
# more than projecting again.
MIN_CHUNK_TOKENS = 64
# Of a block in the gradients of a chunk: its weight stays in the cache from the one to the other.
CACHED_COLUMNS = 1024


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
    gemms = _gemms(student, teacher, options)
    ranks = options.vocabulary_slice
    first = 0 if ranks is None else ranks.first  # targets and top-k ids are global
    with fast_gemms(gemms.onednn):
        gate = None
        if options.grad_filter is not None:
            rows_first = _row_blocks(student, teacher, options, rows_N, gemms)
            gate = _thresholds(terms, rows_first, options.grad_filter)
            del rows_first
        filters = gate is not None and gate.is_worth(
            slice(None), len(student.weight_VD), MOST_NEEDED[gemms.operands]
        )
        blocks = TileBlocks(
            student,
            teacher if isinstance(teacher, Head) else None,
            rows_N,
            dtype=sums.dtype,
            gemms=gemms,
            workspace_bytes=options.workspace_bytes - gemms.scratch_bytes,
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
                    operands=sums.dtype if filters else gemms.operands,
                )
                if gate is not None and filters:
                    gate.kept_N[rows] += sums.add_filtered(
                        dlogits_RB, gate.threshold_N[rows], hidden_RD, heads[0][0], sum_BD, rows
                    )
                else:
                    sums.add(dlogits_RB, hidden_RD, heads[0][0], sum_BD, rows)
                sums.add_bias(dlogits_RB, block)
            sums.finish(block, sum_BD)
            del heads, sum_BD  # before the next block's are made
    if ranks is not None and sums.hidden_MD is not None:
        ranks.add_up(sums.hidden_MD)
    nothing_N = torch.zeros(len(targets_N), dtype=sums.dtype)
    return *sums.results(), nothing_N if gate is None else gate.dropped(sums.dtype)


def _thresholds(terms: GradTerms, blocks: RowBlocks, share: float) -> Filter:
    """A sweep before the backward pass, for a threshold is of a whole row."""
    gate = Filter.empty(blocks.num_tokens)
    for rows in blocks.chunks():
        student_RV, teacher_RV = blocks.project(rows)
        dlogits_RV = terms.apply(student_RV, teacher_RV, rows, operands=blocks.dtype)
        gate.measure(dlogits_RV, rows, share)
    return gate


def can_chunk(
    student: Head,
    teacher: Head | TeacherTopK | None,
    needs: tuple[bool, bool, bool],
    options: HeadOptions,
) -> bool:
    """Whether the token-chunk way stays in its workspace.

    A weight narrower than the sums wants a copy of itself in their dtype (half of it in a
    SplitSum), beside which there must be room for MIN_CHUNK_TOKENS. A filter reads rows of the
    whole weight as they are.
    """
    weight_VD = student.weight_VD
    dtype = statistics_dtype(student.hidden_ND, weight_VD)
    if options.grad_filter is not None:
        readable = weight_VD.dtype in (dtype, torch.bfloat16) and weight_VD.is_contiguous()
        if not readable or (dtype == torch.float64 and weight_VD.dtype != dtype):
            return False
    copy = _weight_sum_bytes(
        student, needs, split=_splits(_gemms(student, teacher, options), options)
    )
    row_bytes = 2 * dtype.itemsize * sum(weight_VD.shape)  # of student and teacher
    tokens = min(MIN_CHUNK_TOKENS, len(student.hidden_ND))
    return not copy or copy + tokens * row_bytes <= options.workspace_bytes // 8 * 7


def _splits(gemms: Gemms, options: HeadOptions) -> bool:
    """Whether the weight's gradient is summed in a SplitSum, which csrc's GEMM alone adds to."""
    return gemms.operands == torch.bfloat16 and options.grad_filter is None


def _weight_sum_bytes(student: Head, needs: tuple[bool, bool, bool], *, split: bool) -> int:
    """Bytes of the sum of the weight's gradient where the gradient itself is too narrow for it."""
    dtype = statistics_dtype(student.hidden_ND, student.weight_VD)
    if not needs[1] or student.weight_VD.dtype == dtype:
        return 0
    return student.weight_VD.numel() * (dtype.itemsize // 2 if split else dtype.itemsize)


def policy_head_loss_fwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
    token_loss: ChunkLoss,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor, ...], Gradients, Tensor]:
    """The sum of a loss of each token, the fields of policy_head_fwd, the loss's gradients, and the
    dropped share of |dlogits|, (N,).

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
    split = _splits(gemms, options)
    reserved = _weight_sum_bytes(student, needs, split=split)
    blocks = _row_blocks(student, teacher, options, rows_N, gemms, reserved_bytes=reserved)
    stats = HeadStats.empty(len(targets_N), teacher)
    sums = GradSums(student, needs, rows_N)
    gate = Filter.empty(len(targets_N))
    total = torch.zeros((), dtype=blocks.dtype)
    everything = slice(0, len(student.weight_VD))
    weight_sum_VD = sums.weight_block(everything, split=split)
    with fast_gemms(gemms.onednn):
        for rows in blocks.chunks():
            student_RV, teacher_RV = blocks.project(rows)
            chunk, topk = stats.rows(rows), _topk_rows(teacher, rows)
            fill_statistics(chunk, student_RV, teacher_RV, targets_N[rows], topk, options)
            outputs = (chunk.logprobs_N, chunk.entropy_N, chunk.divergence_N)
            loss, upstream = loss_and_upstream(outputs, rows, token_loss, blocks.dtype)
            total += loss
            terms = GradTerms(targets_N[rows], topk, chunk, upstream, options)
            # A filter looks at them before they are rounded.
            operands = gemms.operands if options.grad_filter is None else blocks.dtype
            dlogits_RV = terms.apply(
                student_RV, teacher_RV, slice(None), tempered=True, operands=operands
            )
            filters = False
            if options.grad_filter is not None:
                gate.measure(dlogits_RV, rows, options.grad_filter)
                filters = gate.is_worth(rows, len(student.weight_VD), MOST_NEEDED[gemms.operands])
            hidden_RD = hidden_rows(student, rows_N, rows, gemms.operands)
            sums.add_bias(dlogits_RV, everything)
            if filters:
                gate.kept_N[rows] = sums.add_filtered(
                    dlogits_RV,
                    gate.threshold_N[rows],
                    hidden_RD,
                    student.weight_VD,
                    weight_sum_VD,
                    rows,
                )
                continue
            if dlogits_RV.dtype != gemms.operands:
                dlogits_RV = narrowed(dlogits_RV, gemms.operands)
            for block in slices(len(student.weight_VD), min(blocks.columns, CACHED_COLUMNS)):
                weight_BD, _ = converted(student, block, gemms.operands)
                sum_BD = None if weight_sum_VD is None else weight_sum_VD[block]
                sums.add(dlogits_RV[:, block], hidden_RD, weight_BD, sum_BD, rows)
                del weight_BD  # before the next block's is made
    sums.finish(everything, weight_sum_VD)
    fields = _fields(stats, teacher, blocks.dtype)
    return total, fields, sums.results(), gate.dropped(blocks.dtype)


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
