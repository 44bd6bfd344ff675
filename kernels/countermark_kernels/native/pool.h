/* A persistent pool of threads, per-thread scratch memory, and the floating-point environment. */
#ifndef CM_POOL_H
#define CM_POOL_H

#include <stdatomic.h>
#include <stdint.h>
#include <stddef.h>

/* Run fn(arg, 0..items-1), each once, on the calling thread and the workers. Returns when all have run. */
void cm_parallel(void (*fn)(void *arg, int64_t item), void *arg, int64_t items);

/* Run fn(arg, 0..threads-1), one item on each thread of the pool, all at the same time. */
void cm_on_every_thread(void (*fn)(void *arg, int64_t item), void *arg);

int cm_threads(void);
int cm_set_threads(int threads);

/* At least `bytes` bytes, 64-byte aligned, owned by this thread until it asks for the same slot again; NULL: no memory.
 * Contents do not survive. A slot belongs to one level of the call tree, so callers never share one. */
enum cm_slot { CM_SLOT_DECODER, CM_SLOT_OP, CM_SLOT_ITEM, CM_SLOTS };
void *cm_scratch(enum cm_slot slot, size_t bytes);

/* Round to nearest even, subnormals kept, exceptions masked; returns the environment to restore. */
uint64_t cm_fp_enter(void);
void cm_fp_leave(uint64_t saved);

#endif
