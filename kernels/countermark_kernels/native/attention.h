/* Attention in two passes over an int8 cache: attention.py. An item is a tile of query rows of one kv head. */

#define TILE_ROWS 24
#define GROUP_MAX 256 /* query heads of one kv head */
#define PV_TOKENS 512 /* |n * v| <= 32639 * 127, so 512 of them stay under 2^31 */
#define P_MAX 32512.0f
#define SCORE_MAX 0x1p14f
#define LAMBDA_MIN (-40)
#define FLOOR 96 /* a score this far below the largest, in powers of two, counts as that far */
#define ROUND 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer */

/* acc[r][0..PV_COLUMNS] = sum over `tokens` tokens of n[r][tokens] * v, up to PV_ROWS rows. `blocks`: where the values
 * [pairs][d][2] of each CM_BLOCK tokens are, then one block more to fetch; the columns begin `offset` bytes behind. Sums
 * stay in registers. The processor fetches ahead by itself within a block only. */
#if defined(__AVX512VNNI__)
#define PV_ROWS 6
#define PV_COLUMNS 32
static inline __attribute__((always_inline)) void pv_tile(const int R, const int16_t *n, int64_t ldn,
                                                          const int8_t *const *blocks, int64_t offset, int64_t tokens,
                                                          int64_t d, int32_t *acc) {
    __m512i sum[PV_ROWS][2];
    for (int r = 0; r < R; r++)
        sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (int64_t t = 0; t < tokens; t += CM_BLOCK, n += CM_BLOCK) {
        const int64_t pairs = (tokens - t < CM_BLOCK ? tokens - t : CM_BLOCK) / 2;
        const int8_t *v = blocks[t / CM_BLOCK] + offset, *next = blocks[t / CM_BLOCK + 1] + offset;
        for (int64_t p = 0; p < pairs; p++, v += 2 * d, next += 2 * d) {
            __builtin_prefetch(next);
            const __m512i v0 = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)v));
            const __m512i v1 = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(v + 32)));
            for (int r = 0; r < R; r++) {
                int32_t pair;
                memcpy(&pair, n + r * ldn + 2 * p, 4);
                sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], _mm512_set1_epi32(pair), v0);
                sum[r][1] = _mm512_dpwssd_epi32(sum[r][1], _mm512_set1_epi32(pair), v1);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        _mm512_storeu_si512(acc + r * d, sum[r][0]);
        _mm512_storeu_si512(acc + r * d + 16, sum[r][1]);
    }
}
#elif defined(__AVX2__)
#define PV_ROWS 6
#define PV_COLUMNS 16
static inline __attribute__((always_inline)) void pv_tile(const int R, const int16_t *n, int64_t ldn,
                                                          const int8_t *const *blocks, int64_t offset, int64_t tokens,
                                                          int64_t d, int32_t *acc) {
    __m256i sum[PV_ROWS][2];
    for (int r = 0; r < R; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int64_t t = 0; t < tokens; t += CM_BLOCK, n += CM_BLOCK) {
        const int64_t pairs = (tokens - t < CM_BLOCK ? tokens - t : CM_BLOCK) / 2;
        const int8_t *v = blocks[t / CM_BLOCK] + offset, *next = blocks[t / CM_BLOCK + 1] + offset;
        for (int64_t p = 0; p < pairs; p++, v += 2 * d, next += 2 * d) {
            __builtin_prefetch(next);
            const __m256i v0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)v));
            const __m256i v1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(v + 16)));
            for (int r = 0; r < R; r++) {
                int32_t pair;
                memcpy(&pair, n + r * ldn + 2 * p, 4);
                sum[r][0] = madd(sum[r][0], v0, _mm256_set1_epi32(pair));
                sum[r][1] = madd(sum[r][1], v1, _mm256_set1_epi32(pair));
            }
        }
    }
    for (int r = 0; r < R; r++) {
        _mm256_storeu_si256((__m256i *)(acc + r * d), sum[r][0]);
        _mm256_storeu_si256((__m256i *)(acc + r * d + 8), sum[r][1]);
    }
}
#else
#define PV_ROWS 6
#define PV_COLUMNS 16
static inline void pv_tile(const int R, const int16_t *n, int64_t ldn, const int8_t *const *blocks,
                           int64_t offset, int64_t tokens, int64_t d, int32_t *acc) {
    for (int r = 0; r < R; r++) {
        int32_t sum[PV_COLUMNS] = {0};
        for (int64_t t = 0; t < tokens; t += 2) {
            const int8_t *v = blocks[t / CM_BLOCK] + offset + t % CM_BLOCK * d;
            for (int j = 0; j < PV_COLUMNS; j++)
                sum[j] += n[r * ldn + t] * v[2 * j] + n[r * ldn + t + 1] * v[2 * j + 1];
        }
        memcpy(acc + r * d, sum, sizeof sum);
    }
}
#endif

