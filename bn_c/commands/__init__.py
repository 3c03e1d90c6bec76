"""The commands of `bn-c`, and what they share: errors, arguments, progress."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """What the user is told, in one line, when a command cannot do its work."""


def extra(module: str, name: str) -> Any:
    """A module that the extra of that name installs."""
    try:
        return import_module(module)
    except ImportError as error:
        raise CommandError(f"needs {module.partition('.')[0]}: pip install 'bn-c[{name}]'") from error


def positive(text: str) -> int:
    """The argument of --threads and --jobs."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return number


def output(text: str, suffix: str = "") -> Path:
    """A file that can be written; known before the work rather than after it."""
    path = Path(text)
    if not text.lower().endswith(suffix):
        raise argparse.ArgumentTypeError(f"expected FILE{suffix}, got {text!r}")
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got {text!r}")
    return path


@contextmanager
def progress(total: int, unit: str, scale: bool = False) -> Iterator[Callable[[int], object]]:
    """A function to be told how much more is done; someone at a terminal sees it as a bar, or as lines without tqdm."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        tqdm = import_module("tqdm").tqdm
    except ImportError:
        yield _lines(total)
        return
    with tqdm(total=total, unit=unit, unit_scale=scale, leave=False, file=sys.stderr) as bar:
        yield bar.update


def _lines(total: int) -> Callable[[int], None]:
    """Says each tenth on a line of its own."""
    done = said = 0

    def update(more: int) -> None:
        nonlocal done, said
        done += more
        tenths = 10 * done // max(total, 1)
        if tenths > said:
            said = tenths
            print(f"{10 * tenths} %", file=sys.stderr, flush=True)

    return update
