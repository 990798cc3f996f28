"""Bad input to the casts: an error before any work that names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops
from lowprec.testing import all_codes, assert_bits_equal, patterns

CASTS = [lp.quantize, lp.encode]
X = torch.ones(3)


# The tensor.


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_tensors_that_are_not_floats(cast: Callable[..., Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"x must be a dense tensor of torch.float64, torch.float32, .*, got {dtype}"):
        cast(torch.zeros(3).to(dtype), "e4m3fn")


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("x", [1.5, [1.0, 2.0], np.ones(3, np.float32), None, "x"], ids=repr)
def test_what_is_no_tensor(cast: Callable[..., Tensor], x: object) -> None:
    with pytest.raises(TypeError, match=f"x must be a tensor, got {type(x).__name__}"):
        cast(x, "e4m3fn")


@pytest.mark.parametrize("cast", CASTS)
def test_sparse_tensors(cast: Callable[..., Tensor]) -> None:
    for x in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_coo().coalesce()):
        with pytest.raises(TypeError, match="x must be a dense tensor .*torch.sparse_coo"):
            cast(x, "e4m3fn")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("cast", CASTS)
def test_nested_tensors(cast: Callable[..., Tensor]) -> None:
    for layout in (torch.jagged, torch.strided):
        with pytest.raises(TypeError, match="x must be a dense tensor"):
            cast(torch.nested.nested_tensor([X, X], layout=layout), "e4m3fn")


@pytest.mark.parametrize("cast", CASTS)
def test_empty_tensors_nan_and_infinity_are_clean(cast: Callable[..., Tensor]) -> None:
    for shape in ((0,), (2, 0, 3), ()):
        assert cast(torch.zeros(shape), "e4m3fn").shape == shape
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert lp.quantize(special, "1-4-3").tolist()[1:] == [480.0, -480.0]
    assert lp.encode(special, "1-4-3").tolist() == [0x7F, 0x7F, 0xFF]


# The format.


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("fmt", ["e4m3fnz", "1-4", "", "1-4-3:bias=x", "1-4-3:bias=2000", "1-0-0"])
def test_formats_that_are_none(cast: Callable[..., Tensor], fmt: str) -> None:
    with pytest.raises(ValueError, match="format|bias|1-0-0"):
        cast(X, fmt)
    with pytest.raises(ValueError, match="format|bias|1-0-0"):
        lp.decode(torch.zeros(3, dtype=torch.uint8), fmt)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("fmt", [None, 8, torch.float64, torch.int8, ("1-4-3",), ["1-4-3"]], ids=repr)
def test_formats_of_a_wrong_type(cast: Callable[..., Tensor], fmt: Any) -> None:
    with pytest.raises(TypeError, match="format"):
        cast(X, fmt)


@pytest.mark.parametrize(
    ("dtype", "fmt", "why"),
    [
        (torch.float16, "1-5-2", "range above: 1-5-2 reaches 114688"),
        (torch.float16, "1-5-2:emax=1", "range below: to 2^-31"),
        (torch.float16, "bf16", "range"),
        (torch.bfloat16, "fp16", "precision: 11 bits"),
        (torch.bfloat16, "1-4-8", "precision: 9 bits"),
        (torch.float32, "1-4-3:bias=150", "range below: to 2^-152"),
        (torch.float32, "1-11-4:specials=ieee", "range"),
        (torch.float32, "1-4-24", "precision: 25 bits"),
    ],
)
def test_a_dtype_that_cannot_hold_the_format(dtype: torch.dtype, fmt: str, why: str) -> None:
    text = str(lp.format(fmt))
    with pytest.raises(
        ValueError, match=rf"{dtype} cannot hold [\d.e+-]+, a value of {text}: use a wider dtype, or encode"
    ):
        lp.quantize(X.to(dtype), fmt)
    codes = lp.encode(X.to(dtype), fmt)
    with pytest.raises(ValueError, match="cannot hold"):
        lp.decode(codes, fmt, dtype=dtype)
    assert lp.decode(codes, fmt, dtype=torch.float64).shape == X.shape, why


# The mode.


@pytest.mark.parametrize("cast", CASTS)
def test_modes(cast: Callable[..., Tensor]) -> None:
    for rounding in ("nearest", "", None, 0, ["up"]):
        with pytest.raises(
            (ValueError, TypeError), match="rounding must be one of nearest_even, .*stochastic, got|unhashable"
        ):
            cast(X, "e4m3fn", rounding=rounding)
    for saturate in (1, None, "yes"):
        with pytest.raises(TypeError, match="saturate must be a bool, got"):
            cast(X, "e4m3fn", saturate=saturate)
    for random_bits in (0, 4, 24, 64, "32", None):
        with pytest.raises(ValueError, match="random_bits must be 32, 16 or 8, got"):
            cast(X, "e4m3fn", rounding="stochastic", random_bits=random_bits)


@pytest.mark.parametrize("cast", CASTS)
def test_arguments_are_by_keyword(cast: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match="positional"):
        cast(X, "e4m3fn", "up")


# Seeds.


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["seed", "offset"])
def test_seeds_and_offsets(cast: Callable[..., Tensor], name: str) -> None:
    for bad in (1.5, "1", True, np.int64(3)):
        with pytest.raises(TypeError, match=f"{name} must be an int or a 0-dim int64 tensor, got"):
            cast(X, "e4m3fn", rounding="stochastic", **{"seed": 1, name: bad})
    for tensor in (torch.tensor([1]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.ones(2, 2).long()):
        with pytest.raises(ValueError, match=f"{name} must be a 0-dim int64 tensor, got {tensor.dtype} of shape"):
            cast(X, "e4m3fn", rounding="stochastic", **{"seed": 1, name: tensor})


@pytest.mark.parametrize("cast", CASTS)
def test_seed_and_generator_exclude_each_other(cast: Callable[..., Tensor]) -> None:
    for rounding in ("stochastic", "nearest_even"):
        with pytest.raises(ValueError, match="seed or generator, not both"):
            cast(X, "e4m3fn", rounding=rounding, seed=1, generator=torch.Generator())


@pytest.mark.parametrize("cast", CASTS)
def test_generators(cast: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got int"):
        cast(X, "e4m3fn", rounding="stochastic", generator=5)


@pytest.mark.gpu
@pytest.mark.parametrize("cast", CASTS)
def test_a_seed_on_another_device(cast: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="seed must be on the CPU or on cpu, got cuda:0"):
        cast(X, "e4m3fn", rounding="stochastic", seed=torch.tensor(1, device="cuda"))


# Codes.


@pytest.mark.parametrize(
    ("codes", "fmt", "wanted"),
    [
        (torch.zeros(3, dtype=torch.int8), "e4m3fn", "torch.uint8"),
        (torch.zeros(3, dtype=torch.uint16), "e4m3fn", "torch.uint8"),
        (torch.zeros(3, dtype=torch.int64), "e4m3fn", "torch.uint8"),
        (torch.zeros(3, dtype=torch.uint8), "bf16", "torch.uint16"),
        (torch.zeros(3, dtype=torch.uint16), "tf32", "torch.uint32"),
        (torch.zeros(3), "e4m3fn", "torch.uint8"),
    ],
)
def test_codes_of_another_dtype(codes: Tensor, fmt: str, wanted: str) -> None:
    with pytest.raises(TypeError, match=f"codes of {fmt} are {wanted}, got {codes.dtype}"):
        lp.decode(codes, fmt)


def test_decode_wants_a_tensor_and_a_format() -> None:
    with pytest.raises(TypeError, match="codes must be a tensor, got list"):
        lp.decode([1, 2], "e4m3fn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fmt is needed to decode torch.uint8"):
        lp.decode(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="expected a format"):
        lp.decode(torch.zeros(3, dtype=torch.uint8).view(torch.float8_e8m0fnu))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e5m2, torch.complex64, "float32", None])
def test_decode_into_another_dtype(dtype: Any) -> None:
    with pytest.raises(
        TypeError, match="dtype must be one of torch.float64, torch.float32, torch.float16, torch.bfloat16, got"
    ):
        lp.decode(torch.zeros(3, dtype=torch.uint8), "e4m3fn", dtype=dtype)


# Where to write.


def test_out_of_another_kind() -> None:
    codes = lp.encode(X, "e4m3fn")
    wrong = [
        (lp.quantize, X, torch.empty(4)),
        (lp.quantize, X, torch.empty(1, 3)),
        (lp.quantize, X, torch.empty(3, dtype=torch.float64)),
        (lp.encode, X, torch.empty(3)),
        (lp.encode, X, torch.empty(3, dtype=torch.int8)),
        (lp.decode, codes, torch.empty(3, dtype=torch.float16)),
        (lp.decode, codes, torch.empty(2)),
        (lp.quantize, X, torch.empty(3, device="meta")),
    ]
    for cast, x, out in wrong:
        with pytest.raises(ValueError, match=r"out must be torch\..* of shape \(3,\) on cpu, got"):
            cast(x, "e4m3fn", out=out)
    with pytest.raises(TypeError, match="out must be a tensor, got ndarray"):
        lp.quantize(X, "e4m3fn", out=np.zeros(3))  # type: ignore[arg-type]


def test_out_is_not_differentiable() -> None:
    leaf = torch.ones(3, requires_grad=True)
    for x, out in ((leaf, torch.empty(3)), (X, torch.empty(3, requires_grad=True))):
        with pytest.raises(ValueError, match="out= is not differentiable"):
            lp.quantize(x, "e4m3fn", out=out)
    with torch.no_grad():
        assert_bits_equal(lp.quantize(leaf, "e4m3fn", out=torch.empty(3)), torch.ones(3))


def test_out_that_overlaps() -> None:
    storage = torch.arange(10.0)
    with pytest.raises(ValueError, match="out must not be expanded"):
        lp.quantize(torch.ones(3, 4), "e4m3fn", out=torch.empty(3, 1).expand(3, 4))
    with pytest.raises(ValueError, match="out must be x itself or share no memory with it"):
        lp.quantize(storage[:8], "e4m3fn", out=storage[1:9])
    with pytest.raises(ValueError, match="out must be x itself or share no memory with it"):
        lp.encode(storage[:4], "e4m3fn", out=storage.view(torch.uint8)[:4])
    assert torch.equal(storage, torch.arange(10.0)), "nothing was written"


def test_out_is_not_vmappable() -> None:
    with pytest.raises(ValueError, match="out= is not vmappable"):
        torch.vmap(lambda x: lp.quantize(x, "e4m3fn", out=torch.empty(3)))(torch.ones(2, 3))
    with pytest.raises(ValueError, match="out= is not vmappable"):
        torch.vmap(lambda out: lp.quantize(X, "e4m3fn", out=out))(torch.ones(2, 3))


# The ops, which check little and must never crash: Python has said what is wrong before.


@pytest.mark.parametrize(
    "arguments",
    [
        ([4, 3], 0, True, None, None, 32),
        ([4, 3, 7, 9, 1], 0, True, None, None, 32),
        ([9, 30, 7, 0, 1], 0, True, None, None, 32),
        ([4, 3, 10**6, 0, 1], 0, True, None, None, 32),
        ([4, 3, 7, 0, 1], 7, True, None, None, 32),
        ([4, 3, 7, 0, 1], 6, True, torch.tensor([1, 2]), None, 32),
        ([4, 3, 7, 0, 1], 6, True, torch.tensor(1.0), None, 32),
    ],
)
def test_ops_refuse_what_they_cannot_use(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
        _ops.quantize(X, *arguments)


# The tests' own tools.


def test_assert_bits_equal_names_the_difference() -> None:
    expected = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    assert_bits_equal(expected, expected.t().contiguous().t())
    first = r"differs in 2 of 4 elements, first at \(0, 1\): -0.0 \(0x80000000\) instead of 0.0 \(0x00000000\)"
    with pytest.raises(AssertionError, match=first + r", from 9.0 \(0x41100000\)"):
        assert_bits_equal(torch.tensor([[1.0, -0.0], [2.0, 4.0]]), expected, given=torch.full((2, 2), 9.0))
    with pytest.raises(
        AssertionError, match=r"codes: torch.float32 of shape \(2,\) instead of torch.float64 of shape \(2,\)"
    ):
        assert_bits_equal(torch.ones(2), torch.ones(2).double(), what="codes")
    with pytest.raises(AssertionError, match=r"instead of torch.float32 of shape \(3,\)"):
        assert_bits_equal(torch.ones(2), torch.ones(3))
    quiet, other = patterns(torch.bfloat16, 0x7FC0, 0x7FC2).split(1)
    with pytest.raises(AssertionError, match=r"nan \(0x7fc1\) instead of nan \(0x7fc0\)"):
        assert_bits_equal(other, quiet)
    with pytest.raises(AssertionError, match=r"at \(\)"):
        assert_bits_equal(torch.tensor(1.0), torch.tensor(2.0))


def test_all_codes_stop_at_16_bits() -> None:
    with pytest.raises(ValueError, match="up to 16 bits"):
        all_codes(lp.format("tf32"))
