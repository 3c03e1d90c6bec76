"""What the tests compare with: `bn_c.definition` in float64, and the bounds that the contract promises.

NumPy only, so that what uses it also runs where pytest does not.
"""

import pickle

import numpy as np

import bn_c
from bn_c import _dispatch, definition

FLOATS = ("f4", "f2")
INTEGERS = ("u1", "i1", "u2", "i2")
CACHES = (_dispatch.LAST_CACHE, 0)  # arrays are taken to be in them, or in memory
ACTIVATIONS = (None, "relu", "relu6", "hard_swish", ("leaky_relu", 0.125), ("clip", -0.75, 1.25))

# y: six roundings to float of the terms that are added, and one to the output.
ROUNDINGS = 6 * 2.0**-24
# Statistics of floats: five roundings to float in the squares of var, a few in double in mean.
MEAN_ERROR = 2e-7
VAR_ERROR = 3e-7
# Statistics of integers, and merged ones: double throughout.
DOUBLE_ERROR = 1e-12

# Where infinity begins in each output dtype: the power of two after the largest number.
LIMIT = {2: 2.0**16, 4: 2.0**128}
DIGITS = {2: 11, 4: 24}
SMALLEST_EXPONENT = {2: -13, 4: -125}

# Lengths around every number of lanes, block and buffer, primes, and one.
LANES = sorted({1, 97, 251, *(lanes + d for lanes in (4, 8, 16, 32, 64) for d in (-1, 0, 1))})
BLOCKS = sorted(length + d for length in (256, 512, 1024, 4096) for d in (-1, 0, 1))


def others(ndim, axis):
    """All axes but that of the channels."""
    return tuple(d for d in range(ndim) if d != axis % ndim)


def per_channel(values, ndim, axis):
    """A vector of one value per channel, to broadcast against an array of that many dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.reshape(values, shape)


def activated(y, activation):
    """The activations as the contract names them, NaN staying NaN."""
    match activation:
        case None:
            return y
        case "relu":
            return np.maximum(y, 0)
        case "relu6":
            return np.clip(y, 0, 6)
        case "hard_swish":
            # Outside [-3, 3] it is 0 or y; the product with an infinite y would be NaN.
            return np.where(y <= -3, 0, np.where(y >= 3, y, y * (y + 3) / 6))
        case "leaky_relu", slope:
            return np.where(y > 0, y, slope * y)
        case "clip", low, high:
            return np.clip(y, low, high)
    raise AssertionError(activation)


def half_ulp(exact, itemsize):
    """Half the distance of two neighbours of that size, near each number."""
    _, exponent = np.frexp(exact)
    smallest = SMALLEST_EXPONENT[itemsize]
    exponent = np.where(exact == 0, smallest, np.maximum(exponent, smallest))
    return np.ldexp(0.5, exponent - DIGITS[itemsize])


def overflowed(y):
    """Numbers that float32 does not hold are infinite."""
    return np.where(np.abs(y) >= LIMIT[4] * (1 - 2.0**-25), np.copysign(np.inf, y), y)


def assert_forward(y, x, mean, var, gamma=None, beta=None, eps=1e-5, axis=1, residual=None, activation=None):
    """y is within its bound of the definition in float64, with the given statistics."""
    gamma = 1.0 if gamma is None else np.asarray(gamma, np.float64)
    beta = 0.0 if beta is None else np.asarray(beta, np.float64)
    residual = 0.0 if residual is None else residual.astype(np.float64)
    x, mean, var = (np.asarray(a, np.float64) for a in (x, mean, var))
    with np.errstate(all="ignore"):
        scaled = definition.normalized(x, mean, var, gamma, 0.0, eps, axis)
        shift = per_channel(beta, x.ndim, axis)
        exact = activated(overflowed(overflowed(scaled + shift) + residual), activation)
        size = np.abs(scaled) + np.abs(shift) + np.abs(residual)
    limit = LIMIT[y.itemsize]
    finite = np.isfinite(size)
    measured = finite | np.isfinite(exact)  # activations have finite bounds
    bound = np.where(finite, ROUNDINGS * np.minimum(size, LIMIT[4]), 0)
    bound += half_ulp(np.nan_to_num(exact), y.itemsize) + 2.0**-149  # subnormals round at each step
    got, exact = np.clip(y.astype(np.float64), -limit, limit), np.clip(exact, -limit, limit)
    right = np.where(measured, np.abs(got - exact) <= bound, got == exact) | (np.isnan(got) & np.isnan(exact))
    if not right.all():
        at = tuple(int(i) for i in np.argwhere(~right)[0])
        raise AssertionError(
            f"{np.count_nonzero(~right)} of {y.size} wrong; y{list(at)} = {y[at]!r}, exactly {exact[at]!r}, "
            f"{abs(got[at] - exact[at]) / bound[at]:.3g} bounds apart"
        )


def exact_statistics(x, axis):
    """Mean and variance: of integers by integer arithmetic, of floats by two passes in float64."""
    if x.dtype.kind == "f":
        return definition.statistics(x.astype(np.float64), axis)
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(np.int64)
    count = len(rows)
    sums, squares = rows.sum(0).tolist(), (rows * rows).sum(0).tolist()
    var = [(count * q - s * s) / count**2 for s, q in zip(sums, squares, strict=True)]
    return np.array(sums) / count, np.array(var)


def assert_statistics(stats, x, axis=1):
    """The statistics of finite x are within their bounds, and exact where all values are the same."""
    mean, var = exact_statistics(x, axis)
    largest = np.abs(x.astype(np.float64)).max(others(x.ndim, axis))
    mean_error, var_error = (MEAN_ERROR, VAR_ERROR) if x.dtype.kind == "f" else (DOUBLE_ERROR, DOUBLE_ERROR)
    assert stats.count == x.size // x.shape[axis]
    assert np.all(np.abs(stats.mean - mean) <= mean_error * largest)
    assert np.all(np.abs(stats.var - var) <= var_error * var)


def check(
    x, *, batch, mean=None, var=None, gamma=None, beta=None, eps=1e-5, axis=1, residual=None, activation=None,
    dtype=None, out=None, num_threads=None,
):  # fmt: skip
    """Calls one of the two functions and checks all that any result has to fulfil; returns y.

    In inference the statistics are by default the exact ones of x.
    """
    inputs = {name: a for name, a in (("x", x), ("residual", residual)) if a is not None}
    before = {name: np.array(a) for name, a in inputs.items()}
    options = {
        "eps": eps, "axis": axis, "residual": residual, "activation": activation, "dtype": dtype, "out": out,
        "num_threads": num_threads,
    }  # fmt: skip
    if batch:
        y, stats = bn_c.batch_norm(x, gamma, beta, **options, return_stats=True)
        mean, var = stats.mean, stats.var
        if np.isfinite(before["x"]).all():
            assert_statistics(stats, before["x"], axis)
    else:
        if mean is None:
            mean, var = exact_statistics(x, axis)
        y = bn_c.batch_norm_inference(x, mean, var, gamma, beta, **options)
    if out is not None:
        assert y is out
        expected = out.dtype
    else:
        expected = np.dtype(dtype or (x.dtype if x.dtype.kind == "f" else "f4"))
    assert (y.shape, y.dtype) == (x.shape, expected)
    for name, a in inputs.items():
        if out is None or not np.shares_memory(a, out):
            assert np.array_equal(a, before[name], equal_nan=a.dtype.kind == "f"), f"{name} was written"
    assert_forward(y, before["x"], mean, var, gamma, beta, eps, axis, before.get("residual"), activation)
    return y


def values(rng, shape, dtype="f4", offset=0.0, std=1.0):
    """Random numbers of any input dtype; integers over their whole range."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return (rng.standard_normal(shape) * std + offset).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def scattered(x, order=None, steps=None, pads=None, first=0):
    """x as a view into a larger array.

    Its dimensions lie in memory in `order`, outermost first, taken in `steps` (negative: backwards), each
    followed by `pads` unused elements, the whole `first` elements behind an aligned address.
    """
    order = tuple(range(x.ndim)) if order is None else order
    steps = (1,) * x.ndim if steps is None else steps
    pads = (0,) * x.ndim if pads is None else pads
    sizes = [x.shape[d] * abs(steps[d]) + pads[d] for d in order]
    total = int(np.prod(sizes))
    memory = np.zeros(first + total, x.dtype)[first:].reshape(sizes).transpose(np.argsort(order))
    view = memory[tuple(slice(0, n * abs(step), abs(step)) for n, step in zip(x.shape, steps, strict=True))]
    view = view[tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]
    view[...] = x
    return view


