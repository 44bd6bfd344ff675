/* Every operation, compiled for one instruction set: -DCM_ISA=portable, avx2 or avx512vnni with the matching -m flags.
 *
 * Everything is static but the table, so the three copies never mix. */
#include "ops.h"

#include "ieee.h"
#include "pool.h"

/* One region for many rows, none for a few: about 0.5 us of hand-over against 1 ns per element. */
#define ROWS_PER_ITEM(k) ((k) > 4096 ? 1 : 4096 / (k) + 1)

/* clang-format off: order matters */
#include "gemm.h"
#include "quantise.h"
#include "norm.h"
#include "hadamard.h"
#include "linear.h"
#include "rope.h"
#include "activation.h"
#include "attention.h"
#include "sampler.h"
#include "fingerprint.h"
#include "selftest.h"

#define CM_JOIN2(a, b) a##b
#define CM_JOIN(a, b) CM_JOIN2(a, b)
#define CM_TEXT2(a) #a
#define CM_TEXT(a) CM_TEXT2(a)

const struct cm_ops CM_JOIN(cm_ops_, CM_ISA) = {
    .name = CM_TEXT(CM_ISA),
    .quantise = quantise,
    .norm_quantise = norm_quantise,
    .linear = linear,
    .rope = rope,
    .append = append,
    .attend = attend,
    .swiglu = swiglu,
    .silu = silu,
    .sample = sample,
    .fingerprint = fingerprint,
    .exp2_digest = exp2_digest,
    .arithmetic = arithmetic,
};
