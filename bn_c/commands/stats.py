"""`bn-c stats`: the mean and standard deviation of each channel of pictures and arrays.

Files are measured apart from each other and merged in their order, so that the result has the same bits whoever
measured them: this process, several, or the workers of a Dask cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

import bn_c
from bn_c.commands import CommandError, extra, positive, progress
from bn_c.commands.files import ArrayFile
from bn_c.commands.image import decoded

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

EXAMPLE = "bn-c stats photos/ --jobs 4 > stats.json"
PICTURES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ARRAYS = (".npy",)
BATCH = 16  # files that a process or worker is given at a time
CONNECTING = 10  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Measured:
    """The statistics of a file, and what its elements are multiplied by in what is printed."""

    file: str
    stats: bn_c.BatchStats
    scale: float

    @property
    def kind(self) -> str:
        """What it has to have in common with others to be merged."""
        return f"{self.stats.num_features} channels of {'bytes' if self.scale != 1 else 'numbers that are no bytes'}"


# Of each file what was measured, or why it could not be.
Results = list[Measured | str]
AllResults = Generator[Results, None, None]


def measured(files: Sequence[str], axis: int) -> Results:
    """Measures some files."""
    return [_measured(file, axis) for file in files]


def _measured(file: str, axis: int) -> Measured | str:
    if not file.lower().endswith(ARRAYS):
        extra("PIL.Image", "cli")  # without it no picture is at fault
    try:
        if file.lower().endswith(ARRAYS):
            x = ArrayFile.open(file)
            stats, dtype = x.statistics(axis), x.dtype
        else:
            pixels = np.asarray(decoded(file))
            stats, dtype = bn_c.batch_stats(pixels, axis=-1), pixels.dtype
    except CommandError as error:
        return str(error)
    except (MemoryError, TypeError, ValueError) as error:
        return f"{file}: {error or 'out of memory'}"
    return Measured(file, stats, 1 / 255 if dtype == np.uint8 else 1.0)


def found(paths: Sequence[str], report: Callable[[str], None]) -> Iterator[str]:
    """The files, and those with known endings in the folders and their folders, each folder's sorted by name."""

    def unreadable(error: OSError) -> None:
        report(f"{error.filename}: {error.strerror}")

    for path in paths:
        if not Path(path).is_dir():
            if not Path(path).exists():
                raise CommandError(f"{path}: no such file or folder")
            yield path
            continue
        for folder, folders, files in os.walk(path, onerror=unreadable):
            folders.sort()
            for file in sorted(files):
                if file.lower().endswith(PICTURES + ARRAYS):
                    yield str(Path(folder, file))


def here(batches: Sequence[list[str]], axis: int) -> AllResults:
    """Measures in this process."""
    yield from (measured(batch, axis) for batch in batches)


def processes(batches: Sequence[list[str]], axis: int, jobs: int) -> AllResults:
    """Measures in several processes, new ones, so that it does not matter what this one has open or running."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    context = get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    with ProcessPoolExecutor(min(jobs, len(batches)), context, _leave_with, (theirs,)) as pool:
        try:
            with _signals_wait():  # the processes inherit that, until they have come to `_leave_with`
                results = pool.map(partial(measured, axis=axis), batches)
            yield from results
        except BrokenProcessPool as error:
            raise CommandError("a process ended unexpectedly, perhaps for lack of memory") from error
        finally:
            ours.close()
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals have their effect at the end: in a finalizer, of which starting processes has many, it would be lost.

    The mask alone would not do, as any other thread may receive them.
    """
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _leave_with(parent: Connection) -> None:
    """Ends a process at Ctrl-C without a word, and at once when the parent closes its end, or is killed."""

    def wait() -> None:
        parent.poll(None)
        os._exit(1)

    Thread(target=wait, daemon=True).start()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def cluster(batches: Sequence[list[str]], axis: int, address: str) -> AllResults:
    """Measures on the workers of a Dask cluster, which have bn_c and the same files."""
    import asyncio

    distributed = extra("distributed", "dask")
    security = distributed.Security()  # as Dask's configuration has it

    async def knock() -> None:
        # A Client that finds nobody takes half a minute to go, and prints a traceback.
        arguments = security.get_connection_args("client")
        (await distributed.core.connect(address, timeout=CONNECTING, **arguments)).abort()

    try:
        asyncio.run(knock())
    except (OSError, TypeError, ValueError) as error:
        raise CommandError(f"--dask: no scheduler at {address!r} ({error})") from error
    with distributed.Client(address, timeout=CONNECTING, security=security, set_as_default=False) as client:
        for future in client.map(partial(measured, axis=axis), batches, pure=False):
            try:
                yield future.result()
            except CommandError:
                raise
            except Exception as error:  # a worker without bn_c, lost workers, a lost scheduler ...
                raise CommandError(f"--dask: {type(error).__name__}: {error}") from error


def merged(results: AllResults, report: Callable[[str], None], tell: Callable[[int], object]) -> Measured:
    """One result of all; files that could not be measured, or do not fit the first one, are reported."""
    total: Measured | None = None
    for batch in results:
        for one in batch:
            if isinstance(one, str):
                report(one)
            elif total is None:
                total = one
            elif one.kind != total.kind:
                report(f"{one.file}: expected {total.kind} as in {total.file}, got {one.kind}")
            else:
                total.stats.merge(one.stats)
        tell(len(batch))
    if total is None or total.stats.count == 0:
        raise CommandError("nothing could be measured")
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bn-c stats`."""
    parser.description = (
        "Prints mean, std (biased) and count of each channel, as ImageNormalizer takes them: of pictures (in RGB) "
        'and of arrays of bytes those of x * "scale", 1/255, of other arrays those of x itself. Files that cannot be '
        "read, or do not fit the first one, are named and left out, and the exit status is 1."
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture, a .npy file, or a folder of them")
    parser.add_argument("--axis", type=int, default=1, help="where .npy files have their channels (1)")
    parser.add_argument("--strict", action="store_true", help="stop at the first file that would be left out")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes (1); the result is the same")
    where.add_argument("--dask", metavar="ADDRESS", help="the scheduler of a Dask cluster whose workers see the files")


def main(options: argparse.Namespace) -> int:
    """Prints the statistics; returns 1 if files were left out."""
    left_out: list[str] = []

    def report(problem: str) -> None:
        if options.strict:
            raise CommandError(problem)
        left_out.append(problem)

    files = list(found(options.paths, report))
    if not files:
        raise CommandError(f"no pictures or .npy files in {', '.join(options.paths)}")
    if options.dask:
        files = [str(Path(file).absolute()) for file in files]
    batches = [files[i : i + BATCH] for i in range(0, len(files), BATCH)]
    if options.dask:
        results = cluster(batches, options.axis, options.dask)
    elif options.jobs > 1:
        results = processes(batches, options.axis, options.jobs)
    else:
        results = here(batches, options.axis)
    try:
        with progress(len(files), "file") as tell, closing(results):
            total = merged(results, report, tell)
    finally:
        for problem in left_out:
            print("left out:", *problem.split(), file=sys.stderr)
    mean, std = ((total.scale * values).tolist() for values in (total.stats.mean, total.stats.std))
    print(json.dumps({"mean": mean, "std": std, "scale": total.scale, "count": total.stats.count}))
    return 1 if left_out else 0
