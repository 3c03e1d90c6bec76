/* Words that several threads change. */
#ifndef BN_C_ATOMIC_H
#define BN_C_ATOMIC_H

#include <stddef.h>

static inline ptrdiff_t bn_load(const ptrdiff_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static inline void bn_store(ptrdiff_t *word, ptrdiff_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* Returns the value before. */
static inline ptrdiff_t bn_add(ptrdiff_t *word, ptrdiff_t n)
{
    return __atomic_fetch_add(word, n, __ATOMIC_ACQ_REL);
}

/* Whether it was `before`, and so is `after` now. */
static inline int bn_change(ptrdiff_t *word, ptrdiff_t before, ptrdiff_t after)
{
    return __atomic_compare_exchange_n(word, &before, after, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

#endif
