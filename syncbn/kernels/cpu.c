/* The compute seam on the CPU (see kernels/__init__.py): plain loops that the compiler vectorises, called by cpu.py.

   Requirements
     - sums are float64; elements are computed in float64, or in float32 about a mean that is a pair hi + lo;
     - x and dy are read once in each of the four functions, the result is written once, nothing of their size is allocated;
     - the ReLU of backward lets pass what that of forward did, to the bit: both come from one expression;
     - one library for every x86-64 processor, on the OpenMP runtime that it is given: it links none;
     - NaN and infinity stay in their channel; sizes may be 0; indices are 64 bits wide.

   Legend: x, dy, y and dx are (N, C, S) in memory: NC* contiguous, or channels_last and (N, C) with S = 1 and rows as N.
   A row is a plane of one channel, or if S = 1 one value of every channel; `type` is a dtype as loops read it: float16 are
   floats by then. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 512   /* values of float16 that are floats for a while: of each of four rows of channels no more */
#define PAGE 4096   /* bytes: rows of channels that are shorter are not read in turns, unless prefetched as far ahead */
#define FAR 65536   /* bytes that longer rows are prefetched ahead, and those of four bytes a value: halves wait for computing */
#define CHUNK 128   /* rows of channels summed before they are added to the sums: rounding errors grow with the terms */
#define BACK 16     /* 2^16 values of rows of channels are taken at once on the way back */
#define GRAIN 14    /* a thread has 2^14 values or more */
#define STREAMED 22 /* results of 2^22 bytes or more are written past the caches, which would read them first */

enum { FLOAT16, BFLOAT16, FLOAT32, FLOAT64 }; /* as in cpu.py */
#define WIDE(dtype) ((dtype) == FLOAT64 ? FLOAT64 : FLOAT32)
#define SIZE(dtype) ((dtype) == FLOAT64 ? 8 : (dtype) == FLOAT32 ? 4 : 2)
#define LEAST(dtype) ((dtype) == FLOAT16 ? 0x1p-25f : (dtype) == BFLOAT16 ? 0x1p-134f : 0) /* the largest that is stored as 0 */
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
enum { MOMENTS, NORMALIZE, RELU, ADD_RELU, SUMS, SUMS_BY_X, SUMS_BY_Y, GRADIENT, GRADIENT_BY_X };
#define IS_SUM(pass) ((pass) == MOMENTS || ((pass) >= SUMS && (pass) <= SUMS_BY_Y))
#define INPUTS(pass) ((pass) < ADD_RELU ? 1 : (pass) == SUMS_BY_Y ? 3 : 2)
#define IS_RELU(pass) ((pass) == RELU || (pass) == ADD_RELU)
#define BY_X(pass) ((pass) == SUMS_BY_X || (pass) == GRADIENT_BY_X)
typedef struct {
    const Call *call;
    int pass, streamed;       /* whether the result is written past the caches */
    const void *coefficients; /* (6, C) as enumerated, of WIDE(dtype); NULL: a sum that needs none */
    double *sums;             /* of a sum, else NULL: (2, C); of rows of channels (parts, 2, 2, C), sums and those of a chunk */
    int64_t parts;            /* of channels, or of rows if S = 1 */
} Work;

/* ---- elements ---- */
typedef union { float value; uint32_t bits; } Float;
INLINE uint16_t to_bfloat(float value) {
    const uint32_t bits = (Float){.value = value}.bits, rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((value != value ? 0x7fc00000u : rounded) >> 16); /* chosen before it is packed, or both would be */
}
#if defined(__x86_64__)
#include <immintrin.h>
#define HAS __builtin_cpu_supports
#define STREAM(to, from) _mm_stream_ps(to, _mm_loadu_ps(from))
#define STREAM_END _mm_sfence
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
#define STREAM(to, from) memcpy(to, from, 16)
#define STREAM_END() (void)0
#define from_halves(to, from, n) abort() /* cpu.py asks first */
#define to_halves(to, from, n) ((void)(from), abort())
#endif
int syncbn_has_float16(void) { return !!HAS("f16c"); }
INLINE double load(const void *from, int64_t i, int64_t type) {
    if (type == BFLOAT16) return (Float){.bits = (uint32_t)((const uint16_t *)from)[i] << 16}.value;
    return type == FLOAT32 ? ((const float *)from)[i] : ((const double *)from)[i];
}
INLINE void store(void *to, int64_t i, int64_t type, double value) {
    if (type == BFLOAT16) ((uint16_t *)to)[i] = to_bfloat((float)value);
    else if (type == FLOAT32) ((float *)to)[i] = (float)value;
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
    if (to.dtype != FLOAT16) store(to.data, i, to.dtype, value);
    else to_halves((uint16_t *)to.data + i, &rounded, 1);
}

