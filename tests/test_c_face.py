"""The table of bn_c.h: called through ctypes, and from modules compiled against the installed header."""

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_double, c_float, c_int, c_size_t, c_ssize_t, c_void_p
from pathlib import Path

import numpy as np
import pytest

import bn_c
from bn_c import _core

TYPES = {name: code for code, name in enumerate(("float32", "float16", "uint8", "int8", "uint16", "int16"))}
IDENTITY, CLIP, LEAKY_RELU, HARD_SWISH = range(4)
(
    OK,
    NULL,
    BAD_CHANNELS,
    BAD_EPS,
    BAD_PARAMS,
    BAD_TYPE,
    BAD_NDIM,
    BAD_SHAPE,
    BAD_AXIS,
    BAD_ACTIVATION,
    UNALIGNED,
    OVERLAP,
    NO_MEMORY,
) = range(13)


class Array(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("type", c_int),
        ("ndim", c_int),
        ("shape", POINTER(c_ssize_t)),
        ("strides", POINTER(c_ssize_t)),
    )


class Activation(ctypes.Structure):
    _fields_ = (("kind", c_int), ("low", c_float), ("high", c_float), ("slope", c_float))


class Api(ctypes.Structure):
    _fields_ = (
        ("abi", c_int),
        ("size", c_size_t),
        ("params_size", CFUNCTYPE(c_size_t, c_ssize_t)),
        ("fold", CFUNCTYPE(c_int, c_void_p, c_ssize_t, c_void_p, c_void_p, c_void_p, c_void_p, c_double)),
        (
            "normalize",
            CFUNCTYPE(c_int, c_void_p, POINTER(Array), c_int, POINTER(Array), POINTER(Activation), POINTER(Array)),
        ),
        ("moments", CFUNCTYPE(c_int, POINTER(Array), c_int, c_void_p, c_void_p, c_void_p)),
        ("error_text", CFUNCTYPE(c_char_p, c_int)),
        (
            "normalize_images",
            CFUNCTYPE(c_int, POINTER(Array), c_void_p, c_void_p, c_int, c_int, POINTER(Array)),
        ),
    )


def python_api(name, restype, *argtypes):
    return ctypes.PYFUNCTYPE(restype, *argtypes)((name, ctypes.pythonapi))


pointer_in = python_api("PyCapsule_GetPointer", c_void_p, ctypes.py_object, c_char_p)
new_capsule = python_api("PyCapsule_New", ctypes.py_object, c_void_p, c_char_p, c_void_p)
api = Api.from_address(pointer_in(_core.c_api, b"bn_c._core.c_api"))


def described(a, **changes):
    """The array as C sees it, with some of it changed."""
    if a is None:
        return None
    sizes = {name: (c_ssize_t * max(a.ndim, 1))(*getattr(a, name)) for name in ("shape", "strides")}
    fields = {"data": a.ctypes.data, "type": TYPES[a.dtype.name], "ndim": a.ndim, **sizes, **changes}
    for name in ("shape", "strides"):
        fields[name] = None if fields[name] is None else (c_ssize_t * 33)(*fields[name])
    return Array(**fields)


def address(a):
    return None if a is None else a.ctypes.data


