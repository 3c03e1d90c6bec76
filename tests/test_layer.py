"""The layer: its options and attributes, running statistics, state dicts, copies, threads, and errors."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from oracle import ACTIVATIONS, LAYOUTS, assert_forward, bits, received, values

import bn_c

ARRAYS = ("gamma", "beta", "running_mean", "running_var")
OPTIONS = ("eps", "momentum", "axis", "activation", "num_threads", "training", "num_batches_tracked")
# Running statistics are stored as float32; each step rounds once.
STORED = 2.0**-23


@pytest.fixture
def x(rng):
    return values(rng, (6, 5, 7, 9), "f4", 3)


def trained(rng, channels=5, **options):
    """A layer of which nothing is at its default."""
    bn = bn_c.BatchNorm(channels, **options)
    if bn.gamma is not None:
        bn.gamma, bn.beta = rng.uniform(-2, 2, channels), rng.uniform(-2, 2, channels)
    if bn.running_mean is not None:
        bn.running_mean, bn.running_var = rng.uniform(-2, 2, channels), rng.uniform(0.5, 2, channels)
        bn.num_batches_tracked = 7
    return bn


@pytest.fixture
def bn(rng):
    return trained(rng)


def state(bn):
    """All of a layer that can be seen."""
    arrays = {name: None if getattr(bn, name) is None else getattr(bn, name).tobytes() for name in ARRAYS}
    return arrays | {name: getattr(bn, name) for name in OPTIONS}


def as_function(bn, x, **options):
    """What inference with the layer has to be, bit for bit."""
    return bn_c.batch_norm_inference(
        x, bn.running_mean, bn.running_var, bn.gamma, bn.beta,
        eps=bn.eps, axis=bn.axis, activation=bn.activation, **options,
    )  # fmt: skip


def assert_infers(bn, x):
    assert bits(bn(x)) == bits(as_function(bn, x))


# ---- defaults, options, attributes ------------------------------------------------------------------


def test_defaults():
    bn = bn_c.BatchNorm(3)
    assert (bn.num_features, bn.eps, bn.momentum, bn.axis) == (3, 1e-5, 0.1, 1)
    assert (bn.activation, bn.num_threads, bn.training, bn.num_batches_tracked) == (None, 1, False, 0)
    for name, expected in zip(ARRAYS, (1, 0, 0, 1), strict=True):
        array = getattr(bn, name)
        assert (array.dtype, array.shape) == (np.float32, (3,))
        assert np.all(array == expected)


def test_a_new_layer_divides_by_nearly_one(x):
    y = bn_c.BatchNorm(5)(x)
    assert_forward(y, x, np.zeros(5), np.ones(5))


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0.5},
        {"eps": 0},
        {"axis": -1},
        {"axis": 2},
        {"axis": 0},
        {"affine": False},
        {"num_threads": 2},
        {"num_threads": None},
        *({"activation": activation} for activation in ACTIVATIONS),
    ],
    ids=str,
)
def test_options_in_inference(isa, options, x, rng):
    bn = trained(rng, x.shape[options.get("axis", 1)], **options)
    before = state(bn)
    for _ in range(2):
        assert_infers(bn, x)
    assert state(bn) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", 0.25),
        ("activation", "relu6"),
        ("activation", ("leaky_relu", 0.5)),
        ("num_threads", 2),
        ("gamma", [1, 2, 3, 4, 5]),
        ("beta", np.arange(5, dtype="f2")),
        ("running_mean", np.arange(5, dtype="f8")),
        ("running_var", np.arange(1, 6, dtype="g")),
    ],
)
def test_assignment_takes_effect_on_the_next_call(name, value, bn, x):
    before = bn(x)
    setattr(bn, name, value)
    assert np.array_equal(getattr(bn, name), value)
    assert_infers(bn, x)
    if name != "num_threads":
        assert not np.array_equal(bn(x), before)


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_read_only_float32_copies(name, bn, x):
    value = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    setattr(bn, name, value)
    array, y = getattr(bn, name), bn(x)
    assert array.dtype == np.float32
    assert np.array_equal(array, value.astype("f4"))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 9
    value[:] = 9
    assert np.array_equal(bn(x), y)
    assert_infers(bn, x)


def test_what_a_layer_was_made_without_is_none_and_stays_so():
    bn = bn_c.BatchNorm(3, affine=False, track_running_stats=False)
    for name in ARRAYS:
        assert getattr(bn, name) is None
        with pytest.raises(ValueError, match=name):
            setattr(bn, name, np.ones(3))
        assert getattr(bn, name) is None


@pytest.mark.parametrize("name", ["num_features", "axis"])
def test_attributes_that_are_only_read(name, bn):
    with pytest.raises(AttributeError):
        setattr(bn, name, 2)


def test_modes(bn):
    assert bn.training is False
    assert bn.train() is bn
    assert bn.training is True
    assert bn.eval() is bn
    assert bn.training is False
    assert bn.train(True).training is True
    assert bn.train(False).training is False
    bn.training = True
    assert bn.training is True
    assert bn_c.BatchNorm(2, training=True).training is True


def test_modes_take_effect_on_the_next_call(bn, x):
    inference = bn(x)
    batch = bn.train()(x)
    assert np.array_equal(batch, bn_c.batch_norm(x, bn.gamma, bn.beta))
    assert not np.array_equal(inference, batch)
    bn.eval()
    assert_infers(bn, x)
    assert not np.array_equal(bn(x), inference), "the running statistics have moved"


def test_repr(bn):
    assert repr(bn).startswith("BatchNorm(5, eps=1e-05, momentum=0.1, axis=1, affine=True, track_running_stats=")
    bn.train().activation = ("clip", 0, 1)
    assert "training=True" in repr(bn)
    assert "activation=('clip', 0, 1)" in repr(bn)


def test_repr_makes_an_equal_layer():
    bn = bn_c.BatchNorm(2, eps=0.5, momentum=None, axis=-1, affine=False, activation=("leaky_relu", 0.1), training=True)
    assert state(eval(repr(bn), {"BatchNorm": bn_c.BatchNorm})) == state(bn)


def test_no_features():
    bn, x = bn_c.BatchNorm(0), np.empty((4, 0, 3), "f4")
    assert bn(x).shape == x.shape
    assert bn.gamma.shape == (0,)


# ---- residual, dtype, out ---------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [None, "f4", "f2"])
@pytest.mark.parametrize("layout", ["c", "channels_last", "sliced"])
def test_arguments_of_a_call(isa, training, dtype, layout, bn, x, rng):
    x, residual = LAYOUTS[layout](x), values(rng, x.shape, "f2")
    bn.train(training).activation = "relu"
    options = {"residual": residual, "dtype": dtype, "activation": "relu"}
    if training:
        expected = bn_c.batch_norm(x, bn.gamma, bn.beta, **options)
    else:
        del options["activation"]
        expected = as_function(bn, x, **options)
    y = bn(x, residual=residual, dtype=dtype)
    assert y.dtype == np.dtype(dtype or "f4")
    assert bits(y) == bits(expected)
    out = np.empty(x.shape, dtype or "f4")
    assert bn(x, residual=residual, dtype=dtype, out=out) is out
    if layout == "c" or not training:
        assert bits(out) == bits(expected)


@pytest.mark.parametrize("training", [False, True])
def test_out_alone_and_in_place(isa, training, bn, x):
    bn.train(training)
    expected = copy.deepcopy(bn)(x)
    out = np.empty_like(x)
    assert copy.deepcopy(bn)(x, out=out) is out
    assert bits(out) == bits(expected)
    assert bn(x, out=x) is x
    assert bits(x) == bits(expected)


@pytest.mark.parametrize("dtype", ["f2", "u1", "i1", "u2", "i2"])
@pytest.mark.parametrize("training", [False, True])
def test_types_of_x(isa, dtype, training, bn, rng):
    x = values(rng, (4, 5, 33), dtype)
    y = bn.train(training)(x)
    assert y.dtype == np.dtype("f2" if dtype == "f2" else "f4")
    mean, var = (x.mean((0, 2), "f8"), x.astype("f8").var((0, 2))) if training else (bn.running_mean, bn.running_var)
    if training:
        # Statistics of halves are within 3e-7; this is about their being used at all.
        assert np.allclose(y, bn_c.batch_norm_inference(x, mean, var, bn.gamma, bn.beta), rtol=2e-3, atol=1e-3)
    else:
        assert_forward(y, x, mean, var, bn.gamma, bn.beta)


def test_x_that_is_no_plain_array(bn, x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    expected = bn(x)
    assert bits(bn(np.load(tmp_path / "x.npy", mmap_mode="r"))) == bits(expected)
    assert bits(bn(memoryview(x))) == bits(expected)
    out = np.empty_like(x)
    view = memoryview(out)
    assert bn(x, out=view) is view
    assert bits(out) == bits(expected)


def test_empty_batch_in_inference(bn):
    assert bn(np.empty((0, 5, 3), "f4")).shape == (0, 5, 3)


# ---- training ---------------------------------------------------------------------------------------


def expected_after(bn, x, weight, unbiased=True):
    """The running statistics after one step from the layer's present ones."""
    stats = bn_c.batch_stats(x, axis=bn.axis)
    var = stats.unbiased_var if unbiased else stats.var
    return (
        (1 - weight) * bn.running_mean.astype("f8") + weight * stats.mean,
        (1 - weight) * bn.running_var.astype("f8") + weight * var,
    )


