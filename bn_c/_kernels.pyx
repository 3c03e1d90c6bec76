"""The loops of the forward pass, compiled once per instruction set from this one source."""
#     moments     mean = sum(x) / m,  m2 = sum((x - mean)^2)          (var = m2 / m)
#     fold        scale = gamma / sqrt(var + eps),  shift = beta - (mean - center) * scale
#     normalize   y = activation((x - center) * scale + shift + residual)
#
# a. Everything happens in blocks that stay in L1. A block that is not a run of floats (half, integers,
#    strides) is loaded into a buffer of floats first, one that is not stored as such is stored from it.
# b. Statistics are sums of deviations, and of their squares, from a center near the mean, which a sample taken
#    all over the channel tells. A center that proves to be more than a quarter of a standard deviation off is
#    replaced by the mean found, and the sums are taken again; a channel that still has no moments gets those of sums
#    in double.
#    They are kept in columns: x is seen as a table whose columns have one channel each. Rows of channels are that as
#    they are, few channels several rows at a time. Short planes lie side by side, a row from each image, as do lines
#    of planes with gaps between them; those of
#    two strips of COLUMNS and more are added strip by strip to the same sums. A long plane is cut into rows of
#    COLUMNS, and what its eights of rows leave over is added like a short plane.
#    The columns of a channel are added up at the end. Of few elements there are eight sums, in double. So there is no
#    loop over one single sum, and every instruction set vectorises the same additions in the same order: the same bits.
# c. Errors. A deviation (2^-24, twice when squared), its square (2^-24) and a tree of four of them (2 * 2^-24)
#    round in float, what follows is double: var is within 5 * 2^-24 = 3e-7. Integers have whole numbers as centers:
#    squares of 8 bits, and trees of four of them, are exact in float, those of 16 bits in double. Channels whose squares
#    leave the range of float, and those of zeros, which may be such, are summed in double.
# d. Literal arguments of inlined functions make one loop for each case out of one source. `apart` tells the compiler
#    that y overlaps nothing, which makes rows of channels 1.3 x faster; in place, x is read through y.

from libc.math cimport INFINITY, fabs, isfinite, sqrt
from libc.stdint cimport int8_t, int16_t, uint8_t, uint16_t
from libc.string cimport memchr, memcmp, memcpy, memset

from cpython.pycapsule cimport PyCapsule_New

from bn_c._layout cimport (
    CENTERS, CLIP, FLOAT16, FLOAT32, HARD_SWISH, IDENTITY, INT8, INT16, LEAKY_RELU, MAX_NDIM, MOMENTS, SUMS, UINT8, UINT16,
    Activation, Coefficients, Job, Kernels, Operand, Statistic,
    is_float, m2_of, magnitude, most_off, outer_in_plane, size_of_type, take_channels,
)
from bn_c._images cimport normalize_images

cdef extern from "bn_c/half.h" nogil:
    ctypedef float *apart "bn_apart"        # floats that no other argument leads to
    bint BN_CONVERTS_HALVES
    enum:
        BN_AT_LEAST
        BN_NOTHING
    float bn_either(bint first, float a, float b)
    int bn_kind_of(const Activation *activation, const void *residual)
    void bn_floats_from_halves(const uint16_t *halves, float *floats, Py_ssize_t n)
    ctypedef struct bn_row_of_halves:
        const uint16_t *x
        const uint16_t *residual
        uint16_t *y
        Py_ssize_t x_row
        Py_ssize_t residual_row
        Py_ssize_t y_row
        const float *center
        const float *scale
        const float *shift
        Activation activation
        int ahead
    Py_ssize_t bn_normalize_halves(
        bn_row_of_halves first, Py_ssize_t rows, Py_ssize_t columns, int step, int next, int stream)
    Py_ssize_t bn_normalize_rows_of_halves(bn_row_of_halves first, Py_ssize_t n, Py_ssize_t columns)
    Py_ssize_t bn_stream_rows_of_halves(bn_row_of_halves first, Py_ssize_t n, Py_ssize_t columns, Py_ssize_t phase)
    void bn_halves_from_floats(const float *floats, uint16_t *halves, Py_ssize_t n)
    Py_ssize_t bn_add_rows_of_halves(
        const uint16_t *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, const float *center,
        double *deviations, double *squares, Py_ssize_t width, Py_ssize_t kept, Py_ssize_t ahead)

cdef extern from "bn_c/sums.h" nogil:
    ctypedef void widest "BN_WIDEST void"
    ctypedef void inlined "BN_INLINED void"
    ctypedef void once "BN_ONCE void"
    ctypedef Py_ssize_t number_once "BN_ONCE Py_ssize_t"
    bint BN_NARROW
    bint BN_WIDER
    float BN_ONE
    float bn_minus(float a, float b, float one)
    void bn_add_few(
        const char *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, double center, double *deviations,
        double *squares)

cdef extern from "bn_c/stream.h" nogil:
    enum:
        BN_BEGINNING
        BN_NEAR
        BN_FAR
    void bn_prefetch(const char *data, Py_ssize_t count)
    void bn_prefetch_to_write(const char *data, Py_ssize_t count)
    void bn_prefetch_far(const char *data, Py_ssize_t count)
    bint BN_STREAMS
    void bn_stream_lines(char *to, const char *source, int lines)
    void bn_stream(char *to, const char *source, size_t count)
    void bn_stream_end()

ctypedef fused number:
    float
    uint8_t
    int8_t
    uint16_t
    int16_t

ctypedef fused loaded:
    float
    uint16_t            # a half

ctypedef fused given:
    float
    double

ctypedef fused repeated_as:
    float
    double

cdef enum:
    AHEAD = 2048        # bytes, with the gaps, that rows which lie apart are asked for ahead: the best of 0 .. 16384
    GAP = 256           # bytes between rows from which on the next one is not seen coming
    CHUNK = 512         # elements that pass through a buffer at a time: the best of 64 .. 1024
    PAGE = 1024         # floats of a page
    LINE = 16           # floats of a cache line
    TWO_LINES = 2 * LINE
    FOUR_LINES = 4 * LINE
    TOGETHER = 4096     # elements of rows that are normalised strip by strip, FOUR_LINES wide: they stay in L1
    NEAR = 1 << 17      # elements that the second cache holds: what comes from further off is to come in order
    STRIP = 128         # columns of a strip of rows, some of which are computed in double
    PATTERN = 512       # coefficients of a row, repeated for several rows of few channels
    STREAMED = 96       # floats of a row that is streamed although x's rows do not join: to put two together takes time
    FEW = 16            # elements of a row below which loops over it are too short, and several are taken at once
    MANY = 64           # rows from which on it is worth repeating coefficients, or asking for each beside another
    COLUMNS = 32        # columns that a plane is cut into: whole registers of every set, enough to hide latency
    NEXT = 8 * COLUMNS * 4  # bytes: the eight rows after those that are added
    LANES = 8           # of a sum
    WIDEST = 512        # columns whose sums are taken at once: with eight rows they fit the smallest L1
    LONGEST = 3 * WIDEST    # elements of planes that may be added so: 0.8 to 0.9 of the time, up to WIDEST 0.5 to 0.75
    L1_WAY = 1 << 13    # bytes from one line to the next that share a place with it in a small L1, which holds four at most
    BLOCK = 8 * 512     # floats of a buffer of statistics: eight of the widest rows, in half of the smallest L1
    LOADED = 2048       # floats that are loaded there at a time, if rows are shorter: the best of 256 .. 4096
    PLANE = 8 * COLUMNS  # elements of a plane that are eight rows
    GROUP = 1 << 18     # bytes of channels that are read together, from memory twice that: L2 holds what is beside the sample
    ROW_SAMPLE = 256    # elements that the center of a channel is guessed from: 1 in 10 000 are taken twice
    PLACES = 64         # in the outer dimensions, from which these are at most
    FEW_ELEMENTS = 1024  # of a channel in several images: up to these are added in double, channel by channel
    FEW_OF_ONE = 512    # of one image
    FEW_ROWS = 128      # of which all are the sample; of fewer than 512 half of them are as near the mean as 256 of many

cdef enum Sum:
    DEVIATIONS      # float, their squares left out
    SQUARES         # float
    WIDE            # double

cdef float NOT_A_NUMBER = float("nan")
# (x - ZERO) * ONE + NO_SHIFT = x, -0 too
cdef float ZERO = 0
cdef float ONE = 1
cdef float NO_SHIFT = -0.0
cdef Activation NOTHING = Activation(kind=IDENTITY, low=0, high=0, slope=0)


# ---- loading and storing: any type and strides, to and from a buffer of floats ----------------------

cdef inline bint lie_apart(Py_ssize_t stride, Py_ssize_t bytes) noexcept nogil:
    """Whether from memory each row has to be asked for."""
    return not bytes <= stride < bytes + GAP


