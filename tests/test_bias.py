"""Casts that manage their own bias: the schedule, what each kind makes of a sequence, state, and where it works."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowprec as lp
from lowprec import _ops
from lowprec.adapt import NOTHING, _is_due, adapt, exponent_of, is_due, new_state
from lowprec.bias import Rule
from tests.engines import DTYPES
from tests.graphs import captured

SCHEDULE = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
MEASURED = ("dynamic", "delayed", "sampled")


def spike(exponent: int) -> Tensor:
    """A tensor whose largest magnitude lies in the binade of 2^exponent."""
    return torch.tensor([0.0, -1.75, 1.0, 0.3]) * 2.0**exponent


def patterns(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits in every other element, numbers like those of a network in the rest."""
    generator = torch.Generator().manual_seed(seed)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    bits = torch.randint(
        torch.iinfo(integer).min, torch.iinfo(integer).max, (size,), generator=generator, dtype=integer
    )
    calm = torch.randn(size, generator=generator).to(dtype)
    return torch.where(torch.arange(size) % (seed + 1) == 1, bits.view(dtype), calm)


def emaxes(cast: lp.Cast, exponents: list[int]) -> list[int]:
    """The exponent of the largest value at each call on spikes."""
    seen = []
    for exponent in exponents:
        cast(spike(exponent))
        seen.append(cast.emax)
    return seen


# The schedule.


def test_the_schedule_is_that_of_2017() -> None:
    assert [call for call in range(1, 257) if is_due(call, 1024)] == SCHEDULE


def test_from_16_on_four_calls_to_a_power_of_two_until_the_interval_is_the_frequency() -> None:
    for exponent in range(4, 12):
        due = [call for call in range(2**exponent, 2 ** (exponent + 1)) if is_due(call, 1024)]
        assert due == [2**exponent + k * 2 ** (exponent - 2) for k in range(4)]
    assert [call for call in range(4096, 9000) if is_due(call, 1024)] == [4096, 5120, 6144, 7168, 8192]


@pytest.mark.parametrize("frequency", [1, 2, 3, 100])
def test_a_low_frequency_measures_at_its_own_multiples(frequency: int) -> None:
    assert [call for call in range(1000, 2000) if is_due(call, frequency)] == [
        call for call in range(1000, 2000) if call % frequency == 0
    ]


