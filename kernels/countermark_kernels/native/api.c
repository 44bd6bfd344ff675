/* The exported functions: choose the instruction set, fix the floating-point environment, call the operation. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "decoder.h"
#include "ops.h"
#include "pool.h"

#define EXPORT __attribute__((visibility("default")))
#ifndef CM_SOURCE_DIGEST
#define CM_SOURCE_DIGEST ""
#endif

static const struct cm_ops *const known[] = {
#if defined(CM_HAVE_avx512vnni)
    &cm_ops_avx512vnni,
#endif
#if defined(CM_HAVE_avx2)
    &cm_ops_avx2,
#endif
    &cm_ops_portable,
};
#define KNOWN ((int)(sizeof known / sizeof *known))

static const struct cm_ops *_Atomic chosen = &cm_ops_portable;

static int supported(const struct cm_ops *ops) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(ops->name, "avx512vnni"))
        return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(ops->name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(ops->name, "portable");
}

/* The digest of the C sources this library was built from, hexadecimal. */
EXPORT const char *cm_source_digest(void) { return CM_SOURCE_DIGEST; }

/* The name of instruction set i (best first) if it is built in and this processor has it, "" if not, NULL past the end. */
EXPORT const char *cm_isa_name(int i) { return i < 0 || i >= KNOWN ? NULL : supported(known[i]) ? known[i]->name : ""; }

EXPORT const char *cm_isa(void) { return atomic_load(&chosen)->name; }

EXPORT int cm_use_isa(const char *name) {
    for (int i = 0; i < KNOWN; i++)
        if (!strcmp(known[i]->name, name) && supported(known[i])) {
            atomic_store(&chosen, known[i]);
            return CM_OK;
        }
    return CM_FAILED;
}

EXPORT int cm_set_thread_count(int threads) { return cm_set_threads(threads); }
EXPORT int cm_thread_count(void) { return cm_threads(); }

/* int8 [n][k] to panels; returns CM_RANGE where a value is -128. */
EXPORT int cm_pack(const int8_t *w, int64_t n, int64_t k, int8_t *packed, int32_t *sums) {
    const int64_t k4 = (k + 3) / 4, panels = (n + 15) / 16;
    int lowest = 0;
    memset(packed, 0, (size_t)(panels * k4 * 64));
    memset(sums, 0, (size_t)(panels * 16) * sizeof *sums);
    for (int64_t i = 0; i < n; i++) {
        int8_t *out = packed + i / 16 * k4 * 64 + i % 16 * 4;
        for (int64_t j = 0; j < k; j++) {
            int8_t value = w[i * k + j];
            lowest = value < lowest ? value : lowest;
            sums[i] += value;
            out[j / 4 * 64 + j % 4] = value;
        }
    }
    return lowest == -128 ? CM_RANGE : CM_OK;
}

#define CALL(...)                                        \
    const struct cm_ops *ops = atomic_load(&chosen);     \
    uint64_t environment = cm_fp_enter();                \
    int status = (__VA_ARGS__);                          \
    cm_fp_leave(environment);                            \
    return status

EXPORT int cm_quantise(const float *x, int64_t rows, int64_t k, int8_t *q, float *s) {
    CALL(ops->quantise(x, rows, k, q, s));
}

EXPORT int cm_norm_quantise(const float *x, int64_t rows, int64_t n, float eps, int8_t *q, float *s) {
    CALL(ops->norm_quantise(x, rows, n, eps, q, s));
}

EXPORT int cm_linear(const struct cm_weight *w, const int8_t *q, const float *s, int64_t rows, const float *bias,
                     const float *residual, float *y) {
    CALL(ops->linear(w, q, s, rows, bias, residual, y));
}

EXPORT int cm_rope_quantise(const struct cm_rope *r, const float *qkv, int64_t rows, int8_t *q, float *s_q, int8_t *k,
                            float *s_k, int8_t *v, float *s_v) {
    CALL(ops->rope(r, qkv, rows, q, s_q, k, s_k, v, s_v));
}

EXPORT int cm_append(const struct cm_span *span, int64_t kv_heads, int64_t head_dim, const int8_t *k, const float *s_k,
                     const int8_t *v, const float *s_v) {
    CALL(ops->append(span, kv_heads, head_dim, k, s_k, v, s_v));
}

EXPORT int cm_attend(const struct cm_span *spans, int64_t span_count, int64_t heads, int64_t kv_heads, int64_t head_dim,
                     float score_constant, const int8_t *q, const float *s_q, float *out) {
    CALL(ops->attend(spans, span_count, heads, kv_heads, head_dim, score_constant, q, s_q, out));
}

EXPORT int cm_swiglu_quantise(const float *gate_up, int64_t rows, int64_t width, int64_t block, int8_t *q, float *s) {
    CALL(ops->swiglu(gate_up, rows, width, block, q, s));
}

EXPORT int cm_silu(const float *x, int64_t n, float *y) {
    CALL(ops->silu(x, n, y));
}

