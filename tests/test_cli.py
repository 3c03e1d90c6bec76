"""The command line, run as users run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import bn_c_command, call

import bn_c
from bn_c import commands


def test_the_demo_falls_and_recovers():
    result = bn_c_command("demo")
    assert result.returncode == 0, result.stderr
    percent = re.compile(r"^(clean|drifted).*?([\d.]+)% +([\d.]+)%$", re.MULTILINE)
    accuracy = {sensor: (float(running), float(batch)) for sensor, running, batch in percent.findall(result.stdout)}
    assert accuracy["clean"][0] >= 97
    assert accuracy["drifted"][0] < 50
    assert accuracy["drifted"][1] >= 97
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "CC BY 4.0" in result.stdout


def test_info():
    result = bn_c_command("info")
    assert result.returncode == 0
    for word in (bn_c.__version__, bn_c.isa, *bn_c.supported_isas(), "numpy", "threads", "python"):
        assert word in result.stdout


def test_version():
    assert bn_c_command("--version").stdout.strip() == f"bn-c {bn_c.__version__}"


@pytest.mark.parametrize("command", ["demo", "info", "bench", "run", "stats", "image"])
def test_help_has_an_example(command):
    result = bn_c_command(command, "--help")
    assert result.returncode == 0
    assert f"bn-c {command}" in result.stdout.split("example:")[1]


@pytest.mark.parametrize(
    "arguments", [[], ["bogus"], ["demo", "--bogus"], ["bench", "--threads", "0"], ["info", "x"], ["stats"]]
)
def test_bad_use_is_one_line_and_status_2(arguments):
    result = bn_c_command(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("bn-c")


def test_a_pipe_whose_reader_leaves():
    command = f"{sys.executable} -m bn_c info | true"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(bn_c.__file__).parents[1],
    )
    assert result.returncode == 0
    assert result.stderr == ""


def test_closed_standard_error(monkeypatch, capsys, tmp_path):
    """A service manager may give none; what belongs there does not go to stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    (tmp_path / "b.npy").write_text("broken")
    assert call("stats", tmp_path) == 1
    assert json.loads(capsys.readouterr().out)["count"] == 2
    sys.stderr.close()


@pytest.mark.parametrize("command", ["info", "demo"])
def test_an_output_that_cannot_be_written(command):
    with Path("/dev/full").open("w") as full:
        result = bn_c_command(command, stdout=full)
    assert result.returncode == 2
    assert result.stderr == f"bn-c {command}: No space left on device\n"


def test_a_missing_extra_is_one_line(monkeypatch, tmp_path, capsys):
    for module in ("PIL", "PIL.Image", "distributed"):
        monkeypatch.setitem(sys.modules, module, None)
    picture = tmp_path / "a.png"
    picture.touch()
    for arguments, extra in (
        (["stats", picture], "cli"),
        (["image", picture, "-o", tmp_path / "y.npy", "--preset", "unit"], "cli"),
        (["stats", picture, "--dask", "tcp://localhost:1"], "dask"),
    ):
        assert call(*arguments) == 2
        assert capsys.readouterr().err.endswith(f": pip install 'bn-c[{extra}]'\n")
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize("tqdm", [True, False])
def test_progress_is_for_terminals(monkeypatch, capsys, tqdm):
    if tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with commands.progress(40, "file") as tell:
            for _ in range(4):
                tell(10)
        said = capsys.readouterr()
        assert said.out == ""
        if not terminal:
            assert said.err == ""
        elif tqdm:
            assert "0/40" in said.err
        else:
            assert said.err == "20 %\n50 %\n70 %\n100 %\n"
