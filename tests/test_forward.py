"""y of both functions against the definition, on every instruction set: sizes, layouts, types, options."""

import array
import tracemalloc

import numpy as np
import pytest
from oracle import (
    ACTIVATIONS,
    BLOCKS,
    CACHES,
    FLOATS,
    GAPS,
    INTEGERS,
    LANES,
    LAYOUTS,
    assert_forward,
    bits,
    check,
    scattered,
    values,
)

import bn_c
from bn_c import _dispatch


def parameters(rng, channels, dtype="f4"):
    return {
        "gamma": rng.uniform(-2, 2, channels).astype(dtype),
        "beta": rng.uniform(-2, 2, channels).astype(dtype),
    }


# ---- sizes and ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", LANES + BLOCKS)
@pytest.mark.parametrize("samples", [2, 5])
def test_length_of_planes(isa, batch, samples, size, dtype, rng):
    check(values(rng, (samples, 3, size), dtype), batch=batch, **parameters(rng, 3))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", LANES + BLOCKS)
def test_number_of_channels_in_rows(isa, batch, size, dtype, rng):
    check(values(rng, (5, size), dtype), batch=batch, axis=-1, **parameters(rng, size))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 21, 31, 33, 40, 63, 65, 128])
@pytest.mark.parametrize("rows", [1, 3, 4, 31, 63, 64, 65, 67, 129, 1021])
def test_number_of_rows_of_few_channels(caches, batch, rows, channels, dtype, rng):
    check(values(rng, (rows, channels), dtype), batch=batch, **parameters(rng, channels))


@pytest.mark.parametrize("outer", [(2, 2), (64, 1), (65, 2), (130, 3), (4, 67), (7, 301)])
@pytest.mark.parametrize("plane", [2, 9, 16, 31, 49, 97])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("order", "CF")
def test_many_short_planes(caches, batch, outer, plane, dtype, order, rng):
    """Blocks are filled from several planes, and several are normalised at once."""
    samples, channels = outer
    x, residual = (np.asarray(values(rng, (samples, channels, plane), dtype), order=order) for _ in range(2))
    for added in (None, residual, residual.astype("f4" if dtype == "f2" else "f2")):
        check(x, batch=batch, residual=added, **parameters(rng, channels))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    "shape", [(1, 3, 401, 403), (3, 40, 61, 67), (1, 1, 1000, 1001), (700, 7, 127), (1, 40, 211, 67), (2, 17, 150, 97)]
)
def test_more_than_one_cache_of_planes(caches, batch, shape, num_threads, rng):
    check(values(rng, shape), batch=batch, num_threads=num_threads, **parameters(rng, shape[1]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", GAPS)
def test_lines_with_gaps(caches, batch, layout, dtype, rng):
    """Short and long ones, of planes and of channels; those from memory are asked for."""
    for width in (1, 7, 31, 64, 112, 257, 513, 1031):
        x, residual = (values(rng, (2, 3, 23, width), dtype) for _ in range(2))
        x = GAPS[layout](x)
        for added in (None, residual):
            check(x, batch=batch, residual=added, **parameters(rng, 3))
            check(x, batch=batch, residual=added, axis=-1, **parameters(rng, width))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("shape", [(10_001, 60), (200_003, 3), (300, 2031), (3, 200_003)])
def test_more_than_one_cache_of_rows(isa, batch, shape, num_threads, rng):
    check(values(rng, shape), batch=batch, axis=-1, num_threads=num_threads, **parameters(rng, shape[1]))


AXES = [(ndim, axis) for ndim in range(1, 7) for axis in range(-ndim, ndim)]


@pytest.mark.parametrize(("ndim", "axis"), AXES)
def test_rank_and_axis(isa, batch, ndim, axis, rng):
    shape = (3, 4, 2, 5, 1, 6)[:ndim]
    check(values(rng, shape), batch=batch, axis=axis, **parameters(rng, shape[axis]))


@pytest.mark.parametrize("axis", [0, 1, 15, 31, -1, -32])
@pytest.mark.parametrize("permuted", [False, True])
def test_rank_32(isa, batch, axis, permuted, rng):
    order = rng.permutation(32) if permuted else None
    x = scattered(values(rng, [2 if d % 3 == 0 else 1 for d in range(32)]), order=order)
    check(x, batch=batch, axis=axis, **parameters(rng, x.shape[axis]))


def test_the_default_axis_is_1(isa, rng):
    x, ones = values(rng, (4, 5, 6)), np.ones(5)
    assert np.array_equal(bn_c.batch_norm(x), check(x, batch=True, axis=1))
    assert np.array_equal(bn_c.batch_norm_inference(x, ones, ones), check(x, batch=False, mean=ones, var=ones, axis=1))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (2, 3, 0, 5), (0, 3, 4, 5)])
