/* The compute seam on the CPU (see kernels/__init__.py): plain loops that the compiler vectorises, called by cpu.py.

   Requirements
     - sums are float64; elements are computed in float64, or in float32 about a mean that is a pair hi + lo;
     - x and dy are read once in each of the four functions, the result is written once, nothing of their size is allocated;
     - one library for every x86-64 processor, on the OpenMP runtime that it is given: it links none;
     - NaN and infinity stay in their channel; sizes may be 0; indices are 64 bits wide.

   Legend: x, dy, y and dx are (N, C, S) in memory: NC* contiguous, or channels_last and (N, C) with S = 1 and rows as N. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define TILE 4     /* rows read together, so that what is kept of the channels is read and written once for them */
#define CHUNK 128  /* rows summed before they are added to the sums, whose rounding errors grow with the number of terms */
#define BLOCK 256  /* float16 values of a row, no more, converted at once */
#define AHEAD 4096 /* bytes, at least, that rows are prefetched ahead */
#define BACK 16    /* elements, 2^16, of the rows that the way back takes at once */
#define GRAIN 14   /* a thread has 2^14 values or more */

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 }; /* as in cpu.py */
#define SIZE(dtype) ((dtype) == FLOAT64 ? 8 : (dtype) == FLOAT32 ? 4 : 2)
typedef struct { void *data; int64_t dtype; } Vector; /* (C,); data NULL: none */
/* What cpu.py packs; 0 where a function has no use for it. */
typedef struct {
    int64_t n, c, s, dtype, threads;
    const void *x, *dy;
    void *out;                     /* y, dx */
    double *message;               /* (2C+1,) or (2C,) */
    double *mean, *invstd, *count; /* saved: (C,), (C,), () */
    Vector weight, bias;           /* γ and β; dγ and dβ of gradient_sums */
    Vector running_mean, running_var;
    int64_t *num_batches_tracked;
    double eps, momentum;
    int64_t cumulative;            /* the momentum is 1 / num_batches_tracked; this and the last four for normalize alone */
} Call;
typedef struct {
    const Call *call;
    const double *coefficients; /* of apply: slope, shift, gain, (3, C) */
    double *sums;               /* of sum, else NULL: (2, C); by rows (parts, 2, 2, C), sums and those of a chunk */
    int64_t parts;              /* of channels, or of rows if S = 1 */
} Work;

/* ---- elements ---- */
typedef union { float value; uint32_t bits; } Float;
INLINE uint16_t to_bfloat(float value) {
    const uint32_t bits = (Float){.value = value}.bits, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0 : rounded);
}
#if defined(__x86_64__)
#include <immintrin.h>
#define HAS __builtin_cpu_supports
#define HALVES __attribute__((target("avx,f16c"), noipa)) static void /* else gcc 12 does not vectorise the loops after them */
/* float16 by the processor's own conversion */
HALVES from_halves(float *to, const uint16_t *from, int64_t n) {
    for (; n >= 8; n -= 8, to += 8, from += 8) _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
    for (int64_t i = 0; i < n; i++) to[i] = _cvtsh_ss(from[i]);
}
HALVES to_halves(uint16_t *to, const float *from, int64_t n) {
    for (; n >= 8; n -= 8, to += 8, from += 8) _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(_mm256_loadu_ps(from), 0));
    for (int64_t i = 0; i < n; i++) to[i] = _cvtss_sh(from[i], 0);
}
#else
#define HAS(feature) 0
#define from_halves(to, from, n) abort() /* cpu.py asks first */
#define to_halves(to, from, n) abort()
#endif
int syncbn_has_float16(void) { return !!HAS("f16c"); }
/* Elements that are no float16; those of vectors may be. */
INLINE double load(const void *from, int64_t i, int64_t dtype) {
    if (dtype == BFLOAT16) return (Float){.bits = (uint32_t)((const uint16_t *)from)[i] << 16}.value;
    return dtype == FLOAT32 ? ((const float *)from)[i] : ((const double *)from)[i];
}
INLINE void store(void *to, int64_t i, int64_t dtype, double value) {
    if (dtype == BFLOAT16) ((uint16_t *)to)[i] = to_bfloat((float)value);
    else if (dtype == FLOAT32) ((float *)to)[i] = (float)value;
    else ((double *)to)[i] = value;
}
static double get(Vector from, int64_t i, double otherwise) {
    float value;
    if (!from.data) return otherwise;
    if (from.dtype != FLOAT16) return load(from.data, i, from.dtype);
    from_halves(&value, (const uint16_t *)from.data + i, 1);
    return value;
}
static void set(Vector to, int64_t i, double value) {
    const float rounded = (float)value;
    if (to.dtype == FLOAT16) to_halves((uint16_t *)to.data + i, &rounded, 1);
    else store(to.data, i, to.dtype, value);
}

