"""LowPrecision: to the bit the plain optimizer without formats; with them, the same for any sharding."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowprec as lp
from lowprec.optim import LowPrecision, place_of_shard
from lowprec.testing import assert_bits_equal
from tests import shards

Make = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD without momentum": partial(torch.optim.SGD, lr=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "Adam, one by one": partial(torch.optim.Adam, lr=0.01, foreach=False),
    "AdamW, foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
}
FP8 = {"weight": "1-4-3", "gradient": "1-5-2:emax=1"}


def model(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    net.register_parameter("scale", nn.Parameter(torch.tensor(0.7)))
    return net.to(device, dtype)


def loss_of(net: nn.Module, step: int) -> Tensor:
    some = next(net.parameters())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(some)
    return (net(x) * net.scale).square().mean()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(4)) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, step)
            loss.backward()
            return loss

        if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_bits_equal(actual.detach(), expected.detach(), what=name)


def holds(fmt: str, x: Tensor) -> bool:
    return torch.equal(lp.quantize(x.detach(), fmt), x.detach())


# Without formats.


@pytest.mark.parametrize("formats", [{}, {"weight": "fp32", "gradient": "fp32", "state": "fp32"}], ids=["None", "fp32"])
@pytest.mark.parametrize("master", ["fp32", "none"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_plain_optimizer(name: str, master: str, formats: dict[str, Any], device: torch.device) -> None:
    if name == "LBFGS" and (master == "none" or formats):
        return
    ours, theirs = model(device), model(device)
    wrapped, plain = OPTIMIZERS[name](ours.parameters()), OPTIMIZERS[name](theirs.parameters())
    optimizer = LowPrecision(wrapped, master=master, **formats)
    train(ours, optimizer)
    train(theirs, plain)
    assert_same(ours, theirs)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        for key, value in plain.state[other].items():
            if isinstance(value, Tensor):
                assert_bits_equal(optimizer.state[mine][key], value, what=key)


def test_closures_give_the_loss_and_equal_the_plain_optimizer() -> None:
    ours, theirs = model(), model()
    pairs = [(ours, LowPrecision(torch.optim.Adam(ours.parameters()))), (theirs, torch.optim.Adam(theirs.parameters()))]
    losses = []
    for net, optimizer in pairs:

        def closure(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, 0)
            loss.backward()
            return loss

        losses.append([float(optimizer.step(closure).detach()) for _ in range(3)])  # type: ignore[union-attr, arg-type]
    assert losses[0] == losses[1]
    assert_same(ours, theirs)


def test_infinities_stay_as_they_are() -> None:
    weight = nn.Parameter(torch.tensor([math.inf, -0.0, 1e-40]))
    LowPrecision(torch.optim.SGD([weight]), weight="fp32", master="none")
    assert_bits_equal(weight.detach(), torch.tensor([math.inf, -0.0, 1e-40]))


# With formats.


@pytest.mark.parametrize("master", ["fp32", "bf16", "none"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "LBFGS"])
def test_every_value_is_one_of_its_format(name: str, master: str, device: torch.device) -> None:
    net = model(device)
    inner = OPTIMIZERS[name](net.parameters())
    inner.param_groups[0]["centered"] = False  # the variance of rounded moments can be negative
    optimizer = LowPrecision(inner, **FP8, state="1-5-4", master=master)
    assert all(holds("1-4-3", parameter) for parameter in net.parameters())
    for step in range(3):
        train(net, optimizer, range(step, step + 1))
        for parameter in net.parameters():
            assert holds("1-4-3", parameter)
            assert parameter.grad is not None
            assert holds("1-5-2:emax=1", parameter.grad)
            for key, value in optimizer.state[parameter].items():
                if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                    assert holds("1-5-4", value), key
    masters = [
        state["lowprec.master"] for state in optimizer.state_dict()["state"].values() if "lowprec.master" in state
    ]
    assert len(masters) == (0 if master == "none" else 5)
    assert all(holds("bf16", value) for value in masters) == (master != "fp32")


def test_state_by_name_and_step_counters() -> None:
    weight = nn.Parameter(torch.randn(64))
    formats = {"exp_avg": "1-5-2", "exp_avg_sq": "bf16"}
    optimizer = LowPrecision(torch.optim.Adam([weight], amsgrad=True), state=formats)
    for _ in range(5):
        weight.grad = torch.randn(64)
        optimizer.step()
    state = optimizer.state[weight]
    assert holds("1-5-2", state["exp_avg"])
    assert holds("bf16", state["exp_avg_sq"])
    assert not holds("bf16", state["max_exp_avg_sq"])
    assert float(state["step"]) == 5


def test_scalar_parameters_keep_their_step_counter() -> None:
    scalar = nn.Parameter(torch.tensor(1.0))
    optimizer = LowPrecision(torch.optim.Adam([scalar]), state="1-2-1")
    for _ in range(9):
        scalar.grad = torch.tensor(0.3)
        optimizer.step()
    assert float(optimizer.state[scalar]["step"]) == 9


def test_factored_state_takes_formats_by_name() -> None:
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer = LowPrecision(torch.optim.Adafactor([weight]), state={"row_var": "bf16", "col_var": "1-5-2"})
    for _ in range(3):
        weight.grad = torch.randn(8, 6)
        optimizer.step()
    assert holds("bf16", optimizer.state[weight]["row_var"])
    assert holds("1-5-2", optimizer.state[weight]["col_var"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_fp32_masters(dtype: torch.dtype) -> None:
    """Each step equals the plain optimizer's on float32 weights, which the model sees rounded."""
    net, wide = model(dtype=dtype), model(dtype=dtype).float()
    ours, theirs = LowPrecision(torch.optim.Adam(net.parameters())), torch.optim.Adam(wide.parameters())
    for step in range(4):
        ours.zero_grad()
        loss_of(net, step).backward()
        for mine, other in zip(net.parameters(), wide.parameters(), strict=True):
            assert mine.grad is not None
            other.grad = mine.grad.float()
        ours.step()
        theirs.step()
        for mine, other in zip(net.parameters(), wide.parameters(), strict=True):
            assert_bits_equal(mine.detach(), other.detach().to(dtype))


