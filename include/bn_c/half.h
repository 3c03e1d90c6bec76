/* Rows of half-precision numbers (IEEE 754 binary16) to and from float, rounding to nearest even.
 *
 * Three ways with the same results (NaN payloads aside): F16C and NEON convert in hardware; the
 * plain version is exact integer arithmetic without branches, so that compilers vectorise it.
 */
#ifndef BN_C_HALF_H
#define BN_C_HALF_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "minus.h"
#include "stream.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* What a function reads otherwise does not overlap these. */
typedef float *restrict bn_apart;

/* Whether the CPU has instructions that convert. */
#if defined(__F16C__) || defined(__aarch64__)
#define BN_CONVERTS_HALVES 1
#else
#define BN_CONVERTS_HALVES 0
#endif

static inline float bn_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bn_bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* yes or no, without a branch: compilers do not vectorise all forms of ?: */
static inline int32_t bn_select(int condition, int32_t yes, int32_t no)
{
    return no ^ ((no ^ yes) & -condition);
}

static inline float bn_float_from_half(uint16_t half)
{
    const int32_t magnitude = half & 0x7fff;
    /* 112 = 127 - 15: the difference of the exponent biases; twice for infinity and NaN. */
    const int32_t normal = (magnitude << 13) + (112 << 23);
    const int32_t special = ((magnitude << 13) + (224 << 23)) | (magnitude > 0x7c00) << 22;
    const int32_t subnormal = (int32_t)bn_bits_from_float((float)magnitude * 0x1p-24f);
    const int32_t finite = bn_select(magnitude < 0x0400, subnormal, normal);
    const int32_t bits = bn_select(magnitude < 0x7c00, finite, special);
    return bn_float_from_bits((uint32_t)bits | (uint32_t)(half & 0x8000) << 16);
}

static inline uint32_t bn_half_from_float(float value)
{
    const uint32_t bits = bn_bits_from_float(value);
    const int32_t magnitude = (int32_t)(bits & 0x7fffffff);
    /* 0xfff plus the last kept bit, then cut: to nearest, ties to even. Carries overflow to infinity. */
    const int32_t normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    /* Added to 0.5, whose last bit is worth 2^-24, a magnitude below 2^-14 is rounded by the adder. */
    const int is_small = magnitude < 0x38800000;
    const float small = bn_float_from_bits((uint32_t)(magnitude & -is_small));
    const int32_t subnormal = (int32_t)bn_bits_from_float(small + 0.5f) - 0x3f000000;
    const int32_t special = bn_select(magnitude > 0x7f800000, 0x7e00 | ((magnitude >> 13) & 0x1ff), 0x7c00);
    const int32_t finite = bn_select(is_small, subnormal, normal);
    const int32_t half = bn_select(magnitude < 0x47800000, finite, special);
    return (uint32_t)half | (bits >> 16 & 0x8000);
}

static inline void bn_floats_from_halves(const uint16_t *halves, float *floats, ptrdiff_t n)
{
    ptrdiff_t i = 0;
#if defined(__AVX512F__) /* 1.2 x faster here than eight at a time */
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(floats + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(halves + i))));
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4)
        vst1q_f32(floats + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
#endif
    for (; i < n; i++)
        floats[i] = bn_float_from_half(halves[i]);
}

static inline void bn_halves_from_floats(const float *floats, uint16_t *halves, ptrdiff_t n)
{
    ptrdiff_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(halves + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4)
        vst1_u16(halves + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(floats + i))));
#endif
    /* By way of 32 bits: compilers would narrow every step on its own, four times slower. */
    while (i < n) {
        uint32_t wide[64];
        const ptrdiff_t some = n - i < 64 ? n - i : 64;
        for (ptrdiff_t j = 0; j < some; j++)
            wide[j] = bn_half_from_float(floats[i + j]);
        for (ptrdiff_t j = 0; j < some; j++)
            halves[i + j] = (uint16_t)wide[j];
        i += some;
    }
}

