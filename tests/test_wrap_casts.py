"""Policies of casts that keep a state: where the states are, what saves and copies them, which bits come out."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowprec as lp
from lowprec.entry import entry_of
from lowprec.policy import ROLES
from lowprec.slots import ROWS

SAMPLED = lp.Policy.recipe("fp8-sampled")
RANDOM = lp.Policy(
    lp.Cast("1-4-3", bias="delayed", history=3, rounding="stochastic", seed=1),
    lp.Cast("1-4-3", bias="dynamic"),
    lp.Cast("1-5-2", bias="sampled", rounding="stochastic", seed=2, pad=3),
    lp.Cast("1-5-2", rounding="stochastic", seed=3),
)
POLICIES = {"sampled": SAMPLED, "random": RANDOM}


def batch(k: int, *shape: int) -> Tensor:
    """Random numbers that grow from one call to the next."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(k)) * 2.0**k


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one pass; leaves no gradients behind."""
    y = model(x)
    y.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [y.detach(), *gradients]


def states(model: nn.Module) -> dict[str, Tensor]:
    """Whatever a wrapped model's state_dict has under `lowprec.`."""
    return {key: value for key, value in model.state_dict().items() if "lowprec." in key}


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same_states(one: nn.Module, other: nn.Module) -> bool:
    a, b = states(one), states(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# What a linear layer computes.


@pytest.mark.parametrize("bias", ["dynamic", "delayed", "sampled"])
def test_a_linear_layer_is_four_casts(bias: str) -> None:
    forward, backward = lp.Cast("1-4-3", bias=bias, history=2), lp.Cast("1-5-2", bias=bias, history=2, pad=1)
    layer = nn.Linear(8, 5)
    model = lp.wrap(copy.deepcopy(layer), lp.Policy(forward, forward, backward, backward))
    a, w, da, dw, db = (copy.deepcopy(cast) for cast in (forward, forward, backward, backward, backward))
    for k in range(7):
        x, dy = batch(k, 4, 8).requires_grad_(), batch(-k, 4, 5)
        y = model(x)
        y.backward(dy)
        assert torch.equal(y, F.linear(a(x), w(layer.weight)) + layer.bias)
        g = da(dy)
        assert torch.equal(x.grad, g @ lp.quantize(layer.weight, w.rule.fmt.with_emax(w.emax)))
        assert torch.equal(model.bias.grad, db(g.sum(0)))
        rounded = lp.quantize(x.detach(), a.rule.fmt.with_emax(a.emax))
        assert torch.equal(model.weight.grad, dw(g.t() @ rounded))
        model.zero_grad()


def test_each_tensor_has_a_state_of_its_own() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ (x.t() * 16)) @ x

    model = lp.wrap(Two(), lp.Policy(lp.Cast("1-4-3", bias="dynamic", pad=0)))
    model(torch.ones(2, 2))
    assert entry_of(model).region.slots[0].emaxes() == (0, 4, 5, 0)


def test_steps_of_a_recurrent_layer_share_one() -> None:
    model = lp.wrap(nn.LSTM(3, 4, num_layers=2), SAMPLED)
    for _ in range(2):
        model(torch.randn(50, 2, 3))[0].sum().backward()
    rows = states(model)
    assert [int(calls) for calls in rows["lowprec.activation"][:, 0]] == [100, 100, 2, 2]
    assert len(rows["lowprec.activation_grad"]) == 2


def test_more_tensors_than_a_table_holds() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(ROWS):
                x = x @ x.t()
            return x

    model = lp.wrap(Many(), SAMPLED)
    model(torch.eye(3))
    assert len(states(model)["lowprec.activation"]) == 2 * ROWS


def test_seeds_differ_from_tensor_to_tensor() -> None:
    model = lp.wrap(network(), RANDOM)
    step(model, batch(0, 5, 8))
    seeds = torch.cat([rows[:, 2] for rows in states(model).values()])
    drawn = seeds[seeds != 0]
    assert len(drawn.unique()) == len(drawn) == 2 + 2 + 4
    again = lp.wrap(network(), RANDOM)
    step(again, batch(0, 5, 8))
    assert same_states(model, again)


