"""What passes from the checked arrays to the loops: one `Job`, laid out.

a. An array of any rank is three loops: over the channels, over one `inner` dimension and over the
   `outer` positions, which are whatever dimensions could not be merged into the inner one.
b. Of channels and inner the one with the smaller stride in x runs fastest. `channels_last` says
   which: rows of channels, or planes of one channel.
c. Strides are in bytes and may be negative or zero. No array is copied to be laid out.
d. A part of the work is a job too: the same loops over fewer channels, rows or outer positions.
   Threads and blocks are made that way, and the kernels need not know of either.
"""

from libc.math cimport NAN, fabs

from bn_c cimport (
    BN_CLIP as CLIP, BN_FLOAT16 as FLOAT16, BN_FLOAT32 as FLOAT32, BN_HARD_SWISH as HARD_SWISH,
    BN_IDENTITY as IDENTITY, BN_INT8 as INT8, BN_INT16 as INT16, BN_LEAKY_RELU as LEAKY_RELU,
    BN_UINT8 as UINT8, BN_UINT16 as UINT16, bn_activation as Activation,
)

cdef enum:
    MAX_NDIM = 32

cdef struct Operand:
    char *data                      # NULL: absent
    int type
    Py_ssize_t channel              # stride from channel to channel
    Py_ssize_t inner
    Py_ssize_t outer[MAX_NDIM]

# Per channel; y = (x - center) * scale + shift in float, from
#   scale  = gamma / std,   std = sqrt(var + eps)
#   center = mean rounded to float
#   shift  = beta - (mean - center) * scale     (the rounding of the mean is not lost)
# A channel whose numbers leave the safe range of float has a NaN scale and is computed in double.
cdef struct Coefficients:
    double *mean
    double *std
    double *gamma
    double *beta
    float *center
    float *scale
    float *shift
    bint wide                       # some channel is computed in double

cdef struct Job:
    bint channels_last
    bint stream                     # write past the caches: out is larger than they are
    bint far                        # x comes from memory, and is asked for ahead
    Py_ssize_t channels
    Py_ssize_t inner
    Py_ssize_t outer
    int outer_ndim
    Py_ssize_t outer_shape[MAX_NDIM]
    Operand x
    Operand residual
    Operand out
    Coefficients coefficients
    Activation activation

# Pictures of bytes, (batch, height, width, channels); y = x * scale + shift, or table[c][x].
cdef struct Images:
    Py_ssize_t[4] shape
    const char *x
    Py_ssize_t[4] x_strides
    char *out
    Py_ssize_t[4] out_strides
    int type                        # of out
    const float *scale
    const float *shift
    bint in_table                   # scale and shift do not give what is in the table
    const char *table               # 256 values for each channel; none of floats

# What `moments` finds of each channel, in `mean` and `m2`.
cdef enum Statistic:
    MOMENTS         # what these say
    CENTERS         # mean: a float near it, from a sample
    SUMS            # of deviations from that, in its place, and of their squares

# The loops of one instruction set.
cdef struct Kernels:
    bint streams                    # it has stores that go past the caches
    void (*normalize)(const Job *job) noexcept nogil
    # Returns how many elements of each channel count.
    Py_ssize_t (*moments)(const Job *job, Statistic statistic, double *mean, double *m2) noexcept nogil
    # Of variances m2 / count.
    void (*fold)(Coefficients *coefficients, Py_ssize_t channels, const double *m2, double count, double eps) noexcept nogil
    void (*images)(const Images *images) noexcept nogil


cdef inline Py_ssize_t size_of_type(int type) noexcept nogil:
    if type == FLOAT32:
        return 4
    return 1 if type == UINT8 or type == INT8 else 2


cdef inline Py_ssize_t magnitude(Py_ssize_t stride) noexcept nogil:
    return -stride if stride < 0 else stride


cdef inline size_t distance(Py_ssize_t stride) noexcept nogil:
    """By which loops are ordered. Elements that are repeated, at stride 0, count as furthest apart."""
    return <size_t> magnitude(stride) - 1


cdef inline void lay_out(
    Job *job, int ndim, int axis, const Py_ssize_t *shape,
    const Py_ssize_t *x, const Py_ssize_t *residual, const Py_ssize_t *out,
) noexcept nogil:
    """Fills in the loops of `job` from the shape and the strides of its arrays (NULL where there is none)."""
    cdef Py_ssize_t[MAX_NDIM] sizes
    cdef int[MAX_NDIM] dims                  # not the channels, of more than one element, by falling stride of x
    cdef int n = 0, merged = 0, d, i
    job.channels = shape[axis]
    job.x.channel = x[axis]
    job.out.channel = out[axis] if out != NULL else 0
    job.residual.channel = residual[axis] if residual != NULL else 0
    for d in range(ndim):
        if d == axis or shape[d] == 1:
            continue
        i = n
        while i > 0 and distance(x[dims[i - 1]]) < distance(x[d]):
            dims[i] = dims[i - 1]
            i -= 1
        dims[i] = d
        n += 1
    # A dimension whose neighbour continues it in every array is the same loop.
    for i in range(n):
        d = dims[i]
        if (
            merged > 0 and x[dims[merged - 1]] == x[d] * shape[d]
            and (out == NULL or out[dims[merged - 1]] == out[d] * shape[d])
            and (residual == NULL or residual[dims[merged - 1]] == residual[d] * shape[d])
        ):
            merged -= 1
            sizes[merged] *= shape[d]
        else:
            sizes[merged] = shape[d]
        dims[merged] = d
        merged += 1
    job.inner = 1
    job.x.inner = job.out.inner = job.residual.inner = 0
    if merged > 0:
        merged -= 1
        d = dims[merged]
        job.inner = sizes[merged]
        job.x.inner = x[d]
        job.out.inner = out[d] if out != NULL else 0
        job.residual.inner = residual[d] if residual != NULL else 0
    job.outer_ndim = merged
    job.outer = 1
    job.x.outer[0] = job.out.outer[0] = job.residual.outer[0] = 0
    for i in range(merged):
        d = dims[i]
        job.outer *= sizes[i]
        job.outer_shape[i] = sizes[i]
        job.x.outer[i] = x[d]
        job.out.outer[i] = out[d] if out != NULL else 0
        job.residual.outer[i] = residual[d] if residual != NULL else 0
    job.channels_last = job.channels > 1 and (job.inner == 1 or magnitude(job.x.channel) < magnitude(job.x.inner))


