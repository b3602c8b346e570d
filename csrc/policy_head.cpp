#include "policy_head.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

// One binary serves every x86-64: the loader picks the widest clone the machine has.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FDFAST_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FDFAST_CLONES
#endif
#define FDFAST_INLINE inline __attribute__((always_inline))

namespace fdfast {
namespace {

template <typename T>
constexpr T kNegInf = -std::numeric_limits<T>::infinity();

// e^x for x <= 88, written so that the compiler vectorises it: 2^n by the exponent bits, e^r by a polynomial. 1 ulp.
FDFAST_INLINE float exp_(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  const float clamped = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = clamped * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.98412698e-4f;
  y = y * r + 1.38888889e-3f;
  y = y * r + 8.33333333e-3f;
  y = y * r + 4.16666667e-2f;
  y = y * r + 1.66666667e-1f;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  int32_t bits, scale;
  std::memcpy(&bits, &shifted, 4);
  scale = (bits + 127) << 23;  // the magic number's own bits leave at the top
  float power;
  std::memcpy(&power, &scale, 4);
  return x < -87.0f ? 0.0f : y * power;
}
// Clamped like the float one: p and e^(t - s) never become a subnormal and an infinity whose product is NaN.
FDFAST_INLINE double exp_(double x) { return x < -708.0 ? 0.0 : std::exp(std::min(x, 708.0)); }

// log x for x > 0 normal: x = m 2^e with m in [1/sqrt2, sqrt2), log m by a polynomial in m - 1.
FDFAST_INLINE float log_(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const int32_t mantissa = bits - (e << 23);
  float m;
  std::memcpy(&m, &mantissa, 4);
  const float f = m - 1.0f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  const float exponent = static_cast<float>(e);
  const float log_m = f - 0.5f * f * f + f * f * f * y;
  return x == std::numeric_limits<float>::infinity() ? x : log_m + exponent * 0.69314718f;
}

// phi(x) = e^x - 1 - x: by its series where the plain form would cancel.
constexpr double kNear = 0.5;
template <typename T>
FDFAST_INLINE T phi_near(T x) {
  constexpr int kLast = std::is_same_v<T, float> ? 9 : 16;  // 0.5^k / k! below one rounding of phi(0.5)
  T y = T(1) / kLast;
  for (int k = kLast - 1; k >= 3; --k) y = T(1) / k * (T(1) + x * y);
  return x * x * T(0.5) * (T(1) + x * y);
}
template <typename T>
FDFAST_INLINE T expm1_(T x) {
  return std::abs(x) < T(kNear) ? x + phi_near(x) : exp_(x) - T(1);
}
// log(1 + y) for y > -1: the rounding of 1 + y is divided out again.
FDFAST_INLINE float log1p_(float y) {
  const float u = 1.0f + y;
  const float lost = u - 1.0f;
  return lost == 0.0f ? y : (u > 1e30f ? log_(u) : log_(u) * (y / lost));
}
FDFAST_INLINE double log1p_(double y) { return std::log1p(y); }
FDFAST_INLINE double log_(double x) { return std::log(x); }

// p_b - p_a - p_a x where x = log(p_b / p_a), that is p_a phi(x): one outcome's share of KL(a || b).
template <typename T>
FDFAST_INLINE T kl_term(T p_a, T p_b, T x) {
  const T far = p_b - p_a - p_a * x;
  const T near = p_a * phi_near(x);
  return p_a == T(0) ? p_b : (std::abs(x) < T(kNear) ? near : far);
}

// log(rest + weight e^x) with rest + weight = 1: the log of a mixture over one of its parts. Where the mixture is far below that part,
// log1p of a number near -1 would have lost it.
template <typename T>
FDFAST_INLINE T log_mix(T rest, T weight, T x) {
  const T e = expm1_(x) * weight;
  const T far = log_(rest + weight * exp_(x));
  return e < T(-0.5) ? far : log1p_(e);
}

template <typename T>
FDFAST_INLINE T tanh_(T y) {
  const T e = expm1_(std::min(y, T(20)) * T(2));
  return e / (e + T(2));
}
// z of a raw logit, and dz/draw. `capped` is known at compile time, so that plain heads do not pay for a tanh.
template <bool capped, typename T>
FDFAST_INLINE T tempered(T raw, T softcap, T inv_temperature) {
  if constexpr (capped) raw = softcap * tanh_(raw / softcap);
  return raw * inv_temperature;
}
template <bool capped, typename T>
FDFAST_INLINE T dz_draw(T z, T softcap, T inv_temperature) {
  if constexpr (!capped) return inv_temperature;
  const T u = z / (inv_temperature * softcap);
  return (T(1) - u * u) * inv_temperature;
}

// Outcome by outcome: f(t, s) as a non-negative term, and the term whose sum is the row's center.
template <Divergence kind, typename T>
FDFAST_INLINE void divergence_terms(T p, T p_t, T d, T alpha, T rest, T& value, T& center) {
  if constexpr (kind == Divergence::forward_kl) {
    value = kl_term(p_t, p, -d);
    center = T(0);
  } else if constexpr (kind == Divergence::reverse_kl) {
    value = kl_term(p, p_t, d);
    center = value;
  } else {
    const T p_m = alpha * p_t + rest * p;
    const T teacher_part = kl_term(p_t, p_m, log_mix(alpha, rest, -d));
    if constexpr (kind == Divergence::jsd) {
      const T student_part = kl_term(p, p_m, log_mix(rest, alpha, d));
      value = alpha * teacher_part + rest * student_part;
      center = student_part;
    } else {
      const T x = expm1_(d);
      value = teacher_part;
      center = p == T(0) ? T(0) : p * (rest * x / (T(1) + alpha * x));
    }
  }
}

// d(divergence)/dz of one outcome.
template <Divergence kind, typename T>
FDFAST_INLINE T divergence_grad(T p, T p_t, T d, T alpha, T rest, T center) {
  if constexpr (kind == Divergence::forward_kl) {
    return std::abs(d) < T(kNear) ? -p * (d + phi_near(d)) : p - p_t;
  } else if constexpr (kind == Divergence::reverse_kl) {
    return p == T(0) ? T(0) : p * (-d - center);
  } else if constexpr (kind == Divergence::jsd) {
    const T l = log_mix(rest, alpha, d);
    return p == T(0) ? T(0) : rest * p * (-l - center);
  } else {
    const T x = expm1_(d);
    const T q = rest * x / (T(1) + alpha * x);
    return p == T(0) ? T(0) : -rest * p * (q - center);
  }
}

constexpr int64_t kStrip = 4096;  // float sums run over a strip, strips are summed in double

template <typename T>
FDFAST_INLINE void temper_row(T* row, int64_t V, T softcap, T inv_temperature) {
  if (softcap > T(0)) {
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) row[v] = tempered<true>(row[v], softcap, inv_temperature);
  } else if (inv_temperature != T(1)) {
#pragma omp simd
    for (int64_t v = 0; v < V; ++v) row[v] = tempered<false>(row[v], softcap, inv_temperature);
  }
}

template <typename T>
FDFAST_INLINE T row_max(const T* z, int64_t V) {
  T top = kNegInf<T>;
#pragma omp simd reduction(max : top)
  for (int64_t v = 0; v < V; ++v) top = std::max(top, z[v]);
  return top;
}

// log-sum-exp of a row; *weighted receives sum e^(z - max) (z - max), for the entropy.
template <typename T>
FDFAST_INLINE RowNorm norm_row(const T* z, int64_t V, double* weighted) {
  const T top = row_max(z, V);
  if (top == kNegInf<T>) return {static_cast<double>(top), 0.0};
  double sum = 0.0, dot = 0.0;
  for (int64_t begin = 0; begin < V; begin += kStrip) {
    const int64_t end = std::min(V, begin + kStrip);
    T strip_sum = 0, strip_dot = 0;
#pragma omp simd reduction(+ : strip_sum, strip_dot)
    for (int64_t v = begin; v < end; ++v) {
      const T x = z[v] - top;
      const T e = exp_(x);
      strip_sum += e;
      strip_dot += e == T(0) ? T(0) : e * x;
    }
    sum += strip_sum;
    dot += strip_dot;
  }
  if (weighted != nullptr) *weighted = dot / sum;
  return {static_cast<double>(top), std::log(sum)};
}

template <Divergence kind, typename T>
FDFAST_INLINE void divergence_row(const T* s, const T* t, int64_t V, RowNorm n, RowNorm m, double alpha_, double* value,
                                  double* center) {
  const T top = n.max, log_sum = n.log_sum, t_top = m.max, t_log_sum = m.log_sum;
  const T alpha = alpha_, rest = 1.0 - alpha_;
  const T shift = m.log_sum - n.log_sum;
  double sum = 0.0, center_sum = 0.0;
  for (int64_t begin = 0; begin < V; begin += kStrip) {
    const int64_t end = std::min(V, begin + kStrip);
    T strip = 0, strip_center = 0;
#pragma omp simd reduction(+ : strip, strip_center)
    for (int64_t v = begin; v < end; ++v) {
      const T a = s[v] - top, b = t[v] - t_top;
      T term, center_term;
      divergence_terms<kind>(exp_(a - log_sum), exp_(b - t_log_sum), (b - a) - shift, alpha, rest, term, center_term);
      strip += term;
      strip_center += center_term;
    }
    sum += strip;
    center_sum += strip_center;
  }
  *value = sum;
  *center = center_sum;
}

template <Divergence kind, bool capped, typename T>
FDFAST_INLINE void grad_row(T* s, const T* t, int64_t V, const HeadMath& math, RowNorm n, RowNorm m, double center_,
                            double coef_p, double coef_plogp, double coef_divergence) {
  const T top = n.max, log_sum = n.log_sum, t_top = m.max, t_log_sum = m.log_sum, shift = m.log_sum - n.log_sum;
  const T alpha = math.alpha, rest = 1.0 - math.alpha, center = center_;
  const T cp = coef_p, cl = coef_plogp, cd = coef_divergence;
  const T cap = math.softcap, inv = math.inv_temperature, t_inv = math.teacher_inv_temperature;
#pragma omp simd
  for (int64_t v = 0; v < V; ++v) {
    const T z = tempered<capped>(s[v], cap, inv);
    const T a = z - top;
    const T log_p = a - log_sum;
    const T p = exp_(log_p);
    const T b = tempered<capped>(t[v], cap, t_inv) - t_top;
    const T direct = p == T(0) ? T(0) : p * (cp + cl * log_p);
    const T toward = divergence_grad<kind>(p, exp_(b - t_log_sum), (b - a) - shift, alpha, rest, center);
    s[v] = (direct + cd * toward) * dz_draw<capped>(z, cap, inv);
  }
}
template <bool capped, typename T>
FDFAST_INLINE void grad_row_alone(T* s, int64_t V, const HeadMath& math, RowNorm n, double coef_p, double coef_plogp) {
  const T top = n.max, log_sum = n.log_sum, cp = coef_p, cl = coef_plogp;
  const T cap = math.softcap, inv = math.inv_temperature;
#pragma omp simd
  for (int64_t v = 0; v < V; ++v) {
    const T z = tempered<capped>(s[v], cap, inv);
    const T log_p = (z - top) - log_sum;
    const T p = exp_(log_p);
    s[v] = (p == T(0) ? T(0) : p * (cp + cl * log_p)) * dz_draw<capped>(z, cap, inv);
  }
}
template <bool capped, typename T>
FDFAST_INLINE void grad_dispatch(T* s, const T* t, int64_t V, const HeadMath& math, RowNorm n, RowNorm m, double center,
                                 double cp, double cl, double cd) {
  if (t == nullptr) return grad_row_alone<capped>(s, V, math, n, cp, cl);
  switch (math.divergence) {
    case Divergence::forward_kl:
      return grad_row<Divergence::forward_kl, capped>(s, t, V, math, n, m, center, cp, cl, cd);
    case Divergence::reverse_kl:
      return grad_row<Divergence::reverse_kl, capped>(s, t, V, math, n, m, center, cp, cl, cd);
    case Divergence::jsd:
      return grad_row<Divergence::jsd, capped>(s, t, V, math, n, m, center, cp, cl, cd);
    case Divergence::skew_kl:
      return grad_row<Divergence::skew_kl, capped>(s, t, V, math, n, m, center, cp, cl, cd);
  }
}

// A clone per instruction set of each row loop: everything above is inlined into these.
#define FDFAST_ROW_LOOPS(T)                                                                                            \
  FDFAST_CLONES void temper_loop(T* row, int64_t V, T cap, T inv) { temper_row(row, V, cap, inv); }                    \
  FDFAST_CLONES RowNorm norm_loop(const T* z, int64_t V, double* weighted) { return norm_row(z, V, weighted); }        \
  FDFAST_CLONES void divergence_loop(const T* s, const T* t, int64_t V, RowNorm n, RowNorm m, Divergence kind,         \
                                     double alpha, double* value, double* center) {                                    \
    switch (kind) {                                                                                                    \
      case Divergence::forward_kl:                                                                                     \
        return divergence_row<Divergence::forward_kl>(s, t, V, n, m, alpha, value, center);                            \
      case Divergence::reverse_kl:                                                                                     \
        return divergence_row<Divergence::reverse_kl>(s, t, V, n, m, alpha, value, center);                            \
      case Divergence::jsd:                                                                                            \
        return divergence_row<Divergence::jsd>(s, t, V, n, m, alpha, value, center);                                   \
      case Divergence::skew_kl:                                                                                        \
        return divergence_row<Divergence::skew_kl>(s, t, V, n, m, alpha, value, center);                               \
    }                                                                                                                  \
  }                                                                                                                    \
  FDFAST_CLONES void grad_loop(T* s, const T* t, int64_t V, const HeadMath& math, RowNorm n, RowNorm m, double center, \
                               double cp, double cl, double cd) {                                                      \
    if (math.softcap > 0.0) return grad_dispatch<true>(s, t, V, math, n, m, center, cp, cl, cd);                        \
    return grad_dispatch<false>(s, t, V, math, n, m, center, cp, cl, cd);                                              \
  }
FDFAST_ROW_LOOPS(float)
FDFAST_ROW_LOOPS(double)

// Rows in equal shares to `threads` threads; each row is computed by one thread, so their number changes no result.
template <typename Body>
void for_rows(int64_t R, int threads, const Body& body) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, R));
  const auto share = [&](int64_t w) {
    for (int64_t r = R * w / workers; r < R * (w + 1) / workers; ++r) body(r);
  };
  std::vector<std::thread> pool;
  for (int64_t w = 1; w < workers; ++w) pool.emplace_back(share, w);
  share(0);
  for (auto& thread : pool) thread.join();
}

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Int = uint32_t;
  static constexpr int kMantissa = 23, kExponent = 8;
};
template <>
struct Bits<double> {
  using Int = uint64_t;
  static constexpr int kMantissa = 52, kExponent = 11;
};

}  // namespace

