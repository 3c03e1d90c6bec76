"""Memory, reference counts and threads stay as they are, however many calls are made.

As a program, it makes as many as it is told, and tells what happened: `python tests/test_long_run.py 10000000`.
"""

import contextlib
import gc
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np

import bn_c

RNG = np.random.default_rng(11)
X = RNG.standard_normal((4, 3, 50)).astype("f4")
HALVES, BYTES = X.astype("f2"), (X * 20).astype("i1")
LARGE = RNG.standard_normal((3, 5, 150, 151)).astype("f4")
OUT, PARAMETERS = np.empty_like(X), (np.zeros(3), np.ones(3), [1.0, 2.0, 3.0], None)
LAYER, TRAINED, STATS = bn_c.BatchNorm(3), bn_c.BatchNorm(3, training=True), bn_c.BatchStats(3)


def refused(call):
    with contextlib.suppress(TypeError, ValueError):
        call()
        raise AssertionError("not refused")


def assign():
    LAYER.gamma = PARAMETERS[2]
    LAYER(X)


# The kinds of calls, and how many of each are made in a round of a thousand.
KINDS = [
    (300, lambda: LAYER(X, out=OUT)),
    (200, lambda: LAYER(X)),
    (100, lambda: LAYER(HALVES, dtype="f4")),
    (50, lambda: LAYER(BYTES, residual=X)),
    (50, lambda: TRAINED(X)),
    (80, lambda: bn_c.batch_norm_inference(X, *PARAMETERS, activation="relu")),
    (50, lambda: bn_c.batch_norm(X, return_stats=True)),
    (40, lambda: STATS.update(BYTES)),
    (20, lambda: STATS + bn_c.batch_stats(HALVES)),
    (20, lambda: LAYER(X[::-1, :, ::2])),
    (20, assign),
    (8, lambda: TRAINED.load_state_dict(TRAINED.state_dict())),
    (8, lambda: pickle.loads(pickle.dumps(LAYER))(X)),
    (10, lambda: refused(lambda: LAYER(X.astype("f8")))),
    (10, lambda: refused(lambda: LAYER(X, out=X[:, :, ::-1]))),
    (10, lambda: refused(lambda: bn_c.batch_norm(X, [1.0]))),
    (10, lambda: refused(lambda: LAYER(X, residual=X[:1]))),
    (10, lambda: refused(lambda: bn_c.batch_norm_inference(X, *PARAMETERS, eps=-1))),
    (3, lambda: refused(lambda: TRAINED.load_state_dict({}))),
    (1, lambda: bn_c.batch_norm(LARGE, num_threads=2)),
]
ROUND = sum(times for times, _ in KINDS)
WATCHED = (
    X,
    HALVES,
    BYTES,
    LARGE,
    OUT,
    *PARAMETERS[:3],
    LAYER,
    TRAINED,
    STATS,
    np.dtype("f4"),
    np.dtype("f2"),
    bn_c._core.Folded,
)


def rounds(number):
    for _ in range(number):
        for times, call in KINDS:
            for _ in range(times):
                call()


def resident():
    """Bytes of memory in use; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def state():
    gc.collect()
    return {
        "bytes": resident(),
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "references": [sys.getrefcount(thing) for thing in WATCHED],
        "threads": threading.active_count(),
    }


def grown(number):
    """What has become more in that many calls, after some that fill caches."""
    rounds(2)
    before = state()
    rounds(max(1, number // ROUND))
    after = state()
    return {
        "bytes": after["bytes"] - before["bytes"],
        "objects": after["objects"] - before["objects"],
        "blocks": after["blocks"] - before["blocks"],
        "references": [a - b for a, b in zip(after["references"], before["references"], strict=True)],
        "threads": after["threads"] - before["threads"],
    }


def assert_flat(growth):
    assert growth["bytes"] < 8 << 20, growth
    assert growth["objects"] < 50, growth
    assert growth["blocks"] < 2000, growth
    assert not any(growth["references"]), growth
    assert not growth["threads"], growth


def test_nothing_grows(thorough):
    assert_flat(grown(10_000_000 if thorough else 10_000))


if __name__ == "__main__":
    growth = grown(int(sys.argv[1]))
    print(f"{sys.argv[1]} calls; more than before: {growth}")
    assert_flat(growth)
