/* A persistent thread pool that spins briefly, then sleeps.
 *
 * One region runs at a time; a second caller meanwhile runs its items alone on its own thread (same bits, by the
 * invariance of every op), so nested or concurrent calls cannot deadlock. A worker joins a region by a compare-and-swap
 * that fails once the region is closed: a region never waits for a worker that has not yet begun. After fork the child
 * starts with no workers and makes its own on first use. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MAX_THREADS 256
#define SPINS 2000 /* 40 to 100 us: longer than the serial stretches between two regions of a decode step */
#define CLOSED 0x80000000u
#define USERS 0x7fffffffu

static struct {
    pthread_mutex_t region; /* held by the caller whose region runs */
    pthread_mutex_t sleep;
    pthread_cond_t wake;
    _Atomic uint64_t state; /* epoch << 32 | CLOSED | users */
    _Atomic int64_t next;
    _Atomic int sleepers;
    void (*fn)(void *, int64_t);
    void *arg;
    int64_t items;
    int threads, workers; /* wanted, including the caller; running */
    _Atomic unsigned generation; /* workers of an older generation leave */
} pool = {.region = PTHREAD_MUTEX_INITIALIZER,
          .sleep = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .state = CLOSED,
          .threads = 1};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key;

static inline void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

uint64_t cm_fp_enter(void) {
#if defined(__x86_64__)
    uint64_t saved = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return saved;
#elif defined(__aarch64__)
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)0));
    return saved;
#else
    return 0;
#endif
}

void cm_fp_leave(uint64_t saved) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)saved);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" ::"r"(saved));
#else
    (void)saved;
#endif
}

static void run_items(void (*fn)(void *, int64_t), void *arg, int64_t items) {
    int64_t i;
    while ((i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < items)
        fn(arg, i);
}

static void *worker(void *context) {
    unsigned generation = (unsigned)(uintptr_t)context;
    uint32_t seen = (uint32_t)(atomic_load(&pool.state) >> 32) - 1; /* look at the current region first */
    cm_fp_enter();
    for (;;) {
        uint64_t state = atomic_load_explicit(&pool.state, memory_order_acquire);
        for (int i = 0; (uint32_t)(state >> 32) == seen && i < SPINS; i++) {
            relax();
            state = atomic_load_explicit(&pool.state, memory_order_acquire);
        }
        if ((uint32_t)(state >> 32) == seen) {
            pthread_mutex_lock(&pool.sleep);
            atomic_fetch_add(&pool.sleepers, 1);
            while ((uint32_t)(atomic_load(&pool.state) >> 32) == seen && atomic_load(&pool.generation) == generation)
                pthread_cond_wait(&pool.wake, &pool.sleep);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.sleep);
        }
        if (atomic_load(&pool.generation) != generation)
            return NULL;
        state = atomic_load(&pool.state);
        while (!(state & CLOSED) && !atomic_compare_exchange_weak(&pool.state, &state, state + 1))
            ;
        seen = (uint32_t)(state >> 32);
        if (state & CLOSED)
            continue;
        run_items(pool.fn, pool.arg, pool.items);
        atomic_fetch_sub_explicit(&pool.state, 1, memory_order_release);
    }
}

static void dismiss(void) { /* with the region held */
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.generation, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep);
    /* A spinning worker looks at the generation only after its spins or a new epoch: give it one. */
    atomic_store(&pool.state, (((atomic_load(&pool.state) >> 32) + 1) << 32) | CLOSED);
    pool.workers = 0;
}

static void before_fork(void) { pthread_mutex_lock(&pool.region); }

static void after_fork_parent(void) { pthread_mutex_unlock(&pool.region); }

static void after_fork_child(void) {
    pthread_mutex_init(&pool.region, NULL);
    pthread_mutex_init(&pool.sleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.state, (((atomic_load(&pool.state) >> 32) + 1) << 32) | CLOSED);
    pool.workers = 0;
}

