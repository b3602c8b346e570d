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

// Where a product goes, rows `stride` apart: float32 numbers at `at` or, if that is null, their upper and lower 16 bits
// at two places. The upper ones alone are a bfloat16, which `round_halves` makes the nearest.
struct Product {
  float* at;
  uint16_t *upper, *lower;
  int64_t stride;

  Product from(int64_t row, int64_t column) const {
    const int64_t i = row * stride + column;
    if (at != nullptr) return {at + i, nullptr, nullptr, stride};
    return {nullptr, upper + i, lower + i, stride};
  }
};

// c (M, N) becomes a (M, K) b (K, N), or c plus it if `add`. Every element is summed by one thread in one order, so
// their number changes no result. Subnormal products count as 0, as the instruction has it.
void gemm_bf16(Factor a, Factor b, int64_t M, int64_t N, int64_t K, Product c, bool add, int threads);

// upper (count) becomes the bfloat16 nearest to each number, ties to even; a NaN stays one.
void round_halves(uint16_t* upper, const uint16_t* lower, int64_t count, int threads);

#if defined(__x86_64__)
namespace avx512bf16 {
int64_t scratch_bytes();
void gemm(Factor a, Factor b, int64_t M, int64_t N, int64_t K, Product c, bool add, void* scratch);
}  // namespace avx512bf16
#endif

}  // namespace fdfast
