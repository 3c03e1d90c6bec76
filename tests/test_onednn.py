"""oneDNN's published problems for batch normalization (its benchdnn, inputs/bnorm), with data made as it makes them.

Mean and variance are exactly representable, and so is every sum on the way to them, so that any order of summation
has to give them without an error: values lie in pairs m * (1 + f) and m * (1 - f) around the mean m, with few bits in
f. Where a channel is too long for that, m is 0 and most values are.
"""

import math

import numpy as np
import oracle
import pytest

import bn_c

EPS = 1 / 16

# (minibatch, channels, ...) of shapes_ci, bnorm_1d, shapes_2d, bnorm_regressions and bnorm_topo_small, with fewer
# channels where they are more than half a million values.
SHAPES = [
    (2, 32, 32), (5, 33, 27), (2, 256, 28, 28), (4, 200, 17, 16), (2, 16, 12, 12, 12), (1, 19, 4, 6, 6),
    (1, 32, 30), (32, 128, 10), (32, 27, 7), (9, 128, 1),
    (1, 1, 1, 1), (1, 256, 28, 28), (1, 257, 28, 28), (1, 1024, 28, 17),
    (2, 251, 28, 28), (2, 5, 224, 224), (2, 64, 56, 56), (8, 161, 16, 16), (88, 20, 16, 16),
    (50, 10, 28, 28), (96, 80, 7, 7), (96, 16, 17, 17), (96, 38, 8, 8),
]  # fmt: skip
# Near y = 0, where gamma * x_hat and beta cancel.
CATCH_CANCEL = [(2, 128, 2, 2), (2, 1024, 2, 2)]


def gamma_beta(channels, gamma_scale, beta_scale):
    c = np.arange(channels)
    gamma = gamma_scale * 2.0 ** (c % 7)
    return gamma, (c % 3 - 1) * gamma * beta_scale


def indices(shape):
    """Of each channel its number, and beside that the running numbers of its values."""
    c = np.arange(shape[1])[:, None]
    return c, np.arange(math.prod(shape) // shape[1]) + c * 478


def as_batch(values, shape, dtype, channels_last):
    """Rows of channels as a mini-batch of that shape."""
    y = np.moveaxis(values.reshape(shape[1], shape[0], *shape[2:]), 0, 1)
    x = y.astype(dtype)
    assert np.array_equal(x, y)
    return np.moveaxis(x, 1, -1).copy() if channels_last else x.copy()


def exact_data(shape, bits):
    """The values of each channel, their means and variances, all exact in so many bits."""
    c, at = indices(shape)
    count = at.shape[1]
    flexible = (bits - math.ceil(math.log2(count))) // 2 - 1
    pairs = flexible >= 3
    flexible = flexible if pairs else min(6, bits // 2)
    f = np.where(at % 2, -1, 1) * (at // 2 * 1637 % 2**flexible) / 2**flexible
    mean = 2.0 ** (c % 7) / 4 if pairs else 0.0 * c
    if not pairs:
        f[at // 2 * 257 % 1024 >= 1024 * 2 ** (bits - 2 * flexible) / count] = 0
    deviations = mean * f if pairs else f
    if count % 2:
        deviations[:, -1] = 0
    var = [math.fsum(row * row) / count for row in deviations]
    return mean + deviations, mean[:, 0], np.array(var)


@pytest.mark.parametrize("shape", [*SHAPES, *CATCH_CANCEL], ids=str)
@pytest.mark.parametrize("dtype", oracle.FLOATS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics(shape, dtype, channels_last):
    values, mean, var = exact_data(shape, oracle.DIGITS[np.dtype(dtype).itemsize])
    x = as_batch(values, shape, dtype, channels_last)
    axis = -1 if channels_last else 1
    gamma, beta = gamma_beta(shape[1], 1 / 8, 1 / 64)
    y, stats = bn_c.batch_norm(x, gamma, beta, eps=EPS, axis=axis, return_stats=True)
    assert stats.count == values.shape[1]
    assert np.array_equal(stats.mean, mean)
    assert np.array_equal(stats.var, var)
    oracle.assert_forward(y, x, stats.mean, stats.var, gamma, beta, EPS, axis)


@pytest.mark.parametrize("shape", [*SHAPES, *CATCH_CANCEL], ids=str)
@pytest.mark.parametrize("dtype", oracle.FLOATS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_given_statistics(shape, dtype, channels_last):
    c, at = indices(shape)
    x = as_batch(at % 65 - 32.0, shape, dtype, channels_last)
    mean, var = 4.0 * (c[:, 0] % 5 - 2), 2.0 * (c[:, 0] % 7)
    axis = -1 if channels_last else 1
    for gamma, beta in ((None, None), gamma_beta(shape[1], 1, 1)):
        y = bn_c.batch_norm_inference(x, mean, var, gamma, beta, eps=EPS, axis=axis)
        oracle.assert_forward(y, x, mean, var, gamma, beta, EPS, axis)
