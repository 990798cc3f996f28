"""The fused casts on tensors, in plain torch: any device, the same bits as the compiled kernels.

Sums are taken in integers; activations in float64, from additions, subtractions, products, quotients and integer work
on exponents, in one fixed order. The kernels in cuda/include/lowprec/{number,activation,fused}.h follow the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.eager import (
    CONTAINERS,
    Unpacked,
    encode,
    floor_log2,
    pack,
    quantize,
    random_words,
    round_code,
    unpack,
)
from lowprec.formats import FloatFormat
from lowprec.rounding import GOES_UP, OVERFLOWS, Rest, Rounding

TINY = -1000
"""In what an activation is computed from, and in what it gives, magnitudes below 2^TINY count as zeros."""

ACTIVATIONS = ("none", "relu", "relu2", "sigmoid", "tanh", "silu", "gelu")
"""Names of the activations, in the order that kernels know them by."""


def cast_transpose(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
    rows: Tensor | None,
    columns: Tensor | None,
) -> None:
    """Write the cast of x into `rows` and its transpose into `columns`: values in x's dtype, codes in integers."""
    how = (fmt, rounding, saturate, seed, offset, random_bits)
    for out in (rows, columns):
        if out is not None:
            cast = quantize(x, *how) if out.is_floating_point() else encode(x, *how)
            out.copy_(cast if out is rows else cast.transpose(-1, -2))


# Sums that are exact before their one rounding.


class Wide(NamedTuple):
    """What rounding needs to know of a format: a `FloatFormat` has it, and here a float dtype's own bits do too."""

    mbits: int
    emin: int
    max_code: int
    subnormals: bool
    specials: str
    has_inf: bool
    has_negative_zero: bool


def wide(fmt: FloatFormat | None, dtype: torch.dtype) -> Wide:
    """A format; that of a dtype's bits if None. One without a normal number reads its top mantissa bit as exponent."""
    if fmt is None:
        precision, bias, _ = CONTAINERS[dtype]
        infinity = (2 * bias + 1) << (precision - 1)
        return Wide(precision - 1, 1 - bias, infinity - 1, True, "ieee", True, True)
    plain = int(fmt.max_code < 1 << fmt.mbits)
    kinds = (fmt.subnormals, fmt.specials, fmt.has_inf, fmt.has_negative_zero)
    return Wide(fmt.mbits - plain, fmt.emin - plain, fmt.max_code, *kinds)


def accumulate_(
    y: Tensor,
    x: Tensor,
    fmt: FloatFormat | None,
    x_format: FloatFormat | None,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
) -> None:
    """Replace y by the rounded sum of y and x. See `lowprec.fused.accumulate_`."""
    word = random_words(y, seed, offset, random_bits) << (32 - random_bits) if rounding is Rounding.stochastic else None
    old = unpack(y)
    total = add(old, unpack(x) if x_format is None else unpack_codes(x, x_format), rounding is Rounding.down)
    to = wide(fmt, y.dtype)
    rounded = _round(total, to, rounding, saturate, word)
    bits = rounded.code if fmt is None else _value_bits(rounded.code, fmt, y.dtype)
    infinity, nan = _specials(y.dtype)
    bits = torch.where(rounded.infinite, infinity if to.has_inf else nan, bits)
    signed = total.negative & ((rounded.code != 0) | to.has_negative_zero)
    bits = torch.where(total.nan, nan, bits | (signed.to(torch.int64) << (8 * y.dtype.itemsize - 1)))
    integer = CONTAINERS[y.dtype].integer
    values = bits.to(integer).view(y.dtype)
    y.copy_(torch.where(old.nan, y, values))


def _specials(dtype: torch.dtype) -> tuple[int, int]:
    """The bits of +infinity and of the quiet NaN."""
    precision, bias, _ = CONTAINERS[dtype]
    infinity = (2 * bias + 1) << (precision - 1)
    return infinity, infinity | (1 << (precision - 2))


def _value_bits(code: Tensor, fmt: FloatFormat, dtype: torch.dtype) -> Tensor:
    return pack(code, torch.zeros_like(code, dtype=torch.bool), fmt, dtype)


def unpack_codes(codes: Tensor, fmt: FloatFormat) -> Unpacked:
    """The numbers of codes, as `unpack` gives those of a float tensor."""
    code = codes.to(torch.int64) & ((fmt.sign_code << 1) - 1)
    negative, magnitude = code >= fmt.sign_code, code & (fmt.sign_code - 1)
    field = magnitude >> fmt.mbits
    significand = (magnitude & fmt.mantissa_mask) + ((field > 0).to(torch.int64) << fmt.mbits)
    if not fmt.subnormals:
        significand = torch.where(field > 0, significand, 0)
    exponent = field.clamp(min=1) - (fmt.bias + fmt.mbits)
    infinite = (magnitude == fmt.max_code + 1) & fmt.has_inf
    nan = (magnitude > fmt.max_code) & ~infinite
    if not fmt.has_negative_zero:
        nan = nan | (code == fmt.sign_code)
    return Unpacked(negative, significand, exponent, infinite, nan)


