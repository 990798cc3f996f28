"""Block-sparse layouts and products: against a dense oracle in float64, and to the bit where sums are declared."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec import reference_accumulate, sparse
from lowprec.accumulator import Accumulator
from lowprec.sparse import BlockLayout
from lowprec.testing import assert_bits_equal
from tests.graphs import captured

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TOKENS = (0, 1, 5, 67)


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def with_holes(rows: int, columns: int) -> Tensor:
    """A random mask, some rows and columns of which are empty, and one column is full."""
    mask = random_mask(rows, columns, 0.4)
    mask[:, columns // 2] = False
    mask[:, 0] = True
    mask[rows // 2] = False
    return mask


MASKS = {
    "one": torch.ones(1, 1, dtype=torch.bool),
    "none": torch.zeros(2, 3, dtype=torch.bool),
    "dense": torch.ones(3, 2, dtype=torch.bool),
    "wide": with_holes(3, 7),
    "tall": with_holes(9, 5),
}


def layouts(device: torch.device, *names: str) -> list[BlockLayout]:
    """Every mask, or those named, in every block size."""
    return [BlockLayout(MASKS[name].to(device), block) for name in names or MASKS for block in (8, 16, 32, 64)]


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def turned(x: Tensor, features: str) -> Tensor:
    """A tensor (N, C) with its features where they are asked for; contiguous."""
    return x.t().contiguous() if features == "first" else x


def assert_near(found: Tensor, exact: Tensor, size: Tensor, terms: int, dtype: torch.dtype) -> None:
    """Within the error of `terms` roundings in float32 (float64 of float64) and one in the result's dtype.

    `size` is the sum of the magnitudes of the terms.
    """
    carrier = UNIT[torch.float64] if dtype == torch.float64 else UNIT[torch.float32]
    bound = size * (terms + 2) * carrier * 1.01 + exact.abs() * UNIT[dtype] * 1.01 + torch.finfo(dtype).tiny
    assert found.dtype == dtype
    assert bool(((found.double() - exact).abs() <= bound).all())


# Layouts.


def test_the_tables(device: torch.device) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]], dtype=torch.bool, device=device)
    fprop, bprop, update, shape = BlockLayout(mask, 8).tables(device)
    assert shape == (2, 3)
    assert fprop.tolist()[:12] == [0, 1, 2, 4, 1, 2, 0, 0, 0, 1, 1, 3]
    assert bprop.tolist()[:11] == [0, 2, 4, 1, 0, 2, 1, 0, 2, 2, 3]
    assert update.tolist()[:8] == [0, 1, 0, 2, 1, 0, 1, 2]
    assert update.tolist()[8:12] == [0, 2, 1, 3]  # Morton codes 1, 4, 2, 6
    assert {each.dtype for each in (fprop, bprop, update)} == {torch.int32}


@pytest.mark.parametrize("name", MASKS)
def test_the_tables_of_any_mask(name: str, device: torch.device) -> None:
    mask = MASKS[name]
    layout = BlockLayout(mask.to(device), 8)
    places = mask.nonzero().tolist()
    assert layout.coordinates.tolist() == places
    for table, outputs, turn in (
        (layout.tables(device).fprop, mask.shape[1], 1),
        (layout.tables(device).bprop, mask.shape[0], 0),
    ):
        offsets, pairs = table.tolist()[: outputs + 1], table[outputs + 1 :].tolist()
        for output in range(outputs):
            expected = [(place[1 - turn], n) for n, place in enumerate(places) if place[turn] == output]
            flat = pairs[2 * offsets[output] : 2 * offsets[output + 1]]
            assert list(zip(flat[::2], flat[1::2], strict=True)) == expected


def test_what_a_layout_says() -> None:
    layout = BlockLayout(MASKS["wide"], 16)
    assert (layout.shape, layout.inputs, layout.outputs) == ((3, 7), 48, 112)
    assert layout.blocks == int(MASKS["wide"].sum())
    assert layout.density == layout.blocks / 21
    assert layout.flops(10) == 20 * layout.blocks * 256
    assert layout.weight_shape == layout.empty().shape == layout.zeros().shape
    assert f"3x7 blocks of 16, {layout.blocks} present" in repr(layout)


def test_a_layout_is_frozen_and_equal_by_value(tmp_path: Path) -> None:
    mask = MASKS["tall"].clone()
    layout = BlockLayout(mask, 16)
    mask[0, 0] = False  # a copy was taken
    assert layout == BlockLayout(MASKS["tall"], 16)
    assert layout != BlockLayout(MASKS["tall"], 32)
    assert layout != BlockLayout(mask, 16)
    with pytest.raises(AttributeError, match="frozen"):
        layout.block = 8
    assert copy.deepcopy(layout) is layout
    again = pickle.loads(pickle.dumps(layout))
    assert (again, hash(again)) == (layout, hash(layout))
    layout.save(tmp_path / "layout.npz")
    assert BlockLayout.load(tmp_path / "layout.npz") == layout
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="no block layout"):
        BlockLayout.load(tmp_path / "other.npz")


def test_dense_and_back(device: torch.device) -> None:
    for layout in layouts(device):
        w = numbers(*layout.weight_shape, dtype=torch.float32, device=device)
        dense = layout.to_dense(w)
        assert dense.shape == (layout.inputs, layout.outputs)
        assert_bits_equal(layout.from_dense(dense), w)
        blocks = dense.reshape(layout.shape[0], layout.block, layout.shape[1], layout.block)
        for n, (i, j) in enumerate(layout.coordinates.tolist()):
            assert_bits_equal(blocks[i, :, j], w[n])
        assert int((dense != 0).sum()) == w.numel()
        assert_bits_equal(layout.T.to_dense(layout.transpose(w)), dense.t())


def test_norms_are_those_of_the_columns(device: torch.device) -> None:
    for layout in layouts(device):
        w = numbers(*layout.weight_shape, dtype=torch.float64, device=device).requires_grad_()
        torch.testing.assert_close(layout.norm(w), layout.to_dense(w).norm(dim=0), rtol=1e-14, atol=0)
    layout = BlockLayout(MASKS["dense"].to(device), 8)
    w = numbers(*layout.weight_shape, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(layout.norm, w)


def test_identity_passes_features_on() -> None:
    layout = BlockLayout(MASKS["dense"], 8)  # 3 x 2 blocks: input block 2 stands on the diagonal again
    eye = torch.eye(8)
    expected = torch.stack([eye, 0 * eye, 0 * eye, eye, eye, 0 * eye])
    assert_bits_equal(layout.identity(), expected)
    square = BlockLayout(torch.eye(4, dtype=torch.bool) | random_mask(4, 4, 0.3), 16)
    assert_bits_equal(square.to_dense(square.identity(0.5, dtype=torch.float64)), 0.5 * torch.eye(64).double())


def test_orthogonal_columns() -> None:
    for layout in layouts(torch.device("cpu"), "tall", "wide"):
        w = layout.orthogonal(torch.Generator().manual_seed(3), dtype=torch.float64)
        assert_bits_equal(w, layout.orthogonal(torch.Generator().manual_seed(3), dtype=torch.float64))
        dense = layout.to_dense(w).unflatten(1, (-1, layout.block)).movedim(1, 0)
        for column, present in zip(dense, layout.mask.any(0).tolist(), strict=True):
            gram = torch.eye(layout.block) if present else torch.zeros(layout.block, layout.block)
            torch.testing.assert_close(column.t() @ column, gram.double(), rtol=0, atol=1e-13)


@pytest.mark.gpu
def test_tables_are_made_within_a_graph() -> None:
    """A mask that changes under replay, at the same number of blocks."""
    masks = [random_mask(30, 20, 0.2, seed).cuda() for seed in range(3)]
    budget = min(int(mask.sum()) for mask in masks)
    masks = [mask & (mask.flatten().cumsum(0).view(mask.shape) <= budget) for mask in masks]
    mask = masks[0].clone()
    sparse.BlockLayout(mask, 8, blocks=budget).tables("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables = sparse.BlockLayout(mask, 8, blocks=budget).tables(mask.device)
    for each in masks:
        mask.copy_(each)
        graph.replay()
        expected = sparse.BlockLayout(each, 8).tables("cuda")
        for found, wanted in zip(tables[:3], expected[:3], strict=True):
            assert_bits_equal(found, wanted)


# Products, against a dense product in float64.


@pytest.mark.parametrize("features", sparse.ops.FEATURES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_and_their_gradients(dtype: torch.dtype, features: str, device: torch.device) -> None:
    for layout in layouts(device):
        w = numbers(*layout.weight_shape, dtype=dtype, device=device).requires_grad_()
        dense = layout.to_dense(w.detach().double())
        where = layout.to_dense(torch.ones_like(w, dtype=torch.float64))
        for n in TOKENS:
            x = numbers(n, layout.inputs, dtype=dtype, device=device, seed=1)
            dy = numbers(n, layout.outputs, dtype=dtype, device=device, seed=2)
            given = turned(x, features).requires_grad_()
            y = sparse.matmul(given, w, layout, features=features)
            dx, dw = torch.autograd.grad(y, (given, w), turned(dy, features))
            _check(turned(y, features), x, dense, dtype, layout.inputs)
            _check(turned(dx, features), dy, dense.t(), dtype, layout.outputs)
            _check(layout.to_dense(dw), x.t(), dy, dtype, n, where)
            assert_bits_equal(sparse.input_grad(turned(dy, features), w.detach(), layout, features=features), dx)
            assert_bits_equal(sparse.weight_grad([(given, turned(dy, features))], layout, features=features), dw)


def _check(found: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, terms: int, where: Tensor | None = None) -> None:
    """A product of a and b, in all places or in some."""
    a, b = a.double(), b.double()
    exact, size = a @ b, a.abs() @ b.abs()
    if where is not None:
        exact, size = exact * where, size * where
    assert_near(found, exact, size, terms, dtype)


def test_features_of_any_number_of_dimensions_and_strides(device: torch.device) -> None:
    layout = BlockLayout(MASKS["wide"].to(device), 8)
    w = numbers(*layout.weight_shape, dtype=torch.float32, device=device)
    x = numbers(6, 5, layout.inputs, dtype=torch.float32, device=device)
    flat = sparse.matmul(x.reshape(30, -1), w, layout)
    assert_bits_equal(sparse.matmul(x, w, layout), flat.view(6, 5, -1))
    assert_bits_equal(sparse.matmul(x[0, 0], w, layout), flat[0])
    assert_bits_equal(sparse.matmul(x[::2, 1:4], w, layout), flat.view(6, 5, -1)[::2, 1:4])
    assert_bits_equal(sparse.matmul(x.transpose(0, 1), w, layout), flat.view(6, 5, -1).transpose(0, 1).contiguous())
    first = x.movedim(2, 0)
    assert_bits_equal(sparse.matmul(first, w, layout, features="first"), flat.t().reshape(-1, 6, 5))
    expanded = x[:1, :1].expand(6, 5, -1)
    assert_bits_equal(sparse.matmul(expanded, w, layout), flat[:1].expand(30, -1).reshape(6, 5, -1))
    turned_w = w.transpose(1, 2).contiguous().transpose(1, 2)
    assert_bits_equal(sparse.matmul(x, turned_w, layout), flat.view(6, 5, -1))


@pytest.mark.parametrize("features", sparse.ops.FEATURES)
def test_gradients_by_differences(features: str, device: torch.device) -> None:
    layout = BlockLayout(MASKS["wide"][:, :3].to(device), 8)
    w = numbers(*layout.weight_shape, dtype=torch.float64, device=device).requires_grad_()
    x = turned(numbers(3, layout.inputs, dtype=torch.float64, device=device), features).requires_grad_()

    def product(x: Tensor, w: Tensor) -> Tensor:
        return sparse.matmul(x, w, layout, features=features)

    assert torch.autograd.gradcheck(product, (x, w))
    assert torch.autograd.gradgradcheck(product, (x, w))


@pytest.mark.parametrize("features", sparse.ops.FEATURES)
def test_transforms(features: str, device: torch.device) -> None:
    """Samples side by side, gradients of each, and forward mode, over reverse too."""
    layout, first = BlockLayout(MASKS["wide"].to(device), 8), int(features == "first")
    w = numbers(*layout.weight_shape, dtype=torch.float64, device=device)
    x = numbers(4, 3, layout.inputs, dtype=torch.float64, device=device)
    x = x.transpose(1, 2).contiguous() if first else x
    gate = torch.linspace(0, 2, layout.blocks, device=device)

    def product(x: Tensor, w: Tensor, gate: Tensor | None = None) -> Tensor:
        return sparse.matmul(x, w, layout, features=features, gate=gate)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return product(x, w).square().sum()

    close: Any = torch.testing.assert_close
    close(torch.vmap(product, (0, None))(x, w), torch.stack([product(each, w) for each in x]))
    y = product(x[0], w)
    close(torch.vmap(product, (None, 0))(x[0], torch.stack([w, -w])), torch.stack([y, -y]))
    each = torch.vmap(torch.func.grad(loss, (0, 1)), (0, None))(x, w)
    for found, n in zip(each, (0, 1), strict=True):
        close(found, torch.stack([torch.func.grad(loss, n)(one, w) for one in x]))
    dx, dw, dgate = torch.randn_like(x[0]), torch.randn_like(w), torch.randn_like(gate)
    y, dy = torch.func.jvp(product, (x[0], w), (dx, dw))
    close((y, dy), (product(x[0], w), product(dx, w) + product(x[0], dw)))
    _, dy = torch.func.jvp(lambda gate: product(x[0], w, gate), (gate,), (dgate,))
    close(dy, product(x[0], w * dgate.double()[:, None, None]), rtol=1e-12, atol=1e-12)
    hessian = torch.func.jvp(torch.func.grad(loss), (x[0], w), (dx, dw))[1]
    step = 1e-6
    both = [torch.func.grad(loss)(x[0] + sign * step * dx, w + sign * step * dw) for sign in (1, -1)]
    close(hessian, (both[0] - both[1]) / (2 * step), rtol=1e-6, atol=1e-6)


# Gates.


@pytest.mark.parametrize("accumulator", [None, "1-6-9"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gates(dtype: torch.dtype, accumulator: str | None, device: torch.device) -> None:
    """They multiply weights; where one is closed, what x holds does not count."""
    layout = BlockLayout(MASKS["tall"].to(device), 8)
    w = numbers(*layout.weight_shape, dtype=dtype, device=device)
    gate = torch.linspace(-1.5, 2, layout.blocks, device=device)
    gate[::3] = 0
    x, dy = (numbers(5, n, dtype=dtype, device=device) for n in (layout.inputs, layout.outputs))
    by_hand = (w * gate.to(dtype)[:, None, None]).masked_fill(gate[:, None, None] == 0, 0)
    how: dict[str, Any] = {"accumulator": accumulator}
    assert torch.equal(sparse.matmul(x, w, layout, gate=gate, **how), sparse.matmul(x, by_hand, layout, **how))
    assert torch.equal(
        sparse.input_grad(dy, w, layout, gate=gate, **how), sparse.input_grad(dy, by_hand, layout, **how)
    )
    carrier = torch.promote_types(dtype, torch.float32)
    sums = sparse.weight_grad([(x, dy)], layout, dtype=carrier, **how)
    expected = (sums * gate.to(carrier)[:, None, None]).masked_fill(gate[:, None, None] == 0, 0).to(dtype)
    assert torch.equal(sparse.weight_grad([(x, dy)], layout, gate=gate, **how), expected)


def test_closed_gates_hide_nan(device: torch.device) -> None:
    layout = BlockLayout(torch.tensor([[True, True], [True, False]], device=device), 8)
    w, x = (numbers(*shape, dtype=torch.float32, device=device) for shape in (layout.weight_shape, (3, 16)))
    x[:, :8], w[1] = math.nan, math.inf
    gate = torch.tensor([0.0, 0.0, 1.0], device=device)
    y = sparse.matmul(x, w, layout, gate=gate)
    assert bool(y.isfinite().all())
    assert not bool(y[:, 8:].any())
    dw = sparse.weight_grad([(x, y)], layout, gate=gate)
    assert not bool(dw[:2].any())
    assert bool(dw[2].isfinite().all())


def test_the_gradient_of_gates(device: torch.device) -> None:
    layout = BlockLayout(MASKS["wide"][:, :3].to(device), 8)
    w = numbers(*layout.weight_shape, dtype=torch.float64, device=device).requires_grad_()
    x = numbers(3, layout.inputs, dtype=torch.float64, device=device).requires_grad_()
    gate = torch.linspace(0, 2, layout.blocks, device=device, requires_grad=True)
    y = sparse.matmul(x, w, layout, gate=gate)
    dense = x @ layout.to_dense(w * gate.double()[:, None, None])
    for found, expected in zip(
        torch.autograd.grad(y.square().sum(), (x, w, gate)),
        torch.autograd.grad(dense.square().sum(), (x, w, gate)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6 if found.dtype == torch.float32 else 1e-12, atol=1e-12)


# Declared sums, to the bit.

ACCUMULATORS = (
    "fp32",
    "1-5-2",
    "1-6-9 toward_zero",
    "chunk4:1-6-9/fp32",
    "pairwise:bf16",
    "exact:fp32",
    "1-6-9;product=bf16",
    "1-4-3 stochastic",
    "3*1-4-3 stochastic/fp32",
)


def by_reference(terms: list[tuple[list[float], list[float]]], accumulator: str, longest: int) -> list[float]:
    """The sums of outputs in row-major order, each of the products of two lists."""
    tree = Accumulator.parse(accumulator)
    rows = [[reference_accumulate.product(a, b, tree) for a, b in zip(*pair, strict=True)] for pair in terms]
    R = tree.roundings(longest)
    return [reference_accumulate.accumulate(row, tree, 7, 3, o, R) for o, row in enumerate(rows)]


def columns(x: Tensor, dense: Tensor, mask: Tensor, block: int, first: bool) -> list[tuple[list[float], list[float]]]:
    """The factors of each output of x @ dense in row-major order: of features whose block is present."""
    present = mask.repeat_interleave(block, 0)
    terms = {
        (n, c): (row[present[:, c // block]].tolist(), dense[present[:, c // block], c].tolist())
        for n, row in enumerate(x)
        for c in range(dense.shape[1])
    }
    order = sorted(terms, key=lambda place: place[::-1]) if first else sorted(terms)
    return [terms[place] for place in order]


@pytest.mark.parametrize("features", sparse.ops.FEATURES)
@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_declared_sums_are_those_of_the_reference(accumulator: str, features: str, device: torch.device) -> None:
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]], dtype=torch.bool)
    layout, first = BlockLayout(mask.to(device), 8), features == "first"
    dtypes = FLOATS[1:] if accumulator != "1-5-2" else FLOATS
    how: dict[str, Any] = {"features": features, "accumulator": accumulator, "seed": 7, "offset": 3}
    for dtype in dtypes:
        how["dtype"] = carrier = torch.promote_types(dtype, torch.float32)
        x, dy = (numbers(2, n, dtype=dtype, device=device) for n in (16, 24))
        w = numbers(*layout.weight_shape, dtype=dtype, device=device, seed=1)
        dense = layout.to_dense(w).cpu()
        y = sparse.matmul(turned(x, features), w, layout, **how)
        expected = by_reference(columns(x.cpu(), dense, mask, 8, first), accumulator, 16)
        assert_bits_equal(y.cpu().flatten(), torch.tensor(expected, dtype=carrier))
        dx = sparse.input_grad(turned(dy, features), w, layout, **how)
        expected = by_reference(columns(dy.cpu(), dense.t(), mask.t(), 8, first), accumulator, 16)
        assert_bits_equal(dx.cpu().flatten(), torch.tensor(expected, dtype=carrier))


@pytest.mark.parametrize("accumulator", ACCUMULATORS)
def test_declared_updates_are_those_of_the_reference(accumulator: str, device: torch.device) -> None:
    """As one sum over the tokens of all pairs."""
    layout = BlockLayout(torch.tensor([[1, 0], [1, 1]], dtype=torch.bool, device=device), 8)
    how: dict[str, Any] = {"accumulator": accumulator, "seed": 7, "offset": 3}
    pairs = [
        tuple(numbers(n, 16, dtype=torch.bfloat16, device=device, seed=n + side) for side in (0, 9)) for n in (3, 0, 2)
    ]
    x, dy = (torch.cat(side).cpu() for side in zip(*pairs, strict=True))
    terms = [
        (x[:, 8 * i + a].tolist(), dy[:, 8 * j + c].tolist())
        for i, j in layout.coordinates.tolist()
        for a in range(8)
        for c in range(8)
    ]
    expected = torch.tensor(by_reference(terms, accumulator, 5), dtype=torch.float32)
    dw = sparse.weight_grad(pairs, layout, dtype=torch.float32, **how)
    assert_bits_equal(dw.cpu().flatten(), expected)
    turned_pairs = [(a.t(), b.t()) for a, b in pairs]
    assert_bits_equal(sparse.weight_grad(turned_pairs, layout, features="first", dtype=torch.float32, **how), dw)


@pytest.mark.parametrize("accumulator", ["hopper_fp16@16:1-6-9", "hopper_fp8:fp32", "hopper_fp8@32:fp32"])
def test_declared_sums_of_tensor_core_models(accumulator: str, device: torch.device) -> None:
    layout = BlockLayout(torch.ones(5, 1, dtype=torch.bool, device=device), 16)
    native = "e4m3fn" if "fp8" in accumulator else None
    x, w = numbers(3, 80, dtype=torch.float32, device=device), layout.orthogonal(device=device)
    how: dict[str, Any] = {"accumulator": accumulator, "dtype": torch.float32}
    if native:
        x, w = (lp.encode(each, native).view(torch.float8_e4m3fn) for each in (x, w))
        expected = lp.matmul(x, w.view(80, 16), accumulator)
    else:
        x, w = x.bfloat16(), w.bfloat16()
        expected = lp.matmul(x, w.view(80, 16), accumulator)
    assert_bits_equal(sparse.matmul(x, w, layout, **how), expected)


def test_undeclared_float32_is_declared_fp32(device: torch.device) -> None:
    """So float32 has the same bits on every device."""
    layout = BlockLayout(MASKS["tall"].to(device), 16)
    x, w = (numbers(*shape, dtype=torch.float32, device=device) for shape in ((9, 144), layout.weight_shape))
    dy = numbers(9, layout.outputs, dtype=torch.float32, device=device)
    assert_bits_equal(sparse.matmul(x, w, layout), sparse.matmul(x, w, layout, accumulator="fp32"))
    assert_bits_equal(sparse.input_grad(dy, w, layout), sparse.input_grad(dy, w, layout, accumulator="fp32"))
    assert_bits_equal(sparse.weight_grad([(x, dy)], layout), sparse.weight_grad([(x, dy)], layout, accumulator="fp32"))
    on_cpu = BlockLayout(MASKS["tall"], 16)
    assert_bits_equal(sparse.matmul(x.cpu(), w.cpu(), on_cpu), sparse.matmul(x, w, layout).cpu())


@pytest.mark.parametrize("accumulator", ["1-6-9", "chunk8:1-5-2/fp32", "pairwise:1-6-9 stochastic"])
def test_a_layout_of_all_blocks_is_a_matrix(accumulator: str, device: torch.device) -> None:
    layout = BlockLayout(torch.ones(2, 3, dtype=torch.bool, device=device), 16)
    x = numbers(4, 32, dtype=torch.float32, device=device).requires_grad_()
    w = numbers(*layout.weight_shape, dtype=torch.float32, device=device).requires_grad_()
    dense = layout.to_dense(w.detach()).requires_grad_()
    y = sparse.matmul(x, w, layout, accumulator=accumulator, seed=5)
    expected = lp.matmul(x, dense, accumulator, seed=5)
    assert_bits_equal(y, expected)
    dx, dw = torch.autograd.grad(y, (x, w), y.detach())
    dx_dense, dw_dense = torch.autograd.grad(expected, (x, dense), y.detach())
    assert_bits_equal(dx, dx_dense)
    if "stochastic" not in accumulator:  # whose words go by the place in [blocks, block, block]
        assert_bits_equal(dw, layout.from_dense(dw_dense))


def test_each_gradient_has_its_own_accumulator_and_words(device: torch.device) -> None:
    layout = BlockLayout(MASKS["tall"].to(device), 8)
    x = numbers(4, layout.inputs, dtype=torch.float32, device=device).requires_grad_()
    w = numbers(*layout.weight_shape, dtype=torch.float32, device=device).requires_grad_()
    pair = ("1-5-2 stochastic", "1-4-3 stochastic")
    y = sparse.matmul(x, w, layout, accumulator="1-6-9", backward=pair, seed=5, offset=2)
    dy = torch.ones_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert_bits_equal(dx, sparse.input_grad(dy, w.detach(), layout, accumulator=pair[0], seed=5, offset=3))
    assert_bits_equal(dw, sparse.weight_grad([(x, dy)], layout, accumulator=pair[1], seed=5, offset=4))


# Codes and casts.

FORMATS = ("e4m3fn", "e5m2", "1-4-3:emax=8", "1-5-2:emax=1", "1-3-4", "e2m3fn", "e4m3fnuz", "1-4-3:subnormals=off")


@pytest.mark.parametrize("accumulator", [None, "1-6-9"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_multiply_as_their_values_do(fmt: str, accumulator: str | None, device: torch.device) -> None:
    layout = BlockLayout(MASKS["wide"].to(device), 16)
    x, dy = (numbers(5, n, dtype=torch.float32, device=device) for n in (layout.inputs, layout.outputs))
    w = numbers(*layout.weight_shape, dtype=torch.float32, device=device)
    cx, cw, cy = (lp.encode(each, fmt) for each in (x, w, dy))
    vx, vw, vy = (lp.decode(each, fmt, dtype=torch.bfloat16) for each in (cx, cw, cy))
    how: dict[str, Any] = {"accumulator": accumulator, "dtype": torch.float32}
    expected = sparse.matmul(vx, vw, layout, **how)
    assert torch.equal(sparse.matmul(cx, cw, layout, x_format=fmt, w_format=fmt, **how), expected)
    assert torch.equal(sparse.matmul(vx, cw, layout, w_format=fmt, **how), expected)
    assert torch.equal(sparse.matmul(cx, vw, layout, x_format=fmt, **how), expected)
    expected = sparse.input_grad(vy, vw, layout, **how)
    assert torch.equal(sparse.input_grad(cy, cw, layout, dy_format=fmt, w_format=fmt, **how), expected)
    expected = sparse.weight_grad([(vx, vy)], layout, **how)
    assert torch.equal(sparse.weight_grad([(cx, cy)], layout, x_format=fmt, dy_format=fmt, **how), expected)


def test_codes_of_two_formats_and_of_torchs_float8(device: torch.device) -> None:
    layout = BlockLayout(MASKS["wide"].to(device), 8)
    x = numbers(5, layout.inputs, dtype=torch.float32, device=device).to(torch.float8_e5m2)
    w = numbers(*layout.weight_shape, dtype=torch.float32, device=device).to(torch.float8_e4m3fn)
    y = sparse.matmul(x, w, layout)
    assert y.dtype == torch.float32
    codes = {"x_format": "e5m2", "w_format": "e4m3fn"}
    assert_bits_equal(y, sparse.matmul(x.view(torch.uint8), w.view(torch.uint8), layout, **codes))
    assert_bits_equal(y, sparse.matmul(x.bfloat16(), w.bfloat16(), layout, dtype=torch.float32))


@pytest.mark.parametrize("accumulator", [None, "chunk32:1-6-9/fp32"])
@pytest.mark.parametrize("how", [{}, {"rounding": "stochastic", "seed": 3, "random_bits": 16}, {"saturate": False}])
def test_casts_of_products(how: dict[str, Any], accumulator: str | None, device: torch.device) -> None:
    """They are those of the float32 sums."""
    layout = BlockLayout(MASKS["tall"].to(device), 16)
    x = numbers(7, layout.inputs, dtype=torch.bfloat16, device=device)
    w = numbers(*layout.weight_shape, dtype=torch.bfloat16, device=device)
    given: dict[str, Any] = {"accumulator": accumulator}
    sums = sparse.matmul(x, w, layout, dtype=torch.float32, **given)
    given["out_format"] = fmt = "1-5-2"
    assert_bits_equal(sparse.matmul(x, w, layout, **given, **how), lp.encode(sums, fmt, **how))
    values = sparse.matmul(x, w, layout, codes=False, dtype=torch.bfloat16, **given, **how)
    assert_bits_equal(values, lp.quantize(sums, fmt, **how).bfloat16())
    codes, statistics = sparse.matmul(x, w, layout, statistics=True, **given, **how)
    assert_bits_equal(codes, lp.encode(sums, fmt, **how))
    measured = lp.measure(sums, fmt, **how)
    assert_bits_equal(statistics.amax, measured.amax)
    assert_bits_equal(statistics.saturated, measured.saturated)


# Updates.


@pytest.mark.parametrize("features", sparse.ops.FEATURES)
def test_updates_over_lists(features: str, device: torch.device) -> None:
    layout = BlockLayout(MASKS["wide"].to(device), 16)
    where = layout.to_dense(torch.ones(layout.weight_shape, device=device, dtype=torch.float64))
    for count in (1, 2, 8, 9, 33):
        for dtype in (torch.float32, torch.bfloat16):
            tokens = [(7 * n + count) % 13 for n in range(count)]
            x, dy = (
                [numbers(n, size, dtype=dtype, device=device, seed=3 * i + n) for i, n in enumerate(tokens)]
                for size in (layout.inputs, layout.outputs)
            )
            pairs = [(turned(a, features), turned(b, features)) for a, b in zip(x, dy, strict=True)]
            dw = sparse.weight_grad(pairs, layout, features=features, dtype=torch.float32)
            _check(layout.to_dense(dw), torch.cat(x).t(), torch.cat(dy), torch.float32, sum(tokens), where)
            again = sparse.weight_grad(pairs, layout, features=features, dtype=torch.float32)
            assert_bits_equal(again, dw)


@pytest.mark.parametrize("accumulator", [None, "1-6-9"])
@pytest.mark.parametrize("out_dtype", FLOATS[1:], ids=str)
def test_updates_in_place(out_dtype: torch.dtype, accumulator: str | None, device: torch.device) -> None:
    layout = BlockLayout(MASKS["tall"].to(device), 8)
    pair = tuple(numbers(6, n, dtype=torch.bfloat16, device=device) for n in (layout.inputs, layout.outputs))
    sums = sparse.weight_grad([pair], layout, dtype=torch.float32, accumulator=accumulator)
    start = numbers(*layout.weight_shape, dtype=out_dtype, device=device)
    for beta in (1.0, 0.5, 0.3):
        out = start.clone()
        assert sparse.weight_grad([pair], layout, out=out, beta=beta, accumulator=accumulator) is out
        assert_bits_equal(out, (start.float() * beta + sums).to(out_dtype))
    out = torch.full_like(start, math.nan)
    sparse.weight_grad([pair], layout, out=out, accumulator=accumulator)
    assert_bits_equal(out, sums.to(out_dtype))


# torch.compile and CUDA graphs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype: torch.dtype, device: torch.device) -> None:
    layout = BlockLayout(MASKS["tall"].to(device), 16)
    x = numbers(7, layout.inputs, dtype=dtype, device=device).requires_grad_()
    w = numbers(*layout.weight_shape, dtype=dtype, device=device).requires_grad_()
    gate = torch.linspace(-1, 1, layout.blocks, device=device)

    def step(x: Tensor, w: Tensor) -> Tensor:
        return sparse.matmul(x * 2, w, layout).relu() + sparse.matmul(x, w, layout, gate=gate, accumulator="1-6-9")

    torch._dynamo.reset()
    y, again = step(x, w), torch.compile(step, fullgraph=True, backend="aot_eager")(x, w)
    assert_bits_equal(again, y)
    expected = torch.autograd.grad(y.sum(), (x, w))
    for one, other in zip(torch.autograd.grad(again.sum(), (x, w)), expected, strict=True):
        assert_bits_equal(one, other)


def test_compiled_codes(device: torch.device) -> None:
    layout = BlockLayout(MASKS["tall"].to(device), 16)
    fmt = "1-4-3:emax=8"
    x, w = (
        lp.encode(numbers(*shape, dtype=torch.float32, device=device), fmt)
        for shape in ((7, layout.inputs), layout.weight_shape)
    )

    def step(x: Tensor, w: Tensor) -> Tensor:
        return sparse.matmul(x, w, layout, x_format=fmt, w_format=fmt, out_format="1-5-2")

    torch._dynamo.reset()
    assert_bits_equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x, w), step(x, w))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured(dtype: torch.dtype) -> None:
    """Forward, backward and a list of updates replay on new inputs."""
    device = torch.device("cuda")
    layout = BlockLayout(random_mask(9, 11, 0.3).to(device), 16)
    w = numbers(*layout.weight_shape, dtype=dtype, device=device)
    x = numbers(70, layout.inputs, dtype=dtype, device=device)

    def step() -> tuple[Tensor, ...]:
        inputs, weights = x.detach().requires_grad_(), w.detach().requires_grad_()  # torch ties leaves to a stream
        y = sparse.matmul(inputs, weights, layout)
        dx, dw = torch.autograd.grad(y.sum(), (inputs, weights))
        both = sparse.weight_grad([(x, y.detach()), (x[:3], y.detach()[:3])], layout)
        return y.detach(), dx, dw, both, sparse.matmul(x, w, layout, accumulator="chunk8:1-6-9/fp32")

    graph, results = captured(step)
    for seed in range(3):
        x.copy_(numbers(*x.shape, dtype=dtype, device=device, seed=seed))
        graph.replay()
        for found, expected in zip([each.clone() for each in results], step(), strict=True):
            assert_bits_equal(found, expected)


# Errors.


def test_errors_of_layouts() -> None:
    mask = MASKS["wide"]
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch.float32"):
        BlockLayout(mask.float())
    with pytest.raises(TypeError, match="mask must be a bool tensor, got list"):
        BlockLayout([[True]])  # type: ignore[arg-type]
    for shape in ((3,), (0, 3), (2, 2, 2)):
        with pytest.raises(ValueError, match="mask must be"):
            BlockLayout(torch.zeros(shape, dtype=torch.bool))
    for block in (0, 4, 24, 128, 16.0, True):
        with pytest.raises(ValueError, match="block must be one of 8, 16, 32, 64"):
            BlockLayout(mask, block)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks must be an int"):
        BlockLayout(mask, blocks=22)
    layout = BlockLayout(mask, 8)
    with pytest.raises(ValueError, match=r"dense must have the shape \[inputs, outputs\] = \(24, 56\)"):
        layout.from_dense(torch.zeros(56, 24))
    with pytest.raises(ValueError, match=r"w must have the shape"):
        layout.to_dense(torch.zeros(1, 8, 8))


def test_errors_of_products(device: torch.device) -> None:
    layout = BlockLayout(MASKS["wide"].to(device), 8)
    x, w = torch.zeros(5, 24, device=device), layout.zeros(device=device)
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "layout must be a BlockLayout", lambda: sparse.matmul(x, w, MASKS["wide"])),  # type: ignore[arg-type]
        (ValueError, 'features must be "last"', lambda: sparse.matmul(x, w, layout, features="both")),
        (ValueError, "features the other axis", lambda: sparse.matmul(x.t(), w, layout)),
        (ValueError, "features the other axis", lambda: sparse.matmul(x, w, layout, features="first")),
        (ValueError, "24 inputs in its last", lambda: sparse.matmul(x[:, :8], w, layout)),
        (ValueError, "56 outputs in its last", lambda: sparse.input_grad(x, w, layout)),
        (ValueError, "at least one dimension", lambda: sparse.matmul(x[0, 0], w, layout)),
        (ValueError, "w must have the shape", lambda: sparse.matmul(x, w[1:], layout)),
        (ValueError, "one dtype", lambda: sparse.matmul(x, w.double(), layout)),
        (TypeError, "x must be a dense tensor", lambda: sparse.matmul(x.int(), w, layout)),
        (TypeError, "codes of x_format, uint8", lambda: sparse.matmul(x, w, layout, x_format="1-4-3")),
        (ValueError, "x_format must have up to 8 bits", lambda: sparse.matmul(x, w, layout, x_format="bf16")),
        (
            ValueError,
            "gate must be float32 of shape",
            lambda: sparse.matmul(x, w, layout, gate=torch.ones(3, device=device)),
        ),
        (ValueError, "give an out_format", lambda: sparse.matmul(x, w, layout, statistics=True)),
        (
            TypeError,
            "must be one of .* for hopper_fp16",
            lambda: sparse.matmul(x.double(), w.double(), layout, accumulator="hopper_fp16"),
        ),
        (ValueError, "backward must be", lambda: sparse.matmul(x, w, layout, backward=("fp32",) * 3)),  # type: ignore[arg-type]
        (ValueError, "at least one", lambda: sparse.weight_grad([], layout)),
        (ValueError, "same tokens", lambda: sparse.weight_grad([(x, torch.zeros(4, 56, device=device))], layout)),
        (
            ValueError,
            "give out",
            lambda: sparse.weight_grad([(x, torch.zeros(5, 56, device=device))], layout, beta=1.0),
        ),
        (
            ValueError,
            "cannot hold all values",
            lambda: sparse.matmul(x.half(), w.to(torch.float8_e5m2), layout, w_format="1-5-2:bias=30"),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_tensor_cores_are_on_gpus() -> None:
    layout = BlockLayout(MASKS["wide"], 8)
    x, w = torch.zeros(5, 24).bfloat16(), layout.zeros(dtype=torch.bfloat16)
    dy = torch.zeros(5, 56).bfloat16()
    for call in (
        lambda: sparse.matmul(x, w, layout, accumulator="tensor_core32"),
        lambda: sparse.matmul(x, w, layout, backward="tensor_core32"),
        lambda: sparse.matmul(x, w, layout, accumulator="tensor_core32", out_format="1-4-3"),
        lambda: sparse.weight_grad([(x, dy)], layout, accumulator="tensor_core32"),
    ):
        with pytest.raises(ValueError, match="need a CUDA device"):
            call()


def test_gates_must_be_finite() -> None:
    layout = BlockLayout(MASKS["wide"], 8)
    for bad in (math.nan, math.inf):
        gate = torch.ones(layout.blocks)
        gate[2] = bad
        with pytest.raises(ValueError, match="gate must be finite, got .* for block 2"):
            sparse.matmul(torch.zeros(5, 24), layout.zeros(), layout, gate=gate)


@pytest.mark.gpu
def test_operands_must_be_on_one_device() -> None:
    layout = BlockLayout(MASKS["wide"], 8)
    with pytest.raises(ValueError, match="on one device"):
        sparse.matmul(torch.zeros(5, 24, device="cuda"), layout.zeros(), layout)
