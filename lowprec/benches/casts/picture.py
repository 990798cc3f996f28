"""The picture: a bar for each row, as a share of the copy's bandwidth, with its target."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lowprec.chart import COLOURS, GREY, INK, style

OURS, COPY, PEER = COLOURS[0], COLOURS[4], "#BBBBBB"
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
LINE = 0.19
"""Height of a row, in inches."""


def draw(record: dict[str, Any]) -> bytes:
    """A PNG: a panel for each device and number of threads."""
    runs = record["runs"]
    with style():
        height = LINE * max(len(run["rows"]) for run in runs) + 1.6
        figure = Figure(figsize=(max(6.6 * len(runs), 7.5), height), layout="constrained")
        for run, axes in zip(runs, figure.subplots(1, len(runs), squeeze=False)[0], strict=True):
            _panel(axes, run)
        figure.legend(handles=_handles(), loc="outside lower left", ncols=4)
        figure.suptitle("Casts: bytes a second, as a share of a copy's", x=0.01, ha="left", fontweight="bold")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
        return file.getvalue()


def _handles() -> list[Any]:
    bars = {"lowprec": OURS, "torch's copy": COPY, "torch and peers": PEER}
    target = Line2D([], [], color=INK, linewidth=2, marker="|", markersize=9, linestyle="", label="target")
    return [*(Patch(color=colour, label=name) for name, colour in bars.items()), target]


def _panel(axes: Axes, run: dict[str, Any]) -> None:
    rows = run["rows"]
    shares = [row["of_copy"] for row in rows]
    colours = [_colour(row) for row in rows]
    axes.barh(range(len(rows)), shares, height=0.72, color=colours)
    for place, row in enumerate(rows):
        end = row["of_copy"]
        if row["target"] is not None:
            wanted = row["target"] * row["of_copy"] / row[row["unit"]]  # the target in this axis' unit
            end = max(end, wanted)
            axes.vlines(wanted, place - 0.45, place + 0.45, color=INK, linewidth=2)
        words = f"{row['of_copy']:.2f}" + {True: "", False: "  missed", None: ""}[row["met"]]
        axes.text(end + 0.01, place, words, va="center", fontsize=7.5, color=INK, bbox=_CLEAR)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(1.15, 1.12 * max(shares)))
    axes.set_xlabel("share of the copy's bytes a second")
    name = run["name"].split(",")[0]
    many = "" if run["device"].startswith("cuda") else f", {run['threads']} thread{'s' * (run['threads'] != 1)}"
    axes.set_title(f"{name}{many}")


def _colour(row: dict[str, Any]) -> str:
    return OURS if row["by"] == "lowprec" else COPY if row["row"].startswith("copy") else PEER
