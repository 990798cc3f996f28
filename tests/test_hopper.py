"""The model of Hopper's tensor cores: against an H100's own results, its judge, and one engine against another."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowprec as lp
from lowprec import _ops, eager_hopper
from lowprec import reference_hopper as judge
from lowprec.accumulator import HOPPER, LEAVES, Accumulator, TensorCore
from lowprec.testing import assert_bits_equal, special_values

# What wgmma gave on an H100 80GB HBM3 (docs/hopper.md), for operands as their bits: single steps with an accumulator
# given, and from nothing; and chains of eight steps from nothing, in which the right operands are the same eight times.
RECORD = dict(np.load(Path(__file__).with_name("hopper_h100.npz")))
DTYPES = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
PAIRS = ("e4m3_e4m3", "e4m3_e5m2", "e5m2_e4m3", "e5m2_e5m2", "fp16", "bf16")
STEPS = tuple(pair for pair in PAIRS if f"{pair}/a" in RECORD)

Leaves = Callable[[Tensor, Tensor, str, int], Tensor]


def eager(a: Tensor, b: Tensor, leaf: str, terms: int) -> Tensor:
    return eager_hopper.leaves(a, b, HOPPER[leaf], terms)


def registered(a: Tensor, b: Tensor, leaf: str, terms: int) -> Tensor:
    result: Tensor = _ops.hopper_leaves(a, b, LEAVES.index(leaf), terms)
    return result


ENGINES = pytest.mark.parametrize("leaves", [eager, registered])


def dtypes_of(pair: str) -> tuple[torch.dtype, torch.dtype]:
    first, _, second = pair.partition("_")
    return DTYPES[first], DTYPES[second or first]


def leaf_of(pair: str) -> str:
    return "hopper_fp8" if "_" in pair else "hopper_fp16"


def recorded(pair: str, name: str) -> tuple[Tensor, Tensor]:
    """The operands of a record."""
    both = (torch.from_numpy(RECORD[f"{pair}/{name}{side}"]) for side in "ab")
    a, b = (bits.view(dtype) for bits, dtype in zip(both, dtypes_of(pair), strict=True))
    return a, b


def float32(pair: str, name: str) -> Tensor:
    return torch.from_numpy(RECORD[f"{pair}/{name}"].view(np.float32))


def numbers(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return x.to(torch.float32).to(torch.float64).numpy()


def smallest(a: Tensor, b: Tensor) -> tuple[int, int]:
    return eager_hopper.min_exponent(a.dtype), eager_hopper.min_exponent(b.dtype)


def judged(a: Tensor, b: Tensor, leaf: str, terms: int) -> Tensor:
    """The judge's leaves; its NaN is the one that the hardware gives."""
    result = judge.leaves(numbers(a), numbers(b), smallest(a, b), HOPPER[leaf], terms)
    values = torch.from_numpy(result).to(torch.float32)
    return torch.where(values.isnan(), torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32), values)


# Against silicon.


@pytest.mark.parametrize("pair", STEPS)
def test_the_judge_gives_what_an_h100_gave(pair: str) -> None:
    a, b = recorded(pair, "")
    core, low = HOPPER[leaf_of(pair)], smallest(a, b)
    accumulators, results = (numbers(float32(pair, name)) for name in ("accumulator", "result"))
    found = [
        judge.step(x, y, c, low, core)
        for x, y, c in zip(numbers(a).tolist(), numbers(b).tolist(), accumulators.tolist(), strict=True)
    ]
    assert len(found) >= 200
    assert_bits_equal(
        torch.tensor(found, dtype=torch.float64).nan_to_num(7e77), torch.from_numpy(results).nan_to_num(7e77)
    )


@pytest.mark.parametrize("pair", STEPS)
def test_the_eager_step_gives_what_an_h100_gave(pair: str, device: torch.device) -> None:
    core = HOPPER[leaf_of(pair)]
    x, y = (eager_hopper.operands(each.to(device), core) for each in recorded(pair, ""))
    accumulators = float32(pair, "accumulator").to(device).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    found = eager_hopper.step(x, y, accumulators, core).to(torch.int32).view(torch.float32)
    assert_bits_equal(found, float32(pair, "result"))


