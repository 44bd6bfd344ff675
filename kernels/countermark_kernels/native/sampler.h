/* The sampled token: sampler.py steps 4 to 10. One item is one sequence. */

static inline uint32_t philox_word0(uint64_t seed, uint32_t position) {
    uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

struct candidate {
    uint32_t key, id; /* key: the bits of |t|, so ascending keys are descending t */
    int32_t w;
};

#define BUCKETS 2048 /* by the upper 11 of 31 bits: an eighth of an octave of |t| each */
#define BUCKET_SHIFT 20

/* Stable, ascending by the lower 20 bits of the key, in place; `spare` holds `count` as well. */
static void sort_bucket(struct candidate *a, struct candidate *spare, int64_t count) {
    for (int shift = 0; shift < BUCKET_SHIFT; shift += 10) {
        int64_t start[1024] = {0}, at = 0;
        for (int64_t i = 0; i < count; i++)
            start[a[i].key >> shift & 1023]++;
        for (int i = 0; i < 1024; i++) {
            const int64_t here = start[i];
            start[i] = at;
            at += here;
        }
        for (int64_t i = 0; i < count; i++)
            spare[start[a[i].key >> shift & 1023]++] = a[i];
        struct candidate *swap = a;
        a = spare;
        spare = swap;
    } /* two passes: the result is back where it began */
}

static inline float row_max(const float *l, int64_t vocab) {
    float m = l[0];
    f8 top = f8_set(m);
    int64_t i = 0;
    for (; i + LANES <= vocab; i += LANES)
        top = f8_max(top, f8_load(l + i));
    m = f8_max_across(top);
    for (; i < vocab; i++)
        m = l[i] > m ? l[i] : m;
    return m;
}

struct sample_job {
    const float *logits;
    int64_t vocab;
    const struct cm_sampling *params;
    int64_t *ids;
    _Atomic int status;
};

static int sample_row(const float *l, int64_t vocab, const struct cm_sampling *p, int64_t *id) {
    float amax = row_amax(l, vocab);
    if (bits_of(amax) >= INFINITY_BITS)
        return CM_NOT_FINITE;
    if (amax >= 0x1p100f)
        return CM_RANGE;
    const float top = row_max(l, vocab);
    if (p->temperature == 0.0f) {
        int64_t i = 0;
        while (l[i] != top)
            i++;
        *id = i;
        return CM_OK;
    }
    const int64_t padded = (vocab + LANES - 1) / LANES * LANES;
    struct candidate *a = cm_scratch(CM_SLOT_ITEM, (size_t)padded * (2 * sizeof *a + 8));
    if (!a)
        return CM_NO_MEMORY;
    struct candidate *spare = a + padded;
    int32_t *key = (int32_t *)(spare + padded), *w = key + padded;

    /* Below -26 the weight is 0 and the token cannot be drawn, whatever the filters: key -1. */
    const f8 temperature = f8_set(p->temperature);
    for (int64_t i = 0; i < vocab; i += LANES) {
        const int64_t lanes = vocab - i < LANES ? vocab - i : LANES;
        const f8 t = div8((lanes == LANES ? f8_load(l + i) : f8_load_part(l + i, lanes)) - f8_set(top), temperature);
        const f8 x = t * f8_set(LOG2E);
        const i8x near = x >= f8_set(-26.0f);
        i8_store(key + i, i8_select(near, f8_bits(t) & i8_set(MAGNITUDE_BITS), i8_set(-1)));
        if (i8_any(near))
            i8_store(w + i, f8_to_int(f8_rint(exp2_8(x) * f8_set(0x1p24f))));
    }

    /* Into buckets, which are in order of t; a bucket is sorted within only where a boundary falls into it. */
    int64_t count = 0, from[BUCKETS + 1] = {0}, sum[BUCKETS] = {0};
    for (int64_t i = 0; i < vocab; i++)
        if (key[i] >= 0) {
            from[(key[i] >> BUCKET_SHIFT) + 1]++;
            sum[key[i] >> BUCKET_SHIFT] += w[i];
            count++;
        }
    for (int b = 0; b < BUCKETS; b++)
        from[b + 1] += from[b];
    for (int64_t i = 0; i < vocab; i++)
        if (key[i] >= 0)
            a[from[key[i] >> BUCKET_SHIFT]++] = (struct candidate){(uint32_t)key[i], (uint32_t)i, w[i]};
    for (int b = BUCKETS; b > 0; b--)
        from[b] = from[b - 1];
    from[0] = 0;

    int last = BUCKETS - 1; /* the bucket that holds the end of what is kept */
    if (p->top_k > 0 && p->top_k < count) {
        count = p->top_k;
        for (last = 0; from[last + 1] < count;)
            last++;
        sort_bucket(a + from[last], spare, from[last + 1] - from[last]);
        sum[last] = 0;
        for (int64_t i = from[last]; i < count; i++)
            sum[last] += a[i].w;
    }
    int64_t total = 0;
    for (int b = 0; b <= last; b++)
        total += sum[b];
    if (p->top_p < 1u << 20) {
        const int64_t threshold = (int64_t)p->top_p * total;
        int64_t before = 0;
        int b = 0;
        while ((before + sum[b]) << 20 < threshold)
            before += sum[b++];
        const int64_t end = b == last && from[b + 1] > count ? count : from[b + 1];
        sort_bucket(a + from[b], spare, end - from[b]);
        int64_t i = from[b];
        for (total = before + a[i].w; total << 20 < threshold; total += a[i].w)
            i++;
        count = i + 1;
        last = b;
        sum[b] = total - before;
    }
    if (p->min_p > 0) {
        total = 0;
        for (int b = 0; b <= last; b++) {
            sum[b] = 0;
            for (int64_t i = from[b]; i < from[b + 1] && i < count; i++) {
                if ((int64_t)a[i].w << 20 < (int64_t)p->min_p << 24)
                    a[i].w = 0;
                sum[b] += a[i].w;
            }
            total += sum[b];
        }
    }
    const uint64_t r = philox_word0(p->seed, p->position), n = (uint64_t)total, low = n & ((1u << 21) - 1);
    const int64_t u = (int64_t)((r * (n >> 21) + (r * low >> 21)) >> 11);
    int64_t before = 0;
    int b = 0;
    while (before + sum[b] <= u)
        before += sum[b++];
    const int64_t end = from[b + 1] < count ? from[b + 1] : count;
    sort_bucket(a + from[b], spare, end - from[b]);
    int64_t i = from[b];
    for (before += a[i].w; before <= u; before += a[i].w)
        i++;
    *id = a[i].id;
    return CM_OK;
}

static void sample_item(void *arg, int64_t item) {
    struct sample_job *job = arg;
    int status = sample_row(job->logits + item * job->vocab, job->vocab, job->params + item, job->ids + item);
    if (status)
        atomic_store(&job->status, status);
}

static int sample(const float *logits, int64_t rows, int64_t vocab, const struct cm_sampling *params, int64_t *ids) {
    struct sample_job job = {.logits = logits, .vocab = vocab, .params = params, .ids = ids};
    cm_parallel(sample_item, &job, rows);
    return atomic_load(&job.status);
}
