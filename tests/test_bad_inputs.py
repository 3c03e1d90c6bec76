"""What crashed others and what users get wrong: refused by name with nothing written, or the exact result.

Each case runs in a forked process, so that a crash is the failure of that case and says where it happened.
"""

import array
import collections
import copy
import ctypes
import datetime
import decimal
import fractions
import gc
import importlib
import inspect
import io
import itertools
import mmap
import os
import pickle
import re
import sys
import threading
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import oracle
import pytest
from numpy.lib.stride_tricks import as_strided
from processes import SECONDS, isolated

import bn_c
from bn_c import _dispatch, _threads, cli

GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
NUMPY_2 = int(np.__version__.split(".")[0]) >= 2
SHAPE = (4, 3, 5)
CHANNELS = SHAPE[1]
MANY = sys.maxsize // 32  # samples: float64 arrays of so many could not be larger
BEYOND_TEXT = 10**5000  # str() refuses to write it
NAN, INF = float("nan"), float("inf")


# ---- good arguments, of which each case spoils one --------------------------------------------------


def good():
    """Every argument as it should be; `added` is a residual for those that want one."""
    rng = np.random.default_rng(3)
    w = SimpleNamespace(eps=1e-5, residual=None, activation=None, dtype=None, num_threads=None, changed=None)
    w.momentum, w.num_features = 0.1, CHANNELS
    put(w, rng.normal(2, 3, SHAPE).astype(np.float32))
    w.out = np.full(SHAPE, 7, np.float32)
    w.added = rng.normal(0, 1, SHAPE).astype(np.float32)
    return w


def put(w, x, axis=1):
    """Makes x the good one, with parameters to go with it; returns it."""
    rng = np.random.default_rng(5)
    w.x, w.axis, w.out = x, axis, None
    w.gamma, w.beta, w.mean = (rng.normal(1, 1, x.shape[axis]).astype(np.float32) for _ in range(3))
    w.var = rng.uniform(1, 2, x.shape[axis]).astype(np.float32)
    return x


def fill(layer, w):
    layer.gamma, layer.beta, layer.running_mean, layer.running_var = w.gamma, w.beta, w.mean, w.var
    return layer


def layer_of(w):
    given = {name: getattr(w, name) for name in ("eps", "axis", "activation", "num_threads")}
    return fill(bn_c.BatchNorm(len(w.gamma), **given), w)


def spoil(case):
    """The arguments of a case, copies of the good ones, and of what is meant by all."""
    w = good()
    value = case.make(w) if inspect.isfunction(case.make) else case.make
    w.layer = layer_of(w)
    w.stats = bn_c.BatchStats(len(w.gamma))
    sane = SimpleNamespace(**{k: np.array(v) if isinstance(v, np.ndarray) else v for k, v in vars(w).items()})
    meant = copy.copy(sane)
    setattr(w, case.argument, value)
    w.changed = case.argument
    if type(value) is np.ndarray and case.argument != "out":
        setattr(meant, case.argument, np.array(value))
    elif value is None or isinstance(value, (bool, int, float, str, tuple)):
        setattr(meant, case.argument, value)
    return w, sane, meant


# ---- the calls that take an argument ----------------------------------------------------------------


def options(w):
    names = ("eps", "axis", "residual", "activation", "dtype", "out", "num_threads")
    return {name: getattr(w, name) for name in names}


def batch(w):
    return bn_c.batch_norm(w.x, w.gamma, w.beta, **options(w))


def inference(w):
    return bn_c.batch_norm_inference(w.x, w.mean, w.var, w.gamma, w.beta, **options(w))


def statistics(w):
    return bn_c.batch_stats(w.x, axis=w.axis, num_threads=w.num_threads)


def update(w):
    return w.stats.update(w.x, axis=w.axis)


def layer(w):
    return w.layer(w.x, residual=w.residual, dtype=w.dtype, out=w.out)


def fast(w):
    """The layer's short way, with statistics that an earlier call has folded."""
    w.layer(np.zeros([len(w.gamma)] * (w.axis + 1 or 1), np.float32))
    return w.layer(w.x, out=w.out)


def training(w):
    return layer(SimpleNamespace(**{**vars(w), "layer": w.layer.train()}))


def create(w):
    given = {} if w.changed == "num_features" else {w.changed: getattr(w, w.changed)}
    return fill(bn_c.BatchNorm(w.num_features, **given), w)(w.x, out=w.out)


def assign(w):
    attribute = {"mean": "running_mean", "var": "running_var"}.get(w.changed, w.changed)
    setattr(w.layer, attribute, getattr(w, w.changed))
    return w.layer(w.x, out=w.out)


def process(w):
    bn_c.set_num_threads(w.num_threads)
    return batch(w)


def create_stats(w):
    return bn_c.BatchStats(w.num_features).update(w.x)


X = (batch, inference, statistics, update, layer, fast, training)
GIVEN_STATISTICS = (inference, layer, fast)
Y = (batch, inference, layer, training)
OUT = (*Y, fast)
PARAMETER = (batch, inference, assign)
STATISTIC = (inference, assign)
AXIS = (batch, inference, statistics, update, create)
OPTION = (batch, inference, create, assign)
THREADS = (batch, inference, statistics, create, assign)


good()  # NumPy loads its generators when first asked: here, and not in every child


# ---- what has to hold -------------------------------------------------------------------------------


class Case(NamedTuple):
    """One wrong, or unusual, value of one argument."""

    verdict: str
    argument: str
    faces: tuple
    make: object
    says: str = ""


class Saying(NamedTuple):
    """A value, and words that help and that its error has to contain."""

    text: str
    make: object


def whole(a):
    """The array that owns the memory of a view."""
    owner, base = a, a.base
    while base is not None:
        owner = base if isinstance(base, np.ndarray) else owner
        base = getattr(base, "base", None)
    return owner


def memory(w):
    return {name: whole(a).tobytes() for name, a in vars(w).items() if isinstance(a, np.ndarray)}


def state(w):
    """All that a call could have changed but for arrays."""
    one = w.layer
    settings = (one.eps, one.momentum, one.activation, one.num_threads, one.axis, one.num_features)
    arrays = {name: (a.shape, a.tobytes()) for name, a in one.state_dict().items()}
    return repr((arrays, settings, w.stats.to_dict(), bn_c.get_num_threads()))


def plain(y):
    """A result as an array."""
    readable = hasattr(y, "__array__") or not hasattr(y, "__dlpack__")
    return np.asarray(y) if readable else np.from_dlpack(y)


def assert_named(error, names):
    """TypeError or ValueError, of one line that begins with the argument's name."""
    text = str(error)
    what = f"{type(error).__name__}: {text:.500}"
    assert isinstance(error, (TypeError, ValueError)), what
    assert re.match(rf"({names})\b", text), f"does not name {names}: {what}"
    assert "\n" not in text, f"more than one line: {what}"


def error_of(run, *arguments):
    """What it raises, None if nothing."""
    try:
        run(*arguments)
    except Exception as error:
        return error
    return None


def assert_statistics(stats, x, axis):
    assert stats.num_features == x.shape[axis]
    if x.size == 0:
        assert stats.count == 0
        assert np.isnan(stats.mean).all()
    elif np.isfinite(x).all():
        oracle.assert_statistics(stats, x, axis)


def assert_exact(face, meant, result):
    """The result is that of the definition."""
    if isinstance(result, bn_c.BatchStats):
        assert_statistics(result, meant.x, meant.axis)
        return
    y, mean, var = plain(result), meant.mean, meant.var
    assert y.shape == meant.x.shape
    assert y.dtype == (meant.dtype or y.dtype)
    assert y.dtype in ("f4", "f2")
    if face in (batch, training, process):
        stats = bn_c.batch_stats(meant.x, axis=meant.axis)
        assert_statistics(stats, meant.x, meant.axis)
        mean, var = stats.mean, stats.var
    parameters = meant.gamma, meant.beta, meant.eps, meant.axis
    oracle.assert_forward(y, meant.x, mean, var, *parameters, meant.residual, meant.activation)


def assert_works(w, one):
    """The layer still does what its parameters say."""
    assert_exact(layer, SimpleNamespace(**{**vars(w), "dtype": None}), one(w.x, residual=w.residual))


NAMES = {"mean": "(running_)?mean", "var": "(running_)?var", "dtype": "dtype|out"}


def judge(face, case):
    """Runs one case with one call; `refused`, `exact`, or `either` of them."""
    w, sane, meant = spoil(case)
    before, results = (memory(w), state(w)), []
    error = error_of(lambda: results.append(face(w)))
    if error is None:
        assert case.verdict != "refused", "expected an error, got a result"
        assert_exact(face, meant, results[0])
        assert w.out is None or results[0] is w.out or isinstance(results[0], bn_c.BatchStats)
        return
    if case.verdict == "exact":
        raise error
    assert_named(error, NAMES.get(case.argument, case.argument))
    assert case.says in str(error), f"does not say {case.says}: {error}"
    assert (memory(w), state(w)) == before, f"written although it raised {error}"
    assert_works(sane, w.layer.eval())


def together(checks):
    """Runs all of them, and tells which went wrong, those that did so alike together."""
    wrong = {}
    for name, check in checks:
        error = error_of(check)
        if error is not None:
            lines = traceback.format_exception(error)
            what = str(error) if isinstance(error, AssertionError) else "".join(lines)[-1500:]
            wrong.setdefault(what, []).append(name)
    if wrong:
        raise AssertionError("\n".join(f"{', '.join(names)}: {what}" for what, names in wrong.items()))


