/* Memory that is kept for later, and is the system's if it needs it before. */
#ifndef BN_C_MEMORY_H
#define BN_C_MEMORY_H

#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

/* Bytes from which on malloc always gives a block back to the system when it is freed: glibc's and musl's. */
#ifdef __GLIBC__
#define BN_GIVEN_BACK (1 << 25)
#else
#define BN_GIVEN_BACK (1 << 17)
#endif

/* Whether the system may now take, when it needs them, the pages of such a block that hold none of its first
   bytes. Those that it has not taken when they are written again stay as they are: none has to be cleared. */
static inline int bn_lend(char *block, size_t size)
{
#ifdef MADV_FREE
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *first = block + (page - (size_t)block % page);
    return size >= BN_GIVEN_BACK &&
           madvise(first, (size - (size_t)(first - block)) / page * page, MADV_FREE) == 0;
#else
    (void)block;
    (void)size;
    return 0;
#endif
}

#endif