def assert_running(bn, expected):
    for array, exact in zip((bn.running_mean, bn.running_var), expected, strict=True):
        assert array.dtype == np.float32
        assert np.all(np.abs(array - exact) <= STORED * np.abs(exact))


@pytest.mark.parametrize("momentum", [0.1, 0.3, 0.0, 1.0, 0, 1, np.float32(0.5)])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_training_moves_the_running_statistics(isa, momentum, unbiased, axis, x, rng):
    options = {"momentum": momentum, "unbiased_running_var": unbiased, "axis": axis, "training": True}
    bn = trained(rng, x.shape[axis], **options)
    for step in range(4):
        batch = x + np.float32(step)
        expected = expected_after(bn, batch, float(momentum), unbiased)
        y = bn(batch)
        assert bits(y) == bits(bn_c.batch_norm(batch, bn.gamma, bn.beta, axis=axis))
        assert_running(bn, expected)
        assert bn.num_batches_tracked == 8 + step


def test_no_momentum_is_the_average_of_all_mini_batches(x):
    bn = bn_c.BatchNorm(5, momentum=None, training=True)
    batches = [x * np.float32(step) + np.float32(step * step) for step in range(1, 6)]
    for batch in batches:
        bn(batch)
    stats = [bn_c.batch_stats(batch) for batch in batches]
    expected = [np.mean([getattr(s, name) for s in stats], axis=0) for name in ("mean", "unbiased_var")]
    for array, exact in zip((bn.running_mean, bn.running_var), expected, strict=True):
        assert np.all(np.abs(array - exact) <= len(batches) * STORED * np.abs(exact))
    assert bn.num_batches_tracked == 5


