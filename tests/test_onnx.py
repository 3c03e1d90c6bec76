"""Against ONNX: its own test cases, its models of all opsets in, and ONNX Runtime's results."""

from pathlib import Path

import numpy as np
import pytest

import bn_c

onnx = pytest.importorskip("onnx", reason="onnx is not installed: its models are not tested")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.backend.test.case.node import _NodeTestCases, batch_normalization  # noqa: E402, F401
from onnx.backend.test.loader import load_model_tests  # noqa: E402
from test_bad_inputs import error_of, isolated  # noqa: E402
from test_models import refused  # noqa: E402

AGREE = 2e-5
PARAMETERS = ("scale", "B", "mean", "var")


# ---- the backend's node cases -----------------------------------------------------------------------


def is_batch_norm(case):
    return [node.op_type for node in case.model.graph.node] == ["BatchNormalization"]


CASES = {case.name: case for case in _NodeTestCases if is_batch_norm(case)}
CONVERTED = {case.name: case for case in load_model_tests(kind="pytorch-converted") if "BatchNorm" in case.name}


def test_both_modes_have_cases():
    modes = [len(case.model.graph.output) > 1 for case in CASES.values()]
    assert modes.count(True) >= 2
    assert modes.count(False) >= 2
    assert len(CONVERTED) >= 5


@pytest.mark.parametrize("name", CASES)
def test_node_case(name):
    """Its parameters are inputs of the model; as initializers they make the layer."""
    case = CASES[name]
    for given, expected in case.data_sets:
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        names = [value.name for value in model.graph.input]
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(given[1:], names[1:], strict=True))
        layer = bn_c.BatchNorm.from_onnx(model)
        assert layer.training is (len(expected) == 3)
        results = [layer(given[0]), layer.running_mean, layer.running_var]
        for ours, theirs in zip(results, expected, strict=False):
            assert ours.dtype == theirs.dtype
            assert np.allclose(ours, theirs, rtol=AGREE, atol=AGREE)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_from_pytorch(name):
    """Models of opset 6, as PyTorch once wrote them, with their inputs and outputs."""
    folder = Path(CONVERTED[name].model_dir)
    layer = bn_c.BatchNorm.from_onnx(folder / "model.onnx")
    for data in folder.glob("test_data_set_*"):
        given, expected = (
            numpy_helper.to_array(onnx.load_tensor(data / f"{kind}_0.pb")) for kind in ("input", "output")
        )
        assert np.allclose(layer(given), expected, rtol=AGREE, atol=AGREE)


# ---- models -----------------------------------------------------------------------------------------


def parameters(rng, channels=4, dtype="f4"):
    arrays = [
        rng.normal(1, 1, channels),
        rng.normal(0, 1, channels),
        rng.normal(0, 1, channels),
        rng.uniform(1, 2, channels),
    ]
    return {name: a.astype(dtype) for name, a in zip(PARAMETERS, arrays, strict=True)}


def batch_norm(name="bn", x="x", y="y", prefix="", outputs=(), **attributes):
    inputs = [x, *(prefix + parameter for parameter in PARAMETERS)]
    return helper.make_node("BatchNormalization", inputs, [y, *outputs], name, **attributes)


def model_of(nodes, arrays, opset=15, shape=(2, 4, 3, 3), functions=(), outputs=("y",)):
    """Arrays that no node computes are initializers."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes), "model", [value("x", TensorProto.FLOAT, shape)],
        [value(output, TensorProto.FLOAT, None) for output in outputs],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("other", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


def assert_layer(layer, arrays, prefix=""):
    state = layer.state_dict()
    for key, name in zip(("weight", "bias", "running_mean", "running_var"), PARAMETERS, strict=True):
        assert np.array_equal(state[key], arrays[prefix + name].astype("f4"))


@pytest.mark.parametrize("opset", range(7, 25))
def test_opsets(opset, path, rng):
    arrays = parameters(rng)
    attributes = {"spatial": 1} if opset < 9 else {}
    onnx.save(model_of([batch_norm(epsilon=1e-3, momentum=0.99, **attributes)], arrays, opset), path)
    layer = bn_c.load_layers(path)["bn"]
    assert_layer(layer, arrays)
    assert (layer.eps, layer.momentum, layer.axis, layer.training) == (1e-3, 0.01, 1, False)
    assert repr(bn_c.BatchNorm.from_onnx(path)) == repr(layer)
    assert repr(bn_c.BatchNorm.from_onnx(str(path), "bn")) == repr(layer)
    assert repr(bn_c.BatchNorm.from_onnx(onnx.load(path), node="y")) == repr(layer)


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15])
def test_runtime(opset, path, rng):
    """ONNX Runtime's inference with the model, and ours with the layer from it."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: nothing is compared with it")
    onnx.save(model_of([batch_norm(epsilon=0.01)], parameters(rng), opset), path)
    x = rng.normal(1, 2, (2, 4, 3, 3)).astype("f4")
    expected = runtime.InferenceSession(path).run(None, {"x": x})[0]
    assert np.allclose(bn_c.BatchNorm.from_onnx(path)(x), expected, rtol=AGREE, atol=AGREE)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.5, 0.0, 1.0, 0.999, 0.97])
