/* The compute seam on the CPU (see kernels/__init__.py): plain loops that the compiler vectorises, called by cpu.py.

   Requirements
     - sums are float64; elements are computed in float64, or in float32 about a mean that is a pair hi + lo;
     - x and dy are read once in each of the four functions, the result is written once, nothing of their size is allocated;
     - the ReLU of backward lets pass what that of forward did, to the bit: both come from one expression;
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
#define WIDE(dtype) ((dtype) == FLOAT64 ? FLOAT64 : FLOAT32) /* the dtype that is computed in */
#define SIZE(dtype) ((dtype) == FLOAT64 ? 8 : (dtype) == FLOAT32 ? 4 : 2)
#define LEAST(dtype) ((dtype) == FLOAT16 ? 0x1p-25f : (dtype) == BFLOAT16 ? 0x1p-134f : 0)
typedef struct { void *data; int64_t dtype; } Vector; /* (C,); data NULL: none */
/* What cpu.py packs; 0 where a function has no use for it. */
typedef struct {
    int64_t n, c, s, dtype, threads;
    int64_t relu;                  /* behind the layer */
    const void *x, *dy, *with;     /* with: what is added before the ReLU; y in gradient_sums, if something was */
    void *out;                     /* y, dx; what a ReLU leaves of dy in gradient_sums, if something was added */
    double *message;               /* (2C+1,) or (2C,) */
    double *mean, *invstd, *count; /* saved: (C,), (C,), () */
    Vector weight, bias;           /* γ and β */
    Vector first, second;          /* running mean and variance of normalize; dγ and dβ of gradient_sums */
    int64_t *num_batches_tracked;
    double eps, momentum;
    int64_t cumulative; /* the momentum is 1 / num_batches_tracked; this and the last three for normalize alone */
} Call;
/* What a pass over the elements does; those from SUMS on are of backward. */
enum { MOMENTS, NORMALIZE, RELU, ADD_RELU, SUMS, SUMS_BY_X, SUMS_BY_Y, GRADIENT, GRADIENT_BY_X };
#define IS_SUM(pass) ((pass) == MOMENTS || ((pass) >= SUMS && (pass) <= SUMS_BY_Y))
typedef struct {
    const Call *call;
    int pass;
    const void *coefficients; /* (6, C) as enumerated, of the dtype that is computed in; NULL: a sum that needs none */
    double *sums;             /* of a sum, else NULL: (2, C); by rows (parts, 2, 2, C), sums and those of a chunk */
    int64_t parts;            /* of channels, or of rows if S = 1 */
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

/* ---- loops ---- */
typedef struct { /* where one begins */
    const void *x, *dy, *with, *coefficients;
    void *out;
    const double *mean;
    double *sums;
    int64_t c;
    float least; /* the largest value that is stored as 0 */
} Place;
/* A channel's (x − mean)·slope + addend, what floats cannot hold of the mean being in the addend; BEFORE: what a ReLU is given. */
enum { MEAN, SLOPE, ADDEND, BEFORE_SLOPE, BEFORE_ADDEND, GAIN };
typedef struct { double mean, slope, addend; } Line;
INLINE double coefficient(Place p, int64_t i, int which, int dtype) { return load(p.coefficients, which * p.c + i, WIDE(dtype)); }
INLINE Line line(Place p, int64_t i, int slope, int dtype) {
    return (Line){coefficient(p, i, MEAN, dtype), coefficient(p, i, slope, dtype), coefficient(p, i, slope + 1, dtype)};
}
INLINE double on(Line l, double x, int dtype) {
    if (dtype == FLOAT64) return (x - l.mean) * l.slope + l.addend;
    return ((float)x - (float)l.mean) * (float)l.slope + (float)l.addend;
}
/* dy, and 0 where the ReLU did: by what it was given, or by y if something was added. */
INLINE double gradient(Place p, int64_t i, double given, int dtype, int pass) {
    const double dy = load(p.dy, i, dtype), y = pass == SUMS_BY_Y ? load(p.with, i, dtype) : given;
    return pass != SUMS && pass != GRADIENT && (dtype == FLOAT64 ? y <= 0 : (float)y <= p.least) ? 0 : dy;
}
/* Stores element i of y or dx: with gain·dy in backward, or with what is added before a ReLU. */
INLINE void apply(Place p, int64_t i, Line here, Line before, double gain, int dtype, int pass) {
    const double x = load(p.x, i, dtype), given = pass == GRADIENT_BY_X ? on(before, x, dtype) : 0;
    const double more = pass >= GRADIENT ? gradient(p, i, given, dtype, pass) : pass == ADD_RELU ? load(p.with, i, dtype) : 0;
    double value = on(here, x, dtype);
    if (pass >= GRADIENT) value = dtype == FLOAT64 ? value + more * gain : (float)value + (float)more * (float)gain;
    if (pass == ADD_RELU) value = dtype == FLOAT64 ? value + more : (float)value + (float)more;
    store(p.out, i, dtype, (pass == RELU || pass == ADD_RELU) && (dtype == FLOAT64 ? value : (float)value) <= 0 ? 0 : value);
}
/* Adds element i to the sums a and b: Σx and Σx², or Σdy and Σdy·(x − μ). */
#define ADD(a, b, i, mean, given) { \
    const double value = load(p.x, i, dtype), factor = pass == MOMENTS ? value : gradient(p, i, given, dtype, pass); \
    if (pass == SUMS_BY_Y) store(p.out, i, dtype, factor); \
    a += factor, b += factor * (pass == MOMENTS ? value : value - (mean)); }
