"""Products with tensor-core leaves, and products of codes that are cast on the way out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops
from lowprec.accumulator import LEAVES, Accumulator
from lowprec.testing import assert_bits_equal

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PAIRS = [(torch.bfloat16,) * 2, (torch.float16,) * 2, *itertools.product(FLOAT8, FLOAT8)]
SUMS = ("fp32", "1-6-9", "bf16", "fp16", "e4m3fn", "e4m3fn overflow", "1-5-2:subnormals=off", "1-8-20:specials=ieee")
MODES = ("nearest_away", "toward_zero", "up", "down", "to_odd", "stochastic")
SHAPES = [(1, 128, 64, 128), (2, 33, 130, 129), (1, 300, 200, 40), (3, 1, 16, 1), (1, 5, 0, 4), (1, 0, 32, 4)]

gpu = pytest.mark.gpu
CUDA = torch.device("cuda")


def numbers(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """Normal numbers; of a wide range; small integers, whose sums often lie half-way; or with infinities and NaN."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "wide":
        return x * torch.exp2(torch.randint(-9, 7, shape, generator=g).float())
    if kind == "integers":
        return (2 * x).round()
    if kind == "special":
        special = torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.randint(0, 3, shape, generator=g)]
        return torch.where(torch.rand(shape, generator=g) < 3e-3, special, x)
    return x


def operands(shape: tuple[int, ...], kind: str, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, Tensor]:
    batch, rows, depth, columns = shape
    a, b = numbers((batch, rows, depth), kind, 1), numbers((batch, depth, columns), kind, 2)
    return a.to(CUDA, dtypes[0]), b.to(CUDA, dtypes[1])


