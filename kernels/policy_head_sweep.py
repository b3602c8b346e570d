"""The forward kernels of policy_head: statistics of every token from one sweep over the vocabulary.

A program walks one split of the vocabulary for one block of tokens, with the logits of student and
teacher in float32 registers; a second, small kernel merges the splits in their order, in float64.
KL(Q||R) needs no second sweep and no difference of log-sum-exps: with u = r - q of the raw logits,
KL = log E_Q[e^(u - E_Q u)] = log(1 + E_Q[phi(u - E_Q u)]), a sum of non-negative terms kept online
about its running mean. jsd and skew_kl mix the two distributions, so they need both norms first and
sweep once more (`_settle_kernel`).
Legend: N tokens, D hidden (TD the teacher's), V vocabulary, S splits, K top-k; q, r the weighting
and the other distribution (teacher and student for KL(T||S)).
"""

import triton
import triton.language as tl

from fdfast.kernels.tile_math import (
    NEAR,
    NEG,
    logits_tile,
    merge_pair,
    phi_near,
    tempered_part,
    tile_of,
    wide,
)

FLOAT16_LOW = tl.constexpr(-65504.0)  # below it float16 is -inf
# Rows of the partial statistics [PARTIALS, S, N]:
PARTIALS = 7  # max, sum, dot of the student; max, sum of the teacher; mean and phi sum of u


@triton.jit
def _update_norm(z_nv, top_n, sum_n):
    """Online softmax: the new (max, sum of e^(z - max))."""
    new_top_n = tl.maximum(top_n, tl.max(z_nv, 1))
    sum_n = sum_n * tl.exp(top_n - new_top_n) + tl.sum(tl.exp(z_nv - new_top_n[:, None]), 1)
    return new_top_n, sum_n


@triton.jit
def _update_student(z_nv, offs_v, top_n, sum_n, dot_n):
    """Likewise with dot, the sum of e^(z - max) (z - max), and where the tile has its maximum."""
    new_top_n = tl.maximum(top_n, tl.max(z_nv, 1))
    x_nv = z_nv - new_top_n[:, None]
    e_nv = tl.exp(x_nv)
    scale_n = tl.exp(top_n - new_top_n)
    dot_n = scale_n * (dot_n + (top_n - new_top_n) * sum_n) + tl.sum(e_nv * x_nv, 1)
    best_n = tl.min(tl.where(x_nv == 0.0, offs_v[None, :], 2147483647), 1)
    return best_n, new_top_n, sum_n * scale_n + tl.sum(e_nv, 1), dot_n


@triton.jit
def update_pair(q_nv, u_nv, old_top_n, top_n, sum_n, mean_n, phi_sum_n):
    """Fold a tile, u = r - q, into (mean of u, sum of e_q phi(u - mean)); the weights' old sum is
    `sum_n`.

    An outcome that q gives less than e^-87 of its largest adds nothing here; where r gives it much,
    `_merge_kernel` notices that the sum falls short.
    """
    e_nv = tl.exp(q_nv - top_n[:, None])
    tile_sum_n = tl.sum(e_nv, 1)
    tile_mean_n = tl.sum(e_nv * u_nv, 1) / tl.maximum(tile_sum_n, 1e-30)
    u_nv = u_nv - tile_mean_n[:, None]
    far_nv = tl.exp(tl.minimum(u_nv, 50.0)) - 1.0 - u_nv
    phi_nv = tl.where(tl.abs(u_nv) < NEAR, phi_near(u_nv), far_nv)
    phi_n = tl.sum(e_nv * phi_nv, 1)
    return merge_pair(mean_n, phi_sum_n, sum_n, old_top_n - top_n, tile_mean_n, phi_n, tile_sum_n)


@triton.jit
def _take_topk(s_nv, v_end, offs_v, ids_ptr, z_ptr, cursor_n, K, V, mask_n):
    """Store the logits of the ids that lie in this tile, and take them out of it.

    The ids of a token are sorted, `cursor_n` points to its next one; as a rule none or one of them
    is here, so the loop is short.
    """
    next_n = tl.load(ids_ptr + cursor_n, mask=mask_n & (cursor_n < K), other=V)
    while tl.min(next_n, 0) < v_end:
        hit_nv = offs_v[None, :] == next_n[:, None]
        here_n = next_n < v_end
        tl.store(z_ptr + cursor_n, tl.sum(tl.where(hit_nv, s_nv, 0.0), 1), mask=here_n)
        s_nv = tl.where(hit_nv, NEG, s_nv)
        cursor_n += here_n.to(tl.int32)
        next_n = tl.load(ids_ptr + cursor_n, mask=mask_n & (cursor_n < K), other=V)
    return s_nv, cursor_n


