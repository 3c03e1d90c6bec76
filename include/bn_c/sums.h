/* What loops that add up numbers ask of compilers and CPUs. */
#ifndef BN_C_SUMS_H
#define BN_C_SUMS_H

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

#endif
