"""The results on the terminal and on disk: table, picture, CSV, JSON and a README that explains them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console

from lowprec.studies import record
from lowprec.studies.capacity.config import Config
from lowprec.studies.capacity.picture import draw
from lowprec.studies.capacity.summary import Summary, as_json, findings, summarise
from lowprec.studies.intervals import plus_minus
from lowprec.studies.page import circumstances, markdown, table

COLUMNS = ("format", "width", "parameters", "seeds", "valid", "test", "chars/s")


def write(config: Config, parts: list[Path], folder: Path, console: Console) -> None:
    """Write results.json, results.csv, capacity.png and README.md, and show the table."""
    summary = summarise(config, [record.read_json(part / "result.json") for part in parts])
    record.write_json(folder / "results.json", as_json(summary))
    record.write(folder / "results.csv", _csv(summary).encode())
    record.write(folder / "capacity.png", draw(summary))
    record.write(folder / "README.md", _readme(summary, record.read_json(folder / "config.json")).encode())
    show(summary, console)
    console.print(f"picture: {folder / 'capacity.png'}; all results: {folder}")


def show(summary: Summary, console: Console) -> None:
    """The table and the conclusions."""
    shown = [index for index, name in enumerate(COLUMNS) if name != "parameters"]  # 80 characters are enough
    heads, rows = [COLUMNS[index] for index in shown], [[row[index] for index in shown] for row in _rows(summary)]
    console.print(table("Bits per character, 95% intervals", heads, rows))
    for line in findings(summary):
        console.print(line)


def _rows(summary: Summary) -> list[tuple[str, ...]]:
    return [
        (
            cell["format"],
            str(cell["width"]),
            f"{cell['parameters']:,}",
            str(len(cell["seeds"])),
            plus_minus(summary.mean(cell, "valid")),
            plus_minus(summary.mean(cell)),
            f"{cell['speed']:,}",
        )
        for cell in summary.cells
    ]


def _csv(summary: Summary) -> str:
    """A line for each seed of each cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("format", "width", "seed", "parameters", "symbols", "valid", "test"))
    for cell in summary.cells:
        for seed, valid, test in zip(cell["seeds"], cell["valid"], cell["test"], strict=True):
            writer.writerow(
                (cell["format"], cell["width"], seed, cell["parameters"], cell["symbols"], repr(valid), repr(test))
            )
    return file.getvalue()


def _readme(summary: Summary, saved: record.Json) -> str:
    config, devices = saved["config"], (device for cell in summary.cells for device in cell["devices"])
    lines = [
        "# Capacity: bits per character over width",
        "",
        "How much wider must a byte model in 8-bit arithmetic be to match one in float32?",
        "",
        "![bits per character over width](capacity.png)",
        "",
        *markdown(COLUMNS, _rows(summary)),
        "",
        "Means over seeds of bits per character, with 95% intervals (test: from the regression's common error).",
        "",
        *(f"- {line}" for line in findings(summary)),
        "",
        "## Method",
        "",
        "A byte model (embedding, multiplicative LSTM with internal steps, output layer) is trained for each format,",
        "width and seed; seeds set the weights and where reading begins, and are the same for all formats. Scores are",
        "of averaged weights, softmax in float32. Test scores are fitted as a_format + s ln(width), one slope for all",
        "formats, by least squares; -offset / s is the ln of the width that makes up for a format, with Fieller's",
        "interval; equality is claimed by two one-sided tests alone.",
        "",
        f"- text: {Path(config['data']).name or 'the embedded tiny Shakespeare'} (SHA-256 {config['sha256']})",
        *circumstances(saved, devices),
        "",
        "Files: `results.csv` (a line for each seed), `results.json` (every number), `config.json`, and for each cell",
        "its `metrics.jsonl` and `result.json`.",
    ]
    return "\n".join(lines) + "\n"
