"""What batch normalization is, in NumPy: the documentation of every function and the oracle of the tests."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray


def statistics(x: NDArray[Any], axis: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """The mean and the biased variance of each channel."""
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    return x.mean(others), x.var(others)


def normalized(
    x: NDArray[Any], mean: Any, var: Any, gamma: Any = 1.0, beta: Any = 0.0, eps: float = 1e-5, axis: int = 1
) -> NDArray[Any]:
    """The y of given statistics, computed in the precision of x: float64 to compare with."""
    channels_last = x.swapaxes(axis, -1)
    y: NDArray[Any] = (channels_last - mean) / (var + eps) ** 0.5 * gamma + beta
    return y.swapaxes(axis, -1)


def pixels(x: NDArray[Any], mean: Any, std: Any, scale: float) -> NDArray[Any]:
    """Pictures normalised, their channels last."""
    y: NDArray[Any] = (x * scale - mean) / std
    return y
