/* int8 x int8 -> int32 over panels of 16 columns: the one inner product of linear layers and attention scores.
 *
 * A panel holds b[k4][16][4]: for each group of four k, 16 columns of 4 values (64 bytes). The rows of a are cut into
 * tiles of `tile_height(rows)`, and a tile of R rows holds a[k4][R][4] in the form the instruction set wants (`a_t`),
 * k padded with a = 0: every load of an inner loop then follows the last. All values lie in -127..127. Sums are
 * integers, so the order and the tiles are free.
 *
 *   avx512vnni  a + 128 as unsigned bytes; vpdpbusd; 128 * (column sum of b) is taken off again
 *   avx2        a and b widened to int16; vpmaddwd: two products of at most 16129 fit, nothing saturates
 *               (vpmaddubsw on bytes would need |a|, a sign per product and a second multiply: no faster)
 *   portable    plain C */

#define PANEL 16
#define NOINLINE __attribute__((noinline)) /* keeps the sums of an inner loop in registers */

#if defined(__AVX512VNNI__)
typedef uint8_t a_t;
#define TILE_MAX 12
#elif defined(__AVX2__)
typedef int16_t a_t;
#define TILE_MAX 6
#else
typedef int8_t a_t;
#define TILE_MAX 1
#endif

/* 8 rows become 4 + 4 rather than 6 + 2. */
static inline int64_t tile_height(int64_t rows) {
    const int64_t tiles = (rows + TILE_MAX - 1) / TILE_MAX;
    return (rows + tiles - 1) / tiles;
}

/* Row `row` of `rows` into its place in `a`, which holds rows * k4 * 4 elements. */
static inline void pack_row(const int8_t *q, int64_t k, int64_t k4, int64_t rows, int64_t row, a_t *a) {
    const int64_t height = tile_height(rows), first = row / height * height;
    const int64_t step = (rows - first < height ? rows - first : height) * 4;
    a_t *out = a + first * k4 * 4 + (row - first) * 4;
#if defined(__AVX512VNNI__)
    const uint32_t flip = 0x80808080u; /* adds 128 to each byte */
    for (int64_t g = 0; g < k4; g++, out += step) {
        uint32_t quad = 0;
        memcpy(&quad, q + g * 4, (size_t)(k - g * 4 < 4 ? k - g * 4 : 4));
        quad ^= flip;
        memcpy(out, &quad, 4);
    }
#else
    for (int64_t g = 0; g < k / 4; g++, out += step)
        for (int i = 0; i < 4; i++)
            out[i] = q[g * 4 + i];
    for (int64_t i = 0; k % 4 && i < 4; i++)
        out[i] = i < k % 4 ? q[k / 4 * 4 + i] : 0;
#endif
}

#if defined(__AVX512VNNI__)

/* R rows of a times one panel. `sums`: the panel's column sums, or NULL to compute them. */
static inline __attribute__((always_inline)) void tile(const int R, const a_t *a, const int8_t *panel, int64_t k4,
                                                       const int32_t *sums, int32_t *c, int64_t ldc) {
    __m512i acc[TILE_MAX], extra = _mm512_setzero_si512();
    const __m512i offset = _mm512_set1_epi8(-128);
    for (int r = 0; r < R; r++)
        acc[r] = _mm512_setzero_si512();
    for (int64_t g = 0; g < k4; g++) {
        const __m512i b = _mm512_loadu_si512(panel + g * 64);
        for (int r = 0; r < R; r++) {
            int32_t quad;
            memcpy(&quad, a + (g * R + r) * 4, 4);
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
static inline void single_tile(const a_t *a, const int8_t *panel, int64_t k4, const int32_t *sums, int32_t *c) {
    __m512i acc[4], extra = _mm512_setzero_si512();
    const __m512i offset = _mm512_set1_epi8(-128);
    for (int i = 0; i < 4; i++)
        acc[i] = _mm512_setzero_si512();
    for (int64_t g = 0; g < k4; g += 4)
        for (int64_t i = 0; i < 4 && g + i < k4; i++) {
            int32_t quad;
            memcpy(&quad, a + (g + i) * 4, 4);
            const __m512i b = _mm512_loadu_si512(panel + (g + i) * 64);
            acc[i] = _mm512_dpbusd_epi32(acc[i], _mm512_set1_epi32(quad), b);
            if (!sums)
                extra = _mm512_dpbusd_epi32(extra, offset, b);
        }
    if (sums)
        extra = _mm512_slli_epi32(_mm512_loadu_si512(sums), 7);
    const __m512i total = _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]));
    _mm512_storeu_si512(c, _mm512_sub_epi32(total, extra));
}

/* c[rows][16] = a . panel. */
static NOINLINE void gemm_panel(const a_t *a, int64_t rows, const int8_t *panel, int64_t k4, const int32_t *sums,
                              int32_t *c, int64_t ldc) {
    const int64_t height = tile_height(rows);
    for (int64_t r = 0; r < rows; r += height) {
        const a_t *from = a + r * k4 * 4;
        int32_t *to = c + r * ldc;
        switch (rows - r < height ? rows - r : height) {
        case 12: tile(12, from, panel, k4, sums, to, ldc); break;
        case 11: tile(11, from, panel, k4, sums, to, ldc); break;
        case 10: tile(10, from, panel, k4, sums, to, ldc); break;
        case 9: tile(9, from, panel, k4, sums, to, ldc); break;
        case 8: tile(8, from, panel, k4, sums, to, ldc); break;
        case 7: tile(7, from, panel, k4, sums, to, ldc); break;
        case 6: tile(6, from, panel, k4, sums, to, ldc); break;
        case 5: tile(5, from, panel, k4, sums, to, ldc); break;
        case 4: tile(4, from, panel, k4, sums, to, ldc); break;
        case 3: tile(3, from, panel, k4, sums, to, ldc); break;
        case 2: tile(2, from, panel, k4, sums, to, ldc); break;
        default: single_tile(from, panel, k4, sums, to); break;
        }
    }
}

