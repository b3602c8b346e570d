"""What the token-chunk way keeps of the logits between the sweep and the gradient, and the kernels
that read it.

A part is the columns of a tile that the sweep works on at once, with one maximum of each model. Of
x = s - (the student's maximum) and y = t - (the teacher's) are kept base = max(x, y) and
delta = y - x, taken in the float32 accumulators. 16-bit inputs keep float16, so 4 bytes a token of
the vocabulary: delta, by which close models differ, has its own 11 bits, and of two probabilities
that are far apart the larger is the more exact one; beyond 65504 a difference is infinite. Without
a teacher these 4 bytes hold x alone, in base and in delta what base leaves of it: 22 bits. float32
keeps float32 (then x alone takes no delta). dlogits are written over base, in the inputs' dtype,
which is of the same size.
Legend: N tokens of a chunk, V vocabulary, P parts, S splits, of whole parts; s, t tempered
logits of student and teacher; p, p_t their probabilities; q, u as in policy_head_sweep.
"""

import triton
import triton.language as tl

from fdfast.kernels.policy_head_grad import dz_of
from fdfast.kernels.policy_head_settle import settled_terms
from fdfast.kernels.policy_head_sweep import update_pair
from fdfast.kernels.tile_math import NEG, clamp, wide


@triton.jit
def _load_kept(ptrs, mask_nv):
    """What was stored, float32, NEG again where float16 made it -inf."""
    return clamp(tl.load(ptrs, mask=mask_nv, other=0.0).to(tl.float32), NEG, -NEG)


@triton.jit
def _log_prob(x_nv, ref_n, at, N, FIRST: tl.constexpr):
    """(x + ref - max) - log_sum, with the norm in rows FIRST and FIRST + 1."""
    top_n = tl.load(at + FIRST * wide(N))
    log_sum_n = tl.load(at + (FIRST + 1) * wide(N))
    return (x_nv + (ref_n - top_n)[:, None]) - log_sum_n[:, None]


@triton.jit
def _log_ratio(delta_nv, ref_n, t_ref_n, at, N):
    """d = log p_t - log p = delta + (the difference of the maxima) - (lse_T - lse_S)."""
    high_n = tl.load(at + 4 * wide(N))
    low_n = tl.load(at + 5 * wide(N))
    return delta_nv + (((t_ref_n - ref_n) - high_n) - low_n)[:, None]


@triton.jit
def _pair_kl_kernel(
    base_ptr,  # (N, V) float16 or float32
    delta_ptr,  # likewise
    ref_ptr,  # (2, P, N) float32
    part_ptr,  # (PARTIALS, S, N) float32: the sweep's; mean and phi sum are written
    N,
    V,
    num_parts,
    num_splits,
    stride_bn,
    BY_STUDENT: tl.constexpr,  # the student is q: reverse_kl
    PARTS_OF_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_V: tl.constexpr,
):
    """One program: BLOCK_N tokens against a split, whose maxima the sweep has found.

    Reads 4 bytes a column (8 in float32) and 8 a part, writes 8 BLOCK_N bytes in all.
    """
    pid_s = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    plane = wide(num_splits) * N
    at_part = part_ptr + wide(pid_s) * N + safe_n
    top_n = tl.load(at_part + (0 if BY_STUDENT else 3) * plane)
    sum_n = tl.zeros((BLOCK_N,), tl.float32)
    mean_n = tl.zeros((BLOCK_N,), tl.float32)
    phi_sum_n = tl.zeros((BLOCK_N,), tl.float32)
    first = pid_s * PARTS_OF_SPLIT
    for part in range(first, tl.minimum(first + PARTS_OF_SPLIT, num_parts)):
        offs_v = part * PART_V + tl.arange(0, PART_V)
        inside_v = (offs_v < V)[None, :]
        mask_nv = mask_n[:, None] & inside_v
        kept_nv = (safe_n * stride_bn)[:, None] + offs_v[None, :]
        ref_ptrs = ref_ptr + wide(part) * N + safe_n
        ref_n = tl.load(ref_ptrs)
        t_ref_n = tl.load(ref_ptrs + wide(num_parts) * N)
        base_nv = _load_kept(base_ptr + kept_nv, mask_nv)
        delta_nv = _load_kept(delta_ptr + kept_nv, mask_nv)
        u_nv = -delta_nv - (t_ref_n - ref_n)[:, None]
        q_nv = base_nv + tl.minimum(delta_nv, 0.0) + t_ref_n[:, None]
        if BY_STUDENT:
            u_nv = -u_nv
            q_nv = base_nv - tl.maximum(delta_nv, 0.0) + ref_n[:, None]
        q_nv = tl.where(inside_v, q_nv, NEG)
        mean_n, phi_sum_n = update_pair(q_nv, u_nv, top_n, top_n, sum_n, mean_n, phi_sum_n)
        sum_n += tl.sum(tl.exp(q_nv - top_n[:, None]), 1)
    tl.store(at_part + 5 * plane, mean_n, mask=mask_n)
    tl.store(at_part + 6 * plane, phi_sum_n, mask=mask_n)


