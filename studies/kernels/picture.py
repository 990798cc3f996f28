"""The picture: speed over width at equally many weights, beside what a dense layer as wide is worth."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lowprec.chart import COLOURS, DASHES, INK, logarithmic, style
from lowprec.studies.kernels.summary import Curve, Summary
from lowprec.studies.kernels.work import density_of
from lowprec.studies.regression import Interval

MARKERS = "osD^"


def draw(summary: Summary) -> bytes:
    """A PNG: a row of panels for each kind and number of tokens, a column for each product."""
    config = summary.config
    lines = [(kind, tokens) for kind in config.kinds for tokens in config.tokens]
    with style():
        figure = Figure(figsize=(3.5 * len(config.ops) + 0.6, 3.1 * len(lines) + 1.1), layout="constrained")
        panels = figure.subplots(len(lines), len(config.ops), squeeze=False, sharex=True)
        for (kind, tokens), line in zip(lines, panels, strict=True):
            for op, axes in zip(config.ops, line, strict=True):
                _panel(axes, summary, op, kind, tokens)
            line[0].set_ylabel(f"{summary.unit[0]}, of blocks that are present")
        figure.legend(handles=_handles(config.blocks), loc="outside lower center", ncols=5)
        title = f"Speed over width at equally many weights: {_device(summary)}"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
        return file.getvalue()


def _device(summary: Summary) -> str:
    return str(summary.cells[0]["device"]).split(",")[0]


def _panel(axes: Axes, summary: Summary, op: str, kind: str, tokens: int) -> None:
    unit = summary.unit[1]
    curves = [curve for curve in summary.curves if (curve.op, curve.kind, curve.tokens) == (op, kind, tokens)]
    for index, curve in enumerate(curves):
        _line(axes, summary, curve, index, unit)
    dense = [speed / unit for speed in curves[0].dense]
    every = [*dense, *(speed.estimate / unit for curve in curves for speed in curve.speed)]
    axes.plot(summary.widths, dense, color=INK, linestyle="--", linewidth=1.3, marker="")
    axes.set_xscale("log")
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    axes.set_ylim(min(every) / 2, 2 * max(every))  # an interval that reaches further is cut
    axes.xaxis.set_minor_locator(NullLocator())
    shares = [f"{width}\n{density_of(widening)}" for width, widening in _ticks(summary)]
    axes.set_xticks([width for width, _ in _ticks(summary)], shares)
    axes.grid(axis="y")
    axes.set_title(f"{op}, {kind}, N = {tokens}")


def _ticks(summary: Summary) -> list[tuple[int, float]]:
    """Widths that have room for their label, from the largest down."""
    kept: list[tuple[int, float]] = []
    for width, widening in reversed(list(zip(summary.widths, summary.config.widenings, strict=True))):
        if not kept or 1.3 * width <= kept[-1][0]:
            kept.append((width, widening))
    return kept


def _line(axes: Axes, summary: Summary, curve: Curve, index: int, unit: float) -> None:
    middle = [each.estimate / unit for each in curve.speed]
    margins = [[abs(end / unit) for end in ends] for ends in zip(*map(_margins, curve.speed), strict=True)]
    look: dict[str, Any] = {"capsize": 2.5, "elinewidth": 1.0, "marker": MARKERS[index], "markersize": 4.5}
    axes.errorbar(summary.widths, middle, margins, color=COLOURS[index], linestyle=DASHES[0], linewidth=1.4, **look)


def _margins(speed: Interval) -> tuple[float, float]:
    return (speed.estimate - speed.low, speed.high - speed.estimate) if speed.low > 0 and speed.bounded else (0.0, 0.0)


def _handles(blocks: tuple[int, ...]) -> list[Any]:
    lines = [
        Line2D([], [], color=COLOURS[i], marker=MARKERS[i], markersize=4.5, linestyle="-", label=f"b = {block}")
        for i, block in enumerate(blocks)
    ]
    dense = "a dense layer as wide, its zeros not counted"
    return [*lines, Line2D([], [], color=INK, linestyle="--", marker="", label=dense)]
