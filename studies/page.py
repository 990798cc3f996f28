"""What results pages of studies share: tables on the terminal, in Markdown and CSV, a run's circumstances."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lowprec.studies.record import Json

OWN_LINES = ("data", "sha256")
"""Settings that a page says elsewhere, or not at all."""


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """For the terminal: the first columns, of words, to the left, the others to the right."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(heads):
        made.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = None) -> list[str]:
    """The lines of a table; given how many columns are on the left, the others are on the right."""
    rule = ["---" if left is None or index < left else "---:" for index in range(len(heads))]
    return ["| " + " | ".join(row) + " |" for row in (heads, rule, *rows)]


def csv_of(columns: Sequence[str], rows: Iterable[Json]) -> str:
    """A line for each row under a line of names; what rows have beside these columns is left out."""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def circumstances(saved: Json, devices: Iterable[str]) -> list[str]:
    """Device, commit and settings of a run, from its config.json."""
    settings = ", ".join(f"{key}={_word(value)}" for key, value in saved["config"].items() if key not in OWN_LINES)
    return [
        f"- device: {'; '.join(dict.fromkeys(devices))}",
        f"- commit: {saved['commit'] or 'not in a checkout'}, lowprec {saved['lowprec']}",
        f"- settings: {settings}",
    ]


def _word(value: object) -> str:
    """A setting as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
