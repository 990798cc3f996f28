"""The results: rows beside what they are measured by, tables, a picture, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console

from lowprec.benches import pages
from lowprec.benches.blocksparse import picture
from lowprec.benches.blocksparse.cases import SHORT, Case
from lowprec.benches.blocksparse.limits import floor
from lowprec.benches.blocksparse.targets import bsr_name, dense_name, target
from lowprec.benches.pages import Row
from lowprec.studies import record as files
from lowprec.studies.page import markdown
from lowprec.timing import Seconds

WORK = ("op", "kind", "features", "block", "tokens", "density", "width", "pattern")
TIMES = ("seconds", "low", "high", "rounds", "graph")
MEASURES = ("flops", "bytes", "flops_per_s", "of_dense", "of_bsr", "floor", "of_floor", "target", "reason", "met")

MANY = 500
"""Rows of which pages and terminals show only those with targets and what these are measured by."""


def rows(cases: list[Case], seconds: dict[str, Seconds], graphs: set[str], run: Row) -> list[Row]:
    """What was measured of rows of one density and number of tokens, beside each other and the run's limits."""
    medians = {name: each.median for name, each in seconds.items()}
    return [_row(case, seconds[case.name], medians, case.name in graphs, run) for case in cases]


def _row(case: Case, time: Seconds, medians: dict[str, float], graph: bool, run: Row) -> Row:
    work, layout = case.work, case.work.layout(run["side"])
    row: Row = {"row": case.name, "by": case.by, "essential": case.essential, "width": layout.inputs}
    row |= {name: getattr(work, name) for name in WORK if name != "width"}
    row |= {"seconds": time.median, "low": time.low, "high": time.high, "rounds": time.rounds, "graph": graph}
    flops, size = work.flops(layout), work.bytes(layout)
    row |= {"flops": flops, "bytes": size, "flops_per_s": flops / time.median}
    beside = {"of_dense": dense_name(work), "of_bsr": bsr_name(work)}
    row |= {name: medians[other] / time.median if other in medians else None for name, other in beside.items()}
    row["failed_beside"] = [name for name, other in beside.items() if other in run["failed"]]
    limit = floor(run["limits"], work.kind, size, flops)
    row |= {"floor": limit, "of_floor": limit and limit / time.median}
    goal = target(work, medians, run["device"]) if case.by == "lowprec" else None
    row |= {"target": goal and goal[0], "reason": goal and goal[1]}
    return row | {"met": None if goal is None else time.median <= goal[0]}


def write(record: Row, out: Path) -> None:
    """Write results.json, results.csv, blocksparse.png and README.md."""
    files.write_json(out / "results.json", record)
    columns = ("row", "by", *WORK, *TIMES, *MEASURES)
    files.write(out / "results.csv", pages.csv_of(record, ("device", "threads"), columns).encode())
    files.write(out / "blocksparse.png", picture.draw(record))
    files.write(out / "README.md", _readme(record).encode())


def _readme(record: Row) -> str:
    """The record as a page."""
    lines = ["# Block-sparse products, timed", "", "![Time over width](blocksparse.png)", ""]
    for run in record["runs"]:
        lines += [f"## {heading(run)}", "", *(f"- {line}" for line in limits_of(run)), ""]
        for title, group in _groups(run):
            lines += [f"### {title}", "", *markdown(_heads(run), (words for words, _ in group), left=1), ""]
        lines += [*(f"- {line}" for line in _remarks(run)), *pages.machine(run), ""]
    return "\n".join([*lines, "## How", "", *pages.origin(record), *_LEGEND, ""])


_PATTERNS = ", ".join(f"{short} {pattern}" for pattern, short in SHORT.items())
_LEGEND = [
    "- `lowprec bench blocksparse`, medians; weights and activations change from call to call, past the cache",
    "- rows *dense* and *BSR* are torch's",
    "- *dense*, *BSR*: how many times faster than torch's dense and BSR products of the same size (bf16 for fp8)",
    "- *floor*: share of the speed at which its bytes would be copied or its operations be done by dense products",
    f"- patterns: {_PATTERNS}; method and targets: docs/bench.md",
]