/* ---- loops; dy is NULL in forward ---- */
enum { SUM_PLANE, SUM_ROWS, APPLY_PLANE, APPLY_ROWS };
/* Adds element i to the sums a and b: Σx and Σx², or Σdy and Σdy·(x − μ). */
#define ADD(a, b, i, mean) { \
    const double value = load(x, i, dtype), factor = dy ? load(dy, i, dtype) : value; \
    a += factor, b += factor * (dy ? value - (mean) : value); }
INLINE void sum_plane(const void *x, const void *dy, int64_t n, double mean, double *sums, int64_t c, int dtype) {
    double a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = 0; i < n; i++) ADD(a, b, i, mean)
    sums[0] += a, sums[c] += b;
}
INLINE void sum_rows(const void *restrict x, const void *restrict dy, int64_t stride, int tile, int64_t n,
                     const double *restrict mean, double *restrict first, int64_t c, int dtype) {
    double *restrict second = first + c;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
        double a = 0, b = 0;
#pragma GCC unroll 8
        for (int row = 0; row < tile; row++) ADD(a, b, row * stride + i, mean[i])
        first[i] += a, second[i] += b;
    }
}
/* out = x·slope + shift, and + dy·gain in backward; in floats about the mean, what they cannot hold of it being in the shift. */
INLINE void apply_plane(const void *restrict x, const void *restrict dy, void *restrict out, int64_t n, double mean, double slope,
                        double shift, double gain, int dtype) {
    const float middle = (float)mean, times = (float)slope, plus = (float)(shift + slope * middle), more = (float)gain;
    for (int64_t i = 0; i < n && dtype == FLOAT64; i++)
        store(out, i, dtype, load(x, i, dtype) * slope + shift + (dy ? load(dy, i, dtype) * gain : 0));
    for (int64_t i = 0; i < n && dtype != FLOAT64; i++) {
        const float value = ((float)load(x, i, dtype) - middle) * times + plus;
        store(out, i, dtype, dy ? value + (float)load(dy, i, dtype) * more : value);
    }
}
/* In doubles, which in a loop that reads coefficients too is faster where `out` is not in a cache. */
INLINE void apply_rows(const void *restrict x, const void *restrict dy, void *restrict out, int64_t stride, int tile, int64_t n,
                       const double *restrict slope, int64_t c, int dtype) {
    const double *restrict shift = slope + c, *restrict gain = shift + c;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 8
        for (int row = 0; row < tile; row++) {
            const int64_t k = row * stride + i;
            const double value = load(x, k, dtype) * slope[i] + shift[i];
            store(out, k, dtype, dy ? value + load(dy, k, dtype) * gain[i] : value);
        }
}
/* Of n elements of `tile` rows, from element `start` and channel i on; float16 by blocks that are floats for a while. */
INLINE void compute(int kind, const Work *work, int64_t start, int tile, int64_t n, int64_t i, double *sums, const void *gradient,
                    int dtype) {
    const int halves = dtype == FLOAT16, type = halves ? FLOAT32 : dtype, rows = kind == SUM_ROWS || kind == APPLY_ROWS;
    const int64_t c = work->call->c, most = halves ? BLOCK : n;
    float xs[TILE * BLOCK], dys[TILE * BLOCK], outs[TILE * BLOCK];
    for (int64_t from = 0, size; from < n; from += most) {
        size = n - from < most ? n - from : most;
        const int64_t at = (start + from) * SIZE(dtype), stride = halves ? size : c, channel = rows ? i + from : i;
        const double *mean = work->call->mean + channel, *k = work->coefficients + channel;
        const void *x = (const char *)work->call->x + at, *dy = gradient ? (const char *)gradient + at : NULL;
        void *out = (char *)work->call->out + at;
        for (int row = 0; halves && row < tile; row++) {
            from_halves(xs + row * size, (const uint16_t *)x + row * c, size);
            if (dy) from_halves(dys + row * size, (const uint16_t *)dy + row * c, size);
        }
        if (halves) x = xs, dy = dy ? dys : NULL, out = outs;
        if (kind == SUM_PLANE) sum_plane(x, dy, size, dy ? *mean : 0, sums + channel, c, type);
        else if (kind == SUM_ROWS) sum_rows(x, dy, stride, tile, size, mean, sums + channel, c, type);
        else if (kind == APPLY_PLANE) apply_plane(x, dy, out, size, *mean, k[0], k[c], k[2 * c], type);
        else apply_rows(x, dy, out, stride, tile, size, k, c, type);
        for (int row = 0; halves && kind >= APPLY_PLANE && row < tile; row++)
            to_halves((uint16_t *)((char *)work->call->out + at) + row * c, outs + row * size, size);
    }
}

