"""The CPU kernels of block-sparse products: the bits of the eager twin and of dense products, along every path.

Dense products under an accumulator are held to the reference elsewhere. NaN compares as NaN.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowprec import _ops, eager_sparse
from lowprec.accumulator import Accumulator
from lowprec.block_tables import Tables
from lowprec.eager_sparse import Operand
from lowprec.formats import float_format
from lowprec.sparse import BlockLayout
from lowprec.testing import assert_bits_equal

BLOCKS = (8, 16, 32, 64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED, OFFSET = torch.tensor(-(2**61) + 12345), torch.tensor(3)

ACCUMULATORS = (
    "fp32",  # multiply-adds
    "1-6-9",  # vectors, and the seldom kinds of rounding after them
    "chunk5:1-5-2 stochastic/fp32",
    "pairwise:1-6-9 up",
    "exact:bf16",  # integers
    "1-5-2;product=1-4-3",
)

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1], [1, 0, 0, 1, 1]], dtype=torch.bool)
"""A row and a column of nothing, columns of one to three blocks, rows of two and three neighbours."""

pytestmark = pytest.mark.usefixtures("one_thread")


def fields_of(text: str) -> list[int]:
    return Accumulator.parse(text).fields


def same(found: Tensor, expected: Tensor, what: object = "") -> None:
    """The same bits, or NaN both."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), what
    assert torch.equal(found.isnan(), expected.isnan()), what
    assert_bits_equal(found.nan_to_num(0.0), expected.nan_to_num(0.0), what=str(what))


def turned(x: Tensor, first: bool) -> Tensor:
    """A tensor [N, C] with its features where they are asked for; contiguous."""
    return x.t().contiguous() if first else x


def numbers(*shape: int) -> Tensor:
    """By numpy: torch draws other ones with other vectors."""
    return torch.from_numpy(np.random.standard_normal(shape))


