/* The loops by 512 bits: AVX-512. */

#include "cpu.h"
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define SET 512
#include "cpu_half.h"
#include "cpu_loops.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
