"""Frames of bytes to tensors: every dtype, layout and stride against the formula in float64, on every set."""

import copy
import ctypes
import itertools
import mmap
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from oracle import bits, half_ulp, scattered

import bn_c
from bn_c import ImageNormalizer, definition

# Roundings of scale and shift, of the product and of the sum.
ROUNDINGS = 4 * 2.0**-24
CHANNELS = [1, 2, 3, 3, 3, 4, 5, 8, 17, 64, 257, 1024]
QUANT = {"uint8": (0.0207, 119), "int8": (0.0183, -5)}
DTYPES = ["float32", "float16", *QUANT]
LAYOUTS = ["NCHW", "NHWC"]


def exact(prep, frame):
    """The definition in float64; channels last."""
    x = frame[..., ::-1] if prep.reverse_channels else frame
    return definition.pixels(x.astype(np.float64), np.asarray(prep.mean), np.asarray(prep.std), prep.scale)


def in_layout(prep, y):
    return y if prep.layout == "NHWC" else np.moveaxis(y, -1, -3)


def check(prep, frame, out=None):
    """Calls it and checks all that any result has to fulfil; returns y."""
    before = frame.copy()
    y = prep(frame, out=out)
    expected = exact(prep, before)
    assert np.array_equal(frame, before)
    assert y is out or out is None
    assert y.dtype == prep.dtype
    assert y.shape == in_layout(prep, expected).shape
    if prep.quant:
        q_scale, zero_point = prep.quant
        info = np.iinfo(prep.dtype)
        expected = np.clip(np.rint(expected / q_scale) + zero_point, info.min, info.max)
        assert np.array_equal(y, in_layout(prep, expected))
        return y
    bound = ROUNDINGS * (np.abs(expected) + np.abs(np.asarray(prep.mean) / np.asarray(prep.std)))
    if prep.dtype == np.float16:
        bound = bound + half_ulp(expected, 2)
    assert np.all(np.abs(y - in_layout(prep, expected)) <= in_layout(prep, bound))
    return y


def normalizer(channels, rng, **options):
    options.setdefault("dtype", "float32")
    options.setdefault("quant", QUANT.get(options["dtype"]))
    mean, std = rng.uniform(-0.2, 0.8, channels), rng.uniform(0.1, 0.5, channels)
    return ImageNormalizer(mean.tolist(), std, **options)


def frame_of(shape, rng):
    return rng.integers(0, 256, shape, np.uint8)


def random_view(shape, rng):
    """Crops, padded rows, skipped and flipped pixels, planes: a view into a larger array."""
    ndim = len(shape)
    order = np.arange(ndim)
    kind = rng.integers(6)
    if kind == 0:
        return frame_of(shape, rng)
    if kind == 1:
        order = rng.permutation(ndim)
    steps = [1] * ndim
    pads = rng.integers(0, 3, ndim).tolist() if kind > 1 else [0] * ndim
    if kind > 2:
        steps = rng.choice([1, 1, 1, -1, 2, -2], ndim).tolist()
        steps[-1] = int(rng.choice([1, -1, 1, 2]))
    return scattered(frame_of(shape, rng), tuple(order.tolist()), steps, pads, int(rng.integers(0, 5)))


def random_out(y, rng):
    """None, or one of any strides whose surroundings are watched."""
    if rng.integers(2):
        return None
    out = scattered(
        np.zeros(y.shape, y.dtype),
        steps=[1] * (y.ndim - 1) + [int(rng.choice([1, 1, 1, 2, -1]))],
        pads=rng.integers(0, 3, y.ndim).tolist(),
        first=int(rng.integers(0, 9)),
    )
    whole = out
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    kept = out.copy()
    whole.view(np.uint8)[...] = 0xA5
    assert not np.array_equal(out, kept)
    return out


def surroundings(out):
    """All bytes around those of an array, which becomes zero."""
    whole = out
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    out[...] = 0
    return whole.tobytes().replace(b"\0", b"")


