"""What the sums and the scores say, with intervals: exponents of growth beside the law's, bits per character lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import log, log2, sqrt
from typing import NamedTuple

import numpy as np

from lowprec.rounding import Rounding
from lowprec.studies.accumulation.config import FULL, Config
from lowprec.studies.accumulation.theory import SITUATIONS, Moments, Situation, law
from lowprec.studies.intervals import mean, plain, text
from lowprec.studies.record import Json
from lowprec.studies.regression import Interval


class Curve(NamedTuple):
    """How the errors of one shape grow, in one situation, with one kind of terms; None where too few points are clear.

    exponent, expected: a in error ~ depth^a, measured and of the law. ratio: of errors to the law.
    step, expected_step: what each doubling of K adds to the error, in spacings 2^-m.
    """

    terms: str
    situation: Situation
    shape: str
    exponent: Interval | None
    expected: float | None
    ratio: Interval | None
    step: Interval | None
    expected_step: float | None


@dataclass(frozen=True)
class Summary:
    """Rows of the sums, by terms and situation, and the cells of the training."""

    config: Config
    sums: list[Json]
    cells: list[Json]

    @cached_property
    def rows(self) -> list[Json]:
        """Every row, with its terms and situation, and what the law says of it."""
        return [
            {"terms": part["terms"], "situation": part["situation"], **row, "law": self._law(part["situation"], row)}
            for part in self.sums
            for row in part["rows"]
        ]

    def _law(self, name: str, row: Json) -> float:
        situation = by_name(name)
        accumulator = self.config.accumulator(row["shape"], row["bits"], situation.rounding.value)
        return law(situation, accumulator, row["K"], Moments(row["mean"], row["square"]))

    @cached_property
    def curves(self) -> list[Curve]:
        return [
            self._curve(part["terms"], by_name(part["situation"]), shape)
            for part in self.sums
            for shape in self.config.shapes
        ]

    def select(self, terms: str, situation: Situation, shape: str) -> list[Json]:
        """The rows of one curve."""
        wanted = (terms, situation.name, shape)
        return [row for row in self.rows if (row["terms"], row["situation"], row["shape"]) == wanted]

    def clear(self, row: Json) -> bool:
        """Whether no term drowns: at every level a sum's last spacing is at most a quarter of what is added to it."""
        situation = by_name(row["situation"])
        accumulator = self.config.accumulator(row["shape"], row["bits"])
        most = max(min(level.fan_in or inputs, inputs) for level, inputs, _ in accumulator.runs(row["K"]))
        size = most if situation.same_sign else sqrt(most)
        return bool(size * 2.0 ** -row["bits"] <= 0.25)

    def _curve(self, terms: str, situation: Situation, shape: str) -> Curve:
        rows = [row for row in self.select(terms, situation, shape) if self.clear(row)]
        by_seed = [[row for row in rows if row["seed"] == seed] for seed in range(self.config.draws)]
        if not _has_slope(by_seed[0]):
            return Curve(terms, situation, shape, None, None, None, None, None)

        def depth(row: Json) -> float:
            return log(self.config.accumulator(shape, row["bits"]).depth(row["K"]))

        def fits(value: str, growth: bool) -> list[float]:
            """The common slope over mantissa bits, for each seed."""
            if growth:
                return [_slope((row["bits"], depth(row), log(row[value])) for row in seed) for seed in by_seed]
            units = [[(row["bits"], log2(row["K"]), row[value] * 2 ** row["bits"]) for row in seed] for seed in by_seed]
            return [_slope(points) for points in units]

        ratio = mean([sum(log(row["rms"] / row["law"]) for row in seed) / len(seed) for seed in by_seed])
        return Curve(
            terms,
            situation,
            shape,
            mean(fits("rms", True)),
            sum(fits("law", True)) / len(by_seed),
            Interval(*np.exp(np.minimum(ratio, 700)).tolist()),
            mean(fits("rms", False)),
            sum(fits("law", False)) / len(by_seed),
        )

    @property
    def of_bound(self) -> float:
        """The largest error over its bound."""
        return max((row["of_bound"] for row in self.rows), default=0.0)

    @property
    def counted(self) -> int:
        """How many sums were measured."""
        return sum(row["sums"] for row in self.rows)

    @property
    def base(self) -> Json:
        return next(cell for cell in self.cells if cell["accumulator"] == FULL)

    def lost(self, cell: Json) -> Interval:
        """Bits per character more than the base, by the differences of equal seeds."""
        return mean([a - b for a, b in zip(cell["test"], self.base["test"], strict=True)])


