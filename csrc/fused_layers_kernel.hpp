// The loops of fused_layers.hpp, compiled once for each instruction set: see rows_kernel.hpp.
#include <cstdint>

#include "fused_layers.hpp"
#include "simd.hpp"

namespace fdfast::FDFAST_ROWS {
namespace {

// Past the end of a row stands 0, which adds nothing to a sum.
FDFAST_INLINE VecF load_or_0(const float* at, Whole whole) { return load(at, whole); }
FDFAST_INLINE VecF load_or_0(const float* at, Part part) {
  VecF x{};
  __builtin_memcpy(&x, at, part.lanes * sizeof(float));
  return x;
}

float norm_row(const float* x, const float* weight, int64_t D, double eps, float* y) {
  VecF squares{};
  for_vectors<float>(0, D, [&](int64_t d, auto extent) __attribute__((always_inline)) {
    const VecF a = load_or_0(x + d, extent);
    squares += a * a;
  });
  const float inv_rms = static_cast<float>(1.0 / __builtin_sqrt(total<float>(squares) / static_cast<double>(D) + eps));
  for_vectors<float>(0, D, [&](int64_t d, auto extent) __attribute__((always_inline)) {
    store(y + d, extent, load_or_0(weight + d, extent) * (load_or_0(x + d, extent) * inv_rms));
  });
  return inv_rms;
}

// dx = inv_rms (g - xhat mean(g xhat)), g = weight * dy, xhat = x * inv_rms.
void norm_grad_row(const float* dy, const float* x, const float* weight, float inv_rms, int64_t D, float* dx) {
  VecF products{};
  for_vectors<float>(0, D, [&](int64_t d, auto extent) __attribute__((always_inline)) {
    products += load_or_0(weight + d, extent) * load_or_0(dy + d, extent) * load_or_0(x + d, extent);
  });
  const double r = inv_rms;
  const float along = static_cast<float>(total<float>(products) / static_cast<double>(D) * r * r);
  for_vectors<float>(0, D, [&](int64_t d, auto extent) __attribute__((always_inline)) {
    const VecF g = load_or_0(weight + d, extent) * load_or_0(dy + d, extent);
    store(dx + d, extent, inv_rms * (g - load_or_0(x + d, extent) * along));
  });
}

void norm_weight_row(const float* dy, const float* x, float inv_rms, int64_t D, double* sums) {
  for (int64_t d = 0; d < D; ++d) sums[d] += static_cast<double>(dy[d] * (x[d] * inv_rms));
}

FDFAST_INLINE VecF sigmoid(VecF x) { return 1.0f / (1.0f + exp_(-x)); }

void swiglu_loop(const float* gate, const float* up, int64_t n, float* y) {
  for_vectors<float>(0, n, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    const VecF g = load_or_0(gate + i, extent);
    store(y + i, extent, g * sigmoid(g) * load_or_0(up + i, extent));
  });
}

void swiglu_grad_loop(const float* dy, const float* gate, const float* up, int64_t n, float* dgate, float* dup) {
  for_vectors<float>(0, n, [&](int64_t i, auto extent) __attribute__((always_inline)) {
    const VecF g = load_or_0(gate + i, extent), d = load_or_0(dy + i, extent), s = sigmoid(g);
    const VecF u = load_or_0(up + i, extent);
    store(dup + i, extent, d * (g * s));
    store(dgate + i, extent, d * u * (s * (1.0f + g * (1.0f - s))));
  });
}

}  // namespace

LayerLoops layer_loops() { return {norm_row, norm_grad_row, norm_weight_row, swiglu_loop, swiglu_grad_loop}; }

}  // namespace fdfast::FDFAST_ROWS