@pytest.mark.parametrize("seed", range(30))
def test_random_frames(isa, seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        channels = int(rng.choice(CHANNELS))
        largest = 70 if channels < 9 else 12
        size = rng.integers(1, largest, 2).tolist()
        batch = rng.integers(1, 4, 1).tolist() if rng.integers(2) else []
        prep = normalizer(
            channels,
            rng,
            scale=float(rng.choice([1 / 255, 1.0, 1 / 128])),
            reverse_channels=bool(rng.integers(2)),
            layout=str(rng.choice(LAYOUTS)),
            dtype=str(rng.choice(DTYPES)),
        )
        frame = random_view((*batch, *size, channels), rng)
        y = check(prep, frame)
        out = random_out(y, rng)
        if out is not None:
            check(prep, frame, out)
            assert set(surroundings(out)) <= {0xA5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reverse_channels", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_widths_around_every_step(isa, channels, reverse_channels, layout, dtype, rng):
    """Pixels one after the other, some bytes apart, and backwards."""
    prep = normalizer(channels, rng, reverse_channels=reverse_channels, layout=layout, dtype=dtype)
    for width in range(1, 28):
        row = frame_of((1, 2 * width + 1, 6), rng)
        check(prep, np.ascontiguousarray(row[:, :width, :channels]))
        check(prep, row[:, :width, :channels])
        check(prep, row[:, width:0:-1, :channels])
        check(prep, row[:, 1::2, 6 - channels :][:, :width, ::-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_threads_and_batches_give_equal_bits(isa, channels, dtype, layout, rng):
    frames = frame_of((2, 361, 403, channels), rng)
    whole = normalizer(channels, np.random.default_rng(1), dtype=dtype, layout=layout)
    y = check(whole, frames)
    assert all(bits(whole(frame)) == bits(part) for frame, part in zip(frames, y, strict=True))
    for num_threads in (2, 3, None):
        threaded = normalizer(channels, np.random.default_rng(1), dtype=dtype, layout=layout, num_threads=num_threads)
        assert bits(threaded(frames)) == bits(y)
        assert bits(threaded(frames[1])) == bits(y[1])
        assert bits(threaded(frames[:, 1:, :, ::-1])) == bits(whole(frames[:, 1:, :, ::-1]))


def test_channels_are_independent(isa, rng):
    """y depends on a byte and its channel alone, whatever loop it goes through."""
    frame = frame_of((19, 23, 70), rng)
    prep = normalizer(70, rng)
    y = prep(frame)
    for c in range(0, 70, 9):
        alone = ImageNormalizer(prep.mean[c : c + 3], prep.std[c : c + 3])
        assert bits(alone(frame[..., c : c + 3])) == bits(y[c : c + 3])


@pytest.mark.parametrize("dtype", QUANT)
@pytest.mark.parametrize("q_scale", [1 / 255, 2 / 255, 0.5, 1.0, 0.0371, 1e-3, 1e-40, 1e40])
@pytest.mark.parametrize("scale", [1 / 255, 1.0, -0.5])
def test_quantised_to_the_last_bit(isa, scale, q_scale, dtype, rng):
    """Of all bytes, also where float32 would decide a tie the other way, and where everything saturates."""
    frame = np.arange(256, dtype=np.uint8).reshape(4, 64, 1).repeat(3, 2)
    zero_point = {"uint8": 128, "int8": -128}[dtype]
    for mean in ([0.0, 0.5, 0.1], [127.5, 1e30, -1e30]):
        options = {"dtype": dtype, "quant": (q_scale, zero_point), "scale": scale}
        check(ImageNormalizer(mean, [1.0, 0.25, 3.0], **options), frame)


def test_bytes_stay_bytes(isa, rng):
    frame = frame_of((33, 35, 3), rng)
    same = ImageNormalizer.unit(dtype="uint8", quant=(1 / 255, 0), layout="NHWC")
    assert np.array_equal(same(frame), frame)
    signed = ImageNormalizer.unit(dtype="int8", quant=(1 / 255, -128), layout="NHWC")
    assert np.array_equal(signed(frame), frame.astype(np.int16) - 128)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 4, 5, 3), (2, 0, 5, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_pixels(shape, layout):
    prep = ImageNormalizer.imagenet(layout=layout)
    expected = shape if layout == "NHWC" else (*shape[:-3], 3, *shape[-3:-1])
    assert prep(np.zeros(shape, np.uint8)).shape == expected
    out = np.zeros(expected, np.float32)
    assert prep(np.zeros(shape, np.uint8), out=out) is out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_reads_nothing_outside_the_frame(isa, channels, dtype, layout, rng):
    """Frames that end, or begin, where the memory does."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    bytes_ = np.frombuffer(memory, np.uint8)
    bytes_[page : 2 * page] = frame_of(page, rng)
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (bytes_.ctypes.data, bytes_.ctypes.data + 2 * page)
    try:
        for address in pages:
            assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
        for width, flip in itertools.product((1, 4, 9, 37), (1, -1)):
            size = 3 * width * channels
            for first in (page, 2 * page - size):
                whole = bytes_[first : first + size].reshape(3, width, channels)
                prep = normalizer(channels, rng, dtype=dtype, layout=layout)
                for frame in (whole, whole[:, :, ::-1], whole[:, ::2]):
                    check(prep, frame[:, ::flip])
    finally:
        for address in pages:
            libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


def test_out_is_a_row_of_a_batch(isa, rng):
    batch = np.full((3, 3, 24, 31), 7, np.float32)
    frame = frame_of((24, 31, 3), rng)
    prep = ImageNormalizer.imagenet()
    check(prep, frame, batch[1])
    assert np.all(batch[[0, 2]] == 7)
    channels_last = np.empty((24, 31, 3), np.float32)
    check(prep, frame, channels_last.transpose(2, 0, 1))
    assert np.array_equal(channels_last, ImageNormalizer.imagenet(layout="NHWC")(frame))


def test_anything_that_shares_its_memory(isa, rng):
    frame = frame_of((24, 31, 3), rng)
    prep = ImageNormalizer.imagenet()
    y = check(prep, frame)
    assert bits(prep(memoryview(frame))) == bits(y)
    assert bits(prep(SimpleNamespace(__array_interface__=frame.__array_interface__, keep=frame))) == bits(y)
    out = memoryview(np.empty_like(y))
    assert prep(frame, out=out) is out
    assert bits(np.asarray(out)) == bits(y)


@pytest.mark.parametrize("channels", CHANNELS)
def test_scalars_serve_any_number_of_channels(channels, rng):
    frame = frame_of((5, 7, channels), rng)
    unit, symmetric = ImageNormalizer.unit(), ImageNormalizer.symmetric(dtype="float16")
    check(unit, frame)
    check(symmetric, frame)
    check(ImageNormalizer(0.5, [0.5] * channels), frame)
    assert np.abs(symmetric(frame)).max() <= 1
    assert bits(unit(np.array([[[0], [255]]], np.uint8))) == bits(np.array([[[0, 1]]], np.float32))


# ---- as others do it --------------------------------------------------------------------------------


def test_as_pytorch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing is compared with it")
    for prep in (ImageNormalizer.imagenet(), ImageNormalizer.imagenet(reverse_channels=True)):
        for shape in ((31, 45, 3), (2, 224, 224, 3)):
            frame = frame_of(shape, rng)
            tensor = torch.from_numpy(frame).flip(-1) if prep.reverse_channels else torch.from_numpy(frame)
            tensor = tensor.movedim(-1, -3).float().div(255)
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (prep.mean, prep.std))
            assert np.abs(prep(frame) - ((tensor - mean) / std).numpy()).max() <= 2e-6
            out = torch.empty(tensor.shape)
            assert prep(torch.from_numpy(frame), out=out) is out
            assert bits(out.numpy()) == bits(prep(frame))


# ---- the object -------------------------------------------------------------------------------------


def test_presets_take_options():
    prep = ImageNormalizer.imagenet(reverse_channels=True, layout="NHWC", dtype=np.int8, quant=(0.02, -3))
    assert prep.mean == (0.485, 0.456, 0.406)
    assert prep.std == (0.229, 0.224, 0.225)
    assert (prep.reverse_channels, prep.layout, prep.dtype, prep.quant) == (True, "NHWC", np.int8, (0.02, -3))
    assert repr(prep) == (
        "ImageNormalizer(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=1/255, reverse_channels=True, "
        "layout='NHWC', dtype='int8', quant=(0.02, -3), num_threads=1)"
    )
    assert (ImageNormalizer.symmetric().mean, ImageNormalizer.unit().std) == (0.5, 1.0)


@pytest.mark.parametrize("prep", [ImageNormalizer.unit(), ImageNormalizer.imagenet(dtype="int8", quant=(0.1, 3))])
def test_copies_and_pickles(prep, rng):
    frame = frame_of((9, 9, 3), rng)
    for other in (pickle.loads(pickle.dumps(prep)), copy.deepcopy(prep), eval(repr(prep))):
        assert other == prep
        assert hash(other) == hash(prep)
        assert bits(other(frame)) == bits(prep(frame))


def test_does_not_change():
    prep = ImageNormalizer.imagenet()
    with pytest.raises(AttributeError):
        prep.mean = (0, 0, 0)
    assert prep != ImageNormalizer.imagenet(dtype="float16")


# ---- what is refused --------------------------------------------------------------------------------

M3, S3 = [0.5] * 3, [0.25] * 3


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "std: expected numbers above 0", {"std": 0}),
        (ValueError, "std: expected numbers above 0", {"std": [1, -1, 1]}),
        (ValueError, "std: expected finite numbers", {"std": [1, float("nan"), 1]}),
        (ValueError, "std: expected finite numbers", {"std": float("inf")}),
        (ValueError, "std: expected as many channels as mean, 3, got 2", {"std": [1, 1.5]}),
        (TypeError, "std: expected", {"std": None}),
        (TypeError, "std: expected", {"std": "1.0"}),
        (TypeError, "std: expected", {"std": [1j, 1, 1]}),
        (ValueError, "std: expected scale / std of magnitude", {"std": 1e-300}),
        (TypeError, "mean: expected", {"mean": {1.0}}),
        (TypeError, "mean: expected", {"mean": True}),
        (ValueError, "mean: expected", {"mean": [[0.5] * 3]}),
        (ValueError, "mean: expected 1 to 1024 channels, got 0", {"mean": np.zeros(0)}),
        (ValueError, "mean: expected 1 to 1024 channels, got 1025", {"mean": [0.5] * 1025}),
        (ValueError, "mean: expected finite numbers", {"mean": [0, 0, float("nan")]}),
        (ValueError, "mean: expected mean / std of magnitude", {"mean": 1e300}),
        (ValueError, "mean: expected mean / std of magnitude", {"mean": 1e-40}),
        (ValueError, "scale: expected", {"scale": 0}),
        (ValueError, "scale: expected", {"scale": float("nan")}),
        (TypeError, "scale: expected", {"scale": "1/255"}),
        (TypeError, "reverse_channels: expected", {"reverse_channels": 1}),
        (ValueError, "layout: expected", {"layout": "nchw"}),
        (ValueError, "layout: expected", {"layout": None}),
        (ValueError, "layout: expected", {"layout": np.array(LAYOUTS)}),
        (TypeError, "dtype: expected", {"dtype": "float64"}),
        (TypeError, "dtype: expected", {"dtype": None}),
        (TypeError, "dtype: expected", {"dtype": "what"}),
        (TypeError, "dtype: expected", {"dtype": ">f4"}),
        (TypeError, "quant: expected", {"dtype": "int8"}),
        (TypeError, "quant: expected", {"dtype": "int8", "quant": (0.1, 1, 2)}),
        (ValueError, "quant: expected None", {"quant": (0.1, 1)}),
        (ValueError, "quant: expected", {"dtype": "int8", "quant": (0.0, 1)}),
        (ValueError, "quant: expected", {"dtype": "int8", "quant": (float("nan"), 1)}),
        (ValueError, "quant: expected", {"dtype": "int8", "quant": (1, 128)}),
        (ValueError, "quant: expected", {"dtype": "uint8", "quant": (1, -1)}),
        (TypeError, "quant zero_point: expected", {"dtype": "uint8", "quant": (1, 1.0)}),
        (ValueError, "num_threads: expected", {"num_threads": 0}),
    ],
)
def test_constructor_refuses(error, message, arguments):
    with pytest.raises(error, match=f"^{message}") as raised:
        ImageNormalizer(**{"mean": M3, "std": S3, **arguments})
    assert "\n" not in str(raised.value)


def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("error", "message", "frame"),
    [
        (TypeError, "frame: expected uint8, got float32: ", zeros(4, 5, 3, dtype="f4")),
        (TypeError, "frame: expected uint8, got int8", zeros(4, 5, 3, dtype="i1")),
        (TypeError, "frame: expected uint8, got bool", zeros(4, 5, 3, dtype="?")),
        (TypeError, "frame: expected uint8, got object", zeros(4, 5, 3, dtype="O")),
        (TypeError, "frame: expected uint8, got datetime64", zeros(4, 5, 3, dtype="M8[s]")),
        (TypeError, "frame: expected", [[[1, 2, 3]]]),
        (TypeError, "frame: expected", None),
        (TypeError, "frame: expected", np.ma.zeros((4, 5, 3), np.uint8)),
        (ValueError, r"frame: expected shape \(H, W, 3\) or \(N, H, W, 3\), got \(4, 5, 4\)", zeros(4, 5, 4)),
        (ValueError, "frame: expected shape", zeros(3, 4, 5)),
        (ValueError, r"frame: expected shape .*, got \(4, 5\): for one channel pass frame", zeros(4, 5)),
        (ValueError, "frame: expected shape", zeros(1, 1, 4, 5, 3)),
        (ValueError, "frame: expected shape", zeros(3)),
    ],
)
def test_frame_is_refused(error, message, frame):
    with pytest.raises(error, match=f"^{message}"):
        ImageNormalizer.imagenet()(frame)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 0), (4, 5, 1025), (3,), (1, 1, 4, 5, 3)])
def test_frame_is_refused_by_scalars(shape):
    with pytest.raises(ValueError, match=r"^frame: expected"):
        ImageNormalizer.unit()(np.zeros(shape, np.uint8))


def read_only(a):
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    ("error", "message", "out"),
    [
        (TypeError, "out: expected float32, got float64", zeros(3, 4, 5, dtype="f8")),
        (TypeError, "out: expected float32, got float16", zeros(3, 4, 5, dtype="f2")),
        (TypeError, "out: expected float32, got >f4", zeros(3, 4, 5, dtype=">f4")),
        (TypeError, "out: expected", [0.0]),
        (ValueError, r"out: expected shape \(3, 4, 5\), got \(4, 5, 3\)", zeros(4, 5, 3, dtype="f4")),
        (ValueError, "out: expected shape", zeros(1, 3, 4, 5, dtype="f4")),
        (ValueError, "out: expected a writable array", read_only(zeros(3, 4, 5, dtype="f4"))),
        (ValueError, "out: expected every element in a place of its own",
         np.lib.stride_tricks.as_strided(zeros(20, dtype="f4"), (3, 4, 5), (0, 20, 4))),
        (ValueError, "out: expected aligned elements", zeros(241)[1:].view("f4").reshape(3, 4, 5)),
    ],
)  # fmt: skip
def test_out_is_refused(error, message, out):
    before = np.array(out)
    with pytest.raises(error, match=f"^{message}"):
        ImageNormalizer.imagenet()(np.full((4, 5, 3), 9, np.uint8), out=out)
    assert np.array_equal(out, before)


def test_out_on_the_frame_is_refused(rng):
    memory = frame_of(240 + 60, rng)
    frame, out = memory[200:260].reshape(4, 5, 3), memory[:240].view(np.float32).reshape(3, 4, 5)
    before = memory.copy()
    with pytest.raises(ValueError, match=r"^out: expected memory apart"):
        ImageNormalizer.imagenet()(frame, out=out)
    same = ImageNormalizer.unit(dtype="uint8", quant=(1 / 255, 0), layout="NHWC")
    with pytest.raises(ValueError, match=r"^out: expected memory apart"):
        same(frame, out=frame)
    assert np.array_equal(memory, before)


def test_default_is_one_thread(monkeypatch):
    monkeypatch.setattr(bn_c._threads, "helpers", ())
    monkeypatch.setattr(bn_c._threads, "grow", lambda size: pytest.fail(f"{size} more threads"))
    frame = np.zeros((600, 600, 3), np.uint8)
    ImageNormalizer.unit()(frame)
    with pytest.raises(pytest.fail.Exception, match="1 more threads"):
        ImageNormalizer.unit(num_threads=2)(frame)