def heading(run: Row) -> str:
    """The device and threads of a run."""
    return f"{run['name']}{pages.threads_of(run)}, {run['side']}² weights"


def limits_of(run: Row) -> Iterator[str]:
    """What the device's own copy and products reach."""
    for name, rate in run["limits"].items():
        _, _, speed, size = unit(run)
        words = f"{rate / 1e9:.0f} GB/s, read and written" if name == "copy" else f"{_digits(rate / size)} {speed}"
        yield f"{'copy' if name == 'copy' else f'dense product, {name}'}: {words}"


def shown(run: Row) -> list[Row]:
    """The rows that are worth a line."""
    every: list[Row] = run["rows"]
    return every if len(every) <= MANY else [row for row in every if row["essential"]]


Lines = list[tuple[tuple[str, ...], bool]]
"""Of a table: the cells, and whether the row is ours."""


def _groups(run: Row) -> Iterator[tuple[str, Lines]]:
    """A title and its lines: what was timed, then what failed."""

    def key(row: Row) -> tuple[str, int, int]:
        return row["density"], row["width"], row["tokens"]

    for (density, width, tokens), group in groupby(shown(run), key):
        lines = [(cells(row, run), row["by"] == "lowprec") for row in group]
        where = f" {density} N={tokens}"
        lines += [
            ((name.removesuffix(where), "failed", *[""] * (len(_heads(run)) - 2)), True)
            for name in run["failed"]
            if name.endswith(where)
        ]
        yield f"{density} of {width} x {width}, N = {tokens}", lines


def _remarks(run: Row) -> Iterator[str]:
    """What is not in the tables."""
    if more := len(run["rows"]) - len(shown(run)):
        yield f"{more} further rows: results.csv"
    waiting = [row["row"] for row in run["rows"] if run["device"] != "cpu" and not row["graph"]]
    if waiting:
        yield f"timed with the host in it, since no CUDA graph takes them: {pages.listed(waiting)}"
    yield from pages.not_timed(run)


def unit(run: Row) -> tuple[str, float, str, float]:
    """What times and speeds are said in: names and sizes."""
    return ("µs", 1e-6, "TFLOP/s", 1e12) if run["device"] != "cpu" else ("ms", 1e-3, "GFLOP/s", 1e9)


def _heads(run: Row) -> list[str]:
    time, _, speed, _ = unit(run)
    return ["row", time, "dense", "BSR", "floor", speed, "target"]


def cells(row: Row, run: Row) -> tuple[str, ...]:
    """A row in words, without what its group's title says."""
    _, second, _, speed = unit(run)
    return (
        str(row["row"]).removesuffix(f" {row['density']} N={row['tokens']}"),
        _digits(row["seconds"] / second),
        *(_ratio(row, name) for name in ("of_dense", "of_bsr", "of_floor")),
        _digits(row["flops_per_s"] / speed),
        "" if row["target"] is None else f"{_digits(row['target'] / second)} {'met' if row['met'] else 'missed'}",
    )


def _ratio(row: Row, name: str) -> str:
    if row[name] is None:
        return "failed" if name in row["failed_beside"] else ""
    return f"{row[name]:.2f}" if row[name] < 10 else f"{row[name]:.0f}"


def _digits(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def show(record: Row, out: Path, console: Console) -> None:
    """Tables for each device and number of threads, and what is not in them."""
    for run in record["runs"]:
        console.print(heading(run), style="bold")
        for line in limits_of(run):
            console.print(line)
        for title, group in _groups(run):
            console.print(pages.table(title, _heads(run), group))
        for line in _remarks(run):
            console.print(line)
    pages.close(record, str(out / "blocksparse.png"), out, console)
