"""`bn-c bench` and the table of peers, on cases that take no time."""

import json
import sys
from dataclasses import replace

import bench_peers
import numpy as np
import pytest
from command_line import bn_c_command, call

import bn_c
from bn_c import _dispatch, bench, commands
from bn_c.bench import ALLOC, OUT, PEERS, Case

CASES = (
    Case("rows", (7, 5), quick=True),
    Case("planes", (2, 3, 4, 5)),
    Case("halves", (2, 4, 5, 3), -1, dtype="float16"),
    Case("fused", (2, 3, 4, 5), fused=True),
    Case("planes", (2, 3, 4, 5), batch=True),
    Case("fused", (2, 4, 5, 3), -1, batch=True, fused=True),
    Case("frame", (1, 3, 6, 7), dtype="uint8"),
)
INSTALLED = [peer.name for peer in PEERS if peer.version]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """One round of each case."""
    monkeypatch.setattr(commands.bench, "CASES", CASES)
    monkeypatch.setattr(commands.bench, "SECONDS", 0)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SAMPLE", 1e-5)


@pytest.fixture
def alone(monkeypatch):
    """As where NumPy is all that is installed."""
    for module in ("torch", "onnx", "onnxruntime", "cv2", "tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)


def expected_peers(case):
    wanted = ["NumPy", "NumPy folded", "PyTorch"]
    if case.frames:
        wanted.append("OpenCV")
    elif case.axis == 1 and not case.batch:
        wanted.append("ONNX Runtime")
    return {name for name in wanted if name in INSTALLED}


def test_every_peer_does_the_same_work(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert call("bench", "--json", file) == 0
    found = json.loads(file.read_text())
    assert found["about"]["numpy"] == np.__version__
    assert [each["case"]["name"] for each in found["cases"]] == [case.name for case in CASES]
    for case, each in zip(CASES, found["cases"], strict=True):
        assert each["results"].keys() == {OUT, ALLOC, *expected_peers(case)}
        assert each["copy"] > 0
        for name, result in each["results"].items():
            assert result["seconds"] > 0
            assert 0 <= result["error"] < (6 if name in (OUT, ALLOC) else 100), (case, name)
    printed = capsys.readouterr().out.splitlines()
    for case in CASES:
        assert sum(line.startswith(f"{case.label} ") for line in printed) == sum(c.label == case.label for c in CASES)
        assert case.group in printed


def test_a_wrong_result_is_seen():
    for case in CASES:
        a = bench.arrays(case)
        way = bench.ours(case, a, 1)[OUT]
        wrong = replace(way, read=lambda y: y * (1 + 64 * np.finfo(y.dtype).eps))
        results = bench.measure(case, a, {OUT: way, "wrong": wrong, "nothing": bench.Way(lambda a=a: a.out)}, 0).results
        assert results[OUT].error < 6 < results["wrong"].error
        assert np.isnan(results["nothing"].error)


def test_with_numpy_alone(alone, tmp_path, capsys):
    assert call("bench", "--quick", "--json", tmp_path / "bench.json") == 0
    said = capsys.readouterr()
    assert "left out      PyTorch, ONNX Runtime, OpenCV: pip install 'bn-c[bench]'\n" in said.out
    assert "NumPy* folded  error" in said.out
    assert said.err == ""
    assert call("bench", "--plot", tmp_path / "bench.png") == 2
    assert capsys.readouterr().err == "bn-c bench: needs matplotlib: pip install 'bn-c[bench]'\n"
    assert not (tmp_path / "bench.png").exists()


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "bench.png"
    assert call("bench", "--plot", file) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_for_terminals(monkeypatch, capsys, terminal):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert call("bench") == 0
    said = capsys.readouterr()
    assert ("0/7" in said.err) == terminal
    assert "planes 2x[3]x4x5" in said.out


def test_too_large_for_the_memory(monkeypatch, capsys):
    monkeypatch.setattr(commands.bench, "CASES", (Case("huge", (1 << 40, 64)), *CASES))
    assert call("bench") == 0
    printed = capsys.readouterr().out
    assert "huge 1099511627776x[64]        left out: needs 1342177280 MB of memory\n" in printed
    assert CASES[0].label in printed


@pytest.mark.parametrize(
    ("option", "said"),
    [("--plot bench.pdf", "FILE.png"), ("--json no/bench.json", "folder"), ("--threads 0", "positive")],
)
def test_bad_options_are_told_before_the_work(option, said):
    result = bn_c_command("bench", *option.split())
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr


def test_the_table_of_peers(monkeypatch, capsys):
    changes = [(case, change, friendly) for case, change, friendly in bench_peers.LAYOUTS if change]
    small = [(replace(c, shape=(2, 3, 4, 5)), change, replace(f, shape=(2, 3, 4, 5))) for c, change, f in changes]
    for name, value in {"SPEED": CASES, "LAYOUTS": small, "FAR": Case("far", (500, 4)), "SECONDS": 0}.items():
        monkeypatch.setattr(bench_peers, name, value)
    try:
        bench_peers.main()
    finally:
        _dispatch.use(bn_c.isa)
    tables = [table.splitlines() for table in capsys.readouterr().out.split("\n\n") if table.startswith("|")]
    assert len(tables) == 5 + 1 + 2 + 2
    for table in tables:
        assert len({line.count(" | ") for line in (table[0], *table[2:])}) == 1
        assert "nan" not in "".join(table)
