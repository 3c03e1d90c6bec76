"""Mean and variance against exact ones, and `BatchStats`: updating, merging, storing."""

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
from oracle import (
    BLOCKS,
    DOUBLE_ERROR,
    FLOATS,
    GAPS,
    INTEGERS,
    LANES,
    LAYOUTS,
    assert_statistics,
    bits,
    received,
    scattered,
    values,
)

import bn_c

SHAPES = [(3, 5, 31, 33), (2000, 4), (64, 300), (2, 3, 4099), (129, 2, 1, 1)]


def assert_exact(x, axis=1, num_threads=None):
    stats = bn_c.batch_stats(x, axis=axis, num_threads=num_threads)
    assert_statistics(stats, x, axis)
    return stats


def assert_close(a, b):
    """Two ways of merging the same parts; a mean near zero is no more exact than the values it averages."""
    assert a.count == b.count
    assert np.all(np.abs(a.mean - b.mean) <= DOUBLE_ERROR * (np.abs(b.mean) + b.std))
    assert np.all(np.abs(a.var - b.var) <= DOUBLE_ERROR * b.var)


# ---- accuracy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("size", LANES + BLOCKS)
def test_lengths_of_planes_and_rows(isa, size, dtype, rng):
    assert_exact(values(rng, (2, 3, size), dtype, offset=20))
    assert_exact(values(rng, (size, 3), dtype, offset=20))
    assert_exact(values(rng, (5, size), dtype, offset=20))


@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 7, 8, 9, 17, 40])
def test_sizes_of_planes(isa, images, dtype, rng):
    """One by one, side by side, in strips, in rows of eight with a rest; more channels than are read together; images
    whose lines share a place in a small L1."""
    for size in (*range(1, 18), 25, 31, 33, 63, 64, 65, 68, 95, 97, 196, 255, 256, 257, 289, 511, 512, 513, 784):
        x = values(rng, (images, 19, size), dtype, offset=20)
        assert_exact(x)
        assert_exact(x[:, ::2])
        assert_exact(np.repeat(x, 2, 2)[..., ::2])
        assert_exact(np.concatenate([x, x], 2)[..., :size])
    for channels, size in [(3, 1023), (3, 1024), (4, 1024), (18, 1024), (3, 1535), (3, 1536), (3, 1537)]:
        assert_exact(values(rng, (images, channels, size), dtype, offset=20))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("shape", [(1, 1100, 5), (1, 520, 49), (2, 600, 9), (7, 515, 8), (3, 70, 11, 12)])
def test_many_channels_of_few_elements(isa, shape, dtype, rng):
    x = values(rng, shape, dtype, offset=20)
    assert_exact(x)
    assert_exact(x[::-1, ::-2, ..., ::-1])
    assert_exact(x[..., 1:])


@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
@pytest.mark.parametrize("layout", GAPS)
def test_lines_with_gaps(caches, layout, dtype, rng):
    """Eight at a time, in strips, from above and below the lengths that are; the next ones are asked for."""
    for width in (1, 7, 31, 65, 112, 255, 257, 300, 511, 512, 513):
        for lines in (1, 7, 8, 41):
            assert_exact(GAPS[layout](values(rng, (3, 2, lines, width), dtype, offset=20)))
    assert_exact(GAPS[layout](values(rng, (2, 37, 41, 19), dtype)), axis=-1)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(
    "shape", [(16, 40, 41, 20), (2, 200, 41, 33), (1, 3, 401, 403), (9, 3, 150, 97), (3, 2, 5, 71, 251)]
)
def test_pieces_with_gaps(caches, shape, num_threads, rng):
    """Cut along the first loop if it is long enough; samples come from all loops."""
    x = values(rng, shape)
    for axis in (1, -1):
        assert_exact(x, axis, num_threads)
        for layout in GAPS.values():
            assert_exact(layout(x), axis, num_threads)
            assert_exact(np.moveaxis(layout(np.moveaxis(x, 1, -1)), -1, 1), axis, num_threads)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("shape", [(9, 20, 196), (40, 20, 784), (2, 20, 3136)])
