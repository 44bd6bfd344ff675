/* Row quantisation: quantise.py. */

static inline float row_amax(const float *x, int64_t k) {
    i8x m = i8_set(0), mask = i8_set(MAGNITUDE_BITS);
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES)
        m = i8_max(m, f8_bits(f8_load(x + i)) & mask);
    if (i < k)
        m = i8_max(m, f8_bits(f8_load_part(x + i, k - i)) & mask);
    return from_bits(i8_max_across(m));
}

/* q = rint(x * (127 / amax)) for amax >= 2^-100, else 0. */
static inline void row_quantise(const float *x, int64_t k, float amax, int8_t *q) {
    if (amax < TINY) {
        memset(q, 0, (size_t)k);
        return;
    }
    f8 scale = f8_set(div1(127.0f, amax));
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES)
        i8_store8(q + i, f8_to_int(f8_rint(f8_load(x + i) * scale)));
    if (i < k) {
        int8_t last[LANES];
        i8_store8(last, f8_to_int(f8_rint(f8_load_part(x + i, k - i) * scale)));
        memcpy(q + i, last, (size_t)(k - i));
    }
}

/* CM_OK, or CM_NOT_FINITE with q and s unset. */
static inline int quantise_row(const float *x, int64_t k, int8_t *q, float *s) {
    float amax = row_amax(x, k);
    if (bits_of(amax) >= INFINITY_BITS)
        return CM_NOT_FINITE;
    row_quantise(x, k, amax, q);
    *s = amax < TINY ? 0.0f : div1(amax, 127.0f);
    return CM_OK;
}

struct rows_job {
    const float *x;
    int64_t rows, k, per_item, block;
    float eps;
    int8_t *q;
    float *s;
    _Atomic int status;
};

static void quantise_item(void *arg, int64_t item) {
    struct rows_job *job = arg;
    int64_t end = (item + 1) * job->per_item < job->rows ? (item + 1) * job->per_item : job->rows;
    for (int64_t r = item * job->per_item; r < end; r++) {
        int status = quantise_row(job->x + r * job->k, job->k, job->q + r * job->k, job->s + r);
        if (status)
            atomic_store(&job->status, status);
    }
}

static int run_rows(void (*fn)(void *, int64_t), struct rows_job *job) {
    job->per_item = ROWS_PER_ITEM(job->k);
    cm_parallel(fn, job, (job->rows + job->per_item - 1) / job->per_item);
    return atomic_load(&job->status);
}

static int quantise(const float *x, int64_t rows, int64_t k, int8_t *q, float *s) {
    struct rows_job job = {.x = x, .rows = rows, .k = k, .q = q, .s = s};
    return run_rows(quantise_item, &job);
}
