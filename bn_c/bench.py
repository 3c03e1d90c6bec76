"""Benchmark cases, who does them and how, and how fast and exact that is: `bn-c bench`, tests/bench_peers.py.

All ways to do a case work on the same arrays, in turn, round after round, in one process: what disturbs the machine
then disturbs all of them alike, and the ratios of their medians hold where times would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pkgutil import resolve_name
from statistics import median
from time import perf_counter
from timeit import Timer
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bn_c
from bn_c import definition

Array = NDArray[Any]
Call = Callable[[], Any]

EPS = 1e-5
OUT, ALLOC = "bn_c", "bn_c, allocating"
SAMPLE = 3e-4  # seconds: far above the resolution of clocks, below the time slices of busy machines
WARM = 5e-3  # seconds of calls before each sample: some caches hold what fits only after ten passes over it
ROUNDS = 7  # at least
CHECKED = 1 << 21  # elements compared with the definition, so that float64 copies fit small boards


# What is computed.


@dataclass(frozen=True)
class Case:
    """A piece of work: the shape of y, the axis of its channels, and the type of x; bytes are camera frames."""

    name: str
    shape: tuple[int, ...]
    axis: int = 1
    dtype: str = "float32"
    batch: bool = False
    fused: bool = False
    quick: bool = False

    @property
    def frames(self) -> bool:
        """Whether it is the work of ImageNormalizer."""
        return self.dtype == "uint8"

    @property
    def label(self) -> str:
        """A name for tables, with the channels in brackets."""
        lengths = [str(length) for length in self.shape]
        lengths[self.axis] = f"[{lengths[self.axis]}]"
        return f"{self.name} {'x'.join(lengths)}{' f16' if self.dtype == 'float16' else ''}"

    @property
    def group(self) -> str:
        """What is computed."""
        if self.frames:
            return "frames of bytes to float32, channels first"
        work = "statistics of the mini-batch" if self.batch else "given statistics (inference)"
        return f"{work}, residual and ReLU" if self.fused else work

    def along(self, values: Array) -> Array:
        """One value per channel, to broadcast against x."""
        return values.reshape([-1 if d == self.axis % len(self.shape) else 1 for d in range(len(self.shape))])


_BATCH_32 = (32, 64, 112, 112)
CASES = (
    Case("dense", (1, 64), quick=True),
    Case("dense", (256, 1024)),
    Case("sensor", (64, 32, 128), quick=True),
    Case("audio", (16, 64, 1000)),
    Case("ResNet-50", (1, 64, 112, 112), quick=True),
    Case("ResNet-50", (1, 2048, 7, 7), quick=True),
    Case("ResNet-50", _BATCH_32),
    Case("ResNet-50", _BATCH_32, dtype="float16"),
    Case("MobileNetV2", (1, 112, 112, 32), -1, quick=True),
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
    Case("MobileNetV2", (32, 112, 112, 32), -1, batch=True),
    Case("ImageNet", (1, 3, 224, 224), dtype="uint8", quick=True),
    Case("1080p", (1, 3, 1080, 1920), dtype="uint8", quick=True),
)


@dataclass(frozen=True)
class Arrays:
    """y = gamma * (x - mean) / sqrt(var + eps) + beta + residual, and the out of all ways that write to one."""

    x: Array
    out: Array
    mean: Array
    var: Array
    gamma: Array
    beta: Array
    eps: float = EPS
    residual: Array | None = None


def arrays(case: Case) -> Arrays:
    """Random arrays of a case, the same in every run."""
    rng = np.random.default_rng(0)
    if case.frames:
        n, c, height, width = case.shape
        x = np.moveaxis(rng.integers(0, 256, (n, height, width, c), np.uint8), -1, 1)
        mean, std = _imagenet()
        return Arrays(x, np.zeros(case.shape, np.float32), 0 * mean, 1 + 0 * mean, 1 / (255 * std), -mean / std, 0.0)
    limits = ((-2, 2), (0.5, 2), (0.5, 1.5), (0.25, 1))
    channels = case.shape[case.axis]
    mean, std, gamma, beta = (rng.uniform(low, high, channels).astype(np.float32) for low, high in limits)
    x = rng.standard_normal(case.shape, np.float32)
    x *= case.along(std)
    x += case.along(mean)
    x = x.astype(case.dtype, copy=False)
    residual = rng.standard_normal(case.shape, np.float32).astype(case.dtype, copy=False) if case.fused else None
    return Arrays(x, np.zeros_like(x), mean, std**2, gamma, beta, residual=residual)


def _imagenet() -> tuple[Array, Array]:
    normalizer = bn_c.ImageNormalizer.imagenet()
    return np.array(normalizer.mean), np.array(normalizer.std)


# By whom.


@dataclass(frozen=True)
class Way:
    """A way to do the work. `call` is timed, after `before`; `read` turns what it returned into y."""

    call: Call
    allocates: bool = False
    read: Callable[[Any], Array] = np.asarray
    before: Call = lambda: None


def ours(case: Case, a: Arrays, threads: int) -> dict[str, Way]:
    """bn_c with `out=`, and without."""
    activation: Any = "relu" if case.fused else None
    options: dict[str, Any] = {"axis": case.axis, "activation": activation, "num_threads": threads}
    call: Callable[..., Any]
    if case.frames:
        call = partial(bn_c.ImageNormalizer.imagenet(num_threads=threads), np.moveaxis(a.x, 1, -1))
    elif case.batch:
        call = partial(bn_c.batch_norm, a.x, a.gamma, a.beta, residual=a.residual, eps=EPS, **options)
    else:
        layer = bn_c.BatchNorm(len(a.mean), eps=EPS, **options)
        layer.running_mean, layer.running_var, layer.gamma, layer.beta = a.mean, a.var, a.gamma, a.beta
        call = partial(layer, a.x, **({"residual": a.residual} if case.fused else {}))
    return {OUT: Way(partial(call, out=a.out)), ALLOC: Way(call, allocates=True)}


def _finish(y: Array, a: Arrays) -> Array:
    """The residual and ReLU, in place, if the case has them."""
    if a.residual is not None:
        np.add(y, a.residual, out=y)
        np.maximum(y, 0, out=y)
    return y


def _plain(case: Case, a: Arrays, _: int) -> Way:
    """`bn_c.definition` in float32; of frames the line that is in most programs."""
    if case.frames:
        frames = np.moveaxis(a.x, 1, -1)
        means, stds = (values.astype(np.float32) for values in _imagenet())
        return Way(lambda: ((frames.astype(np.float32) / 255 - means) / stds).transpose(0, 3, 1, 2), allocates=True)

    def call() -> Array:
        x = a.x.astype(np.float32, copy=False)
        mean, var = definition.statistics(x, case.axis) if case.batch else (a.mean, a.var)
        y = definition.normalized(x, mean, var, a.gamma, a.beta, EPS, case.axis)
        return _finish(y.astype(case.dtype, copy=False), a)

    return Way(call, allocates=True)


def _folded(case: Case, a: Arrays, _: int) -> Way:
    """`x * scale + shift`, as one writes it by hand for speed."""

    def fold(mean: Array, var: Array) -> list[Array]:
        scale = a.gamma / np.sqrt(var + np.float32(a.eps))
        return [case.along(v.astype(np.float32, copy=False)) for v in (scale, a.beta - mean * scale)]

    def apply(scale: Array, shift: Array) -> Array:
        np.multiply(a.x, scale, out=a.out)
        np.add(a.out, shift, out=a.out)
        return _finish(a.out, a)

    def batch() -> Array:
        # In float32: NumPy's sums of float16 overflow.
        return apply(*fold(*definition.statistics(a.x.astype(np.float32, copy=False), case.axis)))

    return Way(batch if case.batch else partial(apply, *fold(a.mean, a.var)))


def _torch(case: Case, a: Arrays, threads: int) -> Way:
    """`torch.nn.functional.batch_norm`, channels last by strides; of frames torchvision's ToTensor and Normalize."""
    torch = import_module("torch")
    torch.set_num_threads(threads)
    x = torch.from_numpy(a.x).movedim(case.axis, 1)
    if case.frames:
        mean, std = (torch.from_numpy(v).float().reshape(3, 1, 1) for v in _imagenet())
        return Way(lambda: x.contiguous().float().div_(255).sub_(mean).div_(std), allocates=True)
    mean, var, gamma, beta = (torch.from_numpy(v) for v in (a.mean, a.var, a.gamma, a.beta))
    statistics = (None, None) if case.batch else (mean, var)
    normalize = partial(torch.nn.functional.batch_norm, x, *statistics, gamma, beta, training=case.batch, eps=EPS)
    call: Call = normalize
    if a.residual is not None:
        residual = torch.from_numpy(a.residual).movedim(case.axis, 1)

        def call() -> Any:
            return normalize().add_(residual).relu_()

    return Way(call, allocates=True, read=lambda y: np.asarray(y.movedim(1, case.axis)))