def test_no_momentum_counts_from_the_mini_batches_tracked(bn, x):
    bn.train().momentum = None
    bn.num_batches_tracked = 3
    expected = expected_after(bn, x, 1 / 4)
    bn(x)
    assert_running(bn, expected)


def test_momentum_takes_effect_on_the_next_call(bn, x):
    bn.train()(x)
    bn.momentum = 0.75
    expected = expected_after(bn, x, 0.75)
    bn(x)
    assert_running(bn, expected)


def test_inference_uses_what_training_has_moved(bn, x):
    bn(x)
    bn.train()(x)
    assert_infers(bn.eval(), x)


def test_training_without_gamma_and_beta(x):
    bn = bn_c.BatchNorm(5, affine=False, training=True)
    assert bits(bn(x)) == bits(bn_c.batch_norm(x))
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("training", [False, True])
def test_no_running_statistics(training, x, rng):
    """Those of the mini-batch, in both modes; nothing is tracked."""
    bn = trained(rng, track_running_stats=False, training=training)
    before = state(bn)
    for _ in range(2):
        assert bits(bn(x)) == bits(bn_c.batch_norm(x, bn.gamma, bn.beta))
    assert state(bn) == before
    assert set(bn.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 1, 1)])
def test_single_value_that_is_allowed(shape, unbiased, rng):
    bn = trained(rng, training=True, allow_single_value=True, unbiased_running_var=unbiased)
    x, var = values(rng, shape), bn.running_var
    mean, _ = expected_after(bn, x, 0.1)
    y = bn(x)
    assert np.array_equal(y.ravel(), bn.beta)
    assert_running(bn, (mean, var))
    assert bn.running_var.tobytes() == var.tobytes()
    assert bn.num_batches_tracked == 8


