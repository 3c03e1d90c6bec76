"""The choice of an instruction set, once, at import: the best that this CPU runs and BN_C_MAX_ISA allows."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

from bn_c import _core

# From the least to the most; a machine has one family of them.
ISAS = ("generic", "aarch64", "x86_64", "x86_64_v3", "x86_64_v4")


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU runs and this build has, baseline first."""
    return tuple(isa for isa in ISAS if _core.cpu_runs(isa) and find_spec(f"bn_c._kernels_{isa}"))


def choose(cap: str | None) -> str:
    """The best supported instruction set, not above `cap`.

    Raises ImportError if `cap` is no name of a supported one.
    """
    supported = supported_isas()
    if not supported:
        raise ImportError("bn_c was built without kernels for this CPU; reinstall it")
    if not cap:
        return supported[-1]
    if cap not in supported:
        raise ImportError(f"BN_C_MAX_ISA: expected one of {', '.join(supported)}, got {cap!r}")
    return cap


def cache(index: int) -> int:
    """The size of a cache in bytes as Linux tells it, or 0. 0 and 1 are the first ones, for data and for code."""
    try:
        # Not by pathlib, whose import would take longer than the rest of bn_c's.
        with open(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") as file:  # noqa: PTH123
            return int(file.read().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 0


# In bytes, where the system does not tell ones that suit small boards. Of more than 64 MB others have their share: a
# virtual machine that was told 300 MB held 50.
LAST_CACHE = min(cache(3) or cache(2) or 4 << 20, 64 << 20)
SECOND_CACHE = cache(2)


def use(isa: str, last: int = LAST_CACHE, second: int = SECOND_CACHE) -> None:
    """Loads the kernels of a supported instruction set and makes them those that every call runs.

    What is larger than the `last` cache, in bytes, is taken to be in memory, and asked for ahead.
    A large `second` one holds channels between their statistics and y.
    """
    _core.use(import_module(f"bn_c._kernels_{isa}").table, last, second)


isa = choose(os.environ.get("BN_C_MAX_ISA"))
use(isa)
