/* Counters that several threads change; each function returns the value before. */
#ifndef BN_C_ATOMIC_H
#define BN_C_ATOMIC_H

#include <stddef.h>

static inline ptrdiff_t bn_add(ptrdiff_t *counter, ptrdiff_t n)
{
    return __atomic_fetch_add(counter, n, __ATOMIC_ACQ_REL);
}

static inline ptrdiff_t bn_or(ptrdiff_t *counter, ptrdiff_t bits)
{
    return __atomic_fetch_or(counter, bits, __ATOMIC_ACQ_REL);
}

#endif