static NOINLINE void pv_product(const int16_t *n, int64_t ldn, int64_t rows, const int8_t *const *blocks,
                                int64_t tokens, int64_t d, int32_t *acc) {
    for (int64_t column = 0; column < d; column += PV_COLUMNS)
        for (int64_t r = 0; r < rows; r += PV_ROWS) {
            const int16_t *from = n + r * ldn;
            int32_t *to = acc + r * d + column;
            switch (rows - r < PV_ROWS ? rows - r : PV_ROWS) {
            case 6: pv_tile(6, from, ldn, blocks, 2 * column, tokens, d, to); break;
            case 5: pv_tile(5, from, ldn, blocks, 2 * column, tokens, d, to); break;
            case 4: pv_tile(4, from, ldn, blocks, 2 * column, tokens, d, to); break;
            case 3: pv_tile(3, from, ldn, blocks, 2 * column, tokens, d, to); break;
            case 2: pv_tile(2, from, ldn, blocks, 2 * column, tokens, d, to); break;
            default: pv_tile(1, from, ldn, blocks, 2 * column, tokens, d, to); break;
            }
        }
}

struct row_maxima {
    float a, raised;
};

/* Pass 1 over one row: S (int32) becomes a (binary32) in place. `lambda`: per token, as binary32. */
static NOINLINE struct row_maxima score_pass(int32_t *row, int64_t tokens, float c, const float *s_k,
                                             const float *lambda) {
    const f8 factor = f8_set(c), lowest = f8_set(-FLT_MAX);
    f8 most = lowest, most_raised = lowest;
    for (int64_t t = 0; t < tokens; t += LANES) { /* rows and scales extend to a multiple of 16 */
        f8 a = f8_convert(i8_load(row + t)) * f8_load(s_k + t);
        f8 raised = f8_fma(a, factor, f8_load(lambda + t));
        if (t + LANES > tokens) {
            i8x visible = i8_before(t, tokens);
            a = f8_select(visible, a, lowest);
            raised = f8_select(visible, raised, lowest);
        }
        most = f8_max(most, a);
        most_raised = f8_max(most_raised, raised);
        f8_store((float *)row + t, a);
    }
    return (struct row_maxima){f8_max_across(most), f8_max_across(most_raised)};
}

/* Pass 2 over one row: the weights n, zero from `tokens` to `padded`, and D. `top`: M; `c`: cq. */
static NOINLINE int64_t weight_pass(const float *a, int64_t tokens, int64_t padded, float c, int32_t top, float g,
                                    const float *s_v, int16_t *n) {
    const f8 factor = f8_set(c), gain = f8_set(g), bias = f8_set(ROUND - (float)top);
    const f8 lowest = f8_set(div1((float)(top - FLOOR), c > TINY ? c : TINY));
    const i8x zero = f8_bits(f8_set(ROUND));
    int64_t total = 0;
    i8x sum = i8_set(0);
    for (int64_t t = 0; t < tokens; t += LANES) {
        const f8 x = f8_max(f8_load(a + t), lowest), whole = f8_fma(x, factor, bias);
        const f8 f = f8_fma(x, factor, bias - whole);
        f8 e = exp2_short8(f8_bits(whole) - zero, f);
        f8 v = f8_load(s_v + t);
        if (t + LANES > tokens) { /* the cache's rows past the last token hold anything */
            i8x visible = i8_before(t, tokens);
            e = f8_select(visible, e, f8_set(0.0f));
            v = f8_select(visible, v, f8_set(0.0f));
        }
        sum += f8_to_int(f8_rint(e * f8_set(0x1p22f)));
        if ((t & (PV_TOKENS - 1)) == PV_TOKENS - LANES) { /* a lane adds at most 64 terms of 2^22 */
            total += i8_sum_across(sum);
            sum = i8_set(0);
        }
        i8_store16(n + t, f8_bits(f8_fma(e * v, gain, f8_set(ROUND))) - zero);
    }
    for (int64_t t = (tokens + LANES - 1) / LANES * LANES; t < padded; t += LANES)
        memset(n + t, 0, LANES * sizeof *n);
    return total + i8_sum_across(sum);
}

