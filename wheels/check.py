"""Checks wheels.

    python wheels/check.py [WHEEL...]

Each by itself: tags and the libraries they allow, size, contents, version, and that no instruction which the oldest
CPU lacks is outside the modules chosen at run time. Needs pyelftools and llvm-objdump.

Without any: whether the wheels in this script's folder are those of SHA256SUMS, and, which is only a message, whether
the sources have changed since. The exit status is 1 if anything is wrong.
"""

import argparse
import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE = Path(__file__).parents[1]
MAX_SIZE = 500_000
# What a wheel may be tagged with, and the newest C library that its users may be asked for.
TAG = re.compile(r"(manylinux|musllinux)(?:_(\d+)_(\d+)|(1|2010|2014))_(\w+)")
OLD_NAMES = {"1": (2, 5), "2010": (2, 12), "2014": (2, 17)}
LIBC = {"manylinux": "gnu", "musllinux": "musl"}
NEWEST = {"manylinux": (2, 17), "musllinux": (1, 2)}
NEEDED = {
    "manylinux": r"(libc\.so\.6|libm\.so\.6|libpthread\.so\.0|ld-linux-[\w-]+\.so\.\d)",
    "musllinux": r"libc\.musl-\w+\.so\.1",
}
# llvm-objdump prints <unknown> for what an aarch64 CPU lacks, but knows every instruction of x86-64. Above SSE2 are
# all VEX and EVEX mnemonics (v...), masks (k...), bit manipulation, SSE3 to SSE4.2 and encryption. tzcnt is not
# among them: as `rep bsf` it runs everywhere.
DISASSEMBLE = {"x86_64": [], "aarch64": ["--mcpu=cortex-a53", "--mattr=-crc,-crypto"]}
ABOVE = {
    "x86_64": r"""v(?!err|erw)\w+ | k(add|and|mov|not|or|shift|test|unpck|x)\w+ | andn | bextr | bls(i|r|msk)\w* | bzhi
        | mulx | pdep | pext | rorx | sarx | shlx | shrx | ad[co]x | popcnt | lzcnt | movbe | crc32 | addsubp[sd]
        | h(add|sub)p[sd] | lddqu | mov(d|sh|sl)dup | ph(add|sub|minpos)\w+ | pabs\w | psign\w | pshufb | palignr
        | pmaddubsw | pmulhrsw | p?blend\w+ | dpp[sd] | extractps | insertps | round\w+ | ptest | pmov[sz]x\w+
        | pm(ax|in)(s[bd]|u[wd]) | pmul(dq|ld) | packusdw | pcmp(eqq|gtq|[ei]str\w) | p(ext|ins)r[bdq] | mpsadbw
        | movntdqa | aes\w+ | pclmul\w+ | sha(1|256)\w+""",
    "aarch64": "<unknown>",
}


