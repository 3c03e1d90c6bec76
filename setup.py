"""The kernels are one source, compiled once per instruction set; everything else is in pyproject.toml."""

import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.egg_info import manifest_maker

# What the sdist holds besides the package; the usual MANIFEST.in would be one more file at the top.
manifest_maker.template = ".manifest"

# Each instruction set and the compiler flags that only its own kernel module may see, baseline first.
ISAS = {
    "x86_64": {
        "x86_64": [],
        "x86_64_v3": ["-march=x86-64-v3"],
        "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=256"],
    },
    # Small cores run instructions in their order: loops must offer several that do not wait for each other.
    "aarch64": {"aarch64": ["-funroll-loops"]},
}
# Contraction would round differently where the CPU has FMA; errno and traps, which nothing here reads,
# keep loops from being vectorised. None of the three changes a result.
FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Nothing throws through C: tables for unwinding it would be 12 kB of a wheel.
FLAGS += ["-fno-asynchronous-unwind-tables"]
# The same short loops took 1.2 to 1.45 x as long where what is before them had moved them within a line.
FAST = ["-O3", "-falign-functions=64", "-falign-loops=64"]
# Mostly calls: small functions inlined made a wheel 6 kB larger and calls no faster. Aligned ones take 0.20 us whatever
# is before them, or up to 0.23; loops over channels that are not vectorised made training (9, 2048) 1.2 x slower.
SMALL = ["-O2", "-fno-inline-small-functions", "-falign-functions=64", "-ftree-vectorize"]
# Not by importing it: where this is cross-compiled it is another architecture's.
NUMPY_INCLUDE = Path(find_spec("numpy").origin).parent / "_core" / "include"
# The oldest NumPy that the package runs with, and what its headers need not declare.
NUMPY = [("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION"), ("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION")]
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "freethreading_compatible": True,
    "binding": False,  # nobody inspects these functions; 7 kB of a wheel
    "auto_pickle": False,  # layers and pictures say themselves what they are made from again
}

INCLUDED = sorted(map(str, [*Path("bn_c").glob("*.pxd"), *Path("include/bn_c").glob("*.h")]))

machine = sysconfig.get_platform().rsplit("-", 1)[-1].replace("arm64", "aarch64")
limited = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")


def extension(module: str, source: str, flags: list[str]) -> Extension:
    """One module, with C of its own so that sources compiled several times do not meet."""
    built = cythonize(
        Extension(
            f"bn_c.{module}",
            [f"bn_c/{source}.pyx"],
            include_dirs=["include", str(NUMPY_INCLUDE)],
            depends=[f"bn_c/{source}.pyx", *INCLUDED],
            define_macros=[*NUMPY, *([("Py_LIMITED_API", "0x030B0000")] if limited else [])],
            py_limited_api=limited,
        ),
        build_dir=f"build/{module}",
        compiler_directives=DIRECTIVES,
    )[0]
    # Set here, as Cython drops `optional` and hands the flags on to the next module of the same source.
    built.extra_compile_args = ["-g0", *FLAGS, *flags]
    built.optional = any(flag.startswith("-march") for flag in flags)
    return built


isas = ISAS.get(machine, {"generic": []})
setup(
    ext_modules=[
        extension("_core", "_core", SMALL),
        # A compiler too old for a set leaves it out; `bn_c.supported_isas()` then does not list it.
        *(extension(f"_kernels_{isa}", "_kernels", [*FAST, *flags]) for isa, flags in isas.items()),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
)