/* ---- loops ---- */
typedef struct { /* where one begins */
    const void *in[3], *coefficients;
    void *out;
    double *sums;
    int64_t c, stride; /* of the coefficients and sums; of the rows */
    float least;
} Place;
/* A channel's (x − mean)·slope + addend, what floats cannot hold of the mean being in the addend; BEFORE: a ReLU's input. */
enum { MEAN, SLOPE, ADDEND, BEFORE_SLOPE, BEFORE_ADDEND, GAIN };
typedef struct { double mean, slope, addend; } Line;
typedef struct { Line line, before; double gain; } Channel;
INLINE double coefficient(Place p, int64_t i, int which, int type) { return load(p.coefficients, which * p.c + i, WIDE(type)); }
INLINE Line line(Place p, int64_t i, int slope, int type) {
    return (Line){coefficient(p, i, MEAN, type), coefficient(p, i, slope, type), coefficient(p, i, slope + 1, type)};
}
INLINE Channel channel(Place p, int64_t i, int type, int pass) {
    const Line none = {0}, its = IS_SUM(pass) ? none : line(p, i, SLOPE, type);
    const Line before = BY_X(pass) ? line(p, i, BEFORE_SLOPE, type) : none;
    return (Channel){its, before, pass >= GRADIENT ? coefficient(p, i, GAIN, type) : 1};
}
INLINE double on(Line l, double x, int type) {
    if (type == FLOAT64) return (x - l.mean) * l.slope + l.addend;
    return ((float)x - (float)l.mean) * (float)l.slope + (float)l.addend;
}
/* What x or its line goes with: itself in moments, else dy, which is 0 where the ReLU was by what it was given, or by y. */
INLINE double factor(Place p, int64_t at, Channel its, int type, int pass) {
    const double x = load(p.in[0], at, type), other = INPUTS(pass) > 1 ? load(p.in[1], at, type) : x;
    const double y = pass == SUMS_BY_Y ? load(p.in[2], at, type) : BY_X(pass) ? on(its.before, x, type) : 0;
    const int by_y = BY_X(pass) || pass == SUMS_BY_Y;
    double value = other;
    if (by_y && type == FLOAT64) value = y <= 0 ? 0 : other;
    else if (by_y) /* by its bits: chosen as a value it would be loaded after the comparison */
        value = (Float){.bits = (Float){.value = (float)other}.bits & ((float)y <= p.least ? 0 : ~0u)}.value;
    if (pass == SUMS_BY_Y) store(p.out, at, type, value);
    return value;
}
/* Element `at` of y or dx. */
INLINE double result(Place p, int64_t at, Channel its, int type, int pass) {
    const double more = factor(p, at, its, type, pass);
    double value = on(its.line, load(p.in[0], at, type), type);
    if (INPUTS(pass) > 1) value = type == FLOAT64 ? value + more * its.gain : (float)value + (float)more * (float)its.gain;
    return IS_RELU(pass) && type != BFLOAT16 && (type == FLOAT64 ? value : (float)value) <= 0 ? 0 : value;
}
/* Stored. Of bfloat16 the ReLU is here: the bits as a number have the value's sign, and those of NaN are positive. */
INLINE void put(Place p, int64_t at, int type, int pass, double value) {
    if (type != BFLOAT16 || !IS_RELU(pass)) { store(p.out, at, type, value); return; }
    const int16_t bits = (int16_t)to_bfloat((float)value);
    ((int16_t *)p.out)[at] = bits < 0 ? 0 : bits;
}
/* Σx and Σx², or Σdy and Σdy·x, of a plane of channel i from element `at` on. */
INLINE void sum_plane(Place p, int64_t at, int64_t i, int64_t n, int type, int pass) {
    const Channel its = channel(p, i, type, pass);
    const int apart = pass == SUMS_BY_Y && type == BFLOAT16, then = apart ? SUMS : pass; /* gcc 12 vectorises no loop of both */
    double a = 0, b = 0;
    if (apart) {
#pragma GCC ivdep
        for (int64_t j = at; j < at + n; j++) factor(p, j, its, type, pass);
        p.in[1] = p.out;
    }
#pragma GCC ivdep
    for (int64_t j = at; j < at + n; j++) {
        const double value = factor(p, j, its, type, then);
        a += value, b += value * load(p.in[0], j, type);
    }
    p.sums[i] += a, p.sums[p.c + i] += b;
}
/* The same of `rows` rows of channels from `start` to `end`. */
INLINE void sum_some(Place p, int64_t at, int rows, int64_t start, int64_t end, int type, int pass) {
    double *restrict first = p.sums, *restrict second = first + p.c;
#pragma GCC ivdep
    for (int64_t i = start; i < end; i++) {
        const Channel its = channel(p, i, type, pass);
        double a = 0, b = 0;
#pragma GCC unroll 4
        for (int64_t row = 0, here = at + i; row < rows; row++, here += p.stride) {
            const double value = factor(p, here, its, type, pass);
            a += value, b += value * load(p.in[0], here, type);
        }
        first[i] += a, second[i] += b;
    }
}
/* While n channels are summed, what comes behind is fetched in the order of memory. */
INLINE void sum_rows(Place p, int64_t at, int rows, int64_t n, int fetched, int type, int pass) {
    const int size = SIZE(type), line = 64 / size;
    const int64_t whole = fetched ? n - n % line : 0;
    for (int64_t i = 0; i < whole; i += line) {
        for (int k = 0; k < INPUTS(pass) * rows; k++) {
            const char *next = (const char *)p.in[k / rows] + (at + i * rows + k % rows * line) * size;
            if (p.stride * size < PAGE) __builtin_prefetch(next + PAGE, 0, 3);
            if (p.stride * size >= PAGE || size > 2) __builtin_prefetch(next + FAR, 0, 2);
        }
        sum_some(p, at, rows, i, i + line, type, pass);
    }
    sum_some(p, at, rows, whole, n, type, pass);
}
/* y or dx of a plane, or of `rows` rows of channels. */
INLINE void apply(Place p, int64_t at, int rows, int64_t i, int64_t n, int planes, int type, int pass) {
    const Channel one = channel(p, i, type, pass);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; j++) {
        const Channel its = planes ? one : channel(p, j, type, pass);
#pragma GCC unroll 4
        for (int64_t row = 0, here = at + j; row < rows; row++, here += p.stride)
            put(p, here, type, pass, result(p, here, its, type, pass));
    }
}
/* The same of one row, of n / 8 · 8 values, past the caches. */
INLINE void stream(Place p, int64_t at, int64_t i, int64_t n, int planes, int pass) {
    const Channel one = channel(p, i, FLOAT32, pass);
    for (int64_t j = 0; j < n; j += 8) {
        float values[8];
#pragma omp simd simdlen(8)
        for (int k = 0; k < 8; k++)
            values[k] = (float)result(p, at + j + k, planes ? one : channel(p, j + k, FLOAT32, pass), FLOAT32, pass);
        for (int k = 0; k < 8; k += 4) STREAM((float *)p.out + at + j + k, values + k);
    }
}
/* `rows` rows from element `at` and channel i on, of n values each; float16 by blocks. Rows of channels are taken by some, so
   that what is kept of the channels is read and written once for them. */
