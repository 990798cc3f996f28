"""The kernels of `accumulate` and `matmul` = the eager twin = the judge, to the bit, along every path they have.

NaN compares as NaN. Shapes lie around the sides of tiles, numbers where sums tie, cancel, overflow and underflow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowprec import _ops, eager_accumulate, reference_accumulate
from lowprec.accumulator import Accumulator, Level
from lowprec.formats import float_format
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal, special_values
from tests.strategies import dtypes, fits, formats, modes, words64

SEED, OFFSET = -(2**62) + 12345678901, 3

ACCUMULATORS = (
    *(f"1-6-9 {mode}" for mode in Rounding),
    *(f"1-5-10:specials=ieee {mode}" for mode in Rounding),  # overflows to infinity
    *(f"1-4-3:subnormals=off {mode}" for mode in Rounding),
    *(f"1-4-3:specials=fnuz {mode} overflow" for mode in Rounding),  # to NaN, and without -0
    *(f"fp32 {mode}" for mode in Rounding),
    "fp32 saturate",
    "bf16",
    "bf16 saturate",
    "bf16 stochastic",
    "tf32",
    "1-8-21:specials=ieee",
    "1-8-22:specials=ieee",  # one digit too many for two roundings
    "1-2-1",
    "1-5-0",  # ties by the exponent
    "1-0-7",  # fixed point
    "1-5-18 stochastic",
    "1-4-2:bias=100",  # below float32's normal numbers
    "chunk5:1-6-9/fp32",
    "chunk4:1-5-2 stochastic/1-8-5:specials=ieee stochastic",
    "3*1-6-9/5*bf16 down/2*fp32",
    "1*bf16/3*1-5-2",
    "pairwise:1-6-9",
    "pairwise:1-6-9 stochastic",
    "exact:1-6-9",
    "exact:1-5-2 stochastic",
    "1-6-9;product=1-4-3",
)
"""One or more for each path of the kernels, and for each reason to take the slowest."""

WIDE = (
    "1-6-9",
    "1-11-20:specials=ieee",
    "1-11-12:specials=ieee stochastic",
    "1-9-20 to_odd",
    "pairwise:1-8-23:specials=ieee",
    "exact:1-10-21",
)
"""Those of float64 besides."""

SHAPES = ((1, 3, 5), (2, 1, 17), (1, 4, 33), (1, 5, 31), (1, 66, 3), (1, 2, 130), (20, 1, 1))
"""Of results: short of a vector, a tile and a block, and past them."""

KINDS = ("random", "wide", "ties", "near_ties", "cancelling", "special", "tiny")


def numbers(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    """Numbers on the CPU, of one kind of trouble."""
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "wide":
        x *= torch.exp2(torch.randint(-30, 30, shape).double())
    if kind == "ties":
        x = torch.randint(-9, 10, shape) * torch.exp2(torch.randint(-9, 3, shape).double())
    if kind == "near_ties":  # halves of many spacings, and products with a last digit far below them
        last = torch.randint(-1, 2, shape) * torch.finfo(dtype).eps
        x = x.sign() * (1 + last) * torch.exp2(-torch.randint(0, 13, shape).double())
    if kind == "cancelling":
        x = torch.where(torch.rand(shape) < 0.5, x.sign() * 1000, x * torch.exp2(torch.randint(-20, 0, shape).double()))
    if kind == "special":
        values = special_values(dtype).double()
        chosen = values[torch.randint(len(values), shape)]
        rare = torch.rand(shape) < (0.02 if shape[-1] > 16 else 0.2)
        x = torch.where(rare | (torch.rand(shape) < 0.3), torch.where(rare, chosen, x.sign() * 0.0), x)
    if kind == "tiny":
        x *= torch.finfo(dtype).smallest_normal * 2.0 ** (torch.finfo(dtype).bits // 8)
    return x.to(dtype)


def same(got: Tensor, expected: Tensor, what: str) -> None:
    """The same bits, or NaN both."""
    got = got.cpu()
    assert torch.equal(got.isnan(), expected.isnan()), what
    assert_bits_equal(got.nan_to_num(0.0), expected.nan_to_num(0.0), what=what)


def seeds(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(SEED, device=device), torch.tensor(OFFSET, device=device)


def judged(a: Tensor, b: Tensor, accumulator: Accumulator, outputs: list[int]) -> list[float]:
    """What the judge says of a few outputs, by their row-major index."""
    rows, columns = a.shape[1], b.shape[2]
    results = []
    for output in outputs:
        batch, row, column = output // columns // rows, output // columns % rows, output % columns
        pairs = zip(a[batch, row].tolist(), b[batch, :, column].tolist(), strict=True)
        terms = [reference_accumulate.product(x, y, accumulator) for x, y in pairs]
        results.append(reference_accumulate.accumulate(terms, accumulator, SEED, OFFSET, output))
    return results


def check_matmul(
    a: Tensor, b: Tensor, accumulator: Accumulator, device: torch.device, judge: int, twin: bool = True
) -> None:
    """The op on a device = the twin, and the judge at so many outputs."""
    what = f"{accumulator} of {a.dtype} {tuple(a.shape)} x {tuple(b.shape)}"
    got = _ops.matmul(a.to(device), b.to(device), accumulator.fields, *seeds(device)).cpu()
    if twin:
        same(got, eager_accumulate.matmul(a, b, accumulator, torch.tensor(SEED), torch.tensor(OFFSET)), what)
    outputs = torch.randint(got.numel(), (judge,)).tolist()
    expected = torch.tensor(judged(a, b, accumulator, outputs), dtype=torch.float64).to(got.dtype)
    same(got.flatten()[outputs], expected, f"{what}, judged")


@st.composite
def accumulators(draw: st.DrawFn, dtype: torch.dtype) -> Accumulator:
    """Any accumulator whose formats the sums' dtype holds."""
    carrier = torch.float64 if dtype == torch.float64 else torch.float32
    fmts = formats(dtype=carrier)
    saturate = st.sampled_from([None, True, False])
    fans = [*draw(st.lists(st.integers(1, 5), max_size=2)), draw(st.sampled_from([None, 2, 3]))]
    exact = draw(st.integers(0, 7)) == 0
    levels = [Level(fan, draw(fmts), draw(modes), draw(saturate)) for fan in ([None] if exact else fans)]
    product = draw(fmts) if draw(st.integers(0, 5)) == 0 else None
    assume(all(fits(level.fmt, carrier) for level in levels))
    return Accumulator(levels, product, leaf="exact" if exact else "terms")


