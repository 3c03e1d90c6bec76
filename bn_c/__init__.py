"""Batch normalization, forward, on the CPUs of small devices: fast, exact and small.

    mean = sum(x) / m        var = sum((x - mean)^2) / m        over the m values x of one channel
    y = gamma * (x - mean) / sqrt(var + eps) + beta

`batch_norm` uses the statistics of the mini-batch, `batch_norm_inference` given ones, `batch_stats` takes them
alone, `BatchStats` merges them from parts, `BatchNorm` is the layer with running statistics. `load_layers` and
`save_layers` take layers from files of other frameworks and keep them, `fold_conv` and `fold_linear` fold them into
the layer before. `ImageNormalizer` makes tensors of camera frames.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bn_c._dispatch import isa, supported_isas
from bn_c._threads import get_num_threads, set_num_threads
from bn_c.functional import batch_norm, batch_norm_inference, batch_stats
from bn_c.layer import BatchNorm
from bn_c.stats import BatchStats

if TYPE_CHECKING:
    from bn_c.folding import fold_conv, fold_linear
    from bn_c.image import ImageNormalizer
    from bn_c.models import load_layers, save_layers

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchStats",
    "ImageNormalizer",
    "__version__",
    "batch_norm",
    "batch_norm_inference",
    "batch_stats",
    "fold_conv",
    "fold_linear",
    "get_include",
    "get_num_threads",
    "isa",
    "load_layers",
    "save_layers",
    "set_num_threads",
    "show_config",
    "supported_isas",
]

# Imported when first asked for: a device that only calls layers does not wait for them.
_LATER = {
    "ImageNormalizer": "image",
    "fold_conv": "folding",
    "fold_linear": "folding",
    "load_layers": "models",
    "save_layers": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


def get_include() -> str:
    """The folder to compile C, C++ and Cython modules with that include `bn_c/bn_c.h`."""
    from pathlib import Path

    return str(Path(__file__).parent / "include")


def show_config() -> None:
    """Prints the version, the instruction sets, the threads, and the NumPy and Python it runs in."""
    import platform

    import numpy as np

    rows = {
        "bn_c": __version__,
        "instruction set": isa,
        "available": ", ".join(supported_isas()),
        "threads": get_num_threads(),
        "numpy": np.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}",
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")