def test_momentum(momentum, rng):
    """Ours is the weight of the new mini-batch, theirs that of the old."""
    layer = bn_c.BatchNorm.from_onnx(model_of([batch_norm(momentum=momentum)], parameters(rng)))
    assert layer.momentum == pytest.approx(1 - momentum, abs=1e-12)


def test_defaults_and_training(rng):
    arrays = parameters(rng)
    layer = bn_c.BatchNorm.from_onnx(model_of([batch_norm()], arrays))
    assert (layer.eps, layer.momentum, layer.training) == (1e-5, 0.1, False)
    training = batch_norm(training_mode=1, outputs=["m", "v"])
    assert bn_c.BatchNorm.from_onnx(model_of([training], arrays)).training
    older = batch_norm(outputs=["m", "v", "saved_m", "saved_v"])
    assert bn_c.BatchNorm.from_onnx(model_of([older], arrays, 9)).training
    for is_test in (0, 1):
        oldest = batch_norm(is_test=is_test)
        assert bn_c.BatchNorm.from_onnx(model_of([oldest], arrays, 6)).training is not bool(is_test)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "bfloat16"])
@pytest.mark.parametrize("raw", [True, False])
def test_dtypes(dtype, raw, rng):
    given = parameters(rng)
    if dtype == "bfloat16":
        arrays = {name: (a.view("u4") & 0xFFFF0000).view("f4") for name, a in given.items()}
        kind = TensorProto.BFLOAT16
    else:
        arrays = {name: a.astype(dtype) for name, a in given.items()}
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = model_of([batch_norm()], {})
    for name, a in arrays.items():
        data = a.tobytes() if dtype != "bfloat16" else (a.view("u4") >> 16).astype("u2").tobytes()
        values = data if raw else a.tolist()
        model.graph.initializer.append(helper.make_tensor(name, kind, a.shape, values, raw=raw))
    assert_layer(bn_c.BatchNorm.from_onnx(model), arrays)


def test_names_and_where_constants_are(path, rng):
    """Several layers: named or not, with Constant nodes, initializers that are shared through Identity, in branches."""
    arrays = {prefix + name: a for prefix in "abc" for name, a in parameters(rng).items()}
    constants = [
        helper.make_node("Constant", [], ["a" + name], value=numpy_helper.from_array(arrays["a" + name]))
        for name in PARAMETERS
    ]
    shared = [
        helper.make_node("Identity", ["bmean"], ["i"]),
        helper.make_node("Identity", ["i"], ["dmean"]),
        *(helper.make_node("Identity", ["b" + name], ["d" + name]) for name in ("scale", "B", "var")),
    ]
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    then = helper.make_graph([batch_norm("then_bn", "x4", "inner", "c")], "then", [], [value])
    other = helper.make_graph([helper.make_node("Identity", ["x4"], ["inner"])], "else", [], [value])
    nodes = [
        *constants,
        batch_norm("/layer1/bn1/BatchNormalization", "x", "x2", "a"),
        batch_norm("", "x2", "x3", "b"),
        *shared,
        batch_norm("same_as_before", "x3", "x4", "d"),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other),
        helper.make_node("BatchNormalization", ["x"], ["z"], "of another kind", domain="other"),
    ]
    kept = {name: a for name, a in arrays.items() if name[0] != "a"} | {"yes": np.array(True)}
    onnx.save(model_of(nodes, kept), path)
    layers = bn_c.load_layers(path)
    assert list(layers) == ["/layer1/bn1/BatchNormalization", "x3", "same_as_before", "then_bn"]
    for layer, prefix in zip(layers.values(), "abbc", strict=True):
        assert_layer(layer, arrays, prefix)
    for node in ("x2", "x3", "then_bn"):
        assert_layer(bn_c.BatchNorm.from_onnx(path, node), arrays, {"x2": "a", "x3": "b"}.get(node, "c"))


