"""Layers in and out of files: the same bits, and of a damaged or hostile file one error that names it."""

import errno
import io
import json
import re
import resource
import tracemalloc
import zipfile
from importlib import import_module

import numpy as np
import oracle
import pytest
from fuzz import check_file, corpus
from processes import killed_at_any_moment
from test_bad_inputs import error_of, isolated

import bn_c
from bn_c import models


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    """A file of each kind that is written."""
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed: its files are not tested")
    return tmp_path / f"model{request.param}"


def trained(rng, channels=5, **options):
    layer = bn_c.BatchNorm(channels, **options)
    if layer.gamma is not None:
        layer.gamma, layer.beta = rng.normal(1, 1, channels), rng.normal(0, 1, channels)
    shape = [4, 4, 4]
    shape[layer.axis] = channels
    training = layer.training
    for _ in range(3):
        layer.train()(rng.normal(3, 2, shape).astype("f4"))
    return layer.train(training)


OPTIONS = {
    "conv1.bn": {},
    "block/0/bn": {"eps": 0.1, "momentum": None, "axis": -1, "training": True, "num_threads": None},
    "plain": {"affine": False, "unbiased_running_var": False, "allow_single_value": True},
    "batch": {"track_running_stats": False, "activation": "relu"},
    "bare": {"affine": False, "track_running_stats": False, "activation": ("clip", np.float32(-0.1), np.inf)},
    "größe 1": {"activation": ("leaky_relu", 0.1), "eps": 1 / 3, "momentum": 1 / 3, "num_threads": 2},
    "": {"activation": "hard_swish"},
    "one.weight": {},
    "bn_c": {},
}


def same(a, b):
    assert repr(a) == repr(b)
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(oracle.bits(ours[key]) == oracle.bits(theirs[key]) for key in ours)
    return True


def test_all_comes_back(path, rng):
    layers = {name: trained(rng, **options) for name, options in OPTIONS.items()}
    layers["none"] = bn_c.BatchNorm(0)
    layers["extreme"] = bn_c.BatchNorm(3)
    layers["extreme"].gamma, layers["extreme"].running_mean = [np.nan, -0.0, np.inf], [1e-45, 3e38, -np.inf]
    bn_c.save_layers(path, layers)
    loaded = bn_c.load_layers(str(path))
    assert list(loaded) == list(layers)
    for name, layer in layers.items():
        activation = layer.activation
        if isinstance(activation, tuple):
            layer.activation = tuple(a if isinstance(a, str) else float(a) for a in activation)
        assert same(loaded[name], layer)
    x = rng.normal(3, 2, (4, 5, 4)).astype("f4")
    assert oracle.bits(loaded["conv1.bn"](x)) == oracle.bits(layers["conv1.bn"](x))
    bn_c.save_layers(path, {})
    assert bn_c.load_layers(path) == {}


def test_same_layers_same_file(path, rng):
    layers = {name: trained(rng) for name in "ab"}
    bn_c.save_layers(path, layers)
    first = path.read_bytes()
    bn_c.save_layers(path, bn_c.load_layers(path))
    assert path.read_bytes() == first


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_state_dict_of_a_whole_model(dtype, tmp_path, rng):
    """As `np.savez(path, **state_dict)` writes it: the layers are found among all the other arrays."""
    bn = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
    state = {f"layer1.0.bn1.{key}": rng.uniform(1, 2, 6).astype(dtype) for key in bn}
    state["layer1.0.bn1.num_batches_tracked"] = np.array(7)
    state |= {f"plain.{key}": rng.uniform(1, 2, 4).astype(dtype) for key in ("running_mean", "running_var")}
    others = ("conv1.weight", "norm.weight", "norm.bias", "ema.running_mean", "running_means", "xrunning_mean")
    state |= {key: rng.normal(0, 1, (3, 3)).astype(dtype) for key in others}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "model.npz", **state)
        loaded = bn_c.load_layers(tmp_path / "model.npz")
        assert list(loaded) == ["layer1.0.bn1", "plain"]
        layer = loaded["layer1.0.bn1"]
        assert layer.num_batches_tracked == 7
        assert loaded["plain"].gamma is None
        for key, array in layer.state_dict().items():
            assert np.array_equal(array, state[f"layer1.0.bn1.{key}"].astype(array.dtype))