def test_importing_draws_nothing() -> None:
    script = "import torch; torch.manual_seed(0); import lowprec; print(torch.initial_seed(), torch.rand(()).item())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    assert done.stdout.split() == ["0", str(torch.rand(()).item())]


# Saving, copying, wrapping again.


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_states_are_saved_and_loaded(policy: lp.Policy) -> None:
    model = lp.wrap(network(), policy)
    for k in range(4):
        step(model, batch(k, 5, 8))
    saved = model.state_dict()
    keys = {f"lowprec.{path}.{role}" for path in ("0", "2") for role in ROLES}
    assert saved.keys() - network().state_dict().keys() == keys
    other = lp.wrap(network(), policy)
    assert str(other.load_state_dict(saved)) == "<All keys matched successfully>"
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    copies = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(memory, weights_only=False)]
    for k in range(4, 7):
        results = step(model, batch(k, 5, 8))
        assert all(same(results, step(each, batch(k, 5, 8))) for each in copies)


def test_a_checkpoint_may_lack_states_or_have_more() -> None:
    plain, model = network(), lp.wrap(network(), SAMPLED)
    assert not states(model)
    step(model, batch(0, 5, 8))
    before = states(model)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(before[key], rows) for key, rows in states(model).items())
    static = lp.wrap(network(), "fp8")
    static.load_state_dict(model.state_dict())
    assert not states(static)
    with pytest.raises(RuntimeError, match=r"lowprec\.0\.activation: expected int64 states of 8 numbers each"):
        lp.wrap(network(), RANDOM).load_state_dict(model.state_dict())


def test_states_inside_a_larger_module() -> None:
    model = nn.ModuleDict({"inner": lp.wrap(network(), SAMPLED)})
    step(model["inner"], batch(0, 5, 8))
    saved = model.state_dict()
    assert "inner.lowprec.0.activation" in saved
    other = nn.ModuleDict({"inner": lp.wrap(network(), SAMPLED)})
    other.load_state_dict(saved)
    assert same_states(model, other)


def test_unwrapping_drops_the_states() -> None:
    model, plain = network(), network()
    before = [dict(vars(module)) for module in model.modules()]
    lp.wrap(model, SAMPLED)
    step(model, batch(0, 5, 8))
    for copied in (copy.deepcopy(model), model):
        lp.unwrap(copied)
        assert copied.state_dict().keys() == plain.state_dict().keys()
        assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in copied.modules())
    assert [list(vars(module)) for module in model.modules()] == [list(names) for names in before]
    assert same(step(model, batch(1, 5, 8)), step(plain, batch(1, 5, 8)))


def test_wrapping_again_starts_anew() -> None:
    model = lp.wrap(network(), SAMPLED)
    first = step(model, batch(0, 5, 8))
    step(model, batch(5, 5, 8))
    assert same(step(lp.wrap(model, SAMPLED), batch(0, 5, 8)), first)
    assert len(model._state_dict_hooks) == 1


def test_static_casts_have_no_state() -> None:
    static = lp.Policy(lp.Cast("1-4-3", rounding="nearest_away"), lp.Cast("e5m2"))
    model = lp.wrap(nn.Linear(8, 3), static)
    x = batch(9, 4, 8)
    rounded = lp.quantize(x, "1-4-3", rounding="nearest_away"), lp.quantize(model.weight, "e5m2")
    assert torch.equal(model(x), F.linear(*rounded) + model.bias)
    assert not states(model)


# Recomputation, compiled code, other devices.


