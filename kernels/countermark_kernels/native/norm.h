/* RMSNorm and quantisation: norm.py. */

/* r for a row with amax >= 2^-100, or a negative number where the mean square overflows. */
static inline float inverse_rms(const float *x, int64_t n, float amax, float eps) {
    int32_t e = exponent_of(amax);
    f8 scale = f8_set(pow2(14 - e));
    int64_t total = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        f8 v = i + LANES <= n ? f8_load(x + i) : f8_load_part(x + i, n - i);
        i8x z = f8_to_int(f8_rint(v * scale));
#if defined(__AVX2__)
        __m256i even = (__m256i)z, odd = _mm256_srli_epi64(even, 32);
        __m256i squares = _mm256_add_epi64(_mm256_mul_epi32(even, even), _mm256_mul_epi32(odd, odd));
        __m128i half = _mm_add_epi64(_mm256_castsi256_si128(squares), _mm256_extracti128_si256(squares, 1));
        total += _mm_extract_epi64(half, 0) + _mm_extract_epi64(half, 1);
#else
        for (int j = 0; j < LANES; j++)
            total += (int64_t)z[j] * z[j];
#endif
    }
    float mean = div1(f32_of(total), (float)n);
    int32_t power = 2 * e - 28;
    float mean_square = mean * pow2(power < -126 ? -126 : power > 127 ? 127 : power);
    if (bits_of(mean_square) >= INFINITY_BITS)
        return -1.0f;
    return div1(1.0f, sqrt1(mean_square + eps));
}

static void norm_item(void *arg, int64_t item) {
    struct rows_job *job = arg;
    int64_t end = (item + 1) * job->per_item < job->rows ? (item + 1) * job->per_item : job->rows;
    for (int64_t r = item * job->per_item; r < end; r++) {
        const float *x = job->x + r * job->k;
        float amax = row_amax(x, job->k);
        if (bits_of(amax) >= INFINITY_BITS) {
            atomic_store(&job->status, CM_NOT_FINITE);
            continue;
        }
        row_quantise(x, job->k, amax, job->q + r * job->k);
        if (amax < TINY) {
            job->s[r] = 0.0f;
            continue;
        }
        float inverse = inverse_rms(x, job->k, amax, job->eps);
        if (inverse < 0.0f)
            atomic_store(&job->status, CM_RANGE);
        job->s[r] = div1(amax, 127.0f) * inverse;
    }
}

static int norm_quantise(const float *x, int64_t rows, int64_t n, float eps, int8_t *q, float *s) {
    struct rows_job job = {.x = x, .rows = rows, .k = n, .eps = eps, .q = q, .s = s};
    return run_rows(norm_item, &job);
}