def judge_all(*rows):
    """Runs cases with every call that takes their argument."""
    pairs = [(face, case) for case in rows for face in case.faces]
    together((f"{face.__name__} ({case.argument})", partial(judge, face, case)) for face, case in pairs)


def cases(verdict, argument, faces, **values):
    """A row for each value."""
    rows = []
    for name, value in values.items():
        says, make = value if isinstance(value, Saying) else ("", value)
        rows.append(pytest.param([Case(verdict, argument, faces, make, says)], id=f"{argument}-{name}"))
    return rows


def merged(*tables):
    """One row for what several tables call the same."""
    rows = {}
    for table in tables:
        for row in table:
            rows.setdefault(row.id.partition("-")[2], []).extend(row.values[0])
    return [pytest.param(row, id=f"per_channel-{name}") for name, row in rows.items()]


# ---- objects that misbehave -------------------------------------------------------------------------


class Result:
    """Returns its value, or raises it."""

    def __init__(self, value):
        self.value = value

    def give(self):
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class Arrays(Result):
    """An object with `__array__`."""

    def __array__(self, dtype=None, copy=None):
        return self.give()


class Fresh(Result):
    """`__array__` returns a copy each time: what is written there is lost."""

    def __array__(self, dtype=None, copy=None):
        return self.value.copy()


class ArrayAttribute(Result):
    """Looking `__array__` up raises."""

    @property
    def __array__(self):
        return self.give()


class Lends:
    """An object with DLPack and nothing else."""

    def __init__(self, lender):
        self.lender = lender

    def __dlpack__(self, **options):
        return self.lender.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.lender.__dlpack_device__()


class Capsule(Result):
    """DLPack that returns or raises anything."""

    def __dlpack__(self, **options):
        return self.give()

    def __dlpack_device__(self):
        return (1, 0)


class Interface:
    """An object with `__array_interface__`, and the array whose memory that is."""

    def __init__(self, interface, array=None):
        self.__array_interface__, self.array = interface, array


class Index(Result):
    """An object with `__index__`."""

    def __index__(self):
        return self.give()


class Sparse:
    """What a sparse matrix shows of itself."""

    shape, dtype, ndim, nnz = SHAPE, np.dtype("f4"), 3, 0

    def toarray(self):
        return np.zeros(SHAPE, "f4")


class BadLength:
    """A sequence that cannot be read."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise RuntimeError("not today")


class BadRepr:
    """Even its repr raises."""

    def __repr__(self):
        raise RuntimeError("no repr")


class BadDtype:
    """Looking `dtype` up raises."""

    @property
    def dtype(self):
        raise RuntimeError("no dtype")


class Liar(np.ndarray):
    """A subclass whose attributes lie."""

    shape = property(lambda self: (10**9, 3, 5))
    strides = property(lambda self: (1 << 40,))
    ndim = property(lambda self: 77)
    dtype = property(lambda self: "f8")


class Spoiler(np.ndarray):
    """A subclass that raises wherever NumPy asks it."""

    raises = False

    def __array_finalize__(self, source):
        if Spoiler.raises:
            raise RuntimeError("finalize")

    def __array__(self, *arguments, **options):
        raise RuntimeError("array")

    def __array_function__(self, *arguments, **options):
        raise RuntimeError("function")

    def __array_ufunc__(self, *arguments, **options):
        raise RuntimeError("ufunc")


class Reentrant:
    """`__array__` calls the package."""

    def __init__(self, value, x):
        self.value, self.x = value, x

    def __array__(self, dtype=None, copy=None):
        bn_c.batch_norm(self.x, num_threads=2)
        bn_c.BatchNorm(self.x.shape[1]).train()(self.x)
        return self.value


class Endless:
    """`__array__` calls the package with the same object again."""

    def __array__(self, dtype=None, copy=None):
        return bn_c.batch_norm(self)


def spoiler(a):
    Spoiler.raises = False
    view = a.view(Spoiler)
    Spoiler.raises = True
    return view


def swapped(a):
    return a.astype(a.dtype.newbyteorder())


def explicit(a):
    """The machine's byte order, spelt out: what ctypes and file formats give."""
    return a.view(a.dtype.newbyteorder("<" if sys.byteorder == "little" else ">"))


def unaligned(a):
    view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def packed(a):
    """A field of a struct of five bytes."""
    view = np.zeros(a.shape, [("a", a.dtype), ("b", "u1")])["a"]
    view[...] = a
    return view


def read_only(a):
    a.flags.writeable = False
    return a


def released(a):
    view = memoryview(a)
    view.release()
    return view


def c_floats(a):
    return (ctypes.c_float * a.size)(*a.ravel().tolist())


def mapped(a):
    pages = mmap.mmap(-1, a.nbytes)
    pages[:] = a.tobytes()
    return pages


def halves(w):
    """Makes x float16."""
    return put(w, w.x.astype(np.float16))


def bytes_of(w, dtype="u1"):
    """Makes x integers."""
    return put(w, (np.arange(60).reshape(SHAPE) * 37 % 101).astype(dtype))


def one_sample(w, dtype="f4"):
    """Makes x rank 1."""
    return put(w, np.arange(1, 8).astype(dtype), axis=0)


def lengths(*shape):
    return lambda w: put(w, np.zeros(shape, np.float32))


# ---- x ----------------------------------------------------------------------------------------------

NOT_ARRAYS = {
    "none": None,
    "scalar": 1.5,
    "int": 3,
    "true": True,
    "complex_number": 1j,
    "numpy_scalar": np.float32(3),
    "numpy_complex": np.complex64(3),
    "list": lambda w: w.added.tolist(),
    "ragged_list": [[1.0], [2.0, 3.0]],
    "tuple": lambda w: tuple(map(tuple, w.added[:, :, 0])),
    "str": "1, 2, 3",
    "bytes": b"\0" * 240,
    "dict": {"a": 1},
    "set": {1.0},
    "generator": lambda w: (value for value in w.added),
    "function": len,
    "array_type": np.ndarray,
    "ellipsis": ...,
    "datetime": datetime.datetime(2020, 1, 1),
    "sparse": Sparse(),
    "bad_sequence": BadLength(),
    "bad_repr": BadRepr(),
    "array_raises": Arrays(RuntimeError("not today")),
    "array_raises_two_lines": Arrays(RuntimeError("two\nlines")),
    "array_returns_list": Arrays([1.0]),
    "array_returns_none": Arrays(None),
    "array_returns_zero_d": Arrays(np.array(1, "f4")),
    "array_returns_float64": lambda w: Arrays(w.added.astype("f8")),
    "array_is_no_method": ArrayAttribute(3),
    "array_lookup_raises": ArrayAttribute(RuntimeError("not today")),
    "dlpack_raises": Capsule(BufferError("not today")),
    "dlpack_returns_garbage": Capsule("garbage"),
    "dlpack_float64": lambda w: Lends(w.added.astype("f8")),
    "interface_garbage": Interface({"shape": "no", "typestr": 3}),
    "interface_no_dict": Interface(3),
    "memoryview_released": lambda w: released(w.added),
    "memoryview_double": lambda w: memoryview(w.added.astype("f8")),
    "memoryview_zero_d": memoryview(np.array(1, "f4")),
}


def wrong_arrays(base, *, masked_data=True):
    """Arrays of the right shape that are nevertheless wrong, made from an attribute of the good arguments."""

    def of(change):
        return lambda w: change(getattr(w, base))

    made = {
        "int64": of(lambda a: a.astype("i8")),
        "int32": of(lambda a: a.astype("i4")),
        "uint64": of(lambda a: abs(a).astype("u8")),
        "bool": of(lambda a: a > 0),
        "complex": of(lambda a: a.astype("c8")),
        "longdouble": of(lambda a: a.astype("g")),
        "object": of(lambda a: a.astype(object)),
        "object_of_none": of(lambda a: np.full(a.shape, None)),
        "unicode": of(lambda a: a.astype("U8")),
        "byte_strings": of(lambda a: a.astype("S8")),
        "datetime64": of(lambda a: a.astype("i8").view("M8[s]")),
        "timedelta64": of(lambda a: a.astype("i8").view("m8[s]")),
        "struct": of(lambda a: np.zeros(a.shape, "f4,f4")),
        "one_field_struct": of(lambda a: a.view([("a", "f4")])),
        "record": of(lambda a: a.view([("a", "f4")]).view(np.recarray)),
        "void": of(lambda a: a.view("V4")),
        "swapped": Saying("byte order", of(swapped)),
        "swapped_half": Saying("byte order", of(lambda a: swapped(a.astype("f2")))),
        "unaligned": Saying("align", of(unaligned)),
        "unaligned_half": Saying("align", of(lambda a: unaligned(a.astype("f2")))),
        "packed_field": Saying("align", of(packed)),
        "masked": Saying("masked", of(lambda a: np.ma.masked_array(a, a > 0))),
        "masked_nowhere": Saying("masked", of(np.ma.masked_array)),
        "masked_constant": np.ma.masked,
        "zero_d": np.array(1, "f4"),
    }
    if hasattr(np.dtypes if NUMPY_2 else np, "StringDType"):
        made["strings"] = of(lambda a: a.astype("U8").astype(np.dtypes.StringDType()))
    return made


def too_deep(base):
    def of(rank):
        return lambda w: getattr(w, base)[0, :, :1].reshape((1, 3) + (1,) * (rank - 2))

    return {f"rank_{rank}": of(rank) for rank in ((33, 64) if NUMPY_2 else ())}


