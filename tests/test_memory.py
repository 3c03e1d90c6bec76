"""Arrays with more elements than 32 bits count, and memory that runs out.

The largest ones need minutes and up to 5 GB at a time: `pytest --thorough tests/test_memory.py`.
"""

import sys

import numpy as np
import pytest
from oracle import bits, exact_statistics
from processes import isolated

import bn_c

needs_64_bits = pytest.mark.skipif(sys.maxsize < 1 << 32, reason="no array of that size on 32-bit machines")
PIECE = 1 << 24


@pytest.fixture
def time_and_memory(thorough):
    if not thorough:
        pytest.skip("pytest --thorough has the minutes and the 5 GB")


# ---- large arrays -----------------------------------------------------------------------------------


def in_pieces(length):
    return [slice(start, min(start + PIECE, length)) for start in range(0, length, PIECE)]


@needs_64_bits
def test_more_than_2_32_bytes_in_one_channel(time_and_memory):
    """2^31 + 65 halves: in place, and their statistics."""
    n = (1 << 31) + 65
    x = np.empty(n, "f2")
    row = np.arange(PIECE).astype("u1").astype("f2")
    for piece in in_pieces(n):
        x[piece] = row[: piece.stop - piece.start]
    x[-1] = 1000
    whole = x.reshape(1, 1, n)
    stats = bn_c.batch_stats(whole, num_threads=2)
    total = int(row.sum(dtype="i8")) * (n // PIECE) + sum(range(65 - 1)) + 1000
    assert stats.count == n
    assert abs(stats.mean[0] - total / n) < 1e-6
    layer = bn_c.BatchNorm(1, eps=0, num_threads=2)
    layer.running_mean, layer.running_var = [128], [4]
    assert layer(whole, out=whole) is whole
    for piece in in_pieces(n)[:-1]:
        assert np.array_equal(x[piece], (row - 128) / 2)
    assert x[-1] == (1000 - 128) / 2


@needs_64_bits
def test_2_500_000_000_halves(time_and_memory):
    """5 GB of output, of an input that stands still along the batch."""
    sample = (np.arange(1_000_000) % 2003).astype("f2").reshape(1, 1000, 1000)
    x = np.broadcast_to(sample, (2500, 1000, 1000))
    y = bn_c.batch_norm(x, num_threads=2, out=np.empty(x.shape, "f2"))
    mean, var = exact_statistics(sample.astype("f8"), 1)
    expected = bn_c.batch_norm_inference(sample, mean, var)
    for row in y:
        assert np.abs(row - expected[0]).max() <= 2e-3
    stats = bn_c.batch_stats(x)
    assert stats.count == 2_500_000
    assert np.allclose(stats.mean, mean, rtol=1e-6, atol=0)
    assert np.allclose(stats.var, var, rtol=3e-7, atol=0)


@needs_64_bits
@pytest.mark.parametrize("shape", [((1 << 31) + 9, 2), (1, 2, (1 << 31) + 9)])
def test_more_rows_than_an_int_counts(shape, time_and_memory, tmp_path):
    """A file with holes, mapped into memory: 4 GB to read, none to keep."""
    path = tmp_path / "x"
    x = np.memmap(path, "u1", "w+", shape=shape)
    x.reshape(-1)[-1] = 200
    stats = bn_c.batch_stats(x, num_threads=2)
    n = shape[0] if len(shape) == 2 else shape[2]
    assert stats.count == n
    assert np.allclose(stats.mean, [0, 200 / n], rtol=1e-12, atol=0)
    assert np.allclose(stats.var, [0, 200**2 * (n - 1) / n**2], rtol=1e-12, atol=0)


# ---- memory that runs out ---------------------------------------------------------------------------


def state(layer):
    return {key: value.tobytes() for key, value in layer.state_dict().items()}


@needs_64_bits
@pytest.mark.parametrize("training", [False, True])
def test_no_memory_for_the_output(training):
    x = np.broadcast_to(np.float32(1), (1 << 44, 3))
    layer = bn_c.BatchNorm(3, training=training)
    before = state(layer)
    with pytest.raises(MemoryError):
        layer(x)
    assert state(layer) == before


X = np.linspace(-3, 3, 4 * 3 * 50, dtype="f4").reshape(4, 3, 50)
LARGE = np.linspace(-3, 3, 700_000 * 3, dtype="f4").reshape(-1, 3)
CALLS = {
    "layer": lambda layer, stats: layer(X),
    "layer with all": lambda layer, stats: layer(X, residual=X, dtype="f2"),
    "training": lambda layer, stats: layer.train()(X),
    "assignment": lambda layer, stats: setattr(layer, "gamma", [1, 2, 3]),
    "options": lambda layer, stats: [setattr(layer, "activation", "relu"), setattr(layer, "eps", 0.5)],
    "state": lambda layer, stats: layer.load_state_dict(layer.state_dict()),
    "functions": lambda layer, stats: bn_c.batch_norm(X, [1, 2, 3], return_stats=True),
    "statistics in parts": lambda layer, stats: bn_c.batch_stats(LARGE),
    "update": lambda layer, stats: stats.update(X),
    "merge": lambda layer, stats: stats.merge(bn_c.batch_stats(X)),
}


def starved(api, call):
    """Each allocation of the call fails in turn: MemoryError, and nothing has changed."""
    failed = 0
    call(bn_c.BatchNorm(3), bn_c.BatchStats(3))  # NumPy does not survive a lack of memory in its first multiplication
    for n in range(2000):
        layer, stats = bn_c.BatchNorm(3, allow_single_value=True), bn_c.BatchStats(3)
        layer.running_mean = [1, 2, 3]
        layer(X)
        before = state(layer), stats.to_dict()
        api.set_nomemory(n, n + 1)
        try:
            call(layer, stats)
        except MemoryError:
            api.remove_mem_hooks()
            failed += 1
            assert (state(layer), stats.to_dict()) == before
            options = {"eps": layer.eps, "activation": layer.activation}
            assert bits(layer.eval()(X)) == bits(bn_c.batch_norm_inference(X, [1, 2, 3], [1, 1, 1], **options))
            continue
        finally:
            api.remove_mem_hooks()
        if n > 300:
            break
    assert failed


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_memory_for_anything(call):
    isolated(starved, pytest.importorskip("_testcapi"), call)