def test_nearest_copies_of_a_master_are_what_quantize_gives() -> None:
    weight, wide = (nn.Parameter(torch.linspace(-3, 3, 50)) for _ in range(2))
    ours, theirs = LowPrecision(torch.optim.SGD([weight], lr=0.3), weight="1-4-3"), torch.optim.SGD([wide], lr=0.3)
    for _ in range(3):
        weight.grad, wide.grad = torch.full((50,), 0.01), torch.full((50,), 0.01)
        ours.step()
        theirs.step()
        assert_bits_equal(weight.detach(), lp.quantize(wide.detach(), "1-4-3"))


@pytest.mark.parametrize(("mode", "stalls"), [("stochastic", False), ("nearest_even", True)])
def test_stochastic_updates_are_unbiased_where_nearest_ones_stall(
    mode: str, stalls: bool, device: torch.device
) -> None:
    """Bfloat16 weights of 1 and updates of 1/16 ulp: each step moves one weight in 16 by an ulp."""
    count, steps, ulp = 1 << 16, 4, 2.0**-7
    weight = nn.Parameter(torch.ones(count, dtype=torch.bfloat16, device=device))
    optimizer = LowPrecision(torch.optim.SGD([weight], lr=1.0), master="none", rounding={"update": mode})
    for _ in range(steps):
        weight.grad = torch.full((count,), -ulp / 16, dtype=torch.bfloat16, device=device)
        optimizer.step()
    moved = float(((weight.detach().double() - 1) / ulp).sum())
    if stalls:
        assert moved == 0
    else:
        # A sum of count · steps draws of probability 1/16: within six standard deviations.
        expected = count * steps / 16
        assert abs(moved - expected) < 6 * math.sqrt(expected * 15 / 16)


