"""How many threads a call may use, and the pool that they come from.

The pool is threads that wait at a queue, made when first needed, and never by the import: asking them costs
a fifth of what the executor of the standard library takes. Whoever calls works too, and waits for none that is
late, so a call that finds them all busy (with another thread's work, or that of a call above it), or cannot have
any, at interpreter exit or in a process out of threads, does its work alone. A forked child makes a pool of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Protocol

from bn_c import _checks


class Parts(Protocol):
    """Work that several threads share: `bn_c._core.Parts`."""

    count: int

    def work(self) -> None: ...
    def help(self) -> None: ...
    def close(self) -> int: ...
    def wait(self) -> None: ...


_default = 1
_asked: SimpleQueue[Callable[[], None]] = SimpleQueue()
_waiting = 0
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


def run(parts: Parts, threads: int) -> None:
    """Runs all parts, on at most that many threads, one of which is the caller's.

    Returns when all are done, whatever signals come: they write to the caller's arrays.
    """
    helpers = min(threads, parts.count, _cpus()) - 1
    try:
        for _ in range(min(helpers, _pool(helpers))):
            _asked.put(parts.help)
        parts.work()
    finally:
        _finish(parts)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(helpers: int) -> int:
    """Makes the pool as large as that, where threads can be had; returns how large it is."""
    global _waiting
    if _waiting < helpers:
        with _growing:
            try:
                while _waiting < helpers:
                    Thread(target=_help, args=(_asked,), name="bn_c", daemon=True).start()
                    _waiting += 1
            except RuntimeError:  # at interpreter exit, or out of threads
                pass
    return _waiting


def _help(asked: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        asked.get()()


def _finish(parts: Parts) -> None:
    interrupt = None
    for _ in range(parts.close()):
        waiting = True
        while waiting:
            try:
                parts.wait()
                waiting = False
            except BaseException as signal:  # raised again when no thread writes any more
                interrupt = signal
    if interrupt is not None:
        raise interrupt


def _after_fork_in_child() -> None:
    global _asked, _waiting, _growing
    _asked, _waiting, _growing = SimpleQueue(), 0, Lock()


def _from_environment() -> None:
    text = os.environ.get("BN_C_NUM_THREADS")
    if text:
        try:
            set_num_threads(int(text))
        except ValueError as error:
            raise ImportError(f"BN_C_NUM_THREADS: expected a positive integer, got {text!r}") from error


_from_environment()
os.register_at_fork(after_in_child=_after_fork_in_child)