EXPORT int cm_sample(const float *logits, int64_t rows, int64_t vocab, const struct cm_sampling *params, int64_t *ids) {
    CALL(ops->sample(logits, rows, vocab, params, ids));
}

EXPORT int cm_fingerprint(const float *logits, int64_t rows, int64_t stride, int64_t vocab, const uint64_t *factors,
                          uint64_t *lanes) {
    CALL(ops->fingerprint(logits, rows, stride, vocab, factors, lanes));
}

EXPORT int cm_decode(const struct cm_decoder *model, float *x, int64_t rows, const int32_t *positions,
                     const struct cm_span *spans, int64_t span_count) {
    CALL(cm_decode_with(ops, model, x, rows, positions, spans, span_count));
}

struct everywhere {
    const struct cm_ops *ops;
    uint64_t digest, short_digest;
    _Atomic int arithmetic_failures, digest_failures, threads;
};

static void test_thread(void *arg, int64_t item) {
    struct everywhere *e = arg;
    (void)item;
    atomic_fetch_add(&e->threads, 1);
    if (!e->ops->arithmetic())
        atomic_fetch_add(&e->arithmetic_failures, 1);
    if (e->ops->exp2_digest(false) != e->digest || e->ops->exp2_digest(true) != e->short_digest)
        atomic_fetch_add(&e->digest_failures, 1);
}

/* One product against 64-bit integers. pattern 0: all 127; 1: 127 and -127; 2: alternating; 3: pseudo-random. */
static int product_is_exact(const struct cm_ops *ops, int64_t rows, int64_t n, int64_t k, int pattern) {
    const size_t packed = (size_t)((n + 15) / 16 * 16 * ((k + 3) / 4 * 4)), columns = (size_t)((n + 15) / 16 * 16);
    int8_t *a = malloc((size_t)(rows * k)), *w = malloc((size_t)(n * k)), *panels = malloc(packed);
    int32_t *sums = malloc(columns * sizeof *sums);
    float *ones = malloc((size_t)(rows + n) * sizeof *ones), *y = malloc((size_t)(rows * n) * sizeof *y);
    int exact = a && w && panels && sums && ones && y;
    uint32_t state = 1;
    for (int64_t i = 0; exact && i < rows * k; i++) {
        state = state * 1664525u + 1013904223u;
        a[i] = (int8_t)(pattern < 2 ? 127 : pattern == 2 ? (i & 1 ? 127 : -127) : (int32_t)((state >> 8) % 255) - 127);
    }
    for (int64_t i = 0; exact && i < n * k; i++) {
        state = state * 1664525u + 1013904223u;
        w[i] = (int8_t)(pattern == 0   ? 127
                        : pattern == 1 ? -127
                        : pattern == 2 ? (i & 1 ? -127 : 127)
                                       : (int32_t)((state >> 8) % 255) - 127);
    }
    if (exact) {
        for (int64_t i = 0; i < rows + n; i++)
            ones[i] = 1.0f;
        const struct cm_weight weight = {.n = n, .k = k, .packed = panels, .sums = sums, .scale = ones};
        exact = cm_pack(w, n, k, panels, sums) == CM_OK && ops->linear(&weight, a, ones, rows, NULL, NULL, y) == CM_OK;
    }
    for (int64_t r = 0; exact && r < rows; r++)
        for (int64_t c = 0; exact && c < n; c++) {
            int64_t sum = 0;
            for (int64_t i = 0; i < k; i++)
                sum += a[r * k + i] * w[c * k + i];
            exact = y[r * n + c] == (float)sum;
        }
    free(a), free(w), free(panels), free(sums), free(ones), free(y);
    return exact;
}

/* Known answers of one instruction set, on every thread of the pool. CM_OK, or CM_FAILED and a word on what failed. */
EXPORT int cm_self_test(const char *name, uint64_t exp2_digest, uint64_t exp2_short_digest, char *message,
                        size_t size) {
    const struct cm_ops *ops = NULL;
    for (int i = 0; i < KNOWN; i++)
        if (!strcmp(known[i]->name, name) && supported(known[i]))
            ops = known[i];
    if (!ops) {
        snprintf(message, size, "not there");
        return CM_FAILED;
    }
    uint64_t environment = cm_fp_enter();
    struct everywhere e = {.ops = ops, .digest = exp2_digest, .short_digest = exp2_short_digest};
    cm_on_every_thread(test_thread, &e);
    const char *failed = e.arithmetic_failures ? "arithmetic" : e.digest_failures ? "exp2" : NULL;
    static const int64_t rows[] = {1, 2, 3, 13}, depths[] = {5, 64, 1537};
    for (int i = 0; !failed && i < 4; i++)
        for (int j = 0; !failed && j < 3; j++)
            for (int pattern = 0; !failed && pattern < 4; pattern++)
                if (!product_is_exact(ops, rows[i], 20, depths[j], pattern))
                    failed = "int8 product";
    cm_fp_leave(environment);
    if (failed)
        snprintf(message, size, "%s", failed);
    return failed ? CM_FAILED : CM_OK;
}
