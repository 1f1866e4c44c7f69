/* The compute seam on the CPU (see kernels/__init__.py): what cpu.py calls; the passes over the elements are in cpu_loops.h.

   Requirements
     - sums are float64; elements are computed in float64, or in float32 about a mean that is a pair hi + lo;
     - one library for every x86-64 processor, on the OpenMP runtime that it is given: it links none;
     - NaN and infinity stay in their channel; sizes may be 0; indices are 64 bits wide.

   Legend: x, dy, y and dx are (N, C, S) in memory: NC* contiguous, or channels_last and (N, C) with S = 1 and rows as N.
   A row is a plane of one channel, or if S = 1 one value of every channel. */

#include "cpu.h"

#define GRAIN 14    /* a thread has 2^14 values or more */
#define STREAMED 22 /* results of 2^22 bytes or more are written past the caches, which would read them first */
#define HAS_256 (HAS("avx2") && HAS("fma") && has_f16c)
#define HAS_512 (HAS_256 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl"))

static int has_f16c; /* asked of the processor, once: many a compiler's builtin does not know the name */
#if defined(__x86_64__)
#include <cpuid.h>
__attribute__((constructor)) static void look_for_f16c(void) {
    unsigned a, b, c, d;
    has_f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif
/* The loops for float16 want its conversions. */
int syncbn_has_float16(void) { return !!HAS_256; }
static double get(Vector from, int64_t i, double otherwise) { return from.data ? load(from.data, i, from.dtype) : otherwise; }
static void set(Vector to, int64_t i, double value) { store(to.data, i, to.dtype, value); }

/* ---- instruction sets and threads ---- */
static int most_bits = 512;
void syncbn_use_bits(int most) { most_bits = most; } /* for tests, of what the processor has */
static void run_part(const Work *work, int64_t part) {
    const int64_t dtype = work->call->dtype;
    /* floats are written slowly by 512 bits where memory is not in a cache, unless there is much to compute */
    const int by_256 = !work->sums && dtype > BFLOAT16 && (work->call->s != 1 || work->pass != GRADIENT_BY_X);
    if (!by_256 && HAS_512 && most_bits >= 512) syncbn_512[dtype][work->pass](work, part);
    else if (HAS_256 && (most_bits >= 256 || dtype == FLOAT16)) syncbn_256[dtype][work->pass](work, part);
    else syncbn_128[dtype][work->pass](work, part);
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
    const double kept = momentum == 1 ? 0 : 1 - momentum; /* or a compiler may take m·r from r, which leaves some of it */
    if (running.data) set(running, i, kept * get(running, i, 0) + momentum * value);
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