X_CASES = [
    *cases("refused", "x", X, **NOT_ARRAYS, **wrong_arrays("added"), **too_deep("x")),
    *cases(
        "refused",
        "x",
        X,
        float64=Saying("x.astype(np.float32)", lambda w: w.x.astype("f8")),
        float64_empty=Saying("x.astype(np.float32)", np.zeros((0, 3))),
        swapped_uint16=Saying("byte order", lambda w: swapped(bytes_of(w, "u2"))),
        unaligned_int16=Saying("align", lambda w: unaligned(bytes_of(w, "i2"))),
        endless=Endless(),
    ),
    *cases(
        "refused",
        "x",
        (batch, inference, statistics, update, layer),
        array_array_double=lambda w: array.array("d", one_sample(w)),
        range=lambda w: range(one_sample(w).size),
    ),
    *cases("refused", "x", (layer, fast, training, update), fewer_channels=lambda w: w.x[:, :2]),
    *cases("refused", "x", (layer, fast, training, update), more_channels=np.ones((4, 4, 5), "f4")),
    *cases("refused", "x", (layer, fast, training, update), no_channels=np.ones((4, 0, 5), "f4")),
    *cases(
        "refused",
        "x",
        (batch, training),
        no_samples=lengths(0, 3, 5),
        no_pixels=lengths(4, 3, 0),
        neither=lengths(0, 3, 0),
        no_rows=lengths(0, 3),
    ),
    *cases("refused", "x", (training,), one_value=lengths(1, 3), one_pixel=lengths(1, 3, 1, 1)),
    *cases(
        "exact",
        "x",
        (*GIVEN_STATISTICS, statistics, update),
        no_samples=lengths(0, 3, 5),
        no_pixels=lengths(4, 3, 0),
        neither=lengths(0, 3, 0),
        no_rows=lengths(0, 3),
        no_pixels_of_many=lengths(MANY, 3, 0),
    ),
    *cases(
        "exact",
        "x",
        X,
        empty_channels=lengths(4, 0, 5),
        nothing=lengths(0, 0),
        no_channels_of_many=lengths(MANY, 0),
    ),
    *cases(
        "exact",
        "x",
        X,
        memoryview=lambda w: memoryview(w.x),
        memoryview_read_only=lambda w: memoryview(w.x).toreadonly(),
        memoryview_uint8=lambda w: memoryview(bytes_of(w)),
        read_only=lambda w: read_only(w.x),
        of_bytes=lambda w: np.frombuffer(bytes_of(w).tobytes(), "u1").reshape(SHAPE),
        array_method=lambda w: Arrays(w.x),
        array_method_masked_nowhere=lambda w: Arrays(np.ma.masked_array(w.x)),
        array_method_reentrant=lambda w: Reentrant(w.x, w.x),
        interface=lambda w: Interface(w.x.__array_interface__, w.x),
        dlpack=lambda w: Lends(w.x),
        dlpack_half=lambda w: Lends(halves(w)),
        matrix=lambda w: np.asmatrix(put(w, w.x[:, :, 0].copy())),
        subclass=lambda w: w.x.view(type("Plain", (np.ndarray,), {})),
        subclass_lies=lambda w: w.x.view(Liar),
        subclass_spoils=lambda w: spoiler(w.x),
        explicit=lambda w: explicit(w.x),
        explicit_half=lambda w: explicit(halves(w)),
        explicit_uint16=lambda w: explicit(bytes_of(w, "u2")),
        record_field=lambda w: np.rec.fromarrays([w.x, w.added], names="a,b").a,
        reversed=lambda w: put(w, w.x[::-1, :, ::-1]),
        transposed=lambda w: put(w, w.x.transpose(2, 1, 0)),
        fortran=lambda w: np.asfortranarray(w.x),
        every_other=lambda w: put(w, np.repeat(w.x, 2, 2)[:, :, ::2]),
        broadcast=lambda w: put(w, np.broadcast_to(w.x[:1], SHAPE)),
        broadcast_channels=lambda w: put(w, np.broadcast_to(w.x[:, :1], SHAPE)),
        overlapping_windows=lambda w: put(w, as_strided(w.x, SHAPE, (4, 8, 4))),
        odd_stride_of_one=lambda w: put(w, as_strided(w.x, (1, 3, 5), (3, 20, 4))),
        rank_32=lambda w: put(w, w.x[:, :, :1].reshape((4, 3) + (1,) * 30)),
        rank_32_full=lambda w: put(w, np.arange(1 << 12, dtype="f4").reshape((2,) * 12 + (1,) * 20)),
        int8=lambda w: bytes_of(w, "i1"),
        uint16=lambda w: bytes_of(w, "u2"),
        int16=lambda w: bytes_of(w, "i2"),
        near_1e30=lambda w: put(w, w.x * np.float32(1e30)),
        near_3e38=lambda w: put(w, np.float32(3e38) * np.sign(w.x)),
        near_1e_minus_40=lambda w: put(w, w.x * np.float32(1e-40)),
        constant=lambda w: put(w, np.full(SHAPE, 1e6, "f4")),
        with_nan=lambda w: put(w, np.where(w.x == w.x[0, 0, 0], np.float32(NAN), w.x)),
        with_infinity=lambda w: put(w, np.where(w.x == w.x[0, 0, 0], np.float32(INF), w.x)),
    ),
    *cases(
        "exact",
        "x",
        (batch, inference, statistics, update, layer),
        array_array=lambda w: array.array("f", one_sample(w)),
        array_array_int16=lambda w: array.array("h", one_sample(w, "i2")),
        bytearray=lambda w: bytearray(one_sample(w, "u1")),
        ctypes_array=lambda w: c_floats(one_sample(w)),
        mapped_file=lambda w: mapped(one_sample(w, "u1")),
        rank_1=one_sample,
        rank_1_last_axis=lambda w: put(w, w.x[0, :, 0].copy(), axis=-1),
    ),
]


# ---- residual and out -------------------------------------------------------------------------------

WRONG_SHAPES = {
    "shorter": lambda w: np.ones((4, 3, 4), "f4"),
    "longer": lambda w: np.ones((4, 3, 6), "f4"),
    "transposed": lambda w: np.ones(SHAPE, "f4").T,
    "flat": lambda w: np.ones(60, "f4"),
    "rank_lower": lambda w: np.ones((4, 15), "f4"),
    "rank_higher": lambda w: np.ones((1, *SHAPE), "f4"),
    "one_row": lambda w: np.ones((1, 3, 5), "f4"),
    "per_channel": lambda w: np.ones((3, 1), "f4"),
    "empty": lambda w: np.ones((0, 3, 5), "f4"),
    "rows_swapped": lambda w: np.ones((3, 4, 5), "f4"),
}


def adding(change):
    """A residual made from the good one."""

    def make(w):
        w.residual = w.added
        return change(w.added)

    return make


def add_rounded(w):
    w.residual = w.added.astype("f2")
    return w.residual


RESIDUAL_CASES = [
    *cases(
        "refused",
        "residual",
        Y,
        **{name: value for name, value in NOT_ARRAYS.items() if name != "none"},
        **wrong_arrays("added"),
        **too_deep("x"),
        **WRONG_SHAPES,
        float64=Saying("residual.astype(np.float32)", lambda w: w.added.astype("f8")),
        uint8=lambda w: bytes_of(w),
        int16=lambda w: bytes_of(w, "i2"),
    ),
    *cases(
        "exact",
        "residual",
        Y,
        half=add_rounded,
        read_only=adding(lambda a: read_only(a.copy())),
        memoryview=adding(memoryview),
        array_method=adding(Arrays),
        dlpack=adding(Lends),
        subclass_lies=adding(lambda a: a.view(Liar)),
        subclass_spoils=adding(spoiler),
        explicit=adding(explicit),
        reversed=lambda w: w.added[::-1, ::-1, ::-1],
        fortran=lambda w: np.asfortranarray(w.added),
        broadcast=lambda w: np.broadcast_to(w.added[:1], SHAPE),
        is_x=lambda w: w.x,
        reversed_x=lambda w: w.x[::-1],
        overlapping_windows=lambda w: as_strided(w.added, SHAPE, (4, 8, 4)),
    ),
]


def shifted(name, by, dtype="f4"):
    """out begins `by` elements behind, or before, the other array."""

    def make(w):
        a = (w.x if name == "x" else w.added).astype(dtype)
        shared = np.zeros(a.size + abs(by), dtype)
        source, out = shared[max(-by, 0) :][: a.size], shared[max(by, 0) :][: a.size]
        source[:] = a.ravel()
        setattr(w, name, source.reshape(SHAPE))
        return out.reshape(SHAPE)

    return make


def viewed(name, view, shape=SHAPE):
    """out is a view of the other array."""

    def make(w):
        a = np.resize(w.x if name == "x" else w.added, shape)
        if name == "x":
            put(w, a)
        else:
            put(w, np.resize(w.x, shape))
            w.residual = a
        return view(a)

    return make


def interleaved(make_x, make_out, shape):
    """x and out lie in the same array without an element in common."""

    def make(w):
        shared = np.zeros(shape, "f4")
        x, out = make_x(shared), make_out(shared)
        x[...] = np.resize(w.x, x.shape)
        put(w, x)
        return out

    return make


def other_type(x_dtype, out_dtype, first=0):
    """out begins at an element of x's memory, as another dtype."""

    def make(w):
        shared = np.zeros(1024, np.uint8)
        x = shared[:512].view(x_dtype)[:60].reshape(SHAPE)
        x[...] = bytes_of(w, "i2")
        put(w, x)
        return shared[first:].view(out_dtype)[:60].reshape(SHAPE)

    return make


