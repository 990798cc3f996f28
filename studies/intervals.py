"""Means and differences with their intervals, tests of equality, and how both are written."""

from __future__ import annotations

from collections.abc import Sequence
from math import copysign, inf, isfinite, sqrt
from typing import overload

import numpy as np

from lowprec.studies.record import Json
from lowprec.studies.regression import Interval, t_quantile, t_within


def mean(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean with its interval by the t distribution; unbounded for one value."""
    estimate = sum(values) / len(values)
    if len(values) < 2:
        return Interval(estimate, -inf, inf)
    margin = t_quantile(confidence, len(values) - 1) * _error(values)
    return Interval(estimate, estimate - margin, estimate + margin)


def equality(differences: Sequence[float], margin: float) -> tuple[Interval, float]:
    """Whether the mean of differences lies within ±margin: two one-sided t tests.

    Returns:
        The mean with its 90% interval, inside ±margin exactly when p is below 0.05; and p, 1 for one difference.
        Source: Schuirmann 1987.
    """
    p = max(below(differences, margin), below([-difference for difference in differences], margin))
    return mean(differences, 0.90), p


def below(values: Sequence[float], limit: float) -> float:
    """Whether the mean of values lies below a limit: p of a one-sided t test, 1 for one value."""
    if len(values) < 2:
        return 1.0
    room, error = limit - mean(values).estimate, _error(values)
    t = room / error if error else copysign(inf, room)
    return (1 - copysign(t_within(abs(t), len(values) - 1), t)) / 2


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1)) / sqrt(len(values))


def text(interval: Interval | None, form: str, confidence: int = 95) -> str:
    """An estimate with its interval in brackets."""
    if interval is None:
        return "–"
    if not interval.bounded:
        return f"{interval.estimate:{form}} [{confidence}%: unbounded]"
    return f"{interval.estimate:{form}} [{confidence}%: {interval.low:{form}} to {interval.high:{form}}]"


def plus_minus(interval: Interval, form: str = ".4f") -> str:
    """An estimate and half the width of its interval."""
    margin = f" ± {interval.high - interval.estimate:{form.lstrip('+')}}" if interval.bounded else ""
    return f"{interval.estimate:{form}}{margin}"


@overload
def plain(interval: Interval) -> Json: ...
@overload
def plain(interval: None) -> None: ...
def plain(interval: Interval | None) -> Json | None:
    """For a JSON file. An unbounded limit is null."""
    if interval is None:
        return None
    return {name: value if isfinite(value) else None for name, value in interval._asdict().items()}
