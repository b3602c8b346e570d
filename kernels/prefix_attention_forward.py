"""The forward kernel of attention over a prefix forest, and what it shares with the backward.

A query at row q sees the key at row k exactly when k <= q < kv_end[k] and, with a window W,
position[q] - position[k] < W. A program owns one tile and walks a list of the tiles that it meets:
first those that are visible as a whole, without masks, then the others. Every element is summed by
one program in the order of its list: no atomics, so results repeat to the bit.
Legend: T tokens, H query heads, G key and value heads, D head size; q queries and k keys of a tile,
d its columns (D rounded up to a power of two), S tiles in a list.
"""

import triton
import triton.language as tl

from fdfast.kernels.tile_math import NEG, wide

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_tile(
    ptr,  # of a head
    offs_n,  # (n,) rows
    offs_d,  # (d,)
    T,
    D,
    stride_t,
    MASKED: tl.constexpr,  # whether rows may lie beyond T
    EVEN_D: tl.constexpr,
):
    """A tile (n, d), zero beyond T and D."""
    ptrs = ptr + (offs_n.to(tl.int64) * stride_t)[:, None] + offs_d[None, :]
    if MASKED and EVEN_D:
        tile_nd = tl.load(ptrs, mask=(offs_n < T)[:, None], other=0.0)
    elif MASKED:
        tile_nd = tl.load(ptrs, mask=(offs_n < T)[:, None] & (offs_d < D)[None, :], other=0.0)
    elif EVEN_D:
        tile_nd = tl.load(ptrs)
    else:
        tile_nd = tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)
    return tile_nd