INLINE void run_rows(const Work *work, int64_t at, int64_t i, int64_t rows, int64_t n, double *sums, int type, int pass) {
    const Call *call = work->call;
    const int planes = call->s != 1, half = type == FLOAT32 && call->dtype == FLOAT16, size = half ? 2 : SIZE(type);
    const int by_four = half || n * size >= PAGE || (IS_SUM(pass) && n * size * 4 <= PAGE);
    const int tile = planes ? 1 : by_four ? 4 : IS_SUM(pass) ? 2 : 1;
    const int64_t width = half && n > BLOCK ? BLOCK : n, fits = half && n ? BLOCK / width : rows;
    const int64_t height = fits < tile ? tile : fits;
    float floats[4][4 * BLOCK + 64]; /* with pages between them loads would wait for stores */
    for (int64_t row = 0; row < rows; row += height) for (int64_t from = 0; from < n; from += width) {
        const int64_t tall = height < rows - row ? height : rows - row, wider = width < n - from ? width : n - from;
        const int64_t start = at + row * n + from, first = planes ? i + row : i + from, piece = wider == n ? tall * n : wider;
#define AT(from, bytes) ((void *)((from) ? (char *)(intptr_t)(from) + (bytes) : NULL))
        Place p = {{0}, AT(work->coefficients, first * SIZE(WIDE(type))), AT(call->out, start * size), AT(sums, first * 8),
                   call->c, half ? wider : n, LEAST(call->dtype)};
        for (int k = 0; k < INPUTS(pass); k++) {
            p.in[k] = half ? floats[k + 1] : AT(call->in[k], start * size);
            for (int64_t j = 0; half && j < tall * wider; j += piece) {
                const uint16_t *const here = (const uint16_t *)call->in[k] + start + j / wider * n;
                for (int64_t ahead = piece; ahead < 2 * piece; ahead += 32) __builtin_prefetch(here + ahead);
                from_halves(floats[k + 1] + j, here, piece);
            }
        }
        if (half) p.out = floats[0];
        for (int64_t j = 0, some; j < tall; j += some) {
            const int64_t here = j * p.stride;
            some = j + tile > tall || work->streamed ? 1 : tile;
#define ROWS(some) IS_SUM(pass) ? sum_rows(p, here, some, wider, some > 1 && !half, type, pass) : \
                                  apply(p, here, some, 0, wider, 0, type, pass)
            if (type == FLOAT32 && !IS_SUM(pass) && work->streamed) stream(p, here, planes ? j : 0, wider, planes, pass);
            else if (planes && IS_SUM(pass)) sum_plane(p, here, j, wider, type, pass);
            else if (planes) apply(p, here, 1, j, wider, 1, type, pass);
            else if (some == 4) ROWS(4);
            else if (some == 2) ROWS(2);
            else ROWS(1);
        }
        for (int64_t j = 0; half && (!IS_SUM(pass) || pass == SUMS_BY_Y) && j < tall * wider; j += piece)
            to_halves((uint16_t *)call->out + start + j / wider * n, floats[0] + j, piece);
    }
}
/* One of the parts. */
INLINE void run_body(const Work *work, int64_t part, int type, int pass) {
    const int64_t n = work->call->n, c = work->call->c, s = work->call->s, all = s == 1 ? n : c;
    const int64_t from = all * part / work->parts, to = all * (part + 1) / work->parts;
    for (int64_t row = 0; s != 1 && row < n; row++) /* apply goes back: what was read last may still be in a cache */
        run_rows(work, ((IS_SUM(pass) ? row : n - 1 - row) * c + from) * s, from, to - from, s, work->sums, type, pass);
    const int64_t most = IS_SUM(pass) ? CHUNK : (1 << BACK) / (c ? c : 1) + 4, chunks = s == 1 ? (to - from + most - 1) / most : 0;
    for (int64_t k = 0; k < chunks; k++) {
        const int64_t row = from + (IS_SUM(pass) ? k : chunks - 1 - k) * most, some = to - row < most ? to - row : most;
        double *sums = AT(work->sums, part * 4 * c * 8), *chunk = AT(sums, 2 * c * 8);
        run_rows(work, row * c, 0, some, c, chunk, type, pass);
        for (int64_t i = 0; IS_SUM(pass) && i < 2 * c; i++) sums[i] += chunk[i], chunk[i] = 0;
    }
}