def test_single_value_in_inference(bn, rng):
    assert_infers(bn, values(rng, (1, 5)))


def test_single_sample_of_rank_1(rng):
    bn = trained(rng, axis=-1)
    x = values(rng, (5,))
    assert_infers(bn, x)
    with pytest.raises(ValueError, match="more than one value per channel"):
        bn.train()(x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_values_concern_their_channel_only(value, bn, x):
    healthy, sick = copy.deepcopy(bn).train(), bn.train()
    expected = healthy(x)
    x[1, 2, 3, 4] = value
    y = sick(x)
    others = [0, 1, 3, 4]
    assert bits(y[:, others]) == bits(expected[:, others])
    for name in ("running_mean", "running_var"):
        assert np.array_equal(getattr(sick, name)[others], getattr(healthy, name)[others])
        assert not np.isfinite(getattr(sick, name)[2])


@pytest.mark.parametrize(
    ("running", "value", "momentum"), [(np.inf, 1, 1), (0, np.inf, 0), (np.inf, -np.inf, 0.1), (3e38, 3e38, 0.5)]
)
def test_tracking_never_raises(running, value, momentum, bn):
    """Where NumPy would, y would be written and the state as before."""
    bn.train().momentum, bn.running_mean = momentum, [running] * 5
    before = bn.num_batches_tracked
    with np.errstate(all="raise"):
        bn(np.array([[value] * 5, [1] * 5], "f4"))
    assert bn.num_batches_tracked == before + 1


def test_arrays_are_there_to_be_found_on_the_class():
    for name in ("gamma", "beta", "running_mean", "running_var"):
        assert getattr(bn_c.BatchNorm, name).__doc__


def test_variance_beyond_float32_is_infinite_without_a_warning(bn):
    x = np.zeros((4, 5), "f4")
    x[:, 1] = [1e30, -1e30, 3e30, 0]
    y = bn.train()(x)
    assert np.isfinite(y).all()
    assert np.isinf(bn.running_var).tolist() == [False, True, False, False, False]
    assert np.isfinite(bn.running_mean).all()


# ---- errors -----------------------------------------------------------------------------------------


def called(**arguments):
    def call(bn, x):
        given = {"x": x} | arguments
        bn(given.pop("x"), **given)

    return call


def assigned(name, value):
    return lambda bn, x: setattr(bn, name, value)


def loaded(**changes):
    """A state dict that fits, but for these keys; None takes them out."""

    def load(bn, x):
        d = {key: a * 2 for key, a in bn.state_dict().items()} | changes
        bn.load_state_dict({key: value for key, value in d.items() if value is not None})

    return load


READ_ONLY = np.zeros((6, 5, 7, 9), "f4")
READ_ONLY.flags.writeable = False
BAD = {
    "x of float64": called(x=np.ones((6, 5, 7, 9))),
    "x a list": called(x=[1.0]),
    "x with other channels": called(x=np.ones((6, 4, 7, 9), "f4")),
    "x without the axis": called(x=np.ones(5, "f4")),
    "x with one value": called(x=np.ones((1, 5, 1, 1), "f4")),
    "x with no value": called(x=np.ones((0, 5, 1, 1), "f4")),
    "residual of another shape": called(residual=np.ones((6, 5, 7), "f4")),
    "residual of integers": called(residual=np.ones((6, 5, 7, 9), "i2")),
    "out of another shape": called(out=np.ones((6, 5, 7, 1), "f4")),
    "out of integers": called(out=np.ones((6, 5, 7, 9), "u1")),
    "out that is read-only": called(out=READ_ONLY),
    "out not of dtype": called(out=np.ones((6, 5, 7, 9), "f2"), dtype="f4"),
    "dtype": called(dtype="f8"),
    "gamma too short": assigned("gamma", np.ones(4)),
    "beta of rank 2": assigned("beta", np.ones((5, 1))),
    "running_mean complex": assigned("running_mean", np.ones(5, complex)),
    "running_var no array": assigned("running_var", 1.0),
    "running_var None": assigned("running_var", None),
    "eps negative": assigned("eps", -1e-5),
    "eps NaN": assigned("eps", np.nan),
    "momentum above 1": assigned("momentum", 1.5),
    "momentum a string": assigned("momentum", "0.1"),
    "activation": assigned("activation", "gelu"),
    "activation out of order": assigned("activation", ("clip", 1, 0)),
    "num_threads": assigned("num_threads", 0),
    "num_batches_tracked": assigned("num_batches_tracked", -1),
    "training": assigned("training", 1),
    "weight too short": loaded(weight=np.ones(4)),
    "running_var too short": loaded(running_var=np.ones(4)),
    "running_mean of rank 0": loaded(running_mean=np.float32(1)),
    "running_mean of integers": loaded(running_mean=np.ones(5, int)),
    "num_batches_tracked loaded negative": loaded(num_batches_tracked=np.array(-1)),
    "num_batches_tracked loaded a vector": loaded(num_batches_tracked=np.arange(5)),
    "no weight": loaded(weight=None),
    "no bias": loaded(bias=None),
    "no running_mean": loaded(running_mean=None),
    "no running_var": loaded(running_var=None),
    "state no mapping": lambda bn, x: bn.load_state_dict([1, 2, 3]),
    "state with another prefix": lambda bn, x: bn.load_state_dict(bn.state_dict(), prefix="bn1."),
}


@pytest.mark.parametrize("act", BAD.values(), ids=BAD)
def test_errors_leave_everything_as_it_was(act, bn, x):
    bn.train()
    before, x_before = state(bn), x.copy()
    with pytest.raises((TypeError, ValueError)):
        act(bn, x)
    assert state(bn) == before
    assert np.array_equal(x, x_before)
    assert_infers(bn.eval(), x)


@pytest.mark.parametrize("act", [called(dtype="f8"), called(residual=np.ones(3, "f4"))])
@pytest.mark.parametrize("training", [False, True])
def test_errors_leave_out_as_it_was(act, training, bn, x):
    out = np.full_like(x, 7)
    with pytest.raises((TypeError, ValueError)):
        act(lambda x, **options: bn.train(training)(x, out=out, **options), x)
    assert np.all(out == 7)


def test_single_value_says_what_allows_it(bn):
    with pytest.raises(ValueError, match=r"x: expected more than one value.*\(1, 5\).*allow_single_value"):
        bn.train()(np.ones((1, 5), "f4"))


# ---- state dicts ------------------------------------------------------------------------------------

KEYS = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}


