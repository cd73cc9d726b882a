// Code for an instruction set that not every CPU has, between RORO_BEGIN_TARGET(features) and RORO_END_TARGET.
// Pragmas take the place of -march, so that one binary runs everywhere.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#define RORO_AVX2 "avx2,fma,f16c"

#define RORO_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define RORO_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define RORO_BEGIN_TARGET(features) \
  RORO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RORO_END_TARGET RORO_PRAGMA(clang attribute pop)
#else
#define RORO_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512"
#define RORO_BEGIN_TARGET(features) RORO_PRAGMA(GCC push_options) RORO_PRAGMA(GCC target(features))
#define RORO_END_TARGET RORO_PRAGMA(GCC pop_options)
#endif

#define RORO_AVX512_BF16 RORO_AVX512 ",avx512bf16"

#endif
