"""A common slope over several groups by ordinary least squares, and what follows from it, with intervals.

Model: y = a_group + s · x + normal errors of one variance. The offset between two groups over the slope is the shift
in x that makes up for it; its interval is Fieller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan2, copysign, cos, inf, isfinite, pi, sin, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its confidence limits, infinite where the data set none."""

    estimate: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        return isfinite(self.low) and isfinite(self.high)


@dataclass(frozen=True)
class CommonSlope:
    """A fit: coefficients (an a for each group, then s), their covariance, the error's deviation and its freedom."""

    groups: tuple[str, ...]
    coefficients: Array
    covariance: Array
    sigma: float
    freedom: int

    def combination(self, weights: Sequence[float] | Array, confidence: float = 0.95) -> Interval:
        """A linear combination of the coefficients, by the t distribution."""
        w = np.asarray(weights, dtype=np.float64)
        estimate, error = float(w @ self.coefficients), self._error(w)
        margin = t_quantile(confidence, self.freedom) * error
        return Interval(estimate, estimate - margin, estimate + margin)

    def slope(self) -> Interval:
        return self.combination([0.0] * len(self.groups) + [1.0])

    def offset(self, group: str, base: str) -> Interval:
        """How far a group lies above another one, at equal x."""
        return self.combination(self._offset(group, base))

    def shift(self, group: str, base: str, confidence: float = 0.95) -> Interval:
        """The x to add in `group` to match `base`: -offset / s, with Fieller's interval.

        Unbounded where the slope does not differ from zero at that confidence.
        Source: Fieller 1954, "Some problems in interval estimation".
        """
        top, bottom = -self._offset(group, base), np.eye(len(self.groups) + 1)[-1]
        a, b = float(top @ self.coefficients), float(bottom @ self.coefficients)
        t2 = t_quantile(confidence, self.freedom) ** 2
        v_aa, v_ab, v_bb = (float(u @ self.covariance @ v) for u, v in ((top, top), (top, bottom), (bottom, bottom)))
        # The interval holds every ratio r for which a - r b does not differ from zero: a quadratic in r.
        square, middle, constant = b * b - t2 * v_bb, a * b - t2 * v_ab, a * a - t2 * v_aa
        if square <= 0:
            return Interval(a / b, -inf, inf)
        root = sqrt(max(middle * middle - square * constant, 0.0))
        return Interval(a / b, (middle - root) / square, (middle + root) / square)

    def matches(self, group: str, base: str, shift: float, margin: float) -> tuple[Interval, float]:
        """Whether `group`, given `shift` more x, equals `base` within a margin: two one-sided tests.

        Returns:
            The difference with its 90% interval, inside ±margin exactly when p is below 0.05; and p.
            Source: Schuirmann 1987.
        """
        weights = self._offset(group, base)
        weights[-1] = shift
        difference, error = self.combination(weights, 0.90), self._error(weights)
        t = (margin - abs(difference.estimate)) / error
        return difference, (1 - copysign(t_within(abs(t), self.freedom), t)) / 2

    def at(self, group: str, x: float) -> float:
        """The fitted y."""
        return float(self.coefficients[self.groups.index(group)] + self.coefficients[-1] * x)

    def _offset(self, group: str, base: str) -> Array:
        weights = np.zeros(len(self.groups) + 1)
        weights[self.groups.index(group)] += 1
        weights[self.groups.index(base)] -= 1
        return weights

    def _error(self, weights: Array) -> float:
        return float(np.sqrt(weights @ self.covariance @ weights))


def fit(groups: Sequence[str], x: Sequence[float], y: Sequence[float]) -> CommonSlope:
    """Fit a common slope to points, given as three sequences of one length.

    Raises:
        ValueError: where there are too few points, or every x of a group is the same in all groups.
    """
    names = tuple(dict.fromkeys(groups))
    design = np.array([[*(float(name == group) for name in names), at] for group, at in zip(groups, x, strict=True)])
    freedom = len(design) - len(names) - 1
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("a common slope needs two widths, and more points than lines and slope have numbers")
    values = np.asarray(y, dtype=np.float64)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ values
    variance = float(np.sum((values - design @ coefficients) ** 2)) / freedom
    return CommonSlope(names, coefficients, variance * inverse, sqrt(variance), freedom)


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t) for Student's T with whole degrees of freedom: a finite sum.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = atan2(t, sqrt(freedom))
    odd = freedom % 2
    term, total = (cos(angle) if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cos(angle) ** 2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


def t_quantile(confidence: float, freedom: int) -> float:
    """The t that holds T within ±t with a probability, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2
