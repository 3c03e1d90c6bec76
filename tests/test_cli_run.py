"""`bn-c run`: arrays in files."""

import itertools
import math
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial

import numpy as np
import oracle
import pytest
from command_line import ELSEWHERE, bn_c_command, call, start
from processes import killed_at_any_moment

import bn_c
from bn_c.commands import files

SHAPES = [
    ((5, 3), 1),
    ((2, 3, 4, 5), 1),
    ((2, 4, 5, 3), -1),
    ((3, 7), 0),
    ((1, 2, 31), 1),
    ((6,), 0),
    ((2, 1, 1, 3, 2), 3),
]


@pytest.fixture
def folder(tmp_path):
    """A folder with some arrays, good and bad."""
    x = np.arange(60, dtype=np.float32).reshape(4, 3, 5)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "two.npz", a=x, b=x)
    np.savez(tmp_path / "none.npz")
    np.save(tmp_path / "three.npy", np.ones(3))
    np.save(tmp_path / "four.npy", np.ones(4))
    np.save(tmp_path / "integers.npy", np.ones(3, int))
    np.save(tmp_path / "double.npy", x.astype(float))
    np.save(tmp_path / "swapped.npy", x.astype(">f4"))
    np.save(tmp_path / "scalar.npy", np.float32(1))
    np.save(tmp_path / "empty.npy", x[:0])
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "records.npy", np.zeros(3, "f4,i4"))
    with pytest.warns(UserWarning, match="format 3.0"):
        np.save(tmp_path / "utf8.npy", np.zeros(3, [("\u221e", "f4")]))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "truncated.npy").write_bytes(whole[:-1])
    (tmp_path / "header.npy").write_bytes(whole[:50])
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "nothing.npy").touch()
    whole = (tmp_path / "two.npz").read_bytes()
    at = whole.index(x[0, 0].tobytes())
    (tmp_path / "changed.npz").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    (tmp_path / "cut.npz").write_bytes(whole[:-30])
    return tmp_path


@pytest.mark.parametrize("block", [1, 7, 30, files.BLOCK])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_equals_the_functions(monkeypatch, tmp_path, rng, shape, axis, order, block):
    monkeypatch.setattr(files, "BLOCK", block)
    x = np.asarray(oracle.values(rng, shape, offset=3), order=order)
    np.save(tmp_path / "x.npy", x)
    vectors = {name: rng.uniform(0.5, 2, shape[axis]) for name in ("gamma", "beta", "mean", "var")}
    for name, values in vectors.items():
        np.save(tmp_path / f"{name}.npy", values)
    run = partial(call, "run", tmp_path / "x.npy", "--axis", axis, "-o", tmp_path / "y.npy")

    given = [part for name in vectors for part in (f"--{name}", tmp_path / f"{name}.npy")]
    assert run(*given, "--eps", 0.5, "--activation", "leaky_relu,0.25", "--dtype", "float16") == 0
    y = np.load(tmp_path / "y.npy")
    expected = bn_c.batch_norm_inference(
        x, **vectors, axis=axis, eps=0.5, activation=("leaky_relu", 0.25), dtype="float16"
    )
    assert oracle.bits(y) == oracle.bits(expected)
    assert y.dtype == np.float16
    assert y.flags.f_contiguous == x.flags.f_contiguous

    assert run(*given[:4], "--threads", 2) == 0
    stats = files.ArrayFile.open(str(tmp_path / "x.npy")).statistics(axis)
    oracle.assert_statistics(stats, x, axis)
    y, gamma, beta = np.load(tmp_path / "y.npy"), vectors["gamma"], vectors["beta"]
    oracle.assert_forward(y, x, stats.mean, stats.var, gamma, beta, axis=axis)
    assert np.allclose(y, bn_c.batch_norm(x, gamma, beta, axis=axis), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [*oracle.FLOATS, *oracle.INTEGERS])
def test_every_dtype(tmp_path, rng, dtype):
    x = oracle.values(rng, (4, 3, 5), dtype)
    np.save(tmp_path / "x.npy", x)
    assert call("run", tmp_path / "x.npy", "-o", tmp_path / "y.npy") == 0
    assert oracle.bits(np.load(tmp_path / "y.npy")) == oracle.bits(bn_c.batch_norm(x))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives(monkeypatch, folder, rng, save):
    monkeypatch.setattr(files, "BLOCK", 10)
    x = oracle.values(rng, (4, 3, 5))
    save(folder / "a:b.npz", x=x)
    save(folder / "x.npz", x=x, gamma=[1.0, 2, 3], y=np.ones(7))
    gamma = f"{folder}/x.npz:gamma"
    for source, target in itertools.product(("a:b.npz", "x.npz:x"), ("y.npz", "y.npy")):
        assert call("run", folder / source, "-o", folder / target, "--gamma", gamma) == 0
        y = np.load(folder / target)
        y = y if target == "y.npy" else y["x"]
        assert np.allclose(y, bn_c.batch_norm(x, [1, 2, 3]), atol=1e-6)
    assert zipfile.ZipFile(folder / "y.npz").testzip() is None
    assert call("run", folder / "x.npy", "-o", folder / "y.npz") == 0
    assert np.load(folder / "y.npz")["y"].shape == (4, 3, 5)