def _onnx_runtime(case: Case, a: Arrays, threads: int) -> Way | None:
    """A BatchNormalization node, bound to x and out; it has given statistics and channels first only."""
    if case.batch or case.axis != 1 or not a.x.flags.c_contiguous:
        return None
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = runtime.InferenceSession(_onnx_model(case, a), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in (("x", a.x), ("residual", a.residual)):
        if array is not None:
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, a.out.dtype.type, a.out.shape, a.out.ctypes.data)
    return Way(partial(session.run_with_iobinding, binding), read=lambda _: a.out)


def _onnx_model(case: Case, a: Arrays) -> Any:
    array = f"{case.dtype.removesuffix('32')}[{','.join(map(str, case.shape))}]"
    node = f"BatchNormalization <epsilon = {EPS:f}> (x, gamma, beta, mean, var)"
    if case.fused:
        graph = f"({array} x, {array} residual) => ({array} y) {{ n = {node} s = Add(n, residual) y = Relu(s) }}"
    else:
        graph = f"({array} x) => ({array} y) {{ y = {node} }}"
    # The first versions that have all of it: older runtimes on boards then read the model.
    model = import_module("onnx.parser").parse_model(f'<ir_version: 8, opset_import: ["": 15]> batch_norm {graph}')
    constant = import_module("onnx.numpy_helper").from_array
    model.graph.initializer.extend(constant(getattr(a, name), name) for name in ("gamma", "beta", "mean", "var"))
    return model.SerializeToString()


