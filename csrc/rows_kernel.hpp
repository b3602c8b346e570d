// The row loops of policy_head, compiled once for each instruction set: rows_avx512.cpp, rows_avx2.cpp and
// rows_generic.cpp define FDFAST_ROWS and include this. Nothing of the standard library but its types: an inline
// function of it, compiled here for AVX-512, could be the copy that the linker keeps for all machines.
//
// Legend: V vocabulary (or a block of it); z = softcap(raw) / temperature the tempered logits; s, t log-probabilities of
// student and teacher, p and p_t their exponentials, d = t - s.
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "rows.hpp"
#include "simd.hpp"

namespace fdfast::FDFAST_ROWS {
namespace {

// log x for x > 0 normal: x = m 2^e with m in [1/sqrt2, sqrt2), log m by a polynomial in m - 1.
FDFAST_INLINE VecF log_(VecF x) {
  const VecI e = ((VecI)x - 0x3f3504f3) >> 23;
  const VecF f = (VecF)((VecI)x - (e << 23)) - 1.0f;
  VecF y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  const VecF log_m = f - 0.5f * f * f + f * f * f * y;
  return x == kInf<float> ? x : log_m + __builtin_convertvector(e, VecF) * 0.69314718f;
}
FDFAST_INLINE VecD log_(VecD x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// phi(x) = e^x - 1 - x: by its series where the plain form would cancel.
constexpr double kNear = 0.5;
template <typename V>
FDFAST_INLINE V phi_near(V x) {
  using T = Lane<V>;
  constexpr int kLast = sizeof(T) == 4 ? 8 : 16;  // 0.5^k / k! below one rounding of phi(0.5)
  double factorial = 20922789888000.0;             // 16!; all of this is known to the compiler
  for (int k = 16; k > kLast; --k) factorial /= k;
  V y = V{} + T(1.0 / factorial);
#pragma GCC unroll 16
  for (int k = kLast; k > 2; --k) {
    factorial /= k;
    y = y * x + T(1.0 / factorial);
  }
  return x * x * y;
}
template <typename V>
FDFAST_INLINE V expm1_(V x) {
  using T = Lane<V>;
  return abs_(x) < T(kNear) ? x + phi_near(x) : exp_(x) - T(1);
}
// log(1 + y) for y > -1: the rounding of 1 + y is divided out again.
FDFAST_INLINE VecF log1p_(VecF y) {
  const VecF u = 1.0f + y;
  const VecF lost = u - 1.0f;
  const VecF log_u = log_(u);
  return lost == 0.0f ? y : (u > 1e30f ? log_u : log_u * (y / lost));
}
FDFAST_INLINE VecD log1p_(VecD y) {
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = __builtin_log1p(y[i]);
  return y;
}

// p_b - p_a - p_a x where x = log(p_b / p_a), that is p_a phi(x): one outcome's share of KL(a || b).
template <typename V>
FDFAST_INLINE V kl_term(V p_a, V p_b, V x) {
  using T = Lane<V>;
  const V far = p_b - p_a - p_a * x;
  const V near = p_a * phi_near(x);
  return p_a == T(0) ? p_b : (abs_(x) < T(kNear) ? near : far);
}

// log(rest + weight e^x) with rest + weight = 1: the log of a mixture over one of its parts. Where the mixture is far
// below that part, log1p of a number near -1 would have lost it.
template <typename V>
FDFAST_INLINE V log_mix(Lane<V> rest, Lane<V> weight, V x) {
  const V e = expm1_(x) * weight;
  const V far = log_(rest + weight * exp_(x));
  return e < Lane<V>(-0.5) ? far : log1p_(e);
}

template <typename V>
FDFAST_INLINE V tanh_(V y) {
  using T = Lane<V>;
  const V e = expm1_((y > T(20) ? y * T(0) + T(20) : y) * T(2));
  return e / (e + T(2));
}

// Outcome by outcome: f(t, s) as a non-negative term, and the term whose sum is the row's center.
template <Divergence kind, typename V, typename T = Lane<V>>
FDFAST_INLINE void divergence_terms(V p, V p_t, V d, T alpha, T rest, V& value, V& center) {
  if constexpr (kind == Divergence::forward_kl) {
    value = kl_term(p_t, p, -d);
    center = V{};
  } else if constexpr (kind == Divergence::reverse_kl) {
    value = kl_term(p, p_t, d);
    center = value;
  } else {
    const V p_m = alpha * p_t + rest * p;
    const V teacher_part = kl_term(p_t, p_m, log_mix(alpha, rest, -d));
    if constexpr (kind == Divergence::jsd) {
      const V student_part = kl_term(p, p_m, log_mix(rest, alpha, d));
      value = alpha * teacher_part + rest * student_part;
      center = student_part;
    } else {
      const V x = expm1_(d);
      value = teacher_part;
      center = p == T(0) ? V{} : p * (rest * x / (T(1) + alpha * x));
    }
  }
}

// d(divergence)/dz of one outcome.
template <Divergence kind, typename V, typename T = Lane<V>>
FDFAST_INLINE V divergence_grad(V p, V p_t, V d, T alpha, T rest, T center) {
  if constexpr (kind == Divergence::forward_kl) {
    return abs_(d) < T(kNear) ? -p * (d + phi_near(d)) : p - p_t;
  } else if constexpr (kind == Divergence::reverse_kl) {
    return p == T(0) ? V{} : p * (-d - center);
  } else if constexpr (kind == Divergence::jsd) {
    return p == T(0) ? V{} : rest * p * (-log_mix(rest, alpha, d) - center);
  } else {
    const V x = expm1_(d);
    const V q = rest * x / (T(1) + alpha * x);
    return p == T(0) ? V{} : -rest * p * (q - center);
  }
}

constexpr int64_t kStrip = 4096;  // float sums run over a strip, strips are summed in double
FDFAST_INLINE int64_t strip_end(int64_t begin, int64_t V) { return V < begin + kStrip ? V : begin + kStrip; }

template <typename T>
void temper_row(T* row, int64_t V, T softcap, T inv_temperature) {
  if (softcap == T(0) && inv_temperature == T(1)) return;
  for_vectors<T>(0, V, [&](int64_t v, auto extent) __attribute__((always_inline)) {
    Vec<T> x = load(row + v, extent);
    if (softcap > T(0)) x = softcap * tanh_(x / softcap);
    store(row + v, extent, x * inv_temperature);
  });
}

// log-sum-exp of a row; *weighted receives sum p (z - max), for the entropy, and *argmax the first place of the max, or
// the last place of all where there is none.
template <typename T>
RowNorm norm_row(const T* z, int64_t V, double* weighted, int64_t* argmax) {
  T top = -kInf<T>;
  int64_t top_strip = 0;
  for (int64_t begin = 0; begin < V; begin += kStrip) {
    Vec<T> tops = all(-kInf<T>);
    for_vectors<T>(begin, strip_end(begin, V), [&](int64_t v, auto extent) __attribute__((always_inline)) {
      const Vec<T> x = load(z + v, extent);
      tops = x > tops ? x : tops;
    });
    const T before = top;
    for (int64_t i = 0; i < kLanes<T>; ++i) top = tops[i] > top ? tops[i] : top;
    if (top > before) top_strip = begin;
  }
  if (argmax != nullptr) {
    int64_t v = top_strip;
    while (v < V - 1 && z[v] != top) ++v;
    *argmax = v;
  }
  if (top == -kInf<T>) return {-kInf<double>, 0.0};
  double sum = 0.0, dot = 0.0;
  for (int64_t begin = 0; begin < V; begin += kStrip) {
    Vec<T> sums{}, dots{};
    for_vectors<T>(begin, strip_end(begin, V), [&](int64_t v, auto extent) __attribute__((always_inline)) {
      const Vec<T> x = load(z + v, extent) - top;
      const Vec<T> e = exp_of_negative(x);
      sums += e;
      dots += e == T(0) ? Vec<T>{} : e * x;
    });
    sum += total<T>(sums);
    dot += total<T>(dots);
  }
  if (weighted != nullptr) *weighted = dot / sum;
  return {static_cast<double>(top), __builtin_log(sum)};
}

template <Divergence kind, typename T>
FDFAST_INLINE void divergence_row(const T* s, const T* t, int64_t V, RowNorm n, RowNorm m, double alpha, double* value,
                                  double* center) {
  const T top = n.max, log_sum = n.log_sum, t_top = m.max, t_log_sum = m.log_sum, shift = m.log_sum - n.log_sum;
  double sum = 0.0, center_sum = 0.0;
  for (int64_t begin = 0; begin < V; begin += kStrip) {
    Vec<T> terms{}, centers{};
    for_vectors<T>(begin, strip_end(begin, V), [&](int64_t v, auto extent) __attribute__((always_inline)) {
      const Vec<T> a = load(s + v, extent) - top, b = load(t + v, extent) - t_top;
      Vec<T> term, center_term;
      const Vec<T> p = exp_of_negative(a - log_sum), p_t = exp_of_negative(b - t_log_sum);
      divergence_terms<kind>(p, p_t, (b - a) - shift, T(alpha), T(1.0 - alpha), term, center_term);
      terms += term;
      centers += center_term;
    });
    sum += total<T>(terms);
    center_sum += total<T>(centers);
  }
  *value = sum;
  *center = center_sum;
}

template <bool capped, typename T>
FDFAST_INLINE Vec<T> slope(Vec<T> z, T softcap, T inv_temperature) {
  if constexpr (!capped) return all(inv_temperature);
  const Vec<T> u = z / (inv_temperature * softcap);
  return (T(1) - u * u) * inv_temperature;
}

template <Divergence kind, bool capped, typename T>
FDFAST_INLINE void grad_row(T* s, const T* t, int64_t V, const HeadMath& math, RowNorm n, RowNorm m, RowCoefs c) {
  const T top = n.max, log_sum = n.log_sum, t_top = m.max, t_log_sum = m.log_sum, shift = m.log_sum - n.log_sum;
  for_vectors<T>(0, V, [&](int64_t v, auto extent) __attribute__((always_inline)) {
    const Vec<T> z = load(s + v, extent), a = z - top, log_p = a - log_sum, p = exp_of_negative(log_p);
    const Vec<T> b = load(t + v, extent) - t_top, p_t = exp_of_negative(b - t_log_sum);
    const Vec<T> direct = p == T(0) ? Vec<T>{} : p * (T(c.p) + T(c.plogp) * log_p);
    const Vec<T> toward =
        divergence_grad<kind>(p, p_t, (b - a) - shift, T(math.alpha), T(1.0 - math.alpha), T(c.center));
    const Vec<T> dz = direct + T(c.divergence) * toward;
    store(s + v, extent, dz * slope<capped>(z, T(math.softcap), T(math.inv_temperature)));
  });
}
template <bool capped, typename T>
FDFAST_INLINE void grad_row_alone(T* s, int64_t V, const HeadMath& math, RowNorm n, RowCoefs c) {
  const T top = n.max, log_sum = n.log_sum;
  for_vectors<T>(0, V, [&](int64_t v, auto extent) __attribute__((always_inline)) {
    const Vec<T> z = load(s + v, extent), log_p = (z - top) - log_sum, p = exp_of_negative(log_p);
    const Vec<T> dz = p == T(0) ? Vec<T>{} : p * (T(c.p) + T(c.plogp) * log_p);
    store(s + v, extent, dz * slope<capped>(z, T(math.softcap), T(math.inv_temperature)));
  });
}
template <bool capped, typename T>
FDFAST_INLINE void grad_dispatch(T* s, const T* t, int64_t V, const HeadMath& math, RowNorm n, RowNorm m, RowCoefs c) {
  if (t == nullptr) return grad_row_alone<capped>(s, V, math, n, c);
  switch (math.divergence) {
    case Divergence::forward_kl:
      return grad_row<Divergence::forward_kl, capped>(s, t, V, math, n, m, c);
    case Divergence::reverse_kl:
      return grad_row<Divergence::reverse_kl, capped>(s, t, V, math, n, m, c);
    case Divergence::jsd:
      return grad_row<Divergence::jsd, capped>(s, t, V, math, n, m, c);
    case Divergence::skew_kl:
      return grad_row<Divergence::skew_kl, capped>(s, t, V, math, n, m, c);
  }
}

template <typename T>
void divergence_of_row(const T* s, const T* t, int64_t V, RowNorm n, RowNorm m, const HeadMath& math, double* value,
                       double* center) {
  switch (math.divergence) {
    case Divergence::forward_kl:
      return divergence_row<Divergence::forward_kl>(s, t, V, n, m, math.alpha, value, center);
    case Divergence::reverse_kl:
      return divergence_row<Divergence::reverse_kl>(s, t, V, n, m, math.alpha, value, center);
    case Divergence::jsd:
      return divergence_row<Divergence::jsd>(s, t, V, n, m, math.alpha, value, center);
    case Divergence::skew_kl:
      return divergence_row<Divergence::skew_kl>(s, t, V, n, m, math.alpha, value, center);
  }
}
template <typename T>
void gradient_of_row(T* s, const T* t, int64_t V, const HeadMath& math, RowNorm n, RowNorm m, RowCoefs c) {
  if (math.softcap > 0.0) return grad_dispatch<true>(s, t, V, math, n, m, c);
  return grad_dispatch<false>(s, t, V, math, n, m, c);
}

// To nearest, ties to even; a NaN stays one.
void narrow_row(float* row, int64_t V) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  auto* const to = reinterpret_cast<char*>(row);  // never ahead of what is still to be read
  for_vectors<float>(0, V, [&](int64_t v, auto extent) __attribute__((always_inline)) {
    const VecF x = load(row + v, extent);
    const Bits bits = (Bits)x;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Half half = __builtin_convertvector(x == x ? rounded : (bits >> 16 | 0x40), Half);
    int64_t lanes = kLanes<float>;
    if constexpr (requires { extent.lanes; }) lanes = extent.lanes;
    __builtin_memcpy(to + v * sizeof(uint16_t), &half, lanes * sizeof(uint16_t));
  });
}

// The sum of the |x| below `edge`.
template <typename T>
double mass_below(const T* x, int64_t V, T edge) {
  double mass = 0.0;
  for (int64_t begin = 0; begin < V; begin += kStrip) {
    Vec<T> sums[4] = {};  // their additions don't wait for each other
    int64_t next = 0;
    for_vectors<T>(begin, strip_end(begin, V), [&](int64_t v, auto extent) __attribute__((always_inline)) {
      const Vec<T> size = abs_(load(x + v, extent));  // past the end is infinity, below nothing
      sums[next++ % 4] += size < edge ? size : Vec<T>{};
    });
    mass += total<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return mass;
}

// How many |x| are below `edge`.
template <typename T>
int64_t count_below(const T* x, int64_t V, T edge) {
  typename Simd<T>::Int counts{};
  for_vectors<T>(0, V, [&](int64_t v, auto extent) __attribute__((always_inline)) {
    counts -= abs_(load(x + v, extent)) < edge;  // true is -1
  });
  int64_t count = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) count += counts[i];
  return count;
}

FDFAST_INLINE VecF load_row(const uint16_t* at, Whole) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  Half half;
  __builtin_memcpy(&half, at, sizeof half);
  return (VecF)(__builtin_convertvector(half, Bits) << 16);
}
FDFAST_INLINE VecF load_row(const uint16_t* at, Part part) {
  uint16_t whole[kLanes<float>] = {};
  __builtin_memcpy(whole, at, part.lanes * sizeof(uint16_t));
  return load_row(whole, Whole{});
}
template <typename T>
FDFAST_INLINE Vec<T> load_row(const T* at, Whole whole) {
  return load(at, whole);
}
template <typename T>
FDFAST_INLINE Vec<T> load_row(const T* at, Part part) {
  return load(at, part);
}

// The x whose size is not below its edge, a NaN's never is, in order: values and places; how many. Both outputs have
// room for V and a vector more.
template <typename T>
int64_t pick(const T* x, int64_t V, T edge, T* values, int32_t* places) {
  int64_t n = 0, v = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; v + kLanes<T> <= V; v += kLanes<T>) {
      const __m512 lanes = (__m512)load(x + v, Whole{});
      const __mmask16 picked = _mm512_cmp_ps_mask(_mm512_abs_ps(lanes), _mm512_set1_ps(edge), _CMP_NLT_UQ);
      _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(picked, lanes));
      const __m512i place = _mm512_add_epi32(step, _mm512_set1_epi32(static_cast<int>(v)));
      _mm512_storeu_si512(places + n, _mm512_maskz_compress_epi32(picked, place));
      n += __builtin_popcount(picked);
    }
  }
