"""Statistics: counts against the reference, sums against the order that docs/statistics.md writes out, bit for bit."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowprec as lp
from lowprec import _ops, eager, eager_statistics, reference
from lowprec.eager_statistics import FIELDS
from lowprec.formats import FloatFormat
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal, neighbourhood, special_values
from tests.strategies import DTYPES, dtypes, fits, formats, modes, tensors

Array = np.ndarray[Any, np.dtype[np.float64]]
E4M3 = lp.format("e4m3fn")


def gather(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding = Rounding.nearest_even,
    saturate: bool = True,
    seed: int = 0,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, statistics and histogram."""
    stats = torch.zeros(len(FIELDS), dtype=torch.float64, device=x.device)
    codes = torch.zeros(1 << fmt.bits, dtype=torch.int64, device=x.device)
    how = (rounding.number, saturate, torch.tensor(seed), None, 32, shift)
    return _ops.quantize_statistics(x, fmt.fields, *how, stats, codes), stats, codes


# Counts.


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts(dtype: torch.dtype, device: torch.device) -> None:
    """[elements, saturated, flushed, nan]; what passes the largest magnitude counts, whatever it became."""
    x = torch.tensor(
        [0.0, -0.0, 1.0, 448.0, 460.0, 470.0, -1e4, math.inf, math.nan, 2.0**-11, -(2.0**-10)], dtype=dtype
    ).to(device)
    for saturate, (mode, saturated, flushed) in itertools.product(
        (True, False),
        [
            (Rounding.nearest_even, 3, 2),
            (Rounding.toward_zero, 2, 2),
            (Rounding.up, 4, 1),
            (Rounding.nearest_away, 3, 1),
        ],
    ):
        values, stats, codes = gather(x, E4M3, mode, saturate)
        assert stats[:4].tolist() == [len(x), saturated, flushed, 1]
        assert_bits_equal(values, _ops.quantize(x, E4M3.fields, mode.number, saturate, None, None, 32))
        assert_bits_equal(codes, histogram(lp.encode(x, E4M3, rounding=mode, saturate=saturate), 256))


def histogram(codes: Tensor, bins: int) -> Tensor:
    return torch.bincount(codes.cpu().to(torch.int64).flatten(), minlength=bins).to(codes.device)


@pytest.mark.parametrize("mode", Rounding)
def test_counts_agree_with_the_reference(mode: Rounding, device: torch.device) -> None:
    x = torch.cat([neighbourhood(lp.format("1-3-2")), special_values(torch.float32)])
    for text in ("1-3-2", "1-3-2:specials=fnuz", "1-3-2:specials=ieee,subnormals=off", "1-0-5:bias=3"):
        fmt = lp.format(text)
        _, stats, _ = gather(x.to(device), fmt, mode, False)
        drawn = [reference.random_word(0, 0, i) for i in range(len(x))]
        saturated = flushed = 0
        for value, word in zip(x.tolist(), drawn, strict=True):
            if math.isfinite(value):
                code = reference.round_magnitude(fmt, Fraction(value), mode, word, 32)
                saturated += code > fmt.max_code
                flushed += code == 0 and value != 0
        saturated += int(x.isinf().sum())
        assert stats[:4].tolist() == [len(x), saturated, flushed, int(x.isnan().sum())]


@given(st.data(), formats(max_bits=12, dtype=torch.float32), dtypes, modes, st.booleans())
def test_histogram_is_that_of_encode(
    data: st.DataObject, fmt: FloatFormat, dtype: torch.dtype, mode: Rounding, saturate: bool
) -> None:
    dtype = dtype if fits(fmt, dtype) else torch.float32
    x = data.draw(tensors(fmt, dtype))
    _, _, codes = gather(x, fmt, mode, saturate)
    drawn = {"seed": 0} if mode is Rounding.stochastic else {}
    assert_bits_equal(codes, histogram(lp.encode(x, fmt, rounding=mode, saturate=saturate, **drawn), 1 << fmt.bits))


# Sums.


