"""The same numbers as PyTorch's layers give, in training and in inference, and from its tensors."""

import copy

import numpy as np
import pytest

import bn_c

torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing is compared with it")

# PyTorch sums and normalises in float32; ours is far closer to the exact result than the two to each other.
AGREE = 2e-5

LAYERS = {
    "1d": (torch.nn.BatchNorm1d, (16, 6)),
    "1d with a plane": (torch.nn.BatchNorm1d, (4, 6, 33)),
    "2d": (torch.nn.BatchNorm2d, (4, 6, 13, 17)),
    "2d channels last": (torch.nn.BatchNorm2d, (4, 6, 13, 17)),
    "3d": (torch.nn.BatchNorm3d, (3, 6, 5, 7, 9)),
    "3d channels last": (torch.nn.BatchNorm3d, (3, 6, 5, 7, 9)),
}


def assert_agrees(ours, theirs):
    assert np.allclose(ours, theirs.detach().numpy(), rtol=AGREE, atol=AGREE)


def batch(name, generator, offset):
    _, shape = LAYERS[name]
    x = torch.randn(shape, generator=generator) * 2 + offset
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if "last" in name else x


def pair(name, generator, **options):
    """A layer of PyTorch with random parameters, and ours from its state."""
    kind, shape = LAYERS[name]
    theirs = kind(shape[1], **options)
    if theirs.affine:
        torch.nn.init.uniform_(theirs.weight, -2, 2, generator=generator)
        torch.nn.init.uniform_(theirs.bias, -2, 2, generator=generator)
    options["eps"] = theirs.eps
    if theirs.state_dict():
        ours = bn_c.BatchNorm.from_torch(theirs.state_dict(), **options)
    else:
        ours = bn_c.BatchNorm(shape[1], **options)
    return theirs, ours


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("momentum", [0.1, None, 0.3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_training_and_inference(name, momentum, affine, track, generator):
    theirs, ours = pair(name, generator, momentum=momentum, affine=affine, track_running_stats=track)
    theirs.train()
    ours.train()
    for step in range(5):
        x = batch(name, generator, offset=step)
        assert_agrees(ours(x), theirs(x))
    state = ours.state_dict()
    assert set(state) == set(theirs.state_dict())
    for key, tensor in theirs.state_dict().items():
        assert_agrees(state[key], tensor)
    theirs.eval()
    ours.eval()
    x = batch(name, generator, offset=2)
    assert_agrees(ours(x), theirs(x))


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_eps(eps, generator):
    theirs, ours = pair("2d", generator, eps=eps)
    x = batch("2d", generator, 1)
    assert_agrees(ours(x), theirs.eval()(x))
    assert_agrees(ours.train()(x), theirs.train()(x))


@pytest.mark.parametrize("name", ["1d", "2d", "2d channels last", "3d channels last"])
def test_tensors_are_read_in_place(name, generator):
    """As x, residual, out and parameters; strides as they are."""
    x, residual = batch(name, generator, 1), batch(name, generator, 0)
    given = [torch.rand(6, generator=generator) + 0.5 for _ in range(4)]
    y = bn_c.batch_norm_inference(x, *given, residual=residual)
    expected = torch.nn.functional.batch_norm(x, *given) + residual
    assert_agrees(y, expected)
    assert y.strides == x.numpy().strides
    out = torch.empty_like(x)
    assert bn_c.batch_norm_inference(x, *given, residual=residual, out=out) is out
    assert np.array_equal(out.numpy(), y)
    assert bn_c.batch_stats(x) == bn_c.batch_stats(x.numpy())


def test_half_tensors(generator):
    x = batch("2d", generator, 1).half()
    y, stats = bn_c.batch_norm(x, return_stats=True)
    assert y.dtype == np.float16
    assert np.array_equal(y, bn_c.batch_norm(x.numpy()))
    assert np.allclose(stats.mean, x.double().mean((0, 2, 3)).numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_tensors_of_other_types_are_refused(dtype):
    with pytest.raises(TypeError, match=r"^x: expected"):
        bn_c.batch_norm(torch.ones((4, 3), dtype=dtype))


def test_tensors_that_need_gradients_are_refused():
    with pytest.raises(TypeError, match=r"^x: expected"):
        bn_c.batch_norm(torch.ones((4, 3), requires_grad=True))


def test_our_state_loads_into_pytorch(generator):
    theirs, ours = pair("2d", generator)
    for step in range(3):
        ours.train()(batch("2d", generator, step))
    theirs.load_state_dict({key: torch.from_numpy(a) for key, a in ours.state_dict().items()})
    x = batch("2d", generator, 1)
    assert_agrees(ours.eval()(x), theirs.eval()(x))


class Ours(torch.nn.Module):
    """A layer of ours in a network of PyTorch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.from_numpy(self.layer(x))


def network():
    """Batch norms after the ReLUs, whose outputs are far from symmetric."""
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.BatchNorm2d(16),
        nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_network_with_its_batch_norms_replaced(memory_format, generator):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        theirs = network().to(memory_format=memory_format)
    for _ in range(5):
        theirs(torch.randn((32, 3, 16, 16), generator=generator).contiguous(memory_format=memory_format))
    theirs.eval()
    ours = copy.deepcopy(theirs)
    for name, module in theirs.named_children():
        if "BatchNorm" in type(module).__name__:
            layer = bn_c.BatchNorm.from_torch(theirs.state_dict(), name + ".", eps=module.eps)
            setattr(ours, name, Ours(layer))
    assert sum(isinstance(module, Ours) for module in ours) == 3
    x = torch.randn((32, 3, 16, 16), generator=generator).contiguous(memory_format=memory_format)
    with torch.inference_mode():
        assert_agrees(ours(x).numpy(), theirs(x))


def test_whole_model_in_a_safetensors_file(tmp_path, generator):
    """One line: the layers of a network in PyTorch's file, in any of its dtypes, and PyTorch's outputs from them."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: no file is loaded")
    with torch.random.fork_rng():
        torch.manual_seed(11)
        theirs = network()
    for _ in range(5):
        theirs(torch.randn((32, 3, 16, 16), generator=generator))
    theirs.eval()
    x = torch.randn((2, 32, 5, 7), generator=generator)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        safetensors.save_file(theirs.to(dtype).state_dict(), tmp_path / "model.safetensors")
        layers = bn_c.load_layers(tmp_path / "model.safetensors")
        modules = {name: m.float() for name, m in theirs.named_children() if "BatchNorm" in type(m).__name__}
        assert list(layers) == sorted(modules)
        for name, layer in layers.items():
            assert layer.num_batches_tracked == modules[name].num_batches_tracked == 5
            layer.eps = modules[name].eps
            given = x[:, : layer.num_features]
            given = given if isinstance(modules[name], torch.nn.BatchNorm2d) else given[:, :, 0, 0]
            with torch.inference_mode():
                assert_agrees(layer(given), modules[name](given))


def test_our_file_loads_into_pytorch(tmp_path, generator):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: no file is loaded")
    _, ours = pair("2d", generator, momentum=None)
    ours.train()(batch("2d", generator, 3))
    bn_c.save_layers(tmp_path / "layers.safetensors", {"bn": ours})
    network = torch.nn.Sequential()
    network.add_module("bn", torch.nn.BatchNorm2d(6))
    network.load_state_dict(safetensors.load_file(tmp_path / "layers.safetensors"))
    x = batch("2d", generator, 3)
    assert_agrees(ours.eval()(x), network.eval()(x))


CONVOLUTIONS = {
    "1d": (torch.nn.Conv1d, torch.nn.BatchNorm1d, 1, {}),
    "2d, strides and groups": (torch.nn.Conv2d, torch.nn.BatchNorm2d, 2, {"stride": 2, "padding": 1, "groups": 2}),
    "2d, depthwise": (torch.nn.Conv2d, torch.nn.BatchNorm2d, 2, {"groups": 4, "bias": False}),
    "3d": (torch.nn.Conv3d, torch.nn.BatchNorm3d, 3, {"dilation": 2}),
    "transposed 1d": (torch.nn.ConvTranspose1d, torch.nn.BatchNorm1d, 1, {"stride": 2}),
    "transposed 2d": (torch.nn.ConvTranspose2d, torch.nn.BatchNorm2d, 2, {"stride": 2, "groups": 2, "padding": 1}),
    "transposed 3d": (torch.nn.ConvTranspose3d, torch.nn.BatchNorm3d, 3, {"groups": 4, "bias": False}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_folded_network(name, generator):
    """Convolution, batch norm, ReLU, linear, batch norm: the same output without the batch norms."""
    conv_of, bn_of, ndim, options = CONVOLUTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        conv, linear = conv_of(4, 8, 3, **options), torch.nn.Linear(8, 5)
    bns = bn_of(8, eps=1e-3), torch.nn.BatchNorm1d(5)
    x = torch.randn((6, 4, *(8,) * ndim), generator=generator)

    def forward(conv, linear, bns):
        z = bns[0](conv(x)).relu().flatten(2).mean(2)
        return bns[1](linear(z))

    for bn in bns:
        torch.nn.init.uniform_(bn.weight, -2, 2, generator=generator)
        torch.nn.init.uniform_(bn.bias, -2, 2, generator=generator)
    for _ in range(5):
        forward(conv, linear, bns)
    for bn in bns:
        bn.eval()
    with torch.inference_mode():
        expected = forward(conv, linear, bns)
        layers = [bn_c.BatchNorm.from_torch(bn.state_dict(), eps=bn.eps) for bn in bns]
        state = conv.state_dict()
        folded = (
            bn_c.fold_conv(state["weight"], state.get("bias"), layers[0], transposed="transposed" in name),
            bn_c.fold_linear(*linear.state_dict().values(), layers[1]),
        )
        for module, (weight, bias) in zip((conv, linear), folded, strict=True):
            module.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
            module.bias = torch.nn.Parameter(torch.from_numpy(bias), requires_grad=False)
        assert_agrees(forward(conv, linear, (lambda y: y, lambda y: y)).numpy(), expected)
