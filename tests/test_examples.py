"""Worked examples: bn_c inside other frameworks, in their memory. Each is a function to copy, and is run."""

import numpy as np
import oracle
import pytest
from numpy.lib.stride_tricks import sliding_window_view

import bn_c
from bn_c import definition

AGREE = 2e-5


def trained(rng, channels, **options):
    layer = bn_c.BatchNorm(channels, **options)
    layer.gamma, layer.beta = rng.normal(1, 1, channels), rng.normal(0, 1, channels)
    layer.running_mean, layer.running_var = rng.normal(0, 1, channels), rng.uniform(0.5, 2, channels)
    return layer


# ---- a network in NumPy -----------------------------------------------------------------------------


def numpy_network(x, weights, layers):
    """Convolution, ReLU, batch norm, residual block, pooling, classifier; each batch norm in place."""
    z = np.einsum("nchwij,ocij->nohw", sliding_window_view(x, (3, 3), (2, 3)), weights["conv1"], optimize=True)
    np.maximum(z, 0, out=z)
    layers["bn1"](z, out=z)
    block = np.einsum("nchw,oc->nohw", z, weights["conv2"], optimize=True)
    layers["bn2"](block, residual=z, out=block)
    return block.mean((2, 3)) @ weights["classifier"].T


def test_numpy_network(tmp_path, rng):
    bn_c.save_layers(tmp_path / "layers.npz", {"bn1": trained(rng, 8), "bn2": trained(rng, 8, activation="relu")})
    shapes = {"conv1": (8, 3, 3, 3), "conv2": (8, 8), "classifier": (10, 8)}
    weights = {name: rng.normal(0, 0.3, shape).astype("f4") for name, shape in shapes.items()}
    x = rng.normal(0, 1, (2, 3, 12, 10)).astype("f4")
    layers = bn_c.load_layers(tmp_path / "layers.npz")
    y = numpy_network(x, weights, layers)

    def exact(bn):
        def forward(z, residual=0.0, out=None):
            given = (a.astype("f8") for a in (bn.running_mean, bn.running_var, bn.gamma, bn.beta))
            out[...] = oracle.activated(definition.normalized(z, *given, bn.eps) + residual, bn.activation)

        return forward

    in_double = {name: a.astype("f8") for name, a in weights.items()}
    expected = numpy_network(x.astype("f8"), in_double, {name: exact(bn) for name, bn in layers.items()})
    assert np.allclose(y, expected, rtol=AGREE, atol=AGREE)


# ---- between two ONNX Runtime sessions --------------------------------------------------------------


def between_two_sessions(features, bn, head, frame):
    """A batch norm whose statistics adapt on the device, which no session does: in place, in the first one's output."""
    import onnxruntime

    z = onnxruntime.OrtValue.ortvalue_from_shape_and_type([1, bn.num_features, *frame.shape[2:]], np.float32)
    binding = features.io_binding()
    binding.bind_cpu_input("frame", frame)
    binding.bind_ortvalue_output("z", z)
    features.run_with_iobinding(binding)
    bn.adapt(z)
    bn(z, out=z)
    binding = head.io_binding()
    binding.bind_ortvalue_input("z", z)
    binding.bind_output("y")
    head.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[0]


def onnx_graph(nodes, arrays, given, result):
    from onnx import TensorProto, helper, numpy_helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if node[3:] else {})) for node in nodes],
        "graph",
        [value(given, TensorProto.FLOAT, None)],
        [value(result, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, name) for name, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8).SerializeToString()


def test_between_two_sessions(rng):
    pytest.importorskip("onnx", reason="onnx is not installed: no session has a model")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: its example is not run")
    bn = trained(rng, 4)
    conv = ("Conv", ["frame", "weight"], ["c"], {"pads": [1, 1, 1, 1]})
    nodes = [conv, ("Relu", ["c"], ["z"])], [("GlobalAveragePool", ["n"], ["p"]), ("Exp", ["p"], ["y"])]
    weight = {"weight": rng.normal(0, 0.5, (4, 3, 3, 3)).astype("f4")}
    features = runtime.InferenceSession(onnx_graph(nodes[0], weight, "frame", "z"))
    head = runtime.InferenceSession(onnx_graph([("Identity", ["z"], ["n"]), *nodes[1]], {}, "z", "y"))
    frame = rng.normal(0, 1, (1, 3, 9, 11)).astype("f4")
    y = between_two_sessions(features, bn, head, frame)
    parameters = {"s": bn.gamma, "b": bn.beta, "m": bn.running_mean, "v": bn.running_var}
    middle = ("BatchNormalization", ["z", "s", "b", "m", "v"], ["n"])
    whole = onnx_graph([*nodes[0], middle, *nodes[1]], {**weight, **parameters}, "frame", "y")
    expected = runtime.InferenceSession(whole).run(None, {"frame": frame})[0]
    assert np.allclose(y, expected, rtol=AGREE, atol=AGREE)


def test_memory_of_an_ort_value(rng):
    """Read and written where it is."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: its example is not run")
    x = rng.normal(0, 1, (5, 3)).astype("f4")
    value = runtime.OrtValue.ortvalue_from_numpy(x)
    if not hasattr(value, "__array__"):
        pytest.skip("this ONNX Runtime has no __array__: value.numpy() is what it gives")
    expected = bn_c.batch_norm(x)
    assert bn_c.batch_stats(value) == bn_c.batch_stats(x)
    assert bn_c.batch_norm(value, out=value) is value
    assert np.array_equal(x, expected)


# ---- before a TFLite interpreter --------------------------------------------------------------------


def before_an_interpreter(interpreter, bn, frame):
    """Normalised from the camera's bytes straight into the interpreter's input tensor."""
    index = interpreter.get_input_details()[0]["index"]
    bn(frame, out=interpreter.tensor(index)())
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def tflite_model(shape):
    """One sigmoid."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def table(kind, **fields):
        made = kind()
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    tensors = [
        table(schema.TensorT, shape=list(shape), type=schema.TensorType.FLOAT32, buffer=n + 1, name=name)
        for n, name in enumerate((b"x", b"y"))
    ]
    code = schema.BuiltinOperator.LOGISTIC
    graph = table(
        schema.SubGraphT,
        tensors=tensors,
        inputs=[0],
        outputs=[1],
        operators=[table(schema.OperatorT, opcodeIndex=0, inputs=[0], outputs=[1])],
    )
    model = table(
        schema.ModelT,
        version=3,
        operatorCodes=[table(schema.OperatorCodeT, builtinCode=code, deprecatedBuiltinCode=code, version=1)],
        subgraphs=[graph],
        buffers=[schema.BufferT() for _ in range(3)],
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_before_an_interpreter(rng):
    reason = "ai-edge-litert is not installed: its example is not run"
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason=reason)
    shape = (1, 6, 8, 3)
    interpreter = litert.Interpreter(model_content=tflite_model(shape))
    interpreter.allocate_tensors()
    colours = [1.0, 2.0, 0.5], [0.0, 0.1, -0.1], [120.0, 110.0, 100.0], [3000.0, 2000.0, 2500.0]
    bn = bn_c.BatchNorm.from_keras(*colours)
    for _ in range(3):
        frame = rng.integers(0, 256, shape, np.uint8)
        y = before_an_interpreter(interpreter, bn, frame)
        assert np.allclose(y, 1 / (1 + np.exp(-bn(frame))), rtol=AGREE, atol=AGREE)
