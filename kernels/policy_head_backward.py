"""The backward launcher of policy_head: see policy_head.py.

Legend: M tokens, N trained tokens, D hidden, V vocabulary, K top-k, R tokens of a chunk, B columns
of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fdfast.divergences import TABLE
from fdfast.kernels import launch
from fdfast.kernels.policy_head_filter import ColumnFilter
from fdfast.kernels.policy_head_forward import HeadStats
from fdfast.kernels.policy_head_grad import _dlogits_kernel, _scatter_kernel
from fdfast.types import Head, HeadOptions, TeacherTopK

# A block narrower than this wastes the tensor cores; rather are the tokens cut in chunks.
MIN_BLOCK_COLUMNS = 1024
COLUMN_STEP = 128  # blocks are whole multiples of the widest tile
SCATTER_BLOCK = 8
# float16 holds 6e-8 to 65504: dlogits are written times the power of two that brings their bound
# here.
FLOAT16_BOUND = 1024.0


@dataclass
class Rows:
    """What the kernels read of each token: N-sized, on the device."""

    row_RN: Tensor  # (ROWS, N) float32
    scale: Tensor  # () float32, dlogits are written times this power of two
    ids_NK: Tensor | None  # int32
    draw_NK: Tensor | None  # float32, dlogits at the ids


@dataclass(frozen=True)
class _Plan:
    """Blocks of the workspace: dlogits (tokens, columns) and what the GEMMs need beside them."""

    N: int
    V: int
    tokens: int
    columns: int

    def blocks(self) -> Iterator[slice]:
        """The vocabulary in blocks."""
        for start in range(0, self.V, self.columns):
            yield slice(start, min(start + self.columns, self.V))

    def chunks(self) -> Iterator[slice]:
        """The trained tokens in chunks."""
        for start in range(0, self.N, self.tokens):
            yield slice(start, min(start + self.tokens, self.N))


def _plan(
    student: Head, N: int, out_dtype: torch.dtype, options: HeadOptions, gathers: bool
) -> _Plan:
    """The widest block that fits the workspace, over as many tokens as leave it wide enough."""
    V, D = student.weight_VD.shape
    size = out_dtype.itemsize
    filtered = options.grad_filter is not None
    # dlogits and, with a filter, their gathered copy; the sums of dweight and of a block of dbias,
    # and the gathered weight.
    column_bytes = (
        4 * D + 4 + filtered * (size + 4) * D + D * size * (student.weight_VD.dtype != out_dtype)
    )
    element_bytes = size * (2 if filtered else 1)
    tokens = N
    while True:
        left = options.workspace_bytes - tokens * D * size * gathers
        columns = left // (column_bytes + tokens * element_bytes) // COLUMN_STEP * COLUMN_STEP
        if columns >= min(MIN_BLOCK_COLUMNS, V) or tokens <= COLUMN_STEP:
            break
        tokens = (tokens + 1) // 2
    if columns < COLUMN_STEP:
        wanted = COLUMN_STEP * (column_bytes + tokens * element_bytes) + tokens * D * size
        raise launch.too_small(options.workspace_bytes, wanted)
    return _Plan(N, V, tokens, min(columns, -(-V // COLUMN_STEP) * COLUMN_STEP))


def token_rows(
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    stats: HeadStats,
    grads: tuple[Tensor, ...],
    options: HeadOptions,
    out_dtype: torch.dtype,
) -> Rows:
    """The coefficients of dlogits from the upstream gradients, in float64, then float32."""
    g_logprobs_N, g_entropy_N, g_divergence_N = (g.double() for g in grads)
    coef_p_N = -g_logprobs_N - g_entropy_N * stats.entropy_N
    row_RN = launch.row_constants(stats.merged_RN)
    scale = torch.ones((), dtype=torch.float64, device=targets_N.device)
    if out_dtype == torch.float16:
        bound_N = g_logprobs_N.abs() + g_entropy_N.abs() * (1.0 + stats.entropy_N)
        bound_N += g_divergence_N.abs() * (2.0 + stats.center_N.abs())
        bound_N = bound_N.where(bound_N.isfinite(), 0.0)  # such a row spoils no other's scale
        largest = bound_N.amax().clamp(min=1e-30) / min(options.temperature, 1.0)
        scale = torch.exp2(torch.floor(torch.log2(FLOAT16_BOUND / largest)))
    ids_NK = draw_NK = None
    if stats.topk is not None:
        assert isinstance(teacher, TeacherTopK)
        log_p_NK = stats.topk.log_p_NK
        direct_NK = coef_p_N[:, None] - g_entropy_N[:, None] * log_p_NK.clamp(min=-1e300)
        dz_NK = log_p_NK.exp() * direct_NK + g_divergence_N[:, None] * stats.topk.dz_NK
        dz_NK += (teacher.ids == targets_N[:, None]) * g_logprobs_N[:, None]
        if options.logit_softcap is not None:
            z_NK = log_p_NK + stats.norm_N2.sum(1, keepdim=True)
            dz_NK *= 1.0 - (z_NK * options.temperature / options.logit_softcap) ** 2
        draw_NK = (dz_NK * scale / options.temperature).float().contiguous()
        ids_NK = teacher.ids.to(torch.int32).contiguous()
        coef_p_N = coef_p_N + g_divergence_N * stats.topk.coef_N
    row_RN[6] = stats.center_N
    row_RN[7], row_RN[8] = coef_p_N * scale, -g_entropy_N * scale
    row_RN[9], row_RN[10] = g_divergence_N * scale, g_logprobs_N * scale
    return Rows(row_RN, scale, ids_NK, draw_NK)


def _write_dlogits(
    out_RB: Tensor,
    block: slice,
    chunk: slice,
    student: Head,
    teacher: Head | None,
    targets_N: Tensor,
    rows_N: Tensor | None,
    rows: Rows,
    options: HeadOptions,
) -> None:
    """dlogits of one block for one chunk of tokens, times rows.scale."""
    head, rows_R = launch.chunk_of(student, rows_N, chunk)
    teacher_head, _ = launch.chunk_of(teacher, rows_N, chunk)
    assert head is not None
    tile = launch.tile_for("grad_single" if teacher is None else "grad_pair", student, teacher)
    R, B = out_RB.shape
    grid = (triton.cdiv(R, tile.block_n) * triton.cdiv(B, tile.block_v),)
    _dlogits_kernel[grid](
        targets_ptr=targets_N[chunk],
        row_ptr=rows.row_RN[:, chunk].contiguous(),
        out_ptr=out_RB,
        N=R,
        first=block.start,
        B=B,
        stride_on=out_RB.stride(0),
        alpha=options.alpha,
        rest=1.0 - options.alpha,
        HAS_TEACHER=teacher is not None,
        KIND=TABLE[options.divergence].code,
        **launch.only(
            _dlogits_kernel,
            launch.gemm_arguments(head, teacher_head, rows_R, options, tile),
        ),
    )
    scatter_topk(out_RB, rows, chunk, block.start)
    if launch.INTERPRETING and launch.same_low_precision(student):
        # The interpreter's store truncates to bfloat16; a GPU rounds, and so does PyTorch.
        out_RB.copy_(out_RB.to(student.hidden_ND.dtype))


def scatter_topk(out_RB: Tensor, rows: Rows, chunk: slice, first: int) -> None:
    """Put dlogits at a TeacherTopK's ids that lie in columns first .. first + B in their place."""
    if rows.ids_NK is None or rows.draw_NK is None:
        return
    (R, B), K = out_RB.shape, rows.ids_NK.shape[1]
    _scatter_kernel[(triton.cdiv(R, SCATTER_BLOCK),)](
        out_RB,
        rows.ids_NK[chunk],
        rows.draw_NK[chunk],
        R,
        B,
        first,
        K,
        out_RB.stride(0),
        BLOCK_N=SCATTER_BLOCK,
        BLOCK_K=triton.next_power_of_2(K),
    )


