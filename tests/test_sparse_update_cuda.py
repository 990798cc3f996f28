"""What the CUDA kernels of the block-sparse update can get wrong: fragments, stages, strides, codes, parts, graphs.

The dense product in float64 judges. K terms of a tensor core lose at most a few of float32's last digits each, of the
sum of magnitudes; then the result is rounded once.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops, sparse
from lowprec.sparse import BlockLayout
from lowprec.testing import assert_bits_equal

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
BLOCKS = (8, 16, 32, 64)
FEATURES = ("last", "first")
EACH = list(itertools.product(BLOCKS, FEATURES))
TOKENS = (0, 1, 15, 63, 64, 65, 200)
HALVES = (torch.bfloat16, torch.float16)
RESULTS = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (
    *("e4m3fn", "e5m2", "1-4-3", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "p3109_k8p4", "e3m4", "1-5-2:bias=16"),
    *("1-5-2:subnormals=off", "1-4-3:emax=12", "1-2-1", "1-0-7", "1-1-6:bias=-3", "1-6-1:bias=40", "1-7-0:bias=60"),
    *("1-3-2:specials=ieee", "1-4-3:specials=fnuz,subnormals=off", "1-5-2:emax=1"),
)
PAIRS = (
    *itertools.product(("e4m3fn", "e5m2"), repeat=2),
    *(("1-4-3:emax=8", "1-5-2:emax=1"), ("1-5-2:emax=1", "1-6-1:bias=40"), ("1-2-5", "1-0-7")),
)
"""Of formats that stay codes until they are in registers."""


def layout_of(block: int, shape: tuple[int, int] = (13, 9), density: float = 0.4) -> BlockLayout:
    """Rectangular, with odd numbers of blocks, an empty row and an empty column, a full one of each."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(block)) < density
    mask[2], mask[:, 1] = True, True
    mask[-2], mask[:, -1] = False, False
    return BlockLayout(mask.to(CUDA), block)


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    g = torch.Generator(device=CUDA).manual_seed(seed)
    return torch.randn(shape, generator=g, device=CUDA).to(dtype)


def pair_of(layout: BlockLayout, tokens: int, features: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    sides = (layout.inputs, layout.outputs)
    x, dy = (
        values((n, tokens) if features == "first" else (tokens, n), dtype, 2 * seed + i) for i, n in enumerate(sides)
    )
    return x, dy


def judge(pairs: list[tuple[Tensor, Tensor]], layout: BlockLayout, features: str) -> tuple[Tensor, Tensor]:
    """The sums in float64, and those of magnitudes."""

    def summed(of: list[tuple[Tensor, Tensor]]) -> Tensor:
        products = [x @ dy.T if features == "first" else x.T @ dy for x, dy in of]
        return layout.from_dense(torch.stack(products).sum(0))

    exact = [(x.double(), dy.double()) for x, dy in pairs]
    return summed(exact), summed([(x.abs(), dy.abs()) for x, dy in exact])


def assert_close(found: Tensor, expected: Tensor, magnitudes: Tensor, terms: int) -> None:
    """Within what `terms` additions in float32 may lose, and one rounding into the result's dtype."""
    info = torch.finfo(found.dtype)
    bound = (terms + 8) * 2.0**-22 * magnitudes + expected.abs() * info.eps + info.smallest_normal * info.eps
    wrong = ((found.double() - expected).abs() > bound).sum()
    assert wrong == 0, f"{int(wrong)} of {found.numel()} elements"
    assert found.isfinite().all()


def check(layout: BlockLayout, pairs: list[tuple[Tensor, Tensor]], features: str, dtype: torch.dtype) -> None:
    found = sparse.weight_grad(pairs, layout, features=features, dtype=dtype)
    assert (found.dtype, found.shape) == (dtype, layout.weight_shape)
    terms = sum(x.shape[features == "first"] for x, _ in pairs)
    assert_close(found, *judge(pairs, layout, features), terms)


@pytest.mark.sanitize
@pytest.mark.parametrize(("block", "features"), EACH)
def test_every_dtype_and_number_of_tokens(block: int, features: str) -> None:
    layout = layout_of(block)
    for tokens, dtype, result in itertools.product(TOKENS, HALVES, RESULTS):
        check(layout, [pair_of(layout, tokens, features, dtype, tokens)], features, result)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (37, 41), (100, 90)])