def folded(mean, var, gamma=None, beta=None, eps=1e-5):
    vectors = [None if v is None else np.array(v, np.float64) for v in (mean, var, gamma, beta)]
    channels = len(vectors[0])
    params = np.empty(api.params_size(channels) // 8 + 1)
    assert api.fold(address(params), channels, *map(address, vectors), eps) == OK
    return params


def normalize(params, x, axis, out, residual=None, activation=None):
    x, residual, out = (a if isinstance(a, Array) else described(a) for a in (x, residual, out))
    return api.normalize(address(params), x, axis, residual, activation, out)


def moments(x, axis):
    """As `BatchStats.to_dict` gives them."""
    channels = x.shape[axis]
    count, mean, m2 = c_ssize_t(-1), np.empty(channels), np.empty(channels)
    assert api.moments(described(x), axis, byref(count), address(mean), address(m2)) == OK
    return {"count": count.value, "mean": mean.tolist(), "mean_rest": [0.0] * channels, "m2": m2.tolist()}


def normalize_images(frames, scale, shift, out, reverse=False, channels_last=False):
    frames, out = (a if isinstance(a, Array) else described(a) for a in (frames, out))
    return api.normalize_images(frames, address(scale), address(shift), reverse, channels_last, out)


def values(rng, shape, dtype):
    if np.dtype(dtype).kind == "f":
        return (rng.standard_normal(shape) * 3 + 1).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


# ---- the same bits as from Python -------------------------------------------------------------------

LAYOUTS = {
    "gapless": lambda a: a,
    "columns first": lambda a: np.asfortranarray(a),
    "axes swapped": lambda a: a.swapaxes(1, 3).copy().swapaxes(1, 3),
    "reversed": lambda a: a[:, ::-1, ::-1],
    "every other": lambda a: a.repeat(2, 3)[..., ::2],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
}
ACTIVATIONS = {
    None: None,
    "relu": Activation(CLIP, 0, np.inf, 0),
    ("clip", -1.0, 2.0): Activation(CLIP, -1, 2, 0),
    ("leaky_relu", 0.25): Activation(LEAKY_RELU, 0, 0, 0.25),
    "hard_swish": Activation(HARD_SWISH, 0, 0, 0),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_given_statistics(isa, rng, dtype, layout):
    x = layout(values(rng, (3, 5, 6, 7), dtype))
    for axis, name, out_dtype, with_residual in itertools.product(
        (0, 1, -1), ACTIVATIONS, ("float32", "float16"), (False, True)
    ):
        channels = x.shape[axis]
        mean, var, gamma, beta = rng.uniform(0.5, 2, (4, channels))
        residual = values(rng, x.shape, out_dtype)[::-1] if with_residual else None
        options = {"axis": axis, "activation": name, "residual": residual, "dtype": out_dtype, "eps": 0.1}
        out = np.zeros_like(x, out_dtype)
        assert normalize(folded(mean, var, gamma, beta, 0.1), x, axis, out, residual, ACTIVATIONS[name]) == OK
        np.testing.assert_array_equal(out, bn_c.batch_norm_inference(x, mean, var, gamma, beta, **options))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_statistics(isa, rng, dtype, layout):
    x = layout(values(rng, (3, 5, 6, 7), dtype))
    for axis in range(-4, 4):
        assert moments(x, axis) == bn_c.batch_stats(x, axis=axis).to_dict()


LARGE = {
    "rows": ((300_000, 3), 1),
    "rows in halves": ((2000, 200), 1),
    "few planes": ((2, 3, 400, 401), 1),
    "many planes": ((40, 16, 29, 31), 1),
}


@pytest.mark.parametrize(("shape", "axis"), LARGE.values(), ids=LARGE)
def test_mini_batches_of_several_pieces(isa, rng, shape, axis):
    """Statistics merged from pieces; with them folded, y is that of `batch_norm`."""
    x = values(rng, shape, "float32")
    stats = moments(x, axis)
    assert stats == bn_c.batch_stats(x, axis=axis, num_threads=2).to_dict()
    out = np.empty_like(x)
    assert normalize(folded(stats["mean"], np.array(stats["m2"]) / stats["count"]), x, axis, out) == OK
    np.testing.assert_array_equal(out, bn_c.batch_norm(x, axis=axis))


FRAMES = {
    "gapless": lambda a: a,
    "crop": lambda a: a[..., 3:-2, 5:-4, :],
    "flipped": lambda a: a[..., ::-1, ::-1, :],
    "every other": lambda a: a[..., ::2, ::3, :],
    "planes": lambda a: np.moveaxis(np.moveaxis(a, -1, 0).copy(), 0, -1),
    "broadcast": lambda a: np.broadcast_to(a[..., :1, :, :], a.shape),
}


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 1024])
@pytest.mark.parametrize("layout", FRAMES.values(), ids=FRAMES)
def test_frames(isa, rng, channels, layout):
    mean, std = rng.uniform(0.2, 0.8, channels), rng.uniform(0.1, 0.5, channels)
    scale, shift = (1 / 255 / std).astype("f4"), (-mean / std).astype("f4")
    for batch, last, reverse in itertools.product(((), (1,), (2,)), (False, True), (False, True)):
        frames = layout(values(rng, (*batch, 11, 40 if channels < 9 else 13, channels), "uint8"))
        prep = bn_c.ImageNormalizer(mean, std, reverse_channels=reverse, layout="NHWC" if last else "NCHW")
        expected = prep(frames)
        for out in (np.empty_like(expected), np.empty((*expected.shape, 2), "f4")[..., 0]):
            assert normalize_images(frames, scale, shift, out, reverse, last) == OK
            np.testing.assert_array_equal(out, expected)


