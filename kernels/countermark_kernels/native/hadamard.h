/* Unnormalised Hadamard transform of n elements in place: hadamard.py. n is a power of two, at least 8. */

#if defined(__clang__)
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (i8x){__VA_ARGS__})
#endif

static inline f8 butterfly1(f8 x) {
    f8 swapped = SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6);
    i8x negative = {0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN};
    return swapped + f8_from_bits(f8_bits(x) ^ negative); /* even: b + a; odd: a + (-b) */
}
static inline f8 butterfly2(f8 x) {
    f8 swapped = SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5);
    i8x negative = {0, 0, INT32_MIN, INT32_MIN, 0, 0, INT32_MIN, INT32_MIN};
    return swapped + f8_from_bits(f8_bits(x) ^ negative);
}
static inline f8 butterfly4(f8 x) {
    f8 swapped = SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3);
    i8x negative = {0, 0, 0, 0, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN};
    return swapped + f8_from_bits(f8_bits(x) ^ negative);
}

/* Eight vectors: strides 8, 16 and 32 without a round trip through memory. */
static inline void butterflies64(f8 v[8]) {
    for (int stride = 1; stride < 8; stride *= 2)
        for (int i = 0; i < 8; i++)
            if (!(i & stride)) {
                f8 a = v[i], b = v[i + stride];
                v[i] = a + b;
                v[i + stride] = a - b;
            }
}

static inline void hadamard(float *x, int64_t n) {
    if (n < 64) {
        for (int64_t i = 0; i < n; i += LANES)
            f8_store(x + i, butterfly4(butterfly2(butterfly1(f8_load(x + i)))));
        for (int64_t stride = LANES; stride < n; stride *= 2)
            for (int64_t start = 0; start < n; start += 2 * stride)
                for (int64_t i = start; i < start + stride; i += LANES) {
                    f8 a = f8_load(x + i), b = f8_load(x + i + stride);
                    f8_store(x + i, a + b);
                    f8_store(x + i + stride, a - b);
                }
        return;
    }
    for (int64_t start = 0; start < n; start += 64) {
        f8 v[8];
        for (int i = 0; i < 8; i++)
            v[i] = butterfly4(butterfly2(butterfly1(f8_load(x + start + i * LANES))));
        butterflies64(v);
        for (int i = 0; i < 8; i++)
            f8_store(x + start + i * LANES, v[i]);
    }
    int64_t stride = 64;
    if (n >= 512) {
        stride = 512;
        for (int64_t start = 0; start < n; start += 512)
            for (int64_t i = start; i < start + 64; i += LANES) {
                f8 v[8];
                for (int j = 0; j < 8; j++)
                    v[j] = f8_load(x + i + j * 64);
                butterflies64(v);
                for (int j = 0; j < 8; j++)
                    f8_store(x + i + j * 64, v[j]);
            }
    }
    for (; stride < n; stride *= 2)
        for (int64_t start = 0; start < n; start += 2 * stride)
            for (int64_t i = start; i < start + stride; i += LANES) {
                f8 a = f8_load(x + i), b = f8_load(x + i + stride);
                f8_store(x + i, a + b);
                f8_store(x + i + stride, a - b);
            }
}

/* Blocks under 8 elements: the definition itself. */
static inline void hadamard_small(float *x, int64_t n) {
    for (int64_t stride = 1; stride < n; stride *= 2)
        for (int64_t i = 0; i < n; i++)
            if (!(i & stride)) {
                float a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
}