def _opencv(case: Case, a: Arrays, threads: int) -> Way | None:
    """`cv2.dnn.blobFromImageWithParams` of frames, which writes to a blob that fits."""
    if not case.frames:
        return None
    cv2 = import_module("cv2")
    cv2.setNumThreads(threads)
    (frame,) = np.moveaxis(a.x, 1, -1)
    mean, std = _imagenet()
    params = cv2.dnn.Image2BlobParams()
    params.scalefactor, params.mean = tuple(1 / (255 * std)), tuple(255 * mean)
    return Way(partial(cv2.dnn.blobFromImageWithParams, frame, a.out, params))


def installed(name: str) -> bool:
    """Whether a module, or what is in one, can be imported."""
    try:
        resolve_name(name)
    except (ImportError, AttributeError, OSError):  # OSError: a library of it is missing
        return False
    return True


@dataclass(frozen=True)
class Peer:
    """Who is compared with: what has to be there, its package first; how it does a case, if it can; its mark."""

    name: str
    column: str
    needs: tuple[str, ...]
    way: Callable[[Case, Arrays, int], Way | None]
    mark: str
    color: str

    @property
    def version(self) -> str | None:
        """That of the package, if all it needs is installed."""
        return str(import_module(self.needs[0]).__version__) if all(map(installed, self.needs)) else None


PEERS = (
    Peer("NumPy", "NumPy", ("numpy",), _plain, "s", "#a9a9a9"),
    Peer("NumPy folded", "folded", ("numpy",), _folded, "D", "#5f5f5f"),
    Peer("PyTorch", "Torch", ("torch",), _torch, "^", "#e07a3f"),
    Peer("ONNX Runtime", "ORT", ("onnxruntime", "onnx"), _onnx_runtime, "v", "#3d6fb5"),
    Peer("OpenCV", "OpenCV", ("cv2", "cv2.dnn.blobFromImageWithParams"), _opencv, "P", "#9b4f96"),
)


