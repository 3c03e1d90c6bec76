"""`bn-c bench`: bn_c on this machine, against a copy, NumPy and, where installed, PyTorch and ONNX Runtime.

All contenders of a case work on the same arrays, in turn, round after round, in one process: what disturbs the
machine then disturbs all of them alike, and the ratios of their medians hold where times would not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bn_c
from bn_c import definition
from bn_c.commands import output, positive

Array = NDArray[Any]
Call = Callable[[], Any]

EPS = 1e-5
COPY, OUT, ALLOC = "copy", "bn_c", "bn_c, allocating"
PLAIN, FOLDED, TORCH, ONNX = "NumPy", "NumPy folded", "PyTorch", "ONNX Runtime"
PEERS = (PLAIN, FOLDED, TORCH, ONNX)

SAMPLE = 1e-3  # seconds; far above the resolution of clocks and the cost of reading them
ROUNDS_MIN, ROUNDS_MAX = 3, 401
SECONDS, SECONDS_QUICK = 4.0, 0.7  # of measuring, per case
CHECKED = 1 << 21  # elements compared with the definition, so that float64 copies fit small boards


@dataclass(frozen=True)
class Case:
    """A piece of work. `memory` is how x lies: "C", "F" or "strided" (every other element of the last axis)."""

    name: str
    shape: tuple[int, ...]
    axis: int = 1
    dtype: str = "float32"
    batch: bool = False
    fused: bool = False
    memory: str = "C"
    offset: float = 0.0
    quick: bool = False

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.shape[self.axis]

    @property
    def size(self) -> str:
        """The shape, with the channels in brackets."""
        lengths = [str(length) for length in self.shape]
        lengths[self.axis] = f"[{lengths[self.axis]}]"
        return "x".join(lengths)

    @property
    def label(self) -> str:
        """A name for tables."""
        return f"{self.name} {self.size}{' f16' if self.dtype == 'float16' else ''}"

    @property
    def group(self) -> str:
        """What is computed."""
        work = "statistics of the mini-batch" if self.batch else "given statistics (inference)"
        return f"{work}, residual and ReLU" if self.fused else work

    @property
    def traffic(self) -> int:
        """Bytes that cannot be avoided: x and the residual read once, y written once."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize * (3 if self.fused else 2)


_BATCH_32 = (32, 64, 112, 112)
CASES = (
    Case("dense", (1, 64), quick=True),
    Case("dense", (256, 1024)),
    Case("sensor", (64, 32, 128), quick=True),
    Case("audio", (16, 64, 1000)),
    Case("ResNet-50", (1, 64, 112, 112), quick=True),
    Case("ResNet-50", (1, 256, 56, 56)),
    Case("ResNet-50", (1, 2048, 7, 7), quick=True),
    Case("ResNet-50", _BATCH_32),
    Case("ResNet-50", _BATCH_32, dtype="float16"),
    Case("MobileNetV2", (1, 112, 112, 32), -1, quick=True),
    Case("MobileNetV2", (1, 7, 7, 1280), -1),
    Case("MobileNetV2", (32, 112, 112, 32), -1),
    Case("MobileNetV2", (1, 112, 112, 32), -1, dtype="float16", quick=True),
    Case("ResNet-50", (1, 256, 56, 56), fused=True, quick=True),
    Case("ResNet-50", (32, 256, 56, 56), fused=True),
    Case("dense", (256, 1024), batch=True, quick=True),
    Case("table", (100_000, 4), batch=True, quick=True),
    Case("sensor", (64, 32, 128), batch=True),
    Case("audio", (16, 64, 1000), batch=True),
    Case("ResNet-50", (32, 256, 14, 14), batch=True, quick=True),
    Case("ResNet-50", _BATCH_32, batch=True),
    Case("ResNet-50", _BATCH_32, batch=True, dtype="float16"),
    Case("MobileNetV2", (32, 112, 112, 32), -1, batch=True),
    Case("ResNet-50", (32, 256, 14, 14), batch=True, fused=True),
)


@dataclass(frozen=True)
class Arrays:
    """What the contenders of a case are given; they share `out`."""

    x: Array
    out: Array
    residual: Array | None
    mean: Array
    var: Array
    gamma: Array
    beta: Array


@dataclass(frozen=True)
class Contender:
    """A way to do the work. `call` is timed, after `before`; `read` turns what it returned into y."""

    name: str
    call: Call
    allocates: bool = False
    read: Callable[[Any], Array] = np.asarray
    before: Call = lambda: None