def written_out(v: Array) -> np.float64:
    """The order of docs/statistics.md, an element at a time."""
    return page([page(v[i : i + 16384]) for i in range(0, max(len(v), 1), 16384)])


def page(v: Any) -> np.float64:
    lanes = [np.float64(0.0)] * 1024
    for i, term in enumerate(v):
        lanes[i % 1024] = lanes[i % 1024] + term
    while len(lanes) > 1:
        lanes = [lanes[i] + lanes[i + 1] for i in range(0, len(lanes), 2)]
    return lanes[0]


def expected(x: Tensor, y: Tensor) -> Tensor:
    """Σ|x|, Σx, Σx², Σe² of numbers x that became y, in the order in which they come."""
    regular = (x.isfinite() & y.isfinite()).cpu().flatten().numpy()
    before, after = (as_summed(each) for each in (x, y))
    with np.errstate(over="ignore", under="ignore"):
        error = np.where(regular, after - before, 0.0)
        terms = (np.abs(before), before, before * before, error * error)
        return torch.tensor([written_out(term) for term in terms])


def as_summed(x: Tensor) -> Array:
    values = x.detach().cpu().to(torch.float64).flatten().numpy()
    return np.where(np.isfinite(values) & (np.abs(values) >= 2.0**-448), values, 0.0)


def wide(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of every exponent that a float32 product has room for, of both signs, with an infinity and a NaN."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator) * 2.0 ** torch.randint(-20, 20, (count,), generator=generator)
    x[count // 2 : count // 2 + 2] = torch.tensor([math.inf, math.nan])[: max(min(2, count - count // 2), 0)]
    return x.to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 1023, 1024, 1025, 16384, 16385, 50_001])
def test_sums_follow_the_order_to_the_bit(count: int, dtype: torch.dtype, device: torch.device) -> None:
    x = wide(count, dtype, device)
    for mode, saturate in ((Rounding.nearest_even, True), (Rounding.stochastic, False)):
        y, stats, _ = gather(x, E4M3, mode, saturate)
        assert_bits_equal(stats[5:].cpu(), expected(x, y))


@pytest.mark.sanitize
def test_more_pages_than_lanes(device: torch.device) -> None:
    """Past 1024 pages a lane of the last step adds up several of them."""
    x = torch.randn(1030 * 16384 + 7).to(torch.bfloat16)
    pages = torch.nn.functional.pad(x.double(), (0, -len(x) % 16384)).reshape(-1, 16, 1024)
    lanes = torch.zeros(len(pages), 1024, dtype=torch.float64)
    for row in range(16):
        lanes = lanes + pages[:, row]
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    wanted = page(lanes.flatten().numpy())
    assert eager_statistics.add_up(x.double()[None].to(device)).item() == wanted
    if _ops.libraries[device.type] == "loaded":  # the eager twin would take long
        _, stats, _ = gather(x.to(device), E4M3)
        assert stats[6].item() == wanted


@given(st.data(), formats(max_bits=12, dtype=torch.float16), dtypes, modes, st.booleans())
def test_sums_of_few_numbers(
    data: st.DataObject, fmt: FloatFormat, dtype: torch.dtype, mode: Rounding, saturate: bool
) -> None:
    """Any numbers, subnormal ones and the largest included."""
    dtype = dtype if fits(fmt, dtype) else torch.float64
    x = data.draw(tensors(fmt, dtype))
    y, stats, _ = gather(x, fmt, mode, saturate)
    wanted = expected(x, y)
    assert ((stats[5:] == wanted) | (stats[5:].isnan() & wanted.isnan())).all()
    finite = x[x.isfinite()].double()
    assert stats[4].item() == (finite.abs().max().item() if len(finite) else 0.0)


def test_sums_are_close_to_exact_ones(device: torch.device) -> None:
    x = torch.randn(40_000, dtype=torch.float64)
    y, stats, _ = gather(x.to(device), E4M3)
    terms = (x.abs(), x, x * x, (y.cpu() - x) ** 2)
    for found, term in zip(stats[5:].tolist(), terms, strict=True):
        assert abs(found - math.fsum(term.tolist())) <= 40 * 2.0**-53 * math.fsum(term.abs().tolist())