def parameters_in_out(w):
    out = np.zeros(SHAPE, "f4")
    for i, name in enumerate(("gamma", "beta", "mean", "var")):
        view = out.reshape(-1)[i * 7 : i * 7 + 3]
        view[:] = getattr(w, name)
        setattr(w, name, view)
    return out


def all_in_one(w):
    w.residual = w.x
    return w.x


def residual_itself(w):
    w.residual = w.added
    return w.added


def dtype_says(dtype):
    def make(w):
        w.dtype = dtype
        return np.zeros(SHAPE, "f2" if dtype == "f4" else "f4")

    return make


def diagonal(a):
    return as_strided(a, SHAPE, (20, 4, 8))


SQUARE = (4, 3, 4)
OUT_CASES = [
    *cases(
        "refused",
        "out",
        OUT,
        **{name: value for name, value in NOT_ARRAYS.items() if name != "none"},
        **wrong_arrays("added"),
        **too_deep("x"),
        **WRONG_SHAPES,
        false=False,
        float64=lambda w: np.zeros(SHAPE),
        uint8=lambda w: np.zeros(SHAPE, "u1"),
        int16=lambda w: np.zeros(SHAPE, "i2"),
        read_only=Saying("read-only", lambda w: read_only(np.zeros(SHAPE, "f4"))),
        read_only_x=Saying("read-only", lambda w: read_only(w.x)),
        read_only_memoryview=lambda w: memoryview(np.zeros(SHAPE, "f4")).toreadonly(),
        of_bytes=lambda w: np.frombuffer(bytes(240), "f4").reshape(SHAPE),
        broadcast=lambda w: np.broadcast_to(np.zeros((1, 3, 5), "f4"), SHAPE),
        stride_0=lambda w: as_strided(np.zeros(60, "f4"), SHAPE, (0, 20, 4)),
        stride_0_last=lambda w: as_strided(np.zeros(60, "f4"), SHAPE, (60, 20, 0)),
        stride_0_everywhere=lambda w: as_strided(np.zeros(60, "f4"), SHAPE, (0, 0, 0)),
        overlapping_windows=lambda w: as_strided(np.zeros(60, "f4"), SHAPE, (4, 4, 4)),
        overlapping_rows=lambda w: as_strided(np.zeros(60, "f4"), SHAPE, (40, 20, 4)),
        overlapping_backwards=lambda w: as_strided(np.zeros(60, "f4")[30:], SHAPE, (-4, 8, 4)),
        overlapping_diagonal=lambda w: diagonal(np.zeros(60, "f4")),
        array_method_copies=lambda w: Fresh(np.zeros(SHAPE, "f4")),
        sequence_of_rows=lambda w: collections.UserList(np.zeros(SHAPE, "f4")),
    ),
    *cases("refused", "out", Y, half_but_dtype_f4=dtype_says("f4"), single_but_dtype_f2=dtype_says("f2")),
    *cases(
        "either",
        "out",
        (batch, inference, layer, fast, training),
        x_shifted_by_1=shifted("x", 1),
        x_shifted_by_minus_1=shifted("x", -1),
        x_shifted_by_a_row=shifted("x", 5),
        x_shifted_by_minus_a_row=shifted("x", -5),
        x_shifted_by_a_sample=shifted("x", 15),
        x_shifted_by_minus_a_sample=shifted("x", -15),
        x_shifted_by_1_half=shifted("x", 1, "f2"),
        x_shifted_by_minus_1_half=shifted("x", -1, "f2"),
        x_reversed=viewed("x", lambda a: a[::-1, ::-1, ::-1]),
        x_samples_reversed=viewed("x", lambda a: a[::-1]),
        x_channels_reversed=viewed("x", lambda a: a[:, ::-1]),
        x_pixels_reversed=viewed("x", lambda a: a[:, :, ::-1]),
        x_transposed=viewed("x", lambda a: a.transpose(2, 1, 0), SQUARE),
        x_channels_transposed=viewed("x", lambda a: a.transpose(1, 0, 2), (3, 3, 5)),
        x_as_half=other_type("f4", "f2"),
        x_as_half_shifted=other_type("f4", "f2", 2),
        x_as_single=other_type("f2", "f4"),
        x_as_single_shifted=other_type("f2", "f4", 4),
        x_of_int16=other_type("i2", "f2"),
        x_of_uint16=other_type("u2", "f2"),
        x_of_uint16_shifted=other_type("u2", "f2", 2),
        x_of_uint8=other_type("u1", "f2"),
        x_of_uint8_as_single=other_type("u1", "f4"),
        strided_apart=lambda w: as_strided(np.zeros(60, "f4"), SHAPE, (60, 8, 12)),
        interleaved_large=interleaved(lambda a: a[::7, :, ::3], lambda a: a[1::7, :, 1::3], (700, 3, 300)),
    ),
    *cases(
        "either",
        "out",
        Y,
        residual_shifted_by_1=shifted("residual", 1),
        residual_shifted_by_minus_1=shifted("residual", -1),
        residual_shifted_by_a_row=shifted("residual", 5),
        residual_shifted_by_minus_a_row=shifted("residual", -5),
        residual_reversed=viewed("residual", lambda a: a[::-1, ::-1, ::-1]),
        residual_pixels_reversed=viewed("residual", lambda a: a[:, :, ::-1]),
        residual_transposed=viewed("residual", lambda a: a.transpose(2, 1, 0), SQUARE),
    ),
    *cases(
        "exact",
        "out",
        OUT,
        none=None,
        is_x=lambda w: w.x,
        is_x_of_halves=halves,
        is_x_reversed=lambda w: put(w, w.x[::-1, :, ::-1]),
        views_x=lambda w: w.x[:],
        views_x_as_memoryview=lambda w: memoryview(w.x),
        interleaved_samples=interleaved(lambda a: a[::2], lambda a: a[1::2], (8, 3, 5)),
        interleaved_channels=interleaved(lambda a: a[:, ::2], lambda a: a[:, 1::2], (4, 6, 5)),
        interleaved_pixels=interleaved(lambda a: a[:, :, ::2], lambda a: a[:, :, 1::2], (4, 3, 10)),
        interleaved_backwards=interleaved(lambda a: a[::-2], lambda a: a[::2], (8, 3, 5)),
        interleaved_blocks=interleaved(lambda a: a[:, :3], lambda a: a[:, 3:], (4, 6, 5)),
        holds_parameters=parameters_in_out,
        half=lambda w: np.zeros(SHAPE, "f2"),
        explicit=lambda w: explicit(np.zeros(SHAPE, "f4")),
        fortran=lambda w: np.zeros(SHAPE, "f4", order="F"),
        reversed=lambda w: np.zeros(SHAPE, "f4")[::-1, ::-1, ::-1],
        every_other=lambda w: np.zeros((4, 3, 10), "f4")[:, :, ::2],
        memoryview=lambda w: memoryview(np.zeros(SHAPE, "f4")),
        array_method=lambda w: Arrays(np.zeros(SHAPE, "f4")),
        subclass_lies=lambda w: np.zeros(SHAPE, "f4").view(Liar),
        subclass_spoils=lambda w: spoiler(np.zeros(SHAPE, "f4")),
        odd_stride_of_one=lambda w: as_strided(put(w, w.x[:1]).copy(), (1, 3, 5), (0, 20, 4)),
    ),
    *cases(
        "exact",
        "out",
        (batch, inference, layer),
        array_array=lambda w: array.array("f", [0] * one_sample(w).size),
        ctypes_array=lambda w: c_floats(one_sample(w) * 0),
    ),
    *cases("exact", "out", Y, is_residual=residual_itself, is_x_and_residual=all_in_one),
    *cases("either", "out", OUT, dlpack=lambda w: Lends(np.zeros(SHAPE, "f4"))),
    *cases("exact", "out", GIVEN_STATISTICS, empty=lambda w: np.zeros_like(lengths(0, 3, 5)(w))),
]


# ---- one value per channel --------------------------------------------------------------------------


def vector_of(name):
    """Wrong values of gamma, beta, mean or var; they replace the attribute of that name."""

    def of(change):
        return lambda w: change(getattr(w, name))

    arrays = wrong_arrays(name)
    fine = ("longdouble", "swapped", "swapped_half", "unaligned", "unaligned_half", "packed_field")
    return {
        **{key: value for key, value in arrays.items() if key not in fine},
        "length_0": np.zeros(0, "f4"),
        "length_1": np.ones(1, "f4"),
        "length_less": np.ones(CHANNELS - 1, "f4"),
        "length_more": np.ones(CHANNELS + 1, "f4"),
        "column": np.ones((CHANNELS, 1), "f4"),
        "row": np.ones((1, CHANNELS), "f4"),
        "square": np.ones((CHANNELS, CHANNELS), "f4"),
        "scalar": 1.0,
        "int": 1,
        "true": True,
        "uint8": np.ones(CHANNELS, "u1"),
        "str": "1.0",
        "chars": "abc",
        "bytes": b"abc",
        "empty_list": [],
        "short_list": [1.0, 2.0],
        "str_list": ["1", "2", "3"],
        "bool_list": [True, False, True],
        "none_list": [1.0, None, 2.0],
        "complex_list": [1j, 2.0, 3.0],
        "object_list": [object()] * CHANNELS,
        "huge_int_list": [10**400] * CHANNELS,
        "nested_list": [[1.0], [2.0], [3.0]],
        "ragged_list": [[1.0], [2.0, 3.0], []],
        "dict": dict.fromkeys(range(3), 1.0),
        "set": {1.0, 2.0, 3.0},
        "generator": lambda w: (1.0 for _ in range(3)),
        "range": range(3),
        "datetime_list": [datetime.datetime(2020, 1, 1)] * 3,
        "type": np.ndarray,
        "sparse": Sparse(),
        "bad_sequence": BadLength(),
        "bad_repr": BadRepr(),
        "array_raises": Arrays(RuntimeError("not today")),
        "array_raises_two_lines": Arrays(RuntimeError("two\nlines")),
        "array_returns_list": Arrays([1.0, 2.0, 3.0]),
        "array_returns_int": Arrays(np.arange(3)),
        "array_longer": Arrays(np.ones(4, "f4")),
        "endless": Endless(),
        "lies": of(lambda a: np.ones(4, "f4").view(Liar)),
    }


