/* All layers of a batch in one call: decoder.py. Only calls the operations of one table, in order. */
#include "decoder.h"

#include "pool.h"

#define TRY(call)               \
    do {                        \
        int status_ = (call);   \
        if (status_ != CM_OK)   \
            return status_;     \
    } while (0)

static size_t max_of(size_t a, size_t b) { return a > b ? a : b; }

/* Hands out 64-byte aligned pieces of one allocation; with base NULL it only counts. */
static void *take(char *base, size_t *used, size_t bytes) {
    void *piece = base ? base + *used : NULL;
    *used += (bytes + 63) & ~(size_t)63;
    return piece;
}

struct buffers {
    int8_t *q, *k, *v, *wide;       /* heads; `wide`: the quantised input of a linear layer */
    float *s, *s_q, *s_k, *s_v;     /* s: its scales */
    float *qkv, *attended, *gate_up;
    struct cm_span *spans;
};

static size_t lay_out(struct buffers *b, char *base, const struct cm_decoder *m, int64_t rows, int64_t span_count) {
    const size_t r = (size_t)rows, d = (size_t)m->head_dim, nh = (size_t)m->heads, nkv = (size_t)m->kv_heads;
    const size_t widest = max_of(max_of((size_t)m->hidden, nh * d), (size_t)m->intermediate);
    size_t used = 0;
    b->q = take(base, &used, r * nh * d);
    b->k = take(base, &used, r * nkv * d);
    b->v = take(base, &used, r * nkv * d);
    b->wide = take(base, &used, r * widest);
    b->s = take(base, &used, r * sizeof(float));
    b->s_q = take(base, &used, r * nh * sizeof(float));
    b->s_k = take(base, &used, r * nkv * sizeof(float));
    b->s_v = take(base, &used, r * nkv * sizeof(float));
    b->qkv = take(base, &used, r * (nh + 2 * nkv) * d * sizeof(float));
    b->attended = take(base, &used, r * nh * d * sizeof(float));
    b->gate_up = take(base, &used, r * 2 * (size_t)m->intermediate * sizeof(float));
    b->spans = take(base, &used, (size_t)span_count * sizeof(struct cm_span));
    return used;
}

int cm_decode_with(const struct cm_ops *ops, const struct cm_decoder *m, float *x, int64_t rows,
                   const int32_t *positions, const struct cm_span *spans, int64_t span_count) {
    struct buffers b;
    char *memory = cm_scratch(CM_SLOT_DECODER, lay_out(&b, NULL, m, rows, span_count));
    if (!memory)
        return CM_NO_MEMORY;
    lay_out(&b, memory, m, rows, span_count);
    for (int64_t i = 0; i < m->layer_count; i++) {
        const struct cm_layer *layer = m->layers + i;
        const struct cm_rope rope = {.positions = positions, .cos = m->cos, .sin = m->sin, .q_gain = layer->q_gain,
                                     .k_gain = layer->k_gain, .heads = m->heads, .kv_heads = m->kv_heads,
                                     .head_dim = m->head_dim, .eps = m->eps};
        TRY(ops->norm_quantise(x, rows, m->hidden, m->eps, b.wide, b.s));
        TRY(ops->linear(&layer->qkv, b.wide, b.s, rows, layer->qkv_bias, NULL, b.qkv));
        TRY(ops->rope(&rope, b.qkv, rows, b.q, b.s_q, b.k, b.s_k, b.v, b.s_v));
        for (int64_t j = 0; j < span_count; j++) {
            const int64_t tokens = i * m->kv_heads * spans[j].stride;
            b.spans[j] = spans[j];
            b.spans[j].k += tokens * m->head_dim;
            b.spans[j].v += tokens * m->head_dim;
            b.spans[j].s_k += tokens;
            b.spans[j].s_v += tokens;
            TRY(ops->append(b.spans + j, m->kv_heads, m->head_dim, b.k, b.s_k, b.v, b.s_v));
        }
        TRY(ops->attend(b.spans, span_count, m->heads, m->kv_heads, m->head_dim, m->score_constant, b.q, b.s_q,
                        b.attended));
        TRY(ops->quantise(b.attended, rows, m->heads * m->head_dim, b.wide, b.s));
        TRY(ops->linear(&layer->o, b.wide, b.s, rows, layer->o_bias, x, x));
        TRY(ops->norm_quantise(x, rows, m->hidden, m->eps, b.wide, b.s));
        TRY(ops->linear(&layer->gate_up, b.wide, b.s, rows, NULL, NULL, b.gate_up));
        TRY(ops->swiglu(b.gate_up, rows, m->intermediate, m->block, b.wide, b.s));
        TRY(ops->linear(&layer->down, b.wide, b.s, rows, NULL, x, x));
    }
    return CM_OK;
}
