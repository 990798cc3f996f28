"""Sizes, budgets and random draws: what every pattern begins with."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


class Draws:
    """Random integers that depend on the seed alone.

    numpy keeps the words of a bit generator for ever, but not what its distributions make of them (NEP 19): here
    integers, orders and choices are made from the words of PCG64 by integer arithmetic.

    Args:
        seed: not negative, of any size.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(whole("seed", seed, least=0))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Independent 64-bit words: [count]."""
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)

    def below(self, bound: int, count: int) -> Integers:
        """Integers from 0 to bound - 1, each as likely as the others to within bound / 2^32."""
        return (((self.words(count) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)

    def order(self, count: int) -> Integers:
        """The numbers from 0 to count - 1 in a random order."""
        return np.argsort(self.words(count), kind="stable")

    def pick(self, among: Integers) -> int:
        """One of them."""
        return int(among[self.below(len(among), 1)[0]])

    def choose(self, candidates: Mask, counts: Integers) -> Mask:
        """In each row so many of the candidates, every set of them equally likely.

        Args:
            candidates: [rows, columns].
            counts: [rows], none above the row's number of candidates.
        """
        rows, columns = candidates.shape
        bits = np.uint64(columns.bit_length())
        places = np.arange(columns, dtype=np.uint64)  # in the low bits, so that no two keys of a row are the same
        keys = ((self.words(rows * columns).reshape(rows, columns) >> bits) << bits) | places
        keys[~candidates] = np.uint64(2**64 - 1)
        last = np.sort(keys, axis=1)[np.arange(rows), counts - 1]
        return (keys <= last[:, None]) & (counts[:, None] > 0)


def budget(n_in: int, n_out: int, density: float) -> int:
    """The number of blocks that a density means: round(density · n_in · n_out), or the diagonal's where that is more.

    Raises:
        TypeError: for sizes that are no integers, or a density that is no number.
        ValueError: for sizes below 1, or a density outside [0, 1].
    """
    whole("n_in", n_in), whole("n_out", n_out)
    return max(round(share("density", density) * n_in * n_out), n_in, n_out)


def diagonal(n_in: int, n_out: int) -> Mask:
    """The blocks that every pattern has: those where i mod n_out = j mod n_in, as in openai/blocksparse.

    Where the sizes differ the diagonal of the smaller one is repeated: max(n_in, n_out) blocks in all.
    """
    i, j = np.ogrid[:n_in, :n_out]
    return np.asarray(i % n_out == j % n_in)


def whole(name: str, value: Any, least: int = 1) -> int:
    """An argument that must be an integer, at least so large."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def share(name: str, value: Any) -> float:
    """An argument that must be a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{name} must be a number from 0 to 1, got {value!r}")
    if math.isnan(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
    return float(value)
