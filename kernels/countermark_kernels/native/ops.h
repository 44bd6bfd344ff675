/* The operations of one instruction set. ops.c is compiled once for each; api.c picks a table. */
#ifndef CM_OPS_H
#define CM_OPS_H

#include <stdbool.h>

#include "countermark.h"

struct cm_ops {
    const char *name;
    int (*quantise)(const float *x, int64_t rows, int64_t k, int8_t *q, float *s);
    int (*norm_quantise)(const float *x, int64_t rows, int64_t n, float eps, int8_t *q, float *s);
    int (*linear)(const struct cm_weight *w, const int8_t *q, const float *s, int64_t rows, const float *bias,
                  const float *residual, float *y);
    int (*rope)(const struct cm_rope *r, const float *qkv, int64_t rows, int8_t *q, float *s_q, int8_t *k, float *s_k,
                int8_t *v, float *s_v);
    int (*append)(const struct cm_span *span, int64_t kv_heads, int64_t head_dim, const int8_t *k, const float *s_k,
                  const int8_t *v, const float *s_v);
    int (*attend)(const struct cm_span *spans, int64_t span_count, int64_t heads, int64_t kv_heads, int64_t head_dim,
                  float score_constant, const int8_t *q, const float *s_q, float *out);
    int (*swiglu)(const float *gate_up, int64_t rows, int64_t width, int64_t block, int8_t *q, float *s);
    int (*silu)(const float *x, int64_t n, float *y);
    int (*sample)(const float *logits, int64_t rows, int64_t vocab, const struct cm_sampling *params, int64_t *ids);
    int (*fingerprint)(const float *logits, int64_t rows, int64_t stride, int64_t vocab, const uint64_t *factors,
                       uint64_t *lanes);
    uint64_t (*exp2_digest)(bool short_form);
    bool (*arithmetic)(void);
};

extern const struct cm_ops cm_ops_portable, cm_ops_avx2, cm_ops_avx512vnni;

#endif