template <typename T>
void head_stats(T* student, T* teacher, int64_t R, int64_t V, const int64_t* targets, const HeadMath& math, int threads,
                RowNorm* norm, RowNorm* teacher_norm, double* logprob, double* entropy, double* divergence,
                double* center, int64_t* argmax) {
  for_rows(R, threads, [&](int64_t r) {
    T* s = student + r * V;
    temper_loop(s, V, static_cast<T>(math.softcap), static_cast<T>(math.inv_temperature));
    double weighted = 0.0;
    norm[r] = norm_loop(s, V, &weighted);
    logprob[r] = (static_cast<double>(s[targets[r]]) - norm[r].max) - norm[r].log_sum;
    entropy[r] = norm[r].log_sum - weighted;
    argmax[r] = std::min<int64_t>(std::find(s, s + V, static_cast<T>(norm[r].max)) - s, V - 1);  // V: all NaN
    divergence[r] = center[r] = 0.0;
    if (teacher == nullptr) return;
    T* t = teacher + r * V;
    temper_loop(t, V, static_cast<T>(math.softcap), static_cast<T>(math.teacher_inv_temperature));
    teacher_norm[r] = norm_loop(t, V, nullptr);
    divergence_loop(s, t, V, norm[r], teacher_norm[r], math.divergence, math.alpha, &divergence[r], &center[r]);
  });
}

