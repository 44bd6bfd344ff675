/* A second opinion on exact-v1: written from kernels/NUMERICS.md alone, scalar and slow, to be compared bit for bit.
 *
 * One sequence, token by token; every function is named after the section of the page that it spells out. Build with
 * -std=c11 -O2 -ffp-contract=off -fno-fast-math; the C library gives sqrtf and rintf, both correctly rounded.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(FLT_EVAL_METHOD) || FLT_EVAL_METHOD != 0
#error "binary32 operations must round to binary32"
#endif

enum { OK, NOT_FINITE, RANGE, CONTEXT, MEMORY };
enum { MOST_TOKENS = 131072, MOST_VOCAB = 1 << 18, INFINITY_BITS = 0x7f800000 };

#define TRY(step)                                                                                                      \
    do {                                                                                                               \
        int failed_ = (step);                                                                                          \
        if (failed_) return failed_;                                                                                   \
    } while (0)

static const float TINY = 0x1p-100f, LOG2E = 0x1.715476p+0f;

typedef struct {
    const int8_t *weight; /* [rows, columns] */
    const float *scale;   /* [rows] */
    const float *bias;    /* [rows], or none */
} linear_t;

typedef struct {
    linear_t qkv, o, gate_up, down;
    const float *q_norm, *k_norm; /* [head_dim], or none */
} layer_t;

typedef struct {
    int64_t hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, context;
    float eps;
    const float *embed;      /* [vocab, hidden] */
    const float *cos, *sin;  /* [context, head_dim / 2] */
    const layer_t *layer;    /* [layers] */
    linear_t head;           /* [vocab, hidden] */
} model_t;

typedef struct {
    float temperature, repetition, presence, frequency;
    int64_t top_k, top_p, min_p; /* the last two in units of 2^-20 */
    uint64_t seed;
    int64_t biased;
    const int32_t *bias_id;
    const float *bias;
} settings_t;

/* ---- 1. Conventions ---- */

static uint32_t bits(float x) {
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

static float from_bits(uint32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

static float least(float a, float b) { return a < b ? a : b; }
static float greatest(float a, float b) { return a > b ? a : b; }
static int finite(float x) { return (bits(x) & 0x7fffffff) < INFINITY_BITS; }
static float pow2(int k) { return from_bits((uint32_t)(k + 127) << 23); }

static int amax(const float *x, int64_t n, float *a) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t b = bits(x[i]) & 0x7fffffff;
        if (b > most) most = b;
    }
    *a = from_bits(most);
    return most < INFINITY_BITS ? OK : NOT_FINITE;
}

float so_bf16(float x) {
    uint32_t b = bits(x);
    return from_bits((b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000);
}

/* IEEE 754's fusedMultiplyAdd: the product is exact in binary64, the sum is rounded there to odd, then once more. */
float so_fma(float a, float b, float c) {
    double product = (double)a * b, sum = product + c, part = sum - product;
    double rest = (product - (sum - part)) + (c - part);
    uint64_t pattern;
    memcpy(&pattern, &sum, sizeof pattern);
    if (rest != 0 && !(pattern & 1)) pattern += (rest > 0) == (sum > 0) ? 1 : UINT64_MAX;
    memcpy(&sum, &pattern, sizeof sum);
    return (float)sum;
}

static float ceiling(float x) {
    float near = rintf(x);
    return near < x ? near + 1 : near;
}

static float scaled(float p, float k) { return from_bits(bits(p) + ((uint32_t)(int32_t)k << 23)); }

float so_exp2(float x) {
    static const float c[] = {0x1.5f7276p-10f, 0x1.3b270ep-7f, 0x1.c6ae72p-5f, 0x1.ebfbe2p-3f, 0x1.62e432p-1f, 1};
    x = least(greatest(x, -126), 126);
    float k = rintf(x), f = x - k, p = 0x1.470b4ap-13f;
    for (int i = 0; i < 6; i++) {
        p = p * f;
        p = p + c[i];
    }
    return scaled(p, k);
}

float so_exp2_short(float k, float f) {
    return scaled(so_fma(so_fma(so_fma(0x1.c2a218p-5f, f, 0x1.f00c4ep-3f), f, 0x1.62f5fap-1f), f, 1), k);
}

static float exp_(float x) { return so_exp2(least(greatest(x, -87), 87) * LOG2E); }

uint64_t so_check_value(int is_short) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < 1 << 19; i++) {
        float x = (float)(i - (1 << 18)) * 0x1p-11f, y = so_exp2(x);
        if (is_short) {
            x = least(greatest(x, -96), 96);
            y = so_exp2_short(rintf(x), x - rintf(x));
        }
        sum += bits(y) * (uint64_t)(2 * i + 1);
    }
    return sum;
}

