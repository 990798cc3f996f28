"""Learned sparsity: budgets, which blocks move, and that all that belongs to them moves along, to the bit."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowprec as lp
from lowprec import sparse
from lowprec.sparse.growth import energies

pytestmark = pytest.mark.usefixtures("one_thread")
Optimizer = torch.optim.Optimizer
DTYPE = torch.float64


def layout_of(rows: int = 5, columns: int = 6, density: float = 0.4, seed: int = 0) -> sparse.BlockLayout:
    return sparse.BlockLayout(torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density, 8)


def perceptron(features: str = "last", gate: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        sparse.Linear(layout_of(5, 6), features=features, gate=gate, dtype=DTYPE),  # type: ignore[arg-type]
        nn.Tanh(),
        sparse.Linear(layout_of(6, 4, 0.5, 1), bias=False, features=features, dtype=DTYPE),  # type: ignore[arg-type]
    )


def batch(step: int, features: str = "last") -> Tensor:
    x = torch.randn(11, 40, generator=torch.Generator().manual_seed(step), dtype=DTYPE)
    return x.T if features == "first" else x


def train(model: nn.Module, optimizer: Optimizer, step: int, features: str = "last") -> None:
    optimizer.zero_grad()
    x = batch(step, features).to(next(model.parameters()).device)
    model(x).square().mean().backward()
    optimizer.step()


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "low precision": lambda model: lp.optim.LowPrecision(
        torch.optim.Adam(model.parameters(), lr=0.01), weight="1-4-3", state="bf16"
    ),
    "16-bit masters": lambda model: lp.optim.LowPrecision(
        torch.optim.Adam(model.parameters(), lr=0.01), weight="1-4-3", master="bf16"
    ),
}


def belongings(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The weights, gradients, states and masters of the sparse layers, written out dense."""
    found = {}
    masters = optimizer.masters if isinstance(optimizer, lp.optim.LowPrecision) else {}
    for name, layer in model.named_modules():
        if isinstance(layer, sparse.Linear):
            weight = layer.weight
            states = {key: value for key, value in optimizer.state[weight].items() if value.shape == weight.shape}
            every = {"weight": weight, "grad": weight.grad, "master": masters.get(weight), **states}
            for kind, value in every.items():
                if value is not None:
                    found[f"{name}.{kind}"] = layer.layout.to_dense(value.detach()).clone()
    return found


def where(layout: sparse.BlockLayout) -> Tensor:
    """The elements of the dense matrix that are present."""
    return layout.to_dense(layout.zeros() + 1) > 0


# What moves.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("score", ["gradient", "random"])
def test_what_stays_keeps_all_that_it_has(name: str, score: str, device: torch.device) -> None:
    model = perceptron().to(device)
    optimizer = OPTIMIZERS[name](model)
    rewiring = sparse.Rewiring(model, optimizer, every=3, until=10, share=0.5, score=score)
    parameters, fresh = list(map(id, model.parameters())), 0
    for step in range(1, 7):
        train(model, optimizer, step)
        before = belongings(model, optimizer)
        moved = rewiring.step()
        assert [each.name for each in moved] == (["0", "2"] if step % 3 == 0 else [])
        after = belongings(model, optimizer)
        assert before.keys() == after.keys()
        for change in moved:
            stay, new = where(change.before) & where(change.after), where(change.after) & ~where(change.before)
            assert change.after.blocks == change.before.blocks
            fresh += int(new.sum())
            for kind in before:
                if kind.startswith(change.name):
                    assert torch.equal(after[kind][stay], before[kind][stay]), kind
                    assert not after[kind][new].any(), kind
        if not moved:
            assert all(torch.equal(after[kind], before[kind]) for kind in before)
    assert fresh >= 5 * 64
    assert list(map(id, model.parameters())) == parameters
    assert len(before) == 2 * {"adam": 4, "momentum": 3, "low precision": 5, "16-bit masters": 5}[name]


