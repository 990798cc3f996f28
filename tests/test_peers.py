"""Second opinions from outside: ml_dtypes and torch agree where they should; where a peer differs, by how much exactly.

docs/numerics.md lists these differences and says why each is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec.testing import all_codes, assert_bits_equal, neighbourhood, patterns, special_values

ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
    "e2m3fn": ml_dtypes.float6_e2m3fn,
    "e3m2fn": ml_dtypes.float6_e3m2fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}
FLOAT8 = [name for name in ML_DTYPES if name.startswith(("e3m4", "e4", "e5"))]
FINITE = ["e2m1fn", "e2m3fn", "e3m2fn"]
NATIVE = {
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}


def inputs(name: str, dtype: torch.dtype) -> Tensor:
    """All inputs of 16 bits; every 65,521st float32, and where rounding can go wrong."""
    if dtype.itemsize == 2:
        return patterns(dtype)
    near = neighbourhood(lp.format(name), dtype) if lp.format(name).bits <= 8 else torch.zeros(0, dtype=dtype)
    return torch.cat([patterns(dtype, step=65_521) if dtype is torch.float32 else near, near, special_values(dtype)])


def by_ml_dtypes(x: Tensor, name: str) -> Tensor:
    """ml_dtypes' codes."""
    source = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype is torch.bfloat16 else x.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        codes = source.astype(ML_DTYPES[name])
    wide = lp.format(name).bits > 8
    return torch.from_numpy(codes.view(np.uint16 if wide else np.uint8).copy())


# ml_dtypes.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ML_DTYPES)
def test_ml_dtypes_rounds_alike(name: str, dtype: torch.dtype) -> None:
    """Every number and infinity; overflow goes to infinity or NaN there, and saturates in its fp6 and fp4."""
    x = inputs(name, dtype)
    x = x[~x.isnan()]
    assert_bits_equal(lp.encode(x, name, saturate=False), by_ml_dtypes(x, name), given=x, what=name)


@pytest.mark.parametrize("name", FLOAT8)
def test_ml_dtypes_makes_the_same_nans(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = inputs(name, dtype)
        x = x[x.isnan()]
        assert_bits_equal(lp.encode(x, name), by_ml_dtypes(x, name), given=x, what=name)


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if name != "fp16"])
def test_ml_dtypes_decodes_alike(name: str) -> None:
    codes = all_codes(lp.format(name))
    theirs = torch.from_numpy(codes.numpy().view(ML_DTYPES[name]).astype(np.float32))
    ours = lp.decode(codes, name)
    assert_bits_equal(ours.isnan(), theirs.isnan(), given=codes)
    assert_bits_equal(ours[~ours.isnan()], theirs[~ours.isnan()], given=codes[~ours.isnan()])


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if name != "fp16"])
def test_ml_dtypes_knows_the_same_limits(name: str) -> None:
    info, fmt = ml_dtypes.finfo(ML_DTYPES[name]), lp.format(name)
    limits = (float(info.max), float(info.smallest_normal), float(info.smallest_subnormal))
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == limits


def test_ml_dtypes_does_not_saturate() -> None:
    """Difference: by default we do. 14,720 of the float16 inputs lie past 464, where e4m3fn overflows."""
    x = patterns(torch.float16)
    x = x[~x.isnan()]
    differs = lp.encode(x, "e4m3fn") != by_ml_dtypes(x, "e4m3fn")
    assert int(differs.sum()) == int((x.abs() > 464).sum()) == 14_720
    assert by_ml_dtypes(x[differs], "e4m3fn").unique(sorted=True).tolist() == [0x7F, 0xFF]
    assert lp.encode(x[differs], "e4m3fn").unique(sorted=True).tolist() == [0x7E, 0xFE]


@pytest.mark.parametrize("name", FINITE)
def test_ml_dtypes_turns_nan_into_zero_where_there_is_none(name: str) -> None:
    """Difference: we give the largest positive code, and count it."""
    x = torch.tensor([torch.nan, -torch.nan])
    assert by_ml_dtypes(x, name).tolist() == [lp.format(name).sign_code, 0]
    assert lp.encode(x, name).tolist() == [lp.format(name).max_code] * 2


DOUBLY_ROUNDED = {
    "e4m3fn": 254,
    "e5m2": 248,
    "e4m3": 240,
    "e3m4": 224,
    "e4m3fnuz": 256,
    "e5m2fnuz": 256,
    "e4m3b11fnuz": 256,
}


