"""How many threads a call may use."""

from __future__ import annotations

import os

from bn_c import _checks

_default = 1


def get_num_threads() -> int:
    """The number of threads of calls that do not say `num_threads`."""
    return _default


def set_num_threads(num_threads: int) -> None:
    """Sets what `get_num_threads` returns, for the whole process. Raises TypeError, ValueError below 1."""
    global _default
    _default = _checks.num_threads(num_threads)


def resolve(num_threads: int | None) -> int:
    """The number of threads of one call; None is the default."""
    return _default if num_threads is None else _checks.num_threads(num_threads)


def _from_environment() -> None:
    text = os.environ.get("BN_C_NUM_THREADS")
    if text:
        try:
            set_num_threads(int(text))
        except ValueError as error:
            raise ImportError(f"BN_C_NUM_THREADS: expected a positive integer, got {text!r}") from error


_from_environment()
