"""`mask`: only what it selects enters the statistics, and every element is normalised."""

import copy
import itertools

import numpy as np
import pytest
from oracle import FLOATS, INTEGERS, LAYOUTS, assert_forward, assert_statistics, bits, values

import bn_c


def selected(x, mask, axis):
    """The elements that count, as rows of channels."""
    sizes = x.shape[:axis] + x.shape[axis + 1 :]
    return np.moveaxis(x, axis, -1)[np.broadcast_to(mask, sizes)]


def random_mask(rng, x, axis, share=0.5):
    mask = rng.random(np.delete(x.shape, axis)) < share
    mask.flat[:2] = True
    return mask


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout, axis, dtype, rng):
    x = LAYOUTS[layout](values(rng, (3, 33, 17, 5), dtype))
    mask = random_mask(rng, x, axis)
    stats = bn_c.batch_stats(x, axis=axis, mask=mask)
    assert_statistics(stats, selected(x, mask, axis))
    y, again = bn_c.batch_norm(x, axis=axis, mask=mask, dtype=np.float32, return_stats=True)
    assert again.count == stats.count
    np.testing.assert_array_equal(again.mean, stats.mean)
    np.testing.assert_allclose(again.var, stats.var, rtol=1e-15)
    assert_forward(y, x, stats.mean, stats.var, axis=axis)


@pytest.mark.parametrize(
    "shape", [(700, 3), (70_001, 64), (2000, 200), (4, 20, 300, 301), (9, 16, 7, 7), (2, 1, 300_000)]
)
@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_sizes_and_threads(isa, shape, share, rng):
    x = values(rng, shape, "f4", offset=20)
    mask = random_mask(rng, x, 1, share)
    stats = bn_c.batch_stats(x, mask=mask)
    assert_statistics(stats, selected(x, mask, 1))
    assert bn_c.batch_stats(x, mask=mask, num_threads=3) == stats
    y = bn_c.batch_norm(x, mask=mask)
    np.testing.assert_array_equal(bits(y), bits(bn_c.batch_norm(x, mask=mask, num_threads=3)))


@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
@pytest.mark.parametrize("shape", [(1, 2, 5000), (3, 2, 700), (5000, 3)])
def test_runs(isa, shape, dtype, rng):
    """Elements that count before and behind those that do not, within and across what is loaded at a time."""
    x = values(rng, shape, dtype, 20)
    steps = np.arange(max(shape))
    for first, last in itertools.product((1, 31, 2047, 2048, 2049, 4999), repeat=2):
        for counting in (steps < last, steps >= first, (steps >= first) == (steps < last), steps % 7 == 3):
            row = np.broadcast_to(counting[: x[:, 0].shape[-1]], x[:, 0].shape)
            for mask in (row, row.copy()) if row.any() else ():
                assert_statistics(bn_c.batch_stats(x, mask=mask), selected(x, mask, 1))


def test_broadcasts_and_strides(isa, rng):
    """One mask for all channels of padded sequences (batch, channels, steps)."""
    x = values(rng, (6, 5, 40), "f4")
    lengths = np.array([40, 1, 17, 0, 33, 8])
    mask = np.arange(40) < lengths[:, None]
    whole = bn_c.batch_stats(x, mask=mask)
    assert whole.count == lengths.sum()
    assert_statistics(whole, selected(x, mask, 1))
    assert bn_c.batch_stats(x, mask=np.asfortranarray(mask)) == whole
    assert bn_c.batch_stats(x, mask=np.repeat(mask, 2, axis=1)[:, ::2]) == whole
    mask = random_mask(rng, x, 1)
    whole = bn_c.batch_stats(x, mask=mask)
    for same in (np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2], mask[:, ::-1].copy()[:, ::-1]):
        assert bn_c.batch_stats(x, mask=same) == whole
    steps = np.arange(40) % 3 == 0
    assert bn_c.batch_stats(x, mask=steps) == bn_c.batch_stats(x, mask=np.tile(steps, (6, 1)))
    assert bn_c.batch_stats(x, mask=np.ones((6, 1), bool)).count == 240


@pytest.mark.parametrize("junk", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("axis", [1, -1])
def test_what_is_left_out_does_not_matter(isa, junk, axis, rng):
    x = values(rng, (50, 8, 8), "f4")
    mask = random_mask(rng, x, axis % 3)
    stats = bn_c.batch_stats(x, axis=axis, mask=mask)
    np.moveaxis(x, axis, -1)[~mask] = junk
    assert bn_c.batch_stats(x, axis=axis, mask=mask) == stats


def test_streaming(rng):
    x = values(rng, (30, 4, 10), "f4")
    mask = random_mask(rng, x, 1)
    stats = bn_c.BatchStats(4)
    for part, part_mask in zip(np.split(x, 5), np.split(mask, 5), strict=True):
        stats.update(part, mask=part_mask)
    assert_statistics(stats, selected(x, mask, 1))
    before = copy.deepcopy(stats)
    assert stats.update(x, mask=np.zeros((30, 10), bool)) == before


def test_layer(rng):
    x = values(rng, (30, 4, 10), "f4")
    mask = random_mask(rng, x, 1)
    layer = bn_c.BatchNorm(4, momentum=None).train()
    y = layer(x, mask=mask)
    batch = bn_c.batch_stats(x, mask=mask)
    np.testing.assert_array_equal(y, bn_c.batch_norm(x, mask=mask))
    np.testing.assert_allclose(layer.running_mean, batch.mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, batch.unbiased_var, rtol=1e-6)
    layer.eval()
    np.testing.assert_array_equal(layer(x, mask=mask), layer(x))


def test_one_value_per_channel(rng):
    x = values(rng, (3, 4), "f4")
    one = np.array([False, True, False])
    layer = bn_c.BatchNorm(4).train()
    with pytest.raises(ValueError, match="x: expected more than one value per channel"):
        layer(x, mask=one)
    assert layer.num_batches_tracked == 0
    assert bn_c.batch_norm(x, mask=one)[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones(3, np.uint8), TypeError, "mask: expected bool, got uint8"),
        (np.ones(3), TypeError, "mask: expected bool, got float64"),
        (np.ones((3, 4), bool), ValueError, r"mask: expected shape \(3,\), .* got \(3, 4\)"),
        (np.ones(2, bool), ValueError, r"mask: expected shape \(3,\), .* got \(2,\)"),
        (np.zeros(3, bool), ValueError, "mask: expected at least one True, got none"),
        ([True, False, True], TypeError, "mask: expected a NumPy array or a buffer, got list"),
        ("all", TypeError, "mask: expected a NumPy array or a buffer, got str"),
        (np.ma.masked_array([True, True, False]), TypeError, "mask: expected a plain array"),
    ],
)
def test_bad_masks(mask, error, message):
    x, out = np.ones((3, 4), np.float32), np.full((3, 4), 7, np.float32)
    with pytest.raises(error, match=message):
        bn_c.batch_norm(x, mask=mask, out=out)
    assert np.all(out == 7)


def test_mask_in_the_memory_of_out():
    x = np.ones((4, 4), np.float32)
    mask = x.view(np.uint8).reshape(-1)[:4].view(bool)
    with pytest.raises(ValueError, match=r"out: .* overlap with mask"):
        bn_c.batch_norm(x, mask=mask, out=x)