class Layer:
    """Weights and gates of a mask: one gate closed, one that is 1, one that leaves weights below the normal ones."""

    def __init__(self, mask: Tensor, block: int, dtype: torch.dtype) -> None:
        self.layout = BlockLayout(mask, block)
        self.tables: Tables = self.layout.tables("cpu")
        self.w = numbers(*self.layout.weight_shape).to(dtype)
        self.gate = numbers(self.layout.blocks).float()
        self.gate[:3] = torch.tensor([0.0, 1.0, 1e-6])[: self.layout.blocks]

    def directions(self, tokens: int) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
        """Operands [N, C], tables, output blocks, and whether weights are transposed."""
        for transpose in (False, True):
            table, outputs = self.tables.direction(transpose)
            features = self.layout.outputs if transpose else self.layout.inputs
            yield numbers(tokens, features).to(self.w.dtype), table, outputs, transpose

    def pairs(self, *tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """x and dy, [N, C] each."""
        sizes = (self.layout.inputs, self.layout.outputs)
        x, dy = ([numbers(n, size).to(self.w.dtype) for n in tokens] for size in sizes)
        return x, dy


# The bits of the eager twin.


def kinds(block: int, first: bool) -> Iterator[tuple[Accumulator, Layer, Tensor | None, int]]:
    """Every accumulator with a layer in one of the dtypes, gated and not in turn, and a number of tokens."""
    for n, text in enumerate(ACCUMULATORS):
        turn = n + BLOCKS.index(block) + 2 * first
        layer = Layer(MASK, block, FLOATS[turn % 4])
        yield Accumulator.parse(text), layer, layer.gate if turn % 3 else None, (1, 5, 17)[turn % 3] * 8 // block + 1


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_declared_products(block: int, first: bool) -> None:
    for tree, layer, gate, tokens in kinds(block, first):
        for x, table, outputs, transpose in layer.directions(tokens):
            left, where = turned(x, first), (table, gate, outputs, first, transpose)
            found = _ops.sparse_matmul_accumulate(left, layer.w, *where, tree.fields, SEED, OFFSET, [], [])
            operands = Operand(left, None), Operand(layer.w, None)
            expected = eager_sparse.matmul_accumulate(*operands, *where, tree, SEED, OFFSET)
            same(found, expected, (tree, x.dtype, transpose, gate is None))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_declared_updates(block: int, first: bool) -> None:
    for tree, layer, gate, tokens in kinds(block, first):
        x, dy = ([turned(each, first) for each in side] for side in layer.pairs(tokens, 0, 1, 2))
        update, blocks = layer.tables.update, layer.layout.blocks
        where = (update, gate, blocks, block, first)
        found = _ops.sparse_weight_grad_accumulate(x, dy, *where, tree.fields, SEED, OFFSET, [], [])
        pairs = ([Operand(each, None) for each in side] for side in (x, dy))
        how = (update, blocks, gate, block, first, tree, SEED, OFFSET)
        same(found, eager_sparse.weight_grad_accumulate(*pairs, *how), (tree, layer.w.dtype, gate is None))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("accumulator", ["hopper_fp16@16:1-5-2 stochastic", "hopper_fp8:fp32"])
def test_models_of_tensor_cores(accumulator: str, first: bool) -> None:
    """Of codes that the model of fp8 takes as they are, and of gated ones and values, which it does not."""
    tree, fields = Accumulator.parse(accumulator), float_format("e4m3fn").fields
    layer = Layer(MASK, 8, torch.bfloat16)
    for gate, is_codes in ((None, False), (None, True), (layer.gate, True)):
        formats, fmt = ([fields, fields], float_format("e4m3fn")) if is_codes else ([[], []], None)
        w = torch.randint(120, layer.w.shape, dtype=torch.uint8) if is_codes else layer.w
        for x, table, outputs, transpose in layer.directions(3):
            x = torch.randint(120, x.shape, dtype=torch.uint8) if is_codes else x
            where = (table, gate, outputs, first, transpose)
            left = turned(x, first)
            found = _ops.sparse_matmul_accumulate(left, w, *where, tree.fields, SEED, OFFSET, *formats)
            operands = Operand(left, fmt), Operand(w, fmt)
            same(found, eager_sparse.matmul_accumulate(*operands, *where, tree, SEED, OFFSET))
        x, dy = ([turned(each, first) for each in side] for side in layer.pairs(3, 18))
        if is_codes:
            x, dy = ([torch.randint(120, each.shape, dtype=torch.uint8) for each in side] for side in (x, dy))
        layout, update = layer.layout, layer.tables.update
        found = _ops.sparse_weight_grad_accumulate(
            x, dy, update, gate, layout.blocks, 8, first, tree.fields, SEED, OFFSET, *formats
        )
        pairs = ([Operand(each, fmt) for each in side] for side in (x, dy))
        how = (update, layout.blocks, gate, 8, first, tree, SEED, OFFSET)
        same(found, eager_sparse.weight_grad_accumulate(*pairs, *how))


def test_tensor_core_leaves_need_the_hardware() -> None:
    layer = Layer(MASK, 8, torch.bfloat16)
    x, table, outputs, transpose = next(layer.directions(3))
    fields = fields_of("tensor_core16:fp32")
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        _ops.sparse_matmul_accumulate(x, layer.w, table, None, outputs, False, transpose, fields, None, None, [], [])


# The bits of dense products.


def dense_columns(x: Tensor, layer: Layer, transpose: bool, text: str) -> Tensor:
    """Every output block by the dense kernel, from [N, C]: float32 [N, outputs]."""
    mask, block = layer.layout.mask, layer.layout.block
    weights = layer.layout.to_dense(layer.w)
    mask, weights = (mask.t(), weights.t()) if transpose else (mask, weights)
    parts = []
    for j in range(mask.shape[1]):
        rows = mask[:, j].repeat_interleave(block)
        a, b = x[:, rows], weights[rows, j * block : (j + 1) * block]
        parts.append(_ops.matmul(a[None], b[None].contiguous(), fields_of(text), None, None)[0])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("block", BLOCKS)
def test_sums_past_the_sides_of_tiles(block: int) -> None:
    """Tokens short of a vector, a tile, and a region, and past them."""
    for dtype in FLOATS[:3]:
        layer = Layer(MASK, block, dtype)
        for tokens in (15, 16, 33, 130):
            for x, table, outputs, transpose in layer.directions(tokens):
                expected = dense_columns(x, layer, transpose, "fp32")
                for first in (False, True):
                    where = (turned(x, first), layer.w, table, None, outputs, first, transpose)
                    found = _ops.sparse_matmul_accumulate(*where, fields_of("fp32"), None, None, [], [])
                    same(found, turned(expected, first), (dtype, tokens, first))
                    rounded = _ops.sparse_matmul(*where, [], [], dtype)
                    same(rounded, turned(expected, first).to(dtype), (dtype, tokens, first))


def test_wide_layers() -> None:
    """Of which no more than a tile of tokens stays near a core."""
    mask = torch.zeros(200, 3, dtype=torch.bool)
    mask[::9, 0] = mask[150:, 2] = True
    layer = Layer(mask, 64, torch.float32)
    x, table, outputs, transpose = next(layer.directions(70))
    expected = dense_columns(x, layer, transpose, "fp32")
    for first in (False, True):
        where = (turned(x, first), layer.w, table, None, outputs, first, transpose)
        found = _ops.sparse_matmul_accumulate(*where, fields_of("fp32"), None, None, [], [])
        same(found, turned(expected, first))


@pytest.mark.parametrize("block", BLOCKS)
def test_updates_of_many_tokens(block: int) -> None:
    """More than are packed at once, in pairs of any length."""
    for dtype in FLOATS[:3]:
        layer = Layer(MASK, block, dtype)
        x, dy = layer.pairs(300, 1, 0, 400, 350)
        left, right = (torch.cat(side).unflatten(1, (-1, block)) for side in (x, dy))
        i, j = layer.layout.coordinates.unbind(1)
        a, b = left[:, i].permute(1, 2, 0), right[:, j].transpose(0, 1)
        for text in ("fp32", "bf16"):
            expected = _ops.matmul(a.contiguous(), b.contiguous(), fields_of(text), None, None)
            for first in (False, True):
                sides = ([turned(each, first) for each in side] for side in (x, dy))
                where = (layer.tables.update, None, layer.layout.blocks, block, first)
                found = _ops.sparse_weight_grad_accumulate(*sides, *where, fields_of(text), None, None, [], [])
                same(found, expected, (dtype, text, first))


def test_float64_sums() -> None:
    """Of integers, whose sums are exact in any order."""
    for block in BLOCKS:
        layer = Layer(MASK, block, torch.float64)
        layer.w = layer.w.mul(8).round()
        dense = layer.layout.to_dense(layer.w)
        for x, table, outputs, transpose in layer.directions(35):
            x = x.mul(8).round()
            expected = x @ (dense.t() if transpose else dense)
            for first in (False, True):
                where = (turned(x, first), layer.w, table, None, outputs, first, transpose, [], [])
                assert torch.equal(_ops.sparse_matmul(*where, torch.float64), turned(expected, first))
                rounded = _ops.sparse_matmul(*where, torch.float16)
                same(rounded, turned(expected, first).half())
        x, dy = layer.pairs(500, 40)
        x, dy = ([each.mul(8).round() for each in side] for side in (x, dy))
        where = (layer.tables.update, None, layer.layout.blocks, block, False)
        expected = layer.layout.from_dense(torch.cat(x).t() @ torch.cat(dy))
        assert torch.equal(_ops.sparse_weight_grad(x, dy, *where, [], [], torch.float64), expected)


# What goes before the sums, and after.


@pytest.mark.parametrize("first", [False, True])
def test_strides(first: bool) -> None:
    layer = Layer(MASK, 16, torch.float32)
    x, table, outputs, transpose = next(layer.directions(40))
    wide = numbers(40, 2 * x.shape[1]).float()
    where = (table, None, outputs, first, transpose)
    for text in ("fp32", "1-6-9"):
        how = (*where, fields_of(text), None, None, [], [])
        for each in (wide[:, ::2], x[::3], x[:1].expand(40, -1), x[:, :1].expand(-1, x.shape[1]), x.t().clone().t()):
            each = each.t() if first else each
            same(
                _ops.sparse_matmul_accumulate(each, layer.w, *how),
                _ops.sparse_matmul_accumulate(each.contiguous(), layer.w, *how),
            )
        strange = layer.w.transpose(0, 2).clone().transpose(0, 2)
        each = turned(x, first)
        same(_ops.sparse_matmul_accumulate(each, strange, *how), _ops.sparse_matmul_accumulate(each, layer.w, *how))


@pytest.mark.parametrize("block", [8, 64])
def test_signs_of_zeros_and_what_closed_blocks_hide(block: int) -> None:
    layer = Layer(torch.ones(2, 2, dtype=torch.bool), block, torch.float32)
    table, outputs = layer.tables.direction(False)
    x, w = torch.full((3, 2 * block), -0.0), torch.ones_like(layer.w)
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0])
    for text in ("fp32", "bf16", "1-6-9"):
        how = (fields_of(text), None, None, [], [])
        y = _ops.sparse_matmul_accumulate(x, w, table, None, outputs, False, False, *how)
        assert y.signbit().all()
        y = _ops.sparse_matmul_accumulate(x, w, table, gate, outputs, False, False, *how)
        assert y[:, :block].signbit().all()
        assert not y[:, block:].signbit().any()
        closed = torch.tensor([0.0, 0.0, 1.0, 1.0])
        strange = x.clone()
        strange[:, :block] = torch.tensor([torch.nan, torch.inf, -torch.inf])[:, None]
        y = _ops.sparse_matmul_accumulate(strange, w, table, closed, outputs, False, False, *how)
        assert not y.signbit().any()
        assert not y.any()


