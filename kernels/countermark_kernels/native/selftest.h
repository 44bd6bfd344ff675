/* What the compiler and the processor must get right, for this instruction set: see ieee.py for the same in torch. */

/* The weighted sum over bits(exp2(i / 2048)), i in -2^18..2^18, modulo 2^64: ieee.EXP2_DIGEST;
 * or of exp2_short, within -96..96: ieee.EXP2_SHORT_DIGEST. */
static uint64_t exp2_digest(bool short_form) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < 1 << 19; i += LANES) {
        float x[LANES];
        for (int64_t j = 0; j < LANES; j++)
            x[j] = (float)(i + j - (1 << 18)) * 0x1p-11f;
        f8 narrow = f8_max(f8_min(f8_load(x), f8_set(96.0f)), f8_set(-96.0f)), k = f8_rint(narrow);
        f8 y = short_form ? exp2_short8(f8_to_int(k), narrow - k) : exp2_8(f8_load(x));
        for (int64_t j = 0; j < LANES; j++)
            sum += (uint64_t)bits_of(y[j]) * (uint64_t)(2 * (i + j) + 1);
    }
    return sum;
}

/* Division, root, rounding, conversion, subnormals and contraction, against binary64 or integers. `volatile` keeps the
 * compiler from computing the answers itself. */
static bool arithmetic(void) {
    uint32_t state = 12345;
    for (int i = 0; i < 4096; i++) {
        volatile float pair[2];
        for (int j = 0; j < 2; j++) {
            state = state * 1664525u + 1013904223u;
            pair[j] = from_bits((int32_t)(((67 + (state >> 9) % 120) << 23) | (state & 0x7fffff)));
        }
        const float a = pair[0], b = pair[1];
        const f8 va = f8_set(a), vb = f8_set(b);
        const float quotient = (float)((double)a / (double)b), product = (float)((double)a * (double)b);
        if (div1(a, b) != quotient || div8(va, vb)[3] != quotient)
            return false;
        if (product < FLT_MAX && (va * vb - f8_set(product))[5] != 0.0f)
            return false;
        const float rest = (float)((double)a * (double)b - (double)product);
        if (product < FLT_MAX && product > 0x1p-60f && f8_fma(va, vb, f8_set(-product))[i % LANES] != rest)
            return false;
        volatile float odd = 1.0f + 0x1p-12f, below = i & 1 ? 0x1p-80f : -0x1p-80f;
        if (f8_fma(f8_set(odd), f8_set(odd), f8_set(below))[i % LANES] != 1.0f + 0x1p-11f + (i & 1 ? 0x1p-23f : 0.0f))
            return false;
        const float root = sqrt1(a);
        const double low = ((double)root + (double)from_bits(bits_of(root) - 1)) * 0.5;
        const double high = ((double)root + (double)from_bits(bits_of(root) + 1)) * 0.5;
        if (low * low > (double)a || (double)a > high * high)
            return false;
        const int32_t twice = (int32_t)(state >> 8) - (1 << 23), floor = twice >> 1; /* |twice / 2| < 2^22 */
        const int32_t nearest = twice & 1 ? floor + (floor & 1) : floor;
        if (f8_to_int(f8_rint(f8_set((float)twice) * f8_set(0.5f)))[i % LANES] != nearest)
            return false;
        const int64_t n = (1 << 23) + (int64_t)(state >> 10);
        if ((int64_t)f32_of((2 * n + 1) << 20) != (n + (n & 1)) << 21 || (int64_t)f32_of(((2 * n + 1) << 20) + 1) != (n + 1) << 21)
            return false;
        const int32_t wide = (int32_t)(2 * n + 1); /* 25 bits: a tie in the conversion from int32 */
        if ((int64_t)f8_convert(i8_set(wide))[i % LANES] != 2 * (n + (n & 1)))
            return false;
        volatile float tiny = from_bits(1 + (int32_t)(state >> 10));
        if (bits_of((f8_set(tiny) + f8_set(tiny))[i % LANES]) != 2 * bits_of(tiny))
            return false;
    }
    return true;
}
