/* The loops by 256 bits: AVX2. */

#include "cpu.h"
#if defined(__x86_64__)
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SET 256
#include "cpu_half.h"
#include "cpu_loops.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
