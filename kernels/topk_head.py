"""topk_head in Triton: the K most likely tokens of each position, from blocks of logits.

A kernel writes float32 logits of one vocabulary block into the workspace, with the maximum and sum
of each tile; PyTorch's radix select takes the block's candidates, which meet those of the blocks
before. Sorting inside the GEMM kernel was reckoned at three times the GEMM's own time; the detour
costs about 16 N V bytes of traffic, half of it.
Legend: N tokens, D hidden, V vocabulary, K top-k, R tokens of a chunk, B columns of a block, T
tiles of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdfast.kernels import launch
from fdfast.kernels.policy_head_merge import _merge_norm
from fdfast.kernels.tile_math import NEG, logits_tile, tempered_part, tile_of, wide
from fdfast.kernels.tiles import Tile
from fdfast.types import Head, HeadOptions

MERGE_BLOCK = 64
MIN_BLOCK_COLUMNS = 4096


@triton.jit
def _logits_kernel(
    x_ptr,  # (N, D)
    w_ptr,  # (V, D)
    b_ptr,  # (V,) or None
    out_ptr,  # (N, B) float32, written: tempered logits of columns first .. first + B
    part_ptr,  # (2, T, N) float32, written: max and sum of each tile
    N,
    V,
    D,
    first,
    B,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_on,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: one tile (BLOCK_N, BLOCK_V).

    Reads (BLOCK_N + BLOCK_V) D elements, writes 4 BLOCK_N (BLOCK_V + 2) bytes.
    """
    num_v = tl.cdiv(B, BLOCK_V)
    pid_n, pid_v = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_v, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_b = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_b = (offs_b < B)[None, :]
    safe_v = tl.minimum(first + offs_b, V - 1)
    raw_nb = logits_tile(
        x_ptr + safe_n * stride_xn,
        w_ptr,
        safe_v,
        D,
        stride_xd,
        stride_wv,
        stride_wd,
        EVEN_D,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        DOT,
    )
    z_nb = tempered_part(
        raw_nb, b_ptr, safe_v, softcap, inv_temperature, 0, 1, HAS_BIAS, HAS_SOFTCAP
    )
    z_nb = tl.where(inside_b, z_nb, NEG)
    top_n = tl.max(z_nb, 1)
    sum_n = tl.sum(tl.exp(z_nb - top_n[:, None]), 1)
    at = part_ptr + wide(pid_v) * N + safe_n
    tl.store(at, top_n, mask=mask_n)
    tl.store(at + wide(num_v) * N, sum_n, mask=mask_n)
    out_ptrs = out_ptr + (safe_n * stride_on)[:, None] + offs_b[None, :]
    tl.store(out_ptrs, z_nb, mask=mask_n[:, None] & inside_b)