@pytest.mark.parametrize(("name", "count"), DOUBLY_ROUNDED.items())
def test_ml_dtypes_rounds_float64_twice(name: str, count: int) -> None:
    """Difference: from float64 it goes by float32, so that one of a tie's two neighbours goes the tie's way."""
    x = neighbourhood(lp.format(name), torch.float64)
    ours, theirs = lp.encode(x, name, saturate=False), by_ml_dtypes(x, name)
    assert int((ours != theirs).sum()) == count
    assert_bits_equal(theirs, lp.encode(x.float(), name, saturate=False))


# torch's own float8 types.


def by_torch(x: Tensor, name: str) -> Tensor:
    return x.to(NATIVE[name]).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_torch_rounds_alike(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x = inputs(name, dtype).to(device)
    x = x[~x.isnan()]
    saturate = name == "e4m3fn" and device.type == "cpu"
    x = x if name != "e4m3fn" or device.type == "cpu" else x[x.abs() <= 448]
    assert_bits_equal(lp.encode(x, name, saturate=saturate), by_torch(x, name), given=x, what=name)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_decodes_alike(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """NaN payloads aside, which are torch's own affair."""
    codes = torch.arange(256, device=device).to(torch.uint8)
    ours, theirs = lp.decode(codes, name, dtype=dtype), codes.view(NATIVE[name]).to(dtype)
    assert_bits_equal(ours.isnan(), theirs.isnan(), given=codes)
    assert_bits_equal(ours[~ours.isnan()], theirs[~ours.isnan()], given=codes[~ours.isnan()])


def test_torch_saturates_in_one_type_of_four() -> None:
    """Difference: torch 2.13 sends overflow and infinity to 448 in e4m3fn, and to infinity or NaN in the others."""
    x = torch.tensor([1e6, torch.inf])
    assert x.to(torch.float8_e4m3fn).float().tolist() == [448.0, 448.0]
    assert x.to(torch.float8_e5m2).float().tolist() == [torch.inf, torch.inf]
    assert x.to(torch.float8_e4m3fnuz).float().isnan().all()
    for name in NATIVE:
        assert lp.quantize(x, name).tolist() == [lp.format(name).max] * 2
        assert not lp.quantize(x, name, saturate=False).isfinite().any()


@pytest.mark.parametrize(("name", "count"), [("e4m3fn", 252), ("e5m2", 248), ("e4m3fnuz", 256), ("e5m2fnuz", 256)])
def test_torch_rounds_float64_twice(name: str, count: int) -> None:
    """Difference: by float32, as ml_dtypes; -431.99999999999994 becomes -448, the next value past the nearest."""
    x = neighbourhood(lp.format(name), torch.float64)
    saturate = name == "e4m3fn"
    ours, theirs = lp.encode(x, name, saturate=saturate), by_torch(x, name)
    assert int((ours != theirs).sum()) == count
    assert_bits_equal(theirs, lp.encode(x.float(), name, saturate=saturate))


def test_the_known_double_rounding() -> None:
    x = torch.tensor([-431.99999999999994], dtype=torch.float64)
    assert x.to(torch.float8_e4m3fn).float().item() == -448
    assert float(x.numpy().astype(ml_dtypes.float8_e4m3fn)[0]) == -448
    assert lp.quantize(x, "e4m3fn").item() == -416


def test_torch_rounds_float64_to_16_bits_twice() -> None:
    """Difference: 1 + 2^-11 + 2^-40 is above the tie of float16, which float32 loses."""
    x = torch.tensor([1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-8 + 2.0**-50], dtype=torch.float64)
    assert x[:1].to(torch.float16).item() == x[1:].to(torch.bfloat16).item() == 1.0
    assert lp.quantize(x[:1], "fp16").item() == 1 + 2.0**-10
    assert lp.quantize(x[1:], "bf16").item() == 1 + 2.0**-7


def test_torch_has_another_nan_in_e5m2() -> None:
    """Difference: all ones, where IEEE 754's quiet NaN and ours sets the top mantissa bit alone."""
    x = torch.tensor([torch.nan, -torch.nan])
    assert by_torch(x, "e5m2").tolist() == [0x7F, 0xFF]
    assert lp.encode(x, "e5m2").tolist() == [0x7E, 0xFE]


# qtorch.


@pytest.fixture(scope="module")
def float_quantize() -> Callable[..., Tensor]:
    """QPyTorch's cast. The first import compiles it, which takes half a minute."""
    from qtorch.quant import float_quantize

    return float_quantize  # type: ignore[no-any-return]


SHAPES = [("1-5-2", {"exp": 5, "man": 2}), ("1-4-3", {"exp": 4, "man": 3})]


@pytest.mark.parametrize(("fmt", "shape"), SHAPES)
def test_qtorch_keeps_the_values(fmt: str, shape: dict[str, int], float_quantize: Callable[..., Tensor]) -> None:
    """It has the slides' formats, of which every code is a number."""
    values = torch.from_numpy(lp.format(fmt).values()).float()
    assert torch.equal(float_quantize(values, **shape, rounding="nearest"), values)


@pytest.mark.parametrize(("fmt", "shape", "wrong", "of"), [(*SHAPES[0], 64, 127), (*SHAPES[1], 64, 127)])
def test_qtorchs_ties(
    fmt: str, shape: dict[str, int], wrong: int, of: int, float_quantize: Callable[..., Tensor]
) -> None:
    """Difference: documented as nearest even, it sends every tie away from zero, half of them to the odd code."""
    values = torch.from_numpy(lp.format(fmt).values()).float()
    positive = values[values >= 0]
    ties = (positive[1:] + positive[:-1]) / 2
    theirs = float_quantize(ties, **shape, rounding="nearest")
    assert len(ties) == of
    assert int((theirs != lp.quantize(ties, fmt)).sum()) == wrong
    assert_bits_equal(theirs, lp.quantize(ties, fmt, rounding="nearest_away"), given=ties)


@pytest.mark.parametrize(("fmt", "shape", "wrong"), [(*SHAPES[0], 4), (*SHAPES[1], 8)])
def test_qtorch_rounds_subnormals_twice(
    fmt: str, shape: dict[str, int], wrong: int, float_quantize: Callable[..., Tensor]
) -> None:
    """Difference: just below a tie between subnormals it goes up, since it adds an offset in float32 first."""
    values = torch.from_numpy(lp.format(fmt).values()).float()
    positive = values[values >= 0]
    ties = (positive[1:] + positive[:-1]) / 2
    below, above = torch.nextafter(ties, torch.zeros(())), torch.nextafter(ties, torch.full((), torch.inf))
    theirs = float_quantize(below, **shape, rounding="nearest")
    differs = theirs != lp.quantize(below, fmt)
    assert int(differs.sum()) == wrong == 2 ** shape["man"]
    assert (theirs[differs] > below[differs]).all()
    assert below[differs].max() < 2 ** shape["man"] * positive[1]
    assert torch.equal(float_quantize(above, **shape, rounding="nearest"), lp.quantize(above, fmt))


@pytest.mark.parametrize(("fmt", "shape"), SHAPES)
def test_qtorch_loses_nan_and_the_sign_of_zero(
    fmt: str, shape: dict[str, int], float_quantize: Callable[..., Tensor]
) -> None:
    """Differences: NaN becomes the largest value, -0 becomes +0. Infinities saturate, as ours do."""
    x = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf])
    theirs, largest = float_quantize(x, **shape, rounding="nearest"), lp.format(fmt).max
    assert theirs.tolist() == [largest, 0.0, largest, -largest]
    assert not theirs[1].signbit()
    ours = lp.quantize(x, fmt)
    assert ours[0].isnan()
    assert ours[1].signbit()
    assert ours[2:].tolist() == [largest, -largest]


def test_qtorch_flips_signs_at_float32s_own_width(float_quantize: Callable[..., Tensor]) -> None:
    """Difference: 1-8-23 holds every float32; qtorch gives back the negative."""
    x = torch.tensor([3.0, 1.125, -1.0])
    assert float_quantize(x, exp=8, man=23, rounding="nearest").tolist() == [-3.0, -1.125, 1.0]
    assert torch.equal(lp.quantize(x, "fp32"), x)


def test_qtorchs_stochastic_rounding_ignores_manual_seed(float_quantize: Callable[..., Tensor]) -> None:
    """Difference: two draws after one seed are two draws."""
    x = torch.full((10_000,), 1.125)

    def draw(cast: Callable[..., Any]) -> Tensor:
        torch.manual_seed(3)
        result: Tensor = cast()
        return result

    theirs = [draw(lambda: float_quantize(x, exp=5, man=2, rounding="stochastic")) for _ in range(2)]
    ours = [draw(lambda: lp.quantize(x, "1-5-2", rounding="stochastic")) for _ in range(2)]
    assert not torch.equal(*theirs)
    assert torch.equal(*ours)