@pytest.mark.parametrize("features", ["last", "first"])
@pytest.mark.parametrize("reduce", ["exact", "l2", "max"])
def test_the_weakest_go_where_the_gradient_is_largest(features: str, reduce: str) -> None:
    model = perceptron(features)
    optimizer = OPTIMIZERS["adam"](model)
    rewiring = sparse.Rewiring(model, optimizer, every=1, until=100, share=0.4, reduce=reduce)
    seen: dict[str, list[Tensor]] = {"0": [], "2": []}
    for name, pair in seen.items():

        def remember(module: nn.Module, args: tuple[Tensor], y: Tensor, pair: list[Tensor] = pair) -> None:
            pair.append(args[0].detach())
            y.register_hook(pair.append)  # type: ignore[no-untyped-call]

        model.get_submodule(name).register_forward_hook(remember)
    train(model, optimizer, 1, features)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in seen}
    for change in rewiring.step():
        n, moving = change.before.blocks, round(rewiring.fraction(1) * change.before.blocks)
        strength = energies(weights[change.name]).tolist()
        kept = sorted(sorted(range(n), key=lambda block: (-strength[block], block))[: n - moving])
        stay = torch.zeros_like(change.before.mask)
        i, j = change.before.coordinates[kept].unbind(1)
        stay[i, j] = True
        fewer = sparse.BlockLayout(stay, 8)
        scores = sparse.absent_scores(
            [(seen[change.name][0], seen[change.name][1])], fewer, features=features, reduce=reduce
        )
        assert change.after == sparse.grow(fewer.zeros(), fewer, scores, moving)[1]


def test_a_block_that_comes_straight_back_is_as_it_was() -> None:
    """A full layer has nowhere to go."""
    model = nn.Sequential(sparse.Linear(sparse.BlockLayout(torch.ones(5, 3, dtype=torch.bool), 8), dtype=DTYPE))
    optimizer = OPTIMIZERS["adam"](model)
    rewiring = sparse.Rewiring(model, optimizer, every=1, until=5, share=1.0)
    train(model, optimizer, 0)
    before = belongings(model, optimizer)
    [change] = rewiring.step()
    assert change.before == change.after
    after = belongings(model, optimizer)
    assert all(torch.equal(after[kind], before[kind]) for kind in before)


def test_all_calls_of_a_step_count() -> None:
    """Accumulated gradients, and a layer that is called twice, are as one batch."""
    whole, parts = perceptron(), perceptron()
    results = []
    for model, sizes in ((whole, [11]), (parts, [4, 7])):
        optimizer = OPTIMIZERS["momentum"](model)
        rewiring = sparse.Rewiring(model, optimizer, every=1, until=5)
        for x in batch(3).split(sizes):
            model(x).square().sum().backward()
        optimizer.step()
        results.append([change.after for change in rewiring.step()])
    assert results[0] == results[1]


def test_gates_move_with_their_blocks() -> None:
    model = perceptron(gate=True)
    layer = model[0]
    optimizer = OPTIMIZERS["adam"](model)
    rewiring = sparse.Rewiring(model, optimizer, every=2, until=10, share=0.5)
    for step in (1, 2):
        train(model, optimizer, step)
        before = layer.gate.detach().clone(), optimizer.state[layer.gate]["exp_avg"].clone()
        moved = rewiring.step()
    change = moved[0]
    fresh = ~change.before.mask[change.after.mask]
    assert torch.equal(layer.gate.detach(), sparse.carry(before[0], change.before, change.after, fill=1.0))
    assert (layer.gate[fresh] == 1).all()
    assert torch.equal(optimizer.state[layer.gate]["exp_avg"], sparse.carry(before[1], change.before, change.after))


def test_layers_that_share_a_weight_share_what_they_learn() -> None:
    one, two = (sparse.Linear(layout_of(5, 5), bias=False, dtype=DTYPE) for _ in range(2))
    two.weight = one.weight
    model = nn.Sequential(one, two)
    optimizer = OPTIMIZERS["adam"](model)
    rewiring = sparse.Rewiring(model, optimizer, every=1, until=9)
    train(model, optimizer, 1)
    [change] = rewiring.step()
    assert one.layout == two.layout == change.after
    two.set_layout(change.before)
    with pytest.raises(ValueError, match="0 and 1 share a weight: they must have one layout"):
        sparse.Rewiring(model, optimizer, until=9)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("features", ["last", "first"])
