"""The token-chunk way of policy_head in Triton: the loss of a token is known from the token alone,
so the logits of a chunk become its gradients and nothing is projected twice.

For each chunk of tokens the sweep of `policy_head_fwd` stores the logits, too: 4 bytes a token of
the vocabulary, two numbers of float16 (see policy_head_pair); for float32 inputs 8 with a
TeacherHidden and 4 without. A pass over the pair settles the divergence (two for jsd and skew_kl),
the loss gives its upstream gradients, a kernel turns what was stored into dlogits in place, and
PyTorch's GEMMs add to the gradients, summed in float32.

GEMM units (2 N D V), against `policy_head_fwd` and `policy_head_bwd`: 4 instead of 6 with a
TeacherHidden (8 for jsd and skew_kl), 3 instead of 4 without; one less each for a frozen weight.
Bytes a token of the vocabulary, 16-bit inputs, TeacherHidden: the pair written, 4, read for the
divergence, 4 (8), and for dlogits, 4; these written, 2, and read by two GEMMs, 4: 18 (22). The
float32 sum of dweight is read and written once a chunk, 8 V D bytes, which is why a chunk has
MIN_CHUNK_TOKENS at least.

Without a TeacherHidden, and of float32 inputs, all results are as exact as the other way's. Of a
TeacherHidden and 16-bit inputs logprobs, entropy and argmax are; the divergence and dlogits carry
the rounding of the pair.
Legend: M tokens, N trained tokens, D hidden, V vocabulary, K top-k, R tokens of a chunk, P parts,
S runs of parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from fdfast.divergences import TABLE
from fdfast.kernels import launch
from fdfast.kernels.policy_head_backward import (
    Rows,
    add_product,
    hidden_rows,
    scatter_topk,
    token_rows,
)
from fdfast.kernels.policy_head_forward import MERGE_BLOCK, Kept, finish, sweep, sweep_bytes
from fdfast.kernels.policy_head_merge import _sum_splits_kernel
from fdfast.kernels.policy_head_pair import _pair_dlogits_kernel, _pair_settle_kernel
from fdfast.kernels.tiles import Tile
from fdfast.token_loss import ChunkLoss, loss_and_upstream
from fdfast.types import Head, HeadOptions, TeacherTopK

# Each chunk reads and writes the float32 sum of dweight, 8 V D bytes, and saves two GEMM units,
# 4 R D V operations: at an H100's 3.35 TB/s and 600 TFLOP/s it is a gain from 360 tokens on.
MIN_CHUNK_TOKENS = 512
ROW_STEP = 64  # rows of the kept logits begin at multiples of it, as the GEMMs like
# What the launchers hold of a token beside the logits: merged statistics in float64, the float32
# constants of the gradient and the upstream gradients.
NUMBERS_BYTES = 512

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def can_chunk(
    student: Head,
    teacher: Head | TeacherTopK | None,
    needs: tuple[bool, bool, bool],
    options: HeadOptions,
) -> bool:
    """Whether the workspace holds chunks that are worth it: all tokens, or MIN_CHUNK_TOKENS.

    What is kept takes 4 bytes a logit, whatever the teacher. A trained weight narrower than float32
    is summed in a float32 [V, D], which counts. A filter gathers columns of blocks, and a weight of
    another dtype than the hidden states' would be copied: both go the recompute way.
    """
    hidden_MD, weight_VD, _ = student
    if options.grad_filter is not None or hidden_MD.dtype != weight_VD.dtype:
        return False
    tile = _sweep_tile(student, None, options, pair=True)
    left = options.workspace_bytes - _sum_bytes(student, needs)
    fits = left // _token_bytes(student, tile, K=0, pair=True, gathers=True)
    return fits >= max(min(len(hidden_MD), MIN_CHUNK_TOKENS), 1)


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
    dropped share of |dlogits|, (N,): 0, since a filter goes the other way.

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
    full = teacher if isinstance(teacher, Head) else None
    launch.check_dtypes("policy_head", *student, *(full or ()))
    N, device = len(targets_N), targets_N.device
    sums = _Sums(student, needs, rows_N)
    total = torch.zeros((), dtype=torch.float32, device=device)
    fields_4N = torch.zeros(4, N, dtype=torch.float32, device=device)
    argmax_N = torch.zeros(N, dtype=torch.int64, device=device)
    with launch.on_device(targets_N):
        workspace = _Workspace.of(student, teacher, needs, rows_N, options)
        for chunk in workspace.chunks():
            topk = None
            if isinstance(teacher, TeacherTopK):
                topk = TeacherTopK(teacher.ids[chunk], teacher.logprobs[chunk])
            heads = (
                launch.chunk_of(student, rows_N, chunk)[0],
                launch.chunk_of(full, rows_N, chunk)[0],
            )
            kept = workspace.kept(chunk)
            merged_RR, argmax_N[chunk], z_RK = sweep(
                heads,
                targets_N[chunk],
                None if topk is None else topk.ids,
                options,
                None if rows_N is None else rows_N[chunk],
                workspace.tile,
                kept,
            )
            center_R = torch.zeros_like(merged_RR[6])
            if full is not None and TABLE[options.divergence].needs_alpha:
                merged_RR[6], center_R = _settle_pair(kept, merged_RR, options)
            fields, stats = finish(merged_RR, center_R, z_RK, topk or full, options)
            for field_N, field_R in zip(fields_4N, fields, strict=True):
                field_N[chunk] = field_R
            loss, upstream = loss_and_upstream(fields[:3], chunk, token_loss, torch.float32)  # type: ignore[arg-type]
            total += loss
            dtype = student.hidden_ND.dtype
            rows = token_rows(targets_N[chunk], topk, stats, upstream, options, dtype)
            dlogits_RV = _pair_dlogits(
                kept, targets_N[chunk], rows, options, dtype, pair=full is not None
            )
            sums.add(dlogits_RV, chunk, rows.scale)
    return total, (*fields_4N, argmax_N), sums.results(), torch.zeros_like(total.expand(N))


def _sweep_tile(student: Head, teacher: Head | None, options: HeadOptions, *, pair: bool) -> Tile:
    kind = launch.tile_kind(
        "keep_pair" if pair else "keep_single", softcap=options.logit_softcap is not None
    )
    return launch.tile_for(kind, student, teacher)


def _num_parts(V: int, tile: Tile) -> int:
    return -(-V // tile.block_v) * tile.parts


def _keeps_two(dtype: torch.dtype, *, pair: bool) -> bool:
    """Whether a logit, or a pair of them, is kept as two numbers: see policy_head_pair."""
    return pair or dtype != torch.float32


def _row_length(V: int) -> int:
    return -(-V // ROW_STEP) * ROW_STEP


def _copies_dlogits(dtype: torch.dtype) -> bool:
    """The interpreter's store truncates to bfloat16; a GPU rounds, and so does PyTorch."""
    return launch.INTERPRETING and dtype == torch.bfloat16


