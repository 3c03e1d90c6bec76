"""From checked arguments to the kernels: takes the arrays, lays them out, runs the loops.

a. Arrays are taken through NumPy's C API: asking for a buffer costs more than all of the work on 64 values. Shapes and
   strides are copied, since another thread may reshape an array; whoever calls keeps the arrays themselves alive.
b. Everything is checked before the first element is written.
c. Compiled for the baseline; only the kernels know more, and they are handed in by `use`.
d. Calls from C come as the same views, without objects behind them, and go the same way without Python.
"""

from libc.math cimport INFINITY, isfinite
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcpy

from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongAndOverflow
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.ref cimport Py_INCREF, PyObject
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport usleep

from bn_c cimport (
    BN_BAD_ACTIVATION, BN_BAD_AXIS, BN_BAD_CHANNELS, BN_BAD_EPS, BN_BAD_NDIM, BN_BAD_PARAMS, BN_BAD_SHAPE, BN_BAD_TYPE,
    BN_C_ABI, BN_NO_MEMORY, BN_NULL, BN_OK, BN_OVERLAP, BN_UNALIGNED, bn_api, bn_array, bn_params,
)
from bn_c._layout cimport (
    CLIP, FLOAT16, FLOAT32, HARD_SWISH, IDENTITY, INT8, INT16, LEAKY_RELU, MAX_NDIM, UINT8, UINT16,
    CENTERS, CHANNELS, MOMENTS, SUMS, Activation, Coefficients, Images, Job, Kernels, Operand, Statistic,
    is_float, is_planes, lay_out, longest_loop, loop_length, m2_of, magnitude, merge_moments, most_off, outer_in_plane,
    size_of, size_of_type, take, take_channels, widest_loop,
)

import numpy as np

from bn_c import _checks, _threads

# By hand: NumPy's own .pxd looks up all of its types at import.
cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyArrayObject:
        pass
    ctypedef struct PyArray_Descr:
        pass
    enum:
        NPY_BYTE, NPY_UBYTE, NPY_SHORT, NPY_USHORT, NPY_HALF, NPY_FLOAT, NPY_DOUBLE
        NPY_KEEPORDER, NPY_ARRAY_WRITEABLE
    int _import_array() except -1
    int PyArray_NDIM(PyArrayObject *array)
    const Py_ssize_t *PyArray_DIMS(PyArrayObject *array)
    const Py_ssize_t *PyArray_STRIDES(PyArrayObject *array)
    char *PyArray_BYTES(PyArrayObject *array)
    int PyArray_TYPE(PyArrayObject *array)
    bint PyArray_ISNOTSWAPPED(PyArrayObject *array)
    bint PyArray_ISWRITEABLE(PyArrayObject *array)
    int PyArray_FailUnlessWriteable(PyArrayObject *array, const char *name) except -1
    void PyArray_CLEARFLAGS(PyArrayObject *array, int flags)
    object PyArray_NewLikeArray(PyArrayObject *prototype, int order, PyArray_Descr *stolen_dtype, int subok)
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *ctx, size_t size) noexcept
        void (*free)(void *ctx, void *block, size_t size) noexcept
    ctypedef struct PyDataMem_Handler:
        char *name
        PyDataMemAllocator allocator
    object PyDataMem_SetHandler(object handler)
    PyObject *PyDataMem_DefaultHandler

_import_array()

cdef extern from "bn_c/cpu.h" nogil:
    ctypedef struct bn_fp_state:
        pass
    bint bn_cpu_runs(const char *isa)
    void bn_fp_enter(bn_fp_state *state)
    void bn_fp_leave(const bn_fp_state *state)

cdef extern from "bn_c/memory.h" nogil:
    enum:
        BN_GIVEN_BACK
    bint bn_lend(char *block, size_t size)

cdef extern from "bn_c/atomic.h" nogil:
    Py_ssize_t bn_add(Py_ssize_t *word, Py_ssize_t n)
    Py_ssize_t bn_load(const Py_ssize_t *word)
    void bn_store(Py_ssize_t *word, Py_ssize_t value)
    bint bn_change(Py_ssize_t *word, Py_ssize_t before, Py_ssize_t after)

cdef extern from "pythread.h" nogil:
    ctypedef void *PyThread_type_lock
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock lock)
    int PyThread_acquire_lock(PyThread_type_lock lock, int wait)
    void PyThread_release_lock(PyThread_type_lock lock)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    ABSENT = -1
    RELEASE_GIL = 1 << 15       # elements: below, a thread switch costs more than the loop
    PIECE = 1 << 18             # elements, at least, of a piece whose statistics are taken on their own
    PIECES = 64                 # and how many there are at most: memory stays in proportion to the channels
    PIECES_OF_HALVES = 16       # to sample one costs a tenth of adding it, if they come from memory
    ROWS = 1 << 10              # of a channel, at least, of such a piece: its sample is a small part of it
    LINE = 64                   # bytes of a cache line: loads that straddle two are slower
    COLUMNS = 64                # channels of rows, at least, whose statistics one thread takes: whole cache lines
    UNIT = 1 << 18              # bytes of channels that are normalised while they are still in the second cache
    LARGE_UNIT = 1 << 20        # the same of what comes from memory, where that cache is large
    HOLDS_UNITS = 2 << 20       # bytes of a large one
    RUN = 1 << 12               # bytes of a unit that lie together
    LONG_RUN = 1 << 15
    HUGE_PAGE = 1 << 21         # bytes, as x86-64 and most ARM64 systems have them

cdef const Kernels *kernels = NULL
cdef Py_ssize_t caches = 0                  # bytes of the last one, of which a call may have three quarters
cdef Py_ssize_t second_cache = 0
# Elements that a call reads, twice for statistics and y: below, to wake threads costs more than they do; below half of
# that, so may threads that are awake.
cdef Py_ssize_t parallel_from = 1 << 19
cdef Py_ssize_t calls_between = 0           # on so many that only threads that are awake repay
cdef object ndarray = np.ndarray
cdef object float32 = np.dtype(np.float32)
cdef object float16 = np.dtype(np.float16)


def cpu_runs(str isa):
    """Whether this CPU has the instruction set of that name."""
    return bn_cpu_runs(isa.encode())


def use(capsule, Py_ssize_t last, Py_ssize_t second):
    """Makes the loops of one instruction set those that every call runs, on a CPU with caches of so many bytes."""
    global kernels, caches, second_cache
    caches = last
    second_cache = second
    kernels = <const Kernels *> PyCapsule_GetPointer(capsule, "bn_c.kernels")


def wake_threads_from(Py_ssize_t elements):
    """Sets the size of x from which on `num_threads` counts; returns what it was. For tests."""
    global parallel_from
    before = parallel_from
    parallel_from = elements
    return before


# ---- arrays -----------------------------------------------------------------------------------------

cdef struct View:
    char *data
    int ndim
    const Py_ssize_t *shape
    const Py_ssize_t *strides   # NULL: there is no array
    Py_ssize_t itemsize
    Py_ssize_t len              # bytes
    Py_ssize_t[MAX_NDIM] own_shape, own_strides


cdef struct Arrays:
    View x
    View mask
    View residual
    View out


cdef inline int type_code(int number) noexcept:
    """Of a NumPy type; ABSENT if the loops do not read it."""
    if number == NPY_FLOAT:
        return FLOAT32
    if number == NPY_HALF:
        return FLOAT16
    if number == NPY_UBYTE:
        return UINT8
    if number == NPY_BYTE:
        return INT8
    if number == NPY_USHORT:
        return UINT16
    if number == NPY_SHORT:
        return INT16
    return ABSENT


cdef inline double *doubles_of(array) noexcept:
    """Of an array that was made here."""
    return <double *> PyArray_BYTES(<PyArrayObject *> array)


cdef inline bint is_aligned(const View *view) noexcept nogil:
    cdef size_t places = <size_t> view.data
    cdef int d
    for d in range(view.ndim):
        if view.shape[d] > 1:
            places |= <size_t> view.strides[d]
    return places % <size_t> view.itemsize == 0 or view.len == 0


