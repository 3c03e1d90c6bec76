"""Whatever the arguments: the result of the oracle, or TypeError or ValueError with nothing written or changed.

Hypothesis makes them up; `pytest --thorough` tries a hundred times as many. All arrays end or begin at pages that no
one may touch.
"""

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from fuzz import check_arguments, corpus
from guard import Guarded, extent
from oracle import CACHES, bits

import bn_c
from bn_c import _dispatch

pytest.importorskip("hypothesis")
from hypothesis import assume, given, note
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")
SPECIAL = (0.0, -0.0, 1.0, NAN, INF, -INF, 1e-45, -1e-39, 6e-8, 65504.0, 3e38, -3e38, 1e30, 1e-30)
BAD_TYPES = ("f8", ">f4", ">f2", "i4", "u8", "?", "c8", "M8[s]", "V4", "S4", "f4,f4")
MOST = 4000  # elements


# ---- good arguments ---------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 63, 65, 255, 257, 513, 1025]))


@st.composite
def shapes(draw):
    shape = []
    for n in draw(st.lists(sizes, min_size=1, max_size=draw(st.sampled_from([2, 4, 6, 32])))):
        shape.append(n if n * np.prod(shape, dtype=int) <= MOST else 1)
    if draw(st.integers(0, 19)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    return tuple(shape)


@st.composite
def strides(draw, shape, itemsize, broadcast=False):
    """Of an array whose dimensions lie in memory in any order, in steps of any sign, with gaps; or standing still."""
    result, span, room = [0] * len(shape), itemsize, 64  # times the elements' own bytes: steps multiply
    for d in draw(st.permutations(range(len(shape)))):
        step = draw(st.sampled_from([1, 1, 1, 1, 2, 3, -1, -2] if room > 3 else [1, -1]))
        room //= abs(step)
        if broadcast and draw(st.integers(0, 9)) == 0:
            continue
        result[d] = span * step
        span = span * abs(step) * max(shape[d], 1) + itemsize * draw(st.sampled_from([0, 0, 0, 1, 3]))
    return tuple(result)


def numbers(seed, kind, shape, dtype):
    """Random numbers of a kind, in any type."""
    rng, dtype = np.random.default_rng(seed), np.dtype(dtype)
    if dtype.kind != "f":
        return oracle.values(rng, shape, dtype)
    x = rng.standard_normal(shape)
    with np.errstate(all="ignore"):
        if kind == "constant":
            x = np.full(shape, x.flat[0] if x.size else 0)
        elif kind == "special":
            x = np.where(rng.random(shape) < 0.1, rng.choice(SPECIAL, shape), x)
        else:
            x = x * kind[0] + kind[1]
        return x.astype(dtype)


kinds = st.sampled_from(["special", "constant", (1, 0), (1, 0), (1, 1e3), (1, 1e6), (1e37, 0), (1e-38, 0), (1e-42, 0)])


@st.composite
def arrays(draw, shape, types, broadcast=False):
    """An array of these types at any place of a memory of its own, and that memory."""
    dtype = np.dtype(draw(st.sampled_from(types)))
    lying = draw(strides(shape, dtype.itemsize, broadcast))
    gap = draw(st.integers(0, 15)) * dtype.itemsize
    memory = Guarded(sum(extent(shape, lying, dtype.itemsize)) + gap)
    a = memory.array(shape, dtype, lying, draw(st.booleans()), gap)
    held = tuple(slice(None) if stride else slice(0, 1) for stride in lying)
    a[held] = numbers(draw(seeds), draw(kinds), a[held].shape, dtype)
    return a, memory


@st.composite
def parameters(draw, channels, low=-3.0):
    """One number per channel in any of the forms that are taken."""
    rng = np.random.default_rng(draw(seeds))
    values = rng.uniform(low, 3, channels)
    if channels and draw(st.integers(0, 3)) == 0:
        values[rng.integers(channels)] = draw(st.sampled_from(SPECIAL))
    with np.errstate(all="ignore"):
        values = values.astype(draw(st.sampled_from(["f8", "f4", "f2", "g"])))
    form = draw(st.sampled_from(["array", "list", "reversed", "every other", "read-only"]))
    if form == "list":
        return values.tolist() if values.dtype != "g" else list(values)
    if form == "reversed":
        return values[::-1]
    if form == "every other":
        return np.repeat(values, 2)[::2]
    values.flags.writeable = form != "read-only"
    return values


activations = st.one_of(
    st.sampled_from(oracle.ACTIVATIONS),
    st.tuples(st.just("leaky_relu"), st.sampled_from([0.0, 0.01, -0.25, 1.0])),
    st.tuples(st.just("clip"), st.floats(-9, 0, width=32), st.floats(0, 9, width=32)),
)
floats, inputs = oracle.FLOATS, (*oracle.FLOATS, *oracle.INTEGERS)


@st.composite
def cases(draw):
    """All arguments of a call, each as it should be, except that out may overlap."""
    shape = draw(shapes())
    case = SimpleNamespace(axis=draw(st.integers(-len(shape), len(shape) - 1)), good=True)
    channels = case.channels = shape[case.axis]
    case.x, memory = draw(arrays(shape, inputs, broadcast=True))
    case.memories = [memory]
    case.gamma, case.beta = (draw(st.none() | parameters(channels)) for _ in range(2))
    case.mean, case.var = draw(parameters(channels)), draw(parameters(channels, 0))
    case.options = {
        "eps": draw(st.sampled_from([1e-5, 1e-3, 0.0, 1, 1e-300, 1e300])),
        "activation": draw(activations),
        "num_threads": draw(st.sampled_from([None, 1, 2, 3])),
    }
    out = draw(st.sampled_from(["new", "new", "apart", "apart", "x", "overlap"]))
    if out == "apart":
        case.out, apart = draw(arrays(shape, floats))
        case.memories.append(apart)
    elif (
        out == "x" and case.x.dtype.kind == "f" and not np.any((np.array(case.x.strides) == 0) & (np.array(shape) > 1))
    ):
        case.out = case.x
    elif out == "overlap":
        case.good = None
        dtype = np.dtype(draw(st.sampled_from(floats)))
        lying = draw(st.just(case.x.strides) | strides(shape, dtype.itemsize))
        room = memory.size - sum(extent(shape, lying, dtype.itemsize))
        if room < 0 or any(stride % dtype.itemsize for stride in lying):
            lying = np.empty(shape, dtype).strides
            room = memory.size - dtype.itemsize * int(np.prod(shape))
        gap = draw(st.integers(0, max(room, 0) // dtype.itemsize)) * dtype.itemsize
        case.out = memory.array(shape, dtype, lying, draw(st.booleans()), gap) if room >= 0 else None
    else:
        case.out = None
    residual = draw(st.sampled_from(["none", "none", "apart", "x", "out"]))
    case.residual = None
    if residual == "apart":
        case.residual, apart = draw(arrays(shape, floats, broadcast=True))
        case.memories.append(apart)
    elif residual == "x" and case.x.dtype.kind == "f":
        case.residual = case.x
    elif residual == "out":
        case.residual = case.out
    if case.out is None:
        case.dtype = draw(st.sampled_from([None, "f4", np.float16, np.dtype("f4")]))
    else:
        case.dtype = draw(st.sampled_from([None, case.out.dtype]))
    return case


# ---- what has to hold -------------------------------------------------------------------------------


def options(case):
    return {**case.options, "axis": case.axis, "residual": case.residual, "dtype": case.dtype, "out": case.out}


def inference(case):
    y = bn_c.batch_norm_inference(case.x, case.mean, case.var, case.gamma, case.beta, **options(case))
    return y, case.mean, case.var, case.gamma, case.beta


def batch(case):
    y, stats = bn_c.batch_norm(case.x, case.gamma, case.beta, **options(case), return_stats=True)
    return y, stats.mean, stats.var, case.gamma, case.beta


def layer(case):
    bn = case.layer
    y = bn(case.x, residual=case.residual, dtype=case.dtype, out=case.out)
    return y, bn.running_mean, bn.running_var, bn.gamma, bn.beta


def training(case):
    """y has the bits of `batch_norm`, which is tested by itself."""
    bn = case.layer
    expected = None
    if not is_refused(case, "training"):
        dtype = case.dtype if case.out is None else case.out.dtype
        expected = bn_c.batch_norm(case.x, bn.gamma, bn.beta, **{**options(case), "dtype": dtype, "out": None})
    y = bn(case.x, residual=case.residual, dtype=case.dtype, out=case.out)
    assert bits(y) == bits(expected)


def statistics(case):
    checked(bn_c.batch_stats(case.x, axis=case.axis, num_threads=case.options["num_threads"]), case)


def update(case):
    checked(case.stats.update(case.x, axis=case.axis), case)


def checked(stats, case):
    assert stats.count == (case.x.size // case.channels if case.channels else 0)
    if stats.count and np.isfinite(case.x).all():
        oracle.assert_statistics(stats, case.x, case.axis)


CALLS = {call.__name__: call for call in (inference, batch, layer, training, statistics, update)}


def prepared(case):
    """With a layer and statistics of the case's parameters."""
    case.layer = bn_c.BatchNorm(case.channels, axis=case.axis, **case.options)
    for name, value in (("gamma", case.gamma), ("beta", case.beta)):
        if value is not None:
            setattr(case.layer, name, value)
    case.layer.running_mean, case.layer.running_var = case.mean, case.var
    case.stats = bn_c.BatchStats(case.channels)
    return case


def arguments(case, *but):
    """What no call may change: all memory but the elements of these arrays, and the parameters."""
    given = [value for value in (case.gamma, case.beta, case.mean, case.var) if value is not None]
    return [memory.outside(*but).tobytes() for memory in case.memories], [bits(np.asarray(v, "f8")) for v in given]


def state(case):
    """What a call that raises may not change either."""
    buffers = {key: value.tobytes() for key, value in case.layer.state_dict().items()}
    return arguments(case), repr(case.layer), buffers, case.stats.to_dict()


def is_refused(case, name):
    """Too few elements per channel."""
    least = {"training": 2, "batch": 1}.get(name, 0)
    return case.channels > 0 and case.x.size // case.channels < least


@pytest.mark.parametrize("name", CALLS)
@given(case=cases(), isa=st.sampled_from(bn_c.supported_isas()), caches=st.sampled_from(CACHES))
def test_the_result_of_the_oracle_or_an_error(name, case, isa, caches):
    """Nothing but out is written, and on an error not even that."""
    prepared(case)
    x, residual = (None if a is None else a.copy() for a in (case.x, case.residual))
    out = [] if case.out is None else [case.out]
    if name == "training":
        case.layer.train()
    before, around = state(case), arguments(case, *out)
    _dispatch.use(isa, caches)
    try:
        result = CALLS[name](case)
    except (TypeError, ValueError) as error:
        note(repr(error))
        assert case.good is None or is_refused(case, name)
        assert state(case) == before
        return
    finally:
        _dispatch.use(bn_c.isa)
    assert not is_refused(case, name)
    assert arguments(case, *out) == around
    if result is None:
        return
    y, mean, var, gamma, beta = result
    assert y.shape == x.shape
    assert y.dtype == (case.dtype or (case.out.dtype if out else x.dtype if x.dtype.kind == "f" else np.float32))
    oracle.assert_forward(
        y, x, mean, var, gamma, beta, case.options["eps"], case.axis, residual, case.options["activation"]
    )


# ---- one bad argument -------------------------------------------------------------------------------


def misplaced(draw, a):
    """The same values, not where their type wants to be."""
    memory = Guarded(a.nbytes + 16)
    return memory.array(a.shape, a.dtype, np.empty(a.shape, a.dtype).strides, gap=draw(st.integers(1, a.itemsize - 1)))


@st.composite
def bad_arrays(draw, a, writable, bound):
    """Something like the array a that no call takes in its place; `bound`: another one must have its shape."""
    faults = ["type", "place", "value", *["rank", "shape"] * bound, *["writable"] * writable]
    fault = draw(st.sampled_from(faults))
    if fault == "type":
        return np.zeros(a.shape, draw(st.sampled_from(BAD_TYPES)))
    if fault == "rank":
        return draw(st.sampled_from([np.zeros((), "f4"), np.zeros((*a.shape, 1), "f4"), np.zeros((1, *a.shape), "f4")]))
    if fault == "shape":
        d = draw(st.integers(0, a.ndim - 1))
        return np.zeros((*a.shape[:d], a.shape[d] + draw(st.integers(1, 9)), *a.shape[d + 1 :]), "f4")
    if fault == "place" and a.size and a.itemsize > 1:
        return misplaced(draw, a)
    if fault == "writable" and a.size:
        a = np.zeros(a.shape, "f4")
        a.flags.writeable = False
        return a
    return draw(st.sampled_from([3, 1.5, "x", b"x", [1.0], (1.0,), {}, object(), np.float32(3), True]))


@st.composite
def bad_parameters(draw, channels):
    wrong = draw(st.integers(0, 40).filter(lambda n: n != channels))
    return draw(
        st.sampled_from(
            [
                np.ones(wrong),
                [1.0] * wrong,
                np.ones((channels, 1)),
                np.ones((1, channels)),
                np.float64(1),
                1.0,
                "ones",
                np.ones(channels, "c8"),
                np.ones(channels, bool),
                np.ones(channels, "i4"),
                object(),
                {},
                ["one"] * channels or 0,
            ]
        )
    )


BAD_OPTIONS = {
    "eps": [-1e-5, NAN, INF, -INF, None, "1", 1j, True, [1e-5], 10**400],
    "axis": [None, 1.0, "1", True, 99, -99, 10**30, [1]],
    "activation": [
        "tanh",
        1,
        ("clip", 1, 0),
        ("clip", NAN, 1),
        ("leaky_relu", INF),
        ("leaky_relu",),
        (),
        ["relu"],
        ("relu", 1),
    ],
    "num_threads": [0, -1, 1.5, "2", True, -(10**30)],
    "dtype": ["f8", ">f4", "i4", "nonsense", 3.5, object()],
}


@st.composite
def spoiled(draw):
    case = draw(cases().filter(lambda case: case.good))
    argument = draw(st.sampled_from(["x", "out", "residual", "gamma", "beta", "mean", "var", *BAD_OPTIONS]))
    case.argument = argument
    if argument in ("x", "out", "residual"):
        bound = argument != "x" or case.out is not None or case.residual is not None
        case.bad = draw(bad_arrays(case.x, argument == "out", bound))
    elif argument in BAD_OPTIONS:
        case.bad = draw(st.sampled_from(BAD_OPTIONS[argument]))
    else:
        case.bad = draw(bad_parameters(case.channels))
    return case


@given(case=spoiled(), name=st.sampled_from(["inference", "batch"]))
def test_a_bad_argument_is_named_and_nothing_is_written(case, name):
    assume(name == "inference" or case.argument not in ("mean", "var"))
    prepared(case)
    before = arguments(case)
    call = SimpleNamespace(**vars(case))
    (call.options if case.argument in call.options else vars(call))[case.argument] = case.bad
    with pytest.raises((TypeError, ValueError)) as caught:
        CALLS[name](call)
    said = str(caught.value)
    note(said)
    assert case.argument in said
    assert "\n" not in said
    assert arguments(case) == before


def test_corpus():
    """What fuzzing begins with, and what it found."""
    check = check_arguments()
    tried = [check(file.read_bytes()) for file in corpus("arguments")]
    assert any(tried)
