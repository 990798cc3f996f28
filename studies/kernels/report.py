"""The results on the terminal and on disk: table, picture, CSV, JSON and a README that explains them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from lowprec.studies import record
from lowprec.studies.kernels.config import Config
from lowprec.studies.kernels.picture import draw
from lowprec.studies.kernels.summary import Summary, as_json, faster_from, findings
from lowprec.studies.page import circumstances, csv_of, markdown, table
from lowprec.studies.regression import Interval

ROW = ("width", "repeat", "op", "kind", "tokens", "block", "flops", "seconds")


def write(config: Config, parts: list[Path], folder: Path, console: Console) -> None:
    """Write results.json, results.csv, kernels.png and README.md, and show the table."""
    summary = Summary(config, [record.read_json(part / "result.json") for part in parts])
    record.write_json(folder / "results.json", as_json(summary))
    record.write(folder / "results.csv", csv_of(ROW, _times(summary)).encode())
    record.write(folder / "kernels.png", draw(summary))
    record.write(folder / "README.md", _readme(summary, record.read_json(folder / "config.json")).encode())
    show(summary, console)
    console.print(f"picture: {folder / 'kernels.png'}; all results: {folder}")


def show(summary: Summary, console: Console) -> None:
    """The table and the conclusions."""
    ends = sorted({0, len(summary.widths) - 1})  # 80 characters are enough
    console.print(table(_title(summary), heads(summary, ends), rows(summary, ends)))
    for line in findings(summary):
        console.print(f"- {line}")


def _title(summary: Summary) -> str:
    return f"{summary.unit[0]} of blocks that are present, and 95% intervals"


def heads(summary: Summary, shown: Sequence[int]) -> list[str]:
    """Of the columns of `rows`."""
    return ["product", *(str(summary.widths[i]) for i in shown), "per doubling", "faster"]


def rows(summary: Summary, shown: Sequence[int]) -> list[list[str]]:
    """A row for each curve: speeds at the widths that are to be shown, and their growth."""
    size = summary.unit[1]
    return [
        [
            f"{curve.op} {curve.kind} N={curve.tokens} b={curve.block}",
            *(_interval(curve.speed[i], size) for i in shown),
            _interval(curve.doubling) if curve.doubling else "",
            faster_from(curve, summary.config) or "",
        ]
        for curve in summary.curves
    ]


def _interval(interval: Interval, unit: float = 1.0) -> str:
    """An estimate, and how far its interval reaches upwards; as a factor it reaches as far down."""
    margin = f" ± {100 * (interval.high / interval.estimate - 1):.2g}%" if interval.bounded and interval.low > 0 else ""
    return f"{interval.estimate / unit:.3g}{margin}"


def _times(summary: Summary) -> Iterator[record.Json]:
    """A line for each repeat of each product."""
    yield from ({"width": cell["width"], **row} for cell in summary.cells for row in cell["rows"])


def _readme(summary: Summary, saved: record.Json) -> str:
    every = range(len(summary.widths))
    lines = [
        "# Kernels: speed over width at equally many weights",
        "",
        "How does the speed of block-sparse products change with width, when the number of weights stays?",
        "",
        "![speed over width](kernels.png)",
        "",
        f"{_title(summary)}:",
        "",
        *markdown(heads(summary, every), rows(summary, every)),
        "",
        f"Geometric means over {summary.config.repeats} repeats, each with a pattern of its own and the median of",
        f"{summary.config.rounds} rounds, with 95% intervals. *Per doubling*: the factor in speed for twice the width;",
        "*faster*: from which density down a sparse layer is faster than torch's dense one as wide, beyond doubt. Each",
        "interval is for itself: with so many, one in twenty may miss.",
        "",
        "## Conclusions",
        "",
        *(f"- {line}" for line in findings(summary)),
        "",
        "## How",
        "",
        "Method: studies/kernels/README.md.",
        "",
        *circumstances(saved, (cell["device"] for cell in summary.cells)),
        "",
        "Files: `results.csv` (a line for each repeat of each product), `results.json` (what follows), `config.json`.",
    ]
    return "\n".join(lines) + "\n"
