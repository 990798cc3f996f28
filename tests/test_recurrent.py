"""LSTM and MLSTM: against their equations, against torch's LSTM, against autograd, and what is rounded where."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowprec as lp
from lowprec import sparse
from lowprec.eager import CONTAINERS
from lowprec.policy import Policy
from lowprec.roles import AS_IT_IS, Role, round_both
from lowprec.sparse import recurrent
from lowprec.sparse.rounding import caster, is_short, nearest_even
from lowprec.testing import assert_bits_equal

FP8 = Policy.recipe("fp8")
Rounder = Callable[[Any], Any]

pytestmark = pytest.mark.usefixtures("one_thread")


def perturbed(layer: Any, scale: float = 0.3) -> Any:
    """The layer with its parameters moved off their symmetric start."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * scale)
    return layer


def layers() -> list[Any]:
    options: dict[str, Any] = {"dtype": torch.float64}
    return [
        pytest.param(lambda: sparse.MLSTM(3, 5, 3, **options), id="mlstm"),
        pytest.param(lambda: sparse.MLSTM(3, 5, 2, replicas=2, **options), id="mlstm-replicas"),
        pytest.param(lambda: sparse.MLSTM(7, 5, 4, dropout=0.5, **options), id="mlstm-dropout"),
        pytest.param(lambda: sparse.LSTM(3, 5, **options), id="lstm"),
        pytest.param(lambda: sparse.LSTM(3, 5, layer_norm=True, **options), id="lstm-norm"),
    ]