@settings(max_examples=60)
@given(data=st.data(), dtype=dtypes, kind=st.sampled_from(KINDS), terms=st.integers(0, 20), seed=words64)
@pytest.mark.usefixtures("one_thread")
def test_anything_matches_the_judge(
    device: torch.device, data: st.DataObject, dtype: torch.dtype, kind: str, terms: int, seed: int
) -> None:
    accumulator = data.draw(accumulators(dtype))
    torch.manual_seed(seed % 2**32)
    a, b = numbers((2, 2, terms), dtype, kind), numbers((2, terms, 2), dtype, kind)
    check_matmul(a, b, accumulator, device, judge=3)


@pytest.mark.parametrize("text", ACCUMULATORS)
@pytest.mark.usefixtures("one_thread")
def test_every_path_in_float32(device: torch.device, text: str) -> None:
    accumulator = Accumulator.parse(text)
    for kind, (batch, rows, columns) in zip(KINDS, SHAPES, strict=True):
        a, b = numbers((batch, rows, 19), torch.float32, kind), numbers((batch, 19, columns), torch.float32, kind)
        check_matmul(a, b, accumulator, device, judge=4)
    a, b = numbers((1, 67, 530), torch.float32, "wide"), numbers((1, 530, 131), torch.float32, "wide")
    check_matmul(a, b, accumulator, device, judge=1, twin=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", [*ACCUMULATORS[:4], "bf16", "1-5-10:specials=ieee", "fp32", "1-5-2 stochastic"])
@pytest.mark.usefixtures("one_thread")
def test_other_dtypes(device: torch.device, text: str, dtype: torch.dtype) -> None:
    for kind in ("random", "special", "tiny"):
        a, b = numbers((1, 5, 33), dtype, kind), numbers((1, 33, 18), dtype, kind)
        check_matmul(a, b, Accumulator.parse(text), device, judge=4)


@pytest.mark.parametrize("text", WIDE)
@pytest.mark.usefixtures("one_thread")
def test_formats_that_only_float64_holds(device: torch.device, text: str) -> None:
    for kind in KINDS:
        scale = 2.0 ** int(torch.randint(-600, 480, ()))
        a, b = numbers((1, 5, 20), torch.float64, kind) * scale, numbers((1, 20, 18), torch.float64, kind)
        check_matmul(a, b, Accumulator.parse(text), device, judge=4)


@pytest.mark.parametrize("text", ["1-6-9", "chunk64:bf16 stochastic/fp32", "pairwise:1-5-10", "exact"])
@pytest.mark.usefixtures("one_thread")
def test_long_sums(device: torch.device, text: str) -> None:
    x = numbers((2, 20_000), torch.float32, "random")
    accumulator = Accumulator.parse(text)
    got = _ops.accumulate(x.to(device), accumulator.fields, *seeds(device))
    terms = [reference_accumulate.term(value) for value in x[1].tolist()]
    expected = reference_accumulate.accumulate(terms, accumulator, SEED, OFFSET, 1)
    same(got[1:], torch.tensor([expected]), text)


@pytest.mark.parametrize("text", ["1-6-9", "1-6-9 stochastic", "chunk16:bf16/fp32", "fp32", "1-5-0", "exact"])
@pytest.mark.usefixtures("one_thread")
def test_sums_of_rows(device: torch.device, text: str) -> None:
    accumulator = Accumulator.parse(text)
    for rows, terms, dtype in ((1, 1, torch.float32), (17, 34, torch.float16), (130, 17, torch.float32)):
        for kind in KINDS:
            x = numbers((rows, terms), dtype, kind)
            got = _ops.accumulate(x.to(device), accumulator.fields, *seeds(device))
            same(got, eager_accumulate.accumulate(x, accumulator, torch.tensor(SEED), torch.tensor(OFFSET)), text)
            row = int(torch.randint(rows, ()))
            values = [reference_accumulate.term(value) for value in x[row].tolist()]
            expected = reference_accumulate.accumulate(values, accumulator, SEED, OFFSET, row)
            same(got[row], torch.tensor(expected), text)


@pytest.mark.parametrize("text", ["1-6-9", "pairwise:bf16 stochastic", "fp32", "exact"])
def test_strides_and_splits_change_nothing(device: torch.device, text: str) -> None:
    accumulator = Accumulator.parse(text)
    a, b = numbers((2, 9, 70), torch.float32, "wide").to(device), numbers((2, 70, 35), torch.float32, "wide").to(device)
    how = (accumulator.fields, *seeds(device))
    expected = _ops.matmul(a, b, *how).cpu()
    for x in (a.mT.contiguous().mT, torch.stack([a, a], -1)[..., 0], torch.cat([a, a], 2)[..., :70]):
        for y in (b.mT.contiguous().mT, torch.stack([b, b], -1)[..., 1], b.movedim(0, 2).contiguous().movedim(2, 0)):
            same(_ops.matmul(x, y, *how), expected, text)
    if not accumulator.is_stochastic:
        same(_ops.matmul(a[1:, 3:5], b[1:, :, 7:20], *how), expected[1:, 3:5, 7:20], text)
        same(_ops.matmul(b.mT, a.mT, *how), expected.mT.contiguous(), text)
    every = _ops.matmul(a[:1].expand(2, 9, 70), b[:1].expand(2, 70, 35), *how).cpu()
    same(every[0], expected[0], text)


@pytest.fixture
def any_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("text", ["1-6-9", "chunk16:1-5-2 stochastic/fp32", "exact"])
def test_threads_change_nothing(text: str) -> None:
    a, b = numbers((3, 70, 40), torch.float32, "random"), numbers((3, 40, 140), torch.float32, "random")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(_ops.matmul(a, b, Accumulator.parse(text).fields, *seeds(torch.device("cpu"))))
    assert_bits_equal(*results)


_DIGEST = """
import hashlib, torch
from lowprec.accumulator import Accumulator
from lowprec import _ops
numbers = (torch.arange(2 * 9 * 70 * 37) * 7919 % 20011 - 10005) / 4096  # torch draws others by other instructions
digest = hashlib.sha256()
for text in {texts!r}:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        a, b = numbers[:1260].reshape(2, 9, 70).to(dtype), numbers[-5180:].reshape(2, 70, 37).to(dtype)
        a[0, :3] *= 2.0**-14
        for left, right in ((a, b), (a[:, :1], b.mT.contiguous().mT)):
            sums = _ops.matmul(left, right, Accumulator.parse(text).fields, torch.tensor(1), torch.tensor(2))
            digest.update(sums.numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_change_nothing() -> None:
    """The same digest of results by AVX-512, by AVX2 and without vectors, on machines that have them."""
    texts = ("1-6-9", "1-4-3:subnormals=off", "bf16", "fp32", "1-5-2 stochastic", "chunk8:1-5-10:specials=ieee/fp32")
    command = [sys.executable, "-c", _DIGEST.format(texts=texts)]
    digests = {
        subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": name}, capture_output=True, check=True).stdout
        for name in ("avx512", "avx2", "default")
    }
    assert len(digests) == 1


@pytest.mark.usefixtures("one_thread")
def test_flushing_denormals_changes_nothing_and_is_left_as_it_was() -> None:
    a, b = numbers((1, 5, 40), torch.float32, "tiny"), torch.ones(1, 40, 18)
    texts = ("bf16", "fp32", "1-6-9:bias=140", "bf16 stochastic", "exact")
    how = [(Accumulator.parse(text).fields, *seeds(torch.device("cpu"))) for text in texts]
    expected = [_ops.matmul(a, b, *each) for each in how]
    assert torch.set_flush_denormal(True)
    try:
        for want, each in zip(expected, how, strict=True):
            assert_bits_equal(_ops.matmul(a, b, *each), want)
        assert (torch.full((64,), 1e-40) * 1).count_nonzero() == 0
    finally:
        torch.set_flush_denormal(False)


def test_two_roundings_would_miss(device: torch.device) -> None:
    # 1 + 2^-10 + 2^-40 lies above the middle of 1 and 1 + 2^-9; rounded to float32 first it is the middle, and ties.
    x = torch.tensor([[1.0, 2.0**-10 + 2.0**-33]], device=device)
    fields = Accumulator.sequential("1-6-9").fields
    assert _ops.accumulate(x, fields, None, None).item() == 1 + 2.0**-9
    factors = torch.tensor([[[1.0, 2.0**-10]]], device=device), torch.tensor([[[1.0], [1 + 2.0**-23]]], device=device)
    assert _ops.matmul(*factors, fields, None, None).item() == 1 + 2.0**-9


def test_signs_of_zero(device: torch.device) -> None:
    zeros = torch.tensor([[0.0, 0.0], [-0.0, -0.0], [0.0, -0.0], [1.0, -1.0], [-(2.0**-40), 0.0]], device=device)
    for mode in Rounding:
        for text in (f"1-6-9 {mode}", f"fp32 {mode}", f"exact:1-6-9 {mode}", f"1-5-0 {mode}"):
            accumulator = Accumulator.parse(text)
            expected = torch.from_numpy(reference_accumulate.sums(zeros.cpu().double().numpy(), accumulator)).float()
            same(_ops.accumulate(zeros, accumulator.fields, None, None), expected, text)


@pytest.mark.parametrize("text", ["1-6-9", "exact"])
def test_nothing_to_add_is_zero(device: torch.device, text: str) -> None:
    fields = Accumulator.parse(text).fields
    for dtype, carrier in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        x = torch.empty(3, 0, dtype=dtype, device=device)
        same(_ops.accumulate(x, fields, None, None), torch.zeros(3, dtype=carrier), text)
        empty = _ops.matmul(x.new_empty(2, 0, 4), x.new_empty(2, 4, 5), fields, None, None)
        assert (empty.shape, empty.dtype) == ((2, 0, 5), carrier)


def test_stochastic_words_are_numbered_by_output_and_rounding(device: torch.device) -> None:
    # Every rounding is a draw between 0 and 1: the sum is 1 as soon as one word's fraction carries.
    accumulator = Accumulator([Level(None, float_format("1-0-1"), "stochastic", True)])
    x = torch.full((64, 5), 0.125, device=device)
    got = _ops.accumulate(x, accumulator.fields, *seeds(device)).cpu().double().numpy()
    assert np.array_equal(got, reference_accumulate.sums(x.cpu().double().numpy(), accumulator, SEED, OFFSET))
    assert 0 < np.count_nonzero(got) < 64
