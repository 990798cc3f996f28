"""What the scores say: cell means, the common slope, what a format costs and how much width makes up for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log, sqrt
from typing import Any

import numpy as np

from lowprec.studies.capacity.config import Config
from lowprec.studies.intervals import plain, text
from lowprec.studies.record import Json
from lowprec.studies.regression import CommonSlope, Interval, fit, t_quantile

CLAIM = 1216 / 1120
"""The slides' claim: fp8 with 8.5% more width matches fp32."""


@dataclass(frozen=True)
class Summary:
    """Scores of every cell, and the regression of test bits per character on ln(width); None with one width."""

    config: Config
    cells: list[Json]
    fit: CommonSlope | None

    @property
    def base(self) -> str:
        return self.config.formats[0]

    @property
    def others(self) -> tuple[str, ...]:
        return self.config.formats[1:]

    @property
    def start(self) -> int:
        """The width at which ln(width / start) is 0."""
        return min(self.config.widths)

    def mean(self, cell: Json, score: str = "test") -> Interval:
        """Of a cell's seeds, with the interval that the regression's error gives; the cell's own without one."""
        values = np.array(cell[score])
        own = float(values.std(ddof=1)) if len(values) > 1 else inf
        use_fit = self.fit is not None and score == "test"
        sigma, freedom = (self.fit.sigma, self.fit.freedom) if self.fit and use_fit else (own, max(len(values) - 1, 1))
        margin = t_quantile(0.95, freedom) * sigma / sqrt(len(values))
        return Interval(float(values.mean()), float(values.mean()) - margin, float(values.mean()) + margin)

    def claim(self) -> tuple[float, Interval]:
        """The slides' extra width, and what it changes, in bits per character."""
        assert self.fit is not None
        weights = [0.0] * len(self.fit.groups) + [log(CLAIM)]
        return CLAIM - 1, self.fit.combination(weights)

    @property
    def width_helps(self) -> bool:
        """Whether the slope is below zero beyond doubt; only then does a width make up for a format's cost."""
        return self.fit is not None and self.fit.slope().high < 0

    def width_needed(self, format: str) -> Interval:
        """The extra width, as a fraction, that makes up for a format's cost, where `width_helps`."""
        assert self.fit is not None
        return Interval(*(exp(x) - 1 if x < 700 else inf for x in self.fit.shift(format, self.base)))


def summarise(config: Config, cells: list[Json]) -> Summary:
    """Fit the regression to the test scores of every seed."""
    start = min(config.widths)
    points = [(cell["format"], log(cell["width"] / start), bpc) for cell in cells for bpc in cell["test"]]
    enough = len(config.widths) > 1 and len(points) > len(config.formats) + 1
    return Summary(config, cells, fit(*zip(*points, strict=True)) if enough else None)


def findings(summary: Summary) -> list[str]:
    """The conclusions, each with its interval."""
    if summary.fit is None:
        return ["One width alone has no slope: name two or more widths to learn what width is worth."]
    return [_width(summary), *(line for format in summary.others for line in _format(summary, format))]


def _width(summary: Summary) -> str:
    more, effect = summary.claim()
    verdict = _verdict(effect, "wider is better", "wider is worse")
    return f"{more:+.1%} width changes bits per character by {text(effect, '+.4f')}: {verdict}."


def _format(summary: Summary, format: str) -> list[str]:
    assert summary.fit is not None
    base, margin = summary.base, summary.config.margin
    offset = summary.fit.offset(format, base)
    difference, p = summary.fit.matches(format, base, log(CLAIM), margin)
    shown = "shown" if p < 0.05 else "not shown"
    verdict = _verdict(offset, f"it is better than {base}", "that is its cost")
    return [
        f"{format} changes bits per character by {text(offset, '+.4f')} at equal width: {verdict}.",
        _makes_up(summary, format),
        f"{format} with {CLAIM - 1:.1%} more width differs from {base} by {text(difference, '+.4f', 90)}: "
        f"equality within ±{margin} is {shown} (two one-sided tests, p = {p:.2g}).",
    ]


def _makes_up(summary: Summary, format: str) -> str:
    if not summary.width_helps:
        return f"No width is shown to help in this run, so none can be said to make up for {format}: train for longer."
    needed = text(summary.width_needed(format), "+.1%")
    return f"{format} needs {needed} width to match {summary.base} (Fieller's interval)."


def _verdict(effect: Interval, below: str, above: str) -> str:
    return below if effect.high < 0 else above if effect.low > 0 else "no difference is shown"


def as_json(summary: Summary) -> Json:
    """Every number, for results.json. An unbounded limit is null."""
    result: Json = {"cells": summary.cells, "findings": findings(summary)}
    if summary.fit:
        numbers: dict[str, Any] = {format: _numbers(summary, format) for format in summary.others}
        result["regression"] = {
            "model": "test = a_format + s ln(width / start)",
            "start": summary.start,
            "a": {group: summary.fit.at(group, 0.0) for group in summary.fit.groups},
            "s": plain(summary.fit.slope()),
            "sigma": summary.fit.sigma,
            "freedom": summary.fit.freedom,
            "against": summary.base,
            "formats": numbers,
        }
    return result


def _numbers(summary: Summary, format: str) -> Json:
    assert summary.fit is not None
    difference, p = summary.fit.matches(format, summary.base, log(CLAIM), summary.config.margin)
    return {
        "offset": plain(summary.fit.offset(format, summary.base)),
        "width_needed": plain(summary.width_needed(format)) if summary.width_helps else None,
        "at_claimed_width": plain(difference) | {"confidence": 0.9, "p_equal": p, "margin": summary.config.margin},
    }
