"""How many threads a call may use, and the pool that they come from.

The pool is the standard library's: it is made when first needed, and never by the import. A call that finds it
in use (by another thread, or below itself) does its work alone; so does one at interpreter exit or, until it
makes a pool of its own, in a forked child.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from bn_c import _checks

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Part = Callable[[], None]

_default = 1
_pool: ThreadPoolExecutor | None = None
_workers = 0
_in_use = Lock()


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


def run(parts: Sequence[Part], threads: int) -> None:
    """Runs all parts, on at most that many threads, one of which is the caller's.

    Returns when all are done, whatever signals come: they write to the caller's arrays.
    """
    left = deque(parts)
    helpers = min(threads, len(parts), _cpus()) - 1
    if helpers < 1 or not _in_use.acquire(blocking=False):
        _drain(left)
        return
    try:
        futures = _start(left, helpers)
        try:
            _drain(left)
        finally:
            _finish(futures)
    finally:
        _in_use.release()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _drain(left: deque[Part]) -> None:
    while left:
        try:
            part = left.popleft()
        except IndexError:
            return
        part()


def _start(left: deque[Part], helpers: int) -> list[Future[None]]:
    """Sets helpers to work; fewer, or none, where no thread can be had."""
    global _pool, _workers
    futures: list[Future[None]] = []
    try:
        if _pool is None or _workers < helpers:
            from concurrent.futures import ThreadPoolExecutor

            _pool, _workers = ThreadPoolExecutor(helpers, "bn_c"), helpers
        for _ in range(helpers):
            futures.append(_pool.submit(_drain, left))
    except RuntimeError:  # at interpreter exit, or out of threads
        pass
    return futures


def _finish(futures: list[Future[None]]) -> None:
    interrupt = None
    for future in futures:
        while not future.done():
            try:
                future.exception()
            except BaseException as signal:  # raised again when no thread writes any more
                interrupt = signal
    if interrupt is not None:
        raise interrupt


def _after_fork_in_child() -> None:
    global _pool, _in_use
    _pool, _in_use = None, Lock()


def _from_environment() -> None:
    text = os.environ.get("BN_C_NUM_THREADS")
    if text:
        try:
            set_num_threads(int(text))
        except ValueError as error:
            raise ImportError(f"BN_C_NUM_THREADS: expected a positive integer, got {text!r}") from error


_from_environment()
os.register_at_fork(after_in_child=_after_fork_in_child)
