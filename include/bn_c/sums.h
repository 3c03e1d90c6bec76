/* What loops that add up numbers ask of compilers and CPUs. */
#ifndef BN_C_SUMS_H
#define BN_C_SUMS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Subtraction by the multipliers, where the adders have more to do: a * 1 - b is rounded once, so it is a -
 * b. AMD's and newer of Intel's CPUs have as many of the ones as of the others.
 * The 1 is not known to the compiler, or it would subtract. */
static const volatile float BN_ONE = 1;

#if defined(__FMA__)
#define bn_minus(a, b, one) __builtin_fmaf(a, one, -(b))
#else
#define bn_minus(a, b, one) ((a) - (b))
#endif

/* Of functions whose loops are limited by arithmetic: by the widest registers there are, 0.75 to 0.85 of the
 * time. All others, which memory limits, are better off with half of them. */
#if defined(__AVX512F__) && !defined(__clang__)
#define BN_WIDER 1
#define BN_WIDEST __attribute__((noinline, target("prefer-vector-width=512")))
#else
#define BN_WIDER 0
#define BN_WIDEST __attribute__((noinline))
#endif

/* Whether vectors are so short that arithmetic limits y in caches, not sums alone. */
#if defined(__AVX__)
#define BN_NARROW 0
#else
#define BN_NARROW 1
#endif

/* Of functions that compilers would copy for each literal argument: copies make wheels too large. */
#if defined(__clang__)
#define BN_ONCE __attribute__((noinline))
#else
#define BN_ONCE __attribute__((noinline, noclone))
#endif

/* Of loops that are made for literal arguments: where compilers are left to choose, some are not. */
#define BN_INLINED __attribute__((always_inline))

/* Sums in eight parts, in vectors of the CPU's size: of loops over so few numbers GCC makes none, and it
 * converts two of four at a time, for ARM one of two. */
#if defined(__AVX512F__)
typedef __m512d bn_part;
#define bn_part_from(x) _mm512_cvtps_pd(_mm256_loadu_ps(x))
#define bn_half_sums(p) (_mm512_castpd512_pd256((p)[0]) + _mm512_extractf64x4_pd((p)[0], 1))
#elif defined(__AVX__)
typedef __m256d bn_part;
#define bn_part_from(x) _mm256_cvtps_pd(_mm_loadu_ps(x))
#define bn_half_sums(p) ((p)[0] + (p)[1])
#elif defined(__aarch64__)
typedef float64x2_t bn_part;
#define bn_part_from(x) vcvt_f64_f32(vld1_f32(x))
#else
typedef double bn_part __attribute__((vector_size(16)));
typedef float bn_two __attribute__((vector_size(8), aligned(4), may_alias));
#define bn_part_from(x) __builtin_convertvector(*(const bn_two *)(x), bn_part)
#endif
typedef int64_t bn_mask __attribute__((vector_size(sizeof(bn_part)), aligned(8), may_alias));
enum { BN_PART = sizeof(bn_part) / sizeof(double), BN_PARTS = 8 / BN_PART };

static inline double bn_total(const bn_part *parts)
{
#if defined(bn_half_sums)
    const __m256d halves = bn_half_sums(parts);
    return (halves[0] + halves[2]) + (halves[1] + halves[3]);
#else
    const bn_part quarters = (parts[0] + parts[2]) + (parts[1] + parts[3]);
    return quarters[0] + quarters[1];
#endif
}

/* Adds those of eight numbers, of which a mask may select some. */
static inline void bn_add_parts(const float *x, double center, const int64_t *mask, bn_part *deviations,
                                bn_part *squares)
{
#pragma GCC unroll 4
    for (int i = 0; i < BN_PARTS; i++) {
        bn_part d = bn_part_from(x + i * BN_PART) - center;
        if (mask)
            d = (bn_part)((bn_mask)d & ((const bn_mask *)mask)[i]);
        deviations[i] += d;
        squares[i] += d * d;
    }
}

/* The sums of numbers' deviations from a center and of their squares, in double. */
static inline void bn_add_few(const char *x, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
                              double center, double *deviations, double *squares)
{
    /* Selects the last c of eight from its place c on. */
    static const int64_t last[15] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1};
    bn_part of_deviations[BN_PARTS] = {{0}}, of_squares[BN_PARTS] = {{0}};
    double deviation = 0, square = 0;
    for (; rows > 0; rows--, x += stride) {
        const float *row = (const float *)x;
        ptrdiff_t i;
        for (i = 0; i + 8 <= columns; i += 8)
            bn_add_parts(row + i, center, NULL, of_deviations, of_squares);
        if (i > 0 && i < columns)
            bn_add_parts(row + columns - 8, center, last + columns % 8, of_deviations, of_squares);
        for (; i < columns && columns < 8; i++) {
            const double d = row[i] - center;
            deviation += d;
            square += d * d;
        }
    }
    *deviations = bn_total(of_deviations) + deviation;
    *squares = bn_total(of_squares) + square;
}

#endif