def test_layouts_of_several_tiles(block: int, shape: tuple[int, int]) -> None:
    for density, features in itertools.product((0.02, 0.3, 1.0), FEATURES):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(block)) < density
        mask[0, 0] = True
        layout = BlockLayout(mask.to(CUDA), block)
        check(layout, [pair_of(layout, 70, features, torch.bfloat16, 1)], features, torch.bfloat16)


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_that_share_nothing(block: int) -> None:
    layout = BlockLayout(torch.eye(333, dtype=torch.bool, device=CUDA), block)
    for features in FEATURES:
        check(layout, [pair_of(layout, 130, features, torch.bfloat16, 1)], features, torch.float32)


@pytest.mark.sanitize
@pytest.mark.parametrize(("block", "features"), EACH)
def test_lists_of_pairs_of_different_lengths(block: int, features: str) -> None:
    layout = layout_of(block)
    for count in (1, 2, 3, 8, 33, 48, 49, 100):
        pairs = [pair_of(layout, (37 * i + 5 * count) % 150, features, torch.bfloat16, i) for i in range(count)]
        check(layout, pairs, features, torch.float32)


def test_long_sums_are_split() -> None:
    layout = BlockLayout(torch.ones(2, 3, dtype=torch.bool, device=CUDA), 32)
    for features, dtype in itertools.product(FEATURES, RESULTS):
        check(layout, [pair_of(layout, n, features, torch.bfloat16, n) for n in (3000, 0, 65, 5001)], features, dtype)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("block", [8, 16])
