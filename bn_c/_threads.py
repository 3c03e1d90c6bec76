"""How many threads a call may use, and the pool that they come from.

The pool is threads that sleep, made when first needed, and never by the import. After a call they wait for the next
one actively for 0.1 ms (never on a machine with one CPU, where there are none), so that calls that follow each other
find them awake. Whoever calls works too, and waits for none that is late, so a call that finds them all busy (with
another thread's work, or that of a call above it), or cannot have any, at interpreter exit or in a process out of
threads, does its work alone. A forked child makes a pool of its own.
"""

from __future__ import annotations

import os
from threading import Lock, Thread

from bn_c import _checks, _core

_default = 1
helpers: tuple[_core.Helper, ...] = ()  # the pool
_growing = Lock()


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


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grow(size: int) -> tuple[_core.Helper, ...]:
    """The pool, first made as large as that, where CPUs and threads can be had."""
    global helpers
    size = min(size, _cpus() - 1)
    with _growing:
        try:
            while len(helpers) < size:
                helper = _core.Helper()
                Thread(target=helper.serve, name="bn_c", daemon=True).start()
                helpers = (*helpers, helper)
        except RuntimeError:  # at interpreter exit, or out of threads
            pass
    return helpers


def _after_fork_in_child() -> None:
    global helpers, _growing
    helpers, _growing = (), Lock()


def _from_environment() -> None:
    text = os.environ.get("BN_C_NUM_THREADS")
    if text:
        try:
            set_num_threads(int(text))
        except ValueError as error:
            raise ImportError(f"BN_C_NUM_THREADS: expected a positive integer, got {text!r}") from error


_from_environment()
os.register_at_fork(after_in_child=_after_fork_in_child)