#endif
  for (; v < V; ++v) {
    values[n] = x[v];
    places[n] = static_cast<int32_t>(v);
    n += !((x[v] < T(0) ? -x[v] : x[v]) < edge);
  }
  return n;
}
constexpr int64_t kStrands = 6;  // sums that stay in registers, of AVX2 too, while the rows go by

template <typename T, typename Row>
void add_rows(const T* values, const int32_t* index, int64_t n, const Row* rows, int64_t D, T* sum) {
  int64_t d = 0;
  for (; d + kStrands * kLanes<T> <= D; d += kStrands * kLanes<T>) {
    Vec<T> sums[kStrands];
#pragma GCC unroll 6
    for (int64_t j = 0; j < kStrands; ++j) sums[j] = load(sum + d + j * kLanes<T>, Whole{});
    for (int64_t i = 0; i < n; ++i) {
      const Row* row = rows + index[i] * D + d;
#pragma GCC unroll 6
      for (int64_t j = 0; j < kStrands; ++j) sums[j] += values[i] * load_row(row + j * kLanes<T>, Whole{});
    }
#pragma GCC unroll 6
    for (int64_t j = 0; j < kStrands; ++j) store(sum + d + j * kLanes<T>, Whole{}, sums[j]);
  }
  for_vectors<T>(d, D, [&](int64_t at, auto extent) __attribute__((always_inline)) {
    Vec<T> strand = load(sum + at, extent);
    for (int64_t i = 0; i < n; ++i) strand += values[i] * load_row(rows + index[i] * D + at, extent);
    store(sum + at, extent, strand);
  });
}

}  // namespace

RowLoops<float> float_loops() {
  return {temper_row<float>, norm_row<float>, divergence_of_row<float>, gradient_of_row<float>,
          narrow_row, mass_below<float>, count_below<float>, pick<float>,
          add_rows<float, float>, add_rows<float, uint16_t>};
}
RowLoops<double> double_loops() {
  return {temper_row<double>, norm_row<double>, divergence_of_row<double>, gradient_of_row<double>,
          nullptr, mass_below<double>, count_below<double>, pick<double>, add_rows<double, double>, nullptr};
}

}  // namespace fdfast::FDFAST_ROWS