struct scratch {
    void *slot[CM_SLOTS];
    size_t bytes[CM_SLOTS];
};

static void free_scratch(void *pointer) {
    struct scratch *mine = pointer;
    for (int i = 0; i < CM_SLOTS; i++)
        free(mine->slot[i]);
    free(mine);
}

static void initialise(void) {
    pthread_key_create(&scratch_key, free_scratch);
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

void *cm_scratch(enum cm_slot slot, size_t bytes) {
    pthread_once(&once, initialise);
    struct scratch *mine = pthread_getspecific(scratch_key);
    if (!mine) {
        mine = calloc(1, sizeof *mine);
        if (!mine || pthread_setspecific(scratch_key, mine)) {
            free(mine);
            return NULL;
        }
    }
    if (mine->bytes[slot] < bytes) {
        free(mine->slot[slot]);
        size_t rounded = (bytes + bytes / 4 + 4095) & ~(size_t)4095;
        mine->slot[slot] = aligned_alloc(64, rounded);
        mine->bytes[slot] = mine->slot[slot] ? rounded : 0;
    }
    return mine->slot[slot];
}

static void hire(void) { /* with the region held */
    while (pool.workers < pool.threads - 1) {
        pthread_t thread;
        pthread_attr_t attributes;
        if (pthread_attr_init(&attributes))
            return;
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        void *context = (void *)(uintptr_t)atomic_load(&pool.generation);
        int failed = pthread_create(&thread, &attributes, worker, context);
        pthread_attr_destroy(&attributes);
        if (failed)
            return; /* fewer threads, same bits */
        pool.workers++;
    }
}

static void run_region(void (*fn)(void *, int64_t), void *arg, int64_t items) { /* with the region held */
    pool.fn = fn;
    pool.arg = arg;
    pool.items = items;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    uint64_t epoch = (atomic_load(&pool.state) >> 32) + 1;
    atomic_store(&pool.state, epoch << 32);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    run_items(fn, arg, items);
    atomic_fetch_or(&pool.state, CLOSED);
    for (int i = 0; atomic_load_explicit(&pool.state, memory_order_acquire) & USERS; i++) {
        relax();
        if (i > SPINS)
            sched_yield(); /* the worker may be waiting for our processor */
    }
}

void cm_parallel(void (*fn)(void *, int64_t), void *arg, int64_t items) {
    pthread_once(&once, initialise);
    if (items > 1 && pool.threads > 1 && pthread_mutex_trylock(&pool.region) == 0) {
        hire();
        run_region(fn, arg, items);
        pthread_mutex_unlock(&pool.region);
    } else {
        for (int64_t i = 0; i < items; i++)
            fn(arg, i);
    }
}

struct meeting {
    void (*fn)(void *, int64_t);
    void *arg;
    int threads;
    _Atomic int arrived;
};

static void meet(void *pointer, int64_t item) {
    struct meeting *m = pointer;
    atomic_fetch_add(&m->arrived, 1);
    while (atomic_load(&m->arrived) < m->threads)
        sched_yield(); /* holds this thread, so that every item goes to another one */
    m->fn(m->arg, item);
}

void cm_on_every_thread(void (*fn)(void *, int64_t), void *arg) {
    pthread_once(&once, initialise);
    pthread_mutex_lock(&pool.region);
    hire();
    struct meeting m = {.fn = fn, .arg = arg, .threads = pool.workers + 1};
    run_region(meet, &m, m.threads);
    pthread_mutex_unlock(&pool.region);
}

int cm_threads(void) { return pool.threads; }

int cm_set_threads(int threads) {
    pthread_once(&once, initialise);
    if (threads < 1 || threads > MAX_THREADS)
        return 4;
    pthread_mutex_lock(&pool.region);
    if (threads - 1 < pool.workers)
        dismiss();
    pool.threads = threads;
    pthread_mutex_unlock(&pool.region);
    return 0;
}