def test_streams_of_words_differ() -> None:
    """By step, parameter, role and seed; they repeat with the seed."""

    def moved(seed: int) -> list[Tensor]:
        weights = [nn.Parameter(torch.ones(4096)) for _ in range(2)]
        how: dict[str, Any] = {"weight": "bf16", "master": "none", "seed": seed, "rounding": "stochastic"}
        optimizer = LowPrecision(torch.optim.SGD(weights, lr=1.0, momentum=0.5), **how, state="1-5-1")
        results = []
        for _ in range(2):
            for weight in weights:
                weight.data.fill_(1.0)
                optimizer.state.get(weight, {}).pop("momentum_buffer", None)
                weight.grad = torch.full((4096,), 2.0**-8 * 1.25)
            optimizer.step()
            results += [weight.detach().clone() for weight in weights]
        return [*results, optimizer.state[weights[0]]["momentum_buffer"]]

    one, other = moved(1), moved(2)
    for left, right in zip(one, moved(1), strict=True):
        assert_bits_equal(left, right)
    distinct = [*one, *other]
    for i, left in enumerate(distinct):
        assert all(not torch.equal(left != left[0], right != right[0]) for right in distinct[:i])


# As an optimizer.


@pytest.mark.parametrize("master", ["fp32", "bf16", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(master: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, LowPrecision]:
        net = model(dtype=dtype)
        how: dict[str, Any] = {"weight": "1-4-3", "state": "1-5-4", "master": master, "rounding": "stochastic"}
        return net, LowPrecision(torch.optim.AdamW(net.parameters(), lr=0.01), **how, seed=5)

    whole, optimizer = start()
    train(whole, optimizer, range(3))
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(whole, optimizer, range(3, 6))
    resumed, again = start()
    again._rounder.draws.load(99, torch.tensor(7))
    saved = torch.load(tmp_path / "saved.pt")
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, range(3, 6))
    assert_same(resumed, whole)
    assert saved["optimizer"]["param_groups"][0]["lowprec.seed"] == 5
    assert int(saved["optimizer"]["param_groups"][0]["lowprec.step"]) == 3


def test_it_goes_on_from_a_plain_state_dict() -> None:
    plain_net = model()
    plain = torch.optim.Adam(plain_net.parameters())
    train(plain_net, plain)
    net = model()
    optimizer = LowPrecision(torch.optim.Adam(net.parameters()))
    net.load_state_dict(plain_net.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch's own shares the tensors
    train(net, optimizer)
    train(plain_net, plain)
    assert_same(net, plain_net)


def test_it_goes_on_from_an_optimizer_that_has_stepped() -> None:
    net = model(dtype=torch.bfloat16)
    plain = torch.optim.Adam(net.parameters())
    train(net, plain)
    optimizer = LowPrecision(plain, **FP8, state={"exp_avg": "1-5-2"})
    weight = next(net.parameters())
    assert holds("1-5-2", optimizer.state[weight]["exp_avg"])
    assert float(optimizer.state[weight]["step"]) == 4
    train(net, optimizer)
    assert optimizer.state[weight]["exp_avg"].dtype is torch.float32
    assert float(optimizer.state[weight]["step"]) == 8


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alike(how: str) -> None:
    net = model()
    optimizer = LowPrecision(torch.optim.Adam(net.parameters()), **FP8, state="bf16")
    train(net, optimizer)
    pair = (net, optimizer)
    twin, twins_optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(net, optimizer)
    train(twin, twins_optimizer)
    assert_same(twin, net)
    assert not {id(parameter) for parameter in twin.parameters()} & {id(parameter) for parameter in net.parameters()}


def test_schedulers_drive_it() -> None:
    ours, theirs = model(), model()
    results = []
    for net, wrap in ((ours, LowPrecision), (theirs, lambda optimizer: optimizer)):
        optimizer = wrap(torch.optim.SGD(net.parameters(), lr=0.1))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6)
        for step in range(5):
            train(net, optimizer, range(step, step + 1))
            scheduler.step()
        results.append(scheduler.get_last_lr())
    assert results[0] == results[1]
    assert_same(ours, theirs)


def test_gradient_scaling_unscales_before_gradients_are_rounded() -> None:
    net, expected = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ours, theirs = (LowPrecision(torch.optim.SGD(n.parameters(), lr=0.1), **FP8) for n in (net, expected))
    scaler.scale(loss_of(net, 0)).backward()
    scaler.step(ours)
    scaler.update()
    train(expected, theirs, range(1))
    assert_same(net, expected)
    before = copy.deepcopy(net)
    next(net.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
    scaler.step(ours)
    assert_same(net, before)


def test_groups_are_shared_and_can_be_added() -> None:
    first, second = nn.Parameter(torch.full((3,), 1.03)), nn.Parameter(torch.full((3,), 1.03))
    inner = torch.optim.SGD([first], lr=0.5)
    optimizer = LowPrecision(inner, weight="1-4-3")
    optimizer.add_param_group({"params": [second], "lr": 0.25})
    assert optimizer.param_groups is inner.param_groups
    assert [group["params"][0] is each for group, each in zip(inner.param_groups, (first, second), strict=True)] == [
        True
    ] * 2
    assert second.tolist() == [1.0] * 3
    for parameter in (first, second):
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert (first.tolist(), second.tolist()) == ([lp.quantize(torch.tensor(0.53), "1-4-3").item()] * 3, [0.75] * 3)
    optimizer.zero_grad()
    assert first.grad is None
    assert [group["params"][0] is each for group, each in zip(inner.param_groups, (first, second), strict=True)] == [
        True
    ] * 2


def test_a_failed_step_leaves_the_models_parameters_in_the_groups() -> None:
    net = model()
    optimizer = LowPrecision(torch.optim.SGD(net.parameters()), **FP8)

    def fail() -> float:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fail)
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert list(map(id, listed)) == list(map(id, net.parameters()))


def test_hooks_run() -> None:
    net = model()
    optimizer = LowPrecision(torch.optim.SGD(net.parameters()), **FP8)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda self, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda self, saved: calls.append("load"))
    train(net, optimizer, range(1))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert calls == ["before", "after", "load"]
    assert saved["mine"] == 1