def test_no_elements(folder, capsys):
    vectors = ["--mean", folder / "three.npy", "--var", folder / "three.npy"]
    assert call("run", folder / "empty.npy", "-o", folder / "y.npy", *vectors) == 0
    assert np.load(folder / "y.npy").shape == (0, 3, 5)
    np.save(folder / "x.npy", np.zeros((10**12, 0), np.float32))
    assert call("run", folder / "x.npy", "-o", folder / "y.npy", "--axis", 0, *vectors) == 2
    assert call("run", folder / "x.npy", "-o", folder / "y.npy") == 0
    assert np.load(folder / "y.npy").shape == (10**12, 0)


def test_in_place(folder):
    x = np.load(folder / "x.npy")
    (folder / "link.npy").symlink_to("x.npy")
    before = sorted(folder.iterdir())
    assert call("run", folder / "x.npy", "-o", folder / "link.npy") == 0
    assert oracle.bits(np.load(folder / "x.npy")) == oracle.bits(bn_c.batch_norm(x))
    assert (folder / "link.npy").is_symlink()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["block1.bn", None])
def test_layers(folder, rng, capsys, name):
    x = np.load(folder / "x.npy").transpose(0, 2, 1).copy()
    np.save(folder / "x.npy", x)
    layers = {"block1.bn": bn_c.BatchNorm(3, eps=0.25, axis=-1, activation="relu")}
    if name:
        layers["block2"] = bn_c.BatchNorm(4, axis=-1)
    layers["block1.bn"].train()(x)
    bn_c.save_layers(folder / "model.npz", layers)
    layer = f"{folder}/model.npz" + (f":{name}" if name else "")
    assert call("run", folder / "x.npy", "-o", folder / "y.npy", "--layer", layer) == 0
    assert oracle.bits(np.load(folder / "y.npy")) == oracle.bits(layers["block1.bn"].eval()(x))
    bn_c.save_layers(folder / "other.npz", {"four": bn_c.BatchNorm(4, axis=-1)})
    for wrong in ("model.npz:block3", "text.npy", "no.npz:a", "cut.npz:a", "other.npz:four"):
        assert call("run", folder / "x.npy", "-o", folder / "z.npy", "--layer", folder / wrong) == 2
    assert call("run", folder / "x.npy", "-o", folder / "z.npy", "--layer", layer, "--eps", -1) == 2
    assert call("run", folder / "x.npy", "-o", folder / "z.npy", "--layer", layer, "--mean", folder / "three.npy") == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 7
    assert "bn-c run: --layer: expected one of 3 channels, got 4\n" in said
    assert not (folder / "z.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{x} -o {y}.txt", "FILE.npy or FILE.npz"),
        ("{x} -o no/y.npy", "existing folder"),
        ("{x} -o /dev", "FILE.npy"),
        ("{x} -o {y} --threads 0", "positive"),
        ("{x} -o {y} --axis 3", "axis: expected -3 to 2"),
        ("{x} -o {y} --eps nan", "eps: expected a finite number"),
        ("{x} -o {y} --eps -1", "eps: expected a finite number"),
        ("{x} -o {y} --dtype int8", "invalid choice"),
        ("{x} -o {y} --activation tanh", "activation: expected"),
        ("{x} -o {y} --activation clip,1", "activation: expected"),
        ("{x} -o {y} --activation clip,2,1", "activation: expected low <= high"),
        ("{x} -o {y} --activation clip,a,b", "expected numbers after 'clip'"),
        ("{x} -o {y} --mean {folder}/three.npy", "--mean and --var"),
        ("{x} -o {y} --gamma {folder}/four.npy", "--gamma: expected shape (3,)"),
        ("{x} -o {y} --gamma {folder}/integers.npy", "gamma: expected real floating-point"),
        ("{x} -o {y} --gamma {folder}/absent.npy", "absent.npy: no such file"),
        ("{x} -o {y} --gamma {x} --layer a.npz", "--layer: not together"),
        ("{folder} -o {y}", "expected a file"),
        ("/dev/null -o {y}", "expected a file"),
        ("{folder}/absent.npy -o {y}", "no such file"),
        ("{folder}/two.npz -o {y}", "one of a, b, got none"),
        ("{folder}/two.npz:c -o {y}", "one of a, b, got 'c'"),
        ("{folder}/none.npz -o {y}", "no arrays"),
        ("{folder}/double.npy -o {y}", "got float64"),
        ("{folder}/swapped.npy -o {y}", "native byte order"),
        ("{folder}/scalar.npy -o {y}", "at least one dimension"),
        ("{folder}/empty.npy -o {y}", "at least one element per channel"),
        ("{folder}/objects.npy -o {y}", "got object"),
        ("{folder}/records.npy -o {y} --axis 0", "records.npy: x: expected float32"),
        ("{folder}/utf8.npy -o {y} --axis 0", "version"),
        ("{folder}/truncated.npy -o {y}", "the file ends before"),
        ("{folder}/header.npy -o {y}", "header.npy: "),
        ("{folder}/text.npy -o {y}", "expected a .npy or .npz file"),
        ("{folder}/nothing.npy -o {y}", "expected a .npy or .npz file"),
        ("{folder}/changed.npz:a -o {y}", "CRC"),
        ("{folder}/cut.npz:a -o {y}", "cut.npz:a: "),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(folder, capsys, arguments, said):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    places = {"folder": folder, "x": folder / "x.npy", "y": folder / "y.npy"}
    assert call("run", *(part.format(**places) for part in arguments.split())) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("bn-c run: ")
    assert output.err.count("\n") == 1
    assert said in output.err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_damaged_files(folder, capsys):
    rng = random.Random(0)
    for name, _ in itertools.product(("x.npy", "two.npz:a"), range(150)):
        file = folder / name.partition(":")[0]
        content = bytearray(file.read_bytes())
        damaged = folder / f"damaged{file.suffix}"
        # Headers and the directory of the archive, where damage is worst.
        for _ in range(rng.randint(1, 4)):
            content[rng.choice((rng.randrange(130), -1 - rng.randrange(150)))] = rng.randrange(256)
        damaged.write_bytes(content[: rng.choice((None, None, rng.randrange(len(content))))])
        status = call("run", f"{damaged}:a" if ":" in name else damaged, "-o", folder / "y.npy")
        said = capsys.readouterr().err
        assert (status, said.count("\n")) in ((0, 0), (2, 1)), said
    assert not written(folder)


