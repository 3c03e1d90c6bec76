"""A guard against slow-downs that noise cannot trip: instructions that the main loops execute per element.

    python tests/instructions.py            compares with tests/instructions.json and fails beyond 5 %, either way
    python tests/instructions.py --write    stores what is counted, for the compiler that made the kernels

Valgrind's callgrind counts, so AVX-512, which it does not know, is left out. Each call is counted on N and 2 N items:
the difference is free of what a call costs. Figures hold for one compiler; under another they are only printed.
"""

import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

import bn_c
from bn_c import _core

STORED = Path(__file__).with_suffix(".json")
TOLERANCE = 0.05
ISAS = [isa for isa in bn_c.supported_isas() if isa != "x86_64_v4"]
# What `_core.use` takes as the size of the caches: outputs are never larger, or always.
IN_CACHE, PAST_IT = 1 << 40, 0
# Python adapts to the first calls, and does some work of its own now and then: the median of several.
WARM_UP, REPEATS = 20, 5


def ones(shape, dtype):
    """From a cache line on: what is executed hangs on that."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    storage = np.empty(size + 64, np.uint8)
    start = -storage.ctypes.data % 64
    array = storage[start : start + size].view(dtype).reshape(shape)
    array[...] = 1
    return array


def inference(x, axis=1, in_place=False, in_double=False):
    layer = bn_c.BatchNorm(x.shape[axis], axis=axis)
    if in_double:
        layer.gamma = np.where(np.arange(x.shape[axis]) == 3, 1e-38, 1)
    out = x if in_place else ones(x.shape, x.dtype if x.dtype.kind == "f" else np.float32)
    return lambda n: layer(x[:n], out=out[:n])


def fused(x):
    layer = bn_c.BatchNorm(x.shape[1], activation="relu")
    residual, out = (ones(x.shape, x.dtype) for _ in range(2))
    return lambda n: layer(x[:n], residual=residual[:n], out=out[:n])


def statistics(x, axis=1, zeros=False, mask=None, gaps=False):
    x = np.repeat(x, 2, -1)[..., ::2] if gaps else x
    np.moveaxis(x, axis, 0)[3] = not zeros
    return lambda n: bn_c.batch_stats(x[:n], axis=axis, mask=None if mask is None else mask[:n])


def pictures(x):
    normalizer = bn_c.ImageNormalizer.imagenet()
    out = ones((len(x), 3, *x.shape[1:3]), np.float32)
    return lambda n: normalizer(x[:n], out=out[:n])


def folded(x, axis=1):
    """What NumPy makes of it, for comparison: no loops of ours, so printed only."""
    shape = [1] * x.ndim
    shape[axis] = -1
    scale, shift = (np.full(x.shape[axis], value, x.dtype).reshape(shape) for value in (2, 3))
    out = ones(x.shape, x.dtype)
    return lambda n: np.add(np.multiply(x[:n], scale, out=out[:n]), shift, out=out[:n])


PLANES, ROWS, SHORT = (4, 16, 56, 56), (4, 28, 28, 64), (64, 64, 7, 7)
ALL_IMAGES, SOME_ELEMENTS = ones((4, 1, 1), bool), np.random.default_rng(0).random((4, 56, 56)) < 0.7
NUMPY = "NumPy's folded expression"
# Name: what makes the call, shape and dtype of x, the size of the caches.
WORKS = {
    "inference: planes": (inference, PLANES, "float32", IN_CACHE),
    "inference: planes, in place": (partial(inference, in_place=True), PLANES, "float32", IN_CACHE),
    "inference: planes, past the caches": (inference, PLANES, "float32", PAST_IT),
    "inference: planes, residual, relu": (fused, PLANES, "float32", IN_CACHE),
    "inference: planes of halves": (inference, PLANES, "float16", IN_CACHE),
    "inference: short planes": (inference, SHORT, "float32", IN_CACHE),
    "inference: short planes of halves": (inference, SHORT, "float16", IN_CACHE),
    "inference: rows": (partial(inference, axis=-1), ROWS, "float32", IN_CACHE),
    "inference: rows of 256": (partial(inference, axis=-1), (8, 7, 7, 256), "float32", IN_CACHE),
    "inference: rows, in place": (partial(inference, axis=-1, in_place=True), ROWS, "float32", IN_CACHE),
    "inference: rows of halves": (partial(inference, axis=-1), ROWS, "float16", IN_CACHE),
    "inference: planes of bytes": (inference, PLANES, "uint8", IN_CACHE),
    "inference: planes, one in double": (partial(inference, in_double=True), PLANES, "float32", IN_CACHE),
    "inference: rows, some in double": (partial(inference, axis=-1, in_double=True), ROWS, "float32", IN_CACHE),
    "statistics: planes": (statistics, PLANES, "float32", IN_CACHE),
    "statistics: planes, every second": (partial(statistics, gaps=True), PLANES, "float32", IN_CACHE),
    "statistics: planes of halves": (statistics, PLANES, "float16", IN_CACHE),
    "statistics: short planes": (statistics, SHORT, "float32", IN_CACHE),
    "statistics: planes of few": (partial(statistics, axis=0), (1024, 7, 7), "float32", IN_CACHE),
    "statistics: rows": (partial(statistics, axis=-1), ROWS, "float32", IN_CACHE),
    "statistics: planes of bytes": (statistics, PLANES, "uint8", IN_CACHE),
    "statistics: planes of 16 bits": (statistics, PLANES, "uint16", IN_CACHE),
    "statistics: planes, masked": (partial(statistics, mask=ALL_IMAGES), PLANES, "float32", IN_CACHE),
    "statistics: planes, masked in part": (partial(statistics, mask=SOME_ELEMENTS), PLANES, "float32", IN_CACHE),
    "statistics: rows, some of zeros": (partial(statistics, axis=-1, zeros=True), ROWS, "float32", IN_CACHE),
    "pictures: RGB to planes": (pictures, (8, 128, 128, 3), "uint8", IN_CACHE),
    f"{NUMPY}: planes": (folded, PLANES, "float32", IN_CACHE),
    f"{NUMPY}: rows": (partial(folded, axis=-1), ROWS, "float32", IN_CACHE),
}


def run():
    """The calls, each between two calls of getppid, by which whatever counts tells them apart.

    x is constant, so that no channel needs its statistics taken twice, which hangs on a sample of the data.
    """
    gc.disable()
    for isa in ISAS:
        table = importlib.import_module(f"bn_c._kernels_{isa}").table
        for make, shape, dtype, caches in WORKS.values():
            _core.use(table, caches, 0)
            call = make(ones(shape, dtype))
            sizes = shape[0] // 2, shape[0]
            for n in (*[1] * WARM_UP, *sizes):
                call(n)
            for n in sizes * REPEATS:
                os.getppid()
                call(n)
            os.getppid()


def counted():
    """Instructions per element: {isa: {work: figure}}."""
    names = [(isa, work) for isa in ISAS for work in WORKS]
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "-q", "--tool=callgrind", "--dump-before=getppid", f"--callgrind-out-file={folder}/out"]
        settings = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
        subprocess.run([*command, sys.executable, __file__, "--run"], check=True, env={**os.environ, **settings})
        dumps = [
            int(re.search(r"^summary: (\d+)", Path(f"{folder}/out.{i}").read_text(), re.MULTILINE)[1])
            for i in range(1, (2 * REPEATS + 1) * len(names) + 1)
        ]
    figures = {isa: {} for isa in ISAS}
    for (isa, work), counts in zip(names, np.reshape(dumps, (len(names), -1))[:, 1:], strict=True):
        half, whole = np.median(np.reshape(counts, (REPEATS, 2)), axis=0)
        figures[isa][work] = round((whole - half) / (np.prod(WORKS[work][1]) / 2), 3)
    return figures


def compiler():
    """Name and major version of what compiled the kernels, as their files tell."""
    found = set()
    for isa in ISAS:
        made = Path(importlib.import_module(f"bn_c._kernels_{isa}").__file__).read_bytes()
        found |= {b" ".join(match) for match in re.findall(rb"(GCC): \([^)]*\) (\d+)|(clang) version (\d+)", made)}
    return ", ".join(sorted(name.decode().strip() for name in found)) or "unknown"


def compared(figures, expected):
    """Prints both; returns what is wrong."""
    wrong = []
    for isa, works in figures.items():
        if isa not in expected:
            print(f"NOT COMPARED: there is no stored figure for {isa}")
        for work, figure in works.items():
            line = f"{isa:10} {work:35} {figure:7.3f}"
            if isa not in expected or work.startswith(NUMPY):
                print(line)
                continue
            was = expected[isa].get(work, np.nan)
            print(f"{line}, stored {was:7.3f}, {figure / was - 1:+.1%}")
            if not abs(figure / was - 1) <= TOLERANCE:
                wrong.append(f"{isa} {work}: {figure} instructions per element, stored are {was}")
    for isa in expected.keys() - figures.keys():
        print(f"NOT COMPARED: {isa}, which this machine or this build does not run")
    return wrong


def main(arguments):
    """The status for the shell."""
    if arguments == ["--run"]:
        run()
        return 0
    if arguments not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    figures, made_by = counted(), compiler()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if arguments:
        stored[made_by] = {
            isa: {work: figure for work, figure in works.items() if not work.startswith(NUMPY)}
            for isa, works in figures.items()
        }
        STORED.write_text(json.dumps(stored, indent=2) + "\n")
    print(f"instructions per element, kernels compiled by {made_by}")
    wrong = compared(figures, stored.get(made_by, {}))
    if made_by not in stored:
        print(f"NOT COMPARED: figures are stored for {', '.join(stored)}, and this is {made_by}; --write adds them")
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print("A loop became slower, or faster: then run this with --write and commit the figures.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