cdef int take_array(View *view, Operand *operand, str name, array, bint writable, bint integers) except -1:
    """Views an array, after checking that its elements can be read (and written) as they are."""
    if type(array) is not ndarray:
        raise TypeError(f"{name}: expected an array, got {_checks.kind(array)}")
    cdef PyArrayObject *of = <PyArrayObject *> array
    cdef int d
    if writable and not PyArray_ISWRITEABLE(of):
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if writable:
        PyArray_FailUnlessWriteable(of, "out")  # warns where NumPy is about to make it read-only
    operand.type = type_code(PyArray_TYPE(of)) if PyArray_ISNOTSWAPPED(of) else ABSENT
    if operand.type == ABSENT or (not integers and operand.type > FLOAT16):
        raise _checks.wrong_dtype(name, array, integers)
    view.ndim = PyArray_NDIM(of)
    if view.ndim == 0 or view.ndim > MAX_NDIM:
        raise ValueError(f"{name}: expected 1 to {MAX_NDIM} dimensions, got {view.ndim}")
    view.data = operand.data = PyArray_BYTES(of)
    view.shape = view.own_shape
    view.strides = view.own_strides
    view.itemsize = view.len = size_of_type(operand.type)
    for d in range(view.ndim):
        view.own_shape[d] = PyArray_DIMS(of)[d]
        view.own_strides[d] = PyArray_STRIDES(of)[d]
        view.len *= view.own_shape[d]
    if not is_aligned(view):
        hint = "" if writable else f"; pass {name}.copy()"
        raise ValueError(f"{name}: expected aligned elements, got an unaligned array{hint}")
    return 0


cdef inline bint has_shape_of(const View *x, const View *view) noexcept nogil:
    cdef int d
    cdef bint same = view.ndim == x.ndim
    for d in range(x.ndim if same else 0):
        same = same and view.shape[d] == x.shape[d]
    return same


cdef int same_shape(str name, const View *view, const View *x) except -1:
    if not has_shape_of(x, view):
        raise ValueError(
            f"{name}: expected the shape of x, {_checks.shape([x.shape[d] for d in range(x.ndim)])}, "
            f"got {_checks.shape([view.shape[d] for d in range(view.ndim)])}")
    return 0


cdef inline void extent(const View *view, size_t *low, size_t *high) noexcept nogil:
    """The addresses from the first byte to behind the last."""
    cdef int d
    cdef Py_ssize_t length
    low[0] = <size_t> view.data
    high[0] = low[0] + view.itemsize
    for d in range(view.ndim):
        length = (view.shape[d] - 1) * view.strides[d]
        if length < 0:
            low[0] += length
        else:
            high[0] += length


cdef bint is_apart_or_same(const View *view, const View *out_view) noexcept nogil:
    cdef size_t low, high, out_low, out_high
    cdef bint same
    cdef int d
    extent(view, &low, &high)
    extent(out_view, &out_low, &out_high)
    if high <= out_low or out_high <= low:
        return True
    same = view.data == out_view.data and view.itemsize == out_view.itemsize
    for d in range(view.ndim):
        same = same and (view.shape[d] == 1 or view.strides[d] == out_view.strides[d])
    return same


cdef int no_overlap(str name, const View *view, array, const View *out_view, out) except -1:
    """out may be the other array itself, or apart from it; a partial overlap would read what was written."""
    if not is_apart_or_same(view, out_view) and _checks.share_memory(array, out):
        raise ValueError(f"out: expected {name} itself or memory apart from it, got a partial overlap with {name}")
    return 0


cdef bint overlaps_itself(const View *view) noexcept nogil:
    """Whether a stride does not span all dimensions with smaller ones."""
    cdef Py_ssize_t[MAX_NDIM] strides, lengths
    cdef Py_ssize_t span = view.itemsize, stride
    cdef int n = 0, d, i
    for d in range(view.ndim):
        if view.shape[d] == 1:
            continue
        stride = magnitude(view.strides[d])
        i = n
        while i > 0 and strides[i - 1] > stride:
            strides[i] = strides[i - 1]
            lengths[i] = lengths[i - 1]
            i -= 1
        strides[i] = stride
        lengths[i] = view.shape[d]
        n += 1
    for i in range(n):
        if strides[i] < span:
            return True
        span += strides[i] * (lengths[i] - 1)
    return False


cdef int no_self_overlap(const View *view) except -1:
    if overlaps_itself(view):
        raise ValueError("out: expected every element in a place of its own, got elements that overlap in memory")
    return 0


cdef int axis_of(const View *x, Py_ssize_t axis) noexcept nogil:
    """Counted from the front; ABSENT if x has none such."""
    if axis < -x.ndim or axis >= x.ndim:
        return ABSENT
    return <int> (axis + x.ndim if axis < 0 else axis)


cdef int channel_axis(Py_ssize_t axis, const View *x) except -1:
    cdef int at = axis_of(x, axis)
    if at == ABSENT:
        raise _checks.wrong_axis(axis, [x.shape[d] for d in range(x.ndim)])
    return at


cdef Py_ssize_t elements(const View *view) noexcept nogil:
    return view.len // view.itemsize


# The memory of new arrays. malloc gives large blocks back to the system, and the system clears each page that it gives:
# that takes longer than to fill it with y. So the last block that was freed is kept for a new array of its size, and
# lent to the system meanwhile.
cdef Py_ssize_t kept = 0        # the address of that block, in whose first bytes its size is
cdef const PyDataMem_Handler *numpys = <const PyDataMem_Handler *> PyCapsule_GetPointer(
    <object> PyDataMem_DefaultHandler, "mem_handler")
cdef PyDataMem_Handler keeping = numpys[0]
strcpy(keeping.name, "bn_c")
keeping.allocator.malloc = take_memory
keeping.allocator.free = keep_memory
cdef object handler = PyCapsule_New(&keeping, "mem_handler", NULL)


cdef void *take_memory(void *ctx, size_t size) noexcept:
    cdef Py_ssize_t at = bn_load(&kept)
    cdef size_t *block = <size_t *> at
    if at != 0 and bn_change(&kept, at, 0):
        if block[0] == size:
            return block
        numpys.allocator.free(ctx, block, block[0])
    return numpys.allocator.malloc(ctx, size)


cdef void keep_memory(void *ctx, void *block, size_t size) noexcept:
    cdef Py_ssize_t before = bn_load(&kept)
    if bn_lend(<char *> block, size):
        (<size_t *> block)[0] = size
        if bn_change(&kept, before, <Py_ssize_t> block):
            block = <void *> before
            size = (<size_t *> block)[0] if block != NULL else 0
    if block != NULL:
        numpys.allocator.free(ctx, block, size)


cdef begin_keeping(Py_ssize_t size):
    """From here on, for an array of so many bytes, until `end_keeping` of what is returned."""
    if size < BN_GIVEN_BACK:
        return None
    before = PyDataMem_SetHandler(handler)
    if <PyObject *> before == PyDataMem_DefaultHandler:
        return before
    PyDataMem_SetHandler(before)            # the caller has one that is not for us to replace
    return None


cdef int end_keeping(before) except -1:
    if before is not None:
        PyDataMem_SetHandler(before)
    return 0


cdef new_out(x, int type, dtype, Py_ssize_t size):
    """An array like x, of so many elements, in x's memory order."""
    if dtype is None:
        dtype = float16 if type == FLOAT16 else float32
    before = begin_keeping(size * (2 if dtype is float16 else 4))
    Py_INCREF(dtype)
    try:
        return PyArray_NewLikeArray(<PyArrayObject *> x, NPY_KEEPORDER, <PyArray_Descr *> dtype, False)
    finally:
        end_keeping(before)


cdef void claim(const View *out) noexcept:
    """Takes the memory of a new array from the system, huge page by huge page, by writing to the end of each.

    Linux clears such a page from its other end to where it was touched: touched at its beginning, as the loops would,
    that takes twice as long. Claiming each page just before its loop gains nothing more.
    """
    cdef Py_ssize_t at = HUGE_PAGE - 1 - <Py_ssize_t> (<size_t> out.data % HUGE_PAGE)
    if out.len >= HUGE_PAGE:
        with nogil:
            while at < out.len:
                out.data[at] = 0
                at += HUGE_PAGE


cdef int take_input(Arrays *arrays, Job *job, x, Py_ssize_t axis, Py_ssize_t channels) except -1:
    """Takes x and returns its axis of channels. `channels` is their expected number, or ABSENT."""
    take_array(&arrays.x, &job.x, "x", x, False, True)
    cdef int at = channel_axis(axis, &arrays.x)
    if channels != ABSENT and arrays.x.shape[at] != channels:
        raise ValueError(f"x: expected {channels} channels on axis {axis}, got shape {_checks.shape(x.shape)}")
    return at


cdef int take_mask(Arrays *arrays, Job *statistics, mask) except -1:
    """`mask` as `_checks.mask` returns it: in the place of a residual, which statistics have none of."""
    statistics.residual.data = statistics.out.data = NULL
    arrays.mask.strides = NULL
    if mask is not None:
        take_array(&arrays.mask, &statistics.residual, "mask", mask, False, True)
        same_shape("mask", &arrays.mask, &arrays.x)
    return 0