#if BN_CONVERTS_HALVES
#if defined(__F16C__)
/* Eight lanes: sixteen are 1.3 x slower where halves come from memory, and 1.08 x faster in L3. */
typedef __m256 bn_floats;
typedef __m128i bn_halves;
#define bn_halves_at(x) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x)))
#define bn_to_halves(t) _mm256_cvtps_ph(t, _MM_FROUND_TO_NEAREST_INT)
#define bn_store_halves(y, halves) _mm_storeu_si128((__m128i *)(y), halves)
#define bn_stream_halves(y, halves) _mm_stream_si128((__m128i *)(y), halves)
#define bn_all _mm256_set1_ps
#define bn_floats_at _mm256_loadu_ps
#define bn_scaled(x, c, a, b) _mm256_add_ps(_mm256_mul_ps(_mm256_sub_ps(x, c), a), b)
#define bn_bounded(t, low, high) _mm256_min_ps(high, _mm256_max_ps(low, t))
#if defined(__FMA__)
#define bn_less(a, b, one) _mm256_fmsub_ps(a, one, b)
#else
#define bn_less(a, b, one) _mm256_sub_ps(a, b)
#endif
typedef __m256d bn_doubles;
#define bn_doubles_at _mm256_loadu_pd
#define bn_store_doubles _mm256_storeu_pd
#define bn_low(t) _mm256_cvtps_pd(_mm256_castps256_ps128(t))
#define bn_high(t) _mm256_cvtps_pd(_mm256_extractf128_ps(t, 1))
#else
typedef float32x4_t bn_floats;
typedef uint16x4_t bn_halves;
#define bn_halves_at(x) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)))
#define bn_to_halves(t) vreinterpret_u16_f16(vcvt_f16_f32(t))
#define bn_store_halves(y, halves) vst1_u16(y, halves)
#define bn_stream_halves bn_store_halves
#define bn_all vdupq_n_f32
#define bn_floats_at vld1q_f32
#define bn_scaled(x, c, a, b) vaddq_f32(vmulq_f32(vsubq_f32(x, c), a), b)
#define bn_less(a, b, one) vsubq_f32(a, b)
typedef float64x2_t bn_doubles;
#define bn_doubles_at vld1q_f64
#define bn_store_doubles vst1q_f64
#define bn_low(t) vcvt_f64_f32(vget_low_f32(t))
#define bn_high vcvt_high_f64_f32
static inline float32x4_t bn_bounded(float32x4_t t, float32x4_t low, float32x4_t high)
{
    t = vbslq_f32(vcltq_f32(t, low), low, t);
    return vbslq_f32(vcgtq_f32(t, high), high, t);
}
#endif

static inline void bn_add_to_sums(double *sums, bn_doubles low, bn_doubles high)
{
    const ptrdiff_t half = sizeof(low) / sizeof(double);
    bn_store_doubles(sums, bn_doubles_at(sums) + low);
    bn_store_doubles(sums + half, bn_doubles_at(sums + half) + high);
}

enum { BN_ROWS = 4, BN_LANES = sizeof(bn_floats) / sizeof(float) };

/* Elements i to n of a row, or of BN_ROWS rows of n that are joined: `step` is 0 where all have one
 * coefficient, 1 where each has its own, and the coefficients of a row are loaded once for all rows. `count`
 * vectors at a time do not wait for each other: small cores run instructions in their order. Returns where it
 * ends. */
static inline __attribute__((always_inline)) ptrdiff_t
bn_normalize_vectors(const uint16_t *x, uint16_t *y, ptrdiff_t i, ptrdiff_t n, const float *center,
                     const float *scale, const float *shift, const int step, float low, float high,
                     const int bounded, const int stream, const int count, const int rows)
{
    const bn_floats lows = bn_all(low), highs = bn_all(high);
    const ptrdiff_t next = rows ? n : BN_LANES;
    bn_floats c = bn_all(*center), a = bn_all(*scale), b = bn_all(*shift);
    for (; i + BN_LANES * (rows ? 1 : count) <= n; i += BN_LANES * (rows ? 1 : count)) {
        bn_halves halves[BN_ROWS];
        for (int j = 0; j < count; j++) {
            if (step && (j == 0 || !rows)) {
                c = bn_floats_at(center + i + BN_LANES * j);
                a = bn_floats_at(scale + i + BN_LANES * j);
                b = bn_floats_at(shift + i + BN_LANES * j);
            }
            bn_floats t = bn_halves_at(x + i + next * j);
            t = bn_scaled(t, c, a, b);
            if (bounded)
                t = bn_bounded(t, lows, highs);
            halves[j] = bn_to_halves(t);
        }
        for (int j = 0; j < count; j++) {
            if (stream)
                bn_stream_halves(y + i + next * j, halves[j]);
            else
                bn_store_halves(y + i + next * j, halves[j]);
        }
    }
    return i;
}

/* The loop above with what is known of it beforehand. */
static inline __attribute__((always_inline)) ptrdiff_t bn_normalize_some(
    const uint16_t *x, uint16_t *y, ptrdiff_t i, ptrdiff_t n, const float *center, const float *scale,
    const float *shift, const int step, float low, float high, int stream, const int count, const int rows)
{
    const int bounded = low > -INFINITY || high < INFINITY;
#define BN_NORMALIZE(bounded, stream)                                                                        \
    bn_normalize_vectors(x, y, i, n, center, scale, shift, step, low, high, bounded, stream, count, rows)
#if defined(__F16C__)
    if (stream && (uintptr_t)y % sizeof(bn_halves) == 0)
        return bounded ? BN_NORMALIZE(1, 1) : BN_NORMALIZE(0, 1);
#endif
    (void)stream;
    return bounded ? BN_NORMALIZE(1, 0) : BN_NORMALIZE(0, 0);
#undef BN_NORMALIZE
}

