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


def last_level_cache() -> int:
    """Its size in bytes as Linux tells it, or else one that suits small boards."""
    for index in (3, 2):
        try:
            # Not by pathlib, whose import would take longer than the rest of bn_c's.
            with open(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") as file:  # noqa: PTH123
                return int(file.read().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return 4 << 20


def use(isa: str, caches: int | None = None) -> None:
    """Loads the kernels of a supported instruction set and makes them those that every call runs.

    What is larger than `caches`, in bytes, the last level's by default, is taken to be in memory.
    """
    _core.use(import_module(f"bn_c._kernels_{isa}").table, last_level_cache() if caches is None else caches)


isa = choose(os.environ.get("BN_C_MAX_ISA"))
use(isa)
