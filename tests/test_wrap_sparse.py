"""Block-sparse layers under a policy, bit for bit: each role by hand, from the products on rounded operands."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import lowprec as lp
from lowprec import blocksparse, sparse
from lowprec.modes import announced
from lowprec.sparse import BatchNorm, BlockLayout, Conv2d, LayerNorm, Linear
from tests.oracle import DA, DW, POLICY, A, W
from tests.test_sparse_layers import FEATURES, Network, arranged, layout_of, normal

SEQUENTIAL = lp.Accumulator.sequential("1-6-9")


def case(layer: Linear, tokens: int = 5) -> tuple[Tensor, Tensor]:
    """An input of a layer that asks for its gradient, and a gradient of its result."""
    device = layer.weight.device
    x = arranged(normal(tokens, layer.inputs).to(device), layer.features).clone().requires_grad_()
    return x, arranged(normal(tokens, layer.outputs, seed=2).to(device), layer.features)


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The result, the input's gradient and those of the parameters; none are left behind."""
    y = layer(x)
    y.backward(dy)
    results = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    layer.zero_grad(set_to_none=True)
    x.grad = None
    return results


def by_hand(
    layer: Linear, x: Tensor, dy: Tensor, policy: lp.Policy = POLICY, sums: tuple[Any, Any, Any] = (None, None, None)
) -> dict[str, Tensor]:
    """The same, written out."""
    where = {"features": layer.features, "gate": layer.gate}
    rounded = [
        t.detach() if fmt is None else lp.quantize(t.detach(), fmt)
        for t, fmt in ((x, policy.activation), (layer.weight, policy.weight), (dy, policy.activation_grad))
    ]
    x, w, dy = rounded
    y = sparse.matmul(x, w, layer.layout, accumulator=sums[0], **where)
    dx = sparse.input_grad(dy, w, layer.layout, accumulator=sums[1], **where)
    dw = sparse.weight_grad([(x, dy)], layer.layout, accumulator=sums[2], **where)
    first = layer.features == "first"
    bias = layer.bias.unsqueeze(1) if first else layer.bias
    results = {"y": y + bias, "x": dx, "weight": dw, "bias": dy.sum(1 if first else 0)}
    for name in ("weight", "bias"):
        if policy.weight_grad is not None:
            results[name] = lp.quantize(results[name], policy.weight_grad)
    return {name: value.detach() for name, value in results.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() >= other.keys()
    for name, value in other.items():
        assert torch.equal(one[name], value), name


# Roles.


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("gated", [False, True])
def test_roles(device: torch.device, features: Any, gated: bool) -> None:
    layout = layout_of()
    gate = torch.tensor([0.3, 0.0, 1.7, -0.6, 1.0, 2.2]) if gated else False
    layer = Linear(layout, features=features, gate=gate, device=device)
    x, dy = case(layer)
    plain = run(layer, x, dy)
    expected = by_hand(layer, x, dy)
    lp.wrap(layer, POLICY, strict=True)
    assert_same(run(layer, x, dy), expected)
    assert all(not torch.equal(plain[name], expected[name]) for name in expected), "the case shows nothing"
    assert_same(run(lp.unwrap(layer), x, dy), plain)


@pytest.mark.parametrize("missing", ["activation", "weight", "activation_grad", "weight_grad"])
def test_a_role_of_none_is_in_full_precision(missing: str) -> None:
    formats = {"activation": A, "weight": W, "activation_grad": DA, "weight_grad": DW, missing: None}
    layer = Linear(layout_of())
    x, dy = case(layer)
    policy = lp.Policy(**formats)
    assert_same(run(lp.wrap(layer, policy), x, dy), by_hand(layer, x, dy, policy))


def test_gates_are_left_as_they_are_and_their_gradients_too() -> None:
    layer = Linear(layout_of(), gate=True)
    layer.gate.data = torch.tensor([0.3, 0.0, 1.7, -0.6, 1.0, 2.2])
    x, dy = case(layer)
    ours = run(lp.wrap(layer, POLICY), x, dy)
    w, update = lp.quantize(layer.weight.detach(), W), (lp.quantize(x.detach(), A), lp.quantize(dy, DA))
    sums = sparse.weight_grad([update], layer.layout)
    assert torch.equal(ours["gate"], (sums * w).sum((1, 2)))
    gated = sparse.weight_grad([update], layer.layout, gate=layer.gate.detach())
    assert torch.equal(ours["weight"], lp.quantize(gated, DW))


def test_functions_are_covered_too() -> None:
    layout = layout_of()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(normal(*layout.weight_shape))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return sparse.matmul(x, self.weight, layout), sparse.input_grad(x[:, :8].repeat(1, 4), self.weight, layout)

    model = lp.wrap(Model(), POLICY, strict=True)
    x = normal(5, 24)
    y, dx = model(x)
    w = lp.quantize(model.weight.detach(), W)
    assert torch.equal(y, sparse.matmul(lp.quantize(x, A), w, layout))
    assert torch.equal(dx, sparse.input_grad(lp.quantize(x[:, :8].repeat(1, 4), A), w, layout))


def test_autocast_casts_what_is_rounded() -> None:
    layer = lp.wrap(Linear(layout_of()), POLICY)
    x = normal(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    rounded = lp.quantize(x, A).bfloat16(), lp.quantize(layer.weight.detach(), W).bfloat16()
    assert torch.equal(y, sparse.matmul(*rounded, layer.layout) + layer.bias.bfloat16())


def test_a_weight_under_a_norm_is_computed_in_full_precision() -> None:
    layer = sparse.weight_norm(Linear(layout_of()))
    weight, x = layer.weight.detach().clone(), normal(5, 24)
    lp.wrap(layer, POLICY, strict=True)
    y = layer(x)
    assert torch.equal(y, sparse.matmul(lp.quantize(x, A), lp.quantize(weight, W), layer.layout) + layer.bias)
    assert "Full precision, where a weight is computed from parameters: parametrizations.weight" in str(
        lp.report(layer)
    )
    y.sum().backward()
    assert layer.parametrizations.weight.original1.grad.isfinite().all()


# States, counts, checkpointing.


def test_casts_that_measure_keep_their_states() -> None:
    layer = lp.wrap(Linear(layout_of()), "fp8-sampled")
    x, dy = case(layer)
    for _ in range(3):
        run(layer, (100 * x.detach()).requires_grad_(), dy)
    keys = {name for name in layer.state_dict() if name.startswith("lowprec.")}
    assert keys == {f"lowprec.{role}" for role in ("activation", "weight", "activation_grad", "weight_grad")}
    (row,) = lp.report(layer).rows
    assert row.calls == 3
    assert row.emaxes["activation"] == (10,)
    twin = lp.wrap(Linear(layout_of()), "fp8-sampled")
    twin.load_state_dict(layer.state_dict())
    assert_same(run(twin, x, dy), run(layer, x, dy))
    plain = Linear(layout_of())
    plain.load_state_dict(lp.unwrap(layer).state_dict())


def test_the_report_counts_what_is_rounded() -> None:
    model = lp.wrap(nn.Sequential(Linear(layout_of()), nn.ReLU(), LayerNorm(32)), POLICY)
    x, dy = normal(5, 24).requires_grad_(), normal(5, 32)
    model(x).backward(dy)
    report = lp.report(model)
    (row,) = report.rows
    assert (row.path, row.kind, row.calls) == ("0", "sparse_matmul", 1)
    elements = {role: count.elements for role, count in row.counts.items()}
    weights = layout_of().blocks * 64
    assert elements == {"activation": 5 * 24, "weight": weights, "activation_grad": 5 * 32, "weight_grad": weights + 32}
    assert report.not_covered == ()
    assert report.elementwise == ("2",)


def test_a_layer_that_has_not_run_is_in_the_report() -> None:
    model = lp.wrap(nn.Sequential(Linear(layout_of()), Conv2d(layout_of(), 3)), POLICY)
    rows = {row.path: (row.kind, row.calls) for row in lp.report(model).rows}
    assert rows == {"0": ("sparse_matmul", 0), "1": ("sparse_matmul", 0)}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["fp8-sampled", "mxfp8"])
def test_checkpointing_sees_the_same(recipe: str, reentrant: bool) -> None:
    layer = Linear(layout_of(block=32))
    x, dy = case(layer)
    plain = run(lp.wrap(copy.deepcopy(layer), recipe), x, dy)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    model = lp.wrap(Checkpointed(), recipe)
    ours = run(model, x, dy)
    assert_same({name.removeprefix("layer."): value for name, value in ours.items()}, plain)
    assert lp.report(model).rows[0].calls == 1


# Accumulators.


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("own", [None, "fp32"])
def test_the_policys_accumulators_form_the_sums(device: torch.device, features: Any, own: str | None) -> None:
    layer = Linear(layout_of(), features=features, accumulator=own, device=device)
    x, dy = case(layer)
    three = (SEQUENTIAL, "pairwise:bf16", "chunk4:1-6-9/fp32")
    policy = lp.Policy(A, W, DA, accumulator=three, reduction="1-6-9")
    ours = run(lp.wrap(layer, policy, strict=True), x, dy)
    expected = by_hand(layer, x, dy, policy, three)
    terms = lp.quantize(dy, DA)
    expected["bias"] = lp.sum(terms, 1 if features == "first" else 0, SEQUENTIAL)
    assert_same(ours, expected)
    assert not torch.equal(ours["y"], by_hand(layer, x, dy, policy)["y"]), "the case shows nothing"
    (row,) = lp.report(layer).rows
    assert row.sums == "policy's"


def test_where_the_policy_has_none_the_layers_own_forms_the_sums() -> None:
    layer = Linear(layout_of(), accumulator=SEQUENTIAL)
    x, dy = case(layer)
    for policy, sums in [
        (lp.Policy(A, W, DA, DW), (SEQUENTIAL,) * 3),
        (lp.Policy(A, W, DA, DW, accumulator=("fp32", None, None)), ("fp32", SEQUENTIAL, SEQUENTIAL)),
    ]:
        assert_same(run(lp.wrap(layer, policy), x, dy), by_hand(layer, x, dy, policy, sums))


def test_gates_under_an_accumulator() -> None:
    layer = Linear(layout_of(), gate=True)
    layer.gate.data = torch.tensor([0.3, 0.0, 1.7, -0.6, 1.0, 2.2])
    x, dy = case(layer)
    policy = lp.Policy(A, W, DA, accumulator=SEQUENTIAL)
    ours = run(lp.wrap(layer, policy), x, dy)
    assert_same(ours, {k: v for k, v in by_hand(layer, x, dy, policy, (SEQUENTIAL,) * 3).items() if k != "weight"})
    w, update = lp.quantize(layer.weight.detach(), W), (lp.quantize(x.detach(), A), lp.quantize(dy, DA))
    sums = sparse.weight_grad([update], layer.layout, accumulator=SEQUENTIAL)
    assert torch.equal(ours["gate"], (sums * w).sum((1, 2)))
    assert torch.equal(ours["weight"], sums * layer.gate[:, None, None])


def test_stochastic_sums_draw_anew_in_each_call() -> None:
    accumulator = lp.Accumulator.sequential("1-5-3")
    accumulator = lp.Accumulator([lp.Level(None, "1-5-3", "stochastic")])
    layer = Linear(layout_of())
    torch.manual_seed(3)
    one = lp.wrap(copy.deepcopy(layer), lp.Policy(accumulator=accumulator))
    torch.manual_seed(3)
    other = lp.wrap(copy.deepcopy(layer), lp.Policy(accumulator=accumulator))
    x, dy = case(layer)
    first, second = run(one, x, dy), run(one, x, dy)
    assert all(not torch.equal(first[name], second[name]) for name in ("y", "x", "weight"))
    assert_same(run(other, x, dy), first)
    assert_same(run(other, x, dy), second)


def test_tensor_core_leaves_multiply_narrow_operands() -> None:
    layer = Linear(layout_of(block=16))
    x, dy = case(layer)
    policy = lp.Policy("1-4-3:emax=8", "1-4-3:emax=8", "e5m2", accumulator="hopper_fp16")
    ours = run(lp.wrap(layer, policy), x, dy)
    where = {"accumulator": "hopper_fp16", "dtype": torch.float32}
    given = [lp.quantize(t.detach(), "1-4-3:emax=8").bfloat16() for t in (x, layer.weight)]
    assert torch.equal(ours["y"], sparse.matmul(*given, layer.layout, **where) + layer.bias)
    gradient = lp.quantize(dy, "e5m2", saturate=False).bfloat16()
    assert torch.equal(ours["x"], sparse.input_grad(gradient, given[1], layer.layout, **where))
    assert torch.equal(ours["weight"], sparse.weight_grad([(given[0], gradient)], layer.layout, **where))
    with pytest.raises(ValueError, match="operands of a product are float32, rounded"):
        lp.wrap(layer, lp.Policy(accumulator="hopper_fp16"))(x)


# Block formats.

FORMATS = ("mxfp8_e4m3", "bfp8/8", "bfp6/8x16", "nvfp4", "bfp8/tensor")


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_blocks_lie_along_each_contraction(features: Any, fmt: str) -> None:
    layer = Linear(layout_of(block=32), features=features)
    layout, first = layer.layout, layer.features == "first"
    x, dy = case(layer, 40)
    ours = run(lp.wrap(layer, lp.Policy(fmt, fmt, fmt)), x, dy)
    channels, tokens = (0, 1) if first else (1, 0)

    def q(t: Tensor, dim: int) -> Tensor:
        return lp.quantize(t.detach(), fmt, dim=dim)

    # A dense matrix with zeros for absent blocks has the same blocks of the format, and these zeros.
    dense = layout.to_dense(layer.weight.detach())
    along_in, along_out = (layout.from_dense(q(dense, dim)) for dim in (0, 1))
    bias = layer.bias.unsqueeze(1) if first else layer.bias
    y = sparse.matmul(q(x, channels), along_in, layout, features=features)
    dx = sparse.input_grad(q(dy, channels), along_out, layout, features=features)
    dw = sparse.weight_grad([(q(x, tokens), q(dy, tokens))], layout, features=features)
    db = q(dy, channels).sum(tokens)
    assert_same(ours, {"y": y + bias, "x": dx, "weight": dw, "bias": db})


def test_blocks_of_one_role_beside_other_formats() -> None:
    layer = Linear(layout_of(block=32), gate=True)
    layer.gate.data.uniform_(0.5, 2)
    x, dy = case(layer, 40)
    gate, layout = layer.gate.detach(), layer.layout
    ours = run(lp.wrap(layer, lp.Policy("mxfp8_e4m3", W, DA, DW)), x, dy)
    w, gradient = lp.quantize(layer.weight.detach(), W), lp.quantize(dy, DA)
    y = sparse.matmul(lp.quantize(x.detach(), "mxfp8_e4m3"), w, layout, gate=gate)
    dx = sparse.input_grad(gradient, w, layout, gate=gate)
    sums = sparse.weight_grad([(lp.quantize(x.detach(), "mxfp8_e4m3", dim=0), gradient)], layout)
    expected = {"y": y + layer.bias.detach(), "x": dx, "gate": (sums * w).sum((1, 2))}
    expected["weight"] = lp.quantize(sums * gate[:, None, None], DW)
    assert_same(ours, expected)


@pytest.mark.parametrize(
    ("policy", "block", "text"),
    [
        (
            lp.Policy.recipe("mxfp8"),
            16,
            "activation: blocks of 32 in mxfp8_e4m3 cross a block-sparse layer's blocks of 16",
        ),
        (lp.Policy(weight="nvfp4"), 8, "weight: blocks of 16 in nvfp4 cross"),
        (lp.Policy(activation_grad="bfp8/24"), 32, "activation_grad: blocks of 24 in bfp8/24 cross"),
        (lp.Policy(weight="bfp8/16x8"), 8, "weight: blocks of 16 in bfp8/16x8 cross"),
        (lp.Policy(activation="bfp8/8x16"), 8, "activation: blocks of 16 in bfp8/8x16 cross"),
    ],
)
def test_blocks_that_cross_those_of_the_layer_are_refused(policy: lp.Policy, block: int, text: str) -> None:
    layer = lp.wrap(Linear(layout_of(block=block)), policy)
    with pytest.raises(ValueError, match=text):
        layer(torch.ones(2, layer.inputs))


def test_tiles_may_be_as_long_as_they_like_along_tokens() -> None:
    for features, fmt in (("last", "bfp8/16x8"), ("first", "bfp8/8x16")):
        layer = lp.wrap(Linear(layout_of(), features=features), lp.Policy(activation=fmt))
        x, _ = case(layer, 40)
        rounded = lp.quantize(x.detach(), fmt)
        assert torch.equal(layer(x), lp.unwrap(layer)(rounded))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("policy", [lp.Policy("bfp24/8", "bfp24/8", "bfp24/8"), lp.Policy(accumulator="fp32")])
def test_gradients_of_gradients(features: Any, policy: lp.Policy) -> None:
    layer = Linear(layout_of(), features=features, gate=True)
    layer.gate.data.uniform_(0.5, 2)
    x, dy = case(layer)

    def second(layer: nn.Module) -> list[Tensor]:
        first = torch.autograd.grad(
            layer(x), [x, layer.weight, layer.gate], torch.tanh(layer(x) * dy), create_graph=True
        )
        total = sum(grad.square().sum() for grad in first)
        return list(torch.autograd.grad(total, [x, layer.weight, layer.gate]))

    plain = second(layer)
    for ours, theirs in zip(second(lp.wrap(layer, policy)), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# Modules, compiled and trained.


@pytest.mark.parametrize("recipe", ["fp8", "fp8-sampled", "mxfp8", "nvfp4"])
def test_compiled_code_computes_the_same(device: torch.device, recipe: str) -> None:
    torch.compiler.reset()
    layer = lp.wrap(Linear(layout_of(block=32), gate=True, device=device), recipe)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x, dy = case(layer)
    for _ in range(2):
        one, other = run(layer, x, dy), run(compiled, x, dy)
        assert_same(one, {name.removeprefix("_orig_mod."): value for name, value in other.items()})


def test_compiled_accumulators_compute_the_same() -> None:
    torch.compiler.reset()
    three = (SEQUENTIAL, lp.Accumulator([lp.Level(None, "1-5-3", "stochastic")]), None)
    layer = lp.wrap(Linear(layout_of(), features="first"), lp.Policy(A, W, DA, DW, accumulator=three))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x, dy = case(layer)
    for _ in range(2):
        one, other = run(layer, x, dy), run(compiled, x, dy)
        assert_same(one, {name.removeprefix("_orig_mod."): value for name, value in other.items()})


def test_a_network_of_all_layers_wraps_and_unwraps() -> None:
    model = Network()
    x = normal(2, 3, 8, 8)
    before = model(x).detach()
    state = copy.deepcopy(model.state_dict())
    lp.wrap(model, "fp8", strict=True)
    wrapped = model(x)
    wrapped.sum().backward()
    assert not torch.equal(wrapped, before)
    kinds = {(row.path, row.kind) for row in lp.report(model).rows}
    expected = {("stem", "conv2d"), ("body.0", "conv2d"), ("body.0", "sparse_matmul")}
    assert kinds == expected | {("body.4", "sparse_matmul"), ("head", "sparse_matmul")}
    lp.unwrap(model).load_state_dict(state)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("layer", [LayerNorm(24), LayerNorm(24, "first"), BatchNorm(24), BatchNorm(24, "last")])
def test_norms_sum_as_the_policy_says(layer: nn.Module) -> None:
    x = arranged(normal(5, 24), layer.features)
    y, plain = lp.wrap(layer, lp.Policy(reduction="1-6-9"), strict=True)(x), lp.unwrap(copy.deepcopy(layer))(x)
    assert not torch.equal(y, plain)
    torch.testing.assert_close(y, plain, rtol=0.05, atol=0.05)
    (row,) = lp.report(layer).rows
    assert (row.sums, row.calls) == ("policy's", 1)


@pytest.mark.parametrize("recipe", ["fp8", "bf16", "fp8-sampled"])
def test_a_sparse_network_trains(one_thread: None, recipe: str) -> None:
    torch.manual_seed(0)
    mask = sparse.patterns.watts_strogatz(4, 4, 0.5)
    layout = BlockLayout(torch.as_tensor(mask), 8)
    layers = [Linear(layout), LayerNorm(32), nn.ReLU(), Linear(layout), nn.ReLU(), nn.Linear(32, 4)]
    model = lp.wrap(nn.Sequential(*layers), recipe, strict=True)
    x, target = normal(16, 32), normal(16, 32)[:, :4].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Modes.


class Seen(TorchFunctionMode):
    """Remembers what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is blocksparse.matmul
        return func(*args, **kwargs or {})


def test_function_modes_see_the_product() -> None:
    x, layer = normal(5, 24), Linear(layout_of())
    with Seen() as outer, Seen() as inner:
        y = layer(x)
    assert (outer.count, inner.count) == (1, 1)
    assert torch.equal(y, layer(x))

    @announced
    def fails() -> None:
        raise ValueError("in vain")

    with Seen() as mode:
        with pytest.raises(ValueError, match="in vain"):
            fails()
        layer(x)
    assert mode.count == 1