def test_nothing_to_normalise(isa, shape):
    y = bn_c.batch_norm_inference(np.empty(shape, np.float16), np.zeros(3), np.ones(3))
    assert (y.shape, y.dtype) == (shape, np.float16)
    with pytest.raises(ValueError, match="x: expected at least one element per channel"):
        bn_c.batch_norm(np.empty(shape, np.float16))


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 5), (0, 0)])
def test_no_channels(isa, shape):
    x, none = np.empty(shape, np.float32), np.empty(0)
    assert bn_c.batch_norm_inference(x, none, none, none, none).shape == shape
    y, stats = bn_c.batch_norm(x, [], [], return_stats=True)
    assert (y.shape, stats.num_features) == (shape, 0)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_one_element_per_channel_gives_beta(isa, dtype, rng):
    x, beta = values(rng, (1, 7), dtype), rng.uniform(-2, 2, 7).astype("f4")
    assert np.array_equal(bn_c.batch_norm(x, None, beta, dtype="f4")[0], beta)


# ---- layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_layout", [None, *LAYOUTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_out(isa, batch, layout, out_layout, dtype, rng):
    x = LAYOUTS[layout](values(rng, (3, 5, 7, 6), dtype))
    out = LAYOUTS[out_layout](np.empty(x.shape, dtype)) if out_layout else None
    check(x, batch=batch, out=out, **parameters(rng, 5))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_long_runs(isa, batch, layout, axis, rng):
    """Enough elements for several blocks, whichever dimension has the channels."""
    x = LAYOUTS[layout](values(rng, (3, 33, 65, 5)))
    check(x, batch=batch, axis=axis, **parameters(rng, x.shape[axis]))


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (0, 2, 3), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
def test_broadcast_x(isa, batch, dims, dtype, rng):
    shape = [1 if d in dims else n for d, n in enumerate((3, 5, 7, 70))]
    x = np.broadcast_to(values(rng, shape, dtype), (3, 5, 7, 70))
    check(x, batch=batch, **parameters(rng, 5))


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("dtype", ["f4", "f2", "i2"])
def test_memory_mapped_x(isa, batch, mode, dtype, rng, tmp_path):
    np.save(tmp_path / "x.npy", values(rng, (4, 3, 9, 11), dtype))
    x = np.load(tmp_path / "x.npy", mmap_mode=mode)
    assert type(check(x, batch=batch)) is np.ndarray


def test_memory_mapped_out(isa, batch, rng, tmp_path):
    x = values(rng, (4, 3, 9, 11))
    out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, x.shape)
    y = check(x, batch=batch, out=out)
    out.flush()
    assert np.array_equal(np.load(tmp_path / "y.npy"), y)


def test_read_only_inputs(isa, batch, rng):
    x, residual = values(rng, (4, 5, 6)), values(rng, (4, 5, 6))
    x.flags.writeable = residual.flags.writeable = False
    check(x, batch=batch, residual=residual)


class WithArray:
    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return self.a


class WithDLPack:
    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


@pytest.mark.parametrize("wrap", [memoryview, WithArray, WithDLPack])
def test_anything_that_shares_its_memory(wrap, rng):
    x, residual = values(rng, (4, 5, 6)), values(rng, (4, 5, 6))
    expected = bn_c.batch_norm(x, residual=residual)
    assert np.array_equal(bn_c.batch_norm(wrap(x), residual=wrap(residual)), expected)
    stats = bn_c.batch_stats(wrap(x))
    y = bn_c.batch_norm_inference(wrap(x), stats.mean, stats.var)
    assert_forward(y, x, stats.mean, stats.var)


