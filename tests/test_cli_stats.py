"""`bn-c stats`: mean and std of files, and their reduction on a cluster."""

import functools
import json
import operator
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
from command_line import call, start

import bn_c
from bn_c.commands import files


def printed(capsys, *arguments, status=0):
    """What a command printed, as JSON, and on stderr."""
    assert call("stats", *arguments) == status
    output = capsys.readouterr()
    return json.loads(output.out), output.err


def save(file, pixels):
    pytest.importorskip("PIL.Image").fromarray(pixels).save(file)


@pytest.fixture
def pictures(tmp_path, rng):
    """500 small pictures in folders, and all of their pixels."""
    folder = tmp_path / "pictures"
    pixels = []
    for i in range(500):
        file = folder / f"class {i % 3}" / f"{i}.{('png', 'BMP', 'ppm')[i % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        one = rng.integers(0, 256, (*rng.integers(1, 30, 2), 3), dtype=np.uint8)
        save(file, one)
        pixels.append(one.reshape(-1, 3))
    (folder / "labels.csv").write_text("not a picture")
    return folder, np.concatenate(pixels)


def test_pictures(pictures, capsys):
    folder, pixels = pictures
    result, said = printed(capsys, folder)
    exact = pixels.astype(np.float64) / 255
    assert said == ""
    assert list(result) == ["mean", "std", "scale", "count"]
    assert result["count"] == len(pixels)
    assert result["scale"] == 1 / 255
    assert np.allclose(result["mean"], exact.mean(0), rtol=1e-9, atol=0)
    assert np.allclose(result["std"], exact.std(0), rtol=1e-9, atol=0)
    assert printed(capsys, folder, "--jobs", 2)[0] == result


@pytest.mark.parametrize("block", [1, 7, files.BLOCK])
@pytest.mark.parametrize("dtype", [*oracle.FLOATS, *oracle.INTEGERS])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_arrays(monkeypatch, tmp_path, rng, capsys, dtype, axis, block):
    monkeypatch.setattr(files, "BLOCK", block)
    shape = [4, 5, 6]
    parts = []
    for n in range(3):
        shape[axis - 1] = n
        parts.append(oracle.values(rng, shape, dtype))
        np.save(tmp_path / f"{n}.npy", np.asarray(parts[-1], order="CF"[n % 2]))
    result, _ = printed(capsys, tmp_path, "--axis", axis)
    x = np.concatenate(parts, axis - 1)
    scale = 1 / 255 if dtype == "u1" else 1.0
    assert result["scale"] == scale
    mean, std = np.array(result["mean"]) / scale, np.array(result["std"]) / scale
    oracle.assert_statistics(bn_c.BatchStats.of(result["count"], mean, std**2 * result["count"]), x, axis)


def test_what_does_not_fit_is_left_out(tmp_path, rng, capsys):
    x = oracle.values(rng, (5, 3))
    np.save(tmp_path / "b.npy", x)
    good, _ = printed(capsys, tmp_path)
    (tmp_path / "a.npy").write_text("broken")
    np.save(tmp_path / "c.npy", oracle.values(rng, (5, 4)))
    np.save(tmp_path / "d.npy", oracle.values(rng, (5, 3), "u1"))
    np.save(tmp_path / "e.npy", x.astype(float))
    np.save(tmp_path / "f.npy", x[:0])
    np.save(tmp_path / "g.npy", x[:, 0])
    for jobs in (1, 2):
        result, said = printed(capsys, tmp_path, "--jobs", jobs, status=1)
        assert result == good
        assert [line.split(":")[1].strip()[-5:] for line in said.splitlines()] == [f"{c}.npy" for c in "acdeg"]
        assert call("stats", tmp_path, "--strict", "--jobs", jobs) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err == f"bn-c stats: {tmp_path}/a.npy: expected a .npy or .npz file\n"
    (tmp_path / "a.npy").unlink()
    assert call("stats", tmp_path, "--strict") == 2
    assert "c.npy: expected 3 channels" in capsys.readouterr().err


