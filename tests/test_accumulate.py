"""Sums and products under accumulators: every engine against the judge, gradients, and what torch does with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import lowprec as lp
from lowprec import eager_accumulate
from lowprec import reference_accumulate as judge
from lowprec.accumulator import Accumulator, Level
from lowprec.formats import FloatFormat
from lowprec.reference import random_word
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal
from tests.engines import engines, float64
from tests.graphs import captured
from tests.strategies import DTYPES, accumulators, dtypes, terms, words64

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = Accumulator.sequential(FloatFormat(11, 20, specials="ieee"))
STOCHASTIC = "chunk5:1-5-2 stochastic/1-6-9 stochastic"
TREES = (
    "1-6-9",
    "1-5-2 toward_zero",
    "chunk7:1-4-3 stochastic/1-6-9 up",
    "pairwise:1-5-4:specials=ieee",
    "5*e4m3fn overflow/3*bf16 to_odd/fp32 down;product=1-5-3",
    "exact:1-5-2 nearest_away",
)


def assert_same(found: Tensor, expected: Tensor, what: object) -> None:
    """The same shape, dtype and bits, but that any NaN is as good as another."""
    found, expected = (torch.where(x.isnan(), torch.nan, x) for x in (found.cpu(), expected.cpu()))
    assert_bits_equal(found, expected, what=str(what))


def judged(a: Tensor, b: Tensor, accumulator: Accumulator, seed: int = 0, offset: int = 0) -> Tensor:
    """What the product of [B, M, K] and [B, K, N] must be."""
    values = judge.matmul(float64(a), float64(b), accumulator, seed, offset)
    return torch.from_numpy(values).to(torch.float64 if a.dtype == torch.float64 else torch.float32)


# Every engine is the judge.


@given(st.data(), dtypes, st.integers(0, 2**32), words64, words64)
@settings(max_examples=150)
def test_products_are_the_judges(
    device: torch.device, data: st.DataObject, dtype: torch.dtype, content: int, seed: int, offset: int
) -> None:
    accumulator = data.draw(accumulators(dtype))
    batch, height, width = (data.draw(st.integers(0, 3)) for _ in range(3))
    count = data.draw(st.one_of(st.integers(0, 9), st.integers(10, 50)))
    fmt = accumulator.levels[0].fmt
    a = terms((batch, height, count), dtype, fmt, content)
    b = terms((batch, count, width), dtype, fmt, content + 1)
    expected = judged(a, b, accumulator, seed, offset)
    for engine in engines(device):
        found = engine.matmul(a, b, accumulator, seed, offset)
        assert_same(found, expected, f"{accumulator} {engine} {a.tolist()} {b.tolist()}")


@given(st.data(), dtypes, st.integers(0, 2**32), words64, words64)
@settings(max_examples=100)
def test_sums_are_the_judges(
    device: torch.device, data: st.DataObject, dtype: torch.dtype, content: int, seed: int, offset: int
) -> None:
    accumulator = data.draw(accumulators(dtype))
    rows, count = data.draw(st.integers(0, 5)), data.draw(st.one_of(st.integers(0, 9), st.integers(10, 50)))
    x = terms((rows, count), dtype, accumulator.levels[0].fmt, content)
    expected = torch.from_numpy(judge.sums(float64(x), accumulator, seed, offset))
    for engine in engines(device):
        found = engine.sums(x, accumulator, seed, offset)
        assert_same(found, expected.to(found.dtype), f"{accumulator} {engine} {x.tolist()}")


@pytest.mark.parametrize("mode", Rounding)
@pytest.mark.parametrize(
    "fmt",
    [
        "1-2-1",
        "1-3-0",
        "1-5-2",
        "1-4-3:bias=9,subnormals=off",
        "1-0-7",
        "e4m3fn",
        "e5m2fnuz",
        "p3109_k8p3",
        "1-6-9",
        "fp16",
        "bf16",
        "fp32",
        "1-5-9:bias=141",  # on float32's subnormals
    ],
)
def test_every_mode_and_kind_of_format(fmt: str, mode: Rounding, device: torch.device) -> None:
    for saturate in (False, True):
        accumulator = Accumulator([Level(5, fmt, mode, saturate), Level(None, fmt, mode, saturate)])
        contents = (terms((1, 2, 9), torch.float32, accumulator.levels[0].fmt, content) for content in range(12))
        a = torch.cat(list(contents))
        expected = judged(a[:6], a[6:].mT, accumulator, 5, 3)
        for engine in engines(device):
            found = engine.matmul(a[:6], a[6:].mT, accumulator, 5, 3)
            assert_same(found, expected, f"{accumulator} {engine} {a.tolist()}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", TREES)
def test_hundreds_of_terms(text: str, dtype: torch.dtype, device: torch.device) -> None:
    accumulator = Accumulator.parse(text)
    a, b = torch.randn(1, 1, 301).to(dtype), torch.randn(1, 301, 2).to(dtype)
    expected = judged(a, b, accumulator, 5, 3)
    for engine in engines(device):
        assert_same(engine.matmul(a, b, accumulator, 5, 3), expected, f"{accumulator} {engine}")


@pytest.mark.parametrize("text", ["1-6-9", "3*1-6-9 stochastic", "chunk101:e4m3fn up/fp32 down"])
def test_twenty_thousand_terms(text: str, device: torch.device) -> None:
    """Where a compiled kernel does it."""
    accumulator = Accumulator.parse(text)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lowprec::matmul", device.type.upper()):
        pytest.skip("no compiled kernel")
    a, b = torch.randn(1, 1, 20_000), torch.randn(1, 20_000, 1)
    (engine,) = [engine for engine in engines(device) if engine.registered]
    assert_same(engine.matmul(a, b, accumulator, 5, 6), judged(a, b, accumulator, 5, 6), accumulator)


@pytest.mark.parametrize("text", ["1-0-31 stochastic", "1-1-30 stochastic", "1-1-30:bias=-40 to_odd", "1-10-20 up"])
def test_formats_of_32_bits_in_float64(text: str, device: torch.device) -> None:
    """A stochastic sum then needs 63 bits and what lies below them."""
    accumulator = Accumulator.parse(text)
    a = torch.cat([terms((1, 2, 9), torch.float64, accumulator.levels[0].fmt, content) for content in range(20)])
    expected = judged(a[:10], a[10:].mT, accumulator, 5, 3)
    for engine in engines(device):
        assert_same(engine.matmul(a[:10], a[10:].mT, accumulator, 5, 3), expected, f"{accumulator} {engine}")


def test_exact_sums_of_the_whole_range(device: torch.device) -> None:
    """Products from 2^-2148 to 2^2048, of which the smallest decides."""
    tiny, huge = 2.0**-1074, 1.7976931348623157e308
    a = torch.tensor([[[huge, tiny, -huge, tiny], [huge, -tiny, -huge, tiny], [huge, huge, huge, -tiny]]]).double()
    b = torch.tensor([[[huge], [tiny], [huge], [1.0]]]).double()
    for mode in Rounding:
        accumulator = Accumulator([Level(None, FloatFormat(11, 20, specials="ieee"), mode)], leaf="exact")
        expected = judged(a, b, accumulator)
        for engine in engines(device):
            assert_same(engine.matmul(a, b, accumulator), expected, f"{accumulator} {engine}")


@pytest.mark.parametrize("mode", Rounding)
def test_what_lies_far_below_decides(mode: Rounding, device: torch.device) -> None:
    """Midpoints of float32 and bfloat16, and products and sums that pass them by less than any float says."""
    above = torch.tensor([2.0**23 - 2.0**12 + 1, 2.0**23 + 2.0**12 + 1])  # whose product is 2^46 + 1
    tie = torch.tensor([1.0, 2.0**-24])
    for sign in (1, -1):
        a = torch.stack(
            [tie * sign, torch.tensor([1.0, 2.0**-70 * above[0]]) * sign, torch.tensor([1 + 2.0**-23, -tie[1]])]
        )
        b = torch.stack([torch.ones(2), torch.tensor([1.0, above[1]]), torch.ones(2)]).unsqueeze(-1)
        for leaf in ("terms", "exact"):
            accumulator = Accumulator([Level(None, "fp32", mode)], leaf=leaf)
            expected = judged(a.unsqueeze(1), b, accumulator, 5)
            for engine in engines(device):
                assert_same(engine.matmul(a.unsqueeze(1), b, accumulator, 5), expected, f"{accumulator} {engine}")
    x = torch.tensor([[1.0, 2.0**-8, 2.0**-140], [1.0, 2.0**-8, -(2.0**-140)], [1 + 2.0**-7, 2.0**-8, -(2.0**-149)]])
    accumulator = Accumulator([Level(None, "bf16", mode)], leaf="exact")
    for rows in (x, -x):
        for engine in engines(device):
            expected = torch.from_numpy(judge.sums(float64(rows), accumulator, 5)).float()
            assert_same(engine.sums(rows, accumulator, 5), expected, f"{accumulator} {engine}")


@pytest.mark.parametrize("mode", Rounding)
@pytest.mark.parametrize("text", ["exact:1-4-3", "1-4-3", "2*1-4-3", "e4m3fnuz"])
def test_the_signs_of_zero_sums(text: str, mode: Rounding, device: torch.device) -> None:
    accumulator = Accumulator.parse(f"{text} {mode}")
    rows = [
        [1.0, -1.0, 0.0],
        [-1.0, 1.0, -0.0],
        [-0.0] * 3,
        [0.0] * 3,
        [0.0, -0.0, 0.0],
        [-0.0, 0.0, -0.0],
        [-0.0, 1, -1],
    ]
    x = torch.tensor(rows)
    expected = torch.from_numpy(judge.sums(float64(x), accumulator)).float()
    for engine in engines(device):
        assert_same(engine.sums(x, accumulator), expected, f"{accumulator} {engine}")


@pytest.mark.parametrize("text", ["1-1-30", "fp32", "bf16", "1-5-2"])
def test_all_32_random_bits_count(text: str, device: torch.device) -> None:
    """A second term that reaches the next number with its word, and one that is a 2^-32nd of the spacing too small."""
    accumulator = Accumulator.parse(f"{text} stochastic")
    fmt = accumulator.levels[0].fmt
    spacing = 2.0 ** (1 - fmt.mbits)
    for seed in range(8):
        enough = 2**32 - random_word(seed, 0, 1)
        for first in (2.0, -2.0):
            for fraction in (enough, enough - 1):
                x = torch.tensor([[first, math.copysign(fraction * spacing * 2.0**-32, first)]], dtype=torch.float64)
                expected = math.copysign(2.0 + (spacing if fraction == enough else 0.0), first)
                for engine in engines(device):
                    assert engine.sums(x, accumulator, seed).item() == expected, engine


@pytest.mark.parametrize("text", [*TREES, STOCHASTIC])
def test_the_twin_in_parts_is_the_twin(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = Accumulator.parse(text)
    a, b = torch.randn(2, 2, 11), torch.randn(2, 11, 3)
    draws = torch.tensor(7), torch.tensor(8)
    whole = eager_accumulate.matmul(a, b, accumulator, *draws)
    for size in (1, 7):
        monkeypatch.setattr(eager_accumulate, "_AT_ONCE", size)
        assert_bits_equal(eager_accumulate.matmul(a, b, accumulator, *draws), whole)


@pytest.mark.parametrize("text", TREES)
def test_flush_to_zero_changes_nothing(text: str) -> None:
    x = torch.randn(4, 30) * 2.0**-130
    accumulator = Accumulator.parse(text.replace("1-6-9", "1-5-9:bias=141"))
    expected = [engine.sums(x, accumulator) for engine in engines(torch.device("cpu"))]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        found = [engine.sums(x, accumulator) for engine in engines(torch.device("cpu"))]
    finally:
        torch.set_flush_denormal(False)
    for one, other in zip(found, expected, strict=True):
        assert_bits_equal(one, other)


def test_flush_to_zero_changes_no_conversion() -> None:
    """Between float32, whose subnormals these are, and float64."""
    x, one = torch.tensor([3.0, -5.0]) * 2.0**-149, torch.ones(2, dtype=torch.float64)
    wide = x.double()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        found = [
            lp.matmul(wide, one, "1-5-9:bias=141", dtype=torch.float32),
            lp.sum(wide, 0, "1-5-9:bias=141", dtype=torch.float32),
            lp.matmul(x, one, "1-5-9:bias=141"),
            lp.sum(x, 0, "1-5-9:bias=141", dtype=torch.float64),
        ]
    finally:
        torch.set_flush_denormal(False)
    assert [each.dtype for each in found] == [torch.float32] * 2 + [torch.float64] * 2
    assert [each.item() for each in found] == [-(2.0**-148)] * 4


# What accumulators are for.


def test_a_tree_of_ones_does_not_stagnate(device: torch.device) -> None:
    ones = torch.ones(64, device=device)
    assert lp.sum(ones, 0, "1-5-2").item() == 8
    assert lp.sum(ones, 0, "pairwise:1-5-2").item() == 64
    assert lp.dot(ones, ones, "1-5-2").item() == 8
    assert lp.matmul(ones, ones, lp.Accumulator.pairwise("1-5-2")).item() == 64


def test_one_rounding_where_float32_and_a_format_are_two(device: torch.device) -> None:
    """1 + (2^-8 + 2^-31) lies above bfloat16's midpoint. Float32 drops what says so, and the tie goes down."""
    x = torch.tensor([1.0, 2.0**-8 + 2.0**-31], device=device)
    assert x.double()[1].item() == 2.0**-8 + 2.0**-31
    twice = lp.quantize(x[0] + x[1], "bf16")
    assert twice.item() == 1.0
    assert lp.sum(x, 0, "bf16").item() == 1.0 + 2.0**-7
    assert lp.dot(x, torch.ones_like(x), "bf16").item() == 1.0 + 2.0**-7
    # (1 + 2^-7) + (2^-8 - 2^-32) lies below a midpoint whose tie goes up. The product has bits that float32 has not.
    a = torch.tensor([1.0 + 2.0**-7, 2.0**-8 * (1 + 2.0**-12)], device=device)
    b = torch.tensor([1.0, 1.0 - 2.0**-12], device=device)
    twice = lp.quantize((a.double() @ b.double()).float(), "bf16")
    assert twice.item() == 1.0 + 2.0**-6
    assert lp.dot(a, b, "bf16").item() == 1.0 + 2.0**-7


