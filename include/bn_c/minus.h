/* Subtraction by the multipliers, where the adders have more to do: a * 1 - b is rounded once, so it is a -
 * b. AMD's and newer of Intel's CPUs have as many of the ones as of the others. */
#ifndef BN_C_MINUS_H
#define BN_C_MINUS_H

/* Not known to the compiler, or it would subtract. */
static const volatile float BN_ONE = 1;

#if defined(__FMA__)
#define bn_minus(a, b, one) __builtin_fmaf(a, one, -(b))
#else
#define bn_minus(a, b, one) ((a) - (b))
#endif

#endif
