/* Pixels of up to four channels, of bytes: y = x * scale + shift to planes or to interleaved elements.
 *
 * Four pixels that lie in 16 bytes are loaded at once. One shuffle then picks four bytes, those of a channel
 * or those of four elements that follow each other in y, and widens them to 32 bits. Strides are in what the
 * shuffles pick: the order of channels, a byte that is skipped, and flips cost nothing.
 * Plain SSE2 has no such shuffle. It loads pixels as words of 32 bits, at any distance; for planes a channel
 * is shifted out of four words, interleaved they are put together. Where pixels have no gaps 16 bytes are
 * loaded; if reversed, each byte comes from a load that lies as far from y's as its channel does. Halves and
 * bytes it leaves to tables, which are no slower.
 * Steps may overlap, since what they write depends on x alone.
 * Lines of interleaved elements are asked for BN_AHEAD bytes before they are written (1080 x 1920: 0.9 of the
 * time on Zen 4; of planes, three runs of lines, 1.2). ARM's cores write whole lines without reading them.
 */
#ifndef BN_C_IMAGE_H
#define BN_C_IMAGE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "bn_c.h"
#include "stream.h"
#include "sums.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BN_INLINE static inline __attribute__((always_inline))

typedef struct {
    int channels;     /* how many at a time; 0: none, these pixels are for other loops */
    int interleaved;  /* y too, or else planes */
    int reversed;     /* SSE2, interleaved: the channels of x are */
    int type;         /* of y, a bn_type; bytes are rounded half to even and saturated */
    ptrdiff_t pixel;  /* stride of x */
    ptrdiff_t low;    /* from the first of the pixels of a step to the first byte that is loaded */
    ptrdiff_t reach;  /* and to the last */
    ptrdiff_t before; /* pixels at the front of a row that are left to other loops */
    ptrdiff_t behind; /* from a pixel to its last byte */
    struct {
        uint8_t picks[16]; /* the byte that goes to each of the 16; SSE2: bits by which a word is
                            * shifted; interleaved, a mask of the bytes of channel k */
        float scale[4];
        float shifted[4];
    } of[4]; /* each four elements of y */
} bn_pixels;

/* BN_STEP: pixels that are done at a time; BN_AHEAD: bytes of y that are asked for before they are written;
 * BN_TYPES: whether y may be other than floats. */
#if defined(__AVX2__)
enum { BN_STEP = 8, BN_AHEAD = 4096, BN_TYPES = 1 };
typedef __m256i bn_px_bytes;
typedef __m256i bn_px_picks;
typedef __m256 bn_px_floats;

static inline bn_px_bytes bn_px_load(const uint8_t *x, ptrdiff_t pixel, const bn_px_picks *masks,
                                     int channels, int interleaved, int reversed)
{
    (void)masks, (void)channels, (void)interleaved, (void)reversed;
    const __m128i first = _mm_loadu_si128((const __m128i *)x);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first),
                                   _mm_loadu_si128((const __m128i *)(x + 4 * pixel)), 1);
}

static inline bn_px_floats bn_px_pick(bn_px_bytes x, bn_px_picks picks, int k, int interleaved)
{
    (void)k, (void)interleaved;
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(x, picks));
}

static inline bn_px_picks bn_px_picks_of(const bn_pixels *p, int k)
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p->of[k].picks));
}

static inline bn_px_floats bn_px_four(const float *values)
{
    return _mm256_broadcast_ps((const __m128 *)values);
}

/* The sum by the multipliers, which have less to do: see sums.h. */
static inline bn_px_floats bn_px_scaled(bn_px_floats x, bn_px_floats scale, bn_px_floats shift,
                                        bn_px_floats one)
{
#if defined(__FMA__)
    return _mm256_fmadd_ps(_mm256_mul_ps(x, scale), one, shift);
#else
    (void)one;
    return _mm256_add_ps(_mm256_mul_ps(x, scale), shift);
#endif
}

