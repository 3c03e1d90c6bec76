"""Layers in and out of files: `.npz`, `.safetensors` and `.onnx`.

a. Arrays have PyTorch's keys behind the layer's name and a dot, so that PyTorch loads the files too. What a state
   dict lacks (eps, axis, activation ...) is JSON under the name `bn_c`: an array of an .npz, an entry of the
   metadata of a .safetensors. Where it is missing, as in a file of a whole PyTorch model, there is a layer wherever
   there are both a running_mean and a running_var.
b. No file is trusted: nothing is unpickled, and no size that a file states is allocated before it was compared
   with the bytes that are there.
c. A file gives all of its layers, or an error. Written files appear whole, or not at all.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bn_c import _checks
from bn_c._files import replacing
from bn_c.layer import COUNTER, TORCH_KEYS, BatchNorm

OPTIONS = "bn_c"
LONGEST_NAME = 1000
# What the arrays of a compressed file may take unpacked: more than layers need, less than harms a small device.
UNPACKED = 16 << 20
UNPACKED_RATIO = 16
NPY_1_0 = b"\x93NUMPY\x01\x00"  # what NumPy writes unless a header is huge

Array = NDArray[Any]
Values = MutableMapping[str, Any]


def load_layers(path: str | os.PathLike[str]) -> dict[str, BatchNorm]:
    """The batch normalization layers of a file, by name.

    Parameters
    ----------
    path : path of an .npz, .safetensors or .onnx file
        What `save_layers` wrote, a PyTorch state dict (also of a whole model, of any float dtype), or an ONNX model.
        A state dict lacks eps, momentum and axis: its layers have the constructor's, so assign `eps` where the model
        had another. The packages for the last two come with `pip install 'bn-c[models]'`.

    Returns
    -------
    dict of str to BatchNorm
        The name is what precedes `.running_mean` in a state dict, and as in `BatchNorm.from_onnx` in an ONNX model.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is damaged or of another kind, or has no layer, or one that cannot be taken over.
    ImportError
        If the package for it is not installed.
    """
    file_path = _path(path, READERS)
    with _taking("path", str(file_path)), file_path.open("rb") as file:
        return READERS[file_path.suffix.lower()](file, file_path)


def save_layers(path: str | os.PathLike[str], layers: Mapping[str, BatchNorm]) -> None:
    """Writes layers with all their options; `load_layers` gives the same bits back.

    Parameters
    ----------
    path : path of an .npz or .safetensors file
        A file that is already there is replaced in one step, when the new one is complete. A .safetensors file is
        also one for PyTorch: `model.load_state_dict(safetensors.torch.load_file(path), strict=False)`.
    layers : mapping of str to BatchNorm
        The layers by name.

    Raises
    ------
    OSError
        If the file cannot be written. What was there stays as it was, as with the other errors.
    TypeError, ValueError
        Naming the argument, what was expected and what came.
    ImportError
        If the package for it is not installed.
    """
    file_path = _path(path, WRITERS)
    arrays: dict[str, Array] = {}
    options = {}
    for name, layer in _checks.mapping("layers", layers).items():
        if not isinstance(name, str) or not isinstance(layer, BatchNorm):
            raise TypeError(
                f"layers: expected names and BatchNorm layers, got {_checks.kind(name)} and {_checks.kind(layer)}"
            )
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(
                f"layers: expected printable names of at most {LONGEST_NAME} characters, got {_checks.said(name)}"
            )
        arrays.update({_prefix(name) + key: array for key, array in layer.state_dict().items()})
        options[name] = {"num_features": layer.num_features, **layer._options()}
    contents = WRITERS[file_path.suffix.lower()](arrays, json.dumps(options, default=float))
    with replacing(file_path) as file:
        file.write(contents)


def _path(path: Any, suffixes: Collection[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a string or a path, got {_checks.kind(path)}")
    result = Path(path)
    if result.suffix.lower() not in suffixes:
        raise ValueError(f"path: expected a name that ends in {' or '.join(suffixes)}, got {_checks.said(str(path))}")
    return result


@contextmanager
def _taking(argument: str, source: str) -> Iterator[None]:
    """Whatever is wrong with a file is one line that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError) or (isinstance(error, OSError) and error.filename):
            raise
        raise ValueError(
            f"{argument}: expected batch normalization layers, got {source!r} ({_checks.why(error)})"
        ) from error


def _prefix(name: str) -> str:
    """What the keys of a layer begin with; a state dict of one layer alone has bare keys."""
    return f"{name}." if name else ""


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed, which such files need: pip install 'bn-c[models]'") from error


# ---- state dicts ------------------------------------------------------------------------------------


