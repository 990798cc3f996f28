"""The fused casts: exact sums against fractions, activations against mpmath, both layouts against the plain casts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowprec as lp
from lowprec import _ops, eager_fused, reference
from lowprec.eager import CONTAINERS, code_dtype
from lowprec.eager_fused import ACTIVATIONS, TINY
from lowprec.formats import FloatFormat
from lowprec.formats import float_format as lookup
from lowprec.fused import accumulate_, activate, transpose
from lowprec.fused import derivative as derivative_of
from lowprec.rounding import OVERFLOWS, Rounding
from lowprec.testing import assert_bits_equal, bits, special_values
from tests.strategies import dtypes, formats, modes, numbers, random_bits, tensors, words64

DTYPES = tuple(CONTAINERS)
KINDS = ("values", "codes", None)
OWN = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
STOCHASTIC: dict[str, Any] = {"rounding": "stochastic", "seed": 3, "offset": 4}


def word(n: int) -> Tensor:
    return torch.tensor(n, dtype=torch.int64)


@contextmanager
def flushing() -> Iterator[None]:
    """Subnormal operands and results of the CPU's floating-point operations become zero."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


# Both layouts.


def cast(kind: str | None, x: Tensor, fmt: FloatFormat | str, **how: Any) -> Tensor | None:
    return None if kind is None else {"values": lp.quantize, "codes": lp.encode}[kind](x, fmt, **how)


def check_transpose(x: Tensor, fmt: FloatFormat | str, outputs: tuple[Any, Any], **how: Any) -> None:
    """The registered op and its twin give what the plain casts do."""
    rows, columns = transpose(x, fmt, outputs=outputs, **how)
    expected_rows, expected_columns = (cast(kind, x.contiguous(), fmt, **how) for kind in outputs)
    for found, expected in ((rows, expected_rows), (columns, expected_columns)):
        assert (found is None) == (expected is None)
    if rows is not None and expected_rows is not None:
        assert_bits_equal(rows, expected_rows, given=x)
        assert rows.is_contiguous()
    if columns is not None and expected_columns is not None:
        assert_bits_equal(columns, expected_columns.mT.contiguous(), given=x.mT)
        assert columns.is_contiguous()


@given(st.data(), dtypes, modes, st.booleans(), words64, words64, random_bits)
@settings(max_examples=150)
def test_both_layouts_are_the_casts(
    device: torch.device,
    data: st.DataObject,
    dtype: torch.dtype,
    mode: Rounding,
    saturate: bool,
    seed: int,
    offset: int,
    rb: int,
) -> None:
    outputs = data.draw(st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)))
    fmt = data.draw(formats(dtype=dtype if "values" in outputs else None))
    some = data.draw(tensors(fmt, dtype))
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 70)))
    x = (
        some.repeat(math.prod(shape) // max(len(some), 1) + 1)
        if len(some)
        else torch.ones(math.prod(shape), dtype=dtype)
    )
    x = x[: math.prod(shape)].reshape(shape).to(device)
    how: dict[str, Any] = {"rounding": mode, "saturate": saturate, "seed": seed, "offset": offset, "random_bits": rb}
    check_transpose(x, fmt, outputs, **how)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ["e4m3fn", "1-5-6", "tf32", "fp32"])
def test_shapes_of_every_alignment(device: torch.device, dtype: torch.dtype, fmt: str) -> None:
    for height, width in itertools.product((1, 3, 64, 65, 130), (1, 7, 64, 96, 131)):
        x = torch.randn(2, height, width, device=device).to(dtype)
        held = fmt == "e4m3fn" or dtype in (torch.float32, torch.float64)
        for outputs in [("codes", "codes"), *([("values", "codes"), ("codes", "values")] if held else [])]:
            check_transpose(x, fmt, outputs, **STOCHASTIC)
            check_transpose(x, fmt, outputs)


def test_layouts_of_what_is_transposed(device: torch.device) -> None:
    x = torch.randn(4, 33, 70, device=device)
    for each in (
        x.mT,
        x[:, ::2, 1:],
        x[1, :, :5],
        x.expand(3, 4, 33, 70),
        x[:0],
        x[..., :0],
        x.flatten()[3:].view(-1, 3),
    ):
        check_transpose(each, "e4m3fn", ("values", "codes"), **STOCHASTIC)