/* ---- 3. One token through the model ---- */

int so_quantise(const float *x, int64_t n, int8_t *q, float *s) {
    float a;
    TRY(amax(x, n, &a));
    float t = a < TINY ? 0 : 127 / a;
    for (int64_t i = 0; i < n; i++) q[i] = (int8_t)rintf(x[i] * t);
    *s = a < TINY ? 0 : a / 127;
    return OK;
}

int so_inverse_rms(const float *x, int64_t n, float eps, float *r) {
    float a;
    TRY(amax(x, n, &a));
    int e = (int)(bits(a) >> 23) - 127; /* a is normal: not below TINY */
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t z = (int64_t)rintf(x[i] * pow2(14 - e));
        sum += z * z;
    }
    int k = 2 * e - 28;
    float m = (float)sum / (float)n * pow2(k < -126 ? -126 : k > 127 ? 127 : k);
    if (!finite(m)) return RANGE;
    *r = 1 / sqrtf(m + eps);
    return OK;
}

static int norm_quantise(const float *x, int64_t n, float eps, int8_t *q, float *s) {
    float a, r;
    TRY(amax(x, n, &a));
    TRY(so_quantise(x, n, q, s));
    if (a < TINY) return OK;
    TRY(so_inverse_rms(x, n, eps, &r));
    *s = a / 127 * r;
    return OK;
}

/* `residual` may be `y` itself. */
static void linear(const int8_t *q, float s, const linear_t *w, int64_t rows, int64_t n, const float *residual,
                   float *y) {
    for (int64_t j = 0; j < rows; j++) {
        const int8_t *row = w->weight + j * n;
        int32_t sum = 0;
        for (int64_t i = 0; i < n; i++) sum += (int32_t)q[i] * row[i];
        float value = (float)sum * s * w->scale[j];
        if (w->bias) value = value + w->bias[j];
        if (residual) value = residual[j] + value;
        y[j] = value;
    }
}

void so_hadamard(float *x, int64_t block) {
    for (int64_t stride = 1; stride < block; stride *= 2)
        for (int64_t i = 0; i < block; i++)
            if (!(i & stride)) {
                float a = x[i], b = x[i + stride];
                x[i] = a + b;
                x[i + stride] = a - b;
            }
}

/* The end of heads(): one head of any kind, whose scale has to stay below 2^24. */
static int quantise_head(const float *h, int64_t d, int8_t *q, float *s) {
    float a;
    TRY(amax(h, d, &a));
    return a < 0x1p30f ? so_quantise(h, d, q, s) : RANGE;
}

/* One query or key head at position p, changed in place. */
static int rotated_head(const model_t *m, float *h, const float *gain, int64_t p, int8_t *q, float *s) {
    int64_t d = m->head_dim, half = d / 2;
    if (gain) {
        float a, r = 0;
        TRY(amax(h, d, &a));
        if (a >= TINY) TRY(so_inverse_rms(h, d, m->eps, &r));
        for (int64_t i = 0; i < d; i++) h[i] = a < TINY ? 0 : h[i] * r * gain[i];
    }
    const float *c = m->cos + p * half, *n = m->sin + p * half;
    for (int64_t i = 0; i < half; i++) {
        float h1 = h[i], h2 = h[i + half];
        h[i] = h1 * c[i] - h2 * n[i];
        h[i + half] = h2 * c[i] + h1 * n[i];
    }
    so_hadamard(h, d);
    return quantise_head(h, d, q, s);
}

/* The cache of one layer: keys and values [tokens, kv_heads, head_dim], their scales [tokens, kv_heads]. */
typedef struct {
    int8_t *k, *v;
    float *s_k, *s_v;
} cache_t;

