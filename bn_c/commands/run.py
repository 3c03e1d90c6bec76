"""`bn-c run`: batch normalization of an array in a file, larger than memory if need be."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bn_c
from bn_c.commands import CommandError, files, output, positive, progress
from bn_c.commands.files import ArrayFile

EXAMPLE = "bn-c run x.npy -o y.npy --layer model.safetensors:block1.bn --activation relu"
LAYERS = (".npz", ".safetensors", ".onnx")

Values = NDArray[Any] | None


@dataclass(frozen=True)
class Parameters:
    """What is done to each channel; mean and var are None until they are those of x."""

    mean: Values
    var: Values
    gamma: Values
    beta: Values
    eps: float
    activation: Any

    def normalize(self, x: NDArray[Any], channels: slice, **options: Any) -> NDArray[Any]:
        """Some of the channels, which x has on axis 1."""
        mean, var, gamma, beta = (v if v is None else v[channels] for v in (self.mean, self.var, self.gamma, self.beta))
        assert mean is not None
        assert var is not None
        return bn_c.batch_norm_inference(x, mean, var, gamma, beta, eps=self.eps, activation=self.activation, **options)


def _target(text: str) -> Path:
    if not text.lower().endswith((".npy", ".npz")):
        raise argparse.ArgumentTypeError(f"expected FILE.npy or FILE.npz, got {text!r}")
    return output(text)


def _activation(text: str) -> Any:
    name, *numbers = text.split(",")
    try:
        return (name, *map(float, numbers)) if numbers else name
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers after {name!r}, got {text!r}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bn-c run`."""
    parser.description = (
        "Normalises an array block by block, in constant memory. Without --layer or --mean and --var the statistics "
        "are those of the array, which is then read twice."
    )
    parser.add_argument("x", metavar="X", help="FILE.npy, or FILE.npz:NAME (FILE.npz if it has one array)")
    parser.add_argument(
        "-o",
        "--output",
        type=_target,
        required=True,
        metavar="Y",
        help="FILE.npy, or FILE.npz for an archive of one array",
    )
    parser.add_argument("--layer", metavar="FILE:NAME", help="a layer of a .npz, .safetensors or .onnx file")
    for name, what in (("gamma", "scale"), ("beta", "shift"), ("mean", "mean"), ("var", "variance")):
        parser.add_argument(f"--{name}", metavar="FILE", help=f"the {what} of each channel: FILE.npy or FILE.npz:NAME")
    parser.add_argument("--eps", type=float, help="added to the variance (the layer's, or 1e-5)")
    parser.add_argument("--axis", type=int, help="where X has its channels (the layer's, or 1)")
    parser.add_argument("--dtype", choices=("float32", "float16"), help="of Y (X's own, float32 for integers)")
    parser.add_argument(
        "--activation", type=_activation, help="relu, relu6, hard_swish, leaky_relu,SLOPE or clip,LOW,HIGH"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="(1); the result is the same for any")


def _layer(options: argparse.Namespace) -> bn_c.BatchNorm | None:
    if options.layer is None:
        return None
    layers: Mapping[str, bn_c.BatchNorm]
    if any(getattr(options, name) is not None for name in ("gamma", "beta", "mean", "var")):
        raise CommandError("--layer: not together with --gamma, --beta, --mean or --var")
    path, name = files.split(options.layer, *LAYERS)
    try:
        layers = bn_c.load_layers(path)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise CommandError(f"--layer: {error}") from error
    if name is None and len(layers) == 1:
        return next(iter(layers.values()))
    if name is None or name not in layers:
        got = "none" if name is None else repr(name)
        raise CommandError(f"--layer: expected FILE:NAME, NAME one of {', '.join(layers) or 'no layers'}, got {got}")
    return layers[name]


def _vector(options: argparse.Namespace, name: str, channels: int) -> Values:
    """One of --gamma, --beta, --mean, --var."""
    file = getattr(options, name)
    if file is None:
        return None
    values = ArrayFile.open(file)
    if values.shape != (channels,):
        raise CommandError(f"--{name}: expected shape ({channels},), one value per channel, got {values.shape}")
    return values.load()


def _parameters(options: argparse.Namespace, layer: bn_c.BatchNorm | None, channels: int) -> Parameters:
    eps, activation = options.eps, options.activation
    if layer is None:
        if (options.mean is None) != (options.var is None):
            raise CommandError("--mean and --var: expected both or neither, got one")
        mean, var, gamma, beta = (_vector(options, name, channels) for name in ("mean", "var", "gamma", "beta"))
        return Parameters(mean, var, gamma, beta, 1e-5 if eps is None else eps, activation)
    if layer.num_features != channels:
        raise CommandError(f"--layer: expected one of {channels} channels, got {layer.num_features}")
    return Parameters(
        layer.running_mean,
        layer.running_var,
        layer.gamma,
        layer.beta,
        layer.eps if eps is None else eps,
        layer.activation if activation is None else activation,
    )


def _checked(parameters: Parameters, x: ArrayFile, axis: int, dtype: Any) -> np.dtype[Any]:
    """The dtype of y, from a call on no elements, which checks all arguments before anything is written."""
    channels = x.channels(axis)
    if parameters.mean is None:
        parameters = replace(parameters, mean=np.zeros(channels), var=np.zeros(channels))
    try:
        return parameters.normalize(np.empty((0, channels, 1), x.dtype), slice(None), dtype=dtype).dtype
    except (TypeError, ValueError) as error:
        raise CommandError(f"{x.name}: {error}" if str(error).startswith("x: ") else str(error)) from error


def main(options: argparse.Namespace) -> None:
    """Reads X, once or twice, and writes Y."""
    x = ArrayFile.open(options.x)
    layer = _layer(options)
    axis = options.axis if options.axis is not None else 1 if layer is None else layer.axis
    parameters = _parameters(options, layer, x.channels(axis))
    dtype = _checked(parameters, x, axis, options.dtype)
    member = (x.member or "y.npy") if options.output.suffix.lower() == ".npz" else None
    passes = 1 if parameters.mean is not None else 2
    with progress(passes * x.size * x.dtype.itemsize, "B", scale=True) as tell:
        if parameters.mean is None:
            stats = x.statistics(axis, options.threads, tell)
            if stats.count == 0 and stats.num_features > 0:
                raise CommandError(f"{x.name}: expected at least one element per channel, got shape {x.shape}")
            parameters = replace(parameters, mean=stats.mean, var=stats.var)
        with files.array_writer(options.output, member, x, dtype) as stream:
            for block, values in x.blocks(axis):
                y = parameters.normalize(values, block.channels, dtype=dtype, num_threads=options.threads)
                stream.write(y.data)
                tell(values.nbytes)