def test_nothing_to_do() -> None:
    empty = Layer(torch.zeros(2, 3, dtype=torch.bool), 8, torch.float32)
    for x, table, outputs, transpose in empty.directions(5):
        for text in ("fp32", "1-6-9"):
            how = (fields_of(text), None, None, [], [])
            y = _ops.sparse_matmul_accumulate(x, empty.w, table, None, outputs, False, transpose, *how)
            same(y, torch.zeros(5, outputs * 8))
    layer = Layer(MASK, 8, torch.float32)
    for text in ("fp32", "1-6-9"):
        how = (fields_of(text), None, None, [], [])
        for x, table, outputs, transpose in layer.directions(0):
            y = _ops.sparse_matmul_accumulate(x, layer.w, table, None, outputs, False, transpose, *how)
            assert y.shape == (0, outputs * 8)
        where = (layer.tables.update, None, layer.layout.blocks, 8, False)
        same(_ops.sparse_weight_grad_accumulate(*layer.pairs(0, 0), *where, *how), torch.zeros_like(layer.w))


@pytest.mark.parametrize(("left", "right"), [("e4m3fn", "e5m2"), ("1-5-2", None), (None, "1-2-1"), ("1-5-2", "1-4-3")])
def test_codes(left: str | None, right: str | None) -> None:
    layer = Layer(MASK, 16, torch.bfloat16)
    formats = [None if each is None else float_format(each) for each in (left, right)]
    fields = [[] if fmt is None else fmt.fields for fmt in formats]

    def drawn(x: Tensor, fmt: Any) -> Tensor:
        return x if fmt is None else torch.randint(2**fmt.bits, x.shape).to(torch.uint8)

    w = drawn(layer.w, formats[1])
    for x, table, outputs, transpose in layer.directions(9):
        x = drawn(x, formats[0])
        values = eager_sparse.values_of(*map(Operand, (x, w), formats))
        where = (table, layer.gate, outputs, False, transpose)
        same(
            _ops.sparse_matmul(x, w, *where, *fields, torch.float32),
            _ops.sparse_matmul(*values, *where, [], [], torch.float32),
        )
    (x,), (dy,) = layer.pairs(9)
    x, dy = drawn(x, formats[0]), drawn(dy, formats[1])
    a, b = eager_sparse.values_of(*map(Operand, (x, dy), formats))
    where = (layer.tables.update, layer.gate, layer.layout.blocks, 16, False)
    same(
        _ops.sparse_weight_grad([x], [dy], *where, *fields, torch.float32),
        _ops.sparse_weight_grad([a], [b], *where, [], [], torch.float32),
    )