INLINE void sum_plane(Place p, int64_t n, int dtype, int pass) {
    const double mean = pass == MOMENTS ? 0 : *p.mean;
    const Line before = pass == SUMS_BY_X ? line(p, 0, BEFORE_SLOPE, dtype) : (Line){0};
    double a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = 0; i < n; i++) ADD(a, b, i, mean, on(before, value, dtype))
    p.sums[0] += a, p.sums[p.c] += b;
}
INLINE void sum_rows(Place p, int64_t stride, int tile, int64_t n, int dtype, int pass) {
    double *restrict first = p.sums, *restrict second = first + p.c;
    const double *restrict mean = p.mean;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
        double a = 0, b = 0;
#pragma GCC unroll 8
        for (int row = 0; row < tile; row++)
            ADD(a, b, row * stride + i, mean[i], pass == SUMS_BY_X ? on(line(p, i, BEFORE_SLOPE, dtype), value, dtype) : 0)
        first[i] += a, second[i] += b;
    }
}
INLINE void apply_plane(Place p, int64_t n, int dtype, int pass) {
    const Line here = line(p, 0, SLOPE, dtype), before = pass == GRADIENT_BY_X ? line(p, 0, BEFORE_SLOPE, dtype) : here;
    const double gain = pass >= GRADIENT ? coefficient(p, 0, GAIN, dtype) : 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) apply(p, i, here, before, gain, dtype, pass);
}
INLINE void apply_rows(Place p, int64_t stride, int tile, int64_t n, int dtype, int pass) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 8
        for (int row = 0; row < tile; row++) {
            const Line here = line(p, i, SLOPE, dtype), before = pass == GRADIENT_BY_X ? line(p, i, BEFORE_SLOPE, dtype) : here;
            apply(p, row * stride + i, here, before, pass >= GRADIENT ? coefficient(p, i, GAIN, dtype) : 0, dtype, pass);
        }
}
INLINE void *by(const void *from, int64_t bytes) { return (void *)((intptr_t)from + bytes); } /* from: may be NULL */
/* Of n elements of `tile` rows, from element `start` and channel i on; float16 by blocks that are floats for a while. */
INLINE void compute(const Work *work, int64_t start, int tile, int64_t n, int64_t i, double *sums, int rows, int dtype, int pass) {
    const Call *call = work->call;
    const int halves = dtype == FLOAT16, type = halves ? FLOAT32 : dtype;
    const int64_t c = call->c, most = halves ? BLOCK : n;
    float xs[TILE * BLOCK], dys[TILE * BLOCK], withs[TILE * BLOCK], outs[TILE * BLOCK];
    for (int64_t from = 0, size; from < n; from += most) {
        size = n - from < most ? n - from : most;
        const int64_t at = (start + from) * SIZE(dtype), stride = halves ? size : c, channel = rows ? i + from : i;
        Place p = {by(call->x, at), by(call->dy, at), by(call->with, at), by(work->coefficients, channel * SIZE(WIDE(dtype))),
                   by(call->out, at), by(call->mean, channel * 8), by(sums, channel * 8), c, LEAST(dtype)};
        for (int row = 0; halves && row < tile; row++) {
            from_halves(xs + row * size, (const uint16_t *)p.x + row * c, size);
            if (pass >= SUMS) from_halves(dys + row * size, (const uint16_t *)p.dy + row * c, size);
            if (pass == SUMS_BY_Y || pass == ADD_RELU) from_halves(withs + row * size, (const uint16_t *)p.with + row * c, size);
        }
        uint16_t *const out = p.out;
        if (halves) p.x = xs, p.dy = dys, p.with = withs, p.out = outs;
        if (IS_SUM(pass)) rows ? sum_rows(p, stride, tile, size, type, pass) : sum_plane(p, size, type, pass);
        else rows ? apply_rows(p, stride, tile, size, type, pass) : apply_plane(p, size, type, pass);
        for (int row = 0; halves && (!IS_SUM(pass) || pass == SUMS_BY_Y) && row < tile; row++)
            to_halves(out + row * c, outs + row * size, size);
    }
}