def bits(a):
    """The bytes of an array; of NaN only that it is one."""
    a = np.array(a, order="C")
    if a.dtype.kind == "f":
        a[np.isnan(a)] = np.nan
    return a.tobytes()


def channels_last(ndim):
    """The order of dimensions of an array with channels last."""
    return (0, *range(2, ndim), 1)


def received(thing):
    """A copy from buffers of a pickle, each of which begins at an odd address, as those from a network may."""
    buffers = []
    pickled = pickle.dumps(thing, 5, buffer_callback=buffers.append)
    return pickle.loads(pickled, buffers=[memoryview(b"\0" + buffer.raw().tobytes())[1:] for buffer in buffers])


# Of arrays of rank 3 and more, channels on axis 1.
# Lines of pictures with gaps between them, or between what is in them.
GAPS = {
    "crop": lambda x: scattered(x, pads=(*(0,) * (x.ndim - 1), 2)),
    "every second line": lambda x: scattered(x, steps=(*(1,) * (x.ndim - 2), 2, 1)),
    "lines from below": lambda x: scattered(x, steps=(*(1,) * (x.ndim - 2), -1, 1)),
    "every second of both": lambda x: scattered(x, steps=(*(1,) * (x.ndim - 2), 2, 2)),
    "every second element": lambda x: scattered(x, steps=(*(1,) * (x.ndim - 1), 2)),
}
LAYOUTS = {
    "c": lambda x: scattered(x),
    "fortran": lambda x: scattered(x, order=range(x.ndim)[::-1]),
    "channels_last": lambda x: scattered(x, channels_last(x.ndim)),
    "channels_outermost": lambda x: scattered(x, order=(1, 0, *range(2, x.ndim))),
    "sliced": lambda x: scattered(x, steps=(2, 3, *(1,) * (x.ndim - 3), 2)),
    "negative": lambda x: scattered(x, steps=(-1,) * x.ndim),
    "negative_plane": lambda x: scattered(x, steps=(*(1,) * (x.ndim - 1), -1)),
    "padded_rows": lambda x: scattered(x, pads=(*(0,) * (x.ndim - 1), 3)),
    "padded_channels_last": lambda x: scattered(x, channels_last(x.ndim), pads=(0, 3, *(0,) * (x.ndim - 2))),
    "every_second_channel": lambda x: scattered(x, channels_last(x.ndim), steps=(1, 2, *(1,) * (x.ndim - 2))),
    "misaligned": lambda x: scattered(x, first=1),
    "misaligned_channels_last": lambda x: scattered(x, channels_last(x.ndim), first=1),
}
