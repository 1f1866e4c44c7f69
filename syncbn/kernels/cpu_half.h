/* Half precision as floats, STRIP values at a time, by the instructions of SET; float16 of 128 bits is left to ATen. */

#define STRIP 16
#if SET > 128
#define LANES (SET / 32)
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
#if SET == 512
INLINE Ints ints(Shorts bits) { return (Ints)_mm512_cvtepu16_epi32((__m256i)bits); }
INLINE Floats from_halves(Shorts bits) { return _mm512_cvtph_ps((__m256i)bits); }
INLINE Shorts to_halves(Floats value) { return (Shorts)_mm512_cvtps_ph(value, 0); }
INLINE Shorts positive_bfloats(Shorts all) { return (Shorts)_mm256_max_epi16((__m256i)all, _mm256_setzero_si256()); }
INLINE Shorts positive_halves(Shorts all) {
    const __m256i infinity = _mm256_set1_epi16(NEGATIVES(FLOAT16)), from_0 = (__m256i)(all - (uint16_t)0x8000);
    return (Shorts)_mm256_maskz_mov_epi16(_mm256_cmpgt_epu16_mask(from_0, infinity), (__m256i)all);
}
INLINE Ints unless_nan(Ints bits, Floats value, Ints nan) {
    return (Ints)_mm512_mask_mov_epi32((__m512i)bits, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), (__m512i)nan);
}
INLINE Shorts high_halves(Ints bits) {
    const __m256i odd = _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return (Shorts)_mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(odd), (__m512i)bits));
}
#else
INLINE Ints ints(Shorts bits) { return (Ints)_mm256_cvtepu16_epi32((__m128i)bits); }
INLINE Floats from_halves(Shorts bits) { return _mm256_cvtph_ps((__m128i)bits); }
INLINE Shorts to_halves(Floats value) { return (Shorts)_mm256_cvtps_ph(value, 0); }
INLINE Shorts positive_bfloats(Shorts all) { return (Shorts)_mm_max_epi16((__m128i)all, _mm_setzero_si128()); }
INLINE Shorts positive_halves(Shorts all) {
    return all & ~(Shorts)(all - (uint16_t)0x8000 <= (uint16_t)NEGATIVES(FLOAT16));
}
INLINE Ints unless_nan(Ints bits, Floats value, Ints nan) {
    return (Ints)_mm256_blendv_ps((Floats)bits, (Floats)nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
}
INLINE Shorts high_halves(Ints bits) {
    const __m256i high = (__m256i)(bits >> 16);
    return (Shorts)_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
#endif
INLINE void widen(float *to, const uint16_t *from, int type) {
    for (int k = 0; k < STRIP; k += LANES) {
        Shorts bits;
        memcpy(&bits, from + k, sizeof bits);
        const Floats value = type == FLOAT16 ? from_halves(bits) : (Floats)(ints(bits) << 16);
        memcpy(to + k, &value, sizeof value);
    }
}
/* With a ReLU, if there is one, by the bits: NaN stays, which of bfloat16 is positive by now. */
INLINE void narrow(uint16_t *to, const float *from, int type, int relu) {
    const Ints nan = (Ints){0} + 0x7fc00000;
    for (int k = 0; k < STRIP; k += LANES) {
        Floats value;
        memcpy(&value, from + k, sizeof value);
        const Ints bits = (Ints)value, rounded = unless_nan(bits + 0x7fff + (bits >> 16 & 1), value, nan);
        const Shorts all = type == FLOAT16 ? to_halves(value) : high_halves(rounded);
        const Shorts stored = !relu ? all : type == FLOAT16 ? positive_halves(all) : positive_bfloats(all);
        memcpy(to + k, &stored, sizeof stored);
    }
}
#else
INLINE void widen(float *to, const uint16_t *from, int type) {
    for (int k = 0; k < STRIP; k++) to[k] = (float)load(from, k, type);
}
INLINE void narrow(uint16_t *to, const float *from, int type, int relu) {
    for (int k = 0; k < STRIP; k++) {
        store(to, k, type, from[k]);
        if (relu) to[k] = at_least_0(to[k], type);
    }
}
#endif
