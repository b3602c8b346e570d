// Registers' worth of numbers for the loops that are compiled once for each instruction set: see rows_kernel.hpp.
#pragma once

#include <cstdint>

#define FDFAST_INLINE inline __attribute__((always_inline))

namespace fdfast::FDFAST_ROWS {
namespace {

// A register's worth of numbers: GCC and Clang split it where the machine's registers are narrower.
template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(64)));
  typedef int32_t Int __attribute__((vector_size(64)));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(64)));
  typedef int64_t Int __attribute__((vector_size(64)));
};
template <typename T>
using Vec = typename Simd<T>::Vec;
using VecF = Vec<float>;
using VecI = Simd<float>::Int;
using VecD = Vec<double>;
template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);
template <typename V>
struct LaneOf;
template <>
struct LaneOf<VecF> {
  using type = float;
};
template <>
struct LaneOf<VecD> {
  using type = double;
};
template <typename V>
using Lane = LaneOf<V>::type;

template <typename T>
constexpr T kInf = static_cast<T>(__builtin_inf());

template <typename V>
FDFAST_INLINE V abs_(V x) {
  return x < Lane<V>(0) ? -x : x;
}
template <typename T>
FDFAST_INLINE Vec<T> all(T x) {
  return x - Vec<T>{};
}
template <typename T>
FDFAST_INLINE double total(Vec<T> x) {
  double sum = 0.0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += x[i];
  return sum;
}

// e^x for x up to 88, 0 below -87: 2^n by the exponent bits, e^r by a polynomial. 1 ulp.
FDFAST_INLINE VecF exp_to_88(VecF x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const VecF shifted = x * 1.44269504f + magic;
  const VecF n = shifted - magic;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF y = r * 1.98412698e-4f + 1.38888889e-3f;
  y = y * r + 8.33333333e-3f;
  y = y * r + 4.16666667e-2f;
  y = y * r + 1.66666667e-1f;
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.0f;
  const VecI scale = ((VecI)shifted + 127) << 23;  // the magic number's own bits leave at the top
  return x < -87.0f ? VecF{} : y * (VecF)scale;    // also where n and r are nothing
}
// Of logits less their maximum, or of log-probabilities.
FDFAST_INLINE VecF exp_of_negative(VecF x) { return exp_to_88(x); }
FDFAST_INLINE VecF exp_(VecF x) { return exp_to_88(x > 88.0f ? all(88.0f) : x); }
// Clamped likewise: p and e^(t - s) never become a subnormal and an infinity whose product is NaN.
FDFAST_INLINE VecD exp_(VecD x) {
  VecD y;
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = x[i] < -708.0 ? 0.0 : __builtin_exp(x[i] < 708.0 ? x[i] : 708.0);
  return y;
}
FDFAST_INLINE VecD exp_of_negative(VecD x) { return exp_(x); }

// A whole vector of a row, or its last lanes: past the end stands -inf, whose probability is 0.
struct Whole {};
struct Part {
  int64_t lanes;
};
template <typename T>
FDFAST_INLINE Vec<T> load(const T* at, Whole) {
  Vec<T> x;
  __builtin_memcpy(&x, at, sizeof x);
  return x;
}
template <typename T>
FDFAST_INLINE Vec<T> load(const T* at, Part part) {
  Vec<T> x = all(-kInf<T>);
  __builtin_memcpy(&x, at, part.lanes * sizeof(T));
  return x;
}
template <typename T>
FDFAST_INLINE void store(T* at, Whole, Vec<T> x) {
  __builtin_memcpy(at, &x, sizeof x);
}
template <typename T>
FDFAST_INLINE void store(T* at, Part part, Vec<T> x) {
  __builtin_memcpy(at, &x, part.lanes * sizeof(T));
}
template <typename T, typename Body>
FDFAST_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
  int64_t v = begin;
  for (; v + kLanes<T> <= end; v += kLanes<T>) body(v, Whole{});
  if (v < end) body(v, Part{end - v});
}

}  // namespace
}  // namespace fdfast::FDFAST_ROWS
