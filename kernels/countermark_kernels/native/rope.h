/* Heads of queries, keys and values: rope.py. */

#define HEAD_MAX 128

struct rope_job {
    const struct cm_rope *r;
    const float *qkv;
    int64_t rows, per_item;
    int8_t *q, *k, *v;
    float *s_q, *s_k, *s_v;
    _Atomic int status;
};

/* quantise_row, and CM_RANGE for a head at or above 2^30: scales stay under 2^24, and scores finite. */
static inline int quantise_head(const float *x, int64_t d, int8_t *q, float *s) {
    float amax = row_amax(x, d);
    if (amax >= 0x1p30f && bits_of(amax) < INFINITY_BITS)
        return CM_RANGE;
    return quantise_row(x, d, q, s);
}

/* One head of q or k: QK-norm with `gain`, rotation, Hadamard, quantisation. */
static inline int rope_head(const float *x, const float *gain, const struct cm_rope *r, int64_t position, int8_t *q,
                            float *s) {
    const int64_t d = r->head_dim, half = d / 2;
    const float *cosine = r->cos + position * half, *sine = r->sin + position * half;
    float y[HEAD_MAX];
    if (gain) {
        float amax = row_amax(x, d);
        if (bits_of(amax) >= INFINITY_BITS)
            return CM_NOT_FINITE;
        if (amax < TINY) {
            memset(y, 0, sizeof y);
        } else {
            float inverse = inverse_rms(x, d, amax, r->eps);
            if (inverse < 0.0f)
                return CM_RANGE;
            for (int64_t i = 0; i < d; i += LANES)
                f8_store(y + i, (f8_load(x + i) * f8_set(inverse)) * f8_load(gain + i));
        }
        x = y;
    }
    for (int64_t i = 0; i < half; i += LANES) {
        f8 x1 = f8_load(x + i), x2 = f8_load(x + half + i), c = f8_load(cosine + i), n = f8_load(sine + i);
        f8_store(y + i, x1 * c - x2 * n);
        f8_store(y + half + i, x2 * c + x1 * n);
    }
    hadamard(y, d);
    return quantise_head(y, d, q, s);
}

static void rope_item(void *arg, int64_t item) {
    struct rope_job *job = arg;
    const struct cm_rope *r = job->r;
    const int64_t d = r->head_dim, nh = r->heads, nkv = r->kv_heads;
    int64_t end = (item + 1) * job->per_item < job->rows ? (item + 1) * job->per_item : job->rows;
    for (int64_t row = item * job->per_item; row < end; row++) {
        const float *x = job->qkv + row * (nh + 2 * nkv) * d;
        int64_t position = r->positions[row];
        int status = CM_OK;
        for (int64_t h = 0; h < nh && !status; h++)
            status = rope_head(x + h * d, r->q_gain, r, position, job->q + (row * nh + h) * d, job->s_q + row * nh + h);
        x += nh * d;
        for (int64_t h = 0; h < nkv && !status; h++)
            status = rope_head(x + h * d, r->k_gain, r, position, job->k + (row * nkv + h) * d, job->s_k + row * nkv + h);
        x += nkv * d;
        for (int64_t h = 0; h < nkv && !status; h++)
            status = quantise_head(x + h * d, d, job->v + (row * nkv + h) * d, job->s_v + row * nkv + h);
        if (status)
            atomic_store(&job->status, status);
    }
}

static int rope(const struct cm_rope *r, const float *qkv, int64_t rows, int8_t *q, float *s_q, int8_t *k, float *s_k,
                int8_t *v, float *s_v) {
    struct rope_job job = {.r = r, .qkv = qkv, .rows = rows, .per_item = ROWS_PER_ITEM((r->heads + 2 * r->kv_heads) * r->head_dim),
                           .q = q, .k = k, .v = v, .s_q = s_q, .s_k = s_k, .s_v = s_v};
    cm_parallel(rope_item, &job, (rows + job.per_item - 1) / job.per_item);
    return atomic_load(&job.status);
}
