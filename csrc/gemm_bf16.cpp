// gemm_bf16.hpp: the longer side of the product shared out to threads, each by the kernel of this machine.
#include "gemm_bf16.hpp"

#include <memory>

#include "threads.hpp"

namespace fdfast {

#if defined(__x86_64__)

bool gemm_bf16_runs() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

int64_t gemm_bf16_scratch_bytes() { return avx512bf16::scratch_bytes(); }

void gemm_bf16(Factor a, Factor b, int64_t M, int64_t N, int64_t K, Product c, bool add, int threads) {
  const bool by_rows = M > N;
  for_shares(by_rows ? M : N, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[avx512bf16::scratch_bytes()]);
    const Factor left{a.at + (by_rows ? begin * a.lane_stride : 0), a.lane_stride, a.depth_stride};
    const Factor right{b.at + (by_rows ? 0 : begin * b.lane_stride), b.lane_stride, b.depth_stride};
    avx512bf16::gemm(left, right, by_rows ? end - begin : M, by_rows ? N : end - begin, K,
                     c.from(by_rows ? begin : 0, by_rows ? 0 : begin), add, scratch.get());
  });
}

#else

bool gemm_bf16_runs() { return false; }
int64_t gemm_bf16_scratch_bytes() { return 0; }
void gemm_bf16(Factor, Factor, int64_t, int64_t, int64_t, Product, bool, int) {}

#endif

void round_halves(uint16_t* upper, const uint16_t* lower, int64_t count, int threads) {
  for_shares(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t up = upper[i], low = lower[i];
      const bool nan = (up & 0x7f80) == 0x7f80 && ((up & 0x7f) | low) != 0;
      const uint32_t rounded = up + (low + (up & 1) > 0x8000);
      upper[i] = static_cast<uint16_t>(nan ? up | 0x40 : rounded);
    }
  });
}

}  // namespace fdfast
