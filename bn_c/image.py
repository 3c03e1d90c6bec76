"""Camera frames to the tensors that networks take, in one pass over the bytes."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_c import _checks, _core, _threads, definition

MAX_CHANNELS = _core.max_channels
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float16", "uint8", "int8")
SAFE = (1e-30, 1e30)  # magnitudes whose products and sums keep the full precision of float32

Values = float | tuple[float, ...]


def _values(name: str, value: Any) -> Values:
    """One finite number for all channels, or one for each."""
    if isinstance(value, Real):
        result: Values = _checks.number(name, value)
    else:
        try:
            channels = len(value)
        except TypeError as error:
            raise TypeError(f"{name}: expected a number, or one per channel, got {_checks.kind(value)}") from error
        result = tuple(_checks.vector(name, value, channels).tolist())
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"{name}: expected 1 to {MAX_CHANNELS} channels, got {channels}")
    if not np.isfinite(result).all():
        raise ValueError(f"{name}: expected finite numbers, got {_checks.said(result)}")
    return result


def _std(value: Any) -> Values:
    result = _values("std", value)
    if not np.greater(result, 0).all():
        raise ValueError(f"std: expected numbers above 0, got {_checks.said(result)}")
    return result


def _scale(value: Any) -> float:
    result = _checks.number("scale", value)
    if not math.isfinite(result) or result == 0:
        raise ValueError(f"scale: expected a finite number other than 0, got {result}")
    return result


def _dtype(value: Any) -> np.dtype[Any]:
    try:
        result: np.dtype[Any] = np.dtype(value)
    except Exception as error:
        raise TypeError(f"dtype: expected {', '.join(DTYPES)}, got {_checks.said(value)}") from error
    if value is None or result.name not in DTYPES or not result.isnative:
        raise TypeError(f"dtype: expected {', '.join(DTYPES)}, got {_checks.said(value)}")
    return result


def _layout(value: Any) -> str:
    if not isinstance(value, str) or value not in LAYOUTS:
        raise ValueError(f"layout: expected 'NCHW' or 'NHWC', got {_checks.said(value)}")
    return value


def _quant(value: Any, dtype: np.dtype[Any]) -> tuple[float, int] | None:
    if dtype.kind == "f":
        if value is not None:
            raise ValueError(f"quant: expected None for {dtype}, got {_checks.said(value)}")
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"quant: expected (q_scale, zero_point) for {dtype}, got {_checks.said(value)}")
    q_scale = _checks.number("quant q_scale", value[0])
    if not math.isfinite(q_scale) or q_scale <= 0:
        raise ValueError(f"quant: expected a finite q_scale above 0, got {q_scale}")
    zero_point, info = _checks.integer("quant zero_point", value[1]), np.iinfo(dtype)
    if not info.min <= zero_point <= info.max:
        raise ValueError(f"quant: expected a zero_point of {dtype}, got {_checks.said(zero_point)}")
    return q_scale, zero_point


def _linear(scale: NDArray[Any], shift: NDArray[Any]) -> NDArray[np.float32]:
    """The rows of scale and shift, of one value per channel, as the loops take them."""
    with np.errstate(all="ignore"):
        return np.stack([scale, shift]).astype(np.float32)


def _of_all_bytes(linear: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the loops compute for each channel and byte."""
    with np.errstate(all="ignore"):
        product = np.arange(256, dtype=np.float32) * linear[0, :, None]
        return product + linear[1, :, None]


