/* The compute seam on the CPU (see kernels/__init__.py): plain loops that the compiler vectorises, called by cpu.py.

   Requirements
     - sums are float64 and elements are computed in float64 as they are read, so that a mean of any size costs no accuracy;
     - x and dy are read once in each of the four functions, the result is written once, nothing of their size is allocated;
     - one library for every x86-64 processor, on the OpenMP runtime that it is given: it links none;
     - NaN and infinity stay in their channel; sizes may be 0; indices are 64 bits wide.

   Legend: x, dy, y and dx are (N, C, S) in memory: NC* contiguous, or channels_last and (N, C) with S = 1 and rows as N. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16   /* independent partial sums along contiguous values */
#define TILE 4     /* rows read together, so that what is kept of the channels is read and written once for them */
#define CHUNK 128  /* rows summed before they are added to the sums, whose rounding errors grow with the number of terms */
#define AHEAD 4096 /* bytes, at least, that rows are prefetched ahead */
#define GRAIN 14   /* a thread has 2^14 values or more */

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 }; /* as in cpu.py */

typedef struct { void *data; int64_t dtype; } Vector; /* (C,); data NULL: none */
/* What cpu.py packs; 0 where a function has no use for it. */
typedef struct {
    int64_t n, c, s, dtype, threads;
    const void *x, *dy;
    void *out;                     /* y, dx */
    double *message;               /* (2C+1,) or (2C,) */
    double *mean, *invstd, *count; /* saved: (C,), (C,), () */
    Vector weight, bias;           /* γ and β; dγ and dβ of gradient_sums */
    Vector running_mean, running_var; /* from here on for normalize alone */
    int64_t *num_batches_tracked;
    double eps, momentum;
    int64_t cumulative; /* the momentum is 1 / num_batches_tracked */
} Call;

/* ---- elements ---- */
typedef union { float value; uint32_t bits; } Float;
INLINE float as_float(uint32_t bits) { return (Float){.bits = bits}.value; }
INLINE uint32_t as_bits(float value) { return (Float){.value = value}.bits; }
INLINE float half_to_float(uint16_t half) {
    const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    /* the digits of a subnormal behind the point of a normal number, which is then subtracted */
    const uint32_t subnormal = as_bits(as_float(magnitude + (113u << 23)) - as_float(113u << 23));
    const uint32_t normal = magnitude + (magnitude < 0xf800000u ? 112u << 23 : 224u << 23);
    return as_float((magnitude < 0x800000u ? subnormal : normal) | sign);
}
INLINE uint16_t float_to_half(float value) {
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    return (uint16_t)((magnitude < 0x38800000u ? subnormal : magnitude >= 0x47800000u ? special : normal) | sign);
}
INLINE uint16_t float_to_bfloat(float value) {
    const uint32_t bits = as_bits(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0 : rounded);
}
INLINE double load(const void *from, int64_t i, int64_t dtype) {
    if (dtype == FLOAT16) return half_to_float(((const uint16_t *)from)[i]);
    if (dtype == BFLOAT16) return as_float((uint32_t)((const uint16_t *)from)[i] << 16);
    return dtype == FLOAT32 ? ((const float *)from)[i] : ((const double *)from)[i];
}
INLINE void store(void *to, int64_t i, int64_t dtype, double value) {
    if (dtype == FLOAT16) ((uint16_t *)to)[i] = float_to_half((float)value);
    else if (dtype == BFLOAT16) ((uint16_t *)to)[i] = float_to_bfloat((float)value);
    else if (dtype == FLOAT32) ((float *)to)[i] = (float)value;
    else ((double *)to)[i] = value;
}
INLINE double load_or(Vector vector, int64_t i, double otherwise) {
    return vector.data ? load(vector.data, i, vector.dtype) : otherwise;
}

/* ---- threads and instruction sets ---- */
typedef struct Work {
    void (*part)(const struct Work *, int64_t); /* computes one of the parts */
    int64_t parts;
    const Call *call;
    const double *coefficients; /* of apply: slope, shift, gain, (3, C) */
    double *sums;               /* of sum: (2, C); by rows (parts, 2, 2, C), sums and those of a chunk */
} Work;

/* GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch has loaded; NULL: one thread. */
static struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*number)(void), (*count)(void);
} threads;
void syncbn_threads(const void *functions) { memcpy(&threads, functions, sizeof threads); }
static void run_parts(void *pointer) {
    const Work *work = pointer;
    for (int64_t part = threads.number(); part < work->parts; part += threads.count()) work->part(work, part);
}
static void run(Work *work) {
    if (work->parts > 1 && threads.parallel) threads.parallel(run_parts, work, (unsigned)work->parts, 0);
    else for (int64_t part = 0; part < work->parts; part++) work->part(work, part);
}

/* Of rows or of channels. */
static int64_t count_parts(const Call *call) {
    const int64_t divisible = call->s == 1 ? call->n : call->c;
    const int64_t most = divisible < call->threads ? divisible : call->threads, parts = call->n * call->c * call->s >> GRAIN;
    return parts > most ? most : parts > 1 ? parts : 1;
}

/* NAME(work, part) for each instruction set from the inlined NAME_body(work, part, dy, dtype); dy is NULL in forward. */
#define BODY(name, dtype) \
    (work->call->dy ? name##_body(work, part, work->call->dy, dtype) : name##_body(work, part, NULL, dtype))
#define DEFINE(name, suffix, attributes) \
    attributes static void name##suffix(const Work *work, int64_t part) { \
        if (work->call->dtype == FLOAT16) BODY(name, FLOAT16); \
        else if (work->call->dtype == BFLOAT16) BODY(name, BFLOAT16); \
        else if (work->call->dtype == FLOAT32) BODY(name, FLOAT32); \
        else BODY(name, FLOAT64); \
    }
