"""Device functions shared by the kernels: one tile of logits, and formulas that stay accurate near
zero.

The formulas are those of csrc/policy_head.hpp: every divergence is a sum of non-negative terms
built on phi(x) = e^x - 1 - x, so it keeps its relative accuracy when teacher and student are close.
Legend: n tokens and v vocabulary columns of a tile, d hidden; s, t tempered logits of student and
teacher; p, p_t their probabilities.
"""

import triton
import triton.language as tl

NEG = tl.constexpr(-1e30)  # stands for -inf, so that no inf - inf or 0 * inf can arise
LARGE = tl.constexpr(1e25)  # a sum of phi that grew to this is never read: see merge_pair
NEAR = tl.constexpr(0.5)  # |x| below which phi is its series


@triton.jit
def wide(x):
    """x as int64, whether it is a tensor, or a number that the JIT made a constant (1, say)."""
    return tl.full((), 0, tl.int64) + x


@triton.jit
def clamp(x, low, high):
    """x within [low, high], and NaN where x is: a plain tl.minimum gives the other number."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def phi_near(x):
    """e^x - 1 - x for |x| < 0.5 by its series, to one rounding."""
    y = 1.0 / 5040 + x * (1.0 / 40320)
    y = 1.0 / 720 + x * y
    y = 1.0 / 120 + x * y
    y = 1.0 / 24 + x * y
    y = 1.0 / 6 + x * y
    return x * x * (0.5 + x * y)


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation."""
    return tl.where(tl.abs(x) < NEAR, x + phi_near(x), tl.exp(x) - 1.0)


@triton.jit
def log_mixture(x, share, rest):
    """log(rest + share e^x) for share + rest = 1 and |x| <= 80: near zero 2 atanh(y / (2 + y)) by
    its series, y = share (e^x - 1); else the sum of two positive terms, so a small rest keeps its
    digits.
    """
    y = share * expm1(x)
    z = y / (2.0 + y)
    q = z * z
    near = 1.0 / 11 + q * (1.0 / 13)
    near = 1.0 / 9 + q * near
    near = 1.0 / 7 + q * near
    near = 1.0 / 5 + q * near
    near = 1.0 / 3 + q * near
    near = 2.0 * z * (1.0 + q * near)
    return tl.where(tl.abs(y) < NEAR, near, tl.log(rest + share * tl.exp(x)))


@triton.jit
def skew_slope(d, alpha, rest):
    """rest (e^d - 1) / (rest + alpha e^d) for alpha + rest = 1 and |d| <= 80: how skew_kl falls as
    a token of the student becomes more likely.
    """
    return rest * expm1(d) / (rest + alpha * tl.exp(d))


@triton.jit
def kl_term(p_a, p_b, x):
    """p_b - p_a - p_a x with x = log(p_b / p_a), that is p_a phi(x): one outcome's share of
    KL(a || b).
    """
    term = tl.where(tl.abs(x) < NEAR, p_a * phi_near(x), p_b - p_a - p_a * x)
    return tl.where(p_a == 0.0, p_b, term)


