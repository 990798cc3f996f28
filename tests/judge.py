"""The reference over whole arrays, stochastic rounding included: exact float64 arithmetic on the reference's grid.

Numbers come as float64. A number and its lower neighbour lie within a factor of two, or the neighbour is zero, so that
their difference is exact; the spacing is a power of two, so that the fraction is. `test_reference.py` holds this judge
to the scalar reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec import reference
from lowprec.formats import FloatFormat
from lowprec.rounding import GOES_UP, OVERFLOWS, Rest, Rounding
from lowprec.testing import bits

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Grid:
    """The magnitudes of a format and the one past its largest: codes and values, ascending."""

    codes: Array
    values: Array


@lru_cache(maxsize=512)
def grid(fmt: FloatFormat) -> Grid:
    """The reference's grid, which it gives where each binade begins: a binade has 2^m even steps."""
    steps = 1 << fmt.mbits
    starts = range(0, fmt.max_code + 2, steps)
    begin = np.array([_float(reference.grid(fmt, code)) for code in starts])
    step = np.array([_float(reference.grid(fmt, code + 1) - reference.grid(fmt, code)) for code in starts])
    values = (begin[:, None] + (step[:, None] * np.arange(steps) if fmt.mbits else 0)).ravel()
    codes = np.arange(fmt.max_code + 2)
    kept = (codes == 0) | (codes >= (1 if fmt.subnormals else steps))
    return Grid(codes[kept], values[: len(codes)][kept])


def _float(x: Fraction) -> float:
    """Exact, but infinity for 2^1024, the value past the largest of a few formats: no number reaches either."""
    return float(x) if x < 2**1024 else math.inf


@dataclass(frozen=True)
class Placed:
    """Numbers between their neighbours: all that the modes share, so that it is found once for all of them."""

    fmt: FloatFormat
    x: Array
    negative: Array
    lower: Array
    fraction: Array


def place(x: Array, fmt: FloatFormat) -> Placed:
    """Find the lower neighbours of float64 numbers of any shape, by index into the grid."""
    values = grid(fmt).values
    magnitude = np.minimum(np.abs(np.where(np.isfinite(x), x, 0.0)), values[-1])
    lower = np.searchsorted(values, magnitude, side="right") - 1
    spacing = np.append(np.diff(values), np.inf)[lower]
    return Placed(fmt, x, np.signbit(x), lower, (magnitude - values[lower]) / spacing)


@dataclass(frozen=True)
class Judged:
    """What numbers round to: signed codes as int64, the same as float64 values, and the numbers that became NaN."""

    codes: Array
    values: Array
    stand_in: Array


def judge(
    placed: Placed, rounding: Rounding, saturate: bool = True, words: Array | None = None, random_bits: int = 32
) -> Judged:
    """Round; `words` are the random words of stochastic rounding, below 2^random_bits, shaped like x."""
    fmt, x, negative = placed.fmt, placed.x, placed.negative
    table = grid(fmt)
    up = GOES_UP[rounding](_rest(placed, table, words, random_bits))
    index = placed.lower + up
    over = (index >= len(table.codes) - 1) | np.isinf(x)
    past = over & (np.isinf(x) | OVERFLOWS[rounding](negative)) & (not saturate and fmt.specials != "finite")
    index = np.where(over, len(table.codes) - 2, index)
    minus = negative & ((index > 0) | fmt.has_negative_zero)
    codes = np.where(minus, table.codes[index] | fmt.sign_code, table.codes[index])
    values = np.copysign(table.values[index], np.where(minus, -1.0, 1.0))
    codes = _by_sign(np.isnan(x), negative, codes, [reference.nan_code(fmt, sign) for sign in (False, True)])
    codes = _by_sign(past, negative, codes, [reference.infinity_code(fmt, sign) for sign in (False, True)])
    values = np.where(past, np.copysign(np.inf if fmt.has_inf else np.nan, x), np.where(np.isnan(x), x, values))
    return Judged(codes, values, past & (not fmt.has_inf))


def _rest(placed: Placed, table: Grid, words: Array | None, random_bits: int) -> Rest:
    fraction = placed.fraction
    carry = (
        np.zeros(fraction.shape, bool)
        if words is None
        else np.floor(fraction * 2.0**random_bits) + words >= 2.0**random_bits
    )
    inexact = np.abs(placed.x) > table.values[placed.lower]
    odd = table.codes[placed.lower] % 2 == 1
    return Rest(inexact, fraction == 0.5, fraction > 0.5, odd, placed.negative, carry)


def _by_sign(where: Array, negative: Array, otherwise: Array, choices: list[int]) -> Array:
    return np.where(where, np.where(negative, choices[1], choices[0]), otherwise)


def words(count: int, seed: int, offset: int, random_bits: int) -> Array:
    """The reference's random words of elements 0, 1, ..., as float64 (which holds them)."""
    return np.array([reference.random_word(seed, offset, i, random_bits) for i in range(count)], dtype=np.float64)


def as_values(judged: Judged, x: Tensor) -> Tensor:
    """The judge's values as `quantize` must return them: NaN inputs as they are, other NaNs quiet, with x's sign."""
    quiet, minus = bits(torch.tensor([torch.nan, -0.0], dtype=x.dtype)).unbind()
    nan = torch.where(x.signbit(), quiet | minus, quiet)
    values = bits(torch.from_numpy(judged.values).to(x.dtype))
    values = torch.where(torch.from_numpy(judged.stand_in), nan, values)
    return torch.where(x.isnan(), bits(x), values).view(x.dtype)


def as_codes(judged: Judged, dtype: torch.dtype) -> Tensor:
    """The judge's codes as `encode` must return them."""
    return torch.from_numpy(judged.codes).to(dtype)
