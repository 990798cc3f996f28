"""The picture: time over width at equally many weights, beside dense and BSR products, floor and targets."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lowprec.benches.blocksparse.cases import BLOCKS, ENDS, PATTERN, PRODUCTS
from lowprec.benches.blocksparse.peers import BSR_NAME, DENSE_NAME
from lowprec.chart import COLOURS, GREY, INK, logarithmic, style
from lowprec.studies.kernels.work import DENSE

Row = dict[str, Any]

MARKERS = "osD^"
KINDS = ("bf16", "fp8", "fp32")
"""Panels; the first two of these that were timed."""


def draw(record: Row) -> bytes:
    """A PNG: for each run a row of panels for each product, a column for each number of tokens and kind."""
    runs = [(run, op) for run in record["runs"] for op in PRODUCTS if any(row["op"] == op for row in run["rows"])]
    columns = [(tokens, kind) for tokens in ENDS for kind in KINDS if _has(record, tokens, kind)]
    with style():
        size = (3.4 * max(len(columns), 2) + 0.6, 3.0 * max(len(runs), 1) + 1.3)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(max(len(runs), 1), max(len(columns), 1), squeeze=False)
        for (run, op), line in zip(runs, panels, strict=False):
            for (tokens, kind), axes in zip(columns, line, strict=False):
                _panel(axes, run, op, tokens, kind)
            line[0].set_ylabel(f"{_unit(run)[0]}, {_device(run)}")
        figure.legend(handles=_handles(), loc="outside lower center", ncols=5)
        title = "Block-sparse products: time over width at equally many weights"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        return file.getvalue()


def _has(record: Row, tokens: int, kind: str) -> bool:
    ours = [row for run in record["runs"] for row in run["rows"] if row["by"] == "lowprec"]
    return any((row["tokens"], row["kind"]) == (tokens, kind) for row in ours)


def _panel(axes: Axes, run: Row, op: str, tokens: int, kind: str) -> None:
    rows = [row for row in run["rows"] if (row["op"], row["tokens"], row["features"]) == (op, tokens, "last")]
    beside = "bf16" if kind == "fp8" else kind
    unit = _unit(run)[1]
    for block, colour, marker in zip(BLOCKS, COLOURS, MARKERS, strict=False):
        _line(axes, unit, _select(rows, "lowprec", kind, block), color=colour, marker=marker, linestyle="-")
        _line(axes, unit, _select(rows, BSR_NAME, beside, block), color=colour, linestyle=":", marker="")
        for row in _select(rows, "lowprec", kind, block):
            if row["target"] is not None and row["density"] == rows[-1]["density"]:
                axes.plot(row["width"], row["target"] / unit, marker="_", markersize=14, color=colour)
    _line(axes, unit, _select(rows, DENSE_NAME, beside, 0), color=INK, linestyle="--", marker="")
    _line(axes, unit, _select(rows, "lowprec", kind, BLOCKS[-1]), "floor", color=GREY, linestyle="-", marker="")
    axes.set_xscale("log")
    axes.set_yscale("log")
    logarithmic(axes.yaxis)
    widths = {row["width"]: row["density"] for row in rows}
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(widths), [f"{width}\n{density}" for width, density in widths.items()])
    axes.grid(axis="y")
    axes.set_title(f"{op}, {kind}, N = {tokens}", fontsize=10)


def _unit(run: Row) -> tuple[str, float]:
    return ("ms", 1e-3) if run["device"] == "cpu" else ("µs", 1e-6)


def _device(run: Row) -> str:
    name = str(run["name"]).split(",")[0]
    return name if run["device"] != "cpu" else f"{name}, {run['threads']} thread{'s' * (run['threads'] != 1)}"


def _select(rows: list[Row], by: str, kind: str, block: int) -> list[Row]:
    """A line: the rows of one pattern over widths."""
    wanted = [row for row in rows if (row["by"], row["kind"], row["block"]) == (by, kind, block)]
    return sorted((row for row in wanted if row["pattern"] in (PATTERN, DENSE)), key=lambda row: int(row["width"]))


def _line(axes: Axes, unit: float, rows: list[Row], what: str = "seconds", **look: Any) -> None:
    points = [(row["width"], row[what] / unit) for row in rows if row[what] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.4, markersize=4, **look)


def _handles() -> list[Any]:
    blocks = [
        Line2D([], [], color=colour, marker=marker, linestyle="-", markersize=4, label=f"lowprec, b = {block}")
        for block, colour, marker in zip(BLOCKS, COLOURS, MARKERS, strict=False)
    ]
    looks: dict[str, dict[str, Any]] = {
        "torch BSR, same colours": {"color": GREY, "linestyle": ":"},
        "torch's dense product (bf16 for fp8)": {"color": INK, "linestyle": "--"},
        "floor": {"color": GREY, "linestyle": "-"},
        "targets": {"color": GREY, "linestyle": "", "marker": "_", "markersize": 14},
    }
    return [*blocks, *(Line2D([], [], label=label, **look) for label, look in looks.items())]
