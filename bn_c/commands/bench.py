"""`bn-c bench`: bn_c on this machine, against a copy, NumPy and, where installed, PyTorch, ONNX Runtime and OpenCV."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import bn_c
from bn_c.bench import ALLOC, CASES, OUT, PEERS, Case, Measured, Peer, arrays, installed, measure, others, ours
from bn_c.commands import extra, files, output, positive, progress

EXAMPLE = "bn-c bench --quick --plot bench.png"
SECONDS, SECONDS_QUICK = 4.0, 0.6  # of measuring, per case

LEGEND = """\
time     of one call of bn_c with out=; medians of interleaved rounds, samples of about 0.3 ms or more
GB/s     x (and the residual) read once, y written once
copy     time of bn_c with out= / time of np.copyto of such a y
alloc    time of bn_c without out=, which makes a new y / time of np.copyto
others   their time / bn_c's, with out= too, or both without (*); below 1 they are faster (!)
error    largest |y - exact| / (|gamma * x_hat| + |beta| + |residual|; of frames |x / 255 / std| +
         |mean / std|), in units of 2^-24 (float16: 2^-11); exact is bn_c.definition in float64;
         then the least and the largest of the others
[ ]      the channels"""


def machine(threads: int) -> dict[str, str]:
    """What was measured where, by name."""
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()} {platform.machine()}",
        "bn_c": f"{bn_c.__version__}, {bn_c.isa}, {threads} thread{'s' if threads > 1 else ''}",
        "Python": platform.python_version(),
        **{peer.needs[0]: peer.version for peer in PEERS if peer.version},
    }


def _cpu() -> str:
    for file, start in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        with suppress(OSError):
            for line in Path(file).read_text().split("\n"):
                if line.startswith(start):
                    return line.rpartition(":")[2].strip(" \t\0")
    return platform.processor() or "unknown CPU"


def digits(value: float) -> str:
    """About three."""
    if value >= 1e4:
        return f"{value:.0e}"
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def duration(seconds: float) -> str:
    """A time, with its unit."""
    return f"{digits(seconds * 1e6)} us" if seconds < 999.5e-6 else f"{digits(seconds * 1e3)} ms"


def header(measured: Measured) -> str:
    """The head of the columns of such rows."""
    columns = [f"{peer.column}{'*' if measured.results[peer.name].allocates else ''}" for peer in measured.peers]
    return _line("", "time", "GB/s", "copy", "alloc", *columns, "error", "others")


def row(measured: Measured, peers: Sequence[Peer]) -> str:
    """A line of the table, with columns for those peers."""
    own, new = measured.results[OUT], measured.results[ALLOC]
    speed = (measured.traffic / own.seconds / 1e9, own.seconds / measured.copy, new.seconds / measured.copy)
    errors = [measured.results[peer.name].error for peer in measured.peers]
    return _line(
        measured.case.label,
        duration(own.seconds),
        *map(digits, speed),
        *(_versus(measured.ratio(peer)) for peer in peers),
        digits(own.error),
        f"{digits(min(errors))}-{digits(max(errors))}",
    )


def _versus(value: float | None) -> str:
    return "- " if value is None else f"{digits(value)}{'!' if value < 1 else ' '}"


def _line(label: str, time: str, *cells: str) -> str:
    *ratios, errors = cells
    return f"{label:<30}{time:>8}{''.join(f'{cell:>7}' for cell in ratios)}{errors:>12}"


def run(cases: Sequence[Case], threads: int, seconds: float, tell: Callable[[int], object]) -> list[Measured]:
    """Measures the cases; says each row as soon as it is known."""
    found: list[Measured] = []
    for group, members in groupby(cases, lambda case: case.group):
        peers: list[Peer] = []
        for case in members:
            if 20 * prod(case.shape) > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
                _say(f"{case.label:<30} left out: needs {20 * prod(case.shape) >> 20} MB of memory")
            else:
                a = arrays(case)
                found.append(measure(case, a, {**ours(case, a, threads), **others(case, a, threads)}, seconds))
                if not peers:
                    peers = found[-1].peers
                    _say(f"\n{group}\n{header(found[-1])}")
                _say(row(found[-1], peers))
            tell(1)
    return found


def _say(line: str) -> None:
    """Prints it, above a bar that there may be."""
    tqdm = sys.modules.get("tqdm")
    (tqdm.tqdm.write if tqdm else print)(line)
    sys.stdout.flush()


def write_json(path: Path, about: dict[str, str], found: Sequence[Measured]) -> None:
    """Everything measured."""
    cases = [{"group": measured.case.group, **asdict(measured)} for measured in found]
    text = json.dumps({"about": about, "legend": LEGEND.splitlines(), "cases": cases}, indent=1)
    with files.replacing(path) as stream:
        stream.write(f"{text}\n".encode())


GREEN = "#00845a"


def write_plot(path: Path, about: dict[str, str], found: Sequence[Measured]) -> None:
    """Two charts of dots, a line per case: times as multiples of that of a copy, and errors."""
    import_module("matplotlib").use("Agg")
    lines = [line for group, members in groupby(found, lambda m: m.case.group) for line in (group, *members)]
    figure, charts = import_module("matplotlib.pyplot").subplots(
        1, 2, sharey=True, width_ratios=(3, 2), figsize=(11, 2 + 0.25 * len(lines)), layout="constrained"
    )
    for chart, title in zip(charts, ("time / time of np.copyto", "error / 2^-24 (float16: 2^-11)"), strict=True):
        chart.set(xscale="log", xlabel=f"{title}, less is better", ylim=(len(lines) - 0.5, -0.5))
        chart.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        chart.xaxis.set_major_formatter("{x:g}")
        chart.grid(color="#e0e0e0", linewidth=0.7)
        chart.tick_params(length=0, which="both", labelsize="small")
        chart.spines[:].set_visible(False)
    charts[0].axvline(1, color="black", linewidth=0.8)
    charts[0].set_title("time of bn_c", loc="left", ha="right", fontsize="medium")
    places = [place for place, line in enumerate(lines) if isinstance(line, Measured)]
    charts[0].set_yticks(places, [f"{m.case.label}   {duration(m.results[OUT].seconds)}" for m in found])
    across = charts[0].get_yaxis_transform()
    for place, line in enumerate(lines):
        if isinstance(line, str):
            charts[0].text(0, place, line, transform=across, va="center", weight="bold", backgroundcolor="white")
    _draw(charts, found, places)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"bn_c {about['bn_c']}, {about['machine']}")
    with files.replacing(path) as stream:
        figure.savefig(stream, format="png", dpi=160)


def _draw(charts: Any, found: Sequence[Measured], places: Sequence[int]) -> None:
    """The dots of each contender, bn_c's above the others."""
    peers = [(peer.name, f"{peer.name} {peer.version}", peer.mark, peer.color, peer.color) for peer in PEERS]
    for name, label, marker, edge, face in ((OUT, OUT, "o", GREEN, GREEN), (ALLOC, ALLOC, "o", GREEN, "none"), *peers):
        drawn = [(m, place) for m, place in zip(found, places, strict=True) if name in m.results]
        heights = [place for _, place in drawn]
        marks = {"s": 45, "marker": marker, "edgecolors": edge, "facecolors": face, "zorder": 4 if name == OUT else 3}
        if drawn:
            charts[0].scatter([m.results[name].seconds / m.copy for m, _ in drawn], heights, label=label, **marks)
            charts[1].scatter([m.results[name].error for m, _ in drawn], heights, **marks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bn-c bench`."""
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, under 20 seconds on a PC")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of each contender (1)")
    parser.add_argument("--json", type=output, metavar="FILE", help="write all that was measured")
    picture = partial(output, suffix=".png")
    parser.add_argument("--plot", type=picture, metavar="FILE.png", help="write a picture (needs matplotlib)")


def main(options: argparse.Namespace) -> None:
    """Prints what it finds, and writes the files."""
    if options.plot:
        extra("matplotlib", "bench")
    about = machine(options.threads)
    for name, text in about.items():
        print(f"{name:13} {text}")
    if absent := [peer.name for peer in PEERS if not peer.version]:
        print(f"left out      {', '.join(absent)}: pip install 'bn-c[bench]'")
    print(f"\n{LEGEND}", flush=True)
    cases = [case for case in CASES if case.quick or not options.quick]
    # Without tqdm the rows are the progress.
    with progress(len(cases), "case") if installed("tqdm") else nullcontext(int) as tell:
        found = run(cases, options.threads, SECONDS_QUICK if options.quick else SECONDS, tell)
    if options.json:
        write_json(options.json, about, found)
    if options.plot:
        write_plot(options.plot, about, found)
