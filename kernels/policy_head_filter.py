"""The certified filter of the backward: which columns of a block of dlogits are worth a GEMM.

A token may drop at most `share` of its sum |dlogits|. The blocks come one after the other, so the
bound is kept for every prefix of the vocabulary: in each block a token may drop what is left of
share * (sum so far, this block included) after what was really dropped before. The final sum is
larger than every prefix's, so the bound holds for the whole, and no sweep over the vocabulary is
needed to find it out. Tokenizers put frequent tokens first, so the budget is there when the long
tail of rare ones comes.
Legend: N tokens, R tokens of a chunk, B columns of a block, J thresholds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_EDGES = 32  # thresholds tried: the row's largest |dlogit| times 2^0 .. 2^-31
COLUMNS = 128  # columns of a step
ROWS_OF_SCAN = 8


@triton.jit
def _threshold_kernel(
    dlogits_ptr,  # (R, B)
    seen_ptr,  # (R,) float32: sum |dlogits| of earlier blocks; this block is added
    dropped_ptr,  # (R,) float32: what earlier blocks dropped
    threshold_ptr,  # (R,) float32, written
    B,
    stride_dr,
    share,
    NUM_EDGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: one token. Reads its B entries twice (the second time from cache) and finds the
    largest threshold, of NUM_EDGES, whose smaller entries together fit the budget.
    """
    row = tl.program_id(0)
    row_ptr = dlogits_ptr + row.to(tl.int64) * stride_dr
    offs = tl.arange(0, COLUMNS)
    largest_b = tl.zeros((COLUMNS,), tl.float32)
    sum_b = tl.zeros((COLUMNS,), tl.float32)
    for b in range(0, B, COLUMNS):
        size_b = tl.abs(tl.load(row_ptr + b + offs, mask=offs < B - b, other=0.0).to(tl.float32))
        largest_b = tl.maximum(largest_b, size_b)
        sum_b += size_b
    largest = tl.max(largest_b, 0)
    offs_j = tl.arange(0, NUM_EDGES)
    edge_j = largest * tl.exp2(-offs_j.to(tl.float32))
    below_j = tl.zeros((NUM_EDGES,), tl.float32)
    for b in range(0, B, COLUMNS):
        size_b = tl.abs(tl.load(row_ptr + b + offs, mask=offs < B - b, other=0.0).to(tl.float32))
        small_bj = tl.where(size_b[:, None] < edge_j[None, :], size_b[:, None], 0.0)
        below_j += tl.sum(small_bj, 0)
    seen = tl.load(seen_ptr + row) + tl.sum(sum_b, 0)
    budget = share * seen - tl.load(dropped_ptr + row)
    tl.store(seen_ptr + row, seen)
    tl.store(threshold_ptr + row, tl.max(tl.where(below_j <= budget, edge_j, 0.0), 0))


@triton.jit
def _active_kernel(
    dlogits_ptr,  # (R, B)
    threshold_ptr,  # (R,) float32
    active_ptr,  # (B,) int8, written: some token has an entry of at least its threshold
    R,
    B,
    stride_dr,
    ROWS_OF_SCAN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: COLUMNS columns of all R tokens; reads R * COLUMNS entries once."""
    offs_b = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    offs_r = tl.arange(0, ROWS_OF_SCAN)
    found_rb = tl.zeros((ROWS_OF_SCAN, COLUMNS), tl.int32)
    for r in range(0, R, ROWS_OF_SCAN):
        mask_r = offs_r < R - r
        at_rb = ((r + offs_r).to(tl.int64) * stride_dr)[:, None] + offs_b[None, :]
        mask_rb = mask_r[:, None] & (offs_b < B)[None, :]
        size_rb = tl.abs(tl.load(dlogits_ptr + at_rb, mask=mask_rb, other=0.0).to(tl.float32))
        threshold_r = tl.load(threshold_ptr + r + offs_r, mask=mask_r, other=1.0)
        idle_rb = (size_rb < threshold_r[:, None]) | (size_rb == 0.0)  # NaN is worth a GEMM
        found_rb = found_rb | tl.where(idle_rb, 0, 1)
    tl.store(active_ptr + offs_b, tl.max(found_rb, 0).to(tl.int8), mask=offs_b < B)


class ColumnFilter:
    """The active columns of block after block, and what each token has dropped; N-sized."""

    def __init__(self, share: float, num_tokens: int, device: torch.device) -> None:
        # Sums are float32: this much of the bound is kept back for their rounding.
        self.share = share * (1 - 1e-5)
        self.seen_N, self.dropped_N = torch.zeros(2, num_tokens, device=device)

    def keep(self, dlogits_RB: Tensor, chunk: slice) -> Tensor:
        """Indices (int64) of the columns of this block that are worth a GEMM."""
        R, B = dlogits_RB.shape
        threshold_R = torch.empty(R, dtype=torch.float32, device=dlogits_RB.device)
        active_B = torch.empty(B, dtype=torch.int8, device=dlogits_RB.device)
        _threshold_kernel[(R,)](
            dlogits_RB,
            self.seen_N[chunk],
            self.dropped_N[chunk],
            threshold_R,
            B,
            dlogits_RB.stride(0),
            self.share,
            NUM_EDGES=NUM_EDGES,
            COLUMNS=COLUMNS,
        )
        _active_kernel[(triton.cdiv(B, COLUMNS),)](
            dlogits_RB,
            threshold_R,
            active_B,
            R,
            B,
            dlogits_RB.stride(0),
            ROWS_OF_SCAN=ROWS_OF_SCAN,
            COLUMNS=COLUMNS,
        )
        idle = (active_B == 0).nonzero().squeeze(1)
        self.dropped_N[chunk] += dlogits_RB[:, idle].abs().sum(1, dtype=torch.float32)
        return active_B.nonzero().squeeze(1)

    def dropped_share(self) -> Tensor:
        """The share of each token's sum |dlogits| that was dropped, (N,) float32."""
        share_N: Tensor = self.dropped_N / self.seen_N.clamp(min=1e-30)
        return share_N