def test_strides_of_frames_may_be_left_out(rng):
    frames, out = values(rng, (2, 5, 6, 3), "uint8"), np.empty((2, 3, 5, 6), "f4")
    scale, shift = np.eye(2, 3, dtype="f4")
    arrays = described(frames, strides=None), described(out, strides=None)
    assert normalize_images(arrays[0], scale, shift, arrays[1]) == OK
    np.testing.assert_array_equal(out, np.moveaxis(frames * scale + shift, -1, 1))


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 4, 4, 3)])
def test_no_pixels(shape):
    ones = np.ones(3, "f4")
    frames, out = np.empty(shape, "u1"), np.empty(shape, "f4")
    assert normalize_images(described(frames, data=None), ones, ones, described(out, data=None), False, True) == OK


def test_gamma_and_beta_may_be_absent(rng):
    x = values(rng, (4, 3), "float32")
    for gamma, beta in itertools.product((None, [1.5, 2, 0]), (None, [-1, 0, 3])):
        out = np.empty_like(x)
        assert normalize(folded([1, 2, 3], [4, 5, 6], gamma, beta), x, 1, out) == OK
        np.testing.assert_array_equal(out, bn_c.batch_norm_inference(x, [1, 2, 3], [4, 5, 6], gamma, beta))


def test_channels_that_leave_the_range_of_float(isa):
    """The parameters keep that some channels are computed in double."""
    x = np.array([[1e38, 2], [-3e38, 4]], "f4")
    parameters = [1e300, 3], [1e-300, 1], [1e200, 1], [0, 0]
    out = np.empty_like(x)
    assert normalize(folded(*parameters, eps=0), x, 1, out) == OK
    np.testing.assert_array_equal(out, bn_c.batch_norm_inference(x, *parameters, eps=0))


def test_strides_may_be_left_out(rng):
    x, out = values(rng, (4, 3, 5), "int16"), np.empty((4, 3, 5), "f2")
    assert normalize(folded([1] * 3, [4] * 3), described(x, strides=None), 1, described(out, strides=None)) == OK
    np.testing.assert_array_equal(out, bn_c.batch_norm_inference(x, [1] * 3, [4] * 3, dtype="f2"))


def test_parameters_may_be_copied(rng):
    x, out = values(rng, (4, 3), "float32"), np.empty((4, 3), "f4")
    params = folded([1, 2, 3], [4, 5, 6])
    copy = params.copy()
    params[:] = 0
    assert normalize(copy, x, 1, out) == OK
    np.testing.assert_array_equal(out, bn_c.batch_norm_inference(x, [1, 2, 3], [4, 5, 6]))


@pytest.mark.parametrize("alias", ["x", "residual"])
def test_in_place(isa, rng, alias):
    x, residual = values(rng, (2, 4, 3, 50), "float32")
    expected = bn_c.batch_norm_inference(x, [1] * 3, [4] * 3, residual=residual)
    out = {"x": x, "residual": residual}[alias]
    assert normalize(folded([1] * 3, [4] * 3), x, 1, out, residual) == OK
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 3, 1 << 40)])
def test_no_elements(shape):
    x = np.empty(shape, "f4")
    channels = shape[1]
    assert normalize(folded([1] * channels, [4] * channels), described(x, data=None), 1, described(x, data=None)) == OK
    assert moments(x, 1) == bn_c.BatchStats(channels).to_dict()


def test_many_threads(rng):
    x = values(rng, (8, 64, 20, 20), "float32")
    mean, var = rng.uniform(1, 2, (2, 64))
    params, expected = folded(mean, var), bn_c.batch_norm_inference(x, mean, var)

    def right(_):
        out = np.empty_like(x)
        return normalize(params, x, 1, out) == OK and np.array_equal(out, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(40)))