def test_broken_pictures_are_left_out(tmp_path, rng, capsys):
    save(tmp_path / "good.png", rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    good, _ = printed(capsys, tmp_path)
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.webp").write_text("no picture")
    save(tmp_path / "deep.png", np.zeros((3, 3), np.uint16))
    result, said = printed(capsys, tmp_path, status=1)
    assert result == good
    names = ("cut.png", "deep.png", "empty.jpg", "text.webp")
    assert all(name in line for name, line in zip(names, said.splitlines(), strict=True))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_rgb(tmp_path, rng, capsys, mode):
    image = pytest.importorskip("PIL.Image").fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "a.tiff")
    result, _ = printed(capsys, tmp_path / "a.tiff")
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3) / 255
    assert np.allclose(result["mean"], pixels.mean(0), rtol=1e-12)


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--jobs", "2", "--dask", "tcp://h:1"], ["--axis", "a"], []])
def test_errors_are_one_line(tmp_path, capsys, arguments):
    for path in (tmp_path, tmp_path / "absent"):
        assert call("stats", path, *arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1


@pytest.mark.parametrize(("shape", "axis"), [((), 1), ((5,), 1), ((2, 3, 4), 3), ((2, 3, 4), -4)])
def test_an_axis_that_is_not_there(tmp_path, capsys, shape, axis):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    assert call("stats", tmp_path / "a.npy", "--axis", axis) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"left out: {tmp_path}/a.npy: {'axis' if shape else 'x'}: expected")


def test_nothing_to_measure(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((0, 3), np.float32))
    assert call("stats", tmp_path) == 2
    (tmp_path / "a.npy").write_text("broken")
    assert call("stats", tmp_path) == 2
    assert capsys.readouterr().out == ""


@pytest.fixture
def long_work(tmp_path):
    """Two files that take a while: a process works on each batch of them."""
    with (tmp_path / "0.npy").open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 34, 3)}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + (3 << 34))
    for i in range(1, 32):
        (tmp_path / f"{i}.npy").symlink_to("0.npy")
    return tmp_path


def children(process):
    """The processes that a process has started, in any of its threads."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return [pid for task in tasks for pid in (task / "children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_processes_start(tmp_path, monkeypatch, number, status):
    class Finalized:
        """Exceptions are lost in its finalizer, during which another thread receives the signal."""

        def __del__(self):
            thread.submit(signal.raise_signal, number).result()

    def finalizing(*arguments):
        Finalized()
        return start_processes(*arguments)

    start_processes = ProcessPoolExecutor.map
    monkeypatch.setattr(ProcessPoolExecutor, "map", finalizing)
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(int).result()  # started with no signal blocked
            assert call("stats", tmp_path, "--jobs", 2) == status
    finally:
        signal.signal(number, before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("delay", [0, 2])
def test_no_process_stays_behind(long_work, number, status, delay):
    with start("stats", long_work, "--jobs", "2", start_new_session=True) as process:
        while len(workers := children(process)) < 3:  # with multiprocessing's resource tracker
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        # A terminal sends it to all of them, others to the one they know.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        output = process.communicate(timeout=60)
    assert process.returncode == status
    # multiprocessing has something to say then, and of workers that were about to start.
    assert output == ("", "") or number == signal.SIGKILL or (delay == 0 and output[0] == "")
    until = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two workers, each a process."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


def test_on_a_dask_cluster(cluster, tmp_path, rng, capsys):
    for i in range(40):
        np.save(tmp_path / f"{i}.npy", oracle.values(rng, (3, 4, i), offset=5))
    single, _ = printed(capsys, tmp_path)
    result, said = printed(capsys, tmp_path, "--dask", cluster.scheduler_address)
    assert said == ""
    assert result["count"] == single["count"]
    for name in ("mean", "std"):
        assert np.allclose(result[name], single[name], rtol=1e-12, atol=0)
    (tmp_path / "7.npy").write_text("broken")
    assert call("stats", tmp_path, "--dask", cluster.scheduler_address, "--strict") == 2
    assert capsys.readouterr().err == f"bn-c stats: {tmp_path}/7.npy: expected a .npy or .npz file\n"


def test_the_documented_reduction(cluster, tmp_path, rng):
    files = []
    for i in range(20):
        files.append(str(tmp_path / f"{i}.npy"))
        np.save(files[-1], oracle.values(rng, (10, 4, 9), offset=5))
    from distributed import Client

    def part(file):
        return bn_c.batch_stats(np.load(file))

    with Client(cluster) as client:
        parts = client.map(part, files)
        total = client.submit(functools.reduce, operator.add, parts).result()
        assert len(client.nthreads()) == 2, "workers are missing"
    here = functools.reduce(operator.add, map(part, files))
    assert total.count == here.count == 20 * 10 * 9
    assert np.allclose(total.mean, here.mean, rtol=1e-12, atol=0)
    assert np.allclose(total.var, here.var, rtol=1e-12, atol=0)
    oracle.assert_statistics(total, np.concatenate([np.load(file) for file in files]))


def test_no_scheduler(capsys, tmp_path):
    pytest.importorskip("distributed")
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    assert call("stats", tmp_path, "--dask", "bogus://localhost") == 2
    assert capsys.readouterr().err.startswith("bn-c stats: --dask: no scheduler at 'bogus://localhost'")
