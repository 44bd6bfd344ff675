/* int8 x int8 -> int32 over panels of 16 columns: the one inner product of linear layers and attention scores.
 *
 * A panel holds b[kq][16][4]: for each group of four k, 16 columns of 4 values (64 bytes). a is row-major in the form
 * each instruction set wants (`a_t`), k padded to a multiple of 4 with a = 0. All values lie in -127..127. Sums are
 * integers, so the order and the tiles below are free.
 *
 *   avx512vnni  a + 128 as unsigned bytes; vpdpbusd; 128 * (column sum of b) is taken off again
 *   avx2        a and b widened to int16; vpmaddwd: two products of at most 16129 fit, nothing saturates
 *               (vpmaddubsw on bytes would need |a|, a sign per product and a second multiply: no faster)
 *   portable    plain C */

#define PANEL 16

#if defined(__AVX512VNNI__)
typedef uint8_t a_t;
#elif defined(__AVX2__)
typedef int16_t a_t;
#else
typedef int8_t a_t;
#endif

/* One row of k int8 values to a_t, padded to k4 * 4. */
static inline void pack_row(const int8_t *q, int64_t k, int64_t k4, a_t *out) {
    int64_t i = 0;
#if defined(__AVX512VNNI__)
    for (; i + 32 <= k; i += 32)
        _mm256_storeu_si256((__m256i *)(out + i),
                            _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(q + i)), _mm256_set1_epi8(-128)));
    for (; i < k; i++)
        out[i] = (uint8_t)(q[i] + 128);
    for (; i < k4 * 4; i++)
        out[i] = 128;
#else
    for (; i < k; i++)
        out[i] = q[i];
    for (; i < k4 * 4; i++)
        out[i] = 0;
#endif
}

#if defined(__AVX512VNNI__)

/* R rows of a times one panel; with `comp`, the panel's column sums times 128 as well. */
static inline __attribute__((always_inline)) void tile(const int R, const a_t *a, int64_t lda, const int8_t *panel,
                                                       int64_t k4, const int32_t *sums, int32_t *c, int64_t ldc) {
    __m512i acc[12], extra = _mm512_setzero_si512();
    const __m512i offset = _mm512_set1_epi8(-128);
    for (int r = 0; r < R; r++)
        acc[r] = _mm512_setzero_si512();
    for (int64_t g = 0; g < k4; g++) {
        __m512i b = _mm512_loadu_si512(panel + g * 64);
        for (int r = 0; r < R; r++) {
            int32_t quad;
            memcpy(&quad, a + r * lda + g * 4, 4);
            acc[r] = _mm512_dpbusd_epi32(acc[r], _mm512_set1_epi32(quad), b);
        }
        if (!sums)
            extra = _mm512_dpbusd_epi32(extra, offset, b);
    }
    if (sums)
        extra = _mm512_slli_epi32(_mm512_loadu_si512(sums), 7);
    for (int r = 0; r < R; r++)
        _mm512_storeu_si512(c + r * ldc, _mm512_sub_epi32(acc[r], extra));
}

/* One row: four chains, because one would wait for the latency of vpdpbusd. */
static inline void tile1(const a_t *a, const int8_t *panel, int64_t k4, const int32_t *sums, int32_t *c) {
    __m512i acc[4], extra = _mm512_setzero_si512();
    const __m512i offset = _mm512_set1_epi8(-128);
    for (int i = 0; i < 4; i++)
        acc[i] = _mm512_setzero_si512();
    for (int64_t g = 0; g < k4; g++) {
        int32_t quad;
        memcpy(&quad, a + g * 4, 4);
        __m512i b = _mm512_loadu_si512(panel + g * 64);
        acc[3] = _mm512_dpbusd_epi32(acc[3], _mm512_set1_epi32(quad), b);
        if (!sums)
            extra = _mm512_dpbusd_epi32(extra, offset, b);
        __m512i turn = acc[3];
        acc[3] = acc[2], acc[2] = acc[1], acc[1] = acc[0], acc[0] = turn;
    }
    if (sums)
        extra = _mm512_slli_epi32(_mm512_loadu_si512(sums), 7);
    __m512i total = _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]));
    _mm512_storeu_si512(c, _mm512_sub_epi32(total, extra));
}

/* c[rows][16] = a . panel. `sums`: the panel's column sums, or NULL to compute them. */
static inline void gemm_panel(const a_t *a, int64_t lda, int64_t rows, const int8_t *panel, int64_t k4,
                              const int32_t *sums, int32_t *c, int64_t ldc) {
    int64_t r = 0;
    for (; r + 12 <= rows; r += 12)
        tile(12, a + r * lda, lda, panel, k4, sums, c + r * ldc, ldc);
    for (; r + 4 <= rows; r += 4)
        tile(4, a + r * lda, lda, panel, k4, sums, c + r * ldc, ldc);
    for (; r + 2 <= rows; r += 2)
        tile(2, a + r * lda, lda, panel, k4, sums, c + r * ldc, ldc);
    if (r < rows)
        tile1(a + r * lda, panel, k4, sums, c + r * ldc);
}