def test_the_kernels_in_use_are_asked(monkeypatch):
    """`use` changes them for C too."""
    calls = []
    fold = CFUNCTYPE(None, c_void_p, c_ssize_t, c_void_p, c_double)(lambda *given: calls.append(given[1]))
    table = (c_void_p * 8)(0, None, None, ctypes.cast(fold, c_void_p))
    try:
        _core.use(new_capsule(ctypes.addressof(table), b"bn_c.kernels", None), 0, 0)
        folded([1, 2, 3], [4, 5, 6])
    finally:
        bn_c._dispatch.use(bn_c.isa)
    assert calls == [3]


# ---- what does not fit ------------------------------------------------------------------------------

X = np.zeros((4, 3, 5), "f4")
MANY = [1] * 33


def array_errors(a, integers):
    """Changes of an array that are errors wherever it stands."""
    yield "no shape", {"shape": None}, NULL
    yield "no data", {"data": None}, NULL
    yield "type -1", {"type": -1}, BAD_TYPE
    yield "type 6", {"type": 6}, BAD_TYPE
    if not integers:
        yield "integers", {"type": TYPES["uint8"]}, BAD_TYPE
    yield "ndim -1", {"ndim": -1}, BAD_NDIM
    yield "ndim 0", {"ndim": 0}, BAD_NDIM
    yield "ndim 33", {"ndim": 33, "shape": MANY, "strides": MANY}, BAD_NDIM
    yield "negative shape", {"shape": (4, 3, -5)}, BAD_SHAPE
    yield "no memory is that large", {"shape": (1 << 40, 3, 1 << 40)}, BAD_SHAPE
    yield "data unaligned", {"data": a.ctypes.data + 1}, UNALIGNED
    yield "strides unaligned", {"strides": (60, 20, 3)}, UNALIGNED


@pytest.mark.parametrize("argument", ["x", "residual", "out"])
def test_arrays_that_do_not_fit(argument):
    params = folded([1] * 3, [4] * 3)
    for case, changes, error in array_errors(X, argument == "x"):
        arrays = {"x": X.copy(), "residual": X.copy(), "out": X + 7}
        out = arrays["out"]
        arrays[argument] = described(arrays[argument], **changes)
        assert normalize(params, axis=1, **arrays) == error, case
        assert (out == 7).all()
    for shape in ((4, 3, 4), (4, 3), (3, 4, 5)) if argument != "x" else ():
        arrays = {"x": X, "residual": None, "out": X + 7, argument: np.empty(shape, "f4")}
        assert normalize(params, axis=1, **arrays) == BAD_SHAPE


def test_arrays_that_do_not_fit_statistics():
    results = np.full((3, 3), 7.0)
    for case, changes, error in array_errors(X, True):
        assert api.moments(described(X, **changes), 1, *map(address, results)) == error, case
    for axis in (3, -4, 1 << 30):
        assert api.moments(described(X), axis, *map(address, results)) == BAD_AXIS
    for missing in range(3):
        pointers = [address(row) for row in results]
        pointers[missing] = None
        assert api.moments(described(X), 1, *pointers) == NULL
    assert api.moments(None, 1, *map(address, results)) == NULL
    assert (results == 7).all()


BAD_ACTIVATIONS = [(-1, 0, 0, 0), (4, 0, 0, 0), (CLIP, 1, 0, 0), (CLIP, np.nan, 0, 0), (CLIP, 0, np.nan, 0)]
BAD_ACTIVATIONS += [(LEAKY_RELU, 0, 0, slope) for slope in (np.nan, np.inf, -np.inf)]


def test_other_arguments_that_do_not_fit():
    params, x, out = folded([1] * 3, [4] * 3), X, X + 7
    assert normalize(params, None, 1, out) == NULL
    assert normalize(params, x, 1, None) == NULL
    assert normalize(None, x, 1, out) == NULL
    for axis in (3, -4, -(1 << 31)):
        assert normalize(params, x, axis, out) == BAD_AXIS
    for axis in (0, 2):
        assert normalize(params, x, axis, out) == BAD_CHANNELS
    for fields in BAD_ACTIVATIONS:
        assert normalize(params, x, 1, out, activation=Activation(*fields)) == BAD_ACTIVATION
    assert normalize(np.zeros_like(params), x, 1, out) == BAD_PARAMS
    unaligned = np.empty(params.nbytes + 4, "u1")[4:]
    assert normalize(unaligned, x, 1, out) == BAD_PARAMS
    assert (out == 7).all()