/* The first four elements to y, the others to `rest`, which is right behind them in planes. */
static inline void bn_px_store(char *y, char *rest, bn_px_floats v, int type, int interleaved)
{
    if (type == BN_FLOAT32) {
        if (!interleaved) {
            _mm256_storeu_ps((float *)y, v);
        } else {
            _mm_storeu_ps((float *)y, _mm256_castps256_ps128(v));
            _mm_storeu_ps((float *)rest, _mm256_extractf128_ps(v, 1));
        }
        return;
    }
    if (type == BN_FLOAT16) {
        const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
        if (!interleaved) {
            _mm_storeu_si128((__m128i *)y, halves);
        } else {
            _mm_storel_epi64((__m128i *)y, halves);
            _mm_storel_epi64((__m128i *)rest, _mm_unpackhi_epi64(halves, halves));
        }
        return;
    }
    /* Too large for an integer becomes the lowest one, which is right at the lower end only. */
    const __m256i words = _mm256_cvtps_epi32(_mm256_min_ps(v, _mm256_set1_ps(512)));
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    const __m128i bytes =
        type == BN_UINT8 ? _mm_packus_epi16(shorts, shorts) : _mm_packs_epi16(shorts, shorts);
    if (!interleaved) {
        _mm_storel_epi64((__m128i *)y, bytes);
    } else {
        const int first = _mm_cvtsi128_si32(bytes), second = _mm_extract_epi32(bytes, 1);
        memcpy(y, &first, 4);
        memcpy(rest, &second, 4);
    }
}
#elif defined(__SSE2__)
enum { BN_STEP = 4, BN_AHEAD = 4096, BN_TYPES = 0 };
typedef __m128i bn_px_bytes;
typedef __m128i bn_px_picks;
typedef __m128 bn_px_floats;

static inline uint32_t bn_px_word(const uint8_t *x)
{
    uint32_t word;
    memcpy(&word, x, 4);
    return word;
}

/* Two of them. */
static inline __m128i bn_px_words(const uint8_t *x, ptrdiff_t pixel)
{
    return _mm_unpacklo_epi32(_mm_cvtsi32_si128((int)bn_px_word(x)),
                              _mm_cvtsi32_si128((int)bn_px_word(x + pixel)));
}

/* The channels of two pixels, in their order. */
static inline uint64_t bn_px_two(const uint8_t *x, ptrdiff_t pixel, int channels, int reversed)
{
    const uint32_t first = bn_px_word(x), second = bn_px_word(x + pixel);
    const int rest = 32 - 8 * channels;
    const uint64_t low = (reversed ? __builtin_bswap32(first) : first << rest) >> rest,
                   high = (reversed ? __builtin_bswap32(second) : second << rest) >> rest;
    return high << 8 * channels | low;
}

/* Four words, or interleaved the channels of four pixels in their order. */
static inline bn_px_bytes bn_px_load(const uint8_t *x, ptrdiff_t pixel, const bn_px_picks *masks,
                                     int channels, int interleaved, int reversed)
{
    if (!interleaved)
        return _mm_unpacklo_epi64(bn_px_words(x, pixel), bn_px_words(x + 2 * pixel, pixel));
    if (pixel != channels) {
        const uint64_t low = bn_px_two(x, pixel, channels, reversed),
                       high = bn_px_two(x + 2 * pixel, pixel, channels, reversed);
        return channels == 4 ? _mm_set_epi64x((int64_t)high, (int64_t)low)
                             : _mm_set_epi64x((int64_t)(high >> (64 - 16 * channels)),
                                              (int64_t)(high << 16 * channels | low));
    }
    if (!reversed)
        return _mm_loadu_si128((const __m128i *)x);
    __m128i bytes = _mm_setzero_si128();
    for (int k = 0; k < channels; k++) {
        const __m128i moved = _mm_loadu_si128((const __m128i *)(x + 2 * (channels - 1 - k)));
        bytes = _mm_or_si128(bytes, _mm_and_si128(moved, masks[k]));
    }
    return bytes;
}