struct attend_item {
    int32_t span, kv_head, first, count; /* rows first .. first + count of the batch */
};

struct attend_job {
    const struct cm_span *spans;
    const struct attend_item *items;
    int64_t item_count, heads, kv_heads, d;
    float constant;
    const int8_t *q;
    const float *s_q;
    float *out;
    _Atomic int status;
};

/* How many tokens token t of a kv head lies behind the start of the pool's layer. */
static inline int64_t place(const struct cm_span *span, int64_t kv_head, int64_t t) {
    return kv_head * span->stride + span->table[t / CM_BLOCK] * (int64_t)CM_BLOCK + t % CM_BLOCK;
}

static inline void fetch(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)from + i);
}

static void attend_tile(void *arg, int64_t index) {
    struct attend_job *job = arg;
    const struct attend_item *item = job->items + job->item_count - 1 - index; /* the longest first */
    const struct cm_span *span = job->spans + item->span;
    const int64_t d = job->d, group = job->heads / job->kv_heads, rows = item->count * group;
    const int64_t position = span->position + item->first - span->start; /* of the first row */
    const int64_t padded = (position + item->count + PANEL - 1) / PANEL * PANEL;

    const size_t a_bytes = (size_t)(rows * d) * sizeof(a_t), s_bytes = (size_t)(rows * padded) * 4;
    const size_t bytes = a_bytes + s_bytes + s_bytes / 2 + (size_t)padded * 12 + (size_t)(rows * d) * 12 + 512;
    char *memory = cm_scratch(CM_SLOT_ITEM, bytes);
    if (!memory) {
        atomic_store(&job->status, CM_NO_MEMORY);
        return;
    }
    int64_t *high = (int64_t *)memory;
    int32_t *scores = (int32_t *)(high + rows * d), *acc = scores + rows * padded;
    float *lambda = (float *)(acc + rows * d), *s_k = lambda + padded, *s_v = s_k + padded;
    int16_t *n = (int16_t *)(s_v + padded);
    a_t *a = (a_t *)(n + rows * padded);
    float divisor[GROUP_MAX];

    for (int64_t r = 0; r < rows; r++)
        pack_row(job->q + ((item->first + r / group) * job->heads + item->kv_head * group + r % group) * d, d, d / 4,
                 rows, r, a);
    for (int64_t t = 0; t < padded; t += PANEL) {
        const int64_t token = place(span, item->kv_head, t);
        if (t + CM_BLOCK < padded) {
            const int64_t ahead = place(span, item->kv_head, t + CM_BLOCK);
            fetch(span->k + ahead * d, (size_t)(PANEL * d));
            fetch(span->s_k + ahead, PANEL * sizeof *s_k);
            fetch(span->s_v + ahead, PANEL * sizeof *s_v);
        }
        gemm_panel(a, rows, span->k + token * d, d / 4, NULL, scores + t, padded);
        memcpy(s_k + t, span->s_k + token, PANEL * sizeof *s_k);
        memcpy(s_v + t, span->s_v + token, PANEL * sizeof *s_v);
    }
    for (int64_t t = 0; t < padded; t += LANES)
        f8_store(lambda + t, f8_convert(i8_max(ceil_exponent8(f8_load(s_v + t)), i8_set(LAMBDA_MIN))));

    for (int64_t r = 0; r < rows; r++) {
        const int64_t tokens = position + r / group + 1;
        const int64_t head = (item->first + r / group) * job->heads + item->kv_head * group + r % group;
        const float scale = job->s_q[head] * job->constant, c = scale < TINY ? 0.0f : scale;
        const struct row_maxima most = score_pass(scores + r * padded, tokens, c, s_k, lambda);
        const float largest = most.a * c;
        if (!(fabsf(largest) < SCORE_MAX)) {
            atomic_store(&job->status, CM_RANGE);
            return;
        }
        const int32_t top = ceil_of(largest);
        const float g = P_MAX * pow2(top - ceil_of(most.raised));
        const float *row = (const float *)(scores + r * padded);
        divisor[r] = f32_of(weight_pass(row, tokens, padded, c, top, g, s_v, n + r * padded)) * g;
    }

    for (int64_t t = 0; t < padded; t += PV_TOKENS) {
        const int64_t tokens = padded - t < PV_TOKENS ? padded - t : PV_TOKENS;
        const int8_t *blocks[PV_TOKENS / CM_BLOCK + 1];
        for (int64_t i = 0; i < tokens + CM_BLOCK; i += CM_BLOCK)
            blocks[i / CM_BLOCK] = span->v + place(span, item->kv_head, t + i < padded ? t + i : t) * d;
        pv_product(n + t, padded, rows, blocks, tokens, d, acc);
        for (int64_t i = 0; i < rows * d; i++)
            high[i] = t ? high[i] + acc[i] : acc[i];
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t head = (item->first + r / group) * job->heads + item->kv_head * group + r % group;
        float *out = job->out + head * d;
        for (int64_t i = 0; i < d; i++)
            out[i] = f32_of(high[r * d + i]) * 0x1p22f;
        for (int64_t i = 0; i < d; i += LANES)
            f8_store(out + i, div8(f8_load(out + i), f8_set(divisor[r])));
    }
}