@dataclass(frozen=True)
class Result:
    """Median seconds of a call, its error (see `LEGEND`), and the largest |y - exact|."""

    seconds: float
    error: float
    deviation: float
    allocates: bool


def arrays(case: Case) -> Arrays:
    """Random arrays of a case, the same in every run."""
    rng = np.random.default_rng(0)
    channels = case.channels
    mean = (case.offset + rng.uniform(-2, 2, channels)).astype(np.float32)
    std = rng.uniform(0.5, 2, channels).astype(np.float32) if not case.offset else np.ones(channels, np.float32)
    gamma = rng.uniform(0.5, 1.5, channels).astype(np.float32)
    beta = rng.uniform(0.25, 1, channels).astype(np.float32)
    x = rng.standard_normal(case.shape, np.float32)
    x *= _along(std, case)
    x += _along(mean, case)
    x = _placed(x.astype(case.dtype, copy=False), case.memory)
    residual = rng.standard_normal(case.shape, np.float32).astype(case.dtype, copy=False) if case.fused else None
    return Arrays(x, np.zeros_like(x), residual, mean, std**2, gamma, beta)


def _along(values: Array, case: Case) -> Array:
    """One value per channel, to broadcast against x."""
    shape = [1] * len(case.shape)
    shape[case.axis] = -1
    return values.reshape(shape)


def _placed(x: Array, memory: str) -> Array:
    if memory == "F":
        return np.asfortranarray(x)
    if memory == "strided":
        return np.repeat(x, 2, -1)[..., ::2]
    return x


# The contenders.


def ours(case: Case, a: Arrays, threads: int) -> list[Contender]:
    """bn_c with `out=`, and without."""
    activation: Any = "relu" if case.fused else None
    extra = {"residual": a.residual} if case.fused else {}
    call: Callable[..., Any]
    if case.batch:
        call = partial(
            bn_c.batch_norm, a.x, a.gamma, a.beta, eps=EPS, axis=case.axis, activation=activation, num_threads=threads
        )
    else:
        layer = bn_c.BatchNorm(case.channels, eps=EPS, axis=case.axis, activation=activation, num_threads=threads)
        layer.running_mean, layer.running_var, layer.gamma, layer.beta = a.mean, a.var, a.gamma, a.beta
        call = partial(layer, a.x)
    return [
        Contender(OUT, partial(call, out=a.out, **extra)),
        Contender(ALLOC, partial(call, **extra), allocates=True),
    ]


def _finish(y: Array, a: Arrays) -> Array:
    """The residual and ReLU, in place, if the case has them."""
    if a.residual is not None:
        np.add(y, a.residual, out=y)
        np.maximum(y, 0, out=y)
    return y


def plain(case: Case, a: Arrays, _: int = 1) -> Contender:
    """`bn_c.definition` in float32."""

    def call() -> Array:
        x = a.x.astype(np.float32, copy=False)
        mean, var = definition.statistics(x, case.axis) if case.batch else (a.mean, a.var)
        y = definition.normalized(x, mean, var, a.gamma, a.beta, EPS, case.axis)
        return _finish(y.astype(case.dtype, copy=False), a)

    return Contender(PLAIN, call, allocates=True)


def folded(case: Case, a: Arrays, _: int = 1) -> Contender:
    """`x * scale + shift`, as one writes it by hand for speed."""

    def fold(mean: Array, var: Array) -> tuple[Array, Array]:
        scale = a.gamma / np.sqrt(var + np.float32(EPS))
        return _along(scale, case), _along(a.beta - mean * scale, case)

    def apply(scale: Array, shift: Array) -> Array:
        np.multiply(a.x, scale, out=a.out)
        np.add(a.out, shift, out=a.out)
        return _finish(a.out, a)

    def batch() -> Array:
        # In float32: NumPy's sums of float16 overflow.
        return apply(*fold(*definition.statistics(a.x.astype(np.float32, copy=False), case.axis)))

    return Contender(FOLDED, batch if case.batch else partial(apply, *fold(a.mean, a.var)))


def pytorch(case: Case, a: Arrays, threads: int) -> Contender | None:
    """`torch.nn.functional.batch_norm`, channels last by strides."""
    torch = _module("torch")
    if torch is None:
        return None
    torch.set_num_threads(threads)
    batch_norm = import_module("torch.nn.functional").batch_norm
    x = torch.from_numpy(a.x).movedim(case.axis, 1)
    mean, var, gamma, beta = (torch.from_numpy(v) for v in (a.mean, a.var, a.gamma, a.beta))
    statistics = (None, None) if case.batch else (mean, var)
    normalize = partial(batch_norm, x, *statistics, gamma, beta, training=case.batch, eps=EPS)
    if a.residual is None:
        call: Call = normalize
    else:
        residual = torch.from_numpy(a.residual).movedim(case.axis, 1)

        def call() -> Any:
            return normalize().add_(residual).relu_()

    return Contender(TORCH, call, allocates=True, read=lambda y: np.asarray(y.movedim(1, case.axis)))


