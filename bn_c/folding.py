"""Batch normalization with given statistics folded into the layer before it, whose weights then do its work.

y = gamma * (weight . x + bias - mean) / sqrt(var + eps) + beta
  = (scale * weight) . x + (bias - mean) * scale + beta            scale = gamma / sqrt(var + eps)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_c import _checks
from bn_c.layer import BatchNorm

Array = NDArray[Any]


def fold_conv(weight: Any, bias: ArrayLike | None, bn: BatchNorm, *, transposed: bool = False) -> tuple[Array, Array]:
    """The weight and bias of a convolution that also does the batch normalization right after it.

    This costs nothing at run time and is right where nothing lies between the two and the statistics stay as they
    are. It is wrong after an activation (conv, ReLU, batch norm), for a batch norm before a convolution that pads,
    where something else reads the convolution's output, and while the layer trains or adapts.

    Parameters
    ----------
    weight : float16, float32 or float64 array of shape (C, in / groups, *k), with k of 1 to 3 dimensions
        In the order of PyTorch and ONNX; (in, C / groups, *k) if `transposed`. A Keras kernel (*k, in, C) is
        `numpy.moveaxis(kernel, (-1, -2), (0, 1))`.
    bias : (C,) array, list or None
        None is 0.
    bn : BatchNorm
        With running statistics, without an activation, in inference mode.
    transposed : bool
        Whether it is a transposed convolution.

    Returns
    -------
    weight, bias : new arrays of the dtype of weight
        Computed in float64.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; also if the dtype of weight does not hold the result.
    """
    transposed = _checks.flag("transposed", transposed)
    weight = _weight(weight, (3, 4, 5))
    if not transposed:
        return _fold_rows(weight, bias, bn)
    channels = _folds(bn).num_features
    # The outputs are those of the first group, then those of the next: (groups, in / groups, C / groups, *k).
    inputs, outputs, *k = weight.shape
    groups = channels // outputs if outputs else 0
    if groups * outputs != channels or groups == 0 or inputs % groups:
        raise ValueError(
            f"weight: expected shape (in, {channels} / groups, *k) for {channels} channels, "
            f"got {_checks.shape(weight.shape)}"
        )
    grouped = weight.reshape(groups, inputs // groups, outputs, *k)
    folded, bias = _fold(grouped, (groups, 1, outputs), bias, bn)
    return folded.reshape(weight.shape), bias


def fold_linear(weight: Any, bias: ArrayLike | None, bn: BatchNorm) -> tuple[Array, Array]:
    """The weight and bias of a fully connected layer that also does the batch normalization right after it.

    Parameters
    ----------
    weight : float16, float32 or float64 array of shape (C, in)
        The transpose of a Keras kernel.
    bias, bn
        As in `fold_conv`.

    Returns
    -------
    weight, bias : new arrays of the dtype of weight
        Computed in float64.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    """
    return _fold_rows(_weight(weight, (2,)), bias, bn)


def _weight(value: Any, ranks: tuple[int, ...]) -> Array:
    weight = _checks.array("weight", value)
    if weight.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"weight: expected float16, float32 or float64, got {weight.dtype}")
    if weight.ndim not in ranks:
        raise ValueError(
            f"weight: expected {' or '.join(map(str, ranks))} dimensions, got shape {_checks.shape(weight.shape)}"
        )
    return weight


def _folds(bn: Any) -> BatchNorm:
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn: expected a BatchNorm, got {_checks.kind(bn)}")
    if bn.running_mean is None or bn.training:
        mode = "one in training mode" if bn.training else "one without"
        raise ValueError(f"bn: expected a layer in inference mode with running statistics, got {mode}")
    if bn.activation is not None:
        raise ValueError(f"bn: expected a layer without activation, which weights cannot do, got {bn.activation!r}")
    return bn


def _fold_rows(weight: Array, bias: Any, bn: Any) -> tuple[Array, Array]:
    """Where the first dimension of weight counts the outputs."""
    channels = _folds(bn).num_features
    if weight.shape[0] != channels:
        raise ValueError(f"weight: expected {channels} outputs, got shape {_checks.shape(weight.shape)}")
    return _fold(weight, (channels,), bias, bn)


def _fold(weight: Array, outputs: tuple[int, ...], bias: Any, bn: BatchNorm) -> tuple[Array, Array]:
    """`outputs`: the shape of one value per output beside the first dimensions of weight."""
    channels = bn.num_features
    bias = np.zeros(channels) if bias is None else np.asarray(_checks.vector("bias", bias, channels), np.float64)
    gamma, beta = (1, 0) if bn.gamma is None else (bn.gamma.astype(np.float64), bn.beta)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
        shift = (bias - bn.running_mean) * scale + beta
        per_output = scale.reshape(outputs + (1,) * (weight.ndim - len(outputs)))
        return _rounded(weight * per_output, weight.dtype), _rounded(shift, weight.dtype)


def _rounded(exact: Array, dtype: np.dtype[Any]) -> Array:
    rounded = exact.astype(dtype)
    if np.any(np.isinf(rounded) & np.isfinite(exact)):
        raise ValueError(f"weight: expected a dtype that holds what is folded, got {dtype}; pass a wider one")
    return rounded
