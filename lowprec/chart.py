"""Pictures: one plain style for every chart, and the number line of a format.

Charts are drawn on `Figure` objects, without pyplot: no display, no global state. Studies share the style.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lowprec.formats import FloatFormat
from lowprec.ruler import detail, magnitudes
from lowprec.tables import product

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that stay apart for colour-blind readers too. Source: Okabe and Ito 2008."""

DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))
"""Line styles in the order of `COLOURS`, so that lines which coincide, or lose their colour, can be told apart."""

INK, GREY = "#222222", "#767676"
NORMAL, SUBNORMAL, SPECIAL = COLOURS[0], COLOURS[1], COLOURS[3]

_SETTINGS: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS, linestyle=DASHES),
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def style() -> contextlib.AbstractContextManager[None]:
    """Settings under which every chart is drawn and saved, for a `with` block; after it the caller's are back."""
    return matplotlib.rc_context(_SETTINGS)


def logarithmic(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each power of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@dataclass(frozen=True)
class Line:
    """The number line of one format: its positive values, or only their ends where there are too many to draw."""

    name: str
    fmt: FloatFormat

    @property
    def dense(self) -> bool:
        return self.fmt.max_code > 600

    @cached_property
    def values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Positive finite values, ascending."""
        return magnitudes(self.fmt)

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return float(self.values[0])

    @property
    def first_normal(self) -> float:
        """The smallest normal value, or infinity where every value is subnormal."""
        return math.inf if self.fmt.min_normal is None else self.fmt.min_normal

    def relative_spacing(self) -> tuple[list[float], list[float]]:
        """Exponents of the binades, then that of the largest value, and log2 of spacing / 2^exponent in each."""
        first = math.floor(math.log2(self.smallest))
        exponents = range(first, self.fmt.emax + 1)
        normal = [max(k, self.fmt.emin) if self.fmt.ebits else self.fmt.emin for k in exponents]
        spacing = [float(at - self.fmt.mbits - k) for at, k in zip(normal, exponents, strict=True)]
        return [*map(float, exponents), math.log2(self.fmt.max)], [*spacing, spacing[-1]]


def draw_formats(formats: Mapping[str, FloatFormat], path: Path) -> None:
    """Save a picture (PNG) of the positive values of formats: near zero, over the whole range, and their precision.

    Args:
        formats: what to draw, under the names to show.
        path: the file to write.

    Raises:
        ValueError: with no format.
        OSError: when the file cannot be written.
    """
    if not formats:
        raise ValueError("formats must name at least one format, got none")
    lines = [Line(name, fmt) for name, fmt in formats.items()]
    with style():
        rows = 0.8 + 0.58 * len(lines)
        figure = Figure(figsize=(10, 2 * rows + 3.4), layout="constrained")
        near, whole, precision = figure.subplots(3, 1, height_ratios=[rows, rows, 2.2])
        whole.sharex(precision)
        _draw_near_zero(near, lines)
        _draw_whole_range(whole, lines)
        _draw_precision(precision, lines)
        figure.suptitle(_title(lines), x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(path, format="png")


def _title(lines: list[Line]) -> str:
    if len(lines) > 1:
        return "Values of " + ", ".join(line.name for line in lines)
    [line] = lines
    form = f" = {line.fmt}" if line.name != str(line.fmt) else ""
    return f"{line.name}{form}: {line.fmt.bits} bits, bias {line.fmt.bias}, values up to {_largest(line)}"


# The rows of number lines. Each kind of value has a height as well as a colour.

_HEIGHTS = {"subnormal": 0.15, "normal": 0.23, "first of its binade": 0.34}
_TICK_COLOURS = dict(zip(_HEIGHTS, (SUBNORMAL, NORMAL, NORMAL), strict=True))


def _draw_near_zero(axes: Axes, lines: list[Line]) -> None:
    limit = max(detail(line.fmt) for line in lines)
    axes.set_xlim(-0.01 * limit, 1.01 * limit)
    for row, line in enumerate(lines):
        _draw_row(axes, row, line, limit=limit)
        axes.vlines(0, row - 0.34, row + 0.34, color=INK, linewidth=1.8)
    if len(lines) == 1:
        _mark_spacing(axes, lines[0], limit)
    top = math.floor(math.log2(limit))
    powers = range(top - 3, top + 1)
    axes.set_xticks([0.0, *(2.0**k for k in powers)], ["0", *map(_power, powers)])
    axes.set_title("Near zero, linear axis")
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=kind) for kind, colour in list(_TICK_COLOURS.items())[:2]
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.1)
    _finish_rows(axes, lines)


def _mark_spacing(axes: Axes, line: Line, limit: float) -> None:
    """Say, above each stretch of equal spacing that is wide enough, what the spacing is."""
    exponents = [k for k in range(line.fmt.emin, line.fmt.emax + 1) if line.fmt.ebits and 2.0**k < limit]
    starts = [*([0.0] if line.smallest < line.first_normal else []), *(2.0**k for k in exponents), limit]
    for start, end in itertools.pairwise(starts):
        exponent = max(math.frexp(start)[1] - 1, line.fmt.emin) if start else line.fmt.emin
        if end - start > 0.1 * limit:
            text = f"spacing {_power(exponent - line.fmt.mbits)}"
            axes.text((start + end) / 2, -0.42, text, ha="center", va="bottom", fontsize=9, color=GREY)


def _draw_whole_range(axes: Axes, lines: list[Line]) -> None:
    low = math.log2(min(line.smallest for line in lines))
    high = math.log2(max(line.fmt.max for line in lines))
    margin = 0.1 * (high - low) + 0.3
    axes.set_xlim(low - margin, high + 2.4 * margin)
    for row, line in enumerate(lines):
        _draw_row(axes, row, line)
        _mark_ends(axes, row, line)
        axes.text(low - 0.9 * margin, row, "0", va="center", fontweight="bold", backgroundcolor="white")
        codes = "±∞, NaN" if line.fmt.has_inf else "NaN" if line.fmt.has_nan else "finite only"
        colour = SPECIAL if line.fmt.has_nan else GREY
        axes.text(high + 2.3 * margin, row, codes, va="center", ha="right", color=colour, fontsize=9)
    axes.set_title("The whole range, log2 axis: zero at the left, special codes at the right")
    places = [k for k in MaxNLocator(14, integer=True).tick_values(low, high) if low <= k <= high]
    axes.set_xticks(places, list(map(_power, places)))
    _finish_rows(axes, lines)


def _draw_row(axes: Axes, row: int, line: Line, limit: float = math.inf) -> None:
    """One format's values: on a linear axis up to `limit`, or all of them on a log2 axis."""
    scale = np.log2 if limit == math.inf else np.positive
    if line.dense:
        _draw_bars(
            axes, row, *(float(scale(min(x, limit, line.fmt.max))) for x in (line.smallest, line.first_normal, limit))
        )
        return
    values = line.values[line.values <= limit]
    room = 600 / (axes.get_xlim()[1] - axes.get_xlim()[0])  # points to each unit of the axis, about
    fine = min(1.1, max(0.4, 0.6 * room / 2**line.fmt.mbits)) if limit == math.inf else 1.1
    normal, power = values >= line.first_normal, np.frexp(values)[0] == 0.5
    kinds = (~normal, normal & ~power, normal & power)
    for chosen, (kind, height), width in zip(kinds, _HEIGHTS.items(), (1.2, fine, 1.6 * fine), strict=True):
        axes.vlines(scale(values[chosen]), row - height, row + height, color=_TICK_COLOURS[kind], linewidth=width)


def _draw_bars(axes: Axes, row: int, start: float, normal: float, end: float) -> None:
    """What `_draw_row` draws, for a format whose single values no picture could show."""
    for left, right, kind in ((start, normal, "subnormal"), (normal, end, "normal")):
        height = _HEIGHTS[kind]
        axes.add_patch(
            Rectangle((left, row - height), right - left, 2 * height, color=_TICK_COLOURS[kind], linewidth=0)
        )


def _mark_ends(axes: Axes, row: int, line: Line) -> None:
    """The smallest and the largest value beside the row, the smallest normal one above it."""
    low, high = math.log2(line.smallest), math.log2(line.fmt.max)
    side: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(_number(line.smallest), (low, row), (-5, 0), ha="right", **side)
    axes.annotate(_largest(line), (high, row), (5, 0), ha="left", **side)
    if line.smallest < line.first_normal < math.inf:
        axes.text(
            math.log2(line.first_normal), row - 0.36, _number(line.first_normal), ha="center", va="bottom", fontsize=9
        )


def _finish_rows(axes: Axes, lines: list[Line]) -> None:
    axes.set_ylim(len(lines) - 0.5, -0.75)
    axes.set_yticks(range(len(lines)), [line.name for line in lines])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


# Precision: how far apart neighbours are, compared with their own size.


def _draw_precision(axes: Axes, lines: list[Line]) -> None:
    for line, colour, dash in zip(lines, itertools.cycle(COLOURS), itertools.cycle(DASHES), strict=False):
        exponents, spacing = line.relative_spacing()
        axes.step(exponents, spacing, where="post", color=colour, linestyle=dash, label=line.name)
        axes.plot(exponents[-1], spacing[-1], "o", color=colour, markersize=4)
    axes.grid(True)
    low, high = axes.dataLim.intervaly
    axes.set_ylim(low - 0.5 - 0.08 * (high - low), high + 0.5 + 0.08 * (high - low))
    axes.set_title("Relative spacing: distance to the next value, over the power of two below; lower is finer")
    axes.set_xlabel("value")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda exponent, _: _power(exponent)))
    if len(lines) > 1:
        axes.legend(loc="upper right")


def _power(exponent: float) -> str:
    return f"$2^{{{round(exponent)}}}$"


def _largest(line: Line) -> str:
    return f"{line.fmt.max:.6g}" if line.fmt.max < 1e9 else f"{line.fmt.max:.2e}"


def _number(x: float) -> str:
    """`product` as mathematics."""
    return re.sub(r"2\^(-?\d+)", r"$2^{\1}$", product(x))
