/* Eight binary32 or int32 lanes in the compiler's vector extension, so that one source serves every instruction set.
 *
 * The functions that the extension lacks (round to integer, select, narrow) have an intrinsic for AVX2 and plain C for
 * the rest. No reduction over floats is ever a sum. */
#ifndef CM_SIMD_H
#define CM_SIMD_H

#include <float.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if FLT_EVAL_METHOD != 0
#error "binary32 operations must be rounded to binary32"
#endif
#if defined(__FAST_MATH__)
#error "fast-math changes bits"
#endif

#define LANES 8
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8x __attribute__((vector_size(32)));
typedef uint32_t u8x __attribute__((vector_size(32)));

static inline f8 f8_load(const float *p) {
    f8 v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void f8_store(float *p, f8 v) { memcpy(p, &v, sizeof v); }
static inline i8x i8_load(const int32_t *p) {
    i8x v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void i8_store(int32_t *p, i8x v) { memcpy(p, &v, sizeof v); }
/* Lanes at and past `count` are zero, and the memory there is not touched. */
static inline f8 f8_load_part(const float *p, int64_t count) {
    f8 v = {0};
    memcpy(&v, p, (size_t)count * sizeof *p);
    return v;
}
static inline void f8_store_part(float *p, f8 v, int64_t count) { memcpy(p, &v, (size_t)count * sizeof *p); }

static inline f8 f8_set(float x) { return (f8){x, x, x, x, x, x, x, x}; }
static inline i8x i8_set(int32_t x) { return (i8x){x, x, x, x, x, x, x, x}; }
static inline i8x f8_bits(f8 x) { return (i8x)x; }
static inline f8 f8_from_bits(i8x x) { return (f8)x; }
static inline f8 f8_convert(i8x x) { return __builtin_convertvector(x, f8); } /* rounds to nearest even */

static inline i8x i8_max(i8x a, i8x b) {
#if defined(__AVX2__)
    return (i8x)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    i8x m = a > b;
    return (a & m) | (b & ~m);
#endif
}
static inline i8x i8_select(i8x mask, i8x a, i8x b) { return (a & mask) | (b & ~mask); }
static inline f8 f8_select(i8x mask, f8 a, f8 b) { return (f8)i8_select(mask, (i8x)a, (i8x)b); }
/* a > b ? a : b and a < b ? a : b; the path holds no NaN. */
static inline f8 f8_max(f8 a, f8 b) {
#if defined(__AVX2__)
    return (f8)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return f8_select(a > b, a, b);
#endif
}
static inline f8 f8_min(f8 a, f8 b) {
#if defined(__AVX2__)
    return (f8)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return f8_select(a < b, a, b);
#endif
}
/* a * b + c, rounded once. Without the instruction: the sum in binary64 with an odd last bit where it is not exact. */
static inline f8 f8_fma(f8 a, f8 b, f8 c) {
#if defined(__FMA__)
    return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    f8 y;
    for (int i = 0; i < LANES; i++) {
        const double product = (double)a[i] * b[i], total = product + c[i], part = total - product;
        const double error = (product - (total - part)) + (c[i] - part);
        int64_t bits;
        memcpy(&bits, &total, sizeof bits);
        if (error != 0.0 && !(bits & 1))
            bits += (error > 0.0) == (total > 0.0) ? 1 : -1;
        double odd;
        memcpy(&odd, &bits, sizeof odd);
        y[i] = (float)odd;
    }
    return y;
#endif
}
/* Nearest integer, half to even. Without AVX2: adding and taking away 2^23 rounds a magnitude under 2^23. */
static inline f8 f8_rint(f8 x) {
#if defined(__AVX2__)
    return (f8)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    i8x sign = f8_bits(x) & i8_set(INT32_MIN);
    i8x magnitude = f8_bits(x) & i8_set(INT32_MAX);
    f8 shift = f8_from_bits(sign | f8_bits(f8_set(8388608.0f)));
    f8 rounded = (x + shift) - shift;
    return f8_select(magnitude < f8_bits(f8_set(8388608.0f)), rounded, x);
#endif
}
/* For integer-valued lanes within int32. */
static inline i8x f8_to_int(f8 x) {
#if defined(__AVX2__)
    return (i8x)_mm256_cvttps_epi32((__m256)x);
#else
    return __builtin_convertvector(x, i8x);
#endif
}
/* Whether any lane is not zero. */
static inline bool i8_any(i8x v) {
#if defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
    int32_t any = 0;
    for (int i = 0; i < LANES; i++)
        any |= v[i];
    return any != 0;
#endif
}
static inline int32_t i8_max_across(i8x v) {
    int32_t m = v[0];
    for (int i = 1; i < LANES; i++)
        m = v[i] > m ? v[i] : m;
    return m;
}
static inline float f8_max_across(f8 v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++)
        m = v[i] > m ? v[i] : m;
    return m;
}
static inline int64_t i8_sum_across(i8x v) {
    int64_t s = 0;
    for (int i = 0; i < LANES; i++)
        s += v[i];
    return s;
}
/* Lane i: all ones where first + i < limit. */
static inline i8x i8_before(int64_t first, int64_t limit) {
    int64_t left = limit - first;
    int32_t count = left > LANES ? LANES : left < 0 ? 0 : (int32_t)left;
    return (i8x){0, 1, 2, 3, 4, 5, 6, 7} < i8_set(count);
}
/* Lanes within int16, to eight int16. */
static inline void i8_store16(int16_t *p, i8x v) {
#if defined(__AVX2__)
    __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi32(low, high));
#else
    for (int i = 0; i < LANES; i++)
        p[i] = (int16_t)v[i];
#endif
}
/* Lanes within int8, to eight int8. */
static inline void i8_store8(int8_t *p, i8x v) {
#if defined(__AVX2__)
    __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
    __m128i words = _mm_packs_epi32(low, high);
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
#else
    for (int i = 0; i < LANES; i++)
        p[i] = (int8_t)v[i];
#endif
}

#endif