def test_convolutions_are_scored_by_what_their_product_reads(kernel: int, features: Any) -> None:
    torch.manual_seed(0)
    layer = sparse.Conv2d(layout_of(3, 4), kernel, stride=2, padding=kernel // 2, features=features)
    dense = layer.to_dense()
    x = torch.randn(2, 24, 5, 5)
    rewiring = sparse.Rewiring(layer, every=1, until=9, share=1.0)
    y = layer(x.movedim(1, -1) if features == "last" else x.transpose(0, 1))
    y.square().sum().backward()
    y = y.movedim(-1, 1) if features == "last" else y.transpose(0, 1)
    torch.testing.assert_close(y, dense(x))
    [change] = rewiring.step()
    spatial = x if layer.spatial is None else nn.functional.conv2d(x, layer.spatial, None, 2, 1, groups=24)
    inner = spatial[:, :, ::2, ::2] if layer.spatial is None else spatial
    gradient = torch.einsum("nihw,nohw->io", inner, 2 * y).detach()
    scores = gradient.view(3, 8, 4, 8).square().sum((1, 3))
    strongest = scores.flatten().sort(descending=True).indices[: round(rewiring.fraction(1) * change.before.blocks)]
    assert change.after.mask.flatten()[strongest].all()


# When.


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 40), st.floats(0.01, 1))
def test_the_share_falls_as_a_cosine(every: int, until: int, share: float) -> None:
    rewiring = sparse.Rewiring(sparse.Linear(layout_of()), every=every, until=until, share=share, score="random")
    assert rewiring.fraction(0) == pytest.approx(share)
    assert rewiring.fraction(until) == pytest.approx(0, abs=1e-12)
    assert rewiring.fraction(until + 1) == rewiring.fraction(until)
    assert rewiring.fraction(until / 2) == pytest.approx(share / 2)  # type: ignore[arg-type]
    due = [step for step in range(1, 2 * until) if rewiring.step()]
    assert due == [step for step in range(1, until) if step % every == 0]


def test_it_listens_only_when_a_step_is_due() -> None:
    model = perceptron()
    optimizer = OPTIMIZERS["adam"](model)
    rewiring = sparse.Rewiring(model, optimizer, every=4, until=9)
    hooks = []
    for step in range(1, 11):
        hooks.append(len(model[0]._forward_hooks))
        train(model, optimizer, step)
        rewiring.step()
    assert hooks == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert not any(site.pairs for site in rewiring._sites)


def test_it_waits_for_a_finite_gradient() -> None:
    model = perceptron()
    optimizer = OPTIMIZERS["momentum"](model)
    rewiring = sparse.Rewiring(model, optimizer, every=2, until=9)
    train(model, optimizer, 1)
    assert not rewiring.step()
    (model(batch(2)).sum() * math.inf).backward()  # as with a loss scale that is too large
    assert not rewiring.step()
    optimizer.zero_grad()
    train(model, optimizer, 3)
    assert [change.name for change in rewiring.step()] == ["0", "2"]
    train(model, optimizer, 4)
    assert len(rewiring.step()) == 2
    train(model, optimizer, 5)
    assert not rewiring.step()


def test_a_gradient_that_never_came_is_an_error() -> None:
    model = perceptron()
    rewiring = sparse.Rewiring(model, every=1, until=9)
    with pytest.raises(RuntimeError, match="0 is due to be rewired, but no gradient came by"):
        rewiring.step()


def test_random_blocks_depend_on_seed_layer_and_step() -> None:
    def after(seed: int) -> list[sparse.BlockLayout]:
        model = nn.Sequential(sparse.Linear(layout_of(6, 6)), sparse.Linear(layout_of(6, 6)))
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        rewiring = sparse.Rewiring(model, every=1, until=99, score="random", seed=seed)
        return [change.after for _ in range(2) for change in rewiring.step()]

    one, same, other = after(1), after(1), after(2)
    assert one == same
    assert one != other
    assert one[0] != one[1]


