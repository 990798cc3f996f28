"""The results: rows with their targets, a table, a picture, CSV and JSON."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowprec.benches.casts import picture
from lowprec.benches.casts.cases import BFLOAT16, FLOAT32, Case
from lowprec.benches.casts.peers import cast_name, copy_name
from lowprec.benches.timing import Seconds
from lowprec.studies import record as files

Row = dict[str, Any]

OF_COPY = {"quantize": 0.92, "encode": 0.92, "decode": 0.92, "stochastic": 0.85, "block": 0.85, "statistics": 0.85}
OF_COPY["transposed"] = 0.80
"""Targets on a GPU: the share of the copy's bandwidth."""

MELEM_A_CORE = {"quantize": 350.0, "stochastic": 225.0}
"""Targets on the CPU: millions of elements a second for each thread, up to two; 700 and 450 on two."""

OF_CAST = 0.8
"""Target of encoding on the CPU: the share of the speed of torch's own cast to float8_e4m3fn."""

COLUMNS = ("device", "threads", "row", "by", "elements", "bytes", "seconds", "low", "high", "rounds")
MEASURES = ("melem_per_s", "gb_per_s", "of_copy", "target", "unit", "met")


def rows(cases: list[Case], seconds: dict[str, Seconds], run: Row) -> list[Row]:
    """What was measured of each case, beside its target."""
    cuda, elements, count = run["device"].startswith("cuda"), run["elements"], run["threads"]
    copy = seconds[copy_name(FLOAT32)].median / (8 * elements)
    results = []
    for case in cases:
        time = seconds[case.name]
        moved = case.moved * elements
        row: Row = {"row": case.name, "by": case.by, "bytes": moved, "seconds": time.median}
        row |= {"low": time.low, "high": time.high, "rounds": time.rounds}
        row["melem_per_s"] = elements / time.median / 1e6
        row["gb_per_s"] = moved / time.median / 1e9
        row["of_copy"] = copy * moved / time.median
        measure, target = _target(case, cuda, count, seconds, elements)
        row |= {"target": target, "unit": measure if target else None}
        row["met"] = None if target is None else row[measure] >= target
        results.append(row)
    return results


def _target(case: Case, cuda: bool, count: int, seconds: dict[str, Seconds], elements: int) -> tuple[str, float | None]:
    """Which measure must reach how much."""
    if case.by != "lowprec":
        return "of_copy", None
    if cuda:
        return "of_copy", OF_COPY.get(case.goal)
    if case.goal == "encode":
        cast = seconds[cast_name(BFLOAT16 if " bf16 " in case.name else FLOAT32)]
        return "melem_per_s", OF_CAST * elements / cast.median / 1e6
    each = MELEM_A_CORE.get(case.goal)
    return "melem_per_s", each and each * min(count, 2)


def write(record: Row, out: Path) -> None:
    """Write results.json, results.csv and casts.png."""
    files.write_json(out / "results.json", record)
    files.write(out / "results.csv", _csv(record).encode())
    files.write(out / "casts.png", picture.draw(record))


def _csv(record: Row) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, (*COLUMNS, *MEASURES), lineterminator="\n")
    writer.writeheader()
    for run in record["runs"]:
        for row in run["rows"]:
            writer.writerow({key: run[key] for key in ("device", "threads", "elements")} | row)
    return file.getvalue()


def show(record: Row, out: Path, console: Console) -> None:
    """A table for each device and number of threads, and what is not in it."""
    for run in record["runs"]:
        console.print(_table(run))
        for name, why in run["failed"].items():
            console.print(f"{name}: {why}")
    for name, state in record["peers"].items():
        console.print(f"{name}: {state}")
    console.print(f"picture: {out / 'casts.png'}; all results: {out}")


def _table(run: Row) -> Table:
    rounds = max(row["rounds"] for row in run["rows"])
    heading = f"{run['name']}, {run['threads']} threads, 2^{run['elements'].bit_length() - 1} elements, {rounds} rounds"
    table = Table(title=heading, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("row", no_wrap=True)
    speed = "GB/s" if run["device"].startswith("cuda") else "Melem/s"
    for name in ("ms", speed, "copy", "target"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in run["rows"]:
        table.add_row(row["row"], *_cells(row, speed), style=None if row["by"] == "lowprec" else "dim")
    return table


def _cells(row: Row, speed: str) -> tuple[str, ...]:
    fast = row["gb_per_s" if speed == "GB/s" else "melem_per_s"]
    target = (
        "" if row["target"] is None else f"{row['target']:.2f}" if row["unit"] == "of_copy" else f"{row['target']:.0f}"
    )
    met = {None: "", True: " met", False: " [bold]miss[/bold]"}[row["met"]]
    return f"{row['seconds'] * 1e3:.3f}", f"{fast:.0f}", f"{row['of_copy']:.2f}", target + met
