// The row loops for AVX2 and FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("arch=haswell")
#endif
#define FDFAST_ROWS avx2
#include "rows_kernel.hpp"
#include "fused_layers_kernel.hpp"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