def test_parameters_without_gradients_stay() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((3,), 0.3))
    optimizer = LowPrecision(torch.optim.Adam([used, unused]), **FP8, state={"exp_avg": "bf16"}, rounding="stochastic")
    seen = unused.detach().clone()
    used.grad = torch.ones(3)
    optimizer.step()
    assert unused.grad is None
    assert unused not in optimizer.state
    assert set(seen.tolist()) <= {0.28125, 0.3125}


def test_its_repr_says_what_it_holds() -> None:
    text = repr(LowPrecision(torch.optim.SGD([nn.Parameter(torch.ones(1))]), **FP8, state="bf16"))
    assert all(
        part in text for part in ("SGD", "weight='1-4-3'", "gradient='1-5-2:bias=30'", "master='fp32'", "seed=0")
    )


# Shards.


@given(data=st.data())
def test_a_shard_draws_the_words_of_the_whole(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    dim, count = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 4))
    index = torch.arange(math.prod(shape)).reshape(shape)
    for rank, part in enumerate(torch.chunk(index, count, dim)):
        start, width, pitch = place_of_shard(shape, dim, count, rank)
        i = torch.arange(part.numel())
        assert torch.equal(start + i // width * pitch + i % width, part.reshape(-1))


def test_sharded_equals_unsharded(tmp_path: Path) -> None:
    """DTensors and FSDP2 in two processes, sharded evenly and unevenly in either dimension; then a resumed run."""
    torch.multiprocessing.spawn(shards.run, (2, tmp_path), nprocs=2)


# CUDA graphs.


@pytest.mark.gpu
def test_a_replayed_graph_draws_new_words() -> None:
    """Captured steps equal eager ones: counters and keys are on the device."""

    def start() -> tuple[nn.Parameter, LowPrecision]:
        weight = nn.Parameter(torch.ones(4096, device="cuda"))
        weight.grad = torch.full_like(weight, -(2.0**-11))
        adam = torch.optim.Adam([weight], lr=torch.tensor(2.0**-10, device="cuda"), capturable=True)
        return weight, LowPrecision(adam, weight="bf16", state="1-5-4", master="none")

    eager, plain = start()
    for _ in range(6):
        plain.step()
    weight, optimizer = start()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
    assert_bits_equal(weight.detach(), eager.detach())
    assert int(optimizer.state_dict()["param_groups"][0]["lowprec.step"]) == 6


@pytest.mark.gpu
def test_cuda_and_cpu_round_alike() -> None:
    """SGD in powers of two is exact, so only the rounding could differ."""
    results = []
    for device in ("cpu", "cuda"):
        weight = nn.Parameter(torch.linspace(-2, 2, 1001).to(device))
        optimizer = LowPrecision(torch.optim.SGD([weight], lr=0.25), weight="1-4-3", gradient="1-5-2", master="none")
        for step in range(4):
            weight.grad = torch.linspace(-1, 1, 1001).roll(step).to(device)
            optimizer.step()
        results.append(weight.detach().cpu())
    assert_bits_equal(results[1], results[0])


# Errors.


def one(dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=dtype))], momentum=0.9)


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        ({"weight": "1-4"}, ValueError, "1-4"),
        ({"state": "mxfp8_e4m3"}, ValueError, "state must be a format of single elements"),
        ({"master": "fp16"}, ValueError, "master must be one of fp32, bf16, none, got 'fp16'"),
        ({"rounding": "nearest"}, ValueError, "rounding must be one of"),
        (
            {"rounding": {"moments": "up"}},
            ValueError,
            "rounding must name roles out of gradient, state, update, weight",
        ),
        ({"saturate": 1}, TypeError, "saturate must be a bool or None"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"random_bits": 7}, ValueError, "random_bits must be 32, 16 or 8"),
        ({"state": {"step": "bf16"}}, ValueError, "step counters"),
        ({"state": {1: "bf16"}}, TypeError, "formats by name"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], error: type[Exception], parts: str) -> None:
    with pytest.raises(error, match=re.escape(parts)):
        LowPrecision(one(), **settings)


