"""The pictures: scores over updates, differences with their intervals, and masks before and after learning."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lowprec.chart import COLOURS, GREY, INK, style
from lowprec.studies.regression import Interval
from lowprec.studies.residual.config import DENSE, Arm
from lowprec.studies.residual.summary import Summary

MASK_COLOURS = ("#FFFFFF", "#8C8C8C", COLOURS[1], COLOURS[0])
"""Of blocks that are absent, kept, dropped and grown."""


def draw_arms(summary: Summary) -> bytes:
    """A PNG: a panel of curves for each format; differences from the base, and of learned patterns from their start."""
    formats = list(dict.fromkeys(Arm.parse(name).format for name in summary.config.arms))
    with style():
        rows = max(len(summary.config.arms) - 1, len(summary.learned()), 1)
        figure = Figure(figsize=(5.6 * max(len(formats), 2), 5.6 + 0.34 * rows), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[3.6, 1.2 + 0.34 * rows], squeeze=False)[:, 0]
        panels = above.subplots(1, len(formats), sharey=True, squeeze=False)[0]
        for axes, format in zip(panels, formats, strict=True):
            _curves(axes, summary, format)
        kinds = list(summary.learned()[0].by) if summary.learned() else []
        axes = below.subplots(1, 1 + len(kinds), width_ratios=[2, *[1] * len(kinds)], squeeze=False)[0]
        _against_base(axes[0], summary)
        for place, (panel, key) in enumerate(zip(axes[1:], kinds, strict=True)):
            _learned(panel, summary, key, named=place == 0)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()


def _curves(axes: Axes, summary: Summary, format: str) -> None:
    patterns = list(dict.fromkeys(Arm.parse(name).pattern for name in summary.config.arms))
    arms = {name: Arm.parse(name) for name in summary.config.arms if Arm.parse(name).format == format}
    for name, arm in arms.items():
        updates, means = summary.curve(name, summary.score)
        look: dict[str, Any] = {
            "color": COLOURS[patterns.index(arm.pattern)],
            "linestyle": "--" if arm.learned else "-",
        }
        axes.plot(updates, [each.estimate for each in means], linewidth=1.5, **look)
        if means[0].bounded:
            low, high = ([max(limit, 1e-9) for limit in limits] for limits in _limits(means))
            axes.fill_between(updates, low, high, color=look["color"], alpha=0.10, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(labelleft=True, which="both")
    axes.set_xlabel("updates")
    axes.set_ylabel("error %, held out, under noise" if summary.score == "error" else "bits per character, test")
    axes.set_title(f"{format}: mean of {summary.config.seeds} seeds, 95%")
    axes.grid(True)
    shown = [(i, pattern) for i, pattern in enumerate(patterns) if any(arm.pattern == pattern for arm in arms.values())]
    handles = [Line2D([], [], color=COLOURS[i], linestyle="-", label=pattern) for i, pattern in shown]
    if any(arm.learned for arm in arms.values()):
        handles.append(Line2D([], [], color=INK, linestyle="--", label="learned from there"))
    axes.legend(handles=handles)


def _limits(means: Sequence[Interval]) -> tuple[list[float], list[float]]:
    return [each.low for each in means], [each.high for each in means]


def _against_base(axes: Axes, summary: Summary) -> None:
    """A row for each arm, in it a line for each accuracy."""
    margin, arms, keys = summary.config.margin, summary.config.arms[1:], summary.accuracies
    axes.axvspan(-margin, margin, color=GREY, alpha=0.15, linewidth=0)
    for each in summary.equalities():
        index = keys.index(each.key)
        row, colour = arms.index(each.arm) + 0.24 * (index - (len(keys) - 1) / 2), COLOURS[(0, 5)[index]]
        _difference(axes, row, each.difference, colour)
        if each.within.bounded:
            axes.plot([each.within.low, each.within.high], [row, row], color=colour, linestyle="-", linewidth=4)
    _finish(axes, arms)
    axes.set_xlabel(f"{summary.unit(summary.score)} more than {summary.base}")
    axes.set_title(f"Against the dense net; grey: ±{margin:g}, thick: 90%")
    if len(keys) > 1:
        handles = [Line2D([], [], color=COLOURS[place], marker="o", linestyle="-") for place in (0, 5)]
        axes.legend(handles, ["under noise", "without"], loc="best")


def _learned(axes: Axes, summary: Summary, key: str, named: bool) -> None:
    found = summary.learned()
    for row, gain in enumerate(found):
        _difference(axes, row, gain.by[key], COLOURS[2])
    _finish(axes, [gain.other if named else "" for gain in found])
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(summary.unit(key))
    axes.set_title("Learned less fixed start" if named else "and in bits")


def _difference(axes: Axes, row: float, effect: Interval, colour: str) -> None:
    margin = effect.high - effect.estimate if effect.bounded else 0.0
    axes.errorbar(effect.estimate, row, xerr=margin, color=colour, marker="o", markersize=5, capsize=3, linestyle="")


def _finish(axes: Axes, names: Sequence[str]) -> None:
    axes.axvline(0, color=INK, linestyle="-", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.grid(axis="x")


def draw_masks(summary: Summary) -> bytes | None:
    """A PNG of seed 0: two rows of masks for each learned arm, a column for each layer; None without such arms."""
    arms = [name for name in summary.config.arms if Arm.parse(name).learned]
    if not arms:
        return None
    names = [f"layer {i + 1}" for i in range(summary.config.layers)]
    if summary.config.enter != DENSE:
        names.insert(0, "enter")
    with style():
        figure = Figure(figsize=(1.15 * len(names) + 0.6, 2.85 * len(arms) + 0.6), layout="constrained")
        parts = figure.subfigures(len(arms), 1, squeeze=False)[:, 0]
        for part, arm in zip(parts, arms, strict=True):
            part.suptitle(arm, x=0.01, ha="left", fontsize=10, fontweight="bold")
            above, below = part.subplots(2, len(names), squeeze=False)
            _mask_rows(above, below, summary.nets(arm)[0]["masks"], names)
        kinds = ("absent", "there before and after", "dropped", "grown")
        handles = [
            Patch(facecolor=colour, edgecolor=GREY, label=name)
            for colour, name in zip(MASK_COLOURS, kinds, strict=True)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        return file.getvalue()


def _mask_rows(
    above: Sequence[Axes], below: Sequence[Axes], masks: dict[str, list[list[str]]], names: Sequence[str]
) -> None:
    for layer, (first, last) in enumerate(zip(masks["before"], masks["after"], strict=True)):
        before, after = (np.array([[int(bit) for bit in row] for row in mask]) for mask in (first, last))
        _mask(above[layer], before + (before & ~after & 1), names[layer])
        _mask(below[layer], after + 2 * (after & ~before & 1), "")
    above[0].set_ylabel("before", fontsize=9)
    below[0].set_ylabel("after", fontsize=9)


def _mask(axes: Axes, kinds: np.ndarray, title: str) -> None:
    axes.imshow(kinds, cmap=ListedColormap(MASK_COLOURS), vmin=0, vmax=3, interpolation="nearest")
    axes.set_title(title, fontsize=9, fontweight="normal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(True)