@triton.jit
def _fold_norms_kernel(
    part_ptr,  # (2, T, N) float32
    norm_ptr,  # (2, N) float64: max and sum so far, updated
    N,
    num_tiles,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N tokens, the tiles of a block one after the other, in float64."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    at_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    top_n = tl.load(norm_ptr + at_n)
    sum_n = tl.load(norm_ptr + wide(N) + at_n)
    for tile in range(num_tiles):
        at = part_ptr + wide(tile) * N + at_n
        o_top_n = tl.load(at).to(tl.float64)
        o_sum_n = tl.load(at + wide(num_tiles) * N).to(tl.float64)
        top_n, sum_n, _ = _merge_norm(top_n, sum_n, sum_n, o_top_n, o_sum_n, o_sum_n)
    tl.store(norm_ptr + at_n, top_n, mask=mask_n)
    tl.store(norm_ptr + wide(N) + at_n, sum_n, mask=mask_n)


def _blocks(N: int, V: int, k: int, workspace_bytes: int, block_n: int) -> tuple[int, int]:
    """Tokens of a chunk and columns of a block: logits, and what topk holds beside them."""
    tokens = N
    while True:
        columns = (workspace_bytes // max(tokens, 1) - 24 * k - 32) // 5 // 128 * 128
        if columns >= min(MIN_BLOCK_COLUMNS, V) or tokens <= block_n:
            break
        tokens = (tokens + 1) // 2
    if columns < 128:
        raise launch.too_small(workspace_bytes, tokens * (5 * 128 + 24 * k + 32), "topk_head")
    return tokens, min(columns, -(-V // 128) * 128)


def topk_head_fwd(
    head: Head, k: int, *, temperature: float, logit_softcap: float | None, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids (N, K) int64 by falling log-probability, log-probabilities (N, K) and their summed
    probability (N,), both float32.
    """
    launch.check_dtypes("topk_head", *head)
    N, V = len(head.hidden_ND), len(head.weight_VD)
    device = head.hidden_ND.device
    options = HeadOptions(temperature=temperature, logit_softcap=logit_softcap)
    ids_NK = torch.zeros(N, k, dtype=torch.int64, device=device)
    logprobs_NK = torch.zeros(N, k, dtype=torch.float64, device=device)
    tile = launch.tile_for("topk", head)
    tokens, columns = _blocks(N, V, k, workspace_bytes, tile.block_n)
    with launch.on_device(head.hidden_ND):
        buffer = torch.empty(tokens * columns, dtype=torch.float32, device=device)
        for start in range(0, N, max(tokens, 1)):
            chunk = slice(start, min(start + tokens, N))
            part = head._replace(hidden_ND=head.hidden_ND[chunk])
            R = chunk.stop - chunk.start
            best_RK = torch.empty(R, 0, dtype=torch.float32, device=device)
            ids_RK = torch.empty(R, 0, dtype=torch.int64, device=device)
            norm_2R = torch.zeros(2, R, dtype=torch.float64, device=device)
            norm_2R[0] = NEG.value
            out_RB = buffer[: R * columns].view(R, columns)
            for first in range(0, V, columns):
                B = min(columns, V - first)
                _block_logits(part, out_RB[:, :B], first, norm_2R, options, tile)
                top = out_RB[:, :B].topk(min(k, B), dim=1)
                best_RK = torch.cat([best_RK, top.values], 1)
                ids_RK = torch.cat([ids_RK, top.indices + first], 1)
                # A stable sort: of equal logits the smaller id comes first, as blocks do.
                best_RK, order = best_RK.sort(dim=1, descending=True, stable=True)
                best_RK, ids_RK = best_RK[:, :k], ids_RK.gather(1, order[:, :k])
            best_RK = best_RK.masked_fill(best_RK <= NEG.value / 2, float("-inf"))
            ids_NK[chunk] = ids_RK
            top_R1, log_sum_R1 = norm_2R[0][:, None], norm_2R[1].log()[:, None]
            logprobs_NK[chunk] = (best_RK.double() - top_R1) - log_sum_R1
    mass_N = logprobs_NK.exp().sum(1)
    return ids_NK, logprobs_NK.to(torch.float32), mass_N.to(torch.float32)


def _block_logits(
    head: Head, out_RB: Tensor, first: int, norm_2R: Tensor, options: HeadOptions, tile: Tile
) -> None:
    """Logits of one block into `out_RB`, their norm folded into `norm_2R`."""
    R, B = out_RB.shape
    num_tiles = triton.cdiv(B, tile.block_v)
    part_2TR = torch.empty(2, num_tiles, R, dtype=torch.float32, device=out_RB.device)
    arguments = launch.gemm_arguments(head, None, None, options, tile)
    _logits_kernel[(triton.cdiv(R, tile.block_n) * num_tiles,)](
        out_ptr=out_RB,
        part_ptr=part_2TR,
        N=R,
        first=first,
        B=B,
        stride_on=out_RB.stride(0),
        **launch.only(_logits_kernel, arguments),
    )
    _fold_norms_kernel[(triton.cdiv(R, MERGE_BLOCK),)](
        part_2TR, norm_2R, R, num_tiles, BLOCK_N=MERGE_BLOCK
    )