cdef inline Py_ssize_t outer_in_plane(const Job *job) noexcept nogil:
    """How many of the outer positions are in one plane: those of loops with shorter strides than the channels'."""
    cdef Py_ssize_t n = 1
    cdef int d = job.outer_ndim - 1
    while d >= 0 and magnitude(job.x.outer[d]) < magnitude(job.x.channel):
        n *= job.outer_shape[d]
        d -= 1
    return n


cdef enum Loop:
    OUTER           # the first of the outer dimensions
    INNER
    CHANNELS


cdef inline Py_ssize_t size_of(const Job *job) noexcept nogil:
    return job.outer * job.inner * job.channels


cdef inline bint is_planes(const Job *job) noexcept nogil:
    """Whether there are enough planes of channels for each to be a piece of work of its own."""
    return not job.channels_last and job.channels >= 16


cdef inline Py_ssize_t loop_length(const Job *job, int loop) noexcept nogil:
    if loop == OUTER:
        return job.outer_shape[0] if job.outer_ndim > 0 else 1
    return job.inner if loop == INNER else job.channels


cdef inline int widest_loop(const Job *job) noexcept nogil:
    """The loop that is best cut into parts where all elements are alike: parts in one piece, if there are enough."""
    if loop_length(job, OUTER) >= 8:
        return OUTER
    return CHANNELS if not job.channels_last and job.channels >= 8 else INNER


cdef inline int longest_loop(const Job *job) noexcept nogil:
    """The loop over elements of one channel that is best cut into parts."""
    return OUTER if loop_length(job, OUTER) >= min(job.inner, <Py_ssize_t> 8) else INNER


cdef inline void shift(Operand *operand, Py_ssize_t stride, Py_ssize_t start) noexcept nogil:
    if operand.data != NULL:
        operand.data += start * stride


cdef inline void take_channels(Job *job, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """Restricts the job to these channels."""
    job.channels = stop - start
    shift(&job.x, job.x.channel, start)
    shift(&job.out, job.out.channel, start)
    shift(&job.residual, job.residual.channel, start)
    job.coefficients.mean += start
    job.coefficients.std += start
    job.coefficients.gamma += start
    job.coefficients.beta += start
    job.coefficients.center += start
    job.coefficients.scale += start
    job.coefficients.shift += start


cdef inline void take(Job *job, int loop, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    """Restricts the job to a part of one of its loops."""
    if loop == CHANNELS:
        take_channels(job, start, stop)
    elif loop == INNER:
        shift(&job.x, job.x.inner, start)
        shift(&job.out, job.out.inner, start)
        shift(&job.residual, job.residual.inner, start)
        job.inner = stop - start
    else:
        shift(&job.x, job.x.outer[0], start)
        shift(&job.out, job.out.outer[0], start)
        shift(&job.residual, job.residual.outer[0], start)
        job.outer = job.outer // job.outer_shape[0] * (stop - start)
        job.outer_shape[0] = stop - start


cdef inline bint is_float(int type) noexcept nogil:
    return type == FLOAT32 or type == FLOAT16


cdef inline double most_off(bint exact) noexcept nogil:
    """For `m2_of`: what cancels of sums in float costs accuracy; that of sums without errors hardly does."""
    return 0.75 if exact else 0.0625


cdef inline double m2_of(
    double deviations, double squares, double n, double center, bint exact, double most, double *mean,
) noexcept nogil:
    """The mean and, returned, m2 of sums about a center, or NaN if they do not tell it: if more than `most` of the
    squares are what the center is off, and cancel. Without branches, to be vectorised."""
    cdef double off = deviations / n
    cdef double shifted = n * (off * off)
    cdef double m2 = squares - shifted if squares > shifted else 0
    # In float, squares below 1e-30 could have gone subnormal, a sum above 1e37 infinite.
    cdef double low = 0 if exact else 1e-30
    cdef double high = 1e300 if exact else 1e37
    m2 = m2 if (squares >= low) & (squares <= high) & (shifted <= squares * most) else NAN
    mean[0] = center + off
    # Any other float near such a center would have left a square.
    return 0 if (squares == 0) & (fabs(center) >= 1e-14) else m2


cdef inline void merge_moments(
    double *mean, double *m2, double n, double other_mean, double other_m2, double m,
) noexcept nogil:
    """The moments of n elements become those of n + m. An infinite mean stays so: inf - inf would be NaN."""
    cdef double delta = other_mean - mean[0]
    cdef double share = m / (n + m)
    mean[0] = mean[0] + delta * share if delta - delta == 0 else mean[0] + other_mean
    m2[0] += other_m2 + delta * delta * (n * share)