template <typename T>
void row_norms(const T* z, int64_t R, int64_t V, int threads, RowNorm* norm) {
  for_rows(R, threads, [&](int64_t r) { norm[r] = norm_loop(z + r * V, V, nullptr); });
}

template <typename T>
void head_grads(T* student, T* teacher, int64_t R, int64_t V, int64_t first, const HeadMath& math, int threads,
                const RowNorm* norm, const RowNorm* teacher_norm, const double* center, const double* coef_p,
                const double* coef_plogp, const double* coef_divergence, const int64_t* targets,
                const double* coef_target, const int64_t* topk_ids, const double* topk_dz, int64_t K) {
  for_rows(R, threads, [&](int64_t r) {
    T* s = student + r * V;
    const T cap = static_cast<T>(math.softcap), inv = static_cast<T>(math.inv_temperature);
    const auto inside = [&](int64_t v) { return v >= first && v < first + V; };
    const auto chained = [&](double dz, int64_t v) {  // reads the raw logit, so before the row is overwritten
      const T raw = s[v - first];
      const T slope = cap > T(0) ? dz_draw<true>(tempered<true>(raw, cap, inv), cap, inv) : inv;
      return static_cast<T>(dz) * slope;
    };
    std::vector<std::pair<int64_t, T>> topk;
    for (int64_t k = r * K; k < (r + 1) * K; ++k) {
      if (inside(topk_ids[k])) topk.emplace_back(topk_ids[k] - first, chained(topk_dz[k], topk_ids[k]));
    }
    const int64_t y = targets[r];
    const T at_target = inside(y) ? chained(coef_target[r], y) : T(0);
    const T* t = teacher == nullptr ? nullptr : teacher + r * V;
    grad_loop(s, t, V, math, norm[r], t == nullptr ? RowNorm{} : teacher_norm[r], center[r], coef_p[r], coef_plogp[r],
              coef_divergence[r]);
    for (const auto& [v, value] : topk) s[v] = value;
    if (inside(y)) s[y - first] += at_target;
  });
}