#elif defined(__AVX2__)

/* Eight lanes hold two partial sums for each of four columns; the pairs of two vectors add up to eight columns. */
static inline void store_columns(int32_t *c, __m256i v0, __m256i v1, bool add) {
    __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(v0, v1), 0xd8);
    if (add)
        sum = _mm256_add_epi32(sum, _mm256_loadu_si256((const __m256i *)c));
    _mm256_storeu_si256((__m256i *)c, sum);
}

static inline __m256i quad_of(const a_t *a) {
    int64_t quad;
    memcpy(&quad, a, 8);
    return _mm256_set1_epi64x(quad);
}

/* sum += pairs of a * b. Assembly, because gcc 12 moves all products of a tile before the sums and spills the sums. */
static inline __m256i madd(__m256i sum, __m256i a, __m256i b) {
    __m256i product;
    __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
    return sum;
}

#define FETCH_AHEAD 4096 /* the next panel follows in memory; past the end of the last one it does nothing */

/* R rows of a times 8 columns (`half` of a panel): 12 sums, 2 columns, a quad and a product fill 16 registers. Widening
 * the panel on the way costs nothing: it runs in pipes that multiplication leaves idle. */
static inline __attribute__((always_inline)) void tile(const int R, const a_t *a, const int8_t *half, int64_t k4,
                                                       int32_t *c, int64_t ldc, bool add) {
    __m256i sum[TILE_MAX][2];
    for (int r = 0; r < R; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t g = 0; g < k4; g++, half += 64, a += R * 4) {
        _mm_prefetch((const char *)half + FETCH_AHEAD, _MM_HINT_T0);
        const __m256i b0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)half));
        const __m256i b1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(half + 16)));
        for (int r = 0; r < R; r++) {
            const __m256i quad = quad_of(a + r * 4);
            sum[r][0] = madd(sum[r][0], b0, quad);
            sum[r][1] = madd(sum[r][1], b1, quad);
        }
    }
    for (int r = 0; r < R; r++)
        store_columns(c + r * ldc, sum[r][0], sum[r][1], add);
}

/* R rows (1 to 3) of a times 4 * V columns of an int8 panel, widened on the way: for few rows, bound by memory. */
static inline __attribute__((always_inline)) void thin_tile(const int R, const int V, const a_t *a, const int8_t *panel,
                                                            int64_t k4, int32_t *c, int64_t ldc) {
    __m256i sum[3][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++)
            sum[r][v] = _mm256_setzero_si256();
    for (int64_t g = 0; g < k4; g++, panel += 64, a += R * 4)
        for (int v = 0; v < V; v++) {
            const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(panel + v * 16)));
            for (int r = 0; r < R; r++)
                sum[r][v] = madd(sum[r][v], b, quad_of(a + r * 4));
        }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < V / 2; h++)
            store_columns(c + r * ldc + 8 * h, sum[r][2 * h], sum[r][2 * h + 1], false);
}

#define CHUNK_K4 384 /* 24 KiB of panel, which stays in the first-level cache for all rows */

/* c[rows][16] = a . panel. */
static NOINLINE void gemm_panel(const a_t *a, int64_t rows, const int8_t *panel, int64_t k4, const int32_t *sums,
                                int32_t *c, int64_t ldc) {
    (void)sums;
    switch (rows) {
    case 1: thin_tile(1, 4, a, panel, k4, c, ldc); return;
    case 2: thin_tile(2, 4, a, panel, k4, c, ldc); return;
    default: break;
    }
    const int64_t height = tile_height(rows);
    for (int64_t g = 0; g < k4; g += CHUNK_K4) {
        const int64_t count = k4 - g < CHUNK_K4 ? k4 - g : CHUNK_K4;
        for (int64_t h = 0; h < 2; h++)
            for (int64_t r = 0; r < rows; r += height) {
                const int64_t in_tile = rows - r < height ? rows - r : height;
                const a_t *from = a + (r * k4 + g * in_tile) * 4;
                const int8_t *half = panel + g * 64 + h * 32;
                int32_t *to = c + r * ldc + h * 8;
                switch (in_tile) {
                case 6: tile(6, from, half, count, to, ldc, g > 0); break;
                case 5: tile(5, from, half, count, to, ldc, g > 0); break;
                case 4: tile(4, from, half, count, to, ldc, g > 0); break;
                case 3: tile(3, from, half, count, to, ldc, g > 0); break;
                case 2: tile(2, from, half, count, to, ldc, g > 0); break;
                default: tile(1, from, half, count, to, ldc, g > 0); break;
                }
            }
    }
}

#else

/* c[rows][16] = a . panel. */
static NOINLINE void gemm_panel(const a_t *a, int64_t rows, const int8_t *panel, int64_t k4, const int32_t *sums,
                              int32_t *c, int64_t ldc) {
    (void)sums;
    for (int64_t r = 0; r < rows; r++) {
        int32_t acc[PANEL] = {0};
        for (int64_t g = 0; g < k4; g++)
            for (int j = 0; j < PANEL; j++)
                for (int i = 0; i < 4; i++)
                    acc[j] += a[(r * k4 + g) * 4 + i] * panel[g * 64 + j * 4 + i];
        memcpy(c + r * ldc, acc, sizeof acc);
    }
}

#endif
