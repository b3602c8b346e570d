// The functions of policy_head.hpp: rows shared out to threads, each by the loops of this machine.
#include "policy_head.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "rows.hpp"
#include "threads.hpp"

namespace fdfast {
namespace {

template <typename T>
const RowLoops<T>& loops() {
  static const RowLoops<T> chosen = [] {
    constexpr bool kFloat = std::is_same_v<T, float>;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      if constexpr (kFloat) return avx512::float_loops();
      else return avx512::double_loops();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      if constexpr (kFloat) return avx2::float_loops();
      else return avx2::double_loops();
    }
#endif
    if constexpr (kFloat) return generic::float_loops();
    else return generic::double_loops();
  }();
  return chosen;
}

// Each row is computed by one thread, so their number changes no result.
template <typename Body>
void for_rows(int64_t R, int threads, const Body& body) {
  for_shares(R, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(r);
  });
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
    loops<T>().temper(s, V, static_cast<T>(math.softcap), static_cast<T>(math.inv_temperature));
    double weighted = 0.0;
    norm[r] = loops<T>().norm(s, V, &weighted, &argmax[r]);
    logprob[r] = (static_cast<double>(s[targets[r]]) - norm[r].max) - norm[r].log_sum;
    entropy[r] = norm[r].log_sum - weighted;
    divergence[r] = center[r] = 0.0;
    if (teacher == nullptr) return;
    T* t = teacher + r * V;
    loops<T>().temper(t, V, static_cast<T>(math.softcap), static_cast<T>(math.teacher_inv_temperature));
    teacher_norm[r] = loops<T>().norm(t, V, nullptr, nullptr);
    loops<T>().divergence(s, t, V, norm[r], teacher_norm[r], math, &divergence[r], &center[r]);
  });
}

template <typename T>
void head_divergence(const T* student, const T* teacher, int64_t R, int64_t V, const HeadMath& math, int threads,
                     const RowNorm* norm, const RowNorm* teacher_norm, double* divergence, double* center) {
  for_rows(R, threads, [&](int64_t r) {
    loops<T>().divergence(student + r * V, teacher + r * V, V, norm[r], teacher_norm[r], math, &divergence[r],
                          &center[r]);
  });
}

template <typename T>
void row_norms(const T* z, int64_t R, int64_t V, int threads, RowNorm* norm) {
  for_rows(R, threads, [&](int64_t r) { norm[r] = loops<T>().norm(z + r * V, V, nullptr, nullptr); });
}

template <typename T>
void head_grads(T* student, T* teacher, int64_t R, int64_t V, int64_t first, bool tempered, bool narrow,
                const HeadMath& math, int threads, const RowNorm* norm, const RowNorm* teacher_norm,
                const double* center, const double* coef_p, const double* coef_plogp, const double* coef_divergence,
                const int64_t* targets, const double* coef_target, const int64_t* topk_ids, const double* topk_dz,
                int64_t K) {
  for_rows(R, threads, [&](int64_t r) {
    T* s = student + r * V;
    T* t = teacher == nullptr ? nullptr : teacher + r * V;
    const T cap = static_cast<T>(math.softcap), inv = static_cast<T>(math.inv_temperature);
    if (!tempered) {
      loops<T>().temper(s, V, cap, inv);
      if (t != nullptr) loops<T>().temper(t, V, cap, static_cast<T>(math.teacher_inv_temperature));
    }
    const auto inside = [&](int64_t v) { return v >= first && v < first + V; };
    const auto chained = [&](double dz, int64_t v) {  // reads z, so before the row is overwritten
      const double u = cap > T(0) ? s[v - first] / (math.inv_temperature * math.softcap) : 0.0;
      return static_cast<T>(dz * (1.0 - u * u) * math.inv_temperature);
    };
    std::vector<std::pair<int64_t, T>> topk;
    for (int64_t k = r * K; k < (r + 1) * K; ++k) {
      if (inside(topk_ids[k])) topk.emplace_back(topk_ids[k] - first, chained(topk_dz[k], topk_ids[k]));
    }
    const int64_t y = targets[r];
    const T at_target = inside(y) ? chained(coef_target[r], y) : T(0);
    loops<T>().gradient(s, t, V, math, norm[r], t == nullptr ? RowNorm{} : teacher_norm[r],
              {coef_p[r], coef_plogp[r], coef_divergence[r], center[r]});
    for (const auto& [v, value] : topk) s[v] = value;
    if (inside(y)) s[y - first] += at_target;
    if constexpr (std::is_same_v<T, float>) {
      if (narrow) loops<T>().narrow(s, V);  // the row is still in the cache
    }
  });
}

template <typename T>
void narrow_rows(T* x, int64_t R, int64_t V, int threads) {
  if constexpr (std::is_same_v<T, float>) for_rows(R, threads, [&](int64_t r) { loops<T>().narrow(x + r * V, V); });
}