template <typename T>
void row_thresholds(const T* x, int64_t R, int64_t V, double share, int threads, double* threshold, double* total) {
  constexpr int kShift = Bits<T>::kMantissa - 3;
  for_rows(R, threads, [&](int64_t r) {
    std::vector<double> bins(size_t{1} << (Bits<T>::kExponent + 3));
    double sum = 0.0;
    for (int64_t v = 0; v < V; ++v) {
      const T magnitude = std::abs(x[r * V + v]);
      typename Bits<T>::Int bits;
      std::memcpy(&bits, &magnitude, sizeof bits);
      bins[bits >> kShift] += magnitude;
      sum += magnitude;
    }
    size_t bin = 0;
    for (double below = 0.0; bin + 1 < bins.size() && below + bins[bin] <= share * sum; ++bin) below += bins[bin];
    const auto edge = static_cast<typename Bits<T>::Int>(bin) << kShift;
    T value;
    std::memcpy(&value, &edge, sizeof value);
    threshold[r] = value;
    total[r] = sum;
  });
}

#define FDFAST_INSTANTIATE(T)                                                                                          \
  template void head_stats<T>(T*, T*, int64_t, int64_t, const int64_t*, const HeadMath&, int, RowNorm*, RowNorm*,      \
                              double*, double*, double*, double*, int64_t*);                                           \
  template void row_norms<T>(const T*, int64_t, int64_t, int, RowNorm*);                                               \
  template void head_grads<T>(T*, T*, int64_t, int64_t, int64_t, const HeadMath&, int, const RowNorm*, const RowNorm*, \
                              const double*, const double*, const double*, const double*, const int64_t*,              \
                              const double*, const int64_t*, const double*, int64_t);                                  \
  template void row_thresholds<T>(const T*, int64_t, int64_t, double, int, double*, double*);
FDFAST_INSTANTIATE(float)
FDFAST_INSTANTIATE(double)

}  // namespace fdfast