def vector_exact(name):
    def of(change):
        return lambda w: change(getattr(w, name))

    def to(*values):
        def make(w):
            setattr(w, name, np.array(values, np.float64))
            return list(values)

        return make

    return {
        "list": of(np.ndarray.tolist),
        "tuple": of(tuple),
        "int_list": to(1, 2, 3),
        "nan_list": to(1.0, NAN, 2.0),
        "nan": np.array([1, NAN, 2], "f4"),
        "infinity": np.array([1, INF, 2], "f4"),
        "zero": np.zeros(CHANNELS, "f4"),
        "negative": -np.ones(CHANNELS, "f4"),
        "half": np.array([1, 2, 0.5], "f2"),
        "double": of(lambda a: a.astype("f8")),
        "longdouble": of(lambda a: a.astype("g")),
        "swapped": of(swapped),
        "swapped_double": of(lambda a: swapped(a.astype("f8"))),
        "unaligned": of(unaligned),
        "packed_field": of(packed),
        "read_only": of(read_only),
        "reversed": of(lambda a: a[::-1]),
        "every_other": lambda w: np.arange(6, dtype="f4")[::2],
        "broadcast": lambda w: np.broadcast_to(np.float32(2), CHANNELS),
        "memoryview": of(memoryview),
        "array_array": of(lambda a: array.array("d", a)),
        "array_method": of(Arrays),
        "array_method_reentrant": lambda w: Reentrant(getattr(w, name), w.x),
        "subclass_lies": of(lambda a: a.view(Liar)),
        "subclass_spoils": of(spoiler),
        "in_x": lambda w: w.x[0, :, 0],
    }


VECTORS = (("gamma", PARAMETER), ("beta", PARAMETER), ("mean", STATISTIC), ("var", STATISTIC))
VECTOR_CASES = [
    *merged(*(cases("refused", name, faces, **vector_of(name)) for name, faces in VECTORS)),
    *merged(*(cases("exact", name, faces, **vector_exact(name)) for name, faces in VECTORS)),
    *merged(*(cases("exact", name, (inference,), huge=np.array([1, 1e300, 2])) for name, _ in VECTORS)),
    *cases("exact", "gamma", (batch, inference), none=None),
    *cases("exact", "beta", (batch, inference), none=None),
    *merged(
        *(cases("refused", name, (assign,), none=None) for name in ("gamma", "beta")),
        *(cases("refused", name, STATISTIC, none=None) for name in ("mean", "var")),
    ),
]


# ---- numbers and options ----------------------------------------------------------------------------

NOT_NUMBERS = {
    "none": None,
    "str": "1",
    "true": True,
    "numpy_true": np.True_,
    "complex_number": 1j,
    "numpy_complex": np.complex64(1),
    "list": [1],
    "object": object(),
    "bad_repr": BadRepr(),
    "array": np.ones(2),
    "type": int,
}
NOT_INTEGERS = {
    **NOT_NUMBERS,
    "float": 1.0,
    "numpy_float": np.float32(1),
    "nan": NAN,
    "decimal": decimal.Decimal(1),
    "float_array": np.array(1.0),
    "index_raises": Index(RuntimeError("not today")),
    "index_returns_str": Index("1"),
    "index_returns_float": Index(1.0),
}
NO_EPS = {
    "nan": NAN,
    "numpy_nan": np.float32(NAN),
    "negative": -1e-5,
    "infinite": INF,
    "minus_infinite": -INF,
    "beyond_float": 10**400,
    "minus_beyond_float": -(10**400),
    "beyond_text": BEYOND_TEXT,
    "fraction_beyond_float": fractions.Fraction(10**400),
}

FLAGS = ("affine", "track_running_stats", "unbiased_running_var", "allow_single_value", "training")
NUMBER_CASES = [
    *cases("refused", "eps", OPTION, **NOT_NUMBERS, **NO_EPS),
    *cases("either", "eps", OPTION, decimal=decimal.Decimal("1e-5"), zero_d=np.array(1e-5)),
    *cases(
        "exact",
        "eps",
        OPTION,
        zero=0,
        minus_zero=-0.0,
        int=1,
        large=1e30,
        numpy_float=lambda w: np.float64(w.eps),
        fraction=fractions.Fraction(1, 100_000),
    ),
    *cases(
        "refused",
        "momentum",
        (create, assign),
        **{key: value for key, value in NOT_NUMBERS.items() if key != "none"},
        **NO_EPS,
        above_1=1.5,
    ),
    *cases("exact", "momentum", (create, assign), none=None, zero=0, one=1),
    *cases(
        "refused",
        "axis",
        AXIS,
        **NOT_INTEGERS,
        one_more=3,
        one_less=-4,
        million=10**6,
        beyond_int=1 << 31,
        beyond_long=1 << 63,
        below_long=-(1 << 63) - 1,
        beyond_float=10**400,
        beyond_text=BEYOND_TEXT,
    ),
    *cases("exact", "axis", AXIS, last=-2, numpy=np.int8(1), zero_d=np.array(1), index=Index(1)),
    *cases(
        "refused",
        "axis",
        AXIS[:-1],
        rank_1_default=Saying("axis=0", lambda w: put(w, np.ones(3, "f4"), 0) is None or 1),
    ),
    *cases(
        "refused",
        "num_threads",
        THREADS,
        **{key: value for key, value in NOT_INTEGERS.items() if key != "none"},
        zero=0,
        minus_1=-1,
        below_long=-(1 << 63) - 1,
        below_text=-BEYOND_TEXT,
    ),
    *cases("refused", "num_threads", (process,), **NOT_INTEGERS, zero=0, minus_1=-1, below_text=-BEYOND_TEXT),
    *cases("exact", "num_threads", THREADS, none=None),
    *cases("exact", "num_threads", (*THREADS, process), two=2, index=Index(2), numpy=np.uint8(3)),
    *cases(
        "either",
        "num_threads",
        (*THREADS, process),
        billion=10**9,
        beyond_float=10**400,
        beyond_text=BEYOND_TEXT,
    ),
    *cases(
        "refused",
        "num_features",
        (create, create_stats),
        **NOT_INTEGERS,
        negative=-1,
        beyond_memory=1 << 62,
        beyond_long=1 << 63,
        beyond_float=10**400,
        minus_beyond_text=-BEYOND_TEXT,
    ),
    *[
        row
        for flag in FLAGS
        for row in cases(
            "refused",
            flag,
            (create, assign) if flag == "training" else (create,),
            none=None,
            one=1,
            zero=0.0,
            str="yes",
            array=np.array([True, False]),
            bad_repr=BadRepr(),
        )
    ],
    *cases(
        "refused",
        "num_batches_tracked",
        (assign,),
        **NOT_INTEGERS,
        negative=-1,
        beyond_long=1 << 63,
        beyond_float=10**400,
        minus_beyond_text=-BEYOND_TEXT,
    ),
]

NO_DTYPES = {
    "float64": np.float64,
    "garbage": "garbage",
    "empty_str": "",
    "two_lines": "f4\nf2",
    "swapped": ">f4" if sys.byteorder == "little" else "<f4",
    "swapped_half": swapped(np.zeros(1, "f2")).dtype,
    "int": int,
    "object": object,
    "bool": bool,
    "float": float,
    "str": str,
    "uint8": "u1",
    "complex": "c8",
    "longdouble": "g",
    "void": "V4",
    "struct": "f4,f4",
    "one_field_struct": [("a", "f4")],
    "subarray": ("f4", (2,)),
    "number": 3,
    "true": True,
    "list": [],
    "dict": {"names": ["a"]},
    "array": np.ones((9, 9), "f4"),
    "bytes_garbage": b"\xff",
    "bad_repr": BadRepr(),
    "dtype_raises": BadDtype(),
}


def written_as(dtype):
    """That spelling, with an out of that dtype."""

    def make(w):
        w.out, w.dtype = np.zeros(SHAPE, dtype), np.dtype(dtype)
        return dtype

    return make