#elif defined(__AVX2__)

/* Eight lanes hold two partial sums for each of four columns; add the pairs of v[0..3] to 16 columns. */
static inline void store_columns(int32_t *c, const __m256i v[4], bool add) {
    for (int h = 0; h < 2; h++) {
        __m256i sum = _mm256_hadd_epi32(v[2 * h], v[2 * h + 1]);
        sum = _mm256_permute4x64_epi64(sum, 0xd8);
        if (add)
            sum = _mm256_add_epi32(sum, _mm256_loadu_si256((const __m256i *)(c + 8 * h)));
        _mm256_storeu_si256((__m256i *)(c + 8 * h), sum);
    }
}

static inline __m256i quad_of(const a_t *a) {
    int64_t quad;
    memcpy(&quad, a, 8);
    return _mm256_set1_epi64x(quad);
}

/* R rows (1 to 3) of a times 16 columns. b: int16 [k4][16][4] when `wide`, else the int8 panel. */
static inline __attribute__((always_inline)) void tile(const int R, const bool wide, const a_t *a, int64_t lda,
                                                       const void *b, int64_t k4, int32_t *c, int64_t ldc, bool add) {
    __m256i acc[3][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v++)
            acc[r][v] = _mm256_setzero_si256();
    for (int64_t g = 0; g < k4; g++) {
        __m256i columns[4];
        for (int v = 0; v < 4; v++)
            columns[v] = wide ? _mm256_load_si256((const __m256i *)((const int16_t *)b + g * 64 + v * 16))
                              : _mm256_cvtepi8_epi16(
                                    _mm_loadu_si128((const __m128i *)((const int8_t *)b + g * 64 + v * 16)));
        for (int r = 0; r < R; r++) {
            __m256i quad = quad_of(a + r * lda + g * 4);
            for (int v = 0; v < 4; v++)
                acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(columns[v], quad));
        }
    }
    for (int r = 0; r < R; r++)
        store_columns(c + r * ldc, acc[r], add);
}

#define WIDE_K4 128 /* 16 KiB of widened panel: half of the first-level cache */

/* c[rows][16] = a . panel. */
static inline void gemm_panel(const a_t *a, int64_t lda, int64_t rows, const int8_t *panel, int64_t k4,
                              const int32_t *sums, int32_t *c, int64_t ldc) {
    (void)sums;
    if (rows <= 3) {
        if (rows == 1)
            tile(1, false, a, lda, panel, k4, c, ldc, false);
        else if (rows == 2)
            tile(2, false, a, lda, panel, k4, c, ldc, false);
        else
            tile(3, false, a, lda, panel, k4, c, ldc, false);
        return;
    }
    _Alignas(32) int16_t wide[WIDE_K4 * 64];
    for (int64_t g = 0; g < k4; g += WIDE_K4) {
        int64_t count = k4 - g < WIDE_K4 ? k4 - g : WIDE_K4;
        for (int64_t i = 0; i < count * 4; i++)
            _mm256_store_si256(
                (__m256i *)(wide + i * 16),
                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(panel + g * 64 + i * 16))));
        int64_t r = 0;
        for (; r + 3 <= rows; r += 3)
            tile(3, true, a + r * lda + g * 4, lda, wide, count, c + r * ldc, ldc, g > 0);
        if (rows - r == 2)
            tile(2, true, a + r * lda + g * 4, lda, wide, count, c + r * ldc, ldc, g > 0);
        else if (rows - r == 1)
            tile(1, true, a + r * lda + g * 4, lda, wide, count, c + r * ldc, ldc, g > 0);
    }
}

#else

/* c[rows][16] = a . panel. */
static inline void gemm_panel(const a_t *a, int64_t lda, int64_t rows, const int8_t *panel, int64_t k4,
                              const int32_t *sums, int32_t *c, int64_t ldc) {
    (void)sums;
    for (int64_t r = 0; r < rows; r++) {
        int32_t acc[PANEL] = {0};
        for (int64_t g = 0; g < k4; g++)
            for (int j = 0; j < PANEL; j++)
                for (int i = 0; i < 4; i++)
                    acc[j] += a[r * lda + g * 4 + i] * panel[g * 64 + j * 4 + i];
        memcpy(c + r * ldc, acc, sizeof acc);
    }
}

#endif
