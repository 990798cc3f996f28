"""The casts on tensors, in plain torch: any device, nothing compiled, the same bits as the compiled kernels.

Works on the bit patterns alone, in int64, so that no floating-point mode of the machine (flush to zero, say) can change
a result. The kernels in cuda/include/lowprec/cast.h follow the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.formats import FloatFormat
from lowprec.rounding import GOES_UP, OVERFLOWS, Rest, Rounding


class Container(NamedTuple):
    """A dtype that holds values: significand bits with the leading one, exponent bias, and the integers of its bits."""

    precision: int
    bias: int
    integer: torch.dtype


CONTAINERS = {
    torch.float64: Container(53, 1023, torch.int64),
    torch.float32: Container(24, 127, torch.int32),
    torch.float16: Container(11, 15, torch.int16),
    torch.bfloat16: Container(8, 127, torch.int16),
}

_WORD = 0xFFFFFFFF
_FAR = 63  # shifting a significand this far leaves nothing of it, and stays a legal shift


class Unpacked(NamedTuple):
    """A float tensor as integers: |x| = significand · 2^exponent where finite. All int64 or bool, shaped like x."""

    negative: Tensor
    significand: Tensor
    exponent: Tensor
    infinite: Tensor
    nan: Tensor


def unpack(x: Tensor) -> Unpacked:
    """The integers of a float tensor."""
    precision, bias, integer = CONTAINERS[x.dtype]
    bits = x.view(integer).to(torch.int64)
    fraction = bits & ((1 << (precision - 1)) - 1)
    field = (bits >> (precision - 1)) & (2 * bias + 1)
    special = field == 2 * bias + 1
    significand = fraction + ((field > 0).to(torch.int64) << (precision - 1))
    exponent = field.clamp(min=1) - (bias + precision - 1)
    return Unpacked(bits < 0, significand, exponent, special & (fraction == 0), special & (fraction != 0))


def floor_log2(n: Tensor) -> Tensor:
    """Index of the leading bit of positive int64 numbers, read from their float64; -1023 for 0."""
    lower = n & ~(n >> 1)  # the same leading bit, and none after it: conversion cannot round up to the next one
    return (lower.to(torch.float64).view(torch.int64) >> 52) - 1023


def _shift_right(n: Tensor, by: Tensor) -> Tensor:
    """Give n · 2^-by rounded down; a left shift where `by` is negative."""
    return torch.where(by >= 0, n >> by.clamp(0, _FAR), n << (-by).clamp(0, _FAR))


class Lower(NamedTuple):
    """The lower neighbour's magnitude code (on the grid without bound), the upper one's, and what lies between."""

    code: Tensor
    step: Tensor
    rest: Rest


def lower_neighbour(
    parts: Unpacked, fmt: FloatFormat, word: Tensor | None, random_bits: int, sticky: Tensor | None = None
) -> Lower:
    """Place finite magnitudes between their neighbours in the format; `sticky` as for `round_code`."""
    zero = parts.significand == 0  # which has no leading bit; any place that is not above the smallest normal will do
    leading = torch.where(zero, fmt.emin, floor_log2(parts.significand) + parts.exponent)
    above_normal = (leading - fmt.emin).clamp(min=0) if fmt.ebits else torch.zeros_like(leading)
    quantum = above_normal + (fmt.emin - fmt.mbits)
    step = torch.ones_like(quantum)
    if not fmt.subnormals:
        # Below the smallest normal the neighbours are zero and that normal, one spacing of 2^emin apart.
        tiny = leading < fmt.emin
        quantum = torch.where(tiny, fmt.emin, quantum)
        step = torch.where(tiny, 1 << fmt.mbits, step)
    # Without exponent bits a code can grow past any shift: far above the largest code, its exact size is of no use.
    significand = torch.where(leading - quantum > 40, 1, parts.significand)
    dropped = torch.where(leading - quantum > 40, -40, quantum - parts.exponent)
    code = (above_normal << fmt.mbits) + _shift_right(significand, dropped)
    rest = _rest(significand, dropped, code, parts.negative, word, random_bits, sticky)
    return Lower(code, step, rest)


def _rest(
    significand: Tensor,
    dropped: Tensor,
    code: Tensor,
    negative: Tensor,
    word: Tensor | None,
    random_bits: int,
    sticky: Tensor | None = None,
) -> Rest:
    near = dropped.clamp(0, _FAR)
    one = torch.ones_like(near)
    rest = significand & ((one << near) - 1)
    half = one << (near - 1).clamp(min=0)
    if word is None:
        carry = torch.zeros_like(negative)
    else:
        fraction = torch.where(dropped <= 0, 0, _shift_right(rest, dropped - random_bits))
        carry = fraction + word >= 1 << random_bits
    near_enough = dropped <= _FAR  # for the fraction to reach a half
    inexact, middle, above = rest != 0, near_enough & (rest == half), near_enough & (rest > half)
    if sticky is not None:
        inexact, middle, above = inexact | sticky, middle & ~sticky, above | (middle & sticky)
    return Rest(inexact, middle, above, (code & 1) == 1, negative, carry)


class Rounded(NamedTuple):
    """Magnitude codes no larger than max_code, and where an infinity takes their place."""

    code: Tensor
    overflow: Tensor
    infinite: Tensor


def round_code(
    parts: Unpacked,
    fmt: FloatFormat,
    rounding: Rounding,
    saturate: bool,
    word: Tensor | None,
    random_bits: int,
    sticky: Tensor | None = None,
) -> Rounded:
    """Round magnitudes to codes. Entries where the input is NaN mean nothing.

    `sticky`: where a magnitude lies above significand · 2^exponent, by less than one unit of the significand. There
    the significand must have at least `random_bits` bits below those that the format keeps.
    """
    lower = lower_neighbour(parts, fmt, word, random_bits, sticky)
    code = torch.where(GOES_UP[rounding](lower.rest), lower.code + lower.step, lower.code)
    overflow = (code > fmt.max_code) | parts.infinite
    if saturate or fmt.specials == "finite":
        infinite = torch.zeros_like(overflow)
    else:
        infinite = parts.infinite | (overflow & OVERFLOWS[rounding](parts.negative))
    return Rounded(torch.where(overflow, fmt.max_code, code), overflow, infinite)


def pack(code: Tensor, negative: Tensor, fmt: FloatFormat, dtype: torch.dtype, shift: Tensor | int = 0) -> Tensor:
    """The bits, in a container that holds them, of the values of finite magnitude codes, times 2^shift."""
    precision, bias, _ = CONTAINERS[dtype]
    field, mantissa = code >> fmt.mbits, code & fmt.mantissa_mask
    significand = mantissa + ((field > 0).to(torch.int64) << fmt.mbits)
    if not fmt.subnormals:
        significand = torch.where(field > 0, significand, 0)
    exponent = field.clamp(min=1) - (fmt.bias + fmt.mbits) + shift
    leading = floor_log2(significand)
    # The container's own spacing there: never finer than that of its subnormals.
    spacing = (leading + exponent - (precision - 1)).clamp(min=2 - bias - precision)
    fraction = _shift_right(significand, spacing - exponent)
    bits = fraction + ((spacing + (bias + precision - 2)) << (precision - 1))
    zero = significand == 0
    signed = negative & (~zero | fmt.has_negative_zero)
    return torch.where(zero, 0, bits) | (signed.to(torch.int64) << _sign_bit(dtype))


def shift_range(fmt: FloatFormat, dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest k with which a dtype holds every finite value of a format times 2^k.

    Raises:
        ValueError: where there is none: the format has more mantissa bits, or a wider range, than the dtype.
    """
    precision, bias, _ = CONTAINERS[dtype]
    low, high = 2 - bias - precision - (fmt.emin - fmt.mbits), bias - fmt.emax
    if fmt.mbits + (fmt.ebits > 0) > precision or low > high:
        raise ValueError(f"{dtype} cannot hold every finite value of {fmt}, whatever its bias: use a wider dtype")
    return low, high


