"""What only the CUDA kernels of sums and products can get wrong: every way of a tile, edges, strides, sizes, graphs.

The CPU's kernels judge, which the other tests hold to the reference.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lowprec import _ops, reference_accumulate
from lowprec.accumulator import Accumulator
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal

pytestmark = pytest.mark.gpu

SEED, OFFSET = 12345678901234567, 5

# Of each kernel, and of each kind of format that one tells apart.
ACCUMULATORS = (
    *(
        "1-6-9",
        "1-4-3",
        "1-5-2:specials=ieee",
        "1-4-3:specials=fnuz overflow",
        "e4m3fn overflow",
        "p3109_k8p4 overflow",
    ),
    *("bf16", "bf16 saturate", "fp16", "1-8-20:specials=ieee", "1-7-21", "1-2-1", "1-5-0", "1-0-7", "fp32"),
    *(f"1-6-9 {mode}" for mode in Rounding),
    *(f"1-5-2:specials=ieee {mode}" for mode in Rounding),
    *(f"1-5-4:subnormals=off {mode}" for mode in Rounding),
    *("1-8-20:specials=ieee stochastic", "bf16 stochastic", "1-4-3:specials=fnuz stochastic overflow"),
    *("chunk64:1-6-9/fp32", "chunk10:1-6-9/1-6-9", "chunk7:1-5-2:specials=ieee/bf16", "chunk16:fp16/fp32"),
    *("chunk48:bf16/fp32", "chunk12:1-6-9 stochastic/1-6-9 stochastic", "16*1-6-9/3*bf16/fp32", "2*1-6-9 up"),
    *(f"pairwise:{fmt}" for fmt in ("1-6-9", "1-5-2", "1-4-3", "bf16", "bf16 saturate", "fp16", "fp32")),
    *(f"pairwise:{fmt}" for fmt in ("1-5-2:specials=ieee", "e4m3fn overflow", "1-4-3:specials=fnuz overflow")),
    *(f"pairwise:{fmt}" for fmt in ("1-8-15:specials=ieee", "1-7-21", "1-2-1", "1-5-4:subnormals=off")),
)

KINDS = ("random", "narrow", "ties", "subnormal", "sparse", "overflow", "special", "wide", "zeros", "mixed")


def numbers(kind: str, shape: tuple[int, ...], accumulator: Accumulator, left: bool) -> Tensor:
    """One operand, of a kind that a way of the kernels could get wrong."""
    fmt = accumulator.levels[0].fmt
    x = torch.randn(shape)
    if kind == "narrow":
        return (x * 4).round() / 4
    if kind == "ties":  # halves of a spacing, and what little above or below them a sum must not lose
        unit = 2.0 ** (-fmt.mbits - 1)
        parts = torch.tensor([1.0, unit, unit * (1 + 2**-20), unit * (1 - 2**-22), 1 + unit, 2.0**-40])
        return x.sign() if left else parts[torch.randint(6, shape)] * torch.exp2(torch.randint(-2, 3, shape).float())
    if kind == "subnormal":
        emin = 1 - fmt.bias
        half = emin // 2
        return x * 2.0 ** (half if left else emin - half - fmt.mbits + 1)
    if kind == "sparse":
        return torch.where(torch.rand(shape) < 0.5, x, x.sign() * 0.0)
    if kind == "overflow":
        return x * float(fmt.max) ** 0.5 / 4 if float(fmt.max) < 1e38 else x * 2.0**62
    if kind == "special":
        return torch.where(
            torch.rand(shape) < 0.001, torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.randint(3, shape)], x
        )
    if kind == "wide":  # beyond what scaling keeps exact, too
        return x * torch.exp2(torch.randint(-130, 120, shape).float())
    if kind == "zeros":
        return -x.sign() * 0.0
    if kind == "mixed":  # every tile of terms takes another way
        along = 1 if left else 0
        tiles = [
            numbers(each, part.shape, accumulator, left)
            for each, part in zip(itertools.cycle(KINDS[:9]), x.split(16, along), strict=False)
        ]
        return torch.cat(tiles, along)
    return x


def seeds(device: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(SEED, device=device), torch.tensor(OFFSET, device=device)


def same(got: Tensor, expected: Tensor, what: str) -> None:
    """The same bits, or NaN both."""
    got = got.cpu()
    assert torch.equal(got.isnan(), expected.isnan()), what
    assert_bits_equal(got.nan_to_num(0.0), expected.nan_to_num(0.0), what=what)


def check(a: Tensor, b: Tensor, accumulator: Accumulator, what: str = "") -> None:
    """The product on CUDA = the one on the CPU."""
    got = _ops.matmul(a.cuda(), b.cuda(), accumulator.fields, *seeds("cuda"))
    same(got, _ops.matmul(a, b, accumulator.fields, *seeds("cpu")), f"{accumulator} of {a.dtype}: {what}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ACCUMULATORS)
def test_every_way(text: str, kind: str) -> None:
    accumulator = Accumulator.parse(text)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = numbers(kind, (37, 164), accumulator, True), numbers(kind, (164, 21), accumulator, False)
        check(a.to(dtype)[None], b.to(dtype)[None], accumulator, kind)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "text", ["1-6-9", "1-6-9 up", "1-6-9 stochastic", "fp32", "chunk10:bf16/fp32", "fp16", "pairwise:1-6-9"]
)
def test_edges_of_tiles(text: str) -> None:
    """Rows and columns around a tile, terms around one and around a group of random words."""
    accumulator = Accumulator.parse(text)
    sides, terms = (1, 63, 65, 128, 129), (1, 3, 4, 15, 16, 17, 31, 33, 64)
    for dtype, rows, k in itertools.product((torch.float32, torch.float16, torch.bfloat16), sides, terms):
        columns = sides[(rows + k) % len(sides)]
        check(torch.randn(1, rows, k).to(dtype), torch.randn(1, k, columns).to(dtype), accumulator, f"{rows}, {k}")


@pytest.mark.parametrize("text", ["pairwise:1-6-9", "pairwise:e4m3fn overflow", "pairwise:fp32"])
def test_pairs_of_any_number_of_terms(text: str) -> None:
    """Short groups at every stage, within a tile and above, and terms that are all -0."""
    accumulator = Accumulator.parse(text)
    for i, k in enumerate((*range(1, 70), 127, 129, 255, 300, 4096, 4097)):
        kind = KINDS[i % len(KINDS)]
        check(
            numbers(kind, (5, k), accumulator, True)[None],
            numbers(kind, (k, 3), accumulator, False)[None],
            accumulator,
            f"{kind}, {k}",
        )
        check(torch.full((1, 1, k), -0.0), torch.ones(1, k, 1), accumulator, f"-0, {k}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["1-6-9", "1-6-9 stochastic", "fp16", "bf16", "pairwise:1-6-9"])
def test_strides_and_batches(text: str, dtype: torch.dtype) -> None:
    """Transposed, sliced from odd places, reversed in order of dimensions, and shared by all batches."""
    accumulator = Accumulator.parse(text)
    a, b = torch.randn(3, 70, 51).to(dtype), torch.randn(3, 51, 66).to(dtype)
    lefts = (a, a.mT.contiguous().mT, a.permute(2, 0, 1).contiguous().permute(1, 2, 0), a[:1].expand(3, -1, -1))
    rights = (b, b.mT.contiguous().mT, b.permute(1, 2, 0).contiguous().permute(2, 0, 1), b[1:2].expand(3, -1, -1))
    for left, right in itertools.product(lefts, rights):
        check(left, right, accumulator)
        check(left[:, 1:, 1:], right[:, 1:, 3:], accumulator)


def test_any_batch_split_gives_the_same_bits() -> None:
    a, b = torch.randn(4, 40, 100, device="cuda"), torch.randn(4, 100, 50, device="cuda")
    fields = Accumulator.parse("1-6-9").fields
    whole = _ops.matmul(a, b, fields, None, None)
    for i in range(4):
        assert_bits_equal(_ops.matmul(a[i : i + 1], b[i : i + 1], fields, None, None), whole[i : i + 1])
    rows = _ops.matmul(a[:, 7:8], b, fields, None, None)
    assert_bits_equal(rows, whole[:, 7:8])


@pytest.mark.parametrize("text", ["1-6-9", "1-6-9 stochastic", "bf16", "pairwise:1-6-9", "chunk64:1-6-9/fp32"])
def test_graphs_read_operands_and_seeds_when_they_run(text: str) -> None:
    accumulator = Accumulator.parse(text)
    a, b = torch.randn(1, 65, 72, device="cuda"), torch.randn(1, 72, 33, device="cuda")
    seed, offset = seeds("cuda")
    _ops.matmul(a, b, accumulator.fields, seed, offset)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _ops.matmul(a, b, accumulator.fields, seed, offset)
    for step in range(3):
        a.normal_()
        offset.fill_(step)
        graph.replay()
        same(out, _ops.matmul(a.cpu(), b.cpu(), accumulator.fields, seed.cpu(), offset.cpu()), f"{accumulator}, {step}")


def test_another_stream() -> None:
    a, b = torch.randn(1, 300, 64, device="cuda"), torch.randn(1, 64, 300, device="cuda")
    fields = Accumulator.parse("1-6-9").fields
    expected = _ops.matmul(a, b, fields, None, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = _ops.matmul(a, b, fields, None, None)
    stream.synchronize()
    assert_bits_equal(got, expected)


def needs_memory(gibibytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory")


def test_more_operands_than_2_31() -> None:
    needs_memory(24)
    terms, rows = 2100, 2**20
    a, b = torch.randn(1, 1, terms), torch.randn(1, terms, 2)
    fields = Accumulator.parse("1-6-9").fields
    got = _ops.matmul(a.cuda().expand(1, rows, terms), b.cuda(), fields, None, None)
    expected = _ops.matmul(a, b, fields, None, None).cuda()
    assert torch.equal(got, expected.expand(1, rows, 2))


@pytest.mark.parametrize("text", ["1-6-9", "1-6-9 stochastic"])
def test_more_results_than_2_31(text: str) -> None:
    needs_memory(24)
    accumulator = Accumulator.parse(text)
    rows, columns = 2**16, 2**15 + 130
    a, b = torch.randn(1, rows, 4), torch.randn(1, 4, columns)
    got = _ops.matmul(a.cuda(), b.cuda(), accumulator.fields, *seeds("cuda"))
    for row, column in ((rows - 1, columns - 1), (rows - 2, 7), (rows // 2, 0), (0, 1)):
        pairs = zip(a[0, row].tolist(), b[0, :, column].tolist(), strict=True)
        terms = [reference_accumulate.product(x, y, accumulator) for x, y in pairs]
        expected = reference_accumulate.accumulate(terms, accumulator, SEED, OFFSET, row * columns + column)
        assert got[0, row, column].item() == expected, (row, column)


@pytest.mark.parametrize("text", ["1-6-9", "pairwise:bf16", "1-6-9 stochastic", "exact:fp32", "chunk64:1-6-9/fp32"])
def test_sums(text: str) -> None:
    accumulator = Accumulator.parse(text)
    for dtype, shape in itertools.product(
        (torch.float64, torch.float32, torch.float16), ((1, 1000), (777, 65), (3, 1))
    ):
        x = torch.randn(shape).to(dtype)
        for each in (x, x.T.contiguous().T, x[::2, ::3]):
            got = _ops.accumulate(each.cuda(), accumulator.fields, *seeds("cuda"))
            same(got, _ops.accumulate(each, accumulator.fields, *seeds("cpu")), f"{accumulator} of {dtype} {shape}")
