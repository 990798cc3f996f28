"""What the times say, with intervals over repeats: speeds, their growth with width, and where sparse beats dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import exp2, log2
from typing import NamedTuple

import numpy as np

from lowprec.studies.intervals import mean, plain, text
from lowprec.studies.kernels.config import Config
from lowprec.studies.record import Json
from lowprec.studies.regression import Interval


class Curve(NamedTuple):
    """One product in blocks of one size, over widths.

    speed: operations a second, of the blocks that are present. of_dense: how many times faster than the dense product
    of a layer as wide. doubling: by what the speed is multiplied when the width doubles; None for one width.
    """

    op: str
    kind: str
    tokens: int
    block: int
    speed: list[Interval]
    of_dense: list[Interval]
    doubling: Interval | None

    @property
    def name(self) -> str:
        return f"{self.op}, {self.kind}, N = {self.tokens}, b = {self.block}"

    @property
    def dense(self) -> list[float]:
        """What the dense products' times are worth as speeds, where their zeros do not count."""
        return [speed.estimate / ratio.estimate for speed, ratio in zip(self.speed, self.of_dense, strict=True)]


@dataclass(frozen=True)
class Summary:
    """The results of every width, in the order of `config.widenings`."""

    config: Config
    cells: list[Json]

    @cached_property
    def curves(self) -> list[Curve]:
        config = self.config
        each = product(config.ops, config.kinds, config.tokens, config.blocks)
        return [self._curve(op, kind, tokens, block) for op, kind, tokens, block in each]

    @property
    def widths(self) -> list[int]:
        return [cell["width"] for cell in self.cells]

    @property
    def unit(self) -> tuple[str, float]:
        """What speeds are said in: its name and size."""
        return ("TFLOP/s", 1e12) if self.config.device == "cuda" else ("GFLOP/s", 1e9)

    def _curve(self, op: str, kind: str, tokens: int, block: int) -> Curve:
        mine = self._samples(op, kind, tokens, block)
        dense = self._samples(op, "bf16" if kind == "fp8" else kind, tokens, 0)
        speeds = [[row["flops"] / row["seconds"] for row in rows] for rows in mine]
        ratios = [
            [whole["seconds"] / row["seconds"] for row, whole in zip(rows, wholes, strict=True)]
            for rows, wholes in zip(mine, dense, strict=True)
        ]
        speed, of_dense = ([_geometric(values) for values in each] for each in (speeds, ratios))
        return Curve(op, kind, tokens, block, speed, of_dense, self._doubling(speeds))

    def _samples(self, op: str, kind: str, tokens: int, block: int) -> list[list[Json]]:
        """Of each width the rows of its repeats."""
        wanted = (op, kind, tokens, block)
        return [
            [row for row in cell["rows"] if (row["op"], row["kind"], row["tokens"], row["block"]) == wanted]
            for cell in self.cells
        ]

    def _doubling(self, speeds: list[list[float]]) -> Interval | None:
        """From the slope of log speed over log width, for each repeat by itself."""
        if len(self.widths) < 2:
            return None
        x = np.log2(self.widths)
        slopes = [float(np.polyfit(x, np.log2(each), 1)[0]) for each in zip(*speeds, strict=True)]
        return _exponential(mean(slopes))


def _geometric(values: list[float]) -> Interval:
    """The geometric mean: ratios of times have no other."""
    return _exponential(mean([log2(value) for value in values]))


def _exponential(interval: Interval) -> Interval:
    return Interval(*(exp2(min(value, 1000.0)) for value in interval))


# In words.


def findings(summary: Summary) -> list[str]:
    """The conclusions, each with its interval."""
    return [line for curve in summary.curves for line in _of(curve, summary)]


def _of(curve: Curve, summary: Summary) -> Iterator[str]:
    if curve.doubling:
        low, high = curve.doubling.low, curve.doubling.high
        verdict = "it grows with width" if low > 1 else "it falls with width" if high < 1 else "no change is shown"
        yield f"{curve.name}: twice the width is {text(curve.doubling, '.2f')} times the speed; {verdict}."
    faster = [ratio.low > 1 for ratio in curve.of_dense]
    first = next((i for i in range(len(faster)) if all(faster[i:])), None)
    if first is None:
        yield f"{curve.name}: not shown to be faster than the dense layer at the largest width."
    else:
        share = f"{100 / summary.config.widenings[first] ** 2:.2g}%"
        largest = text(curve.of_dense[-1], ".3g")
        yield f"{curve.name}: faster than the dense layer from {share} down; {largest} times at the largest width."


def as_json(summary: Summary) -> Json:
    """What follows from the rows, for results.json; these are in results.csv."""
    curves = [
        curve._asdict()
        | {"speed": [plain(each) for each in curve.speed], "of_dense": [plain(each) for each in curve.of_dense]}
        | {"doubling": plain(curve.doubling) if curve.doubling else None}
        for curve in summary.curves
    ]
    return {"findings": findings(summary), "widths": summary.widths, "curves": curves}