template <typename T>
void row_thresholds(const T* x, int64_t R, int64_t V, double share, int threads, double* threshold, double* total,
                    int64_t* needed) {
  using Int = typename Bits<T>::Int;
  constexpr int kShift = Bits<T>::kMantissa - 3;
  const auto edge = [](Int bin) {
    const Int bits = bin << kShift;
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  const auto bin = [](T value) {  // whose edge is at most the value
    Int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits >> kShift;
  };
  for_rows(R, threads, [&](int64_t r) {
    const T* row = x + r * V;
    // Halving, with all below `low` within the share, and not all below `high`, infinity at first. However the sum is
    // spread, all below a V-th of the share are within it.
    Int low = 0, high = ((Int{1} << Bits<T>::kExponent) - 1) << 3;
    total[r] = loops<T>().mass(row, V, edge(high));
    if (std::isfinite(total[r])) low = std::min(bin(static_cast<T>(share * total[r] / V)), high);
    while (high - low > 1) {
      const Int middle = low + (high - low) / 2;
      (loops<T>().mass(row, V, edge(middle)) <= share * total[r] ? low : high) = middle;
    }
    threshold[r] = edge(low);
    needed[r] = V - loops<T>().count(row, V, edge(low));
  });
}

namespace {

constexpr int64_t kSparseColumns = 256;  // whose weights stay in a second-level cache while the rows go by
constexpr int64_t kSlot = kSparseColumns + 16;  // `pick` writes up to a vector more than it returns

// sum += values[i] * rows[first + index[i]].
template <typename T>
void add_rows(const T* values, const int32_t* index, int64_t n, Rows rows, int64_t first, int64_t D, T* sum) {
  if constexpr (std::is_same_v<T, float>) {
    if (rows.bf16) {
      const auto* narrow = static_cast<const uint16_t*>(rows.at) + first * D;
      return loops<T>().add_rows_bf16(values, index, n, narrow, D, sum);
    }
  }
  loops<T>().add_rows(values, index, n, static_cast<const T*>(rows.at) + first * D, D, sum);
}

// body(row, place of the entry) for the entries in columns [begin, end), row by row.
template <typename Body>
void for_entries(const std::vector<int64_t>& counts, const int32_t* columns, int64_t begin, int64_t end,
                 const Body& body) {
  for (size_t r = 0; r < counts.size(); ++r) {
    for (int64_t at = r * kSlot; at < static_cast<int64_t>(r) * kSlot + counts[r]; ++at) {
      if (columns[at] >= begin && columns[at] < end) body(static_cast<int64_t>(r), at);
    }
  }
}

}  // namespace

template <typename T>
void sparse_grads(const T* dlogits, int64_t R, int64_t V, const double* threshold, Rows weight, Rows hidden, int64_t D,
                  int threads, T* dhidden, T* dweight, double* kept) {
  // What is kept of a block of columns, a slot a row: dlogits are read once, a few lines of memory at a time.
  std::vector<T> values(R * kSlot);
  std::vector<int32_t> columns(R * kSlot);
  std::vector<int64_t> counts(R);
  for (int64_t v = 0; v < V; v += kSparseColumns) {
    const int64_t width = std::min(kSparseColumns, V - v);
    for_shares(R, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* const value = values.data() + r * kSlot;
        int32_t* const column = columns.data() + r * kSlot;
        const int64_t n = counts[r] =
            loops<T>().pick(dlogits + r * V + v, width, static_cast<T>(threshold[r]), value, column);
        double sum = 0.0;
        for (int64_t i = 0; i < n; ++i) sum += std::abs(value[i]);
        kept[r] += sum;
        if (dhidden != nullptr && n > 0) {
          add_rows(value, column, n, weight, v, D, dhidden + r * D);
        }
      }
    });
    if (dweight == nullptr) continue;
    for_shares(width, threads, [&](int64_t begin, int64_t end) {
      // The same entries by columns, each column's in the order of the rows.
      std::vector<int64_t> ends(kSparseColumns + 1);
      for_entries(counts, columns.data(), begin, end, [&](int64_t, int64_t at) { ++ends[columns[at] + 1]; });
      for (int64_t c = begin; c < end; ++c) ends[c + 1] += ends[c];
      std::vector<T> sorted(ends[end]);
      std::vector<int32_t> rows(ends[end]);
      for_entries(counts, columns.data(), begin, end, [&](int64_t r, int64_t at) {
        const int64_t to = ends[columns[at]]++;
        sorted[to] = values[at];
        rows[to] = static_cast<int32_t>(r);
      });
      for (int64_t c = begin, from = 0; c < end; from = ends[c++]) {
        if (ends[c] == from) continue;
        add_rows(sorted.data() + from, rows.data() + from, ends[c] - from, hidden, 0, D, dweight + (v + c) * D);
      }
    });
  }
}

#define FDFAST_INSTANTIATE(T)                                                                                          \
  template void head_stats<T>(T*, T*, int64_t, int64_t, const int64_t*, const HeadMath&, int, RowNorm*, RowNorm*,      \
                              double*, double*, double*, double*, int64_t*);                                           \
  template void head_divergence<T>(const T*, const T*, int64_t, int64_t, const HeadMath&, int, const RowNorm*,         \
                                   const RowNorm*, double*, double*);                                                  \
  template void row_norms<T>(const T*, int64_t, int64_t, int, RowNorm*);                                               \
  template void head_grads<T>(T*, T*, int64_t, int64_t, int64_t, bool, bool, const HeadMath&, int, const RowNorm*,     \
                              const RowNorm*, const double*, const double*, const double*, const double*,              \
                              const int64_t*, const double*, const int64_t*, const double*, int64_t);                  \
  template void narrow_rows<T>(T*, int64_t, int64_t, int);                                                             \
  template void row_thresholds<T>(const T*, int64_t, int64_t, double, int, double*, double*, int64_t*);                \
  template void sparse_grads<T>(const T*, int64_t, int64_t, const double*, Rows, Rows, int64_t, int, T*, T*, double*);
FDFAST_INSTANTIATE(float)
FDFAST_INSTANTIATE(double)

}  // namespace fdfast