@triton.jit
def _store_tile(
    ptr,  # of a head
    tile_nd,
    offs_n,  # (n,) rows
    offs_d,  # (d,)
    T,
    D,
    stride_t,
    EVEN_D: tl.constexpr,
):
    """The tile's rows before T and columns before D, in the pointer's dtype."""
    ptrs = ptr + (offs_n.to(tl.int64) * stride_t)[:, None] + offs_d[None, :]
    mask = (offs_n < T)[:, None]
    if not EVEN_D:
        mask = mask & (offs_d < D)[None, :]
    tl.store(ptrs, tile_nd.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sees(offs_q, offs_k, end_k, position_q, position_k, window, HAS_WINDOW: tl.constexpr):
    """(q, k) bool, from vectors that bring their own axes: (q, 1) and (1, k), or the transpose."""
    visible = (offs_k <= offs_q) & (offs_q < end_k)
    if HAS_WINDOW:
        visible = visible & (position_q - position_k < window)
    return visible


@triton.jit
def _positions(position_ptr, offs_n, T, HAS_WINDOW: tl.constexpr):
    """(n,) int32; the rows themselves where no window asks for positions."""
    return tl.load(position_ptr + offs_n, mask=offs_n < T, other=0) if HAS_WINDOW else offs_n


@triton.jit
def _attend(
    out_qd,
    top_q,
    sum_q,
    q_qd,
    offs_q,
    position_q,
    key_tile,
    k_ptr,
    v_ptr,
    end_ptr,
    position_ptr,
    T,
    D,
    stride_kt,
    stride_vt,
    scale_log2,
    window,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """The online softmax after one more tile of keys: sums, their maximum in units of log 2."""
    offs_k = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    k_kd = _load_tile(k_ptr, offs_k, offs_d, T, D, stride_kt, MASKED, EVEN_D).to(DOT)
    z_qk = tl.dot(q_qd, tl.trans(k_kd), input_precision="ieee") * scale_log2
    if MASKED:
        end_k = tl.load(end_ptr + offs_k, mask=offs_k < T, other=0)
        position_k = _positions(position_ptr, offs_k, T, HAS_WINDOW)
        visible = _sees(
            offs_q[:, None],
            offs_k[None, :],
            end_k[None, :],
            position_q[:, None],
            position_k[None, :],
            window,
            HAS_WINDOW,
        )
        # Not -inf: a row without a visible key so far takes sums of ones, which the first visible
        # one multiplies by 2^NEG = 0. Every token sees itself, so there always is one.
        z_qk = tl.where(visible, z_qk, NEG)
    new_top_q = tl.maximum(top_q, tl.max(z_qk, 1))
    p_qk = tl.exp2(z_qk - new_top_q[:, None])
    shrink_q = tl.exp2(top_q - new_top_q)
    sum_q = sum_q * shrink_q + tl.sum(p_qk, 1)
    v_kd = _load_tile(v_ptr, offs_k, offs_d, T, D, stride_vt, MASKED, EVEN_D).to(DOT)
    out_qd = tl.dot(p_qk.to(DOT), v_kd, out_qd * shrink_q[:, None], input_precision="ieee")
    return out_qd, new_top_q, sum_q


@triton.jit
def _forward_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, G, D)
    v_ptr,  # (T, G, D)
    out_ptr,  # (T, H, D), written
    lse_ptr,  # (H, T) float32, written
    end_ptr,  # (T,) int32: kv_end
    position_ptr,  # (T,) int32, or None without a window
    first_ptr,  # (tiles of queries + 1,) int32: where each one's list begins
    masked_ptr,  # (tiles of queries,) int32: where its tiles begin that need masks
    list_ptr,  # (S,) int32: tiles of keys
    T,
    H,
    D,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    scale_log2,
    window,
    GROUP: tl.constexpr,  # query heads of a key head
    EVEN_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: a tile of queries of one head, all its keys.

    Reads BLOCK_Q D elements and 2 BLOCK_K D a tile of its list, which the GROUP heads beside it
    find in L2; writes BLOCK_Q (D + 1). The last tiles of queries, which see most, run first.
    """
    pid = tl.program_id(0)
    head = pid % H
    query_tile = tl.cdiv(T, BLOCK_Q) - 1 - pid // H
    offs_q = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    q_ptr += wide(head) * stride_qh
    k_ptr += wide(head // GROUP) * stride_kh
    v_ptr += wide(head // GROUP) * stride_vh
    q_qd = _load_tile(q_ptr, offs_q, offs_d, T, D, stride_qt, True, EVEN_D).to(DOT)
    position_q = _positions(position_ptr, offs_q, T, HAS_WINDOW)
    out_qd = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    top_q = tl.full((BLOCK_Q,), NEG, dtype=tl.float32)
    sum_q = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    first, masked = tl.load(first_ptr + query_tile), tl.load(masked_ptr + query_tile)
    end = tl.load(first_ptr + query_tile + 1)
    for at in range(first, masked):
        out_qd, top_q, sum_q = _attend(
            out_qd,
            top_q,
            sum_q,
            q_qd,
            offs_q,
            position_q,
            tl.load(list_ptr + at),
            k_ptr,
            v_ptr,
            end_ptr,
            position_ptr,
            T,
            D,
            stride_kt,
            stride_vt,
            scale_log2,
            window,
            False,
            EVEN_D,
            HAS_WINDOW,
            BLOCK_K,
            BLOCK_D,
            DOT,
        )
    for at in range(masked, end):
        out_qd, top_q, sum_q = _attend(
            out_qd,
            top_q,
            sum_q,
            q_qd,
            offs_q,
            position_q,
            tl.load(list_ptr + at),
            k_ptr,
            v_ptr,
            end_ptr,
            position_ptr,
            T,
            D,
            stride_kt,
            stride_vt,
            scale_log2,
            window,
            True,
            EVEN_D,
            HAS_WINDOW,
            BLOCK_K,
            BLOCK_D,
            DOT,
        )
    out_ptr += wide(head) * stride_oh
    _store_tile(out_ptr, out_qd / sum_q[:, None], offs_q, offs_d, T, D, stride_ot, EVEN_D)
    lse_q = (top_q + tl.log2(sum_q)) * LN_2
    tl.store(lse_ptr + wide(head) * T + offs_q, lse_q, mask=offs_q < T)
