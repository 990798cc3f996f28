"""What the benches' reports share: lines about the machine and the code, what was not timed, CSV and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowprec.studies import page

Row = dict[str, Any]

NAMED = 12
"""Rows that a line names, at most; the record has all."""


def threads_of(run: Row) -> str:
    """How many, to stand after the device's name; nothing for a GPU."""
    return f", {run['threads']} thread{'s' * (run['threads'] != 1)}" if run["device"] == "cpu" else ""


def not_timed(run: Row) -> Iterator[str]:
    """The rows that failed, and those that this build or device does not have, by reason."""
    for kind, words in (("failed", ""), ("missing", "not there ")):
        reasons = run.get(kind, {})
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            yield f"{listed(names)}: {f'{words}({reason})' if words else reason}"


def listed(names: list[str]) -> str:
    """The first of them, and how many there are beside."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return "; ".join([*names[:NAMED], *more])


def machine(run: Row) -> list[str]:
    """Clocks and load, as items of a page."""
    clocks = "; ".join(f"{name} {value}" for name, value in run["clocks"].items() if name != "name")
    load = ", ".join(f"{each:.1f}" for each in run["load"])
    return [*([f"- before: {clocks}"] if clocks else []), f"- load averages of the machine, after: {load}"]


def origin(record: Row) -> list[str]:
    """The code that ran and the peers, as items of a page."""
    kernels = ", ".join(f"{name} {state}" for name, state in record["kernels"].items())
    return [
        f"- commit {record['commit'] or 'unknown'}, lowprec {record['lowprec']}, compiled kernels: {kernels}",
        f"- torch {record['torch']}, Python {record['python']}",
        *(f"- {name}: {state}" for name, state in record["peers"].items() if name != "torch"),
    ]


def csv_of(record: Row, of_run: Sequence[str], of_row: Sequence[str]) -> str:
    """A line for each row: columns of its run, then its own."""
    rows = ({key: run[key] for key in of_run} | row for run in record["runs"] for row in run["rows"])
    return page.csv_of((*of_run, *of_row), rows)


def table(title: str, heads: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> Table:
    """A table whose first column is a name and whose last a verdict; rows that are not ours are dim."""
    padding = (0, 1 if len(heads) < 7 else 0, 0, 0)  # 80 characters are enough
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=padding, pad_edge=False)
    for index, head in enumerate(heads):
        result.add_column(head, justify="right" if index else "left", no_wrap=True)
    for (*cells, verdict), ours in rows:
        result.add_row(*cells, verdict.replace("missed", "[bold]miss[/bold]"), style=None if ours else "dim")
    return result


def close(record: Row, picture: str, out: object, console: Console) -> None:
    """The last lines on the terminal: peers, and where everything is."""
    for name, state in record["peers"].items():
        console.print(f"{name}: {state}")
    console.print(f"picture: {picture}; all results: {out}")
