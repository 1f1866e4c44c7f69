/* The loops over the elements, that the compiler vectorises for the instruction set SET of the file that includes them.

   Requirements
     - x and dy are read once, the result is written once, but for a part of a strip; nothing of their size is allocated;
     - half precision is converted in registers, by strips;
     - the ReLU of backward lets pass what that of forward did, to the bit: both come from one expression. */

#define FEW 2       /* values of half precision are as well computed one by one as by a strip */
#define FAR 65536   /* bytes that longer rows are fetched ahead, and those of four bytes a value: halves wait for computing */
#define BLOCK 4096  /* values of a plane summed before they are added to the sums: rounding errors grow with the terms */
#define CHUNK 128   /* rows of channels, likewise, or about the root of their number */
#define BACK 16     /* 2^16 values of rows of channels are taken at once on the way back */
#define IS_HALF(type) ((type) < FLOAT32)
#define LEAST(type) ((type) == FLOAT16 ? 0x1p-25f : (type) == BFLOAT16 ? 0x1p-134f : 0) /* the largest that is stored as 0 */
#define INPUTS(pass) ((pass) < ADD_RELU ? 1 : (pass) == SUMS_BY_Y ? 3 : 2)
#define IS_RELU(pass) ((pass) == RELU || (pass) == ADD_RELU)
#define BY_X(pass) ((pass) == SUMS_BY_X || (pass) == GRADIENT_BY_X)

/* No iteration of a loop reads what another writes; BY_VECTORS: it has few, which clang would unroll instead. */
#ifdef __clang__
#define ANY_ORDER _Pragma("clang loop vectorize(assume_safety)")
#define BY_VECTORS _Pragma("clang loop vectorize(assume_safety) interleave(disable) unroll(disable)")
#else
#define ANY_ORDER _Pragma("GCC ivdep")
#define BY_VECTORS _Pragma("omp simd")
#endif

/* ---- elements ---- */
typedef struct { /* where a loop begins */
    const void *in[3], *coefficients;
    void *out;
    double *sums;
    int64_t c, stride; /* of the coefficients and sums; of the rows */
    float least;       /* the largest input of a ReLU whose result is stored as 0 */
} Place;
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
    const int by_y = BY_X(pass) || pass == SUMS_BY_Y, is_off = type == FLOAT64 ? y <= 0 : (float)y <= p.least;
    const double value = by_y ? unless(is_off, other, type) : other;
    if (pass == SUMS_BY_Y) store(p.out, at, type, value);
    return value;
}
/* Element `at` of y, before the ReLU, or of dx. */
INLINE double result(Place p, int64_t at, Channel its, int type, int pass) {
    const double more = factor(p, at, its, type, pass);
    const double value = on(its.line, load(p.in[0], at, type), type);
    if (INPUTS(pass) == 1) return value;
    return type == FLOAT64 ? value + more * its.gain : (float)value + (float)more * (float)its.gain;
}
/* Of floats; half precision has its ReLU when it is stored. */
INLINE double relu(double value, int type, int pass) {
    return IS_RELU(pass) ? unless(type == FLOAT64 ? value <= 0 : (float)value <= 0, value, type) : value;
}
INLINE void put(Place p, int64_t at, int type, int pass, double value) {
    store(p.out, at, type, IS_HALF(type) ? value : relu(value, type, pass));
    if (IS_RELU(pass) && IS_HALF(type)) ((uint16_t *)p.out)[at] = at_least_0(((uint16_t *)p.out)[at], type);
}