def _layers(keys: Collection[str], read: Callable[[str], Array], text: str | None) -> dict[str, BatchNorm]:
    """The layers of a state dict: those that its options list, and those that its keys show."""
    listed = json.loads(text) if text is not None else {}
    if not isinstance(listed, dict) or not all(isinstance(options, dict) for options in listed.values()):
        raise ValueError(f"{OPTIONS}: expected an object of objects")
    mean, var = "running_mean", "running_var"
    prefixes = [key.removesuffix(mean) for key in keys if key == mean or key.endswith("." + mean)]
    shown: dict[str, dict[str, Any]] = {prefix[:-1]: {} for prefix in prefixes if prefix + var in keys}
    if text is None and not shown:
        raise ValueError(f"expected keys such as 'bn1.running_mean' and 'bn1.running_var', got {_checks.names(keys)}")
    layers = {}
    for name in [*listed, *(name for name in shown if name not in listed)]:
        prefix = _prefix(name)
        wanted = [prefix + key for key in (*TORCH_KEYS, COUNTER)]
        state = {key: read(key) for key in wanted if key in keys}
        layers[name] = _layer(state, prefix, listed.get(name, {}))
    return layers


def _layer(state: Mapping[str, Array], prefix: str, options: dict[str, Any]) -> BatchNorm:
    options = dict(options)
    channels = options.pop("num_features", None)
    if isinstance(options.get("activation"), list):
        options["activation"] = tuple(options["activation"])
    if options.get("affine") is False and options.get("track_running_stats") is False:
        return BatchNorm(channels, **options)
    layer = BatchNorm.from_torch(state, prefix, **options)
    if channels is not None and channels != layer.num_features:
        raise ValueError(f"{prefix}: expected {channels} channels, got {layer.num_features}")
    return layer


def _read_npz(file: BinaryIO, path: Path) -> dict[str, BatchNorm]:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("expected each array once")
        left = max(UNPACKED, UNPACKED_RATIO * path.stat().st_size)

        def read(key: str) -> Array:
            nonlocal left
            member = members[key]
            left -= member.file_size
            if left < 0 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{key}: expected an array in proportion to the file, got {member.file_size} bytes")
            return _npy(key, archive.read(member))

        text = str(read(OPTIONS)) if OPTIONS in members else None
        return _layers(members, read, text)


def _npy(key: str, data: bytes) -> Array:
    """An array of numbers, or of one text, in NumPy's format; its stated size is checked first."""
    stream = io.BytesIO(data)
    if stream.read(len(NPY_1_0)) != NPY_1_0:
        raise ValueError(f"{key}: expected an array in NumPy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "fiuU" or len(shape) > 1:
        raise ValueError(f"{key}: expected at most one dimension of numbers, got {dtype} of shape {shape}")
    if stream.tell() + dtype.itemsize * math.prod(shape) != len(data):
        raise ValueError(f"{key}: expected {dtype} of shape {shape}, got {len(data)} bytes")
    return np.ndarray(shape, dtype, data, stream.tell())


def _write_npz(arrays: Mapping[str, Array], text: str) -> bytes:
    stream = io.BytesIO()
    members: dict[str, Any] = {**arrays, OPTIONS: np.array(text)}
    np.savez(stream, **members)
    return stream.getvalue()


def _read_safetensors(file: BinaryIO, path: Path) -> dict[str, BatchNorm]:
    with _package("safetensors").safe_open(path, framework="numpy") as tensors:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))

        def read(key: str) -> Array:
            if header[key]["dtype"] != "BF16":
                return np.asarray(tensors.get_tensor(key))
            # NumPy has no such numbers; they are the upper halves of float32.
            start, end = header[key]["data_offsets"]
            file.seek(8 + size + start)
            halves = np.frombuffer(file.read(end - start), "<u2").astype(np.uint32)
            return (halves << 16).view(np.float32).reshape(header[key]["shape"])

        return _layers(dict.fromkeys(tensors.keys()), read, (tensors.metadata() or {}).get(OPTIONS))


def _write_safetensors(arrays: Mapping[str, Array], text: str) -> bytes:
    contents: bytes = _package("safetensors.numpy").save(dict(arrays), {OPTIONS: text})
    return contents


# ---- ONNX -------------------------------------------------------------------------------------------


def from_onnx(kind: type[BatchNorm], model_or_path: Any, node: str | None) -> BatchNorm:
    """As `BatchNorm.from_onnx` says."""
    onnx = _package("onnx")
    if not isinstance(model_or_path, (str, os.PathLike, onnx.ModelProto)):
        raise TypeError(f"model_or_path: expected an ONNX model or its path, got {_checks.kind(model_or_path)}")
    if node is not None and not isinstance(node, str):
        raise TypeError(f"node: expected a name, got {_checks.kind(node)}")
    path = None if isinstance(model_or_path, onnx.ModelProto) else Path(model_or_path)
    source = "a model" if path is None else str(path)
    with _taking("model_or_path", source):
        model = model_or_path if path is None else _model(path.read_bytes())
        found = _batch_norms(model)
    chosen = [at for at in found if node in (None, _name(at[0]), at[0].output[0])]
    if len(chosen) != 1:
        names = _checks.names([_name(one) for one, _ in found])
        raise ValueError(f"node: expected the name or output of one of {names}, got {node!r}")
    with _taking("model_or_path", source):
        return _onnx_layer(kind, model, *chosen[0], path)


