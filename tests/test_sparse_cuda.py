"""What only the CUDA kernels of block-sparse products can get wrong: tiles, edges, layouts, codes, graphs, and order.

A dense product in float64 judges. Sums are float32 of K exact products: a tensor core keeps at least 24 bits of an
instruction's 16 aligned terms, so an output is within K / 8 · 2^-24 of the sum of magnitudes, or, of few products of
codes, each of which may lose a digit, 16 · 2^-24. A subnormal code counts there as the smallest normal number
(docs/hopper.md).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowprec as lp
from lowprec import _ops
from lowprec.block_tables import SHARES, Tables, part_blocks, product_plan, share_plan, tables_of
from lowprec.formats import FloatFormat

BLOCKS = (8, 16, 32, 64)
TOKENS = (0, 1, 63, 64, 65, 200)
FORMATS = (
    *("e4m3fn", "e5m2", "1-4-3:emax=8", "1-5-2:emax=1", "1-3-4", "1-3-2", "1-4-3:specials=fnuz"),
    *("1-5-2:subnormals=off", "1-0-7", "1-6-1", "p3109_k8p4", "1-2-1"),
)
CASTS = (
    *("e4m3fn", "e5m2", "1-4-3:emax=8", "1-4-3:emax=3", "1-5-2:emax=1", "1-5-2:specials=ieee", "1-4-3:specials=fnuz"),
    *("1-5-2:subnormals=off", "p3109_k8p4", "1-2-1", "1-5-0", "bf16"),
)
HALF_FORMATS = ("e4m3fn", "1-4-3:emax=8", "1-2-1")
"""Formats that float16 holds."""
PAIRS = (
    *(("e4m3fn", "e4m3fn"), ("e5m2", "1-3-4"), ("1-4-3:emax=8", "1-3-2"), ("1-2-1", "e5m2")),
    *(("1-5-2:emax=1", "1-4-3:emax=8"), ("1-4-3:emax=8", "1-6-1:bias=40"), ("1-5-1:emax=1", "1-2-1")),
)
EDGES = (
    *(("1-5-2:emax=1", "1-5-2:emax=1"), ("1-6-1:bias=62", "1-6-1:bias=62"), ("1-7-0:bias=60", "1-6-1:bias=40")),
    *(("1-0-7:bias=5", "1-5-2:bias=100"), ("1-5-2:bias=31", "1-4-3:bias=-20"), ("1-5-0:emax=1", "1-0-7")),
    *(("1-5-2:emax=1", "e4m3fn"), ("e5m2", "1-5-2:emax=1"), ("1-5-2:specials=ieee,bias=30", "1-4-3:emax=8")),
    *(("1-5-2:subnormals=off", "1-5-2:emax=1"), ("p3109_k8p4", "1-5-2"), ("e5m2", "e4m3fn")),
)
"""Pairs of formats at the ends of the ranges of the quick kernel, and beyond, and with special values."""
gpu = pytest.mark.gpu


class Layer:
    """A mask with an empty row and an empty column, weights of values or codes, and the judge."""

    def __init__(
        self, shape: tuple[int, int], block: int, dtype: torch.dtype, fmt: str | None = None, gated: bool = False
    ):
        torch.manual_seed(block + shape[0])
        self.mask = torch.rand(shape, device="cuda") < 0.4
        self.mask[shape[0] // 2] = False
        self.mask[:, shape[1] // 2] = False
        self.block, self.dtype = block, dtype
        self.blocks = int(self.mask.sum())
        self.tables: Tables = tables_of(self.mask, self.blocks, block)
        self.fmt = lp.format(fmt) if fmt else None
        self.w, self.w_values = operand((self.blocks, block, block), dtype, self.fmt)
        self.gate = None
        if gated:
            self.gate = torch.randn(self.blocks, device="cuda")
            self.gate[::3] = 0

    def dense(self, magnitude: bool = False) -> Tensor:
        """The weights [inputs, outputs] in float64, gates rounded in as the contract has it; or their magnitudes."""
        w = aligned(self.w_values, self.fmt) if magnitude else self.w_values
        if self.gate is not None:
            w = w.to(self.dtype) * self.gate.to(self.dtype)[:, None, None]
        i, j = self.mask.nonzero().unbind(1)
        inputs, outputs = self.mask.shape
        full = torch.zeros(inputs, outputs, self.block, self.block, dtype=torch.float64, device="cuda")
        full[i, j] = w.double().abs() if magnitude else w.double()
        return full.transpose(1, 2).reshape(inputs * self.block, outputs * self.block)


def long_layer(outputs: int, block: int, fmt: str | None = None) -> Layer:
    """One of a long column, and of short ones."""
    layer = Layer((150, outputs), block, torch.bfloat16)
    layer.mask[:, 0] = True
    layer.blocks = int(layer.mask.sum())
    layer.tables = tables_of(layer.mask, layer.blocks, block)
    layer.fmt = lp.format(fmt) if fmt else None
    layer.w, layer.w_values = operand((layer.blocks, block, block), layer.dtype, layer.fmt)
    return layer


def operand(shape: tuple[int, ...], dtype: torch.dtype, fmt: FloatFormat | None) -> tuple[Tensor, Tensor]:
    """Values, or codes of finite values, and what they stand for."""
    if fmt is None:
        x = torch.randn(shape, device="cuda").to(dtype)
        return x, x
    codes = torch.randint(0, 1 << fmt.bits, shape, device="cuda", dtype=torch.uint8)
    values = lp.decode(codes, fmt, dtype=torch.float32)
    codes = codes.masked_fill(~values.isfinite(), 0)
    return codes, values.masked_fill(~values.isfinite(), 0)


def aligned(x: Tensor, fmt: FloatFormat | None) -> Tensor:
    """Magnitudes by which tensor cores align terms."""
    return x.abs() if fmt is None else x.abs().clamp_min(2.0**fmt.emin)


def fields(fmt: FloatFormat | None) -> list[int]:
    return [] if fmt is None else list(fmt.fields)


def multiply(
    layer: Layer, x: Tensor, first: bool, transpose: bool, x_fmt: FloatFormat | None, dtype: torch.dtype
) -> Tensor:
    table, outputs = layer.tables.direction(transpose)
    formats = (fields(x_fmt), fields(layer.fmt))
    return _ops.sparse_matmul(x, layer.w, table, layer.gate, outputs, first, transpose, *formats, dtype)


def check(layer: Layer, tokens: int, first: bool, transpose: bool, x_format: str | None, dtype: torch.dtype) -> None:
    """One product against the judge, twice with the same bits."""
    x_fmt = lp.format(x_format) if x_format else None
    features = layer.mask.shape[1 if transpose else 0] * layer.block
    x, values = operand((features, tokens) if first else (tokens, features), layer.dtype, x_fmt)
    y = multiply(layer, x, first, transpose, x_fmt, dtype)
    w, size = layer.dense(), layer.dense(magnitude=True)
    w, size = (w.T, size.T) if transpose else (w, size)
    left = values.T if first else values
    exact, magnitude = left.double() @ w, aligned(left, x_fmt).double() @ size
    got = (y.T if first else y).double()
    terms = int(layer.mask.sum(1 if transpose else 0).max()) * layer.block
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    digits = max(terms / 8, 16 if x_fmt and layer.fmt else 0) + 2
    bound = magnitude * digits * 2.0**-24 + exact.abs() * unit * 1.01 + 2.0**-24 * (unit > 0)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= bound).all()
    assert torch.equal(y.view(torch.uint8), multiply(layer, x, first, transpose, x_fmt, dtype).view(torch.uint8))


@gpu
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_values(block: int, transpose: bool, first: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for gated in (False, True):
            layer = Layer((7, 5), block, dtype, gated=gated)
            for tokens in TOKENS:
                check(layer, tokens, first, transpose, None, torch.float32)
            check(layer, 65, first, transpose, None, dtype)
            check(layer, 72, first, transpose, None, dtype)


@pytest.mark.sanitize
@gpu
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_codes(block: int, transpose: bool, first: bool) -> None:
    for fmt in FORMATS:
        layer = Layer((5, 6), block, torch.bfloat16, fmt)
        check(layer, 72, first, transpose, fmt, torch.float32)
        check(layer, 40, first, transpose, None, torch.float32)
    gated = Layer((5, 6), block, torch.bfloat16, "e4m3fn", gated=True)
    check(gated, 65, first, transpose, "e5m2", torch.float32)
    check(Layer((5, 6), block, torch.float16, "e4m3fn"), 65, first, transpose, None, torch.float32)
    check(Layer((5, 6), block, torch.bfloat16), 65, first, transpose, "1-4-3:emax=8", torch.bfloat16)


@pytest.mark.sanitize
@gpu
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_long_columns(block: int, transpose: bool) -> None:
    layer = long_layer(3, block)
    for first in (False, True):
        check(layer, 64, first, transpose, None, torch.float32)
        check(layer, 300, first, transpose, None, torch.bfloat16)


@gpu
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("outputs", [1, 3, 40])
@pytest.mark.parametrize("block", BLOCKS)
def test_shares(block: int, outputs: int, transpose: bool) -> None:
    for x_format, w_format in PAIRS:
        layer = long_layer(outputs, block, w_format)
        for tokens in (1, 63, 65, 300, 512):
            check(layer, tokens, tokens % 2 == 0, transpose, x_format, torch.float32)
        check(layer, 72, True, transpose, x_format, torch.bfloat16)


@pytest.mark.sanitize
@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_few_shares(block: int) -> None:
    layer = long_layer(1, block, "e4m3fn")
    check(layer, 65, True, False, "1-3-2", torch.float32)
    check(layer, 72, False, True, "e5m2", torch.float32)


@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_powers_of_two(block: int) -> None:
    layer = long_layer(3, block, "1-4-3:emax=8")
    x, _ = operand((150 * block, 65), layer.dtype, layer.fmt)
    sums = multiply(layer, x, True, False, layer.fmt, torch.float32)
    for x_emax, w_emax in ((15, 15), (-24, -24), (3, -20)):
        layer.fmt = lp.format(f"1-4-3:emax={w_emax}")
        got = multiply(layer, x, True, False, lp.format(f"1-4-3:emax={x_emax}"), torch.float32)
        assert torch.equal(got, sums * 2.0 ** (x_emax + w_emax - 16))


@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_powers_of_two_beyond_float16(block: int) -> None:
    layer = long_layer(3, block, "1-4-3:emax=8")
    x, _ = operand((150 * block, 65), layer.dtype, lp.format("1-5-2:emax=1"))
    sums = multiply(layer, x, True, False, lp.format("1-5-2:emax=1"), torch.float32)
    for x_emax, w_emax in ((20, 12), (14, 15), (-60, -20), (-90, 10)):
        layer.fmt = lp.format(f"1-4-3:emax={w_emax}")
        got = multiply(layer, x, True, False, lp.format(f"1-5-2:emax={x_emax}"), torch.float32)
        assert torch.equal(got.double(), sums.double() * 2.0 ** (x_emax + w_emax - 9))


@gpu
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_pair_of_codes(block: int, transpose: bool, first: bool) -> None:
    """Sums of one term are that product, exactly: of each code of x, a token, and each of w, an output."""
    for x_format, w_format in (*PAIRS, *EDGES):
        x_fmt, w_fmt = lp.format(x_format), lp.format(w_format)
        parts = max(1 << w_fmt.bits >> block.bit_length() - 1, 1)  # blocks that hold all codes of w
        layer = Layer((3, 3), block, torch.bfloat16)
        layer.mask = torch.ones((parts, 1) if transpose else (1, parts), dtype=torch.bool, device="cuda")
        layer.blocks, layer.fmt = parts, w_fmt
        layer.tables = tables_of(layer.mask, parts, block)
        codes = torch.arange(parts * block, device="cuda").remainder(1 << w_fmt.bits).to(torch.uint8)
        layer.w = torch.zeros(parts, block, block, dtype=torch.uint8, device="cuda")
        layer.w[:, 5] = codes.view(parts, block)
        layer.w = layer.w.transpose(1, 2).contiguous() if transpose else layer.w
        x = torch.zeros(1 << x_fmt.bits, block, dtype=torch.uint8, device="cuda")
        x[:, 5] = torch.arange(len(x), device="cuda").to(torch.uint8)
        y = multiply(layer, x.T.contiguous() if first else x, first, transpose, x_fmt, torch.float32)
        left, right = (lp.decode(c, f, dtype=torch.float64) for c, f in ((x[:, 5], x_fmt), (codes, w_fmt)))
        exact = left[:, None] * right
        assert torch.equal((y.T if first else y).double().nan_to_num(7.0), exact.nan_to_num(7.0)), (x_format, w_format)


@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_shares_in_a_graph(block: int) -> None:
    layer = long_layer(3, block, "e4m3fn")
    x, _ = operand((150 * block, 300), layer.dtype, layer.fmt)
    dy, _ = operand((3 * block, 300), layer.dtype, layer.fmt)
    calls = [(x, False), (dy, True), (x[:, 100:], False)]

    def products() -> list[Tensor]:
        return [multiply(layer, each, True, turn, layer.fmt, torch.float32) for each, turn in calls]

    products()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = products()
    for _ in range(3):
        x.copy_(x.roll(1, 0))
        dy.copy_(dy.roll(1, 1))
        for each in got:
            each.fill_(float("nan"))
        graph.replay()
        assert all(map(torch.equal, got, products()))


@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_shares_on_two_streams(block: int) -> None:
    layer = long_layer(40, block, "e4m3fn")
    inputs = [operand((150 * block, 512), layer.dtype, layer.fmt)[0] for _ in range(2)]
    expected = [multiply(layer, x, True, False, layer.fmt, torch.float32) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for x, stream, results in zip(inputs, streams, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(multiply(layer, x, True, False, layer.fmt, torch.float32))
    torch.cuda.synchronize()
    for results, one in zip(got, expected, strict=True):
        assert all(torch.equal(each, one) for each in results)


@pytest.mark.sanitize
@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_any_strides(block: int) -> None:
    layer = Layer((5, 6), block, torch.bfloat16)
    x = torch.randn(2 * 33, 5 * block + 3, device="cuda").bfloat16()[::2, 3:]
    y = multiply(layer, x.contiguous(), False, False, None, torch.float32)
    assert torch.equal(multiply(layer, x, False, False, None, torch.float32), y)
    assert torch.equal(multiply(layer, x.T, True, False, None, torch.float32), y.T)
    expanded = x[:1].expand(70, -1)
    assert torch.equal(multiply(layer, expanded, False, False, None, torch.float32), y[:1].expand(70, -1))


@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_special_values(block: int) -> None:
    layer = Layer((3, 3), block, torch.bfloat16)
    layer.gate = torch.ones(layer.blocks, device="cuda")
    x = torch.ones(9, 3 * block, device="cuda").bfloat16()
    x[3, 0], x[5, 1], x[7, 2] = float("nan"), float("inf"), -float("inf")
    y = multiply(layer, x, False, False, None, torch.float32)
    row = layer.mask[0].repeat_interleave(block)
    assert y[3, row].isnan().all()
    assert y[[0, 1, 2, 4, 6, 8]].isfinite().all()
    assert not y[5, row].isfinite().any()
    assert not y[7, row].isfinite().any()
    assert y[:, ~row].isfinite().all()
    layer.gate.zero_()
    assert (multiply(layer, x, False, False, None, torch.float32).view(torch.int32) == 0).all()
    for fmt, code in (("e4m3fn", 0x7F), ("e5m2", 0x7E), ("e5m2", 0x7C), ("1-4-3:specials=fnuz", 0x80)):
        x = torch.zeros(9, 3 * block, device="cuda", dtype=torch.uint8)
        x[3, 0] = code
        for other in (None, "e4m3fn"):
            layer = Layer((3, 3), block, torch.bfloat16, other)
            y = multiply(layer, x, False, False, lp.format(fmt), torch.float32)
            assert not y[3, row].isfinite().any()
            assert (y[[0, 1, 2, 4, 5]] == 0).all()


@gpu
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_values(dtype: torch.dtype, first: bool) -> None:
    for block in BLOCKS:
        layer = Layer((5, 4), block, dtype, gated=True)
        for transpose in (False, True):
            features = layer.mask.shape[1 if transpose else 0] * block
            x = torch.randn(features, 37, device="cuda", dtype=dtype)
            y = multiply(layer, x if first else x.T, first, transpose, None, dtype)
            w = layer.dense().T if transpose else layer.dense()
            exact = w.T @ x.double()
            torch.testing.assert_close(
                (y if first else y.T).double(), exact, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12
            )


Product = tuple[Tensor, Tensor, Tensor, Tensor | None, int, bool, bool, list[int], list[int]]


def check_casts(product: Product, formats: tuple[str, ...], roundings: tuple[int, ...]) -> None:
    """Sums cast on the way out, or rounded to 16 bits, against float32 sums cast after it, to the bit."""
    seed, offset = torch.tensor(12345678901234567), torch.tensor(5)
    sums = _ops.sparse_matmul(*product, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = _ops.sparse_matmul(*product, dtype)
        assert torch.equal(narrow.nan_to_num(7.0), sums.to(dtype).nan_to_num(7.0))
    for name, rounding, saturate in itertools.product(formats, roundings, (False, True)):
        words = (seed, offset) if rounding == 6 else (None, None)
        for bits in (32, 16, 8) if rounding == 6 else (32,):
            how = (list(lp.format(name).fields), rounding, saturate, *words, bits)
            codes = _ops.sparse_matmul_cast(*product, *how, True, torch.float32)
            assert torch.equal(codes, _ops.encode(sums, *how)), (name, rounding, saturate, bits)
            for dtype in (torch.float32, torch.bfloat16, *((torch.float16,) if name in HALF_FORMATS else ())):
                values = _ops.sparse_matmul_cast(*product, *how, False, dtype)
                judge = _ops.quantize(sums, *how).to(dtype)
                assert values.dtype == dtype
                assert torch.equal(values.nan_to_num(7.0), judge.nan_to_num(7.0)), (name, rounding, saturate, dtype)


def product_of(layer: Layer, tokens: int, first: bool, x_format: str | None = None) -> Product:
    """A forward product of random numbers, one of them NaN where they are values."""
    x_fmt = lp.format(x_format) if x_format else None
    inputs, outputs = layer.mask.shape
    shape = (inputs * layer.block, tokens) if first else (tokens, inputs * layer.block)
    x, _ = operand(shape, layer.dtype, x_fmt)
    if not x_fmt:
        x[3, 5] = float("nan")
    return x, layer.w, layer.tables.fprop, layer.gate, outputs, first, False, fields(x_fmt), fields(layer.fmt)


@pytest.mark.sanitize
@gpu
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_cast_of_sums(block: int, first: bool) -> None:
    layer = Layer((5, 6), block, torch.bfloat16)
    for tokens in (40, 65):
        check_casts(product_of(layer, tokens, first), ("e4m3fn", "1-4-3:emax=3", "1-5-0", "bf16"), (0, 2, 6))


@gpu
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_casts_of_products_of_values(block: int, first: bool) -> None:
    """Rows that end within four neighbours, or begin there; tokens in parts of columns, and without."""
    layer = Layer((5, 6), block, torch.bfloat16)
    for tokens in (6, 65, 68, 131):
        check_casts(product_of(layer, tokens, first), CASTS, tuple(range(7)))


@gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_casts_of_products_of_codes(block: int, first: bool, gated: bool) -> None:
    layer = Layer((5, 6), block, torch.bfloat16, "1-4-3:emax=8", gated)
    for tokens in (7, 64, 66):
        check_casts(product_of(layer, tokens, first, "1-3-2"), CASTS, (0, 1, 5, 6))


@gpu
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_casts_of_parts(block: int, first: bool) -> None:
    layer = long_layer(5, block)
    for tokens in (33, 64, 125):
        check_casts(product_of(layer, tokens, first), ("1-4-3:emax=8", "e4m3fn", "bf16"), (0, 3, 6))


@gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_in_a_graph(block: int) -> None:
    layer = Layer((6, 6), block, torch.bfloat16)
    x = torch.randn(100, 6 * block, device="cuda").bfloat16()
    multiply(layer, x, False, False, None, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.tables = tables_of(layer.mask, layer.blocks, block)
        y = multiply(layer, x, False, False, None, torch.bfloat16)
    x.copy_(torch.randn_like(x))
    layer.mask.copy_(layer.mask.flip(0))
    graph.replay()
    layer.tables = tables_of(layer.mask, layer.blocks, block)
    assert torch.equal(y, multiply(layer, x, False, False, None, torch.bfloat16))


class TestManyTokens:
    """Blocks of 64 and many tokens, which Hopper multiplies by warpgroups."""

    TOKENS = (64, 65, 128, 192, 255, 256, 257, 512, 700)

    @staticmethod
    def layer(mask: Tensor, dtype: torch.dtype = torch.bfloat16) -> Layer:
        """With blocks enough for that kernel at any number of tokens from 64 on."""
        layer = Layer((3, 3), 64, dtype)
        layer.mask, layer.blocks = mask, int(mask.sum())
        assert layer.blocks >= 8 * 132
        layer.tables = tables_of(mask, layer.blocks, 64)
        layer.w, layer.w_values = operand((layer.blocks, 64, 64), dtype, None)
        return layer

    def random(self, dtype: torch.dtype = torch.bfloat16) -> Layer:
        return self.layer(Layer((60, 62), 64, dtype).mask, dtype)

    @gpu
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_values(self, dtype: torch.dtype, transpose: bool, first: bool) -> None:
        layer = self.random(dtype)
        for tokens in self.TOKENS:
            check(layer, tokens, first, transpose, None, torch.float32)
        for tokens in (256, 257, 300):
            check(layer, tokens, first, transpose, None, dtype)

    @gpu
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_codes(self, transpose: bool, first: bool) -> None:
        """Decoded beforehand from 512 tokens on."""
        layer = self.random()
        for x_format, w_format in (*PAIRS, ("1-5-2:subnormals=off", "p3109_k8p4")):
            layer.fmt = lp.format(w_format)
            layer.w, layer.w_values = operand((layer.blocks, 64, 64), layer.dtype, layer.fmt)
            for tokens in (511, 512, 700):
                check(layer, tokens, first, transpose, x_format, torch.float32)

    @pytest.mark.sanitize
    @gpu
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("transpose", [False, True])
    def test_few_items_of_many_shares(self, transpose: bool, first: bool) -> None:
        mask = torch.rand((900, 3), device="cuda") < torch.tensor([1.1, 0.0, 0.4], device="cuda")
        layer = self.layer(mask.T.contiguous() if transpose else mask)
        check(layer, 300, first, transpose, None, torch.float32)

    @gpu
    def test_mostly_empty(self) -> None:
        mask = torch.zeros((40, 200), dtype=torch.bool, device="cuda")
        mask[:, 150:178] = True
        layer = self.layer(mask)
        for first in (False, True):
            check(layer, 257, first, False, None, torch.bfloat16)

    @gpu
    @pytest.mark.parametrize("first", [False, True])
    def test_cast_of_sums(self, first: bool) -> None:
        layer = self.random()
        for tokens in (256, 257, 260):
            check_casts(product_of(layer, tokens, first), ("1-4-3:emax=8", "e4m3fn", "1-5-0", "bf16"), (0, 2, 6))

    @gpu
    def test_tokens_apart(self) -> None:
        """Other tokens' NaN, those of a tile's end and what lies beyond rows come into no sum."""
        layer = self.random()
        x = torch.randn(257, 60 * 64 + 11, device="cuda").bfloat16()
        x[[3, 255]] = float("nan")
        x[:, :3], x[:, -8:] = float("nan"), float("nan")
        x = x[:, 3:-8]
        y = multiply(layer, x, False, False, None, torch.float32)
        live = layer.mask.any(0).repeat_interleave(64)
        assert y[[3, 255]][:, live].isnan().all()
        assert (y[[3, 255]][:, ~live] == 0).all()
        kept = torch.ones(257, dtype=torch.bool, device="cuda")
        kept[[3, 255]] = False
        assert y[kept].isfinite().all()
        assert torch.equal(multiply(layer, x.contiguous(), False, False, None, torch.float32)[kept], y[kept])
        turned = multiply(layer, x.T, True, False, None, torch.float32).T
        assert torch.equal(turned[kept], y[kept])
        copied = multiply(layer, x.T.contiguous(), True, False, None, torch.float32).T
        assert torch.equal(copied[kept], y[kept])

    @gpu
    def test_in_a_graph(self) -> None:
        layer = self.layer(torch.rand((60, 60), device="cuda") < 0.4)
        x = torch.randn(300, 60 * 64, device="cuda").bfloat16()
        for transpose in (False, True):
            multiply(layer, x, False, transpose, None, torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tables = tables_of(layer.mask, layer.blocks, 64)
            layer.tables = tables
            y = multiply(layer, x, False, False, None, torch.bfloat16)
            y = multiply(layer, y, False, True, None, torch.bfloat16)
        layer.mask.copy_(layer.mask.roll(7, 0))
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            layer.tables = tables_of(layer.mask, layer.blocks, 64)
            again = multiply(layer, x, False, False, None, torch.bfloat16)
            assert torch.equal(y, multiply(layer, again, False, True, None, torch.bfloat16))


def test_plan() -> None:
    lengths = torch.tensor([3, 0, 90, 2, 70, 4, 0, 1])
    whole, parts = product_plan(lengths, 170, 64)
    assert whole[:, 0].tolist() == [2, 4, 0, 1, 3, 5, 6, 7]
    most = part_blocks(8, 170, 64)
    assert parts.shape == (8 + 170 // most, 4)
    used = parts[parts[:, 0] >= 0]
    for output, length in enumerate(lengths.tolist()):
        rows = used[used[:, 0] == output]
        assert rows[:, 3].eq(max(1, -(-length // most))).all()
        assert len(rows) == rows[0, 3]
        assert rows[:, 2].sum() == length
        assert rows[:, 2].max() <= most
        assert torch.equal(rows[1:, 1], rows[:-1, 1] + rows[:-1, 2])
        assert length == 0 or rows[0, 1] == lengths[:output].sum()
    whole, parts = product_plan(torch.zeros(4, dtype=torch.int64), 0, 8)
    assert whole.tolist() == parts.tolist() == [[i, 0, 0, 1] for i in range(4)]


@given(st.lists(st.integers(0, 200), min_size=1, max_size=60), st.sampled_from(BLOCKS))
def test_plan_of_shares(lengths: list[int], block: int) -> None:
    count, stage = SHARES[block]
    rows = share_plan(torch.tensor(lengths), block).tolist()
    begins = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    starts = [begin + stage * n for n, begin in enumerate(begins)]  # of outputs, in the line that shares cut
    assert len(rows) == count + 1
    for n, (output, *pairs) in enumerate(rows):
        place = n * starts[-1] // count
        assert starts[output] <= place
        assert output == len(lengths) or place < starts[output + 1]
        assert pairs == [begins[min(output + k, len(lengths))] for k in range(3)]