/* ---- loops ---- */
typedef struct { float in[3][STRIP], out[STRIP]; } Strip; /* what is left of it when compiled are registers */
/* The inputs from element `at` on, and where their results go: `narrow` them. */
INLINE Place widened(Strip *strip, Place p, int64_t at, int type, int pass) {
    for (int k = 0; k < INPUTS(pass); k++) {
        widen(strip->in[k], (const uint16_t *)p.in[k] + at, type);
        p.in[k] = strip->in[k];
    }
    p.out = strip->out;
    return p;
}
/* Σx and Σx², or Σdy and Σdy·x, of n values of a plane of channel i from element `at` on. */
INLINE void sum_plane(Place p, int64_t at, int64_t i, int64_t n, int type, int pass) {
    const Channel its = channel(p, i, type, pass);
    const int64_t end = at + n;
    double a = 0, b = 0, firsts[STRIP] = {0}, seconds[STRIP] = {0};
    for (; IS_HALF(type) && at + STRIP <= end; at += STRIP) {
        Strip strip;
        const Place wide = widened(&strip, p, at, type, pass);
#pragma omp simd
        for (int k = 0; k < STRIP; k++) {
            const double value = factor(wide, k, its, FLOAT32, pass);
            firsts[k] += value, seconds[k] += value * load(wide.in[0], k, FLOAT32);
        }
        if (pass == SUMS_BY_Y) narrow((uint16_t *)p.out + at, strip.out, type, 0);
    }
ANY_ORDER
    for (; at < end; at++) {
        const double value = factor(p, at, its, type, pass);
        a += value, b += value * load(p.in[0], at, type);
    }
#pragma omp simd reduction(+ : a, b)
    for (int k = 0; k < STRIP; k++) a += firsts[k], b += seconds[k];
    p.sums[i] += a, p.sums[p.c + i] += b;
}
/* The same of `rows` rows of channels from `start` to `end`. */
INLINE void sum_some(Place p, int64_t at, int rows, int64_t start, int64_t end, int type, int pass) {
    double *restrict first = p.sums, *restrict second = first + p.c;
    for (; IS_HALF(type) && start + STRIP <= end; start += STRIP) {
        double a[STRIP] = {0}, b[STRIP] = {0};
#pragma GCC unroll 4
        for (int64_t row = 0, here = at + start; row < rows; row++, here += p.stride) {
            Strip strip;
            const Place wide = widened(&strip, p, here, type, pass);
#pragma omp simd
            for (int k = 0; k < STRIP; k++) {
                const double value = factor(wide, k, channel(p, start + k, type, pass), FLOAT32, pass);
                a[k] += value, b[k] += value * load(wide.in[0], k, FLOAT32);
            }
            if (pass == SUMS_BY_Y) narrow((uint16_t *)p.out + here, strip.out, type, 0);
        }
#pragma omp simd
        for (int k = 0; k < STRIP; k++) first[start + k] += a[k], second[start + k] += b[k];
    }
ANY_ORDER
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
INLINE void sum_rows(Place p, int64_t at, int rows, int64_t n, int type, int pass) {
    const int size = SIZE(type), line = 64 / size;
    const int64_t whole = rows > 1 ? n - n % line : 0;
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
/* y or dx of a plane of channel i, or of `rows` rows of channels. */
INLINE void apply(Place p, int64_t at, int rows, int64_t i, int64_t n, int planes, int type, int pass) {
    const Channel one = channel(p, i, type, pass);
    int64_t j = 0;
    for (; IS_HALF(type) && n >= STRIP && j + FEW < n; j += STRIP) {
        j = j < n - STRIP ? j : n - STRIP; /* the last strip begins in the one before */
#pragma GCC unroll 4
        for (int64_t row = 0, here = at + j; row < rows; row++, here += p.stride) {
            Strip strip;
            const Place wide = widened(&strip, p, here, type, pass);
BY_VECTORS
            for (int k = 0; k < STRIP; k++)
                strip.out[k] = (float)result(wide, k, planes ? one : channel(p, j + k, type, pass), FLOAT32, pass);
            narrow((uint16_t *)p.out + here, strip.out, type, IS_RELU(pass));
        }
    }
ANY_ORDER
    for (; j < n; j++) {
        const Channel its = planes ? one : channel(p, j, type, pass);
#pragma GCC unroll 4
        for (int64_t row = 0, here = at + j; row < rows; row++, here += p.stride)
            put(p, here, type, pass, result(p, here, its, type, pass));
    }
}
/* The same of one row of floats, of n / 8 · 8 values, past the caches. */
#if defined(__x86_64__)
#define STREAM(to, from) _mm_stream_ps(to, _mm_loadu_ps(from))
#define STREAM_END _mm_sfence
#else
#define STREAM(to, from) memcpy(to, from, 16)
#define STREAM_END() (void)0
#endif
INLINE void stream(Place p, int64_t at, int64_t i, int64_t n, int planes, int pass) {
    const Channel one = channel(p, i, FLOAT32, pass);
    for (int64_t j = 0; j < n; j += 8) {
        float values[8];
BY_VECTORS
        for (int k = 0; k < 8; k++) {
            const Channel its = planes ? one : channel(p, j + k, FLOAT32, pass);
            values[k] = (float)relu(result(p, at + j + k, its, FLOAT32, pass), FLOAT32, pass);
        }
        for (int k = 0; k < 8; k += 4) STREAM((float *)p.out + at + j + k, values + k);
    }
}
/* `rows` rows from element `at` and channel i on, of n values each. Rows of channels are taken by some, so that what is kept of
   the channels is read and written once for them. */
INLINE void run_rows(const Work *work, int64_t at, int64_t i, int64_t rows, int64_t n, double *sums, int type, int pass) {
    const Call *call = work->call;
    const int planes = call->s != 1, size = SIZE(type);
    const int by_four = n * size >= PAGE || (IS_SUM(pass) && n * size * 4 <= PAGE);
    const int tile = planes || work->streamed ? 1 : by_four ? 4 : IS_SUM(pass) ? 2 : 1;
#define AT(from, bytes) ((void *)((from) ? (char *)(intptr_t)(from) + (bytes) : NULL))
    Place p = {{0}, AT(work->coefficients, i * SIZE(WIDE(type))), AT(call->out, at * size), AT(sums, i * 8),
               call->c, n, LEAST(type)};
    for (int k = 0; k < INPUTS(pass); k++) p.in[k] = AT(call->in[k], at * size);
    for (int64_t row = 0, some; row < rows; row += some) {
        const int64_t here = row * n;
        some = row + tile > rows ? 1 : tile;
#define ROWS(some) IS_SUM(pass) ? sum_rows(p, here, some, n, type, pass) : apply(p, here, some, 0, n, 0, type, pass)
        if (type == FLOAT32 && !IS_SUM(pass) && work->streamed) stream(p, here, planes ? row : 0, n, planes, pass);
        else if (planes && IS_SUM(pass))
            for (int64_t j = 0; j < n; j += BLOCK) sum_plane(p, here + j, row, n - j < BLOCK ? n - j : BLOCK, type, pass);
        else if (planes) apply(p, here, 1, row, n, 1, type, pass);
        else if (some == 4) ROWS(4);
        else if (some == 2) ROWS(2);
        else ROWS(1);
    }
}
/* One of the parts. */
INLINE void run_body(const Work *work, int64_t part, int type, int pass) {
    const int64_t n = work->call->n, c = work->call->c, s = work->call->s, all = s == 1 ? n : c;
    const int64_t from = all * part / work->parts, to = all * (part + 1) / work->parts;
    for (int64_t row = 0; s != 1 && row < n; row++) /* apply goes back: what was read last may still be in a cache */
        run_rows(work, ((IS_SUM(pass) ? row : n - 1 - row) * c + from) * s, from, to - from, s, work->sums, type, pass);
    int64_t root = CHUNK;
    while (root * root < to - from) root *= 2;
    const int64_t most = IS_SUM(pass) ? root : (1 << BACK) / (c ? c : 1) + 4, chunks = s == 1 ? (to - from + most - 1) / most : 0;
    for (int64_t k = 0; k < chunks; k++) {
        const int64_t row = from + (IS_SUM(pass) ? k : chunks - 1 - k) * most, some = to - row < most ? to - row : most;
        double *sums = AT(work->sums, part * 4 * c * 8), *chunk = AT(sums, 2 * c * 8);
        run_rows(work, row * c, 0, some, c, chunk, type, pass);
        for (int64_t i = 0; IS_SUM(pass) && i < 2 * c; i++) sums[i] += chunk[i], chunk[i] = 0;
    }
    if (work->streamed) STREAM_END();
}

/* ---- a function for each dtype and pass ---- */
#define ALL(X, type) X(type, MOMENTS) X(type, NORMALIZE) X(type, RELU) X(type, ADD_RELU) X(type, SUMS) X(type, SUMS_BY_X) \
    X(type, SUMS_BY_Y) X(type, GRADIENT) X(type, GRADIENT_BY_X)
#define FUNCTION(type, pass) static void type##_##pass(const Work *work, int64_t part) { run_body(work, part, type, pass); }
#define ENTRY(type, pass) [type][pass] = type##_##pass,
#define TABLE_(set) syncbn_##set
#define TABLE(set) TABLE_(set)
ALL(FUNCTION, BFLOAT16) ALL(FUNCTION, FLOAT32) ALL(FUNCTION, FLOAT64)
#if SET > 128
ALL(FUNCTION, FLOAT16)
#endif
Body *const TABLE(SET)[FLOAT64 + 1][PASSES] = {
#if SET > 128
    ALL(ENTRY, FLOAT16)
#endif
    ALL(ENTRY, BFLOAT16) ALL(ENTRY, FLOAT32) ALL(ENTRY, FLOAT64)};