NO_ACTIVATIONS = {
    "unknown": "gelu",
    "empty_str": "",
    "upper": "RELU",
    "space": "relu ",
    "two_lines": "relu\n",
    "long_str": "relu" * 1000,
    "int": 1,
    "zero": 0,
    "true": True,
    "float": 1.5,
    "bytes": b"relu",
    "function": len,
    "object": object(),
    "bad_repr": BadRepr(),
    "set": {"relu"},
    "array": np.ones(2),
    "list_clip": ["clip", 0, 1],
    "empty_tuple": (),
    "relu_tuple": ("relu",),
    "relu_with_slope": ("relu", 1.0),
    "nested": (("clip", 0, 1),),
    "leaky_alone": ("leaky_relu",),
    "leaky_str": "leaky_relu",
    "leaky_two": ("leaky_relu", 0.1, 0.2),
    "leaky_nan": ("leaky_relu", NAN),
    "leaky_infinite": ("leaky_relu", INF),
    "leaky_none": ("leaky_relu", None),
    "leaky_text": ("leaky_relu", "0.1"),
    "leaky_true": ("leaky_relu", True),
    "leaky_complex": ("leaky_relu", 1j),
    "leaky_beyond_float": ("leaky_relu", 10**400),
    "leaky_array": ("leaky_relu", np.ones(3)),
    "clip_alone": ("clip",),
    "clip_one": ("clip", 0.0),
    "clip_three": ("clip", 0.0, 1.0, 2.0),
    "clip_upside_down": ("clip", 1.0, 0.0),
    "clip_nan_low": ("clip", NAN, 1.0),
    "clip_nan_high": ("clip", 0.0, NAN),
    "clip_none": ("clip", None, 1.0),
    "clip_text": ("clip", "0", "1"),
    "clip_beyond_float": ("clip", -(10**400), 10**400),
    "clip_beyond_text": ("clip", 1, -BEYOND_TEXT),
    "array_for_name": (np.array(["clip", "relu"]), 0.1),
    "array_for_clip": (np.array([1, 2]), 0.0, 1.0),
    "bad_repr_for_name": (BadRepr(), 0.1),
    "many": ("clip",) * 100_000,
}

OPTION_CASES = [
    *cases("refused", "dtype", Y, **NO_DTYPES),
    *cases("refused", "dtype", Y, half_but_out_f4="f2", half_type_but_out_f4=np.float16),
    *cases("exact", "dtype", Y, char=written_as("e"), type=written_as(np.float32), native=written_as("=f4")),
    *cases("either", "dtype", Y, bytes=b"f4"),
    *cases("refused", "activation", OPTION, **NO_ACTIVATIONS),
    *cases(
        "exact",
        "activation",
        OPTION,
        numpy_str=np.str_("relu"),
        clip_everything=("clip", -INF, INF),
        clip_to_zero=("clip", 0, 0),
        clip_to_infinity=("clip", INF, INF),
        clip_beyond_single=("clip", -1e300, 1e300),
        leaky_backwards=("leaky_relu", -2),
    ),
    *cases("either", "activation", OPTION, leaky_beyond_single=("leaky_relu", 1e300)),
]


ARRAY_CASES = [*X_CASES, *RESIDUAL_CASES, *OUT_CASES, *VECTOR_CASES]


@pytest.mark.parametrize("rows", [*ARRAY_CASES, *NUMBER_CASES, *OPTION_CASES])
def test_argument(rows):
    isolated(judge_all, *rows)


# ---- calls that cannot be tables of one argument ----------------------------------------------------


def unchanged(w, call, names):
    """The call is refused, and leaves the arrays, the layer and the statistics as they were."""
    before = memory(w), state(w)
    error = error_of(call, w)
    assert error is not None, "expected an error"
    assert_named(error, names)
    assert (memory(w), state(w)) == before, f"written although it raised {error}"


def ready():
    """Good arguments with a layer and statistics that have seen some data."""
    w = good()
    w.layer = layer_of(w)
    w.layer.num_batches_tracked = 3
    w.stats = bn_c.BatchStats(CHANNELS).update(w.x)
    return w


def test_return_stats():
    def call(w):
        bn_c.batch_norm(w.x, out=w.out, return_stats=np.array([True, False]))

    isolated(lambda: unchanged(ready(), call, "return_stats"))


def without(*keys):
    return [lambda state: {key: value for key, value in state.items() if key not in keys}]


def with_value(value, *keys):
    """States with that value instead of an array."""
    return [lambda state, key=key: {**state, key: value} for key in keys]


KEYS = ("weight", "bias", "running_mean", "running_var")
VALUES = {
    "none": None,
    "str": "abc",
    "scalar": 1.0,
    "zero_d": np.array(1.0),
    "length_0": np.zeros(0, "f4"),
    "length_1": np.ones(1, "f4"),
    "length_more": np.ones(4, "f4"),
    "matrix": np.ones((3, 3), "f4"),
    "column": np.ones((3, 1), "f4"),
    "complex": np.ones(3, "c8"),
    "object": np.array([None] * 3),
    "masked": np.ma.masked_array(np.ones(3, "f4"), [True, False, False]),
    "int_array": np.arange(3),
    "ragged": [[1.0], [2.0, 3.0], []],
    "generator": (1.0 for _ in range(3)),
    "array_raises": Arrays(RuntimeError("not today")),
}
COUNTS = {
    "none": None,
    "str": "x",
    "digits": "3",
    "negative": -1,
    "half": 2.5,
    "nan": NAN,
    "infinite": INF,
    "true": True,
    "list": [1, 2],
    "ragged": [[1], [2, 3]],
    "array": np.arange(3),
    "complex": 1j,
    "beyond_long": 1 << 63,
    "beyond_float": 10**400,
    "object": object(),
    "array_raises": Arrays(RuntimeError("not today")),
}
STATES = {
    "none": [lambda state: None],
    "int": [lambda state: 3],
    "str": [lambda state: "weight bias running_mean running_var"],
    "list_of_keys": [list],
    "empty_list": [lambda state: []],
    "items": [lambda state: list(state.items())],
    "set_of_keys": [set],
    "function": [lambda state: len],
    "empty": [lambda state: {}],
    "other_keys": [lambda state: {"gamma": 1, 3: 2}],
    **{f"no_{key}": without(key) for key in KEYS},
    "only_bias": without("running_var", "running_mean", "num_batches_tracked", "weight"),
    **{f"array_{name}": with_value(value, *KEYS) for name, value in VALUES.items()},
    **{f"count_{name}": with_value(value, "num_batches_tracked") for name, value in COUNTS.items()},
}
STATE_NAMES = r"state|prefix|gamma|beta|weight|bias|running_\w+|num_batches_tracked"


def load(w, value, **options):
    w.layer.load_state_dict(value, **options)


def from_torch(w, value, **options):
    bn_c.BatchNorm.from_torch(value, **options)


def load_into_bare(w, value, **options):
    """A layer without arrays reads nothing but the counter."""
    bn_c.BatchNorm(CHANNELS, affine=False, track_running_stats=False).load_state_dict(value, **options)


def refuse_state(loader, change):
    w = ready()
    value = change(w.layer.state_dict())
    unchanged(w, lambda w: loader(w, value), STATE_NAMES)


@pytest.mark.parametrize("name", STATES)
def test_state_dict(name):
    pairs = itertools.product((load, from_torch), STATES[name])
    isolated(together, [(loader.__name__, partial(refuse_state, loader, change)) for loader, change in pairs])


@pytest.mark.parametrize("name", ["none", "int", "str", "empty_list", "items", "function"])
def test_state_dict_for_a_layer_without_arrays(name):
    isolated(lambda: unchanged(ready(), lambda w: load_into_bare(w, STATES[name][0]({})), STATE_NAMES))


@pytest.mark.parametrize("prefix", [None, 3, "wrong.", b"", ["a"]], ids=repr)
@pytest.mark.parametrize("loader", [load, from_torch])
def test_prefix(loader, prefix):
    def call(w):
        loader(w, w.layer.state_dict(), prefix=prefix)

    isolated(lambda: unchanged(ready(), call, STATE_NAMES))


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", "1"), ("axis", 1.5), ("momentum", NAN), ("num_threads", 0), ("affine", 1)],
)
def test_options_of_from_torch(name, value):
    def call(w):
        from_torch(w, w.layer.state_dict(), **{name: value})

    isolated(lambda: unchanged(ready(), call, name))


# ---- layers -----------------------------------------------------------------------------------------


def set_read_only(name, value):
    def run():
        w = ready()
        before = state(w)
        error = error_of(setattr, w.layer, name, value)
        assert isinstance(error, AttributeError), repr(error)
        assert state(w) == before

    return run


def write_into(name):
    def run():
        w = ready()
        before = state(w)
        error = error_of(getattr(w.layer, name).__setitem__, 0, 9)
        assert isinstance(error, ValueError), repr(error)
        assert state(w) == before

    return run


def reshape_what_was_read(name):
    """What was read from a layer is the reader's: its shape is no part of the layer."""

    def run():
        w = ready()
        getattr(w.layer, name).shape = (CHANNELS, 1)
        w.layer.eps = w.eps
        assert_works(w, w.layer)

    return run


def change_what_was_assigned(name):
    def run():
        w = ready()
        own = getattr(w, {"running_mean": "mean", "running_var": "var"}.get(name, name))
        given = own.copy()
        setattr(w.layer, name, given)
        given[:] = 99
        assert_works(w, w.layer)

    return run


def without_arrays(name, value):
    def run():
        w = ready()
        bare = bn_c.BatchNorm(CHANNELS, affine=False, track_running_stats=False)
        unchanged(w, lambda w: setattr(bare, name, value), name)

    return run


def mode_is_no_flag():
    unchanged(ready(), lambda w: w.layer.train("no"), "mode|training")


def assert_result_of_training(w, before, x, **options):
    """Either all of it happens, or an error and nothing."""
    error = error_of(lambda: w.layer(x, out=w.out, **options))
    if error is None:
        stats = bn_c.batch_stats(x)
        oracle.assert_forward(w.out, x, stats.mean, stats.var, w.gamma, w.beta, w.eps)
        assert w.layer.num_batches_tracked == 4
    else:
        assert_named(error, "x|running_mean|running_var")
        assert (memory(w), state(w)) == before, f"written although it raised {error!r}"


