"""The backward kernels of policy_head: dlogits of a vocabulary block, recomputed tile by tile.

Legend: N tokens, D hidden (TD the teacher's), V vocabulary, B columns of the block, K top-k.
"""

import triton
import triton.language as tl

from fdfast.kernels.policy_head_settle import log_prob, log_ratio
from fdfast.kernels.tile_math import (
    NEAR,
    clamp,
    dz_draw,
    log_mixture,
    logits_tile,
    phi_near,
    skew_slope,
    tempered_part,
    tile_of,
    wide,
)

FORWARD_KL = tl.constexpr(0)  # the codes of divergences.TABLE
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)


@triton.jit
def divergence_grad(p_nv, p_t_nv, d_nv, center_n, alpha, rest, KIND: tl.constexpr):
    """d(divergence)/dz of every outcome."""
    if KIND == FORWARD_KL:
        near_nv = -p_nv * (d_nv + phi_near(d_nv))
        grad_nv = tl.where(tl.abs(d_nv) < NEAR, near_nv, p_nv - p_t_nv)
    elif KIND == REVERSE_KL:
        grad_nv = tl.where(p_nv == 0.0, 0.0, p_nv * (-d_nv - center_n[:, None]))
    else:
        d_nv = clamp(d_nv, -80.0, 80.0)
        if KIND == JSD:
            l_nv = -log_mixture(d_nv, alpha, rest)
            grad_nv = rest * p_nv * (l_nv - center_n[:, None])
        else:
            l_nv = skew_slope(d_nv, alpha, rest)
            grad_nv = rest * p_nv * (center_n[:, None] - l_nv)
    return grad_nv


@triton.jit
def dz_of(
    s_nv,  # tempered logits of the student
    log_p_nv,
    p_t_nv,  # the teacher's; without one, anything
    d_nv,  # log p_t - log p; likewise
    hit_nv,  # whether this is the target
    at,  # (BLOCK_N,) pointers to the tokens' constants, see policy_head_settle
    N,
    softcap,
    inv_temperature,
    alpha,
    rest,
    HAS_TEACHER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
):
    """dz = p (coef_p + coef_plogp log p) + coef_divergence d(divergence)/dz, plus coef_target at
    the target, times dz/draw.
    """
    plane = wide(N)
    p_nv = tl.exp(log_p_nv)
    coef_p_n = tl.load(at + 7 * plane)
    coef_plogp_n = tl.load(at + 8 * plane)
    dz_nv = p_nv * (coef_p_n[:, None] + coef_plogp_n[:, None] * log_p_nv)
    if HAS_TEACHER:
        center_n = tl.load(at + 6 * plane)
        toward_nv = divergence_grad(p_nv, p_t_nv, d_nv, center_n, alpha, rest, KIND)
        dz_nv += tl.load(at + 9 * plane)[:, None] * toward_nv
    dz_nv += tl.where(hit_nv, tl.load(at + 10 * plane)[:, None], 0.0)
    return dz_nv * dz_draw(s_nv, softcap, inv_temperature, HAS_SOFTCAP)


@triton.jit
def _dlogits_kernel(
    x_ptr,  # (M, D) hidden states of the student
    w_ptr,  # (V, D)
    b_ptr,  # (V,) or None
    tx_ptr,  # (M, TD) of the teacher, or None
    tw_ptr,  # (V, TD) or None
    tb_ptr,  # (V,) or None
    rows_ptr,  # (N,) int64: which rows of x are trained, or None for all
    targets_ptr,  # (N,) int64
    row_ptr,  # (ROWS, N) float32, see policy_head_settle
    out_ptr,  # (N, B) bfloat16, float16 or float32, written: dlogits of columns first .. first + B
    N,
    V,
    D,
    TD,
    first,
    B,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_txn,
    stride_txd,
    stride_twv,
    stride_twd,
    stride_on,
    softcap,
    inv_temperature,
    teacher_inv_temperature,
    alpha,
    rest,  # 1 - alpha, which float32 would round
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_TD: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    T_DOT: tl.constexpr,
):
    """One program: one tile (BLOCK_N, BLOCK_V) of dz_of.

    Reads (BLOCK_N + BLOCK_V) (D + TD) elements, writes BLOCK_N * BLOCK_V.
    """
    pid_n, pid_v = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(B, BLOCK_V), GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    rows_n = safe_n
    if HAS_ROWS:
        rows_n = tl.load(rows_ptr + safe_n)
    begin = pid_v * BLOCK_V
    safe_v = tl.minimum(first + begin + tl.arange(0, BLOCK_V), V - 1)
    s_raw_nv = logits_tile(
        x_ptr + rows_n * stride_xn,
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
    if HAS_TEACHER:
        t_raw_nv = logits_tile(
            tx_ptr + rows_n * stride_txn,
            tw_ptr,
            safe_v,
            TD,
            stride_txd,
            stride_twv,
            stride_twd,
            EVEN_TD,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
            T_DOT,
        )
    at = row_ptr + safe_n
    target_n = tl.load(targets_ptr + safe_n).to(tl.int32) - first
    out_row_ptrs = out_ptr + safe_n * stride_on
    for part in tl.static_range(PARTS):
        offs_b = begin + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
        part_v = tl.minimum(first + offs_b, V - 1)
        s_nv = tempered_part(
            s_raw_nv,
            b_ptr,
            part_v,
            softcap,
            inv_temperature,
            part,
            PARTS,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        if HAS_TEACHER:
            t_nv = tempered_part(
                t_raw_nv,
                tb_ptr,
                part_v,
                softcap,
                teacher_inv_temperature,
                part,
                PARTS,
                HAS_TEACHER_BIAS,
                HAS_SOFTCAP,
            )
            p_t_nv = tl.exp(log_prob(t_nv, at, N, 2))
            d_nv = log_ratio(s_nv, t_nv, at, N)
        else:
            p_t_nv = s_nv
            d_nv = s_nv
        dz_nv = dz_of(
            s_nv,
            log_prob(s_nv, at, N, 0),
            p_t_nv,
            d_nv,
            offs_b[None, :] == target_n[:, None],
            at,
            N,
            softcap,
            inv_temperature,
            alpha,
            rest,
            HAS_TEACHER,
            HAS_SOFTCAP,
            KIND,
        )
        mask_nv = mask_n[:, None] & (offs_b < B)[None, :]
        out_ptrs = out_row_ptrs[:, None] + offs_b[None, :]
        tl.store(out_ptrs, dz_nv.to(out_ptr.dtype.element_ty), mask=mask_nv)


@triton.jit
def _scatter_kernel(
    out_ptr,  # (N, B) dlogits of columns first .. first + B
    ids_ptr,  # (N, K) int32
    draw_ptr,  # (N, K) float32: what dlogits are at ids
    N,
    B,
    first,
    K,
    stride_on,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N tokens. Reads 8 K bytes a token, writes those of its ids in the block;
    they are distinct, so no two writes meet.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_nk = mask_n[:, None] & (offs_k < K)[None, :]
    at_nk = (safe_n * K)[:, None] + offs_k[None, :]
    column_nk = tl.load(ids_ptr + at_nk, mask=mask_nk, other=0) - first
    draw_nk = tl.load(draw_ptr + at_nk, mask=mask_nk, other=0.0)
    mask_nk = mask_nk & (column_nk >= 0) & (column_nk < B)
    out_ptrs = out_ptr + (safe_n * stride_on)[:, None] + column_nk
    tl.store(out_ptrs, draw_nk.to(out_ptr.dtype.element_ty), mask=mask_nk)