/* Sums of rows, while what comes behind them is prefetched in the order of memory. */
INLINE void sum_tile(const Work *work, int64_t start, int tile, double *sums, const void *dy, int dtype) {
    const int size = SIZE(dtype), line = 64 / size, some = dtype == FLOAT16 ? BLOCK : line;
    const int64_t c = work->call->c, whole = c - c % some, next = tile * c * size;
    const int64_t ahead = start * size + (next > AHEAD ? next : AHEAD);
    for (int64_t from = 0; from < whole; from += some) {
        for (int64_t i = tile * from; i < tile * (from + some); i += line) {
            __builtin_prefetch((const char *)work->call->x + i * size + ahead);
            if (dy) __builtin_prefetch((const char *)dy + i * size + ahead);
        }
        compute(SUM_ROWS, work, start + from, tile, some, from, sums, dy, dtype);
    }
    compute(SUM_ROWS, work, start + whole, tile, c - whole, whole, sums, dy, dtype);
}
/* One of the parts. */
INLINE void run_body(const Work *work, int64_t part, const void *dy, int dtype) {
    const int64_t n = work->call->n, c = work->call->c, s = work->call->s, all = s == 1 ? n : c;
    const int64_t from = all * part / work->parts, to = all * (part + 1) / work->parts;
    for (int64_t row = 0; s != 1 && row < n; row++) /* apply goes back: what was read last may still be in a cache */
        for (int64_t i = from; i < to; i++)
            if (work->sums) compute(SUM_PLANE, work, (row * c + i) * s, 1, s, i, work->sums, dy, dtype);
            else compute(APPLY_PLANE, work, ((n - 1 - row) * c + i) * s, 1, s, i, NULL, dy, dtype);
    for (int64_t row = from, end; s == 1 && work->sums && row < to;) {
        double *sums = work->sums + part * 4 * c, *chunk = sums + 2 * c;
        end = row + CHUNK < to ? row + CHUNK : to;
        for (; row + TILE <= end; row += TILE) sum_tile(work, row * c, TILE, chunk, dy, dtype);
        for (; row < end; row++) sum_tile(work, row * c, 1, chunk, dy, dtype);
        for (int64_t i = 0; i < 2 * c; i++) sums[i] += chunk[i], chunk[i] = 0;
    }
    const int64_t some = ((1 << BACK) / (c ? c : 1) + TILE) / TILE * TILE;
    for (int64_t end = to, row; s == 1 && !work->sums && end > from; end -= some) {
        row = end - some < from ? from : end - some;
        for (; c >= 1024 && row + TILE <= end; row += TILE) /* the coefficients exceed the nearest cache */
            compute(APPLY_ROWS, work, row * c, TILE, c, 0, NULL, dy, dtype);
        for (; row < end; row++) compute(APPLY_ROWS, work, row * c, 1, c, 0, NULL, dy, dtype);
    }
}