def test_it_resumes_where_it_stopped() -> None:
    """Model, optimizer and scheduler through a file in the middle: the same bits as without."""

    def parts() -> tuple[nn.Module, Optimizer, sparse.Rewiring]:
        model = perceptron()
        optimizer = OPTIMIZERS["adam"](model)
        return model, optimizer, sparse.Rewiring(model, optimizer, every=3, until=20)

    straight, stopped, resumed = parts(), parts(), parts()
    for step in range(1, 12):
        train(*straight[:2], step)
        straight[2].step()
    for step in range(1, 6):
        train(*stopped[:2], step)
        stopped[2].step()
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)  # the next step is due: its hooks are in place
    file.seek(0)
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    for step in range(6, 12):
        train(*resumed[:2], step)
        resumed[2].step()
    assert resumed[2].state_dict() == straight[2].state_dict() == {"steps": 11, "waiting": []}
    for left, right in zip(straight[0].state_dict().values(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(left, right)


# What it is for.


def test_learned_blocks_fit_better_than_fixed_ones() -> None:
    """Where the target is sparse in other blocks than those at the start, rewiring finds them."""
    torch.manual_seed(0)
    truth = layout_of(8, 8, 0.15, 1)
    teacher = sparse.Linear(truth, bias=False, dtype=DTYPE).requires_grad_(False)
    start = sparse.BlockLayout(torch.zeros(64).index_fill(0, torch.randperm(64)[: truth.blocks], 1).view(8, 8) > 0, 8)
    losses, found = {}, {}
    for score in ("fixed", "gradient"):
        torch.manual_seed(1)
        layer = sparse.Linear(start, bias=False, dtype=DTYPE)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        rewiring = sparse.Rewiring(layer, optimizer, every=10, until=200, share=0.5)
        for _ in range(300):
            x = torch.randn(64, 64, dtype=DTYPE)
            loss = (layer(x) - teacher(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if score == "gradient":
                rewiring.step()
        losses[score], found[score] = float(loss.detach()), int((layer.layout.mask & truth.mask).sum())
    assert found["gradient"] >= truth.blocks - 1
    assert losses["gradient"] < 0.01 * losses["fixed"]


@pytest.mark.parametrize("recipe", ["fp8", "bf16"])
def test_under_a_policy(recipe: str) -> None:
    model = lp.wrap(perceptron(), lp.Policy.recipe(recipe))
    optimizer = OPTIMIZERS["adam"](model)
    rewiring = sparse.Rewiring(model, optimizer, every=1, until=9)
    for step in range(1, 4):
        train(model, optimizer, step)
        assert len(rewiring.step()) == 2


def test_compiled_layers_follow() -> None:
    layer = sparse.Linear(layout_of())
    run = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, 40)
    torch.testing.assert_close(run(x), layer(x))
    sparse.Rewiring(layer, every=1, until=9, share=1.0, score="random").step()
    torch.testing.assert_close(run(x), layer.to_dense()(x))


def test_compiled_models_run_eagerly_when_a_step_is_due() -> None:
    compiled, plain = perceptron(), perceptron()
    run = torch.compile(compiled, backend="eager")
    layouts = []
    for model, call in ((compiled, run), (plain, plain)):
        rewiring = sparse.Rewiring(model, every=3, until=9, share=0.5)
        dues = []
        for step in range(6):
            dues.append(rewiring.due)
            with torch.compiler.set_stance("force_eager" if rewiring.due else "default"):
                call(batch(step)).square().mean().backward()
            layouts.append([change.after for change in rewiring.step()])
        assert dues == [False, False, True] * 2
    assert layouts[:6] == layouts[6:]
    assert torch.equal(run(batch(9)), compiled(batch(9)))


def test_copies_of_a_model_are_on_their_own() -> None:
    model = perceptron()
    rewiring = sparse.Rewiring(model, every=1, until=9, score="random", share=1.0)
    before = copy.deepcopy(model)
    [change, _] = rewiring.step()
    assert before[0].layout == change.before
    assert model[0].layout == change.after != change.before


# Wrong arguments.


def test_wrong_arguments() -> None:
    layer = sparse.Linear(layout_of())
    for name, value, error, message in [
        ("until", 0, ValueError, "until must be at least 1, got 0"),
        ("every", 0, ValueError, "every must be at least 1, got 0"),
        ("every", 2.5, TypeError, "every must be an int, got 2.5"),
        ("share", 0, ValueError, "share must be above 0, got 0"),
        ("share", 1.5, ValueError, "share must be from 0 to 1, got 1.5"),
        ("score", "weight", ValueError, "score must be one of gradient, random, got 'weight'"),
        ("reduce", "mean", ValueError, "reduce must be one of l2, max, exact, got 'mean'"),
        ("seed", -1, ValueError, "seed must be at least 0, got -1"),
        ("optimizer", layer, TypeError, "optimizer must be a torch.optim.Optimizer or None, got Linear"),
    ]:
        with pytest.raises(error, match=message):
            sparse.Rewiring(layer, **{"until": 9, name: value})
    with pytest.raises(ValueError, match="model must have sparse layers whose weight needs a gradient, got none"):
        sparse.Rewiring(nn.Linear(3, 3), until=9)
    with pytest.raises(ValueError, match="got none"):
        sparse.Rewiring(layer.requires_grad_(False), until=9)
    with pytest.raises(TypeError, match="model must be a module or sparse layers, got Linear for layer 0"):
        sparse.Rewiring([nn.Linear(3, 3)], until=9)  # type: ignore[list-item]
    normed = sparse.weight_norm(sparse.Linear(layout_of()))
    with pytest.raises(ValueError, match="named has a parametrized weight"):
        sparse.Rewiring({"named": normed}, until=9)
