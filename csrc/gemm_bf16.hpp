// Products of bfloat16 matrices in float32, for PyTorch on the CPU has none: its own round the product to bfloat16.
//
// Legend: M rows and N columns of the product, K the depth that is summed over.
#pragma once

#include <cstdint>

namespace fdfast {

// A factor: element (lane, depth) lies at at[lane * lane_stride + depth * depth_stride], one of the strides being 1. A
// lane is a row of the left factor, a column of the right one.
struct Factor {
  const uint16_t* at;
  int64_t lane_stride, depth_stride;
};

// Whether this machine multiplies bfloat16 (AVX512-BF16).
bool gemm_bf16_runs();

// Bytes that a product takes for packed blocks, a thread.
int64_t gemm_bf16_scratch_bytes();

// c (M, N), rows ldc apart, becomes a (M, K) b (K, N), or c plus it if `add`. Every element is summed by one thread in
// one order, so their number changes no result. Subnormal products count as 0, as the instruction has it.
void gemm_bf16(Factor a, Factor b, int64_t M, int64_t N, int64_t K, float* c, int64_t ldc, bool add, int threads);

#if defined(__x86_64__)
namespace avx512bf16 {
int64_t scratch_bytes();
void gemm(Factor a, Factor b, int64_t M, int64_t N, int64_t K, float* c, int64_t ldc, bool add, void* scratch);
}  // namespace avx512bf16
#endif

}  // namespace fdfast