static inline __m128i bn_px_channel(bn_px_bytes x, bn_px_picks count)
{
    return _mm_and_si128(_mm_srl_epi32(x, count), _mm_set1_epi32(255));
}

/* A channel, or interleaved the four elements that are k fours behind the first. */
static inline bn_px_floats bn_px_pick(bn_px_bytes x, bn_px_picks count, int k, int interleaved)
{
    const __m128i zero = _mm_setzero_si128();
    if (!interleaved)
        return _mm_cvtepi32_ps(bn_px_channel(x, count));
    const __m128i shorts = k < 2 ? _mm_unpacklo_epi8(x, zero) : _mm_unpackhi_epi8(x, zero);
    return _mm_cvtepi32_ps(k % 2 ? _mm_unpackhi_epi16(shorts, zero) : _mm_unpacklo_epi16(shorts, zero));
}

static inline bn_px_picks bn_px_picks_of(const bn_pixels *p, int k)
{
    return _mm_loadu_si128((const __m128i *)p->of[k].picks);
}

static inline bn_px_floats bn_px_four(const float *values) { return _mm_loadu_ps(values); }

static inline bn_px_floats bn_px_scaled(bn_px_floats x, bn_px_floats scale, bn_px_floats shift,
                                        bn_px_floats one)
{
    (void)one;
    return _mm_add_ps(_mm_mul_ps(x, scale), shift);
}

static inline void bn_px_store(char *y, char *rest, bn_px_floats v, int type, int interleaved)
{
    (void)rest, (void)type, (void)interleaved;
    _mm_storeu_ps((float *)y, v);
}
#elif defined(__aarch64__)
enum { BN_STEP = 4, BN_AHEAD = 0, BN_TYPES = 1 };
typedef uint8x16_t bn_px_bytes;
typedef uint8x16_t bn_px_picks;
typedef float32x4_t bn_px_floats;

static inline bn_px_bytes bn_px_load(const uint8_t *x, ptrdiff_t pixel, const bn_px_picks *masks,
                                     int channels, int interleaved, int reversed)
{
    (void)pixel, (void)masks, (void)channels, (void)interleaved, (void)reversed;
    return vld1q_u8(x);
}

static inline bn_px_floats bn_px_pick(bn_px_bytes x, bn_px_picks picks, int k, int interleaved)
{
    (void)k, (void)interleaved;
    return vcvtq_f32_u32(vreinterpretq_u32_u8(vqtbl1q_u8(x, picks)));
}

static inline bn_px_picks bn_px_picks_of(const bn_pixels *p, int k) { return vld1q_u8(p->of[k].picks); }

static inline bn_px_floats bn_px_four(const float *values) { return vld1q_f32(values); }

static inline bn_px_floats bn_px_scaled(bn_px_floats x, bn_px_floats scale, bn_px_floats shift,
                                        bn_px_floats one)
{
    (void)one;
    return vaddq_f32(vmulq_f32(x, scale), shift);
}

static inline void bn_px_store(char *y, char *rest, bn_px_floats v, int type, int interleaved)
{
    (void)rest, (void)interleaved;
    if (type == BN_FLOAT32) {
        vst1q_f32((float *)y, v);
    } else if (type == BN_FLOAT16) {
        vst1_u16((uint16_t *)y, vreinterpret_u16_f16(vcvt_f16_f32(v)));
    } else {
        const int16x4_t shorts = vqmovn_s32(vcvtnq_s32_f32(v));
        const int16x8_t twice = vcombine_s16(shorts, shorts);
        const uint8x8_t bytes = type == BN_UINT8 ? vqmovun_s16(twice) : vreinterpret_u8_s8(vqmovn_s16(twice));
        const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
        memcpy(y, &four, 4);
    }
}
#endif