def test_parameters_that_do_not_fit():
    params, one = np.zeros(100), np.ones(3)
    before = params.copy()
    for eps in (-1e-9, np.nan, np.inf):
        assert api.fold(address(params), 3, address(one), address(one), None, None, eps) == BAD_EPS
    for mean, var in ((None, one), (one, None)):
        assert api.fold(address(params), 3, address(mean), address(var), None, None, 0) == NULL
    assert api.fold(None, 3, address(one), address(one), None, None, 0) == NULL
    for channels in (-1, 1 << 60, sys.maxsize):
        assert api.params_size(channels) == 0
        assert api.fold(address(params), channels, address(one), address(one), None, None, 0) == BAD_CHANNELS
    assert api.fold(address(params) + 4, 3, address(one), address(one), None, None, 0) == BAD_PARAMS
    np.testing.assert_array_equal(params, before)


def test_overlaps():
    params = folded([1] * 3, [4] * 3)
    memory = np.full(200, 7, "f4")
    x, ahead, apart = (memory[start : start + 60].reshape(4, 3, 5) for start in (0, 5, 60))
    assert normalize(params, x, 1, ahead) == OVERLAP
    assert normalize(params, apart, 1, ahead, residual=x) == OVERLAP
    assert normalize(params, x, 1, x[:, :, ::-1]) == OVERLAP
    assert normalize(params, memory.view("f2")[:60].reshape(4, 3, 5), 1, x) == OVERLAP
    assert normalize(params, apart, 1, described(x, strides=(0, 20, 4))) == OVERLAP
    assert (memory == 7).all()
    assert normalize(params, x, 1, apart) == OK


@pytest.mark.parametrize("argument", ["frames", "out"])
def test_frames_that_do_not_fit(argument):
    ones = np.ones(3, "f4")
    frames = np.zeros((4, 3, 3), "u1")
    for case, changes, error in array_errors(frames if argument == "frames" else X, argument == "frames"):
        if error == UNALIGNED and argument == "frames":
            continue
        out = np.full((3, 4, 3), 7, "f4")
        arrays = {"frames": frames, "out": out}
        arrays[argument] = described(arrays[argument], **changes)
        assert normalize_images(scale=ones, shift=ones, **arrays) == error, case
        assert (out == 7).all()


def test_other_arguments_that_do_not_fit_frames():
    ones, frames, out = np.ones(1025, "f4"), np.zeros((4, 6, 3), "u1"), np.full((3, 4, 6), 7, "f4")
    for missing in range(4):
        given = [frames, ones, ones, out]
        given[missing] = None
        assert normalize_images(*given) == NULL
    for dtype in set(TYPES) - {"uint8"}:
        assert normalize_images(frames.astype(dtype), ones, ones, out) == BAD_TYPE
    for dtype in set(TYPES) - {"float32"}:
        assert normalize_images(frames, ones, ones, out.astype(dtype)) == BAD_TYPE
    for shape in ((12,), (12, 3), (1, 1, 4, 6, 3)):
        assert normalize_images(np.zeros(shape, "u1"), ones, ones, out) == BAD_NDIM
    for channels in (0, 1025):
        arrays = np.zeros((4, 6, channels), "u1"), np.zeros((channels, 4, 6), "f4")
        assert normalize_images(arrays[0], ones, ones, arrays[1]) == BAD_CHANNELS
    assert normalize_images(frames, ones, ones, out, channels_last=True) == BAD_SHAPE
    for shape in ((4, 6, 3), (3, 6, 4), (3, 4, 5), (1, 3, 4, 6), (3, 24)):
        assert normalize_images(frames, ones, ones, np.zeros(shape, "f4")) == BAD_SHAPE
    assert normalize_images(frames[None], ones, ones, np.zeros((2, 3, 4, 6), "f4")) == BAD_SHAPE
    assert (out == 7).all()


