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
#if defined(__AVX__) /* two stores for a line: 1.4 x faster on Zen 4 than one of 512 bits */
typedef __m256i bn_vector;
#define bn_vector_at _mm256_loadu_si256
#define bn_stream_vector _mm256_stream_si256
#else
typedef __m128i bn_vector;
#define bn_vector_at _mm_loadu_si128
#define bn_stream_vector _mm_stream_si128
#endif
#else
#define BN_STREAMS 0
#endif

enum {
    BN_LINE = 64,
    BN_BEGINNING = 8 * BN_LINE, /* of a plane: how memory goes on from there, caches see by themselves */
    BN_NEAR = 4096,             /* bytes ahead that memory is asked for y: the best of 2048 .. 16384 */
    BN_FAR = 16384              /* and for statistics: of 4096 .. 65536 */
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

/* Streamed stores stay where they are: the order that compilers give them otherwise took 1.1 x on Zen 1, and
 * of halves up to 1.6 x on Zen 4. */
static inline void bn_in_order(void) { __asm__ volatile("" ::: "memory"); }

/* One cache line or two. Not to load all of them first took 1.1 x on Zen 1. Without BN_STREAMS this is
 * memcpy, like all here. */
static inline void bn_stream_lines(char *to, const char *from, const int lines)
{
#if BN_STREAMS
    enum { IN_TWO = 2 * BN_LINE / sizeof(bn_vector) };
    bn_vector vectors[IN_TWO];
    for (int i = 0; i < lines * IN_TWO / 2; i++)
        vectors[i] = bn_vector_at((const bn_vector *)from + i);
    for (int i = 0; i < lines * IN_TWO / 2; i++) {
        bn_stream_vector((bn_vector *)to + i, vectors[i]);
        bn_in_order();
    }
#else
    memcpy(to, from, lines * BN_LINE);
#endif
}

/* memcpy in whole cache lines; a first or last line that is written in part is stored normally. */
static inline void bn_stream(char *to, const char *from, size_t bytes)
{
#if BN_STREAMS
    size_t head = (size_t)(-(uintptr_t)to & (BN_LINE - 1));
    if (head > bytes)
        head = bytes;
    memcpy(to, from, head);
    to += head;
    from += head;
    bytes -= head;
    for (; bytes >= BN_LINE; to += BN_LINE, from += BN_LINE, bytes -= BN_LINE)
        bn_stream_lines(to, from, 1);
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