def test_samples_that_mislead(isa, shape, dtype, rng):
    """Runs of equal values: a few of them do not tell the mean. Some channels are added twice, their neighbours too."""
    x = np.repeat(rng.choice([-1.0, 1.0], (*shape[:2], shape[2] // 28)), 28, 2) + rng.uniform(-0.01, 0.01, shape)
    assert_exact((x + np.arange(20).reshape(20, 1)).astype(dtype))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout, axis, dtype, rng):
    assert_exact(LAYOUTS[layout](values(rng, (3, 33, 65, 5), dtype)), axis)


@pytest.mark.parametrize("ndim", [1, 2, 3, 4, 5, 6, 32])
def test_ranks(isa, ndim, rng):
    x = scattered(values(rng, [2 if d % 3 == 0 else 1 for d in range(ndim)]), order=rng.permutation(ndim))
    for axis in range(-ndim, ndim):
        assert_exact(x, axis)


@pytest.mark.parametrize("offset", [1e3, 1e6, -1e6, 1e7])
@pytest.mark.parametrize("shape", SHAPES)
def test_offset(isa, shape, offset, rng):
    assert_exact(values(rng, shape, "f4", offset))


def test_tall_input(isa, rng):
    assert_exact(values(rng, (100_003, 4), "f4", 1013))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
@pytest.mark.parametrize(
    "shape", [(2, 30, 101, 103), (1, 1, 801, 1009), (700, 7, 127), (100_003, 7), (2501, 517), (300, 2048), (3, 200_003)]
)
def test_several_threads(isa, shape, dtype, num_threads, rng):
    x = values(rng, shape, dtype, 100)
    assert_exact(x, num_threads=num_threads)
    _, stats = bn_c.batch_norm(x, return_stats=True, num_threads=num_threads)
    assert_statistics(stats, x)


# Of sizes whose sums are taken of two halves about the same centers.
IN_HALVES = [
    *[((2000, 200), 1), ((1031, 301), 1), ((130_003, 3), 1), ((1100, 1001), 1)],
    *[((3, 41, 43, 67), -1), ((1, 3, 401, 403), 1)],
]


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize(("shape", "axis"), IN_HALVES)
def test_two_halves(isa, shape, axis, dtype, rng):
    x = values(rng, shape, dtype, 20)
    for array in (x, np.repeat(x, 2, 0)[::2]):
        stats = assert_exact(array, axis)
        assert all(bn_c.batch_stats(array, axis=axis, num_threads=threads) == stats for threads in (2, 3))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [2, 3, 5, 7])
def test_two_halves_whose_centers_are_no_use(isa, steps, dtype, rng):
    """What a sample takes is far from the mean, or one half is; or there is none, or no variance."""
    x = values(rng, (2000, 200), dtype)
    x[::steps, :2] += 50
    x[:1000, 2] += 300
    x[:, 3] = 0
    stats = assert_exact(x)
    assert bn_c.batch_stats(x, num_threads=2) == stats
    x[1234, 4] = np.nan
    with_nan = bn_c.batch_stats(x, num_threads=2)
    assert np.isnan(with_nan.mean[4])
    assert_statistics(bn_c.batch_stats(np.delete(x, 4, 1)), np.delete(x, 4, 1))
    np.testing.assert_allclose(np.delete(with_nan.var, 4), np.delete(stats.var, 4), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [1013, 1e6])
@pytest.mark.parametrize("layout", ["rows", "columns", "one_plane"])
def test_a_million_rows(isa, offset, layout, rng):
    x = values(rng, (1_000_000, 4), "f4", offset)
    x = {"rows": x, "columns": np.asfortranarray(x), "one_plane": x.reshape(1, 1, -1)}[layout]
    assert_exact(x)


@pytest.mark.parametrize("size", [1e30, 3e38, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_very_large_and_very_small_values(isa, shape, offset, size, rng):
    """Neither the squares nor the sums of float32 could hold them."""
    assert_exact(((rng.uniform(-1, 1, shape) + offset) * (size / (1 + offset))).astype("f4"))


def test_sizes_that_differ_between_channels(isa, rng):
    """Channels for which float is enough, beside those for which it is not."""
    sizes = np.array([1, 1e30, 1e-30, 3e38, 1e-42, 100], "f4")
    x = rng.uniform(-1, 1, (500, 6)).astype("f4") * sizes
    assert_exact(x)
    assert_exact(np.asfortranarray(x))


def test_sizes_that_differ_within_a_channel(isa, rng):
    x = values(rng, (3, 2, 70, 71)) * np.float32(10) ** rng.integers(-30, 30, (3, 2, 70, 71)).astype("f4")
    assert_exact(x)


@pytest.mark.parametrize("value", [0.1, -1e6 / 3, 1e30, 3.4028235e38, 1e-30, 1e-45, 0.0])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 60, 63, 65, 127, 1000, 1023, 4097, 10_007, 100_003])
def test_constant_channels_have_no_variance(isa, count, value):
    for shape in [(1, 2, count), (count, 2), (count, 21)]:
        stats = assert_exact(np.full(shape, value, "f4"))
        assert np.all(stats.var == 0)
        assert np.all(stats.mean == np.float32(value))


@pytest.mark.parametrize("dtype", ["f2", *INTEGERS])
def test_constant_channels_of_other_types_have_no_variance(isa, dtype):
    for shape in [(1, 2, 10_007), (10_007, 2), (60, 21)]:
        assert np.all(assert_exact(np.full(shape, 77, dtype)).var == 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 35, 31, 33), (40, 35, 7, 7), (700, 35), (9000, 35), (2, 35, 5000)])
