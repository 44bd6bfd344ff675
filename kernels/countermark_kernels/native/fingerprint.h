/* Fingerprint of raw logits: fingerprint.py. All arithmetic modulo 2^64. */

struct fingerprint_job {
    const float *logits;
    int64_t stride, vocab;
    const uint64_t *factors;
    uint64_t *lanes;
};

static void fingerprint_item(void *arg, int64_t item) {
    struct fingerprint_job *job = arg;
    const float *l = job->logits + item * job->stride;
    const uint64_t *h0 = job->factors, *h1 = h0 + job->vocab;
    uint64_t f0 = 0, f1 = 0;
    for (int64_t i = 0; i < job->vocab; i++) {
        uint64_t bits = (uint32_t)bits_of(l[i]);
        f0 += bits * h0[i];
        f1 += bits * h1[i];
    }
    job->lanes[item * 2] = f0;
    job->lanes[item * 2 + 1] = f1;
}

static int fingerprint(const float *logits, int64_t rows, int64_t stride, int64_t vocab, const uint64_t *factors,
                       uint64_t *lanes) {
    struct fingerprint_job job = {.logits = logits, .stride = stride, .vocab = vocab, .factors = factors, .lanes = lanes};
    cm_parallel(fingerprint_item, &job, rows);
    return CM_OK;
}