/* Sums of rows, while what comes behind them is prefetched in the order of memory. */
INLINE void sum_tile(const Work *work, int64_t start, double *sums, int dtype, int pass) {
    const int size = SIZE(dtype), line = 64 / size, some = dtype == FLOAT16 ? BLOCK : line;
    const int64_t c = work->call->c, whole = c - c % some, next = TILE * c * size;
    const int64_t ahead = start * size + (next > AHEAD ? next : AHEAD);
    for (int64_t from = 0; from < whole; from += some) {
        for (int64_t i = TILE * from; i < TILE * (from + some); i += line) {
            __builtin_prefetch((const char *)work->call->x + i * size + ahead);
            if (pass >= SUMS) __builtin_prefetch((const char *)work->call->dy + i * size + ahead);
            if (pass == SUMS_BY_Y) __builtin_prefetch((const char *)work->call->with + i * size + ahead);
        }
        compute(work, start + from, TILE, some, from, sums, 1, dtype, pass);
    }
    compute(work, start + whole, TILE, c - whole, whole, sums, 1, dtype, pass);
}
/* One of the parts. */
INLINE void run_body(const Work *work, int64_t part, int dtype, int pass) {
    const int64_t n = work->call->n, c = work->call->c, s = work->call->s, all = s == 1 ? n : c;
    const int64_t from = all * part / work->parts, to = all * (part + 1) / work->parts;
    for (int64_t row = 0; s != 1 && row < n; row++) /* apply goes back: what was read last may still be in a cache */
        for (int64_t i = from, at = IS_SUM(pass) ? row : n - 1 - row; i < to; i++)
            compute(work, (at * c + i) * s, 1, s, i, work->sums, 0, dtype, pass);
    for (int64_t row = from, end; s == 1 && IS_SUM(pass) && row < to;) {
        double *sums = work->sums + part * 4 * c, *chunk = sums + 2 * c;
        end = row + CHUNK < to ? row + CHUNK : to;
        for (; row + TILE <= end; row += TILE) sum_tile(work, row * c, chunk, dtype, pass);
        for (; row < end; row++) compute(work, row * c, 1, c, 0, chunk, 1, dtype, pass);
        for (int64_t i = 0; i < 2 * c; i++) sums[i] += chunk[i], chunk[i] = 0;
    }
    const int64_t some = ((1 << BACK) / (c ? c : 1) + TILE) / TILE * TILE;
    for (int64_t end = to, row; s == 1 && !IS_SUM(pass) && end > from; end -= some) {
        row = end - some < from ? from : end - some;
        for (; c >= 1024 && row + TILE <= end; row += TILE) /* the coefficients exceed the nearest cache */
            compute(work, row * c, TILE, c, 0, NULL, 1, dtype, pass);
        for (; row < end; row++) compute(work, row * c, 1, c, 0, NULL, 1, dtype, pass);
    }
}

