"""The judge: casts in exact integers and fractions. Slow, and evidently right; everything else is compared with it.

Scalars go through `encode`, `decode` and `quantize`. `Table` holds the thresholds of a format under one rounding mode,
so that whole code spaces can be checked at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from lowprec.formats import FloatFormat
from lowprec.rounding import GOES_UP, OVERFLOWS, Rest, Rounding

Array = np.ndarray[Any, Any]

_MASK = 0xFFFFFFFF


def grid(fmt: FloatFormat, code: int) -> Fraction:
    """The value of a magnitude code on the grid of the format continued without bound past its largest value."""
    exponent, mantissa = code >> fmt.mbits, code & fmt.mantissa_mask
    if fmt.ebits == 0:
        exponent, mantissa = 0, code
    if exponent == 0:
        return Fraction(mantissa if fmt.subnormals else 0) * Fraction(2) ** (fmt.emin - fmt.mbits)
    return (1 + Fraction(mantissa, 1 << fmt.mbits)) * Fraction(2) ** (exponent - fmt.bias)


def neighbours(fmt: FloatFormat, magnitude: Fraction) -> tuple[int, int, bool]:
    """Codes of the neighbours of a magnitude on the unbounded grid, and whether the lower one counts as odd.

    The lower code is the largest with grid(code) <= magnitude. Without subnormals the neighbours below the smallest
    normal are zero, which is even, and that normal.
    """
    first_normal = 1 << fmt.mbits
    if not fmt.subnormals and magnitude < grid(fmt, first_normal):
        return 0, first_normal, False
    step = Fraction(2) ** (fmt.emin - fmt.mbits)
    if fmt.ebits == 0 or magnitude < Fraction(2) ** fmt.emin:
        lower = math.floor(magnitude / step)
    else:
        exponent = _floor_log2(magnitude)
        fraction = magnitude / Fraction(2) ** exponent - 1
        lower = ((exponent + fmt.bias) << fmt.mbits) + math.floor(fraction * (1 << fmt.mbits))
    return lower, lower + 1, lower % 2 == 1


def _floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if x >= Fraction(2) ** exponent else exponent - 1


def round_magnitude(fmt: FloatFormat, x: Fraction, rounding: Rounding, word: int, random_bits: int) -> int:
    """The code on the unbounded grid that |x| rounds to."""
    lower, upper, odd = neighbours(fmt, abs(x))
    low, high = grid(fmt, lower), grid(fmt, upper)
    fraction = (abs(x) - low) / (high - low)
    rest = Rest(
        inexact=fraction > 0,
        tie=fraction == Fraction(1, 2),
        above=fraction > Fraction(1, 2),
        odd=odd,
        negative=x < 0,
        carry=math.floor(fraction * (1 << random_bits)) + word >= 1 << random_bits,
    )
    return upper if GOES_UP[rounding](rest) else lower


def encode(
    x: float | Fraction,
    fmt: FloatFormat,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    word: int = 0,
    random_bits: int = 32,
) -> int:
    """The code of a number: a float (±0, ±inf and NaN included) or a Fraction.

    `word` is the random word of stochastic rounding, below 2^random_bits.
    """
    rounding = Rounding.of(rounding)
    negative = math.copysign(1.0, x) < 0 if isinstance(x, float) else x < 0
    if isinstance(x, float) and math.isnan(x):
        return nan_code(fmt, negative)
    if isinstance(x, float) and math.isinf(x):
        overflow, infinite = True, True
        code = 0
    else:
        code = round_magnitude(fmt, Fraction(x), rounding, word, random_bits)
        overflow, infinite = code > fmt.max_code, OVERFLOWS[rounding](negative)
    if overflow:
        if infinite and not saturate and fmt.specials != "finite":
            return infinity_code(fmt, negative)
        code = fmt.max_code
    return with_sign(fmt, code, negative)


def with_sign(fmt: FloatFormat, code: int, negative: bool) -> int:
    """A magnitude code with a sign; zero stays positive where the format has one zero."""
    signed = negative and (code != 0 or fmt.has_negative_zero)
    return code | fmt.sign_code if signed else code


def nan_code(fmt: FloatFormat, negative: bool) -> int:
    """The code that a NaN of that sign gets."""
    if fmt.specials == "finite":
        return fmt.max_code
    if not fmt.has_negative_zero:
        return fmt.sign_code
    magnitude = fmt.top_code if fmt.specials == "fn" else fmt.max_code + 1 + (1 << (fmt.mbits - 1))
    return with_sign(fmt, magnitude, negative)


def infinity_code(fmt: FloatFormat, negative: bool) -> int:
    """The code of an infinity, or of the NaN that stands in for it."""
    return with_sign(fmt, fmt.max_code + 1, negative) if fmt.has_inf else nan_code(fmt, negative)


def decode(code: int, fmt: FloatFormat) -> float:
    """The value of a code, exactly. A NaN keeps the sign of its code where the format has signed NaNs."""
    code &= (fmt.sign_code << 1) - 1
    negative, magnitude = bool(code & fmt.sign_code), code & (fmt.sign_code - 1)
    sign = -1.0 if negative else 1.0
    if not fmt.has_negative_zero and code == fmt.sign_code:
        return math.nan
    if magnitude > fmt.max_code:
        infinite = fmt.has_inf and magnitude == fmt.max_code + 1
        return sign * math.inf if infinite else math.copysign(math.nan, sign)
    value = float(grid(fmt, magnitude))
    return value if value == 0 and not fmt.has_negative_zero else sign * value


def quantize(
    x: float | Fraction,
    fmt: FloatFormat,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    word: int = 0,
    random_bits: int = 32,
) -> float:
    """The value that a number rounds to; a NaN stays, and one standing in for an infinity carries x's sign."""
    if isinstance(x, float) and math.isnan(x):
        return x
    value = decode(encode(x, fmt, rounding, saturate, word, random_bits), fmt)
    return math.copysign(value, x if isinstance(x, float) else -1.0 if x < 0 else 1.0) if math.isnan(value) else value