cdef int take_residual(Arrays *arrays, Job *job, residual) except -1:
    job.residual.data = NULL
    arrays.residual.strides = NULL
    if residual is not None:
        take_array(&arrays.residual, &job.residual, "residual", residual, False, False)
        same_shape("residual", &arrays.residual, &arrays.x)
    return 0


cdef int take_given_out(Arrays *arrays, Job *job, x, mask, residual, out, dtype) except -1:
    take_array(&arrays.out, &job.out, "out", out, True, False)
    same_shape("out", &arrays.out, &arrays.x)
    if dtype is not None and out.dtype != dtype:
        raise ValueError(f"out: expected dtype {dtype}, as dtype= says, got {out.dtype}")
    if arrays.out.len > 0:
        no_self_overlap(&arrays.out)
        no_overlap("x", &arrays.x, x, &arrays.out, out)
        if mask is not None:
            no_overlap("mask", &arrays.mask, mask, &arrays.out, out)
        if residual is not None:
            no_overlap("residual", &arrays.residual, residual, &arrays.out, out)
    return 0


# ---- parameters -------------------------------------------------------------------------------------

cdef enum:
    MEAN
    STD
    GAMMA
    BETA
    VAR                 # of the mini-batch's statistics: the sums of squared deviations, as they merge
    EXACT_ROWS

cdef enum:
    ROUNDED_ROWS = 3    # center, scale, shift


cdef size_t size_of_parameters(Py_ssize_t channels) noexcept nogil:
    return channels * (EXACT_ROWS * sizeof(double) + ROUNDED_ROWS * sizeof(float))


cdef Coefficients coefficients_in(double *rows, Py_ssize_t channels) noexcept nogil:
    cdef float *rounded = <float *> (rows + EXACT_ROWS * channels)
    return Coefficients(
        mean=rows + MEAN * channels, std=rows + STD * channels, gamma=rows + GAMMA * channels, beta=rows + BETA * channels,
        center=rounded, scale=rounded + channels, shift=rounded + 2 * channels, wide=False)


cdef void fold(Coefficients *k, Py_ssize_t channels, const double *var, double eps) noexcept nogil:
    cdef bn_fp_state state
    bn_fp_enter(&state)
    kernels.fold(k, channels, var, 1, eps)
    bn_fp_leave(&state)


cdef bint copied(values, double *to, Py_ssize_t channels) except -1:
    """Copies a vector of floats or doubles that has one element per channel; False, and nothing, if it is not that."""
    cdef PyArrayObject *of
    cdef Py_ssize_t c, stride
    cdef const char *data
    cdef bn_fp_state state
    cdef int type_number
    if type(values) is not ndarray:
        return False
    of = <PyArrayObject *> values
    if PyArray_NDIM(of) != 1 or PyArray_DIMS(of)[0] != channels or not PyArray_ISNOTSWAPPED(of):
        return False
    type_number = PyArray_TYPE(of)
    stride = PyArray_STRIDES(of)[0]
    data = PyArray_BYTES(of)
    if type_number == NPY_FLOAT and (<size_t> data | <size_t> stride) % sizeof(float) == 0:
        bn_fp_enter(&state)             # or subnormals may be taken for 0
        for c in range(channels):
            to[c] = (<const float *> (data + c * stride))[0]
        bn_fp_leave(&state)
        return True
    if type_number == NPY_DOUBLE and (<size_t> data | <size_t> stride) % sizeof(double) == 0:
        for c in range(channels):
            to[c] = (<const double *> (data + c * stride))[0]
        return True
    return False


cdef class Folded:
    """The parameters of each channel, in double, and what the loops need of them, in float."""
    cdef readonly Py_ssize_t channels
    cdef Py_ssize_t count
    cdef char *memory
    cdef double *exact
    cdef Coefficients k
    # Of the layer that keeps it.
    cdef Activation activation
    cdef Py_ssize_t axis
    cdef int threads

    def __init__(self, Py_ssize_t channels, gamma=None, beta=None):
        self.begin(channels, gamma, beta)

    cdef int begin(self, Py_ssize_t channels, gamma, beta) except -1:
        PyMem_Free(self.memory)
        self.memory = <char *> PyMem_Malloc(size_of_parameters(channels) + LINE)
        if self.memory == NULL:
            raise MemoryError()
        self.exact = <double *> (self.memory + (-<size_t> self.memory) % LINE)
        self.channels = channels
        self.k = coefficients_in(self.exact, channels)
        if gamma is None:
            self.set_all(GAMMA, 1)
        else:
            self.fill("gamma", GAMMA, gamma)
        if beta is None:
            self.set_all(BETA, 0)
        else:
            self.fill("beta", BETA, beta)
        return 0

    def __dealloc__(self):
        PyMem_Free(self.memory)

    cdef double *row(self, int row) noexcept:
        return self.exact + row * self.channels

    cdef void set_all(self, int row, double value) noexcept:
        cdef Py_ssize_t c
        for c in range(self.channels):
            self.row(row)[c] = value

    cdef int fill(self, str name, int row, values) except -1:
        if not copied(values, self.row(row), self.channels):
            values = _checks.vector(name, values, self.channels).astype(np.float64)
            if not copied(values, self.row(row), self.channels):
                raise ValueError(f"{name}: expected {self.channels} values, got shape {_checks.shape(values.shape)}")
        return 0

    cdef int take_statistics(self, mean, var, double eps) except -1:
        self.fill("mean", MEAN, mean)
        self.fill("var", VAR, var)
        fold(&self.k, self.channels, self.row(VAR), eps)
        return 0

    def fold(self, mean, var, double eps):
        """Takes the statistics to normalise with; returns itself."""
        self.take_statistics(mean, var, eps)
        return self

    cdef object copy_of(self, int row):
        result = np.empty(self.channels)
        memcpy(doubles_of(result), self.row(row), self.channels * sizeof(double))
        return result

    def statistics(self):
        """Of the mini-batch that was normalised: elements per channel, mean, sum of squared deviations."""
        return self.count, self.copy_of(MEAN), self.copy_of(VAR)

    cdef object moved(self, running, const double *batch, double divisor, double weight):
        """(1 - weight) * running + weight * batch / divisor, in double, as a read-only array like `running`, a layer's."""
        cdef const float *old = <const float *> PyArray_BYTES(<PyArrayObject *> running)
        result = new_out(running, FLOAT32, None, self.channels)
        cdef float *new = <float *> PyArray_BYTES(<PyArrayObject *> result)
        cdef Py_ssize_t c
        cdef bn_fp_state state
        bn_fp_enter(&state)
        for c in range(self.channels):
            new[c] = <float> ((1 - weight) * old[c] + weight * (batch[c] / divisor))
        bn_fp_leave(&state)
        PyArray_CLEARFLAGS(<PyArrayObject *> result, NPY_ARRAY_WRITEABLE)
        return result

    def running(self, running_mean, running_var, double weight, bint unbiased):
        """Running statistics with that much of the mini-batch's; one element per channel has no variance."""
        cdef Py_ssize_t divisor = self.count - unbiased
        if self.count > 1:
            running_var = self.moved(running_var, self.row(VAR), divisor, weight)
        return {"running_mean": self.moved(running_mean, self.row(MEAN), 1, weight), "running_var": running_var}


cdef dict activation_kinds = {
    "identity": IDENTITY, "clip": CLIP, "leaky_relu": LEAKY_RELU, "hard_swish": HARD_SWISH,
}


cdef Activation as_activation(activation):
    """`activation` as `_checks.activation` returns it."""
    cdef Activation result
    kind, low, high = activation
    result.kind = activation_kinds[kind]
    result.low = result.slope = low
    result.high = high
    return result


# ---- running the kernels ----------------------------------------------------------------------------

cdef enum Task:
    NORMALIZE       # y of folded statistics
    STATISTICS      # `statistic`
    BOTH            # the statistics, then y, of some channels at a time


cdef struct Work:
    int task
    Job job                 # of NORMALIZE and BOTH
    Job statistics          # of STATISTICS and BOTH: x laid out by itself, so that their bits depend on x alone
    Statistic statistic     # of STATISTICS
    double *mean            # of STATISTICS
    double *m2              # of STATISTICS and BOTH
    Py_ssize_t counted      # of STATISTICS: elements of each channel that the mask did not leave out
    double count            # of BOTH: the same, beforehand
    double eps