/* One query head over tokens 0..p; `a`: room for p + 1 numbers. */
static int attend(const model_t *m, const cache_t *cache, const int8_t *q, float s_q, int64_t kv, int64_t p, float *a,
                  float *o) {
    int64_t d = m->head_dim, nkv = m->kv_heads, sum_d = 0, sum_n[128] = {0};
    float cq = s_q * (d == 64 ? 0x1.715476p-9f : 0x1.0527dcp-10f), most = 0, most_valued = 0;
    if (p >= MOST_TOKENS) return CONTEXT;
    if (cq < TINY) cq = 0;
    for (int64_t t = 0; t <= p; t++) {
        const int8_t *k = cache->k + (t * nkv + kv) * d;
        int32_t sum = 0;
        for (int64_t i = 0; i < d; i++) sum += (int32_t)q[i] * k[i];
        a[t] = (float)sum * cache->s_k[t * nkv + kv];
        int lambda = (int)((bits(cache->s_v[t * nkv + kv]) + 0x7fffff) >> 23) - 127;
        float valued = so_fma(a[t], cq, (float)(lambda < -40 ? -40 : lambda));
        if (t == 0 || a[t] > most) most = a[t];
        if (t == 0 || valued > most_valued) most_valued = valued;
    }
    float top = most * cq;
    if (!(top > -16384 && top < 16384)) return RANGE;
    float ceil_top = ceiling(top); /* M; and M' is ceiling(most_valued) */
    float g = 32512 * pow2((int)(ceil_top - ceiling(most_valued)));
    float floor_a = (ceil_top - 96) / greatest(cq, TINY), b = 12582912 - ceil_top;
    for (int64_t t = 0; t <= p; t++) {
        const int8_t *v = cache->v + (t * nkv + kv) * d;
        float above = greatest(a[t], floor_a);
        float w = so_fma(above, cq, b);
        float e = so_exp2_short(w - 12582912, so_fma(above, cq, b - w));
        sum_d += (int64_t)rintf(e * 0x1p22f);
        int64_t n = (int64_t)(so_fma(e * cache->s_v[t * nkv + kv], g, 12582912) - 12582912);
        for (int64_t i = 0; i < d; i++) sum_n[i] += n * v[i];
    }
    for (int64_t i = 0; i < d; i++) o[i] = (float)sum_n[i] * 0x1p22f / ((float)sum_d * g);
    return OK;
}

/* y: [gate | up], changed in place. */
static int swiglu_quantise(float *y, int64_t n, int8_t *q, float *s) {
    int64_t block = 1;
    float a;
    while (block < 512 && n % (2 * block) == 0) block *= 2;
    for (int64_t i = 0; i < n; i++) y[i] = y[i] / (exp_(-y[i]) + 1) * y[n + i];
    for (int64_t i = 0; i < n; i += block) so_hadamard(y + i, block);
    TRY(amax(y, n, &a)); /* before bf16, whose sum could carry a NaN into zero */
    for (int64_t i = 0; i < n; i++) y[i] = so_bf16(y[i]);
    return so_quantise(y, n, q, s);
}

typedef struct {
    cache_t *cache;                    /* [layers] */
    float *x, *wide, *o, *a;            /* [hidden], the widest linear output, [heads * head_dim], [tokens] */
    int8_t *q8, *heads8;               /* the widest linear input, the query heads */
    float *s_q;                        /* [heads] */
} state_t;

static int one_token(const model_t *m, state_t *st, int64_t p, int32_t token, float *logits) {
    int64_t d = m->head_dim, nh = m->heads, nkv = m->kv_heads, width = m->intermediate;
    float s;
    memcpy(st->x, m->embed + token * m->hidden, (size_t)m->hidden * sizeof(float));
    for (int64_t l = 0; l < m->layers; l++) {
        const layer_t *w = m->layer + l;
        const cache_t *cache = st->cache + l;
        float *y = st->wide;
        TRY(norm_quantise(st->x, m->hidden, m->eps, st->q8, &s));
        linear(st->q8, s, &w->qkv, (nh + 2 * nkv) * d, m->hidden, NULL, y);
        for (int64_t h = 0; h < nh; h++)
            TRY(rotated_head(m, y + h * d, w->q_norm, p, st->heads8 + h * d, st->s_q + h));
        for (int64_t h = 0; h < nkv; h++) {
            int64_t at = p * nkv + h;
            TRY(rotated_head(m, y + (nh + h) * d, w->k_norm, p, cache->k + at * d, cache->s_k + at));
            TRY(quantise_head(y + (nh + nkv + h) * d, d, cache->v + at * d, cache->s_v + at));
        }
        for (int64_t h = 0; h < nh; h++)
            TRY(attend(m, cache, st->heads8 + h * d, st->s_q[h], h / (nh / nkv), p, st->a, st->o + h * d));
        TRY(so_quantise(st->o, nh * d, st->q8, &s));
        linear(st->q8, s, &w->o, m->hidden, nh * d, st->x, st->x);
        TRY(norm_quantise(st->x, m->hidden, m->eps, st->q8, &s));
        linear(st->q8, s, &w->gate_up, 2 * width, m->hidden, NULL, y);
        TRY(swiglu_quantise(y, width, st->q8, &s));
        linear(st->q8, s, &w->down, m->hidden, width, st->x, st->x);
    }
    TRY(norm_quantise(st->x, m->hidden, m->eps, st->q8, &s));
    linear(st->q8, s, &m->head, m->vocab, m->hidden, NULL, logits);
    return OK;
}

