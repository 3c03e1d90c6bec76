from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_c._checks import Activation

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

c_api: object
max_channels: int

def cpu_runs(isa: str) -> bool: ...
def use(capsule: object, last: int, second: int) -> None: ...
def wake_threads_from(elements: int) -> int: ...
def are_awake(helpers: tuple[Helper, ...]) -> bool: ...
def merge(
    mean: Doubles,
    rest: Doubles,
    m2: Doubles,
    count: int,
    other_mean: Doubles,
    other_rest: Doubles,
    other_m2: Doubles,
    other_count: int,
) -> None: ...
def normalize(
    x: NDArray[Any],
    folded: Folded,
    activation: Activation,
    axis: int,
    residual: NDArray[Any] | None,
    dtype: np.dtype[Any] | None,
    out: NDArray[Any] | None,
    threads: int,
) -> NDArray[Any]: ...
def batch_norm(
    x: Any,
    gamma: Any,
    beta: Any,
    eps: Any,
    axis: Any,
    mask: Any,
    residual: Any,
    activation: Any,
    dtype: Any,
    out: Any,
    num_threads: int | None,
) -> tuple[NDArray[Any], Folded]: ...
def batch_norm_inference(
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    beta: Any,
    eps: Any,
    axis: Any,
    residual: Any,
    activation: Any,
    dtype: Any,
    out: Any,
    num_threads: int | None,
) -> NDArray[Any]: ...
def normalize_batch(
    x: NDArray[Any],
    folded: Folded,
    eps: float,
    mask: NDArray[Any] | None,
    counted: int,
    activation: Activation,
    axis: int,
    residual: NDArray[Any] | None,
    dtype: np.dtype[Any] | None,
    out: NDArray[Any] | None,
    threads: int,
) -> NDArray[Any]: ...
def moments(
    x: NDArray[Any], mask: NDArray[Any] | None, counted: int, axis: int, channels: int | None, threads: int
) -> tuple[int, Doubles, Doubles]: ...

class Folded:
    channels: int
    def __init__(self, channels: int, gamma: Any = None, beta: Any = None) -> None: ...
    def fold(self, mean: Any, var: Any, eps: float) -> Folded: ...
    def statistics(self) -> tuple[int, Doubles, Doubles]: ...
    def running(
        self, running_mean: Floats, running_var: Floats, weight: float, unbiased: bool
    ) -> dict[str, Floats]: ...

class Layer:
    _ready: Folded | None
    _version: object
    def _keep(self, folded: Folded, version: object, activation: Activation, axis: int, threads: int) -> None: ...
    def __call__(
        self, x: Any, *, residual: Any = None, mask: Any = None, dtype: Any = None, out: Any = None
    ) -> NDArray[Any]: ...

class Helper:
    def serve(self) -> None: ...

class Pixels:
    channels: int
    def __init__(
        self,
        linear: NDArray[np.float32],
        table: NDArray[Any] | None,
        dtype: np.dtype[Any],
        linear_is_exact: bool,
        reverse: bool,
        channels_last: bool,
    ) -> None: ...
    def __call__(self, frame: NDArray[Any], out: NDArray[Any] | None, threads: int) -> NDArray[Any]: ...