def constant(text: str, name: str):
    """The value of a constant of Python source, which is not run."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def above_baseline(module: Path, arch: str) -> list[str]:
    """The instructions that the oldest CPU of this architecture lacks."""
    known = [f"llvm-objdump{version}" for version in ("", *(f"-{n}" for n in range(30, 13, -1)))]
    objdump = next(filter(None, map(shutil.which, known)), None)
    if not objdump:
        sys.exit("llvm-objdump is missing (Debian's package llvm has it)")
    command = [objdump, "-d", "--no-show-raw-insn", "--x86-asm-syntax=intel", *DISASSEMBLE[arch], str(module)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^ *([0-9a-f]+):\s+(\S+)", text, re.MULTILINE)
    if len(instructions) < 1000:
        sys.exit(f"{objdump} does not disassemble {module.name}")
    above = re.compile(ABOVE[arch], re.VERBOSE)
    return [f"{mnemonic} at {address}" for address, mnemonic in instructions if above.fullmatch(mnemonic)]


def elf_problems(module: Path, arch: str, libc: str, newest: tuple[int, ...]):
    """What is wrong with how a module is linked."""
    from elftools.elf.elffile import ELFFile

    with module.open("rb") as file:
        elf = ELFFile(file)
        if elf["e_machine"] != {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}[arch]:
            yield f"is for {elf['e_machine']}"
        for entry in elf.get_section_by_name(".dynamic").iter_tags():
            if entry.entry.d_tag == "DT_NEEDED" and not re.fullmatch(NEEDED[libc], entry.needed):
                yield f"needs {entry.needed}"
            if entry.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                yield f"has a {entry.entry.d_tag}"
        stacks = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_GNU_STACK"]
        if not stacks or stacks[0]["p_flags"] & 1:
            yield "wants an executable stack"
        versions = elf.get_section_by_name(".gnu.version_r")
        for _, symbols in versions.iter_versions() if versions else ():
            for symbol in symbols:
                number = re.fullmatch(r"GLIBC_([\d.]+)", symbol.name)
                if libc == "musllinux" or not number or tuple(map(int, number[1].split("."))) > newest:
                    yield f"needs {symbol.name}"


def problems(wheel: Path):
    """What is wrong with a wheel, one line each."""
    if not zipfile.is_zipfile(wheel) or wheel.name.count("-") != 4:
        yield "is not a wheel"
        return
    _, version, _, abi, platforms = wheel.stem.split("-")
    tags = [TAG.fullmatch(tag) for tag in platforms.split(".")]
    if not all(tags) or len({(tag[1], tag[5]) for tag in tags}) > 1 or tags[0][5] not in ABOVE:
        yield f"platform {platforms}: expected manylinux or musllinux, for {' or '.join(ABOVE)}"
        return
    libc, arch = tags[0][1], tags[0][5]
    # With several tags the first C library counts: the wheel says that it runs there.
    oldest = min(OLD_NAMES[tag[4]] if tag[4] else (int(tag[2]), int(tag[3])) for tag in tags)
    if oldest > NEWEST[libc]:
        yield f"tagged for {libc} {oldest}, which is above {NEWEST[libc]}"
    if wheel.stat().st_size >= MAX_SIZE:
        yield f"{wheel.stat().st_size} bytes, expected less than {MAX_SIZE}"

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        root = Path(folder)
        expected = constant((SOURCE / "bn_c/__init__.py").read_text(), "__version__")
        inside = root / "bn_c/__init__.py"
        found = constant(inside.read_text(), "__version__") if inside.exists() else None
        if not version == found == expected:
            yield f"version {version} in the name, {found} in bn_c, {expected} in the sources"
        for name in ("py.typed", "__init__.pxd", "include/bn_c/bn_c.h"):
            if not (root / "bn_c" / name).exists():
                yield f"{name} is missing"
        if libraries := [path.name for path in root.rglob("*.libs")]:
            yield f"brings libraries: {', '.join(libraries)}"

        isas = constant((SOURCE / "setup.py").read_text(), "ISAS")[arch]
        suffix = "abi3.so" if abi == "abi3" else f"cpython-{abi[2:]}-{arch}-linux-{LIBC[libc]}.so"
        flags = {
            f"bn_c/_core.{suffix}": [],
            **{
                f"bn_c/_kernels_{isa}.{suffix}": [flag for flag in isas[isa] if flag.startswith("-march")]
                for isa in isas
            },
        }
        files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
        binaries = {name: path for name, path in files.items() if path.read_bytes()[:4] == b"\x7fELF"}
        yield from (f"{name} is missing" for name in sorted(flags.keys() - binaries))
        yield from (f"{name} does not belong here" for name in sorted(binaries.keys() - flags))
        for name in sorted(flags.keys() & binaries):
            path = binaries[name]
            yield from (f"{name} {problem}" for problem in elf_problems(path, arch, libc, oldest))
            above = above_baseline(path, arch)
            if above and not flags[name]:
                yield f"{name} has {len(above)} instructions above the baseline: {', '.join(above[:4])}"
            if flags[name] and not above:
                yield f"{name} was built without its flags"


def sums_problems(folder: Path):
    """How the wheels of a folder differ from its SHA256SUMS; prints which sources are not those they were made of."""
    if not any(folder.glob("*.whl")) and not (folder / "SHA256SUMS").exists():
        print("there are no wheels here; wheels/build makes them")
        return
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = dict(reversed(line.split("  ")) for line in lines if not line.startswith("# "))
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.whl")}
    yield from (f"{name}: not as in SHA256SUMS" for name in sorted(sums.keys() & found) if sums[name] != found[name])
    yield from (f"{name}: in SHA256SUMS, but not here" for name in sorted(sums.keys() - found))
    yield from (f"{name}: not in SHA256SUMS" for name in sorted(found.keys() - sums))

    made_of = {line.split("\t")[1]: line.removeprefix("# ") for line in lines if line.startswith("# ")}
    now = subprocess.run(["git", "ls-tree", "HEAD", *made_of], cwd=SOURCE, capture_output=True, text=True, check=True)
    if changed := sorted(name for name, line in made_of.items() if line not in now.stdout.splitlines()):
        print(f"THE WHEELS ARE OLDER THAN THE SOURCES: {', '.join(changed)} changed; wheels/build makes new ones")


def main() -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", nargs="*", type=Path, metavar="WHEEL")
    wheels = parser.parse_args().wheels
    if not wheels:
        found = list(sums_problems(Path(__file__).parent))
        print(*found, sep="\n", end="\n" if found else "")
        return bool(found)
    failed = False
    for wheel in wheels:
        found = list(problems(wheel))
        failed |= bool(found)
        print(f"{wheel.name}: {f'{wheel.stat().st_size} bytes, ok' if not found else ''}", *found, sep="\n    ")
    return failed


if __name__ == "__main__":
    sys.exit(main())