def others(case: Case, a: Arrays, threads: int) -> dict[str, Way]:
    """The peers that are installed and can do the case."""
    return {peer.name: way for peer in PEERS if peer.version and (way := peer.way(case, a, threads))}


# How fast and how exact.


@dataclass(frozen=True)
class Result:
    """Median seconds of a call, and the largest |y - exact| in units of the last place of the terms of y."""

    seconds: float
    error: float
    allocates: bool


@dataclass(frozen=True)
class Measured:
    """What came of a case: seconds of np.copyto, and the results by name.

    `traffic` are the bytes that cannot be avoided: x and the residual read once, y written once.
    """

    case: Case
    traffic: int
    copy: float
    results: dict[str, Result]

    @property
    def peers(self) -> list[Peer]:
        """Those that did it."""
        return [peer for peer in PEERS if peer.name in self.results]

    def ratio(self, peer: Peer) -> float | None:
        """Its time over that of bn_c, both allocating or both not; None if it did not do it."""
        if peer.name not in self.results:
            return None
        result = self.results[peer.name]
        # As it is printed, so that no 1.00 counts as faster.
        return round(result.seconds / self.results[ALLOC if result.allocates else OUT].seconds, 2)


def measure(case: Case, a: Arrays, ways: Mapping[str, Way], seconds: float) -> Measured:
    """The time and the error of each way, and the time of a copy of y."""
    errors = _errors(case, a, ways)
    copied = a.x if a.x.dtype == a.out.dtype else np.ones_like(a.out)
    copy, *times = _times([Way(partial(np.copyto, a.out, copied)), *ways.values()], seconds)
    results = map(Result, times, errors, [way.allocates for way in ways.values()])
    traffic = sum(v.nbytes for v in (a.x, a.out, a.residual) if v is not None)
    return Measured(case, traffic, copy, dict(zip(ways, results, strict=True)))


def _times(ways: Sequence[Way], seconds: float) -> list[float]:
    """Median seconds of a call of each: all in turn, round after round, for about that long."""
    samplers = [_sampler(way) for way in ways]
    samples: list[list[float]] = []
    end = perf_counter() + seconds
    while len(samples) < ROUNDS or perf_counter() < end:
        samples.append([sample() for sample in samplers])
    return [median(times) for times in zip(*samples, strict=True)]


def _sampler(way: Way) -> Callable[[], float]:
    """What gives the seconds of a call, as the mean of calls that take about SAMPLE."""
    timer = Timer(way.call)

    def sample(repeats: int, warm_up: int) -> float:
        way.before()
        timer.timeit(warm_up)
        return timer.timeit(repeats) / repeats

    shortest = max(1e-7, min(sample(1, 1) for _ in range(3)))
    return partial(sample, math.ceil(SAMPLE / shortest), math.ceil(WARM / shortest))


def _errors(case: Case, a: Arrays, ways: Mapping[str, Way]) -> list[float]:
    exact, size = _exact(case, a)
    errors = []
    for way in ways.values():
        a.out.fill(np.nan)
        way.before()
        deviation = np.abs(_sampled(way.read(way.call()), case) - exact)
        errors.append(float(np.max(deviation / size) / np.finfo(a.out.dtype).epsneg))
    return errors


def _exact(case: Case, a: Arrays) -> tuple[Array, Array]:
    """Some channels of y in float64, and the size of the terms it is the sum of."""
    x, *parameters = (_sampled(v, case) for v in (a.x, *map(case.along, (a.mean, a.var, a.gamma, a.beta))))
    mean, var, gamma, beta = (v.reshape(len(v)) for v in parameters)
    if case.batch:
        mean, var = definition.statistics(x, 0)
    y = definition.normalized(x, mean, var, gamma, beta, a.eps, 0)
    size = np.abs(definition.normalized(x, mean, var, gamma, 0.0, a.eps, 0)) + np.abs(parameters[-1])
    if a.residual is None:
        return y, size
    residual = _sampled(a.residual, case)
    return np.maximum(y + residual, 0), size + np.abs(residual)


def _sampled(x: Array, case: Case) -> Array:
    """Every so many channels, first, so that there are about CHECKED elements."""
    step = math.ceil(math.prod(case.shape) / CHECKED)
    return np.moveaxis(x, case.axis, 0)[::step].astype(np.float64)
