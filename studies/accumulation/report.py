"""The results on the terminal and on disk: tables, pictures, CSV, JSON and a README that explains them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console

from lowprec.studies import record
from lowprec.studies.accumulation.config import FULL, Config
from lowprec.studies.accumulation.picture import draw_sums, draw_training
from lowprec.studies.accumulation.summary import Curve, Summary, as_json, findings
from lowprec.studies.intervals import mean, plus_minus, text
from lowprec.studies.page import circumstances, markdown, table

GROWTH = ("terms", "situation", "shape", "exponent of depth", "law", "error / law", "per doubling", "law's")
TRAINED = ("accumulator", "test", "more than fp32", "chars/s")
ROW = ("terms", "situation", "shape", "bits", "K", "seed", "sums", "rms", "median", "high", "max", "law", "of_bound")


def write(config: Config, sums: list[Path], cells: list[Path], folder: Path, console: Console) -> None:
    """Write results.json, CSV, pictures and README.md, and show the tables."""
    read = [[record.read_json(part / "result.json") for part in parts] for parts in (sums, cells)]
    summary = Summary(config, *read)
    record.write_json(folder / "results.json", as_json(summary))
    record.write(folder / "results.csv", _csv(summary).encode())
    if sums:
        record.write(folder / "accumulation.png", draw_sums(summary))
    if cells:
        record.write(folder / "training.png", draw_training(summary))
    record.write(folder / "README.md", _readme(summary, record.read_json(folder / "config.json")).encode())
    show(summary, console)
    console.print(f"all results: {folder}")


def show(summary: Summary, console: Console) -> None:
    """The tables and the conclusions."""
    if summary.sums:
        shown = [0, 1, 2, 3, 4]  # 80 characters are enough
        heads, rows = [GROWTH[i] for i in shown], [[row[i] for i in shown] for row in growth_rows(summary)]
        console.print(table("How errors grow with depth", heads, rows, left=3))
    if summary.cells:
        console.print(table("Bits per character", TRAINED, trained_rows(summary)))
    for line in findings(summary):
        console.print(f"- {line}")


def growth_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A row for each curve, under `GROWTH`."""
    return [
        (
            curve.terms,
            curve.situation.name,
            curve.shape,
            text(curve.exponent, ".2f").replace("95%: ", ""),
            _number(curve.expected),
            text(curve.ratio, ".2f").replace("95%: ", ""),
            *_steps(curve),
        )
        for curve in summary.curves
    ]


def _steps(curve: Curve) -> tuple[str, str]:
    """Of trees alone: elsewhere the error is no line over log2 K."""
    if curve.shape != "pairwise":
        return "", ""
    return text(curve.step, ".3f").replace("95%: ", ""), _number(curve.expected_step, ".3f")


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}"


def trained_rows(summary: Summary) -> list[tuple[str, ...]]:
    """A row for each cell, under `TRAINED`."""
    return [
        (
            cell["accumulator"],
            plus_minus(mean(cell["test"])),
            "" if cell["accumulator"] == FULL else plus_minus(summary.lost(cell), "+.4f"),
            f"{cell['speed']:,}",
        )
        for cell in summary.cells
    ]


def _csv(summary: Summary) -> str:
    """A line for each draw of each sum, then one for each seed of each cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, (*ROW, "accumulator", "valid", "test"), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary.rows)
    for cell in summary.cells:
        for seed, valid, test in zip(cell["seeds"], cell["valid"], cell["test"], strict=True):
            writer.writerow({"accumulator": cell["accumulator"], "seed": seed, "valid": valid, "test": test})
    return file.getvalue()


def _readme(summary: Summary, saved: record.Json) -> str:
    devices = [
        *(part["device"] for part in summary.sums),
        *(name for cell in summary.cells for name in cell["devices"]),
    ]
    lines = ["# Accumulation: what a sum loses", "", "How does a sum's error grow with its length, in what order?", ""]
    lines += _about_sums(summary) if summary.sums else []
    lines += _about_training(summary) if summary.cells else []
    lines += ["## Conclusions", "", *(f"- {line}" for line in findings(summary)), ""]
    lines += ["## How", "", "Method: studies/accumulation/README.md; theory: docs/accumulate-theory.md.", ""]
    lines += [*circumstances(saved, devices), ""]
    lines += ["Files: `results.csv` (a line for each draw and seed), `results.json` (what follows), `config.json`."]
    return "\n".join(lines) + "\n"


def _about_sums(summary: Summary) -> list[str]:
    return [
        "![error of sums over their length](accumulation.png)",
        "",
        *markdown(GROWTH, growth_rows(summary)),
        "",
        "Errors are root mean squares over the sums of a draw, relative to Σ|t| (terms of one sign) or √Σt² (mean 0).",
        "*Exponent of depth*: a in error ~ depth^a, where depth is K for sequential sums and 1 + log2 K for pairwise",
        "ones; fitted to logarithms, one slope for all mantissa bits, where no term drowns (at every level the last",
        "sum's spacing is at most a quarter of what is added to it). *Error / law*: geometric mean. *Per doubling*:",
        "what each doubling of K adds to a tree's error, over 2^-m. Means over draws with 95% intervals; *law*: the",
        "same fit to the law. Products of fp8 numbers have few bits: short sums of them are exact, so errors begin",
        "below the law and grow faster until they meet it.",
        "",
    ]


def _about_training(summary: Summary) -> list[str]:
    return [
        "## Inside training",
        "",
        "![bits per character lost over mantissa bits](training.png)",
        "",
        *markdown(TRAINED, trained_rows(summary)),
        "",
        "Means over seeds with 95% intervals; differences are of equal seeds, which see the same text and begin alike.",
        "",
    ]
