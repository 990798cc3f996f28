"""What the times say, with intervals over repeats: speeds, their growth with width, and where sparse beats dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product
from math import exp2, inf, log2
from typing import NamedTuple

import numpy as np

from lowprec.studies.intervals import mean, plain
from lowprec.studies.kernels.config import Config
from lowprec.studies.kernels.work import density_of
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
    return Interval(*(exp2(value) if value < 1000 else inf for value in interval))


# In words.


def findings(summary: Summary) -> list[str]:
    """The conclusions: a line for each product, over its blocks."""
    lines = []
    for (op, kind, tokens), group in groupby(summary.curves, lambda curve: curve[:3]):
        curves = list(group)
        words = "; ".join(filter(None, (_said(curves, _growth), _faster(curves, summary.config))))
        lines.append(f"{op}, {kind}, N = {tokens}: {words}.")
    return lines


def _said(curves: list[Curve], say: Callable[[Curve], str]) -> str:
    """What is said of each block; of those of which the same is said, together."""
    said: dict[str, list[int]] = {}
    for curve in curves:
        said.setdefault(say(curve), []).append(curve.block)
    return ", ".join(f"{words} for b = {', '.join(map(str, blocks))}" for words, blocks in said.items() if words)


def _growth(curve: Curve) -> str:
    if curve.doubling is None:
        return ""
    if curve.doubling.low > 1:
        return "speed grows with width"
    return "speed falls with width" if curve.doubling.high < 1 else "no change of speed is shown"


def _faster(curves: list[Curve], config: Config) -> str:
    slow = [curve for curve in curves if faster_from(curve, config) is None]
    fast = [curve for curve in curves if curve not in slow]
    shown = _said(fast, lambda curve: f"from {faster_from(curve, config)} down")
    unshown = _said(slow, lambda curve: "not shown to be faster than a dense layer")
    return "; ".join(filter(None, (shown and f"faster than a dense layer {shown}", unshown)))


def faster_from(curve: Curve, config: Config) -> str | None:
    """The density from which down a sparse layer is faster than a dense one as wide, beyond doubt."""
    faster = [ratio.low > 1 for ratio in curve.of_dense]
    first = next((i for i in range(len(faster)) if all(faster[i:])), None)
    return None if first is None else density_of(config.widenings[first])


def as_json(summary: Summary) -> Json:
    """What follows from the rows, for results.json; these are in results.csv."""
    curves = [
        curve._asdict()
        | {"speed": [plain(each) for each in curve.speed], "of_dense": [plain(each) for each in curve.of_dense]}
        | {"doubling": plain(curve.doubling), "faster_from": faster_from(curve, summary.config)}
        for curve in summary.curves
    ]
    return {"findings": findings(summary), "widths": summary.widths, "curves": curves}