def test_names_are_only_names(tmp_path):
    """Nothing is written or read where a name in a file points to."""
    name = "../../evil"
    np.savez(tmp_path / "a.npz", **{f"{name}.running_mean": np.zeros(2), f"{name}.running_var": np.ones(2)})
    assert list(bn_c.load_layers(tmp_path / "a.npz")) == [name]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


NO_PATHS = [None, 3, b"model.npz", ["model.npz"], object()]
NO_SUFFIX = ["model", "model.pt", "npz", ".npz", "model.npz.bak", ""]


@pytest.mark.parametrize("call", [bn_c.load_layers, lambda path: bn_c.save_layers(path, {})])
def test_no_path(call):
    for value in NO_PATHS:
        with pytest.raises(TypeError, match=r"^path: expected a string or a path, got \w+$"):
            call(value)
    for value in NO_SUFFIX:
        with pytest.raises(ValueError, match=r"^path: expected a name that ends in \.npz or "):
            call(value)
    with pytest.raises(ValueError, match=r"^path: "):
        bn_c.save_layers("model.onnx", {})


def test_no_layers(path):
    layer = bn_c.BatchNorm(2)
    for value in (None, layer, [("a", layer)], "a"):
        with pytest.raises(TypeError, match=r"^layers: expected a mapping"):
            bn_c.save_layers(path, value)
    for value in ({"a": None}, {"a": layer, "b": layer.state_dict()}, {1: layer}, {None: layer}, {b"a": layer}):
        with pytest.raises(TypeError, match=r"^layers: expected names and BatchNorm layers, got "):
            bn_c.save_layers(path, value)
    for name in ("a\0b", "a\nb", "\ud800", "x" * 1001):
        with pytest.raises(ValueError, match=r"^layers: expected printable names"):
            bn_c.save_layers(path, {name: layer})
    assert not path.exists()


def test_what_was_there_stays(path, monkeypatch):
    """Where the disk is full, and where the folder is gone or read-only."""
    bn_c.save_layers(path, {"a": bn_c.BatchNorm(2)})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            bn_c.save_layers(path, {"b": bn_c.BatchNorm(3)})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=re.escape(str(path.parent / "none" / path.name))):
        bn_c.save_layers(path.parent / "none" / path.name, {"b": bn_c.BatchNorm(3)})
    folder = path.with_stem("folder")
    folder.mkdir()
    with pytest.raises(OSError, match=r"directory|Directory"):
        bn_c.save_layers(folder, {})
    assert len(list(path.parent.iterdir())) == 2