def onnx_runtime(case: Case, a: Arrays, threads: int) -> Contender | None:
    """A BatchNormalization node, bound to x and out; it has given statistics and channels first only."""
    runtime, onnx = _module("onnxruntime"), _module("onnx")
    if runtime is None or onnx is None or case.batch or case.axis != 1 or case.memory != "C":
        return None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = _onnx_model(onnx, case, a).SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    dtype = np.dtype(case.dtype).type
    for name, array in (("x", a.x), ("residual", a.residual)):
        if array is not None:
            binding.bind_input(name, "cpu", 0, dtype, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, dtype, a.out.shape, a.out.ctypes.data)
    return Contender(ONNX, partial(session.run_with_iobinding, binding), read=lambda _: a.out)


def _onnx_model(onnx: Any, case: Case, a: Arrays) -> Any:
    helper = onnx.helper
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    parameters = {"gamma": a.gamma, "beta": a.beta, "mean": a.mean, "var": a.var}
    nodes = [helper.make_node("BatchNormalization", ["x", *parameters], ["n" if case.fused else "y"], epsilon=EPS)]
    inputs = ["x"]
    if case.fused:
        nodes += [helper.make_node("Add", ["n", "residual"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
        inputs.append("residual")
    graph = helper.make_graph(
        nodes,
        "batch_norm",
        [helper.make_tensor_value_info(name, kind, case.shape) for name in inputs],
        [helper.make_tensor_value_info("y", kind, case.shape)],
        [onnx.numpy_helper.from_array(value, name) for name, value in parameters.items()],
    )
    # The first versions that have all of it: older runtimes on boards then read the model.
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def contenders(case: Case, a: Arrays, threads: int) -> list[Contender]:
    """The copy, bn_c, and the peers that are installed and can do the case."""
    peers = (make(case, a, threads) for make in (plain, folded, pytorch, onnx_runtime))
    copy = Contender(COPY, partial(np.copyto, a.out, a.x), read=lambda _: a.out)
    return [copy, *ours(case, a, threads), *(peer for peer in peers if peer)]


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


# Measuring.


def measure(case: Case, a: Arrays, entrants: Sequence[Contender], seconds: float) -> dict[str, Result]:
    """The time and the error of each contender."""
    errors = _errors(case, a, entrants)
    times = timed(entrants, seconds)
    return {c.name: Result(times[c.name], *errors[c.name], c.allocates) for c in entrants}


def timed(entrants: Sequence[Contender], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each, sampled in turn, for about `seconds` in all, equally shared."""
    repeats = {c.name: _repeats(c) for c in entrants}
    samples: dict[str, list[float]] = {c.name: [] for c in entrants}
    share = seconds / len(entrants)
    for done in range(ROUNDS_MAX):
        waiting = [c for c in entrants if done < ROUNDS_MIN or sum(samples[c.name]) * repeats[c.name] < share]
        if not waiting:
            break
        for c in waiting:
            samples[c.name].append(_sample(c, repeats[c.name]))
    return {name: median(values) for name, values in samples.items()}


def _repeats(contender: Contender) -> int:
    """Calls that take about SAMPLE."""
    repeats = 1
    while True:
        each = _sample(contender, repeats)
        if each * repeats < 100 * SAMPLE:
            # An interruption makes a short call look long, and single calls find their arrays out of the cache.
            each = min(each, *(_sample(contender, repeats) for _ in range(3)))
        if each * repeats >= SAMPLE:
            return repeats
        repeats = max(2 * repeats, min(100 * repeats, math.ceil(SAMPLE / max(each, 1e-8))))


def _sample(contender: Contender, repeats: int) -> float:
    call = contender.call
    contender.before()
    if repeats > 1:
        call()  # so that work that fits a cache finds its arrays there
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def _errors(case: Case, a: Arrays, entrants: Sequence[Contender]) -> dict[str, tuple[float, float]]:
    channels, exact, scale = _exact(case, a)
    scale *= 2.0**-11 if case.dtype == "float16" else 2.0**-24
    errors = {}
    for c in entrants:
        a.out.fill(np.nan)
        c.before()
        y = c.read(c.call())
        deviation = np.abs(_chosen(y, case, channels) - exact)
        errors[c.name] = float(np.max(deviation / scale)), float(np.max(deviation))
    return errors


def _exact(case: Case, a: Arrays) -> tuple[NDArray[np.intp], Array, Array]:
    """Some channels, their y in float64, and the size of the terms it is the sum of."""
    count = max(1, CHECKED * case.channels // math.prod(case.shape))
    channels = np.unique(np.linspace(0, case.channels - 1, min(count, case.channels)).astype(np.intp))
    x = _chosen(a.x, case, channels)
    mean, var, gamma, beta = (v[channels].astype(np.float64) for v in (a.mean, a.var, a.gamma, a.beta))
    if case.batch:
        mean, var = definition.statistics(x, 0)
    scaled = definition.normalized(x, mean, var, gamma, 0.0, EPS, 0)
    beta = beta.reshape(-1, *[1] * (x.ndim - 1))
    y, scale = scaled + beta, np.abs(scaled) + np.abs(beta)
    if a.residual is not None:
        residual = _chosen(a.residual, case, channels)
        y, scale = np.maximum(y + residual, 0), scale + np.abs(residual)
    return channels, y, scale


def _chosen(x: Array, case: Case, channels: NDArray[np.intp]) -> Array:
    return np.moveaxis(x, case.axis, 0)[channels].astype(np.float64)


# Reporting.

LEGEND = """\
time     of one call of bn_c with out=; medians of interleaved rounds, samples of 1 ms or more
GB/s     x (and the residual) read once, y written once
copy     time of bn_c with out= / time of np.copyto(y, x)
alloc    time of bn_c without out=, which makes a new y / time of np.copyto(y, x)
others   their time / bn_c's, with out= too, or both without (*); below 1 they are faster (!)
error    largest |y - exact| / (|gamma * x_hat| + |beta| + |residual|), in units of 2^-24
         (float16: 2^-11); exact is bn_c.definition in float64; then the least and the largest of
         the others
[ ]      the channels"""

ROW = "{:<30}{:>8}{:>6}{:>6}{:>6}{:>7}{:>8}{:>7}{:>6}{:>6} {:>9}"
HEADER = ROW.format("", "time", "GB/s", "copy", "alloc", "NumPy*", "folded", "Torch*", "ORT", "error", "others")


def machine(threads: int) -> dict[str, str]:
    """What was measured where, by name."""
    versions = {TORCH: "torch", ONNX: "onnxruntime"}
    modules = {name: _module(module) for name, module in versions.items()}
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()} {platform.machine()}",
        "bn_c": f"{bn_c.__version__}, {bn_c.isa}, {threads} thread{'s' if threads > 1 else ''}",
        "Python": platform.python_version(),
        PLAIN: np.__version__,
        **{name: str(module.__version__) for name, module in modules.items() if module},
    }


def _cpu() -> str:
    for file, start in (("/proc/device-tree/model", ""), ("/proc/cpuinfo", "model name")):
        try:
            lines = Path(file).read_text().split("\n")
        except OSError:
            continue
        for line in lines:
            if line.startswith(start):
                return line.rpartition(":")[2].strip(" \t\0")
    return platform.processor() or "unknown CPU"


def left_out() -> Iterator[str]:
    """What is not compared with, and how to have it."""
    for peer, *names in ((TORCH, "torch"), (ONNX, "onnxruntime", "onnx")):
        missing = [name for name in names if _module(name) is None]
        if missing:
            yield f"{peer} is left out: pip install {' '.join(missing)}"


def ratio(results: dict[str, Result], peer: str) -> float | None:
    """The peer's time over that of bn_c, both allocating or both not; None if the peer did not run."""
    if peer not in results:
        return None
    value = results[peer].seconds / results[ALLOC if results[peer].allocates else OUT].seconds
    # As it is printed, so that no 1.00 counts as faster.
    return round(value, 2)


def duration(seconds: float) -> str:
    """A time, with its unit."""
    unit, factor = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    return f"{digits(seconds * factor)} {unit}"


def digits(value: float) -> str:
    """About three digits."""
    if not math.isfinite(value) or value >= 1e4:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def row(case: Case, results: dict[str, Result]) -> str:
    """A line of the table."""
    own, copy = results[OUT], results[COPY].seconds
    errors = [results[peer].error for peer in PEERS if peer in results]
    return ROW.format(
        case.label,
        duration(own.seconds),
        digits(case.traffic / own.seconds / 1e9),
        digits(own.seconds / copy),
        digits(results[ALLOC].seconds / copy),
        *(_versus(ratio(results, peer)) for peer in PEERS),
        f"{own.error:.1f}",
        f"{_short(min(errors))}-{_short(max(errors))}",
    )


def _versus(value: float | None) -> str:
    if value is None:
        return "-"
    return digits(value) + ("!" if value < 1 else " ")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1 else f"{value:.1f}"


def run(cases: Sequence[Case], threads: int, seconds: float, say: Callable[[str], None]) -> dict[Case, Any]:
    """Measures the cases; says each row as soon as it is known."""
    found: dict[Case, dict[str, Result]] = {}
    group = ""
    for case in cases:
        if case.group != group:
            group = case.group
            say(f"\n{group}\n{HEADER}")
        if 4 * case.traffic > _memory():
            say(f"{case.label:<30} left out: needs {4 * case.traffic >> 20} MB of memory")
            continue
        a = arrays(case)
        found[case] = measure(case, a, contenders(case, a, threads), seconds)
        say(row(case, found[case]))
    return found


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function that prints a line; those of cases also move a bar, where there can be one."""
    tqdm = _module("tqdm") if sys.stderr.isatty() else None
    if tqdm is None:
        yield partial(print, flush=True)
        return
    with tqdm.tqdm(total=total, unit="case", leave=False, file=sys.stderr) as bar:

        def say(line: str) -> None:
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()
            if not line.startswith("\n"):
                bar.update()

        yield say


def write_json(path: Path, about: dict[str, str], found: dict[Case, dict[str, Result]]) -> None:
    """Everything measured."""
    rows = [
        {
            **asdict(case),
            "traffic": case.traffic,
            # A copy is no attempt at y.
            "results": {n: {"seconds": r.seconds} if n == COPY else asdict(r) for n, r in results.items()},
        }
        for case, results in found.items()
    ]
    path.write_text(json.dumps({"about": about, "legend": LEGEND.splitlines(), "cases": rows}, indent=1) + "\n")


COLORS = {OUT: "#0b6e4f", ALLOC: "#7fc8a9", PLAIN: "#b9b9b9", FOLDED: "#7a7a7a", TORCH: "#e07a3f", ONNX: "#3d6fb5"}


def write_plot(path: Path, about: dict[str, str], found: dict[Case, dict[str, Result]]) -> None:
    """Bars of the time relative to a copy."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.62 * len(found)), layout="constrained")
    height = 0.8 / len(COLORS)
    for position, results in enumerate(found.values()):
        for i, name in enumerate(name for name in COLORS if name in results):
            value = results[name].seconds / results[COPY].seconds
            place = position - 0.4 + height * (i + 0.5)
            axes.barh(place, value - 1, 0.9 * height, 1, color=COLORS[name])
            axes.annotate(
                digits(value), (max(value, 1), place), (2, 0), textcoords="offset points", va="center", fontsize=6
            )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(found)), [_tick(case) for case in found], fontsize=8)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("time / time of a plain copy (np.copyto), logarithmic; less is faster")
    axes.spines[["top", "right"]].set_visible(False)
    seen = [name for name in COLORS if any(name in results for results in found.values())]
    bars = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in seen]
    labels = [f"{name} {about[name]}" if name in about and name != OUT else name for name in seen]
    figure.legend(bars, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"Batch normalization, forward: bn_c {about['bn_c']}\n{about['machine']}", fontsize=9)
    figure.savefig(path, dpi=160)


def _tick(case: Case) -> str:
    work = "batch statistics" if case.batch else "inference"
    return f"{case.label}\n{work}{' + residual + ReLU' if case.fused else ''}"


# The command.


def _picture(text: str) -> Path:
    if _module("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return output(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bn-c bench`."""
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, under 20 seconds on a PC")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of each contender (1)")
    parser.add_argument("--json", type=output, metavar="FILE", help="write all that was measured")
    parser.add_argument("--plot", type=_picture, metavar="FILE.png", help="write a picture (needs matplotlib)")


def main(options: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    about = machine(options.threads)
    for name, text in about.items():
        print(f"{name:13} {text}")
    for line in left_out():
        print(line)
    print(f"\n{LEGEND}")
    cases = [case for case in CASES if case.quick or not options.quick]
    with progress(len(cases)) as say:
        found = run(cases, options.threads, SECONDS_QUICK if options.quick else SECONDS, say)
    if options.json:
        write_json(options.json, about, found)
    if options.plot:
        write_plot(options.plot, about, found)
    return 0