def test_state_dict_has_copies_under_pytorchs_keys(bn, x):
    d, y = bn.state_dict(), bn(x)
    assert set(d) == {*KEYS, "num_batches_tracked"}
    for key, name in KEYS.items():
        assert d[key].dtype == np.float32
        assert np.array_equal(d[key], getattr(bn, name))
        d[key][:] = 9
    assert (d["num_batches_tracked"].dtype, d["num_batches_tracked"].shape) == (np.int64, ())
    assert int(d["num_batches_tracked"]) == 7
    assert np.array_equal(bn(x), y)


@pytest.mark.parametrize("prefix", ["", "layer1.0.bn1."])
@pytest.mark.parametrize("form", [np.asarray, np.ndarray.tolist, lambda a: a.astype("f8") if a.shape else a])
def test_load_state_dict(prefix, form, bn, x, rng):
    other = trained(rng)
    other(x)
    d = {prefix + key: form(a) for key, a in bn.state_dict().items()}
    other.load_state_dict(d | {"unrelated": 3, "layer2.bn.weight": np.ones(2)}, prefix)
    assert state(other) == state(bn)
    assert bits(other(x)) == bits(bn(x))


def test_load_state_dict_makes_copies(bn, x):
    d = {key: a.astype("f8") if a.shape else a for key, a in bn.state_dict().items()}
    bn.load_state_dict(d)
    y = bn(x)
    for a in d.values():
        a[...] = 9
    assert np.array_equal(bn(x), y)
    assert bn.num_batches_tracked == 7


def test_load_state_dict_without_a_counter_keeps_it(bn, rng):
    d = trained(rng).state_dict()
    del d["num_batches_tracked"]
    bn.num_batches_tracked = 42
    bn.load_state_dict(d)
    assert bn.num_batches_tracked == 42
    assert np.array_equal(bn.gamma, d["weight"])


def test_a_missing_key_is_named(bn):
    with pytest.raises(ValueError, match=r"state: expected a key 'bn1\.weight'"):
        bn.load_state_dict(bn.state_dict(), prefix="bn1.")