/* ---- instruction sets and threads ---- */
#define BODY(dtype) (work->call->dy ? run_body(work, part, work->call->dy, dtype) : run_body(work, part, NULL, dtype))
#define DEFINE(name, attributes) attributes static void name(const Work *work, int64_t part) { \
        if (work->call->dtype == FLOAT32) BODY(FLOAT32); \
        else if (work->call->dtype == FLOAT64) BODY(FLOAT64); \
        else if (work->call->dtype == BFLOAT16) BODY(BFLOAT16); \
        else BODY(FLOAT16); }
DEFINE(run_128, )
#if defined(__x86_64__)
DEFINE(run_512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
DEFINE(run_256, __attribute__((target("avx2,fma"))))
#else
#define run_512 run_128
#define run_256 run_128
#endif
static void run_part(const Work *work, int64_t part) {
    const int planes = !work->sums && work->call->s != 1; /* written slowly by 512 bits where memory is not in a cache */
    if (!planes && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")) run_512(work, part);
    else if (HAS("avx2") && HAS("fma")) run_256(work, part);
    else run_128(work, part);
}
/* GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch has loaded; NULL: one thread. */
static struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*number)(void), (*count)(void);
} threads;
void syncbn_threads(const void *functions) { memcpy(&threads, functions, sizeof threads); }
static void run_thread(void *work) {
    for (int64_t part = threads.number(); part < ((Work *)work)->parts; part += threads.count()) run_part(work, part);
}
/* Sums to the message, or, with coefficients, which are freed, apply. -1 if there is no memory. */
static int run(const Call *call, double *coefficients) {
    const int64_t c = call->c, divisible = call->s == 1 ? call->n : c, worth = call->n * c * call->s >> GRAIN;
    const int64_t most = divisible < call->threads ? divisible : call->threads, parts = worth < most ? worth : most;
    Work work = {call, coefficients, coefficients ? NULL : call->message, parts > 1 ? parts : 1};
    const int by_rows = work.sums && call->s == 1;
    if (work.sums) memset(work.sums, 0, sizeof(double) * 2 * c);
    if (by_rows && !(work.sums = calloc(work.parts * 4 * c + 1, sizeof(double)))) return -1;
    if (work.parts > 1 && threads.parallel) threads.parallel(run_thread, &work, (unsigned)work.parts, 0);
    else for (int64_t part = 0; part < work.parts; part++) run_part(&work, part);
    for (int64_t part = 0; by_rows && part < work.parts; part++)
        for (int64_t i = 0; i < 2 * c; i++) call->message[i] += work.sums[part * 4 * c + i];
    free(by_rows ? work.sums : coefficients);
    return 0;
}

/* ---- the seam; each function returns 0, or -1 if there is no memory ---- */
int syncbn_moments(const Call *call) {
    call->message[2 * call->c] = (double)call->n * (double)call->s;
    return run(call, NULL);
}
static void move(Vector running, int64_t i, double momentum, double value) {
    if (running.data) set(running, i, get(running, i, 0) + momentum * (value - get(running, i, 0)));
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
        coefficients[i] = invstd * get(call->weight, i, 1);
        coefficients[c + i] = get(call->bias, i, 0) - mean * coefficients[i];
        if (count > 0) move(call->running_mean, i, momentum, mean);
        if (count > 1) move(call->running_var, i, momentum, var * unbias);
    }
    *call->count = count;
    return run(call, coefficients);
}
int syncbn_gradient_sums(const Call *call) {
    if (run(call, NULL)) return -1;
    for (int64_t i = 0; i < call->c; i++) {
        set(call->weight, i, call->message[call->c + i] * call->invstd[i]);
        set(call->bias, i, call->message[i]);
    }
    return 0;
}
int syncbn_input_gradient(const Call *call) {
    const int64_t c = call->c;
    const double n = *call->count < 1 ? 1 : *call->count;
    double *coefficients = malloc(sizeof(double) * (3 * c + 1));
    if (!coefficients) return -1;
    for (int64_t i = 0; i < c; i++) {
        const double invstd = call->invstd[i], gain = invstd * get(call->weight, i, 1);
        const double slope = -gain * invstd * invstd * call->message[c + i] / n;
        coefficients[i] = slope;
        coefficients[c + i] = -gain * call->message[i] / n - slope * call->mean[i];
        coefficients[2 * c + i] = gain;
    }
    return run(call, coefficients);
}
