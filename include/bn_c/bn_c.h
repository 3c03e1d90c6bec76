/* bn_c for C, C++ and Cython: the loops chosen for this CPU, without Python in the way.
 *
 *     const bn_api *bn = bn_c_import();        with the GIL, after Python.h; NULL: an exception is set
 *     bn_params *params = malloc(bn->params_size(channels));
 *     bn->fold(params, channels, mean, var, gamma, beta, 1e-5);
 *     bn->normalize(params, &x, 1, NULL, NULL, &out);
 *
 * The functions need no GIL, run on the caller's thread, may run on many at once, and give the bits that
 * bn_c's Python functions give. They return 0, or a bn_error and have written nothing then.
 */
#ifndef BN_C_H
#define BN_C_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when anything below does; entries that are added at the end of bn_api only make it longer. */
#define BN_C_ABI 1

enum bn_type { BN_FLOAT32, BN_FLOAT16, BN_UINT8, BN_INT8, BN_UINT16, BN_INT16 }; /* y: the first two */

/* As in Py_buffer: 1 to 32 dimensions, strides in bytes, of any sign, or NULL: C's order without gaps. */
typedef struct {
    void *data; /* aligned to its type; read only, but for that of out */
    int type;
    int ndim;
    const ptrdiff_t *shape;
    const ptrdiff_t *strides;
} bn_array;

enum bn_activation_kind {
    BN_IDENTITY,
    BN_CLIP,       /* min(max(y, low), high); relu: 0 and INFINITY */
    BN_LEAKY_RELU, /* y > 0 ? y : slope * y */
    BN_HARD_SWISH, /* y * clip(y + 3, 0, 6) / 6 */
};

typedef struct {
    int kind;
    float low, high, slope;
} bn_activation;

/* mean, var, gamma, beta and eps, ready for the loops: the caller's memory, which may be copied. */
typedef struct bn_params bn_params;

enum bn_error {
    BN_OK,
    BN_NULL,           /* an argument, its data or its shape */
    BN_BAD_CHANNELS,   /* negative, too many, or another number than the parameters'; frames: not 1 to 1024 */
    BN_BAD_EPS,        /* negative or not finite */
    BN_BAD_PARAMS,     /* not from fold, or not aligned to 8 */
    BN_BAD_TYPE,       /* no bn_type, or none for this argument */
    BN_BAD_NDIM,       /* not 1 to 32; frames: not 3 or 4 */
    BN_BAD_SHAPE,      /* negative, too large, or another than x's; frames: than channels_last says */
    BN_BAD_AXIS,       /* not -ndim to ndim - 1 */
    BN_BAD_ACTIVATION, /* an unknown kind, low > high, NaN, or a slope that is not finite */
    BN_UNALIGNED,      /* data or strides are not multiples of the element's size */
    BN_OVERLAP,        /* out with itself, frames, or x or residual unless that is the very same array */
    BN_NO_MEMORY,
};

typedef struct {
    int abi;
    size_t size; /* of this struct in the bn_c that runs */

    /* Bytes of the parameters of that many channels; 0: BN_BAD_CHANNELS. */
    size_t (*params_size)(ptrdiff_t channels);

    /* The parameters of each channel; gamma NULL is 1, beta NULL is 0. */
    int (*fold)(bn_params *params, ptrdiff_t channels, const double *mean, const double *var,
                const double *gamma, const double *beta, double eps);

    /* out = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual), with channels on that axis,
     * which may be negative; residual and activation may be NULL. out is x or residual itself, or its
     * addresses, from the lowest to the highest, are apart from theirs. */
    int (*normalize)(const bn_params *params, const bn_array *x, int axis, const bn_array *residual,
                     const bn_activation *activation, const bn_array *out);

    /* count elements in each channel; their mean, and m2 = sum((x - mean)^2) = count * var, one of each per
     * channel, apart from x. Without elements, 0. */
    int (*moments)(const bn_array *x, int axis, ptrdiff_t *count, double *mean, double *m2);

    /* One line about a bn_error, in memory that stays. */
    const char *(*error_text)(int error);

    /* out = frames * scale[c] + shift[c] for channel c of out, as bn_c.ImageNormalizer does with
     * scale = (float)(1 / 255.0 / std), shift = (float)(-mean / std). frames: BN_UINT8, (height, width,
     * channels), or a batch of them; out: BN_FLOAT32 (halves would need a table), (channels, height, width),
     * or as frames if channels_last. reverse turns BGR to RGB. Nothing overlaps out. */
    int (*normalize_images)(const bn_array *frames, const float *scale, const float *shift, int reverse,
                            int channels_last, const bn_array *out);
} bn_api;

#ifdef Py_PYTHON_H
/* The table; it lives as long as the process. With the GIL. NULL: an ImportError is set. */
static inline const bn_api *bn_c_import(void)
{
    const bn_api *api = (const bn_api *)PyCapsule_Import("bn_c._core.c_api", 0);
    if (api && (api->abi != BN_C_ABI || api->size < sizeof *api)) {
        PyErr_Format(PyExc_ImportError, "bn_c: expected C ABI %d of %zu bytes or more, got %d of %zu; %s",
                     BN_C_ABI, sizeof *api, api->abi, api->size,
                     api->abi > BN_C_ABI ? "build this module again" : "install a newer bn_c");
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif

#endif