def philox(seed: int, offset: int, group: int) -> tuple[int, int, int, int]:
    """The four words of Philox4x32-10 (Salmon et al. 2011) at one counter: key = seed, counter = (group, offset)."""
    key = [seed & _MASK, (seed >> 32) & _MASK]
    c = [group & _MASK, (group >> 32) & _MASK, offset & _MASK, (offset >> 32) & _MASK]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ key[0], second & _MASK, (first >> 32) ^ c[3] ^ key[1], first & _MASK]
        key = [(key[0] + 0x9E3779B9) & _MASK, (key[1] + 0xBB67AE85) & _MASK]
    return c[0], c[1], c[2], c[3]


def random_word(seed: int, offset: int, index: int, random_bits: int = 32) -> int:
    """The random word of element `index`: each 32-bit word is split from its low end."""
    per_word = 32 // random_bits
    word = philox(seed, offset, index // (4 * per_word))[index // per_word % 4]
    return (word >> (random_bits * (index % per_word))) & ((1 << random_bits) - 1)


@dataclass(frozen=True)
class Table:
    """Thresholds of a format under one deterministic mode and sign: code c holds from `thresholds[c - 1]` on.

    Between two neighbours lies one magnitude at which the result changes; `inclusive[c]` says whether that magnitude
    itself already belongs to the upper one. Built by asking the scalar judge, exact for formats up to 19 bits whose
    midpoints float64 holds.
    """

    codes: Array
    thresholds: Array
    inclusive: Array

    def round(self, magnitudes: Array) -> Array:
        """Codes on the grid, the one past max_code included, of non-negative finite float64 magnitudes."""
        below = np.searchsorted(self.thresholds, magnitudes, side="left")
        at = below < len(self.thresholds)
        hit = np.zeros(magnitudes.shape, dtype=bool)
        hit[at] = (self.thresholds[below[at]] == magnitudes[at]) & self.inclusive[below[at]]
        rounded: Array = self.codes[below + hit]
        return rounded


@lru_cache(maxsize=64)
def table(fmt: FloatFormat, rounding: Rounding, negative: bool) -> Table:
    """The table of a format, one past its largest finite code included."""
    first = 0 if fmt.subnormals else (1 << fmt.mbits) - 1
    codes = np.array([0, *range(first + 1, fmt.max_code + 2)], dtype=np.int64)
    sign = -1 if negative else 1
    thresholds, inclusive = [], []
    for lower, upper in zip(codes[:-1].tolist(), codes[1:].tolist(), strict=True):
        low, high = grid(fmt, lower), grid(fmt, upper)
        middle, quarter = (low + high) / 2, (high - low) / 4
        goes_up = [
            round_magnitude(fmt, sign * x, rounding, 0, 32) == upper
            for x in (middle - quarter, middle, middle + quarter)
        ]
        # The result changes at the lower neighbour (any rest goes up), at the midpoint, or only at the upper neighbour.
        threshold = low if goes_up[0] else middle if goes_up[2] else high
        # The value past the largest may be 2^1024, which no float64 reaches.
        thresholds.append(float(threshold) if threshold < 2**1024 else math.inf)
        inclusive.append(not goes_up[0] and (goes_up[1] or not goes_up[2]))
    return Table(codes, np.array(thresholds), np.array(inclusive))


def encode_array(x: Array, fmt: FloatFormat, rounding: Rounding | str = "nearest_even", saturate: bool = True) -> Array:
    """`encode` over a float64 array of any shape, deterministic modes, formats up to 19 bits: int64 codes."""
    rounding = Rounding.of(rounding)
    negative, magnitude = np.signbit(x), np.abs(np.where(np.isfinite(x), x, 0.0))
    codes = np.empty(x.shape, dtype=np.int64)
    for sign in (False, True):
        part = negative == sign
        code = table(fmt, rounding, sign).round(magnitude[part])
        infinite = np.isinf(x[part])
        limit = saturate or fmt.specials == "finite"
        becomes_infinite = infinite | ((code > fmt.max_code) & OVERFLOWS[rounding](sign))
        code = np.where((code > fmt.max_code) | infinite, fmt.max_code, code)
        signed = np.where((code != 0) | fmt.has_negative_zero, code | (fmt.sign_code if sign else 0), code)
        signed = signed if limit else np.where(becomes_infinite, infinity_code(fmt, sign), signed)
        codes[part] = np.where(np.isnan(x[part]), nan_code(fmt, sign), signed)
    return codes


def decode_array(codes: Array, fmt: FloatFormat) -> Array:
    """`decode` over an array of codes: float64 values."""
    unique, inverse = np.unique(codes, return_inverse=True)
    values: Array = np.array([decode(int(code), fmt) for code in unique])[inverse].reshape(codes.shape)
    return values
