// The product of gemm_bf16.hpp for AVX512-BF16, whose instruction multiplies 16 pairs and adds each to a float32 lane.
//
// Blocks of both factors are packed into panels, [panel][depth / 2][lanes of a panel], each entry a pair of
// neighbours in depth; a tile of the product, one panel by one panel, then stays in registers for a block's depth.
// Nothing of the standard library: see rows_kernel.hpp.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("arch=cooperlake,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers, see its bug 105593
#endif
#include <immintrin.h>

#include "gemm_bf16.hpp"

namespace fdfast::avx512bf16 {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTileRows = 8, kTileVectors = 3;  // 24 of 32 registers; 8 lanes are half a register
constexpr int64_t kTileColumns = kTileVectors * kLanes;
// The most of a block: one of each factor lies in a second-level cache of 1 MiB. Hidden sizes up to kDepth need one
// pass over the product.
constexpr int64_t kDepth = 640, kRows = 128, kColumns = 576;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t whole(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }
inline __mmask32 first_lanes(int64_t n) { return n >= 32 ? ~0U : (1U << (n > 0 ? n : 0)) - 1; }

// Where 16 lanes of a pair of depths go: 8 to `low`, 8 to `high`; the next pair `step` further.
struct Panels {
  uint32_t *low, *high;
  int64_t step;
  void put(int64_t pair, __m512i x) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + pair * step), _mm512_castsi512_si256(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + pair * step), _mm512_extracti64x4_epi64(x, 1));
  }
};

// Row i of x becomes column i.
void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i ab_low = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    const __m512i ab_high = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    const __m512i cd_low = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
    const __m512i cd_high = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
    y[i] = _mm512_unpacklo_epi64(ab_low, cd_low);
    y[i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    y[i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    y[i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
  }
  // y[4 q + j] holds in its quarter p the column 4 p + j of rows 4 q .. 4 q + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i left_even = _mm512_shuffle_i32x4(y[j], y[4 + j], 0x88);
    const __m512i left_odd = _mm512_shuffle_i32x4(y[j], y[4 + j], 0xdd);
    const __m512i right_even = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x88);
    const __m512i right_odd = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xdd);
    x[j] = _mm512_shuffle_i32x4(left_even, right_even, 0x88);
    x[4 + j] = _mm512_shuffle_i32x4(left_odd, right_odd, 0x88);
    x[8 + j] = _mm512_shuffle_i32x4(left_even, right_even, 0xdd);
    x[12 + j] = _mm512_shuffle_i32x4(left_odd, right_odd, 0xdd);
  }
}

// Lanes whose depth is contiguous: a pair is 32 bits already, 16 x 16 of them change places.
void pack_along_depth(const uint16_t* from, int64_t stride, int64_t lanes, int64_t depth, Panels to) {
  for (int64_t k = 0; k < depth; k += 2 * kLanes) {
    const __mmask32 some = first_lanes(depth - k);
    __m512i x[16];
    for (int64_t i = 0; i < kLanes; ++i) {
      x[i] = i < lanes ? _mm512_maskz_loadu_epi16(some, from + i * stride + k) : _mm512_setzero_si512();
    }
    transpose(x);
    const int64_t pairs = least(kLanes, (depth - k + 1) / 2);
    for (int64_t p = 0; p < pairs; ++p) to.put(k / 2 + p, x[p]);
  }
}

// Depths whose lanes are contiguous: neighbours in depth are interleaved.
__m512i interleaved(const uint16_t* even, const uint16_t* odd, __mmask16 some) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, even));
  if (odd == nullptr) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, odd)), 16));
}

