"""Batch normalization of one array: with its own statistics, with given ones, and the statistics alone."""

from __future__ import annotations

from typing import Any, Literal, overload

from numpy.typing import ArrayLike, NDArray

from bn_c import _checks, _core, _threads
from bn_c.stats import BatchStats

Activation = (
    Literal["relu", "relu6", "hard_swish"]
    | tuple[Literal["leaky_relu"], float]
    | tuple[Literal["clip"], float, float]
    | None
)


@overload
def batch_norm(
    x: Any,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Any = None,
    residual: Any = None,
    activation: Activation = None,
    dtype: Any = None,
    out: Any = None,
    num_threads: int | None = None,
    return_stats: Literal[False] = False,
) -> NDArray[Any]: ...
@overload
def batch_norm(
    x: Any,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Any = None,
    residual: Any = None,
    activation: Activation = None,
    dtype: Any = None,
    out: Any = None,
    num_threads: int | None = None,
    return_stats: Literal[True],
) -> tuple[NDArray[Any], BatchStats]: ...
def batch_norm(
    x: Any,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    mask: Any = None,
    residual: Any = None,
    activation: Activation = None,
    dtype: Any = None,
    out: Any = None,
    num_threads: int | None = None,
    return_stats: bool = False,
) -> NDArray[Any] | tuple[NDArray[Any], BatchStats]:
    """Normalises x with the mean and variance of this mini-batch (Ioffe & Szegedy 2015, arXiv:1502.03167).

    For the m values of each channel

        mean = sum(x) / m        var = sum((x - mean)^2) / m
        y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)

    Parameters
    ----------
    x : array of shape (N, C), (N, C, H, W) or any other rank from 1 to 32
        float32 or float16; uint8, int8, uint16 and int16 are read exactly. Any strides, none copied. Anything
        that shares its memory with NumPy will do: buffers, `__array__`, DLPack.
    gamma, beta : (C,) arrays of any float dtype, or lists, optional
        Scale and shift; 1 and 0 if None.
    eps : float
        Added to the variance; finite, >= 0.
    axis : int
        Where x has its channels: 1, or -1 for channels last.
    mask : bool array of the shape of x without `axis`, or one that broadcasts to it, optional
        True counts. It selects what enters the statistics, such as the valid steps of padded sequences; every
        element is normalised.
    residual : float32 or float16 array of the shape of x, optional
        Added before the activation, in the same pass.
    activation : None, "relu", "relu6", "hard_swish", ("leaky_relu", slope) or ("clip", low, high)
        NaN stays NaN through each.
    dtype : float32 or float16, optional
        Of y; else that of `out`, else that of x, float32 for integers.
    out : array of the shape of x, optional
        Written and returned. May be x itself; may not overlap x or residual in part.
    num_threads : int, optional
        The result does not depend on it. None: `bn_c.get_num_threads()`.
    return_stats : bool
        Also return the `BatchStats` of x.

    Returns
    -------
    y, or (y, stats)
        In x's memory order unless `out` is given. |y - exact| is within 6 * 2^-24 * (|gamma * x_hat| + |beta| +
        |residual|) and half an ulp of y's dtype, at any mean.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing is written then. ValueError also if x has
        no element per channel, or none that the mask selects.

    Notes
    -----
    The same x gives the same bits on every CPU, for any number of threads and in place. NaN and infinity stay in
    their channel. With one element per channel, var is 0 and y is beta.

    Examples
    --------
    >>> x = np.array([[1, 10], [2, 30], [3, 20]], np.float32)       # 3 samples, 2 channels
    >>> bn_c.batch_norm(x, gamma=[1, 2]).round(2)
    array([[-1.22, -2.45],
           [ 0.  ,  2.45],
           [ 1.22,  0.  ]], dtype=float32)
    """
    return_stats = _checks.flag("return_stats", return_stats)
    y, folded = _core.batch_norm(x, gamma, beta, eps, axis, mask, residual, activation, dtype, out, num_threads)
    return (y, BatchStats.of(*folded.statistics())) if return_stats else y


def batch_norm_inference(
    x: Any,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: Activation = None,
    dtype: Any = None,
    out: Any = None,
    num_threads: int | None = None,
) -> NDArray[Any]:
    """Normalises x with given statistics, such as the running ones of a trained layer.

        y = activation(gamma * (x - mean) / sqrt(var + eps) + beta + residual)

    Parameters
    ----------
    mean, var : (C,) arrays of any float dtype, or lists
        The statistics of each channel. Where var + eps is 0 or negative, y is what IEEE 754 arithmetic gives.
    x, gamma, beta, eps, axis, residual, activation, dtype, out, num_threads
        As in `batch_norm`. x may have no elements.

    Returns
    -------
    y
        As in `batch_norm`. The same bits for any layout and for any split of a batch.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; nothing is written then.

    Examples
    --------
    >>> frame = np.full((1, 4, 6, 3), 128, np.uint8)                # channels last
    >>> y = bn_c.batch_norm_inference(frame, [118, 128, 138], [100, 100, 100], axis=-1, activation="relu")
    >>> y[0, 0, 0].round(3)
    array([1., 0., 0.], dtype=float32)
    """
    return _core.batch_norm_inference(
        x, mean, var, gamma, beta, eps, axis, residual, activation, dtype, out, num_threads
    )


def batch_stats(x: Any, *, axis: int = 1, mask: Any = None, num_threads: int | None = None) -> BatchStats:
    """The statistics of x alone; x is read once.

    Parameters
    ----------
    x, axis, mask, num_threads
        As in `batch_norm`. There may be no elements: the count is 0 then.

    Returns
    -------
    BatchStats
        count, mean and biased variance of each channel, in float64. For floats var is within 3e-7 (relative) and
        mean within 2e-7 * max|x| of the exact values, whatever the offset and the length; exact for integers.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Examples
    --------
    >>> bn_c.batch_stats(np.array([[1, 10], [3, 30]], np.uint8)).mean
    array([ 2., 20.])
    """
    x = _checks.array("x", x)
    axis = _checks.axis(axis)
    count, mean, m2 = _core.moments(x, *_checks.mask(mask, x, axis), axis, None, _threads.resolve(num_threads))
    return BatchStats.of(count, mean, m2)
