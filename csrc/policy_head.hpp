// The elementwise part of policy_head on the CPU: rows of logits in, statistics or dlogits out.
//
// Source of the formulas: fdfast/divergences.py. Every sum over the vocabulary is of non-negative terms built on
// phi(x) = e^x - 1 - x, so a divergence near zero keeps its relative accuracy: KL(T||S) = sum p_T phi(s - t), because
// sum p_T = sum p_S = 1. Identical rows give exactly 0.
//
// Legend: R rows, V vocabulary (or a block of it), K sparse entries a row. z = softcap(raw) / temperature are the
// tempered logits; s, t = log-probabilities of student and teacher; d = t - s.
#pragma once

#include <cstdint>

namespace fdfast {

enum class Divergence : int { forward_kl = 0, reverse_kl = 1, jsd = 2, skew_kl = 3 };

struct HeadMath {
  Divergence divergence;
  double alpha;
  double inv_temperature;
  double teacher_inv_temperature;
  double softcap;  // 0: none
};

// What the backward pass needs of a row. lse = max + log_sum is kept in two parts: at logits of 1e4 their float32 sum
// would be off by 5e-4.
struct RowNorm {
  double max;
  double log_sum;
};

// Statistics of R rows of V logits. `student` and `teacher` (may be null) hold raw logits and are replaced by z.
// `center` is the row's constant in the gradient of the divergence.
template <typename T>
void head_stats(T* student, T* teacher, int64_t R, int64_t V, const int64_t* targets, const HeadMath& math, int threads,
                RowNorm* norm, RowNorm* teacher_norm, double* logprob, double* entropy, double* divergence,
                double* center, int64_t* argmax);

// The divergence's part of `head_stats` on z, under given norms: where the vocabulary is cut, those of all of it. Then
// `divergence` and `center` are this part's terms of two sums.
template <typename T>
void head_divergence(const T* student, const T* teacher, int64_t R, int64_t V, const HeadMath& math, int threads,
                     const RowNorm* norm, const RowNorm* teacher_norm, double* divergence, double* center);

// log-sum-exp of R rows of V tempered logits; a row of nothing but -inf gives {-inf, 0}.
template <typename T>
void row_norms(const T* z, int64_t R, int64_t V, int threads, RowNorm* norm);

// `student` holds the logits of the block that begins at column `first`, raw or, if `tempered`, z already; it is
// replaced by the gradient by the raw ones:
//   dz = p (coef_p + coef_plogp * s) + coef_divergence * d(divergence)/dz, times dz/draw,
// where entries topk_ids (R, K) are set to topk_dz instead, and coef_target is added at the target. `teacher` may be
// null. Indices are of the vocabulary; those outside the block are passed over. If `narrow` (float only), the row is
// rounded to bfloat16 at last, into the first half of its bytes.
template <typename T>
void head_grads(T* student, T* teacher, int64_t R, int64_t V, int64_t first, bool tempered, bool narrow,
                const HeadMath& math, int threads, const RowNorm* norm, const RowNorm* teacher_norm,
                const double* center, const double* coef_p, const double* coef_plogp, const double* coef_divergence,
                const int64_t* targets, const double* coef_target, const int64_t* topk_ids, const double* topk_dz,
                int64_t K);

// Rounds rows to bfloat16 in place, each into the first half of its bytes; nothing for double.
template <typename T>
void narrow_rows(T* x, int64_t R, int64_t V, int threads);

// For each row the largest `threshold` such that all entries below it sum to at most `share` of the row's sum |x|,
// to within a bin of 1/8 octave; `total` is that sum, `needed` counts the others. A NaN is never below.
template <typename T>
void row_thresholds(const T* x, int64_t R, int64_t V, double share, int threads, double* threshold, double* total,
                    int64_t* needed);

// Contiguous rows of T or, for float, of bfloat16.
struct Rows {
  const void* at;
  bool bf16;
};

// The products of dlogits (R, V) with the |dlogits| below each row's threshold left out: dhidden (R, D) += dlogits
// weight (V, D), and dweight (V, D) += dlogits^T hidden (R, D); each of the two may be null. kept (R) += the |dlogits|
// that are not left out. A sum runs in one order, whatever the threads.
template <typename T>
void sparse_grads(const T* dlogits, int64_t R, int64_t V, const double* threshold, Rows weight, Rows hidden, int64_t D,
                  int threads, T* dhidden, T* dweight, double* kept);

}  // namespace fdfast