class Checkpointed(nn.Module):
    """A block in a checkpointed function, with functional products in it and around it, and a checkpoint inside."""

    def __init__(self, reentrant: bool | None, nested: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.reentrant, self.nested = reentrant, nested

    def inner(self, x: Tensor) -> Tensor:
        return self.second(x @ self.weight).sin()

    def outer(self, x: Tensor) -> Tensor:
        x = self.first(x.tanh() @ self.weight).sin()
        return (self._checkpoint(self.inner, x) if self.nested else self.inner(x)) @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._checkpoint(self.outer, x @ self.weight) @ self.weight

    def _checkpoint(self, function: Any, x: Tensor) -> Tensor:
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of reentrant within reentrant
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_sees_the_same_casts(policy: lp.Policy, reentrant: bool, nested: bool) -> None:
    plain, saving = (lp.wrap(Checkpointed(each, nested), policy) for each in (None, reentrant))
    for k in range(6):
        assert same(step(plain, batch(k, 4, 6).requires_grad_()), step(saving, batch(k, 4, 6).requires_grad_()))
        assert same_states(plain, saving)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_compiled_is_eager(policy: lp.Policy) -> None:
    plain = lp.wrap(network(), policy)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    for k in range(6):
        assert same(step(plain, batch(k, 5, 8)), step(compiled, batch(k, 5, 8)))
        assert same_states(plain, compiled._orig_mod)


def test_compiled_by_inductor() -> None:
    """Which sums in another order, so that the bits of a gradient may differ, and measures the same."""
    plain = lp.wrap(network(), SAMPLED)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True)
    for k in range(6):
        step(plain, batch(k, 5, 8))
        step(compiled, batch(k, 5, 8))
    assert same_states(plain, compiled._orig_mod)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_captured_training_step_keeps_measuring(policy: lp.Policy) -> None:
    plain = lp.wrap(network().cuda(), policy)
    x = batch(0, 5, 8).cuda()
    step(plain, x)
    captured = copy.deepcopy(plain)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(copy.deepcopy(plain), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(x)
        y.square().mean().backward()
    for k in range(12):
        x.copy_(batch(k, 5, 8))
        graph.replay()
        assert same([y, *(p.grad for p in captured.parameters())], step(plain, x))
        assert same_states(plain, captured)


def test_autocast_clamps_to_what_it_casts_to() -> None:
    model = lp.wrap(nn.Linear(4, 4, bias=False), lp.Policy(lp.Cast("1-5-2", bias="dynamic", pad=40)))
    x = torch.tensor([[1.0, 3.1, -0.7, 5.3]])
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    rounded = lp.quantize(x, "1-5-2:emax=15")
    assert torch.equal(y, F.linear(rounded.half(), model.weight.half()))


# What a report says, and what is refused.


def test_export_is_refused() -> None:
    model = lp.wrap(network(), SAMPLED)
    with pytest.raises(Exception, match="cannot be exported"):
        torch.export.export(model, (batch(0, 5, 8),))


def test_a_layer_that_rounds_by_hand_takes_formats_alone() -> None:
    from lowprec import sparse

    with pytest.raises(ValueError, match="rounds by hand"):
        sparse.LSTM(4, 4, policy="fp8-sampled")(torch.randn(2, 3, 4))


def test_the_report_says_where_the_biases_are() -> None:
    model = lp.wrap(network(), lp.Policy(lp.Cast("1-4-3", bias="dynamic", pad=1), "1-4-3", "1-5-2:emax=1"))
    model(torch.full((2, 8), 5.0))
    report = lp.report(model)
    (row,) = (row for row in report.rows if row.path == "0")
    assert row.emaxes == {"activation": (3,)}
    assert row.formats.activation == "1-4-3 | bias=dynamic, pad=1"
    text = str(report)
    assert "Formats [1]: a 1-4-3 | bias=dynamic, pad=1, w 1-4-3, da 1-5-2:bias=30, dw full precision" in text
    assert "Measured, exponents of the largest value now: 0 a 3; 2 a" in text
    assert "Measured" not in str(lp.report(lp.wrap(model, "fp8")))
