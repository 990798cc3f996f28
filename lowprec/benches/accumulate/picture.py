"""The picture: a bar for each row, in terms a second, with its floor and its target."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lowprec.chart import COLOURS, GREY, INK, style

OURS, PEER = COLOURS[0], "#BBBBBB"
LINE = 0.2
"""Height of a row, in inches."""


def draw(record: dict[str, Any]) -> bytes:
    """A PNG: a panel for each device and number of threads."""
    runs = record["runs"]
    with style():
        height = LINE * max(len(run["rows"]) for run in runs) + 1.8
        figure = Figure(figsize=(max(6.6 * len(runs), 8.0), height), layout="constrained")
        for run, axes in zip(runs, figure.subplots(1, len(runs), squeeze=False)[0], strict=True):
            _panel(axes, run)
        figure.legend(handles=_handles(), loc="outside lower left", ncols=4)
        title = "Sums and products under accumulators: terms a second"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
        return file.getvalue()


def _handles() -> list[Any]:
    look: dict[str, Any] = {"marker": "|", "markersize": 9, "linestyle": "", "linewidth": 2}
    marks = {"target": INK, "what issue allows": COLOURS[1]}
    return [
        Patch(color=OURS, label="lowprec"),
        Patch(color=PEER, label="torch and peers"),
        *(Line2D([], [], color=colour, label=name, **look) for name, colour in marks.items()),
    ]


def _panel(axes: Axes, run: dict[str, Any]) -> None:
    rows = run["rows"]
    scale = 1e12 if run["device"].startswith("cuda") else 1e9
    axes.set_xscale("log")
    axes.barh(
        range(len(rows)),
        [row["rate"] / scale for row in rows],
        height=0.72,
        color=[OURS if row["by"] == "lowprec" else PEER for row in rows],
    )
    for place, row in enumerate(rows):
        for name, colour in (("floor", COLOURS[1]), ("target", INK)):
            if row[name] is not None:
                axes.vlines(row[name] / scale, place - 0.45, place + 0.45, color=colour, linewidth=2)
        words = f"{row['rate'] / scale:.3g}" + {True: "", False: "  missed", None: ""}[row["met"]]
        end = max(row[name] or 0.0 for name in ("rate", "target", "floor")) / scale
        axes.text(end * 1.08, place, words, va="center", fontsize=7.5, color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    low, high = (f(row["rate"] for row in rows) / scale for f in (min, max))
    axes.set_xlim(low / 3, high * 6)
    axes.set_xlabel(f"{'tera' if scale == 1e12 else 'giga'}terms a second, log scale")
    axes.grid(axis="x", color=GREY, alpha=0.3)
    name = run["name"].split(",")[0]
    many = "" if run["device"].startswith("cuda") else f", {run['threads']} thread{'s' * (run['threads'] != 1)}"
    axes.set_title(f"{name}{many}")
