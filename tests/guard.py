"""Memory between two pages that no one may touch: an access beyond an array ends the process there and then.

Any function that takes arrays can be tested with it: `guarded(a)` is a copy of an array, with its strides, that begins
or ends at such a page, and its memory, whose `written(views)` tells what was written beside the elements of some.
"""

import ctypes
import mmap

import numpy as np

CANARY = 0xA5
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PROT_NONE = 0


def extent(shape, strides, itemsize):
    """How many bytes the elements of an array reach to before its first one, and from there on."""
    if 0 in shape:
        return 0, 0
    reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    return -sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + itemsize


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

    def array(self, shape, dtype, strides, at_end=True, gap=0):
        """An array of what is there, `gap` bytes before the page at the end, or behind the first one."""
        dtype = np.dtype(dtype)
        before, after = extent(shape, strides, dtype.itemsize)
        first = self.size - gap - after if at_end else gap + before
        return np.ndarray(shape, dtype, self.bytes, first, strides)

    def like(self, a, at_end=True, gap=0):
        """A copy of an array, with its strides, at such a place."""
        view = self.array(a.shape, a.dtype, a.strides, at_end, gap)
        view[...] = a
        return view

    def outside(self, *views):
        """The bytes that are no element of these views."""
        outside = np.ones(self.size, bool)
        for view in views:
            at = view.__array_interface__["data"][0] - self.bytes.ctypes.data
            shape, strides = (*view.shape, view.itemsize), (*view.strides, 1)
            if view.size and 0 <= at < self.size:
                np.ndarray(shape, bool, outside, at, strides)[...] = False
        return self.bytes[outside]

    def written(self, *views):
        """How many bytes that are no element of these views are no canaries any more."""
        return int(np.count_nonzero(self.outside(*views) != CANARY))


def guarded(a, at_end=True, gap=0):
    """A copy of one array in guarded memory of its own, and that memory."""
    memory = Guarded(sum(extent(a.shape, a.strides, a.itemsize)) + gap)
    return memory.like(a, at_end, gap), memory
