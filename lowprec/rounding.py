"""Rounding modes: one predicate each, written once for exact fractions and for tensors.

A number x lies between two neighbours of a format, `lower` and `upper` in magnitude. A mode decides whether x goes to
the upper one. To add a mode, add a member to `Rounding`, a predicate to `GOES_UP`, an entry to `OVERFLOWS`, and a
functor to cuda/include/lowprec/round.h.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

Flag = Any
"""A Python bool or a bool tensor: predicates use only `&`, `|` and `^`, which both have."""


class Rounding(StrEnum):
    """Rounding modes, in the order that kernels know them by.

    nearest_even: nearest; ties to the even code. nearest_away: nearest; ties to the larger magnitude. toward_zero, up,
    down: directed. to_odd: exact values stay, others go to the neighbour whose code is odd. stochastic: away from zero
    with the probability of the fraction.

    Source: IEEE 754-2019, section 4.3; Boldo and Melquiond 2008 for rounding to odd.
    """

    nearest_even = "nearest_even"
    nearest_away = "nearest_away"
    toward_zero = "toward_zero"
    up = "up"
    down = "down"
    to_odd = "to_odd"
    stochastic = "stochastic"

    @property
    def number(self) -> int:
        """The mode's place in the order above."""
        return _NUMBERS[self]

    @classmethod
    def of(cls, value: Rounding | str) -> Rounding:
        """The mode of that name; ValueError lists the names."""
        try:
            return cls(value)
        except ValueError:
            raise ValueError(f"rounding must be one of {', '.join(cls)}, got {value!r}") from None


_NUMBERS = {mode: number for number, mode in enumerate(Rounding)}


class Rest(NamedTuple):
    """What lies between a number and its lower neighbour, as much as any mode needs to know.

    Attributes:
        inexact: the number is not the lower neighbour itself.
        tie: it lies exactly halfway between the neighbours.
        above: it lies nearer to the upper neighbour.
        odd: the code of the lower neighbour is odd.
        negative: the number is below zero.
        carry: the truncated fraction plus the random word reaches one (stochastic only).
    """

    inexact: Flag
    tie: Flag
    above: Flag
    odd: Flag
    negative: Flag
    carry: Flag


GOES_UP: dict[Rounding, Callable[[Rest], Flag]] = {
    Rounding.nearest_even: lambda rest: rest.above | (rest.tie & rest.odd),
    Rounding.nearest_away: lambda rest: rest.above | rest.tie,
    Rounding.toward_zero: lambda rest: rest.inexact & False,
    Rounding.up: lambda rest: rest.inexact & (rest.negative ^ True),
    Rounding.down: lambda rest: rest.inexact & rest.negative,
    Rounding.to_odd: lambda rest: rest.inexact & (rest.odd ^ True),
    Rounding.stochastic: lambda rest: rest.carry,
}
"""Whether a number goes to its upper neighbour in magnitude."""

OVERFLOWS: dict[Rounding, Callable[[Flag], Flag]] = {
    Rounding.nearest_even: lambda negative: negative | True,
    Rounding.nearest_away: lambda negative: negative | True,
    Rounding.toward_zero: lambda negative: negative & False,
    Rounding.up: lambda negative: negative ^ True,
    Rounding.down: lambda negative: negative,
    Rounding.to_odd: lambda negative: negative & False,
    Rounding.stochastic: lambda negative: negative | True,
}
"""Whether a finite number past the largest finite magnitude goes to infinity, where the cast does not saturate."""