@pytest.mark.parametrize("wrap", [memoryview, WithArray])
def test_anything_that_shares_its_memory_as_out(wrap, rng):
    x = values(rng, (4, 5, 6))
    out = np.empty_like(x)
    wrapped = wrap(out)
    assert bn_c.batch_norm(x, out=wrapped) is wrapped
    assert np.array_equal(out, bn_c.batch_norm(x))


def test_array_of_the_standard_library():
    x = array.array("f", [1, 2, 3, 4])
    y = bn_c.batch_norm_inference(x, [1, 1, 1, 1], [1, 1, 1, 1], axis=0, eps=0)
    assert y.tolist() == [0, 1, 2, 3]


# ---- new outputs, given outputs, in place -----------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 2, 3), (2, 0, 3, 1)])
@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
def test_new_output_has_the_memory_order_of_x(batch, order, dtype, rng):
    x = scattered(values(rng, (3, 4, 5, 6), dtype), order=order, steps=(1, 2, 1, 1), pads=(1, 0, 2, 0))
    y = check(x, batch=batch)
    assert y.transpose(order).flags.c_contiguous


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("over", [-1, 0, 1, 1 << 20])
def test_new_output_of_huge_pages(batch, over, dtype, rng):
    check(values(rng, (1, 1, (2 << 20) // np.dtype(dtype).itemsize + over), dtype), batch=batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place(isa, batch, layout, dtype, rng):
    x = LAYOUTS[layout](values(rng, (3, 33, 5, 65), dtype))
    check(x, batch=batch, out=x, activation="relu", **parameters(rng, 33))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_residual_that_is_out(isa, batch, layout, out_dtype, dtype, rng):
    x = values(rng, (3, 17, 5, 9), dtype)
    out = LAYOUTS[layout](values(rng, x.shape, out_dtype))
    check(x, batch=batch, residual=out, out=out, **parameters(rng, 17))


@pytest.mark.parametrize("layout", ["c", "channels_last"])
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_long_residual_that_is_out(isa, batch, layout, out_dtype, dtype, rng):
    """More elements than one pass through a buffer."""
    x = LAYOUTS[layout](values(rng, (1, 3, 31, 101), dtype))
    out = LAYOUTS[layout](values(rng, x.shape, out_dtype))
    check(x, batch=batch, residual=out, out=out, **parameters(rng, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_x_that_is_residual_and_out(isa, batch, layout, dtype, rng):
    x = LAYOUTS[layout](values(rng, (3, 17, 5, 9), dtype))
    check(x, batch=batch, residual=x, out=x, **parameters(rng, 17))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_nothing_around_out_is_written(isa, batch, layout, out_dtype, rng):
    x = values(rng, (3, 17, 9, 19))
    out = LAYOUTS[layout](np.ones(x.shape, out_dtype))
    around = np.array(out.base)  # everything in it that is not out is 0
    check(x, batch=batch, out=out, gamma=np.zeros(17), beta=np.ones(17))
    assert np.array_equal(out.base, around)


def shifted_by(rng, shift):
    """Memory, and two arrays in it that begin so many elements apart."""
    memory = values(rng, 2000)
    return memory, *(memory[at : at + 420].reshape(4, 5, 21) for at in (600 + shift, 600))


@pytest.mark.parametrize("shift", [-420, 420])
@pytest.mark.parametrize("argument", ["x", "residual"])
def test_neighbours_in_memory_do_not_overlap(isa, batch, argument, shift, rng):
    _, shifted, out = shifted_by(rng, shift)
    check(**{"x": values(rng, out.shape), argument: shifted}, batch=batch, out=out)


@pytest.mark.parametrize("shift", [-419, -70, -5, -1, 1, 5, 70, 419])
@pytest.mark.parametrize("argument", ["x", "residual"])
def test_partial_overlap_is_exact_or_an_error(isa, batch, argument, shift, rng):
    memory, shifted, out = shifted_by(rng, shift)
    before, message = memory.copy(), None
    try:
        check(**{"x": values(rng, out.shape), argument: shifted}, batch=batch, out=out)
    except ValueError as error:
        message = str(error)
    if message:
        assert message.startswith("out: expected")
        assert np.array_equal(memory, before)


# ---- types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["c", "channels_last", "sliced"])
@pytest.mark.parametrize("residual_dtype", [None, *FLOATS])
@pytest.mark.parametrize("dtype", [None, *FLOATS])
@pytest.mark.parametrize("x_dtype", FLOATS + INTEGERS)
def test_types_of_x_residual_and_output(isa, batch, x_dtype, dtype, residual_dtype, layout, rng):
    x = LAYOUTS[layout](values(rng, (3, 5, 7, 11), x_dtype))
    residual = residual_dtype and values(rng, x.shape, residual_dtype)
    check(x, batch=batch, dtype=dtype, residual=residual, **parameters(rng, 5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts_of_the_residual(isa, batch, layout, dtype, rng):
    x = values(rng, (3, 5, 7, 33))
    check(x, batch=batch, residual=LAYOUTS[layout](values(rng, x.shape, dtype)), **parameters(rng, 5))


def test_broadcast_residual(isa, batch, rng):
    x = values(rng, (3, 5, 7, 33))
    check(x, batch=batch, residual=np.broadcast_to(values(rng, (5, 1, 1)), x.shape))


@pytest.mark.parametrize("spelling", ["float16", "e", np.float16, np.dtype("f2")])
def test_spellings_of_dtype(spelling, rng):
    assert bn_c.batch_norm(values(rng, (4, 5)), dtype=spelling).dtype == np.float16


@pytest.mark.parametrize("form", ["f2", "f4", "f8", "g", "list", "strided", "subclass"])
@pytest.mark.parametrize("given", [(), ("gamma",), ("beta",), ("gamma", "beta")])
def test_forms_of_the_parameters(isa, batch, given, form, rng):
    def formed(a):
        match form:
            case "list":
                return a.tolist()
            case "strided":
                return np.repeat(a, 2)[::-2]
            case "subclass":
                return a.view(type("Sub", (np.ndarray,), {}))
            case dtype:
                return a.astype(dtype)

    x = values(rng, (4, 6, 9))
    chosen = {name: formed(a) for name, a in parameters(rng, 6, "f8").items() if name in given}
    if not batch:
        chosen |= {"mean": formed(rng.uniform(-1, 1, 6)), "var": formed(rng.uniform(0.5, 2, 6))}
    check(x, batch=batch, **chosen)


def test_parameters_of_different_types_together(isa, rng):
    x = values(rng, (4, 3, 9), "f2")
    mean, var = np.array([0.1, 0.2, 0.3], np.float64), np.array([1, 2, 3], np.float16)
    check(x, batch=False, mean=mean, var=var, gamma=[1, 2, 3], beta=np.array([0.1, 0.2, 0.3], np.longdouble))


# ---- values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1e3, -1e6, 1e6, 1e7])
@pytest.mark.parametrize("shape", [(3, 5, 31, 33), (2000, 4), (64, 300)])
def test_offset(isa, batch, offset, shape, rng):
    check(values(rng, shape, "f4", offset), batch=batch, **parameters(rng, shape[1]))


@pytest.mark.parametrize("offset", [0, 1e3, -3e4])
def test_offset_of_halves(isa, batch, offset, rng):
    check(values(rng, (3, 5, 31, 33), "f2", offset, 30), batch=batch, **parameters(rng, 5))


def test_given_mean_between_two_floats(isa, rng):
    """What the mean loses when it is rounded to float is not lost."""
    mean = np.array([1e6 + 0.03, -1e5 + 0.003, 12345.0004])
    x = (mean[:, None] + rng.standard_normal((4, 3, 50)) * 0.1).astype("f4")
    check(x, batch=False, mean=mean, var=np.full(3, 0.01))


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("shape", [(3, 4, 50), (60, 4)])
def test_very_large_and_very_small_values(isa, batch, shape, eps, size, rng):
    x = (rng.uniform(-1, 1, shape) * size).astype("f4")
    check(x, batch=batch, eps=eps, gamma=np.array([1, -0.5, 3, 1e-3], "f4"))


WIDE = {
    "tiny_variance": {"var": [1e-80, 1, 1e-70, 4]},
    "huge_variance": {"var": [1e80, 1, 1e300, 4]},
    "huge_gamma": {"gamma": [1e38, 1, 1e100, -2]},
    "tiny_gamma": {"gamma": [1e-38, 1, 1e-100, -2]},
    "huge_beta": {"beta": [3e38, 1, -1e38, -2]},
    "huge_mean": {"mean": [3e38, 1, -1e300, -2]},
    "no_gamma": {"gamma": [0, 1, 0, -2]},
}


@pytest.mark.parametrize("layout", ["c", "channels_last", "sliced"])
@pytest.mark.parametrize("name", WIDE)
def test_parameters_outside_the_range_of_float32(isa, name, layout, rng):
    x = LAYOUTS[layout](values(rng, (3, 4, 5, 17)))
    parameters = {"mean": np.zeros(4), "var": np.ones(4)} | WIDE[name]
    check(x, batch=False, **parameters)
    check(x, batch=False, residual=values(rng, x.shape), activation="relu", dtype="f2", **parameters)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(9, 3, 7, 11), (5, 40, 5, 5), (70, 17), (9, 64), (7, 129), (3, 300), (2, 1100)])
def test_channels_in_double_leave_others_as_they_are(caches, shape, dtype, rng):
    """Planes on their own, rows in strips; strips and rows that have none, some and nothing else of them."""
    given = parameters(rng, shape[1]) | {"mean": rng.uniform(-1, 1, shape[1]), "var": rng.uniform(1, 2, shape[1])}
    for layout in ("c", "channels_last", "sliced") if len(shape) > 2 else ("c",):
        x, out = (LAYOUTS[layout](values(rng, shape, dtype)) for _ in range(2))
        for fused in ({}, {"residual": values(rng, shape, dtype), "activation": "hard_swish"}):
            expected = bn_c.batch_norm_inference(x, **given, **fused)
            for wide in (slice(1, 2), slice(0, None, 2), slice(128, None), slice(None)):
                gamma = given["gamma"].copy()
                gamma[wide] *= 1e-38
                y = check(x, batch=False, **given | {"gamma": gamma}, **fused)
                rest = gamma == given["gamma"]
                assert bits(y[:, rest]) == bits(expected[:, rest])
                out[...] = x
                check(out, batch=False, out=out, **given | {"gamma": gamma}, **fused)


@pytest.mark.parametrize("parameter", ["mean", "var", "gamma", "beta"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [1, -1])
def test_parameter_that_is_not_finite_concerns_its_channel_only(isa, parameter, value, axis, rng):
    x = values(rng, (6, 5, 5))
    parameters = {"mean": np.zeros(5), "var": np.ones(5), "gamma": np.ones(5), "beta": np.zeros(5)}
    expected = bn_c.batch_norm_inference(x, **parameters, axis=axis)
    parameters[parameter][2] = value
    y = check(x, batch=False, axis=axis, **parameters)
    others = [0, 1, 3, 4]
    assert np.array_equal(np.take(y, others, axis), np.take(expected, others, axis))


@pytest.mark.parametrize("var", [0.0, -0.5, -1e-5])
@pytest.mark.parametrize("gamma", [None, [1, 2, 0, -1]])
def test_no_variance_is_what_ieee_arithmetic_gives(isa, var, gamma, rng):
    x = values(rng, (3, 4, 20))
    x[:, 1] = 0.25
    mean, variances = np.array([0, 0.25, 1, 0]), np.array([1, var, 1, var])
    y = check(x, batch=False, mean=mean, var=variances, gamma=gamma, eps=0.0 if var != -1e-5 else 1e-5)
    assert np.isnan(y[:, 1]).all()
    assert not np.isfinite(y[:, 3]).any()
    assert np.isfinite(y[:, [0, 2]]).all()


def test_constant_channel_without_eps_is_nan(isa):
    y = check(np.full((6, 2), 0.1, "f4"), batch=True, eps=0)
    assert np.isnan(y).all()


@pytest.mark.parametrize("eps", [0, 0.0, 1e-12, 1e-5, 1e-3, 1.0, 1e30, 1e300, np.float32(1e-5)])
def test_eps(isa, batch, eps, rng):
    check(values(rng, (3, 4, 20)), batch=batch, eps=eps)


# ---- activations ------------------------------------------------------------------------------------

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 65504, -65504, 1e-7, -1e-7]
EDGES = np.array([-3, 3, 6, -0.75, 1.25], "f4")
AROUND = [*EDGES, *np.nextafter(EDGES, np.float32(-9)), *np.nextafter(EDGES, np.float32(9))]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, ("clip", -np.inf, np.inf), ("clip", 0, 0), ("leaky_relu", -0.5)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("axis", [0, 1])
def test_activations_of_special_values(isa, activation, x_dtype, dtype, axis):
    with np.errstate(over="ignore"):
        special = np.array([*SPECIAL, *AROUND, *np.linspace(-8, 8, 33)], "f4").astype(x_dtype)
    x = np.stack([np.roll(special, i) for i in range(len(special))], axis=axis)
    one = np.ones(len(special))
    check(x, batch=False, mean=0 * one, var=one, eps=0, axis=axis, activation=activation, dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["c", "channels_last", "sliced"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_activations_with_everything_else(isa, batch, activation, layout, with_residual, in_place, rng):
    x = LAYOUTS[layout](values(rng, (3, 5, 7, 33)))
    residual = values(rng, x.shape) if with_residual else None
    out = x if in_place else None
    check(x, batch=batch, residual=residual, out=out, activation=activation, **parameters(rng, 5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_comes_after_the_residual(isa, activation):
    """Before it, -5 would have become 0, or the result would not have been clipped."""
    x, residual = np.full((1, 1, 40), -5, "f4"), np.full((1, 1, 40), 5.5, "f4")
    y = bn_c.batch_norm_inference(x, [0], [1], eps=0, residual=residual, activation=activation)
    expected = {"hard_swish": 0.5 * 3.5 / 6}.get(activation, 0.5)
    assert np.allclose(y, expected, rtol=1e-6, atol=0)


# ---- everything at random ---------------------------------------------------------------------------


def random_layout(rng, x):
    order = rng.permutation(x.ndim)
    steps = rng.choice([1, 1, 1, 2, -1, -2], x.ndim).tolist()
    pads = rng.choice([0, 0, 0, 1, 5], x.ndim).tolist()
    return scattered(x, order, steps, pads, first=int(rng.integers(3)))


def random_case(rng):
    ndim = int(rng.integers(1, 6))
    axis = int(rng.integers(-ndim, ndim))
    sizes = rng.choice([1, 2, 3, 5, 8, 13, 16, 31, 33, 64, 65, 130], ndim)
    while sizes.prod() > 20_000:
        sizes[rng.integers(ndim)] = rng.integers(1, 5)
    x_dtype = str(rng.choice(FLOATS + INTEGERS))
    offsets = [(0, 1), (1, 1), (1e3, 3), (0, 1e3)] + [(1e6, 1), (-1e6, 30)] * (x_dtype != "f2")
    offset, std = offsets[rng.integers(len(offsets))]
    x = random_layout(rng, values(rng, sizes, x_dtype, offset, std))
    case = {
        "axis": axis,
        "eps": float(rng.choice([1e-5, 1e-3, 0.5])),
        "activation": ACTIVATIONS[rng.integers(len(ACTIVATIONS))],
    }
    for name in ("gamma", "beta"):
        if rng.random() < 0.7:
            case[name] = rng.uniform(-2, 2, sizes[axis]).astype(rng.choice(["f2", "f4", "f8"]))
    out_dtype = str(rng.choice(FLOATS))
    if rng.random() < 0.4:
        case["residual"] = random_layout(rng, values(rng, sizes, str(rng.choice(FLOATS))))
    match rng.integers(5):
        case 0:
            case["dtype"] = out_dtype
        case 1:
            case["out"] = random_layout(rng, np.empty(sizes, out_dtype))
        case 2 if x.dtype.kind == "f":
            case["out"] = x
        case 3 if "residual" in case:
            case["out"] = case["residual"]
    return x, case


@pytest.mark.parametrize("seed", range(1200))
def test_random_case(seed, batch):
    rng = np.random.default_rng(seed)
    _dispatch.use(str(rng.choice(bn_c.supported_isas())), CACHES[seed % 2])
    try:
        x, case = random_case(rng)
        check(x, batch=batch, num_threads=int(rng.integers(1, 4)), **case)
    finally:
        _dispatch.use(bn_c.isa)


# ---- size and memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["c", "every second element"])
@pytest.mark.parametrize(
    "shape", [(1, 40, 211, 67), (2, 17, 150, 97), (9, 33, 14, 14), (9, 33, 14, 23), (70, 20, 7, 7), (3000, 61)]
)
def test_bits_do_not_depend_on_the_caches(isa, batch, shape, layout, dtype, fused, rng):
    """Whether all are held by the last one, or together are too large for it, or out alone is; nor on the second."""
    x, residual = ({"c": np.asarray, **GAPS}[layout](values(rng, shape, dtype)) for _ in range(2))
    options = {"residual": residual if fused else None, **parameters(rng, shape[1])}
    found = set()
    large = 1 << 30
    for sizes in [(large, 0), (large, large), (2 * x.nbytes, 0), (0, 0), (0, large)]:
        _dispatch.use(isa, *sizes)
        y = bn_c.batch_norm(x, **options) if batch else bn_c.batch_norm_inference(x, *np.ones((2, shape[1])), **options)
        found.add(bits(y))
    assert len(found) == 1


@pytest.mark.parametrize("fused", [None, "relu", "hard_swish"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["c", "channels_last", "gaps"])
@pytest.mark.parametrize("columns", [31, 32, 33, 40, 49, 63, 64, 65, 95, 96, 97, 111, 120, 129, 199, 512, 531, 1040])
def test_rows_that_share_a_line_of_memory(isa, columns, layout, dtype, fused, rng):
    """Wherever in a cache line out begins; next to it nothing is written."""
    channels = columns if layout == "channels_last" else 3
    x, residual = (values(rng, (3, 9, columns) if channels == columns else (9, 3, columns), dtype) for _ in range(2))
    if layout == "gaps":
        x = np.repeat(x, 2, 1)[:, ::2]
    axis = -1 if channels == columns else 1
    mean, var = np.arange(channels) % 7 + 0.0, np.arange(channels) % 5 + 1.0
    options = {"axis": axis, "residual": residual, "activation": fused} if fused else {"axis": axis}
    y = bn_c.batch_norm_inference(x, mean, var, **options)
    _dispatch.use(isa, 0)
    for first in range(64 // x.itemsize):
        around = np.full(x.size + 64, -77, dtype)
        out = around[first : first + x.size].reshape(x.shape)
        bn_c.batch_norm_inference(x, mean, var, **options, out=out)
        assert np.array_equal(out, y)
        assert (around[:first] == -77).all()
        assert (around[first + x.size :] == -77).all()


@pytest.mark.slow
@pytest.mark.parametrize("x_dtype", ["f4", "f2", "u1"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [
        (5, 4, 911, 1021),
        (19_530_011, 1),
        (101, 193_373),
        (6_510_007, 3),
        (1, 21, 930_011),
        (30_001, 8, 7, 11),
        (300_007, 64),
    ],
)
def test_outputs_larger_than_caches_are_those_of_their_parts(isa, x_dtype, dtype, shape):
    """Stores may then go around the caches, in whole lines; no length here is a multiple of a line."""
    x = (np.arange(np.prod(shape), dtype=np.uint32) % 251).astype(x_dtype).reshape(shape)
    channels = shape[1]
    mean, var = np.arange(channels) % 7 + 100.0, np.arange(channels) % 5 + 1.0
    out = scattered(np.empty(shape, dtype), first=1)
    bn_c.batch_norm_inference(x, mean, var, out=out)
    longest = max((d for d in range(x.ndim) if d != 1), key=lambda d: shape[d])
    for x_part, out_part in zip(*(np.array_split(a, 20, longest) for a in (x, out)), strict=True):
        assert np.array_equal(bn_c.batch_norm_inference(x_part, mean, var, dtype=dtype), out_part)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["c", "channels_last"])
def test_large_output_of_a_mini_batch(isa, layout):
    x = (np.arange(3 * 5 * 911 * 1021, dtype=np.uint32) % 251).astype("f4").reshape(3, 5, 911, 1021)
    x = LAYOUTS[layout](x)
    y, stats = bn_c.batch_norm(x, return_stats=True)
    for sample in range(len(x)):
        at = slice(sample, sample + 1)
        assert_forward(y[at], x[at], stats.mean, stats.var)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_layout_is_copied(batch, layout, dtype):
    x = LAYOUTS[layout](np.ones((8, 40, 80, 80), dtype))
    out, residual = np.empty(x.shape, dtype), LAYOUTS[layout](x)
    mean, var = np.zeros(40), np.ones(40)
    tracemalloc.start()
    if batch:
        bn_c.batch_norm(x, residual=residual, out=out)
    else:
        bn_c.batch_norm_inference(x, mean, var, residual=residual, out=out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