def test_overlaps_of_frames():
    ones, memory = np.ones(3, "f4"), np.full(1000, 7, "u1")
    out = memory[400:688].view("f4").reshape(3, 4, 6)
    for start, error in ((328, OK), (329, OVERLAP), (400, OVERLAP), (687, OVERLAP), (688, OK)):
        memory[:] = 7
        frames = memory[start : start + 72].reshape(4, 6, 3)
        assert normalize_images(frames, ones, ones, out) == error
        assert (memory == 7).all() == (error == OVERLAP)
    memory[:] = 7
    assert normalize_images(memory[:72].reshape(4, 6, 3), ones, ones, described(out, strides=(0, 24, 4))) == OVERLAP
    assert (memory == 7).all()


def test_every_error_has_a_text():
    texts = [api.error_text(error).decode() for error in range(NO_MEMORY + 1)]
    assert len(set(texts)) == len(texts)
    assert api.error_text(-1) == api.error_text(NO_MEMORY + 1) == b"unknown error"


# ---- compiled modules -------------------------------------------------------------------------------


def snippet(language):
    """What the README has in this language."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    return text.partition(f"```{language}\n")[2].partition("```")[0]


C_MODULE = """
static PyObject *frames_to_planes(PyObject *self, PyObject *args)
{
    Py_buffer x, y;
    PyObject *frames;
    int error = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "Ow*", &frames, &y))
        return NULL;
    if (PyObject_GetBuffer(frames, &x, PyBUF_ND) == 0) {
        error = to_planes((unsigned char *)x.buf, x.shape[0], x.shape[1], x.shape[2], (float *)y.buf);
        PyBuffer_Release(&x);
    }
    PyBuffer_Release(&y);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(error);
}

