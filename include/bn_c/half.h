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

#include "bn_c.h"
#include "stream.h"
#include "sums.h"

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
    /* 112 = 127 - 15: the difference of the exponent biases; twice for infinity and NaN. Subnormals are 2^-14
     * more, which is subtracted again. */
    const int32_t magnitude = half & 0x7fff;
    const int32_t special = -(magnitude > 0x7bff) & (112 << 23), subnormal = -(magnitude < 0x0400);
    const int32_t bits = (magnitude << 13) + (112 << 23) + special + (subnormal & (1 << 23));
    const float value =
        bn_float_from_bits((uint32_t)bits) - bn_float_from_bits((uint32_t)(subnormal & (113 << 23)));
    return bn_float_from_bits(bn_bits_from_float(value) | (uint32_t)(half & 0x8000) << 16);
}

static inline uint32_t bn_half_from_float(float value)
{
    const uint32_t bits = bn_bits_from_float(value);
    const int32_t magnitude = (int32_t)(bits & 0x7fffffff);
    const float absolute = bn_float_from_bits((uint32_t)magnitude);
    /* From 2^16 on it is infinity. */
    const int32_t limited = (int32_t)bn_bits_from_float(absolute < 0x1p16f ? absolute : 0x1p16f);
    /* 0xfff plus the last kept bit, then cut: to nearest, ties to even. Carries overflow to infinity. */
    const int32_t normal = (limited - (112 << 23) + 0xfff + ((limited >> 13) & 1)) >> 13;
    /* Added to 0.5, whose last bit is worth 2^-24, a magnitude below 2^-14 is rounded by the adder. */
    const int32_t subnormal = (int32_t)bn_bits_from_float(absolute + 0.5f) - 0x3f000000;
    const int32_t half = bn_select(magnitude < 0x38800000, subnormal, normal);
    const int32_t nan = -(magnitude > 0x7f800000) & (0x0200 | (magnitude >> 13 & 0x1ff));
    return (uint32_t)(half | nan) | (bits >> 16 & 0x8000);
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
#define bn_stream_halves(y, halves) (_mm_stream_si128((__m128i *)(y), halves), bn_in_order())
#define bn_all _mm256_set1_ps
#define bn_floats_at _mm256_loadu_ps
#if defined(__FMA__)
#define bn_floats_less(a, b, one) _mm256_fmsub_ps(a, bn_all(one), b)
#else
#define bn_floats_less(a, b, one) _mm256_sub_ps(a, b)
#endif
#define bn_at_least(low, t) _mm256_max_ps(low, t)
#define bn_at_most(high, t) _mm256_min_ps(high, t)
#define bn_if_more(a, b, yes, no) _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ))
#else
typedef float32x4_t bn_floats;
typedef uint16x4_t bn_halves;
#define bn_halves_at(x) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)))
#define bn_to_halves(t) vreinterpret_u16_f16(vcvt_f16_f32(t))
#define bn_store_halves(y, halves) vst1_u16(y, halves)
#define bn_stream_halves bn_store_halves
#define bn_all vdupq_n_f32
#define bn_floats_at vld1q_f32
#define bn_floats_less(a, b, one) vsubq_f32(a, b)
#define bn_if_more(a, b, yes, no) vbslq_f32(vcgtq_f32(a, b), yes, no)
static inline bn_floats bn_at_least(bn_floats low, bn_floats t) { return bn_if_more(low, t, low, t); }
static inline bn_floats bn_at_most(bn_floats high, bn_floats t) { return bn_if_more(t, high, high, t); }
#endif

enum { BN_ROWS = 4, BN_LANES = sizeof(bn_floats) / sizeof(float) };

#endif

/* Of two floats. By `?:` GCC turns some comparisons around for ARM, which takes three instructions more. */
static inline float bn_either(int first, float a, float b)
{
#if defined(__aarch64__)
    const uint32_t mask = -(uint32_t)first;
    uint32_t a_bits, b_bits;
    memcpy(&a_bits, &a, sizeof a);
    memcpy(&b_bits, &b, sizeof b);
    b_bits = (a_bits & mask) | (b_bits & ~mask);
    memcpy(&b, &b_bits, sizeof b);
    return b;
#else
    return first ? a : b;
#endif
}

/* What follows the formula. ReLU is half of a clip, and most of them. */
enum { BN_AT_LEAST = BN_HARD_SWISH + 1, BN_NOTHING };

static inline int bn_kind_of(const bn_activation *activation, const void *residual)
{
    if (!residual && activation->kind == BN_IDENTITY)
        return BN_NOTHING;
    return activation->kind == BN_CLIP && activation->high == INFINITY ? BN_AT_LEAST : activation->kind;
}

/* y = activation((x - center) * scale + shift + residual). */
typedef struct {
    const uint16_t *x;
    const uint16_t *residual; /* NULL: none */
    uint16_t *y;              /* or x, or residual */
    ptrdiff_t x_row;          /* bytes to the next row */
    ptrdiff_t residual_row;
    ptrdiff_t y_row;
    const float *center;
    const float *scale;
    const float *shift;
    bn_activation activation;
    int ahead; /* whether x is asked for where y is streamed */
} bn_row_of_halves;

#if BN_CONVERTS_HALVES
#define BN_AT(data, bytes) ((void *)((char *)(data) + (bytes)))

/* Conversion keeps the adders busy, so the multipliers subtract: 0.85 to 0.9 of the time in caches. */
static inline bn_floats bn_normalized(const uint16_t *x, bn_floats c, bn_floats a, bn_floats b,
                                      const float one)
{
    return bn_floats_less(bn_halves_at(x), c, one) * a + b;
}

/* n vectors, which are at element i of a row and `stride` apart, become activation(t + residual), as floats
 * do by `activated` in _kernels.pyx. NaN stays NaN. Asked for every few vectors, what is to be done takes no
 * time; a loop for each case would make wheels too large. */
static inline __attribute__((always_inline)) void bn_activate(bn_floats *t, const int n,
                                                              const bn_row_of_halves *r, ptrdiff_t i,
                                                              ptrdiff_t stride, const int kind)
{
    const bn_activation *f = &r->activation;
    if (kind == BN_NOTHING)
        return;
    if (r->residual)
        for (int j = 0; j < n; j++)
            t[j] = t[j] + bn_halves_at(BN_AT(r->residual + i, stride * j));
    if (kind == BN_AT_LEAST) {
        for (int j = 0; j < n; j++)
            t[j] = bn_at_least(bn_all(f->low), t[j]);
    } else if (kind == BN_CLIP) {
        for (int j = 0; j < n; j++)
            t[j] = bn_at_most(bn_all(f->high), bn_at_least(bn_all(f->low), t[j]));
    } else if (kind != BN_IDENTITY) {
        const bn_floats slope = bn_all(f->slope), zero = bn_all(0), three = bn_all(3),
                        sixth = bn_all((float)(1.0 / 6.0));
        for (int j = 0; j < n; j++) {
            if (kind == BN_LEAKY_RELU)
                t[j] = bn_if_more(t[j], zero, t[j], t[j] * slope);
            else
                t[j] = bn_if_more(three, t[j], bn_if_more(t[j], -three, t[j] * (t[j] + three) * sixth, zero),
                                  t[j]);
        }
    }
}

/* A vector of y from element i of a row on. `step` is 0 where all have one coefficient, 1 where each has its
 * own. */
static inline __attribute__((always_inline)) bn_halves bn_normalized_at(const bn_row_of_halves *r,
                                                                        ptrdiff_t i, const float one,
                                                                        const int step, const int kind)
{
    bn_floats t =
        step ? bn_normalized(r->x + i, bn_floats_at(r->center + i), bn_floats_at(r->scale + i),
                             bn_floats_at(r->shift + i), one)
             : bn_normalized(r->x + i, bn_all(*r->center), bn_all(*r->scale), bn_all(*r->shift), one);
    bn_activate(&t, 1, r, i, 0, kind);
    return bn_to_halves(t);
}

/* Elements i to n of a row, BN_ROWS vectors at a time, which do not wait for each other: small cores run
 * instructions in their order. Or one vector of each of BN_ROWS rows, for which coefficients are loaded once.
 * Returns where it ends. */
static inline __attribute__((always_inline)) ptrdiff_t bn_normalize_vectors(bn_row_of_halves r, ptrdiff_t i,
                                                                            ptrdiff_t n, const float one,
                                                                            const int step, const int kind,
                                                                            const int stream, const int rows)
{
    const ptrdiff_t some = rows ? BN_LANES : BN_ROWS * BN_LANES;
    const ptrdiff_t x_next = rows ? r.x_row : (ptrdiff_t)sizeof(bn_halves);
    const ptrdiff_t residual_next = rows ? r.residual_row : (ptrdiff_t)sizeof(bn_halves);
    const ptrdiff_t y_next = rows ? r.y_row : (ptrdiff_t)sizeof(bn_halves);
    bn_floats c = bn_all(*r.center), a = bn_all(*r.scale), b = bn_all(*r.shift);
    for (; i + some <= n; i += some) {
        bn_floats t[BN_ROWS];
        if (stream && r.ahead)
            bn_prefetch((const char *)(r.x + i) + BN_NEAR, BN_LINE);
        for (int j = 0; j < BN_ROWS; j++) {
            if (step && (j == 0 || !rows)) {
                c = bn_floats_at(r.center + i + BN_LANES * j);
                a = bn_floats_at(r.scale + i + BN_LANES * j);
                b = bn_floats_at(r.shift + i + BN_LANES * j);
            }
            t[j] = bn_normalized(BN_AT(r.x + i, x_next * j), c, a, b, one);
        }
        bn_activate(t, BN_ROWS, &r, i, residual_next, kind);
        for (int j = 0; j < BN_ROWS; j++) {
            if (stream)
                bn_stream_halves(BN_AT(r.y + i, y_next * j), bn_to_halves(t[j]));
            else
                bn_store_halves(BN_AT(r.y + i, y_next * j), bn_to_halves(t[j]));
        }
    }
    return i;
}

/* n elements, a vector at least. The last vector overlaps those before it, and where y is x or the residual
 * it is read before they are written: not otherwise, as CPUs would not see memory coming any more (1.5 x).
 * Whole lines only are streamed. */
static inline __attribute__((always_inline)) void bn_normalize_row_of_halves(bn_row_of_halves r, ptrdiff_t n,
                                                                             const float one, const int step,
                                                                             const int kind, int stream)
{
    const ptrdiff_t last = n - BN_LANES;
    const int early = n % BN_LANES && (r.y == r.x || r.y == r.residual);
    ptrdiff_t i = 0, until = n;
    bn_halves end;
    memset(&end, 0, sizeof end);
    if (early)
        end = bn_normalized_at(&r, last, one, step, kind);
#if BN_STREAMS
    if (stream && (uintptr_t)r.y % sizeof(bn_halves) == 0) {
        until = -(uintptr_t)r.y % BN_LINE / sizeof *r.y;
        until = until < n ? until : n;
    }
#endif
    for (;;) {
        i = bn_normalize_vectors(r, i, until, one, step, kind, 0, 0);
        for (; i + BN_LANES <= until; i += BN_LANES)
            bn_store_halves(r.y + i, bn_normalized_at(&r, i, one, step, kind));
        if (until == n)
            break;
        i = bn_normalize_vectors(r, i, n, one, step, kind, BN_STREAMS, 0);
        until = n;
    }
    if (i < n)
        bn_store_halves(r.y + last, early ? end : bn_normalized_at(&r, last, one, step, kind));
}

static inline void bn_move(bn_row_of_halves *r, ptrdiff_t rows)
{
    r->x = BN_AT(r->x, rows * r->x_row);
    if (r->residual)
        r->residual = BN_AT(r->residual, rows * r->residual_row);
    r->y = BN_AT(r->y, rows * r->y_row);
}

static inline __attribute__((always_inline)) void bn_normalize_each_row(bn_row_of_halves r, ptrdiff_t rows,
                                                                        ptrdiff_t columns, const float one,
                                                                        const int step, const int kind,
                                                                        int next, int stream)
{
    ptrdiff_t row = 0;
    if (step && !stream && columns % 16 == 0)
        for (; row + BN_ROWS <= rows; row += BN_ROWS) {
            bn_normalize_vectors(r, 0, columns, one, 1, kind, 0, 1);
            bn_move(&r, BN_ROWS);
        }
    for (; row < rows; row++) {
        bn_normalize_row_of_halves(r, columns, one, step, kind, stream);
        bn_move(&r, 1);
        r.center += next;
        r.scale += next;
        r.shift += next;
    }
}
#endif

/* Rows from the first one on, halves to halves without a detour through memory, if a row is a vector at
 * least; returns how many elements were done, all or none. `step` is 1 where each element of a row has its
 * own coefficients, the same in all rows, 0 where all have one, and the next row's is `next` behind. Not
 * inlined: copies for each caller made wheels too large. */
static __attribute__((noinline, unused)) ptrdiff_t bn_normalize_halves(bn_row_of_halves r, ptrdiff_t rows,
                                                                       ptrdiff_t columns, const int step,
                                                                       int next, int stream)
{
#if BN_CONVERTS_HALVES
    const float one = BN_ONE;
    const int kind = bn_kind_of(&r.activation, r.residual);
    if (columns < BN_LANES)
        return 0;
    if (kind == BN_NOTHING)
        bn_normalize_each_row(r, rows, columns, one, step, BN_NOTHING, next, stream);
    else
        bn_normalize_each_row(r, rows, columns, one, step, kind, next, stream);
    return rows * columns;
#else
    return 0;
#endif
}

/* Of n elements in joined rows, whose elements have coefficients of their own, as many as are whole fours of
 * rows. */
static inline ptrdiff_t bn_normalize_rows_of_halves(bn_row_of_halves r, ptrdiff_t n, ptrdiff_t columns)
{
#if BN_CONVERTS_HALVES
    if (columns % 16)
        return 0;
    r.x_row = r.residual_row = r.y_row = columns * (ptrdiff_t)sizeof(uint16_t);
    return bn_normalize_halves(r, n / columns / BN_ROWS * BN_ROWS, columns, 1, 0, 0);
#else
    return 0;
#endif
}

#if BN_STREAMS && BN_CONVERTS_HALVES
/* BN_ROWS rows of whole lines, `row` elements each, the first one of which has its coefficients at `at` of
 * `columns`. A line is written as a whole: parts of four lines in turn took up to three times as long. What
 * longer rows read is asked for in the order of memory, in which CPUs do not see it coming: 3 x. */
static inline void bn_stream_four_rows(bn_row_of_halves r, ptrdiff_t row, ptrdiff_t columns, ptrdiff_t at)
{
    enum { IN_LINE = BN_LINE / sizeof(bn_halves) };
    const float one = BN_ONE;
    const ptrdiff_t ahead = BN_ROWS * r.x_row > BN_NEAR ? BN_ROWS * r.x_row : BN_NEAR;
    const int ask = r.x_row > 2 * BN_LINE, kind = bn_kind_of(&r.activation, r.residual);
    for (ptrdiff_t i = 0; i < row; i += BN_LANES * IN_LINE) {
        bn_halves halves[BN_ROWS][IN_LINE];
#pragma GCC unroll 4
        for (int k = 0; k < IN_LINE; k++) {
            const bn_floats c = bn_floats_at(r.center + at), a = bn_floats_at(r.scale + at);
            const bn_floats b = bn_floats_at(r.shift + at);
            const ptrdiff_t here = i + BN_LANES * k;
            bn_floats t[BN_ROWS];
            at = at + BN_LANES < columns ? at + BN_LANES : 0;
            if (ask)
                bn_prefetch((const char *)(r.x + BN_ROWS * i) + ahead + k * BN_LINE, BN_LINE);
            if (ask && r.residual)
                bn_prefetch((const char *)(r.residual + BN_ROWS * i) + ahead + k * BN_LINE, BN_LINE);
            for (int j = 0; j < BN_ROWS; j++)
                t[j] = bn_normalized(BN_AT(r.x + here, r.x_row * j), c, a, b, one);
            bn_activate(t, BN_ROWS, &r, here, r.x_row, kind);
            for (int j = 0; j < BN_ROWS; j++)
                halves[j][k] = bn_to_halves(t[j]);
        }
        for (int j = 0; j < BN_ROWS; j++)
            for (int k = 0; k < IN_LINE; k++)
                bn_stream_halves(BN_AT(r.y + i + BN_LANES * k, r.x_row * j), halves[j][k]);
    }
}
#endif

/* The same to memory, from where a line of y begins: rows are as many as whole lines need, and the first
 * one's coefficients are at `phase`. */
static inline ptrdiff_t bn_stream_rows_of_halves(bn_row_of_halves r, ptrdiff_t n, ptrdiff_t columns,
                                                 ptrdiff_t phase)
{
    ptrdiff_t done = 0;
#if BN_STREAMS && BN_CONVERTS_HALVES
    ptrdiff_t row = columns;
    if (columns % BN_LANES || phase % BN_LANES)
        return 0;
    while (row % (BN_LINE / 2))
        row += columns;
    r.x_row = r.residual_row = r.y_row = row * (ptrdiff_t)sizeof(uint16_t);
    for (; done + BN_ROWS * row <= n; done += BN_ROWS * row) {
        bn_stream_four_rows(r, row, columns, phase);
        bn_move(&r, BN_ROWS);
    }
#endif
    return done;
}

#if BN_CONVERTS_HALVES
/* What is summed is limited by arithmetic, so it is by the widest registers there are (0.95 of the time in
 * planes, 0.75 to 0.95 in rows from memory). */
#if defined(__AVX512DQ__)
typedef __m512 bn_terms;
#define bn_terms_at _mm512_loadu_ps
#define bn_terms_of_halves(x) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x)))
#define bn_terms_less(a, b, one) _mm512_fmsub_ps(a, _mm512_set1_ps(one), b)
typedef __m512d bn_doubles;
#define bn_doubles_at _mm512_loadu_pd
#define bn_store_doubles _mm512_storeu_pd
#define bn_low(t) _mm512_cvtps_pd(_mm512_castps512_ps256(t))
#define bn_high(t) _mm512_cvtps_pd(_mm512_extractf32x8_ps(t, 1))
#else
typedef bn_floats bn_terms;
#define bn_terms_at bn_floats_at
#define bn_terms_of_halves bn_halves_at
#define bn_terms_less bn_floats_less
#if defined(__F16C__)
typedef __m256d bn_doubles;
#define bn_doubles_at _mm256_loadu_pd
#define bn_store_doubles _mm256_storeu_pd
#define bn_low(t) _mm256_cvtps_pd(_mm256_castps256_ps128(t))
#define bn_high(t) _mm256_cvtps_pd(_mm256_extractf128_ps(t, 1))
#else
typedef float64x2_t bn_doubles;
#define bn_doubles_at vld1q_f64
#define bn_store_doubles vst1q_f64
#define bn_low(t) vcvt_f64_f32(vget_low_f32(t))
#define bn_high vcvt_high_f64_f32
#endif
#endif

enum { BN_TERMS = sizeof(bn_terms) / sizeof(float) };

static inline void bn_terms_add(double *sums, bn_doubles low, bn_doubles high)
{
    bn_store_doubles(sums, bn_doubles_at(sums) + low);
    bn_store_doubles(sums + BN_TERMS / 2, bn_doubles_at(sums + BN_TERMS / 2) + high);
}
#define bn_terms_add_one(sums, t) bn_terms_add(sums, bn_low(t), bn_high(t))
#define bn_terms_add_two(sums, t, u) bn_terms_add(sums, bn_low(t) + bn_low(u), bn_high(t) + bn_high(u))

/* Of a vector of columns, whose type and operations those of `terms` are. */
#define BN_ADD_EIGHT_HALVES(name, terms)                                                                     \
    static inline void name(const uint16_t *x, ptrdiff_t stride, const float *center, double *deviations,    \
                            double *squares, float one)                                                      \
    {                                                                                                        \
        const terms m = terms##_at(center);                                                                  \
        terms d[8];                                                                                          \
        (void)one;                                                                                           \
        for (int k = 0; k < 8; k++)                                                                          \
            d[k] = terms##_less(terms##_of_halves(x + k * stride), m, one);                                  \
        terms##_add_one(deviations, ((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7])));      \
        for (int k = 0; k < 8; k++)                                                                          \
            d[k] *= d[k];                                                                                    \
        terms##_add_two(squares, (d[0] + d[1]) + (d[2] + d[3]), (d[4] + d[5]) + (d[6] + d[7]));              \
    }
BN_ADD_EIGHT_HALVES(bn_add_eight_halves, bn_terms)

#if defined(__F16C__)
/* Planes of 14 x 14 end with four. */
typedef __m128 bn_four;
#define bn_four_at _mm_loadu_ps
#define bn_four_of_halves(x) _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(x)))
#define bn_four_less(a, b, one) _mm_sub_ps(a, b)
#define bn_four_add_one(sums, t) _mm256_storeu_pd(sums, _mm256_loadu_pd(sums) + _mm256_cvtps_pd(t))
#define bn_four_add_two(sums, t, u)                                                                          \
    _mm256_storeu_pd(sums, _mm256_loadu_pd(sums) + (_mm256_cvtps_pd(t) + _mm256_cvtps_pd(u)))
BN_ADD_EIGHT_HALVES(bn_add_four_halves, bn_four)
#endif
#undef BN_ADD_EIGHT_HALVES

/* Of any fewer columns. */
static inline void bn_add_last_halves(const uint16_t *x, ptrdiff_t stride, ptrdiff_t n, const float *center,
                                      double *deviations, double *squares, float one)
{
#if defined(__F16C__)
    if (n == 4) {
        bn_add_four_halves(x, stride, center, deviations, squares, one);
        return;
    }
#endif
    uint16_t halves[8 * BN_TERMS] = {0};
    float about[BN_TERMS] = {0};
    double sums[2 * BN_TERMS] = {0};
    for (int k = 0; k < 8; k++)
        for (ptrdiff_t c = 0; c < n; c++)
            halves[k * BN_TERMS + c] = x[k * stride + c];
    for (ptrdiff_t c = 0; c < n; c++)
        about[c] = center[c];
    bn_add_eight_halves(halves, BN_TERMS, about, sums, sums + BN_TERMS, one);
    for (ptrdiff_t c = 0; c < n; c++) {
        deviations[c] += sums[c];
        squares[c] += sums[BN_TERMS + c];
    }
}
#endif

/* Adds deviations and squares of halves to the sums of their columns, eight rows at a time in the order in
 * which those of floats are added; returns how many rows these were. Each `width` columns have `kept` sums, a
 * power of two if they are fewer, which further columns are added to in turn. `ahead` bytes behind them
 * memory is asked for. Without a detour through a buffer this takes 0.7 of the time. */
static inline BN_INLINED ptrdiff_t bn_add_rows_of_halves(const uint16_t *x, ptrdiff_t stride, ptrdiff_t rows,
                                                         ptrdiff_t columns, const float *center,
                                                         double *deviations, double *squares, ptrdiff_t width,
                                                         ptrdiff_t kept, ptrdiff_t ahead)
{
    ptrdiff_t row = 0;
#if BN_CONVERTS_HALVES
    const float one = BN_ONE;
    const ptrdiff_t whole = width & -(ptrdiff_t)BN_TERMS, turn = kept < width ? kept - 1 : -1;
    for (; row + 8 <= rows; row += 8) {
        const uint16_t *eight = x + row * stride;
        for (ptrdiff_t first = 0, at = 0; first < columns; first += width, at += kept) {
            for (ptrdiff_t c = 0; c < whole; c += BN_TERMS) {
                if (ahead && stride == columns)
                    bn_prefetch_far((const char *)eight + ahead + 16 * (first + c), 16 * BN_TERMS);
                else if (ahead && c % (BN_LINE / 2) == 0)
                    for (int k = 0; k < 8; k++)
                        bn_prefetch_far((const char *)(eight + first + c + k * stride) + ahead, 1);
                bn_add_eight_halves(eight + first + c, stride, center + at + (c & turn),
                                    deviations + at + (c & turn), squares + at + (c & turn), one);
            }
            if (whole < width)
                bn_add_last_halves(eight + first + whole, stride, width - whole, center + at + (whole & turn),
                                   deviations + at + (whole & turn), squares + at + (whole & turn), one);
        }
    }
#endif
    return row;
}

#endif