@given(st.integers(1, 2**52), st.integers(1, 2**40))
def test_the_device_keeps_the_same_schedule(call: int, frequency: int) -> None:
    assert bool(_is_due(torch.tensor(call), frequency)) == is_due(call, frequency)
    assert bool(_is_due(torch.tensor(call // frequency * frequency or 1), frequency)) == is_due(
        call // frequency * frequency or 1, frequency
    )


# What a measurement is.


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exponent_is_that_of_the_largest_finite_magnitude(device: torch.device, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = math.frexp(float(info.smallest_normal) * info.eps)[1] - 1
    cases = [
        ([info.max, 1.0], math.frexp(info.max)[1] - 1),
        ([1.0, -info.max, math.inf, math.nan], math.frexp(info.max)[1] - 1),
        ([math.inf, 0.5, -math.inf], -1),
        ([2.0, 1.99], 1),
        ([1.984375], 0),
        ([0.0, float(info.smallest_normal) * info.eps], tiny),
        ([0.0, -0.0], NOTHING),
        ([math.nan, math.inf, 0.0], NOTHING),
    ]
    for values, exponent in cases:
        x = torch.tensor(values, dtype=torch.float64).to(dtype).to(device)
        assert exponent_of(x).item() == exponent, values


def test_with_stdv_it_is_that_of_mean_and_deviation(device: torch.device) -> None:
    x = torch.tensor([1.0, -3.0, 5.0, 7.0, math.nan, math.inf], device=device)  # mean 4, deviation sqrt(5)
    for stdv, exponent in ((0.0, 2), (1.75, 2), (1.8, 3), (5.3, 3), (5.4, 4)):
        assert exponent_of(x, stdv).item() == exponent
        assert exponent_of(x.double() * 2.0**-600, stdv).item() == 2 - 600  # nothing that a sum could count: max |x|
    assert exponent_of(x.double() * 2.0**800, 1.0).item() == 802
    assert exponent_of(torch.zeros(3, device=device), 2.0).item() == NOTHING
    cast = lp.Cast("1-4-3", bias="dynamic", pad=0, stdv=5.4).to(device)
    cast(x)
    assert cast.emax == 4


@pytest.mark.parametrize("bias", MEASURED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_rounds_with_the_bias_that_it_measured(device: torch.device, bias: str, dtype: torch.dtype) -> None:
    cast = lp.Cast("1-4-3", bias=bias, pad=1).to(device)
    x = (3 * torch.randn(7, 5)).to(dtype).to(device)
    top = math.frexp(float(x.abs().max()))[1] - 1
    assert torch.equal(cast(x), lp.quantize(x, f"1-4-3:emax={top + 1}"))
    assert (cast.emax, cast.calls) == (top + 1, 1)


@pytest.mark.parametrize("bias", MEASURED)
def test_an_empty_or_a_zero_tensor_changes_nothing(device: torch.device, bias: str) -> None:
    cast = lp.Cast("1-4-3", bias=bias).to(device)
    cast(torch.zeros(3, device=device))
    assert (cast.emax, cast.calls) == (cast.rule.fmt.emax, 1)
    cast(torch.full((3,), 4.0, device=device))
    for nothing in (torch.zeros(3), torch.empty(0), torch.tensor(math.inf), torch.full((2,), math.nan)):
        same = cast(nothing.to(device))
        assert same.shape == nothing.shape
        assert cast.emax == 4
    assert cast.calls == 6


def test_a_bias_is_clamped_to_what_the_dtype_holds(device: torch.device) -> None:
    cast = lp.Cast("1-5-2", bias="dynamic", pad=100).to(device)
    x = torch.tensor([1.0, 60000.0, 1e-4], device=device).half()
    assert torch.equal(cast(x), lp.quantize(x, "1-5-2:emax=15"))
    cast = lp.Cast("1-5-2", bias="dynamic", pad=-100).to(device)
    assert torch.equal(cast(x), lp.quantize(x, "1-5-2:bias=23"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stdv", [None, 0.0, 3.0])
def test_kernels_measure_as_the_eager_twin(device: torch.device, dtype: torch.dtype, stdv: float | None) -> None:
    """Sizes around a page and a row; numbers over the dtype's whole range; strides; NaN and infinities in between."""
    for size in (1, 31, 1023, 1025, 16383, 16385, 70001):
        for seed in range(3):
            numbers = patterns(size, dtype, seed)
            for x in (numbers, numbers[1:], numbers[::3], torch.zeros_like(numbers), numbers * 0.001):
                x = x.to(device)
                state, other = (new_state([3], 2)[0].to(device) for _ in range(2))
                rule = (2, 7, 1, stdv, 1024, 2)
                for _ in range(2):
                    assert torch.equal(_ops.adapt(x, state, *rule), adapt(x, other, *rule))
                assert torch.equal(state, other)


# Sequences.


def test_a_sampled_bias_follows_a_recorded_sequence() -> None:
    """Tensors whose largest magnitude doubles at every call: the bias is that of the last call that measured."""
    expected = [3, 4, 5, 6, 7, 8, 8, 10, 10, 12, 12, 14, 14, 14, 14, 18, 18, 18, 18, 22, 22, 22, 22, 26, 26, 26, 26, 30]
    expected += [30, 30, 30, 34, 34, 34, 34, 34, 34, 34, 34, 42]
    assert emaxes(lp.Cast("1-4-3", bias="sampled"), list(range(1, 41))) == expected


def test_a_sampled_bias_measures_before_that_tensor_is_rounded() -> None:
    cast = lp.Cast("1-4-3", bias="sampled", pad=0)
    for exponent, held in zip([0, 9, -9, 30, -30, 1, 5, 2, 7], [0, 9, -9, 30, -30, 1, 1, 2, 2], strict=True):
        x = spike(exponent)
        assert torch.equal(cast(x), lp.quantize(x, f"1-4-3:emax={held}"))


def test_a_delayed_bias_is_that_of_the_calls_before() -> None:
    cast = lp.Cast("1-4-3", bias="delayed", history=3, pad=0)
    assert emaxes(cast, [5, 1, 9, 2, 2, 2, 2, 0]) == [5, 5, 5, 9, 9, 9, 2, 2]


def test_a_dynamic_bias_is_that_of_each_tensor() -> None:
    assert emaxes(lp.Cast("1-4-3", bias="dynamic", pad=-1), [5, 1, 9, 2]) == [4, 0, 8, 1]


def test_delayed_and_dynamic_are_equal_on_constant_data(device: torch.device) -> None:
    x = torch.randn(64, device=device)
    delayed, dynamic = (lp.Cast("1-4-3", bias=bias).to(device) for bias in ("delayed", "dynamic"))
    for _ in range(20):
        assert torch.equal(delayed(x), dynamic(x))
    assert delayed.emax == dynamic.emax


# State.


@pytest.mark.parametrize("bias", MEASURED)
def test_state_is_in_the_state_dict(bias: str) -> None:
    cast = lp.Cast("1-4-3", bias=bias, rounding="stochastic", history=2)
    tensors = [torch.randn(9) * 2**k for k in range(7)]
    for x in tensors[:3]:
        cast(x)
    other = lp.Cast("1-4-3", bias=bias, rounding="stochastic", history=2)
    other.load_state_dict(cast.state_dict())
    memory = io.BytesIO()
    torch.save(cast, memory)
    memory.seek(0)
    copies = [other, copy.deepcopy(cast), pickle.loads(pickle.dumps(cast)), torch.load(memory, weights_only=False)]
    for x in tensors[3:]:
        y = cast(x)
        assert all(torch.equal(y, each(x)) for each in copies)


def test_a_static_cast_is_quantize_and_has_no_state() -> None:
    x = torch.randn(20) * 1e3
    assert not lp.Cast("bf16").state_dict()
    for how in ({}, {"rounding": "up"}, {"saturate": False}):
        assert torch.equal(lp.Cast("e5m2", **how)(x), lp.quantize(x, "e5m2", **how))


def test_draws_advance_with_the_calls(device: torch.device) -> None:
    x = torch.randn(50, device=device)
    cast = lp.Cast("1-4-3", rounding="stochastic", seed=5, random_bits=16).to(device)
    for call in range(3):
        expected = lp.quantize(x, "1-4-3", rounding="stochastic", seed=5, offset=call, random_bits=16)
        assert torch.equal(cast(x), expected)


def test_without_a_seed_torchs_default_generator_draws_one() -> None:
    torch.manual_seed(3)
    one = lp.Cast("1-4-3", rounding="stochastic")
    other = lp.Cast("1-4-3", rounding="stochastic")
    torch.manual_seed(3)
    again = lp.Cast("1-4-3", rounding="stochastic")
    assert torch.equal(one.state, again.state)
    assert not torch.equal(one.state, other.state)


# Where it works.


@pytest.mark.parametrize("bias", ["static", *MEASURED])
def test_gradients_pass_straight_through(device: torch.device, bias: str) -> None:
    cast = lp.Cast("1-4-3", bias=bias).to(device)
    x = torch.randn(5, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(cast(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize("bias", MEASURED)
def test_compiled_is_eager(bias: str) -> None:
    plain = lp.Cast("1-4-3", bias=bias, rounding="stochastic", seed=1, history=2)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True)
    for k in range(8):
        x, y = (torch.randn(33, generator=torch.Generator().manual_seed(k)).requires_grad_() for _ in range(2))
        with torch.no_grad():
            x *= 2**k
            y *= 2**k
        assert torch.equal(plain(x), compiled(y))
        compiled(y).sum().backward()
        plain(x)
    assert torch.equal(plain.state, compiled.state)


def test_vmap_measures_the_whole_batch() -> None:
    cast = lp.Cast("1-4-3", bias="dynamic")
    x = torch.tensor([[1.0, 2.0], [64.0, 3.0]])
    assert torch.equal(torch.vmap(cast)(x), lp.Cast("1-4-3", bias="dynamic")(x))
    assert (cast.emax, cast.calls) == (8, 1)


class Twice(nn.Module):
    """Two casts around a product, in a checkpointed function, also one within the other."""

    def __init__(self, nested: bool, reentrant: bool | None) -> None:
        super().__init__()
        self.nested, self.reentrant = nested, reentrant
        self.first = lp.Cast("1-4-3", bias="sampled", rounding="stochastic", seed=1)
        self.second = lp.Cast("1-2-1", bias="delayed", history=2)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))

    def inner(self, x: Tensor) -> Tensor:
        return self.second(x @ self.first(self.weight)).sin()

    def outer(self, x: Tensor) -> Tensor:
        x = self.first(x * 3).exp()
        return self._checkpoint(self.inner, x).square() if self.nested else self.inner(x).square()

    def forward(self, x: Tensor) -> Tensor:
        return self._checkpoint(self.outer, self.first(x)) + self.second(x)

    def _checkpoint(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of reentrant within reentrant
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_sees_the_bias_and_the_draws_of_the_first_pass(nested: bool, reentrant: bool) -> None:
    plain, saving = Twice(nested, None), Twice(nested, reentrant)
    for k in range(5):
        results = []
        for model in (plain, saving):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(k)).mul(2**k).requires_grad_()
            y = model(x)
            y.sum().backward()
            results.append([y, x.grad, model.weight.grad, *model.state_dict().values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", MEASURED)
def test_a_replayed_graph_keeps_measuring(bias: str) -> None:
    plain = lp.Cast("1-4-3", bias=bias, rounding="stochastic", seed=1, history=3).cuda()
    other = copy.deepcopy(plain)
    x = torch.randn(300, device="cuda")
    graph, y = captured(lambda: other(x))
    other.state.copy_(plain.state)
    for k in range(30):
        x.copy_(torch.randn(300, device="cuda") * 2 ** (k % 11))
        graph.replay()
        assert torch.equal(y, plain(x))
        assert torch.equal(other.state, plain.state)


# Rules and errors.


@pytest.mark.parametrize(
    "cast",
    [
        lp.Cast("1-4-3"),
        lp.Cast("bf16"),
        lp.Cast("e5m2", saturate=False, rounding="stochastic", seed=-3, random_bits=8),
        lp.Cast("1-5-2:emax=1,subnormals=off", bias="delayed", history=4, pad=0, stdv=2.5),
        lp.Cast("1-4-3", bias="sampled", frequency=64, dim=0),
    ],
)
def test_rules_parse_back_and_representations_evaluate(cast: lp.Cast) -> None:
    assert Rule.parse(str(cast.rule)) == cast.rule
    assert eval(repr(cast), {"Cast": lp.Cast}).rule == cast.rule


def test_a_plain_format_is_its_own_rule() -> None:
    assert str(Rule.of("1-5-2:emax=1")) == str(lp.format("1-5-2:emax=1"))
    assert not Rule.of("bf16").saturate
    assert Rule.of(lp.Cast("bf16")).saturate


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fmt": "1-4"}, ValueError, "unknown format"),
        ({"bias": "guessed"}, ValueError, "bias must be one of static, dynamic, delayed, sampled, got 'guessed'"),
        ({"rounding": "odd"}, ValueError, "rounding must be one of"),
        ({"frequency": 0}, ValueError, "frequency must be at least 1, got 0"),
        ({"frequency": 1.5}, TypeError, "frequency must be an int, got 1.5"),
        ({"history": 0}, ValueError, "history must be at least 1"),
        ({"pad": True}, TypeError, "pad must be an int, got True"),
        ({"stdv": -1.0}, ValueError, "stdv must be finite and not negative, got -1.0"),
        ({"stdv": "2"}, TypeError, "stdv must be a number or None"),
        ({"random_bits": 4}, ValueError, "random_bits must be 32, 16 or 8, got 4"),
        ({"saturate": 1}, TypeError, "saturate must be a bool, got 1"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lp.Cast(**{"fmt": "1-4-3", **arguments})


def test_errors_of_a_call() -> None:
    cast = lp.Cast("1-4-10", bias="dynamic")
    with pytest.raises(ValueError, match="cannot hold every finite value"):
        cast(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="x must be a dense tensor"):
        cast(torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"move the cast with \.to"):
        cast(torch.ones(2, device="meta"))
