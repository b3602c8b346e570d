// The elementwise parts of a transformer's layers in float32, each in one pass over its rows.
//
// Legend: R rows, D numbers of a row, n numbers of a tensor.
#pragma once

#include <cstdint>

namespace fdfast {

// y = weight * (x * inv_rms), inv_rms (R) = 1 / sqrt(mean x^2 + eps).
void rms_norm(const float* x, const float* weight, int64_t R, int64_t D, double eps, int threads, float* y,
              float* inv_rms);

// The gradients of x (R, D) and of the weight (D), each null where it is not wanted. The weight's is summed over the
// rows in double, in one order whatever the threads.
void rms_norm_grads(const float* dy, const float* x, const float* weight, const float* inv_rms, int64_t R, int64_t D,
                    int threads, float* dx, float* dweight);

// y = gate / (1 + e^-gate) * up.
void swiglu(const float* gate, const float* up, int64_t n, int threads, float* y);
void swiglu_grads(const float* dy, const float* gate, const float* up, int64_t n, int threads, float* dgate,
                  float* dup);

// The loops of one instruction set.
struct LayerLoops {
  float (*norm_row)(const float* x, const float* weight, int64_t D, double eps, float* y);
  void (*norm_grad_row)(const float* dy, const float* x, const float* weight, float inv_rms, int64_t D, float* dx);
  // sums (D) += dy * x * inv_rms
  void (*norm_weight_row)(const float* dy, const float* x, float inv_rms, int64_t D, double* sums);
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
  void (*swiglu_grads)(const float* dy, const float* gate, const float* up, int64_t n, float* dgate, float* dup);
};

namespace generic {
LayerLoops layer_loops();
}
#if defined(__x86_64__)
namespace avx2 {
LayerLoops layer_loops();
}
namespace avx512 {
LayerLoops layer_loops();
}
#endif

}  // namespace fdfast
