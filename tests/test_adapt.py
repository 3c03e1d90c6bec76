"""`BatchNorm.adapt`: the running statistics move to those of new data as the formula says, or stay."""

import numpy as np
import oracle
import pytest

import bn_c

OLD_MEAN, OLD_VAR = np.array([1.0, -2.0, 0.5]), np.array([1.0, 4.0, 0.25])

# Shape of x, axis of the channels, and the number of samples.
SAMPLES = {
    "rows": ((7, 3), 1, 7),
    "images": ((5, 3, 4, 6), 1, 5),
    "images, channels last": ((5, 4, 6, 3), -1, 5),
    "windows, channels last": ((5, 20, 3), 2, 5),
    "one image": ((1, 3, 4, 6), 1, 1),
    "an image without batch": ((3, 4, 6), 0, 1),
    "an image without batch, counted from the end": ((3, 4, 6), -3, 1),
    "one row": ((3,), -1, 1),
    "one row, axis 0": ((3,), 0, 1),
}


def layer(axis=1, **options):
    bn = bn_c.BatchNorm(3, axis=axis, **options)
    bn.running_mean, bn.running_var = OLD_MEAN, OLD_VAR
    return bn


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("prior", [16, 0, 0.5, 1, np.float32(3), 10**9, 1e308])
@pytest.mark.parametrize("dtype", ["f4", "f2", "u1"])
def test_formula(name, prior, dtype, rng):
    shape, axis, n = SAMPLES[name]
    x = oracle.values(rng, shape, dtype)
    mean, var = oracle.exact_statistics(x, axis)
    bn = layer(axis)
    assert bn.adapt(x, prior) is bn
    p = float(prior)
    for got, old, new in ((bn.running_mean, OLD_MEAN, mean), (bn.running_var, OLD_VAR, var)):
        exact = p / (p + n) * old + n / (p + n) * new
        assert np.allclose(got, exact, rtol=1e-6, atol=1e-6 * np.abs(new).max())


def test_default_prior(rng):
    x = rng.normal(5, 3, (16, 3)).astype("f4")
    bn = layer().adapt(x)
    assert np.allclose(bn.running_mean, (OLD_MEAN + x.mean(0)) / 2, rtol=1e-6)
    assert np.allclose(bn.running_var, (OLD_VAR + x.var(0)) / 2, rtol=1e-6)


def test_all_of_a_drift(rng):
    """With prior=0, gain and offset of a sensor are undone, whatever the statistics were."""
    x = rng.normal(0, 1, (400, 3)).astype("f4")
    bn = layer(eps=0.0)
    bn.running_mean, bn.running_var = np.full(3, np.nan), np.full(3, np.inf)
    before = bn.adapt(x, prior=0)(x)
    drifted = bn.adapt(x * 3 + 100, 0)(x * 3 + 100)
    assert np.allclose(before, drifted, atol=1e-4)


def test_only_the_statistics_change(rng):
    x = rng.normal(5, 3, (16, 3)).astype("f4")
    for training in (False, True):
        bn = layer(training=training, momentum=None)
        bn.num_batches_tracked = 7
        bn(x[:4])
        count = bn.num_batches_tracked
        bn.adapt(x)
        assert bn.training is training
        assert bn.num_batches_tracked == count
        assert bn.gamma.tolist() == [1, 1, 1]
    y = bn.eval()(x)
    assert oracle.bits(y) == oracle.bits(
        bn_c.batch_norm_inference(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta)
    )


GOOD = np.ones((4, 3), np.float32)
WRONG = {
    "no_array": ([1.0, 2.0, 3.0], 16, "x"),
    "float64": (np.ones((4, 3)), 16, "x"),
    "other_channels": (np.ones((4, 2), "f4"), 16, "x"),
    "no_channels": (np.ones(3, "f4"), 16, "axis"),
    "no_samples": (np.ones((0, 3), "f4"), 16, "x"),
    "no_pixels": (np.ones((4, 3, 0), "f4"), 16, "x"),
    "no_samples_no_prior": (np.ones((0, 3), "f4"), 0, "x"),
    "negative_prior": (GOOD, -1, "prior"),
    "nan_prior": (GOOD, float("nan"), "prior"),
    "infinite_prior": (GOOD, float("inf"), "prior"),
    "prior_none": (GOOD, None, "prior"),
    "prior_text": (GOOD, "16", "prior"),
    "prior_true": (GOOD, True, "prior"),
    "prior_array": (GOOD, np.ones(3), "prior"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name):
    x, prior, argument = WRONG[name]
    bn = layer()
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected [^\n]*$"):
        bn.adapt(x, prior)
    assert bn.running_mean.tolist() == OLD_MEAN.tolist()
    assert bn.running_var.tolist() == OLD_VAR.tolist()


def test_no_statistics_to_adapt():
    with pytest.raises(ValueError, match=r"^running_mean: expected a layer with running statistics"):
        bn_c.BatchNorm(3, track_running_stats=False).adapt(GOOD)