def inputs(layer: Any, steps: int = 4, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    lead = () if layer.replicas is None else (layer.replicas,)
    p = next(layer.parameters())
    shapes = ((*lead, steps, rows, layer.input_size), *[(*lead, rows, layer.hidden_size)] * 2)
    return tuple(torch.randn(shape, dtype=p.dtype, requires_grad=True) for shape in shapes)  # type: ignore[return-value]


# The equations, for one sequence, on vectors.


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


class Equations:
    """The recipe read line by line: one replica, one row, numpy float64."""

    def __init__(self, layer: Any, activation: Rounder, weight: Rounder) -> None:
        self.p = {name: p.detach().numpy() for name, p in layer.named_parameters()}
        self.round, self.round_weight, self.size = activation, weight, layer.hidden_size

    def linear(self, name: str, x: Any, group: int = 0) -> Any:
        columns = slice(group * self.size, (group + 1) * self.size)
        z = np.array([sum(x * w) for w in self.round_weight(self.p[f"weight_{name}"])[:, columns].T])
        bias = self.p[f"bias_{name}"][group]
        if f"gain_{name}" not in self.p:
            return z + bias
        z = self.round(z)
        normal = (z - z.mean()) / np.sqrt(z.var() + 1e-6)
        return self.round(normal * self.p[f"gain_{name}"][group] + bias)

    def gates(self, gates: list[Any], c: Any, keep: Any) -> tuple[Any, Any]:
        i, f, o, u = gates
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(u * keep)
        return self.round(sigmoid(o) * np.tanh(c)), c

    def mlstm(self, xs: Any, h: Any, c: Any, steps: int, keeps: Any) -> tuple[Any, Any]:
        hs, h = [], self.round(h)
        for x, keep in zip(self.round(xs), keeps, strict=True):
            m, a = self.linear("input", x, 0), self.linear("input", x, 1)
            z = self.round(self.linear("step0", h) * m)
            z = np.maximum(self.round(self.linear("step1", z) + a), 0)
            for k in range(2, steps):
                z = np.maximum(self.linear(f"step{k}", z), 0)
            h, c = self.gates([self.linear("gates", z, group) for group in range(4)], c, keep)
            hs.append(h)
        return np.array(hs), c

    def lstm(self, xs: Any, h: Any, c: Any, keeps: Any) -> tuple[Any, Any]:
        hs, h = [], self.round(h)
        for x, keep in zip(self.round(xs), keeps, strict=True):
            gates = [self.linear("hidden", h, group) + self.linear("input", x, group) for group in range(4)]
            h, c = self.gates(gates, c, keep)
            hs.append(h)
        return np.array(hs), c


def rounder(fmt: Any) -> Rounder:
    return lambda x: x if fmt is None else lp.quantize(torch.as_tensor(x), fmt).numpy()


@pytest.mark.parametrize("policy", [None, FP8], ids=["none", "fp8"])
@pytest.mark.parametrize("make", layers())
def test_forward_is_the_equations(make: Callable[[], Any], policy: Policy | None) -> None:
    layer = perturbed(make())
    layer.policy = policy
    x, h, c = inputs(layer)
    torch.manual_seed(7)
    hs, (last_h, last_c) = layer(x, (h, c))
    torch.manual_seed(7)
    keep = layer._keep(x if layer.replicas else x[None])
    keeps = np.ones((4, 2, 5)) if keep is None else keep[0].numpy()
    single = select_replica(layer, 1) if layer.replicas else layer
    part = (1,) if layer.replicas else ()
    equations = Equations(single, rounder(policy and policy.activation), rounder(policy and policy.weight))
    for row in range(2):
        arrays = [v.detach().numpy() for v in (x[part][:, row], h[part][row], c[part][row])]
        extra = (layer.steps,) if isinstance(layer, sparse.MLSTM) else ()
        method = equations.mlstm if extra else equations.lstm
        expected_hs, expected_c = method(*arrays, *extra, keeps[:, row])  # type: ignore[operator]
        np.testing.assert_allclose(hs[part][:, row].detach().numpy(), expected_hs, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(last_c[part][row].detach().numpy(), expected_c, rtol=1e-10, atol=1e-12)
        assert torch.equal(last_h[part][row], hs[part][-1, row])


def select_replica(layer: Any, index: int) -> Any:
    """One replica as a layer of its own."""
    extra = (layer.steps,) if isinstance(layer, sparse.MLSTM) else ()
    dtype = next(layer.parameters()).dtype
    single = type(layer)(layer.input_size, layer.hidden_size, *extra, policy=layer.policy, dtype=dtype)
    single.load_state_dict({name: p[index] for name, p in layer.state_dict().items()})
    return single


@pytest.mark.parametrize("make", layers())
def test_gradients_are_derivatives(make: Callable[[], Any]) -> None:
    layer = perturbed(make())
    x, h, c = inputs(layer, steps=3)

    def run(x: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        hs, state = layer(x, (h, c))
        return hs, *state

    assert torch.autograd.gradcheck(run, (x, h, c, *layer.parameters()), fast_mode=True)


def test_plain_lstm_is_torchs() -> None:
    ours, theirs = perturbed(sparse.LSTM(3, 5, dtype=torch.float64)), nn.LSTM(3, 5, dtype=torch.float64)
    order = [0, 1, 3, 2]  # torch: input, forget, update, output
    rows = {"input": "ih", "hidden": "hh"}
    with torch.no_grad():
        for name, other in rows.items():
            weight, bias = ours.get_parameter(f"weight_{name}"), ours.get_parameter(f"bias_{name}")
            theirs.get_parameter(f"weight_{other}_l0").copy_(weight.mT.reshape(4, 5, -1)[order].flatten(0, 1))
            theirs.get_parameter(f"bias_{other}_l0").copy_(bias[order].flatten())
    x, h, c = inputs(ours)
    hs, (last_h, last_c) = ours(x, (h, c))
    expected, (their_h, their_c) = theirs(x, (h[None], c[None]))
    torch.testing.assert_close(hs, expected)
    torch.testing.assert_close((last_h, last_c), (their_h[0], their_c[0]))
    weights = torch.randn_like(hs)
    ours_dx = torch.autograd.grad((hs * weights).sum(), (x, ours.weight_hidden, ours.bias_input))
    theirs_dx = torch.autograd.grad((expected * weights).sum(), (x, theirs.weight_hh_l0, theirs.bias_ih_l0))
    torch.testing.assert_close(ours_dx[0], theirs_dx[0])
    torch.testing.assert_close(ours_dx[1].mT.reshape(4, 5, 5)[order].flatten(0, 1), theirs_dx[1])
    torch.testing.assert_close(ours_dx[2][order].flatten(), theirs_dx[2])


# What is rounded: against autograd over `round_both`, and seen from outside.


def autograd_mlstm(layer: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The layer once more, its gradients left to autograd; products and norms rounded in both directions."""
    forward, weight, backward, weight_grad = layer.policy.formats

    def both(x: Tensor) -> Tensor:
        return round_both(x, Role(forward), Role(backward))

    def linear(name: str, x: Tensor, w: Tensor) -> Tensor:
        shape = (*x.shape[:-1], *layer.get_parameter(f"bias_{name}").shape)
        normal = nn.functional.layer_norm(both(x @ w).view(shape), shape[-1:], eps=1e-6)
        return both(normal * layer.get_parameter(f"gain_{name}") + layer.get_parameter(f"bias_{name}"))

    def operand(x: Tensor) -> Tensor:
        return round_both(x, Role(forward), AS_IT_IS)

    w = {n: round_both(layer.get_parameter(f"weight_{n}"), Role(weight), Role(weight_grad)) for n in layer.maps}
    hs, h = [], operand(h)
    ma = linear("input", operand(x), w["input"])
    for m, a in zip(ma[..., 0, :], ma[..., 1, :], strict=True):
        z = operand(linear("step0", h, w["step0"])[:, 0] * m)
        z = operand(linear("step1", z, w["step1"])[:, 0] + a).relu()
        for k in range(2, layer.steps):
            z = linear(f"step{k}", z, w[f"step{k}"])[:, 0].relu()
        i, f, o, u = linear("gates", z, w["gates"]).unbind(-2)
        c = f.sigmoid() * c + i.sigmoid() * u.tanh()
        h = operand(o.sigmoid() * c.tanh())
        hs.append(h)
    return torch.stack(hs), c


def test_rounded_gradients_are_autograds() -> None:
    layer = perturbed(sparse.MLSTM(6, 8, 4, policy=FP8, dtype=torch.float64))
    x, h, c = inputs(layer, steps=5, rows=3)
    wanted = (x, h, c, *layer.parameters())
    hs, (_, last) = layer(x, (h, c))
    expected_hs, expected_last = autograd_mlstm(layer, x, h, c)
    weights = torch.randn_like(hs) * 0.1
    ours = torch.autograd.grad((hs * weights).sum() + last.sum(), wanted)
    theirs = torch.autograd.grad((expected_hs * weights).sum() + expected_last.sum(), wanted)
    assert torch.equal(hs, expected_hs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def is_rounded(x: Tensor, fmt: Any) -> bool:
    return torch.equal(lp.quantize(x.detach().float(), fmt), x.detach().float())


@pytest.mark.parametrize("container", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [sparse.MLSTM, sparse.LSTM])
def test_every_operand_is_in_its_format(
    make: Any, container: torch.dtype | None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    layer = perturbed(make(16, 24, policy=FP8, container=container, replicas=2, device=device))
    seen: list[tuple[Tensor, Tensor]] = []
    product = recurrent.product
    monkeypatch.setattr(recurrent, "product", lambda x, w, how: seen.append((x, w)) or product(x, w, how))
    x = torch.randn(2, 5, 4, 16, device=device)
    hs, _ = layer(x)
    forward = len(seen)
    (hs * torch.randn_like(hs)).mean().backward()
    assert is_rounded(hs, FP8.activation)
    assert all(is_rounded(x, FP8.activation) and is_rounded(w, FP8.weight) for x, w in seen[:forward])
    weights, grads = FP8.weight, FP8.activation_grad
    pairs = [(a, b) for a, b in seen[forward:] if a.shape[-2] == 4]  # dY · Wᵀ of each timestep
    assert pairs
    assert all(is_rounded(dy, grads) and is_rounded(w, weights) for dy, w in pairs)
    sums = [(x, dy) for x, dy in seen[forward:] if dy.shape[-2] == 20]  # xᵀ · dY of the chunk
    assert len(sums) == len(layer.maps)
    assert all(is_rounded(x, FP8.activation) and is_rounded(dy, grads) for x, dy in sums)
    for name, p in layer.named_parameters():
        assert p.grad is not None
        assert p.grad.any()
        assert is_rounded(p.grad, FP8.weight_grad) == name.startswith("weight")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [sparse.MLSTM, sparse.LSTM])
def test_every_product_has_its_accumulator(make: Any, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(accumulator=("1-6-9", "chunk4:1-6-5/1-6-9", "pairwise:1-6-7"))
    layer = perturbed(make(6, 8, policy=None if wrapped else policy))
    if wrapped:
        lp.wrap(layer, policy, strict=True)
    seen: list[tuple[str | None, Tensor]] = []
    product = recurrent.product
    monkeypatch.setattr(recurrent, "product", lambda x, w, how: seen.append((how, y := product(x, w, how))) or y)
    hs, _ = layer(torch.randn(5, 4, 6))
    forward, each = len(seen), 5 * (len(layer.maps) - 1) + 1  # of the input's map at once, of the others every timestep
    hs.sum().backward()
    assert [how for how, _ in seen[:forward]] == ["1-6-9"] * each
    backward = Counter(how for how, _ in seen[forward:])
    assert backward == {"chunk4:1-6-5/1-6-9": each, "pairwise:1-6-7": len(layer.maps)}
    assert all(is_rounded(y, lp.format(how.rpartition(":")[2].rpartition("/")[2])) for how, y in seen if how)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_under_an_accumulator(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 4, 5).to(dtype).mT
    y = recurrent.product(x, w, "pairwise:1-6-9")
    assert_bits_equal(y, lp.matmul(x, w, "pairwise:1-6-9"))
    assert y.dtype == recurrent.product(x, w, None).dtype


@pytest.mark.parametrize("make", [sparse.MLSTM, sparse.LSTM])
def test_formats_that_change_nothing_change_no_bit(make: Any) -> None:
    none = perturbed(make(6, 8, policy=None))
    x = torch.randn(3, 2, 6)
    results = []
    for policy in (None, Policy(), Policy("fp32", "fp32", "fp32", "fp32")):
        layer = copy.deepcopy(none)
        layer.policy = policy
        hs, _ = layer(x)
        hs.square().sum().backward()
        results.append([hs, *(p.grad for p in layer.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_recipes_roles_are_separate() -> None:
    """fp8-forward rounds no gradient."""
    layer = perturbed(sparse.MLSTM(6, 8, 3, policy="fp8-forward"))
    hs, _ = layer(torch.randn(3, 2, 6))
    hs.mean().backward()
    assert is_rounded(hs, FP8.activation)
    assert not any(is_rounded(p.grad, FP8.weight_grad) for p in layer.parameters())


def test_bfloat16_containers_change_no_value() -> None:
    wide = perturbed(sparse.MLSTM(16, 24, 3, policy=FP8))
    narrow = copy.deepcopy(wide)
    narrow.container = torch.bfloat16
    x = torch.randn(4, 3, 16)
    results = []
    for layer in (wide, narrow):
        hs, (_, c) = layer(x)
        hs.square().mean().backward()
        results.append([hs, c, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("make", [sparse.MLSTM, sparse.LSTM])
def test_wrap_puts_its_policy_in_place_of_the_layers(make: Any) -> None:
    own, wrapped = (nn.Sequential(perturbed(make(6, 8, policy=policy))) for policy in ("fp8", "fp8-forward"))
    wrapped.load_state_dict(own.state_dict())
    lp.wrap(wrapped, "fp8", strict=True)
    x = torch.randn(3, 2, 6)
    results = []
    for model in (own, wrapped):
        hs, _ = model(x)
        hs.square().mean().backward()
        results.append([hs, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [(row.path, row.kind, row.calls) for row in lp.report(wrapped).rows] == [("0", "lstm", 1)]


def test_compiled_steps_compute_the_same(device: torch.device) -> None:
    plain = perturbed(sparse.MLSTM(4, 8, 2, policy="fp8", device=device))
    compiled = sparse.MLSTM(4, 8, 2, policy="fp8", compile=True, device=device)
    compiled.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2, 4, device=device)
    results = []
    for layer in (plain, compiled):
        hs, (_, c) = layer(x)
        hs.square().mean().backward()
        results.append([hs, c, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


# Replicas, states, beginnings, errors.


@pytest.mark.parametrize("policy", [None, "fp8"])
def test_replicas_are_layers_side_by_side(policy: str | None) -> None:
    stacked = perturbed(sparse.MLSTM(6, 8, 3, policy=policy, replicas=3, dtype=torch.float64))
    x, h, c = inputs(stacked)
    hs, (last_h, last_c) = stacked(x, (h, c))
    for index in range(3):
        one, (one_h, one_c) = select_replica(stacked, index)(x[index], (h[index], c[index]))
        torch.testing.assert_close((hs[index], last_h[index], last_c[index]), (one, one_h, one_c))


def test_a_state_carries_on() -> None:
    layer = perturbed(sparse.MLSTM(6, 8, 3, policy="fp8"))
    x = torch.randn(6, 2, 6)
    whole, (h, c) = layer(x)
    first, state = layer(x[:4])
    second, (later_h, later_c) = layer(x[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close((later_h, later_c), (h, c))


def test_dropout_only_while_training() -> None:
    layer = perturbed(sparse.MLSTM(6, 8, 3, dropout=0.5))
    x = torch.randn(3, 2, 6)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_beginning() -> None:
    layer = sparse.MLSTM(4, 10, 3, replicas=2)
    assert all(torch.equal(layer.get_parameter(f"weight_step{k}")[1], torch.eye(10)) for k in range(3))
    assert torch.equal(layer.weight_gates[0], torch.eye(10).repeat(1, 4))
    tiled = torch.eye(4).repeat(1, 3)
    assert not torch.equal(layer.weight_input[0][:, :10], layer.weight_input[0][:, 10:20] * 0)
    assert torch.equal(layer.weight_input[0][:, :10], tiled[:, :10])
    assert torch.equal(layer.bias_gates[0], torch.eye(4)[1][:, None].expand(4, 10))
    assert not layer.bias_input.any()
    assert bool((layer.gain_step1 == 1).all())
    assert "bias_hidden" in dict(sparse.LSTM(4, 10).named_parameters())


def test_layers_copy_pickle_and_load() -> None:
    layer = perturbed(sparse.MLSTM(6, 8, 3, policy="fp8"))
    x = torch.randn(3, 2, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], layer(x)[0])
    fresh = sparse.MLSTM(6, 8, 3, policy="fp8")
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], layer(x)[0])


def test_autocast_leaves_the_layer_alone() -> None:
    layer = perturbed(sparse.MLSTM(6, 8, 3))
    x = torch.randn(3, 2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)[0]
    assert torch.equal(inside, layer(x)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sparse.MLSTM(0, 8), "input_size must be a positive int"),
        (lambda: sparse.LSTM(4, 2.5), "hidden_size must be a positive int"),  # type: ignore[arg-type]
        (lambda: sparse.MLSTM(4, 8, 1), "steps must be an int of at least 2"),
        (lambda: sparse.MLSTM(4, 8, dropout=1.0), "dropout must be in"),
        (lambda: sparse.MLSTM(4, 8, policy="fp9"), "recipe must be one of"),
        (lambda: sparse.MLSTM(4, 8, container=torch.bfloat16), "must give activation a format"),
        (lambda: sparse.MLSTM(4, 8, policy=Policy("fp16", "fp16", "fp16"), container=torch.bfloat16), "cannot hold"),
        (lambda: sparse.MLSTM(4, 8)(torch.zeros(3, 4)), r"x must be \[T, N, 4\]"),
        (lambda: sparse.MLSTM(4, 8)(torch.zeros(0, 2, 4)), "with T > 0"),
        (lambda: sparse.MLSTM(4, 8, replicas=2)(torch.zeros(3, 2, 4)), r"x must be \[R, T, N, 4\]"),
        (lambda: sparse.MLSTM(4, 8)(torch.zeros(3, 2, 4), (torch.zeros(2, 8), torch.zeros(1, 8))), "c must be"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_dtypes() -> None:
    with pytest.raises(TypeError, match="like the parameters"):
        sparse.MLSTM(4, 8)(torch.zeros(3, 2, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match="policy must be"):
        sparse.MLSTM(4, 8, policy=8)


def test_parameters_changed_before_the_gradient_are_noticed() -> None:
    layer = sparse.MLSTM(4, 8, 3)
    hs, _ = layer(torch.randn(3, 2, 4))
    with torch.no_grad():
        layer.weight_step1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hs.sum().backward()


def test_an_empty_batch() -> None:
    hs, (h, c) = sparse.MLSTM(4, 8, 3, policy="fp8")(torch.zeros(3, 0, 4))
    assert hs.shape == (3, 0, 8)
    assert h.shape == c.shape == (0, 8)


# The short cast.


def bit_patterns(dtype: torch.dtype) -> Tensor:
    """Every 16-bit float and its neighbours in a wider dtype, and random bits."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).to(dtype)
    integer = CONTAINERS[dtype].integer
    around = [every, (every.view(integer) + 1).view(dtype), (every.view(integer) - 1).view(dtype)]
    info = torch.iinfo(integer)
    return torch.cat([*around, torch.randint(info.min, info.max, (10**5,), dtype=integer).view(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["1-4-3:emax=8", "1-5-2:emax=1", "1-3-4", "e4m3fn", "1-6-9", "1-7-1:emax=30", "1-2-1"])
def test_the_short_cast_is_quantize(name: str, dtype: torch.dtype, device: torch.device) -> None:
    fmt = lp.format(name)
    assert is_short(fmt, dtype)
    x = bit_patterns(dtype).to(device)
    short, whole = nearest_even(fmt, dtype)(x), lp.quantize(x, fmt)
    good = (short.view(CONTAINERS[dtype].integer) == whole.view(CONTAINERS[dtype].integer)) | x.isnan()
    assert bool(good.all()), x[~good][:5]
    assert bool(short[x.isnan()].isnan().all())


@pytest.mark.parametrize(
    "name", ["bf16", "fp16", "1-5-0:emax=3", "fp32", "e5m2", "e4m3fnuz", "1-0-7", "1-4-3:emax=-110"]
)
def test_other_formats_take_the_operator(name: str) -> None:
    fmt = lp.format(name)
    assert not is_short(fmt, torch.float32)
    x = torch.randn(1000) * 1e3
    assert torch.equal(caster(fmt, torch.float32, "cpu")(x), lp.quantize(x, fmt, saturate=fmt.specials != "ieee"))
