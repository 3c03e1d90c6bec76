"""A network with its batch norms folded into the layers before them does what it did."""

import itertools

import numpy as np
import pytest

import bn_c
from bn_c import definition

# Each product rounds once more than in the unfolded network, and so do the sums.
AGREE = {"f8": 1e-12, "f4": 2e-5, "f2": 2e-2}


def convolve(x, weight, bias, groups=1):
    """y[n, o, p] = sum over i and k of weight[o, i, k] * x[n, i, p + k], in float64, for any number of dimensions."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    outputs, inputs, *k = weight.shape
    size = [n - m + 1 for n, m in zip(x.shape[2:], k, strict=True)]
    y = np.zeros((len(x), outputs, *size))
    per_group = outputs // groups
    for o, i in itertools.product(range(outputs), range(inputs)):
        for at in np.ndindex(*k):
            window = tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))
            y[:, o] += weight[(o, i, *at)] * x[(slice(None), o // per_group * inputs + i, *window)]
    return y if bias is None else y + np.reshape(bias, (-1, *[1] * len(k)))


def convolve_transposed(x, weight, bias, groups=1):
    """Its weight is (in, out / groups, *k); each input spreads over the outputs of its group."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    inputs, per_group, *k = weight.shape
    size = [n + m - 1 for n, m in zip(x.shape[2:], k, strict=True)]
    y = np.zeros((len(x), per_group * groups, *size))
    for i, o in itertools.product(range(inputs), range(per_group)):
        group = i // (inputs // groups)
        for at in np.ndindex(*k):
            window = tuple(slice(a, a + n) for a, n in zip(at, x.shape[2:], strict=True))
            y[(slice(None), group * per_group + o, *window)] += weight[(i, o, *at)] * x[:, i]
    return y if bias is None else y + np.reshape(bias, (-1, *[1] * len(k)))


def trained(rng, channels, affine=True, eps=1e-3):
    bn = bn_c.BatchNorm(channels, affine=affine, eps=eps)
    bn.running_mean, bn.running_var = rng.normal(0, 3, channels), rng.uniform(0.1, 4, channels)
    if affine:
        bn.gamma, bn.beta = rng.normal(1, 1, channels), rng.normal(0, 1, channels)
    return bn


def unfolded(y, bn):
    """The batch norm after a layer, in float64."""
    gamma, beta = (1.0, 0.0) if bn.gamma is None else (bn.gamma.astype("f8"), bn.beta.astype("f8"))
    return definition.normalized(y, bn.running_mean.astype("f8"), bn.running_var.astype("f8"), gamma, beta, bn.eps)


def assert_folded(layer, x, weight, bias, bn, folded, **options):
    new_weight, new_bias = folded
    assert new_weight.shape == weight.shape
    assert new_bias.shape == (bn.num_features,)
    assert new_weight.dtype == new_bias.dtype == weight.dtype
    assert not np.shares_memory(new_weight, weight)
    expected = unfolded(layer(x, weight, bias, **options), bn)
    error = np.abs(layer(x, new_weight, new_bias, **options) - expected).max()
    assert error <= AGREE[weight.dtype.str[1:]] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", AGREE)
