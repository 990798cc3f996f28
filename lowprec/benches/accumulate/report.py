"""The results: rows with their floors and targets, a table, a picture, CSV and JSON."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowprec.benches import pages
from lowprec.benches.accumulate import picture
from lowprec.benches.accumulate.cases import Case
from lowprec.benches.accumulate.floor import INSTRUCTIONS, floor_of
from lowprec.benches.accumulate.peers import DENSE
from lowprec.benches.pages import Row
from lowprec.studies import record as files
from lowprec.studies.page import markdown
from lowprec.timing import Seconds

ON_GPU = {"exact": 2.4e12, "exact sums": 3.5e12, "stochastic": 1.5e12, "native": 20e12}
"""Targets on a GPU, in terms a second."""

OF_DENSE = 0.5
"""Target of tensor-core rows: the share of torch's bfloat16 product."""

A_CORE = 2e9
"""Target on the CPU, in terms a second for each thread, up to two."""

COLUMNS = ("row", "by", "terms", "seconds", "low", "high", "rounds")
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
    files.write(out / "results.csv", pages.csv_of(record, ("device", "threads"), (*COLUMNS, *MEASURES)).encode())
    files.write(out / "accumulate.png", picture.draw(record))
    files.write(out / "README.md", _readme(record).encode())


def _readme(record: Row) -> str:
    """The record as a page."""
    lines = ["# Sums and products under accumulators, timed", "", "![Terms a second of every row](accumulate.png)", ""]
    for run in record["runs"]:
        lines += [f"## {heading(run)}", "", *_markdown(run), "", *(f"- {line}" for line in pages.not_timed(run))]
        lines += [*pages.machine(run), ""]
    slots = ", ".join(f"{name} {count:g}" for name, count in INSTRUCTIONS.items())
    return "\n".join(
        [
            *lines,
            "## How",
            "",
            *pages.origin(record),
            "- `lowprec bench accumulate`, medians; a term is a multiplication and an addition, in sums an addition",
            f"- *of floor*: of the terms a second that issue allows, at so many slots a term: {slots}",
            f"- *of bf16*: of the rate of {DENSE}",
            "",
        ]
    )


def _markdown(run: Row) -> list[str]:
    return markdown(_heads(run), ((row["row"], *cells(row, run)) for row in run["rows"]), left=1)


def _heads(run: Row) -> list[str]:
    return [head or unit(run)[0] for head in HEADS]


def heading(run: Row) -> str:
    """The device, threads and size of a run."""
    rows, columns, terms = run["size"]
    rounds = max((row["rounds"] for row in run["rows"]), default=0)
    return f"{run['name']}{pages.threads_of(run)}, [{rows}, {terms}] x [{terms}, {columns}], {rounds} rounds"


def unit(run: Row) -> tuple[str, float]:
    """What rates are said in: its name and size."""
    return ("T terms/s", 1e12) if run["device"].startswith("cuda") else ("G terms/s", 1e9)


def cells(row: Row, run: Row) -> tuple[str, ...]:
    """A row in words, but for its name."""
    scale = unit(run)[1]
    shares = ("" if row[name] is None else f"{row[name]:.2g}" for name in ("of_floor", "of_dense"))
    verdict = "" if row["target"] is None else f"{row['target'] / scale:.3g} {'met' if row['met'] else 'missed'}"
    return f"{row['seconds'] * 1e3:.3g}", f"{row['rate'] / scale:.3g}", *shares, verdict


def show(record: Row, out: Path, console: Console) -> None:
    """A table for each device and number of threads, and what is not in it."""
    for run in record["runs"]:
        console.print(_table(run))
        for line in pages.not_timed(run):
            console.print(line)
    pages.close(record, str(out / "accumulate.png"), out, console)


def _table(run: Row) -> Table:
    rows = (((row["row"], *cells(row, run)), row["by"] == "lowprec") for row in run["rows"])
    return pages.table(heading(run), _heads(run), rows)
