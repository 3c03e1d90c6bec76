"""Checks of arguments: what passes is returned as what the next step takes, what does not names itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

Activation = tuple[str, float, float]
INFINITY = math.inf
X_DTYPES = "float32, float16, uint8, int8, uint16 or int16"
FLOAT_DTYPES = "float32 or float16"
ACTIVATIONS: dict[str | None, Activation] = {
    None: ("identity", 0.0, 0.0),
    "relu": ("clip", 0.0, INFINITY),
    "relu6": ("clip", 0.0, 6.0),
    "hard_swish": ("hard_swish", 0.0, 0.0),
}
ACTIVATION_FORMS = "None, 'relu', 'relu6', 'hard_swish', ('leaky_relu', slope) or ('clip', low, high)"


def shape(sizes: Iterable[int]) -> str:
    """A shape as it is written in messages."""
    return str(tuple(map(int, sizes)))


def said(value: object) -> str:
    """What came, on one short line."""
    try:
        text = repr(value)
    except Exception:
        return kind(value)
    return " ".join(text.split())[:60]


def kind(value: object) -> str:
    """What came, in a word or two."""
    return type(value).__name__


def array(name: str, value: Any) -> NDArray[Any]:
    """The array that `value` is or shares its memory with: buffers, `__array__`, DLPack. Never a copy of a list."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked array, whose mask would be ignored")
    if value is None or isinstance(value, (list, tuple, str, bytes, Real, complex)):
        raise TypeError(f"{name}: expected a NumPy array or a buffer, got {kind(value)}")
    try:
        shares = hasattr(value, "__array__") or not hasattr(value, "__dlpack__")
        result = np.asarray(value) if shares else np.from_dlpack(value)
    except Exception as error:
        raise TypeError(f"{name}: expected a NumPy array or a buffer, got {kind(value)} ({why(error)})") from error
    if result.ndim == 0:
        raise TypeError(f"{name}: expected a NumPy array or a buffer, got {kind(value)}")
    return result


def out(value: Any) -> NDArray[Any] | None:
    """As `optional_array`, and what is written there is not lost in a copy."""
    result = optional_array("out", value)
    if result is not None and result is not value and result.size and not share_memory(array("out", value), result):
        raise TypeError(f"out: expected a NumPy array or a buffer, got {kind(value)}, which makes a copy")
    return result


def why(error: Exception) -> str:
    """An error's message on one line. A lack of memory is no fault of the argument's."""
    if isinstance(error, MemoryError):
        raise error
    return " ".join(str(error).split())


def mask(value: Any, x: NDArray[Any], at: int) -> tuple[NDArray[np.uint8] | None, int]:
    """As an array of the shape of x, whose channels share it, and how many elements of each channel it selects."""
    if value is None:
        return None, 0
    result = array("mask", value)
    if result.dtype != np.bool_:
        raise TypeError(f"mask: expected bool, got {result.dtype}")
    at = at % x.ndim if channels(x, at) >= 0 else at
    sizes = x.shape[:at] + x.shape[at + 1 :]
    try:
        result = np.broadcast_to(result, sizes)
    except ValueError as error:
        raise ValueError(
            f"mask: expected shape {shape(sizes)}, that of x without axis {at}, or one that broadcasts to it, "
            f"got {shape(result.shape)}"
        ) from error
    selected = np.broadcast_to(np.expand_dims(result.view(np.uint8), at), x.shape)
    return selected, int(np.count_nonzero(result))


def optional_array(name: str, value: Any) -> NDArray[Any] | None:
    """As `array`; None stays None."""
    return None if value is None else array(name, value)


def names(values: Iterable[str]) -> str:
    """The first of some names, such as the keys of a mapping."""
    keys = list(values)
    return ", ".join(map(repr, keys[:5])) + (" ..." if len(keys) > 5 else "") or "none"


def wrong_dtype(name: str, value: NDArray[Any], integers: bool) -> Exception:
    """The error for a dtype that the loops do not read."""
    expected = X_DTYPES if integers else FLOAT_DTYPES
    if value.dtype.isnative is False and value.dtype.kind in "fiu":
        return TypeError(f"{name}: expected native byte order, got {value.dtype.str}")
    hint = f"; pass {name}.astype(np.float32)" if value.dtype.kind in "fiub" and name != "out" else ""
    return TypeError(f"{name}: expected {expected}, got {value.dtype}{hint}")


def other_dtype(name: str, value: NDArray[Any], expected: np.dtype[Any]) -> TypeError:
    """The error for a dtype that is not the one that can be."""
    hint = ""
    if name == "frame" and value.dtype.kind == "f":
        hint = ": pictures are normalised from their bytes; batch_norm_inference takes floats"
    return TypeError(f"{name}: expected {expected}, got {value.dtype}{hint}")


def wrong_frame(sizes: Sequence[int], channels: int | str) -> ValueError:
    """The error for what is no picture, or no batch of them, of so many channels."""
    hint = ": for one channel pass frame[..., None]" if len(sizes) == 2 else ""
    expected = f"shape (H, W, {channels}) or (N, H, W, {channels})"
    return ValueError(f"frame: expected {expected}, got {shape(sizes)}{hint}")


def share_memory(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays have a byte in common; True also where that is too hard to say."""
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # the stub knows 0 and -1 only
    except RuntimeError:  # numpy.exceptions.TooHardError, which older NumPy keeps elsewhere
        return True


def number(name: str, value: Any) -> float:
    """A real number, not a bool."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {kind(value)}")
    try:
        return float(value)
    except Exception as error:
        raise ValueError(f"{name}: expected a number that float holds, got {said(value)}") from error


