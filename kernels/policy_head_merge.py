"""The small second kernels of policy_head's forward: partial statistics of the splits as one.

They walk the splits in their order in float64, so the result depends neither on the tokens beside
nor on timing.
Legend: N tokens, S splits of the vocabulary, K top-k; q, r the weighting and the other
distribution (teacher and student for KL(T||S)).
"""

import triton
import triton.language as tl

from fdfast.kernels.tile_math import NEG, merge_pair, wide

MERGED = 10  # rows of what `_merge_kernel` writes


@triton.jit
def _merge_norm(top_n, sum_n, dot_n, other_top_n, other_sum_n, other_dot_n):
    """(max, sum e^(z - max), sum e^(z - max) (z - max)) of two parts."""
    new_top_n = tl.maximum(top_n, other_top_n)
    a_n = tl.exp(top_n - new_top_n)
    b_n = tl.exp(other_top_n - new_top_n)
    dot_n = a_n * (dot_n + (top_n - new_top_n) * sum_n)
    dot_n += b_n * (other_dot_n + (other_top_n - new_top_n) * other_sum_n)
    return new_top_n, a_n * sum_n + b_n * other_sum_n, dot_n


@triton.jit
def _merge_kernel(
    part_ptr,  # (PARTIALS, S, N) float32
    best_ptr,  # (S, N) int32
    z_target_ptr,  # (N,) float32
    ids_ptr,  # (N, K) int32 sorted, or None
    z_topk_ptr,  # (N, K) float32, or None
    out_ptr,  # (MERGED, N) float64, written
    argmax_ptr,  # (N,) int64, written
    N,
    K,
    num_splits,
    HAS_TEACHER: tl.constexpr,
    HAS_TOPK: tl.constexpr,
    BY_STUDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_N tokens, their splits one after the other, in float64.

    Reads 4 (PARTIALS + 1) S bytes a token. Writes rows: 0, 1 max and log-sum of the student; 2
    log-probability of the target; 3 entropy; 4, 5 max and log-sum of the teacher; 6 the KL; 7 the
    difference of log-sum-exps, lse_T - lse_S; 8, 9 max and log-sum of the student without ids.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    at_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    plane = wide(num_splits) * N
    top_n = tl.full((BLOCK_N,), NEG, tl.float64)
    sum_n = tl.zeros((BLOCK_N,), tl.float64)
    dot_n = tl.zeros((BLOCK_N,), tl.float64)
    t_top_n = tl.full((BLOCK_N,), NEG, tl.float64)
    t_sum_n = tl.zeros((BLOCK_N,), tl.float64)
    mean_n = tl.zeros((BLOCK_N,), tl.float64)
    phi_sum_n = tl.zeros((BLOCK_N,), tl.float64)
    best_n = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(num_splits):
        at = part_ptr + at_n + wide(split) * N
        o_top_n = tl.load(at).to(tl.float64)
        o_sum_n = tl.load(at + plane).to(tl.float64)
        o_dot_n = tl.load(at + 2 * plane).to(tl.float64)
        if HAS_TEACHER:
            o_t_top_n = tl.load(at + 3 * plane).to(tl.float64)
            o_t_sum_n = tl.load(at + 4 * plane).to(tl.float64)
            o_mean_n = tl.load(at + 5 * plane).to(tl.float64)
            o_phi_sum_n = tl.load(at + 6 * plane).to(tl.float64)
            q_top_n, q_sum_n, oq_top_n, oq_sum_n = t_top_n, t_sum_n, o_t_top_n, o_t_sum_n
            if BY_STUDENT:
                q_top_n, q_sum_n, oq_top_n, oq_sum_n = top_n, sum_n, o_top_n, o_sum_n
            high_n = tl.maximum(q_top_n, oq_top_n)
            lift_n = tl.exp(oq_top_n - high_n)
            # Both parts at the scale of the larger max; the phi sums are scaled like the weights.
            mean_n, phi_sum_n = merge_pair(
                mean_n, phi_sum_n, q_sum_n, q_top_n - high_n, o_mean_n, o_phi_sum_n * lift_n,
                oq_sum_n * lift_n,
            )  # fmt: skip
            t_top_n, t_sum_n, _ = _merge_norm(
                t_top_n, t_sum_n, t_sum_n, o_t_top_n, o_t_sum_n, o_t_sum_n
            )
        o_best_n = tl.load(best_ptr + at_n + wide(split) * N)
        best_n = tl.where(o_top_n > top_n, o_best_n, best_n)
        top_n, sum_n, dot_n = _merge_norm(top_n, sum_n, dot_n, o_top_n, o_sum_n, o_dot_n)

    out = out_ptr + at_n
    row = wide(N)
    if HAS_TOPK:
        empty_n = top_n <= 0.5 * NEG  # the ids are all that can be reached
        tl.store(out + 8 * row, tl.where(empty_n, float("-inf"), top_n), mask=mask_n)
        tl.store(out + 9 * row, tl.where(empty_n, 0.0, tl.log(sum_n)), mask=mask_n)
        offs_k = tl.arange(0, BLOCK_K)
        inside_k = (offs_k < K)[None, :]
        z_nk = tl.load(
            z_topk_ptr + (at_n * K)[:, None] + offs_k[None, :], mask=inside_k, other=NEG
        ).to(tl.float64)
        ids_nk = tl.load(ids_ptr + (at_n * K)[:, None] + offs_k[None, :], mask=inside_k, other=0)
        o_top_n = tl.max(z_nk, 1)
        x_nk = z_nk - o_top_n[:, None]
        e_nk = tl.where(inside_k, tl.exp(x_nk), 0.0)
        o_best_n = tl.min(tl.where(x_nk == 0.0, ids_nk, 2147483647), 1)
        best_n = tl.where(
            o_top_n > top_n,
            o_best_n,
            tl.where(o_top_n == top_n, tl.minimum(best_n, o_best_n), best_n),
        )
        top_n, sum_n, dot_n = _merge_norm(
            top_n, sum_n, dot_n, o_top_n, tl.sum(e_nk, 1), tl.sum(e_nk * x_nk, 1)
        )
    log_sum_n = tl.log(sum_n)
    z_target_n = tl.load(z_target_ptr + at_n).to(tl.float64)
    logprob_n = tl.where(z_target_n <= 0.5 * NEG, float("-inf"), (z_target_n - top_n) - log_sum_n)
    tl.store(out, top_n, mask=mask_n)
    tl.store(out + row, log_sum_n, mask=mask_n)
    tl.store(out + 2 * row, logprob_n, mask=mask_n)
    tl.store(out + 3 * row, log_sum_n - dot_n / sum_n, mask=mask_n)
    tl.store(argmax_ptr + at_n, best_n.to(tl.int64), mask=mask_n)
    if HAS_TEACHER:
        t_log_sum_n = tl.log(t_sum_n)
        difference_n = (t_top_n - top_n) + (t_log_sum_n - log_sum_n)  # lse_T - lse_S
        weight_n = t_sum_n
        sign = -1.0
        if BY_STUDENT:
            weight_n = sum_n
            sign = 1.0
        far_n = sign * difference_n - mean_n
        y_n = phi_sum_n / weight_n
        u_n = 1.0 + y_n
        lost_n = tl.where(u_n == 1.0, 1.0, u_n - 1.0)
        near_n = tl.where(u_n == 1.0, y_n, tl.log(u_n) * (y_n / lost_n))  # log(1 + y)
        # The two agree up to rounding unless the sum of phi was clipped.
        use_near_n = tl.abs(near_n - far_n) <= 1e-5 + 1e-6 * tl.abs(mean_n)
        kl_n = tl.where(use_near_n, near_n, tl.where(far_n < 0.0, 0.0, far_n))
        kl_n = tl.where(kl_n > 1e20, float("inf"), kl_n)
        difference_n = tl.where(use_near_n, sign * (mean_n + near_n), difference_n)
        tl.store(out + 4 * row, t_top_n, mask=mask_n)
        tl.store(out + 5 * row, t_log_sum_n, mask=mask_n)
        tl.store(out + 6 * row, kl_n, mask=mask_n)
        tl.store(out + 7 * row, difference_n, mask=mask_n)


@triton.jit
def _sum_splits_kernel(
    part_ptr,  # (F, S, N) float32
    out_ptr,  # (F, N) float64, written
    N,
    num_splits,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N tokens of one of the F sums, its splits one after the other."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    row = wide(tl.program_id(1))
    sum_n = tl.zeros((BLOCK_N,), tl.float64)
    for split in range(num_splits):
        at = part_ptr + (row * num_splits + split) * N + offs_n
        sum_n += tl.load(at, mask=mask_n, other=0.0).to(tl.float64)
    tl.store(out_ptr + row * N + offs_n, sum_n, mask=mask_n)
