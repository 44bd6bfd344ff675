/* All layers of a batch in one call: decoder.py. Only calls the operations of one table, in order. */
#ifndef CM_DECODER_H
#define CM_DECODER_H

#include "ops.h"

/* x: [rows][hidden], replaced by the last residual. spans: as for layer 0. */
int cm_decode_with(const struct cm_ops *ops, const struct cm_decoder *model, float *x, int64_t rows,
                   const int32_t *positions, const struct cm_span *spans, int64_t span_count);

#endif
