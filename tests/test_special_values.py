"""The README's tables of special values, row by row; and the floating-point state around every call."""

import ctypes
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import bn_c

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TABLES = README.partition("\n## Special values\n")[2].partition("\n## ")[0].split("With the statistics")
ROW = re.compile(r"^\|.*\| `(x=.*)` \| `(.*)` \|$", re.MULTILINE)
GIVEN, OF_BATCH = (ROW.findall(table) for table in TABLES)
NUMBERS = {"nan": np.nan, "inf": np.inf}
# From the single element to whole registers, chunks and what they leave over.
REPEATS = (1, 2, 7, 50, 700)


def of_row(arguments, y):
    """A row's arguments, with those that it says nothing of, and y."""
    defaults = {
        "mean": 0,
        "var": 1,
        "gamma": 1,
        "beta": 0,
        "eps": 0,
        "residual": None,
        "activation": None,
        "dtype": "f4",
    }
    given = {**defaults, **eval(f"dict({arguments})", NUMBERS)}
    return given, np.array(eval(y, NUMBERS), given["dtype"])


def types_of(values):
    """Those that hold the values."""
    with np.errstate(over="ignore"):
        exact = np.array(values, "f8")
        return [dtype for dtype in ("f4", "f2") if np.array_equal(exact.astype(dtype), exact, equal_nan=True)]


def assert_identical(got, expected):
    assert got.dtype == expected.dtype
    assert np.array_equal(got, expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(got)[numbers], np.signbit(expected)[numbers])


def test_the_tables_are_found():
    assert len(GIVEN) > 30
    assert len(OF_BATCH) > 5


def middle_of_three(values, repeats, axis, dtype):
    """An array of three channels, of which the middle one has the values."""
    row = np.tile(np.array(values, "f8"), repeats).astype(dtype)
    return np.stack([np.arange(row.size, dtype=dtype), row, np.ones_like(row)], axis)


@pytest.mark.parametrize(("arguments", "y"), GIVEN)
@pytest.mark.parametrize("axis", [0, 1])
def test_given_statistics(isa, arguments, y, axis):
    given, y = of_row(arguments, y)
    parameters = {name: np.array([0.5, given.pop(name), 0.5], "f8") for name in ("mean", "var", "gamma", "beta")}
    x, residual = given.pop("x"), given.pop("residual")
    for dtype, repeats in itertools.product(types_of(x), REPEATS):
        added = None if residual is None else middle_of_three(residual, repeats, axis, "f4")
        x_of_three = middle_of_three(x, repeats, axis, dtype)
        result = bn_c.batch_norm_inference(x_of_three, **parameters, residual=added, axis=axis, **given)
        assert_identical(result.take(1, axis), np.tile(y, repeats))
        assert np.isfinite(result.take([0, 2], axis)).all()


@pytest.mark.parametrize(("arguments", "y"), OF_BATCH)
@pytest.mark.parametrize("axis", [0, 1])
def test_statistics_of_the_mini_batch(isa, arguments, y, axis):
    given, y = of_row(arguments, y)
    gamma, beta = (np.full(3, float(given[name])) for name in ("gamma", "beta"))
    for dtype, repeats in itertools.product(types_of(given["x"]), REPEATS):
        x = middle_of_three(given["x"], repeats, axis, dtype)
        result = bn_c.batch_norm(x, gamma, beta, eps=given["eps"], axis=axis, dtype=given["dtype"])
        assert_identical(result.take(1, axis), np.tile(y, repeats))


# ---- the floating-point state -----------------------------------------------------------------------

LIBC = ctypes.CDLL(None)
needs_fenv = pytest.mark.skipif(
    not hasattr(LIBC, "fegetenv") or not hasattr(LIBC, "__errno_location"), reason="knows the C library of Linux only"
)
X = np.linspace(-3, 3, 4 * 3 * 50, dtype="f4").reshape(4, 3, 50)
Y = np.empty_like(X)
LARGE = np.tile(X, (20, 1, 100))
LARGE_Y = np.empty_like(LARGE)


def state(errno):
    """Modes and flags of floating-point arithmetic as the C library stores them, and errno."""
    environment = ctypes.create_string_buffer(64)
    LIBC.fegetenv(environment)
    return environment.raw, errno[0]


@needs_fenv
@pytest.mark.parametrize("flags", [False, True])
def test_layers_calls_leave_the_state_as_it_was(isa, flags):
    """Modes, flags and errno, though the arithmetic overflows. (Where NumPy computes for a call, it changes flags.)"""
    layer = bn_c.BatchNorm(3, eps=0)
    layer.gamma = [1e38, 1, 0.1]
    LIBC.__errno_location.restype = ctypes.POINTER(ctypes.c_int)
    errno = LIBC.__errno_location()
    for x, y in ((X, Y), (X, None), (LARGE, LARGE_Y)):
        layer(x, out=y)
        (LIBC.feraiseexcept if flags else LIBC.feclearexcept)(0x1D)
        errno[0] = 77
        before = state(errno)
        layer(x, out=y)
        after = state(errno)
        assert after == before