cdef inline Py_ssize_t rows_ahead(Py_ssize_t stride, Py_ssize_t some) noexcept nogil:
    """How many rows before it is read a row that lies apart is asked for, where `some` are taken at a time."""
    return max(some, AHEAD // max(magnitude(stride), <Py_ssize_t> 1))


cdef void prefetch_rows(const char *x, Py_ssize_t stride, Py_ssize_t bytes, Py_ssize_t rows) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(rows):
        bn_prefetch_far(x + row * stride, bytes)


cdef inline bint is_run(const Operand *operand, Py_ssize_t stride) noexcept nogil:
    return operand.type == FLOAT32 and stride == 4


cdef inline float *whole_lines(float *storage) noexcept nogil:
    """Where the first cache line of a buffer, longer by LINE, begins: stores that straddle lines are slow."""
    return storage + (-<size_t> storage % 64) // 4


cdef inline float *away_from(const char *x, float *storage) noexcept nogil:
    """Where a buffer, longer by PAGE, is half a page off x: CPUs may take loads for dependent on stores whose last
    12 bits of address are the same, and the speed would hang on where the stack happens to be."""
    return storage + ((<size_t> x + 2048) // 64 * 64 - <size_t> storage) % 4096 // 4


cdef inline void load_row(const number *source, Py_ssize_t stride, apart to, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = <float> (<const number *> (<const char *> source + i * stride))[0]


cdef inline void load_row_of_halves(const uint16_t *source, Py_ssize_t stride, uint16_t *to, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        to[i] = (<const uint16_t *> (<const char *> source + i * stride))[0]


cdef inline void load_grid(
    const number *source, Py_ssize_t row_stride, Py_ssize_t stride, loaded *to, Py_ssize_t rows, Py_ssize_t columns,
) noexcept nogil:
    cdef Py_ssize_t _row
    for _row in range(rows):
        if loaded is float:
            load_row(source, stride, <apart> to, columns)
        else:
            load_row_of_halves(<const uint16_t *> source, stride, to, columns)
        source = <const number *> (<const char *> source + row_stride)
        to += columns


cdef inline void load_numbers(
    const number *source, Py_ssize_t row_stride, Py_ssize_t stride, loaded *to, Py_ssize_t rows, Py_ssize_t columns,
) noexcept nogil:
    # Strides that are known when this is compiled are vectorised; those of integers made wheels too large.
    if stride == <Py_ssize_t> sizeof(number):
        if (number is uint8_t or number is float or loaded is uint16_t) and columns == 3:
            load_grid(source, row_stride, sizeof(number), to, rows, 3)
        else:
            load_grid(source, row_stride, sizeof(number), to, rows, columns)
    elif (number is float or loaded is uint16_t) and stride == 2 * <Py_ssize_t> sizeof(number):
        load_grid(source, row_stride, 2 * <Py_ssize_t> sizeof(number), to, rows, columns)
    elif (number is uint8_t or number is float or loaded is uint16_t) and stride == -<Py_ssize_t> sizeof(number):
        if (number is float or loaded is uint16_t) and columns == 3:
            load_grid(source, row_stride, -<Py_ssize_t> sizeof(number), to, rows, 3)
        else:
            load_grid(source, row_stride, -<Py_ssize_t> sizeof(number), to, rows, columns)
    else:
        load_grid(source, row_stride, stride, to, rows, columns)


cdef inline void load_halves(
    const char *source, Py_ssize_t row_stride, Py_ssize_t stride, float *to, Py_ssize_t rows, Py_ssize_t columns,
) noexcept nogil:
    """Short rows, and what is strided, are put together first, to be converted whole vectors at a time."""
    cdef uint16_t[CHUNK] halves
    cdef Py_ssize_t row = 0, first = 0, n, some
    if stride == 2 and (rows == 1 or columns >= CHUNK // 4):
        for row in range(rows):
            bn_floats_from_halves(<const uint16_t *> (source + row * row_stride), to + row * columns, columns)
        return
    while row < rows:
        some = min(<Py_ssize_t> CHUNK, columns - first)
        n = max(<Py_ssize_t> 1, min(CHUNK // columns, rows - row))
        load_numbers(
            <const uint16_t *> (source + row * row_stride + first * stride), row_stride, stride, &halves[0], n, some)
        bn_floats_from_halves(halves, to + row * columns + first, n * some)
        first += some
        if first == columns:
            first = 0
            row += n


cdef void load(
    int type, const char *source, Py_ssize_t row_stride, Py_ssize_t stride, float *to, Py_ssize_t rows, Py_ssize_t columns,
) noexcept nogil:
    """Rows of numbers, one after the other."""
    if row_stride == columns * stride:
        columns *= rows
        rows = 1
    if type == FLOAT32:
        load_numbers(<const float *> source, row_stride, stride, to, rows, columns)
    elif type == FLOAT16:
        load_halves(source, row_stride, stride, to, rows, columns)
    elif type == UINT8:
        load_numbers(<const uint8_t *> source, row_stride, stride, to, rows, columns)
    elif type == INT8:
        load_numbers(<const int8_t *> source, row_stride, stride, to, rows, columns)
    elif type == UINT16:
        load_numbers(<const uint16_t *> source, row_stride, stride, to, rows, columns)
    else:
        load_numbers(<const int16_t *> source, row_stride, stride, to, rows, columns)


cdef inline void store_numbers(
    const loaded *source, char *to, Py_ssize_t row_stride, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns,
    bint stream,
) noexcept nogil:
    cdef Py_ssize_t _row, i
    for _row in range(rows):
        if stride != <Py_ssize_t> sizeof(loaded):
            for i in range(columns):
                (<loaded *> (to + i * stride))[0] = source[i]
        elif stream:
            bn_stream(to, <const char *> source, columns * sizeof(loaded))
        else:
            memcpy(to, source, columns * sizeof(loaded))
        source += columns
        to += row_stride


cdef void store(
    const Job *job, const float *source, char *to, Py_ssize_t row_stride, Py_ssize_t stride,
    Py_ssize_t rows, Py_ssize_t columns,
) noexcept nogil:
    """Rows of numbers that lie one after the other, CHUNK at most."""
    cdef uint16_t[CHUNK] storage
    cdef uint16_t *halves = storage
    if row_stride == columns * stride:
        columns *= rows
        rows = 1
    if job.out.type == FLOAT32:
        store_numbers(source, to, row_stride, stride, rows, columns, job.stream)
        return
    if stride == 2 and rows == 1 and not job.stream:
        halves = <uint16_t *> to
    bn_halves_from_floats(source, halves, rows * columns)
    if halves == &storage[0]:
        store_numbers(<const uint16_t *> halves, to, row_stride, stride, rows, columns, job.stream)


cdef void repeat(
    const given *values, Py_ssize_t channels, Py_ssize_t times, repeated_as *to, Py_ssize_t n,
) noexcept nogil:
    """Each channel's value that many times, then all of these again until they are n."""
    cdef Py_ssize_t done = channels * times, c, i
    if times == 1:
        for c in range(channels):
            to[c] = <repeated_as> values[c]
    else:
        for c in range(channels):
            for i in range(times):
                to[c * times + i] = <repeated_as> values[c]
    while done < n:
        memcpy(to + done, to, min(done, n - done) * sizeof(repeated_as))
        done *= 2


# ---- y = activation((x - center) * scale + shift + residual) ----------------------------------------

cdef inline float activated(float y, int kind, float low, float high, float slope) noexcept nogil:
    """Comparisons are written so that NaN stays NaN. As `bn_activate` of halves."""
    if kind == CLIP or kind == BN_AT_LEAST:
        y = bn_either(y < low, low, y)
    if kind == CLIP:
        y = bn_either(y > high, high, y)
    elif kind == LEAKY_RELU:
        y = bn_either(y > 0, y, y * slope)
    elif kind == HARD_SWISH:
        y = bn_either(y <= -3, 0, bn_either(y >= 3, y, y * (y + <float> 3) * <float> (1.0 / 6.0)))
    return y


cdef inline inlined normalize_row(
    const float *x, int stride, const float *residual, apart y, Py_ssize_t n,
    const float *center, const float *scale, const float *shift, int step,
    int kind, const Activation *activation, bint in_place,
) noexcept nogil:
    """step is 1 where each element has its own channel, 0 where all have one; `stride` is x's."""
    cdef Py_ssize_t i
    cdef float t
    cdef float low = activation.low, high = activation.high, slope = activation.slope
    for i in range(n):
        t = ((y[i] if in_place else x[i * stride]) - center[i * step]) * scale[i * step] + shift[i * step]
        if residual != NULL:
            t = t + residual[i]
        y[i] = activated(t, kind, low, high, slope)


cdef struct Steps:
    # In bytes, in each array.
    Py_ssize_t x
    Py_ssize_t residual
    Py_ssize_t out


cdef struct Rows:
    # Elements that follow each other, in x at `stride`, and from where the next of them do.
    Py_ssize_t columns
    int stride
    Steps step
    bint next_channel               # whose coefficients follow; else they have the same
    bint twice                      # these are there again behind a row, as is x
    bint streamed                   # y, whose rows join, goes to memory
    Py_ssize_t ahead                # bytes from x to what is asked for meanwhile; 0: nothing


cdef inline inlined normalize_strip(
    const float *x, const float *residual, apart y, Py_ssize_t rows, const Steps *step,
    const float *center, const float *scale, const float *shift, int kind, const Activation *activation, bint in_place,
) noexcept nogil:
    """Coefficients of so few columns stay in registers: 0.65 to 0.9 of the time."""
    cdef Py_ssize_t _row
    for _row in range(rows):
        normalize_row(x, 1, residual, y, FOUR_LINES, center, scale, shift, 1, kind, activation, in_place)
        x = <const float *> (<const char *> x + step.x)
        y = <apart> (<char *> y + step.out)
        if residual != NULL:
            residual = <const float *> (<const char *> residual + step.residual)


cdef inline inlined normalize_rows_of(
    const float *x, int stride, const float *residual, apart y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift,
    int step, int kind, const Activation *activation, bint in_place,
) noexcept nogil:
    cdef Py_ssize_t some, column
    if step == 1 and stride == 1 and (kind <= CLIP or kind == BN_AT_LEAST) and rows.columns % FOUR_LINES == 0 \
            and (rows.columns == FOUR_LINES or (residual == NULL and 8 * rows.columns <= TOGETHER and n <= NEAR)):
        while n >= rows.columns:
            some = n // rows.columns
            if rows.columns > FOUR_LINES:
                some = min(some, TOGETHER // rows.columns)
            column = 0
            while column < rows.columns:
                normalize_strip(
                    x + column, residual + column if residual != NULL else NULL, y + column, some, &rows.step,
                    center + column, scale + column, shift + column, kind, activation, in_place)
                column += FOUR_LINES
            n -= some * rows.columns
            x = <const float *> (<const char *> x + some * rows.step.x)
            y = <apart> (<char *> y + some * rows.step.out)
            if residual != NULL:
                residual = <const float *> (<const char *> residual + some * rows.step.residual)
    while n > 0:
        some = min(n, rows.columns)
        normalize_row(x, stride, residual, y, some, center, scale, shift, step, kind, activation, in_place)
        n -= some
        x = <const float *> (<const char *> x + rows.step.x)
        y = <apart> (<char *> y + rows.step.out)
        if residual != NULL:
            residual = <const float *> (<const char *> residual + rows.step.residual)
        center += rows.next_channel
        scale += rows.next_channel
        shift += rows.next_channel


cdef inline Activation bounds_of(const Activation *activation) noexcept nogil:
    """None are infinite: one loop for two activations."""
    cdef Activation bounds = activation[0]
    if activation.kind != CLIP:
        bounds.low = -INFINITY
        bounds.high = INFINITY
    return bounds


cdef inline inlined normalize_activated(
    const float *x, int stride, const float *residual, apart y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift,
    int step, int kind, const Activation *bounds, bint in_place,
) noexcept nogil:
    if residual == NULL and kind == BN_NOTHING:     # the literal leaves out loops
        normalize_rows_of(x, stride, residual, y, n, rows, center, scale, shift, step, IDENTITY, bounds, in_place)
    elif BN_NARROW and stride == 1 and (kind == BN_AT_LEAST or kind == IDENTITY):
        normalize_rows_of(x, stride, residual, y, n, rows, center, scale, shift, step, BN_AT_LEAST, bounds, in_place)
    elif kind == LEAKY_RELU and stride == 1:
        normalize_rows_of(x, stride, residual, y, n, rows, center, scale, shift, step, LEAKY_RELU, bounds, in_place)
    elif kind == HARD_SWISH and stride == 1:
        normalize_rows_of(x, stride, residual, y, n, rows, center, scale, shift, step, HARD_SWISH, bounds, in_place)
    else:
        normalize_rows_of(x, stride, residual, y, n, rows, center, scale, shift, step, CLIP, bounds, in_place)


cdef once activate_lines(float *y, const Activation *activation) noexcept nogil:
    cdef Py_ssize_t i
    if activation.kind == LEAKY_RELU:
        for i in range(TWO_LINES):
            y[i] = activated(y[i], LEAKY_RELU, 0, 0, activation.slope)
    else:
        for i in range(TWO_LINES):
            y[i] = activated(y[i], HARD_SWISH, 0, 0, 0)


cdef struct Pair:
    # Two lines.
    const float *x
    const float *residual
    const float *center
    const float *scale
    const float *shift


cdef struct Seam:
    # Two lines before and two behind where a row ends.
    float[FOUR_LINES] x
    float[FOUR_LINES] residual
    float[FOUR_LINES] center
    float[FOUR_LINES] scale
    float[FOUR_LINES] shift


cdef inline void join(float *seam, const float *row, const float *next, Py_ssize_t columns) noexcept nogil:
    memcpy(seam, row + columns - TWO_LINES, TWO_LINES * sizeof(float))
    memcpy(seam + TWO_LINES, next, TWO_LINES * sizeof(float))


cdef inline void change(float *values, int at, float before, float behind) noexcept nogil:
    cdef int i
    for i in range(TWO_LINES):
        values[i] = before if i < at else behind


cdef inline Pair pair_of(
    Seam *seam, const float *x, int stride, const float *residual, const Rows *rows, Py_ssize_t behind,
    const float *center, const float *scale, const float *shift, int step,
) noexcept nogil:
    """The one of which so many elements are of the next row. If `step`, the seam has the coefficients."""
    cdef Pair pair
    cdef const float *next = <const float *> (<const char *> x + rows.step.x)
    pair.x = x + (rows.columns - TWO_LINES + behind) * stride
    if stride == 1 and next != x + rows.columns:
        join(seam.x, x, next, rows.columns)
        pair.x = seam.x + behind
    if residual != NULL:
        next = <const float *> (<const char *> residual + rows.step.residual)
        join(seam.residual, residual, next, rows.columns)
        pair.residual = seam.residual + behind
    pair.center = seam.center
    pair.scale = seam.scale
    pair.shift = seam.shift
    if step:
        pair.center += behind
        pair.scale += behind
        pair.shift += behind
    else:
        change(seam.center, TWO_LINES - behind, center[0], center[rows.next_channel])
        change(seam.scale, TWO_LINES - behind, scale[0], scale[rows.next_channel])
        change(seam.shift, TWO_LINES - behind, shift[0], shift[rows.next_channel])
    return pair


cdef inline inlined stream_pairs(
    const float *x, int stride, const float *residual, float *y, Py_ssize_t n, const Rows *rows, Py_ssize_t column,
    const float *center, const float *scale, const float *shift, int step, const Activation *activation,
) noexcept nogil:
    """Pairs of lines, from some column of a row on: two lines from memory, two to memory, and so on. 32 at a time, through
    a buffer, took twice as long (Zen 1). Of one line GCC would not make vectors, and loops for each activation would make
    wheels too large."""
    cdef float[TWO_LINES] lines
    cdef Seam seam
    cdef Pair pair
    cdef Activation bounds = bounds_of(activation)
    cdef Py_ssize_t _pair
    if step and not rows.twice and n > rows.columns - column:
        join(seam.center, center, center, rows.columns)
        join(seam.scale, scale, scale, rows.columns)
        join(seam.shift, shift, shift, rows.columns)
    for _pair in range(n // TWO_LINES):
        pair.x = x + column * stride
        pair.residual = residual + column if residual != NULL else NULL
        if rows.ahead != 0:
            bn_prefetch(<const char *> pair.x + rows.ahead, stride * sizeof(lines))
        if step or column + TWO_LINES > rows.columns:
            pair.center = center + column
            pair.scale = scale + column
            pair.shift = shift + column
            if column + TWO_LINES > rows.columns and not rows.twice:
                pair = pair_of(&seam, x, stride, residual, rows, column + TWO_LINES - rows.columns, center, scale, shift, step)
            normalize_row(
                pair.x, stride, pair.residual if residual != NULL else NULL, lines, TWO_LINES,
                pair.center, pair.scale, pair.shift, 1, CLIP, &bounds, False)
        else:
            normalize_row(
                pair.x, stride, pair.residual if residual != NULL else NULL, lines, TWO_LINES,
                center, scale, shift, 0, CLIP, &bounds, False)
        if activation.kind > CLIP:
            activate_lines(lines, activation)
        bn_stream_lines(<char *> y, <const char *> lines, 2)
        y += TWO_LINES
        column += TWO_LINES
        if column >= rows.columns:
            column -= rows.columns
            x = <const float *> (<const char *> x + rows.step.x)
            if residual != NULL:
                residual = <const float *> (<const char *> residual + rows.step.residual)
            center += rows.next_channel
            scale += rows.next_channel
            shift += rows.next_channel


cdef void stream_lines(
    const float *x, const float *residual, float *y, Py_ssize_t n, const Rows *rows, Py_ssize_t column,
    const float *center, const float *scale, const float *shift, int step, const Activation *activation,
) noexcept nogil:
    if rows.stride == 2:
        stream_pairs(x, 2, NULL, y, n, rows, column, center, scale, shift, step, activation)
    elif residual != NULL:
        stream_pairs(x, 1, residual, y, n, rows, column, center, scale, shift, step, activation)
    else:
        stream_pairs(x, 1, NULL, y, n, rows, column, center, scale, shift, step, activation)


cdef inline inlined normalize_located(
    const float *x, const float *residual, apart y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift, int step, int kind, const Activation *bounds,
) noexcept nogil:
    if rows.stride == 2:
        normalize_activated(x, 2, NULL, y, n, rows, center, scale, shift, step, kind, bounds, False)
    elif residual != NULL:
        if x == y:
            normalize_activated(x, 1, residual, y, n, rows, center, scale, shift, step, kind, bounds, True)
        else:
            normalize_activated(x, 1, residual, y, n, rows, center, scale, shift, step, kind, bounds, False)
    elif x == y:
        normalize_activated(x, 1, NULL, y, n, rows, center, scale, shift, step, kind, bounds, True)
    else:
        normalize_activated(x, 1, NULL, y, n, rows, center, scale, shift, step, kind, bounds, False)


cdef void normalize_channels(
    const float *x, const float *residual, apart y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift, int kind, const Activation *bounds,
) noexcept nogil:
    normalize_located(x, residual, y, n, rows, center, scale, shift, 1, kind, bounds)


cdef void normalize_channel(
    const float *x, const float *residual, apart y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift, int kind, const Activation *bounds,
) noexcept nogil:
    normalize_located(x, residual, y, n, rows, center, scale, shift, 0, kind, bounds)


cdef void normalize_loops(
    const float *x, const float *residual, float *y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift, int step, const Activation *activation,
) noexcept nogil:
    cdef Activation bounds = bounds_of(activation)
    cdef int kind = bn_kind_of(activation, residual)
    if step:
        normalize_channels(x, residual, y, n, rows, center, scale, shift, kind, &bounds)
    else:
        normalize_channel(x, residual, y, n, rows, center, scale, shift, kind, &bounds)


cdef void stream_floats(
    const float *x, const float *residual, float *y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift, int step, const Activation *activation,
) noexcept nogil:
    """Pairs of lines; what is before and behind them, in parts of rows, normally."""
    cdef Py_ssize_t before = min(n, -<size_t> y % 64 // 4), pairs = (n - before) // TWO_LINES * TWO_LINES
    cdef Py_ssize_t i = 0, row, column, some, k
    cdef const float *x_row
    cdef const float *residual_row = NULL
    while i < n:
        row = i // rows.columns
        column = i - row * rows.columns
        k = row * rows.next_channel
        x_row = <const float *> (<const char *> x + row * rows.step.x)
        if residual != NULL:
            residual_row = <const float *> (<const char *> residual + row * rows.step.residual)
        if i == before and pairs > 0:
            some = pairs
            stream_lines(
                x_row, residual_row, y + i, pairs, rows, column, center + k, scale + k, shift + k, step, activation)
        else:
            some = min(rows.columns - column, (before if i < before else n) - i)
            k += column * step
            normalize_loops(
                x_row + column * rows.stride, residual_row + column if residual != NULL else NULL, y + i, some, rows,
                center + k, scale + k, shift + k, step, activation)
        i += some


cdef void normalize_floats(
    const float *x, const float *residual, float *y, Py_ssize_t n, const Rows *rows,
    const float *center, const float *scale, const float *shift, int step, const Activation *activation,
) noexcept nogil:
    """n elements, in rows of which the last may be shorter."""
    if BN_STREAMS and rows.streamed:
        stream_floats(x, residual, y, n, rows, center, scale, shift, step, activation)
    else:
        normalize_loops(x, residual, y, n, rows, center, scale, shift, step, activation)


cdef struct Place:
    # Where in its arrays a job is.
    const char *x
    const char *residual            # NULL: absent
    char *out


cdef Py_ssize_t normalize_halves(
    bn_row_of_halves first, Py_ssize_t rows, Py_ssize_t columns, int step, bint next_channel, bint stream,
) noexcept nogil:
    """Halves to halves where the CPU converts; returns how many elements were done."""
    if step:
        return bn_normalize_halves(first, rows, columns, 1, next_channel, stream)
    return bn_normalize_halves(first, rows, columns, 0, next_channel, stream)


cdef inline void move(Place *at, const Steps *step, Py_ssize_t n) noexcept nogil:
    at.x += n * step.x
    at.out += n * step.out
    if at.residual != NULL:
        at.residual += n * step.residual


cdef inline Py_ssize_t outer_offset(
    int ndim, const Py_ssize_t *shape, const Py_ssize_t *strides, Py_ssize_t position,
) noexcept nogil:
    cdef Py_ssize_t offset = 0
    cdef int d
    for d in range(ndim - 1, 0, -1):
        offset += position % shape[d] * strides[d]
        position //= shape[d]
    return offset + position * strides[0]


cdef Py_ssize_t offset_in(const Job *job, const Operand *operand, Py_ssize_t position) noexcept nogil:
    return outer_offset(job.outer_ndim, &job.outer_shape[0], &operand.outer[0], position)


cdef Place outer_place(const Job *job, Py_ssize_t position) noexcept nogil:
    cdef Place at
    at.x = job.x.data + offset_in(job, &job.x, position)
    at.out = job.out.data + offset_in(job, &job.out, position)
    at.residual = NULL
    if job.residual.data != NULL:
        at.residual = job.residual.data + offset_in(job, &job.residual, position)
    return at


cdef struct Loop:
    # Which arrays it runs over as they are, the others being in buffers; and its rows.
    bint x
    bint residual
    bint out
    Rows rows


cdef struct Walk:
    # How the elements of a job follow each other.
    int step                        # 1: an element after the other is of the next channel, 0: of the same
    Steps element
    Steps row
    bint halves
    bint ahead                      # x is asked for, what follows being read soon
    bint short_rows                 # those of y: a page at most
    bint whole_lines                # those of y
    bint joined                     # rows of y, and of x if its elements lie apart
    bint streamed                   # rows of y go to memory, from floats as they are
    Loop over_run                   # over elements of one row, or of several that are joined in all arrays
    Loop over_rows                  # over several rows


cdef inline Steps steps_of(Py_ssize_t x, Py_ssize_t residual, Py_ssize_t out) noexcept nogil:
    cdef Steps steps
    steps.x = x
    steps.residual = residual
    steps.out = out
    return steps


cdef inline Steps channel_steps(const Job *job) noexcept nogil:
    return steps_of(job.x.channel, job.residual.channel, job.out.channel)


cdef inline Steps inner_steps(const Job *job) noexcept nogil:
    return steps_of(job.x.inner, job.residual.inner, job.out.inner)


cdef Rows joined_rows(Py_ssize_t columns, int stride, bint next_channel) noexcept nogil:
    cdef Rows rows
    rows.columns = columns
    rows.stride = stride
    rows.step = steps_of(columns * 4 * stride, columns * 4, columns * 4)
    rows.next_channel = next_channel
    rows.twice = rows.streamed = False
    rows.ahead = 0
    return rows


cdef bint are_halves(const Job *job, const Steps *element) noexcept nogil:
    """Whether all are halves, one after the other, that the CPU converts, and none is computed in double."""
    return job.x.type == FLOAT16 and job.out.type == FLOAT16 and element.x == 2 and element.out == 2 \
        and (job.residual.data == NULL or (job.residual.type == FLOAT16 and element.residual == 2)) \
        and not job.coefficients.wide and BN_CONVERTS_HALVES


cdef Walk walk_of(
    const Job *job, int step, Steps element, Steps row, Py_ssize_t columns, Py_ssize_t period, bint next_channel,
) noexcept nogil:
    """Rows of that many columns, after each of which come the next channel's coefficients or the same ones.

    In a run these repeat after `period` elements.
    """
    cdef Walk walk
    cdef Loop run
    cdef Loop rows
    cdef int stride
    walk.step = step
    walk.element = element
    walk.row = row
    walk.ahead = job.far and element.x == size_of_type(job.x.type)
    walk.short_rows = columns * magnitude(element.out) <= 4 * PAGE
    walk.whole_lines = columns * element.out % FOUR_LINES == 0
    walk.halves = are_halves(job, &element)
    # Every second float is taken as it lies: through a buffer it is half as fast.
    stride = 2 if job.x.type == FLOAT32 and walk.element.x == 8 and columns >= FEW \
        and job.residual.data == NULL and job.activation.kind <= CLIP and not job.coefficients.wide else 1
    run.x = is_run(&job.x, walk.element.x // stride)
    # Loops take nothing but x for being y as well.
    run.residual = job.residual.data == NULL or (
        is_run(&job.residual, walk.element.residual) and job.residual.data != job.out.data)
    run.out = is_run(&job.out, walk.element.out)
    run.rows = joined_rows(period, stride, False)
    walk.joined = row.out == columns * element.out and (stride == 1 or row.x == columns * element.x)
    walk.streamed = job.stream and everywhere(job, &run) and columns >= (
        TWO_LINES if row.x == columns * element.x else STREAMED) \
        and (walk.joined or walk.whole_lines or not walk.short_rows)
    rows = run
    # What is neither a long row nor streamed as one goes through the caches: streaming parts of lines costs five times as
    # much, and short rows by way of a buffer took 1.2 x.
    rows.out = run.out and (not job.stream or walk.streamed or (walk.short_rows and columns >= FEW))
    if job.stream and run.out:
        run.rows = joined_rows(period * (1 + (TWO_LINES - 1) // period), stride, False)     # two lines at least
        run.rows.twice = run.rows.streamed = True
        run.rows.ahead = BN_NEAR if walk.ahead and run.x else 0
    rows.rows = joined_rows(columns if columns >= FEW or not step else period, stride, next_channel)
    if columns >= FEW:
        if rows.x:
            rows.rows.step.x = row.x
        if rows.residual:
            rows.rows.step.residual = row.residual
        if rows.out:
            rows.rows.step.out = row.out
    else:
        rows.x = rows.x and row.x == columns * 4
        rows.residual = rows.residual and (job.residual.data == NULL or row.residual == columns * 4)
        rows.out = rows.out and row.out == columns * 4
    if walk.streamed:
        rows.rows.streamed = True
        if walk.ahead:
            rows.rows.ahead = rows_ahead(row.x, 1) * row.x if lie_apart(row.x, columns * element.x) else BN_NEAR
    walk.over_run = run
    walk.over_rows = rows
    return walk


cdef bn_row_of_halves row_of_halves(
    const Job *job, const Walk *walk, const Place *at, const float *center, const float *scale, const float *shift,
) noexcept nogil:
    return bn_row_of_halves(
        x=<const uint16_t *> at.x, residual=<const uint16_t *> at.residual, y=<uint16_t *> at.out,
        x_row=walk.row.x, residual_row=walk.row.residual, y_row=walk.row.out,
        center=center, scale=scale, shift=shift,
        activation=job.activation, ahead=walk.ahead)


cdef bint everywhere(const Job *job, const Loop *loop) noexcept nogil:
    return loop.x and loop.residual and loop.out and not job.coefficients.wide


cdef inline inlined normalize_column(
    const float *x, Py_ssize_t stride, apart y, Py_ssize_t y_stride, Py_ssize_t n, const Coefficients *k, Py_ssize_t c,
) noexcept nogil:
    """The formula in double; strides in elements."""
    cdef double mean = k.mean[c], std = k.std[c], gamma = k.gamma[c], beta = k.beta[c]
    cdef Py_ssize_t i
    for i in range(n):
        y[i * y_stride] = <float> (gamma * ((<double> x[i * stride] - mean) / std) + beta)


cdef inline bint is_wide(const Coefficients *k, Py_ssize_t channel) noexcept nogil:
    """Whether it is computed in double."""
    return k.scale[channel] != k.scale[channel]


cdef once normalize_wide(
    const float *x, Py_ssize_t stride, apart y, Py_ssize_t rows, Py_ssize_t columns, const Coefficients *k,
    Py_ssize_t first, int step,
) noexcept nogil:
    """A row of one channel that is computed in double, or rows of channels of which some are. Without activation."""
    cdef Rows each = joined_rows(columns, 1, False)
    cdef Py_ssize_t c
    if step == 0:
        normalize_column(x, 1, y, 1, columns, k, first)
        return
    each.step.x = stride * 4
    normalize_loops(x, NULL, y, rows * columns, &each, k.center + first, k.scale + first, k.shift + first, 1, &NOTHING)
    for c in range(columns):
        if is_wide(k, first + c):
            normalize_column(x + c, stride, y + c, columns, rows, k, first + c)


cdef void normalize_chunk(
    const Job *job, const Walk *walk, const Loop *loop, Place at, Py_ssize_t rows, Py_ssize_t columns,
    const float *center, const float *scale, const float *shift, Py_ssize_t first,
) noexcept nogil:
    """rows x columns elements, CHUNK at most. Their channels begin at `first`."""
    cdef float[CHUNK + PAGE] storage
    cdef float[CHUNK + LINE] residual_storage
    cdef float[CHUNK] wide
    cdef Rows each = loop.rows
    cdef int step = walk.step
    cdef float *buffer = away_from(at.x, storage)
    cdef float *added = whole_lines(residual_storage)
    cdef const float *x = <const float *> at.x
    cdef const float *residual = <const float *> at.residual
    cdef float *y = <float *> at.out if loop.out else buffer
    if walk.ahead and loop.rows.ahead == 0 and (rows == 1 or walk.row.x == columns * walk.element.x):
        bn_prefetch(at.x + BN_NEAR, rows * columns * walk.element.x)
    if not loop.residual:
        load(job.residual.type, at.residual, walk.row.residual, walk.element.residual, added, rows, columns)
        residual = added
    if not loop.x:
        # To where y is if its rows join: out may be the residual, which is loaded by now.
        if not loop.rows.streamed and (rows == 1 or walk.row.out == columns * 4):
            buffer = y
        load(job.x.type, at.x, walk.row.x, walk.element.x, buffer, rows, columns)
        x = buffer
    if job.coefficients.wide:
        normalize_wide(
            x, walk.row.x // 4 if loop.x else columns, wide, rows, columns, &job.coefficients, first, walk.step)
        x = wide
        each.step.x = each.columns * 4
        center = &ZERO
        scale = &ONE
        shift = &NO_SHIFT
        step = 0
    normalize_floats(x, residual, y, rows * columns, &each, center, scale, shift, step, &job.activation)
    if not loop.out:
        store(job, y, at.out, walk.row.out, walk.element.out, rows, columns)


cdef void normalize_run(
    const Job *job, const Walk *walk, Place at, Py_ssize_t total,
    const float *center, const float *scale, const float *shift, Py_ssize_t period, Py_ssize_t first,
) noexcept nogil:
    """Elements one step from each other. Where their coefficients repeat, after `period`, they are there twice."""
    cdef Py_ssize_t most = period if walk.halves else min(<Py_ssize_t> CHUNK, period)
    cdef Py_ssize_t phase = 0, n = most, done
    if everywhere(job, &walk.over_run):
        normalize_floats(
            <const float *> at.x, <const float *> at.residual, <float *> at.out, total, &walk.over_run.rows,
            center, scale, shift, walk.step, &job.activation)
        return
    if job.stream and 0 < walk.element.out <= 4:
        # All chunks but the last end where a cache line of out does.
        if most > 2 * LINE:
            most = most // (2 * LINE) * (2 * LINE)
        n = most
        if <size_t> at.out % 64 > 0:
            n = min(most, <Py_ssize_t> ((64 - <size_t> at.out % 64) // <size_t> walk.element.out))
    while total > 0:
        if walk.halves and walk.step and n == most and not job.stream:
            # After whole rows the phase is the same.
            done = bn_normalize_rows_of_halves(
                row_of_halves(job, walk, &at, center + phase, scale + phase, shift + phase), total,
                walk.over_run.rows.columns)
            move(&at, &walk.element, done)
            total -= done
        n = min(n, total)
        done = 0
        if walk.halves:
            done = normalize_halves(
                row_of_halves(job, walk, &at, center + phase, scale + phase, shift + phase), 1, n, walk.step, False,
                job.stream)
            move(&at, &walk.element, done)
            phase += done * walk.step
        if done < n:
            normalize_chunk(
                job, walk, &walk.over_run, at, 1, n - done, center + phase, scale + phase, shift + phase, first + phase)
            move(&at, &walk.element, n - done)
            phase += (n - done) * walk.step
        if phase >= period:
            phase -= period
        total -= n
        n = most


cdef void stream_rows_of_halves(
    const Job *job, const Walk *walk, Place at, Py_ssize_t total, Py_ssize_t columns,
    const float *center, const float *scale, const float *shift,
) noexcept nogil:
    """Joined rows of whole vectors: four at a time from where a line of y begins, what is before and behind piece by piece."""
    cdef Py_ssize_t phase = 0, before = -<size_t> at.out % 64 // 2, n, done
    while total > 0:
        if before == 0:
            done = bn_stream_rows_of_halves(
                row_of_halves(job, walk, &at, center, scale, shift), total, columns, phase)
            move(&at, &walk.element, done)
            total -= done
        n = min(total, columns - phase)
        if before > 0:
            n = min(n, before)
            before -= n
        done = normalize_halves(
            row_of_halves(job, walk, &at, center + phase, scale + phase, shift + phase), 1, n, 1, False, True)
        if done < n:
            normalize_chunk(job, walk, &walk.over_run, at, 1, n, center + phase, scale + phase, shift + phase, 0)
        move(&at, &walk.element, n)
        total -= n
        phase = (phase + n) % columns


cdef void normalize_table(
    const Job *job, const Walk *walk, Place at, Py_ssize_t rows, Py_ssize_t columns,
    const float *center, const float *scale, const float *shift, Py_ssize_t first,
) noexcept nogil:
    """Rows one step from each other."""
    cdef bint all_floats = everywhere(job, &walk.over_rows)
    cdef bint all_halves = walk.halves and columns >= FEW and (walk.short_rows or walk.whole_lines or not job.stream)
    cdef bint one_by_one = (job.coefficients.wide and not walk.step) or columns > CHUNK // 2
    cdef bint together = all_halves or (all_floats and (walk.joined or not walk.streamed))
    cdef bint apart = job.far and walk.short_rows and not walk.streamed and 0 < walk.element.x <= 8 \
        and lie_apart(walk.row.x, columns * walk.element.x)
    cdef Py_ssize_t some = rows if together and not apart else 1 if one_by_one or walk.streamed else CHUNK // columns
    cdef Py_ssize_t ahead = rows_ahead(walk.row.x, some)
    while rows > 0:
        some = min(some, rows)
        if apart:
            prefetch_rows(at.x + ahead * walk.row.x, walk.row.x, columns * walk.element.x, min(some, rows - ahead))
        if all_floats:
            normalize_floats(
                <const float *> at.x, <const float *> at.residual, <float *> at.out, some * columns, &walk.over_rows.rows,
                center, scale, shift, walk.step, &job.activation)
        elif all_halves:
            normalize_halves(
                row_of_halves(job, walk, &at, center, scale, shift), some, columns, walk.step,
                walk.over_rows.rows.next_channel, job.stream and walk.whole_lines)
        elif one_by_one:
            normalize_run(job, walk, at, columns, center, scale, shift, columns, first)
        else:
            normalize_chunk(job, walk, &walk.over_rows, at, some, columns, center, scale, shift, first)
        move(&at, &walk.row, some)
        if walk.over_rows.rows.next_channel:
            center += some
            scale += some
            shift += some
            first += some
        rows -= some


cdef inline bint planes_join(const Operand *operand, Py_ssize_t inner) noexcept nogil:
    return operand.data == NULL or operand.channel == inner * operand.inner


cdef inline bint rows_join(const Steps *element, const Steps *row, Py_ssize_t columns) noexcept nogil:
    """Whether each row begins where the one before ends."""
    return row.x == columns * element.x and row.residual == columns * element.residual and row.out == columns * element.out


cdef Py_ssize_t rows_of_lines(Py_ssize_t columns) noexcept nogil:
    """How many short rows make whole cache lines, four at least; 1 if they are too many for a pattern."""
    cdef Py_ssize_t rows = FOUR_LINES
    while rows > 1 and columns * (rows // 2) % FOUR_LINES == 0:
        rows //= 2
    return rows if rows * columns <= PATTERN else 1


cdef void normalize_rows(const Job *job, Py_ssize_t first, Py_ssize_t channels, Py_ssize_t times) noexcept nogil:
    """Rows of these channels, with so many elements of each.

    The coefficients of many short rows are repeated, for loops that are longer than one row. Halves do not need it
    where their rows do not make whole lines: then less of L1 counts for more.
    """
    cdef float[6 * PATTERN + LINE] storage
    cdef float *pattern = whole_lines(storage)
    cdef const Coefficients *k = &job.coefficients
    cdef const float *center = k.center
    cdef const float *scale = k.scale
    cdef const float *shift = k.shift
    cdef Steps element = channel_steps(job), row = inner_steps(job)
    cdef Py_ssize_t columns = channels * times, few = rows_of_lines(columns), needed, i
    cdef Py_ssize_t period = PATTERN // (few * columns) * few * columns
    cdef bint joined = rows_join(&element, &row, columns)
    cdef bint long_enough = are_halves(job, &element) and columns >= FOUR_LINES and few * columns % FOUR_LINES > 0
    cdef bint repeated = period > columns and job.inner >= 4 and job.outer * job.inner >= MANY and not k.wide and (
        columns < FEW or (joined and not long_enough))
    cdef Py_ssize_t width = few * columns if repeated else columns
    cdef Walk walk = walk_of(job, 1, element, row, columns, width, False)
    cdef Place at
    if repeated or times > 1:
        needed = min(2 * period, job.inner * columns) if repeated else columns
        repeat(center + first, channels, times, pattern, needed)
        repeat(scale + first, channels, times, pattern + 2 * PATTERN, needed)
        repeat(shift + first, channels, times, pattern + 4 * PATTERN, needed)
        center = pattern
        scale = pattern + 2 * PATTERN
        shift = pattern + 4 * PATTERN
    for i in range(job.outer):
        at = outer_place(job, i)
        move(&at, &element, first * times)
        if BN_STREAMS and job.stream and walk.halves and joined and width <= PAGE and width % LANES == 0 \
                and <size_t> at.out % 16 == 0:
            stream_rows_of_halves(job, &walk, at, job.inner * columns, width, center, scale, shift)
        elif repeated and joined:
            normalize_run(job, &walk, at, job.inner * columns, center, scale, shift, period, 0)
        else:
            normalize_table(job, &walk, at, job.inner, columns, center, scale, shift, 0)


cdef void turn(Operand *operand, int last) noexcept nogil:
    operand.channel = operand.inner
    operand.inner = operand.outer[last]


cdef void normalize_short_planes(const Job *job) noexcept nogil:
    """Planes that follow each other: as many as a pattern holds are a row, like channels that are last."""
    cdef Job turned = job[0]
    cdef int last = job.outer_ndim - 1
    cdef Py_ssize_t most = 2 * PATTERN // job.inner, first = 0
    if most > 2 * LINE:
        most = most // (2 * LINE) * (2 * LINE)
    elif most > LINE:
        most = LINE                     # whole vectors of halves
    turned.outer_ndim = last
    turned.inner = job.outer_shape[last]
    turned.outer = job.outer // turned.inner
    turn(&turned.x, last)
    turn(&turned.residual, last)
    turn(&turned.out, last)
    while first < job.channels:
        normalize_rows(&turned, first, min(most, job.channels - first), job.inner)
        first += most


cdef void normalize_planes(const Job *job) noexcept nogil:
    """In the order of x in memory: outer loops of shorter strides than the channels' run inside these."""
    cdef const Coefficients *k = &job.coefficients
    cdef Steps channel = channel_steps(job)
    cdef int last = job.outer_ndim - 1
    cdef Py_ssize_t inside = outer_in_plane(job), run, position = 0, c, i
    cdef Walk walk
    cdef Place at
    if inside == 1:
        walk = walk_of(job, 0, inner_steps(job), channel, job.inner, job.inner, True)
        for position in range(job.outer):
            if everywhere(job, &walk.over_rows) and not walk.streamed and position + 1 < job.outer:
                at = outer_place(job, position + 1)
                bn_prefetch_to_write(at.out, BN_BEGINNING)
                if at.residual != NULL:
                    bn_prefetch(at.residual, BN_BEGINNING)
            normalize_table(
                job, &walk, outer_place(job, position), job.channels, job.inner, k.center, k.scale, k.shift, 0)
        return
    run = job.outer_shape[last]
    walk = walk_of(
        job, 0, inner_steps(job), steps_of(job.x.outer[last], job.residual.outer[last], job.out.outer[last]),
        job.inner, job.inner, False)
    while position < job.outer:
        for c in range(job.channels):
            i = 0
            while i < inside:
                at = outer_place(job, position + i)
                move(&at, &channel, c)
                normalize_table(job, &walk, at, run, job.inner, k.center + c, k.scale + c, k.shift + c, c)
                i += run
        position += inside


cdef inline Py_ssize_t short_plane(const Job *job) noexcept nogil:
    """The elements from which on a plane is a row of its own. Rows of halves are slower to begin, and in caches to end
    within a vector: 7 x 7 planes of 8 images and more take 0.8 to 0.95 of the time as parts of rows."""
    if job.x.type != FLOAT16:
        return FEW
    return 4 * FEW if job.inner % LANES != 0 and job.outer >= 8 and not job.far and not job.stream else 2 * FEW


cdef void normalize_alike(const Job *job) noexcept nogil:
    """Rows, or planes of channels that are all computed in double, or none of them."""
    cdef bint joined = planes_join(&job.x, job.inner) and planes_join(&job.out, job.inner) \
        and planes_join(&job.residual, job.inner)
    if job.channels_last:
        normalize_rows(job, 0, job.channels, 1)
    elif joined and job.inner < short_plane(job) and job.outer >= 4 and not job.coefficients.wide:
        normalize_short_planes(job)
    else:
        normalize_planes(job)


cdef void normalize(const Job *job) noexcept nogil:
    """Where a channel is computed in double, planes that are so apart from others, rows in strips that have such or not."""
    cdef Job part
    cdef Py_ssize_t start = 0, stop
    cdef bint wide
    if not job.coefficients.wide:
        normalize_alike(job)
        start = job.channels
    while start < job.channels:
        wide = is_wide(&job.coefficients, start)
        stop = start + 1
        while stop < job.channels and (stop % STRIP > 0 if job.channels_last else is_wide(&job.coefficients, stop) == wide):
            wide |= is_wide(&job.coefficients, stop)
            stop += 1
        part = job[0]
        take_channels(&part, start, stop)
        part.coefficients.wide = wide
        normalize_alike(&part)
        start = stop
    if job.stream:
        bn_stream_end()


# ---- moments ----------------------------------------------------------------------------------------

# Sums over the elements x of a column, about a center that is near their mean.
cdef struct Sums:
    double *deviations              # sum(x - center)
    double *squares                 # sum((x - center)^2)


# The centers, which are floats unless the sums are wide.
cdef union Centers:
    float *rounded
    double *exact


cdef struct Positions:
    # Where the loops over the elements of a channel lead in one array.
    const char *data
    Py_ssize_t channel              # from one to the next
    Py_ssize_t inner
    const Py_ssize_t *outer


cdef struct View:
    # x as a table: rows of columns, each of one channel, `width` of them side by side.
    # One step of the inner loop meets channels * width numbers; `per_row` steps make a row.
    int type
    Py_ssize_t channels
    bint separate                   # each of them is a table of its own
    Py_ssize_t width
    Py_ssize_t kept                 # sums of a channel that lie side by side; a wider one is added to them in strips
    Py_ssize_t per_row
    Py_ssize_t number               # stride from number to number
    Py_ssize_t inner
    Py_ssize_t outer
    int outer_ndim
    const Py_ssize_t *outer_shape
    bint far                        # as in a job
    Py_ssize_t behind               # bytes of a plane that another view adds later
    Positions x
    Positions mask                  # data NULL: every element counts


cdef inline inlined add_eight(
    const float *a, Py_ssize_t stride, Py_ssize_t columns, const float *center,
    double *deviations, double *squares, bint squared, float one,
) noexcept nogil:
    """Eight rows."""
    cdef const float *b = a + 4 * stride
    cdef Py_ssize_t c
    cdef float m, d0, d1, d2, d3, d4, d5, d6, d7
    for c in range(columns):
        m = center[c]
        d0 = bn_minus(a[c], m, one) if squared else a[c]
        d1 = bn_minus(a[c + stride], m, one) if squared else a[c + stride]
        d2 = bn_minus(a[c + 2 * stride], m, one) if squared else a[c + 2 * stride]
        d3 = bn_minus(a[c + 3 * stride], m, one) if squared else a[c + 3 * stride]
        d4 = bn_minus(b[c], m, one) if squared else b[c]
        d5 = bn_minus(b[c + stride], m, one) if squared else b[c + stride]
        d6 = bn_minus(b[c + 2 * stride], m, one) if squared else b[c + 2 * stride]
        d7 = bn_minus(b[c + 3 * stride], m, one) if squared else b[c + 3 * stride]
        deviations[c] += <double> (((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7)))
        if squared:
            squares[c] += <double> ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) \
                + <double> ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7))


cdef inline inlined add_block(
    const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, const float *center,
    Sums *sums, bint squared, Py_ssize_t ahead,
) noexcept nogil:
    cdef double *deviations = sums.deviations
    cdef double *squares = sums.squares
    cdef Py_ssize_t row, c, later
    cdef const float *a
    cdef const char *far
    cdef float d0, d1, one = BN_ONE
    for row in range(0, rows - 7, 8):
        a = x + row * stride
        c = 0
        if ahead == NEXT:
            bn_prefetch(<const char *> a + NEXT, NEXT)
        elif ahead != 0:
            # Little by little: asking for all of it at once took 1.4 x, and 2 x in rows (Zen 1).
            while c + LINE <= columns:
                far = <const char *> (a + c) + ahead
                for later in range(8):
                    bn_prefetch_far(far + later * stride * 4, 1)
                add_eight(a + c, stride, LINE, center + c, deviations + c, squares + c, squared, one)
                c += LINE
        add_eight(a + c, stride, columns - c, center + c, deviations + c, squares + c, squared, one)
    for row in range(rows & ~7, rows - 1, 2):
        a = x + row * stride
        for c in range(columns):
            d0 = a[c] - center[c]
            d1 = a[c + stride] - center[c]
            deviations[c] += <double> (d0 + d1)
            if squared:
                squares[c] += <double> (d0 * d0 + d1 * d1)
    if rows & 1:
        a = x + (rows - 1) * stride
        for c in range(columns):
            d0 = a[c] - center[c]
            deviations[c] += <double> d0
            if squared:
                squares[c] += <double> (d0 * d0)


cdef widest add_block_wide(
    const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, const double *center, Sums *sums,
) noexcept nogil:
    """The same in double."""
    cdef double *deviations = sums.deviations
    cdef double *squares = sums.squares
    cdef Py_ssize_t row, c
    cdef double d
    for row in range(rows):
        for c in range(columns):
            d = x[row * stride + c] - center[c]
            deviations[c] += d
            squares[c] += d * d


cdef widest add_squares(
    const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, const Centers *centers, Sums *sums,
    Py_ssize_t ahead,
) noexcept nogil:
    # A plane's columns are known. To cut wider rows into such strips is slower: memory wants whole lines in order.
    # On x86 memory alone is the limit for what comes from it, and a loop for that would make wheels too large.
    cdef bint far = ahead != 0 and ahead != NEXT
    if columns == COLUMNS and stride == COLUMNS and not (BN_STREAMS and far):
        add_block(x, COLUMNS, rows, COLUMNS, centers.rounded, sums, True, NEXT if BN_STREAMS and ahead != 0 else ahead)
    else:
        add_block(x, stride, rows, columns, centers.rounded, sums, True, ahead)


cdef once add(
    Sum kind, const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, const Centers *centers, Sums *sums,
    Py_ssize_t ahead,
) noexcept nogil:
    """Adds a block of any size; bits depend on its rows being added eight at a time, not on how it is cut.

    `ahead` is from what is added to what is asked for meanwhile, in bytes; 0: nothing.
    """
    if kind == WIDE:
        add_block_wide(x, stride, rows, columns, centers.exact, sums)
    elif kind == DEVIATIONS:
        add_block(x, stride, rows, columns, centers.rounded, sums, False, 0)
    elif BN_WIDER and columns == COLUMNS and stride == COLUMNS and ahead != 0 and ahead != NEXT:
        # From memory the widest registers are 1.05 to 1.15 x slower.
        add_block(x, COLUMNS, rows, COLUMNS, centers.rounded, sums, True, ahead)
    else:
        add_squares(x, stride, rows, columns, centers, sums, ahead)


cdef inline Sums sums_at(const Sums *sums, Py_ssize_t column) noexcept nogil:
    return Sums(sums.deviations + column, sums.squares + column)


cdef inline Centers centers_at(const Centers *centers, Sum kind, Py_ssize_t column) noexcept nogil:
    cdef Centers at
    if kind == WIDE:
        at.exact = centers.exact + column
    else:
        at.rounded = centers.rounded + column
    return at


cdef widest add_squares_of_strips(
    const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t channels, Py_ssize_t width, const float *center,
    const Sums *sums,
) noexcept nogil:
    """Eight rows of one channel after the other, so that memory is read in order."""
    cdef Py_ssize_t some, left, columns, c
    cdef const float *strip
    cdef const float *about
    cdef float one = BN_ONE
    cdef Sums at
    while rows > 0:
        some = min(<Py_ssize_t> 8, rows)
        strip = x
        for c in range(channels):
            about = center + c * COLUMNS
            at = sums_at(sums, c * COLUMNS)
            left = width
            while some == 8 and left >= COLUMNS:
                add_eight(strip, stride, COLUMNS, about, at.deviations, at.squares, True, one)
                strip += COLUMNS
                left -= COLUMNS
            if some == 8 and left == 4:                 # the end of 14 x 14
                add_eight(strip, stride, 4, about, at.deviations, at.squares, True, one)
                strip += 4
                left = 0
            while left > 0:
                columns = min(left, <Py_ssize_t> COLUMNS)
                add_block(strip, stride, some, columns, about, &at, True, 0)
                strip += columns
                left -= columns
        x += some * stride
        rows -= some


cdef void add_strips(
    Sum kind, const float *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t channels, Py_ssize_t width,
    const Centers *centers, const Sums *sums,
) noexcept nogil:
    """Rows of channels that are wider than their sums."""
    cdef Py_ssize_t c, left
    cdef Centers about
    cdef Sums at
    if kind == SQUARES:
        add_squares_of_strips(x, stride, rows, channels, width, centers.rounded, sums)
        return
    for c in range(channels):
        about = centers_at(centers, kind, c * COLUMNS)
        at = sums_at(sums, c * COLUMNS)
        left = width
        while left > 0:
            add(kind, x, stride, rows, min(<Py_ssize_t> COLUMNS, left), &about, &at, 0)
            x += min(<Py_ssize_t> COLUMNS, left)
            left -= COLUMNS


cdef once choose_centers(
    const double *mean, const float *values, Py_ssize_t channels, bint whole, double *center,
) noexcept nogil:
    """A float near each mean, which is that of a sample, whatever it was: some value of the channel and a step of five
    bits from it. (What a mask leaves out is none of its values; then the mean is.)

    So the deviations of data of few bits have few bits, and their squares and sums are exact. Those of integers always
    are, about a whole number.
    """
    cdef double halfway = <double> (<long long> 3 << 51)    # to it whole numbers are rounded
    cdef double splits = <double> (<long long> 1 << 48) + 1
    cdef double step, near
    cdef Py_ssize_t c
    for c in range(channels):
        step = mean[c] - values[c]
        near = step * splits
        step = near - (near - step)
        near = values[c] + step if fabs(step) <= 1e37 else mean[c]
        near = mean[c] + halfway - halfway if whole else near
        center[c] = <float> near if fabs(near) <= 1e37 else 0


cdef number_once found_all(
    const Sums *sums, double n, Py_ssize_t channels, const double *center, bint exact, double most, double *mean, double *m2,
) noexcept nogil:
    """The moments of the channels whose m2 is not known yet; whether all are now."""
    cdef Py_ssize_t c
    cdef double found, mean_found
    cdef bint unsafe = False, unknown
    for c in range(channels):
        found = m2_of(sums.deviations[c], sums.squares[c], n, center[c], exact, most, &mean_found)
        unknown = m2[c] != m2[c]
        mean[c] = mean_found if unknown else mean[c]
        m2[c] = found if unknown else m2[c]
    for c in range(channels):
        unsafe |= m2[c] != m2[c]
    return not unsafe


cdef bint may_be_found(const Sums *sums, Py_ssize_t channels, const double *m2) noexcept nogil:
    """Whether other centers may tell more of what is unknown. Of zeros, and what is nearly 0, none does; of infinities
    and NaN none."""
    cdef Py_ssize_t c
    cdef bint may = False
    for c in range(channels):
        may |= (m2[c] != m2[c]) & (0 < sums.squares[c] < INFINITY)
    return may


cdef void begin(const View *view, Sum kind, const double *center, Centers *centers, Sums *sums) noexcept nogil:
    """Each channel's center to all of its columns, whose sums are 0."""
    cdef Py_ssize_t columns = view.channels * view.kept * (1 if view.separate else view.per_row)
    memset(sums.deviations, 0, columns * sizeof(double))
    if kind != DEVIATIONS:
        memset(sums.squares, 0, columns * sizeof(double))
    if kind == WIDE:
        repeat(center, view.channels, view.kept, centers.exact, columns)
    else:
        repeat(center, view.channels, view.kept, centers.rounded, columns)


cdef double total(const double *values, Py_ssize_t n) noexcept nogil:
    """Their sum, in LANES parts, so that it does not wait for every single addition."""
    cdef double[LANES] sums
    cdef Py_ssize_t i, lane
    for lane in range(LANES):
        sums[lane] = 0
    for i in range(n // LANES):
        for lane in range(LANES):
            sums[lane] += values[i * LANES + lane]
    for i in range(n // LANES * LANES, n):
        sums[0] += values[i]
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))


cdef void end(const View *view, double *sums) noexcept nogil:
    """The sums of all columns of a channel at its index."""
    cdef Py_ssize_t n = 1 if view.separate else view.per_row, numbers = view.channels * view.kept, c, i
    while n > 1:                                    # a power of two
        n //= 2
        for i in range(n * numbers):
            sums[i] += sums[n * numbers + i]
    for c in range(view.channels if view.kept > 1 else 0):
        sums[c] = total(sums + c * view.kept, view.kept)


cdef Py_ssize_t place(const View *view, const Positions *array, Py_ssize_t position) noexcept nogil:
    return outer_offset(view.outer_ndim, view.outer_shape, array.outer, position)


cdef inline Py_ssize_t numbers_of(const View *view) noexcept nogil:
    """Those that a step meets in a table."""
    return view.width if view.separate else view.channels * view.width


cdef inline bint in_strips(const View *view) noexcept nogil:
    return view.width > view.kept


cdef inline bint is_direct(const View *view) noexcept nogil:
    """Whether rows are added as they lie, and those of a position together: runs of a plane are, and eights of rows."""
    cdef Py_ssize_t size = size_of_type(view.type)
    return is_float(view.type) and view.number == size and view.mask.data == NULL \
        and (view.per_row == 1 or view.x.inner == numbers_of(view) * size) \
        and (view.outer == 1 or view.inner >= 8 * view.per_row or (view.separate and view.per_row == 1))


cdef once add_steps(
    const View *view, Sum kind, const float *x, Py_ssize_t stride, Py_ssize_t steps, const Centers *centers, Sums *sums,
    Py_ssize_t ahead,
) noexcept nogil:
    """Steps that follow each other: whole rows, at that stride, then what is left of one."""
    cdef Py_ssize_t numbers = numbers_of(view), rows
    if in_strips(view):
        add_strips(kind, x, stride, steps, 1 if view.separate else view.channels, view.width, centers, sums)
        return
    rows = steps // view.per_row
    if rows > 0:
        add(kind, x, stride, rows, numbers * view.per_row, centers, sums, ahead)
    if steps > rows * view.per_row:
        add(kind, x + rows * stride, 0, 1, (steps - rows * view.per_row) * numbers, centers, sums, 0)


cdef inline bint is_every_second(const View *view) noexcept nogil:
    """Whether long planes are every second of the floats that lie there."""
    return view.separate and view.per_row == COLUMNS and view.type == FLOAT32 and view.x.inner == 8 \
        and view.mask.data == NULL


cdef widest add_every_second(
    const float *x, Py_ssize_t eights, const float *center, double *deviations, double *squares,
) noexcept nogil:
    """Eight rows of a plane are added while the next eight are read: from caches, where it takes 0.8 to 0.95 of the time."""
    cdef float[PLANE + LINE] storage
    cdef float *rows = whole_lines(storage)
    cdef float one = BN_ONE
    cdef Py_ssize_t _eight
    for _eight in range(eights):
        load_row(x, 8, <apart> rows, PLANE)
        add_eight(rows, COLUMNS, COLUMNS, center, deviations, squares, True, one)
        x += 2 * PLANE


cdef number_once add_halves(
    const View *view, const uint16_t *x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns, const Centers *centers,
    Sums *sums, Py_ssize_t ahead,
) noexcept nogil:
    """Whole eights of rows, as they lie; returns how many rows these were."""
    cdef Py_ssize_t width = view.width if in_strips(view) else columns, kept = view.kept if in_strips(view) else columns
    if columns == COLUMNS and stride == COLUMNS:
        return bn_add_rows_of_halves(
            x, COLUMNS, rows, COLUMNS, centers.rounded, sums.deviations, sums.squares, COLUMNS, COLUMNS, ahead)
    return bn_add_rows_of_halves(
        x, stride, rows, columns, centers.rounded, sums.deviations, sums.squares, width, kept, ahead)


cdef Py_ssize_t ahead_of(const View *view, Py_ssize_t position) noexcept nogil:
    """From x at that position to what memory is to be asked for meanwhile.

    That is the same place of a later plane, or of this one if it is long. What caches hold is worth asking for in a
    plane only, eight rows before it is read; long ones with gaps never are: CPUs see them coming.
    """
    cdef Py_ssize_t numbers = numbers_of(view), plane = view.inner * view.x.inner, later
    if view.x.inner != numbers * view.number or (view.number != size_of_type(view.type) and plane >= BN_FAR):
        return 0
    if not view.far:
        return NEXT if numbers * view.per_row == COLUMNS else 0
    later = position + 1 + BN_FAR // max(plane, <Py_ssize_t> 1)
    if plane < 4 * BN_FAR and later < view.outer:
        return place(view, &view.x, later) - place(view, &view.x, position)
    return BN_FAR


cdef Py_ssize_t leading(const char *mask, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """How many steps count, if all others are behind them, as those of a padded sequence are; -1 if they are not."""
    cdef const char *zero
    cdef Py_ssize_t first = 0, step
    if stride == 0:
        return n if mask[0] else 0
    if stride == 1:
        zero = <const char *> memchr(mask, 0, n)
        first = n if zero == NULL else zero - mask
        return first if first == n or memcmp(zero, zero + 1, n - first - 1) == 0 else -1
    while first < n and mask[first * stride]:
        first += 1
    for step in range(first, n):
        if mask[step * stride]:
            return -1
    return first


cdef Py_ssize_t pack_rows(
    float *rows, const char *mask, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t columns,
) noexcept nogil:
    """Moves the rows that count together and returns how many they are."""
    cdef Py_ssize_t counted = 0, row, c
    for row in range(n):
        for c in range(columns):
            rows[counted * columns + c] = rows[row * columns + c]
        counted += mask[row * stride] != 0
    return counted


cdef Py_ssize_t blank_numbers(apart numbers, const char *mask, Py_ssize_t n, float center) noexcept nogil:
    cdef int blanked = 0
    cdef float number
    cdef Py_ssize_t i
    for i in range(n):
        number = numbers[i]             # read in any case: without branches the loop is vectorised
        blanked += mask[i] == 0
        numbers[i] = center if mask[i] == 0 else number
    return blanked


cdef Py_ssize_t blank_rows(
    float *rows, const char *mask, Py_ssize_t stride, Py_ssize_t n, Py_ssize_t columns, const float *center,
) noexcept nogil:
    """Puts the centers, which add nothing, in the place of rows that do not count, and returns how many these are."""
    cdef Py_ssize_t blanked = 0, row
    if columns == 1 and stride == 1:
        return blank_numbers(rows, mask, n, center[0])
    for row in range(n):
        if mask[row * stride] == 0:
            memcpy(rows + row * columns, center, columns * sizeof(float))
            blanked += 1
    return blanked


cdef number_once add_view(const View *view, Sum kind, const Centers *centers, const Sums *sums) noexcept nogil:
    """Adds what a view shows of each channel, and returns how many elements these are."""
    cdef float[BLOCK + LINE] storage
    cdef float *buffer = whole_lines(storage)
    cdef Py_ssize_t numbers = numbers_of(view), columns = numbers * view.per_row
    cdef Py_ssize_t row_stride = view.per_row * view.x.inner, tables = view.channels if view.separate else 1
    cdef bint direct = is_direct(view)
    # Of planes eight rows are read at once, and then the next plane's: no gap is too small.
    cdef bint apart = view.far and 0 < view.number <= 8 and view.x.inner != numbers * view.number \
        and (view.width > 1 or lie_apart(view.x.inner, numbers * view.number))
    # Many long ones are asked for while those eight rows before them are added, others by themselves.
    cdef bint evenly = apart and direct and view.inner >= MANY and columns >= FOUR_LINES and not in_strips(view)
    # The eights of rows stay together.
    cdef Py_ssize_t most = max(<Py_ssize_t> 8, LOADED // columns // 8 * 8) * view.per_row
    cdef Py_ssize_t position, start, next, table, left, some, filled = 0, n = 0, rows, ahead, far
    cdef Py_ssize_t left_out = 0
    cdef Py_ssize_t later = rows_ahead(view.x.inner, most)
    cdef const char *x
    cdef const char *mask = NULL
    cdef Centers about = centers[0]
    cdef Sums at = sums[0]
    apart = apart and not evenly
    for position in range(view.outer):
        start = place(view, &view.x, position)
        next = place(view, &view.x, position + 1) if direct and position + 1 < view.outer else start
        ahead = 8 * view.x.inner if evenly else ahead_of(view, position)
        far = ahead if view.far else 0
        for table in range(tables):
            x = view.x.data + start + table * view.x.channel
            left = view.inner
            about = centers_at(centers, kind, table * view.kept)
            at = sums_at(sums, table * view.kept)
            if next != start and apart:
                prefetch_rows(x + next - start, view.x.inner, numbers * view.number, min(left, later))
            elif next != start:
                bn_prefetch(x + next - start, BN_BEGINNING)
            if view.mask.data != NULL:
                mask = view.mask.data + place(view, &view.mask, position)
            if view.behind > 0 and view.far:
                bn_prefetch_far(x + (ahead if ahead != BN_FAR else 0) + left * view.x.inner, view.behind)
            while left > 0:
                some = left if direct and not apart else min(left, most - filled)
                if apart:
                    prefetch_rows(x + later * view.x.inner, view.x.inner, numbers * view.number, min(some, left - later))
                rows = 0
                if direct and view.type == FLOAT32:
                    add_steps(view, kind, <const float *> x, row_stride // 4, some, &about, &at, ahead)
                    rows = some
                elif direct and kind == SQUARES:
                    rows = view.per_row * add_halves(
                        view, <const uint16_t *> x, row_stride // 2, some // view.per_row, columns, &about, &at, far)
                elif kind == SQUARES and filled == 0 and left >= PLANE and not view.far and is_every_second(view):
                    rows = some = left // PLANE * PLANE
                    add_every_second(<const float *> x, left // PLANE, about.rounded, at.deviations, at.squares)
                n += rows
                x += rows * view.x.inner
                left -= rows
                some -= rows
                if some == 0:
                    continue
                some = min(some, most - filled)
                if far != 0:
                    bn_prefetch_far(x + far, some * view.x.inner)
                load(view.type, x, view.x.inner, view.number, buffer + filled * numbers, some, numbers)
                x += some * view.x.inner
                left -= some
                rows = some
                if mask != NULL:
                    rows = leading(mask, view.mask.inner, some)
                    if rows < 0 and kind == WIDE:
                        rows = pack_rows(buffer + filled * numbers, mask, view.mask.inner, some, numbers)
                    elif rows < 0:
                        rows = some
                        left_out += blank_rows(
                            buffer + filled * numbers, mask, view.mask.inner, some, numbers, about.rounded)
                    mask += some * view.mask.inner
                filled += rows
                if filled == most or (left == 0 and (direct or tables > 1)):
                    add_steps(view, kind, buffer, columns, filled, &about, &at, 0)
                    n += filled
                    filled = 0
    add_steps(view, kind, buffer, columns, filled, &about, &at, 0)
    return (n + filled - left_out) * view.width // tables


cdef Py_ssize_t add_all(const View *view, const View *rest, Sum kind, const double *center, Sums *sums) noexcept nogil:
    """The sums of each channel about its center, and how many elements of it there are."""
    cdef Centers centers
    cdef double[WIDEST + LINE] storage
    cdef Py_ssize_t n
    centers.exact = <double *> whole_lines(<float *> storage)
    begin(view, kind, center, &centers, sums)
    n = add_view(view, kind, &centers, sums)
    if rest != NULL:
        n += add_view(rest, kind, &centers, sums)
    end(view, sums.deviations)
    if kind != DEVIATIONS:
        end(view, sums.squares)
    return n


cdef inline Py_ssize_t thinned(Py_ssize_t length, Py_ssize_t most, Py_ssize_t *x, Py_ssize_t *mask) noexcept nogil:
    """The length of a loop with at most that many steps, which are longer then."""
    if length <= most:
        return length
    x[0] *= length // most
    mask[0] *= length // most
    return most


cdef struct Thinned:
    # The outer dimensions of a sample.
    Py_ssize_t[MAX_NDIM] shape
    Py_ssize_t[MAX_NDIM] x
    Py_ssize_t[MAX_NDIM] mask


cdef void thin_outer(View *sample, Thinned *outer) noexcept nogil:
    """Eight steps of each outer dimension at most, and not more than PLACES of all."""
    cdef int d
    if sample.outer_ndim == 0:
        return
    sample.outer = 1
    for d in range(sample.outer_ndim):
        outer.x[d] = sample.x.outer[d]
        outer.mask[d] = sample.mask.outer[d]
        outer.shape[d] = thinned(
            sample.outer_shape[d], min(<Py_ssize_t> 8, PLACES // sample.outer), &outer.x[d], &outer.mask[d])
        sample.outer *= outer.shape[d]
    sample.outer_shape = &outer.shape[0]
    sample.x.outer = &outer.x[0]
    sample.mask.outer = &outer.mask[0]


cdef View sample_of(const View *view, Thinned *outer) noexcept nogil:
    """Some elements of each channel, from all over it."""
    cdef View sample = view[0]
    cdef Py_ssize_t n = view.outer * view.inner * view.width
    cdef Py_ssize_t most = ROW_SAMPLE
    sample.far = False
    if n <= FEW_ROWS:
        return sample
    if view.channels > 1:
        most = min(most, max(<Py_ssize_t> FEW_ROWS, n // 2))
    thin_outer(&sample, outer)
    most = max(<Py_ssize_t> (8 if view.width > 1 else 1), most // view.width // sample.outer)
    sample.inner = thinned(view.inner, most, &sample.x.inner, &sample.mask.inner)
    if view.channels * view.width == 1:
        sample.number = sample.x.inner
    return sample


cdef View side_by_side(const View *planes, Py_ssize_t start) noexcept nogil:
    """Elements of planes from `start` on as columns, whose rows are the planes."""
    cdef View view = planes[0]
    cdef int last = planes.outer_ndim - 1
    view.separate = start > 0
    view.x.data += start * view.x.inner
    view.width = planes.inner - start
    view.kept = view.width if view.width < 2 * COLUMNS and start == 0 else COLUMNS
    view.inner = planes.outer_shape[last] if last >= 0 else 1
    view.x.inner = planes.x.outer[last] if last >= 0 else 0
    view.outer = planes.outer // view.inner
    view.outer_ndim = max(last, 0)
    return view


cdef View windows_of(const View *planes, Thinned *outer) noexcept nogil:
    """Runs of COLUMNS elements, eight of each channel or more, from all over its planes."""
    cdef View sample = side_by_side(planes, 0)
    cdef Py_ssize_t places = planes.inner - COLUMNS
    if sample.inner >= 4:
        sample.inner = thinned(sample.inner, 8, &sample.x.inner, &sample.mask.inner)
    else:
        sample = planes[0]
        sample.inner = 7 // planes.outer + 1
        sample.x.inner = 0
    if sample.inner > 1:
        sample.x.inner += places // (sample.inner - 1) * sample.number
    thin_outer(&sample, outer)
    sample.far = False
    sample.separate = True
    sample.width = sample.kept = COLUMNS
    sample.per_row = 1
    return sample


cdef Py_ssize_t view_moments(
    const View *view, const View *rest, const View *sample, Statistic statistic, double *mean, double *m2,
) noexcept nogil:
    cdef Sums sums
    cdef double[2 * WIDEST + LINE] storage
    cdef double[WIDEST] center
    cdef float[WIDEST] values
    cdef bint whole = not is_float(view.type), exact
    cdef Sum kind = WIDE if view.type == UINT16 or view.type == INT16 else SQUARES
    cdef double most
    cdef int attempt = 0
    cdef Py_ssize_t c, n
    sums.deviations = <double *> whole_lines(<float *> storage)
    sums.squares = sums.deviations + WIDEST
    if statistic == SUMS:
        memcpy(center, mean, view.channels * sizeof(double))
        n = add_all(view, rest, kind, center, &sums)
        memcpy(mean, sums.deviations, view.channels * sizeof(double))
        memcpy(m2, sums.squares, view.channels * sizeof(double))
        return n
    for c in range(view.channels):
        center[c] = 0
        m2[c] = NOT_A_NUMBER
    n = add_all(sample, NULL, DEVIATIONS, center, &sums)
    for c in range(view.channels):
        mean[c] = sums.deviations[c] / n
        values[c] = <float> mean[c]
    if view.mask.data == NULL:
        load(view.type, view.x.data, 0, view.x.channel, values, 1, view.channels)
    choose_centers(mean, values, view.channels, whole, center)
    if statistic == CENTERS:
        memcpy(mean, center, view.channels * sizeof(double))
    while statistic == MOMENTS:
        if attempt >= 2:
            kind = WIDE
        exact = whole or kind == WIDE
        most = 2 if attempt == 3 else most_off(exact)
        n = add_all(view, rest, kind, center, &sums)
        if n == 0 or found_all(&sums, n, view.channels, center, exact, most, mean, m2) or attempt == 3:
            break
        if may_be_found(&sums, view.channels, m2):
            attempt += 1
        elif attempt < 2:
            attempt = 2
        else:
            break
        for c in range(view.channels):
            values[c] = <float> mean[c]
            center[c] = mean[c] if isfinite(mean[c]) else 0
        if attempt == 1:
            choose_centers(mean, values, view.channels, whole, center)
    return n


cdef bint are_few(const Job *job) noexcept nogil:
    """Planes whose columns, beside each other, would be more work than their elements are."""
    if job.channels_last or job.residual.data != NULL:
        return False
    if job.outer == 1:
        return job.inner <= FEW_OF_ONE
    return job.outer < 8 and job.inner >= LANES and job.outer * job.inner <= FEW_ELEMENTS


cdef Py_ssize_t moments_of_few(const Job *job, double *mean, double *m2) noexcept nogil:
    """Their sums, in double, about the first element, which is at most sqrt(n) standard deviations from the mean."""
    cdef float[FEW_ELEMENTS] storage
    cdef double[FEW_ELEMENTS] center, deviations, squares
    cdef Sums sums = Sums(&deviations[0], &squares[0])
    cdef bint direct = job.outer_ndim <= 1 and is_run(&job.x, job.x.inner)
    cdef Py_ssize_t n = job.outer * job.inner, most = FEW_ELEMENTS if direct else FEW_ELEMENTS // n
    cdef Py_ssize_t plane = job.x.channel, row = job.x.outer[0], first = 0, some, c, position
    cdef const char *x
    while first < job.channels:
        some = min(most, job.channels - first)
        x = job.x.data + first * job.x.channel
        if not direct:
            plane = job.inner * 4
            row = some * plane
            for position in range(job.outer):
                load(
                    job.x.type, x + offset_in(job, &job.x, position), job.x.channel, job.x.inner,
                    storage + position * some * job.inner, some, job.inner)
            x = <const char *> storage
        for c in range(some):
            center[c] = (<const float *> x)[0] if isfinite((<const float *> x)[0]) else 0
            bn_add_few(x, row, job.outer, job.inner, center[c], &deviations[c], &squares[c])
            x += plane
            m2[first + c] = NOT_A_NUMBER
        found_all(&sums, n, some, center, True, 2, mean + first, m2 + first)
        first += some
    return n


cdef View view_of(const Job *job) noexcept nogil:
    """The loops over a channel as they are."""
    cdef View view
    view.type = job.x.type
    view.far = job.far
    view.separate = not job.channels_last
    view.behind = 0
    view.channels = view.width = view.kept = view.per_row = 1
    view.inner = job.inner
    view.outer = job.outer
    view.outer_ndim = job.outer_ndim
    view.outer_shape = &job.outer_shape[0]
    view.number = job.x.channel if job.channels_last else job.x.inner
    view.x = Positions(job.x.data, job.x.channel, job.x.inner, &job.x.outer[0])
    view.mask = Positions(job.residual.data, 0, job.residual.inner, &job.residual.outer[0])
    return view


cdef inline bint rows_are_near(const View *planes) noexcept nogil:
    """Whether the rows of a plane with gaps can be added eight at a time: as they lie, and from the smallest L1."""
    cdef int last = planes.outer_ndim - 1
    return last >= 0 and planes.outer_shape[last] >= 8 and magnitude(planes.x.outer[last]) < 1 << 14 \
        and planes.inner <= WIDEST and is_float(planes.type) and planes.number == size_of_type(planes.type)


cdef inline bint images_are_rows(const Job *job) noexcept nogil:
    """Whether planes of floats that are not short are added eight images at a time too: unless they are long and these
    share a place in a small L1."""
    cdef int last = job.outer_ndim - 1
    return is_run(&job.x, job.x.inner) and last >= 0 and job.outer_shape[last] >= 8 \
        and (job.inner <= WIDEST or (job.inner <= LONGEST and job.x.outer[last] % L1_WAY != 0))


cdef inline Py_ssize_t read_together(const Job *job) noexcept nogil:
    """How many channels with COLUMNS sums each are."""
    cdef Py_ssize_t bytes = job.inner * job.outer * size_of_type(job.x.type)
    return max(<Py_ssize_t> 1, min(<Py_ssize_t> WIDEST // COLUMNS, (2 * GROUP if job.far else GROUP) // bytes))


cdef Py_ssize_t moments(const Job *job, Statistic statistic, double *mean, double *m2) noexcept nogil:
    """The elements of each channel that count; their mean, and the sum of their squared deviations from it."""
    cdef View planes = view_of(job), view = planes, rest = planes, sample
    cdef Thinned thinned_outer
    cdef const View *left_over = NULL
    cdef Py_ssize_t first = 0, most = 1, n = 0, eights = job.inner // PLANE * PLANE
    if are_few(job):
        return moments_of_few(job, mean, m2)
    if job.channels_last:
        most = WIDEST
        view.per_row = COLUMNS
        while view.per_row > 1 and (
            job.channels * (view.per_row // 2) % COLUMNS == 0 or view.per_row * job.channels > WIDEST
        ):
            view.per_row //= 2
    elif view.mask.data == NULL and (job.inner <= PLANE or images_are_rows(job) or rows_are_near(&planes)):
        # Planes, or their lines, are short: the elements are columns, of several channels that follow each other.
        view = side_by_side(&planes, 0)
        most = WIDEST // job.inner
        if in_strips(&view) and view.type == FLOAT32 and is_direct(&view):
            most = read_together(job)
        elif most > LANES:
            most = most // LANES * LANES    # columns in whole registers
        if job.x.channel != job.inner * job.x.inner:
            most = 1
    else:
        view.per_row = view.kept = COLUMNS
        if is_direct(&view) or is_every_second(&view):
            most = read_together(job)
            rest = side_by_side(&planes, eights)
            if rest.inner >= 8 and rest.width > 0:
                view.inner = eights
                view.behind = rest.width * rest.number
                left_over = &rest
    view.channels = min(most, job.channels)
    if view.mask.data == NULL and (view.separate or in_strips(&view)) and planes.outer * planes.inner > FEW_ROWS:
        sample = windows_of(&planes, &thinned_outer)
    else:
        sample = sample_of(&view, &thinned_outer)
    while first < job.channels:
        view.channels = rest.channels = sample.channels = min(most, job.channels - first)
        n = view_moments(&view, left_over, &sample, statistic, mean + first, m2 + first)
        first += most
        view.x.data += most * job.x.channel
        rest.x.data += most * job.x.channel
        sample.x.data += most * job.x.channel
    return n


# ---- fold -------------------------------------------------------------------------------------------

cdef void fold(Coefficients *k, Py_ssize_t channels, const double *m2, double count, double eps) noexcept nogil:
    cdef Py_ssize_t c
    cdef double scale, shift
    cdef int safe, wide = 0
    for c in range(channels):
        k.std[c] = sqrt(m2[c] / count + eps)
        scale = k.gamma[c] / k.std[c]
        k.center[c] = <float> k.mean[c]
        shift = k.beta[c] - (k.mean[c] - k.center[c]) * scale
        # `|` and `&`: without branches the loop is vectorised
        safe = ((fabs(scale) >= 1e-30) | (scale == 0)) & (fabs(scale) <= 1e30) & (fabs(k.mean[c]) <= 1e30) \
            & ((fabs(shift) >= 1e-37) | (shift == 0)) & (fabs(shift) <= 1e37)
        wide |= (not safe) & (scale == scale)           # of NaN all is NaN
        k.scale[c] = <float> scale if safe else NOT_A_NUMBER
        k.shift[c] = <float> shift
    k.wide = wide


cdef Kernels kernels = Kernels(streams=BN_STREAMS, normalize=normalize, moments=moments, fold=fold, images=normalize_images)
table = PyCapsule_New(&kernels, "bn_c.kernels", NULL)
