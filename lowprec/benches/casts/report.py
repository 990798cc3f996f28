"""The results: rows with their targets, a table, a picture, CSV and JSON."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lowprec.benches import pages
from lowprec.benches.casts import picture
from lowprec.benches.casts.cases import BFLOAT16, FLOAT32, Case
from lowprec.benches.casts.peers import cast_name, copy_name
from lowprec.benches.pages import Row
from lowprec.studies import record as files
from lowprec.studies.page import markdown
from lowprec.timing import Seconds

OF_COPY = {"quantize": 0.92, "encode": 0.92, "decode": 0.92, "stochastic": 0.85, "block": 0.85, "statistics": 0.85}
OF_COPY["transposed"] = 0.80
"""Targets on a GPU: the share of the copy's bandwidth."""

MELEM_A_CORE = {"quantize": 350.0, "stochastic": 225.0}
"""Targets on the CPU: millions of elements a second for each thread, up to two; 700 and 450 on two."""

OF_CAST = 0.8
"""Target of encoding on the CPU: the share of the speed of torch's own cast to float8_e4m3fn."""

COLUMNS = ("row", "by", "bytes", "seconds", "low", "high", "rounds")
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
    """Write results.json, results.csv, casts.png and README.md."""
    files.write_json(out / "results.json", record)
    files.write(
        out / "results.csv", pages.csv_of(record, ("device", "threads", "elements"), (*COLUMNS, *MEASURES)).encode()
    )
    files.write(out / "casts.png", picture.draw(record))
    files.write(out / "README.md", _readme(record).encode())


def _readme(record: Row) -> str:
    """The record as a page."""
    lines = ["# Casts, timed", "", "![Speed of every row, as a share of a copy's](casts.png)", ""]
    for run in record["runs"]:
        lines += [f"## {_heading(run)}", "", *markdown(_heads(run), _rows(run), left=1), ""]
        lines += [*(f"- {line}" for line in pages.not_timed(run)), *pages.machine(run), ""]
    lines += ["## How", "", *pages.origin(record)]
    lines += ["- `lowprec bench casts`, medians; *copy*: bytes a second over those of a copy of float32"]
    return "\n".join(lines) + "\n"


def _heads(run: Row) -> tuple[str, ...]:
    return "row", "ms", _speed(run), "copy", "target"


def _rows(run: Row) -> list[tuple[str, ...]]:
    return [(row["row"], *_cells(row, _speed(run))) for row in run["rows"]]


def _heading(run: Row) -> str:
    rounds = max(row["rounds"] for row in run["rows"])
    return f"{run['name']}{pages.threads_of(run)}, 2^{run['elements'].bit_length() - 1} elements, {rounds} rounds"


def _speed(run: Row) -> str:
    return "GB/s" if run["device"].startswith("cuda") else "Melem/s"


def show(record: Row, out: Path, console: Console) -> None:
    """A table for each device and number of threads, and what is not in it."""
    for run in record["runs"]:
        ours = (row["by"] == "lowprec" for row in run["rows"])
        console.print(pages.table(_heading(run), _heads(run), zip(_rows(run), ours, strict=True)))
        for line in pages.not_timed(run):
            console.print(line)
    pages.close(record, str(out / "casts.png"), out, console)


def _cells(row: Row, speed: str) -> tuple[str, ...]:
    fast = row["gb_per_s" if speed == "GB/s" else "melem_per_s"]
    return f"{row['seconds'] * 1e3:.3f}", f"{fast:.0f}", f"{row['of_copy']:.2f}", _verdict(row)


def _verdict(row: Row) -> str:
    if row["target"] is None:
        return ""
    wanted = f"{row['target']:.2f}" if row["unit"] == "of_copy" else f"{row['target']:.0f}"
    return f"{wanted} {'met' if row['met'] else 'missed'}"
