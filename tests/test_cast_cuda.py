"""What only the CUDA kernels of the casts can get wrong: both their ways, chunks and tails, sizes past 2^31, graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal, patterns
from tests.engines import holds

pytestmark = pytest.mark.gpu

# Of each kind that the kernels tell apart: plain ones; without subnormals, without -0, with infinities or NaN; ties by
# the exponent's parity, ranges too wide or too far out for float32 sums.
FORMATS = (
    *("1-4-3", "1-5-2:emax=1", "1-0-7", "1-2-1", "1-3-4:subnormals=off", "e4m3fn", "e5m2", "e4m3fnuz", "e4m3b11fnuz"),
    *("p3109_k8p4", "1-4-3:specials=p3109,subnormals=off", "1-4-0", "1-7-0:specials=fn", "1-6-1:bias=120"),
    *("1-4-3:bias=-20", "1-0-3:bias=140", "bf16", "fp16", "1-8-5", "1-5-9:specials=fnuz"),
)


def sixteen_bits(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit dtype; every 65,537th of float32's bit patterns."""
    if dtype.itemsize == 2:
        return patterns(dtype)
    return torch.arange(-(2**31), 2**31, 65_537).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_every_kind_of_format_in_every_mode(text: str, dtype: torch.dtype) -> None:
    fmt, x = lp.format(text), sixteen_bits(dtype)
    for mode, saturate in itertools.product(Rounding, (True, False)):
        how = {"rounding": mode, "saturate": saturate, "seed": 5 if mode is Rounding.stochastic else None}
        assert_bits_equal(lp.encode(x.cuda(), fmt, **how).cpu(), lp.encode(x, fmt, **how), given=x)
        if holds(fmt, dtype):
            assert_bits_equal(lp.quantize(x.cuda(), fmt, **how).cpu(), lp.quantize(x, fmt, **how), given=x)


@pytest.mark.parametrize("text", FORMATS)
def test_every_code(text: str) -> None:
    fmt = lp.format(text)
    codes = torch.arange(1 << fmt.bits).to(lp.encode(torch.zeros(1), fmt).dtype).repeat(40)[:-3]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        if holds(fmt, dtype):
            assert_bits_equal(lp.decode(codes.cuda(), fmt, dtype=dtype).cpu(), lp.decode(codes, fmt, dtype=dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_chunks_tails_and_offsets(dtype: torch.dtype) -> None:
    """Counts around a tile, from places that no vector access may begin at, out of place and in place."""
    x = torch.randn(40_000).to(dtype)
    x[::97] = torch.nan
    for begin, count, fmt in itertools.product((0, 1, 8), (1, 4095, 32_771), ("e4m3fn", "e4m3fnuz")):
        part = x[begin : begin + count]
        for how in ({}, {"rounding": "stochastic", "seed": 2, "random_bits": 8}):
            expected = lp.quantize(part, fmt, **how)
            given = x.cuda()[begin : begin + count]
            assert_bits_equal(lp.quantize(given, fmt, **how).cpu(), expected, given=part)
            codes = lp.encode(given, fmt, **how)
            assert_bits_equal(codes.cpu(), lp.encode(part, fmt, **how), given=part)
            assert_bits_equal(lp.decode(codes, fmt, dtype=dtype).cpu(), lp.decode(codes.cpu(), fmt, dtype=dtype))
            assert_bits_equal(lp.quantize(given, fmt, out=given, **how).cpu(), expected, given=part)


def test_a_graph_reads_shift_seed_and_offset_when_it_runs() -> None:
    x = torch.randn(5000, device="cuda")
    shift, seed, offset = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(3))
    fmt = lp.format("1-4-3")

    def cast() -> Tensor:
        return _ops.quantize(x, fmt.fields, Rounding.stochastic.number, True, seed, offset, 32, shift)

    cast()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = cast()
    for values in ((0, 1, 2), (-9, 3, 2), (4, 1, 5), (1000, 0, 0)):
        for word, value in zip((shift, seed, offset), values, strict=True):
            word.fill_(value)
        graph.replay()
        assert_bits_equal(result, cast())
        by, *draws = (torch.tensor(value) for value in values)
        expected = _ops.quantize(x.cpu(), fmt.fields, Rounding.stochastic.number, True, *draws, 32, by)
        assert_bits_equal(result.cpu(), expected)


@pytest.mark.parametrize("random_bits", [32, 16, 8])
def test_shards_in_chunks_and_out_of_them(random_bits: int) -> None:
    """Runs whose places are multiples of a chunk, and others."""
    fields, seed = lp.format("1-4-3").fields, torch.tensor(3)
    for width, pitch, start in ((64, 256, 8), (64, 256, 4), (40, 77, 3), (24, 24, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(50, width).to(dtype)
            args = (fields, Rounding.stochastic.number, True, seed, None, random_bits, None, [start, width, pitch])
            assert_bits_equal(_ops.quantize(x.cuda(), *args).cpu(), _ops.quantize(x, *args), given=x)


def test_more_elements_than_32_bits_count() -> None:
    count = (1 << 31) + 4099
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB")
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(8209, device="cuda").bfloat16()
    x[-8209:] = last
    how = {"rounding": "stochastic", "seed": 4}
    codes = lp.encode(x, "1-4-3", **how)
    assert not codes[:-8209].any()
    whole = [[count - 8209, 8209, 0]]
    drawn = _ops.quantize(
        last, lp.format("1-4-3").fields, Rounding.stochastic.number, True, torch.tensor(4), None, 32, None, *whole
    )
    values = lp.decode(codes, "1-4-3", dtype=torch.bfloat16, out=x)
    assert_bits_equal(values[-8209:], drawn)
    assert_bits_equal(lp.encode(x, "1-4-3")[-8209:], codes[-8209:])
    dense = lp.encode(x.view(-1, 1), "e2m1fn", pack=True)
    assert dense.shape == (count, 1)
    assert_bits_equal(dense[-8209:, 0], lp.encode(x[-8209:], "e2m1fn"))