@pytest.mark.parametrize("first", [False, True])
def test_casts(first: bool) -> None:
    layer, fields = Layer(MASK, 8, torch.float32), float_format("1-4-3").fields
    for x, table, outputs, transpose in layer.directions(20):
        where = (turned(x, first), layer.w, table, layer.gate, outputs, first, transpose, [], [])
        y = _ops.sparse_matmul(*where, torch.float32)
        for rounding, bits in ((0, 32), (6, 16)):
            how = (fields, rounding, True, SEED, OFFSET, bits)
            codes = _ops.sparse_matmul_cast(*where, *how, True, torch.float32)
            assert torch.equal(codes, _ops.encode(y, *how))
            for dtype in FLOATS[:3]:
                values = _ops.sparse_matmul_cast(*where, *how, False, dtype)
                assert_bits_equal(values, _ops.quantize(y, *how).to(dtype))


def test_updates_in_place() -> None:
    """beta · out and the sum are rounded each, then once into the dtype of out, whatever its strides."""
    for dtype in FLOATS:
        layer = Layer(MASK, 8, torch.bfloat16)
        x, dy = layer.pairs(4, 9)
        where = (layer.tables.update, layer.gate, layer.layout.blocks, 8, False, [], [])
        carrier = torch.float64 if dtype == torch.float64 else torch.float32
        sums = _ops.sparse_weight_grad(x, dy, *where, carrier)
        before = numbers(*layer.w.shape).to(carrier).to(dtype).transpose(1, 2)
        for beta in (0.0, 1.0, 0.3):
            out = before.clone(memory_format=torch.preserve_format)
            _ops.sparse_weight_grad_out(x, dy, *where, out, beta)
            assert_bits_equal(out, (sums + before.to(carrier) * beta if beta else sums).to(dtype))
    out = torch.full_like(layer.w, torch.nan)
    _ops.sparse_weight_grad_out(x, dy, *where, out, 0.0)
    assert not out.isnan().any()