def _read_onnx(file: BinaryIO, path: Path) -> dict[str, BatchNorm]:
    model = _model(file.read())
    layers: dict[str, BatchNorm] = {}
    for node, values in _batch_norms(model):
        name = _name(node)
        if name in layers:
            raise ValueError(f"expected a name of its own for each node, got {name!r} twice")
        layers[name] = _onnx_layer(BatchNorm, model, node, values, path)
    return layers


def _model(data: bytes) -> Any:
    return _package("onnx").load_model_from_string(data)


def _batch_norms(model: Any) -> list[tuple[Any, Values]]:
    """The BatchNormalization nodes of a model, with what gives each value that they may see."""
    if any(_is_batch_norm(node) for function in model.functions for node in function.node):
        raise ValueError("BatchNormalization in a function; inline it with onnx.inliner.inline_local_functions")
    found = list(_in_graph(model.graph, ChainMap()))
    if not found:
        raise ValueError("no BatchNormalization node; exporters fold those that follow a convolution into it")
    return found


def _in_graph(graph: Any, outer: ChainMap[str, Any]) -> Iterator[tuple[Any, Values]]:
    values = outer.new_child({tensor.name: tensor for tensor in graph.initializer})
    values.update({output: node for node in graph.node for output in node.output})
    for node in graph.node:
        if _is_batch_norm(node):
            yield node, values
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _in_graph(inner, values)


def _is_batch_norm(node: Any) -> bool:
    return node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx") and len(node.output) > 0


def _name(node: Any) -> str:
    return str(node.name or node.output[0])


def _onnx_layer(kind: type[BatchNorm], model: Any, node: Any, values: Values, path: Path | None) -> BatchNorm:
    version = max((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), default=0)
    if not version:
        raise ValueError("expected a model that names its opset")
    get = _package("onnx.helper").get_attribute_value
    given: dict[str, Any] = {"epsilon": 1e-5, "momentum": 0.9, "training_mode": 0, "is_test": 0, "spatial": 1}
    given.update({attribute.name: get(attribute) for attribute in node.attribute})
    if version < 9 and not given["spatial"]:
        raise ValueError(f"{_name(node)}: expected spatial=1, got one mean for each place in a channel")
    gamma, beta, mean, var = (_constant(_name(node), name, values, path) for name in node.input[1:5])
    if version < 7:
        training = not given["is_test"]
    else:
        training = given["training_mode"] if version >= 14 else len(node.output) > 1
    # Attributes are float32: the number meant is the shortest one that they hold, and 1 - 0.9 is 0.1.
    layer = kind(
        len(mean),
        eps=float(str(np.float32(_checks.eps(given["epsilon"])))),
        momentum=round(1 - _checks.momentum(given["momentum"]), 7),
        unbiased_running_var=False,
        training=bool(training),
    )
    layer._assign({"gamma": gamma, "beta": beta, "running_mean": mean, "running_var": var})
    return layer


def _constant(node: str, name: str, values: Values, path: Path | None) -> Array:
    """A parameter as it stands in the model, perhaps behind Identity nodes."""
    source: Any = values.get(name)
    seen = set()
    while getattr(source, "op_type", None) == "Identity" and source.input[0] not in seen:
        seen.add(source.input[0])
        source = values.get(source.input[0])
    if getattr(source, "op_type", None) == "Constant":
        source = next((attribute.t for attribute in source.attribute if attribute.name == "value"), source)
    if source is None or hasattr(source, "op_type"):
        by = f"by a node {source.op_type}" if source else "or fed"
        raise ValueError(f"{node}: expected constant parameters, got {name!r}, which is computed {by} at run time")
    if path is None and source.data_location == source.EXTERNAL:
        raise ValueError(f"{node}: expected {name!r} in the model, got it in a file; pass the model's path")
    array = _package("onnx.numpy_helper").to_array(source, str(path.parent) if path else "")
    if array.dtype.kind not in "fV":  # V: bfloat16
        raise ValueError(f"{node}: expected floating-point numbers, got {array.dtype} in {name!r}")
    return np.asarray(array.astype(np.float32))


READERS: dict[str, Callable[[BinaryIO, Path], dict[str, BatchNorm]]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".onnx": _read_onnx,
}
WRITERS: dict[str, Callable[[Mapping[str, Array], str], bytes]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