def train_on(change, **errstate):
    """Statistics beyond float32 are no reason to write a part of the result."""

    def run():
        w = ready()
        w.layer.train()
        with np.errstate(**errstate):
            assert_result_of_training(w, (memory(w), state(w)), change(w.x))

    return run


def sometimes(value):
    return lambda x: np.where(x > 4, np.float32(value), x)


def train_before_anything(make):
    """A refused call is not a mini-batch."""

    def run():
        w = ready()
        w.layer.train().momentum = None
        before = state(w)
        assert_named(error_of(w.layer, make(w)), "x|axis")
        assert state(w) == before

    return run


def single_values():
    w = ready()
    w.layer = fill(bn_c.BatchNorm(CHANNELS, allow_single_value=True, training=True), w)
    x = w.x[:1, :, :1].copy()
    y = w.layer(x)
    oracle.assert_forward(y, x, x[0, :, 0], np.zeros(CHANNELS), w.gamma, w.beta, w.eps)
    assert w.layer.running_var.tobytes() == w.var.tobytes()


def unknown_keyword():
    assert_named(error_of(lambda: bn_c.BatchNorm(3, epsilon=1e-3)), ".*epsilon")
    assert_named(error_of(lambda: bn_c.BatchNorm()), ".*num_features")
    assert_named(error_of(lambda: ready().layer(good().x, eps=3)), ".*eps")


def uninitialised():
    """Python lets users make one without `__init__`; it cannot work, but may not crash either."""
    empty = bn_c.BatchNorm.__new__(bn_c.BatchNorm)
    assert error_of(empty, good().x) is not None
    assert error_of(bn_c.BatchStats.__new__(bn_c.BatchStats).update, good().x) is not None


def copied(copies):
    """A copy is a layer of its own."""

    def run():
        w = ready()
        assert_works(w, w.layer)
        other = copies(w.layer)
        assert_works(w, other)
        other.gamma = [9.0] * CHANNELS
        assert_works(w, w.layer)

    return run


def while_called(change):
    """The buffers of a call are its own, whatever `__array__` of a later argument does to earlier ones."""

    def run():
        w = ready()
        w.out = None

        class Late:
            def __array__(self, dtype=None, copy=None):
                change(w)
                return w.added

        w.residual = Late()
        for face in Y:
            error = error_of(face, w)
            assert error is None or isinstance(error, (TypeError, ValueError)), repr(error)

    return run