def _leading_bit(n: Tensor) -> Tensor:
    """Index of the leading bit of positive int64 numbers; 0 for 0."""
    high = n >> 32
    return torch.where(high > 0, floor_log2(high) + 32, floor_log2(n | 1))


def _normalise(parts: Unpacked, top: int) -> tuple[Tensor, Tensor]:
    """Significands with their leading bit at `top`, and the exponents of that bit."""
    leading = _leading_bit(parts.significand)
    return parts.significand << (top - leading), parts.exponent + leading


def add(a: Unpacked, b: Unpacked, down: bool) -> Unpacked:
    """The sum, rounded to odd with at least 61 bits; `down`: the sign of a sum that is zero.

    Significands of 53 bits stand nine bits above the last one, so that one bit can stand for all that lies below.
    """
    (p, i), (q, j) = _normalise(a, 61), _normalise(b, 61)
    i, j = torch.where(p == 0, -8192, i), torch.where(q == 0, -8192, j)
    first = (i > j) | ((i == j) & (p >= q))
    large, small = torch.where(first, p, q), torch.where(first, q, p)
    distance = (i - j).abs().clamp(max=62)
    shifted = small >> distance
    aligned = shifted | ((shifted << distance) != small).to(torch.int64)
    opposite = a.negative ^ b.negative
    total = torch.where(opposite, large - aligned, large + aligned)
    negative = torch.where(first, a.negative, b.negative)
    negative = torch.where(opposite & (total == 0), torch.full_like(negative, down), negative)
    infinite = a.infinite | b.infinite
    negative = torch.where(infinite, torch.where(a.infinite, a.negative, b.negative), negative)
    nan = a.nan | b.nan | (a.infinite & b.infinite & opposite)
    return Unpacked(negative, total, torch.maximum(i, j) - 61, infinite, nan)


class _Code(NamedTuple):
    """Magnitude codes no larger than max_code, and where an infinity or its NaN takes their place."""

    code: Tensor
    infinite: Tensor


def _round(parts: Unpacked, to: Wide, rounding: Rounding, saturate: bool, word: Tensor | None) -> _Code:
    """Round significands of up to 63 bits; `word` is a random word in the top of 32 bits."""
    significand, leading = _normalise(parts, 62)
    zero = parts.significand == 0
    exponent = leading.clamp(min=to.emin)
    gap = torch.where(leading < to.emin, 0 if to.subnormals else to.mbits, 0)
    count = 62 - to.mbits + exponent - leading + gap
    shift = count.clamp(max=63)
    # Of a number that lies further below, all that counts is that it is not zero, and its fraction.
    placed = torch.where(count > 63, parts.significand.clamp(max=1), significand)
    kept = placed >> shift
    rest = placed - (kept << shift)
    half = torch.ones_like(shift) << (shift - 1)
    carry = torch.zeros_like(zero) if word is None else _fraction(significand, count) + word >= 1 << 32
    lower = kept + ((exponent - to.emin) << to.mbits)
    beside = Rest(rest != 0, rest == half, rest > half, (lower & 1) == 1, parts.negative, carry)
    code = lower + (GOES_UP[rounding](beside).to(torch.int64) << gap)
    code = torch.where(zero, 0, code)
    over = (code > to.max_code) | parts.infinite
    infinite = parts.infinite | (over & OVERFLOWS[rounding](parts.negative))
    stays = saturate or to.specials == "finite"
    return _Code(torch.where(over, to.max_code, code), torch.zeros_like(over) if stays else infinite)


def _fraction(significand: Tensor, count: Tensor) -> Tensor:
    """The first 32 bits of the `count` digits that go."""
    left = significand << (32 - count).clamp(min=0)
    return (left >> (count - 32).clamp(0, 63)) & 0xFFFFFFFF


# Activations in float64.


def to_float64(x: Tensor) -> Tensor:
    """A float tensor in float64, exactly; by its integers, since a conversion may flush subnormals."""
    if x.dtype == torch.float64:
        return x
    parts = unpack(x)
    bits = parts.significand.to(torch.float64).view(torch.int64) + (parts.exponent << 52)
    bits = torch.where(parts.significand == 0, 0, bits)
    infinity, nan = _specials(torch.float64)
    bits = torch.where(parts.infinite, infinity, torch.where(parts.nan, nan, bits))
    return (bits | (parts.negative.to(torch.int64) << 63)).view(torch.float64)


def _without_tiny(x: Tensor) -> Tensor:
    bits = x.view(torch.int64)
    tiny = (bits & (2**63 - 1)) < (1023 + TINY) << 52
    return torch.where(tiny, bits & -(2**63), bits).view(torch.float64)


