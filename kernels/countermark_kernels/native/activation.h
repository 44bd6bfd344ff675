/* SwiGLU, block Hadamard, quantisation: activation.py. */

static inline f8 silu8(f8 x) { return div8(x, exp_8(-x) + f8_set(1.0f)); }

/* n a multiple of 8: for the comparison of all 2^32 inputs. */
static int silu(const float *x, int64_t n, float *y) {
    for (int64_t i = 0; i < n; i += LANES)
        f8_store(y + i, silu8(f8_load(x + i)));
    return CM_OK;
}

static void swiglu_item(void *arg, int64_t item) {
    struct rows_job *job = arg; /* k: the width of one half */
    const int64_t width = job->k, block = job->block;
    float *y = cm_scratch(CM_SLOT_ITEM, (size_t)width * sizeof *y);
    if (!y) {
        atomic_store(&job->status, CM_NO_MEMORY);
        return;
    }
    int64_t end = (item + 1) * job->per_item < job->rows ? (item + 1) * job->per_item : job->rows;
    for (int64_t r = item * job->per_item; r < end; r++) {
        const float *gate = job->x + r * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += LANES) {
            const bool whole = i + LANES <= width;
            f8 g = whole ? f8_load(gate + i) : f8_load_part(gate + i, width - i);
            f8 u = whole ? f8_load(up + i) : f8_load_part(up + i, width - i);
            f8 a = silu8(g) * u;
            if (whole)
                f8_store(y + i, a);
            else
                f8_store_part(y + i, a, width - i);
        }
        for (int64_t i = 0; i < width; i += block) {
            if (block >= LANES)
                hadamard(y + i, block);
            else
                hadamard_small(y + i, block);
        }
        if (bits_of(row_amax(y, width)) >= INFINITY_BITS) { /* before the rounding, which can turn a NaN into zero */
            atomic_store(&job->status, CM_NOT_FINITE);
            continue;
        }
        for (int64_t i = 0; i < width; i += LANES) {
            if (i + LANES <= width)
                f8_store(y + i, round_bf16_8(f8_load(y + i)));
            else
                f8_store_part(y + i, round_bf16_8(f8_load_part(y + i, width - i)), width - i);
        }
        int status = quantise_row(y, width, job->q + r * width, job->s + r);
        if (status)
            atomic_store(&job->status, status);
    }
}

static int swiglu(const float *gate_up, int64_t rows, int64_t width, int64_t block, int8_t *q, float *s) {
    struct rows_job job = {.x = gate_up, .rows = rows, .k = width, .block = block, .q = q, .s = s};
    return run_rows(swiglu_item, &job);
}