/* normalize(params, x, axis, out): float32 arrays of any strides */
static PyObject *normalize(PyObject *self, PyObject *args)
{
    Py_buffer params, views[2];
    PyObject *x, *y;
    int axis, error;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*OiO", &params, &x, &axis, &y))
        return NULL;
    if (PyObject_GetBuffer(x, &views[0], PyBUF_STRIDES) == 0) {
        if (PyObject_GetBuffer(y, &views[1], PyBUF_STRIDES | PyBUF_WRITABLE) == 0) {
            bn_array from = {views[0].buf, BN_FLOAT32, views[0].ndim, views[0].shape, views[0].strides};
            bn_array to = {views[1].buf, BN_FLOAT32, views[1].ndim, views[1].shape, views[1].strides};
            bn_activation relu = {BN_CLIP, 0, 6, 0};
            Py_BEGIN_ALLOW_THREADS
            error = bn->normalize((const bn_params *)params.buf, &from, axis, NULL, &relu, &to);
            Py_END_ALLOW_THREADS
            if (error)
                PyErr_SetString(PyExc_ValueError, bn->error_text(error));
            PyBuffer_Release(&views[1]);
        }
        PyBuffer_Release(&views[0]);
    }
    PyBuffer_Release(&params);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *constants(PyObject *self, PyObject *none)
{
    (void)self, (void)none;
    return Py_BuildValue("{si si si si si si si si si si}", "abi", BN_C_ABI, "array", (int)sizeof(bn_array),
                         "activation", (int)sizeof(bn_activation), "api", (int)sizeof(bn_api), "normalize",
                         (int)offsetof(bn_api, normalize), "text", (int)offsetof(bn_api, error_text), "images",
                         (int)offsetof(bn_api, normalize_images), "int16", BN_INT16, "hard_swish", BN_HARD_SWISH,
                         "no_memory", BN_NO_MEMORY);
}

static PyObject *connect(PyObject *self, PyObject *none)
{
    (void)self, (void)none;
    bn = bn_c_import();
    if (!bn)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"normalize", normalize, METH_VARARGS, NULL},
    {"frames_to_planes", frames_to_planes, METH_VARARGS, NULL},
    {"constants", constants, METH_NOARGS, NULL},
    {"connect", connect, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "face", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_face(void)
{
    PyObject *made = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
    if (made != NULL)
        PyUnstable_Module_SetGIL(made, Py_MOD_GIL_NOT_USED);
#endif
    return made;
}
"""

HEADERS = Path(sysconfig.get_path("include"))
COMPILERS = {"c": os.environ.get("CC", "cc").split()[0], "c++": os.environ.get("CXX", "c++").split()[0]}


def compiled(folder, name, source, language, *flags):
    """A module compiled in a folder of its own, and loaded."""
    compiler = shutil.which(COMPILERS[language])
    if not compiler or not (HEADERS / "Python.h").exists():
        pytest.skip(f"there is no {COMPILERS[language]}, or no Python.h in {HEADERS}, to compile with")
    target = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    command = [compiler, "-x", language, "-shared", "-fPIC", *flags]
    command += [f"-I{bn_c.get_include()}", f"-I{HEADERS}", "-o", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["c", "c++"])
def face(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("face")
    (folder / "face.c").write_text(snippet("c") + C_MODULE)
    return compiled(folder, "face", folder / "face.c", request.param, "-Wall", "-Wextra", "-Werror")


def test_get_include():
    assert (Path(bn_c.get_include()) / "bn_c/bn_c.h").is_file()
    assert Path(bn_c.get_include()).is_absolute()


def test_the_header_and_this_file_agree(face):
    assert face.constants() == {
        "abi": api.abi,
        "array": ctypes.sizeof(Array),
        "activation": ctypes.sizeof(Activation),
        "api": ctypes.sizeof(Api),
        "normalize": Api.normalize.offset,
        "text": Api.error_text.offset,
        "images": Api.normalize_images.offset,
        "int16": TYPES["int16"],
        "hard_swish": HARD_SWISH,
        "no_memory": NO_MEMORY,
    }
    assert api.size == ctypes.sizeof(Api)


@pytest.mark.parametrize("axis", [1, -1])
def test_a_module_in_c(face, rng, axis):
    face.connect()
    x = values(rng, (20, 3, 8, 3), "float32")[:, :, ::-2]
    out = np.zeros_like(x)
    face.normalize(folded([1, 2, 3], [4, 5, 6]), x, axis, out)
    expected = bn_c.batch_norm_inference(x, [1, 2, 3], [4, 5, 6], axis=axis, activation="relu6")
    np.testing.assert_array_equal(out, expected)
    with pytest.raises(ValueError, match="axis: expected -ndim to ndim - 1"):
        face.normalize(folded([1], [4]), x, 4, out)


def test_frames_to_planes(face, rng):
    face.connect()
    frames, planes = values(rng, (2, 5, 6, 3), "uint8"), np.zeros((2, 3, 5, 6), "f4")
    assert face.frames_to_planes(frames, planes) == OK
    expected = bn_c.ImageNormalizer.imagenet(reverse_channels=True)(frames)
    np.testing.assert_array_equal(planes, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"abi": 2}, r"expected C ABI 1 of \d+ bytes or more, got 2 of \d+; build this module again"),
        ({"abi": 0}, "got 0 of .* install a newer bn_c"),
        ({"size": 16}, "got 1 of 16; install a newer bn_c"),
    ],
)
def test_another_abi(face, monkeypatch, changes, message):
    other = Api(**{"abi": api.abi, "size": api.size, **changes})
    monkeypatch.setattr(_core, "c_api", new_capsule(ctypes.addressof(other), b"bn_c._core.c_api", None))
    with pytest.raises(ImportError, match=message):
        face.connect()


def test_a_longer_table(face, monkeypatch):
    """Entries that were added later do not matter."""
    other = Api(abi=api.abi, size=api.size + 8)
    with monkeypatch.context() as patched:
        patched.setattr(_core, "c_api", new_capsule(ctypes.addressof(other), b"bn_c._core.c_api", None))
        face.connect()
    face.connect()


def test_a_module_in_cython(tmp_path, rng):
    pytest.importorskip("Cython")
    (tmp_path / "whitening.pyx").write_text(snippet("cython"))
    # Cython finds bn_c where Python does, if that is a path: so it is of editable installs too.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-m", "cython", "-3", "-Werror", "-X", "freethreading_compatible=True", "whitening.pyx"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    whiten = compiled(tmp_path, "whitening", tmp_path / "whitening.c", "c").whiten
    x = values(rng, (500, 8), "float32")[:, ::2]
    expected = bn_c.batch_norm(x)
    whiten(x)
    np.testing.assert_array_equal(x, expected)
    with pytest.raises(ValueError, match="out: expected x or residual itself"):
        whiten(np.lib.stride_tricks.as_strided(x, (4, 4), (4, 4)))