/* logits: [count, vocab]; `done` is how many rows are written when an error stops the sequence. */
int so_forward(const model_t *m, const int32_t *tokens, int64_t count, float *logits, int64_t *done) {
    int64_t q_width = m->heads * m->head_dim, kv_width = m->kv_heads * m->head_dim;
    int64_t wide = 2 * m->intermediate, input = m->hidden;
    if (q_width + 2 * kv_width > wide) wide = q_width + 2 * kv_width;
    if (q_width > input) input = q_width;
    if (m->intermediate > input) input = m->intermediate;
    *done = 0;
    if (count > m->context || count > MOST_TOKENS) return CONTEXT;

    state_t st = {
        calloc((size_t)m->layers, sizeof(cache_t)), calloc((size_t)m->hidden, sizeof(float)),
        calloc((size_t)wide, sizeof(float)),        calloc((size_t)q_width, sizeof(float)),
        calloc((size_t)count + 1, sizeof(float)), calloc((size_t)input, 1),
        calloc((size_t)q_width, 1),                 calloc((size_t)m->heads, sizeof(float)),
    };
    int result = st.cache && st.x && st.wide && st.o && st.a && st.q8 && st.heads8 && st.s_q ? OK : MEMORY;
    for (int64_t l = 0; l < m->layers && st.cache; l++) {
        cache_t *c = st.cache + l;
        c->k = calloc((size_t)count + 1, (size_t)kv_width);
        c->v = calloc((size_t)count + 1, (size_t)kv_width);
        c->s_k = calloc((size_t)count + 1, (size_t)m->kv_heads * sizeof(float));
        c->s_v = calloc((size_t)count + 1, (size_t)m->kv_heads * sizeof(float));
        if (!c->k || !c->v || !c->s_k || !c->s_v) result = MEMORY;
    }
    for (; result == OK && *done < count; *done += result == OK)
        result = one_token(m, &st, *done, tokens[*done], logits + *done * m->vocab);
    for (int64_t l = 0; l < m->layers && st.cache; l++) {
        cache_t *c = st.cache + l;
        free(c->k), free(c->v), free(c->s_k), free(c->s_v);
    }
    free(st.cache), free(st.x), free(st.wide), free(st.o), free(st.a), free(st.q8), free(st.heads8), free(st.s_q);
    return result;
}

/* ---- 4. Sampling ---- */

/* Random123's Philox4x32 with 10 rounds; the counter becomes the output. */
void so_philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53 * counter[0], b = (uint64_t)0xCD9E8D57 * counter[2];
        uint32_t next0 = (uint32_t)(b >> 32) ^ counter[1] ^ key0, next2 = (uint32_t)(a >> 32) ^ counter[3] ^ key1;
        counter[0] = next0;
        counter[1] = (uint32_t)b;
        counter[2] = next2;
        counter[3] = (uint32_t)a;
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
}

typedef struct {
    float t;
    int32_t id;
    int64_t w;
} entry_t;