static int attend(const struct cm_span *spans, int64_t span_count, int64_t heads, int64_t kv_heads, int64_t head_dim,
                  float score_constant, const int8_t *q, const float *s_q, float *out) {
    const int64_t group = heads / kv_heads, per_tile = group < TILE_ROWS ? TILE_ROWS / group : 1;
    if (group > GROUP_MAX)
        return CM_FAILED;
    int64_t count = 0;
    for (int64_t i = 0; i < span_count; i++)
        count += (spans[i].end - spans[i].start + per_tile - 1) / per_tile * kv_heads;
    struct attend_item *items = cm_scratch(CM_SLOT_OP, (size_t)count * sizeof *items);
    if (!items)
        return CM_NO_MEMORY;
    int64_t at = 0;
    for (int64_t i = 0; i < span_count; i++)
        for (int64_t row = spans[i].start; row < spans[i].end; row += per_tile)
            for (int64_t h = 0; h < kv_heads; h++)
                items[at++] = (struct attend_item){
                    .span = (int32_t)i, .kv_head = (int32_t)h, .first = (int32_t)row,
                    .count = (int32_t)(spans[i].end - row < per_tile ? spans[i].end - row : per_tile)};
    struct attend_job job = {.spans = spans, .items = items, .item_count = count, .heads = heads, .kv_heads = kv_heads,
                             .d = head_dim, .constant = score_constant, .q = q, .s_q = s_q, .out = out};
    cm_parallel(attend_tile, &job, count);
    return atomic_load(&job.status);
}

/* Write the rows of one span into its blocks: the layouts of cache.py. */
static int append(const struct cm_span *span, int64_t kv_heads, int64_t head_dim, const int8_t *k, const float *s_k,
                  const int8_t *v, const float *s_v) {
    const int64_t d = head_dim;
    for (int64_t row = span->start; row < span->end; row++)
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t t = span->position + row - span->start, in = (row * kv_heads + h) * d;
            const int64_t token = place(span, h, t);
            int8_t *key = span->k + (token - t % PANEL) * d + t % PANEL * 4;
            int8_t *value = span->v + (token - t % 2) * d + t % 2;
            for (int64_t i = 0; i < d / 4; i++)
                memcpy(key + i * PANEL * 4, k + in + i * 4, 4);
            for (int64_t i = 0; i < d; i++)
                value[i * 2] = v[in + i];
            span->s_k[token] = s_k[row * kv_heads + h];
            span->s_v[token] = s_v[row * kv_heads + h];
        }
    return CM_OK;
}