@pytest.mark.parametrize("k", [(3,), (1,), (3, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_convolution(dtype, k, groups, affine, rng):
    bn = trained(rng, 12, affine)
    x = rng.normal(0, 1, (2, 6, *(n + 2 for n in k)))
    weight = rng.normal(0, 1, (12, 6 // groups, *k)).astype(dtype)
    for bias in (None, rng.normal(0, 1, 12), rng.normal(0, 1, 12).tolist()):
        folded = bn_c.fold_conv(weight, bias, bn)
        assert_folded(convolve, x, weight, bias, bn, folded, groups=groups)


@pytest.mark.parametrize("dtype", AGREE)
@pytest.mark.parametrize("k", [(3,), (3, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_transposed_convolution(dtype, k, groups, rng):
    bn = trained(rng, 12)
    x = rng.normal(0, 1, (2, 6, *(n + 1 for n in k)))
    weight = rng.normal(0, 1, (6, 12 // groups, *k)).astype(dtype)
    for bias in (None, rng.normal(0, 1, 12).astype("f2")):
        folded = bn_c.fold_conv(weight, bias, bn, transposed=True)
        assert_folded(convolve_transposed, x, weight, bias, bn, folded, groups=groups)


@pytest.mark.parametrize("dtype", AGREE)
@pytest.mark.parametrize("affine", [True, False])
def test_linear(dtype, affine, rng):
    def linear(x, weight, bias):
        y = x @ weight.astype("f8").T
        return y if bias is None else y + bias

    bn = trained(rng, 7, affine)
    x = rng.normal(0, 1, (9, 4))
    weight = rng.normal(0, 1, (7, 4)).astype(dtype)
    for bias in (None, rng.normal(0, 1, 7)):
        assert_folded(linear, x, weight, bias, bn, bn_c.fold_linear(weight, bias, bn))


def test_keras_kernel(rng):
    """Its order as the documentation says."""
    bn = trained(rng, 4)
    kernel = rng.normal(0, 1, (3, 2, 5, 4)).astype("f4")
    folded, _ = bn_c.fold_conv(np.moveaxis(kernel, (-1, -2), (0, 1)), None, bn)
    scale = bn.gamma / np.sqrt(bn.running_var + bn.eps)
    assert np.allclose(np.moveaxis(folded, (0, 1), (-1, -2)), kernel * scale, rtol=1e-6)


def test_computed_in_double(rng):
    """The weights are the exact ones, rounded once."""
    bn = trained(rng, 4)
    weight = rng.normal(0, 1, (4, 5)).astype("f4")
    folded, bias = bn_c.fold_linear(weight, None, bn)
    mean, var, gamma, beta = (a.astype("f8") for a in (bn.running_mean, bn.running_var, bn.gamma, bn.beta))
    scale = gamma / np.sqrt(var + bn.eps)
    assert np.array_equal(folded, (weight * scale[:, None]).astype("f4"))
    assert np.array_equal(bias, (beta - mean * scale).astype("f4"))


def test_overflow_is_refused():
    """Rather than a network that gives infinities on the device."""
    bn = bn_c.BatchNorm(2, eps=1e-6)
    bn.running_var = [0.0, 1.0]
    with pytest.raises(ValueError, match=r"^weight: expected a dtype that holds what is folded, got float16"):
        bn_c.fold_linear(np.full((2, 1), 1000, "f2"), None, bn)
    bn.running_mean = [70.0, 0.0]
    with pytest.raises(ValueError, match=r"^weight: expected a dtype"):
        bn_c.fold_linear(np.zeros((2, 1), "f2"), None, bn)
    bn_c.fold_linear(np.full((2, 1), 1000, "f4"), None, bn)


def test_no_variance():
    """var + eps of 0, and below, is what IEEE 754 says, in that channel alone."""
    bn = bn_c.BatchNorm(3, eps=0.0)
    bn.running_var = [0.0, -1.0, 1.0]
    weight, bias = bn_c.fold_linear(np.ones((3, 1), "f4"), None, bn)
    assert np.array_equal(weight[:, 0], [np.inf, np.nan, 1], equal_nan=True)
    assert np.array_equal(bias, [np.nan, np.nan, 0], equal_nan=True)


BN = bn_c.BatchNorm(4)
CONV = np.ones((4, 2, 3, 3), np.float32)
WRONG = {
    "weight_list": ([1.0], None, BN, "weight"),
    "weight_none": (None, None, BN, "weight"),
    "weight_integers": (CONV.astype(int), None, BN, "weight"),
    "weight_other_order": (CONV.astype(">f4"), None, BN, "weight"),
    "weight_complex": (CONV.astype(complex), None, BN, "weight"),
    "weight_of_linear": (np.ones((4, 3), "f4"), None, BN, "weight"),
    "weight_rank_6": (np.ones((4, 2, 1, 1, 1, 1), "f4"), None, BN, "weight"),
    "weight_masked": (np.ma.masked_array(CONV), None, BN, "weight"),
    "weight_channels": (np.ones((3, 4, 3, 3), "f4"), None, BN, "weight"),
    "weight_channels_one": (np.ones((1, 4, 3, 3), "f4"), None, BN, "weight"),
    "bias_length": (CONV, np.zeros(3), BN, "bias"),
    "bias_scalar": (CONV, 0.0, BN, "bias"),
    "bias_integers": (CONV, np.zeros(4, int), BN, "bias"),
    "bias_text": (CONV, "0000", BN, "bias"),
    "bn_none": (CONV, None, None, "bn"),
    "bn_dict": (CONV, None, BN.state_dict(), "bn"),
    "bn_training": (CONV, None, bn_c.BatchNorm(4, training=True), "bn"),
    "bn_without_statistics": (CONV, None, bn_c.BatchNorm(4, track_running_stats=False), "bn"),
    "bn_with_activation": (CONV, None, bn_c.BatchNorm(4, activation="relu"), "bn"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name):
    weight, bias, bn, argument = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: expected [^\n]*$"):
        bn_c.fold_conv(weight, bias, bn)


@pytest.mark.parametrize("shape", [(4, 3, 3), (3, 2, 3), (4, 8, 1), (2, 0, 3), (0, 3, 3)])
def test_transposed_shape(shape):
    with pytest.raises(ValueError, match=r"^weight: expected shape \(in, 4 / groups, \*k\)"):
        bn_c.fold_conv(np.ones(shape, "f4"), None, BN, transposed=True)
    with pytest.raises(TypeError, match=r"^transposed: "):
        bn_c.fold_conv(CONV, None, BN, transposed=1)


def test_linear_shape():
    with pytest.raises(ValueError, match=r"^weight: expected 2 dimensions"):
        bn_c.fold_linear(CONV, None, BN)
    with pytest.raises(ValueError, match=r"^weight: expected 4 outputs"):
        bn_c.fold_linear(np.ones((5, 4), "f4"), None, BN)