def test_the_twin_of_both_layouts(device: torch.device) -> None:
    for dtype, mode in itertools.product(DTYPES, Rounding):
        x = torch.cat([special_values(dtype), torch.randn(46).to(dtype)]).reshape(-1, 6).to(device)
        args = (lookup("e4m3fn"), mode, False, word(1), None, 16)
        for first, second in itertools.product((dtype, torch.uint8), repeat=2):
            mine = [
                torch.empty(x.shape, dtype=first, device=device),
                torch.empty(x.mT.shape, dtype=second, device=device),
            ]
            theirs = [torch.empty_like(each) for each in mine]
            _ops.cast_transpose(x, args[0].fields, mode.number, *args[2:], *mine)
            eager_fused.cast_transpose(x, *args, *theirs)
            for one, other in zip(mine, theirs, strict=True):
                assert_bits_equal(one, other)


def test_gradients_of_both_layouts_add_up(device: torch.device) -> None:
    x = torch.randn(5, 7, device=device, requires_grad=True)
    rows, columns = transpose(x, "e4m3fn", outputs=("values", "values"))
    assert rows is not None
    assert columns is not None
    g, h = torch.randn_like(rows), torch.randn_like(columns)
    (both,) = torch.autograd.grad([rows, columns], x, [g, h])
    assert_bits_equal(both, g + h.mT)
    for kept, upstream, expected in ((0, g, g), (1, h, h.mT)):
        result = transpose(x, "e4m3fn", outputs=("values", "values"))[kept]
        assert result is not None
        assert_bits_equal(torch.autograd.grad(result, x, upstream)[0], expected)
    values, codes = transpose(x, "e4m3fn")
    assert values is not None
    assert codes is not None
    assert not codes.requires_grad
    assert_bits_equal(torch.autograd.grad(values, x, g)[0], g)
    assert not any(out.requires_grad for out in transpose(x, "e4m3fn", outputs=("codes", "codes")) if out is not None)


# Sums.


def own_format(dtype: torch.dtype) -> FloatFormat:
    """The format of a dtype's bits; float64's, which no `FloatFormat` of 32 bits is, for the reference alone."""
    if dtype in OWN:
        return lookup(OWN[dtype])
    fmt = object.__new__(FloatFormat)
    fields = {"ebits": 11, "mbits": 52, "bias": 1023, "specials": "ieee", "subnormals": True, "_text": "float64"}
    for name, value in fields.items():
        object.__setattr__(fmt, name, value)
    return fmt


def exact_sum(y: float, x: float, fmt: FloatFormat, mode: Rounding, saturate: bool, draw: int, rb: int) -> float:
    """The reference: a sum of fractions, rounded once."""
    if math.isnan(y) or math.isnan(x) or (math.isinf(y) and math.isinf(x) and y != x):
        return math.nan
    if math.isinf(y) or math.isinf(x):
        return reference.quantize(y if math.isinf(y) else x, fmt, mode, saturate)
    total = Fraction(y) + Fraction(x)
    if total == 0:
        both_minus = math.copysign(1, y) < 0 and math.copysign(1, x) < 0
        mixed = math.copysign(1, y) != math.copysign(1, x)
        zero = -0.0 if both_minus or (mixed and mode is Rounding.down) else 0.0
        return reference.quantize(zero, fmt, mode, saturate)
    return reference.quantize(total, fmt, mode, saturate, draw, rb)


def near(y: Tensor) -> st.SearchStrategy[Tensor]:
    """Terms of y's shape whose sums with y are hard: cancelling, far below, at midpoints, anything."""
    return st.integers(0, 2**32).map(lambda seed: _near(y, seed))


