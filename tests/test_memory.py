"""Arrays with more elements than 32 bits count, and memory that runs out.

The largest ones need minutes and up to 5 GB at a time: `pytest --thorough tests/test_memory.py`.
"""

import ctypes
import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from oracle import bits, exact_statistics
from processes import isolated

import bn_c

multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
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


# ---- the memory of outputs ----------------------------------------------------------------------------


def address(array):
    return array.ctypes.data


def allocator(array):
    return multiarray.get_handler_name(array)


def pictures(n):
    return bn_c.ImageNormalizer([0.5] * 3, [0.5] * 3)(np.ones((n, 1000, 1400, 3), "u1"))


MAKERS = {
    "layer": lambda n: bn_c.BatchNorm(3)(np.ones((n * 1_400_000, 3), "f4")),
    "halves": lambda n: bn_c.batch_norm_inference(np.ones((n * 2_800_000, 3), "f2"), [0] * 3, [1] * 3),
    "pictures": pictures,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_large_outputs_use_the_memory_of_the_last_one_freed(make):
    first = make(2)
    expected, at = first.copy(), address(first)
    assert first.flags.owndata
    assert allocator(first) == "bn_c"
    second = make(2)
    assert not np.may_share_memory(first, second)
    del first
    assert np.array_equal(second, expected)
    third = make(2)
    assert address(third) == at
    assert np.array_equal(third, expected)
    assert np.array_equal(second, expected)


def test_only_large_outputs_keep_memory():
    layer = bn_c.BatchNorm(3)
    assert allocator(layer(X)) == "default_allocator"
    assert allocator(layer(KEPT)) == "bn_c"
    assert allocator(np.empty(1 << 24, "f4")) == "default_allocator"
    with pytest.raises(MemoryError):
        layer(np.broadcast_to(np.float32(1), (1 << 44, 3)))
    assert allocator(np.empty(1 << 24, "f4")) == "default_allocator"


def test_outputs_of_other_sizes_resized_ones_and_threads():
    expected = bn_c.BatchNorm(3)(np.ones((1, 3), "f4"))
    for n in (2, 3, 2, 2, 4, 3):
        y = MAKERS["layer"](n)
        assert (y == expected).all()
        if n == 2:
            y.resize((n * 1_400_001, 3), refcheck=False)
            y[-1] = 7
        if n == 4:
            y.resize((5, 3), refcheck=False)
            assert (y == expected).all()
        thread = threading.Thread(target=list.clear, args=([y],))
        del y
        thread.start()
        thread.join()


def lazily_freed():
    """Bytes that the system may take from this process; None where it does not say."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return None
    return 1024 * int(text.partition("LazyFree:")[2].split()[0]) if "LazyFree:" in text else None


def says_what_is_lent():
    """Not all systems do, and QEMU lends nothing."""
    if lazily_freed() is None or not hasattr(mmap, "MADV_FREE"):
        return False
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(b"x" * len(pages))
        before = lazily_freed()
        pages.madvise(mmap.MADV_FREE)
        return lazily_freed() > before


says_what_may_be_taken = pytest.mark.skipif(
    not says_what_is_lent(), reason="a system that does not say what it may take"
)


@says_what_may_be_taken
def test_the_system_may_take_what_is_kept():
    y = MAKERS["layer"](2)
    before, size = lazily_freed(), y.nbytes
    del y
    assert lazily_freed() - before > 0.9 * size
    again = MAKERS["layer"](2)
    assert lazily_freed() - before < 0.1 * size, again.nbytes


@says_what_may_be_taken
def test_memory_does_not_grow_by_more_than_is_kept_of_one_output():
    outputs = [MAKERS["layer"](2) for _ in range(4)]
    before, size = lazily_freed(), outputs[0].nbytes
    outputs.clear()
    assert lazily_freed() - before < 1.1 * size


class Handler(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("allocator", ctypes.c_void_p * 5))


@pytest.fixture
def own_allocator():
    """NumPy's, under another name, as a caller may have set it."""
    capsule = ctypes.pythonapi.PyCapsule_GetPointer
    capsule.restype, capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = ctypes.cast(capsule(multiarray._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(api[304])
    default = ctypes.PYFUNCTYPE(ctypes.py_object)(api[305])()
    handler = Handler.from_buffer_copy(Handler.from_address(capsule(default, b"mem_handler")))
    handler.name = b"caller's"
    set_handler(new(ctypes.addressof(handler), b"mem_handler", None))
    yield handler
    set_handler(default)


def test_an_allocator_of_the_caller_stays(own_allocator):
    assert allocator(bn_c.BatchNorm(3)(KEPT)) == "caller's"
    assert allocator(np.empty(3)) == "caller's"


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
KEPT = np.broadcast_to(np.float32(1), (2_800_001, 3))  # y has more than 32 MB, which malloc gives back when it is freed
CALLS = {
    "layer": lambda layer, stats: layer(X),
    "layer with all": lambda layer, stats: layer(X, residual=X, dtype="f2"),
    "large output": lambda layer, stats: layer(KEPT),
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