LAYERS = {
    "axis_is_read_only": set_read_only("axis", 0),
    "num_features_is_read_only": set_read_only("num_features", 4),
    **{f"write_into_{name}": write_into(name) for name in ("gamma", "beta", "running_mean", "running_var")},
    **{f"reshape_read_{name}": reshape_what_was_read(name) for name in ("gamma", "running_var")},
    **{f"change_assigned_{name}": change_what_was_assigned(name) for name in ("gamma", "running_mean")},
    **{f"no_{name}_to_assign": without_arrays(name, [1.0, 1.0, 1.0]) for name in ("gamma", "running_mean")},
    "no_gamma_to_assign_none": without_arrays("gamma", None),
    "mode_is_no_flag": mode_is_no_flag,
    "train_on_1e30": train_on(lambda x: x * np.float32(1e30)),
    "train_on_1e30_where_overflow_raises": train_on(lambda x: x * np.float32(1e30), over="raise"),
    "train_on_1e_minus_30_where_underflow_raises": train_on(lambda x: x * np.float32(1e-30), under="raise"),
    "train_on_infinity": train_on(sometimes(INF)),
    "train_on_infinity_where_invalid_raises": train_on(sometimes(INF), invalid="raise"),
    "train_on_nan": train_on(sometimes(NAN), all="raise"),
    "train_on_one_value": train_before_anything(lambda w: w.x[:1, :, :1]),
    "train_on_nothing": train_before_anything(lambda w: w.x[:0]),
    "train_on_float64": train_before_anything(lambda w: w.x.astype("f8")),
    "train_on_rank_1": train_before_anything(lambda w: w.x[0, :, 0]),
    "train_on_rank_0": train_before_anything(lambda w: w.x[0, 0, 0]),
    "single_values": single_values,
    "unknown_keyword": unknown_keyword,
    "uninitialised": uninitialised,
    "copy": copied(copy.copy),
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda one: pickle.loads(pickle.dumps(one))),
    "x_reshaped_while_called": while_called(lambda w: setattr(w.x, "shape", (5, 3, 4))),
    "x_flattened_while_called": while_called(lambda w: setattr(w.x, "shape", (60,))),
    "x_freed_while_called": while_called(lambda w: w.x.resize((1, 3, 1), refcheck=False)),
    "gamma_reshaped_while_called": while_called(lambda w: setattr(w.gamma, "shape", (3, 1))),
    "gamma_freed_while_called": while_called(lambda w: w.gamma.resize(0, refcheck=False)),
    "layer_changed_while_called": while_called(lambda w: setattr(w.layer, "gamma", [3.0, 4.0, 5.0])),
    "collected_while_called": while_called(lambda w: gc.collect()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    isolated(LAYERS[name])


# ---- statistics -------------------------------------------------------------------------------------


def stats_of(w, **changes):
    return bn_c.BatchStats.from_dict({**w.stats.to_dict(), **changes})


ONE = {"count": 1, "mean": [1.0], "mean_rest": [0.0], "m2": [1.0]}
DICTS = {
    "none": None,
    "int": 3,
    "str": "count mean m2",
    "list": ["count", "mean", "m2"],
    "empty": {},
    "function": len,
    "bad_repr": BadRepr(),
    "array": np.ones((9, 9)),
    **{f"no_{key}": {k: v for k, v in ONE.items() if k != key} for key in ONE},
    **{
        f"count_{name}": {**ONE, "count": value}
        for name, value in COUNTS.items()
        if name not in ("beyond_long", "beyond_float")
    },
    **{
        f"{key}_{name}": {**dict.fromkeys(ONE, [1.0] * 3), "count": 1, key: value}
        for key in ONE
        if key != "count"
        for name, value in VALUES.items()
    },
    "lengths_differ": {**ONE, "m2": [1.0, 2.0]},
    "chars": {**ONE, "mean": "abc", "mean_rest": "abc", "m2": "abc"},
}


@pytest.mark.parametrize("name", DICTS)
def test_from_dict(name):
    def call(w):
        bn_c.BatchStats.from_dict(DICTS[name])

    isolated(lambda: unchanged(ready(), call, "values|count|mean|mean_rest|m2"))


OTHERS = {
    "none": None,
    "int": 3,
    "dict": {"count": 1, "mean": [1.0] * 3, "m2": [1.0] * 3},
    "array": np.ones(3),
    "fewer_features": bn_c.BatchStats(2),
    "more_features": bn_c.BatchStats(4),
    "no_features": bn_c.BatchStats(0),
    "layer": bn_c.BatchNorm(3),
    "type": bn_c.BatchStats,
    "bad_repr": BadRepr(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_merge(name):
    isolated(lambda: unchanged(ready(), lambda w: w.stats.merge(OTHERS[name]), "other"))


@pytest.mark.parametrize("name", OTHERS)
def test_add(name):
    """Python itself words the error where the other is something else."""
    isolated(lambda: unchanged(ready(), lambda w: w.stats + OTHERS[name], "other|.*operand"))


def merge_large_counts(count):
    """Counts that one machine cannot reach, several may."""

    def run():
        w = ready()
        try:
            large = stats_of(w, count=count)
        except (TypeError, ValueError) as error:
            return assert_named(error, "count")
        merged = large + large + large
        assert merged.count == 3 * count
        assert np.allclose(merged.mean, w.stats.mean, rtol=1e-12)
        return w.stats.merge(large).update(w.x)

    return run


def merge_with_itself():
    w = ready()
    w.stats.merge(w.stats)
    assert_statistics(w.stats, np.concatenate([w.x, w.x]), 1)


def large_count():
    x = np.broadcast_to(np.uint8(7), ((1 << 31) + 65, 1))
    stats = bn_c.batch_stats(x)
    assert (stats.count, stats.mean[0], stats.var[0]) == (len(x), 7, 0)


STATISTICS = {
    "merge_2_62": merge_large_counts(1 << 62),
    "merge_2_63": merge_large_counts((1 << 63) - 1),
    "merge_10_30": merge_large_counts(10**30),
    "merge_10_400": merge_large_counts(10**400),
    "merge_with_itself": merge_with_itself,
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name):
    isolated(STATISTICS[name])


@pytest.mark.slow
@pytest.mark.skipif(sys.maxsize < 1 << 32, reason="no array of that size on 32-bit machines")
def test_more_elements_than_an_int_counts():
    isolated(large_count)


# ---- environment and command line -------------------------------------------------------------------


def reload_with(variable, value, module):
    os.environ[variable] = value
    error = error_of(importlib.reload, module)
    assert isinstance(error, ImportError), repr(error)
    assert str(error).startswith(f"{variable}: "), error
    assert "\n" not in str(error)
    if variable == "BN_C_MAX_ISA":
        assert all(isa in str(error) for isa in bn_c.supported_isas()), error


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many", " ", "1e3", "0x2", "nan"])
def test_threads_of_environment(value):
    isolated(reload_with, "BN_C_NUM_THREADS", value, _threads)


@pytest.mark.parametrize("value", ["garbage", "AVX2", "x86_64_v9", " ", "generic,x86_64", "../x", "é"])
def test_isa_of_environment(value):
    isolated(reload_with, "BN_C_MAX_ISA", value, _dispatch)


def run_command(arguments):
    said, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(said), redirect_stdout(printed):
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
    assert status == 2
    assert not printed.getvalue()
    assert said.getvalue().count("\n") == 1, f"more than one line:\n{said.getvalue()}"


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["--nonsense"], ["info", "more"], ["info", "--more"], ["demo", "--more"], [""]],
    ids=lambda arguments: "_".join(["bn-c", *arguments]),
)
def test_command(arguments):
    isolated(run_command, arguments)


# ---- forks, threads, recursion ----------------------------------------------------------------------


def fork_and_call():
    """Threads, if the package has some, do not follow into a child; calls there work nevertheless."""
    w = ready()
    x = np.resize(w.x, (64, 3, 1000))
    expected = bn_c.batch_norm(x, num_threads=4).tobytes()
    layer_expected = w.layer(x).tobytes()

    def again():
        assert bn_c.batch_norm(x, num_threads=4).tobytes() == expected
        assert w.layer(x).tobytes() == layer_expected
        w.layer.train()(x)

    for _ in range(3):
        isolated(again)
    again()


def fork_while_calling():
    x = np.resize(good().x, (64, 3, 1000))
    expected = bn_c.batch_norm(x, num_threads=2).tobytes()
    stop = threading.Event()

    def work():
        while not stop.is_set():
            bn_c.batch_norm(x, num_threads=2)

    def again():
        assert bn_c.batch_norm(x, num_threads=2).tobytes() == expected

    threads = start(work, work)
    for _ in range(10):
        isolated(again)
    stop.set()
    join(threads)


def start(*works):
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return threads


def join(threads):
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


def outcome(call, w):
    """A result as bytes to compare; None for an error that users expect."""
    try:
        y = call(w)
    except (TypeError, ValueError):
        return None
    return repr(y.to_dict()) if isinstance(y, bn_c.BatchStats) else (y.shape, y.tobytes())


def race(make, call, changes, calls=300):
    """Other threads change what calls use: each result is that of one of the states, or an error."""
    w = make()
    expected = {None}
    for change in changes:
        change(w)
        expected.add(outcome(call, w))
    wrong, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            for change in changes:
                change(w)

    def watch():
        for _ in range(calls):
            y = outcome(call, w)
            if y not in expected:
                wrong.append(y)

    sys.setswitchinterval(1e-6)
    changing, calling = start(work), start(watch, watch)
    join(calling)
    stop.set()
    join(changing)
    assert not wrong, f"{len(wrong)} of {2 * calls} results are those of no state"


def larger():
    """Enough elements for calls that let other threads run."""
    w = ready()
    put(w, np.resize(w.x, (40, 3, 500)))
    return w


def reshape(*shape):
    return lambda w: setattr(w.x, "shape", shape)


def set_layer(name, value):
    return lambda w: setattr(w.layer, name, value)


def slow(w):
    """A call of the layer that is not its short way."""
    return w.layer(w.x, dtype="f4")


def new_stats(w):
    return bn_c.BatchStats(CHANNELS).update(w.x)


RESHAPES = (reshape(40, 3, 500), reshape(500, 3, 40), reshape(100, 600), reshape(60_000))
GAMMAS = (set_layer("gamma", [1.0, 2.0, 3.0]), set_layer("gamma", [3.0, 2.0, 1.0]))
ACTIVATIONS = (set_layer("activation", None), set_layer("activation", "relu"))
RACES = {
    **{
        f"{face.__name__}_while_x_is_reshaped": (face, RESHAPES)
        for face in (batch, inference, statistics, new_stats, slow)
    },
    "short_layer_while_x_is_reshaped": (lambda w: w.layer(w.x), RESHAPES),
    "layer_while_gamma_is_assigned": (slow, GAMMAS),
    "short_layer_while_gamma_is_assigned": (lambda w: w.layer(w.x), GAMMAS),
    "layer_while_activation_is_assigned": (slow, ACTIVATIONS),
    "layer_while_mode_changes": (slow, (lambda w: w.layer.train(), lambda w: w.layer.eval())),
}


@pytest.mark.parametrize("name", RACES)
def test_race(name):
    call, changes = RACES[name]
    if changes is RESHAPES and not GIL:
        pytest.skip("without the GIL, NumPy itself does not survive this")
    if name == "layer_while_mode_changes":
        # Training moves the running statistics, so the results of no two calls are the same.
        return isolated(lambda: race(larger, lambda w: np.zeros(call(w).shape), changes))
    return isolated(lambda: race(larger, call, changes))


def train_from_threads():
    w = larger()
    w.layer.train()
    join(start(*[lambda: [w.layer(w.x, dtype="f4") for _ in range(100)] for _ in range(3)]))
    assert np.isfinite(w.layer.running_mean).all()
    assert np.isfinite(w.layer.running_var).all()


class Between:
    """Lets something happen before the n-th bytecode of a call, as another thread could."""

    def __init__(self, n, happen):
        self.left, self.happen = n, happen

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            self.left -= 1
            if self.left == -1:
                self.happen()
        return self


def switch_anywhere(make, call, change):
    """As a race, but with one switch of threads, before each bytecode in turn: nothing is left to chance."""
    w = make()
    before = outcome(call, w)
    change(w)
    after = outcome(call, w)
    wrong = {}
    for n in itertools.count():
        w = make()
        between = Between(n, lambda w=w: change(w))
        sys.settrace(between)
        try:
            y = outcome(call, w)
        finally:
            sys.settrace(None)
        if between.left >= 0:
            break
        if y not in (before, after, None):
            wrong.setdefault("neither the result before the change nor that after it", n)
        if outcome(call, w) != after:
            wrong.setdefault("the change does not last", n)
    assert n, "nothing was traced"
    assert not wrong, f"first at bytecode {wrong}"


def with_out(face):
    """The call writes into an out of its own."""

    def call(w):
        w.out = np.zeros(w.x.shape, np.float32)
        return face(w)

    return call


def folded():
    """A layer with folded statistics and the default number of threads."""
    w = ready()
    w.out = None
    w.layer.num_threads = None
    w.layer(w.x)
    return w


def without_out():
    w = ready()
    w.out = None
    return w


def other_state(w):
    w.layer.load_state_dict({key: np.arange(3, dtype="f4") + i for i, key in enumerate(KEYS)})


def assign_all(w):
    """Several assignments and a call, as another thread would make them."""
    w.layer.gamma = [3.0, 2.0, 1.0]
    w.layer.activation = "relu"
    w.layer(w.x, dtype="f4")


def short(w):
    return w.layer(w.x)


SWITCHES = {
    **{
        f"{face.__name__}_x_{name}": (without_out, face, reshape(*shape))
        for face in (batch, inference, statistics, new_stats, slow, short)
        for name, shape in (("permuted", (5, 3, 4)), ("merged", (15, 4)), ("flattened", (60,)))
    },
    "batch_x_reshaped_with_out": (ready, with_out(batch), reshape(5, 3, 4)),
    "layer_x_reshaped_with_out": (ready, with_out(layer), reshape(5, 3, 4)),
    "inference_gamma_reshaped": (without_out, inference, lambda w: setattr(w.gamma, "shape", (3, 1))),
    "inference_mean_reshaped": (without_out, inference, lambda w: setattr(w.mean, "shape", (1, 3))),
    "layer_gamma": (without_out, slow, set_layer("gamma", [3.0, 2.0, 1.0])),
    "layer_running_mean": (without_out, slow, set_layer("running_mean", [3.0, 2.0, 1.0])),
    "layer_eps": (without_out, slow, set_layer("eps", 1.0)),
    "layer_activation": (without_out, slow, set_layer("activation", "relu")),
    "layer_num_threads": (without_out, slow, set_layer("num_threads", 2)),
    "layer_to_training": (without_out, slow, set_layer("training", True)),
    "layer_load_state_dict": (without_out, slow, other_state),
    "folded_layer_gamma": (folded, slow, set_layer("gamma", [3.0, 2.0, 1.0])),
    "folded_layer_load_state_dict": (folded, slow, other_state),
    "short_layer_gamma": (folded, short, set_layer("gamma", [3.0, 2.0, 1.0])),
    "short_layer_load_state_dict": (folded, short, other_state),
    "training_layer_gamma": (
        lambda: SimpleNamespace(**{**vars(ready()), "layer": ready().layer.train()}),
        slow,
        set_layer("gamma", [3.0, 2.0, 1.0]),
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switch_of_threads(name):
    isolated(switch_anywhere, *SWITCHES[name])


def short_layer_and_several_assignments():
    """The result is that of a state that the layer has been in, not parts of two."""
    w, expected = folded(), []
    for change in (lambda w: None, set_layer("gamma", [3.0, 2.0, 1.0]), set_layer("activation", "relu")):
        change(w)
        expected.append(outcome(short, w))
    for n in itertools.count():
        w = folded()
        between = Between(n, lambda w=w: assign_all(w))
        sys.settrace(between)
        y = outcome(short, w)
        sys.settrace(None)
        if between.left >= 0:
            return
        assert y in expected, f"at bytecode {n}: gamma of one state with the activation of another"


OTHERWISE = {
    "fork_and_call": fork_and_call,
    "fork_while_calling": fork_while_calling,
    "train_from_threads": train_from_threads,
    "short_layer_and_several_assignments": short_layer_and_several_assignments,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_processes_and_threads(name):
    isolated(OTHERWISE[name])
