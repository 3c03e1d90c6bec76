"""The same input gives the same bits: instruction sets, threads, in place or not, alignment, layout, parts.

    python tests/test_bits.py [HASH]

prints the hash of all results on this machine and the instruction set in use, so that machines can be
compared; given a hash, its exit status says whether it is that one. Inputs are made of integers, so that they
are the same everywhere. Of NaN only that it is one counts.
"""

import functools
import hashlib
import itertools
import sys

import numpy as np
import pytest
from oracle import ACTIVATIONS, FLOATS, INTEGERS, LAYOUTS, bits, channels_last, scattered

import bn_c
from bn_c import _core, _dispatch


def integers(seed, shape, width=24):
    """Numbers of so many bits around zero, the same with every NumPy."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return (raw >> np.uint64(64 - width)).astype(np.int64).reshape(shape) - (1 << width - 1)


def numbers(seed, shape, dtype="f4"):
    """Any dtype, exact: floats from -8 to 8, integers over their whole range."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        width = 11 if dtype.itemsize == 2 else 24
        return (integers(seed, shape, width) / (1 << width - 4)).astype(dtype)
    return integers(seed, shape, 16).astype(np.int16).view(np.uint16).astype(dtype)


# ---- one hash of everything -------------------------------------------------------------------------

SHAPES = [
    (1, 1), (7, 5), (33, 65), (1000, 4), (9, 300), (5001, 1), (3001, 13), (300, 257),
    (1, 3, 1, 1), (4, 3, 17, 19), (2, 64, 31, 33), (3, 300, 7), (2, 5, 70, 71), (2, 3, 200, 301), (70, 3, 61),
    (9, 18, 14, 14), (3, 5, 13, 13), (17, 3, 28, 28), (1, 40, 7, 7), (2, 520, 3, 5), (5, 7, 14, 14), (19, 5, 17, 17),
]  # fmt: skip
# Enough elements for several threads, as planes and as rows, many and few.
LARGE = [
    (1, 1, 801, 1009), (2, 30, 101, 103), (700, 7, 127), (100_003, 7), (1031, 517), (3, 200_003),
    (261, 1024), (653, 384), (2001, 128), (3001, 128),
]  # fmt: skip
EXTREMES = ["offset", "huge", "tiny", "subnormal", "not finite", "constant", "mixed"]


def extreme(kind, seed, shape):
    x = numbers(seed, shape)
    match kind:
        case "offset":
            return x + np.float32(1 << 20)
        case "huge":
            return x * np.float32(2.0**124)
        case "tiny":
            return x * np.float32(2.0**-100)
        case "subnormal":
            return x * np.float32(2.0**-135)
        case "constant":
            return x * 0 + np.float32(0.1)
    x.reshape(-1)[::101] *= np.float32(2.0**100)
    if kind == "not finite":
        x.reshape(-1)[5::1009] = np.nan
        x.reshape(-1)[7::2003] = np.inf
    return x


def inputs():
    """x, its axis, and a number that chooses the options."""
    choice = itertools.count()
    for seed, (shape, dtype) in enumerate(itertools.product(SHAPES, FLOATS + INTEGERS)):
        x = numbers(seed, shape, dtype)
        yield x, 1, next(choice)
        yield scattered(x, channels_last(x.ndim)), 1, next(choice)
        yield scattered(x, steps=(2, *(-1,) * (x.ndim - 1)), pads=(0, *(1,) * (x.ndim - 1))), 1, next(choice)
        yield x, 0, next(choice)
    for seed, (shape, dtype) in enumerate(itertools.product(LARGE, ["f4", "f2", "u1"])):
        x = numbers(seed, shape, dtype)
        yield x, 1, next(choice)
        yield scattered(x, channels_last(x.ndim)), 1, next(choice)
    for seed, (shape, kind) in enumerate(itertools.product(SHAPES, EXTREMES)):
        x = extreme(kind, seed, shape)
        yield x, 1, next(choice)
        yield scattered(x, channels_last(x.ndim)), 1, next(choice)