def finite(name: str, value: Any) -> float:
    """A finite number, not negative."""
    result = number(name, value)
    if not 0 <= result < INFINITY:
        raise ValueError(f"{name}: expected a finite number >= 0, got {result}")
    return result


def eps(value: Any) -> float:
    """What is added to the variance."""
    return finite("eps", value)


def momentum(value: Any) -> float:
    """A weight from 0 to 1."""
    result = number("momentum", value)
    if not 0 <= result <= 1:
        raise ValueError(f"momentum: expected 0 to 1, or None, got {result}")
    return result


def flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too; nothing else is taken for one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {kind(value)}")
    return bool(value)


def integer(name: str, value: Any) -> int:
    """Anything that counts as an index, not a bool."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected an integer, got {kind(value)}")
    try:
        return operator.index(value)
    except Exception as error:
        raise TypeError(f"{name}: expected an integer, got {kind(value)}") from error


def axis(value: Any) -> int:
    """An axis; whether x has it is checked with x."""
    result = integer("axis", value)
    if not -32 <= result < 32:
        raise ValueError(f"axis: expected -32 to 31, got {said(result)}")
    return result


def num_threads(value: Any) -> int:
    """A positive number of threads. More than could be of use are as good as many."""
    result = integer("num_threads", value)
    if result < 1:
        raise ValueError(f"num_threads: expected at least 1, got {said(result)}")
    return min(result, 256)


def count(name: str, value: Any) -> int:
    """An integer from 0 to what int64 holds."""
    result = integer(name, value)
    if not 0 <= result < 1 << 63:
        raise ValueError(f"{name}: expected an integer from 0 to 2^63 - 1, got {said(result)}")
    return result


def num_features(value: Any) -> int:
    """A number of channels."""
    result = count("num_features", value)
    if result >= 1 << 31:
        raise ValueError(f"num_features: expected an integer below 2^31, got {said(result)}")
    return result


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A dict or something like it."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {kind(value)}")
    return value


def length(name: str, value: Any) -> int:
    """How many channels there are, where a vector says it."""
    try:
        return int(np.shape(value)[0])
    except Exception as error:
        raise TypeError(f"{name}: expected one value per channel, got {kind(value)}") from error


def channels(x: NDArray[Any], at: int) -> int:
    """How many channels x has."""
    sizes = x.shape
    if not -len(sizes) <= at < len(sizes):
        raise wrong_axis(at, sizes)
    return int(sizes[at])


def wrong_axis(at: int, sizes: Sequence[int]) -> ValueError:
    """The error for an axis that x does not have."""
    n = len(sizes)
    if n == 0:
        return ValueError("x: expected at least one dimension, got 0")
    hint = ": a rank-1 x is one sample, pass axis=0 or -1" if n == 1 else ""
    return ValueError(f"axis: expected {-n} to {n - 1} for x of shape {shape(sizes)}, got {at}{hint}")


def vector(name: str, value: Any, channels: int) -> NDArray[np.floating[Any]]:
    """One real number per channel: a float array of any precision, or a list."""
    if type(value) is np.ndarray and value.dtype.kind == "f" and value.shape == (channels,):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked array, whose mask would be ignored")
    try:
        result = np.asarray(value)
    except Exception as error:
        raise TypeError(f"{name}: expected {channels} real numbers, got {kind(value)} ({why(error)})") from error
    integers = result.dtype.kind in "iu" and isinstance(value, (list, tuple))
    if result.dtype.kind != "f" and not integers:
        raise TypeError(f"{name}: expected real floating-point numbers, got {kind(value)} of {result.dtype}")
    if result.shape != (channels,):
        raise ValueError(f"{name}: expected shape ({channels},), one value per channel, got {shape(result.shape)}")
    return result.astype(np.float64) if integers else result


def out_dtype(value: Any) -> np.dtype[Any] | None:
    """float32 or float16, in any of NumPy's spellings; None stays None."""
    if value is None:
        return None
    try:
        result: np.dtype[Any] = np.dtype(value)
    except Exception as error:
        raise TypeError(f"dtype: expected {FLOAT_DTYPES}, got {said(value)}") from error
    if result not in (np.float32, np.float16) or not result.isnative:
        raise TypeError(f"dtype: expected {FLOAT_DTYPES}, got {result}")
    return result


def activation(value: Any) -> Activation:
    """What the loops do after scale and shift: its kind, and low and high, or the slope as low."""
    if value is None or isinstance(value, str):
        if value not in ACTIVATIONS:
            raise ValueError(f"activation: expected {ACTIVATION_FORMS}, got {said(value)}")
        return ACTIVATIONS[value]
    if not isinstance(value, tuple):
        raise TypeError(f"activation: expected {ACTIVATION_FORMS}, got {kind(value)}")
    if not value or not isinstance(value[0], str):
        raise ValueError(f"activation: expected {ACTIVATION_FORMS}, got {said(value)}")
    if len(value) == 2 and value[0] == "leaky_relu":
        slope = number("activation slope", value[1])
        if not math.isfinite(slope):
            raise ValueError(f"activation: expected a finite slope, got {slope}")
        return "leaky_relu", slope, 0.0
    if len(value) == 3 and value[0] == "clip":
        low, high = number("activation low", value[1]), number("activation high", value[2])
        if not low <= high:
            raise ValueError(f"activation: expected low <= high to clip to, got {low} and {high}")
        return "clip", low, high
    raise ValueError(f"activation: expected {ACTIVATION_FORMS}, got {said(value)}")
