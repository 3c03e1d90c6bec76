"""The command line: `bn-c demo`, `bn-c info`, `bn-c bench`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

import bn_c
from bn_c import bench

BENCH_EXAMPLE = "bn-c bench --quick --plot bench.png"


def _demo(_: argparse.Namespace) -> None:
    from bn_c import demo

    demo.main()


def _info(_: argparse.Namespace) -> None:
    bn_c.show_config()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bn-c", description="Batch normalization, forward, on the CPU.")
    parser.add_argument("--version", action="version", version=f"bn-c {bn_c.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, summary, example in (
        ("demo", _demo, "a small network on handwritten digits, before and after its sensor drifts", "bn-c demo"),
        ("info", _info, "version, instruction sets, threads, NumPy and Python", "BN_C_MAX_ISA=x86_64 bn-c info"),
        ("bench", bench.main, "time and error here, against NumPy and what else is installed", BENCH_EXAMPLE),
    ):
        description = f"{summary.capitalize()}."
        command = commands.add_parser(name, help=summary, description=description, epilog=f"example: {example}")
        command.set_defaults(run=run)
        if name == "bench":
            bench.add_arguments(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit status. Bad use is one line on stderr and status 2."""
    options = _parser().parse_args(arguments)
    status = 0
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe left; what Python still wants to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
