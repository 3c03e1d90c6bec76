"""Half precision in and out against NumPy's conversions: every half, and every kind of float.

With mean 0, variance 1 and eps 0, y = (x - 0) * 1 + 0 is x itself, but for -0, to which adding 0 gives +0.
"""

import numpy as np
import pytest
from oracle import bits, values

import bn_c

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def passed_through(x, dtype, axis=1, out=None):
    channels = x.shape[axis]
    return bn_c.batch_norm_inference(x, np.zeros(channels), np.ones(channels), eps=0, axis=axis, dtype=dtype, out=out)


def cast(x, dtype):
    """Overflow and, on aarch64, signalling NaN make NumPy warn."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype)


def assert_passed_through(x, y, dtype):
    expected = cast(x, dtype)
    expected[x == 0] = 0
    assert bits(y) == bits(expected)


# Contiguous, strided, with every length of a tail and as rows of channels.
VIEWS = {
    "plane": lambda x: x.reshape(1, 1, -1),
    "many planes": lambda x: x[: len(x) // 16 * 16].reshape(16, 1, -1),
    "odd planes": lambda x: x[: len(x) // 13 * 13].reshape(1, 13, -1),
    "every second": lambda x: x.reshape(1, 1, -1)[..., ::2],
    "every other second": lambda x: x.reshape(1, 1, -1)[..., 1::2],
    "every third": lambda x: x.reshape(1, 1, -1)[..., ::3],
    "backwards": lambda x: x.reshape(1, 1, -1)[..., ::-1],
    "rows": lambda x: x[: len(x) // 64 * 64].reshape(-1, 64),
    "odd rows": lambda x: x[: len(x) // 13 * 13].reshape(-1, 13),
    "rows of one": lambda x: x.reshape(-1, 1),
    "strided rows": lambda x: x[: len(x) // 26 * 26].reshape(-1, 26)[:, ::2],
    "columns": lambda x: x[: len(x) // 64 * 64].reshape(64, -1).T,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_every_half(isa, view, dtype):
    x = view(HALVES)
    assert_passed_through(x, passed_through(x, dtype), dtype)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_every_half_in_place(isa, view):
    x = view(HALVES.copy())
    before = x.copy()
    assert_passed_through(before, passed_through(x, None, out=x), "f2")


@pytest.mark.parametrize("start", range(33))
def test_halves_at_every_alignment_and_length_of_tail(isa, start):
    """NaN, infinities and subnormals in the vectors as in what is left over."""
    special = np.array([0x7E00, 0xFE00, 0x7C00, 0xFC00, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0x7D01], np.uint16)
    halves = np.resize(special, 200).view(np.float16)
    for stop in range(start + 1, start + 40):
        x = halves[start:stop].reshape(1, 1, -1)
        assert_passed_through(x, passed_through(x, "f4"), "f4")
        assert_passed_through(x, passed_through(cast(x, "f4"), "f2"), "f2")


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("added", [False, True])
def test_rows_of_halves_of_every_length(caches, axis, activation, added, rng):
    """As the floats they are: joined, apart, and in place of what is read, where rows end within a vector."""
    for columns in [*range(1, 70), 257, 263, 288, 1001]:
        shape = (3, 5, columns)
        x, residual = values(rng, shape, "f2"), values(rng, shape, "f2") if added else None
        mean, var = rng.uniform(-1, 1, shape[axis]), rng.uniform(1, 2, shape[axis])
        memory = np.full((3, 3, 5, columns + 3), 7, "f2")
        apart, x_apart, residual_apart = memory[..., :columns]
        x_apart[...] = x
        calls = [(x, residual, np.empty_like(x)), (x, residual, apart), (x_apart, residual, np.empty_like(x))]
        if added:
            residual_apart[...] = residual
            calls += [(x, residual_apart, np.empty_like(x)), (x, residual_apart, residual_apart)]
            own = residual.copy()
            calls += [(x, own, own)]
        calls += [(x_apart, residual, x_apart), (x, residual, x)]
        options = {"axis": axis, "activation": activation}
        wide = bn_c.batch_norm_inference(x.astype("f4"), mean, var, residual=residual, dtype="f2", **options)
        for source, plus, out in calls:
            y = bn_c.batch_norm_inference(source, mean, var, residual=plus, out=out, **options)
            assert bits(y) == bits(wide)
        assert np.all(memory[..., columns:] == 7)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_every_half_as_residual(isa, dtype):
    residual = HALVES.reshape(1, 1, -1)
    y = bn_c.batch_norm_inference(np.zeros(residual.shape, "f4"), [0], [1], eps=0, residual=residual, dtype=dtype)
    assert_passed_through(residual, y, dtype)


def test_statistics_of_every_pair_of_a_half_and_itself(isa):
    finite = HALVES[np.isfinite(HALVES)]
    for x in (np.stack([finite, finite]), np.stack([finite, finite], 1)[None].swapaxes(1, 2)):
        axis = x.shape.index(len(finite))
        stats = bn_c.batch_stats(x, axis=axis)
        assert np.array_equal(stats.mean, finite.astype("f8"))
        assert np.all(stats.var == 0)


def with_neighbours(x):
    """Each float between the one below and the one above it, and all of them negative."""
    x = np.stack([np.nextafter(x, np.float32(-np.inf)), x, np.nextafter(x, np.float32(np.inf))], -1).ravel()
    return np.concatenate([x, -x])


POSITIVE = HALVES[HALVES >= 0][:-1].astype("f4")
with np.errstate(over="ignore", invalid="ignore"):
    FLOATS = {
        # Exactly representable in float32; beyond the largest half, the next would be 65536.
        "ties": with_neighbours((POSITIVE + np.append(POSITIVE[1:], np.float32(65536))) / 2),
        "halves": with_neighbours(POSITIVE),
        "overflow": with_neighbours(np.array([65503.996, 65504, 65519.996, 65520, 65536, 1e5, 3.4028235e38], "f4")),
        "subnormals": with_neighbours(np.float32(2) ** np.arange(-149, -10, dtype="f4")),
        "special": np.array([np.nan, -np.nan, np.inf, -np.inf, 0, -0.0], "f4"),
        "powers": with_neighbours(np.float32(2) ** np.arange(-140, 128, dtype="f4")),
        "NaN": np.append(0x7F800001 + np.arange(0, 1 << 23, 99991), 0xFFC00000).astype(np.uint32).view("f4"),
    }


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("kind", FLOATS)
def test_floats_to_halves(isa, kind, view):
    x = view(np.resize(FLOATS[kind], max(1000, len(FLOATS[kind]))))
    assert_passed_through(x, passed_through(x, "f2"), "f2")


@pytest.mark.parametrize("view", ["plane", "every second", "odd rows"])
def test_random_floats_to_halves(isa, view):
    """All exponents alike, and densely those that a half has."""
    pattern = np.random.PCG64(16).random_raw(1 << 18).view(np.uint32)
    dense = (pattern & 0x8FFFFFFF) + np.uint32(0x33000000)
    x = VIEWS[view](np.concatenate([pattern, dense]).view("f4"))
    assert_passed_through(x, passed_through(x, "f2"), "f2")


def test_floats_to_halves_in_a_strided_output(isa):
    x = FLOATS["ties"].reshape(1, 1, -1)
    memory = np.full((1, 1, x.size * 2), 7, "f2")
    assert_passed_through(x, passed_through(x, None, out=memory[..., ::-2]), "f2")
    assert np.all(memory[..., ::2] == 7)
