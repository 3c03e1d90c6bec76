/* What has to be asked of the CPU: which instruction sets it runs, and its floating-point state. */
#ifndef BN_C_CPU_H
#define BN_C_CPU_H

#include <string.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif defined(__aarch64__)
#include <stdint.h>
#else
#include <fenv.h>
#endif

/* Whether the CPU (and its operating system) runs an instruction set, asked before any of it runs. */

static inline int bn_cpu_runs(const char *isa)
{
    if (strcmp(isa, "generic") == 0)
        return 1;
#if defined(__x86_64__)
    if (strcmp(isa, "x86_64") == 0)
        return 1;
/* Compilers older than these know neither the levels' names nor how to build for them. */
#if defined(__clang__) ? __clang_major__ >= 17 : __GNUC__ >= 11
    __builtin_cpu_init();
    if (strcmp(isa, "x86_64_v3") == 0)
        return __builtin_cpu_supports("x86-64-v3") != 0;
    if (strcmp(isa, "x86_64_v4") == 0)
        return __builtin_cpu_supports("x86-64-v4") != 0;
#endif
#elif defined(__aarch64__)
    if (strcmp(isa, "aarch64") == 0)
        return 1;
#endif
    return 0;
}

/* The loops run rounding to nearest, with subnormals, and leave the caller's modes and flags as they were. */
#if defined(__x86_64__)
typedef unsigned int bn_fp_state;
#elif defined(__aarch64__)
typedef struct {
    uint64_t control, status;
} bn_fp_state;
#else
typedef fenv_t bn_fp_state;
#endif

static inline void bn_fp_enter(bn_fp_state *state)
{
#if defined(__x86_64__)
    *state = _mm_getcsr();
    _mm_setcsr(0x1f80);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(state->control), "=r"(state->status));
    __asm__ volatile("msr fpcr, xzr" ::: "memory");
#else
    fegetenv(state);
    fesetenv(FE_DFL_ENV);
#endif
}

static inline void bn_fp_leave(const bn_fp_state *state)
{
#if defined(__x86_64__)
    _mm_setcsr(*state);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1" ::"r"(state->control), "r"(state->status) : "memory");
#else
    fesetenv(state);
#endif
}

#endif
