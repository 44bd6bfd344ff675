/* Linear layer: linear.py. An item is a run of panels for a block of rows; any split gives the same bits. */

#define ROW_BLOCK 192 /* a block of activations stays in the second-level cache beside its panel */

struct linear_job {
    const struct cm_weight *w;
    const a_t *a;
    const float *s, *bias, *residual;
    float *y;
    int64_t rows, k4, panels, panels_per_item, groups;
    _Atomic int status;
};

/* y = ((float(S) * s) * ws) + bias, then residual + y, for `width` <= 16 columns of one row. */
static inline void scale_row(const struct linear_job *job, const int32_t *total, int64_t row, int64_t column,
                             int64_t width) {
    const int64_t at = row * job->w->n + column;
    const f8 s = f8_set(job->s[row]);
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = width - i;
        const bool whole = left >= LANES;
        f8 ws = whole ? f8_load(job->w->scale + column + i) : f8_load_part(job->w->scale + column + i, left);
        f8 y = (f8_convert(i8_load(total + i)) * s) * ws;
        if (job->bias)
            y = y + (whole ? f8_load(job->bias + column + i) : f8_load_part(job->bias + column + i, left));
        if (job->residual)
            y = (whole ? f8_load(job->residual + at + i) : f8_load_part(job->residual + at + i, left)) + y;
        if (whole)
            f8_store(job->y + at + i, y);
        else
            f8_store_part(job->y + at + i, y, left);
    }
}

static void linear_item(void *arg, int64_t item) {
    struct linear_job *job = arg;
    const struct cm_weight *w = job->w;
    const int64_t first_row = item / job->groups * ROW_BLOCK;
    const int64_t rows = job->rows - first_row < ROW_BLOCK ? job->rows - first_row : ROW_BLOCK;
    const int64_t first = item % job->groups * job->panels_per_item;
    const int64_t last = first + job->panels_per_item < job->panels ? first + job->panels_per_item : job->panels;
    int32_t total[ROW_BLOCK * PANEL];
    for (int64_t p = first; p < last; p++) {
        gemm_panel(job->a + first_row * job->k4 * 4, rows, w->packed + p * job->k4 * 64, job->k4, w->sums + p * PANEL,
                   total, PANEL);
        const int64_t width = w->n - p * PANEL < PANEL ? w->n - p * PANEL : PANEL;
        for (int64_t r = 0; r < rows; r++)
            scale_row(job, total + r * PANEL, first_row + r, p * PANEL, width);
    }
}

struct pack_job {
    const int8_t *q;
    a_t *a;
    int64_t rows, k, k4, per_item;
};

static void pack_item(void *arg, int64_t item) {
    struct pack_job *job = arg;
    int64_t end = (item + 1) * job->per_item < job->rows ? (item + 1) * job->per_item : job->rows;
    for (int64_t r = item * job->per_item; r < end; r++) {
        const int64_t first = r / ROW_BLOCK * ROW_BLOCK;
        const int64_t rows = job->rows - first < ROW_BLOCK ? job->rows - first : ROW_BLOCK;
        pack_row(job->q + r * job->k, job->k, job->k4, rows, r - first, job->a + first * job->k4 * 4);
    }
}

static int linear(const struct cm_weight *w, const int8_t *q, const float *s, int64_t rows, const float *bias,
                  const float *residual, float *y) {
    if (rows == 0 || w->n == 0)
        return CM_OK;
    const int64_t k4 = (w->k + 3) / 4, panels = (w->n + PANEL - 1) / PANEL;
    a_t *a = cm_scratch(CM_SLOT_OP, (size_t)(rows * k4 * 4) * sizeof *a);
    if (!a)
        return CM_NO_MEMORY;
    struct pack_job pack = {.q = q, .a = a, .rows = rows, .k = w->k, .k4 = k4, .per_item = 8 * ROWS_PER_ITEM(w->k)};
    cm_parallel(pack_item, &pack, (rows + pack.per_item - 1) / pack.per_item);
    const int64_t wanted = 8 * (int64_t)cm_threads(), per_item = (panels + wanted - 1) / wanted;
    struct linear_job job = {.w = w, .a = a, .s = s, .bias = bias, .residual = residual, .y = y, .rows = rows,
                             .k4 = k4, .panels = panels, .panels_per_item = per_item,
                             .groups = (panels + per_item - 1) / per_item};
    cm_parallel(linear_item, &job, (rows + ROW_BLOCK - 1) / ROW_BLOCK * job.groups);
    return CM_OK;
}