/* ---- instruction sets and threads ---- */
#define PASSES(X, set, type) X(set, type, MOMENTS) X(set, type, NORMALIZE) X(set, type, RELU) X(set, type, ADD_RELU) \
    X(set, type, SUMS) X(set, type, SUMS_BY_X) X(set, type, SUMS_BY_Y) X(set, type, GRADIENT) X(set, type, GRADIENT_BY_X)
#define ALL(X, set) PASSES(X, set, BFLOAT16) PASSES(X, set, FLOAT32) PASSES(X, set, FLOAT64)
#define NAME(set, type, pass) set##_##type##_##pass,
#define FUNCTION(set, type, pass) \
    TARGET_##set static void set##_##type##_##pass(const Work *work, int64_t part) { run_body(work, part, type, pass); }
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
    const int64_t dtype = work->call->dtype, which = (dtype == FLOAT16 ? 1 : dtype - 1) * (GRADIENT_BY_X + 1) + work->pass;
    /* floats are written slowly by 512 bits where memory is not in a cache, unless there is much to compute */
    const int by_256 = !work->sums && dtype > BFLOAT16 && (work->call->s != 1 || work->pass != GRADIENT_BY_X);
    if (!by_256 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")) run_512[which](work, part);
    else if (HAS("avx2") && HAS("fma")) run_256[which](work, part);
    else run_128[which](work, part);
    if (work->streamed) STREAM_END();
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
    const int64_t row = call->s != 1 ? call->s : c, bytes = call->n * c * call->s * 4;
    const int streamed = !IS_SUM(pass) && call->dtype == FLOAT32 && row % 8 == 0 && (call->s != 1 || c * 4 < PAGE) &&
                         (intptr_t)call->out % 16 == 0 && bytes >> STREAMED;
    Work work = {call, pass, streamed, coefficients, IS_SUM(pass) ? call->message : NULL, parts > 1 ? parts : 1};
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
    const double mean = call->statistics[i], middle = type == FLOAT64 ? mean : (float)mean;
    store(to, MEAN * call->c + i, type, middle), store(to, which * call->c + i, type, slope);
    store(to, (which + 1) * call->c + i, type, addend + slope * (middle - mean));
}
/* γ·i, set with β as the line of y; returned. */
static double set_normal(const Call *call, int64_t i, void *to, int64_t which) {
    const double scale = call->statistics[call->c + i] * get(call->weight, i, 1);
    set_line(call, i, to, which, scale, get(call->bias, i, 0));
    return scale;
}

