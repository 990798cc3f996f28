"""The judge of sums: trees of partial sums in exact fractions, rounded by the judge of casts.

Terms are numbers as a sum meets them: exact, with the sign of a zero kept, or infinite, or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from lowprec.accumulator import Accumulator, Level, Run
from lowprec.formats import FloatFormat
from lowprec.reference import quantize, random_word
from lowprec.rounding import Rounding

Array = np.ndarray[Any, Any]


class Exact(NamedTuple):
    """A finite number of any precision; `negative` tells -0 from +0."""

    value: Fraction
    negative: bool


Term = Exact | float
"""Finite, or an infinity or NaN as a float."""


def term(x: float) -> Term:
    """A float as a term."""
    return Exact(Fraction(x), math.copysign(1.0, x) < 0) if math.isfinite(x) else x


def _as_float(x: Term) -> float:
    """Only the sign, or what kind of special value it is, counts in the result."""
    return x if isinstance(x, float) else -1.0 if x.negative else 1.0


def multiply(a: Term, b: Term) -> Term:
    """The exact product; 0 · inf is NaN."""
    if isinstance(a, Exact) and isinstance(b, Exact):
        return Exact(a.value * b.value, a.negative != b.negative)
    if any(isinstance(x, Exact) and x.value == 0 for x in (a, b)):
        return math.nan
    return _as_float(a) * _as_float(b)


def add(a: Term, b: Term, rounding: Rounding) -> Term:
    """The exact sum; inf - inf is NaN. A zero has the sign IEEE 754 gives it under a rounding mode."""
    if not (isinstance(a, Exact) and isinstance(b, Exact)):
        return _as_float(a) + _as_float(b)
    total = a.value + b.value
    if total != 0:
        return Exact(total, total < 0)
    both_zero = a.value == 0 and a.negative == b.negative
    return Exact(total, a.negative if both_zero else rounding is Rounding.down)


def round_term(x: Term, fmt: FloatFormat, rounding: Rounding, saturate: bool, word: int = 0) -> float:
    """A term as a value of a format; what overflows without saturating is an infinity or NaN."""
    if isinstance(x, float):
        return quantize(x, fmt, rounding, saturate, word)
    if x.value == 0:
        return quantize(-0.0 if x.negative else 0.0, fmt, rounding, saturate, word)
    return quantize(x.value, fmt, rounding, saturate, word)


def product(a: float, b: float, accumulator: Accumulator) -> Term:
    """A term of a matrix product: exact, or rounded to the accumulator's product format."""
    exact = multiply(term(a), term(b))
    if accumulator.product is None:
        return exact
    return term(round_term(exact, accumulator.product, Rounding.nearest_even, True))


def accumulate(
    terms: Sequence[Term],
    accumulator: Accumulator,
    seed: int = 0,
    offset: int = 0,
    output: int = 0,
    roundings: int | None = None,
) -> float:
    """The sum of terms, of which tensor cores' leaves are the values they gave.

    `output` is the row-major index of the sum among those of one call, by which random words are drawn; each of those
    has as many `roundings`, if not those of these terms.
    """
    if not terms:
        return 0.0
    values: Sequence[Term] = terms
    if accumulator.leaf == "exact":
        values = [_exact_sum(terms, accumulator.levels[0].rounding)]
    runs = list(accumulator.runs_of(len(values)))
    first = output * (sum(run.inputs for run in runs) if roundings is None else roundings)
    for run in runs:

        def word(n: int, run: Run = run) -> int:
            return random_word(seed, offset, first + run.first + n)

        values = [term(x) for x in _run_level(values, run.level, word)]
    (result,) = values
    return result if isinstance(result, float) else math.copysign(float(result.value), _as_float(result))


def _run_level(values: Sequence[Term], level: Level, word: Callable[[int], int]) -> Iterable[float]:
    size = level.fan_in or len(values)
    for begin in range(0, len(values), size):
        total: Term | None = None
        for n in range(begin, min(begin + size, len(values))):
            exact = values[n] if total is None else add(total, values[n], level.rounding)
            draw = word(n) if level.rounding is Rounding.stochastic else 0
            total = term(round_term(exact, level.fmt, level.rounding, level.saturate, draw))
        assert total is not None
        yield total if isinstance(total, float) else math.copysign(float(total.value), _as_float(total))


def _exact_sum(terms: Sequence[Term], rounding: Rounding) -> Term:
    total = terms[0]
    for each in terms[1:]:
        total = add(total, each, rounding)
    return total


def matmul(a: Array, b: Array, accumulator: Accumulator, seed: int = 0, offset: int = 0) -> Array:
    """The product of float arrays [B, M, K] and [B, K, N] -> float64 [B, M, N]."""
    batch, rows, _ = a.shape
    columns = b.shape[-1]
    result = np.empty((batch, rows, columns))
    for output, place in enumerate(np.ndindex(result.shape)):
        i, row, column = place
        pairs = zip(a[i, row].tolist(), b[i, :, column].tolist(), strict=True)
        terms = [product(x, y, accumulator) for x, y in pairs]
        result[place] = accumulate(terms, accumulator, seed, offset, output)
    return result


def sums(x: Array, accumulator: Accumulator, seed: int = 0, offset: int = 0) -> Array:
    """The sums of the rows of a float array [O, K] -> float64 [O]."""
    rows = [[term(value) for value in row] for row in x.tolist()]
    return np.array([accumulate(row, accumulator, seed, offset, o) for o, row in enumerate(rows)])