@ENGINES
@pytest.mark.parametrize("pair", STEPS)
def test_steps_from_nothing_give_what_an_h100_gave(pair: str, leaves: Leaves, device: torch.device) -> None:
    a, b = (each.to(device) for each in recorded(pair, ""))
    found = leaves(a[:, None], b[:, :, None], leaf_of(pair), 0)
    assert_bits_equal(found.flatten(), float32(pair, "result_from_zero"))


@ENGINES
@pytest.mark.parametrize("pair", PAIRS)
def test_chains_give_what_an_h100_gave(pair: str, leaves: Leaves, device: torch.device) -> None:
    a, b = (each.to(device) for each in recorded(pair, "chain_"))
    found = leaves(a, torch.cat([b] * 8, dim=-1).mT, leaf_of(pair), 0)
    assert_bits_equal(found.squeeze(-1), float32(pair, "chain_result"))


@pytest.fixture
def hopper() -> torch.device:
    """A device whose tensor cores these are."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper's tensor cores")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("K", [32, 64, 128, 512, 2048])
def test_cublas_gives_what_the_fp8_model_gives(K: int, hopper: torch.device) -> None:
    """Fast accumulation is one chain of instructions; without it, cuBLAS promotes every 128 terms."""
    one = torch.ones((), device=hopper)
    a, b = (torch.randn(256, K, device=hopper).to(torch.float8_e4m3fn) for _ in "ab")
    for fast, text in ((True, "hopper_fp8"), (False, "hopper_fp8@128:fp32")):
        expected = torch._scaled_mm(a, b.T, one, one, out_dtype=torch.float32, use_fast_accum=fast)
        assert_bits_equal(lp.matmul(a, b.T, text), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [16, 64, 256])
def test_cublas_gives_what_the_fp16_model_gives(K: int, dtype: torch.dtype, hopper: torch.device) -> None:
    a, b = torch.randn(256, K, device=hopper).to(dtype), torch.randn(K, 256, device=hopper).to(dtype)
    assert_bits_equal(lp.matmul(a, b, "hopper_fp16"), torch.mm(a, b, out_dtype=torch.float32))


# Known figures.


def dot(pairs: list[tuple[float, float]], dtype: torch.dtype, accumulator: str) -> float:
    a, b = torch.tensor(pairs).T.to(dtype)
    return float(lp.matmul(a[None], b[:, None], accumulator))


def test_what_others_found() -> None:
    """MMA-Sim: 448² + 31 · 4 is 200704, not 200828; 13 digits are kept with fp8 operands."""
    assert dot([(448.0, 448.0)] + [(2.0, 2.0)] * 31, torch.float8_e4m3fn, "hopper_fp8") == 200704.0
    assert dot([(448.0, 448.0)] + [(2.0, 2.0)] * 31, torch.float16, "hopper_fp16") == 200828.0
    for power, expected in ((-13, 2.0**-13), (-14, 0.0)):
        half = 2.0 ** (power // 2), 2.0 ** (power - power // 2)
        assert dot([(1.0, 1.0), half], torch.float8_e5m2, "hopper_fp8") - 1.0 == expected


def test_every_term_is_cut_and_the_sum_too() -> None:
    """Two halves of the last digit do not make a whole one; sums go toward zero, where nearest would go away."""
    core = HOPPER["hopper_fp8"]
    half = 2.0**-7, 2.0**-7
    assert judge.step([1.0, *[half[0]] * 2], [1.0, *[half[1]] * 2], 0.0, (-14, -14), core) == 1.0
    assert judge.step([1.0, 1.0, 1.5 * 2.0**-6], [1.0, 1.0, 2.0**-6], 0.0, (-14, -14), core) == 2.0 + 2.0**-12
    assert judge.step([-1.0, 1.0], [1.0, 2.0**-13], 0.0, (-14, -14), core) == 2.0**-13 - 1


def test_promotion_sums_leaves_in_float32() -> None:
    """A long sum of ones stalls at 2^14 within the tensor core, and not where every 128 terms go to float32."""
    ones = torch.ones(1, 1 << 15).to(torch.float8_e4m3fn)
    small = torch.full_like(ones, 2.0**-9, dtype=torch.float32).to(torch.float8_e4m3fn)
    a, b = torch.cat([ones, small], dim=1), torch.ones(2 << 15, 1).to(torch.float8_e4m3fn)
    exact = 2.0**15 + 2.0**6
    assert lp.matmul(a, b, "hopper_fp8@128:fp32").item() == exact
    assert lp.matmul(a, b, Accumulator.hopper_fp8(128)).item() == exact
    assert lp.matmul(a, b, "hopper_fp8").item() == 2.0**14
    assert lp.matmul(a.float().half(), b.float().half(), "hopper_fp16").item() == exact


def test_products_under_the_model_differentiate_batch_and_compile() -> None:
    a, b = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((3, 5, 64), (64, 7)))
    y = lp.matmul(a, b, "hopper_fp16@32:fp32", dtype=torch.bfloat16)
    dy = torch.randn_like(y)
    da, db = torch.autograd.grad(y, (a, b), dy)
    assert_bits_equal(da, lp.matmul(dy, b.detach().mT, "hopper_fp16@32:fp32", dtype=torch.bfloat16))
    both = a.detach().flatten(0, 1).mT, dy.flatten(0, 1)
    assert_bits_equal(db, lp.matmul(*both, "hopper_fp16@32:fp32", dtype=torch.bfloat16))

    def fp8(x: Tensor, w: Tensor) -> Tensor:
        return lp.matmul(x, w, "hopper_fp8@32:fp32")

    x, w = a.detach().to(torch.float8_e4m3fn), b.detach().to(torch.float8_e5m2)
    assert_bits_equal(torch.compile(fp8, fullgraph=True, backend="aot_eager")(x, w), fp8(x, w))
    assert_bits_equal(torch.func.vmap(fp8, (0, None))(x, w), fp8(x, w))


# One engine against another.


def operands(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of a narrow range, many of them zero or of the dtype's far ends, seldom infinite or NaN."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread, centre = draw(st.integers(0, 20)), draw(st.sampled_from([0, 0, 0, -6, 8, -60, 60]))
    exponents = torch.randint(centre - spread, centre + spread + 1, shape, generator=generator)
    x = (torch.randn(shape, generator=generator) * torch.exp2(exponents.float())).to(dtype).to(torch.float32)
    finite = special_values(torch.float32) if dtype == torch.float32 else torch.tensor([0.0, -0.0])
    picks = finite[torch.randint(len(finite), shape, generator=generator)]
    kinds = torch.rand(shape, generator=generator)
    x = torch.where(kinds < draw(st.sampled_from([0.0, 0.1, 0.9])), picks, x)
    top = torch.finfo(dtype).max
    x = x.clamp(-top, top).nan_to_num(0.0)
    odd = torch.tensor([math.inf, -math.inf, math.nan])[torch.randint(3, shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.02])), odd, x).to(dtype)


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor, str, int]:
    leaf = draw(st.sampled_from(list(HOPPER)))
    narrow = [torch.float8_e4m3fn, torch.float8_e5m2] if leaf == "hopper_fp8" else [torch.float16, torch.bfloat16]
    batch, rows, columns = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 33, 65]))
    K = draw(st.sampled_from([0, 1, 16, 31, 33, 64, 100, 130]))
    a = operands(draw, (batch, rows, K), draw(st.sampled_from([*narrow, torch.float32])))
    b = operands(draw, (batch, columns, K), draw(st.sampled_from([*narrow, torch.float32]))).mT
    return a, b, leaf, draw(st.sampled_from([0, 32, 64, 128]))


@given(products())
@settings(max_examples=40)
def test_kernels_give_what_the_judge_gives(device: torch.device, product: tuple[Tensor, Tensor, str, int]) -> None:
    a, b, leaf, terms = product
    a, b = a[:, :, :70], b[:, :70, :5]
    expected = judged(a, b, leaf, terms)
    for leaves in (eager, registered):
        assert_bits_equal(leaves(a.to(device), b.to(device), leaf, terms), expected)


@given(products())
@settings(max_examples=60)
def test_kernels_give_what_the_eager_twin_gives(device: torch.device, product: tuple[Tensor, Tensor, str, int]) -> None:
    a, b, leaf, terms = product
    expected = eager(a, b, leaf, terms)
    found = registered(a.to(device), b.to(device), leaf, terms)
    assert found.is_contiguous()
    assert_bits_equal(found, expected)


@pytest.mark.parametrize("leaf", HOPPER)
def test_strides_and_threads_change_nothing(leaf: str, device: torch.device) -> None:
    a = torch.randn(2, 70, 200, device=device).to(torch.float8_e5m2)
    b = torch.randn(2, 200, 67, device=device).to(torch.float8_e5m2)
    expected = registered(a, b, leaf, 64)
    wide = torch.zeros(2, 140, 400, device=device).to(a.dtype)[:, ::2, ::2]
    wide.copy_(a)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert_bits_equal(registered(wide, b.mT.contiguous().mT, leaf, 64), expected)
    torch.set_num_threads(threads)
    one = b[:1].expand(2, 200, 67)
    assert_bits_equal(registered(a, one, leaf, 64), registered(a, one.contiguous(), leaf, 64))


@ENGINES
def test_digits_that_no_operand_has_are_dropped(leaves: Leaves, device: torch.device) -> None:
    x = torch.tensor([[[1.9999, -3.0e-3, 2.0**-140]]], device=device)
    ones = torch.ones(1, 3, 1, device=device)
    for leaf, precision in (("hopper_fp8", 4), ("hopper_fp16", 11)):
        kept = [math.copysign(judge.operand(each, -126, HOPPER[leaf]), each) for each in x.flatten().tolist()]
        assert abs(Fraction(1.9999) - Fraction(kept[0])) < Fraction(2) ** (1 - precision)
        assert_bits_equal(leaves(x, ones, leaf, 0), leaves(torch.tensor([[kept]], device=device), ones, leaf, 0))


@ENGINES
def test_nan_is_always_the_same_one_and_zero_positive(leaves: Leaves, device: torch.device) -> None:
    inf, nan = math.inf, math.nan
    rows = [[inf, 0.0], [inf, -inf], [nan, 1.0], [-nan, inf], [0.0, inf], [inf, 1.0], [-inf, 5.0], [-0.0, -1e-40]]
    x = torch.tensor(rows, device=device).unsqueeze(1)
    y = torch.tensor([1.0, 2.0], device=device).expand(8, 2).unsqueeze(2).clone()
    y[0, 1] = y[4, 1] = 0.0
    y[0, 0] = y[7] = 1e-30
    found = leaves(x, y, "hopper_fp16", 0).view(torch.int32).flatten().tolist()
    infinity, sign = 0x7F800000, -(2**31)
    assert found == [infinity, *[0x7FFFFFFF] * 4, infinity, infinity + sign, 0]


# Bounds and arguments.


@pytest.mark.parametrize("text", ["hopper_fp8", "hopper_fp8@64:fp32", "hopper_fp16", "hopper_fp16@32:bf16"])
def test_errors_stay_within_the_bound(text: str) -> None:
    accumulator = Accumulator.parse(text)
    dtype = torch.float8_e5m2 if accumulator.leaf == "hopper_fp8" else torch.bfloat16
    share = 0.0
    for K in (1, 17, 64, 300):
        a = (torch.rand(4, K) + 0.25).to(dtype)
        b = torch.randn(K, 4).exp().to(dtype)
        exact = a.double() @ b.double() if dtype == torch.bfloat16 else a.float().double() @ b.float().double()
        error = ((lp.matmul(a, b, accumulator).double() - exact).abs() / exact).max().item()
        assert error <= accumulator.error_bound(K)
        share = max(share, error / accumulator.error_bound(K))
    assert share > 1e-3


def test_depth_counts_steps() -> None:
    assert Accumulator.hopper_fp8().depth(128) == 4 + 1
    assert Accumulator.hopper_fp8(64).depth(1000) == 2 + 16
    assert Accumulator.hopper_fp16(128).depth(1) == 1 + 1
    assert TensorCore(32, 13, 13, 4).unit < 1.1 * 2**-8


def test_errors_name_what_came() -> None:
    a, b = torch.ones(1, 2, 32), torch.ones(1, 32, 2)
    with pytest.raises(TypeError, match="float64"):
        eager(a.double(), b, "hopper_fp8", 0)
    with pytest.raises(ValueError, match="multiple of 32"):
        eager(a, b, "hopper_fp8", 16)
    with pytest.raises(ValueError, match=r"\(1, 2, 32\)"):
        eager(a, b.mT, "hopper_fp8", 0)
    for broken in ((a.double(), b, 3, 0), (a, b, 3, 16), (a, b.mT, 3, 0), (a[0], b[0], 3, 0)):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            _ops.hopper_leaves(*broken)
    with pytest.raises(TypeError, match="float64"):
        lp.matmul(a[0].double(), b[0], "hopper_fp8")