def hardest_values(fmt: FloatFormat) -> list[float]:
    """Values that need the most range and precision: a dtype that holds these holds every finite value."""
    smallest = 1 if fmt.subnormals else 1 << fmt.mbits
    codes = {smallest, smallest + 1, fmt.max_code, fmt.max_code - 1}
    return [fmt.magnitude(code) for code in sorted(codes) if code <= fmt.max_code]


def holds(dtype: torch.dtype, value: float) -> bool:
    """Whether a dtype has a finite nonzero value. Told from its fields: tensors may be fake here, or have no data."""
    precision, bias, _ = CONTAINERS[dtype]
    mantissa, exponent = math.frexp(value)
    last = max(exponent - precision, 2 - bias - precision)  # the exponent of the last bit that the dtype has there
    return exponent <= bias + 1 and exponent > last and math.ldexp(mantissa, exponent - last).is_integer()


def container_of(formats: Sequence[FloatFormat], own: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype for codes of some formats: `own`, that of values beside them, or the first that fits; None if none."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if own is None else (own,):
        if dtype in CONTAINERS and all(holds(dtype, value) for fmt in formats for value in hardest_values(fmt)):
            return dtype
    return None


def _sign_bit(dtype: torch.dtype) -> int:
    return dtype.itemsize * 8 - 1


def _special_bits(dtype: torch.dtype) -> tuple[int, int]:
    """The bits of +infinity and of the quiet NaN."""
    precision, bias, _ = CONTAINERS[dtype]
    infinity = (2 * bias + 1) << (precision - 1)
    return infinity, infinity | (1 << (precision - 2))


def _as_values(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(CONTAINERS[dtype].integer).view(dtype)


def quantize(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
    shift: Tensor | None = None,
    place: Sequence[int] = (),
) -> Tensor:
    """Values, in x's dtype and shape; NaN keeps its bits. See `lowprec.quantize`.

    `shift` lowers the format's bias: the values are those of the format times 2^shift, which is clamped to
    `shift_range`. `place` is where x lies in a larger tensor, whose elements' words it draws; see `random_words`.
    """
    word = random_words(x, seed, offset, random_bits, place) if rounding is Rounding.stochastic else None
    return quantize_parts(x, fmt, rounding, saturate, word, random_bits, shift)[0]


def quantize_parts(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    saturate: bool,
    word: Tensor | None,
    random_bits: int,
    shift: Tensor | None,
) -> tuple[Tensor, Unpacked, Rounded]:
    """`quantize`, and what it came from: the numbers taken apart, and their rounded codes."""
    parts = unpack(x)
    by = 0 if shift is None else shift.to(x.device).clamp(*shift_range(fmt, x.dtype))
    scaled = parts._replace(exponent=parts.exponent - by)
    rounded = round_code(scaled, fmt, rounding, saturate, word, random_bits)
    values = torch.where(parts.nan, x, values_of(rounded, parts.negative, fmt, x.dtype, by))
    return torch.empty_like(x).copy_(values), parts, rounded


def values_of(
    rounded: Rounded, negative: Tensor, fmt: FloatFormat, dtype: torch.dtype, shift: Tensor | int = 0
) -> Tensor:
    """Rounded codes and their infinities, or the NaNs that stand in for them, as values times 2^shift of a dtype."""
    infinity, nan = _special_bits(dtype)
    special = (negative.to(torch.int64) << _sign_bit(dtype)) | (infinity if fmt.has_inf else nan)
    bits = torch.where(rounded.infinite, special, pack(rounded.code, negative, fmt, dtype, shift))
    return _as_values(bits, dtype)


def encode(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
) -> Tensor:
    """Codes of the values, in the smallest unsigned dtype that holds them. See `lowprec.encode`."""
    parts = unpack(x)
    word = random_words(x, seed, offset, random_bits) if rounding is Rounding.stochastic else None
    rounded = round_code(parts, fmt, rounding, saturate, word, random_bits)
    out = torch.empty_like(x, dtype=code_dtype(fmt.fields))
    return out.copy_(full_codes(parts, rounded, fmt).to(out.dtype))


def full_codes(parts: Unpacked, rounded: Rounded, fmt: FloatFormat) -> Tensor:
    """The codes that rounded magnitudes make with their signs, infinities and NaNs, as int64."""
    signed = parts.negative & ((rounded.code != 0) | fmt.has_negative_zero)
    code = rounded.code | (signed.to(torch.int64) * fmt.sign_code)
    code = torch.where(rounded.infinite, _infinity_codes(parts.negative, fmt), code)
    return torch.where(parts.nan, _nan_codes(parts.negative, fmt), code)


def _nan_codes(negative: Tensor, fmt: FloatFormat) -> Tensor:
    if fmt.specials == "finite":
        return torch.full_like(negative, fmt.max_code, dtype=torch.int64)
    if not fmt.has_negative_zero:
        return torch.full_like(negative, fmt.sign_code, dtype=torch.int64)
    magnitude = fmt.top_code if fmt.specials == "fn" else fmt.max_code + 1 + (1 << (fmt.mbits - 1))
    return negative.to(torch.int64) * fmt.sign_code + magnitude


def _infinity_codes(negative: Tensor, fmt: FloatFormat) -> Tensor:
    """Codes of infinities, or of the NaNs that stand in for them."""
    if not fmt.has_inf:
        return _nan_codes(negative, fmt)
    return negative.to(torch.int64) * fmt.sign_code + (fmt.max_code + 1)


def code_dtype(fields: list[int]) -> torch.dtype:
    """uint8, uint16 or uint32: the smallest that holds the codes of the format with these `fields`."""
    bits = 1 + fields[0] + fields[1]
    return torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.uint32


def decode(codes: Tensor, fmt: FloatFormat, dtype: torch.dtype) -> Tensor:
    """Values of codes, exactly. See `lowprec.decode`."""
    code = codes.to(torch.int64) & ((fmt.sign_code << 1) - 1)
    negative, magnitude = code >= fmt.sign_code, code & (fmt.sign_code - 1)
    infinity, nan = _special_bits(dtype)
    sign = negative.to(torch.int64) << _sign_bit(dtype)
    bits = pack(magnitude.clamp(max=fmt.max_code), negative, fmt, dtype)
    special = sign | torch.where(magnitude == fmt.max_code + 1, infinity if fmt.has_inf else nan, nan)
    bits = torch.where(magnitude > fmt.max_code, special, bits)
    if not fmt.has_negative_zero:
        bits = torch.where(code == fmt.sign_code, nan, bits)
    return torch.empty_like(codes, dtype=dtype).copy_(_as_values(bits, dtype))


def random_words(
    x: Tensor, seed: Tensor | None, offset: Tensor | None, random_bits: int, place: Sequence[int] = ()
) -> Tensor:
    """The random word of every element, by its index in row-major order: int64, shaped like x.

    Philox4x32-10 (Salmon et al. 2011): key = the seed's words, counter = the words of the element's group and of the
    offset; a group of four 32-bit words serves 4, 8 or 16 elements, each word split from its low end.

    `place` is empty, or (start, width, pitch) of a shard: runs of `width` elements lie `pitch` apart in the whole
    tensor, the first one from its element `start` on.
    """
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    if place:
        start, width, pitch = place
        index = start + index // width * pitch + index % width
    return words_at(index, seed, offset, random_bits)


def words_at(index: Tensor, seed: Tensor | None, offset: Tensor | None, random_bits: int = 32) -> Tensor:
    """The random words of elements with these indices: int64, shaped like them."""
    per_word = 32 // random_bits
    group, lane = index // (4 * per_word), index // per_word % 4
    words = philox(_halves(seed, index.device), _halves(offset, index.device), group)
    word = torch.stack(words).gather(0, lane.unsqueeze(0)).squeeze(0)
    return (word >> (index % per_word * random_bits)) & ((1 << random_bits) - 1)


def _halves(n: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a 0-dim int64 tensor, None being 0."""
    n = torch.zeros((), dtype=torch.int64, device=device) if n is None else n.to(device)
    return n & _WORD, (n >> 32) & _WORD


def philox(
    key: tuple[Tensor, Tensor], offset: tuple[Tensor, Tensor], group: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words of Philox4x32-10, as int64. Products wrap mod 2^64, which keeps their words right."""
    k0, k1 = key
    c0, c1 = group & _WORD, (group >> 32) & _WORD
    c2, c3 = (part.expand_as(group) for part in offset)
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
