"""Wheels made wrong on purpose, which check.py has to refuse.

WHEELS=folder pytest wheels/test_check.py
"""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import check
import pytest
from elftools.elf.elffile import ELFFile

WHEELS = Path(os.environ["WHEELS"])


@pytest.fixture(params=["manylinux2014_x86_64", "musllinux_1_2_aarch64"])
def wheel(request):
    """An abi3 wheel that is right."""
    (path,) = WHEELS.glob(f"*-abi3-{request.param}*.whl")
    return path


@pytest.fixture
def disassembled(monkeypatch):
    """Spares the time to disassemble what is not looked at."""
    monkeypatch.setattr(check, "above_baseline", lambda path, arch: ["vaddps"] * path.name.count("_v"))


@pytest.fixture
def contents(wheel, tmp_path):
    folder = tmp_path / "contents"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def found(contents, name):
    """What is wrong with a wheel of these contents under this name."""
    path = contents.parent / name
    shutil.make_archive(str(path), "zip", contents)
    path.with_name(path.name + ".zip").rename(path)
    return "\n".join(check.problems(path))


def test_right(wheel, contents):
    assert list(check.problems(wheel)) == []
    assert found(contents, wheel.name) == ""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("-manylinux2014", "-manylinux_2_28", "above"),
        ("-musllinux_1_2", "-musllinux_1_3", "above"),
        ("-manylinux2014", "-manylinux_2_16", "needs GLIBC_2.17"),
        ("-manylinux2014", "-musllinux_1_2", "needs "),
        ("-musllinux_1_2", "-manylinux2014", "needs libc.musl"),
        ("-manylinux2014", "-linux", "expected manylinux or musllinux"),
        ("-0.1", "-9.1", "version 9.1"),
    ],
)
def test_name(wheel, contents, disassembled, old, new, problem):
    name = wheel.name.partition(".manylinux")[0].removesuffix(".whl") + ".whl"
    if old not in name or ("GLIBC" in problem and "aarch64" not in name):
        pytest.skip("of another name")
    assert problem in found(contents, name.replace(old, new))


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (lambda root: (root / "bn_c/py.typed").unlink(), "py.typed is missing"),
        (lambda root: (root / "bn_c/include/bn_c/bn_c.h").unlink(), "include/bn_c/bn_c.h is missing"),
        (lambda root: (root / "bn_c/_core.abi3.so").unlink(), "_core.abi3.so is missing"),
        (lambda root: shutil.copy(root / "bn_c/_core.abi3.so", root / "bn_c/other.so"), "other.so does not belong"),
        (lambda root: (root / "bn_c.libs").mkdir(), "brings libraries: bn_c.libs"),
        (lambda root: (root / "data").write_bytes(os.urandom(500_000)), "expected less than 500000"),
    ],
)
def test_contents(wheel, contents, disassembled, wrong, problem):
    wrong(contents)
    assert problem in found(contents, wheel.name)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--add-needed", "libgomp.so.1"], "needs libgomp.so.1"),
        (["--set-rpath", "/opt/lib"], "has a DT_RUNPATH"),
        (["--set-rpath", "/opt/lib", "--force-rpath"], "has a DT_RPATH"),
        (["--set-execstack"], "wants an executable stack"),
    ],
)
def test_linking(wheel, contents, disassembled, options, problem):
    subprocess.run(["patchelf", *options, contents / "bn_c/_core.abi3.so"], check=True)
    assert problem in found(contents, wheel.name)


@pytest.mark.parametrize(
    ("arch", "code", "instruction"),
    [
        ("x86_64", "c5f877", "vzeroupper"),
        ("x86_64", "62f17c4858c0", "vaddps"),
        ("x86_64", "f30fb8c0", "popcnt"),
        ("x86_64", "660f3800c0", "pshufb"),
        ("aarch64", "000020b8", "<unknown>"),  # ldadd, of ARMv8.1
        ("aarch64", "0028e01e", "<unknown>"),  # fadd of halves, of ARMv8.2
    ],
)
def test_instruction_above_the_baseline(wheel, contents, arch, code, instruction):
    if arch not in wheel.name:
        pytest.skip("of another architecture")
    path = contents / "bn_c/_core.abi3.so"
    assert check.above_baseline(path, arch) == []
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        offset = ELFFile(file).get_section_by_name(".text")["sh_offset"]
    data[offset : offset + len(code) // 2] = bytes.fromhex(code)
    path.write_bytes(data)
    assert [name.split()[0] for name in check.above_baseline(path, arch)] == [instruction]


def test_kernels_of_another_set(wheel, contents):
    if "x86_64" not in wheel.name:
        pytest.skip("has only the baseline")
    baseline, v3 = (contents / f"bn_c/_kernels_{isa}.abi3.so" for isa in ("x86_64", "x86_64_v3"))
    shutil.copy(baseline, contents / "copy")
    shutil.copy(v3, baseline)
    shutil.move(contents / "copy", v3)
    problems = found(contents, wheel.name)
    assert "_kernels_x86_64.abi3.so has" in problems
    assert "_kernels_x86_64_v3.abi3.so was built without its flags" in problems


def test_sums(tmp_path, capsys):
    for path in [*WHEELS.glob("*.whl"), WHEELS / "SHA256SUMS"]:
        shutil.copy(path, tmp_path)
    assert list(check.sums_problems(tmp_path)) == []
    first, second = sorted(tmp_path.glob("*.whl"))[:2]
    first.write_bytes(first.read_bytes() + b"\0")
    second.rename(tmp_path / "other.whl")
    (tmp_path / "SHA256SUMS").write_text(
        (tmp_path / "SHA256SUMS").read_text().replace("# 100644 blob ", "# 100644 blob 0")
    )
    capsys.readouterr()
    assert [problem.partition(": ")[2] for problem in check.sums_problems(tmp_path)] == [
        "not as in SHA256SUMS", "in SHA256SUMS, but not here", "not in SHA256SUMS",
    ]  # fmt: skip
    assert "OLDER THAN THE SOURCES: pyproject.toml, setup.py changed" in capsys.readouterr().out