def add_product(sum_AC: Tensor, a_AB: Tensor, b_BC: Tensor, *, alpha: float = 1.0) -> None:
    """sum += alpha a @ b with float32 accumulation; 16-bit factors stay 16-bit on a GPU."""
    if a_AB.dtype == torch.float32:
        sum_AC.addmm_(a_AB, b_BC, alpha=alpha)
    elif a_AB.is_cuda:
        torch.addmm(sum_AC, a_AB, b_BC, out_dtype=torch.float32, alpha=alpha, out=sum_AC)
    else:  # under the interpreter
        sum_AC.addmm_(a_AB.float(), b_BC.float(), alpha=alpha)


def policy_head_bwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
    stats: HeadStats,
    grads: tuple[Tensor, ...],
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
    hidden_MD, weight_VD, bias_V = student
    (V, D), N, device = weight_VD.shape, len(targets_N), hidden_MD.device
    full = teacher if isinstance(teacher, Head) else None
    out_dtype = hidden_MD.dtype if launch.same_low_precision(student) else torch.float32
    dhidden_ND = torch.zeros(N, D, dtype=torch.float32, device=device) if needs[0] else None
    dweight_VD = torch.zeros(V, D, dtype=weight_VD.dtype, device=device) if needs[1] else None
    dbias_V = None
    if needs[2] and bias_V is not None:
        dbias_V = torch.zeros(V, dtype=torch.float32, device=device)
    dropped_N = torch.zeros(N, dtype=torch.float32, device=device)
    if N and any(needs):
        gathers = rows_N is not None and needs[1]
        plan = _plan(student, N, out_dtype, options, gathers)
        rows = token_rows(targets_N, teacher, stats, grads, options, out_dtype)
        column_filter = None
        if options.grad_filter is not None:
            column_filter = ColumnFilter(options.grad_filter, N, device)
        with launch.on_device(hidden_MD):
            wide = torch.float32 if launch.INTERPRETING else out_dtype
            buffer = torch.empty(plan.tokens * plan.columns, dtype=wide, device=device)
            for block in plan.blocks():
                sum_BD = None
                if dweight_VD is not None:
                    sum_BD = torch.zeros(
                        block.stop - block.start, D, dtype=torch.float32, device=device
                    )
                for chunk in plan.chunks():
                    R = chunk.stop - chunk.start
                    out_RB = buffer[: R * plan.columns].view(R, plan.columns)
                    out_RB = out_RB[:, : block.stop - block.start]
                    _write_dlogits(
                        out_RB, block, chunk, student, full, targets_N, rows_N, rows, options
                    )
                    columns = None if column_filter is None else column_filter.keep(out_RB, chunk)
                    if dbias_V is not None:
                        dbias_V[block] += out_RB.sum(0, dtype=torch.float32)
                    if dhidden_ND is not None:
                        _add_dhidden(dhidden_ND[chunk], out_RB, weight_VD[block], columns)
                    if sum_BD is not None:
                        _add_dweight(sum_BD, out_RB, hidden_rows(hidden_MD, rows_N, chunk), columns)
                if dweight_VD is not None and sum_BD is not None:
                    dweight_VD[block] = sum_BD.div_(rows.scale)
        if column_filter is not None:
            dropped_N = column_filter.dropped_share()
        for total in (dhidden_ND, dbias_V):
            if total is not None:
                total.div_(rows.scale)
    dhidden_MD = None
    if dhidden_ND is not None:
        dhidden_MD = dhidden_ND.to(hidden_MD.dtype)
        if rows_N is not None:
            dhidden_MD = torch.zeros_like(hidden_MD).index_copy_(0, rows_N, dhidden_MD)
    if dbias_V is not None and bias_V is not None:
        dbias_V = dbias_V.to(bias_V.dtype)
    return dhidden_MD, dweight_VD, dbias_V, dropped_N