cdef void normalize_units(const Work *work) noexcept nogil:
    cdef Job unit, statistics
    cdef const Job *x = &work.statistics
    cdef Py_ssize_t plane = x.inner * outer_in_plane(x) * size_of_type(x.x.type)
    cdef Py_ssize_t channel = x.inner * x.outer * size_of_type(x.x.type)
    cdef Py_ssize_t start = 0, stop, step = work.job.channels
    cdef bint large = second_cache >= HOLDS_UNITS
    cdef Py_ssize_t some = max(<Py_ssize_t> 1, (LARGE_UNIT if large and x.far else UNIT) // channel)
    # To jump from run to run costs more than reading x again, unless that cache is large (0.65 to 0.9 of the time) and runs
    # are not short, or they are long, from memory, and x alone (planes of 224 x 224: 0.8; with a residual 1.2 x).
    if some * plane >= (RUN if large else LONG_RUN) and (large or (x.far and work.job.residual.data == NULL)):
        step = some
    while start < work.job.channels:
        stop = min(start + step, work.job.channels)
        unit = work.job
        statistics = work.statistics
        take_channels(&unit, start, stop)
        take_channels(&statistics, start, stop)
        kernels.moments(&statistics, MOMENTS, unit.coefficients.mean, work.m2 + start)
        if step < work.job.channels:
            unit.far = False                # the statistics have just read it
        kernels.fold(&unit.coefficients, unit.channels, work.m2 + start, work.count, work.eps)
        kernels.normalize(&unit)
        start = stop


cdef void want_moments(Work *work, double *mean, double *m2) noexcept nogil:
    work.task = STATISTICS
    work.statistic = MOMENTS
    work.mean = mean
    work.m2 = m2
    work.counted = 0


cdef void run(Work *work) noexcept nogil:
    cdef bn_fp_state state
    bn_fp_enter(&state)
    if work.task == NORMALIZE:
        kernels.normalize(&work.job)
    elif work.task == STATISTICS:
        work.counted = kernels.moments(&work.statistics, work.statistic, work.mean, work.m2)
    else:
        normalize_units(work)
    bn_fp_leave(&state)


cdef enum:
    ACTIVE = 100_000        # ns that threads wait actively for each other; then they sleep, and waking one costs 15 us
    # What a helper is doing, where it is not the address of what is offered to it.
    ASLEEP = 0
    AWAKE = 1
    BUSY = 2


cdef size_t now() noexcept nogil:
    """In ns, from any moment, and from 0 again."""
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <size_t> t.tv_sec * 1_000_000_000 + <size_t> t.tv_nsec


cdef bint becomes(const Py_ssize_t *word, Py_ssize_t value, bint equal) noexcept nogil:
    """Whether it gets to be equal to value, or not equal, in a short time; meanwhile others may have the core."""
    cdef size_t start = now()
    while (bn_load(word) == value) != equal:
        if now() - start > ACTIVE:
            return False
        sched_yield()
    return True


cdef class Parts:
    """The work of a call in parts, which any number of threads take one after the other.

    The caller takes them from the front, and helpers, as they come, from the back: what a core has in its cache of
    one call it finds there in the next. When no part is left the caller withdraws its offers, and waits only for
    those who took one.
    """
    cdef readonly Py_ssize_t count
    cdef Py_ssize_t taken
    cdef Py_ssize_t taken_by_helpers
    cdef Py_ssize_t helpers     # that have an offer, or are at work

    def __cinit__(self, Py_ssize_t count):
        self.count = count

    cdef void run_part(self, Py_ssize_t index) noexcept nogil:
        pass

    cdef int run(self, Py_ssize_t threads) except -1:
        """Runs all parts, on at most that many threads, one of which is the caller's.

        Returns when all are done, whatever signals come: they write to the caller's arrays.
        """
        cdef Py_ssize_t wanted = min(threads, self.count) - 1
        cdef tuple helpers = _threads.helpers
        cdef Helper helper
        if len(helpers) < wanted:
            helpers = _threads.grow(wanted)
        for helper in helpers:
            if wanted > 0 and helper.offer(self):
                wanted -= 1
        with nogil:
            self.work()
        for helper in helpers:
            helper.withdraw(self)
        return self.finish()

    cdef void work(self) noexcept nogil:
        cdef Py_ssize_t index = 0
        while bn_add(&self.taken, 1) < self.count:
            self.run_part(index)
            index += 1

    cdef void help(self) noexcept nogil:
        while bn_add(&self.taken, 1) < self.count:
            self.run_part(self.count - 1 - bn_add(&self.taken_by_helpers, 1))

    cdef bint is_done(self) noexcept nogil:
        """Waits for that, but not for long."""
        cdef int looks = 0
        if becomes(&self.helpers, 0, True):
            return True
        while looks < 100 and bn_load(&self.helpers) != 0:
            usleep(50)
            looks += 1
        return looks < 100

    cdef int finish(self) except -1:
        """Waits for those at work. A signal that raises is raised again when no thread writes any more."""
        cdef bint done = bn_load(&self.helpers) == 0
        interrupt = None
        while not done:
            with nogil:
                done = self.is_done()
            try:
                PyErr_CheckSignals()
            except BaseException as signal:
                interrupt = signal
        if interrupt is not None:
            raise interrupt
        return 0


cdef class Helper:
    """What a thread that helps shares with those that ask it to. It never needs the GIL: at interpreter exit it
    could not have it.

    It waits for the next offer actively at first, so that call after call finds it awake, then sleeps.
    """
    cdef Py_ssize_t state
    cdef PyThread_type_lock sleeping

    def __cinit__(self):
        self.state = AWAKE
        self.sleeping = PyThread_allocate_lock()
        if self.sleeping == NULL:
            raise MemoryError()
        PyThread_acquire_lock(self.sleeping, 1)

    def __dealloc__(self):
        if self.sleeping != NULL:
            PyThread_free_lock(self.sleeping)

    def serve(self):
        """What its thread does; never returns."""
        with nogil:
            while True:
                if becomes(&self.state, AWAKE, False):
                    self.accept()
                elif bn_change(&self.state, AWAKE, ASLEEP):
                    PyThread_acquire_lock(self.sleeping, 1)

    cdef bint offer(self, Parts parts) noexcept:
        """Whether it may take them, until they are withdrawn."""
        cdef Py_ssize_t at = <Py_ssize_t> <void *> parts
        bn_add(&parts.helpers, 1)
        if bn_change(&self.state, AWAKE, at):
            return True
        if bn_change(&self.state, ASLEEP, at):
            PyThread_release_lock(self.sleeping)
            return True
        bn_add(&parts.helpers, -1)
        return False

    cdef void withdraw(self, Parts parts) noexcept:
        """Unless it has taken them, it will not."""
        if bn_change(&self.state, <Py_ssize_t> <void *> parts, AWAKE):
            bn_add(&parts.helpers, -1)

    cdef void accept(self) noexcept nogil:
        cdef Py_ssize_t at = bn_load(&self.state)
        if at != AWAKE and bn_change(&self.state, at, BUSY):
            (<Parts> <void *> at).help()
            bn_store(&self.state, AWAKE)
            bn_add(&(<Parts> <void *> at).helpers, -1)  # from here on they may be gone


def are_awake(tuple helpers):
    """Whether one of them is, or is busy."""
    cdef Helper helper
    for helper in helpers:
        if bn_load(&helper.state) != ASLEEP:
            return True
    return False


cdef Work part_of_work(const Work *work, int loop, Py_ssize_t index, Py_ssize_t count) noexcept nogil:
    cdef Work part = work[0]
    cdef Py_ssize_t length = loop_length(&work.statistics if work.task == STATISTICS else &work.job, loop)
    cdef Py_ssize_t start = index * length // count, stop = (index + 1) * length // count
    if work.task != STATISTICS:
        take(&part.job, loop, start, stop)
    if work.task != NORMALIZE:
        take(&part.statistics, loop, start, stop)
    if loop == CHANNELS and work.task != NORMALIZE:
        part.m2 += start
    if loop == CHANNELS and work.task == STATISTICS:
        part.mean += start
    return part


cdef class Works(Parts):
    """Parts that are each a work of their own."""
    cdef Work *works

    def __cinit__(self, Py_ssize_t count):
        self.works = <Work *> PyMem_Malloc(count * sizeof(Work))
        if self.works == NULL:
            raise MemoryError()

    def __dealloc__(self):
        PyMem_Free(self.works)

    cdef void run_part(self, Py_ssize_t index) noexcept nogil:
        run(&self.works[index])


cdef Works parts_of(const Work *work, int loop, Py_ssize_t count):
    cdef Works parts = Works.__new__(Works, count)
    cdef Py_ssize_t index
    for index in range(count):
        parts.works[index] = part_of_work(work, loop, index, count)
    return parts


cdef int repaid(int threads, Py_ssize_t size) except -1:
    """As many of these threads (0: the default's) as repay themselves for a call that reads so many elements: all or one.

    Calls between the two sizes are for them if they find some awake, as those that follow each other do; one in 32 wakes
    them.
    """
    if size < parallel_from // 2:
        return 1
    if threads == 0:
        threads = _threads.get_num_threads()
    if threads == 1 or size >= parallel_from or bn_add(&calls_between, 1) % 32 == 0 or are_awake(_threads.helpers):
        return threads
    return 1


cdef Py_ssize_t count_parts(const Job *job, int loop, Py_ssize_t threads) noexcept nogil:
    """Of that loop: two for each thread, so that all end together.

    Channels of rows are cut at multiples of COLUMNS, where `moments` takes the same sums of a part as of the whole.
    """
    cdef Py_ssize_t count = min(2 * threads, loop_length(job, loop))
    if loop == CHANNELS and job.channels_last:
        count = min(count, job.channels // COLUMNS)
        while count > 1 and job.channels % (count * COLUMNS) > 0:
            count -= 1
    return max(count, <Py_ssize_t> 1)


cdef int run_parts(Work *work, int loop, int threads) except -1:
    """Runs all of the work; with several threads, in parts of one of its loops."""
    cdef const Job *job = &work.statistics if work.task == STATISTICS else &work.job
    cdef Py_ssize_t count = count_parts(job, loop, threads) if threads > 1 else 1
    if count > 1:
        parts_of(work, loop, count).run(threads)
    elif size_of(job) >= RELEASE_GIL:
        with nogil:
            run(work)
    else:
        run(work)
    return 0


cdef bint in_halves(const Job *statistics) noexcept nogil:
    """Whether the sums of each channel are those of two halves, about the same center: too small for two samples."""
    cdef Py_ssize_t size = size_of(statistics), rows = size // statistics.channels
    return not is_planes(statistics) and size >= PIECE and rows >= ROWS and (size < 2 * PIECE or rows < 2 * ROWS)


cdef Py_ssize_t pieces_of(const Job *statistics) noexcept nogil:
    """How many pieces of its longest loop are computed on their own, however many threads there are.

    Many planes are independent channels, as are rows that are few. Others, and few planes, are cut into pieces, whose
    moments are merged in order: the bits depend on the arrays alone. A power of two of them is for as many threads,
    most often.
    """
    cdef Py_ssize_t size = size_of(statistics)
    cdef Py_ssize_t pieces = min(<Py_ssize_t> (PIECES_OF_HALVES if statistics.x.type == FLOAT16 else PIECES), size // PIECE)
    if is_planes(statistics):
        return 1
    if in_halves(statistics):
        return 2
    pieces = min(pieces, size // statistics.channels // ROWS)
    pieces = min(pieces, loop_length(statistics, longest_loop(statistics)))
    while pieces & (pieces - 1):
        pieces &= pieces - 1
    return max(pieces, <Py_ssize_t> 1)


cdef void merge_piece(Work *work, const Work *piece) noexcept nogil:
    """The next piece's moments join those of the ones before, of which there are work.counted elements so far."""
    cdef Py_ssize_t c
    cdef bn_fp_state state
    bn_fp_enter(&state)
    for c in range(work.statistics.channels if piece.counted > 0 else 0):
        if work.counted == 0:
            work.mean[c] = piece.mean[c]
            work.m2[c] = piece.m2[c]
        else:
            merge_moments(&work.mean[c], &work.m2[c], work.counted, piece.mean[c], piece.m2[c], piece.counted)
    work.counted += piece.counted
    bn_fp_leave(&state)


cdef void join_halves(Work *work, const Work *halves) noexcept nogil:
    """The moments of both; those of all again where the centers were too far off."""
    cdef Work again = work[0]
    cdef Py_ssize_t c
    cdef bint exact = not is_float(work.statistics.x.type), found = True
    cdef bn_fp_state state
    work.counted = halves[0].counted + halves[1].counted
    bn_fp_enter(&state)
    for c in range(work.statistics.channels):
        work.m2[c] = m2_of(
            halves[0].mean[c] + halves[1].mean[c], halves[0].m2[c] + halves[1].m2[c], work.counted, work.mean[c],
            exact, most_off(exact), &work.mean[c])
        found &= work.m2[c] == work.m2[c]
    bn_fp_leave(&state)
    if found:
        return
    again.statistic = MOMENTS
    again.mean = halves[0].mean
    again.m2 = halves[0].m2
    run(&again)
    for c in range(work.statistics.channels):
        if work.m2[c] != work.m2[c]:
            work.mean[c] = again.mean[c]
            work.m2[c] = again.m2[c]


cdef void begin_pieces(Work *work, Work *pieces, Py_ssize_t count, double *found) noexcept nogil:
    """Makes works of the statistics that `end_pieces` joins. In `found` is room for two numbers per channel of each."""
    cdef Py_ssize_t channels = work.statistics.channels, index
    cdef bint halves = in_halves(&work.statistics)
    if halves:
        work.statistic = CENTERS
        run(work)
    for index in range(count):
        pieces[index] = part_of_work(work, longest_loop(&work.statistics), index, count)
        pieces[index].mean = found + 2 * index * channels
        pieces[index].m2 = pieces[index].mean + channels
        if halves:
            pieces[index].statistic = SUMS
            memcpy(pieces[index].mean, work.mean, channels * sizeof(double))


cdef void end_pieces(Work *work, const Work *pieces, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t index
    if in_halves(&work.statistics):
        join_halves(work, pieces)
    else:
        for index in range(count):
            merge_piece(work, &pieces[index])


cdef int run_pieces(Work *work, Py_ssize_t count, int threads) except -1:
    cdef Works parts = Works.__new__(Works, count)
    found = np.empty((count, 2 * work.statistics.channels))
    cdef double *doubles = doubles_of(found)
    with nogil:
        begin_pieces(work, parts.works, count, doubles)
        if threads == 1:
            parts.work()
    if threads > 1:
        parts.run(threads)
    with nogil:
        end_pieces(work, parts.works, count)
    return 0


cdef int run_moments(Work *work, double *mean, double *m2, int threads) except -1:
    cdef Py_ssize_t pieces = pieces_of(&work.statistics)
    want_moments(work, mean, m2)
    if pieces == 1:
        run_parts(work, CHANNELS, threads)
    else:
        run_pieces(work, pieces, threads)
    return 0


cdef int run_batch(Work *work, Folded folded, double eps, int threads) except -1:
    """The statistics, folded, and y."""
    cdef bn_fp_state state
    threads = repaid(threads, 2 * size_of(&work.job))
    work.m2 = folded.row(VAR)
    work.eps = eps
    work.count = folded.count
    if is_planes(&work.job):
        work.task = BOTH
        run_parts(work, CHANNELS, threads)
        return 0
    run_moments(work, folded.row(MEAN), work.m2, threads)
    bn_fp_enter(&state)
    kernels.fold(&folded.k, folded.channels, work.m2, work.count, eps)
    bn_fp_leave(&state)
    work.job.coefficients = folded.k
    work.task = NORMALIZE
    run_parts(work, widest_loop(&work.job), threads)
    return 0


# ---- calls ------------------------------------------------------------------------------------------

cdef Py_ssize_t bytes_of(const View *view) noexcept nogil:
    """With the gaps between elements, which are read too, line by line."""
    cdef Py_ssize_t step = LINE
    cdef int d
    for d in range(view.ndim - 1, -1, -1):
        if view.shape[d] > 1 and view.strides[d] != 0:
            step = min(step, magnitude(view.strides[d]))
            if step <= view.itemsize:
                return view.len
    return elements(view) * step


cdef Py_ssize_t touched(const Arrays *arrays) noexcept nogil:
    """The bytes that a call for y reads and writes."""
    cdef Py_ssize_t bytes = bytes_of(&arrays.x)
    if arrays.residual.strides != NULL:
        bytes += arrays.residual.len
    return bytes if arrays.out.data == arrays.x.data else bytes + arrays.out.len


cdef bint come_from_memory(Py_ssize_t bytes) noexcept nogil:
    return bytes > caches - caches // 4


cdef void lay_out_y(
    Job *job, const Arrays *arrays, int at, const Coefficients *coefficients, const Activation *activation,
) noexcept nogil:
    """Arrays that were not taken have NULL strides."""
    lay_out(job, arrays.x.ndim, at, arrays.x.shape, arrays.x.strides, arrays.residual.strides, arrays.out.strides)
    job.coefficients = coefficients[0]
    job.activation = activation[0]
    # To ask for one of two arrays ahead slows the other down more than it helps.
    job.far = arrays.residual.strides == NULL and come_from_memory(touched(arrays))
    # Beside as much of x the caches would not hold y.
    job.stream = kernels.streams and arrays.out.len > caches // 2 and arrays.out.data != arrays.x.data


cdef void lay_out_statistics(Job *job, const Arrays *arrays, int at, Py_ssize_t bytes) noexcept nogil:
    """Of a call that reads and writes so many bytes."""
    lay_out(job, arrays.x.ndim, at, arrays.x.shape, arrays.x.strides, arrays.mask.strides, NULL)
    job.far = come_from_memory(bytes)


cdef object forward(
    x, Folded folded, const Activation *activation, Py_ssize_t axis, residual, dtype, out, int threads,
    double eps, bint batch, mask, Py_ssize_t counted,
):
    """y of the folded statistics or, if `batch`, of those of x, which `folded` then holds."""
    cdef Arrays arrays
    cdef Work work
    cdef Job *job = &work.job
    cdef int at
    cdef Py_ssize_t size
    at = take_input(&arrays, job, x, axis, folded.channels)
    take_mask(&arrays, &work.statistics, mask)
    take_residual(&arrays, job, residual)
    if out is None:
        out = new_out(x, job.x.type, dtype, elements(&arrays.x))
        take_array(&arrays.out, &job.out, "out", out, True, False)
        # Another thread may have reshaped x since.
        same_shape("out", &arrays.out, &arrays.x)
        claim(&arrays.out)
    else:
        take_given_out(&arrays, job, x, mask, residual, out, dtype)
    size = elements(&arrays.x)
    folded.count = 0 if size == 0 else (counted if mask is not None else size // folded.channels)
    if size == 0:
        if batch and folded.channels > 0:
            raise ValueError(f"x: expected at least one element per channel, got shape {_checks.shape(x.shape)}")
        return out
    if batch and folded.count == 0:
        raise ValueError("mask: expected at least one True, got none")
    lay_out_y(job, &arrays, at, &folded.k, activation)
    if batch:
        work.statistics.x = job.x
        lay_out_statistics(&work.statistics, &arrays, at, touched(&arrays))
        run_batch(&work, folded, eps, threads)
    else:
        work.task = NORMALIZE
        run_parts(&work, widest_loop(job), repaid(threads, size))
    return out


def normalize(x, Folded folded, activation, Py_ssize_t axis, residual, dtype, out, int threads):
    """y of given statistics."""
    cdef Activation kind = as_activation(activation)
    return forward(x, folded, &kind, axis, residual, dtype, out, threads, 0, False, None, 0)


cdef object of_arguments(
    x, mean, var, gamma, beta, eps, axis, mask, residual, activation, dtype, out, num_threads, Folded folded, bint batch,
):
    """`forward` of what users pass: what needs no look by `_checks` is not shown to it, for calls on few values."""
    cdef Activation kind
    cdef Py_ssize_t counted = 0
    cdef long at = MAX_NDIM
    cdef int ndim, overflow = 0, threads = 0
    given = out
    if type(x) is not ndarray:
        x = _checks.array("x", x)
    if type(axis) is int:
        at = PyLong_AsLongAndOverflow(axis, &overflow)
    if overflow or not -MAX_NDIM <= at < MAX_NDIM:
        at = _checks.axis(axis)
    if type(eps) is not float or not 0 <= <double> eps < INFINITY:
        eps = _checks.eps(eps)
    if residual is not None:
        residual = _checks.array("residual", residual)
    if dtype is not None:
        dtype = _checks.out_dtype(dtype)
    if out is not None and type(out) is not ndarray:
        out = _checks.out(out)
    if activation is None:
        memset(&kind, 0, sizeof(kind))
    else:
        kind = as_activation(_checks.activation(activation))
    ndim = PyArray_NDIM(<PyArrayObject *> x)
    if not -ndim <= at < ndim:
        raise _checks.wrong_axis(at, x.shape)
    folded.begin(PyArray_DIMS(<PyArrayObject *> x)[at + ndim if at < 0 else at], gamma, beta)
    if batch:
        mask, counted = _checks.mask(mask, x, at)
    else:
        folded.take_statistics(mean, var, eps)
    if batch or num_threads is not None:
        threads = _threads.resolve(num_threads)
    y = forward(x, folded, &kind, at, residual, dtype, out, threads, eps, batch, mask, counted)
    return y if given is None else given


def batch_norm(x, gamma, beta, eps, axis, mask, residual, activation, dtype, out, num_threads):
    """That of `functional`, and what holds the statistics."""
    cdef Folded folded = Folded.__new__(Folded)
    y = of_arguments(
        x, None, None, gamma, beta, eps, axis, mask, residual, activation, dtype, out, num_threads, folded, True)
    return y, folded


def batch_norm_inference(x, mean, var, gamma, beta, eps, axis, residual, activation, dtype, out, num_threads):
    """That of `functional`."""
    return of_arguments(
        x, mean, var, gamma, beta, eps, axis, None, residual, activation, dtype, out, num_threads,
        Folded.__new__(Folded), False)


def normalize_batch(
    x, Folded folded, double eps, mask, Py_ssize_t counted, activation, Py_ssize_t axis, residual, dtype, out, int threads,
):
    """y of this mini-batch's statistics, which `folded.statistics()` gives afterwards.

    `mask`, as `_checks.mask` returns it, selects what enters them: `counted` elements of each channel.
    """
    cdef Activation kind = as_activation(activation)
    return forward(x, folded, &kind, axis, residual, dtype, out, threads, eps, True, mask, counted)


def moments(x, mask, Py_ssize_t counted, Py_ssize_t axis, channels, int threads):
    """Elements per channel, and the mean and the sum of squared deviations of each."""
    cdef Arrays arrays
    cdef Work work
    cdef Job *job = &work.statistics
    cdef Py_ssize_t count = 0
    at = take_input(&arrays, job, x, axis, ABSENT if channels is None else channels)
    take_mask(&arrays, job, mask)
    mean = np.zeros(arrays.x.shape[at])
    m2 = np.zeros(arrays.x.shape[at])
    if elements(&arrays.x) > 0:
        count = elements(&arrays.x) // arrays.x.shape[at] if mask is None else counted
    if count > 0:
        lay_out_statistics(job, &arrays, at, bytes_of(&arrays.x))
        run_moments(&work, doubles_of(mean), doubles_of(m2), repaid(threads, elements(&arrays.x)))
    return count, mean, m2


def merge(
    double[::1] mean, double[::1] rest, double[::1] m2, double count,
    const double[::1] other_mean, const double[::1] other_rest, const double[::1] other_m2, double other_count,
):
    """Moments of `count` elements become those of both parts. Means are sums of two: what double holds, and the rest."""
    cdef Py_ssize_t c
    cdef double base, from_base, total, added
    cdef bn_fp_state state
    bn_fp_enter(&state)
    for c in range(mean.shape[0]):
        base = mean[c] if mean[c] - mean[c] == 0 else 0
        from_base = mean[c] - base + rest[c]
        merge_moments(&from_base, &m2[c], count, other_mean[c] - base + other_rest[c], other_m2[c], other_count)
        total = base + from_base
        added = total - base
        mean[c] = total
        rest[c] = base - (total - added) + (from_base - added)
        if rest[c] - rest[c] != 0:
            rest[c] = 0
    bn_fp_leave(&state)


cdef class Layer:
    """What a layer is between two calls with the same parameters: ready for x, residual and out.

    `_forward` of the subclass takes every other call; it folds the parameters, and `_keep` takes the result for
    the calls to come, unless the layer has got another `_version` since.
    """
    cdef public Folded _ready
    cdef public object _version

    def _keep(self, Folded folded, version, activation, Py_ssize_t axis, int threads):
        """From now on, calls with just x, residual and out normalise with `folded`; 0 threads are the default's."""
        folded.activation = as_activation(activation)
        folded.axis = axis
        folded.threads = threads
        if version is self._version:
            self._ready = folded

    def __call__(self, x, *, residual=None, mask=None, dtype=None, out=None):
        cdef Folded folded = self._ready
        if folded is None or type(x) is not ndarray or mask is not None or dtype is not None \
                or (residual is not None and type(residual) is not ndarray) \
                or (out is not None and type(out) is not ndarray):
            return self._forward(x, residual, mask, dtype, out)
        return forward(x, folded, &folded.activation, folded.axis, residual, None, out, folded.threads, 0, False, None, 0)


# ---- pictures ---------------------------------------------------------------------------------------

cdef enum:
    HEIGHT = 1
    WIDTH
    CHANNEL

cdef enum:
    MAX_CHANNELS = 1024

max_channels = MAX_CHANNELS


cdef int take_typed(View *view, Operand *operand, str name, array, bint writable, dtype, int type) except -1:
    """As `take_array`, of one dtype."""
    if array.dtype == dtype:
        take_array(view, operand, name, array, writable, True)
        if operand.type == type:
            return 0
    raise _checks.other_dtype(name, array, dtype)


cdef void set_out_shape(Py_ssize_t *to, const View *x, bint channels_last) noexcept nogil:
    """Of y for frames of shape (height, width, channels), with or without a batch before them."""
    cdef int height = x.ndim - 3
    memcpy(to, x.shape, x.ndim * sizeof(Py_ssize_t))
    if not channels_last:
        to[height] = x.shape[height + 2]
        to[height + 1] = x.shape[height]
        to[height + 2] = x.shape[height + 1]


cdef void set_strides(Py_ssize_t *to, const View *view, bint channels_last) noexcept nogil:
    """Of (batch, height, width, channels), whatever the order in the array, which may be without a batch."""
    cdef int none = 4 - view.ndim
    to[0] = 0 if none else view.strides[0]
    to[HEIGHT] = view.strides[(1 if channels_last else 2) - none]
    to[WIDTH] = view.strides[(2 if channels_last else 3) - none]
    to[CHANNEL] = view.strides[(3 if channels_last else 1) - none]


cdef void join_width(Images *images, int dim) noexcept nogil:
    """Makes one row of a dimension and the width where each row continues the one before, in x and in out."""
    cdef Py_ssize_t width = images.shape[WIDTH]
    if width == 1:
        images.x_strides[WIDTH] = images.x_strides[dim]
        images.out_strides[WIDTH] = images.out_strides[dim]
    elif images.x_strides[dim] != width * images.x_strides[WIDTH] \
            or images.out_strides[dim] != width * images.out_strides[WIDTH]:
        return
    images.shape[WIDTH] *= images.shape[dim]
    images.shape[dim] = 1


cdef void lay_out_images(
    Images *images, const View *x, const View *out, bint reverse, bint channels_last,
) noexcept nogil:
    cdef int d
    images.shape[0] = x.shape[0] if x.ndim == 4 else 1
    for d in range(HEIGHT, 4):
        images.shape[d] = x.shape[x.ndim - 4 + d]
    images.x = <const char *> x.data
    images.out = <char *> out.data
    set_strides(images.x_strides, x, True)
    set_strides(images.out_strides, out, channels_last)
    if reverse:
        images.x += (images.shape[CHANNEL] - 1) * images.x_strides[CHANNEL]
        images.x_strides[CHANNEL] = -images.x_strides[CHANNEL]
    join_width(images, HEIGHT)
    if images.shape[HEIGHT] == 1:
        join_width(images, 0)


cdef void run_images(const Images *images) noexcept nogil:
    cdef bn_fp_state state
    bn_fp_enter(&state)
    kernels.images(images)
    bn_fp_leave(&state)


cdef class ImageParts(Parts):
    """Parts of one dimension of pictures."""
    cdef Images images
    cdef int dim

    cdef void run_part(self, Py_ssize_t index) noexcept nogil:
        cdef Images part = self.images
        cdef Py_ssize_t length = self.images.shape[self.dim], start = index * length // self.count
        part.x += start * part.x_strides[self.dim]
        part.out += start * part.out_strides[self.dim]
        part.shape[self.dim] = (index + 1) * length // self.count - start
        run_images(&part)


cdef int run_images_parts(const Images *images, int threads) except -1:
    cdef Py_ssize_t size = images.shape[0] * images.shape[HEIGHT] * images.shape[WIDTH] * images.shape[CHANNEL]
    cdef ImageParts parts
    cdef int dim = 0, d
    threads = repaid(threads, size)
    if threads > 1:
        for d in (HEIGHT, WIDTH):
            dim = d if images.shape[d] > images.shape[dim] else dim
        parts = ImageParts.__new__(ImageParts, min(2 * <Py_ssize_t> threads, images.shape[dim]))
        parts.images = images[0]
        parts.dim = dim
        parts.run(threads)
    elif size >= RELEASE_GIL:
        with nogil:
            run_images(images)
    else:
        run_images(images)
    return 0


cdef class Pixels:
    """What becomes of the pixels of pictures with so many channels.

    y = x * scale + shift, in floats, and of other dtypes table[c, x]. Without a scale there is only the table.
    """
    cdef readonly Py_ssize_t channels
    cdef object dtype
    cdef int type
    cdef bint reverse, channels_last
    cdef const float[:, ::1] linear
    cdef const unsigned char[:, ::1] table
    cdef bint in_table

    def __init__(self, linear, table, dtype, bint linear_is_exact, bint reverse, bint channels_last):
        self.linear = linear
        self.channels = linear.shape[1]
        self.dtype = dtype
        self.type = type_code(dtype.num)
        self.table = None if table is None else table.view(np.uint8)
        self.in_table = not linear_is_exact
        self.reverse = reverse
        self.channels_last = channels_last

    cdef int set_images(self, Images *images, const View *x, const View *out) except -1:
        lay_out_images(images, x, out, self.reverse, self.channels_last)
        images.type = self.type
        images.scale = &self.linear[0, 0]
        images.shift = &self.linear[1, 0]
        images.in_table = self.in_table
        images.table = NULL if self.table is None else <const char *> &self.table[0, 0]
        return 0

    def __call__(self, frame, out, int threads):
        """(H, W, C) or (N, H, W, C), normalised; `out` or a new array."""
        cdef Arrays arrays
        cdef Operand operand
        cdef Py_ssize_t[4] sizes
        cdef Images images
        take_typed(&arrays.x, &operand, "frame", frame, False, np.dtype(np.uint8), UINT8)
        if arrays.x.ndim not in (3, 4) or arrays.x.shape[arrays.x.ndim - 1] != self.channels:
            raise _checks.wrong_frame([arrays.x.shape[d] for d in range(arrays.x.ndim)], self.channels)
        set_out_shape(sizes, &arrays.x, self.channels_last)
        shape = tuple([sizes[d] for d in range(arrays.x.ndim)])
        given = out is not None
        if not given:
            before = begin_keeping(elements(&arrays.x) * self.dtype.itemsize)
            try:
                out = np.empty(shape, self.dtype)
            finally:
                end_keeping(before)
        take_typed(&arrays.out, &operand, "out", out, True, self.dtype, self.type)
        got = tuple([arrays.out.shape[d] for d in range(arrays.out.ndim)])
        if got != shape:
            raise ValueError(f"out: expected shape {_checks.shape(shape)}, got {_checks.shape(got)}")
        if arrays.out.len > 0:
            if given:
                no_self_overlap(&arrays.out)
                if _checks.share_memory(frame, out):
                    raise ValueError("out: expected memory apart from that of frame, got an overlap with it")
            else:
                claim(&arrays.out)
            self.set_images(&images, &arrays.x, &arrays.out)
            run_images_parts(&images, threads)
        return out


# ---- calls from C: `bn_c.h` says what they do ---------------------------------------------------------

cdef enum:
    FOLDED = 0x626e5f63         # how parameters from fold begin


cdef struct Params:
    # Of eight bytes each, as the rows that follow are.
    int64_t mark
    int64_t channels
    int64_t wide


cdef int take_from_c(
    View *view, Operand *operand, const bn_array *array, bint integers, const View *like,
) noexcept nogil:
    """As `take_array`, and with the shape of `like` if that is not NULL."""
    cdef int d
    cdef bint empty = False
    if array == NULL:
        return BN_NULL
    if array.type < FLOAT32 or array.type > (INT16 if integers else FLOAT16):
        return BN_BAD_TYPE
    if array.ndim < 1 or array.ndim > MAX_NDIM:
        return BN_BAD_NDIM
    if array.shape == NULL:
        return BN_NULL
    operand.type = array.type
    operand.data = <char *> array.data
    view.data = <char *> array.data
    view.ndim = array.ndim
    view.shape = array.shape
    view.strides = array.strides if array.strides != NULL else &view.own_strides[0]
    view.itemsize = view.len = size_of_type(array.type)
    for d in range(array.ndim - 1, -1, -1):
        view.own_strides[d] = view.len
        if array.shape[d] < 0 or (array.shape[d] > 0 and view.len > PY_SSIZE_T_MAX // array.shape[d]):
            return BN_BAD_SHAPE
        if array.shape[d] == 0:
            empty = True
        else:
            view.len *= array.shape[d]
    if empty:
        view.len = 0
    if like != NULL and not has_shape_of(like, view):
        return BN_BAD_SHAPE
    if array.data == NULL and not empty:
        return BN_NULL
    return BN_OK if is_aligned(view) else BN_UNALIGNED


cdef bint is_activation(const Activation *activation) noexcept nogil:
    if activation.kind == CLIP:
        return activation.low <= activation.high
    if activation.kind == LEAKY_RELU:
        return isfinite(activation.slope)
    return activation.kind == IDENTITY or activation.kind == HARD_SWISH


cdef size_t params_size_from_c(Py_ssize_t channels) noexcept nogil:
    if channels < 0 or channels > PY_SSIZE_T_MAX // 64:
        return 0
    return sizeof(Params) + size_of_parameters(channels)


cdef int fold_from_c(
    bn_params *memory, Py_ssize_t channels, const double *mean, const double *var,
    const double *gamma, const double *beta, double eps,
) noexcept nogil:
    cdef Params *params = <Params *> memory
    cdef Coefficients k
    cdef Py_ssize_t c
    if params_size_from_c(channels) == 0:
        return BN_BAD_CHANNELS
    if params == NULL or (channels > 0 and (mean == NULL or var == NULL)):
        return BN_NULL
    if <size_t> params % sizeof(double):
        return BN_BAD_PARAMS
    if not 0 <= eps < INFINITY:
        return BN_BAD_EPS
    k = coefficients_in(<double *> (params + 1), channels)
    for c in range(channels):
        k.mean[c] = mean[c]
        k.gamma[c] = gamma[c] if gamma != NULL else 1
        k.beta[c] = beta[c] if beta != NULL else 0
    fold(&k, channels, var, eps)
    params[0] = Params(mark=FOLDED, channels=channels, wide=k.wide)
    return BN_OK


cdef int normalize_from_c(
    const bn_params *memory, const bn_array *x, int axis, const bn_array *residual, const Activation *activation,
    const bn_array *out,
) noexcept nogil:
    cdef const Params *params = <const Params *> memory
    cdef Activation identity
    cdef Arrays arrays
    cdef Coefficients k
    cdef Work work
    cdef Job *job = &work.job
    cdef int at, error
    if params == NULL:
        return BN_NULL
    if <size_t> params % sizeof(double) or params.mark != FOLDED:
        return BN_BAD_PARAMS
    memset(&identity, 0, sizeof(identity))
    if activation == NULL:
        activation = &identity
    if not is_activation(activation):
        return BN_BAD_ACTIVATION
    job.residual.data = NULL
    arrays.residual.strides = NULL
    error = take_from_c(&arrays.x, &job.x, x, True, NULL)
    if error == BN_OK and residual != NULL:
        error = take_from_c(&arrays.residual, &job.residual, residual, False, &arrays.x)
    if error == BN_OK:
        error = take_from_c(&arrays.out, &job.out, out, False, &arrays.x)
    if error != BN_OK:
        return error
    at = axis_of(&arrays.x, axis)
    if at == ABSENT:
        return BN_BAD_AXIS
    if arrays.x.shape[at] != params.channels:
        return BN_BAD_CHANNELS
    if elements(&arrays.x) == 0:
        return BN_OK
    if overlaps_itself(&arrays.out) or not is_apart_or_same(&arrays.x, &arrays.out) \
            or (residual != NULL and not is_apart_or_same(&arrays.residual, &arrays.out)):
        return BN_OVERLAP
    k = coefficients_in(<double *> (params + 1), params.channels)
    k.wide = params.wide
    lay_out_y(job, &arrays, at, &k, activation)
    work.task = NORMALIZE
    run(&work)
    return BN_OK


cdef int moments_from_c(const bn_array *x, int axis, Py_ssize_t *count, double *mean, double *m2) noexcept nogil:
    cdef Arrays arrays
    cdef Work work
    cdef Job *job = &work.statistics
    cdef Work *parts
    cdef Py_ssize_t channels, pieces, index
    cdef int at, error
    if count == NULL or mean == NULL or m2 == NULL:
        return BN_NULL
    job.residual.data = job.out.data = NULL
    arrays.mask.strides = NULL
    error = take_from_c(&arrays.x, &job.x, x, True, NULL)
    if error != BN_OK:
        return error
    at = axis_of(&arrays.x, axis)
    if at == ABSENT:
        return BN_BAD_AXIS
    channels = arrays.x.shape[at]
    if elements(&arrays.x) == 0:
        count[0] = 0
        memset(mean, 0, channels * sizeof(double))
        memset(m2, 0, channels * sizeof(double))
        return BN_OK
    lay_out_statistics(job, &arrays, at, bytes_of(&arrays.x))
    count[0] = elements(&arrays.x) // channels
    want_moments(&work, mean, m2)
    pieces = pieces_of(job)
    if pieces == 1:
        run(&work)
        return BN_OK
    parts = <Work *> malloc(pieces * (sizeof(Work) + 2 * channels * sizeof(double)))
    if parts == NULL:
        return BN_NO_MEMORY
    begin_pieces(&work, parts, pieces, <double *> (parts + pieces))
    for index in range(pieces):
        run(&parts[index])
    end_pieces(&work, parts, pieces)
    free(parts)
    return BN_OK


cdef int normalize_images_from_c(
    const bn_array *frames, const float *scale, const float *shift, int reverse, int channels_last, const bn_array *out,
) noexcept nogil:
    cdef View x, y, like
    cdef Operand operand
    cdef Py_ssize_t[4] shape
    cdef Images images
    cdef int error
    if scale == NULL or shift == NULL:
        return BN_NULL
    error = take_from_c(&x, &operand, frames, True, NULL)
    if error != BN_OK:
        return error
    if operand.type != UINT8:
        return BN_BAD_TYPE
    if x.ndim != 3 and x.ndim != 4:
        return BN_BAD_NDIM
    if not 1 <= x.shape[x.ndim - 1] <= MAX_CHANNELS:
        return BN_BAD_CHANNELS
    set_out_shape(shape, &x, channels_last)
    like.ndim = x.ndim
    like.shape = shape
    error = take_from_c(&y, &operand, out, False, &like)
    if error != BN_OK:
        return error
    if operand.type != FLOAT32:
        return BN_BAD_TYPE
    if elements(&x) == 0:
        return BN_OK
    if overlaps_itself(&y) or not is_apart_or_same(&x, &y):
        return BN_OVERLAP
    lay_out_images(&images, &x, &y, reverse, channels_last)
    images.type = FLOAT32
    images.scale = scale
    images.shift = shift
    images.in_table = False
    images.table = NULL
    run_images(&images)
    return BN_OK


cdef const char *error_text_for_c(int error) noexcept nogil:
    if error == BN_OK:
        return "no error"
    if error == BN_NULL:
        return "expected an argument with data and a shape, got NULL"
    if error == BN_BAD_CHANNELS:
        return "channels: expected 0 or more, as many as the parameters have; frames: 1 to 1024"
    if error == BN_BAD_EPS:
        return "eps: expected a finite number >= 0"
    if error == BN_BAD_PARAMS:
        return "params: expected memory aligned to 8 bytes that fold has filled"
    if error == BN_BAD_TYPE:
        return "type: expected float32, float16 or, for x alone, uint8, int8, uint16 or int16; frames: uint8 to float32"
    if error == BN_BAD_NDIM:
        return "ndim: expected 1 to 32 dimensions; frames: 3 or 4"
    if error == BN_BAD_SHAPE:
        return "shape: expected sizes >= 0, the same for x, residual and out; frames: out as channels_last says"
    if error == BN_BAD_AXIS:
        return "axis: expected -ndim to ndim - 1"
    if error == BN_BAD_ACTIVATION:
        return "activation: expected a known kind, low <= high, a finite slope"
    if error == BN_UNALIGNED:
        return "expected aligned elements, got unaligned data or strides"
    if error == BN_OVERLAP:
        return "out: expected x or residual itself or memory apart from all that is read, got an overlap"
    if error == BN_NO_MEMORY:
        return "out of memory"
    return "unknown error"


cdef bn_api api
api.abi = BN_C_ABI
api.size = sizeof(bn_api)
api.params_size = params_size_from_c
api.fold = fold_from_c
api.normalize = normalize_from_c
api.moments = moments_from_c
api.error_text = error_text_for_c
api.normalize_images = normalize_images_from_c
c_api = PyCapsule_New(&api, "bn_c._core.c_api", NULL)