static int by_t_then_id(const void *left, const void *right) {
    const entry_t *a = left, *b = right;
    if (a->t != b->t) return a->t > b->t ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

/* Steps 1 to 4. `count`: [vocab], zeros: how often the output holds an id. */
static int adjust(float *l, int64_t vocab, const settings_t *p, const int32_t *prompt, int64_t prompt_tokens,
                  const int32_t *output, int64_t output_tokens, int32_t *count) {
    for (int64_t i = 0; i < p->biased; i++) l[p->bias_id[i]] = l[p->bias_id[i]] + p->bias[i];
    for (int64_t i = 0; i < output_tokens; i++) count[output[i]]++;
    if (p->repetition != 1) {
        char *seen = calloc((size_t)vocab, 1);
        if (!seen) return MEMORY;
        for (int64_t i = 0; i < prompt_tokens; i++) seen[prompt[i]] = 1;
        for (int64_t i = 0; i < vocab; i++)
            if (seen[i] || count[i]) l[i] = l[i] > 0 ? l[i] / p->repetition : l[i] * p->repetition;
        free(seen);
    }
    if (p->presence != 0 || p->frequency != 0)
        for (int64_t i = 0; i < vocab; i++)
            if (count[i]) l[i] = (l[i] - p->presence) - (float)count[i] * p->frequency;
    float most;
    TRY(amax(l, vocab, &most));
    return most < 0x1p100f ? OK : RANGE;
}

/* Steps 5 to 10. */
static int32_t draw(const float *l, float most, int64_t vocab, const settings_t *p, uint32_t position, entry_t *e) {
    for (int64_t i = 0; i < vocab; i++) {
        e[i].t = (l[i] - most) / p->temperature;
        e[i].id = (int32_t)i;
        e[i].w = (int64_t)rintf(so_exp2(e[i].t * LOG2E) * 0x1p24f);
    }
    qsort(e, (size_t)vocab, sizeof *e, by_t_then_id);
    int64_t kept = p->top_k > 0 && p->top_k < vocab ? p->top_k : vocab, total = 0, sum = 0;
    for (int64_t i = 0; i < kept; i++) total += e[i].w;
    if (p->top_p < 1 << 20)
        for (int64_t i = 0; i < kept; i++) {
            sum += e[i].w;
            if (sum * (1 << 20) >= p->top_p * total) kept = i + 1;
        }
    total = 0;
    for (int64_t i = 0; i < kept; i++) {
        if (p->min_p > 0 && e[i].w * (1 << 20) < p->min_p * (1 << 24)) e[i].w = 0; /* never the one that exceeds u */
        total += e[i].w;
    }
    uint32_t r[4] = {position, 0, 0, 0};
    so_philox(r, (uint32_t)p->seed, (uint32_t)(p->seed >> 32));
    uint64_t t = (uint64_t)total, r32 = r[0];
    uint64_t u = r32 * (t >> 32) + ((r32 * (t & 0xffffffff)) >> 32);
    uint64_t cumulated = 0;
    int64_t i = 0;
    while ((cumulated += (uint64_t)e[i].w) <= u) i++;
    return e[i].id;
}

int so_sample(const float *logits, int64_t vocab, const settings_t *p, uint32_t position, const int32_t *prompt,
              int64_t prompt_tokens, const int32_t *output, int64_t output_tokens, int32_t *token) {
    if (vocab < 1 || vocab > MOST_VOCAB) return RANGE;
    float *l = malloc((size_t)vocab * sizeof *l);
    int32_t *count = calloc((size_t)vocab, sizeof *count);
    entry_t *entries = malloc((size_t)vocab * sizeof *entries);
    int result = l && count && entries ? OK : MEMORY;
    if (result == OK) {
        memcpy(l, logits, (size_t)vocab * sizeof *l);
        result = adjust(l, vocab, p, prompt, prompt_tokens, output, output_tokens, count);
    }
    if (result == OK) {
        int32_t best = 0;
        for (int32_t i = 1; i < vocab; i++)
            if (l[i] > l[best]) best = i;
        *token = p->temperature == 0 ? best : draw(l, l[best], vocab, p, position, entries);
    }
    free(l), free(count), free(entries);
    return result;
}

/* ---- 5. Fingerprint ---- */

uint64_t so_splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

void so_fingerprint(const float *logits, int64_t vocab, uint8_t out[16]) {
    for (uint64_t lane = 0; lane < 2; lane++) {
        uint64_t sum = 0;
        for (int64_t i = 0; i < vocab; i++) sum += bits(logits[i]) * (so_splitmix64(2 * (uint64_t)i + lane) | 1);
        for (int byte = 0; byte < 8; byte++) out[8 * lane + (uint64_t)byte] = (uint8_t)(sum >> (8 * byte));
    }
}