@triton.jit
def _keep_student(s_nv, base_ptr, delta_ptr, kept_nv, ref_ptrs, mask_nv, mask_n):
    """Store one part of the student's logits and its maximum: see policy_head_pair."""
    ref_n = tl.max(s_nv, 1)
    tl.store(ref_ptrs, ref_n, mask=mask_n)
    x_nv = s_nv - ref_n[:, None]
    base_nv = x_nv.to(base_ptr.dtype.element_ty)
    tl.store(base_ptr + kept_nv, base_nv, mask=mask_nv)
    if base_ptr.dtype.element_ty == tl.float16:
        # Where base is -inf nothing is left: -inf - (-inf) would be NaN.
        rest_nv = tl.where(x_nv < FLOAT16_LOW, 0.0, x_nv - base_nv.to(tl.float32))
        tl.store(delta_ptr + kept_nv, rest_nv.to(tl.float16), mask=mask_nv)


@triton.jit
def _keep_pair(s_nv, t_nv, base_ptrs, delta_ptrs, ref_ptrs, plane, mask_nv, mask_n):
    """Store one part of both models' logits and its maxima: see policy_head_pair."""
    ref_n = tl.max(s_nv, 1)
    t_ref_n = tl.max(t_nv, 1)
    tl.store(ref_ptrs, ref_n, mask=mask_n)
    tl.store(ref_ptrs + plane, t_ref_n, mask=mask_n)
    x_nv = s_nv - ref_n[:, None]
    y_nv = t_nv - t_ref_n[:, None]
    base_nv = tl.maximum(x_nv, y_nv, propagate_nan=tl.PropagateNan.ALL)
    tl.store(base_ptrs, base_nv.to(base_ptrs.dtype.element_ty), mask=mask_nv)
    # (t - s) first: it is small where the models are close.
    delta_nv = (t_nv - s_nv) - (t_ref_n - ref_n)[:, None]
    tl.store(delta_ptrs, delta_nv.to(delta_ptrs.dtype.element_ty), mask=mask_nv)