/* ---- the seam; each function returns 0, or -1 if there is no memory ---- */
int syncbn_moments(const Call *call) {
    call->message[2 * call->c] = (double)call->n * (double)call->s;
    return run(call, MOMENTS, NULL);
}
static void move(Vector running, int64_t i, double momentum, double value) {
    if (running.data) set(running, i, (1 - momentum) * get(running, i, 0) + momentum * value);
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
        call->statistics[i] = mean, call->statistics[c + i] = 1 / sqrt(var + call->eps);
        set_normal(call, i, coefficients, SLOPE);
        if (count > 0) move(call->first, i, momentum, mean);
        if (count > 1) move(call->second, i, momentum, var * unbias);
    }
    call->statistics[2 * c] = count;
    run(call, !call->relu ? NORMALIZE : call->in[1] ? ADD_RELU : RELU, coefficients);
    free(coefficients);
    return 0;
}
int syncbn_gradient_sums(const Call *call) {
    const int by_x = call->relu && !call->in[2];
    double *coefficients = by_x ? coefficients_of(call) : NULL;
    if (by_x && !coefficients) return -1;
    for (int64_t i = 0; by_x && i < call->c; i++) set_normal(call, i, coefficients, BEFORE_SLOPE);
    const int failed = run(call, by_x ? SUMS_BY_X : call->relu ? SUMS_BY_Y : SUMS, coefficients);
    free(coefficients);
    for (int64_t i = 0; i < call->c && !failed; i++) {
        call->message[call->c + i] -= call->statistics[i] * call->message[i];
        set(call->first, i, call->message[call->c + i] * call->statistics[call->c + i]);
        set(call->second, i, call->message[i]);
    }
    return failed;
}
int syncbn_input_gradient(const Call *call) {
    const int64_t c = call->c;
    const double *invstd = call->statistics + c;
    void *coefficients = coefficients_of(call);
    if (!coefficients) return -1;
    const double n = invstd[c] < 1 ? 1 : invstd[c];
    for (int64_t i = 0; i < c; i++) {
        const double gain = set_normal(call, i, coefficients, BEFORE_SLOPE);
        const double slope = -gain * invstd[i] * invstd[i] * call->message[c + i] / n;
        set_line(call, i, coefficients, SLOPE, slope, -gain * call->message[i] / n);
        store(coefficients, GAIN * c + i, WIDE(call->dtype), gain);
    }
    run(call, call->relu ? GRADIENT_BY_X : GRADIENT, coefficients);
    free(coefficients);
    return 0;
}