def test_channels_of_zeros_leave_others_as_they_are(isa, shape, dtype, rng):
    x = values(rng, shape, dtype, 3)
    alone = bn_c.batch_stats(x)
    for zeros in (slice(7, 8), slice(None, None, 3), slice(None)):
        x[:, zeros] = 0
        x[:, zeros][::2] = -0.0
        stats = assert_exact(x)
        assert not stats.mean[zeros].any()
        assert not stats.var[zeros].any()
        rest = x.any((0, *range(2, x.ndim)))
        assert bits(stats.mean[rest]) == bits(alone.mean[rest])
        assert bits(stats.var[rest]) == bits(alone.var[rest])


@pytest.mark.parametrize("low_high", [(-1, 1), (1e6, 1e6 + 0.0625), (0, 3e38), (-1e-30, 1e-30), (1 - 2**-24, 1)])
@pytest.mark.parametrize("period", [2, 3, 64, 100, 4096, 5000])
def test_square_waves(isa, period, low_high):
    """Also two neighbouring floats, between which the mean is no float."""
    low, high = low_high
    wave = np.where(np.arange(30_011) % period < period // 2, low, high).astype("f4")
    assert_exact(wave.reshape(1, 1, -1))
    assert_exact(np.stack([wave, -wave, wave[::-1]], 1))


@pytest.mark.parametrize("rare", [1, 5, 300])
@pytest.mark.parametrize("offset", [0, 1, 1e6])
def test_a_few_outliers(isa, offset, rare):
    x = np.full((40_000, 3), offset, "f4")
    x[:: 40_000 // rare] += 1000
    assert_exact(x)
    assert_exact(np.asfortranarray(x))


@pytest.mark.parametrize("block", [1, 50, 64, 1000, 4096, 9000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_drifting_data(isa, block, dtype, rng):
    """Blocks whose means differ much more than the values within them."""
    drift = np.repeat(rng.uniform(-3e4, 3e4, -(-40_000 // block)), block)[:40_000]
    x = (drift[:, None] + rng.standard_normal((40_000, 3)) * 20).astype(dtype)
    assert_exact(x)
    assert_exact(np.ascontiguousarray(x.T)[None])


@pytest.mark.parametrize("block", [1, 50, 1000, 9000])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_drifting_integers(isa, block, dtype, rng):
    """No sample tells their mean, and blocks are at both ends of their range."""
    ends = rng.choice([np.iinfo(dtype).min, np.iinfo(dtype).max], (-(-40_000 // block), 3))
    x = np.repeat(ends, block, 0)[:40_000].astype(dtype)
    x[::977] //= 2
    assert_exact(x)
    assert_exact(np.ascontiguousarray(x.T)[None])


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("ones", [1, 3, 20_000, 39_999])
def test_integers_that_differ_by_one(isa, dtype, ones):
    """About the nearest whole number half of the squares may cancel, and nothing is lost."""
    x = np.zeros((40_000, 3), dtype)
    x[np.linspace(0, 39_999, ones).astype(int)] = 1
    assert_exact(x)
    assert_exact(np.ascontiguousarray(x.T)[None])


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("span", [1, 2, 100])
def test_integers_at_the_end_of_their_range(isa, dtype, span, rng):
    top = np.iinfo(dtype).max
    x = rng.integers(top - span, top, (30_011, 3), dtype, endpoint=True)
    assert_exact(x)
    assert_exact(np.ascontiguousarray(x.T)[None])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        *[((3, 5, 31, 33), 1), ((2, 3, 16, 16), 1), ((2, 9, 5000), 1), ((5, 9, 7, 7), 1)],  # planes
        *[((77, 64), 1), ((101, 3), 1), ((19, 500), 1), ((2, 700), 1), ((3, 9, 11, 12), -1)],  # rows
    ],
)
def test_halves_have_the_statistics_of_their_values(isa, shape, axis, rng):
    x = values(rng, shape, "f2", 100)
    assert assert_exact(x, axis=axis) == bn_c.batch_stats(x.astype("f4"), axis=axis)


def test_the_same_statistics_from_every_function(isa, rng):
    x = values(rng, (6, 5, 31, 33), "f4", 100)
    stats = assert_exact(x)
    _, of_batch_norm = bn_c.batch_norm(x, return_stats=True)
    assert bn_c.BatchStats(5).update(x) == stats
    assert_close(of_batch_norm, stats)


# ---- NaN, infinity, nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["c", "channels_last", "fortran", "sliced"])
@pytest.mark.parametrize("position", [0, 5000, -1])
@pytest.mark.parametrize("shape", [(3, 5, 41, 83), (2, 5, 9, 13)])
def test_not_finite_values_stay_in_their_channel(isa, shape, layout, dtype, value, position, rng):
    x = LAYOUTS[layout](values(rng, shape, dtype))
    y, stats = bn_c.batch_norm(x, return_stats=True)
    plane = x[:, 2]
    plane[np.unravel_index(position % plane.size, plane.shape)] = value
    y_after, after = bn_c.batch_norm(x, return_stats=True)
    others = [0, 1, 3, 4]
    assert bits(y_after[:, others]) == bits(y[:, others])
    assert bits(after.mean[others]) == bits(stats.mean[others])
    assert bits(after.var[others]) == bits(stats.var[others])
    assert np.array_equal(after.mean[2], value, equal_nan=True)
    assert np.isnan(after.var[2])
    assert np.isnan(y_after[:, 2]).all()


def test_infinities_of_both_signs_have_no_mean(isa):
    x = np.zeros((1000, 2), "f4")
    x[3, 0], x[900, 0] = np.inf, -np.inf
    stats = bn_c.batch_stats(x)
    assert np.isnan(stats.mean[0])
    assert (stats.mean[1], stats.var[1]) == (0, 0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (2, 3, 0, 5), (0, 3, 4, 5)])
def test_statistics_of_nothing(shape):
    stats = bn_c.batch_stats(np.empty(shape, "f4"))
    assert (stats.count, stats.num_features) == (0, 3)
    assert np.isnan([stats.mean, stats.var, stats.unbiased_var, stats.std]).all()


@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (2, 0, 3)])
def test_statistics_of_no_channels(shape):
    stats = bn_c.batch_stats(np.empty(shape, "f4"))
    assert stats.num_features == 0
    assert stats.mean.shape == stats.var.shape == (0,)


# ---- BatchStats -------------------------------------------------------------------------------------


@pytest.fixture
def parts(rng):
    """Mini-batches of different lengths, types and means, one of them empty."""
    kinds = [(1, "f4", 0), (7, "f4", 1e4), (100, "f2", -200), (3000, "f4", 3), (0, "f4", 0), (1000, "u1", 0)]
    return [values(rng, (n, 3), dtype, offset) for n, dtype, offset in kinds]


def merged(stats):
    total = bn_c.BatchStats(3)
    for part in stats:
        total.merge(part)
    return total


def test_attributes(rng):
    x = values(rng, (50, 3), "f4", 7)
    stats, x = bn_c.batch_stats(x), x.astype(np.float64)
    assert (stats.count, stats.num_features) == (50, 3)
    for name, expected in {
        "mean": x.mean(0),
        "var": x.var(0),
        "unbiased_var": x.var(0, ddof=1),
        "std": x.std(0),
    }.items():
        value = getattr(stats, name)
        assert value.dtype == np.float64
        assert np.allclose(value, expected, rtol=1e-6, atol=0), name
        with pytest.raises(AttributeError):
            setattr(stats, name, expected)


def test_a_new_one_is_empty():
    stats = bn_c.BatchStats(2)
    assert (stats.count, stats.num_features) == (0, 2)
    assert np.isnan([stats.mean, stats.var, stats.unbiased_var, stats.std]).all()


def test_one_element_has_no_unbiased_variance():
    stats = bn_c.batch_stats(np.ones((1, 2), "f4"))
    assert np.all(stats.var == 0)
    assert np.isnan(stats.unbiased_var).all()


def test_results_are_copies():
    stats = bn_c.batch_stats(np.eye(3, dtype="f4"))
    before = copy.deepcopy(stats)
    for name in ("mean", "var", "unbiased_var", "std"):
        getattr(stats, name)[:] = 99
    for values_ in stats.to_dict().values():
        if isinstance(values_, list):
            values_[:] = [99] * 3
    assert stats == before


def test_update_in_pieces(isa, parts):
    stats = bn_c.BatchStats(3)
    for part in parts:
        assert stats.update(part) is stats
    assert_close(stats, merged([bn_c.batch_stats(part) for part in parts]))
    assert_statistics(stats, np.concatenate(parts))


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_update_takes_the_axis(axis):
    x = np.arange(9, dtype="f4").reshape(3, 3)
    assert bn_c.BatchStats(3).update(x, axis) == bn_c.batch_stats(x, axis=axis)


def test_merging_in_any_order(isa, parts):
    stats = [bn_c.batch_stats(part) for part in parts]
    first = merged(stats)
    assert_statistics(first, np.concatenate(parts))
    for order in itertools.permutations(stats):
        assert_close(merged(order), first)


def test_merging_as_a_tree(parts):
    a, b, c, d, e, f = (bn_c.batch_stats(part) for part in parts)
    assert_close(((a + b) + (c + d)) + (e + f), merged([a, b, c, d, e, f]))
    assert_close(a + (b + (c + (d + (e + f)))), merged([a, b, c, d, e, f]))


@pytest.mark.parametrize("pieces", [2, 100, 5000])
@pytest.mark.parametrize("offset", [1e6, -1e7])
def test_many_pieces_of_data_far_from_zero(isa, offset, pieces, rng):
    """The mean of a part, as float64 holds it, is too coarse for that."""
    x = values(rng, (20_000, 3), "f4", offset)
    parts = [bn_c.batch_stats(piece) for piece in np.array_split(x, pieces)]
    stats = merged(parts)
    assert_statistics(stats, x)
    assert_close(merged(parts[::-1]), stats)
    assert_close(merged([parts[i] for i in rng.permutation(pieces)]), stats)
    while len(parts) > 1:
        parts = [merged(parts[i : i + 2]) for i in range(0, len(parts), 2)]
    assert_close(parts[0], stats)
    assert bn_c.BatchStats.from_dict(stats.to_dict()) + parts[0] == stats + parts[0]


@pytest.mark.parametrize("shape", [(7, 3), (50, 3, 9), (3, 70, 15)])
def test_statistics_of_a_call_are_those_alone(isa, shape, rng):
    x = values(rng, shape)
    mask = rng.random((shape[0], *shape[2:])) < 0.7
    for some in (None, mask):
        assert bn_c.batch_norm(x, mask=some, return_stats=True)[1] == bn_c.batch_stats(x, mask=some)


def test_addition_makes_a_new_one(parts):
    a, b = bn_c.batch_stats(parts[1]), bn_c.batch_stats(parts[2])
    before = copy.deepcopy([a, b])
    total = a + b
    assert total is not a
    assert [a, b] == before
    assert total == copy.deepcopy(a).merge(b)
    assert total.count == 107


def test_merge_changes_and_returns_itself(parts):
    a, b = bn_c.batch_stats(parts[1]), bn_c.batch_stats(parts[2])
    before = copy.deepcopy(b)
    assert a.merge(b) is a
    assert a.count == 107
    assert b == before


def test_merging_with_an_empty_one_changes_nothing(parts):
    a = bn_c.batch_stats(parts[1])
    assert a + bn_c.BatchStats(3) == a == bn_c.BatchStats(3) + a
    assert copy.deepcopy(a).update(parts[4]) == a


def test_merging_with_itself(parts):
    a = bn_c.batch_stats(parts[1])
    assert_close(copy.deepcopy(a) + a, a.merge(a))
    assert_statistics(a, np.concatenate([parts[1], parts[1]]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_merging_what_is_not_finite(value, parts):
    bad = parts[1].copy()
    bad[2, 1] = value
    expected = merged([bn_c.batch_stats(parts[1]), bn_c.batch_stats(parts[2])])
    for a, b in itertools.permutations([bn_c.batch_stats(bad), bn_c.batch_stats(parts[2])]):
        total = a + b
        assert np.array_equal(total.mean[1], value, equal_nan=True)
        assert np.isnan(total.var[1])
        for c in (0, 2):
            assert total.mean[c] == pytest.approx(expected.mean[c], rel=DOUBLE_ERROR)
            assert total.var[c] == pytest.approx(expected.var[c], rel=DOUBLE_ERROR)


def test_equality(parts):
    a, b = bn_c.batch_stats(parts[1]), bn_c.batch_stats(parts[2])
    assert a == bn_c.batch_stats(parts[1])
    assert a != b
    assert bn_c.BatchStats(3) == bn_c.BatchStats(3)
    assert bn_c.BatchStats(3) != bn_c.BatchStats(2)
    assert a != 3
    assert (a == "a") is False
    one, three = np.ones((1, 3), "f4"), np.ones((3, 3), "f4")
    assert bn_c.batch_stats(one) != bn_c.batch_stats(three), "only their count differs"
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


STORED = {
    "pickle": lambda stats: pickle.loads(pickle.dumps(stats)),
    "old pickle": lambda stats: pickle.loads(pickle.dumps(stats, protocol=0)),
    "buffers": received,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "json": lambda stats: bn_c.BatchStats.from_dict(json.loads(json.dumps(stats.to_dict()))),
}


@pytest.mark.parametrize("store", STORED.values(), ids=STORED)
@pytest.mark.parametrize("kind", ["usual", "empty", "no channels", "not finite", "extreme"])
def test_stored_and_read_again(store, kind, parts):
    stats = {
        "usual": bn_c.batch_stats(parts[3]),
        "empty": bn_c.BatchStats(3),
        "no channels": bn_c.batch_stats(np.empty((4, 0), "f4")),
        "not finite": bn_c.batch_stats(np.array([[np.nan, np.inf, -np.inf, 1]] * 2, "f4")),
        "extreme": bn_c.batch_stats(np.array([[3e38, 1e-45, -3e38], [1e38, 3e-45, 0.1]], "f4")),
    }[kind]
    again = store(stats)
    assert again == stats
    assert bits(again.mean) == bits(stats.mean)
    assert bits(again.var) == bits(stats.var)
    assert repr(again) == repr(stats)


def test_what_is_received_is_merged_from_where_doubles_may_be(parts):
    stats = bn_c.batch_stats(parts[3])
    again = received(stats)
    assert all(array.flags.aligned for array in vars(again).values() if isinstance(array, np.ndarray))
    assert stats + again == stats + stats


def test_a_copy_is_independent(parts):
    a = bn_c.batch_stats(parts[1])
    for store in STORED.values():
        again = store(a)
        again.update(parts[2])
        assert (a.count, again.count) == (7, 107)


def test_from_dict_makes_copies():
    mean = np.zeros(2)
    stats = bn_c.BatchStats.from_dict({"count": 3, "mean": mean, "mean_rest": [0, 0], "m2": [1.0, 2.0]})
    mean[:] = 9
    assert np.all(stats.mean == 0)
    assert np.allclose(stats.var, [1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("values_", "message"),
    [
        ({"count": 3, "m2": [1.0, -1.0]}, "m2: expected sums of squares, got -1.0"),
        ({"count": 0, "m2": [1.0, 0.0]}, "count: expected one above 0"),
        ({"count": 0, "mean": [1.0, 0.0]}, "count: expected one above 0"),
    ],
)
def test_from_dict_of_what_to_dict_never_returns(values_, message):
    zeros = {key: [0.0, 0.0] for key in ("mean", "mean_rest", "m2")}
    with pytest.raises(ValueError, match=message):
        bn_c.BatchStats.from_dict(zeros | values_)


def test_repr_shows_count_and_range():
    stats = bn_c.batch_stats(np.array([[0, 10], [2, 30]], "f4"))
    assert repr(stats) == "BatchStats(num_features=2, count=2, mean=1..20, var=1..100)"
    assert repr(bn_c.BatchStats(5)) == "BatchStats(num_features=5, count=0)"


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda s: s.update(np.ones((4, 2), "f4")), ValueError, "x: expected 3 channels"),
        (lambda s: s.update(np.ones((4, 3))), TypeError, r"x: expected float32.*astype\(np.float32\)"),
        (lambda s: s.update(np.ones((4, 3), "f4"), axis=5), ValueError, "axis: expected"),
        (lambda s: s.update([[1.0, 2.0, 3.0]]), TypeError, "x: expected a NumPy array"),
        (lambda s: s.merge(bn_c.BatchStats(2)), ValueError, "other: expected 3 features, got 2"),
        (lambda s: s.merge(3), TypeError, "other: expected BatchStats, got int"),
        (lambda s: s + bn_c.BatchStats(2), ValueError, "other: expected 3 features, got 2"),
        (lambda s: s + 3, TypeError, "unsupported operand"),
    ],
)
def test_errors_change_nothing(act, error, message, parts):
    stats = bn_c.batch_stats(parts[1])
    before = copy.deepcopy(stats)
    with pytest.raises(error, match=message):
        act(stats)
    assert stats == before
