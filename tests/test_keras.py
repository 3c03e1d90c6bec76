"""`BatchNorm.from_keras`: its conventions, and the same numbers as Keras gives."""

import os
from importlib.util import find_spec

import numpy as np
import oracle
import pytest

import bn_c

AGREE = 2e-5
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras' tensors


def weights(rng, channels=4):
    gamma, beta, mean = rng.normal(1, 1, (3, channels))
    return gamma, beta, mean, rng.uniform(1, 2, channels)


def test_defaults(rng):
    """Channels last, epsilon 1e-3, momentum 0.99 of the old statistics, biased variance, as Keras documents them."""
    gamma, beta, mean, var = weights(rng)
    layer = bn_c.BatchNorm.from_keras(gamma, beta, mean, var)
    x = rng.normal(2, 3, (5, 6, 7, 4)).astype("f4")
    oracle.assert_forward(layer(x), x, *(a.astype("f4") for a in (mean, var, gamma, beta)), 1e-3, -1)
    x_mean, x_var = oracle.exact_statistics(x, -1)
    layer.train()(x)
    assert np.allclose(layer.running_mean, mean * 0.99 + x_mean * 0.01, rtol=1e-6)
    assert np.allclose(layer.running_var, var * 0.99 + x_var * 0.01, rtol=1e-6)


def test_without_scale_or_center(rng):
    gamma, beta, mean, var = weights(rng)
    x = rng.normal(2, 3, (6, 4)).astype("f4")
    for g, b in ((None, beta), (gamma, None), (None, None), (gamma.tolist(), list(beta))):
        layer = bn_c.BatchNorm.from_keras(g, b, mean, var.astype("f2"), epsilon=0.1, axis=1)
        expected = bn_c.batch_norm_inference(x, mean.astype("f4"), var.astype("f2"), g, b, eps=0.1)
        assert np.allclose(layer(x), expected, rtol=1e-6, atol=1e-6)
        assert (layer.gamma is None) == (g is b)


WRONG = {
    "gamma": [np.ones(3), np.ones((4, 1)), "gamma", np.ones(4, int)],
    "beta": [np.ones(5), 0.0],
    "moving_mean": [None, 0.0, [], "", np.ones((4, 1)), [[1.0], [2.0, 3.0]]],
    "moving_variance": [None, 1.0, np.ones(3)],
    "epsilon": [None, -1, "1"],
    "axis": [None, 1.0, 99],
}


@pytest.mark.parametrize("argument", WRONG)
def test_refused(argument):
    given = {name: np.ones(4, "f4") for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    for value in WRONG[argument]:
        wrong = {**given, argument: value}
        with pytest.raises((TypeError, ValueError), match=rf"^({argument}|gamma): expected [^\n]*$"):
            bn_c.BatchNorm.from_keras(**wrong)


@pytest.fixture(scope="module")
def keras():
    """Keras on the backend that is there: that of NumPy needs JAX."""
    if not find_spec("keras"):
        pytest.skip("Keras is not installed: nothing is compared with it")
    backend = next((name for name in ("torch", "jax", "tensorflow") if find_spec(name)), None)
    if backend is None:
        pytest.skip("Keras has no backend: nothing is compared with it")
    os.environ.setdefault("KERAS_BACKEND", backend)
    return pytest.importorskip("keras")


@pytest.mark.parametrize("shape", [(16, 5), (6, 20, 5), (4, 6, 7, 5), (2, 3, 4, 5, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"epsilon": 0.1}, {"scale": False}, {"center": False}], ids=str)
def test_keras(keras, shape, options, rng):
    theirs = keras.layers.BatchNormalization(**options)
    theirs.build((None, *shape[1:]))
    for weight in theirs.weights:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    given = [getattr(theirs, name, None) for name in ("gamma", "beta", "moving_mean", "moving_variance")]
    given = [None if variable is None else keras.ops.convert_to_numpy(variable) for variable in given]
    ours = bn_c.BatchNorm.from_keras(*given, epsilon=theirs.epsilon)
    for step in range(3):
        x = rng.normal(step, 2, shape).astype("f4")
        expected = keras.ops.convert_to_numpy(theirs(x, training=True))
        assert np.allclose(ours.train()(x), expected, rtol=AGREE, atol=AGREE)
        expected = keras.ops.convert_to_numpy(theirs(x, training=False))
        assert np.allclose(ours.eval()(x), expected, rtol=AGREE, atol=AGREE)
    for name in ("mean", "var"):
        moving = getattr(theirs, {"mean": "moving_mean", "var": "moving_variance"}[name])
        assert np.allclose(getattr(ours, f"running_{name}"), keras.ops.convert_to_numpy(moving), rtol=AGREE)


def test_channels_first(keras, rng):
    theirs = keras.layers.BatchNormalization(axis=1)
    theirs.build((None, 5, 6, 7))
    x = rng.normal(1, 2, (3, 5, 6, 7)).astype("f4")
    theirs(x, training=True)
    ours = bn_c.BatchNorm.from_keras(*theirs.get_weights(), axis=1)
    assert np.allclose(ours(x), keras.ops.convert_to_numpy(theirs(x)), rtol=AGREE, atol=AGREE)