#if defined(__SSE2__) || defined(__aarch64__)
/* How to take pixels with these strides of x, whose y is planes or interleaved. */
static inline void bn_pixels_plan(bn_pixels *p, ptrdiff_t pixel, ptrdiff_t channel, ptrdiff_t channels,
                                  int interleaved, int type)
{
    p->channels = 0;
    p->interleaved = interleaved;
    p->type = type;
    p->pixel = pixel;
    if (channels > 4 || channel > 15 || channel < -15 || pixel > 1 << 20 || pixel < -(1 << 20))
        return;
    const ptrdiff_t span = (channels - 1) * channel, low = span < 0 ? span : 0, high = span - low;
    p->before = 0;
    p->behind = high;
#if defined(__AVX2__) || defined(__aarch64__)
    const ptrdiff_t three = 3 * pixel, back = three < 0 ? three : 0;
    if (three - 2 * back + high - low > 15)
        return;
    p->low = low + back;
    p->reach = p->low + 15 + (pixel > 0 ? (BN_STEP - 4) * pixel : 0);
    for (int k = 0; k < channels; k++)
        for (int i = 0; i < 4; i++) {
            const int at = 4 * k + i;
            const ptrdiff_t of_pixel = interleaved ? at / channels : i, c = interleaved ? at % channels : k;
            const uint8_t picks[4] = {(uint8_t)(of_pixel * pixel + c * channel - p->low), 255, 255, 255};
            memcpy(p->of[k].picks + 4 * i, picks, 4);
        }
#else
    if (high - low > 3 || type != BN_FLOAT32)
        return;
    if (interleaved && channel != 1 && channel != -1)
        return;
    p->reversed = channel < 0;
    p->low = low;
    p->reach = low + 3 + (pixel > 0 ? 3 * pixel : 0);
    if (interleaved && pixel == channels) {
        p->before = p->reversed;
        p->low += low;
        p->reach = 15;
    }
    for (int k = 0; k < channels; k++)
        for (int i = 0; i < 16; i++)
            p->of[k].picks[i] = (uint8_t)(interleaved ? -(i % channels == k)
                                          : i == 0    ? 8 * (k * channel - low)
                                                      : 0);
#endif
    p->channels = (int)channels;
}

/* With the scale and shift of its channels. */
static inline void bn_pixels_scale(bn_pixels *p, const float *scale, const float *shift)
{
    for (int k = 0; k < 4 && p->channels; k++)
        for (int i = 0; i < 4; i++) {
            const int c = (p->interleaved ? 4 * k + i : k) % p->channels;
            p->of[k].scale[i] = scale[c];
            p->of[k].shifted[i] = shift[c];
        }
}

/* Inlined, as are its callers, so that its last three arguments are literals. */
BN_INLINE void bn_pixels_loop(const bn_pixels *p, const uint8_t *x, char *y, ptrdiff_t plane, ptrdiff_t i,
                              const ptrdiff_t last, const int channels, const int interleaved, const int type)
{
    const ptrdiff_t size = type == BN_FLOAT32 ? 4 : type == BN_FLOAT16 ? 2 : 1;
    const ptrdiff_t step = interleaved ? channels * size : size; /* from pixel to pixel */
    const ptrdiff_t apart = interleaved ? 4 * size : plane;
    const ptrdiff_t pixel = p->pixel, low = p->low;
    const int reversed = p->reversed;
    bn_px_picks picks[4];
    bn_px_floats scale[4], shift[4];
    const float one[4] = {BN_ONE, BN_ONE, BN_ONE, BN_ONE};
    const bn_px_floats ones = bn_px_four(one);
#pragma GCC unroll 4 /* or else the arrays stay in memory */
    for (int k = 0; k < channels; k++) {
        picks[k] = bn_px_picks_of(p, k);
        scale[k] = bn_px_four(p->of[k].scale);
        shift[k] = bn_px_four(p->of[k].shifted);
    }
    /* A first step, those where stores are aligned, and a last one: they overlap. */
    const ptrdiff_t ahead =
        BN_STEP - (interleaved ? 0 : (ptrdiff_t)((uintptr_t)(y + i * size) / size % BN_STEP));
    const ptrdiff_t from[3] = {i, i + ahead, last}, to[3] = {i + 1, last, last + 1};
    for (int part = 0; part < 3; part++)
        for (i = from[part]; i < to[part]; i += BN_STEP) {
            const bn_px_bytes pixels =
                bn_px_load(x + i * pixel + low, pixel, picks, channels, interleaved, reversed);
            if (interleaved && BN_AHEAD)
                bn_prefetch_to_write(y + i * step + BN_AHEAD, BN_STEP * step);
#pragma GCC unroll 4
            for (int k = 0; k < channels; k++) {
                char *first = y + i * step + k * apart;
                const bn_px_floats four = bn_px_pick(pixels, picks[k], k, interleaved);
                bn_px_store(first, first + 4 * step, bn_px_scaled(four, scale[k], shift[k], ones), type,
                            interleaved);
            }
        }
}

