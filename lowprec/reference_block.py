"""The judge of block formats: exact fractions, one element at a time. Slow, and evidently right.

Tensors are flat sequences of numbers in row-major order with a shape. An element finds its block by its coordinates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from lowprec import reference
from lowprec.formats import NAMES, BlockFormat, FloatFormat
from lowprec.rounding import Rounding

DTYPES = {"float64": (53, 1023), "float32": (24, 127), "float16": (11, 15), "bfloat16": (8, 127)}
"""Significand bits, with the leading one, and largest exponent of the dtypes that hold values."""


@dataclass(frozen=True)
class Quantized:
    """A tensor in a block format: what `quantize` gives, and the codes of `encode` as they are stored."""

    values: list[float]
    codes: list[int]
    scales: list[int]
    tensor_scale: float | None


def quantize(
    x: Sequence[float],
    shape: Sequence[int],
    fmt: BlockFormat,
    dim: int = -1,
    dtype: str = "float32",
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    words: Sequence[int] | None = None,
    random_bits: int = 32,
) -> Quantized:
    """Round numbers of a dtype to a block format; `words` are the elements' random words.

    Raises:
        ValueError: for a dtype that holds the elements with no power-of-two scale.
    """
    if fmt.scale == "e8m0":
        scale_range(fmt.element, dtype)
    places = blocks_of(shape, fmt, dim)
    members: list[list[float]] = [[] for _ in range(math.prod(scales_shape(shape, fmt, dim)))]
    for number, place in zip(x, places, strict=True):
        members[place].append(number)
    overall = tensor_scale(x, fmt, dtype) if fmt.tensor_scale else None
    codes_of_scales = [scale_code(block, fmt, dtype, overall) for block in members]
    values, codes = [], []
    for i, (number, place) in enumerate(zip(x, places, strict=True)):
        scale = scale_value(codes_of_scales[place], fmt, overall)
        assert scale is not None
        code = element_code(number, scale, fmt.element, rounding, saturate, words[i] if words else 0, random_bits)
        codes.append(store(code, fmt))
        values.append(number if math.isnan(number) else element_value(code, scale, fmt.element, dtype, number))
    nan = 255 if fmt.scale == "e8m0" else reference.nan_code(_scale(fmt), False)
    marked = [nan if any(map(math.isnan, m)) else c for m, c in zip(members, codes_of_scales, strict=True)]
    return Quantized(values, codes, marked, overall)


def decode(
    codes: Sequence[int],
    scales: Sequence[int],
    overall: float | None,
    shape: Sequence[int],
    fmt: BlockFormat,
    dim: int = -1,
    dtype: str = "float32",
) -> list[float]:
    """The values of codes, the exact product rounded once into a dtype."""
    values = []
    for stored, place in zip(codes, blocks_of(shape, fmt, dim), strict=True):
        scale = scale_value(scales[place], fmt, overall)
        code = store(stored, fmt)
        sign = -1.0 if code & fmt.element.sign_code else 1.0
        values.append(math.nan if scale is None else element_value(code, scale, fmt.element, dtype, sign))
    return values


# Which block an element belongs to.


def scales_shape(shape: Sequence[int], fmt: BlockFormat, dim: int) -> tuple[int, ...]:
    """The shape of the scales."""
    sizes = _sizes(shape, fmt, dim)
    if fmt.block == "tensor":
        return ()
    return tuple(-(-length // size) for length, size in zip(shape, sizes, strict=True))


def _sizes(shape: Sequence[int], fmt: BlockFormat, dim: int) -> list[int]:
    """The block's size along each dimension."""
    sizes = [1] * len(shape)
    if isinstance(fmt.block, tuple):
        for place, size in zip((-1, -2), reversed(fmt.block), strict=True):
            if len(shape) >= -place:
                sizes[place] = size
    elif fmt.block != "tensor" and shape:
        sizes[dim] = int(fmt.block)
    return sizes


def blocks_of(shape: Sequence[int], fmt: BlockFormat, dim: int) -> list[int]:
    """For each element in row-major order the row-major index of its block."""
    counts, sizes = scales_shape(shape, fmt, dim), _sizes(shape, fmt, dim)
    places = []
    for coordinates in itertools.product(*map(range, shape)):
        index = 0
        for at, size, count in zip(coordinates, sizes, counts, strict=False):
            index = index * count + at // size
        places.append(index)
    return places


# Scales.


def tensor_scale(x: Sequence[float], fmt: BlockFormat, dtype: str) -> float:
    """The scale amax / (largest element · largest scale) in float32, saturating.

    A tensor without finite nonzero numbers, but with infinities, counts as holding the dtype's largest number.
    """
    amax = _amax(x)
    if amax == 0 and any(map(math.isinf, x)):
        precision, bias = DTYPES[dtype]
        amax = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** bias
    return reference.quantize(amax / (Fraction(fmt.element.max) * Fraction(_scale(fmt).max)), NAMES["fp32"])


def _amax(x: Sequence[float]) -> Fraction:
    return max((abs(Fraction(number)) for number in x if math.isfinite(number)), default=Fraction(0))


