// The functions of fused_layers.hpp: rows shared out to threads, each by the loops of this machine.
#include "fused_layers.hpp"

#include <algorithm>
#include <vector>

#include "threads.hpp"

namespace fdfast {
namespace {

const LayerLoops& loops() {
  static const LayerLoops chosen = [] {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
      return avx512::layer_loops();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::layer_loops();
#endif
    return generic::layer_loops();
  }();
  return chosen;
}

}  // namespace

void rms_norm(const float* x, const float* weight, int64_t R, int64_t D, double eps, int threads, float* y,
              float* inv_rms) {
  for_shares(R, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) inv_rms[r] = loops().norm_row(x + r * D, weight, D, eps, y + r * D);
  });
}

void rms_norm_grads(const float* dy, const float* x, const float* weight, const float* inv_rms, int64_t R, int64_t D,
                    int threads, float* dx, float* dweight) {
  if (dx != nullptr) {
    for_shares(R, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        loops().norm_grad_row(dy + r * D, x + r * D, weight, inv_rms[r], D, dx + r * D);
      }
    });
  }
  if (dweight == nullptr) return;
  // Columns are shared out, so each sum runs over the rows in their order.
  for_shares(D, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(end - begin);
    for (int64_t r = 0; r < R; ++r) {
      loops().norm_weight_row(dy + r * D + begin, x + r * D + begin, inv_rms[r], end - begin, sums.data());
    }
    std::copy(sums.begin(), sums.end(), dweight + begin);
  });
}

void swiglu(const float* gate, const float* up, int64_t n, int threads, float* y) {
  for_shares(n, threads, [&](int64_t begin, int64_t end) {
    loops().swiglu(gate + begin, up + begin, end - begin, y + begin);
  });
}

void swiglu_grads(const float* dy, const float* gate, const float* up, int64_t n, int threads, float* dgate,
                  float* dup) {
  for_shares(n, threads, [&](int64_t begin, int64_t end) {
    loops().swiglu_grads(dy + begin, gate + begin, up + begin, end - begin, dgate + begin, dup + begin);
  });
}

}  // namespace fdfast
