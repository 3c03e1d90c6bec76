"""The command line, run as users run it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bn_c


def bn_c_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "bn_c", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(bn_c.__file__).parents[1],  # not where a source tree may shadow what is installed
        **options,
    )


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


@pytest.mark.parametrize("command", ["demo", "info", "bench"])
def test_help_has_an_example(command):
    result = bn_c_command(command, "--help")
    assert result.returncode == 0
    assert f"bn-c {command}" in result.stdout.split("example:")[1]


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["demo", "--bogus"], ["bench", "--threads", "0"], ["info", "x"]])
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


@pytest.mark.slow
def test_a_quick_benchmark(tmp_path):
    file = tmp_path / "bench.json"
    result = bn_c_command("bench", "--quick", "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "copy" in result.stdout
    assert json.loads(file.read_text())