def layouts(device: torch.device) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Tensors, each with its dimensions in the order in which sums take them."""
    x = torch.randn(6, 8, 10, 12, device=device) * 100
    return {
        "contiguous": (x, (0, 1, 2, 3)),
        "transposed": (x.transpose(1, 3), (0, 3, 2, 1)),
        "channels last": (x.contiguous(memory_format=torch.channels_last), (0, 2, 3, 1)),
        "permuted": (x.permute(3, 0, 2, 1), (1, 3, 2, 0)),
        "ones among the sizes": (x[:1].permute(3, 0, 2, 1), (1, 3, 2, 0)),
        "every other": (x[:, ::2], (0, 1, 2, 3)),
        "every other, transposed": (x[:, ::2].transpose(0, 3), (0, 1, 2, 3)),
        "expanded": (x[:, :, :1].expand(6, 8, 3, 12), (0, 1, 2, 3)),
        "zero-dim": (x[0, 0, 0, 0], ()),
    }


LAYOUTS = tuple(layouts(torch.device("cpu")))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_order_of_dense_tensors_and_row_major_of_others(name: str, device: torch.device) -> None:
    x, dims = layouts(device)[name]
    y, stats, _ = gather(x, E4M3)
    assert_bits_equal(stats[5:].cpu(), expected(x.permute(dims), y.permute(dims)))
    y, stats, _ = gather(x, E4M3, Rounding.stochastic)
    assert_bits_equal(stats[5:].cpu(), expected(x, y))


def test_sums_alone_are_those_of_the_cast(device: torch.device) -> None:
    for x, _ in layouts(device).values():
        _, stats, _ = gather(x, E4M3)
        assert_bits_equal(eager_statistics.sums(x), torch.stack([stats[0], stats[4], stats[5], stats[7]]))
    assert eager_statistics.sums(torch.empty(0, 3)).tolist() == [0, 0, 0, 0]
    assert eager_statistics.sums(torch.tensor([math.nan, -3.0, math.inf])).tolist() == [1, 3, 3, 9]


def test_vectors_add_up(device: torch.device) -> None:
    x, y = torch.randn(2, 3000, device=device) * torch.tensor([[1.0], [300.0]], device=device)
    (_, one, first), (_, two, second) = gather(x, E4M3), gather(y, E4M3)
    stats, codes = torch.zeros_like(one), torch.zeros_like(first)
    for each in (y, x[:0], x):
        _ops.quantize_statistics(each, E4M3.fields, 0, True, None, None, 32, None, stats, codes)
    amax = torch.maximum(one[4], two[4])
    assert_bits_equal(stats, torch.cat([(two + one)[:4], amax[None], (two + one)[5:]]))
    assert_bits_equal(codes, first + second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flush_to_zero_changes_no_sum(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.cat([special_values(dtype), torch.randn(300).to(dtype) * (1e-40 if dtype == torch.float32 else 1e-310)])
    least = {torch.float32: -149, torch.float64: -1074}[dtype]
    fmt = FloatFormat(5, 2, bias=-1 - least)
    _, before, _ = gather(x.to(device), fmt)
    torch.set_flush_denormal(True)
    try:
        _, after, _ = gather(x.to(device), fmt)
    finally:
        torch.set_flush_denormal(False)
    assert_bits_equal(after, before)


@pytest.mark.parametrize("shift", [0, 3, -5, 10_000, -10_000])
def test_shift(shift: int, device: torch.device) -> None:
    x = torch.randn(5000, device=device) * 30
    by = torch.tensor(shift, device=device)
    values, stats, codes = gather(x, E4M3, shift=by)
    low, high = eager.shift_range(E4M3, x.dtype)
    same, wanted, found = gather(x, E4M3.with_bias(E4M3.bias - min(max(shift, low), high)))
    for mine, theirs in ((values, same), (stats, wanted), (codes, found)):
        assert_bits_equal(mine, theirs)