def _near(y: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = y.double()
    scale = torch.randint(-70, 4, y.shape, generator=generator).double().exp2()
    factor = torch.where(
        torch.rand(y.shape, generator=generator) < 0.4, -1.0, torch.randn(y.shape, generator=generator)
    )
    ulp = torch.randint(-2, 3, y.shape, generator=generator).double() * 2.0**-53
    return torch.where(torch.rand(y.shape, generator=generator) < 0.3, -wide * (1 + ulp * 2), wide * scale * factor)


@given(st.data(), dtypes, st.sampled_from(DTYPES), modes, st.booleans(), words64, words64, random_bits)
@settings(max_examples=250)
def test_sums_are_rounded_once(
    device: torch.device,
    data: st.DataObject,
    dtype: torch.dtype,
    of: torch.dtype,
    mode: Rounding,
    saturate: bool,
    seed: int,
    offset: int,
    rb: int,
) -> None:
    fmt = data.draw(st.one_of(st.none(), formats(dtype=dtype)))
    result = own_format(dtype) if fmt is None else fmt
    assume(mode != Rounding.stochastic or result.mbits <= 27)
    y = data.draw(tensors(lookup("e4m3fn") if fmt is None else fmt, dtype))
    x = data.draw(st.one_of(near(y), st.just(y.flip(0)))).to(of)
    how: dict[str, Any] = {"rounding": mode, "saturate": saturate, "seed": seed, "offset": offset, "random_bits": rb}
    terms = zip(y.double().tolist(), x.double().tolist(), strict=True)
    draws = [reference.random_word(seed, offset, i, rb) for i in range(len(y))]
    sums = [exact_sum(a, b, result, mode, saturate, draw, rb) for (a, b), draw in zip(terms, draws, strict=True)]
    expected = torch.tensor(sums, dtype=torch.float64)
    check_sums(y.to(device), x.to(device), expected, fmt, **how)


def check_sums(y: Tensor, x: Tensor, expected: Tensor, fmt: FloatFormat | None, **how: Any) -> None:
    """The op and its twin give the reference's sums, in the dtype of y."""
    found = accumulate_(y.clone(), x, fmt, **how)
    twin = y.clone()
    args = (Rounding.of(how["rounding"]), how["saturate"], word(how["seed"]), word(how["offset"]), how["random_bits"])
    eager_fused.accumulate_(twin, x, fmt, None, *args)
    assert_bits_equal(found, twin, given=x, what=f"{fmt} {how}")
    assert_bits_equal(found[y.isnan()], y[y.isnan()])
    found, y = found.cpu(), y.cpu()
    nan = expected.isnan()
    assert found[nan].isnan().all()
    assert_bits_equal(found[~nan], expected[~nan].to(y.dtype), given=y[~nan], what=f"{fmt} {how}")


@given(st.data(), dtypes, formats(max_bits=16), modes, words64)
def test_codes_are_added_as_their_values(
    device: torch.device, data: st.DataObject, dtype: torch.dtype, x_format: FloatFormat, mode: Rounding, seed: int
) -> None:
    fmt = data.draw(formats(max_bits=12, dtype=dtype))
    y = data.draw(tensors(fmt, dtype)).to(device)
    most = 2 ** (8 * code_dtype(x_format.fields).itemsize) - 1
    codes = data.draw(st.lists(st.integers(0, most), min_size=len(y), max_size=len(y)))
    x = torch.tensor(codes, dtype=torch.int64).to(code_dtype(x_format.fields)).to(device)
    how: dict[str, Any] = {"rounding": mode, "seed": seed, "saturate": False}
    values = lp.decode(x, x_format, dtype=torch.float64)
    expected = accumulate_(y.clone(), values, fmt, **how)
    assert_bits_equal(accumulate_(y.clone(), x, fmt, x_format=x_format, **how), expected, given=x)
    twin = y.clone()
    eager_fused.accumulate_(twin, x, fmt, x_format, mode, False, word(seed), None, 32)
    assert_bits_equal(twin, expected, given=x)


def test_sums_are_ieees(device: torch.device) -> None:
    """In a dtype's own format, nearest even, the sum of two numbers of the dtype is what IEEE 754 says."""
    for dtype in DTYPES:
        y = torch.cat([special_values(dtype).repeat(18), torch.randn(5000).to(dtype)])
        x = torch.cat([special_values(dtype).repeat_interleave(18), torch.randn(5000).to(dtype) * 0.01])
        expected = y + x
        found = accumulate_(y.clone().to(device), x.to(device)).cpu()
        kept = ~expected.isnan()
        assert_bits_equal(found[kept], expected[kept], given=x[kept])
        assert found[~kept].isnan().all()


def test_float8_tensors_are_codes(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    y = torch.ones(256, device=device)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz):
        expected = accumulate_(y.clone(), lp.decode(codes, dtype))
        assert_bits_equal(accumulate_(y.clone(), codes.view(dtype)), expected)


@pytest.mark.sanitize
def test_sums_do_not_mind_layouts(device: torch.device) -> None:
    base = torch.randn(6, 10, 8, device=device)
    x = torch.randn(8, 10, 6, device=device).permute(2, 1, 0)
    for mode in ("nearest_even", "stochastic"):
        expected = accumulate_(base.clone(), x.contiguous(), "bf16", rounding=mode, seed=5)
        y = base.permute(1, 2, 0).clone(memory_format=torch.contiguous_format).permute(2, 0, 1)
        found = accumulate_(y, x, "bf16", rounding=mode, seed=5)
        assert found is y
        assert_bits_equal(y, expected)
        holes = torch.zeros(6, 10, 16, device=device)
        accumulate_(holes[..., ::2].copy_(base), x, "bf16", rounding=mode, seed=5)
        assert_bits_equal(holes[..., ::2], expected)
        assert not holes[..., 1::2].any()
    for shape in ((), (0,), (3, 0)):
        y = torch.ones(shape, device=device)
        assert accumulate_(y, y).shape == shape
        assert (y == 2).all()


def test_a_sum_with_itself_doubles(device: torch.device) -> None:
    y = torch.randn(1000, device=device)
    expected = lp.quantize(2 * y, "bf16", saturate=False)
    assert_bits_equal(accumulate_(y, y, "bf16"), expected)


def test_stochastic_sums_are_unbiased() -> None:
    """1 + 2^-9 in bfloat16, whose spacing there is 2^-7, goes up in a quarter of the cases."""
    count = 2**16
    y = torch.ones(count, dtype=torch.bfloat16)
    accumulate_(y, torch.full((count,), 2.0**-9), rounding="stochastic", seed=1)
    ups = (y > 1).double().mean().item()
    assert abs(ups - 0.25) <= 5 * math.sqrt(0.25 * 0.75 / count)


# Activations.


def precisely(name: str, t: float) -> mpmath.mpf:
    """An activation in 200 bits."""

    def sigmoid(z: mpmath.mpf) -> mpmath.mpf:
        return 1 / (1 + mpmath.exp(-z))

    with mpmath.workprec(200):
        t = mpmath.mpf(t)
        functions: dict[str, Callable[[], Any]] = {
            "none": lambda: t,
            "relu": lambda: max(t, mpmath.mpf(0)),
            "relu2": lambda: max(t, mpmath.mpf(0)) ** 2,
            "sigmoid": lambda: sigmoid(t),
            "tanh": lambda: mpmath.tanh(t),
            "silu": lambda: t * sigmoid(t),
            "gelu": lambda: t * sigmoid(2 * mpmath.sqrt(2 / mpmath.pi) * (t + mpmath.mpf(44715) / 10**6 * t**3)),
        }
        return functions[name]()


BOUNDS = {"sigmoid": 2.0**-50, "tanh": 2.0**-50, "silu": 2.0**-50, "gelu": 2.0**-41}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_accurate(name: str) -> None:
    """Within the relative error that docs/fused.md states, wherever the result is not tiny."""
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-60, 11, (500,), generator=generator).double().exp2()
    ends = torch.tensor([692.9, 693.1, 709.0, 1e-300, 0.34657, 0.34658, 16.0, 18.7, 19.1, 32.0, 33.0])
    t = torch.cat([torch.randn(500, generator=generator).double() * exponents, ends.double()])
    t = torch.cat([t, -t])
    for given_t, found in zip(t.tolist(), eager_fused.activation(t, name, None, None, -1).tolist(), strict=True):
        exact = precisely(name, given_t)
        if abs(exact) < mpmath.mpf(2) ** (TINY + 11):  # 693 times the largest sigmoid that counts as zero
            assert abs(found) <= 2.0 ** (TINY + 11)
        else:
            error = abs((mpmath.mpf(found) - exact) / exact)
            assert error <= BOUNDS.get(name, 2.0**-53), (given_t, found)