def _sum_bytes(student: Head, needs: tuple[bool, bool, bool]) -> int:
    weight_VD = student.weight_VD
    return 4 * weight_VD.numel() if needs[1] and weight_VD.dtype != torch.float32 else 0


def _token_bytes(student: Head, tile: Tile, *, K: int, pair: bool, gathers: bool) -> int:
    """What the chunk way holds of one token."""
    V, D = student.weight_VD.shape
    size = student.hidden_ND.dtype.itemsize
    planes = 2 if _keeps_two(student.hidden_ND.dtype, pair=pair) else 1
    kept = planes * size * _row_length(V) + 8 * _num_parts(V, tile)
    kept += (4 + size) * V * _copies_dlogits(student.hidden_ND.dtype)
    products = (4 + size + size * gathers) * D  # dhidden and as it is returned, hidden
    return kept + products + sweep_bytes(V, K, tile) + NUMBERS_BYTES


@dataclass
class _Workspace:
    """The kept logits of a chunk, and how the trained tokens are cut."""

    N: int
    V: int
    tokens: int  # of a chunk
    tile: Tile
    base: Tensor  # flat
    delta: Tensor | None
    ref: Tensor

    @classmethod
    def of(
        cls,
        student: Head,
        teacher: Head | TeacherTopK | None,
        needs: tuple[bool, bool, bool],
        rows_N: Tensor | None,
        options: HeadOptions,
    ) -> "_Workspace":
        """As many tokens a chunk as fit, evenly cut.

        Raises:
            InputError: not one fits.
        """
        hidden_MD, weight_VD, _ = student
        full = teacher if isinstance(teacher, Head) else None
        K = teacher.ids.shape[1] if isinstance(teacher, TeacherTopK) else 0
        V = len(weight_VD)
        N = len(hidden_MD) if rows_N is None else len(rows_N)
        tile = _sweep_tile(student, full, options, pair=full is not None)
        each = _token_bytes(
            student, tile, K=K, pair=full is not None, gathers=rows_N is not None and needs[1]
        )
        fits = (options.workspace_bytes - _sum_bytes(student, needs)) // each
        if fits < 1:
            raise launch.too_small(options.workspace_bytes, _sum_bytes(student, needs) + each)
        tokens = triton.cdiv(N, triton.cdiv(N, min(fits, max(N, 1)))) if N else 0
        whole = triton.cdiv(tokens, tile.block_n) * tile.block_n
        tokens = min(whole, N) if whole <= fits else tokens
        dtype = hidden_MD.dtype if hidden_MD.dtype == torch.float32 else torch.float16
        size, device = tokens * _row_length(V), hidden_MD.device
        delta = None
        if _keeps_two(hidden_MD.dtype, pair=full is not None):
            delta = torch.empty(size, dtype=dtype, device=device)
        return cls(
            N,
            V,
            tokens,
            tile,
            base=torch.empty(size, dtype=dtype, device=device),
            delta=delta,
            ref=torch.empty(2 * tokens * _num_parts(V, tile), dtype=torch.float32, device=device),
        )

    def chunks(self) -> Iterator[slice]:
        """The trained tokens in chunks."""
        for start in range(0, self.N, max(self.tokens, 1)):
            yield slice(start, min(start + self.tokens, self.N))

    def kept(self, chunk: slice) -> Kept:
        """Room for the logits of a chunk."""
        R, P, row = chunk.stop - chunk.start, _num_parts(self.V, self.tile), _row_length(self.V)

        def rows(flat: Tensor) -> Tensor:
            return flat[: R * row].view(R, row)[:, : self.V]

        return Kept(
            rows(self.base),
            None if self.delta is None else rows(self.delta),
            self.ref[: 2 * P * R].view(2, P, R),
            part_v=self.tile.block_v // self.tile.parts,
            split_v=self.tile.split_v,
        )


