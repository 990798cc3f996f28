"""The results: rows with their floors and targets, a table, a picture, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowprec.benches.accumulate import picture
from lowprec.benches.accumulate.cases import Case
from lowprec.benches.accumulate.floor import INSTRUCTIONS, floor_of
from lowprec.benches.accumulate.peers import DENSE
from lowprec.benches.timing import Seconds
from lowprec.studies import record as files

Row = dict[str, Any]

ON_GPU = {"exact": 2.4e12, "exact sums": 3.5e12, "stochastic": 1.5e12, "native": 20e12}
"""Targets on a GPU, in terms a second."""

OF_DENSE = 0.5
"""Target of tensor-core rows: the share of torch's bfloat16 product."""

A_CORE = 2e9
"""Target on the CPU, in terms a second for each thread, up to two."""

COLUMNS = ("device", "threads", "row", "by", "terms", "seconds", "low", "high", "rounds")
MEASURES = ("rate", "floor", "of_floor", "of_dense", "target", "met")
HEADS = ("row", "ms", "", "of floor", "of bf16", "target")


def rows(cases: list[Case], seconds: dict[str, Seconds], run: Row) -> list[Row]:
    """What was measured of each case, beside its floor and target; rates are terms a second."""
    rates = {case.name: case.terms(run["size"]) / seconds[case.name].median for case in cases}
    results = []
    for case in cases:
        time, rate = seconds[case.name], rates[case.name]
        row: Row = {"row": case.name, "by": case.by, "terms": case.terms(run["size"]), "seconds": time.median}
        row |= {"low": time.low, "high": time.high, "rounds": time.rounds, "rate": rate}
        floor = floor_of(case.arithmetic, run["issue_rate"])
        row |= {"floor": floor, "of_floor": floor and rate / floor}
        row["of_dense"] = None if case.sums else rate / rates[DENSE]
        target = _target(case, run, rates[DENSE])
        results.append(row | {"target": target, "met": None if target is None else rate >= target})
    return results


def _target(case: Case, run: Row, dense: float) -> float | None:
    """In terms a second."""
    if case.by != "lowprec":
        return None
    if not run["device"].startswith("cuda"):
        return A_CORE * min(run["threads"], 2) if case.goal in ("exact", "exact sums") else None
    return OF_DENSE * dense if case.goal == "tensor core" else ON_GPU.get(case.goal)


def write(record: Row, out: Path) -> None:
    """Write results.json, results.csv, accumulate.png and README.md."""
    files.write_json(out / "results.json", record)
    files.write(out / "results.csv", _csv(record).encode())
    files.write(out / "accumulate.png", picture.draw(record))
    files.write(out / "README.md", _readme(record).encode())


def _readme(record: Row) -> str:
    """The record as a page."""
    lines = ["# Sums and products under accumulators, timed", "", "![Terms a second of every row](accumulate.png)", ""]
    for run in record["runs"]:
        lines += [f"## {heading(run)}", "", *_markdown(run), "", *(f"- {line}" for line in _not_timed(run))]
        clocks = "; ".join(f"{name} {value}" for name, value in run["clocks"].items() if name != "name")
        load = ", ".join(f"{each:.1f}" for each in run["load"])
        lines += [*([f"- before: {clocks}"] if clocks else []), f"- load averages of the machine, after: {load}", ""]
    kernels = ", ".join(f"{name} {state}" for name, state in record["kernels"].items())
    slots = ", ".join(f"{name} {count:g}" for name, count in INSTRUCTIONS.items())
    return "\n".join(
        [
            *lines,
            "## How",
            "",
            f"- commit {record['commit'] or 'unknown'}, lowprec {record['lowprec']}, compiled kernels: {kernels}",
            f"- torch {record['torch']}, Python {record['python']}",
            *(f"- {name}: {state}" for name, state in record["peers"].items() if name != "torch"),
            "- `lowprec bench accumulate`, medians; a term is a multiplication and an addition, in sums an addition",
            f"- *of floor*: of the terms a second that issue allows, at so many slots a term: {slots}",
            f"- *of bf16*: of the rate of {DENSE}",
            "",
        ]
    )


def _markdown(run: Row) -> list[str]:
    heads = [head or unit(run)[0] for head in HEADS]
    body = ["| " + " | ".join((row["row"], *cells(row, run))) + " |" for row in run["rows"]]
    return [f"| {' | '.join(heads)} |", "| --- " + "| ---: " * 5 + "|", *body]


def _not_timed(run: Row) -> Iterator[str]:
    yield from (f"{name}: {why}" for name, why in run["failed"].items())
    for reason in dict.fromkeys(run["missing"].values()):
        names = [name for name, why in run["missing"].items() if why == reason]
        yield f"{'; '.join(names)}: not there ({reason})"


def heading(run: Row) -> str:
    """The device, threads and size of a run."""
    rows, columns, terms = run["size"]
    rounds = max((row["rounds"] for row in run["rows"]), default=0)
    count = f", {run['threads']} thread{'s' * (run['threads'] != 1)}" if run["device"] == "cpu" else ""
    return f"{run['name']}{count}, [{rows}, {terms}] x [{terms}, {columns}], {rounds} rounds"


def unit(run: Row) -> tuple[str, float]:
    """What rates are said in: its name and size."""
    return ("T terms/s", 1e12) if run["device"].startswith("cuda") else ("G terms/s", 1e9)


def cells(row: Row, run: Row) -> tuple[str, ...]:
    """A row in words, but for its name."""
    scale = unit(run)[1]
    shares = ("" if row[name] is None else f"{row[name]:.2g}" for name in ("of_floor", "of_dense"))
    verdict = "" if row["target"] is None else f"{row['target'] / scale:.3g} {'met' if row['met'] else 'missed'}"
    return f"{row['seconds'] * 1e3:.3g}", f"{row['rate'] / scale:.3g}", *shares, verdict


def _csv(record: Row) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, (*COLUMNS, *MEASURES), lineterminator="\n")
    writer.writeheader()
    for run in record["runs"]:
        writer.writerows({key: run[key] for key in ("device", "threads")} | row for row in run["rows"])
    return file.getvalue()


def show(record: Row, out: Path, console: Console) -> None:
    """A table for each device and number of threads, and what is not in it."""
    for run in record["runs"]:
        console.print(_table(run))
        for line in _not_timed(run):
            console.print(line)
    for name, state in record["peers"].items():
        console.print(f"{name}: {state}")
    console.print(f"picture: {out / 'accumulate.png'}; all results: {out}")


def _table(run: Row) -> Table:
    table = Table(title=heading(run), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in HEADS:
        table.add_column(head or unit(run)[0], justify="left" if head == "row" else "right", no_wrap=True)
    for row in run["rows"]:
        *numbers, target = cells(row, run)
        marked = target.replace("missed", "[bold]miss[/bold]")
        table.add_row(row["row"], *numbers, marked, style=None if row["by"] == "lowprec" else "dim")
    return table
