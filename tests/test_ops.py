"""The registered ops under all that torch does with ops: schemas, fake tensors, autograd, transforms, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

import lowprec as lp
from lowprec import reference
from lowprec.formats import NAMES
from lowprec.testing import assert_bits_equal
from tests.cases import CASES, Arguments, Case
from tests.graphs import captured

STOCHASTIC: dict[str, Any] = {"rounding": "stochastic", "seed": 3, "offset": 4}


def fresh(case: Case, device: torch.device) -> list[Arguments]:
    return case.arguments(device)


def tensors_of(result: Any) -> list[Tensor]:
    """What an op returned: nothing, a tensor or several."""
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def _look(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.stride(), x.device


# Registration.


def test_every_op_has_a_row() -> None:
    registered = {
        name.removeprefix("lowprec::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowprec::")
    }
    assert {case.name for case in CASES} == registered


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, device: torch.device) -> None:
    """Schema and aliasing, fake tensors, autograd registration, functionalization with static and dynamic shapes."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for arguments in fresh(case, device)[:7]:
        torch.library.opcheck(case.op, arguments, test_utils=checks if case.pure else checks[1:3])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_results_are_like_the_real_ones(case: Case, device: torch.device) -> None:
    for arguments in fresh(case, device):
        real = case.op(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
            fake = case.op(*fakes)
        assert [_look(each) for each in tensors_of(fake)] == [_look(each) for each in tensors_of(real)]


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "draw_seed"], ids=str)
def test_no_op_keeps_or_returns_its_inputs(case: Case, device: torch.device) -> None:
    """Calling an op twice gives equal, separate results and leaves inputs as they were."""
    for arguments, again in zip(fresh(case, device), fresh(case, device), strict=True):
        first, second = case.op(*arguments), case.op(*again)
        for one, other in zip(arguments, again, strict=True):
            if isinstance(one, Tensor):
                assert_bits_equal(one, other)
        for one, other in zip(tensors_of(first), tensors_of(second), strict=True):
            assert_bits_equal(one, other)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_data(kind: str) -> None:
    """They go through the public functions, with formats that are met for the first time."""
    bias = {"meta": 40, "fake": 43}[kind]
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        x = torch.empty(3, 4).t()
        codes = lp.encode(x, f"1-4-3:bias={bias}", **STOCHASTIC)
        assert (codes.shape, codes.stride(), codes.device) == (x.shape, x.stride(), x.device)
        assert lp.decode(codes, f"1-4-3:bias={bias + 1}").device == x.device
        values = lp.quantize(x, f"1-4-3:bias={bias + 2}", rounding="stochastic")
        assert lp.quantize(x, "1-4-3", out=values) is values


def test_a_default_device_changes_nothing(device: torch.device) -> None:
    """Seeds are drawn on the CPU, formats are checked nowhere, whatever the device of new tensors."""
    x = torch.randn(100)
    torch.manual_seed(5)
    expected = [lp.quantize(x, "1-4-3", rounding="stochastic"), lp.quantize(x, "1-4-3", **STOCHASTIC)]
    for other in ("meta", device):
        torch.manual_seed(5)
        with torch.device(other):
            found = [lp.quantize(x, "1-4-3", rounding="stochastic"), lp.quantize(x, "1-4-3", **STOCHASTIC)]
            lp.encode(x, f"1-5-2:bias={len(str(other)) + 9}")
        for one, two in zip(found, expected, strict=True):
            assert_bits_equal(one, two)


# Gradients.


