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
};

/* Stable, ascending by key: ties stay in order of id. Returns the sorted array, one of the two. */
static struct candidate *radix_sort(struct candidate *a, struct candidate *b, int64_t count) {
    for (int shift = 0; shift < 33; shift += 11) {
        int64_t start[2048] = {0}, at = 0;
        for (int64_t i = 0; i < count; i++)
            start[a[i].key >> shift & 2047]++;
        for (int i = 0; i < 2048; i++) {
            int64_t here = start[i];
            start[i] = at;
            at += here;
        }
        for (int64_t i = 0; i < count; i++)
            b[start[a[i].key >> shift & 2047]++] = a[i];
        struct candidate *swap = a;
        a = b;
        b = swap;
    }
    return a;
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
    struct candidate *a = cm_scratch(CM_SLOT_ITEM, (size_t)vocab * (2 * sizeof *a + sizeof(int64_t)));
    if (!a)
        return CM_NO_MEMORY;
    int64_t count = 0;
    const f8 temperature = f8_set(p->temperature);
    for (int64_t i = 0; i < vocab; i += LANES) {
        const int64_t lanes = vocab - i < LANES ? vocab - i : LANES;
        f8 t = div8((lanes == LANES ? f8_load(l + i) : f8_load_part(l + i, lanes)) - f8_set(top), temperature);
        i8x near = t * f8_set(LOG2E) >= f8_set(-26.0f); /* below, the weight is 0 and the token cannot be drawn */
        for (int64_t j = 0; j < lanes; j++)
            if (near[j])
                a[count++] = (struct candidate){(uint32_t)(bits_of(t[j]) & MAGNITUDE_BITS), (uint32_t)(i + j)};
    }
    int64_t *w = (int64_t *)(a + 2 * vocab);
    a = radix_sort(a, a + vocab, count);
    if (p->top_k > 0 && p->top_k < count)
        count = p->top_k;
    int64_t total = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t lanes = count - i < LANES ? count - i : LANES;
        float t[LANES] = {0};
        for (int64_t j = 0; j < lanes; j++)
            t[j] = -from_bits((int32_t)a[i + j].key);
        f8 weight = f8_rint(exp2_8(f8_load(t) * f8_set(LOG2E)) * f8_set(0x1p24f));
        for (int64_t j = 0; j < lanes; j++)
            total += w[i + j] = (int64_t)weight[j];
    }
    if (p->top_p < 1u << 20) {
        int64_t sum = 0, i = 0;
        do
            sum += w[i++];
        while (sum << 20 < (int64_t)p->top_p * total);
        count = i;
    }
    total = 0;
    for (int64_t i = 0; i < count; i++) {
        if (w[i] << 20 < w[0] * p->min_p)
            w[i] = 0;
        total += w[i];
    }
    const uint64_t r = philox_word0(p->seed, p->position), t = (uint64_t)total, low = t & ((1u << 21) - 1);
    const int64_t u = (int64_t)((r * (t >> 21) + (r * low >> 21)) >> 11);
    int64_t sum = w[0], i = 0;
    while (sum <= u)
        sum += w[++i];
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