def results(x, axis, choice, num_threads):
    """Both functions and the statistics, with options that change from call to call."""
    channels = x.shape[axis]
    mean, gamma, beta = (numbers(choice + i, channels, "f8") for i in range(3))
    var = (integers(choice + 3, channels) % 4096 + 1) / 1024
    options = {
        "axis": axis,
        "gamma": gamma if choice % 7 else None,
        "beta": beta if choice % 5 else None,
        "residual": numbers(choice, x.shape, FLOATS[choice % 2]) if choice % 3 == 0 else None,
        "activation": ACTIVATIONS[choice % len(ACTIVATIONS)],
        "dtype": [None, "f4", "f2"][choice // 2 % 3],
        "num_threads": num_threads,
    }
    yield bn_c.batch_norm_inference(x, mean, var, **options)
    y, stats = bn_c.batch_norm(x, **options, return_stats=True)
    yield from (y, stats.mean, stats.var)
    stats = bn_c.batch_stats(x, axis=axis, num_threads=num_threads)
    yield from (stats.mean, stats.var)


# Frames of every way through the loops: several threads' pixels, an alpha that is skipped, flips, planes.
FRAMES = {
    "pixels": lambda c: numbers(1, (max(31, 900 // c), 301, c), "u1"),
    "crop": lambda c: numbers(2, (21, 37, c + 1), "u1")[3:, 5:, :c],
    "flip": lambda c: numbers(3, (2, 11, 67, c), "u1")[:, ::-1, ::-1],
    "planes": lambda c: numbers(4, (c, 11, 67), "u1").transpose(1, 2, 0),
}
QUANT = {"float32": None, "float16": None, "uint8": (0.25, 113), "int8": (3 / 128, -7)}


def pictures(num_threads):
    """Of every dtype and layout."""
    for channels, name in itertools.product([1, 2, 3, 4, 5, 67], FRAMES):
        frame = FRAMES[name](channels)
        mean, std = numbers(5, channels, "f8"), (integers(6, channels) % 4096 + 1) / 2048
        for layout, reverse, dtype in itertools.product(["NCHW", "NHWC"], [False, True], QUANT):
            options = {"layout": layout, "reverse_channels": reverse, "dtype": dtype, "quant": QUANT[dtype]}
            yield bn_c.ImageNormalizer(mean, std, **options, num_threads=num_threads)(frame)


def digest(num_threads=1):
    total = hashlib.sha256()
    for result in pictures(num_threads):
        total.update(bits(result))
    for x, axis, choice in inputs():
        for result in results(x, axis, choice, num_threads):
            total.update(bits(result))
    return total.hexdigest()


@functools.cache
def baseline_digest():
    _dispatch.use(bn_c.supported_isas()[0])
    return digest()


def test_one_hash_on_every_instruction_set(isa):
    baseline = baseline_digest()
    _dispatch.use(isa)
    print(isa, baseline)
    assert digest() == baseline


def test_one_hash_with_any_number_of_threads(isa):
    baseline = baseline_digest()
    _dispatch.use(isa)
    for num_threads in (2, 3):
        assert digest(num_threads) == baseline


# ---- what must not matter ---------------------------------------------------------------------------


def batch_norm(x, **options):
    y, stats = bn_c.batch_norm(x, numbers(1, x.shape[1]), numbers(2, x.shape[1]), return_stats=True, **options)
    return y, stats.mean, stats.var


def given(channels):
    """Parameters and statistics of so many channels."""
    mean, gamma, beta = (numbers(seed, channels, "f8") for seed in (1, 2, 3))
    return {"mean": mean, "var": (integers(4, channels) % 4096 + 1) / 1024, "gamma": gamma, "beta": beta}


def inference(x, **options):
    return (bn_c.batch_norm_inference(x, **given(x.shape[1]), **options),)


def all_bits(results):
    return [bits(result) for result in results]


both = pytest.mark.parametrize("call", [batch_norm, inference])
activations = pytest.mark.parametrize("activation", [None, "relu", "hard_swish"])
floats = pytest.mark.parametrize("dtype", FLOATS)
SHAPE = (3, 21, 9, 233)


@both
@floats
@activations
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_or_not(isa, call, layout, dtype, activation):
    x = LAYOUTS[layout](numbers(0, SHAPE, dtype))
    expected = all_bits(call(x, activation=activation))
    assert all_bits(call(x, activation=activation, out=x)) == expected


@both
@floats
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_out(isa, call, layout, dtype):
    x, residual = numbers(0, SHAPE, dtype), numbers(1, SHAPE, dtype)
    expected = all_bits(call(x, residual=residual))
    assert all_bits(call(x, residual=residual, out=LAYOUTS[layout](np.zeros_like(x)))) == expected


@both
@floats
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_residual(isa, call, layout, in_place, dtype):
    x, residual = numbers(0, SHAPE, dtype), numbers(1, SHAPE, dtype)
    expected = all_bits(call(x, residual=residual))
    residual = LAYOUTS[layout](residual)
    assert all_bits(call(x, residual=residual, out=residual if in_place else None)) == expected


@both
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("shape", [(3, 5, 9, 233), (41, 67), (70, 3)])
def test_any_alignment(isa, call, shape, dtype):
    x, residual = numbers(0, shape, dtype), numbers(1, shape, "f2")
    expected = all_bits(call(x, residual=residual))
    for first in range(1, 35):
        moved, out = scattered(x, first=first), scattered(np.zeros(shape, np.result_type(dtype, "f2")), first=first)
        moved_residual = scattered(residual, first=first)
        assert all_bits(call(moved, residual=residual)) == expected
        if dtype in FLOATS:
            assert all_bits(call(x, residual=residual, out=out)) == expected
        assert all_bits(call(x, residual=moved_residual)) == expected


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_in_inference(isa, layout, dtype, out_dtype):
    x, residual = numbers(0, SHAPE, dtype), numbers(1, SHAPE)
    options = {"residual": residual, "activation": "hard_swish", "dtype": out_dtype}
    assert all_bits(inference(LAYOUTS[layout](x), **options)) == all_bits(inference(x, **options))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 64, 128])
def test_channels_in_reverse(isa, channels, dtype):
    """BGR, as OpenCV reads it, as RGB."""
    x = numbers(0, (2, 37, 23, channels), dtype)
    reverse, copy = x[..., ::-1], x[..., ::-1].copy()
    options = {**given(channels), "axis": -1}
    assert bits(bn_c.batch_norm_inference(reverse, **options)) == bits(bn_c.batch_norm_inference(copy, **options))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_any_axis_in_inference(isa, axis):
    x = numbers(0, (5, 21, 9, 33))
    moved = np.moveaxis(x, 1, axis)
    y = bn_c.batch_norm_inference(moved, **given(21), axis=axis)
    assert bits(np.moveaxis(y, axis, 1)) == bits(*inference(x))


@floats
@pytest.mark.parametrize("dim", [0, 2, 3])
@pytest.mark.parametrize("layout", ["c", "channels_last", "negative"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_any_split_in_inference(isa, layout, dim, parts, dtype):
    x = LAYOUTS[layout](numbers(0, (7, 21, 9, 133), dtype))
    pieces = [inference(part)[0] for part in np.array_split(x, parts, dim)]
    assert bits(np.concatenate(pieces, dim)) == bits(*inference(x))


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("axis", [1, -1])
def test_each_channel_by_itself_in_inference(isa, axis, kind):
    """Whatever the other channels hold, also parameters outside the range of float."""
    x = np.moveaxis(extreme(kind, 0, (4, 6, 131)), 1, axis)
    parameters = given(6)
    parameters["var"][2], parameters["gamma"][3], parameters["beta"][4] = 1e-80, 1e300, -2e38
    y = bn_c.batch_norm_inference(x, **parameters, axis=axis)
    for c in range(6):
        alone = {name: a[c : c + 1] for name, a in parameters.items()}
        part = bn_c.batch_norm_inference(np.take(x, [c], axis), **alone, axis=axis)
        assert bits(part) == bits(np.take(y, [c], axis))


@both
def test_twice(isa, call):
    x = numbers(0, SHAPE)
    assert all_bits(call(x)) == all_bits(call(x))


if __name__ == "__main__":
    _core.wake_threads_from(1)
    hash_of_all = digest()
    print(hash_of_all, bn_c.isa)
    sys.exit(len(sys.argv) > 1 and sys.argv[1] != hash_of_all)
