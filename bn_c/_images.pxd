"""The loops over pictures: bytes in, floats, halves or bytes out, compiled once per instruction set.

a. y is a function of a byte and its channel, so that every way to compute it gives the same bits.
b. Pixels of up to four channels, and single channels whose pixels are that near, go through `bn_c/image.h`
   where y is a run of either. What it leaves, and all others, go through plain loops, channel by channel:
   floats are computed, halves and bytes looked up.
c. Rows of floats with many channels, last and in order on both sides, are one run, with the coefficients
   repeated.
"""

from libc.stdint cimport uint8_t, uint16_t

from bn_c._layout cimport FLOAT16, FLOAT32, Images, size_of_type

cdef extern from "bn_c/sums.h" nogil:
    ctypedef void once "BN_ONCE void"

cdef extern from "bn_c/image.h" nogil:
    ctypedef struct bn_pixels:
        int channels
    void bn_pixels_plan(
        bn_pixels *plan, Py_ssize_t pixel, Py_ssize_t channel, Py_ssize_t channels, int interleaved, int type)
    void bn_pixels_scale(bn_pixels *plan, const float *scale, const float *shift)
    Py_ssize_t bn_pixels_row(
        const bn_pixels *plan, const uint8_t *x, Py_ssize_t n, char *y, Py_ssize_t plane, Py_ssize_t *stop)

ctypedef fused value:
    uint8_t
    uint16_t

cdef enum:
    HEIGHT = 1
    WIDTH
    CHANNEL
    REPEATED = 256      # coefficients of a row, repeated for pixels of few channels
    NEAR = 16384        # bytes of x that are gone through channel by channel: they stay in L1


