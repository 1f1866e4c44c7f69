/* What the seam (cpu.c) and the loops of each instruction set (cpu_loops.h) share: a call, a pass over it, an element. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 }; /* as in cpu.py */
#define WIDE(dtype) ((dtype) == FLOAT64 ? FLOAT64 : FLOAT32)
#define PAGE 4096 /* bytes; rows of channels that are shorter are taken by fewer */
#define SIZE(dtype) ((dtype) == FLOAT64 ? 8 : (dtype) == FLOAT32 ? 4 : 2)
typedef struct { void *data; int64_t dtype; } Vector; /* (C,); data NULL: none */
/* What cpu.py packs; 0 where a function has no use for it. */
typedef struct {
    int64_t n, c, s, dtype, threads, relu; /* relu: there is one behind the layer */
    const void *in[3];             /* x; dy, or what is added before the ReLU; y, for gradient_sums if something was added */
    void *out;                     /* y, dx; what a ReLU leaves of dy in gradient_sums, if something was added */
    double *message;               /* (2C+1,) or (2C,) */
    double *statistics;            /* (2C+1,) [mean, invstd, n], saved */
    Vector weight, bias;           /* γ and β */
    Vector first, second;          /* running mean and variance of normalize; dγ and dβ of gradient_sums */
    int64_t *num_batches_tracked;
    double eps, momentum;
    int64_t cumulative; /* the momentum is 1 / num_batches_tracked; this and the last three for normalize alone */
} Call;

/* What a pass over the elements does; those from SUMS on are of backward. */
enum { MOMENTS, NORMALIZE, RELU, ADD_RELU, SUMS, SUMS_BY_X, SUMS_BY_Y, GRADIENT, GRADIENT_BY_X, PASSES };
#define IS_SUM(pass) ((pass) == MOMENTS || ((pass) >= SUMS && (pass) <= SUMS_BY_Y))
typedef struct {
    const Call *call;
    int pass, streamed;       /* whether the result is written past the caches */
    const void *coefficients; /* (6, C) as enumerated, of WIDE(dtype); NULL: a sum that needs none */
    double *sums;             /* of a sum, else NULL: (2, C); of rows of channels (parts, 2, 2, C), sums and those of a chunk */
    int64_t parts;            /* of channels, or of rows if S = 1 */
} Work;
/* A channel's (x − mean)·slope + addend, what floats cannot hold of the mean being in the addend; BEFORE: a ReLU's input. */
enum { MEAN, SLOPE, ADDEND, BEFORE_SLOPE, BEFORE_ADDEND, GAIN };

/* One of the parts of a pass, by an instruction set: by dtype and pass. */
typedef void Body(const Work *work, int64_t part);
extern Body *const syncbn_128[FLOAT64 + 1][PASSES] __attribute__((visibility("hidden")));
#if defined(__x86_64__)
#include <immintrin.h>
#define HAS __builtin_cpu_supports
#define HALF __attribute__((target("avx,f16c"), unused)) static
HALF float from_half(uint16_t bits) { return _cvtsh_ss(bits); }
HALF uint16_t to_half(float value) { return _cvtss_sh(value, 0); }
extern Body *const syncbn_256[FLOAT64 + 1][PASSES] __attribute__((visibility("hidden")));
extern Body *const syncbn_512[FLOAT64 + 1][PASSES] __attribute__((visibility("hidden")));
#else
#define HAS(feature) 0
#define from_half(bits) (abort(), (float)(bits)) /* cpu.py asks first */
#define to_half(value) (abort(), (uint16_t)(value))
#define syncbn_256 syncbn_128
#define syncbn_512 syncbn_128
#endif

typedef union { float value; uint32_t bits; } Float;
typedef union { double value; uint64_t bits; } Double;
/* The value, or 0 if `not`: by its bits, or gcc loads it after the comparison. */
INLINE double unless(int not, double value, int type) {
    if (type == FLOAT64) return (Double){.bits = (Double){.value = value}.bits & (not ? 0 : ~(uint64_t)0)}.value;
    return (Float){.bits = (Float){.value = (float)value}.bits & (not ? 0 : ~0u)}.value;
}
INLINE uint16_t to_bfloat(float value) {
    const uint32_t bits = (Float){.value = value}.bits, rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((value != value ? 0x7fc00000u : rounded) >> 16); /* chosen before it is packed, or both would be */
}
/* Half precision, with 0 for what is below it: by the bits, since of floats clang makes a maximum, whose zero can be negative. */
#define NEGATIVES(type) ((type) == FLOAT16 ? 0x7c00 : 0x7f80) /* from 0x8000 on as many bits are of -0 to -infinity */
INLINE uint16_t at_least_0(uint16_t bits, int type) { return (uint16_t)(bits - 0x8000) <= NEGATIVES(type) ? 0 : bits; }
INLINE double load(const void *from, int64_t i, int64_t type) {
    if (type == FLOAT16) return from_half(((const uint16_t *)from)[i]);
    if (type == BFLOAT16) return (Float){.bits = (uint32_t)((const uint16_t *)from)[i] << 16}.value;
    return type == FLOAT32 ? ((const float *)from)[i] : ((const double *)from)[i];
}
INLINE void store(void *to, int64_t i, int64_t type, double value) {
    if (type == FLOAT16) ((uint16_t *)to)[i] = to_half((float)value);
    else if (type == BFLOAT16) ((uint16_t *)to)[i] = to_bfloat((float)value);
    else if (type == FLOAT32) ((float *)to)[i] = (float)value;
    else ((double *)to)[i] = value;
}
