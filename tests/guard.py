"""Memory between two pages that no one may touch: an access beyond an array ends the process there and then.

Any function that takes arrays can be tested with it: `memory.like(a, ...)` is a copy of an array, with its strides,
that begins or ends at such a page, and `memory.written(views)` tells what was written beside the elements of some.
"""

import ctypes
import mmap

import numpy as np

CANARY = 0xA5
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PROT_NONE = 0


def extent(a):
    """The bytes before and after the first element that the elements of an array reach to."""
    reach = [(n - 1) * stride for n, stride in zip(a.shape, a.strides, strict=True)] if a.size else []
    return -sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + (a.itemsize if a.size else 0)


class Guarded:
    """At least that many bytes, all of them canaries; the page before and the page behind have no access."""

    def __init__(self, size):
        page = mmap.PAGESIZE
        self.size = -(-max(size, 1) // page) * page
        self._map = mmap.mmap(-1, self.size + 2 * page)
        whole = np.frombuffer(self._map, np.uint8)
        self.bytes = whole[page:-page]
        self.bytes[:] = CANARY
        for at in (whole.ctypes.data, whole.ctypes.data + page + self.size):
            if LIBC.mprotect(at, page, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")

    def like(self, a, at_end=True, gap=0):
        """A copy of an array with the same strides: `gap` bytes before the page at the end, or behind the first one."""
        before, after = extent(a)
        first = self.size - gap - after if at_end else gap + before
        assert before <= first <= self.size - after
        view = np.ndarray(a.shape, a.dtype, self.bytes, first, a.strides)
        if not any(stride == 0 and n > 1 for n, stride in zip(a.shape, a.strides, strict=True)):
            view[...] = a
        else:
            unique = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in a.strides)
            view[unique] = a[unique]
        return view

    def written(self, *views):
        """How many bytes that are no element of these views are no canaries any more."""
        outside = np.ones(self.size, bool)
        for view in views:
            at = view.__array_interface__["data"][0] - self.bytes.ctypes.data
            shape, strides = (*view.shape, view.itemsize), (*view.strides, 1)
            if view.size:
                np.ndarray(shape, bool, outside, at, strides)[...] = False
        return int(np.count_nonzero(self.bytes[outside] != CANARY))


def guarded(a, at_end=True, gap=0):
    """A copy of one array in guarded memory of its own, and that memory."""
    memory = Guarded(sum(extent(a)) + gap)
    return memory.like(a, at_end, gap), memory
