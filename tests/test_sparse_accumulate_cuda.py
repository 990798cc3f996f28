"""What only the CUDA kernels of block-sparse sums can get wrong: tiles, gathers, tails, strides, sizes, graphs.

Where nothing is drawn, the dense kernels judge by gathered operands, which their own tests hold to the CPU's; else the
CPU, which the other tests hold to the reference.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lowprec import _ops
from lowprec.accumulate import tree
from lowprec.accumulator import Accumulator
from lowprec.block_tables import Tables, tables_of
from lowprec.formats import format as lookup
from tests.test_accumulate_cuda import KINDS, numbers, same, seeds

pytestmark = pytest.mark.gpu
sanitize = pytest.mark.sanitize

BLOCKS = (8, 16, 32, 64)
WAYS = tuple(itertools.product((False, True), (False, True)))  # features first, transposed

QUICK = ("fp32", "1-6-9", "1-5-2", "1-5-2:specials=ieee", "e4m3fn overflow", "bf16", "chunk10:1-6-9/fp32")
OTHERS = (
    *("1-6-9 up", "1-6-9 stochastic", "1-5-4:subnormals=off", "1-4-3 to_odd", "bf16 toward_zero", "fp16"),
    *(
        "chunk12:1-6-9 stochastic/1-6-9 stochastic",
        "16*1-6-9/3*bf16/fp32",
        "pairwise:bf16",
        "pairwise:1-6-9 stochastic",
    ),
    *("exact:fp32", "exact:1-6-9 stochastic", "fp32;product=bf16", "1-5-2 stochastic;product=1-4-3"),
    *("hopper_fp16:fp32", "hopper_fp16@32:1-6-9", "hopper_fp8@64:bf16 stochastic", "hopper_fp8:2*1-6-9"),
)


class Layer:
    """A mask of some blocks, one row and one column of it empty; and its tables."""

    def __init__(self, block: int, inputs: int = 5, outputs: int = 4) -> None:
        self.block, self.inputs, self.outputs = block, inputs, outputs
        self.mask = torch.rand(inputs, outputs) < 0.6
        self.mask[1], self.mask[:, 1] = False, False
        self.mask[0, 0] = True
        self.blocks = int(self.mask.sum())

    def tables(self, device: str) -> Tables:
        return tables_of(self.mask.to(device), self.blocks, self.block)

    def product(
        self, x: Tensor, w: Tensor, transpose: bool, first: bool, accumulator: Accumulator, **rest: object
    ) -> Tensor:
        table, outputs = self.tables(x.device.type).direction(transpose)
        gate, formats = rest.get("gate"), rest.get("formats", ([], []))
        words = seeds(x.device.type)
        return _ops.sparse_matmul_accumulate(
            x, w, table, gate, outputs, first, transpose, accumulator.fields, *words, *formats
        )

    def update(
        self, x: list[Tensor], dy: list[Tensor], first: bool, accumulator: Accumulator, **rest: object
    ) -> Tensor:
        gate, formats = rest.get("gate"), rest.get("formats", ([], []))
        device = x[0].device.type
        return _ops.sparse_weight_grad_accumulate(
            x, dy, self.tables(device).update, gate, self.blocks, self.block, first, accumulator.fields,
            *seeds(device), *formats,
        )  # fmt: skip

    def operands(
        self, kind: str, tokens: int, transpose: bool, first: bool, accumulator: Accumulator
    ) -> tuple[Tensor, Tensor]:
        features = (self.outputs if transpose else self.inputs) * self.block
        x = numbers(kind, (tokens, features), accumulator, True)
        w = numbers(kind, (self.blocks * self.block, self.block), accumulator, False)
        return x.t().contiguous() if first else x, w.view(self.blocks, self.block, self.block)


def to_cuda(arguments: dict[str, object]) -> dict[str, object]:
    return {name: each.cuda() if isinstance(each, Tensor) else each for name, each in arguments.items()}


def gathered(layer: Layer, x: Tensor, w: Tensor, transpose: bool, first: bool, accumulator: Accumulator) -> Tensor:
    """The product column by column through the dense kernels."""
    mask = layer.mask.t() if transpose else layer.mask
    names = torch.zeros_like(layer.mask, dtype=torch.long)
    names[layer.mask] = torch.arange(layer.blocks)
    names = names.t() if transpose else names
    x = x.t() if first else x
    columns = []
    for j in range(mask.shape[1]):
        inputs = mask[:, j].nonzero().squeeze(1).tolist()
        if not inputs:
            columns.append(torch.zeros(x.shape[0], layer.block, device=x.device))
            continue
        left = torch.cat([x[:, i * layer.block : (i + 1) * layer.block] for i in inputs], 1)
        blocks = [w[names[i, j]] for i in inputs]
        right = torch.cat([each.t() if transpose else each for each in blocks])
        columns.append(tree(left[None], right[None], accumulator.fields, None, None)[0])
    y = torch.cat(columns, 1)
    return y.t() if first else y


def gathered_update(layer: Layer, x: list[Tensor], dy: list[Tensor], first: bool, accumulator: Accumulator) -> Tensor:
    """The update as part of the dense one."""
    left, right = torch.cat(x, int(first)), torch.cat(dy, int(first))
    left, right = (left, right.t()) if first else (left.t(), right)
    dense = tree(left[None], right[None], accumulator.fields, None, None)[0]
    return dense.unflatten(0, (-1, layer.block)).unflatten(2, (-1, layer.block)).transpose(1, 2)[layer.mask.cuda()]


def check_product(layer: Layer, x: Tensor, w: Tensor, transpose: bool, first: bool, text: str, **rest: object) -> None:
    accumulator = Accumulator.parse(text)
    on_cuda = (x.cuda(), w.cuda(), transpose, first, accumulator)
    if rest or accumulator.is_stochastic:
        expected = layer.product(x, w, transpose, first, accumulator, **rest)
    else:
        expected = gathered(layer, *on_cuda).cpu()
    got = layer.product(*on_cuda, **to_cuda(rest))
    same(got, expected, f"{text}, block {layer.block}, {tuple(x.shape)}, {transpose=}, {first=}, {x.dtype}")


def check_update(layer: Layer, x: list[Tensor], dy: list[Tensor], first: bool, text: str, **rest: object) -> None:
    accumulator = Accumulator.parse(text)
    on_cuda = ([each.cuda() for each in x], [each.cuda() for each in dy], first, accumulator)
    if rest or accumulator.is_stochastic:
        expected = layer.update(x, dy, first, accumulator, **rest)
    else:
        expected = gathered_update(layer, *on_cuda).cpu()
    got = layer.update(*on_cuda, **to_cuda(rest))
    same(got, expected, f"{text}, block {layer.block}, {[tuple(each.shape) for each in x]}, {first=}, {x[0].dtype}")


def pairs(
    layer: Layer, kind: str, tokens: tuple[int, ...], first: bool, accumulator: Accumulator
) -> tuple[list[Tensor], list[Tensor]]:
    """Operands of an update."""
    x = [numbers(kind, (n, layer.inputs * layer.block), accumulator, True) for n in tokens]
    dy = [numbers(kind, (layer.outputs * layer.block, n), accumulator, False).t() for n in tokens]
    return tuple([each.t().contiguous() if first else each.contiguous() for each in side] for side in (x, dy))  # type: ignore[return-value]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("text", QUICK)
def test_products_by_tiles(text: str, block: int) -> None:
    layer = Layer(block)
    for (first, transpose), kind in zip(itertools.cycle(WAYS), KINDS, strict=False):
        for tokens in (67, 130) if kind == "random" else (67,):
            operands = layer.operands(kind, tokens, transpose, first, Accumulator.parse(text))
            check_product(layer, *operands, transpose, first, text)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("text", QUICK)
def test_updates_by_tiles(text: str, block: int) -> None:
    layer = Layer(block)
    for first, kind in zip(itertools.cycle((False, True)), KINDS, strict=False):
        operands = pairs(layer, kind, (35,) if first else (3, 30, 8), first, Accumulator.parse(text))
        check_update(layer, *operands, first, text)


@pytest.mark.parametrize("text", OTHERS)
def test_every_accumulator(text: str) -> None:
    layer, accumulator = Layer(8), Accumulator.parse(text)
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if accumulator.leaf != "exact" else (torch.float32,)
    for (first, transpose), dtype in zip(WAYS, itertools.cycle(dtypes), strict=False):
        x, w = layer.operands("random", 5, transpose, first, accumulator)
        check_product(layer, x.to(dtype), w.to(dtype), transpose, first, text)
    x, dy = (side[0].to(dtypes[-1]) for side in pairs(layer, "sparse", (21,), False, accumulator))
    check_update(layer, [x, x], [dy, dy], False, text)


@pytest.mark.parametrize("tokens", [1, pytest.param(5, marks=sanitize), 64, pytest.param(67, marks=sanitize), 130])
@pytest.mark.parametrize("text", ["fp32", "1-6-9", "1-6-9 stochastic"])
def test_edges(text: str, tokens: int) -> None:
    """Tokens around those of a tile, in both layouts, and alone."""
    drawn = "stochastic" in text
    for block in (8,) if drawn else (8, 64):
        layer, accumulator = Layer(block, 3, 3), Accumulator.parse(text)
        for first, transpose in WAYS if tokens <= 5 or not drawn else ():
            check_product(
                layer, *layer.operands("random", tokens, transpose, first, accumulator), transpose, first, text
            )
        for first in (False, True):
            check_update(layer, *pairs(layer, "random", (tokens, 3), first, accumulator), first, text)


def test_many_rows_of_few_weights() -> None:
    """Updates of a diagonal: all weights of a block of threads have inputs of their own."""
    layer = Layer(8, 40, 40)
    layer.mask = torch.eye(40, dtype=torch.bool)
    layer.blocks = 40
    for first, text in itertools.product((False, True), ("fp32", "1-6-9")):
        check_update(layer, *pairs(layer, "random", (37,), first, Accumulator.parse(text)), first, text)


@pytest.mark.parametrize("text", ["fp32", "1-6-9", "pairwise:fp32", "hopper_fp16@16:fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates(dtype: torch.dtype, text: str) -> None:
    """A closed block counts as +0, whatever x holds there; others are multiplied first, and rounded."""
    layer, accumulator = Layer(16), Accumulator.parse(text)
    gate = torch.randn(layer.blocks)
    gate[::3] = 0
    gate[-1] = -0.0
    for first, transpose in WAYS:
        x, w = layer.operands("sparse", 9, transpose, first, accumulator)
        x.view(-1)[::7] = torch.nan
        check_product(layer, x.to(dtype), w.to(dtype), transpose, first, text, gate=gate)
    x, dy = (side[0].to(dtype) for side in pairs(layer, "random", (9,), False, accumulator))
    check_update(layer, [x], [dy], False, text, gate=gate)


@pytest.mark.parametrize("text", ["fp32", "1-6-9", "hopper_fp8@32:fp32", "exact:fp32"])
def test_codes(text: str) -> None:
    layer, accumulator = Layer(16), Accumulator.parse(text)
    for left, right in (
        ("1-4-3", "1-4-3"),
        ("e4m3fn", "e5m2"),
        ("1-4-3", ""),
        ("", "1-2-5"),
        ("p3109_k8p4", "e4m3fnuz"),
    ):
        formats = [lookup(name).fields if name else [] for name in (left, right)]
        for first, transpose in WAYS:
            x, w = layer.operands("random", 7, transpose, first, accumulator)
            x = torch.randint(256, x.shape).to(torch.uint8) if left else x.half()
            w = torch.randint(256, w.shape).to(torch.uint8) if right else w.half()
            check_product(layer, x, w, transpose, first, text, formats=formats)
        x, dy = (side[0].half() for side in pairs(layer, "random", (11,), False, accumulator))
        x = torch.randint(256, x.shape).to(torch.uint8) if left else x
        dy = torch.randint(256, dy.shape).to(torch.uint8) if right else dy
        check_update(layer, [x], [dy], False, text, formats=formats)


@pytest.mark.parametrize(
    "text", ["1-6-9", "1-10-20:specials=ieee", "exact:1-6-9", "chunk10:1-5-2 stochastic/1-10-20:specials=ieee"]
)
def test_float64(text: str) -> None:
    layer, accumulator = Layer(8), Accumulator.parse(text)
    gate = torch.randn(layer.blocks)
    for first, transpose in WAYS:
        x, w = layer.operands("random", 4, transpose, first, accumulator)
        check_product(layer, x.double() / 3, w.double() / 7, transpose, first, text, gate=gate)
    x, dy = (side[0].double() / 3 for side in pairs(layer, "random", (6,), True, accumulator))
    check_update(layer, [x], [dy], True, text, gate=gate)


def test_strides_and_alignment() -> None:
    layer, accumulator = Layer(8), Accumulator.parse("fp32")
    x, w = layer.operands("random", 9, False, False, accumulator)
    shifted = torch.randn(9, x.shape[1] + 1)[:, 1:]
    for view in (x[::2], x.t().contiguous().t(), shifted, x.flip(0)[:, :], torch.randn(9, 2 * x.shape[1])[:, ::2]):
        check_product(layer, view, w, False, False, "fp32")
        check_product(layer, view.t(), w.transpose(1, 2), False, True, "fp32")
        check_update(layer, [view], [torch.randn(view.shape[0], layer.outputs * 8)], False, "fp32")


def test_nothing() -> None:
    layer = Layer(8)
    for text, first in itertools.product(("fp32", "1-6-9", "exact:fp32"), (False, True)):
        shape = (layer.inputs * 8, 0) if first else (0, layer.inputs * 8)
        other = (layer.outputs * 8, 0) if first else (0, layer.outputs * 8)
        check_product(layer, torch.empty(shape), torch.randn(layer.blocks, 8, 8), False, first, text)
        check_update(layer, [torch.empty(shape)], [torch.empty(other)], first, text)
    layer.mask, layer.blocks = torch.zeros(3, 2, dtype=torch.bool), 0
    check_product(layer, torch.randn(5, 24), torch.empty(0, 8, 8), False, False, "fp32")


@pytest.mark.parametrize("text", ["fp32", "1-6-9 stochastic"])
def test_graph(text: str) -> None:
    """A replayed graph follows the tables, the operands and the seed that it finds."""
    layer, accumulator = Layer(16), Accumulator.parse(text)
    x, w = (each.cuda() for each in layer.operands("random", 33, False, False, accumulator))
    tables, (seed, offset) = layer.tables("cuda"), seeds("cuda")

    def product() -> Tensor:
        fields = accumulator.fields
        return _ops.sparse_matmul_accumulate(x, w, tables.fprop, None, 4, False, False, fields, seed, offset, [], [])

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = product()
    x.copy_(x.flip(0))
    seed.add_(1)
    graph.replay()
    assert torch.equal(replayed, product())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "text", ["tensor_core16:fp32", "tensor_core64:fp32", "tensor_core48:1-6-9", "tensor_core16:1-5-2 up"]
)
def test_tensor_core_leaves(text: str, block: int) -> None:
    layer, accumulator = Layer(block), Accumulator.parse(text)
    for dtype, (first, transpose), kind in zip((torch.bfloat16, torch.float16) * 2, WAYS, KINDS, strict=False):
        x, w = (each.to(dtype) for each in layer.operands(kind, 70, transpose, first, accumulator))
        check_product(layer, x, w, transpose, first, text)
    for first, dtype in ((False, torch.bfloat16), (True, torch.float16)):
        x_list, dy_list = pairs(layer, "random", (29, 12), first, accumulator)
        halves = [[each.to(dtype) for each in side] for side in (x_list, dy_list)]
        check_update(layer, *halves, first, text)
