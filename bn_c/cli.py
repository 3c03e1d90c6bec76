"""The command line: `bn-c demo`, `info`, `bench`, `run`, `stats`, `image`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import bn_c
from bn_c.commands import CommandError, bench, image, run, stats

INTERRUPTED = 128 + signal.SIGINT


def _demo(_: argparse.Namespace) -> None:
    from bn_c import demo

    demo.main()


def _info(_: argparse.Namespace) -> None:
    bn_c.show_config()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bn-c", description="Batch normalization, forward, on the CPU.")
    parser.add_argument("--version", action="version", version=f"bn-c {bn_c.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, main, module, summary, example in (
        ("demo", _demo, None, "a small network on handwritten digits, before and after its sensor drifts", "bn-c demo"),
        ("info", _info, None, "version, instruction sets, threads, NumPy and Python", "BN_C_MAX_ISA=x86_64 bn-c info"),
        ("bench", bench.main, bench, "time and error here, against NumPy and what else is installed", bench.EXAMPLE),
        ("run", run.main, run, "normalises an array in a file, however large", run.EXAMPLE),
        ("stats", stats.main, stats, "mean and std of each channel of pictures or arrays, as JSON", stats.EXAMPLE),
        ("image", image.main, image, "a picture as the tensor that a network takes", image.EXAMPLE),
    ):
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description, epilog=f"example: {example}")
        command.set_defaults(run=main, fail=command.error)
        if module is not None:
            module.add_arguments(command)
    return parser


@contextmanager
def _unwinding() -> Iterator[None]:
    """SIGTERM and SIGHUP, unless ignored, leave as Ctrl-C does: through all that cleans up."""

    def leave(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    signals = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for each in signals:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)


def _drop_output() -> None:
    """What Python still wants to flush goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. Bad use, and work that cannot be done, is one line and status 2."""
    if sys.stderr is None:  # closed: what is said there is lost, and not said on stdout
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    options = _parser().parse_args(arguments)
    try:
        with _unwinding():
            status = options.run(options) or 0
            print(end="", flush=True)
    except BrokenPipeError:
        _drop_output()  # the reader of a pipe left
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except OSError as error:
        _drop_output()  # it may be what could not be written
        options.fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except (CommandError, MemoryError) as error:
        options.fail(str(error) or "out of memory")
    return int(status)