def test_more_tokens_than_the_cache_holds(block: int, features: str) -> None:
    """Small blocks take them by rounds, each of which adds to what those before it left."""
    layout = layout_of(block, (2400 // block, 2400 // block))
    tokens = int(2.3 * torch.cuda.get_device_properties(CUDA).L2_cache_size) // (layout.inputs + layout.outputs) // 2
    counts = (tokens // 24 * 8, 0, tokens // 7, 65, tokens // 16 * 8)
    pairs = [pair_of(layout, n, features, torch.bfloat16, i) for i, n in enumerate(counts)]
    sums = sparse.weight_grad(pairs, layout, features=features, dtype=torch.float32)
    assert_close(sums, *judge(pairs, layout, features), sum(counts))
    gate = torch.randn(layout.blocks, device=CUDA)
    gate[::3] = 0
    for result, beta, factor in itertools.product(RESULTS, (0.0, 0.5), (None, gate)):
        old = values(layout.weight_shape, result, 9) if beta else torch.full_like(sums, torch.nan, dtype=result)
        gated = sums if factor is None else torch.where(gate[:, None, None] == 0, 0.0, sums * gate[:, None, None])
        want = (gated + (old.float() * beta if beta else 0)).to(result)
        assert_bits_equal(sparse.weight_grad(pairs, layout, features=features, out=old, beta=beta, gate=factor), want)


@pytest.mark.sanitize
@pytest.mark.parametrize(("block", "features"), EACH)
def test_strides(block: int, features: str) -> None:
    layout = layout_of(block)
    x, dy = pair_of(layout, 70, features, torch.bfloat16, 3)
    expected = sparse.weight_grad([(x, dy)], layout, features=features)

    def views(t: Tensor) -> list[Tensor]:
        wide = torch.full((t.shape[0] + 3, 2 * t.shape[1] + 5), torch.nan, device=CUDA, dtype=t.dtype)
        inner = [wide[1 : 1 + t.shape[0], s : s + step * t.shape[1] : step] for s, step in ((0, 1), (3, 1), (1, 2))]
        for view in inner:
            view.copy_(t)
        return [t, t.T.contiguous().T, *inner]

    for left, right in zip(views(x), views(dy)[::-1], strict=True):
        left.copy_(x)
        right.copy_(dy)
        assert_bits_equal(sparse.weight_grad([(left, right)], layout, features=features), expected)
    one = values((1, 1)).expand(x.shape)
    found = sparse.weight_grad([(one, dy)], layout, features=features, dtype=torch.float32)
    assert_close(found, *judge([(one, dy)], layout, features), 70)


@pytest.mark.parametrize(("block", "features"), EACH)
def test_gates_and_what_out_held(block: int, features: str) -> None:
    layout = layout_of(block)
    pairs = [pair_of(layout, n, features, torch.bfloat16, n) for n in (40, 90)]
    sums = sparse.weight_grad(pairs, layout, features=features, dtype=torch.float32)
    gate = torch.randn(layout.blocks, device=CUDA)
    gate[::3] = 0
    gated = torch.where(gate[:, None, None] == 0, 0.0, sums * gate[:, None, None])
    for result, beta in itertools.product(RESULTS, (0.0, 1.0, 0.5)):
        for factor, expected in ((None, sums), (gate, gated)):
            old = values(layout.weight_shape, result, 9) if beta else torch.full_like(sums, torch.nan, dtype=result)
            want = (expected + (old.float() * beta if beta else 0)).to(result)
            for out in (old.clone(), old.transpose(1, 2).contiguous().transpose(1, 2)):
                given = sparse.weight_grad(pairs, layout, features=features, out=out, beta=beta, gate=factor)
                assert given is out
                assert_bits_equal(out, want)


def test_closed_gates_hide_what_is_not_finite() -> None:
    layout = layout_of(16)
    x, dy = pair_of(layout, 50, "last", torch.bfloat16, 1)
    x[:, :16] = torch.nan
    gate = torch.ones(layout.blocks, device=CUDA)
    gate[layout.coordinates[:, 0] == 0] = 0
    found = sparse.weight_grad([(x, dy)], layout, gate=gate)
    assert_bits_equal(found[gate == 0], torch.zeros_like(found[gate == 0]))
    assert found.isfinite().all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes(fmt: str) -> None:
    """Every code as it decodes, beside codes of another format and beside values; what is not finite, too."""
    form = lp.format(fmt)
    for block, features, tokens in itertools.product((8, 32), FEATURES, (64, 77)):
        layout = layout_of(block)
        codes = torch.randint(0, 1 << form.bits, (tokens, layout.inputs), device=CUDA, dtype=torch.uint8)
        other = lp.encode(values((tokens, layout.outputs)).float(), "e4m3fn")
        decoded, right = lp.decode(codes, fmt, dtype=torch.float32), lp.decode(other, "e4m3fn", dtype=torch.float32)
        if features == "first":
            codes, other, decoded, right = (t.T.contiguous() for t in (codes, other, decoded, right))
        finite = decoded.isfinite()
        expected, magnitudes = judge([(decoded.nan_to_num(0, 0, 0), right)], layout, features)
        clean = torch.where(finite, codes, 0)
        how = {"features": features, "x_format": fmt}
        found = sparse.weight_grad([(clean, other)], layout, dy_format="e4m3fn", **how)
        assert found.dtype == torch.float32
        assert_close(found, expected, magnitudes, tokens)
        bfloat16 = right.bfloat16()
        mixed = sparse.weight_grad([(clean, bfloat16)], layout, dtype=torch.float32, **how)
        assert_close(mixed, expected, magnitudes, tokens)
        found = sparse.weight_grad([(codes, other)], layout, dy_format="e4m3fn", **how)
        special = (
            layout.from_dense(
                (~finite).double() @ torch.ones_like(right).double().T
                if features == "first"
                else (~finite).double().T @ torch.ones_like(right).double()
            )
            > 0
        )
        assert torch.equal(found.isfinite(), ~special)


@pytest.mark.parametrize(("block", "features"), EACH)
def test_every_pair_of_codes(block: int, features: str) -> None:
    """Sums of one term are that product, exactly, special values too."""
    layout = BlockLayout(torch.ones(256 // block, 256 // block, dtype=torch.bool, device=CUDA), block)
    more = (("1-5-2:bias=100", "1-0-7:bias=5"), ("1-7-0:bias=60", "1-6-1:bias=62"), ("1-2-1", "1-5-2:emax=1"))
    special = (("e4m3fn", "1-5-2:emax=1"), ("1-5-2:emax=1", "e5m2"), ("1-5-2:specials=ieee,bias=30", "p3109_k8p4"))
    for x_format, dy_format in (*PAIRS, *more, *special):
        x, dy = (torch.zeros(16, 256, dtype=torch.uint8, device=CUDA) for _ in range(2))
        for to, fmt in ((x, x_format), (dy, dy_format)):
            to[5] = torch.arange(256, device=CUDA).remainder(1 << lp.format(fmt).bits).to(torch.uint8)
        left, right = (lp.decode(c[5], f, dtype=torch.float64) for c, f in ((x, x_format), (dy, dy_format)))
        pair = (x.T.contiguous(), dy.T.contiguous()) if features == "first" else (x, dy)
        how = {"features": features, "x_format": x_format, "dy_format": dy_format}
        found = sparse.weight_grad([pair], layout, dtype=torch.float32, **how)
        expected = layout.from_dense(left[:, None] * right)
        assert torch.equal(found.double().nan_to_num(7.0), expected.nan_to_num(7.0)), (x_format, dy_format)


@pytest.mark.parametrize(("block", "features"), EACH)
def test_codes_wherever_they_lie(block: int, features: str) -> None:
    """In rows of 16 bytes they stay bytes until they are in registers, in others they do not: the same bits."""
    layout = layout_of(block)
    gate = torch.linspace(-1, 1, layout.blocks, device=CUDA)

    def at(codes: Tensor, place: int) -> Tensor:
        wide = codes.new_full((len(codes), (codes.shape[1] + 31) // 16 * 16), 0x3C)
        view = wide[:, place : place + codes.shape[1]]
        view.copy_(codes)
        return view

    for x_format, dy_format in PAIRS:
        tokens = (16, 80, 200, 31)
        wide = [pair_of(layout, n, features, torch.float32, n) for n in tokens]
        pairs = [(lp.encode(x, x_format), lp.encode(dy, dy_format)) for x, dy in wide]
        how = {"features": features, "x_format": x_format, "dy_format": dy_format}
        for result, factor in itertools.product(RESULTS, (None, gate)):
            aligned, beside, apart = (
                sparse.weight_grad([(f(x), f(dy)) for x, dy in pairs], layout, gate=factor, dtype=result, **how)
                for f in (lambda t: at(t, 0), lambda t: at(t, 8), lambda t: t.T.contiguous().T)
            )
            assert_bits_equal(aligned, beside)
            assert_bits_equal(aligned, apart)


def test_strided_codes() -> None:
    for features in FEATURES:
        layout = layout_of(8)
        x, dy = pair_of(layout, 50, features, torch.float32, 1)
        codes, other = lp.encode(x, "e4m3"), lp.encode(dy, "e5m2")
        how = {"features": features, "x_format": "e4m3", "dy_format": "e5m2"}
        expected = sparse.weight_grad([(codes, other)], layout, **how)
        found = sparse.weight_grad([(codes.T.contiguous().T, other.T.contiguous().T)], layout, **how)
        assert_bits_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_values(dtype: torch.dtype) -> None:
    """One weight a thread: the op takes float32 as well, which the public function sums as declared."""
    for block, first, counts in itertools.product((8, 64), (False, True), ([7], [30, 0, 5], [2] * 60)):
        layout = layout_of(block)
        features = FEATURES[first]
        pairs = [pair_of(layout, n, features, dtype, i) for i, n in enumerate(counts)]
        where = (layout.tables(CUDA).update, None, layout.blocks, block, first, [], [])
        xs, dys = (list(each) for each in zip(*pairs, strict=True))
        found = _ops.sparse_weight_grad(xs, dys, *where, dtype)
        expected, magnitudes = judge(pairs, layout, features)
        bound = (sum(counts) + 2) * torch.finfo(dtype).eps * magnitudes
        assert bool(((found.double() - expected).abs() <= bound).all())


def test_the_same_bits_again() -> None:
    layout = layout_of(8, (70, 60), 0.1)
    for features, counts in itertools.product(FEATURES, ([512], [64, 65, 3] * 11, [9000])):
        pairs = [pair_of(layout, n, features, torch.bfloat16, i) for i, n in enumerate(counts)]
        first, second = (sparse.weight_grad(pairs, layout, features=features) for _ in range(2))
        assert_bits_equal(first, second)


def test_graph_capture() -> None:
    layout = layout_of(16)
    pairs = [pair_of(layout, n, "last", torch.bfloat16, n) for n in (64, 33, 1)]
    out = torch.zeros(layout.weight_shape, device=CUDA)
    sparse.weight_grad(pairs, layout, out=out, beta=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse.weight_grad(pairs, layout, out=out, beta=0.0)
        rounded = sparse.weight_grad(pairs, layout, dtype=torch.float16)
    for x, _ in pairs:
        x.neg_()
    graph.replay()
    expected = sparse.weight_grad(pairs, layout, dtype=torch.float32)
    assert_bits_equal(out, expected)
    assert_bits_equal(rounded, expected.half())
