"""What a sum's error should be: the typical one, from the sizes of the partial sums; see docs/accumulate-theory.md."""

from __future__ import annotations

from collections.abc import Iterator
from math import log, sqrt
from typing import NamedTuple

from lowprec.accumulator import Accumulator
from lowprec.rounding import Rounding

BIAS = 1 / (4 * log(2))
"""Mean of the relative error of truncation, over the spacing 2^-m of significands: half a spacing over a significand x,
where ln x is uniform."""

NOISE = sqrt(3 / (96 * log(2)))
"""Deviation of a rounding's relative error over 2^-m, likewise: that of a uniform number as wide as the spacing."""


class Situation(NamedTuple):
    """Which terms, rounded how.

    same_sign: whether all terms are positive; the error is then compared with Σ|t|, else with √Σt².
    """

    name: str
    same_sign: bool
    rounding: Rounding
    title: str


SITUATIONS = (
    Situation("truncated", True, Rounding.toward_zero, "terms of one sign, truncated"),
    Situation("same_sign", True, Rounding.nearest_even, "terms of one sign, to nearest"),
    Situation("zero_mean", False, Rounding.nearest_even, "terms of mean 0, to nearest"),
)


class Moments(NamedTuple):
    """Of a term: E|t| and E t²."""

    mean: float
    square: float


def partial_sums(accumulator: Accumulator, K: int) -> Iterator[tuple[int, int, float]]:
    """Every rounding that can change a value: how many partial sums, of how many terms each, and the bias of each.

    The bias is that of truncation, over BIAS. Where j rounded numbers of like size are added, log2 j bits drop, whose
    mean is 1 - 1/j of half a spacing: a quarter of a spacing in a pairwise tree. Counted as if every group were full,
    which it is where fan-ins divide what they are given.
    """
    terms, below = 1, None
    for level, inputs, _ in accumulator.runs(K):
        size = min(level.fan_in or inputs, inputs)
        same = (level.fmt, level.rounding) == below
        for j in range(2 if same else 1, size + 1):
            yield -(-inputs // size), j * terms, 1 - 1 / j if same else 1.0
        terms, below = terms * size, (level.fmt, level.rounding)


def law(situation: Situation, accumulator: Accumulator, K: int, moments: Moments) -> float:
    """The root mean square of a sum's error, before its terms drown, over Σ|t| or √Σt².

    Rounding errors count as independent: of mean 0, but for truncation, and of a deviation proportional to the partial
    sum. Σ over roundings of E s² is then the variance; Σ of E s the drift.
    """
    spacing = 2.0 ** -accumulator.levels[0].fmt.mbits
    mean = moments.mean if situation.same_sign else 0.0
    drift = variance = 0.0
    for count, terms, bias in partial_sums(accumulator, K):
        drift += bias * count * terms * mean
        variance += count * ((terms * mean) ** 2 + terms * (moments.square - mean**2))
    drift *= BIAS if situation.rounding is Rounding.toward_zero else 0.0
    norm = K * mean if situation.same_sign else sqrt(K * moments.square)
    return spacing * sqrt(drift**2 + NOISE**2 * variance) / norm
