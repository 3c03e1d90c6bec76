"""Arrays in files, read and written from the first element to the last, so that memory does not grow with them.

a. A file is read, not mapped: pages of a map count as resident memory, and a mapped file that shrinks or fails
   kills the process. Reading in order also takes the members of .npz files, compressed or not.
b. Whatever its rank, order and axis, an array is a sequence of `outer` samples of `channels` planes of `inner`
   elements: one in Fortran order is that of the reversed shape.
c. A file appears when it is whole and on the disk, or not at all.
"""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

import bn_c
from bn_c import _checks, _files
from bn_c.commands import CommandError

BLOCK = 1 << 22  # elements of a block: enough for threads, little for a small board


@dataclass(frozen=True)
class Block:
    """Elements that follow each other in a file: of the `channels`, in an array with its channels on axis 1."""

    shape: tuple[int, int, int]
    channels: slice


@dataclass(frozen=True)
class ArrayFile:
    """An array in a .npy file or, as FILE.npz:NAME, in a .npz file: what its header says, then its elements."""

    name: str
    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @classmethod
    def open(cls, name: str) -> ArrayFile:
        """Reads the header. A .npz file with one array needs no :NAME."""
        path, member = split(name, ".npz")
        with telling(name):
            if not path.is_file():
                raise CommandError(f"{name}: {'expected a file' if path.exists() else 'no such file'}")
            with path.open("rb") as stream:
                single = member is None and stream.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX
            if not single:
                member = _member(name, path, member)
            with ExitStack() as opened:
                return cls(name, path, member, *_header(_stream(opened, path, member)))

    @contextmanager
    def _elements(self) -> Iterator[IO[bytes]]:
        """The file or member, from its first element on."""
        with ExitStack() as opened:
            with telling(self.name):
                stream = _stream(opened, self.path, self.member)
                _header(stream)
            yield stream

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def channels(self, axis: int) -> int:
        """How many channels there are on that axis."""
        if not -len(self.shape) <= axis < len(self.shape):
            raise CommandError(f"{self.name}: {_checks.wrong_axis(axis, self.shape)}")
        return self.shape[axis]

    def blocks(self, axis: int) -> Iterator[tuple[Block, NDArray[Any]]]:
        """All elements, in the file's order. The array is overwritten by the next one."""
        channels = self.channels(axis)
        axis %= len(self.shape)
        before, after = self.shape[:axis], self.shape[axis + 1 :]
        if self.fortran:
            before, after = after, before
        buffer = np.empty(min(self.size, BLOCK), self.dtype)
        with self._elements() as stream:
            for block in _blocks(math.prod(before), channels, math.prod(after)):
                flat = buffer[: math.prod(block.shape)]
                self._fill(stream, flat)
                yield block, flat.reshape(block.shape)
            with telling(self.name):
                stream.read(1)  # at the end of a member its checksum is compared

    def statistics(self, axis: int, threads: int = 1, tell: Callable[[int], object] = int) -> bn_c.BatchStats:
        """Of each channel; `tell` hears of every block how many bytes it had."""
        parts: dict[int, bn_c.BatchStats] = {}
        for block, values in self.blocks(axis):
            stats = bn_c.batch_stats(values, num_threads=threads)
            parts.setdefault(block.channels.start, bn_c.BatchStats(stats.num_features)).merge(stats)
            tell(values.nbytes)
        if not parts:
            return bn_c.BatchStats(self.channels(axis))
        count = parts[0].count
        mean, var = (np.concatenate([getattr(part, name) for part in parts.values()]) for name in ("mean", "var"))
        return bn_c.BatchStats.of(count, mean, var * count)

    def load(self) -> NDArray[Any]:
        """The whole array."""
        flat = np.empty(self.size, self.dtype)
        with self._elements() as stream:
            self._fill(stream, flat)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")

    def _fill(self, stream: IO[bytes], flat: NDArray[Any]) -> None:
        view = flat.view(np.uint8).data
        with telling(self.name):
            while view:
                read = cast(Any, stream).readinto(view)
                if not read:
                    raise CommandError(
                        f"{self.name}: expected {self.size} elements of {self.dtype}, the file ends before"
                    )
                view = view[read:]


def split(name: str, *suffixes: str) -> tuple[Path, str | None]:
    """FILE.npz:NAME as a path and a name; a file that is there may have a colon in its own."""
    match = re.fullmatch(rf"(.+?(?:{'|'.join(map(re.escape, suffixes))})):(.*)", name, re.DOTALL | re.IGNORECASE)
    if match is None or Path(name).exists():
        return Path(name), None
    return Path(match[1]), match[2]


@contextmanager
def telling(name: str) -> Iterator[None]:
    """Makes whatever a broken file raises, which may be anything, a line that names it; drops warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"{name}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from error


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"expected version 1.0 or 2.0 of the .npy format, got {version[0]}.{version[1]}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if any(length < 0 for length in shape):
        raise ValueError(f"expected no negative length, got {shape}")
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"expected numbers, got {dtype}")
    return shape, dtype, fortran


def _stream(opened: ExitStack, path: Path, member: str | None) -> IO[bytes]:
    if member is None:
        return opened.enter_context(path.open("rb"))
    return opened.enter_context(opened.enter_context(zipfile.ZipFile(path)).open(member))


def _member(name: str, path: Path, member: str | None) -> str:
    if not zipfile.is_zipfile(path):
        raise CommandError(f"{name}: expected a .npy or .npz file")
    with zipfile.ZipFile(path) as archive:
        members = {entry.removesuffix(".npy"): entry for entry in archive.namelist() if entry.endswith(".npy")}
    if member is None and len(members) == 1:
        return next(iter(members.values()))
    if member not in members:
        got = "none" if member is None else repr(member)
        raise CommandError(f"{name}: expected :NAME, one of {', '.join(members) or 'no arrays'}, got {got}")
    return members[member]


def _blocks(outer: int, channels: int, inner: int) -> Iterator[Block]:
    """As many whole samples as fit, else whole planes of one sample, else parts of one plane."""
    sample = channels * inner
    if outer * sample == 0:
        return
    if sample <= BLOCK:
        step = BLOCK // sample
        for first in range(0, outer, step):
            yield Block((min(step, outer - first), channels, inner), slice(0, channels))
        return
    step = max(1, BLOCK // inner)
    for _ in range(outer):
        for first in range(0, channels, step):
            some = slice(first, min(first + step, channels))
            for start in range(0, inner, BLOCK):
                yield Block((1, some.stop - first, min(BLOCK, inner - start)), some)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """As `bn_c._files.replacing`, which leaves the old file, or none, unless the new one is whole."""
    try:
        with _files.replacing(path) as stream:
            yield stream
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from error


@contextmanager
def array_writer(path: Path, member: str | None, like: ArrayFile, dtype: np.dtype[Any]) -> Iterator[IO[bytes]]:
    """A stream for the elements of an array of that dtype, in the shape and order of another one.

    It makes a .npy file, or a .npz file with one `member`.
    """
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": like.fortran, "shape": like.shape}
    with replacing(path) as stream:
        if member is None:
            npy.write_array_header_1_0(stream, header)
            yield stream
            return
        with (
            zipfile.ZipFile(stream, "w") as archive,
            archive.open(zipfile.ZipInfo(member), "w", force_zip64=True) as inside,
        ):
            npy.write_array_header_1_0(inside, header)
            yield inside