cdef inline void scale_run(
    const uint8_t *x, Py_ssize_t x_stride, char *y, Py_ssize_t y_stride, Py_ssize_t n, float scale, float shift,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef float *run = <float *> y
    if y_stride != 4:
        for i in range(n):
            (<float *> (y + i * y_stride))[0] = x[i * x_stride] * scale + shift
    elif x_stride != 1:
        for i in range(n):
            run[i] = x[i * x_stride] * scale + shift
    else:
        for i in range(n):
            run[i] = x[i] * scale + shift


cdef inline void look_up_run(
    const uint8_t *x, Py_ssize_t x_stride, char *y, Py_ssize_t y_stride, Py_ssize_t n, const value *table,
) noexcept nogil:
    """Four at a time, since no load may pass a store that it might depend on."""
    cdef Py_ssize_t i
    cdef value a, b, c, d
    for i in range(0, n - 3, 4):
        a = table[x[i * x_stride]]
        b = table[x[(i + 1) * x_stride]]
        c = table[x[(i + 2) * x_stride]]
        d = table[x[(i + 3) * x_stride]]
        (<value *> (y + i * y_stride))[0] = a
        (<value *> (y + (i + 1) * y_stride))[0] = b
        (<value *> (y + (i + 2) * y_stride))[0] = c
        (<value *> (y + (i + 3) * y_stride))[0] = d
    for i in range(n & ~3, n):
        (<value *> (y + i * y_stride))[0] = table[x[i * x_stride]]


cdef inline once run_of_channel(
    const Images *images, Py_ssize_t c, const char *x, char *out, Py_ssize_t first, Py_ssize_t stop,
) noexcept nogil:
    """One channel of the pixels from `first` to `stop` of a row."""
    cdef Py_ssize_t pixel = images.x_strides[WIDTH], out_pixel = images.out_strides[WIDTH]
    cdef const uint8_t *source = <const uint8_t *> x + c * images.x_strides[CHANNEL] + first * pixel
    out += c * images.out_strides[CHANNEL] + first * out_pixel
    if images.type == FLOAT32:
        scale_run(source, pixel, out, out_pixel, stop - first, images.scale[c], images.shift[c])
    elif images.type == FLOAT16:
        look_up_run(source, pixel, out, out_pixel, stop - first, <const uint16_t *> images.table + c * 256)
    else:
        look_up_run(source, pixel, out, out_pixel, stop - first, <const uint8_t *> images.table + c * 256)


cdef inline void row_of_pixels(const Images *images, bn_pixels *plan, const char *x, char *out) noexcept nogil:
    cdef Py_ssize_t channels = images.shape[CHANNEL], width = images.shape[WIDTH]
    cdef Py_ssize_t pixel = images.x_strides[WIDTH], channel = images.x_strides[CHANNEL]
    cdef Py_ssize_t at_once = max(plan.channels, 1)
    cdef Py_ssize_t block = width if at_once == channels else max(<Py_ssize_t> 16, NEAR // channels)
    cdef Py_ssize_t start = 0, n, c, k, first, stop
    while start < width:
        n = min(block, width - start)
        c = 0
        while c < channels:
            if at_once < channels:
                bn_pixels_scale(plan, images.scale + c, images.shift + c)
            first = bn_pixels_row(
                plan, <const uint8_t *> x + c * channel, n, out + c * images.out_strides[CHANNEL],
                images.out_strides[CHANNEL], &stop)
            for k in range(c, c + at_once):
                if first > 0:
                    run_of_channel(images, k, x, out, 0, first)
                if stop < n:
                    run_of_channel(images, k, x, out, stop, n)
            c += at_once
        x += n * pixel
        out += n * images.out_strides[WIDTH]
        start += n


cdef inline void scale_elements(
    const uint8_t *x, float *y, Py_ssize_t n, const float *scale, const float *shift,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        y[i] = x[i] * scale[i] + shift[i]


cdef inline void row_of_elements(
    const Images *images, const char *x, char *out, const float *scale, const float *shift, Py_ssize_t period,
) noexcept nogil:
    """A row with its channels last on both sides, `period` elements at a time."""
    cdef Py_ssize_t total = images.shape[WIDTH] * images.shape[CHANNEL], start = 0, n
    while start < total:
        n = min(period, total - start)
        scale_elements(<const uint8_t *> x + start, <float *> out + start, n, scale, shift)
        start += n


cdef inline void make_plan(const Images *images, bn_pixels *plan) noexcept nogil:
    """For all channels at once, or else for single ones; none where y is not a run of either."""
    cdef Py_ssize_t channels = images.shape[CHANNEL], size = size_of_type(images.type)
    cdef Py_ssize_t pixel = images.x_strides[WIDTH], channel = images.x_strides[CHANNEL]
    cdef bint planes = images.out_strides[WIDTH] == size
    cdef bint interleaved = images.out_strides[CHANNEL] == size and images.out_strides[WIDTH] == channels * size
    plan.channels = 0
    if images.in_table:
        return
    if interleaved and channels > 1:
        bn_pixels_plan(plan, pixel, channel, channels, 1, images.type)
    elif planes:
        bn_pixels_plan(plan, pixel, channel, channels, 0, images.type)
        if plan.channels == 0:
            bn_pixels_plan(plan, pixel, 0, 1, 0, images.type)
    bn_pixels_scale(plan, images.scale, images.shift)


cdef inline bint is_run_of_elements(const Images *images) noexcept nogil:
    cdef Py_ssize_t channels = images.shape[CHANNEL]
    return images.type == FLOAT32 and images.x_strides[CHANNEL] == 1 and images.x_strides[WIDTH] == channels \
        and images.out_strides[CHANNEL] == 4 and images.out_strides[WIDTH] == channels * 4


cdef inline void normalize_images(const Images *images) noexcept nogil:
    cdef float[REPEATED] scales, shifts
    cdef const float *scale = images.scale
    cdef const float *shift = images.shift
    cdef Py_ssize_t channels = images.shape[CHANNEL], period = channels, index, row, i
    cdef const char *x
    cdef char *out
    cdef bn_pixels plan
    make_plan(images, &plan)
    cdef bint elements = is_run_of_elements(images) and plan.channels == 0
    if elements and channels <= REPEATED:
        period = REPEATED // channels * channels if channels > 16 else REPEATED // (16 * channels) * 16 * channels
        for i in range(period):
            scales[i] = scale[i % channels]
            shifts[i] = shift[i % channels]
        scale = scales
        shift = shifts
    for index in range(images.shape[0]):
        for row in range(images.shape[HEIGHT]):
            x = images.x + index * images.x_strides[0] + row * images.x_strides[HEIGHT]
            out = images.out + index * images.out_strides[0] + row * images.out_strides[HEIGHT]
            if elements:
                row_of_elements(images, x, out, scale, shift, period)
            else:
                row_of_pixels(images, &plan, x, out)