@triton.jit
def _sweep_kernel(
    x_ptr,  # (M, D) hidden states of the student
    w_ptr,  # (V, D)
    b_ptr,  # (V,) or None
    tx_ptr,  # (M, TD) of the teacher, or None
    tw_ptr,  # (V, TD) or None
    tb_ptr,  # (V,) or None
    rows_ptr,  # (N,) int64: which rows of x are trained, or None for all
    targets_ptr,  # (N,) int64
    ids_ptr,  # (N, K) int32, sorted along K, or None
    first_ptr,  # (S, N) int32: how many of the ids come before each split, or None
    part_ptr,  # (PARTIALS, S, N) float32, written
    best_ptr,  # (S, N) int32, written: the student's argmax within the split
    z_target_ptr,  # (N,) float32, written: the target's logit
    z_topk_ptr,  # (N, K) float32, written: the logits at ids, or None
    base_ptr,  # (N, V) float16 or float32, written: see policy_head_pair; or None
    delta_ptr,  # likewise; None without a teacher for float32
    ref_ptr,  # (2, P, N) float32, written: the maximum of each part; or None
    N,
    V,
    D,
    TD,
    K,
    num_splits,
    num_parts,
    stride_bn,
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
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_TOPK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BY_STUDENT: tl.constexpr,  # the student is q: reverse_kl
    KEEPS: tl.constexpr,  # the logits are stored, for the token-chunk way
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

    Reads (BLOCK_N + BLOCK_V) (D + TD) elements a tile and writes 4 (PARTIALS + 1) BLOCK_N bytes in
    all: no logit reaches memory but the target's and those of a top-k teacher. If it KEEPS them, a
    tile is written, too: 4 bytes a column, 8 for a teacher and float32.
    """
    pid_n, pid_s = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_splits, GROUP_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    rows_n = safe_n
    if HAS_ROWS:
        rows_n = tl.load(rows_ptr + safe_n)
    target_n = tl.load(targets_ptr + safe_n).to(tl.int32)
    v_begin = pid_s * SPLIT_V
    v_stop = tl.minimum(v_begin + SPLIT_V, V)

    top_n = tl.full((BLOCK_N,), NEG, tl.float32)
    sum_n = tl.zeros((BLOCK_N,), tl.float32)
    dot_n = tl.zeros((BLOCK_N,), tl.float32)
    best_n = tl.zeros((BLOCK_N,), tl.int32)
    z_target_n = tl.zeros((BLOCK_N,), tl.float32)
    t_top_n = tl.full((BLOCK_N,), NEG, tl.float32)
    t_sum_n = tl.zeros((BLOCK_N,), tl.float32)
    mean_n = tl.zeros((BLOCK_N,), tl.float32)
    phi_sum_n = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_TOPK:
        cursor_n = tl.load(first_ptr + wide(pid_s) * N + safe_n)

    for v in range(v_begin, v_stop, BLOCK_V):
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
        for part in tl.static_range(PARTS):
            begin = v + part * (BLOCK_V // PARTS)
            offs_v = begin + tl.arange(0, BLOCK_V // PARTS)
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
            s_nv = tl.where(inside_v, s_nv, NEG)
            z_target_n += tl.sum(tl.where(offs_v[None, :] == target_n[:, None], s_nv, 0.0), 1)
            if KEEPS:
                mask_nv = mask_n[:, None] & inside_v
                kept_nv = (safe_n * stride_bn)[:, None] + offs_v[None, :]
                ref_ptrs = ref_ptr + wide(begin // (BLOCK_V // PARTS)) * N + safe_n
                if not HAS_TEACHER:
                    _keep_student(s_nv, base_ptr, delta_ptr, kept_nv, ref_ptrs, mask_nv, mask_n)
            if HAS_TOPK:
                s_nv, cursor_n = _take_topk(
                    s_nv,
                    tl.minimum(begin + BLOCK_V // PARTS, V),
                    offs_v,
                    ids_ptr + safe_n * K,
                    z_topk_ptr + safe_n * K,
                    cursor_n,
                    K,
                    V,
                    mask_n,
                )
            old_top_n = top_n
            old_sum_n = sum_n
            tile_best_n, top_n, sum_n, dot_n = _update_student(
                s_nv, offs_v, old_top_n, old_sum_n, dot_n
            )
            best_n = tl.where(top_n > old_top_n, tile_best_n, best_n)
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
                t_nv = tl.where(inside_v, t_nv, NEG)
                if KEEPS:
                    _keep_pair(
                        s_nv,
                        t_nv,
                        base_ptr + kept_nv,
                        delta_ptr + kept_nv,
                        ref_ptrs,
                        wide(num_parts) * N,
                        mask_nv,
                        mask_n,
                    )
                t_old_top_n = t_top_n
                t_old_sum_n = t_sum_n
                t_top_n, t_sum_n = _update_norm(t_nv, t_old_top_n, t_old_sum_n)
                if KEEPS:
                    pass  # _pair_kl_kernel finds out: here it would not fit the registers
                elif BY_STUDENT:
                    mean_n, phi_sum_n = update_pair(
                        s_nv, t_nv - s_nv, old_top_n, top_n, old_sum_n, mean_n, phi_sum_n
                    )
                else:
                    mean_n, phi_sum_n = update_pair(
                        t_nv, s_nv - t_nv, t_old_top_n, t_top_n, t_old_sum_n, mean_n, phi_sum_n
                    )

    plane = wide(num_splits) * N
    at = part_ptr + wide(pid_s) * N + safe_n
    tl.store(at, top_n, mask=mask_n)
    tl.store(at + plane, sum_n, mask=mask_n)
    tl.store(at + 2 * plane, dot_n, mask=mask_n)
    if HAS_TEACHER:
        tl.store(at + 3 * plane, t_top_n, mask=mask_n)
        tl.store(at + 4 * plane, t_sum_n, mask=mask_n)
        if not KEEPS:
            tl.store(at + 5 * plane, mean_n, mask=mask_n)
            tl.store(at + 6 * plane, phi_sum_n, mask=mask_n)
    tl.store(best_ptr + wide(pid_s) * N + safe_n, best_n, mask=mask_n)
    own_n = mask_n & (target_n >= v_begin) & (target_n < v_stop)
    tl.store(z_target_ptr + safe_n, z_target_n, mask=own_n)
