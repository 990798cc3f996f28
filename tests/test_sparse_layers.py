"""Block-sparse layers against torch's own on the same weights written out dense, and normalisation in both axes."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lowprec import sparse
from lowprec.sparse import BatchNorm, BlockLayout, Conv2d, LayerNorm, Linear

FEATURES = ("last", "first")


def layout_of(inputs: int = 3, outputs: int = 4, block: int = 8, density: float = 0.5, seed: int = 0) -> BlockLayout:
    """A random layout with an empty row, an empty column and otherwise no empty one."""
    mask = torch.rand(inputs, outputs, generator=torch.Generator().manual_seed(seed)) < density
    mask[0], mask[1] = True, False
    mask[:, 1] = False
    return BlockLayout(mask, block)


def moved(layout: BlockLayout, by: int = 1) -> BlockLayout:
    """Another layout of the same shape with as many blocks."""
    return BlockLayout(layout.mask.roll(by, 1), layout.block)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arranged(x: Tensor, features: str) -> Tensor:
    """Rows [..., C] as a layer of that axis takes them."""
    return x.movedim(-1, 0) if features == "first" else x


def back(y: Tensor, features: str) -> Tensor:
    return y.movedim(0, -1) if features == "first" else y


# Linear.


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,), (1, 1, 1)])
@pytest.mark.parametrize("gate", [False, True, "fixed"])
def test_linear_is_the_dense_layer(features: Any, shape: tuple[int, ...], gate: Any) -> None:
    layout = layout_of()
    given = torch.tensor([0.0, 0.5, -2.0, 1.0, 3.0, 0.25])[: layout.blocks] if gate == "fixed" else gate
    layer = Linear(layout, features=features, gate=given, dtype=torch.float64)
    x = normal(*shape, layer.inputs, dtype=torch.float64)
    assert isinstance(layer.gate, nn.Parameter) == (gate is True)
    torch.testing.assert_close(back(layer(arranged(x, features)), features), layer.to_dense()(x))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("block", [8, 16])
def test_gradients(features: Any, block: int) -> None:
    layer = Linear(layout_of(2, 2, block), features=features, gate=True, dtype=torch.float64)
    x = arranged(normal(3, layer.inputs, dtype=torch.float64), features).requires_grad_()
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"weight", "bias", "gate"}

    def call(x: Tensor, gate: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(("weight", "bias"), rest, strict=True), gate=gate)
        return torch.func.functional_call(layer, given, (x,))

    # Gates are float32: their own gradient is compared below.
    fixed = layer.gate.detach()
    assert torch.autograd.gradcheck(lambda x, w, b: call(x, fixed, w, b), (x, layer.weight, layer.bias), fast_mode=True)
    dy = torch.randn_like(layer(x))
    layer(x).backward(dy)
    product = (layer.weight.grad * layer.weight).sum((1, 2))
    torch.testing.assert_close(layer.gate.grad.double(), product.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulator", [None, "chunk16:bf16/fp32"])
def test_linear_is_a_product_and_a_bias(
    device: torch.device, features: Any, dtype: torch.dtype, accumulator: str | None
) -> None:
    layer = Linear(layout_of(), features=features, accumulator=accumulator, device=device, dtype=dtype)
    x = arranged(normal(2, 5, layer.inputs, dtype=dtype).to(device), features)
    y = sparse.matmul(x, layer.weight, layer.layout, features=features, accumulator=accumulator)
    bias = layer.bias.view(-1, 1, 1) if features == "first" else layer.bias
    assert torch.equal(layer(x), y + bias)
    plain = Linear(layer.layout, False, features, accumulator=accumulator, device=device, dtype=dtype)
    plain.weight.data.copy_(layer.weight)
    assert plain.bias is None
    assert torch.equal(plain(x), y)


def test_initial_values_follow_the_fan_in() -> None:
    mask = torch.zeros(16, 3, dtype=torch.bool)
    mask[:, 0], mask[5, 1] = True, True
    layer = Linear(BlockLayout(mask, 8))
    column = layer.layout.coordinates[:, 1]
    for j, fan_in in ((0, 128), (1, 8)):
        bound = fan_in**-0.5
        values = layer.weight[column == j]
        assert 0.5 * bound < values.abs().max() <= bound
        assert 0 < layer.bias[8 * j : 8 * j + 8].abs().max() <= bound
    assert (layer.bias[16:] == 0).all()
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_autocast_casts_the_operands() -> None:
    layer = Linear(layout_of())
    x = normal(5, layer.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer(x.bfloat16()), y)
    product = sparse.matmul(x.bfloat16(), layer.weight.bfloat16(), layer.layout)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, product + layer.bias.bfloat16())
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_dense_and_back() -> None:
    dense = nn.Linear(24, 32, dtype=torch.float64).eval()
    layout = layout_of()
    layer = Linear.from_dense(dense, layout, "first", accumulator="fp32")
    assert (layer.features, layer.accumulator, layer.training) == ("first", "fp32", False)
    kept = layout.to_dense(torch.ones(layout.weight_shape)).T.bool()
    expected = dense.weight.masked_fill(~kept, 0)
    again = layer.to_dense()
    assert isinstance(again, nn.Linear)
    assert torch.equal(again.weight, expected)
    assert torch.equal(again.bias, dense.bias)
    assert Linear.from_dense(nn.Linear(24, 32, bias=False), layout).to_dense().bias is None


# What is saved, copied and changed.


def test_a_checkpoint_brings_its_mask() -> None:
    layer, other = Linear(layout_of()), Linear(moved(layout_of()))
    x = normal(5, layer.inputs)
    assert set(layer.state_dict()) == {"weight", "bias", "mask"}
    stream = io.BytesIO()
    torch.save(other.state_dict(), stream)
    stream.seek(0)
    assert layer.layout != other.layout
    layer.load_state_dict(torch.load(stream, weights_only=True))
    assert layer.layout == other.layout
    assert torch.equal(layer.mask, other.layout.mask)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("other", [layout_of(3, 5), layout_of(density=0), layout_of(3, 4, 16)])
def test_a_checkpoint_that_does_not_fit_is_refused(other: BlockLayout) -> None:
    model = nn.Sequential(Linear(layout_of()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0\.(mask: .* do not fit|weight: copying a param with shape)"):
        model.load_state_dict(nn.Sequential(Linear(other)).state_dict())
    assert torch.equal(model[0].mask, before["0.mask"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.mask"'):
        model.load_state_dict({name: value for name, value in before.items() if "mask" not in name})


def test_copies_are_their_own() -> None:
    layer = Linear(layout_of(), gate=True)
    x = normal(5, layer.inputs)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        twin.set_layout(moved(layer.layout))
        twin.weight.data.zero_()
        assert layer.layout == layout_of()
        assert layer.mask.equal(layer.layout.mask)
        assert not torch.equal(twin(x), layer(x))


def test_a_layer_from_the_meta_device() -> None:
    layer = Linear(layout_of(), device="meta")
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    assert torch.equal(layer.mask, layer.layout.mask)
    layer.reset_parameters()
    x = normal(5, layer.inputs)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_moving_and_casting(device: torch.device) -> None:
    layer = Linear(layout_of(), gate=True).to(device, torch.float64)
    assert layer.gate.dtype == torch.float32 or layer.gate.dtype == torch.float64
    x = normal(5, layer.inputs, dtype=torch.float64).to(device)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_a_layout_changes_under_compiled_code(device: torch.device) -> None:
    torch.compiler.reset()
    layer = Linear(layout_of(), device=device)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = normal(5, layer.inputs).to(device)
    for by in range(4):
        layout = moved(layout_of(), by)
        layer.set_layout(layout)
        assert layer.layout is layout
        expected = sparse.matmul(x, layer.weight, layout) + layer.bias
        assert torch.equal(layer(x), expected)
        assert torch.equal(compiled(x), expected)
    assert len(graphs) == 1


def test_inference_mode_leaves_nothing_behind() -> None:
    layer, layout = Linear(layout_of()), layout_of()
    x = normal(5, layer.inputs)
    with torch.inference_mode():
        layer.cpu()(x)
        sparse.matmul(x, layer.weight, layout)
    layer(x).sum().backward()
    sparse.matmul(x, layer.weight, layout).sum().backward()
    layer.set_layout(moved(layout))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_layout() -> None:
    layer = Linear(layout_of(), device="cuda")
    x = normal(5, layer.inputs).cuda()
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for by in range(3):
            layer.set_layout(moved(layout_of(), by))
            graph.replay()
            assert torch.equal(y, layer(x))


@pytest.mark.parametrize("other", [layout_of(3, 5), layout_of(3, 4, 16), layout_of(density=0)])
def test_another_size_is_no_layout_to_change_to(other: BlockLayout) -> None:
    layer = Linear(layout_of())
    with pytest.raises(ValueError, match="layout must have the shape, block and number of blocks of"):
        layer.set_layout(other)


def test_repr() -> None:
    layer = Linear(layout_of(), accumulator="fp32", gate=True, features="first")
    text = "Linear(24, 32, block=8, density=50.0%, bias=True, features='first', accumulator='fp32', gate=True)"
    assert repr(layer) == text


ERRORS: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "layout must be a BlockLayout, got Tensor", lambda: Linear(torch.ones(2, 2))),
    (
        ValueError,
        r'features must be "last" for \(N, C\) or "first" for \(C, N\), got .middle.',
        lambda: Linear(layout_of(), features="middle"),
    ),
    (
        ValueError,
        r"gate must be True, False or floats \[6\], one per block, got torch.float32 \(2,\)",
        lambda: Linear(layout_of(), gate=torch.ones(2)),
    ),
    (ValueError, "gate must be finite", lambda: Linear(layout_of(), gate=torch.full((6,), torch.inf))),
    (
        ValueError,
        r'x must have 24 inputs in its last dimension \(features="last"\), got shape \(24, 5\) \(its other',
        lambda: Linear(layout_of())(torch.ones(24, 5)),
    ),
    (
        ValueError,
        r'x must have 24 inputs in its first dimension \(features="first"\), got shape \(5, 24\) \(its other',
        lambda: Linear(layout_of(), features="first")(torch.ones(5, 24)),
    ),
    (
        ValueError,
        r'x must have 24 inputs in its last dimension \(features="last"\), got shape \(\)$',
        lambda: Linear(layout_of())(torch.ones(())),
    ),
    (
        TypeError,
        "x must be torch.float32 like the weight, got torch.float64",
        lambda: Linear(layout_of())(torch.ones(5, 24).double()),
    ),
    (
        TypeError,
        "linear must be a torch.nn.Linear, got Conv2d",
        lambda: Linear.from_dense(nn.Conv2d(24, 32, 1), layout_of()),
    ),
    (ValueError, "layout must be of 32 to 24 features, got", lambda: Linear.from_dense(nn.Linear(32, 24), layout_of())),
    (
        TypeError,
        "layout must be a BlockLayout, got Tensor",
        lambda: Linear(layout_of()).set_layout(torch.ones(3, 4, dtype=torch.bool)),
    ),
    (ValueError, "size must be a positive int, got 0", lambda: LayerNorm(0)),
    (
        ValueError,
        r"x must have 5 features in its first dimension .*, got shape \(3, 5\) \(its other side has as many",
        lambda: LayerNorm(5, "first")(torch.ones(3, 5)),
    ),
    (
        ValueError,
        r"x must have 5 features in its last dimension .*, got shape \(5, 3\) \(its other side has as many",
        lambda: BatchNorm(5, "last")(torch.ones(5, 3)),
    ),
    (ValueError, "Expected more than 1 value per channel", lambda: BatchNorm(5)(torch.ones(5, 1))),
    (
        TypeError,
        "layer must be a sparse.Linear or a sparse.Conv2d, got Linear",
        lambda: sparse.weight_norm(nn.Linear(2, 2)),
    ),
    (
        ValueError,
        "layer: its weight is parametrized already",
        lambda: sparse.weight_norm(sparse.weight_norm(Linear(layout_of()))),
    ),
    (
        ValueError,
        r"x must be images \[C, N, H, W\], got shape \(24, 5\)",
        lambda: Conv2d(layout_of())(torch.ones(24, 5)),
    ),
    (
        ValueError,
        r"x must have 24 inputs in its first dimension .* \(its other side has as many",
        lambda: Conv2d(layout_of())(torch.ones(2, 5, 5, 24)),
    ),
    (ValueError, "kernel_size must be an int from 1 up, or a pair of them, got 0", lambda: Conv2d(layout_of(), 0)),
    (
        ValueError,
        r"stride must be an int from 1 up, or a pair of them, got \(1, 2, 3\)",
        lambda: Conv2d(layout_of(), 1, (1, 2, 3)),
    ),
    (
        ValueError,
        "groups must be 'depthwise' or divide the 24 channels, got 5",
        lambda: Conv2d(layout_of(), 3, groups=5),
    ),
    (
        ValueError,
        "conv must be 1x1, in one group and padded with zeros",
        lambda: Conv2d.from_dense(nn.Conv2d(24, 32, 3), layout_of()),
    ),
    (
        TypeError,
        "conv must be a torch.nn.Conv2d, got Linear",
        lambda: Conv2d.from_dense(nn.Linear(24, 32), layout_of()),
    ),
    (ValueError, "x must have two dimensions or more", lambda: sparse.to_cn(torch.ones(3))),
]


@pytest.mark.parametrize(("error", "text", "call"), ERRORS, ids=[case[1][:50] for case in ERRORS])
def test_errors(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error, match=text):
        call()


# Normalisation.


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0,), ()])
def test_layer_norm_is_torchs(features: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, plain = LayerNorm(24, features, eps=1e-3, dtype=dtype), nn.LayerNorm(24, eps=1e-3, dtype=dtype)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        ours.data = theirs.data = normal(24, dtype=dtype)
    x = normal(*shape, 24, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(arranged(ours, features)), plain(theirs)
    assert y.is_contiguous()
    assert torch.equal(back(y, features), expected)
    dy = normal(*shape, 24, seed=2, dtype=dtype)
    back(y, features).backward(dy)
    expected.backward(dy)
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(layer.weight.grad, plain.weight.grad)


def test_layer_norm_without_parameters() -> None:
    x = normal(24, 5)
    plain = F.layer_norm(x.T, (24,)).T
    for options, names in (({"affine": False}, []), ({"bias": False}, ["weight"])):
        layer = LayerNorm(24, "first", **options)
        assert [name for name, _ in layer.named_parameters()] == names
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracks", [True, False])
def test_batch_norm_over_images_is_torchs(momentum: float | None, tracks: bool) -> None:
    options = {"momentum": momentum, "track_running_stats": tracks, "dtype": torch.float64}
    layer, plain = BatchNorm(24, **options), nn.BatchNorm2d(24, **options)
    for _ in range(3):
        x = normal(2, 24, 5, 4, dtype=torch.float64)
        y = layer(sparse.to_cn(x))
        torch.testing.assert_close(sparse.from_cn(y), plain(x))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    layer.eval(), plain.eval()
    torch.testing.assert_close(layer(sparse.to_cn(x)), sparse.to_cn(plain(x)))
    last = BatchNorm(24, "last", **options)
    last.load_state_dict(layer.state_dict())
    torch.testing.assert_close(last.eval()(x.movedim(1, -1)), plain(x).movedim(1, -1))


@pytest.mark.parametrize("features", FEATURES)
def test_batch_norm_takes_any_number_of_dimensions(features: Any) -> None:
    layer = BatchNorm(24, features).eval()
    layer.running_mean.normal_()
    for shape in ((24,), (0, 24), (5, 24), (2, 3, 4, 5, 24)):
        x = normal(*shape)
        expected = (x - layer.running_mean) * (layer.running_var + layer.eps).rsqrt()
        torch.testing.assert_close(back(layer(arranged(x, features)), features), expected)


def reference_norm(layer: Linear, gain: Tensor, v: Tensor) -> Tensor:
    """Weight norm of the dense matrix, for output features that have weights."""
    dense = layer.layout.to_dense(v)
    length = dense.square().sum(0).sqrt()
    return layer.layout.from_dense(dense * (gain / length.masked_fill(length == 0, 1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_norm(device: torch.device, dtype: torch.dtype) -> None:
    layer = Linear(layout_of(), device=device, dtype=dtype)
    weight = layer.weight.detach().clone()
    assert sparse.weight_norm(layer) is layer
    gain, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    assert (gain.shape, v.shape) == ((32,), layer.layout.weight_shape)
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(gain[:8], layer.layout.norm(weight)[:8])
    gain.data, v.data = normal(32, dtype=dtype).to(device), 3 * v.data
    torch.testing.assert_close(layer.weight, reference_norm(layer, gain, v))
    layer(normal(5, 24, dtype=dtype).to(device)).sum().backward()
    assert gain.grad.isfinite().all()
    assert (gain.grad[8:16] == 0).all(), "no weight reaches the empty column"
    assert v.grad.isfinite().all()
    assert isinstance(copy.deepcopy(layer), type(layer))
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer.weight, reference_norm(layer, gain, v))


def test_weight_norm_has_gradients_of_every_order() -> None:
    layer = sparse.weight_norm(Linear(layout_of(2, 2), dtype=torch.float64))
    norm = layer.parametrizations.weight[0]
    gain, v = (p.detach().clone().requires_grad_() for p in norm.right_inverse(layer.weight.detach()))
    gain = gain.detach().fill_(1.5).requires_grad_()
    assert torch.autograd.gradcheck(norm, (gain, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(norm, (gain, v), fast_mode=True)
    plain = nn.Linear(8, 8, bias=False, dtype=torch.float64)
    parametrizations.weight_norm(plain)
    one = Linear(BlockLayout(torch.ones(1, 1, dtype=torch.bool), 8), False, dtype=torch.float64)
    one.weight.data = plain.weight.detach().T[None].clone()
    sparse.weight_norm(one)
    x = normal(5, 8, dtype=torch.float64)
    one(x).square().sum().backward()
    plain(x).square().sum().backward()
    ours, theirs = one.parametrizations.weight, plain.parametrizations.weight
    torch.testing.assert_close(ours.original0.grad, theirs.original0.grad.flatten())
    torch.testing.assert_close(ours.original1.grad[0].T, theirs.original1.grad)


def test_weight_norm_follows_the_layout() -> None:
    layer = sparse.weight_norm(Linear(layout_of()))
    layout = moved(layout_of())
    layer.set_layout(layout)
    gain, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    torch.testing.assert_close(layer.weight, reference_norm(layer, gain, v))
    fresh = sparse.weight_norm(Linear(layout_of()))
    fresh.load_state_dict(layer.state_dict())
    assert fresh.layout == layout
    assert torch.equal(fresh.weight, layer.weight)


# Convolutions.

CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "padding": (0, 2)},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "groups": 6, "stride": 2},
    {"kernel_size": 2, "groups": 1, "bias": False},
]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution_is_the_dense_one(features: Any, options: dict[str, Any]) -> None:
    layer = Conv2d(layout_of(), features=features, dtype=torch.float64, **options)
    dense = layer.to_dense()
    assert isinstance(dense, nn.Conv2d)
    x = normal(2, 24, 7, 6, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    there = (0, 1) if features == "first" else (-1, 1)
    y, expected = layer(ours.movedim(*reversed(there))).movedim(*there), dense(theirs)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(expected)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad)
    if layer.spatial is None:
        torch.testing.assert_close(layer.weight.grad, layer.layout.from_dense(dense.weight.grad[:, :, 0, 0].T))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("groups", ["depthwise", 4, 1])
def test_gradients_of_convolutions(features: Any, groups: Any) -> None:
    layer = Conv2d(layout_of(2, 2), 2, 1, 1, groups=groups, features=features, dtype=torch.float64)
    shape = (16, 1, 3, 2) if features == "first" else (1, 3, 2, 16)
    x = normal(*shape, dtype=torch.float64).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()), fast_mode=True)


def test_a_1x1_convolution_from_a_dense_one() -> None:
    conv = nn.Conv2d(24, 32, 1, stride=2, padding=1)
    layer = Conv2d.from_dense(conv, layout_of())
    kept = layout_of().to_dense(torch.ones(layout_of().weight_shape)).T[:, :, None, None].bool()
    with torch.no_grad():
        conv.weight.masked_fill_(~kept, 0)
    x = normal(2, 24, 5, 5)
    torch.testing.assert_close(sparse.from_cn(layer(sparse.to_cn(x))), conv(x))
    assert torch.equal(layer.to_dense().weight, conv.weight)


def test_the_spatial_weight_starts_as_torchs() -> None:
    layer = Conv2d(layout_of(), 3)
    assert layer.spatial.shape == (24, 1, 3, 3)
    assert 0.2 < layer.spatial.abs().max() <= 1 / 3
    before = layer.spatial.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.spatial, before)
    assert set(layer.state_dict()) == {"weight", "bias", "spatial", "mask"}
    assert "kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=24" in repr(layer)


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d((2, 1))]
)
def test_torchs_pooling_takes_channels_first(pool: nn.Module) -> None:
    x = normal(2, 24, 6, 5)
    assert torch.equal(sparse.from_cn(pool(sparse.to_cn(x))), pool(x))


def test_there_and_back() -> None:
    x = normal(2, 3, 4, 5)
    assert sparse.to_cn(x).shape == (3, 2, 4, 5)
    assert sparse.to_cn(x).is_contiguous()
    assert torch.equal(sparse.from_cn(sparse.to_cn(x)), x)
    assert torch.equal(sparse.to_cn(x[..., 0, 0]), x[..., 0, 0].T)


# Together.


class Network(nn.Module):
    """Images [N, 3, H, W] to classes, all of it with channels first."""

    def __init__(self, features: Any = "first") -> None:
        super().__init__()
        whole = BlockLayout(torch.ones(2, 2, dtype=torch.bool), 8)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            sparse.weight_norm(Conv2d(whole, 3, padding=1)),
            BatchNorm(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            Conv2d(whole),
            LayerNorm(16, "first"),
            nn.ReLU(),
        )
        self.head = Linear(whole, features="first")

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(sparse.to_cn(self.stem(x)))
        return sparse.from_cn(self.head(x.mean((2, 3))))


def test_a_network_compiles_whole() -> None:
    torch.compiler.reset()
    network = Network()
    twin = copy.deepcopy(network)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = normal(2, 3, 8, 8)
    for model in (network, compiled):
        model(x).square().sum().backward()
    for (name, p), q in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
