"""The pictures: errors of sums beside law and bound, and what training loses to its accumulator."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lowprec.chart import COLOURS, DASHES, GREY, INK, style
from lowprec.rounding import Rounding
from lowprec.studies.accumulation.config import SHAPES, Config
from lowprec.studies.accumulation.summary import Curve, Summary, by_name
from lowprec.studies.accumulation.theory import Situation

MARKERS = "osD^vP*"
WORDS = {"fp8": "products of fp8 numbers", "fp32": "normal, in fp32"}


def colour_of(shape: str) -> str:
    """The same in every picture."""
    return COLOURS[SHAPES.index(shape)]


# Sums.


def draw_sums(summary: Summary) -> bytes:
    """A PNG: a panel for each kind of terms and situation; errors over 2^-m, where bits coincide."""
    kinds = list(dict.fromkeys(part["terms"] for part in summary.sums))
    situations = list(dict.fromkeys(by_name(part["situation"]) for part in summary.sums))
    with style():
        size = (4.1 * len(situations), 4.0 * len(kinds) + 0.9)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(kinds), len(situations), sharex=True, sharey=True, squeeze=False)
        for row, terms in zip(panels, kinds, strict=True):
            for axes, situation in zip(row, situations, strict=True):
                _panel(axes, summary, terms, situation)
        figure.legend(handles=_handles(summary.config), loc="outside lower center", ncols=6)
        title = "Error of a sum of K terms, in units of the accumulator's relative spacing"
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        return _png(figure)


def _panel(axes: Axes, summary: Summary, terms: str, situation: Situation) -> None:
    for shape in summary.config.shapes:
        rows = summary.select(terms, situation, shape)
        for marker, bits in zip(MARKERS, summary.config.bits, strict=False):
            _points(axes, summary, [row for row in rows if row["bits"] == bits], marker)
        _lines(axes, summary, [row for row in rows if row["bits"] == max(summary.config.bits)])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(summary.config.lengths)
    axes.tick_params(labelbottom=True, labelleft=True)
    axes.set_xlabel(f"K terms, {WORDS[terms]}")
    axes.set_ylabel(f"|error| / {'Σ|t|' if situation.same_sign else '√Σt²'}, rms, over $2^{{-m}}$")
    axes.set_title(situation.title)
    axes.grid(True)
    curves = [curve for curve in summary.curves if curve.terms == terms and curve.situation == situation]
    words = "\n".join(filter(None, map(_exponent, curves)))
    axes.text(0.03, 0.97, words, transform=axes.transAxes, va="top", fontsize=8.5)


def _points(axes: Axes, summary: Summary, rows: list[dict[str, Any]], marker: str) -> None:
    """Means over draws; hollow where terms drown."""
    for K in summary.config.lengths:
        here = [row for row in rows if row["K"] == K]
        colour = colour_of(here[0]["shape"])
        error = float(np.mean([row["rms"] for row in here])) * 2 ** here[0]["bits"]
        face = colour if summary.clear(here[0]) else "none"
        if error:
            axes.plot(K, error, marker, color=colour, markerfacecolor=face, markersize=5, markeredgewidth=0.9)


def _lines(axes: Axes, summary: Summary, rows: list[dict[str, Any]]) -> None:
    """The law, and the bound as far as it says anything: of the narrowest spacing, where it is nearly depth · u."""
    lengths, scale = summary.config.lengths, 2.0 ** rows[0]["bits"]
    laws, bounds = [], []
    for K in lengths:
        row = next(row for row in rows if row["K"] == K)
        situation = by_name(row["situation"])
        accumulator = summary.config.accumulator(row["shape"], row["bits"], situation.rounding.value)
        norm = 1.0 if situation.same_sign else (K / row["square"]) ** 0.5 * row["mean"]
        laws.append(row["law"] * scale)
        bound = accumulator.error_bound(K)
        bounds.append(bound * scale * norm if bound <= 1 else math.nan)
    colour = colour_of(rows[0]["shape"])
    axes.plot(lengths, laws, color=colour, linestyle="-", linewidth=1.3)
    axes.plot(lengths, bounds, color=colour, linestyle=DASHES[1], linewidth=1.0, alpha=0.8)


def _exponent(curve: Curve) -> str:
    if curve.exponent is None or curve.shape == "chunked":
        return ""
    if curve.step and curve.shape == "pairwise" and curve.situation.rounding is Rounding.toward_zero:
        margin = curve.step.high - curve.step.estimate
        return f"pairwise: {curve.step.estimate:.3f} ± {margin:.3f} more for each doubling of K"
    base = "K" if curve.shape == "sequential" else "(1 + log₂K)"
    margin = curve.exponent.high - curve.exponent.estimate
    return f"{curve.shape}: {base}^a, a = {curve.exponent.estimate:.2f} ± {margin:.2f}"


def _handles(config: Config) -> list[Any]:
    shapes = [
        Line2D([], [], color=colour_of(shape), linestyle="-", label=_words(config, shape)) for shape in config.shapes
    ]
    bits = [
        Line2D([], [], color=INK, marker=marker, linestyle="", markersize=5, label=f"m = {bits}")
        for marker, bits in zip(MARKERS, config.bits, strict=False)
    ]
    hollow: dict[str, Any] = {"color": INK, "marker": "o", "linestyle": "", "markersize": 5, "markerfacecolor": "none"}
    kinds = [
        Line2D([], [], color=GREY, linestyle="-", label="lines: law"),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1.0, label="worst case"),
        Line2D([], [], label="hollow: terms drown", **hollow),
    ]
    return [*shapes, *kinds, *bits]


def _words(config: Config, shape: str) -> str:
    return f"chunks of {config.chunk}" if shape == "chunked" else shape


# Training.


def draw_training(summary: Summary) -> bytes:
    """A PNG: bits per character over mantissa bits, a line for each shape, beside fp32."""
    with style():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for index, shape in enumerate(summary.config.shapes):
            _trained(axes, summary, shape, index)
        axes.axhline(0, color=GREY, linewidth=1.0)
        axes.set_xlabel("mantissa bits of the accumulator of every product, forward and backward")
        axes.set_ylabel("bits per character more than with fp32")
        axes.set_xticks(summary.config.training_bits)
        axes.set_title("What training loses to its accumulator")
        axes.grid(axis="y")
        axes.legend(title=f"mean of {summary.config.seeds} seeds, 95%")
        return _png(figure)


def _trained(axes: Axes, summary: Summary, shape: str, index: int) -> None:
    cells = {cell["accumulator"]: cell for cell in summary.cells}
    bits = sorted(summary.config.training_bits)
    lost = [summary.lost(cells[f"{shape}-{each}"]) for each in bits]
    margins = [each.high - each.estimate if each.bounded else 0.0 for each in lost]
    places = [each + 0.08 * (index - 1) for each in bits]
    look: dict[str, Any] = {"capsize": 3, "elinewidth": 1.1, "marker": MARKERS[index], "linestyle": DASHES[index]}
    estimates = [each.estimate for each in lost]
    axes.errorbar(
        places, estimates, margins, color=colour_of(shape), label=_words(summary.config, shape), linewidth=1.3, **look
    )


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