#if defined(__x86_64__)
#define HAS __builtin_cpu_supports
#define DEFINE_ALL(name) \
    DEFINE(name, _512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))) \
    DEFINE(name, _256, __attribute__((target("avx2,fma")))) \
    DEFINE(name, _128, ) \
    static void name(const Work *work, int64_t part) { \
        if (HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")) name##_512(work, part); \
        else if (HAS("avx2") && HAS("fma")) name##_256(work, part); \
        else name##_128(work, part); \
    }
#else
#define DEFINE_ALL(name) DEFINE(name, , )
#endif

/* ---- sums: Σx and Σx², or Σdy and Σdy·(x − μ) ---- */
/* Adds element i to the sums a and b. */
#define ADD(a, b, i, mean) \
    do { \
        const double value = load(x, i, dtype), factor = dy ? load(dy, i, dtype) : value; \
        a += factor; \
        b += factor * (dy ? value - (mean) : value); \
    } while (0)

/* Over s contiguous values of one channel; added to sums[0] and sums[c]. */
INLINE void sum_plane(const void *x, const void *dy, int64_t i, int64_t s, double mean, int dtype, double *sums, int64_t c) {
    double first[LANES] = {0}, second[LANES] = {0}, a = 0, b = 0;
    const int64_t end = i + s;
    for (; i + LANES <= end && dtype == FLOAT16; i += LANES)
        for (int lane = 0; lane < LANES; lane++) ADD(first[lane], second[lane], i + lane, mean);
    for (; i + LANES <= end; i += LANES) {
        double value[LANES], factor[LANES]; /* one kind of work a loop: only float16 is vectorised with all in one */
        for (int lane = 0; lane < LANES; lane++) value[lane] = load(x, i + lane, dtype) - mean;
        for (int lane = 0; lane < LANES; lane++) factor[lane] = dy ? load(dy, i + lane, dtype) : value[lane];
        for (int lane = 0; lane < LANES; lane++) first[lane] += factor[lane], second[lane] += factor[lane] * value[lane];
    }
    for (; i < end; i++) ADD(a, b, i, mean);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) first[lane] += first[lane + half], second[lane] += second[lane + half];
    sums[0] += first[0] + a, sums[c] += second[0] + b;
}

/* Over the channels [from, to) of `tile` rows; added to first and second (C,). */
INLINE void sum_columns(const void *restrict x, const void *restrict dy, const double *restrict mean, int64_t start, int64_t c,
                        int tile, int64_t from, int64_t to, int dtype, double *restrict first, double *restrict second) {
#pragma GCC ivdep
    for (int64_t i = from; i < to; i++) {
        double a = 0, b = 0;
#pragma GCC unroll 8
        for (int row = 0; row < tile; row++) ADD(a, b, start + row * c + i, mean[i]);
        first[i] += a, second[i] += b;
    }
}

/* Over `tile` rows, while what comes behind them is prefetched in the order of memory; added to sums (2, C). */
INLINE void sum_tile(const void *x, const void *dy, const double *mean, int64_t start, int64_t c, int tile, int dtype,
                     double *sums) {
    const int size = dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2, line = 64 / size;
    const int64_t ahead = (tile * c * size > AHEAD ? tile * c * size : AHEAD) + start * size, whole = c - c % line;
    for (int64_t from = 0; from < whole; from += line) {
        for (int64_t i = tile * from; i < tile * (from + line); i += line) {
            __builtin_prefetch((const char *)x + i * size + ahead);
            if (dy) __builtin_prefetch((const char *)dy + i * size + ahead);
        }
        sum_columns(x, dy, mean, start, c, tile, from, from + line, dtype, sums, sums + c);
    }
    sum_columns(x, dy, mean, start, c, tile, whole, c, dtype, sums, sums + c);
}
INLINE void sum_body(const Work *work, int64_t part, const void *dy, int dtype) {
    const void *x = work->call->x;
    const double *mean = work->call->mean;
    const int64_t n = work->call->n, c = work->call->c, s = work->call->s, all = s == 1 ? n : c;
    const int64_t from = all * part / work->parts, to = all * (part + 1) / work->parts;
    for (int64_t row = 0; s != 1 && row < n; row++)
        for (int64_t i = from; i < to; i++) sum_plane(x, dy, (row * c + i) * s, s, dy ? mean[i] : 0, dtype, work->sums + i, c);
    if (s != 1) return;
    double *sums = work->sums + part * 4 * c, *chunk = sums + 2 * c;
    for (int64_t row = from; row < to;) {
        const int64_t end = row + CHUNK < to ? row + CHUNK : to;
        for (; row + TILE <= end; row += TILE) sum_tile(x, dy, mean, row * c, c, TILE, dtype, chunk);
        for (; row < end; row++) sum_tile(x, dy, mean, row * c, c, 1, dtype, chunk);
        for (int64_t i = 0; i < 2 * c; i++) sums[i] += chunk[i], chunk[i] = 0;
    }
}
DEFINE_ALL(sum)
/* The sums (2, C) to the message. -1 if there is no memory. */
static int sum_all(const Call *call) {
    const int64_t c = call->c;
    Work work = {.part = sum, .parts = count_parts(call), .call = call, .sums = call->message};
    memset(call->message, 0, sizeof(double) * 2 * c);
    if (call->s == 1 && !(work.sums = calloc(work.parts * 4 * c + 1, sizeof(double)))) return -1;
    run(&work);
    for (int64_t part = 0; part < work.parts && call->s == 1; part++)
        for (int64_t i = 0; i < 2 * c; i++) call->message[i] += work.sums[part * 4 * c + i];
    if (call->s == 1) free(work.sums);
    return 0;
}

/* ---- apply: out = x·slope + shift, and + dy·gain in backward ---- */
/* `size` values of each of `tile` rows, c values apart; the coefficients are those of `channel`, or from it on with step 1. */
INLINE void apply_run(const Work *work, int64_t start, int64_t size, int tile, int64_t channel, int step, const void *restrict dy,
                      int dtype) {
    const int64_t c = work->call->c;
    const double *restrict slope = work->coefficients + channel, *restrict shift = slope + c, *restrict gain = shift + c;
    const void *restrict x = work->call->x;
    void *restrict out = work->call->out;
#pragma GCC ivdep
    for (int64_t i = 0; i < size; i++)
#pragma GCC unroll 8
        for (int row = 0; row < tile; row++) {
            const int64_t at = start + row * c + i;
            const double value = load(x, at, dtype) * slope[i * step] + shift[i * step];
            store(out, at, dtype, dy ? value + load(dy, at, dtype) * gain[i * step] : value);
        }
}
INLINE void apply_body(const Work *work, int64_t part, const void *dy, int dtype) {
    const int64_t n = work->call->n, c = work->call->c, s = work->call->s, all = s == 1 ? n : c;
    const int64_t from = all * part / work->parts, to = all * (part + 1) / work->parts;
    int64_t row = s == 1 ? from : 0;
    for (; s != 1 && row < n; row++)
        for (int64_t i = from; i < to; i++) apply_run(work, (row * c + i) * s, s, 1, i, 0, dy, dtype);
    for (; s == 1 && c >= 1024 && row + TILE <= to; row += TILE) /* the coefficients exceed the first-level cache */
        apply_run(work, row * c, c, TILE, 0, 1, dy, dtype);
    for (; s == 1 && row < to; row++) apply_run(work, row * c, c, 1, 0, 1, dy, dtype);
}
DEFINE_ALL(apply)
static int apply_all(const Call *call, double *coefficients) {
    Work work = {.part = apply, .parts = count_parts(call), .call = call, .coefficients = coefficients};
    run(&work);
    free(coefficients);
    return 0;
}
/* ---- the seam; each function returns 0, or -1 if there is no memory ---- */
int syncbn_moments(const Call *call) {
    call->message[2 * call->c] = (double)call->n * (double)call->s;
    return sum_all(call);
}
INLINE void move(Vector running, int64_t i, double momentum, double value) {
    const double old = load_or(running, i, 0);
    if (running.data) store(running.data, i, running.dtype, old + momentum * (value - old));
}

int syncbn_normalize(const Call *call) {
    const int64_t c = call->c;
    const double count = call->message[2 * c], n = count < 1 ? 1 : count, unbias = count / (count < 2 ? 1 : count - 1);
    double momentum = call->momentum, *coefficients = malloc(sizeof(double) * (3 * c + 1));
    if (!coefficients) return -1;
    if (call->num_batches_tracked) *call->num_batches_tracked += count > 0;
    if (call->cumulative) momentum = 1 / (double)(*call->num_batches_tracked < 1 ? 1 : *call->num_batches_tracked);
    for (int64_t i = 0; i < c; i++) {
        const double mean = call->message[i] / n, square = call->message[c + i] / n - mean * mean;
        const double var = square < 0 ? 0 : square, invstd = 1 / sqrt(var + call->eps);
        call->mean[i] = mean, call->invstd[i] = invstd;
        coefficients[i] = invstd * load_or(call->weight, i, 1);
        coefficients[c + i] = load_or(call->bias, i, 0) - mean * coefficients[i];
        if (count > 0) move(call->running_mean, i, momentum, mean);
        if (count > 1) move(call->running_var, i, momentum, var * unbias);
    }
    *call->count = count;
    return apply_all(call, coefficients);
}
int syncbn_gradient_sums(const Call *call) {
    if (sum_all(call)) return -1;
    for (int64_t i = 0; i < call->c; i++) {
        store(call->weight.data, i, call->weight.dtype, call->message[call->c + i] * call->invstd[i]);
        store(call->bias.data, i, call->bias.dtype, call->message[i]);
    }
    return 0;
}
int syncbn_input_gradient(const Call *call) {
    const int64_t c = call->c;
    const double n = *call->count < 1 ? 1 : *call->count;
    double *coefficients = malloc(sizeof(double) * (3 * c + 1));
    if (!coefficients) return -1;
    for (int64_t i = 0; i < c; i++) {
        const double invstd = call->invstd[i], gain = invstd * load_or(call->weight, i, 1);
        const double slope = -gain * invstd * invstd * call->message[c + i] / n;
        coefficients[i] = slope;
        coefficients[c + i] = -gain * call->message[i] / n - slope * call->mean[i];
        coefficients[2 * c + i] = gain;
    }
    return apply_all(call, coefficients);
}