@triton.jit
def tempered(raw, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(raw / softcap) / temperature, never below NEG; NaN stays NaN."""
    if HAS_SOFTCAP:
        y = raw / softcap
        e = expm1(clamp(tl.abs(y), 0.0, 20.0) * 2.0)
        magnitude = softcap * (e / (e + 2.0))
        raw = tl.where(raw < 0.0, -magnitude, magnitude)
    return tl.maximum(raw * inv_temperature, NEG, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dz_draw(z, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """The derivative of `tempered` where it gave z."""
    slope = inv_temperature
    if HAS_SOFTCAP:
        u = z / (inv_temperature * softcap)
        slope = (1.0 - u * u) * inv_temperature
    return slope


@triton.jit
def logits_tile(
    x_row_ptrs,  # (BLOCK_N,) pointers to the hidden states of the tile's tokens
    w_ptr,  # (V, D)
    offs_v,  # (BLOCK_V,) columns, each inside the vocabulary
    D,
    stride_xd,
    stride_wv,
    stride_wd,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):
    """One float32 tile (BLOCK_N, BLOCK_V) of raw logits, accumulated over D in registers.

    Reads (BLOCK_N + BLOCK_V) * D elements; tensor cores for 16-bit DOT, ieee FMA for float32.
    """
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_row_ptrs[:, None] + offs_d[None, :] * stride_xd
    w_ptrs = w_ptr + (offs_v.to(tl.int64) * stride_wv)[:, None] + offs_d[None, :] * stride_wd
    logits_nv = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            x_nd = tl.load(x_ptrs)
            w_vd = tl.load(w_ptrs)
        else:
            mask_d = (offs_d < D - d)[None, :]
            x_nd = tl.load(x_ptrs, mask=mask_d, other=0.0)
            w_vd = tl.load(w_ptrs, mask=mask_d, other=0.0)
        logits_nv = tl.dot(x_nd.to(DOT), tl.trans(w_vd.to(DOT)), logits_nv, input_precision="ieee")
        x_ptrs += BLOCK_D * stride_xd
        w_ptrs += BLOCK_D * stride_wd
    return logits_nv


@triton.jit
def part_of(tile_nv, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """Columns INDEX * BLOCK_V / PARTS and on of a tile; PARTS is a power of two.

    What follows a GEMM works part by part, so that its temporaries do not need as many registers as
    the accumulators. The parts lie in registers already: nothing moves.
    """
    if PARTS == 1:
        part_nv = tile_nv
    else:
        n: tl.constexpr = tile_nv.shape[0]
        v: tl.constexpr = tile_nv.shape[1]
        low_nv, high_nv = tl.split(tl.permute(tl.reshape(tile_nv, (n, 2, v // 2)), (0, 2, 1)))
        if INDEX < PARTS // 2:
            part_nv = part_of(low_nv, INDEX, PARTS // 2)
        else:
            part_nv = part_of(high_nv, INDEX - PARTS // 2, PARTS // 2)
    return part_nv


@triton.jit
def tile_of(pid, num_n, num_v, GROUP_N: tl.constexpr):
    """(pid_n, pid_v) of a program: GROUP_N token blocks meet the whole vocabulary before the next
    group begins, so that their hidden states stay in L2 while the weight streams past once.
    """
    group = pid // (GROUP_N * num_v)
    first_n = group * GROUP_N
    size = tl.minimum(num_n - first_n, GROUP_N)
    within = pid - group * GROUP_N * num_v
    return first_n + within % size, within // size


@triton.jit
def rebase(phi_sum, weight, delta, log_scale):
    """A sum of e phi(u) about its mean, with sum e = weight, moved to u + delta and scaled by
    exp(log_scale): e^delta phi_sum + phi(delta) weight, for sum e u = 0.
    """
    scale = tl.exp(log_scale)
    near = scale * ((1.0 + delta + phi_near(delta)) * phi_sum + phi_near(delta) * weight)
    joint = tl.exp(tl.minimum(delta + log_scale, 25.0))
    far = joint * (phi_sum + weight) - scale * weight * (1.0 + delta)
    return tl.where(tl.abs(delta) < NEAR, near, far)


@triton.jit
def merge_pair(mean, phi_sum, weight, log_scale, other_mean, other_phi_sum, other_weight):
    """Two parts of (mean of u, sum e phi(u - mean)) as one; `log_scale` brings the first part's
    weights to the scale of the second's.

    Every term is non-negative, so nothing cancels. A part beyond LARGE is clipped: it belongs to a
    divergence so large that `_merge_kernel` takes the difference of log-sum-exps instead.
    """
    scaled = weight * tl.exp(log_scale)
    share = other_weight / tl.maximum(scaled + other_weight, 1e-30)
    merged_mean = mean + share * (other_mean - mean)
    merged = rebase(phi_sum, weight, mean - merged_mean, log_scale)
    merged += rebase(other_phi_sum, other_weight, other_mean - merged_mean, 0.0 * log_scale)
    return merged_mean, tl.minimum(tl.maximum(merged, 0.0), LARGE)


@triton.jit
def tempered_part(
    raw_nv,  # the tile
    b_ptr,  # (V,) or None
    safe_v,  # (BLOCK_V / PARTS,) the part's columns, each inside the vocabulary
    softcap,
    inv_temperature,
    INDEX: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Tempered logits of one part of a tile of raw ones, the bias added."""
    part_nv = part_of(raw_nv, INDEX, PARTS)
    if HAS_BIAS:
        part_nv += tl.load(b_ptr + safe_v).to(tl.float32)[None, :]
    return tempered(part_nv, softcap, inv_temperature, HAS_SOFTCAP)