def _settle_pair(kept: Kept, merged_RR: Tensor, options: HeadOptions) -> Tensor:
    """jsd or skew_kl and its center from the kept pair, (2, R) float64."""
    R, num_splits = len(kept.base_RV), kept.num_splits
    part_2SR = torch.empty(2, num_splits, R, dtype=torch.float32, device=merged_RR.device)
    settled_2R = merged_RR.new_empty(2, R)
    _pair_settle_kernel[kept.grid](
        row_ptr=launch.row_constants(merged_RR),
        part_ptr=part_2SR,
        alpha=options.alpha,
        rest=1.0 - options.alpha,
        IS_JSD=options.divergence == "jsd",
        **kept.arguments(),
    )
    grid = (triton.cdiv(R, MERGE_BLOCK), 2)
    _sum_splits_kernel[grid](part_2SR, settled_2R, R, num_splits, BLOCK_N=MERGE_BLOCK)
    return settled_2R


def _pair_dlogits(
    kept: Kept,
    targets_R: Tensor,
    rows: Rows,
    options: HeadOptions,
    dtype: torch.dtype,
    *,
    pair: bool,
) -> Tensor:
    """dlogits (R, V) times rows.scale, over the kept logits."""
    R, V = kept.base_RV.shape
    out_RV = kept.base_RV.view(dtype)
    if _copies_dlogits(dtype):
        out_RV = torch.empty_strided(
            (R, V), kept.base_RV.stride(), dtype=torch.float32, device=out_RV.device
        )
    _pair_dlogits_kernel[kept.grid](
        out_ptr=out_RV,
        targets_ptr=targets_R,
        row_ptr=rows.row_RN,
        softcap=float(options.logit_softcap or 1.0),
        inv_temperature=1.0 / options.temperature,
        alpha=options.alpha,
        rest=1.0 - options.alpha,
        HAS_TEACHER=pair,
        HAS_SOFTCAP=options.logit_softcap is not None,
        KIND=TABLE[options.divergence].code,
        **launch.only(_pair_dlogits_kernel, kept.arguments()),
    )
    scatter_topk(out_RV, rows, slice(0, R), 0)
    return out_RV.to(dtype)


@dataclass
class _Sums:
    """The gradients while they are added up: float32, but dhidden, whose rows are final at once."""

    student: Head
    needs: tuple[bool, bool, bool]
    rows_N: Tensor | None
    hidden_MD: Tensor | None = field(init=False, default=None)
    weight_VD: Tensor | None = field(init=False, default=None)
    bias_V: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        hidden_MD, weight_VD, bias_V = self.student
        device = hidden_MD.device
        if self.needs[0]:
            self.hidden_MD = torch.zeros_like(hidden_MD, memory_format=torch.contiguous_format)
        if self.needs[1]:
            self.weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=device)
        if self.needs[2] and bias_V is not None:
            self.bias_V = torch.zeros(len(bias_V), dtype=torch.float32, device=device)

    def add(self, dlogits_RV: Tensor, chunk: slice, scale: Tensor) -> None:
        """Fold in a chunk, whose dlogits are times `scale`."""
        student, rows_N = self.student, self.rows_N
        if self.hidden_MD is not None:
            sum_RD = torch.zeros(
                len(dlogits_RV),
                student.hidden_ND.shape[1],
                dtype=torch.float32,
                device=dlogits_RV.device,
            )
            add_product(sum_RD, dlogits_RV, student.weight_VD)
            final_RD = sum_RD.div_(scale).to(self.hidden_MD.dtype)
            if rows_N is None:
                self.hidden_MD[chunk] = final_RD
            else:
                self.hidden_MD.index_copy_(0, rows_N[chunk], final_RD)
        if self.weight_VD is not None:
            # Each chunk of float16 has its own scale: the host must know it, so it waits.
            back = 1.0 / scale.item() if dlogits_RV.dtype == torch.float16 else 1.0
            hidden_RD = hidden_rows(student.hidden_ND, rows_N, chunk)
            add_product(self.weight_VD, dlogits_RV.T, hidden_RD, alpha=back)
        if self.bias_V is not None:
            self.bias_V += dlogits_RV.sum(0, dtype=torch.float32) / scale

    def results(self) -> Gradients:
        """hidden, weight, bias, each in its input's dtype."""
        _, weight_VD, bias_V = self.student
        return (
            self.hidden_MD,
            None if self.weight_VD is None else self.weight_VD.to(weight_VD.dtype),
            None if self.bias_V is None or bias_V is None else self.bias_V.to(bias_V.dtype),
        )