// Packs lanes [lane, lane + lanes) and depths [k, k + depth) of a factor into panels of `width`; lanes past the end
// are 0.
template <int64_t width>
void pack(const Factor& f, int64_t lane, int64_t lanes, int64_t k, int64_t depth, uint32_t* panels) {
  const int64_t pairs = (depth + 1) / 2, panel = pairs * width;
  const uint16_t* from = f.at + lane * f.lane_stride + k * f.depth_stride;
  const auto group = [&](int64_t i) -> Panels {  // of lanes i .. i + 15
    const int64_t j = i + kLanes / 2;
    return {panels + i / width * panel + i % width, panels + j / width * panel + j % width, width};
  };
  if (f.depth_stride == 1) {
    for (int64_t i = 0; i < lanes; i += kLanes) {
      pack_along_depth(from + i * f.lane_stride, f.lane_stride, lanes - i, depth, group(i));
    }
    return;
  }
  // Two whole rows at a time: rows may lie a multiple of the cache's size apart, so that they push each other out.
  for (int64_t p = 0; p < pairs; ++p) {
    const uint16_t* even = from + 2 * p * f.depth_stride;
    const uint16_t* odd = 2 * p + 1 < depth ? even + f.depth_stride : nullptr;
    for (int64_t i = 0; i < lanes; i += kLanes) {
      const __mmask16 some = static_cast<__mmask16>(first_lanes(lanes - i));
      group(i).put(p, interleaved(even + i, odd == nullptr ? nullptr : odd + i, some));
    }
  }
}

// 16 numbers of a product, or the first of them.
inline __m512 read(const Product& c, __mmask16 some) {
  if (c.at != nullptr) return _mm512_maskz_loadu_ps(some, c.at);
  const __m512i upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, c.upper));
  const __m512i lower = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, c.lower));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(upper, 16), lower));
}
inline void write(const Product& c, __mmask16 some, __m512 x) {
  if (c.at != nullptr) {
    _mm512_mask_storeu_ps(c.at, some, x);
    return;
  }
  const __m512i bits = _mm512_castps_si512(x);
  _mm256_mask_storeu_epi16(c.upper, some, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  _mm256_mask_storeu_epi16(c.lower, some, _mm512_cvtepi32_epi16(bits));
}
inline void fetch(const Product& c) {
  if (c.at != nullptr) {
    _mm_prefetch(c.at, _MM_HINT_T0);
  } else {
    _mm_prefetch(c.upper, _MM_HINT_T0);
    _mm_prefetch(c.lower, _MM_HINT_T0);
  }
}

// One tile of the product, or its first `rows` and `columns`.
void tile(const uint32_t* a, const uint32_t* b, int64_t pairs, Product c, int64_t rows, int64_t columns, bool add) {
  __m512 sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < kTileVectors; ++j) sum[i][j] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < kTileRows && i < rows; ++i) {  // the product below hides how far away it lies
    for (int64_t j = 0; j < kTileVectors; ++j) fetch(c.from(i, j * kLanes));
  }
  for (int64_t p = 0; p < pairs; ++p, a += kTileRows, b += kTileColumns) {
    __m512bh right[kTileVectors];
#pragma GCC unroll 3
    for (int64_t j = 0; j < kTileVectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTileRows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 3
      for (int64_t j = 0; j < kTileVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int64_t j = 0; j < kTileVectors; ++j) {
      const __mmask16 some = static_cast<__mmask16>(first_lanes(columns - j * kLanes));
      const Product at = c.from(i, j * kLanes);
      write(at, some, (add ? read(at, some) : _mm512_setzero_ps()) + sum[i][j]);
    }
  }
}

}  // namespace

int64_t scratch_bytes() {
  return 2 * kDepth * (kRows + kLanes + kColumns + kTileColumns) + 64;
}

void gemm(Factor a, Factor b, int64_t M, int64_t N, int64_t K, Product c, bool add, void* scratch) {
  auto* const a_panels = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
  auto* const b_panels = a_panels + kDepth / 2 * (kRows + kLanes);
  const int64_t even_depth = whole((K + (K - 1) / kDepth) / ((K - 1) / kDepth + 1), 2 * kLanes);  // no thin last block
  for (int64_t k = 0; k < K; k += even_depth) {
    const int64_t depth = least(even_depth, K - k), pairs = (depth + 1) / 2;
    for (int64_t n = 0; n < N; n += kColumns) {
      const int64_t columns = least(kColumns, N - n);
      pack<kTileColumns>(b, n, columns, k, depth, b_panels);
      for (int64_t m = 0; m < M; m += kRows) {
        const int64_t rows = least(kRows, M - m);
        pack<kTileRows>(a, m, rows, k, depth, a_panels);
        for (int64_t j = 0; j < columns; j += kTileColumns) {
          for (int64_t i = 0; i < rows; i += kTileRows) {
            tile(a_panels + i * pairs, b_panels + j * pairs, pairs, c.from(m + i, n + j), rows - i, columns - j,
                 add || k > 0);
          }
        }
      }
    }
  }
}

}  // namespace fdfast::avx512bf16
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