@triton.jit
def _pair_settle_kernel(
    base_ptr,  # (N, V) float16 or float32
    delta_ptr,  # likewise
    ref_ptr,  # (2, P, N) float32
    row_ptr,  # (ROWS, N) float32, see policy_head_settle
    part_ptr,  # (2, S, N) float32, written: the divergence and its center
    N,
    V,
    num_parts,
    num_splits,
    stride_bn,
    alpha,
    rest,  # 1 - alpha, which float32 would round
    IS_JSD: tl.constexpr,  # else skew_kl
    PARTS_OF_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_V: tl.constexpr,
):
    """One program: BLOCK_N tokens against a split.

    Reads 4 bytes a column (8 in float32) and 8 a part, writes 8 BLOCK_N bytes in all.
    """
    pid_s = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    at = row_ptr + safe_n
    value_n = tl.zeros((BLOCK_N,), tl.float32)
    center_n = tl.zeros((BLOCK_N,), tl.float32)
    first = pid_s * PARTS_OF_SPLIT
    for part in range(first, tl.minimum(first + PARTS_OF_SPLIT, num_parts)):
        offs_v = part * PART_V + tl.arange(0, PART_V)
        inside_v = (offs_v < V)[None, :]
        mask_nv = mask_n[:, None] & inside_v
        kept_nv = (safe_n * stride_bn)[:, None] + offs_v[None, :]
        ref_ptrs = ref_ptr + wide(part) * N + safe_n
        ref_n = tl.load(ref_ptrs)
        t_ref_n = tl.load(ref_ptrs + wide(num_parts) * N)
        base_nv = _load_kept(base_ptr + kept_nv, mask_nv)
        delta_nv = _load_kept(delta_ptr + kept_nv, mask_nv)
        log_p_nv = _log_prob(base_nv - tl.maximum(delta_nv, 0.0), ref_n, at, N, 0)
        log_p_t_nv = _log_prob(base_nv + tl.minimum(delta_nv, 0.0), t_ref_n, at, N, 2)
        d_nv = _log_ratio(delta_nv, ref_n, t_ref_n, at, N)
        p_nv = tl.where(inside_v, tl.exp(log_p_nv), 0.0)
        p_t_nv = tl.where(inside_v, tl.exp(log_p_t_nv), 0.0)
        value_nv, center_nv = settled_terms(p_nv, p_t_nv, d_nv, alpha, rest, IS_JSD)
        value_n += tl.sum(value_nv, 1)
        center_n += tl.sum(center_nv, 1)
    at_part = part_ptr + wide(pid_s) * N + safe_n
    tl.store(at_part, value_n, mask=mask_n)
    tl.store(at_part + wide(num_splits) * N, center_n, mask=mask_n)


@triton.jit
def _pair_dlogits_kernel(
    base_ptr,  # (N, V) float16 or float32
    delta_ptr,  # likewise; None for a float32 x alone
    ref_ptr,  # (2, P, N) float32
    out_ptr,  # (N, V) of the inputs' dtype, written: dlogits; may lie over base
    targets_ptr,  # (N,) int64
    row_ptr,  # (ROWS, N) float32, see policy_head_settle
    N,
    V,
    num_parts,
    stride_bn,
    softcap,
    inv_temperature,
    alpha,
    rest,  # 1 - alpha, which float32 would round
    HAS_TEACHER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
    PARTS_OF_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_V: tl.constexpr,
):
    """One program: BLOCK_N tokens against a split, turned into dlogits: see dz_of.

    Reads 4 bytes a column (in float32 8, or 4 without a teacher), writes 2 (4). Each element is
    read and written by one program, so dlogits may take the place of base.
    """
    pid_s = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    at = row_ptr + safe_n
    target_n = tl.load(targets_ptr + safe_n).to(tl.int32)
    first = pid_s * PARTS_OF_SPLIT
    for part in range(first, tl.minimum(first + PARTS_OF_SPLIT, num_parts)):
        offs_v = part * PART_V + tl.arange(0, PART_V)
        mask_nv = mask_n[:, None] & (offs_v < V)[None, :]
        kept_nv = (safe_n * stride_bn)[:, None] + offs_v[None, :]
        ref_ptrs = ref_ptr + wide(part) * N + safe_n
        ref_n = tl.load(ref_ptrs)
        x_nv = _load_kept(base_ptr + kept_nv, mask_nv)
        if HAS_TEACHER:
            t_ref_n = tl.load(ref_ptrs + wide(num_parts) * N)
            delta_nv = _load_kept(delta_ptr + kept_nv, mask_nv)
            y_nv = x_nv + tl.minimum(delta_nv, 0.0)
            x_nv = x_nv - tl.maximum(delta_nv, 0.0)
            p_t_nv = tl.exp(_log_prob(y_nv, t_ref_n, at, N, 2))
            d_nv = _log_ratio(delta_nv, ref_n, t_ref_n, at, N)
        else:
            if base_ptr.dtype.element_ty == tl.float16:
                x_nv += _load_kept(delta_ptr + kept_nv, mask_nv)
            p_t_nv = x_nv
            d_nv = x_nv
        dz_nv = dz_of(
            x_nv + ref_n[:, None],
            _log_prob(x_nv, ref_n, at, N, 0),
            p_t_nv,
            d_nv,
            offs_v[None, :] == target_n[:, None],
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
        tl.store(out_ptr + kept_nv, dz_nv.to(out_ptr.dtype.element_ty), mask=mask_nv)