def hidden_rows(hidden_MD: Tensor, rows_N: Tensor | None, chunk: slice) -> Tensor:
    """The hidden states of a chunk of trained tokens, (R, D)."""
    return hidden_MD[chunk] if rows_N is None else hidden_MD.index_select(0, rows_N[chunk])


def _add_dhidden(
    sum_RD: Tensor, dlogits_RB: Tensor, weight_BD: Tensor, columns: Tensor | None
) -> None:
    """sum += dlogits @ weight, on the named columns only."""
    if columns is not None:
        dlogits_RB, weight_BD = dlogits_RB[:, columns], weight_BD[columns]
    add_product(sum_RD, dlogits_RB, weight_BD.to(dlogits_RB.dtype))


def _add_dweight(
    sum_BD: Tensor, dlogits_RB: Tensor, hidden_RD: Tensor, columns: Tensor | None
) -> None:
    """sum += dlogits.T @ hidden, on the named columns only."""
    hidden_RD = hidden_RD.to(dlogits_RB.dtype)
    if columns is None:
        add_product(sum_BD, dlogits_RB.T, hidden_RD)
        return
    product_AD = sum_BD.new_zeros(len(columns), sum_BD.shape[1])
    add_product(product_AD, dlogits_RB[:, columns].T, hidden_RD)
    sum_BD[columns] += product_AD
