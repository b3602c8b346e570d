"""The backward kernels of attention over a prefix forest: dq by tiles of queries, dk and dv by
tiles of keys, each as in prefix_attention_forward.py.

Legend: T tokens, H query heads, G key and value heads, D head size; q queries and k keys of a tile,
d its columns (D rounded up to a power of two), S tiles in a list.
"""

import triton
import triton.language as tl

from fdfast.kernels.prefix_attention_forward import _load_tile, _positions, _sees, _store_tile
from fdfast.kernels.tile_math import wide

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_dq(
    dq_qd,
    q_qd,
    dout_qd,
    lse_log2_q,
    delta_q,
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
    """dq / scale after one more tile of keys: dS K with dS = P (dO V' - delta)."""
    offs_k = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    k_kd = _load_tile(k_ptr, offs_k, offs_d, T, D, stride_kt, MASKED, EVEN_D).to(DOT)
    v_kd = _load_tile(v_ptr, offs_k, offs_d, T, D, stride_vt, MASKED, EVEN_D).to(DOT)
    z_qk = tl.dot(q_qd, tl.trans(k_kd), input_precision="ieee") * scale_log2
    p_qk = tl.exp2(z_qk - lse_log2_q[:, None])
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
        p_qk = tl.where(visible, p_qk, 0.0)
    dp_qk = tl.dot(dout_qd, tl.trans(v_kd), input_precision="ieee")
    dz_qk = p_qk * (dp_qk - delta_q[:, None])
    return tl.dot(dz_qk.to(DOT), k_kd, dq_qd, input_precision="ieee")


@triton.jit
def _dq_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, G, D)
    v_ptr,  # (T, G, D)
    out_ptr,  # (T, H, D)
    dout_ptr,  # (T, H, D)
    lse_ptr,  # (H, T) float32
    delta_ptr,  # (H, T) float32, written: sum over D of dout * out
    dq_ptr,  # (T, H, D), written
    end_ptr,  # (T,) int32
    position_ptr,  # (T,) int32 or None
    first_ptr,  # (tiles of queries + 1,) int32
    masked_ptr,  # (tiles of queries,) int32
    list_ptr,  # (S,) int32
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
    stride_gt,
    stride_gh,
    stride_dqt,
    stride_dqh,
    scale,
    scale_log2,
    window,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: dq of a tile of queries of one head, and delta for the kernel that comes next.

    Reads 3 BLOCK_Q D elements and 2 BLOCK_K D a tile of its list; writes BLOCK_Q (D + 1).
    """
    pid = tl.program_id(0)
    head = pid % H
    query_tile = tl.cdiv(T, BLOCK_Q) - 1 - pid // H
    offs_q = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    inside_q = offs_q < T
    q_ptr += wide(head) * stride_qh
    k_ptr += wide(head // GROUP) * stride_kh
    v_ptr += wide(head // GROUP) * stride_vh
    out_ptr += wide(head) * stride_oh
    dout_ptr += wide(head) * stride_gh
    q_qd = _load_tile(q_ptr, offs_q, offs_d, T, D, stride_qt, True, EVEN_D).to(DOT)
    out_qd = _load_tile(out_ptr, offs_q, offs_d, T, D, stride_ot, True, EVEN_D)
    dout_qd = _load_tile(dout_ptr, offs_q, offs_d, T, D, stride_gt, True, EVEN_D)
    delta_q = tl.sum(out_qd.to(tl.float32) * dout_qd.to(tl.float32), 1)
    tl.store(delta_ptr + wide(head) * T + offs_q, delta_q, mask=inside_q)
    dout_qd = dout_qd.to(DOT)
    lse_q = tl.load(lse_ptr + wide(head) * T + offs_q, mask=inside_q, other=0.0)
    lse_log2_q = lse_q * LOG2_E
    position_q = _positions(position_ptr, offs_q, T, HAS_WINDOW)
    dq_qd = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    first, masked = tl.load(first_ptr + query_tile), tl.load(masked_ptr + query_tile)
    end = tl.load(first_ptr + query_tile + 1)
    for at in range(first, masked):
        dq_qd = _add_dq(
            dq_qd,
            q_qd,
            dout_qd,
            lse_log2_q,
            delta_q,
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
        dq_qd = _add_dq(
            dq_qd,
            q_qd,
            dout_qd,
            lse_log2_q,
            delta_q,
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
    dq_ptr += wide(head) * stride_dqh
    _store_tile(dq_ptr, dq_qd * scale, offs_q, offs_d, T, D, stride_dqt, EVEN_D)


@triton.jit
def _add_dkv(
    dk_kd,
    dv_kd,
    k_kd,
    v_kd,
    offs_k,
    end_k,
    position_k,
    query_tile,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    position_ptr,
    T,
    D,
    stride_qt,
    stride_gt,
    scale_log2,
    window,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """dk / scale and dv after one more tile of queries: dS' Q and P' dO.

    Queries beyond T are zero with dO and delta, so a tile that needs no masks may have some.
    """
    offs_q = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    inside_q = offs_q < T
    q_qd = _load_tile(q_ptr, offs_q, offs_d, T, D, stride_qt, True, EVEN_D).to(DOT)
    dout_qd = _load_tile(dout_ptr, offs_q, offs_d, T, D, stride_gt, True, EVEN_D).to(DOT)
    lse_log2_q = tl.load(lse_ptr + offs_q, mask=inside_q, other=0.0) * LOG2_E
    delta_q = tl.load(delta_ptr + offs_q, mask=inside_q, other=0.0)
    z_kq = tl.dot(k_kd, tl.trans(q_qd), input_precision="ieee") * scale_log2
    p_kq = tl.exp2(z_kq - lse_log2_q[None, :])
    if MASKED:
        position_q = _positions(position_ptr, offs_q, T, HAS_WINDOW)
        visible = _sees(
            offs_q[None, :],
            offs_k[:, None],
            end_k[:, None],
            position_q[None, :],
            position_k[:, None],
            window,
            HAS_WINDOW,
        )
        p_kq = tl.where(visible, p_kq, 0.0)
    dv_kd = tl.dot(p_kq.to(DOT), dout_qd, dv_kd, input_precision="ieee")
    dp_kq = tl.dot(v_kd, tl.trans(dout_qd), input_precision="ieee")
    dz_kq = p_kq * (dp_kq - delta_q[None, :])
    dk_kd = tl.dot(dz_kq.to(DOT), q_qd, dk_kd, input_precision="ieee")
    return dk_kd, dv_kd


@triton.jit
def _dkv_kernel(
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, G, D)
    v_ptr,  # (T, G, D)
    dout_ptr,  # (T, H, D)
    lse_ptr,  # (H, T) float32
    delta_ptr,  # (H, T) float32, of _dq_kernel
    dk_ptr,  # (T, G, D), written
    dv_ptr,  # (T, G, D), written
    end_ptr,  # (T,) int32
    position_ptr,  # (T,) int32 or None
    first_ptr,  # (tiles of keys + 1,) int32
    masked_ptr,  # (tiles of keys,) int32
    list_ptr,  # (S,) int32: tiles of queries
    T,
    H,
    D,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    scale,
    scale_log2,
    window,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: dk and dv of a tile of keys of one key head, the GROUP query heads in turn.

    Reads 2 BLOCK_K D elements and GROUP BLOCK_Q (2 D + 2) a tile of its list; writes 2 BLOCK_K D.
    The first tiles of keys, which most see, run first.
    """
    pid = tl.program_id(0)
    num_key_heads = H // GROUP
    key_head = pid % num_key_heads
    key_tile = pid // num_key_heads
    offs_k = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    k_ptr += wide(key_head) * stride_kh
    v_ptr += wide(key_head) * stride_vh
    k_kd = _load_tile(k_ptr, offs_k, offs_d, T, D, stride_kt, True, EVEN_D).to(DOT)
    v_kd = _load_tile(v_ptr, offs_k, offs_d, T, D, stride_vt, True, EVEN_D).to(DOT)
    end_k = tl.load(end_ptr + offs_k, mask=offs_k < T, other=0)
    position_k = _positions(position_ptr, offs_k, T, HAS_WINDOW)
    dk_kd = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv_kd = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    first, masked = tl.load(first_ptr + key_tile), tl.load(masked_ptr + key_tile)
    end = tl.load(first_ptr + key_tile + 1)
    for member in range(GROUP):
        head = wide(key_head * GROUP + member)
        for at in range(first, masked):
            dk_kd, dv_kd = _add_dkv(
                dk_kd,
                dv_kd,
                k_kd,
                v_kd,
                offs_k,
                end_k,
                position_k,
                tl.load(list_ptr + at),
                q_ptr + head * stride_qh,
                dout_ptr + head * stride_gh,
                lse_ptr + head * T,
                delta_ptr + head * T,
                position_ptr,
                T,
                D,
                stride_qt,
                stride_gt,
                scale_log2,
                window,
                False,
                EVEN_D,
                HAS_WINDOW,
                BLOCK_Q,
                BLOCK_D,
                DOT,
            )
        for at in range(masked, end):
            dk_kd, dv_kd = _add_dkv(
                dk_kd,
                dv_kd,
                k_kd,
                v_kd,
                offs_k,
                end_k,
                position_k,
                tl.load(list_ptr + at),
                q_ptr + head * stride_qh,
                dout_ptr + head * stride_gh,
                lse_ptr + head * T,
                delta_ptr + head * T,
                position_ptr,
                T,
                D,
                stride_qt,
                stride_gt,
                scale_log2,
                window,
                True,
                EVEN_D,
                HAS_WINDOW,
                BLOCK_Q,
                BLOCK_D,
                DOT,
            )
    dk_ptr += wide(key_head) * stride_dkh
    dv_ptr += wide(key_head) * stride_dvh
    _store_tile(dk_ptr, dk_kd * scale, offs_k, offs_d, T, D, stride_dkt, EVEN_D)
    _store_tile(dv_ptr, dv_kd, offs_k, offs_d, T, D, stride_dvt, EVEN_D)
