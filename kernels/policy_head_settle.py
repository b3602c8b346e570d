"""jsd and skew_kl: the second sweep of the forward, with both norms known.

Legend: N tokens, D hidden (TD the teacher's), V vocabulary, S splits; p, p_t, p_m probabilities of
student, teacher and their mixture; d = log p_t - log p.
"""

import triton
import triton.language as tl

from fdfast.kernels.tile_math import (
    clamp,
    kl_term,
    log_mixture,
    logits_tile,
    skew_slope,
    tempered_part,
    tile_of,
    wide,
)

# Rows of the constants of a token, (ROWS, N) float32, that this kernel and the gradient's read.
ROWS = 11  # max, log_sum, teacher's max, log_sum, lse_T - lse_S in two parts, center, coef_p,
# coef_plogp, coef_divergence, coef_target


@triton.jit
def log_ratio(s_nv, t_nv, row_ptr, N):
    """d = (t - s) - (lse_T - lse_S) of raw logits, the last in two parts: a small difference of
    close logits keeps its digits.
    """
    high_n = tl.load(row_ptr + 4 * wide(N))
    low_n = tl.load(row_ptr + 5 * wide(N))
    return ((t_nv - s_nv) - high_n[:, None]) - low_n[:, None]


@triton.jit
def log_prob(z_nv, row_ptr, N, FIRST: tl.constexpr):
    """(z - max) - log_sum, with the norm in rows FIRST and FIRST + 1."""
    top_n = tl.load(row_ptr + FIRST * wide(N))
    log_sum_n = tl.load(row_ptr + (FIRST + 1) * wide(N))
    return (z_nv - top_n[:, None]) - log_sum_n[:, None]


@triton.jit
def settled_terms(p_nv, p_t_nv, d_nv, alpha, rest, IS_JSD: tl.constexpr):
    """What every outcome adds to the divergence, and to the center of its gradient."""
    p_m_nv = alpha * p_t_nv + rest * p_nv
    d_nv = clamp(d_nv, -80.0, 80.0)  # beyond, the mixture is one of the two to every digit
    value_nv = kl_term(p_t_nv, p_m_nv, log_mixture(-d_nv, rest, alpha))
    if IS_JSD:
        center_nv = kl_term(p_nv, p_m_nv, log_mixture(d_nv, alpha, rest))
        value_nv = alpha * value_nv + rest * center_nv
    else:
        center_nv = p_nv * skew_slope(d_nv, alpha, rest)
    return value_nv, center_nv


@triton.jit
def _settle_kernel(
    x_ptr,  # (M, D) hidden states of the student
    w_ptr,  # (V, D)
    b_ptr,  # (V,) or None
    tx_ptr,  # (M, TD) of the teacher
    tw_ptr,  # (V, TD)
    tb_ptr,  # (V,) or None
    rows_ptr,  # (N,) int64: which rows of x are trained, or None for all
    row_ptr,  # (ROWS, N) float32
    part_ptr,  # (2, S, N) float32, written: the divergence and its center
    N,
    V,
    D,
    TD,
    num_splits,
    stride_xn,
    stride_xd,
    stride_wv,
    stride_wd,
    stride_txn,
    stride_txd,
    stride_twv,
    stride_twd,
    softcap,
    inv_temperature,
    teacher_inv_temperature,
    alpha,
    rest,  # 1 - alpha, which float32 would round
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_JSD: tl.constexpr,  # else skew_kl
    EVEN_D: tl.constexpr,
    EVEN_TD: tl.constexpr,
    SPLIT_V: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    DOT: tl.constexpr,
    T_DOT: tl.constexpr,
):
    """One program: BLOCK_N tokens against SPLIT_V columns of the vocabulary.

    Reads (BLOCK_N + BLOCK_V) (D + TD) elements a tile, writes 8 BLOCK_N bytes in all.
    """
    pid_n, pid_s = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_splits, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    rows_n = safe_n
    if HAS_ROWS:
        rows_n = tl.load(rows_ptr + safe_n)
    value_n = tl.zeros((BLOCK_N,), tl.float32)
    center_n = tl.zeros((BLOCK_N,), tl.float32)
    v_begin = pid_s * SPLIT_V
    for v in range(v_begin, tl.minimum(v_begin + SPLIT_V, V), BLOCK_V):
        safe_v = tl.minimum(v + tl.arange(0, BLOCK_V), V - 1)
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
        for part in tl.static_range(PARTS):
            offs_v = v + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
            part_v = tl.minimum(offs_v, V - 1)
            inside_v = (offs_v < V)[None, :]
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
            d_nv = log_ratio(s_nv, t_nv, row_ptr + safe_n, N)
            p_nv = tl.where(inside_v, tl.exp(log_prob(s_nv, row_ptr + safe_n, N, 0)), 0.0)
            p_t_nv = tl.where(inside_v, tl.exp(log_prob(t_nv, row_ptr + safe_n, N, 2)), 0.0)
            value_nv, center_nv = settled_terms(p_nv, p_t_nv, d_nv, alpha, rest, IS_JSD)
            value_n += tl.sum(value_nv, 1)
            center_n += tl.sum(center_nv, 1)
    at = part_ptr + wide(pid_s) * N + safe_n
    tl.store(at, value_n, mask=mask_n)
    tl.store(at + wide(num_splits) * N, center_n, mask=mask_n)
