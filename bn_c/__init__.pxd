"""What `bn_c/bn_c.h` declares, for Cython: `from bn_c cimport bn_api, bn_c_import`.

The shape of a memoryview x is &x.shape[0]: x.shape alone is an array, which Cython would copy.
"""

cdef extern from "bn_c/bn_c.h" nogil:
    enum:
        BN_C_ABI

    enum:
        BN_FLOAT32
        BN_FLOAT16
        BN_UINT8
        BN_INT8
        BN_UINT16
        BN_INT16

    ctypedef struct bn_array:
        void *data
        int type
        int ndim
        const Py_ssize_t *shape
        const Py_ssize_t *strides

    enum:
        BN_IDENTITY
        BN_CLIP
        BN_LEAKY_RELU
        BN_HARD_SWISH

    ctypedef struct bn_activation:
        int kind
        float low
        float high
        float slope

    ctypedef struct bn_params:
        pass

    enum:
        BN_OK
        BN_NULL
        BN_BAD_CHANNELS
        BN_BAD_EPS
        BN_BAD_PARAMS
        BN_BAD_TYPE
        BN_BAD_NDIM
        BN_BAD_SHAPE
        BN_BAD_AXIS
        BN_BAD_ACTIVATION
        BN_UNALIGNED
        BN_OVERLAP
        BN_NO_MEMORY

    ctypedef struct bn_api:
        int abi
        size_t size
        size_t (*params_size)(Py_ssize_t channels) noexcept nogil
        int (*fold)(
            bn_params *params, Py_ssize_t channels, const double *mean, const double *var,
            const double *gamma, const double *beta, double eps) noexcept nogil
        int (*normalize)(
            const bn_params *params, const bn_array *x, int axis, const bn_array *residual,
            const bn_activation *activation, const bn_array *out) noexcept nogil
        int (*moments)(const bn_array *x, int axis, Py_ssize_t *count, double *mean, double *m2) noexcept nogil
        const char *(*error_text)(int error) noexcept nogil
        int (*normalize_images)(
            const bn_array *frames, const float *scale, const float *shift, int reverse, int channels_last,
            const bn_array *out) noexcept nogil

cdef extern from "bn_c/bn_c.h":
    const bn_api *bn_c_import() except NULL