def equal(found: Tensor, expected: Tensor) -> None:
    """The same bits, NaN by being NaN."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert_bits_equal(found.masked_fill(found.isnan(), 0), expected.masked_fill(expected.isnan(), 0))


def added(leaves: Tensor, accumulator: Accumulator, seed: Tensor | None = None) -> Tensor:
    """Leaves [B, M, N, L] under the levels of an accumulator, by the op that adds up rows."""
    sums: Tensor = _ops.accumulate(leaves.flatten(0, 2), [0, 0, *accumulator.fields[2:]], seed, None)
    return sums.reshape(leaves.shape[:3])


# Leaves.


@gpu
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("k", [32, 64, 96, 0])
def test_leaves_are_those_of_the_model(dtypes: tuple[torch.dtype, ...], k: int) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the model is Hopper's")
    leaf = LEAVES.index("hopper_fp8" if dtypes[0] in FLOAT8 else "hopper_fp16")
    for shape, kind in itertools.product([(2, 33, 130, 40), (1, 5, 0, 4)], ("normal", "wide", "integers")):
        a, b = operands(shape, kind, dtypes)
        equal(_ops.tensor_core_leaves(a, b, k), _ops.hopper_leaves(a, b, leaf, k))


@gpu
def test_zeros_of_either_sign_give_positive_zero() -> None:
    """So that the sign of a sum matters at its end alone."""
    a, b = torch.full((1, 64, 64), -0.0, device=CUDA), torch.ones(1, 64, 64, device=CUDA)
    assert_bits_equal(_ops.tensor_core_leaves(a.bfloat16(), b.bfloat16(), 64), torch.zeros(1, 64, 64, 1, device=CUDA))


# Sums.


@gpu
@pytest.mark.parametrize("kind", ["normal", "wide", "integers", "special"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_rounded_once(shape: tuple[int, ...], kind: str) -> None:
    for dtypes, k in itertools.product(PAIRS[:3], (32, 64, 0)):
        if dtypes[0] in FLOAT8 and torch.cuda.get_device_capability()[0] != 9:
            continue
        a, b = operands(shape, kind, dtypes)
        leaves = _ops.tensor_core_leaves(a, b, k)
        for text in SUMS:
            accumulator = Accumulator(Accumulator.parse(text).levels, leaf="tensor_core", terms=k)
            found = _ops.tensor_core_matmul(a, b, accumulator.fields, None, None)
            equal(found, added(leaves, accumulator))


@gpu
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str) -> None:
    a, b = operands((2, 40, 300, 24), "normal", (torch.bfloat16, torch.bfloat16))
    accumulator = Accumulator.parse(f"tensor_core64:1-6-9 {mode}")
    seed = torch.tensor(5) if mode == "stochastic" else None
    found = _ops.tensor_core_matmul(a, b, accumulator.fields, seed, None)
    equal(found, added(_ops.tensor_core_leaves(a, b, 64), accumulator, seed))


@gpu
def test_strides_change_nothing() -> None:
    a, b = operands((2, 96, 160, 72), "normal", (torch.bfloat16, torch.bfloat16))
    expected = lp.matmul(a, b, "tensor_core64:1-6-9")
    for x, y in [(a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT), (a[:, ::1], b)]:
        equal(lp.matmul(x, y, "tensor_core64:1-6-9"), expected)
    room = torch.zeros(2, 97, 161, dtype=torch.bfloat16, device=CUDA)
    room[:, 1:, 1:] = a
    equal(lp.matmul(room[:, 1:, 1:], b, "tensor_core64:1-6-9"), expected)
    equal(lp.matmul(a, b[:1], "tensor_core64:1-6-9")[0], expected[0])


@gpu
def test_trees_above_leaves() -> None:
    a, b = operands((1, 40, 700, 24), "normal", (torch.bfloat16, torch.bfloat16))
    accumulator = Accumulator(Accumulator.parse("4*bf16/1-6-9").levels, leaf="tensor_core", terms=32)
    equal(lp.matmul(a, b, accumulator), added(_ops.tensor_core_leaves(a, b, 32), accumulator))


@gpu
def test_a_captured_product_sees_new_operands() -> None:
    a, b = operands((1, 128, 256, 128), "normal", (torch.bfloat16, torch.bfloat16))
    lp.matmul(a, b, "tensor_core64:1-6-9")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        product = lp.matmul(a, b, "tensor_core64:1-6-9")
    a.mul_(2)
    graph.replay()
    equal(product, lp.matmul(a, b, "tensor_core64:1-6-9"))


@gpu
def test_gradients_are_such_products() -> None:
    a, b = (x[0].requires_grad_() for x in operands((1, 64, 128, 32), "normal", (torch.bfloat16, torch.bfloat16)))
    y = lp.matmul(a, b, "tensor_core64:1-6-9", dtype=torch.bfloat16)
    dy = numbers((64, 32), "normal", 3).to(CUDA, torch.bfloat16)
    da, db = torch.autograd.grad(y, (a, b), dy)
    equal(da, lp.matmul(dy, b.detach().mT, "tensor_core64:1-6-9").bfloat16())
    equal(db, lp.matmul(a.detach().mT, dy, "tensor_core64:1-6-9").bfloat16())


# Errors.


def test_tensor_cores_need_a_gpu() -> None:
    x = torch.ones(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"tensor_core.*CUDA device.*hopper_fp16 and hopper_fp8.*got operands on cpu"):
        lp.matmul(x, x, "tensor_core64")
    with pytest.raises(RuntimeError, match="tensor_core"):
        _ops.tensor_core_matmul(x[None], x[None], Accumulator.parse("tensor_core64").fields, None, None)


def test_tensor_cores_take_narrow_operands() -> None:
    x = torch.ones(32, 32)
    for a, b in [(x, x), (x.half(), x.bfloat16()), (x.half(), x.to(torch.float8_e5m2))]:
        with pytest.raises(ValueError, match="both bfloat16, both float16, or each one of"):
            lp.matmul(a, b, "tensor_core64")


def test_float8_takes_32_terms_at_once(device: torch.device) -> None:
    x = torch.ones(32, 32, device=device).to(torch.float8_e5m2)
    with pytest.raises(ValueError, match="CUDA device" if device.type == "cpu" else "32 terms"):
        lp.matmul(x, x, "tensor_core16")


# Codes in, codes out.

ACCUMULATORS = ("exact:bf16", "chunk8:1-6-9/fp32", "hopper_fp16@16:fp32")


def codes_of(shape: tuple[int, ...], fmt: str, device: torch.device, seed: int) -> Tensor:
    codes: Tensor = lp.encode(numbers(shape, "normal", seed), fmt)
    return codes.to(device)


def accumulators(device: torch.device) -> tuple[str, ...]:
    return ACCUMULATORS if device.type == "cpu" else (*ACCUMULATORS, "tensor_core32:1-6-9", "tensor_core64")


def composed(a: Tensor, b: Tensor, accumulator: str, formats: tuple[str, str], out: str, **how: Any) -> Tensor:
    """The product by separate functions, in float32."""
    x, y = (lp.decode(codes, fmt, dtype=torch.bfloat16) for codes, fmt in zip((a, b), formats, strict=True))
    cast = how.pop("cast", lp.quantize)
    result: Tensor = cast(lp.matmul(x, y, accumulator), out, **how)
    return result


@pytest.mark.parametrize("out", ["e4m3fn", "1-5-2:subnormals=off", "p3109_k8p4", "1-3-0"])
@pytest.mark.parametrize("formats", [("e4m3fn", "e5m2"), ("1-4-3:emax=8", "1-5-2:emax=1")], ids=str)
def test_fused_is_composed(device: torch.device, formats: tuple[str, str], out: str) -> None:
    a, b = codes_of((2, 9, 70), formats[0], device, 1), codes_of((2, 70, 13), formats[1], device, 2)
    for accumulator in accumulators(device):
        for how in ({}, {"rounding": "up"}, {"rounding": "stochastic", "seed": 3, "offset": 2, "random_bits": 16}):
            given: dict[str, Any] = {"a_format": formats[0], "b_format": formats[1], "out_format": out, **how}
            expected = composed(a, b, accumulator, formats, out, **how)
            for dtype in (torch.float32, torch.bfloat16):
                equal(lp.fused.matmul(a, b, accumulator, dtype=dtype, **given), expected.to(dtype))
            codes = lp.fused.matmul(a, b, accumulator, codes=True, **given)
            assert_bits_equal(codes, composed(a, b, accumulator, formats, out, cast=lp.encode, **how))


def test_statistics_are_those_of_the_cast(device: torch.device) -> None:
    formats = ("e4m3fn", "e4m3fn")
    a, b = codes_of((40, 64), formats[0], device, 1), codes_of((64, 48), formats[1], device, 2)
    for accumulator, codes in itertools.product(accumulators(device), (False, True)):
        given: dict[str, Any] = {"a_format": formats[0], "b_format": formats[1], "out_format": "1-4-3", "codes": codes}
        result, found = lp.fused.matmul(a, b, accumulator, statistics=True, **given)
        assert_bits_equal(result, lp.fused.matmul(a, b, accumulator, **given))
        product = lp.fused.matmul(a, b, accumulator, a_format=formats[0], b_format=formats[1])
        assert found.numbers() == lp.measure(product, "1-4-3").numbers()


def test_values_beside_codes(device: torch.device) -> None:
    a, codes = numbers((9, 70), "normal", 1).to(device), codes_of((70, 13), "1-4-3", device, 2)
    for dtype in (torch.float32, torch.bfloat16):
        found = lp.fused.matmul(a.to(dtype), codes, "1-6-9", b_format="1-4-3")
        equal(found, lp.matmul(a.to(dtype), lp.decode(codes, "1-4-3", dtype=dtype), "1-6-9"))


def test_stochastic_levels_draw_beside_the_cast(device: torch.device) -> None:
    a, b = (codes_of((16, 16), "1-4-3", device, seed) for seed in (1, 2))
    given: dict[str, Any] = {"a_format": "1-4-3", "b_format": "1-4-3"}
    product = lp.fused.matmul(a, b, "1-6-9 stochastic", seed=0, offset=4, **given)
    values = [lp.decode(x, "1-4-3") for x in (a, b)]
    equal(product, lp.matmul(*values, "1-6-9 stochastic", seed=0, offset=5))
    found = lp.fused.matmul(
        a, b, "1-6-9 stochastic", out_format="1-4-3", rounding="stochastic", offset=4, seed=0, **given
    )
    equal(found, lp.quantize(product, "1-4-3", rounding="stochastic", seed=0, offset=4))


def test_fused_products_compile(device: torch.device) -> None:
    a, b = (codes_of((32, 32), "1-4-3", device, seed) for seed in (1, 2))
    for accumulator in accumulators(device):

        def product(a: Tensor, b: Tensor, accumulator: str = accumulator) -> Any:
            return lp.fused.matmul(
                a, b, accumulator, a_format="1-4-3", b_format="1-4-3", out_format="e5m2", codes=True, statistics=True
            )[0]

        assert_bits_equal(torch.compile(product, fullgraph=True)(a, b), product(a, b))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a_format": "bf16"}, "up to 8 bits"),
        ({"a_format": "1-6-1:bias=60", "b_format": "1-4-3", "dtype": torch.float64, "out_format": "1-4-3"}, "dtype"),
        ({"codes": True}, "out_format"),
        ({"statistics": True}, "out_format"),
        ({"out_format": "1-4-3", "rounding": "sideways"}, "rounding"),
    ],
)
def test_errors(given: dict[str, Any], message: str) -> None:
    x = torch.ones(4, 4, dtype=torch.uint8)
    given = {"a_format": "1-4-3", "b_format": "1-4-3", **given}
    with pytest.raises((TypeError, ValueError), match=message):
        lp.fused.matmul(x, x, "fp32", **given)