@pytest.mark.parametrize("prefix", ["", "features.3."])
@pytest.mark.parametrize(("affine", "track"), [(True, True), (True, False), (False, True)])
def test_from_torch(prefix, affine, track, x, rng):
    source = trained(rng, affine=affine, track_running_stats=track)
    d = {prefix + key: a for key, a in source.state_dict().items()}
    bn = bn_c.BatchNorm.from_torch(d, prefix)
    assert state(bn) == state(source)
    assert bits(bn(x)) == bits(source(x))


def test_from_torch_takes_the_options_of_the_constructor(bn, x):
    options = {"eps": 1e-3, "momentum": None, "axis": -1, "activation": "relu", "num_threads": 2, "training": True}
    made = bn_c.BatchNorm.from_torch(bn.state_dict(), **options)
    for name, value in options.items():
        assert getattr(made, name) == value
    assert np.array_equal(made.gamma, bn.gamma)
    single = bn_c.BatchNorm.from_torch(bn.state_dict(), training=True, allow_single_value=True)
    assert np.array_equal(single(np.ones((1, 5), "f4"))[0], bn.beta)


def test_from_torch_makes_a_subclass(bn):
    class Sub(bn_c.BatchNorm):
        pass

    assert type(Sub.from_torch(bn.state_dict())) is Sub


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "expected a key 'weight'"),
        ({"bias": None}, "expected a key 'bias'"),
        ({"running_mean": None}, "expected a key 'running_mean'"),
        ({"running_var": None}, "expected a key 'running_var'"),
        ({"running_var": np.ones(4)}, r"state\['running_var'\]: expected shape \(5,\), .* got \(4,\)"),
        ({"weight": 3}, r"state\['weight'\]: expected one value per channel, got int"),
        ({"num_batches_tracked": -1}, r"state\['num_batches_tracked'\]: expected an integer from 0"),
        (dict.fromkeys(KEYS), "expected keys such as"),
    ],
)
def test_from_torch_of_an_incomplete_state(change, message, bn):
    d = {key: value for key, value in (bn.state_dict() | change).items() if value is not None}
    with pytest.raises((TypeError, ValueError), match=message):
        bn_c.BatchNorm.from_torch(d)


# ---- copies -----------------------------------------------------------------------------------------

COPIES = {
    "pickle": lambda bn: pickle.loads(pickle.dumps(bn)),
    "old pickle": lambda bn: pickle.loads(pickle.dumps(bn, protocol=0)),
    "buffers": received,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.5, "momentum": None, "axis": -1, "activation": ("clip", 0, 1), "num_threads": None},
        {"training": True, "unbiased_running_var": False, "allow_single_value": True},
    ],
    ids=str,
)
def test_copies_do_the_same(make, options, x, rng):
    x = x[..., :5]
    bn = trained(rng, **options)
    bn(x)
    again = make(bn)
    assert state(again) == state(bn)
    assert repr(again) == repr(bn)
    for mode in (False, True, False):
        assert bits(again.train(mode)(x)) == bits(bn.train(mode)(x))
        assert state(again) == state(bn)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_are_independent(make, bn, x):
    y, before = bn(x), state(bn)
    again = make(bn)
    again.gamma = np.zeros(5)
    again.eps = 0.5
    again.train()(x)
    assert state(bn) == before
    assert bits(bn(x)) == bits(y)


class Tagged(bn_c.BatchNorm):
    def __init__(self, tag):
        super().__init__(5, axis=-1)
        self.tag = tag


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copies_have_what_users_and_subclasses_added(make, rng):
    bn = Tagged("stem")
    bn.gamma, bn.note = rng.standard_normal(5), [1, 2]
    again = make(bn)
    assert type(again) is Tagged
    assert (again.tag, again.note) == ("stem", [1, 2])
    assert state(again) == state(bn)


# ---- threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "num_threads"), [((2, 5), 1), ((3, 5, 90, 91), 1), ((3, 5, 150, 151), 2)])
def test_inference_shared_between_threads(isa, shape, num_threads, bn, rng):
    """Also the first calls, which make the layer ready, at the same moment."""
    bn.num_threads = num_threads
    inputs = [values(rng, shape) for _ in range(8)]
    expected = [bits(as_function(bn, x)) for x in inputs]
    start = threading.Barrier(8)

    def work(x):
        start.wait()
        return [bits(bn(x)) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for results, right in zip(pool.map(work, inputs), expected, strict=True):
            assert results == [right] * 10