def test_stochastic_sums_are_unbiased(device: torch.device) -> None:
    """4096 sums of 400 times 0.05 in 1-5-2, where nearest-even stops at 0.5.

    A partial sum is a martingale whose steps stay within a spacing: at most 4 below 32, 8 below 64. By Azuma's
    inequality the mean of the sums is off by more than t with probability 2 exp(-2 t² · 4096 / (400 · 8²)), here 1e-12.
    """
    x = torch.full((4096, 400), 0.05, device=device)
    bound = math.sqrt(400 * 8**2 * math.log(2e12) / (2 * 4096))
    assert lp.sum(x[:1], 1, "1-5-2").item() == 0.5
    sums = lp.sum(x, 1, "1-5-2 stochastic", seed=1)
    assert sums.max() <= 64
    assert abs(sums.double().mean().item() - 400 * x[0, 0].double().item()) < bound


def test_draws_repeat_by_seed_and_offset(device: torch.device) -> None:
    a, b = torch.randn(3, 4, 20, device=device), torch.randn(20, 5, device=device)
    first = lp.matmul(a, b, STOCHASTIC, seed=3, offset=4)
    assert_bits_equal(lp.matmul(a, b, STOCHASTIC, seed=3, offset=4), first)
    assert_bits_equal(lp.matmul(a, b, STOCHASTIC, seed=torch.tensor(3), offset=torch.tensor(4)), first)
    for how in ({"seed": 3}, {"seed": 4, "offset": 4}, {}):
        assert not torch.equal(lp.matmul(a, b, STOCHASTIC, **how), first)
    for draw in (lambda: {}, lambda: {"generator": torch.Generator().manual_seed(9)}):
        torch.manual_seed(9)
        found = lp.matmul(a, b, STOCHASTIC, **draw())
        torch.manual_seed(9)
        assert_bits_equal(lp.matmul(a, b, STOCHASTIC, **draw()), found)