def test_deep_branches(rng):
    arrays = parameters(rng)
    graph = helper.make_graph([batch_norm()], "innermost", [], [])
    for _ in range(20):
        graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "outer", [], [])
    assert_layer(bn_c.BatchNorm.from_onnx(model_of(graph.node, arrays)), arrays)


def test_external_data(path, rng):
    arrays = parameters(rng)
    onnx.save(
        model_of([batch_norm()], arrays), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert path.with_name("weights.bin").exists()
    assert_layer(bn_c.load_layers(path)["bn"], arrays)
    assert_layer(bn_c.BatchNorm.from_onnx(onnx.load(path)), arrays)
    with pytest.raises(ValueError, match=r"^model_or_path: .*pass the model's path"):
        bn_c.BatchNorm.from_onnx(onnx.load(path, load_external_data=False))
    path.with_name("weights.bin").write_bytes(b"short")
    refused(path)
    path.with_name("weights.bin").unlink()
    refused(path)


@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
def test_from_pytorch(path, rng):
    """A network as PyTorch exports it, with its batch norm before the convolution, where it stays."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing of it is loaded")
    bn = torch.nn.BatchNorm2d(4, eps=1e-3)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            tensor.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, 4)))
    network = torch.nn.Sequential(bn, torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)).eval()
    x = torch.from_numpy(rng.normal(1, 2, (2, 4, 5, 5)).astype("f4"))
    with pytest.warns(DeprecationWarning, match="legacy"):
        torch.onnx.export(network, (x,), path, dynamo=False)
    (layer,) = bn_c.load_layers(path).values()
    with torch.inference_mode():
        assert np.allclose(layer(x), bn(x), rtol=AGREE, atol=AGREE)
    assert layer.eps == 1e-3


# ---- what is refused --------------------------------------------------------------------------------


def changed(rng, nodes=None, without=(), more=None, **options):
    arrays = {name: a for name, a in parameters(rng).items() if name not in without}
    return model_of(nodes or [batch_norm()], {**arrays, **(more or {})}, **options)


def bad_tensor(**fields):
    """A scale that says other things about itself than its data."""
    tensor = numpy_helper.from_array(np.ones(4, "f4"), "scale")
    for name, value in fields.items():
        if name == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        else:
            setattr(tensor, name, value)

    def make(rng):
        model = changed(rng, without=["scale"])
        model.graph.initializer.append(tensor)
        return model

    return make


def external(location):
    def make(rng):
        model = bad_tensor(data_location=TensorProto.EXTERNAL, raw_data=b"")(rng)
        model.graph.initializer[-1].external_data.add(key="location", value=location)
        return model

    return make


def in_function(rng):
    function = helper.make_function(
        "other", "block", ["x", *PARAMETERS], ["y"], [batch_norm()], [helper.make_opsetid("", 15)]
    )
    call = helper.make_node("block", ["x", *PARAMETERS], ["y"], domain="other")
    return changed(rng, [call], functions=[function])


def node(*inputs, **attributes):
    return lambda rng: changed(rng, [helper.make_node("BatchNormalization", inputs, ["y"], "bn", **attributes)])


GIVEN = ("x", *PARAMETERS)
RELU = helper.make_node("Relu", ["B"], ["scale"])
LOOP = [helper.make_node("Identity", ["s"], ["scale"]), helper.make_node("Identity", ["scale"], ["s"])]
BAD = {
    "none": (lambda rng: changed(rng, [helper.make_node("Relu", ["x"], ["y"])]), "no BatchNormalization node"),
    "computed": (
        lambda rng: changed(rng, [RELU, batch_norm()], ["scale"]),
        "'scale', which is computed by a node R",
    ),
    "fed": (lambda rng: changed(rng, without=["mean"]), "'mean', which is computed or fed at run time"),
    "endless_identity": (lambda rng: changed(rng, [*LOOP, batch_norm()], ["scale"]), "by a node Identity"),
    "in_a_function": (in_function, "inline"),
    "not_spatial": (lambda rng: changed(rng, [batch_norm(spatial=0)], opset=7), "spatial=1"),
    "name_twice": (lambda rng: changed(rng, [batch_norm(), batch_norm(y="y2")]), "'bn' twice"),
    "no_opset": (lambda rng: helper.make_model(changed(rng).graph, opset_imports=[]), "opset"),
    "few_inputs": (node("x", "scale", "B"), None),
    "no_scale": (node("x", "", "B", "mean", "var"), "''"),
    "negative_eps": (node(*GIVEN, epsilon=-1.0), "eps"),
    "nan_eps": (node(*GIVEN, epsilon=float("nan")), "eps"),
    "eps_is_text": (node(*GIVEN, epsilon="1"), None),
    "momentum_2": (node(*GIVEN, momentum=2.0), "momentum"),
    "momentum_nan": (node(*GIVEN, momentum=float("nan")), "momentum"),
    "momentum_is_a_list": (node(*GIVEN, momentum=[0.9]), None),
    "other_length": (lambda rng: changed(rng, without=["var"], more={"var": np.ones(3, "f4")}), "running_var"),
    "two_dimensions": (lambda rng: changed(rng, without=["mean"], more={"mean": np.ones((4, 1), "f4")}), None),
    "one_number": (lambda rng: changed(rng, without=["mean"], more={"mean": np.array(1, "f4")}), None),
    "integers": (lambda rng: changed(rng, without=["mean"], more={"mean": np.ones(4, "i8")}), "mean"),
    "texts": (lambda rng: changed(rng, without=["mean"], more={"mean": np.array(["a"] * 4, object)}), None),
    "huge_dims": (bad_tensor(dims=[1 << 40]), None),
    "overflowing_dims": (bad_tensor(dims=[1 << 62, 4]), None),
    "short_data": (bad_tensor(raw_data=bytes(15)), None),
    "unknown_type": (bad_tensor(data_type=99), None),
    "undefined_type": (bad_tensor(data_type=0), None),
    "external_missing": (external("none.bin"), None),
    "external_elsewhere": (external("../../../../../../etc/hostname"), None),
    "external_absolute": (external("/etc/hostname"), None),
    "external_device": (external("/dev/zero"), None),
    "external_itself": (external("."), None),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name, path, rng):
    make, says = BAD[name]

    def run():
        path.write_bytes(make(rng).SerializeToString())
        refused(path, says)
        with pytest.raises((ValueError, OSError)):
            bn_c.BatchNorm.from_onnx(path)

    isolated(run)


def test_damaged(path, rng):
    """Cut anywhere, or one byte changed anywhere: an error that names the file, or layers."""
    good = changed(rng, [batch_norm(), batch_norm("bn2", "y", "z")]).SerializeToString()

    def run():
        for at in range(0, len(good), 3):
            for data in (good[:at], good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]):
                path.write_bytes(data)
                error = error_of(bn_c.load_layers, path)
                assert error is None or isinstance(error, (ValueError, OSError)), repr(error)
                assert error is None or (str(path) in str(error) and "\n" not in str(error)), error

    isolated(run)


def test_arguments(path, rng):
    model = changed(rng, [batch_norm(), batch_norm("bn2", "y", "z")])
    for value in (None, 3, b"model.onnx", model.SerializeToString(), model.graph):
        with pytest.raises(TypeError, match=r"^model_or_path: expected an ONNX model or its path, got \w+$"):
            bn_c.BatchNorm.from_onnx(value)
    for value in ("bn3", None, ""):
        with pytest.raises(ValueError, match=r"^node: expected the name or output of one of 'bn', 'bn2', got "):
            bn_c.BatchNorm.from_onnx(model, value)
    with pytest.raises(TypeError, match=r"^node: expected a name, got int$"):
        bn_c.BatchNorm.from_onnx(model, 3)
    with pytest.raises(FileNotFoundError):
        bn_c.BatchNorm.from_onnx(path)


def test_one_of_several(rng):
    """A parameter that is computed at run time is in the way of its own layer alone."""
    arrays = parameters(rng)
    nodes = [
        batch_norm(),
        helper.make_node("Relu", ["B"], ["r"]),
        helper.make_node("BatchNormalization", ["y", "scale", "r", "mean", "var"], ["z"], "computed"),
    ]
    model = model_of(nodes, arrays)
    assert_layer(bn_c.BatchNorm.from_onnx(model, "bn"), arrays)
    with pytest.raises(ValueError, match=r"^model_or_path: .*computed: expected constant parameters, got 'r'"):
        bn_c.BatchNorm.from_onnx(model, "computed")
