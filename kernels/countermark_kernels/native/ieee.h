/* The operations that need care to round once: NUMERICS.md section 1. The only header that divides, roots or rounds. */
#ifndef CM_IEEE_H
#define CM_IEEE_H

#include <math.h>

#include "simd.h"

#define LOG2E 0x1.715476p+0f
#define TINY 0x1p-100f
#define INFINITY_BITS 0x7f800000
#define MAGNITUDE_BITS 0x7fffffff

static inline int32_t bits_of(float x) {
    int32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}
static inline float from_bits(int32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}
static inline float div1(float a, float b) { return a / b; }
static inline f8 div8(f8 a, f8 b) { return a / b; }
static inline float sqrt1(float x) { return sqrtf(x); } /* an instruction: -fno-math-errno */
static inline float pow2(int32_t exponent) { return from_bits((exponent + 127) << 23); }
static inline int32_t exponent_of(float x) { return (bits_of(x) >> 23) - 127; }
static inline int32_t ceil_of(float x) { /* |x| < 2^31 */
    int32_t whole = (int32_t)x;
    return (float)whole < x ? whole + 1 : whole;
}
static inline i8x ceil_exponent8(f8 x) { return ((f8_bits(x) + i8_set(0x7fffff)) >> 23) - i8_set(127); }
/* An integer under 2^53 as binary32, rounded once: exact in binary64 first. */
static inline float f32_of(int64_t x) { return (float)(double)x; }

static inline f8 exp2_8(f8 x) {
    x = f8_min(f8_max(x, f8_set(-126.0f)), f8_set(126.0f));
    f8 k = f8_rint(x);
    f8 f = x - k;
    f8 p = f8_set(0x1.470b4ap-13f);
    p = p * f + f8_set(0x1.5f7276p-10f); /* -ffp-contract=off: a product, rounded, and a sum, rounded */
    p = p * f + f8_set(0x1.3b270ep-7f);
    p = p * f + f8_set(0x1.c6ae72p-5f);
    p = p * f + f8_set(0x1.ebfbe2p-3f);
    p = p * f + f8_set(0x1.62e432p-1f);
    p = p * f + f8_set(1.0f);
    return f8_from_bits(f8_bits(p) + (f8_to_int(k) << 23));
}
/* 2^(k + f) by the polynomial of degree 3. */
static inline f8 exp2_short8(i8x k, f8 f) {
    f8 p = f8_fma(f8_set(0x1.c2a218p-5f), f, f8_set(0x1.f00c4ep-3f));
    p = f8_fma(p, f, f8_set(0x1.62f5fap-1f));
    p = f8_fma(p, f, f8_set(1.0f));
    return f8_from_bits(f8_bits(p) + (k << 23));
}
static inline f8 round_bf16_8(f8 x) {
    i8x b = f8_bits(x);
    return f8_from_bits((b + (i8_set(0x7fff) + ((b >> 16) & i8_set(1)))) & i8_set(-0x10000));
}
static inline float exp2_1(float x) { return exp2_8(f8_set(x))[0]; }
static inline f8 exp_8(f8 x) { return exp2_8(f8_min(f8_max(x, f8_set(-87.0f)), f8_set(87.0f)) * f8_set(LOG2E)); }

#endif