def test_what_draws_nothing_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    lp.matmul(torch.ones(3, 3), torch.ones(3, 3), "1-6-9", backward=STOCHASTIC)
    lp.sum(torch.ones(3), 0, "pairwise:bf16", seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("text", [text for text in TREES if "stochastic" not in text])
def test_parts_of_a_batch_have_the_bits_of_the_whole(text: str, device: torch.device) -> None:
    a, b = torch.randn(4, 6, 33, device=device), torch.randn(4, 33, 5, device=device)
    whole = lp.matmul(a, b, text)
    for i in range(4):
        for j in range(0, 6, 2):
            assert_bits_equal(lp.matmul(a[i, j : j + 2], b[i][:, 1:4], text), whole[i, j : j + 2, 1:4])


# Public functions: shapes, strides, dtypes.

SHAPES = [
    ((4,), (4,)),
    ((3, 4), (4,)),
    ((4,), (4, 5)),
    ((3, 4), (4, 5)),
    ((2, 3, 4), (4,)),
    ((4,), (2, 4, 5)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (3, 4, 5)),
    ((1, 3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (1, 6, 4, 5)),
    ((0, 3, 4), (4, 5)),
    ((2, 0, 4), (4, 5)),
    ((2, 3, 0), (0, 5)),
    ((2, 3, 4), (2, 4, 0)),
    ((1, 3, 4), (0, 4, 5)),
    ((0,), (0,)),
]


@pytest.mark.parametrize(("left", "right"), SHAPES, ids=str)
def test_shapes_are_those_of_torch(left: tuple[int, ...], right: tuple[int, ...], device: torch.device) -> None:
    """Small integers have exact sums."""
    a, b = (torch.randint(-3, 4, shape, device=device).float() for shape in (left, right))
    for text in ("1-6-9", "pairwise:1-6-9", "exact"):
        found = lp.matmul(a, b, text)
        assert found.shape == torch.matmul(a, b).shape
        assert torch.equal(found, torch.matmul(a, b))


@given(st.sampled_from(SHAPES), dtypes, st.integers(0, 2**32), st.sampled_from([*TREES, STOCHASTIC]))
@settings(max_examples=40)
def test_matmul_is_the_judges(device: torch.device, shapes: Any, dtype: torch.dtype, content: int, text: str) -> None:
    """Broadcasting, any strides, and the index that random words go by."""
    accumulator = Accumulator.parse(text)
    a, b = (terms(shape, dtype, accumulator.levels[0].fmt, content + n) for n, shape in enumerate(shapes))
    rows, columns = (a if a.dim() > 1 else a[None]), (b if b.dim() > 1 else b[:, None])
    batch = torch.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
    rows, columns = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) if batch else x[None] for x in (rows, columns))
    expected = judged(rows, columns, accumulator, 5, 6).reshape(torch.matmul(a, b).shape)
    strided = a.to(device).flip(0).flip(0).mT.contiguous().mT if a.dim() > 1 else a.to(device)
    found = lp.matmul(strided, b.to(device), accumulator, seed=5, offset=6)
    assert_same(found, expected, f"{text} {a.tolist()} {b.tolist()}")