/* ---- instruction sets and threads ---- */
#define PASSES(X, set, dtype) X(set, dtype, MOMENTS) X(set, dtype, NORMALIZE) X(set, dtype, RELU) X(set, dtype, ADD_RELU) \
    X(set, dtype, SUMS) X(set, dtype, SUMS_BY_X) X(set, dtype, SUMS_BY_Y) X(set, dtype, GRADIENT) X(set, dtype, GRADIENT_BY_X)
#define ALL(X, set) PASSES(X, set, FLOAT16) PASSES(X, set, BFLOAT16) PASSES(X, set, FLOAT32) PASSES(X, set, FLOAT64)
#define NAME(set, dtype, pass) set##_##dtype##_##pass,
#define FUNCTION(set, dtype, pass) \
    TARGET_##set static void set##_##dtype##_##pass(const Work *work, int64_t part) { run_body(work, part, dtype, pass); }
#define DEFINE(set) ALL(FUNCTION, set) static void (*const set[])(const Work *, int64_t) = {ALL(NAME, set)};
#define TARGET_run_128
#define TARGET_run_256 __attribute__((target("avx2,fma")))
#define TARGET_run_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
DEFINE(run_128)
#if defined(__x86_64__)
DEFINE(run_256)
DEFINE(run_512)
#else
#define run_256 run_128
#define run_512 run_128
#endif
static void run_part(const Work *work, int64_t part) {
    const int64_t which = work->call->dtype * (GRADIENT_BY_X + 1) + work->pass;
    /* written slowly by 512 bits where memory is not in a cache, unless there is much to compute */
    const int by_256 = !work->sums && (work->call->s != 1 || work->pass != GRADIENT_BY_X);
    if (!by_256 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")) run_512[which](work, part);
    else if (HAS("avx2") && HAS("fma")) run_256[which](work, part);
    else run_128[which](work, part);
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
/* -1 if there is no memory. */
static int run(const Call *call, int pass, const void *coefficients) {
    const int64_t c = call->c, divisible = call->s == 1 ? call->n : c, worth = call->n * c * call->s >> GRAIN;
    const int64_t most = divisible < call->threads ? divisible : call->threads, parts = worth < most ? worth : most;
    Work work = {call, pass, coefficients, IS_SUM(pass) ? call->message : NULL, parts > 1 ? parts : 1};
    const int by_rows = work.sums && call->s == 1;
    if (work.sums) memset(work.sums, 0, sizeof(double) * 2 * c);
    if (by_rows && !(work.sums = calloc(work.parts * 4 * c + 1, sizeof(double)))) return -1;
    if (work.parts > 1 && threads.parallel) threads.parallel(run_thread, &work, (unsigned)work.parts, 0);
    else for (int64_t part = 0; part < work.parts; part++) run_part(&work, part);
    for (int64_t part = 0; by_rows && part < work.parts; part++)
        for (int64_t i = 0; i < 2 * c; i++) call->message[i] += work.sums[part * 4 * c + i];
    if (by_rows) free(work.sums);
    return 0;
}
static void *coefficients_of(const Call *call) { return malloc((GAIN + 1) * sizeof(double) * call->c + 1); }
static void set_line(const Call *call, int64_t i, void *to, int64_t which, double slope, double addend) {
    const int type = WIDE(call->dtype);
    const double mean = call->mean[i], middle = type == FLOAT64 ? mean : (float)mean;
    store(to, MEAN * call->c + i, type, middle), store(to, which * call->c + i, type, slope);
    store(to, (which + 1) * call->c + i, type, addend + slope * (middle - mean));
}
/* γ·i, set with β as the line of y; returned. */
static double set_normal(const Call *call, int64_t i, void *to, int64_t which) {
    const double scale = call->invstd[i] * get(call->weight, i, 1);
    set_line(call, i, to, which, scale, get(call->bias, i, 0));
    return scale;
}

/* ---- the seam; each function returns 0, or -1 if there is no memory ---- */
int syncbn_moments(const Call *call) {
    call->message[2 * call->c] = (double)call->n * (double)call->s;
    return run(call, MOMENTS, NULL);
}
static void move(Vector running, int64_t i, double momentum, double value) {
    if (running.data) set(running, i, get(running, i, 0) + momentum * (value - get(running, i, 0)));
}
int syncbn_normalize(const Call *call) {
    const int64_t c = call->c;
    const double count = call->message[2 * c], n = count < 1 ? 1 : count, unbias = count / (count < 2 ? 1 : count - 1);
    double momentum = call->momentum, *coefficients = coefficients_of(call);
    if (!coefficients) return -1;
    if (call->num_batches_tracked) *call->num_batches_tracked += count > 0;
    if (call->cumulative) momentum = 1 / (double)(*call->num_batches_tracked < 1 ? 1 : *call->num_batches_tracked);
    for (int64_t i = 0; i < c; i++) {
        const double mean = call->message[i] / n, square = call->message[c + i] / n - mean * mean;
        const double var = square < 0 ? 0 : square;
        call->mean[i] = mean, call->invstd[i] = 1 / sqrt(var + call->eps);
        set_normal(call, i, coefficients, SLOPE);
        if (count > 0) move(call->first, i, momentum, mean);
        if (count > 1) move(call->second, i, momentum, var * unbias);
    }
    *call->count = count;
    run(call, !call->relu ? NORMALIZE : call->with ? ADD_RELU : RELU, coefficients);
    free(coefficients);
    return 0;
}
int syncbn_gradient_sums(const Call *call) {
    const int by_x = call->relu && !call->with;
    double *coefficients = by_x ? coefficients_of(call) : NULL;
    if (by_x && !coefficients) return -1;
    for (int64_t i = 0; by_x && i < call->c; i++) set_normal(call, i, coefficients, BEFORE_SLOPE);
    const int failed = run(call, by_x ? SUMS_BY_X : call->relu ? SUMS_BY_Y : SUMS, coefficients);
    free(coefficients);
    for (int64_t i = 0; i < call->c && !failed; i++) {
        set(call->first, i, call->message[call->c + i] * call->invstd[i]);
        set(call->second, i, call->message[i]);
    }
    return failed;
}
int syncbn_input_gradient(const Call *call) {
    const int64_t c = call->c;
    const double n = *call->count < 1 ? 1 : *call->count;
    void *coefficients = coefficients_of(call);
    if (!coefficients) return -1;
    for (int64_t i = 0; i < c; i++) {
        const double gain = set_normal(call, i, coefficients, BEFORE_SLOPE);
        const double slope = -gain * call->invstd[i] * call->invstd[i] * call->message[c + i] / n;
        set_line(call, i, coefficients, SLOPE, slope, -gain * call->message[i] / n);
        store(coefficients, GAIN * c + i, WIDE(call->dtype), gain);
    }
    run(call, call->relu ? GRADIENT_BY_X : GRADIENT, coefficients);
    free(coefficients);
    return 0;
}
