"""The judge of the model of Hopper's tensor cores: one step at a time, in exact fractions (docs/hopper.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lowprec.accumulator import TensorCore

Array = np.ndarray[Any, Any]


def exponent(x: Fraction, smallest: int) -> int:
    """floor(log2 |x|), or that of the smallest normal number where x is below it."""
    magnitude, result = abs(x), smallest
    while magnitude >= Fraction(2) ** (result + 1):
        result += 1
    return result


def cut(x: Fraction, quantum: Fraction) -> Fraction:
    """The multiple of a quantum next to x toward zero."""
    return math.trunc(x / quantum) * quantum


def operand(x: float, smallest: int, core: TensorCore) -> float:
    """What a tensor core reads of a number: no more digits than its operands have."""
    if not math.isfinite(x) or x == 0:
        return x
    return float(cut(Fraction(x), Fraction(2) ** (exponent(Fraction(x), smallest) - core.precision + 1)))


def step(
    x: Sequence[float], y: Sequence[float], accumulator: float, smallest: tuple[int, int], core: TensorCore
) -> float:
    """The accumulator plus the products of at most `core.step` operands.

    `smallest`: the exponents of the smallest normal numbers of either operand's format.
    """
    special = [p for p in (*(i * j for i, j in zip(x, y, strict=True)), accumulator) if not math.isfinite(p)]
    if special:
        return sum(special)
    terms = [
        (Fraction(i) * Fraction(j), exponent(Fraction(i), smallest[0]) + exponent(Fraction(j), smallest[1]))
        for i, j in zip(x, y, strict=True)
        if i * j != 0
    ]
    if accumulator:
        terms.append((Fraction(accumulator), exponent(Fraction(accumulator), -126)))
    if not terms:
        return 0.0
    quantum = Fraction(2) ** (max(core.floor, *(each for _, each in terms)) - core.fraction_bits)
    total = sum((cut(value, quantum) for value, _ in terms), Fraction())
    total = cut(total, Fraction(2) ** (exponent(total, -126) - core.kept_bits))
    if abs(total) >= Fraction(2) ** 128:
        return math.copysign(math.inf, total)
    return float(total)


def leaf(x: Sequence[float], y: Sequence[float], smallest: tuple[int, int], core: TensorCore) -> float:
    """The sum of products that a tensor core forms step by step, from +0 on."""
    accumulator = 0.0
    left, right = ([operand(each, low, core) for each in line] for line, low in zip((x, y), smallest, strict=True))
    for first in range(0, len(left), core.step):
        last = first + core.step
        accumulator = step(left[first:last], right[first:last], accumulator, smallest, core)
    return accumulator


def leaves(a: Array, b: Array, smallest: tuple[int, int], core: TensorCore, terms: int = 0) -> Array:
    """The leaves of the product of float arrays [B, M, K] and [B, K, N] -> float64 [B, M, N, L]."""
    K = a.shape[2]
    size = terms or max(K, 1)

    def lines() -> Iterator[float]:
        for i, row, column in np.ndindex(a.shape[0], a.shape[1], b.shape[2]):
            x, y = a[i, row].tolist(), b[i, :, column].tolist()
            yield from (leaf(x[n : n + size], y[n : n + size], smallest, core) for n in range(0, K, size))

    return np.array(list(lines())).reshape(a.shape[0], a.shape[1], b.shape[2], -(-K // size))