@pytest.mark.parametrize("dim", [None, 0, -1, 1, (0, 2), (2, 0), (1, 2), (0, 1, 2), [1]], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_over_dimensions(dim: Any, keepdim: bool, device: torch.device) -> None:
    x = torch.randn(3, 4, 5, device=device).transpose(0, 1)
    dims = [d % 3 for d in ([0, 1, 2] if dim is None else [dim] if isinstance(dim, int) else dim)]
    kept = [d for d in range(3) if d not in dims]
    rows = x.permute(*kept, *sorted(dims)).flatten(len(kept)).reshape(-1, math.prod(x.shape[d] for d in dims))
    expected = torch.from_numpy(judge.sums(float64(rows.cpu()), Accumulator.parse(STOCHASTIC), 5, 6)).float()
    found = lp.sum(x, dim, STOCHASTIC, keepdim=keepdim, seed=5, offset=6)
    assert found.shape == x.sum(dims, keepdim=keepdim).shape
    assert_same(found.flatten(), expected, dim)


def test_sums_of_numbers_and_of_nothing(device: torch.device) -> None:
    number = torch.tensor(1.1, device=device)
    for dim in (None, 0, -1):
        assert lp.sum(number, dim, "1-4-3").item() == 1.125
    assert lp.sum(torch.empty(0, 3, device=device), 0, "1-4-3").tolist() == [0.0] * 3
    assert lp.sum(torch.empty(0, 3, device=device), 1, "exact").shape == (0,)
    assert not lp.sum(torch.empty(2, 0, device=device), 1, "1-4-3 down").signbit().any()
    assert not lp.matmul(torch.empty(2, 0, device=device), torch.empty(0, 2, device=device), "1-4-3").signbit().any()


def test_result_dtypes(device: torch.device) -> None:
    x = torch.randn(5, device=device)
    for dtype in DTYPES:
        carrier = torch.float64 if dtype == torch.float64 else torch.float32
        assert lp.sum(x.to(dtype), 0, "1-4-3").dtype == carrier
        for other in DTYPES:
            expected = torch.float64 if torch.float64 in (dtype, other) else torch.float32
            assert lp.dot(x.to(dtype), x.to(other), "1-4-3").dtype == expected
            product = lp.dot(x.to(dtype), x.to(dtype), "fp32" if carrier == torch.float32 else WIDE, dtype=other)
            assert product.dtype == other


def test_a_result_is_rounded_into_its_dtype_once(device: torch.device) -> None:
    """From float64 by way of float32 would be twice: what lies above the midpoints is lost in float32."""
    for dtype, spacing in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        x = torch.tensor([1 + spacing / 2, 2.0**-29], dtype=torch.float64, device=device)
        assert x.sum().float().to(dtype).item() == 1.0
        assert lp.sum(x, 0, "1-1-30", dtype=dtype).item() == 1.0 + spacing
        assert lp.dot(x, torch.ones_like(x), "1-1-30", dtype=dtype).item() == 1.0 + spacing


def test_operands_of_two_dtypes_are_carried_exactly(device: torch.device) -> None:
    a, b = torch.randn(3, 9, device=device).bfloat16(), torch.randn(9, 2, device=device).half()
    for text in TREES[:4]:
        expected = lp.matmul(a.float(), b.float(), text, seed=1)
        assert_bits_equal(lp.matmul(a, b, text, seed=1), expected)
        assert_bits_equal(lp.matmul(a, b.double(), text, seed=1), expected.double())


# Gradients.


def gradients(a: Tensor, b: Tensor, dy: Tensor, *args: Any, **how: Any) -> tuple[Tensor, Tensor]:
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    return torch.autograd.grad(lp.matmul(a, b, *args, **how), (a, b), dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [None, "pairwise:1-5-4", ("1-5-2", "exact:bf16")], ids=str)
def test_gradients_are_products(backward: Any, dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(7, 5, device=device).to(dtype).mT, torch.randn(7, 6, device=device).to(dtype)
    y = lp.matmul(a, b, "1-6-9")
    dy = torch.randn_like(y)
    left, right = backward if isinstance(backward, tuple) else (backward or "1-6-9",) * 2
    da, db = gradients(a, b, dy, "1-6-9", backward=backward)
    assert_bits_equal(da, lp.matmul(dy, b.mT, left, dtype=dtype))
    assert_bits_equal(db, lp.matmul(a.mT, dy, right, dtype=dtype))


def test_gradients_draw_further_on(device: torch.device) -> None:
    a, b, dy = (torch.randn(shape, device=device) for shape in ((5, 7), (7, 6), (5, 6)))
    for offset in (0, 4, torch.tensor(4)):
        da, db = gradients(a, b, dy, "1-6-9", backward=STOCHASTIC, seed=3, offset=offset)
        assert_bits_equal(da, lp.matmul(dy, b.mT, STOCHASTIC, seed=3, offset=offset + 1))
        assert_bits_equal(db, lp.matmul(a.mT, dy, STOCHASTIC, seed=3, offset=offset + 2))
        again = gradients(a, b, dy, STOCHASTIC, seed=3, offset=offset)
        assert_bits_equal(again[0], da)
        assert_bits_equal(again[1], db)
    zero = gradients(a, b, dy, STOCHASTIC, seed=0)
    assert_bits_equal(zero[0], lp.matmul(dy, b.mT, STOCHASTIC, seed=0, offset=1))


def test_gradients_without_a_seed_draw_their_own(device: torch.device) -> None:
    a, b, dy = torch.randn(20, 20, device=device), torch.eye(20, device=device), torch.eye(20, device=device)
    torch.manual_seed(3)
    first = gradients(a, a.mT, dy, "exact", backward="1-2-1 stochastic")
    again = gradients(a, a.mT, dy, "exact", backward="1-2-1 stochastic")
    torch.manual_seed(3)
    same = gradients(a, a.mT, dy, "exact", backward="1-2-1 stochastic")
    assert not torch.equal(first[0], first[1].mT)
    assert not torch.equal(first[0], again[0])
    assert_bits_equal(same[0], first[0])
    assert_bits_equal(same[1], first[1])
    assert torch.equal(lp.matmul(a, b, "exact"), a)


def test_a_broadcast_operand_has_one_sum_as_gradient(device: torch.device) -> None:
    """Over the batch dimensions that it lacks, then over the other dimension: in row-major order of dY."""
    a, b = torch.randn(2, 1, 3, 4, device=device), torch.randn(5, 4, 6, device=device)
    dy = torch.randn(2, 5, 3, 6, device=device)
    da, db = gradients(a, b, dy, "1-6-9", backward="1-5-4")
    rows = dy.permute(0, 2, 1, 3).reshape(2, 3, 30)
    assert_bits_equal(da[:, 0], lp.matmul(rows, b.permute(0, 2, 1).reshape(30, 4), "1-5-4"))
    columns = dy.permute(1, 0, 2, 3).reshape(5, 6, 6)
    assert_bits_equal(db, lp.matmul(a[:, 0].permute(2, 0, 1).reshape(4, 6), columns, "1-5-4"))
    weight = torch.randn(4, 6, device=device)
    _, dw = gradients(a, weight, dy[:, :1], "1-6-9")
    assert_bits_equal(dw, lp.matmul(a.reshape(6, 4).mT, dy[:, :1].reshape(6, 6), "1-6-9"))


@pytest.mark.parametrize(("left", "right"), SHAPES, ids=str)
def test_gradients_of_every_shape(left: tuple[int, ...], right: tuple[int, ...], device: torch.device) -> None:
    a, b = (torch.randint(-3, 4, shape, device=device).float().requires_grad_() for shape in (left, right))
    expected = torch.matmul(a, b)
    dy = torch.randint_like(expected, -3, 4)
    for text in ("1-6-9", "pairwise:1-6-9", "exact"):
        found = torch.autograd.grad(lp.matmul(a, b, text), (a, b), dy)
        for one, other in zip(found, torch.autograd.grad(torch.matmul(a, b), (a, b), dy), strict=True):
            assert one.shape == other.shape
            assert torch.equal(one, other)


def test_gradients_to_any_order(device: torch.device) -> None:
    """Twenty bits, and steps of 2^-7: numeric derivatives are good to about 2^-12."""
    how = {"eps": 2.0**-7, "atol": 1e-3, "rtol": 1e-3}
    a, b = (torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in ((2, 1, 3), (3, 2)))
    for accumulator in (WIDE, lp.Accumulator.exact(WIDE.levels[0].fmt)):

        def product(a: Tensor, b: Tensor, accumulator: Accumulator = accumulator) -> Tensor:
            return lp.matmul(a, b, accumulator)

        assert gradcheck(product, (a, b), check_forward_ad=True, check_batched_grad=True, **how)
        assert gradgradcheck(product, (a, b), **how)
    assert gradcheck(lambda a: lp.sum(a, (0, 2), WIDE), a, check_forward_ad=True, check_batched_grad=True, **how)
    assert gradgradcheck(lambda a: lp.sum(a, (0, 2), WIDE) ** 2, a, **how)


def test_second_derivatives_are_products_too(device: torch.device) -> None:
    """With the accumulator of the first."""
    a, b = torch.randn(5, 7, device=device, requires_grad=True), torch.randn(7, 6, device=device, requires_grad=True)
    dy, v = torch.randn(5, 6, device=device, requires_grad=True), torch.randn(5, 7, device=device)
    (da,) = torch.autograd.grad(lp.matmul(a, b, "1-6-9", backward=("1-5-4", "fp32")), a, dy, create_graph=True)
    ddy, db = torch.autograd.grad(da, (dy, b), v)
    assert_bits_equal(ddy, lp.matmul(v, b, "1-5-4"))
    assert_bits_equal(db, lp.matmul(dy.mT, v, "1-5-4").mT)


def test_gradients_only_where_asked(device: torch.device) -> None:
    a, b = torch.randn(3, 4, device=device, requires_grad=True), torch.randn(4, 2, device=device)
    lp.matmul(a, b, "1-6-9").sum().backward()
    assert a.grad is not None
    assert b.grad is None
    assert not lp.matmul(a.detach(), b, "1-6-9").requires_grad


def test_gradients_of_results_in_other_dtypes(device: torch.device) -> None:
    """dY is taken as it is, and a sum that was carried in float64 has gradients carried there."""
    a, b = torch.randn(3, 4, device=device).half(), torch.randn(4, 2, device=device).double()
    dy = torch.randn(3, 2, device=device).bfloat16()
    da, db = gradients(a, b, dy, WIDE, dtype=torch.bfloat16)
    assert_bits_equal(da, lp.matmul(dy.double(), b.mT, WIDE, dtype=torch.float16))
    assert_bits_equal(db, lp.matmul(a.double().mT, dy, WIDE))
    b = b.float()
    dy = torch.randn(3, 2, device=device).double()
    assert_bits_equal(gradients(a, b, dy, "fp32", dtype=torch.float64)[1], lp.matmul(a.mT, dy, "fp32").float())


def test_the_gradient_of_a_sum_reaches_every_term(device: torch.device) -> None:
    for dtype in DTYPES:
        x = torch.randn(3, 4, 5, device=device).to(dtype).requires_grad_()
        for dim, keepdim in ((1, False), ((0, 2), True), (None, False)):
            sums = lp.sum(x, dim, STOCHASTIC, keepdim=keepdim)
            dy = torch.randn_like(sums)
            (found,) = torch.autograd.grad(sums, x, dy)
            (expected,) = torch.autograd.grad(x.sum(dim, keepdim=keepdim), x, dy.to(dtype))
            assert_bits_equal(found, expected)
    x = torch.ones(2, device=device, dtype=torch.float16, requires_grad=True)
    dy = torch.tensor(1 + 2.0**-11 + 2.0**-40, device=device, dtype=torch.float64)  # above a midpoint of float16
    (found,) = torch.autograd.grad(lp.sum(x, 0, "1-6-9", dtype=torch.float64), x, dy)
    assert found.tolist() == [1 + 2.0**-10] * 2


# Under torch's transforms.


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("text", ["1-6-9", STOCHASTIC, "exact"])
def test_compiled(text: str, device: torch.device) -> None:
    accumulator = lp.Accumulator.parse(text)
    a = torch.randn(2, 3, 4, device=device, requires_grad=True)
    b = torch.randn(4, 5, device=device, requires_grad=True)

    def step(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
        y = lp.matmul(a, b, accumulator, backward=("1-5-4", text), seed=3, offset=offset)
        return lp.sum(y, (0, 1), text, seed=4) * lp.dot(b[0], b[1], accumulator, seed=5, dtype=torch.bfloat16)

    function = compiled(step)
    for offset in (torch.tensor(1), torch.tensor(2)):
        found, expected = function(a, b, offset), step(a, b, offset)
        assert_bits_equal(found, expected)
        pairs = zip(*(torch.autograd.grad(y.sum(), (a, b)) for y in (found, expected)), strict=True)
        for one, other in pairs:
            assert_bits_equal(one, other)


def test_compiled_with_dynamic_shapes_and_drawn_seeds(device: torch.device) -> None:
    function = compiled(lambda a, b: lp.sum(lp.matmul(a, b, STOCHASTIC), 0, "pairwise:1-6-9"), dynamic=True)
    for n in (3, 4, 7):
        a, b = torch.randn(n, 4, device=device), torch.randn(4, n + 1, device=device)
        results = []
        for each in (function, lambda a, b: lp.sum(lp.matmul(a, b, STOCHASTIC), 0, "pairwise:1-6-9")):
            torch.manual_seed(3)
            results.append(each(a, b))
        assert_bits_equal(*results)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (2, 1)], ids=str)
def test_vmap_is_the_batched_product(in_dims: Any, device: torch.device) -> None:
    """Stochastic rounding goes by the index in the batched result."""
    a, b = torch.randn(4, 4, 4, device=device), torch.randn(4, 4, 4, device=device)
    a, b = (x if dim is not None else x[0] for x, dim in zip((a, b), in_dims, strict=True))
    batched = [x if dim is None else x.movedim(dim, 0) for x, dim in zip((a, b), in_dims, strict=True)]
    how = {"seed": 3, "offset": 4}
    found = torch.vmap(lambda a, b: lp.matmul(a, b, STOCHASTIC, **how), in_dims=in_dims)(a, b)
    assert_bits_equal(found, lp.matmul(*batched, STOCHASTIC, **how))


def test_vmap_of_sums_gradients_and_seeds(device: torch.device) -> None:
    x, w = torch.randn(4, 3, 5, device=device), torch.randn(5, 2, device=device)
    sums = torch.vmap(lambda x: lp.sum(x, 0, STOCHASTIC, seed=3), in_dims=1)(x)
    assert_bits_equal(sums, lp.sum(x.transpose(0, 1), 1, STOCHASTIC, seed=3))
    grads = torch.vmap(torch.func.grad(lambda w, x: lp.matmul(x, w, "1-6-9").sum()), in_dims=(None, 0))(w, x)
    assert_bits_equal(grads, lp.matmul(x.mT, torch.ones(4, 3, 2, device=device), "1-6-9"))
    seeds = torch.tensor([1, 2, 3])
    found = torch.vmap(lambda seed: lp.matmul(x, w, STOCHASTIC, seed=seed))(seeds)
    assert_bits_equal(found, torch.stack([lp.matmul(x, w, STOCHASTIC, seed=seed) for seed in (1, 2, 3)]))
    found = torch.vmap(lambda seed: lp.sum(x, 0, STOCHASTIC, seed=seed))(seeds)
    assert_bits_equal(found, torch.stack([lp.sum(x, 0, STOCHASTIC, seed=seed) for seed in (1, 2, 3)]))


def test_forward_mode_and_hessians(device: torch.device) -> None:
    a, b, t = (torch.randn(shape, device=device) for shape in ((3, 4), (4, 2), (3, 4)))
    value, tangent = torch.func.jvp(lambda a: lp.matmul(a, b, "1-6-9"), (a,), (t,))
    assert_bits_equal(value, lp.matmul(a, b, "1-6-9"))
    assert_bits_equal(tangent, lp.matmul(t, b, "1-6-9"))
    both = torch.func.jvp(lambda a: lp.matmul(a, a.mT, "1-6-9"), (a,), (t,))[1]
    assert_bits_equal(both, lp.matmul(t, a.mT, "1-6-9") + lp.matmul(a, t.mT, "1-6-9"))
    assert_bits_equal(torch.func.jvp(lambda a: lp.sum(a, 1, "1-4-3"), (a,), (t,))[1], lp.sum(t, 1, "1-4-3"))
    x = torch.randn(3, device=device)
    assert_bits_equal(torch.func.hessian(lambda x: lp.dot(x, x, "exact"))(x), 2 * torch.eye(3, device=device))


@pytest.mark.parametrize("backward", [None, "1-6-9"])
def test_checkpointing_draws_the_same_again(backward: Any, device: torch.device) -> None:
    a, b = (torch.randn(shape, device=device, requires_grad=True) for shape in ((4, 8), (8, 3)))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (lp.matmul(a, b, STOCHASTIC, backward=backward) ** 2).sum()

    results = []
    for value in (lambda: loss(a, b), lambda: checkpoint(loss, a, b, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(value(), (a, b)))
    for one, other in zip(*results, strict=True):
        assert_bits_equal(one, other)


def test_autocast_changes_nothing(device: torch.device) -> None:
    a, b = torch.randn(3, 4, device=device, requires_grad=True), torch.randn(4, 2, device=device)
    expected = torch.autograd.grad(lp.matmul(a, b, "1-6-9").sum(), a)
    with torch.autocast(device.type, torch.bfloat16):
        y = lp.matmul(a, b, "1-6-9")
        assert_bits_equal(y, lp.matmul(a.detach(), b, "1-6-9"))
        found = torch.autograd.grad(y.sum(), a)
    assert_bits_equal(*found, *expected)


@pytest.mark.gpu
def test_a_replayed_graph_draws_new_bits() -> None:
    device = torch.device("cuda")
    a = torch.randn(8, 40, device=device, requires_grad=True)
    b, x = torch.randn(40, 6, device=device), torch.randn(5, 30, device=device)
    seed, offset = torch.tensor(3, device=device), torch.tensor(0, device=device)

    def step() -> tuple[Tensor, ...]:
        y = lp.matmul(a, b, STOCHASTIC, seed=seed, offset=offset)
        (da,) = torch.autograd.grad(y, a, torch.ones_like(y))
        sums = lp.sum(x, 1, "pairwise:1-5-2 stochastic", seed=seed, offset=offset)
        exact = lp.matmul(a.detach(), b, "exact:bf16")
        offset.add_(1)
        return y.detach(), da, sums, exact

    graph, found = captured(step)
    for _ in range(2):
        before = offset.clone()
        graph.replay()
        replayed = [each.clone() for each in found]
        offset.copy_(before)
        for one, other in zip(replayed, step(), strict=True):
            assert_bits_equal(one, other)


@pytest.mark.gpu
def test_a_frozen_seed_is_refused_under_capture() -> None:
    a = torch.randn(3, 3, device="cuda")
    lp.matmul(a, a, STOCHASTIC)
    torch.cuda.synchronize()
    with (
        pytest.raises(ValueError, match="seed must be a tensor on the device"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        lp.matmul(a, a, STOCHASTIC)


# Errors, before any work.

A, B = torch.ones(3, 4), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((3, 4), (3, 4), r"as many columns as b has rows, got shapes \(3, 4\) and \(3, 4\)"),
        ((3,), (4,), r"got shapes \(3,\) and \(4,\)"),
        ((), (4,), r"at least one dimension, got shapes \(\) and \(4,\)"),
        ((2, 3, 4), (3, 4, 2), r"batch dimensions of a and b must broadcast, got shapes \(2, 3, 4\) and \(3, 4, 2\)"),
    ],
)
def test_shapes_that_do_not_multiply(left: tuple[int, ...], right: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp.matmul(torch.ones(left), torch.ones(right), "1-6-9")


def test_tensors_of_other_kinds() -> None:
    for other in (A.long(), A.to(torch.complex64), A.bool(), A.to(torch.float8_e4m3fn), A.to_sparse(), [1.0]):
        for call in (
            lambda x: lp.matmul(x, B, "1-6-9"),
            lambda x: lp.matmul(A.mT, x, "1-6-9"),
            lambda x: lp.sum(x, 0, "1-6-9"),
            lambda x: lp.dot(x, A[0], "1-6-9"),
        ):
            with pytest.raises(TypeError, match="must be (a tensor|a dense tensor|one of)"):
                call(other)
    with pytest.raises(ValueError, match=r"a must have one dimension, got shape \(3, 4\)"):
        lp.dot(A, B, "1-6-9")
    with pytest.raises(ValueError, match="a and b must be on one device, got cpu and meta"):
        lp.matmul(A, B.to("meta"), "1-6-9")


def test_accumulators_that_cannot_be() -> None:
    def refused(error: type[Exception], message: str, *args: Any, **how: Any) -> None:
        with pytest.raises(error, match=message):
            lp.matmul(*args, **how)

    wide = "accumulator '1-6-9/1-9-9': level 1 is 1-9-9, of which torch.float32 cannot hold .*"
    refused(ValueError, wide, A, B, "1-6-9/1-9-9")
    refused(ValueError, wide, A, B, "1-6-9", backward="1-6-9/1-9-9")
    refused(ValueError, wide, A, B, "1-6-9", backward=("fp32", "1-6-9/1-9-9"))
    refused(ValueError, "the product format is 1-2-24", A, B, "1-6-9;product=1-2-24")
    refused(ValueError, "level 0 is 1-8-23, of which torch.float32 cannot hold", A, B, "1-8-23")
    refused(ValueError, "unknown format", A, B, "foo")
    refused(TypeError, "accumulator must be an Accumulator or a string, got 3", A, B, 3)
    refused(TypeError, "accumulator must be an Accumulator or a string, got 3", A, B, "1-6-9", backward=(None, 3))
    refused(ValueError, r"a pair of them \(dA, dB\)", A, B, "1-6-9", backward=("fp32",) * 3)
    refused(TypeError, "dtype must be one of", A, B, "1-6-9", dtype=torch.int32)
    refused(ValueError, "seed or generator, not both", A, B, "1-6-9", seed=1, generator=torch.Generator())
    refused(TypeError, "seed must be an int", A, B, "1-6-9 stochastic", seed=1.5)
    lp.matmul(A.double(), B, "1-6-9/1-9-9")
    with pytest.raises(ValueError, match="a tensor core adds products"):
        lp.sum(A, 0, "hopper_fp8")
    with pytest.raises(ValueError, match="cannot hold"):
        lp.sum(A, 0, "1-9-9")
    refused(TypeError, "a must be one of .* for hopper_fp16, got torch.float64", A.double(), B, "hopper_fp16")
    how = {"backward": ("hopper_fp16", "fp32"), "dtype": torch.float64}
    refused(TypeError, "gradient must be one of .* for hopper_fp16", A, B.clone().requires_grad_(), "fp32", **how)


@pytest.mark.parametrize("dim", [2, -3, (0, 5), (0, 0), (1, -1), (), True, 1.5, "x"], ids=repr)
def test_dimensions_that_are_not_there(dim: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="dim must"):
        lp.sum(A, dim, "1-6-9")