def activated(x: Tensor, name: str, fmt: FloatFormat, mode: Rounding, saturate: bool, **rest: Any) -> Tensor:
    """The twin."""
    scale, bias = rest.get("scale"), rest.get("bias")
    last = (name, scale, bias, rest.get("dim", -1), rest.get("codes", False))
    return eager_fused.activate(x, fmt, mode, saturate, word(9), word(8), 16, *last)


@given(st.data(), dtypes, modes, st.booleans(), st.sampled_from(ACTIVATIONS), st.booleans())
@settings(max_examples=200)
def test_activations_agree(
    device: torch.device,
    data: st.DataObject,
    dtype: torch.dtype,
    mode: Rounding,
    saturate: bool,
    name: str,
    codes: bool,
) -> None:
    fmt = data.draw(formats(dtype=None if codes else dtype))
    x = data.draw(tensors(lookup("e5m2"), dtype, 24))
    x = torch.cat([x, special_values(dtype), torch.linspace(-30, 30, 7).to(dtype)]).to(device)
    of = data.draw(dtypes)
    factor = st.one_of(
        st.none(),
        numbers(lookup("e4m3fn"), of).map(lambda v: torch.tensor(v, dtype=of, device=device)),
        st.just(torch.linspace(-2, 3, len(x), device=device).to(of)),
    )
    rest: dict[str, Any] = {"scale": data.draw(factor), "bias": data.draw(factor), "codes": codes}
    how: dict[str, Any] = {"rounding": mode, "saturate": saturate, "seed": 9, "offset": 8, "random_bits": 16}
    found = activate(x, fmt, name, **rest, **how)
    assert_bits_equal(found, activated(x, name, fmt, mode, saturate, **rest), given=x, what=f"{name} to {fmt} {rest}")