def test_the_gradient_passes_straight_through(device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = torch.tensor([-1e4, -1.1, 0.0, 1e-4, 3.3, float("inf")], dtype=dtype, device=device, requires_grad=True)
        for how in ({}, STOCHASTIC, {"saturate": False}):
            upstream = torch.arange(6.0, device=device).to(dtype)
            (gradient,) = torch.autograd.grad(lp.quantize(x, "e4m3fn", **how), x, upstream)
            assert_bits_equal(gradient, upstream)


def test_second_derivatives(device: torch.device) -> None:
    x = torch.tensor([0.3, -1.7, 5.1], dtype=torch.float64, device=device, requires_grad=True)
    rounded = lp.quantize(x, "e4m3fn")
    (gradient,) = torch.autograd.grad((rounded**3).sum(), x, create_graph=True)
    assert_bits_equal(gradient, 3 * rounded**2)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert_bits_equal(second, 6 * rounded)


def test_no_graph_without_need(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    assert not lp.quantize(x, "e4m3fn").requires_grad
    assert not lp.encode(x.requires_grad_(), "e4m3fn").requires_grad
    with torch.no_grad():
        assert not lp.quantize(x, "e4m3fn").requires_grad


def test_forward_mode(device: torch.device) -> None:
    x, tangent = torch.randn(2, 5, device=device)
    value, derivative = torch.func.jvp(lambda v: lp.quantize(v, "e4m3fn"), (x,), (tangent,))
    assert_bits_equal(value, lp.quantize(x, "e4m3fn"))
    assert_bits_equal(derivative, tangent)
    with forward_ad.dual_level():
        dual = lp.quantize(forward_ad.make_dual(x, tangent), "e4m3fn", **STOCHASTIC)
        assert_bits_equal(forward_ad.unpack_dual(dual).tangent, tangent)
    assert_bits_equal(torch.func.jacfwd(lambda v: lp.quantize(v, "e4m3fn"))(x), torch.eye(5, device=device))
    assert_bits_equal(torch.func.jacrev(lambda v: lp.quantize(v, "e4m3fn"))(x), torch.eye(5, device=device))


def test_hessian_by_forward_over_reverse(device: torch.device) -> None:
    x = torch.tensor([0.3, -1.7], dtype=torch.float64, device=device)
    hessian = torch.func.hessian(lambda v: (lp.quantize(v, "e4m3fn") ** 3).sum())(x)
    assert torch.equal(hessian, torch.diag(6 * lp.quantize(x, "e4m3fn")))


def test_under_autocast(device: torch.device) -> None:
    x = torch.randn(5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert_bits_equal(lp.quantize(x, "e4m3fn"), lp.quantize(x.clone(), "e4m3fn"))
        assert lp.quantize(x, "e4m3fn").dtype is torch.float32


# torch.func.vmap.


@pytest.mark.parametrize("how", [{}, STOCHASTIC, STOCHASTIC | {"random_bits": 8}], ids=["nearest", "32", "8"])
def test_vmap_is_the_cast_of_the_batched_tensor(how: dict[str, Any], device: torch.device) -> None:
    """The random index is that of the batched tensor."""
    x = torch.randn(4, 3, 5, device=device)
    values, codes = lp.quantize(x, "e5m2", **how), lp.encode(x, "e5m2", **how)
    assert_bits_equal(torch.vmap(lambda v: lp.quantize(v, "e5m2", **how))(x), values)
    assert_bits_equal(torch.vmap(lambda v: lp.encode(v, "e5m2", **how))(x), codes)
    assert_bits_equal(torch.vmap(lambda v: lp.decode(v, "e5m2"))(codes), values)
    nested = torch.vmap(torch.vmap(lambda v: lp.quantize(v, "e5m2", **how)))
    assert_bits_equal(nested(x), values)
    moved = torch.vmap(lambda v: lp.quantize(v, "e5m2", **how), in_dims=2, out_dims=2)
    assert_bits_equal(moved(x), values)


def test_vmap_of_gradients(device: torch.device) -> None:
    x = torch.randn(4, 5, device=device)
    gradients = torch.vmap(torch.func.grad(lambda v: (lp.quantize(v, "e4m3fn") ** 2).sum()))(x)
    assert_bits_equal(gradients, 2 * lp.quantize(x, "e4m3fn"))


def test_vmap_over_seeds(device: torch.device) -> None:
    x, seeds = torch.randn(50, device=device), torch.tensor([1, 2, 3])
    rounded = torch.vmap(lambda seed: lp.quantize(x, "e5m2", rounding="stochastic", seed=seed))(seeds)
    expected = [lp.quantize(x, "e5m2", rounding="stochastic", seed=seed) for seed in (1, 2, 3)]
    assert_bits_equal(rounded, torch.stack(expected))
    pairs = torch.vmap(lambda v, offset: lp.quantize(v, "e5m2", rounding="stochastic", seed=1, offset=offset))
    together = pairs(x.expand(3, 50), seeds)
    singly = [lp.quantize(x, "e5m2", rounding="stochastic", seed=1, offset=offset) for offset in (1, 2, 3)]
    assert_bits_equal(together, torch.stack(singly))


# torch.compile.


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize(
    "how", [{}, STOCHASTIC, {"rounding": "up", "saturate": False}], ids=["nearest", "stochastic", "up"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_casts(how: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    x, fmt = torch.randn(6, 7, device=device).to(dtype).t(), lp.format("e4m3fn")

    def casts(x: Tensor) -> tuple[Tensor, ...]:
        codes = lp.encode(x, "e4m3fn", **how)
        return lp.quantize(x, fmt, **how), codes, lp.decode(codes, torch.float8_e4m3fn, dtype=dtype)

    for found, expected in zip(compiled(casts)(x), casts(x), strict=True):
        assert_bits_equal(found, expected)
        assert found.stride() == expected.stride()


def test_compiled_gradients(device: torch.device) -> None:
    def loss(x: Tensor) -> Tensor:
        return (lp.quantize(x, "e4m3fn") ** 2).sum()

    x = torch.randn(6, 7, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    (found,) = torch.autograd.grad(compiled(loss)(x), x)
    assert_bits_equal(found, expected)


def test_compiled_with_dynamic_shapes(device: torch.device) -> None:
    function = compiled(lambda x: lp.quantize(x * 2, "1-5-2:emax=1", **STOCHASTIC), dynamic=True)
    for count in (5, 6, 17):
        x = torch.randn(count, device=device)
        assert_bits_equal(function(x), lp.quantize(x * 2, "1-5-2:emax=1", **STOCHASTIC))


def test_compiled_with_a_seed_that_changes(device: torch.device) -> None:
    """A seed as a tensor is an input of the graph: no recompilation, another draw each time."""
    function = compiled(lambda x, seed, offset: lp.quantize(x, "e5m2", rounding="stochastic", seed=seed, offset=offset))
    x = torch.randn(100, device=device)
    for where in {"cpu", device.type}:
        for seed, offset in ((1, 2), (3, 4)):
            found = function(x, torch.tensor(seed, device=where), torch.tensor(offset, device=where))
            assert_bits_equal(found, lp.quantize(x, "e5m2", rounding="stochastic", seed=seed, offset=offset))


def test_compiled_formats_may_be_arguments(device: torch.device) -> None:
    x = torch.randn(50, device=device)
    function = compiled(lambda x, fmt: lp.quantize(x, fmt))
    for fmt in ("e4m3fn", "1-5-2:emax=1", lp.format("e5m2"), lp.format("1-4-3:bias=3"), torch.float8_e4m3fnuz):
        assert_bits_equal(function(x, fmt), lp.quantize(x, fmt))


def test_compiled_out(device: torch.device) -> None:
    def write(x: Tensor, values: Tensor, codes: Tensor) -> Tensor:
        lp.quantize(x, "e4m3fn", out=values)
        lp.encode(x, "e4m3fn", out=codes)
        return values + 1

    x = torch.randn(50, device=device)
    values, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    assert_bits_equal(compiled(write)(x, values, codes), lp.quantize(x, "e4m3fn") + 1)
    assert_bits_equal(values, lp.quantize(x, "e4m3fn"))
    assert_bits_equal(codes, lp.encode(x, "e4m3fn"))


def test_inductor_agrees_and_manual_seed_governs_its_draws(device: torch.device) -> None:
    """Through code generation once: a fused neighbourhood, the gradient, channels_last, and the default seed."""

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        rounded = lp.quantize(x.abs() * 3, "e4m3fn").flatten(0, 1).relu()
        drawn = lp.quantize(x, "e5m2", rounding="stochastic")
        return rounded, drawn

    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for function in (step, compiled(step, "inductor")):
        torch.manual_seed(11)
        rounded, drawn = function(x)
        (gradient,) = torch.autograd.grad(rounded.sum() + drawn.sum(), x)
        results.append((rounded.detach(), drawn.detach(), gradient))
    for expected, found in zip(*results, strict=True):
        assert_bits_equal(found, expected)
    assert all(
        found.stride() == expected.stride() for expected, found in zip(*(two[:2] for two in results), strict=True)
    )


def test_compiled_training_step_keeps_strides(device: torch.device) -> None:
    """A cast between a convolution and a view: the fake kernel's strides must be the real one's."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 6, 2)).to(device)

    def forward(x: Tensor) -> Tensor:
        hidden = lp.quantize(model[0](x), "e4m3fn")
        return model[2](hidden.permute(0, 2, 3, 1).contiguous().view(2, -1)).sum()

    x = torch.randn(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    compiled(forward)(x).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# CUDA graphs.


@pytest.mark.gpu
def test_a_replayed_graph_casts_new_inputs_and_draws_new_bits() -> None:
    x, seed, offset = torch.randn(1000, device="cuda"), torch.tensor(5, device="cuda"), torch.tensor(0, device="cuda")
    codes_out = torch.empty(1000, dtype=torch.uint8, device="cuda")

    def step() -> tuple[Tensor, ...]:
        drawn = lp.quantize(x, "e5m2", rounding="stochastic", seed=seed, offset=offset)
        codes = lp.encode(x, "e4m3fn")
        lp.encode(x, "e4m3fn", rounding="stochastic", seed=seed, offset=offset, random_bits=8, out=codes_out)
        offset.add_(1)
        return drawn, lp.quantize(x, "1-4-3", rounding="up"), codes, lp.decode(codes, "e4m3fn")

    graph, (drawn, up, codes, decoded) = captured(step)
    for replay in range(3):
        x.copy_(torch.randn(1000))
        before = offset.item()
        graph.replay()
        how = {"rounding": "stochastic", "seed": 5, "offset": before}
        assert_bits_equal(drawn, lp.quantize(x, "e5m2", **how), what=f"replay {replay}")
        assert_bits_equal(codes_out, lp.encode(x, "e4m3fn", **how, random_bits=8))
        assert_bits_equal(up, lp.quantize(x, "1-4-3", rounding="up"))
        assert_bits_equal(codes, lp.encode(x, "e4m3fn"))
        assert_bits_equal(decoded, lp.decode(codes, "e4m3fn"))
        assert offset.item() == before + 1


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"seed": 3}, {"seed": torch.tensor(3)}], ids=["none", "int", "cpu tensor"])
def test_a_frozen_seed_is_refused_under_capture(how: dict[str, Any]) -> None:
    x = torch.randn(100, device="cuda")
    lp.quantize(x, "e5m2", rounding="stochastic", seed=1)
    torch.cuda.synchronize()
    with (
        pytest.raises(ValueError, match="seed must be a tensor on the device"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        lp.quantize(x, "e5m2", rounding="stochastic", **how)


@pytest.mark.sanitize
@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.pure], ids=str)
def test_every_op_on_a_second_stream(case: Case) -> None:
    """Results and what ops write into are the same as on the first stream."""
    device = torch.device("cuda")
    expected = [(case.op(*arguments), arguments) for arguments in fresh(case, device)]
    stream = torch.cuda.Stream()
    given = fresh(case, device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [(case.op(*arguments), arguments) for arguments in given]
    torch.cuda.current_stream().wait_stream(stream)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(one, Tensor):
            assert_bits_equal(one, other)


def test_the_examples_of_the_contract(device: torch.device) -> None:
    """Seed 1, offset 2: the first four words, seen through the elements that they carry."""
    for i, word in enumerate((0xE73404CF, 0x8CEDC5D3, 0x3F071736, 0x0A0AFDDD)):
        assert reference.random_word(1, 2, i) == word
        for fraction, expected in ((2**32 - word, 1.25), (2**32 - word - 1, 1.0)):
            x = torch.ones(4, dtype=torch.float64, device=device)
            x[i] += 0.25 * fraction / 2**32
            assert lp.quantize(x, NAMES["e5m2"], rounding="stochastic", seed=1, offset=2)[i].item() == expected