BN_INLINE void bn_pixels_typed(const bn_pixels *p, const uint8_t *x, char *y, ptrdiff_t plane,
                               ptrdiff_t first, ptrdiff_t last, const int type)
{
#define BN_LOOP(channels, interleaved)                                                                       \
    bn_pixels_loop(p, x, y, plane, first, last, channels, interleaved, type)
    switch (p->channels + (p->interleaved ? 4 : 0)) {
    case 1:
    case 5:
        BN_LOOP(1, 0);
        break;
    case 2:
        BN_LOOP(2, 0);
        break;
    case 3:
        BN_LOOP(3, 0);
        break;
    case 4:
        BN_LOOP(4, 0);
        break;
    case 6:
        BN_LOOP(2, 1);
        break;
    case 7:
        BN_LOOP(3, 1);
        break;
    case 8:
        BN_LOOP(4, 1);
        break;
    }
#undef BN_LOOP
}

/* Most of n pixels, from the one returned to the one before `stop`; no byte is read that is not between the
 * first and the last of theirs, none is written that belongs to others. */
static inline ptrdiff_t bn_pixels_row(const bn_pixels *p, const uint8_t *x, ptrdiff_t n, char *y,
                                      ptrdiff_t plane, ptrdiff_t *stop)
{
    *stop = 0;
    if (p->channels == 0)
        return 0;
    const ptrdiff_t end = p->behind + (p->pixel > 0 ? (n - 1) * p->pixel : 0);
    const ptrdiff_t room = end - p->reach; /* of the first step */
    ptrdiff_t first = p->before, last = n - BN_STEP;
    if (p->pixel > 0 && room < last * p->pixel)
        last = room < 0 ? -1 : room / p->pixel;
    else if (p->pixel < 0 && room < 0)
        first = (-room - p->pixel - 1) / -p->pixel;
    else if (p->pixel == 0 && room < 0)
        return 0;
    if (first > last)
        return 0;
    switch (BN_TYPES ? p->type : BN_FLOAT32) {
    case BN_FLOAT32:
        bn_pixels_typed(p, x, y, plane, first, last, BN_FLOAT32);
        break;
    case BN_FLOAT16:
        bn_pixels_typed(p, x, y, plane, first, last, BN_FLOAT16);
        break;
    case BN_UINT8:
        bn_pixels_typed(p, x, y, plane, first, last, BN_UINT8);
        break;
    default:
        bn_pixels_typed(p, x, y, plane, first, last, BN_INT8);
    }
    *stop = last + BN_STEP;
    return first;
}
#else
static inline void bn_pixels_plan(bn_pixels *p, ptrdiff_t pixel, ptrdiff_t channel, ptrdiff_t channels,
                                  int interleaved, int type)
{
    (void)pixel, (void)channel, (void)channels, (void)interleaved, (void)type;
    p->channels = 0;
}

static inline void bn_pixels_scale(bn_pixels *p, const float *scale, const float *shift)
{
    (void)p, (void)scale, (void)shift;
}

static inline ptrdiff_t bn_pixels_row(const bn_pixels *p, const uint8_t *x, ptrdiff_t n, char *y,
                                      ptrdiff_t plane, ptrdiff_t *stop)
{
    (void)p, (void)x, (void)n, (void)y, (void)plane;
    return *stop = 0;
}
#endif

#endif