def test_wrong_optimizers() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer"):
        LowPrecision([nn.Parameter(torch.ones(1))])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LowPrecision already"):
        LowPrecision(LowPrecision(one()))
    with pytest.raises(TypeError, match="parameters must be one of"):
        LowPrecision(one(torch.complex64))
    lbfgs = torch.optim.LBFGS([nn.Parameter(torch.ones(1))])
    for settings in ({"state": "bf16"}, {"master": "none"}, {"master": "bf16"}):
        with pytest.raises(ValueError, match="LBFGS"):
            LowPrecision(lbfgs, **settings)  # type: ignore[arg-type]


def test_a_dtype_that_cannot_hold_its_format() -> None:
    for role in ("weight", "gradient"):
        with pytest.raises(ValueError, match="float16 cannot hold"):
            LowPrecision(one(torch.float16), **{role: "1-5-2:bias=30"})
    LowPrecision(one(torch.float16), state="1-5-2:bias=30")
    optimizer = LowPrecision(one(), weight="bf16")
    with pytest.raises(ValueError, match="float16 cannot hold"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float16))]})
    assert len(optimizer.param_groups) == 1


def test_unknown_state_is_named_once_there_is_any() -> None:
    inner = one()
    optimizer = LowPrecision(inner, state={"exp_avg": "bf16"})
    optimizer.step()
    inner.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="state names exp_avg; the optimizer has momentum_buffer"):
        optimizer.step()


def test_sparse_gradients_have_no_format() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = LowPrecision(torch.optim.SGD(embedding.parameters()), gradient="1-5-2")
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="must be dense"):
        optimizer.step()
    optimizer = LowPrecision(torch.optim.SparseAdam(list(embedding.parameters())), weight="1-4-3")
    optimizer.step()
    assert holds("1-4-3", embedding.weight)