def test_without_an_activation_it_is_the_cast(device: torch.device) -> None:
    for dtype, mode in itertools.product(DTYPES, Rounding):
        x = torch.cat([special_values(dtype), torch.randn(200).to(dtype) * 50]).to(device)
        how: dict[str, Any] = {"rounding": mode, "seed": 4, "saturate": False}
        fmt = "e4m3fn"
        assert_bits_equal(activate(x, fmt, **how), lp.quantize(x, fmt, **how), given=x)
        assert_bits_equal(activate(x, fmt, codes=True, **how), lp.encode(x, fmt, **how), given=x)


INF, NAN = math.inf, math.nan
SPECIAL = {  # of -inf, -800, -0, +0, 800, inf
    "none": (-INF, -800.0, -0.0, 0.0, 800.0, INF),
    "relu": (0.0, 0.0, 0.0, 0.0, 800.0, INF),
    "relu2": (0.0, 0.0, 0.0, 0.0, 640000.0, INF),
    "sigmoid": (0.0, 0.0, 0.5, 0.5, 1.0, 1.0),
    "tanh": (-1.0, -1.0, -0.0, 0.0, 1.0, 1.0),
    "silu": (-0.0, -0.0, -0.0, 0.0, 800.0, INF),
    "gelu": (-0.0, -0.0, -0.0, 0.0, 800.0, INF),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_values(device: torch.device, name: str) -> None:
    x = torch.tensor([-INF, -800.0, -0.0, 0.0, 800.0, INF], device=device)
    expected = torch.tensor(SPECIAL[name], device=device)
    assert_bits_equal(activate(x, "fp32", name, saturate=False), expected, given=x)
    nan = special_values(torch.float32)[special_values(torch.float32).isnan()].to(device)
    assert_bits_equal(activate(nan, "fp32", name), nan)
    zero_times_infinity = activate(torch.zeros(2, device=device), "fp32", "none", scale=INF)
    assert_bits_equal(
        zero_times_infinity, torch.full((2,), 0x7FC00000, dtype=torch.int32, device=device).view(torch.float32)
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_scale_and_bias_lie_along_a_dimension(device: torch.device, dim: int) -> None:
    x = torch.randn(6, 5, 4, device=device).transpose(0, 2)
    scale, bias = torch.randn(x.shape[dim], device=device), torch.randn(x.shape[dim], device=device)
    shape = [-1 if i == dim % 3 else 1 for i in range(3)]
    t = x.double() * scale.double().reshape(shape) + bias.double().reshape(shape)
    expected = lp.quantize(t, "e4m3fn").to(x.dtype)
    assert_bits_equal(activate(x, "e4m3fn", scale=scale, bias=bias, dim=dim), expected.contiguous())
    plain = activate(x, "e4m3fn", scale=2, bias=-1.5)
    assert_bits_equal(plain, lp.quantize(x.double() * 2 - 1.5, "e4m3fn").to(x.dtype).contiguous())
    assert plain.is_contiguous()


def test_flush_to_zero_changes_no_sum_and_no_activation(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.cat([special_values(dtype), torch.arange(1, 200).to(CONTAINERS[dtype].integer).view(dtype)]).to(
            device
        )
        x = x[~x.isnan()]

        def results(x: Tensor) -> list[Tensor]:
            sums = [accumulate_(x.flip(0), x), accumulate_(x * 0, x)]
            scales: list[Any] = [None, x.flip(0)]
            return sums + [
                activate(
                    x, "fp32" if x.dtype == torch.float32 else "1-10-20", name, scale=scale, bias=scale, rounding="up"
                )
                for name, scale in itertools.product(ACTIVATIONS, scales)
            ]

        expected = results(x)
        with flushing():
            found = results(x)
            twins = [activated(x, name, lookup("tf32"), Rounding.up, True) for name in ACTIVATIONS]
        for one, other in zip(found, expected, strict=True):
            assert_bits_equal(one, other)
        for one, name in zip(twins, ACTIVATIONS, strict=True):
            assert_bits_equal(one, activated(x, name, lookup("tf32"), Rounding.up, True))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients(device: torch.device, name: str) -> None:
    """Those of the same computation in torch, the cast left out."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda t: t,
        "relu": torch.relu,
        "relu2": lambda t: torch.relu(t) ** 2,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "silu": torch.nn.functional.silu,
        "gelu": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    }
    generator = torch.Generator().manual_seed(1)
    x, scale, bias, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((3, 4, 5), (4,), (), (3, 4, 5))
    )
    inputs = [each.requires_grad_() for each in (x, scale, bias)]
    expected = torch.autograd.grad(functions[name](x * scale[:, None] + bias), inputs, g)
    found = torch.autograd.grad(activate(x, "e4m3fn", name, scale=scale, bias=bias, dim=1), inputs, g)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not activate(x, "e4m3fn", name, codes=True).requires_grad
    t = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert derivative_of(t, name).dtype == torch.float64


# All of them under torch.


def run_all(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor | None, ...]:
    both = transpose(x, "e4m3fn", outputs=("values", "codes"), **STOCHASTIC)
    gated = activate(x, "1-5-2", "silu", scale=scale, bias=0.5)
    codes = activate(x, "1-5-2", "gelu", codes=True, **STOCHASTIC)
    return (*both, gated, codes, accumulate_(y.clone(), x, "bf16", **STOCHASTIC))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(device: torch.device, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(run_all, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for shape in ((4, 8), (6, 10)):
            args = (
                torch.randn(shape, device=device),
                torch.randn(shape, device=device),
                torch.randn(shape[1], device=device),
            )
            for found, expected in zip(compiled(*args), run_all(*args), strict=True):
                assert found is not None
                assert expected is not None
                assert_bits_equal(found, expected)


def test_compiled_gradients(device: torch.device) -> None:
    def loss(x: Tensor, scale: Tensor) -> Tensor:
        rows, columns = transpose(activate(x, "e4m3fn", "gelu", scale=scale), "1-5-2", outputs=("values", "values"))
        assert rows is not None
        assert columns is not None
        return (rows * 2).sum() + (columns**2).sum()

    torch.compiler.reset()
    x = torch.randn(4, 6, device=device, requires_grad=True)
    scale = torch.randn(6, device=device, requires_grad=True)
    expected = torch.autograd.grad(loss(x, scale), (x, scale))
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x, scale), (x, scale))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_a_captured_graph_replays() -> None:
    x, y = torch.randn(96, 130, device="cuda"), torch.randn(96, 130, device="cuda")
    seed, scale = torch.tensor(1, device="cuda"), torch.randn(130, device="cuda")
    how: dict[str, Any] = {"rounding": "stochastic", "seed": seed}

    def step() -> list[Tensor]:
        both = transpose(x, "e4m3fn", **how)
        values = activate(x, "1-5-2", "tanh", scale=scale, bias=0.25, **how)
        return [each for each in (*both, values, accumulate_(y, x, "bf16", **how)) if each is not None]

    step()
    torch.cuda.synchronize()
    start = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (5, -6):
        seed.fill_(value)
        y.copy_(start)
        graph.replay()
        found = [each.clone() for each in captured]
        y.copy_(start)
        for one, other in zip(found, step(), strict=True):
            assert_bits_equal(one, other)


@pytest.mark.gpu
@given(st.data(), dtypes, modes, st.sampled_from(ACTIVATIONS), words64)
@settings(max_examples=100)
def test_devices_agree(data: st.DataObject, dtype: torch.dtype, mode: Rounding, name: str, seed: int) -> None:
    fmt = data.draw(formats(max_bits=16, dtype=dtype))
    x = data.draw(tensors(fmt, dtype, 200))
    how: dict[str, Any] = {"rounding": mode, "seed": seed}
    assert_bits_equal(activate(x.cuda(), fmt, name, **how), activate(x, fmt, name, **how), given=x)
    y = x.flip(0)
    assert_bits_equal(accumulate_(y.cuda(), x.cuda(), fmt, **how), accumulate_(y.clone(), x, fmt, **how), given=x)


X = torch.ones(2, 3)
WRONG: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    "one dimension": (ValueError, lambda: transpose(X[0], "e4m3fn")),
    "outputs": (ValueError, lambda: transpose(X, "e4m3fn", outputs=("values", "bits"))),  # type: ignore[arg-type]
    "no dtype of ours": (TypeError, lambda: transpose(X.int(), "e4m3fn")),
    "not held": (ValueError, lambda: transpose(X.half(), "bf16")),
    "activation": (ValueError, lambda: activate(X, "e4m3fn", "swish")),
    "scale's length": (ValueError, lambda: activate(X, "e4m3fn", scale=torch.ones(2))),
    "scale's dimensions": (ValueError, lambda: activate(X, "e4m3fn", scale=torch.ones(2, 3))),
    "scale's type": (TypeError, lambda: activate(X, "e4m3fn", scale="2")),  # type: ignore[arg-type]
    "bias's dtype": (TypeError, lambda: activate(X, "e4m3fn", bias=torch.ones(3, dtype=torch.int32))),
    "dim": (ValueError, lambda: activate(X, "e4m3fn", dim=2)),
    "shape": (ValueError, lambda: accumulate_(X.clone(), X[:1])),
    "no format of codes": (ValueError, lambda: accumulate_(X.clone(), X.to(torch.uint8))),
    "format of values": (ValueError, lambda: accumulate_(X.clone(), X, x_format="e4m3fn")),
    "dtype of codes": (TypeError, lambda: accumulate_(X.clone(), X.to(torch.uint8), x_format="bf16")),
    "stochastic float64": (ValueError, lambda: accumulate_(X.double(), X, rounding="stochastic", seed=1)),
    "gradient": (ValueError, lambda: accumulate_(X.clone().requires_grad_(), X)),
    "overlap": (ValueError, lambda: accumulate_(X.flatten()[1:], X.flatten()[:-1])),
    "not a tensor": (TypeError, lambda: accumulate_(X.clone(), 1.0)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    error, call = WRONG[name]
    with pytest.raises(error):
        call()


def test_overflow_follows_the_default(device: torch.device) -> None:
    y = torch.tensor([400.0, -400.0], device=device)
    x = y.clone()
    assert accumulate_(y.clone(), x, "e4m3fn").tolist() == [448.0, -448.0]
    assert accumulate_(y.clone(), x * 1e38).tolist() == [math.inf, -math.inf]
    assert accumulate_(y.clone(), x, "e4m3").tolist() == [math.inf, -math.inf]
    assert accumulate_(y.clone(), x, "e4m3", saturate=True).tolist() == [240.0, -240.0]
    for mode in Rounding:
        away = OVERFLOWS[mode](False)
        found = accumulate_(y.clone(), x, "e4m3", rounding=mode, seed=1)[0].item()
        assert found == (math.inf if away else 240.0)
    assert bits(accumulate_(torch.tensor([-0.0]), torch.tensor([0.0]), rounding="down")).item() == -(2**31)
