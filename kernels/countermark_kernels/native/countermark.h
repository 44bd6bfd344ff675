/* The C interface of the exact kernels. Called through ctypes by binding.py, which checks every shape first.
 *
 * Every function returns a cm_status. Sizes are elements; rows are contiguous. The arithmetic is that of
 * kernels/NUMERICS.md (profile exact-v1); each .c file names its section. Nothing here reads the environment. */
#ifndef COUNTERMARK_H
#define COUNTERMARK_H

#include <stddef.h>
#include <stdint.h>

enum cm_status { CM_OK = 0, CM_NOT_FINITE = 1, CM_RANGE = 2, CM_NO_MEMORY = 3, CM_FAILED = 4 };

/* int8 weights [n][k] packed as panels of 16 rows by 4 columns: [ceil(n/16)][ceil(k/4)][16][4], zero padded.
 * sums[i] = the sum of row i, for instruction sets that add 128 to the activations. */
struct cm_weight {
    int64_t n, k;
    const int8_t *packed;
    const int32_t *sums; /* [ceil(n/16) * 16] */
    const float *scale;  /* [n] */
};

#define CM_BLOCK 64 /* tokens of a block of keys and values: cache.py */

/* Rows start..end of a ragged batch, tokens position.. of one sequence; its keys and values of ONE layer.
 * Token t of kv head h lies h * stride + table[t / CM_BLOCK] * CM_BLOCK + t % CM_BLOCK tokens behind k, v (d elements a
 * token), s_k and s_v (one). kv_heads * stride tokens lie between two layers. */
struct cm_span {
    int64_t start, end, position, stride;
    const int32_t *table; /* [ceil((position + end - start) / CM_BLOCK)] */
    int8_t *k, *v;
    float *s_k, *s_v;
};

struct cm_rope {
    const int32_t *positions;    /* [rows] */
    const float *cos, *sin;      /* [context][d/2] */
    const float *q_gain, *k_gain; /* [d] or NULL */
    int64_t heads, kv_heads, head_dim;
    float eps;
};

struct cm_layer {
    struct cm_weight qkv, o, gate_up, down;
    const float *qkv_bias, *o_bias, *q_gain, *k_gain;
};

struct cm_decoder {
    const struct cm_layer *layers;
    int64_t layer_count, hidden, heads, kv_heads, head_dim, intermediate, block;
    const float *cos, *sin;
    float eps, score_constant;
};

struct cm_sampling {
    uint64_t seed;
    uint32_t position, top_p, min_p;
    int32_t top_k; /* 0: all */
    float temperature;
};

#endif
