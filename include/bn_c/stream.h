/* Stores that go to memory without reading the line first and without staying in the caches. */
#ifndef BN_C_STREAM_H
#define BN_C_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Whether the CPU has them. ARM's cores see by themselves that whole lines are written. */
#if defined(__SSE2__)
#include <immintrin.h>
#define BN_STREAMS 1
#else
#define BN_STREAMS 0
#endif

enum {
    BN_LINE = 64,
    BN_BEGINNING = 8 * BN_LINE, /* of a plane: how memory goes on from there, caches see by themselves */
    BN_FAR = 16384              /* bytes ahead that memory is asked: the best of 4096 .. 65536 */
};

/* Ask for these bytes: to be read soon, or written, or to be read later from the second cache. */
#define BN_PREFETCH(name, ...)                                                                               \
    static inline void name(const char *data, ptrdiff_t bytes)                                               \
    {                                                                                                        \
        for (ptrdiff_t i = 0; i < bytes; i += BN_LINE)                                                       \
            __builtin_prefetch(data + i, __VA_ARGS__);                                                       \
    }
BN_PREFETCH(bn_prefetch, 0, 3)
BN_PREFETCH(bn_prefetch_to_write, 1, 3)
BN_PREFETCH(bn_prefetch_far, 0, 2)
#undef BN_PREFETCH

/* memcpy in whole cache lines; a first or last line that is written in part is stored normally.
 * Without BN_STREAMS it is memcpy. */
static inline void bn_stream(char *to, const char *from, size_t bytes)
{
#if defined(__SSE2__)
    size_t head = (size_t)(-(uintptr_t)to & (BN_LINE - 1));
    if (head > bytes)
        head = bytes;
    memcpy(to, from, head);
    to += head;
    from += head;
    bytes -= head;
    for (; bytes >= BN_LINE; to += BN_LINE, from += BN_LINE, bytes -= BN_LINE) {
#if defined(__AVX__) /* two halves of a line: 1.4 x faster on Zen 4 than one store of 512 bits */
        _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
        _mm256_stream_si256((__m256i *)(to + 32), _mm256_loadu_si256((const __m256i *)(from + 32)));
#else
        for (int i = 0; i < BN_LINE; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
#endif
    }
#endif
    memcpy(to, from, bytes);
}

/* Streamed stores are weakly ordered: other threads see them after this. */
static inline void bn_stream_end(void)
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

#endif