/* Elements of a row, a vector at least. The last vector is done with those before it that it overlaps, and is
 * loaded first, since y may be x. Of rows that end within a vector whole lines only are streamed. */
static inline __attribute__((always_inline)) void
bn_normalize_row_of_halves(const uint16_t *x, uint16_t *y, ptrdiff_t n, const float *center,
                           const float *scale, const float *shift, const int step, float low, float high,
                           int stream)
{
    uint16_t rest[BN_LANES];
    const ptrdiff_t last = n - BN_LANES, own = step ? last : 0;
    ptrdiff_t i = 0;
    memcpy(rest, x + last, sizeof rest);
#if defined(__aarch64__)
    (void)stream;
    i = bn_normalize_some(x, y, i, n, center, scale, shift, step, low, high, 0, BN_ROWS, 0);
#else
    if (stream)
        i = bn_normalize_some(x, y, i, n % BN_LANES ? n & -BN_LINE / 2 : n, center, scale, shift, step, low,
                              high, 1, 1, 0);
#endif
    i = bn_normalize_some(x, y, i, n, center, scale, shift, step, low, high, 0, 1, 0);
    if (i < n)
        bn_normalize_some(rest, y + last, 0, BN_LANES, center + own, scale + own, shift + own, step, low,
                          high, 0, 1, 0);
}
#endif

/* y = min(max((x - center) * scale + shift, low), high), halves to halves without a detour through memory, of
 * rows that lie `x_row` and `y_row` bytes apart, if a row is a vector at least; returns how many elements
 * were done, all or none. `step` is 1 where each element of a row has its own coefficients, 0 where all have
 * one; the next row's follow `next` behind. NaN stays NaN: the bound is taken only if y compares beyond it.
 */
static inline ptrdiff_t bn_normalize_halves(const uint16_t *x, uint16_t *y, ptrdiff_t rows, ptrdiff_t columns,
                                            ptrdiff_t x_row, ptrdiff_t y_row, const float *center,
                                            const float *scale, const float *shift, const int step, int next,
                                            float low, float high, int stream)
{
#if BN_CONVERTS_HALVES
    if (columns < BN_LANES)
        return 0;
    for (ptrdiff_t row = 0; row < rows; row++, center += next, scale += next, shift += next) {
        bn_normalize_row_of_halves(x, y, columns, center, scale, shift, step, low, high, stream);
        x = (const uint16_t *)((const char *)x + x_row);
        y = (uint16_t *)((char *)y + y_row);
    }
    return rows * columns;
#else
    return 0;
#endif
}

/* The same for joined rows of elements that have coefficients of their own, and each row the same. */
static inline ptrdiff_t bn_normalize_rows_of_halves(const uint16_t *x, uint16_t *y, ptrdiff_t n,
                                                    ptrdiff_t columns, const float *center,
                                                    const float *scale, const float *shift, float low,
                                                    float high, int stream)
{
    ptrdiff_t done = 0;
#if BN_CONVERTS_HALVES
    if (columns % 16 == 0)
        for (; done + BN_ROWS * columns <= n; done += BN_ROWS * columns)
            bn_normalize_some(x + done, y + done, 0, columns, center, scale, shift, 1, low, high, stream,
                              BN_ROWS, 1);
#endif
    return done;
}

/* Adds deviations and squares of halves to the sums of their columns, eight rows at a time in the order in
 * which those of floats are added; returns how many rows these were. `ahead` bytes behind them memory is
 * asked for. Without a detour through a buffer this takes 0.7 of the time. */
static inline ptrdiff_t bn_add_rows_of_halves(const uint16_t *x, ptrdiff_t stride, ptrdiff_t rows,
                                              ptrdiff_t columns, const float *center, double *deviations,
                                              double *squares, ptrdiff_t ahead)
{
    ptrdiff_t row = 0;
#if BN_CONVERTS_HALVES
    const bn_floats one = bn_all(BN_ONE);
    (void)one;
    for (; columns % BN_LANES == 0 && row + 8 <= rows; row += 8) {
        const uint16_t *eight = x + row * stride;
        if (ahead)
            bn_prefetch_far((const char *)eight + ahead, 16 * columns);
        for (ptrdiff_t c = 0; c < columns; c += BN_LANES) {
            const bn_floats m = bn_floats_at(center + c);
            bn_floats d[8];
            for (int k = 0; k < 8; k++)
                d[k] = bn_less(bn_halves_at(eight + k * stride + c), m, one);
            const bn_floats sum = ((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7]));
            for (int k = 0; k < 8; k++)
                d[k] *= d[k];
            const bn_floats first = (d[0] + d[1]) + (d[2] + d[3]), second = (d[4] + d[5]) + (d[6] + d[7]);
            bn_add_to_sums(deviations + c, bn_low(sum), bn_high(sum));
            bn_add_to_sums(squares + c, bn_low(first) + bn_low(second), bn_high(first) + bn_high(second));
        }
    }
#endif
    return row;
}

#endif
