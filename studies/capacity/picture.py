"""The picture: every seed, the means, the common-slope lines, and the width that a format costs."""

from __future__ import annotations

import io
from math import exp, log
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from lowprec.chart import COLOURS, DASHES, INK, style
from lowprec.studies.capacity.summary import Summary

MARKERS = "osD^v"
BESIDE = 1.004
"""How far what would cover one another is moved apart, as a ratio of widths."""


def draw(summary: Summary) -> bytes:
    """A PNG."""
    with style():
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for index, format in enumerate(summary.config.formats):
            _format(axes, summary, format, index)
        if summary.width_helps and summary.others:
            _gap(axes, summary, summary.others[0])
        _label(axes, summary)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()


def _format(axes: Axes, summary: Summary, format: str, index: int) -> None:
    cells = [cell for cell in summary.cells if cell["format"] == format]
    colour, marker = COLOURS[index], MARKERS[index % len(MARKERS)]
    aside = BESIDE ** (2 * index - len(summary.config.formats) + 1)
    widths = [cell["width"] * aside for cell in cells]
    for width, cell in zip(widths, cells, strict=True):
        axes.scatter([width / BESIDE] * len(cell["test"]), cell["test"], s=16, color=colour, alpha=0.5, linewidths=0)
    means = [summary.mean(cell) for cell in cells]
    middle = [mean.estimate for mean in means]
    margins = [mean.high - mean.estimate if mean.bounded else 0.0 for mean in means]
    look: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markersize": 7,
        "linestyle": "",
        "capsize": 4,
        "elinewidth": 1.2,
    }
    axes.errorbar(widths, middle, margins, label=format, **look)
    if summary.fit:
        ends = [min(summary.config.widths) / 1.015, max(summary.config.widths) * 1.015]
        fitted = [summary.fit.at(format, log(width / summary.start)) for width in ends]
        axes.plot(ends, fitted, color=colour, linestyle=DASHES[index], linewidth=1.4)


def _gap(axes: Axes, summary: Summary, format: str) -> None:
    """An arrow from the base's line to the format's, at equal bits per character."""
    assert summary.fit is not None
    shift, needed = summary.fit.shift(format, summary.base), summary.width_needed(format)
    at = log(max(summary.config.widths) / summary.start) / 2
    level = summary.fit.at(summary.base, at)
    left, right = (summary.start * exp(x) for x in (at, at + shift.estimate))
    limits = f"95%: {needed.low:+.1%} to {needed.high:+.1%}" if needed.bounded else "95%: unbounded"
    axes.annotate("", (right, level), (left, level), arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1.4})
    words = f"arrow: {format} needs {needed.estimate:+.1%} width\nto match {summary.base} ({limits})"
    axes.text(0.02, 0.03, words, transform=axes.transAxes, color=INK, fontsize=9)


def _label(axes: Axes, summary: Summary) -> None:
    config = summary.config
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(config.widths, [str(width) for width in config.widths])
    axes.set_xlabel(f"width of the hidden state, log scale ({config.steps} internal steps)")
    axes.set_ylabel("bits per character, test text")
    axes.set_title("What a format costs, in bits and in width")
    axes.grid(axis="y")
    axes.legend(title=f"mean of {config.seeds} seeds, 95%; dots: seeds")