def on_a_full_disk(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    error = error_of(bn_c.save_layers, path, {"b": bn_c.BatchNorm(1000)})
    assert (type(error), error.errno) == (OSError, errno.EFBIG)


def test_a_full_disk(path):
    bn_c.save_layers(path, {"a": bn_c.BatchNorm(2)})
    before = path.read_bytes()
    isolated(on_a_full_disk, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError, match="/proc"):  # where root cannot write either
        bn_c.save_layers(f"/proc/model{path.suffix}", {})


@pytest.mark.slow
def test_killed_at_any_moment(path, thorough):
    layers = {"a": bn_c.BatchNorm(100_000)}
    killed_at_any_moment(lambda: bn_c.save_layers(path, layers), path, 500 if thorough else 30)


def test_a_link_stays_a_link(path):
    link = path.with_name(f"link{path.suffix}")
    link.symlink_to(path.name)
    bn_c.save_layers(link, {"a": bn_c.BatchNorm(2)})
    assert link.is_symlink()
    assert list(bn_c.load_layers(path)) == ["a"]


# ---- damaged and hostile files ----------------------------------------------------------------------


def refused(path, says=None):
    """ValueError or OSError in one line that names the file, with next to nothing allocated."""
    tracemalloc.start()
    with pytest.raises((ValueError, OSError), match=says) as caught:
        bn_c.load_layers(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert isinstance(caught.value, OSError) or text.startswith("path: ")
    assert peak < 10 << 20, f"{peak} bytes allocated"


def npy(array=None, header=None, data=b""):
    """A member of an .npz: an array, or any header."""
    if array is not None:
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=True)
        return stream.getvalue()
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def described(shape, dtype="<f4"):
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"


class Evil:
    def __reduce__(self):
        return print, ("code of the file was run",)


GOOD = {"bn.running_mean": npy(np.zeros(3)), "bn.running_var": npy(np.ones(3))}


def own(**options):
    """The options of a layer, as `save_layers` writes them."""
    return npy(np.array(json.dumps({"bn": {"num_features": 3, "affine": False, **options}})))


MEMBERS = {
    "none": {},
    "no_layer": {"weight": npy(np.ones(3)), "bias": npy(np.ones(3))},
    "pickle": {**GOOD, "bn.running_mean": npy(np.array([Evil()], object))},
    "pickled_options": {**GOOD, "bn_c": npy(np.array(Evil(), object))},
    "no_array": {**GOOD, "bn.running_mean": b"text"},
    "empty_member": {**GOOD, "bn.running_mean": b""},
    "only_magic": {**GOOD, "bn.running_mean": b"\x93NUMPY\x01\x00"},
    "other_version": {**GOOD, "bn.running_mean": npy(np.zeros(3)).replace(b"\x01\x00", b"\x04\x00", 1)},
    "huge_shape": {**GOOD, "bn.running_mean": npy(header=described((1 << 40,)))},
    "overflowing_shape": {**GOOD, "bn.running_mean": npy(header=described((1 << 62,), "<f8"))},
    "negative_shape": {**GOOD, "bn.running_mean": npy(header=described((-3,)))},
    "short": {**GOOD, "bn.running_mean": npy(np.zeros(3))[:-1]},
    "long": {**GOOD, "bn.running_mean": npy(np.zeros(3)) + b"\0"},
    "other_length": {**GOOD, "bn.running_mean": npy(np.zeros(4))},
    "two_dimensions": {**GOOD, "bn.running_mean": npy(np.zeros((3, 1)))},
    "no_dimension": {**GOOD, "bn.running_mean": npy(np.array(3.0))},
    "integers": {**GOOD, "bn.running_mean": npy(np.zeros(3, int))},
    "texts": {**GOOD, "bn.running_mean": npy(np.array(["a", "b", "c"]))},
    "complex": {**GOOD, "bn.running_mean": npy(np.zeros(3, complex))},
    "records": {**GOOD, "bn.running_mean": npy(np.zeros(3, "f4,f4"))},
    "nested_header": {**GOOD, "bn.running_mean": npy(header="(" * 9000)},
    "header_of_code": {**GOOD, "bn.running_mean": npy(header="{'descr': print('code of the file was run')}")},
    "only_weight": {**GOOD, "bn.weight": npy(np.ones(3))},
    "count_of_floats": {**GOOD, "bn.num_batches_tracked": npy(np.array(1.5))},
    "negative_count": {**GOOD, "bn.num_batches_tracked": npy(np.array(-1))},
    "many_counts": {**GOOD, "bn.num_batches_tracked": npy(np.arange(3))},
    "no_json": {**GOOD, "bn_c": npy(np.array("{"))},
    "no_text": {**GOOD, "bn_c": npy(np.array(1.0))},
    "deep_json": {**GOOD, "bn_c": npy(np.array("[" * 100_000))},
    "list_of_options": {**GOOD, "bn_c": npy(np.array("[]"))},
    "options_of_other_kind": {**GOOD, "bn_c": npy(np.array('{"bn": 3}'))},
    "listed_but_missing": {**GOOD, "bn_c": npy(np.array('{"other": {"num_features": 3}}'))},
    "other_num_features": {**GOOD, "bn_c": own(num_features=4)},
    "unknown_option": {**GOOD, "bn_c": own(colour="red")},
    "no_eps": {**GOOD, "bn_c": own(eps="1")},
    "nan_eps": {**GOOD, "bn_c": own(eps=float("nan"))},
    "no_activation": {**GOOD, "bn_c": own(activation=["clip", 1])},
    "huge_bare_layer": {"bn_c": own(num_features=10**30, track_running_stats=False)},
    "huge_layer_without_arrays": {"bn_c": own(num_features=(1 << 31) - 1)},
    "flag_that_is_none": {"bn_c": own(num_features=(1 << 31) - 1, track_running_stats=0)},
}


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize("name", MEMBERS)
def test_hostile_npz(name, tmp_path, capfd):
    isolated(refused, zipped(tmp_path / "model.npz", MEMBERS[name]))
    assert "code of the file was run" not in "".join(capfd.readouterr())


def test_bomb(tmp_path):
    size = models.UNPACKED // 4 + 1000
    bomb = {"bn.running_mean": npy(np.zeros(size, "f4")), **{k: v for k, v in GOOD.items() if "var" in k}}
    refused(zipped(tmp_path / "model.npz", bomb, compression=zipfile.ZIP_DEFLATED), "in proportion")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression(method, tmp_path):
    """Of these, Python would unpack much at once; NumPy does not write them."""
    refused(zipped(tmp_path / "model.npz", GOOD, compression=method))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_name_twice(tmp_path):
    zipped(tmp_path / "model.npz", GOOD)
    with zipfile.ZipFile(tmp_path / "model.npz", "a") as archive:
        archive.writestr("bn.running_mean.npy", npy(np.ones(3)))
    refused(tmp_path / "model.npz", "once")


def header(entries, data=b"", size=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def tensors(mean=(3,), var=(3,), dtype="F32", end=12, more=None, metadata=None):
    entries = {
        "bn.running_mean": {"dtype": dtype, "shape": mean, "data_offsets": [0, end]},
        "bn.running_var": {"dtype": "F32", "shape": var, "data_offsets": [12, 24]},
    }
    if metadata is not None:
        entries["__metadata__"] = metadata
    return header({**entries, **(more or {})}, bytes(24))


TENSORS = {
    "empty": b"",
    "short": b"\x08\0\0",
    "huge_header": header({}, size=1 << 62),
    "header_beyond_file": header({}, size=100),
    "no_json": header(b"{" * 50),
    "deep_json": header(b'{"a":' * 20_000),
    "no_layer": header({}),
    "huge_shape": tensors(mean=(1 << 40,)),
    "overflowing_shape": tensors(mean=(1 << 62, 4)),
    "negative_shape": tensors(mean=(-3,)),
    "other_length": tensors(mean=(6,), dtype="F16"),
    "beyond_file": tensors(mean=(6,), end=24),
    "two_dimensions": tensors(mean=(3, 1)),
    "no_dimension": tensors(mean=()),
    "integers": tensors(dtype="I32"),
    "bfloat16_of_other_length": tensors(mean=(6,), dtype="BF16"),
    "float8": tensors(mean=(12,), dtype="F8_E4M3"),
    "unknown_dtype": tensors(dtype="F33"),
    "metadata_no_text": tensors(metadata={"bn_c": 3}),
    "metadata_no_json": tensors(metadata={"bn_c": "{"}),
    "metadata_deep": tensors(metadata={"bn_c": "[" * 100_000}),
    "huge_layer": tensors(metadata={"bn_c": json.dumps({"x": {"num_features": (1 << 31) - 1}})}),
}


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_safetensors(name, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(TENSORS[name])
    isolated(refused, path)


def test_good_safetensors(tmp_path):
    """What the hostile ones are made of is good."""
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensors())
    assert list(bn_c.load_layers(path)) == ["bn"]


def damage(path):
    """Cut or changed in one byte, here and there: an error that names the file, or all of the layers."""
    good, names = path.read_bytes(), len(bn_c.load_layers(path))
    for at in range(0, len(good), 13):
        for data in (good[:at], good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]):
            path.write_bytes(data)
            error = error_of(bn_c.load_layers, path)
            if error is None:
                assert len(bn_c.load_layers(path)) == names
                assert len(data) == len(good)
            else:
                assert isinstance(error, (ValueError, OSError)), repr(error)
                assert str(path) in str(error)
                assert "\n" not in str(error)


def test_damaged(path):
    bn_c.save_layers(path, {"a": bn_c.BatchNorm(3)})
    isolated(damage, path)


@pytest.mark.parametrize("file", corpus("files"), ids=lambda file: file.name)
def test_corpus(file, tmp_path):
    """What fuzzing begins with, and what it found."""
    isolated(check_file, file.read_bytes(), tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".onnx"])
def test_unreadable(suffix, tmp_path):
    package = {".npz": "numpy", ".safetensors": "safetensors", ".onnx": "onnx"}[suffix]
    pytest.importorskip(package)
    missing = tmp_path / f"model{suffix}"
    with pytest.raises(FileNotFoundError, match="model"):
        bn_c.load_layers(missing)
    missing.mkdir()
    with pytest.raises(OSError, match="model"):
        bn_c.load_layers(missing)
    for data in (b"", b"\0", b"PK\x03\x04", b"\x80\x04", b"not a model", bytes(range(256)) * 10):
        wrong = tmp_path / f"wrong{suffix}"
        wrong.write_bytes(data)
        refused(wrong)


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_package_not_installed(suffix, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"")
    monkeypatch.setattr(models, "import_module", missing)
    with pytest.raises(ImportError, match=r"^\w+ is not installed.*: pip install 'bn-c\[models\]'$"):
        bn_c.load_layers(path)
    assert import_module("bn_c")
