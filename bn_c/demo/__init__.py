"""Handwritten digits from a drifting sensor: running statistics against batch statistics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bn_c import BatchNorm, batch_norm, batch_norm_inference, batch_stats, definition

__all__ = ["Network", "main"]

Array: TypeAlias = NDArray[np.float32]
Normalize: TypeAlias = Callable[[BatchNorm, Array], Array]

FOLDER = Path(__file__).parent
GAIN, OFFSET, NOISE = 0.4, 0.3, 0.04
ROUNDS, TIME_LIMIT = 50, 1.5

TITLE = """\
bn_c demo: handwritten digits from a drifting sensor
Data: UCI Optical Recognition of Handwritten Digits, E. Alpaydin & C. Kaynak,
CC BY 4.0 (test images, 8 x 8 pixels). A small network with three batch norms
was trained on other digits from a clean sensor."""


def running_statistics(layer: BatchNorm, x: Array) -> Array:
    """Normalize with the statistics stored in training."""
    return layer(x)


def batch_statistics(layer: BatchNorm, x: Array) -> Array:
    """Normalize with the statistics of ``x`` and leave the stored ones alone."""
    return batch_norm(x, layer.gamma, layer.beta, eps=layer.eps, activation="relu")


def numpy_running(layer: BatchNorm, x: Array) -> Array:
    """Normalize with the stored statistics in plain NumPy."""
    return _relu(_plain(layer, x, layer.running_mean, layer.running_var))


def numpy_batch(layer: BatchNorm, x: Array) -> Array:
    """Normalize with the statistics of ``x`` in plain NumPy."""
    return _relu(_plain(layer, x, *definition.statistics(x)))


def _plain(layer: BatchNorm, x: Array, mean: Array, var: Array) -> Array:
    return definition.normalized(x, mean, var, layer.gamma, layer.beta, layer.eps)


def _relu(y: Array) -> Array:
    return np.maximum(y, 0, out=y)


class Network:
    """The trained network: three times convolution, batch norm and ReLU, then one linear layer.

    ``state`` holds the weights, of any float dtype, under their PyTorch ``state_dict`` names.
    """

    def __init__(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.convs = [state[f"conv{i}.weight"].astype(np.float32) for i in (1, 2, 3)]
        self.norms = [BatchNorm.from_torch(state, prefix=f"bn{i}.", activation="relu") for i in (1, 2, 3)]
        self.fc_weight, self.fc_bias = state["fc.weight"].astype(np.float32), state["fc.bias"]

    def __call__(self, images: Array, normalize: Normalize = running_statistics) -> Array:
        """Return the scores, (batch, 10), of ``images``, (batch, 1, 8, 8)."""
        bn1, bn2, bn3 = self.norms
        conv1, conv2, conv3 = self.convs
        x = normalize(bn1, _conv3x3(images, conv1))
        x = _max_pool(normalize(bn2, _conv3x3(x, conv2)))
        x = _max_pool(normalize(bn3, _conv3x3(x, conv3)))
        scores: Array = x.reshape(len(x), -1) @ self.fc_weight.T + self.fc_bias
        return scores


def _conv3x3(x: Array, weight: NDArray[Any]) -> Array:
    batch, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
    columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(batch, -1, height * width)
    planes: Array = weight.reshape(len(weight), -1) @ columns
    return planes.reshape(batch, -1, height, width)


def _max_pool(x: Array) -> Array:
    batch, channels, height, width = x.shape
    pooled: Array = x.reshape(batch, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))
    return pooled


def _drift(images: Array) -> Array:
    noise = np.random.default_rng(0).normal(0.0, NOISE, images.shape)
    return (GAIN * images + OFFSET + noise).astype(np.float32)


def _load() -> tuple[Network, Array, NDArray[np.uint8]]:
    with np.load(FOLDER / "network.npz") as state:
        network = Network(state)
    with np.load(FOLDER / "digits.npz") as digits:
        # The pixels are 0..16, the network's input is 0..1.
        return network, digits["images"][:, None].astype(np.float32) / 16, digits["labels"]


def _norm_inputs(network: Network, images: Array, normalize: Normalize) -> list[Array]:
    """Return what each batch norm is given in one pass through the network."""
    inputs: list[Array] = []

    def recorded(layer: BatchNorm, x: Array) -> Array:
        inputs.append(x)
        return normalize(layer, x)

    network(images, recorded)
    return inputs


def _print_accuracy(network: Network, clean: Array, drifted: Array, labels: NDArray[np.uint8]) -> None:
    print(f"\nAccuracy on {len(labels)} images, taken as one mini-batch")
    print(f"{'':34}{'running statistics':>20}{'batch statistics':>20}")
    sensors = {
        "clean sensor": clean,
        f"drifted: {GAIN} x + {OFFSET} + noise {NOISE}": drifted,
    }
    for name, images in sensors.items():
        cells = (
            f"{np.mean(network(images, normalize).argmax(axis=1) == labels):20.1%}"
            for normalize in (running_statistics, batch_statistics)
        )
        print(f"{name:34}{''.join(cells)}")


def _print_statistics(network: Network, drifted: Array) -> None:
    print("\nChannel statistics on the drifted images, smallest .. largest channel")
    print("x_hat = (x - mean) / sqrt(var + eps), that is, before gamma and beta")
    print(f"{'':10}{'running stats: x_hat':>22}{'batch stats: x':>22}{'batch stats: x_hat':>22}")
    passes = zip(
        network.norms,
        _norm_inputs(network, drifted, running_statistics),
        _norm_inputs(network, drifted, batch_statistics),
        strict=True,
    )
    for i, (layer, x_running, x) in enumerate(passes, start=1):
        mean, var, eps = layer.running_mean, layer.running_var, layer.eps
        drifting = batch_stats(batch_norm_inference(x_running, mean, var, eps=eps))
        before, after = batch_stats(x), batch_stats(batch_norm(x, eps=eps))
        columns = (drifting, before, after)
        print(f"bn{i}  mean {''.join(_span(stats.mean) for stats in columns)}")
        print(f"     var  {''.join(_span(stats.var) for stats in columns)}")
    print("Running statistics hand the drift on; batch statistics rescale at each layer.")


def _span(values: Any) -> str:
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    low, high = np.round([np.min(values), np.max(values)], 3) + 0.0
    return f"{low:11.3f} ..{high:8.3f}"


def _medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Time the calls in turn, round after round; return each one's median in milliseconds."""
    times: list[list[float]] = [[] for _ in calls]
    end = perf_counter() + TIME_LIMIT
    for _ in range(ROUNDS):
        for call, samples in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            samples.append((perf_counter() - start) * 1e3)
        if perf_counter() > end:
            break
    return [median(samples) for samples in times]


def _print_times(network: Network, drifted: Array) -> None:
    inputs = _norm_inputs(network, drifted, batch_statistics)

    def all_layers(normalize: Normalize) -> Callable[[], object]:
        return lambda: [normalize(*pair) for pair in zip(network.norms, inputs, strict=True)]

    normalizers = (numpy_running, running_statistics, numpy_batch, batch_statistics)
    times = _medians([all_layers(normalize) for normalize in normalizers])
    print(f"\nTime of the three batch norms with ReLU, {len(drifted)} images, median")
    print(f"{'':34}{'plain NumPy':>14}{'bn_c':>14}{'speedup':>12}")
    for name, plain, ours in (
        ("running statistics", times[0], times[1]),
        ("batch statistics", times[2], times[3]),
    ):
        print(f"{name:34}{plain:11.2f} ms{ours:11.2f} ms{plain / ours:11.1f}x")


def main() -> None:
    """Print accuracy under sensor drift, channel statistics and times."""
    network, clean, labels = _load()
    drifted = _drift(clean)
    print(TITLE)
    _print_accuracy(network, clean, drifted, labels)
    _print_statistics(network, drifted)
    _print_times(network, drifted)