# What must change nothing.


def results(layer: Layer, tokens: int) -> list[Tensor]:
    """Of every op."""
    found = []
    layout, tables = layer.layout, layer.tables
    for first in (False, True):
        for x, table, outputs, transpose in layer.directions(tokens):
            where = (turned(x, first), layer.w, table, layer.gate, outputs, first, transpose)
            found.append(_ops.sparse_matmul(*where, [], [], layer.w.dtype))
            for text in ("1-6-9", "1-5-2 stochastic"):
                found.append(_ops.sparse_matmul_accumulate(*where, fields_of(text), SEED, None, [], []))
        x, dy = ([turned(each, first) for each in side] for side in layer.pairs(tokens, 3))
        where = (x, dy, tables.update, layer.gate, layout.blocks, layout.block, first)
        found.append(_ops.sparse_weight_grad(*where, [], [], layer.w.dtype))
        found.append(_ops.sparse_weight_grad_accumulate(*where, fields_of("1-6-9"), None, None, [], []))
    return found


@pytest.mark.parametrize("block", [8, 32])
def test_threads_change_nothing(block: int) -> None:
    mask = torch.from_numpy(np.random.rand(9, 7) < 0.5)
    for dtype in (torch.float32, torch.float64):
        by_threads = []
        for threads in (1, 2):
            np.random.seed(1)
            torch.set_num_threads(threads)
            by_threads.append(results(Layer(mask, block, dtype), 70))
        for one, two in zip(*by_threads, strict=True):
            same(two, one)


_DIGEST = """
import hashlib, numpy, torch
from tests.test_sparse_cpu import BLOCKS, FLOATS, MASK, Layer, results
torch.set_num_threads(1)
numpy.random.seed(0)
digest = hashlib.sha256()
for block, dtype in zip((8, 16, 32, 64, 16, 8), (*FLOATS[:3], *FLOATS[:3])):
    for result in results(Layer(MASK, block, dtype), 256 // block + 5):
        digest.update(result.float().numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_change_nothing() -> None:
    """The same digest of results by AVX-512, by AVX2 and without vectors, on machines that have them."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env=os.environ | {"ATEN_CPU_CAPABILITY": name},
            capture_output=True,
            check=True,
        ).stdout
        for name in ("avx512", "avx2", "default")
    }
    assert len(digests) == 1


def test_flushing_denormals_changes_nothing_and_is_left_as_it_was() -> None:
    layer = Layer(MASK, 8, torch.float32)
    layer.w *= 1e-20
    layer.gate *= 1e-19
    np.random.seed(1)
    expected = results(layer, 40)
    assert torch.set_flush_denormal(True)
    try:
        np.random.seed(1)
        for found, want in zip(results(layer, 40), expected, strict=True):
            assert_bits_equal(found, want)
        assert (torch.full((64,), 1e-40) * 1).count_nonzero() == 0
    finally:
        torch.set_flush_denormal(False)


def test_tables_must_be_those_of_the_operands() -> None:
    layer = Layer(MASK, 8, torch.float32)
    x, table, outputs, transpose = next(layer.directions(4))
    how = (fields_of("fp32"), None, None, [], [])
    for place, value in ((1, 99), (outputs, -1), (outputs + 1, 4), (outputs + 2, -1)):
        wrong = table.clone()
        wrong[place] = value
        with pytest.raises(RuntimeError, match="the table is not that"):
            _ops.sparse_matmul_accumulate(x, layer.w, wrong, None, outputs, False, transpose, *how)
    with pytest.raises(RuntimeError, match="int32"):
        _ops.sparse_matmul_accumulate(x, layer.w, table.long(), None, outputs, False, transpose, *how)
    update = layer.tables.update.clone()
    update[1] = MASK.shape[1]
    where = (update, None, layer.layout.blocks, 8, False)
    with pytest.raises(RuntimeError, match="the table is not that"):
        _ops.sparse_weight_grad_accumulate(*layer.pairs(4), *where, *how)