def by_name(name: str) -> Situation:
    """The situation of that name."""
    return next(situation for situation in SITUATIONS if situation.name == name)


def _has_slope(rows: list[Json]) -> bool:
    return any(len({row["K"] for row in rows if row["bits"] == bits}) > 1 for bits in {row["bits"] for row in rows})


def _slope(points: Iterable[tuple[int, float, float]]) -> float:
    """The least-squares slope of y on x that groups share, each with an intercept of its own: (group, x, y)."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for group, x, y in points:
        groups.setdefault(group, []).append((x, y))
    centred = np.concatenate([np.array(each) - np.mean(each, 0) for each in groups.values()])
    return float(centred[:, 0] @ centred[:, 1] / (centred[:, 0] @ centred[:, 0]))


# In words.


def findings(summary: Summary) -> list[str]:
    """The conclusions, each with its interval."""
    lines = [line for curve in summary.curves if (line := _growth(curve))]
    if summary.sums:
        lines.append(
            f"Of {summary.counted:,} sums none is further from the exact one than its bound; "
            f"the worst error is {summary.of_bound:.2f} of it."
            if summary.of_bound <= 1
            else f"A sum exceeds its bound: {summary.of_bound:.3f} of it."
        )
    lines += [_loss(summary, cell) for cell in summary.cells if cell["accumulator"] != FULL]
    return [*lines, *(line for bits in summary.config.training_bits if (line := _order(summary, bits)))]


def _growth(curve: Curve) -> str:
    if curve.exponent is None or curve.step is None or curve.shape == "chunked":
        return ""
    where = f"{curve.terms}, {curve.situation.title}, {curve.shape}"
    if curve.shape == "pairwise" and curve.situation.rounding is Rounding.toward_zero:
        return (
            f"{where}: each doubling of K adds {text(curve.step, '.3f')} spacings 2^-m to the error, "
            f"by the law {curve.expected_step:.3f}."
        )
    depth = "K" if curve.shape == "sequential" else "(1 + log2 K)"
    growth = text(curve.exponent, ".2f")
    return f"{where}: the error grows as {depth}^a with a = {growth}, by the law {curve.expected:.2f}."


def _loss(summary: Summary, cell: Json) -> str:
    lost = summary.lost(cell)
    verdict = "it is lost" if lost.low > 0 else "better than fp32" if lost.high < 0 else "no difference is shown"
    shape, _, bits = cell["accumulator"].rpartition("-")
    return f"In training, {shape} sums, m = {bits}: {text(lost, '+.4f')} bits per character; {verdict}."


def _order(summary: Summary, bits: int) -> str:
    """What the order alone is worth."""
    cells = {cell["accumulator"]: cell for cell in summary.cells}
    pair = [cells.get(f"{shape}-{bits}") for shape in ("sequential", "pairwise")]
    if None in pair:
        return ""
    running, tree = (cell["test"] for cell in pair if cell)
    gained = mean([a - b for a, b in zip(running, tree, strict=True)])
    verdict = "pairwise is better" if gained.low > 0 else "worse" if gained.high < 0 else "no difference is shown"
    return f"In training, m = {bits}, sequential less pairwise: {text(gained, '+.4f')} bits per character; {verdict}."


# On disk.


def as_json(summary: Summary) -> Json:
    """What follows from the rows, for results.json; these are in results.csv. An unbounded limit is null."""
    curves = [
        {
            "terms": curve.terms,
            "situation": curve.situation.name,
            "shape": curve.shape,
            **{name: plain(getattr(curve, name)) for name in ("exponent", "ratio", "step")},
            "expected": curve.expected,
            "expected_step": curve.expected_step,
        }
        for curve in summary.curves
    ]
    lost = {cell["accumulator"]: plain(summary.lost(cell)) for cell in summary.cells}
    return {"findings": findings(summary), "curves": curves, "cells": summary.cells, "lost": lost}