@dataclass(frozen=True, repr=False)
class ImageNormalizer:
    """Frames of bytes to normalised tensors, in one pass: y = (x * scale - mean) / std for each channel.

    Called with a uint8 array (H, W, C) it returns (C, H, W), with a batch (N, H, W, C) it returns (N, C, H, W);
    with layout "NHWC" the shape stays. Frames may have any strides (crops, flips, padded rows, a slice of a
    larger array) and are not copied; anything that shares its memory with NumPy will do.

    Parameters
    ----------
    mean, std : number, or one per channel
        In the order of the channels of y, in the units of x * scale; std above 0. Two numbers serve frames of any
        number of channels. There may be 1 to 1024.
    scale : float
        Of the bytes: 1/255 for means and deviations of pictures in 0..1, 1 for those of 0..255.
    reverse_channels : bool
        Turns BGR, as OpenCV reads pictures, to RGB.
    layout : "NCHW" or "NHWC"
        Of y; a single frame has no N.
    dtype : float32, float16, uint8 or int8
        Of y.
    quant : (q_scale, zero_point), for uint8 and int8
        y is then clip(round(y / q_scale) + zero_point), halves to even, as quantised models expect it.
    num_threads : int, optional
        The result does not depend on it. None: `bn_c.get_num_threads()`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Notes
    -----
    Floats are within 4 * 2^-24 * (|y| + |mean / std|) of the exact result, half floats plus half their ulp.
    Quantised results are those of the formula in float64. The same bits on every CPU and for any number of threads.

    Examples
    --------
    >>> prep = bn_c.ImageNormalizer.imagenet(reverse_channels=True) # frames from OpenCV are BGR
    >>> frame = np.zeros((480, 640, 3), np.uint8)
    >>> tensor = np.empty((8, 3, 224, 224), np.float32)
    >>> prep(frame[100:324, 200:424], out=tensor[0]).shape
    (3, 224, 224)
    """

    mean: ArrayLike
    std: ArrayLike
    _: KW_ONLY
    scale: float = 1 / 255
    reverse_channels: bool = False
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Any = "float32"
    quant: tuple[float, int] | None = None
    num_threads: int | None = 1
    _pixels: _core.Pixels | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        mean, std, dtype = _values("mean", self.mean), _std(self.std), _dtype(self.dtype)
        lengths = {len(v) for v in (mean, std) if isinstance(v, tuple)}
        if len(lengths) > 1:
            raise ValueError(f"std: expected as many channels as mean, {np.size(mean)}, got {np.size(std)}")
        checked = {
            "mean": mean,
            "std": std,
            "scale": _scale(self.scale),
            "reverse_channels": _checks.flag("reverse_channels", self.reverse_channels),
            "layout": _layout(self.layout),
            "dtype": dtype,
            "quant": _quant(self.quant, dtype),
            "num_threads": None if self.num_threads is None else _checks.num_threads(self.num_threads),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._prepare(*lengths or {1})

    @classmethod
    def imagenet(cls, **options: Any) -> ImageNormalizer:
        """For networks trained on ImageNet: its mean and std of RGB in 0..1; options as in the constructor."""
        return cls((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), **options)

    @classmethod
    def unit(cls, **options: Any) -> ImageNormalizer:
        """To 0..1, for any number of channels; options as in the constructor."""
        return cls(0.0, 1.0, **options)

    @classmethod
    def symmetric(cls, **options: Any) -> ImageNormalizer:
        """To -1..1, for any number of channels; options as in the constructor."""
        return cls(0.5, 0.5, **options)

    def __call__(self, frame: Any, out: Any = None) -> NDArray[Any]:
        """The frame, or batch of frames, normalised.

        Parameters
        ----------
        frame : uint8 array of shape (H, W, C) or (N, H, W, C)
            Any strides, none copied.
        out : array of the shape and dtype of y, optional
            Written and returned, of any strides: a model's input buffer, a row of a batch. Apart from frame.

        Returns
        -------
        y
            `out`, or a new array.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came; nothing is written then.
        """
        x = _checks.array("frame", frame)
        y = self._pixels_for(x)(x, _checks.out(out), _threads.resolve(self.num_threads))
        return y if out is None else out

    def _pixels_for(self, frame: NDArray[Any]) -> _core.Pixels:
        """What is prepared for the channels of the mean and std, or else for those of the frame."""
        pixels = self._pixels
        assert pixels is not None
        if isinstance(self.mean, tuple) or isinstance(self.std, tuple):
            return pixels
        if frame.ndim not in (3, 4):
            raise _checks.wrong_frame(frame.shape, "C")
        channels = frame.shape[-1]
        if not 1 <= channels <= MAX_CHANNELS:
            raise ValueError(f"frame: expected 1 to {MAX_CHANNELS} channels, got shape {_checks.shape(frame.shape)}")
        return pixels if pixels.channels == channels else self._prepare(channels)

    def _prepare(self, channels: int) -> _core.Pixels:
        """Folds the parameters, and keeps that for the calls to come."""
        mean, std = (np.broadcast_to(np.asarray(v, np.float64), channels) for v in (self.mean, self.std))
        linear, table, linear_is_exact = self._folded(mean, std)
        last = self.layout == "NHWC"
        pixels = _core.Pixels(linear, table, self.dtype, linear_is_exact, self.reverse_channels, last)
        object.__setattr__(self, "_pixels", pixels)
        return pixels

    def _folded(self, mean: NDArray[Any], std: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[Any] | None, bool]:
        """Scale and shift; what becomes of each byte, unless that is float32; whether scale and shift give it."""
        if self.quant is not None:
            return self._folded_to_integers(mean, std, *self.quant)
        with np.errstate(all="ignore"):
            scale, shift = self.scale / std, -mean / std
        for name, values in (("std", scale), ("mean", shift[shift != 0])):
            if np.any((np.abs(values) < SAFE[0]) | (np.abs(values) > SAFE[1])):
                formula = "scale / std" if name == "std" else "mean / std"
                raise ValueError(f"{name}: expected {formula} of magnitude {SAFE[0]} to {SAFE[1]}")
        linear = _linear(scale, shift)
        if self.dtype == np.float32:
            return linear, None, True
        with np.errstate(over="ignore"):
            return linear, _of_all_bytes(linear).astype(np.float16), True

    def _folded_to_integers(
        self, mean: NDArray[Any], std: NDArray[Any], q_scale: float, zero_point: int
    ) -> tuple[NDArray[np.float32], NDArray[Any], bool]:
        info = np.iinfo(self.dtype)
        with np.errstate(all="ignore"):
            y = definition.pixels(np.arange(256.0)[:, None], mean, std, self.scale).T
            table = np.clip(np.rint(y / q_scale) + zero_point, info.min, info.max)
            linear = _linear(self.scale / std / q_scale, zero_point - mean / std / q_scale)
        same = np.clip(np.rint(_of_all_bytes(linear)), info.min, info.max) == table
        return linear, np.ascontiguousarray(table.astype(self.dtype)), bool(same.all())

    def _options(self) -> dict[str, Any]:
        names = [f.name for f in fields(self) if f.init]
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        texts = {name: repr(value) for name, value in self._options().items()}
        texts["dtype"] = repr(self.dtype.name)
        if self.scale == 1 / 255:
            texts["scale"] = "1/255"
        if self.quant is None:
            del texts["quant"]
        return f"ImageNormalizer({', '.join(f'{name}={text}' for name, text in texts.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self._options())


def _rebuilt(cls: type[ImageNormalizer], options: dict[str, Any]) -> ImageNormalizer:
    return cls(**options)
