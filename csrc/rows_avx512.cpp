// The row loops for AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx2"))), apply_to = function)
#else
#pragma GCC target("arch=skylake-avx512,prefer-vector-width=512")
#endif
#define FDFAST_ROWS avx512
#include "rows_kernel.hpp"
#include "fused_layers_kernel.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