def written(folder):
    """What a command writes before it is whole."""
    return list(folder.glob(".bn_c-*.tmp"))


@pytest.fixture
def large(tmp_path):
    """A file of three blocks, of which nothing is on the disk."""
    return sparse(tmp_path / "x.npy", (600, 4, 1 << 12))


def sparse(file, shape):
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
        stream.truncate(stream.tell() + 4 * math.prod(shape))
    return file


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_nothing_behind(large, number, status):
    target = large.with_name("y.npy")
    target.write_text("old")
    with start("run", large, "-o", target) as process:
        while not written(large.parent):
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(number)
        assert process.communicate() == ("", "")
    assert process.returncode == status
    assert target.read_text() == "old"
    assert written(large.parent) == []


def test_killed_at_any_moment(monkeypatch, tmp_path, thorough):
    monkeypatch.setattr(files, "BLOCK", 1 << 14)
    x, target = sparse(tmp_path / "x.npy", (300, 4, 1 << 10)), tmp_path / "y.npy"

    def run():
        assert call("run", x, "-o", target) == 0

    killed_at_any_moment(run, target, 500 if thorough else 30)


def test_a_full_disk(large):
    target = large.with_name("y.npy")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    result = bn_c_command("run", large, "-o", target, preexec_fn=limit)
    assert (result.returncode, result.stderr) == (2, f"bn-c run: {target}: File too large\n")
    assert list(large.parent.iterdir()) == [large]


def test_a_folder_that_cannot_be_written(folder, capsys):
    assert call("run", folder / "x.npy", "-o", "/proc/y.npy") == 2  # also for root
    assert capsys.readouterr().err == "bn-c run: /proc/y.npy: No such file or directory\n"


PEAK = """
import sys
from bn_c.cli import main
assert main(sys.argv[1:]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(10_000_000, 4), (1, 40_000, 1000), (1, 4, 10_000_000)])
def test_memory_does_not_grow_with_the_array(tmp_path, shape):
    # 160 MB become 80 MB.
    x = sparse(tmp_path / "x.npy", shape)
    command = [sys.executable, "-c", PEAK, "run", x, "-o", tmp_path / "y.npy", "--dtype", "float16"]
    peak = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ELSEWHERE).stdout
    assert int(peak) < 120_000
    assert (tmp_path / "y.npy").stat().st_size > x.stat().st_size // 2
