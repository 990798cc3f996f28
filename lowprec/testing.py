"""Checking number formats to the bit: the inputs worth trying, and comparisons that name the first difference.

For tests of this package and of anything built on its formats.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowprec.eager import CONTAINERS, code_dtype
from lowprec.formats import FloatFormat

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The bit patterns of a tensor, as integers of its own width: uint8, int16, int32 or int64, x's shape."""
    return x.view(_INTEGERS[x.dtype.itemsize])


def assert_bits_equal(actual: Tensor, expected: Tensor, *, given: Tensor | None = None, what: str = "result") -> None:
    """Check that two tensors have the same shape, dtype and bits; they may be on two devices.

    Unlike an equality of values this tells +0 from -0 and one NaN from another.

    Args:
        actual: a tensor of any dtype and strides.
        expected: what it should be.
        given: the inputs, of the same shape; the failure then shows the one that led to the first difference.
        what: what is compared, for the failure's first words.

    Raises:
        AssertionError: naming the number of differences, the coordinate of the first one and both of its bit patterns.
    """
    head = f"{what}: {actual.dtype} of shape {tuple(actual.shape)}"
    wanted = f"{expected.dtype} of shape {tuple(expected.shape)}"
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        raise AssertionError(f"{head} instead of {wanted}")
    differs = bits(actual.detach().cpu()) != bits(expected.detach().cpu())
    if not differs.any():
        return
    where = tuple(differs.nonzero()[0].tolist())
    source = "" if given is None else f", from {_show(given, where)}"
    raise AssertionError(
        f"{head} differs in {int(differs.sum())} of {differs.numel()} elements, first at {where}: "
        f"{_show(actual, where)} instead of {_show(expected, where)}{source}"
    )


def _show(x: Tensor, where: tuple[int, ...]) -> str:
    """One element as its value and its bit pattern."""
    element = x.detach()[where].cpu()
    width = element.dtype.itemsize
    pattern = int(bits(element).item()) % (1 << (8 * width))
    return f"{element.item()!r} (0x{pattern:0{2 * width}x})"


def patterns(dtype: torch.dtype, start: int = 0, stop: int | None = None, step: int = 1) -> Tensor:
    """Values by their bit patterns: start, start + step, ... up to stop (by default all there are), as a 1-dim tensor.

    Args:
        dtype: float64, float32, float16 or bfloat16.
        start: the first pattern, a non-negative integer: 0x80000000 is the -0 of float32.
        stop: one past the last pattern.
        step: between two patterns.
    """
    integer = CONTAINERS[dtype].integer
    count = 1 << (8 * dtype.itemsize)
    wrapped = torch.arange(start, count if stop is None else stop, step, dtype=torch.int64)
    return wrapped.to(integer).view(dtype)


def special_values(dtype: torch.dtype) -> Tensor:
    """The corners of a dtype, in both signs, as a 1-dim tensor.

    0, the smallest and largest subnormal, the smallest normal, 1, the largest finite value, infinity, the quiet NaN, a
    signalling NaN and the NaN of all ones.
    """
    precision, bias, integer = CONTAINERS[dtype]
    normal, infinity = 1 << (precision - 1), (2 * bias + 1) << (precision - 1)
    quiet = infinity | normal >> 1
    finite = [0, 1, normal - 1, normal, bias << (precision - 1), infinity - 1]
    positive = torch.tensor([*finite, infinity, quiet, infinity + 1, infinity | normal - 1])
    sign = torch.tensor(-1 << (8 * dtype.itemsize - 1), dtype=torch.int64)
    return torch.cat([positive, positive | sign]).to(integer).view(dtype)


def all_codes(fmt: FloatFormat) -> Tensor:
    """Every code of a format of up to 16 bits, ascending, in the dtype that `encode` gives."""
    if fmt.bits > 16:
        raise ValueError(f"all_codes() lists formats up to 16 bits; {fmt} has {fmt.bits}")
    return torch.arange(1 << fmt.bits).to(code_dtype(fmt.fields))


def canonical_codes(fmt: FloatFormat) -> Tensor:
    """The codes that `encode` writes, ascending: one for each value, infinity and sign of NaN.

    Left out are those of other NaN payloads and, with subnormals off, those of zero with mantissa bits.
    """
    codes = all_codes(fmt).to(torch.int64)
    magnitude = codes & (fmt.sign_code - 1)
    quiet = fmt.top_code if fmt.specials == "fn" else fmt.max_code + 1 + (1 << fmt.mbits >> 1)
    kept = (magnitude <= fmt.max_code) | (magnitude == quiet) | ((magnitude == fmt.max_code + 1) & fmt.has_inf)
    if not fmt.subnormals:
        kept &= (magnitude == 0) | (magnitude >> fmt.mbits > 0)
    return codes[kept].to(code_dtype(fmt.fields))


def neighbourhood(fmt: FloatFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where rounding to a format of up to 16 bits can go wrong, in both signs, as a 1-dim tensor without NaN.

    Every finite value, the next one that the format would have, and every midpoint between two of these; each of them
    rounded to `dtype`, and its two neighbours in `dtype`.
    """
    precision, bias, integer = CONTAINERS[dtype]
    positive = fmt.values()[len(fmt.values()) // 2 :]
    spacing = math.ldexp(1.0, max(fmt.emax, fmt.emin) - fmt.mbits)
    grid = np.append(positive, fmt.max + spacing)
    points = torch.from_numpy(np.concatenate([grid, grid[:-1] + np.diff(grid) / 2])).to(dtype)
    infinity = (2 * bias + 1) << (precision - 1)
    around = torch.cat([bits(points).to(torch.int64) + step for step in (-1, 0, 1)])
    magnitudes = around.clamp(0, infinity).to(integer).view(dtype)
    return torch.cat([magnitudes, -magnitudes])
