"""No loop reads or writes a byte outside its arrays: they end, or begin, at pages that no one may touch."""

import ctypes
import faulthandler
import os
import signal

import numpy as np
import pytest
from guard import CANARY, Guarded, guarded
from oracle import FLOATS, INTEGERS, LAYOUTS, bits, values
from processes import isolated

import bn_c
from bn_c import _dispatch

MOST = 4 * 512 + 3  # elements: four times what the loops take at a time, and some
BLOCKS = {block * 4096 + d for block in range(1, 5) for d in (-33, -32, -31, -3, -1, 0, 1, 3, 31, 32, 33)}
# The shape of n elements on each way through the loops; channels are on axis 1.
SHAPES = {
    "plane": lambda n: (1, 1, n),
    "planes": lambda n: (2, 3, n // 6),
    "row": lambda n: (1, n),
    "rows": lambda n: (4, n // 4),
    "few channels": lambda n: (n // 3, 3),
    "short planes": lambda n: (4, n // 36, 9),
    "many planes": lambda n: (9, 2, n // 18),
}
TYPES = [("f4", "f4"), ("f2", "f2"), ("f2", "f4"), ("f4", "f2"), ("u1", "f4"), ("i1", "f2"), ("u2", "f4"), ("i2", "f2")]
AROUND = 64  # bytes beside an array that are looked at


@pytest.fixture
def places(thorough):
    """Where arrays of n elements are put: at the end or not, and how many elements from the page there."""
    if thorough:
        return lambda n: [(at_end, offset) for at_end in (True, False) for offset in range(16)]
    return lambda n: [(True, 0), (n % 2 == 0, n // 2 % 16)]


@pytest.fixture
def sizes(thorough):
    """All of them, or those around whole registers, lines and chunks."""
    return [n for n in range(MOST + 1) if thorough or n < 140 or n % 64 in (63, 0, 1, 31) or n % 512 in (3, 9, 17, 500)]


class Memory(Guarded):
    """One piece for arrays of many sizes; its canaries are numbers of any type."""

    def __init__(self, dtype, most):
        self.dtype = np.dtype(dtype)
        super().__init__((most + 16) * self.dtype.itemsize + 2 * AROUND)

    def place(self, shape, at_end, offset):
        size, gap = int(np.prod(shape)) * self.dtype.itemsize, offset * self.dtype.itemsize
        self.first = self.size - size - gap if at_end else gap
        self.behind = self.first + size
        return np.ndarray(shape, self.dtype, self.bytes, self.first)

    def unharmed(self):
        """Beside the last array; it is made one of canaries again."""
        before = self.bytes[max(0, self.first - AROUND) : self.first]
        after = self.bytes[self.behind : self.behind + AROUND]
        self.bytes[self.first : self.behind] = CANARY
        return bool((before == CANARY).all() and (after == CANARY).all())


def sweep(call, shape_of, sizes, places, *types):
    """The call with arrays of all sizes at all places, the last of them one that is written."""
    *inputs, out = (Memory(dtype, sizes[-1]) for dtype in types)
    for n in sizes:
        shape = shape_of(n)
        for at_end, offset in places(n):
            arrays = [memory.place(shape, at_end, offset) for memory in inputs]
            call(*arrays, out.place(shape, at_end, (offset * 7 + n) % 16 if offset else 0))
            assert out.unharmed(), f"written outside {shape} of {types}, {offset} elements from the page"
    assert not out.written()
    assert not any(memory.written() for memory in inputs)


def inference(**options):
    """The layer's call, which is the shortest way to the loops."""
    layers = {}

    def call(x, *residual_and_out):
        channels = x.shape[1]
        if channels not in layers:
            layers.clear()
            layers[channels] = bn_c.BatchNorm(channels, **options)
        *residual, out = residual_and_out
        layers[channels](x, residual=residual[0] if residual else None, out=out)

    return call


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size(isa, shape, types, sizes, places):
    isolated(sweep, inference(), SHAPES[shape], sizes, places, *types)


def test_every_second_float_of_every_size(isa, sizes, places):
    """Nothing is read behind the last of them."""
    call = inference()

    def every_second(x, out):
        call(x[..., ::2], out[..., : (x.shape[-1] + 1) // 2])

    isolated(sweep, every_second, lambda n: (1, 1, n), sizes, places, "f4", "f4")


@pytest.mark.parametrize("types", TYPES[:4], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_past_the_caches(isa, shape, types, sizes, places):
    """As outputs larger than the caches are written."""
    _dispatch.use(isa, 0)
    isolated(sweep, inference(), SHAPES[shape], sizes, places, *types)


@pytest.mark.parametrize("residual", FLOATS)
@pytest.mark.parametrize("types", TYPES[:4], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_size_with_residual(isa, shape, types, residual, sizes, places):
    call = inference(activation="relu")
    isolated(sweep, call, SHAPES[shape], sizes, places, types[0], residual, types[1])


def statistics(x, _):
    bn_c.batch_stats(x)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_of_every_size(isa, shape, dtype, sizes, places):
    isolated(sweep, statistics, SHAPES[shape], [*sizes, *sorted(BLOCKS)], places, dtype, "f4")


def masked_statistics():
    """Of two thirds of the elements of each channel."""
    memory = Memory("?", MOST)

    def call(x, _):
        mask = memory.place((*x.shape[:1], *x.shape[2:]), x.size % 2 == 0, x.size // 2 % 16)
        mask.flat = [True, True, False]
        bn_c.batch_stats(x, mask=mask)

    return call


@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_masked_statistics_of_every_size(isa, shape, dtype, sizes, places):
    isolated(sweep, masked_statistics(), SHAPES[shape], sizes, places, dtype, "f4")


def pictures(channels, layout, **options):
    prepare = bn_c.ImageNormalizer([0.5] * channels, [0.25] * channels, layout=layout, **options)

    def call(frame, out):
        height, width, _ = frame.shape
        prepare(frame, out=out if layout == "NHWC" else out.reshape(channels, height, width))

    return call


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"dtype": "int8", "quant": (0.1, 3)}], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("height", [1, 3])
def test_pictures_of_every_size(isa, height, channels, layout, options, sizes, places):
    def shape_of(n):
        return height, n // (height * channels), channels

    call = pictures(channels, layout, reverse_channels=True, **options)
    isolated(sweep, call, shape_of, sizes, places, "u1", options.get("dtype", "float32"))


# ---- every layout -----------------------------------------------------------------------------------


def every_place(act, *arrays):
    for at_end in (True, False):
        for offset in range(16):
            act(*[guarded(a, at_end, offset * a.itemsize) for a in arrays])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, batch, layout, rng):
    shape = (2, 3, 5, 7)
    out, residual = (LAYOUTS[layout](values(rng, shape, dtype)) for dtype in ("f2", "f4"))
    parameters = [np.ones(3, name) for name in ("f4", "f8", "f2", "f4")]

    def act(*places):
        (x, residual, out, mean, var, gamma, beta), memories = zip(*places, strict=True)
        if batch:
            bn_c.batch_norm(x, gamma, beta, residual=residual, out=out)
        else:
            bn_c.batch_norm_inference(x, mean, var, gamma, beta, residual=residual, out=out)
        assert not memories[2].written(out)

    def every_type():
        for dtype in FLOATS + INTEGERS:
            every_place(act, LAYOUTS[layout](values(rng, shape, dtype)), residual, out, *parameters)

    isolated(every_type)


@pytest.mark.parametrize("shape", [(2, 5, 257), (2, 5, 16, 9), (130, 5), (3, 700)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place(isa, batch, shape, dtype, rng):
    x = values(rng, shape, dtype)
    expected = bits(bn_c.BatchNorm(shape[1], training=batch)(x))

    def act(guarded_x):
        array, memory = guarded_x
        assert bits(bn_c.BatchNorm(shape[1], training=batch)(array, out=array)) == expected
        assert not memory.written(array)

    isolated(every_place, act, x)


@pytest.mark.parametrize("shape", [(3, 5, 150, 151), (70_001, 5), (3, 90_001), (300, 17, 63)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_of_several_threads(isa, batch, shape, dtype, rng):
    x = values(rng, shape, dtype)

    def act():
        for at_end in (True, False):
            array, _ = guarded(x, at_end)
            out, memory = guarded(np.zeros_like(x), at_end)
            layer = bn_c.BatchNorm(shape[1], training=batch, num_threads=3)
            assert bits(layer(array, out=out)) == bits(layer.eval()(x) if not batch else out)
            assert not memory.written(out)

    isolated(act)


# ---- that it can fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("access", [lambda at: ctypes.string_at(at, 1), lambda at: ctypes.memset(at, 0, 1)])
def test_an_access_beyond_is_the_end(access, at_end):
    a, _ = guarded(np.zeros(7, "f2"), at_end)
    at = a.ctypes.data + (a.nbytes if at_end else -1)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        access(at)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (-signal.SIGSEGV, -signal.SIGBUS)


def test_a_write_beside_the_elements_is_seen():
    a, memory = guarded(LAYOUTS["sliced"](np.zeros((2, 3, 5), "f4")), gap=8)
    assert not memory.written(a)
    memory.bytes[-1] = 0
    assert memory.written(a) == 1
