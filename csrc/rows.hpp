// One row of logits at a time: the loops over the vocabulary, chosen once for the machine. See rows_kernel.hpp.
#pragma once

#include <cstdint>

#include "policy_head.hpp"

namespace fdfast {

// A row's coefficients: dz = p (p + plogp * log p) + divergence * d(divergence)/dz, whose constant is `center`.
struct RowCoefs {
  double p, plogp, divergence, center;
};

// `norm`, `divergence` and `gradient` take z. `weighted` receives sum p (z - max), `argmax` the first place of the max;
// both may be null. `narrow` rounds a row
// to bfloat16 in place, into the first half of its bytes; null for double. `mass` is the sum of the |x| below `edge`,
// `count` their number; `pick` writes the others in order, with their places, and a vector of nothing more, and returns
// how many they are.
// `add_rows` adds values[i] * rows[index[i]], i < n, to sum (D); `add_rows_bf16` takes bfloat16 rows; null for double.
template <typename T>
struct RowLoops {
  void (*temper)(T* row, int64_t V, T softcap, T inv_temperature);
  RowNorm (*norm)(const T* z, int64_t V, double* weighted, int64_t* argmax);
  void (*divergence)(const T* s, const T* t, int64_t V, RowNorm n, RowNorm m, const HeadMath& math, double* value,
                     double* center);
  void (*gradient)(T* s, const T* t, int64_t V, const HeadMath& math, RowNorm n, RowNorm m, RowCoefs coefs);
  void (*narrow)(T* row, int64_t V);
  double (*mass)(const T* x, int64_t V, T edge);
  int64_t (*count)(const T* x, int64_t V, T edge);
  int64_t (*pick)(const T* x, int64_t V, T edge, T* values, int32_t* places);
  void (*add_rows)(const T* values, const int32_t* index, int64_t n, const T* rows, int64_t D, T* sum);
  void (*add_rows_bf16)(const T* values, const int32_t* index, int64_t n, const uint16_t* rows, int64_t D, T* sum);
};

namespace generic {
RowLoops<float> float_loops();
RowLoops<double> double_loops();
}  // namespace generic
#if defined(__x86_64__)
namespace avx2 {
RowLoops<float> float_loops();
RowLoops<double> double_loops();
}  // namespace avx2
namespace avx512 {
RowLoops<float> float_loops();
RowLoops<double> double_loops();
}  // namespace avx512
#endif

}  // namespace fdfast