def _scale(fmt: BlockFormat) -> FloatFormat:
    assert isinstance(fmt.scale, FloatFormat)
    return fmt.scale


def scale_code(block: Sequence[float], fmt: BlockFormat, dtype: str, overall: float | None) -> int:
    """The code of a block's scale, NaN left aside."""
    amax, infinite = _amax(block), any(map(math.isinf, block))
    if fmt.scale == "e8m0":
        low, high = scale_range(fmt.element, dtype)
        if amax == 0:
            return (high if infinite else low) + 127
        return min(max(exponent(amax, fmt), low), high) + 127
    scale = _scale(fmt)
    if amax == 0 and infinite:
        return scale.max_code
    divisor = Fraction(fmt.element.max) * (1 if overall is None else Fraction(overall))
    return 0 if divisor == 0 else reference.encode(amax / divisor, scale)


def exponent(amax: Fraction, fmt: BlockFormat) -> int:
    """The exponent k of a block's scale by the format's rule, before it is clamped."""
    floor, largest = reference._floor_log2(amax), Fraction(fmt.element.max)
    if fmt.rule == "floor":
        return floor - fmt.element.emax
    if fmt.rule == "ceil":
        k = floor - fmt.element.emax - 1
        while amax > largest * Fraction(2) ** k:
            k += 1
        return k
    largest_step = reference.grid(fmt.element, fmt.element.max_code + 1) - largest
    step = largest_step * Fraction(2) ** (floor - fmt.element.emax)
    return reference._floor_log2(round(amax / step) * step) - fmt.element.emax


@lru_cache(maxsize=256)
def scale_range(element: FloatFormat, dtype: str) -> tuple[int, int]:
    """The exponents, from -127 to 127, with which a dtype holds every finite element times the scale."""
    values = [reference.grid(element, code) for code in _telling(element)]
    held = [k for k in range(-127, 128) if all(_held(value * Fraction(2) ** k, dtype) for value in values)]
    if not held:
        raise ValueError(f"{dtype} cannot hold {element} with any scale")
    return held[0], held[-1]


def _telling(fmt: FloatFormat) -> set[int]:
    """Codes whose values need the most range and precision."""
    first = 1 if fmt.subnormals else 1 << fmt.mbits
    codes = {first, first + 1, fmt.max_code, fmt.max_code - 1, *(1 << i for i in range(fmt.ebits + fmt.mbits))}
    return {code for code in codes if first <= code <= fmt.max_code}


def _held(x: Fraction, dtype: str) -> bool:
    value = to_dtype(x, dtype)
    return math.isfinite(value) and Fraction(value) == x


def scale_value(code: int, fmt: BlockFormat, overall: float | None) -> Fraction | None:
    """What a scale's code means, times the tensor's scale; None where either is no finite number."""
    if fmt.scale == "e8m0":
        return None if code == 255 else Fraction(2) ** (code - 127)
    value = reference.decode(code, _scale(fmt))
    if not math.isfinite(value) or (overall is not None and not math.isfinite(overall)):
        return None
    return Fraction(value) * (1 if overall is None else Fraction(overall))


# Elements.


def element_code(
    x: float, scale: Fraction, fmt: FloatFormat, rounding: Rounding | str, saturate: bool, word: int, bits: int
) -> int:
    """The code of one element: the exact quotient rounded once; 0 where the scale is."""
    if math.isnan(x):
        return reference.nan_code(fmt, math.copysign(1.0, x) < 0)
    if scale == 0:
        return 0
    if math.isinf(x) or x == 0:
        return reference.encode(x, fmt, rounding, saturate)
    return reference.encode(Fraction(x) / scale, fmt, rounding, saturate, word, bits)


def element_value(code: int, scale: Fraction, fmt: FloatFormat, dtype: str, like: float) -> float:
    """Code times scale in a dtype; a NaN has the sign of `like`, if the format's NaNs have one."""
    value = reference.decode(code, fmt)
    sign = math.copysign(1.0, value) * (-1.0 if scale < 0 else 1.0)
    if math.isnan(value):
        return math.copysign(value, like)
    if math.isinf(value):
        return math.nan if scale == 0 else sign * math.inf
    return math.copysign(to_dtype(abs(Fraction(value) * scale), dtype), sign)


def store(code: int, fmt: BlockFormat) -> int:
    """An element's code as it is stored, and back: two's complement where the format has it."""
    sign = fmt.element.sign_code
    return 3 * sign - code if fmt.twos_complement and code > sign else code


def to_dtype(x: Fraction, dtype: str) -> float:
    """A non-negative number rounded to nearest even in a dtype; infinity past its largest."""
    precision, bias = DTYPES[dtype]
    if x == 0:
        return 0.0
    last = max(reference._floor_log2(x) - (precision - 1), 2 - bias - precision)
    rounded = round(x / Fraction(2) ** last) * Fraction(2) ** last
    return math.inf if rounded >= Fraction(2) ** (bias + 1) else float(rounded)