def _exponential(t: Tensor) -> tuple[Tensor, Tensor]:
    """e^t = 2^power · (1 + fraction) for -700 <= t <= 0, as (fraction, power)."""
    shifted = t * float.fromhex("0x1.71547652b82fep+0") + 1.5 * 2.0**52
    power = shifted - 1.5 * 2.0**52
    r = (t - power * float.fromhex("0x1.62e42fee00000p-1")) - power * float.fromhex("0x1.a39ef35793c76p-33")
    series = torch.full_like(r, 1.0 / math.factorial(13))
    for n in range(12, 1, -1):
        series = series * r + 1.0 / math.factorial(n)
    return r + (r * r) * series, shifted.view(torch.int64).to(torch.int32).to(torch.int64)


def _exp_negative(a: Tensor) -> Tensor:
    """e^-a for a >= 0; 0 from a > 693 on."""
    far = a > 693.0
    fraction, power = _exponential(-torch.where(far, 693.0, a))
    bits = (1.0 + fraction).view(torch.int64) + (power << 52)
    return torch.where(far, 0, bits).view(torch.float64)


def _magnitude(x: Tensor) -> Tensor:
    return (x.view(torch.int64) & (2**63 - 1)).view(torch.float64)


def _sigmoid(t: Tensor) -> Tensor:
    e = _exp_negative(_magnitude(t))
    return torch.where(t.signbit(), e, 1.0) / (1.0 + e)


def _tanh(t: Tensor) -> Tensor:
    a = _magnitude(t)
    fraction, exponent = _exponential(-2.0 * torch.where(a > 32.0, 32.0, a))
    power = ((exponent + 1023) << 52).view(torch.float64)
    below_one = fraction * power + (power - 1.0)
    result = -below_one / (2.0 + below_one)
    return (_magnitude(result).view(torch.int64) | (t.view(torch.int64) & -(2**63))).view(torch.float64)


def _gated(t: Tensor, share: Tensor) -> Tensor:
    return torch.where(share == 0.0, -0.0, _without_tiny(t * share))


def _positive(t: Tensor) -> Tensor:
    return torch.where(t.signbit(), 0.0, t)


def _gelu_argument(t: Tensor) -> Tensor:
    return t * (float.fromhex("0x1.9884533d43651p+0") + float.fromhex("0x1.2444f2a4d8b4bp-4") * (t * t))


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "relu": _positive,
    "relu2": lambda t: _without_tiny(_positive(t) * _positive(t)),
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "silu": lambda t: _gated(t, _sigmoid(t)),
    "gelu": lambda t: _gated(t, _sigmoid(_gelu_argument(t))),
}


def activation(x: Tensor, name: str, scale: Tensor | None, bias: Tensor | None, dim: int) -> Tensor:
    """Give act(scale · x + bias) in float64, before any rounding to a format. See `lowprec.fused.activate`."""
    t = to_float64(x)
    if scale is not None or bias is not None or name not in ("none", "relu"):
        t = _without_tiny(t)
    if scale is not None:
        t = _without_tiny(t * _without_tiny(to_float64(along(scale, x, dim))))
    if bias is not None:
        t = _without_tiny(t + _without_tiny(to_float64(along(bias, x, dim))))
    # Work on exponents may make a number of a NaN.
    return torch.where(t.isnan(), t, _FUNCTIONS[name](t))


def along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """A number or a vector along one dimension of x, on x's device, shaped to be broadcast over x."""
    shape: Sequence[int] = [-1 if i == dim % x.dim() else 1 for i in range(x.dim())] if vector.dim() else ()
    return vector.to(x.device).reshape(shape)


def activate(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
    name: str,
    scale: Tensor | None,
    bias: Tensor | None,
    dim: int,
    codes: bool,
) -> Tensor:
    """Round act(scale · x + bias) to values in x's dtype or to codes, in row-major order."""
    x = x.contiguous()
    t = activation(x, name, scale, bias, dim)
    # A NaN that came keeps its sign, and in values its bits; one that arose is the positive quiet one.
    nan64 = _specials(torch.float64)[1]
    came = (x.isnan() & (x.view(CONTAINERS[x.dtype].integer) < 0)).to(torch.int64) << 63
    t = torch.where(t.isnan(), came | nan64, t.view(torch.int64)).view(torch.float64)
    if codes:
        return encode(t, fmt, rounding, saturate, seed, offset, random_bits)
    parts = unpack(t)
    word = random_words(x, seed, offset, random_bits) if rounding is Rounding.stochastic else None
    rounded = round_code(parts, fmt, rounding, saturate, word, random_bits)
    infinity, nan = _specials(x.dtype)
    sign = parts.negative.to(torch.int64) << (8 * x.dtype.itemsize - 1)
    bits = pack(rounded.code, parts.negative, fmt, x.dtype)
    bits = torch.where(rounded.infinite, sign | (infinity if fmt.has_inf else nan), bits)
    bits = torch.where(parts.nan, nan, bits)
    values = bits.to(CONTAINERS[x.dtype].integer).view(x.dtype)
    return torch.where(x.isnan(), x, values)
