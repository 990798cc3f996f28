"""The results on the terminal and on disk: tables, pictures, CSV, JSON and a README that explains them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console

from lowprec.studies import record
from lowprec.studies.intervals import plus_minus
from lowprec.studies.page import circumstances, markdown, table
from lowprec.studies.residual.config import Config
from lowprec.studies.residual.picture import draw_arms, draw_masks
from lowprec.studies.residual.summary import FORMS, Summary, as_json, findings

ROW = ("arm", "seed", "parameters", "width", "error", "bits", "clean", "moved", "seconds")


def write(config: Config, parts: list[Path], folder: Path, console: Console) -> None:
    """Write results.json, results.csv, the pictures and README.md, and show the table."""
    summary = Summary(config, [record.read_json(part / "result.json") for part in parts])
    record.write_json(folder / "results.json", as_json(summary))
    record.write(folder / "results.csv", _csv(summary).encode())
    record.write(folder / "residual.png", draw_arms(summary))
    masks = draw_masks(summary)
    if masks:
        record.write(folder / "masks.png", masks)
    saved = record.read_json(folder / "config.json")
    record.write(folder / "README.md", _readme(summary, saved, bool(masks)).encode())
    show(summary, console)
    console.print(f"all results: {folder}")


def show(summary: Summary, console: Console) -> None:
    """The table and the conclusions."""
    heads, rows = _heads(summary), _rows(summary)
    scores = slice(3, len(heads) - 2)  # with the arms they are as wide as a terminal
    console.print(table("Held-out rows, 95%", [heads[0], *heads[scores]], [[row[0], *row[scores]] for row in rows]))
    for line in findings(summary):
        console.print(f"- {line}")


def _heads(summary: Summary) -> tuple[str, ...]:
    scores = ("error %", "bits", "clean error %") if summary.config.on_digits else ("bits per character", "error %")
    return ("arm", "parameters", "width", *scores, "moved", "seconds")


def _rows(summary: Summary) -> list[tuple[str, ...]]:
    """A row for each arm: means over seeds."""
    keys = ("error", "bits", "clean") if summary.config.on_digits else ("bits", "error")
    return [
        (
            arm,
            f"{summary.nets(arm)[0]['parameters']:,}",
            str(summary.nets(arm)[0]["width"]),
            *(plus_minus(summary.mean(arm, key), FORMS[key]) for key in keys),
            f"{summary.mean(arm, 'moved').estimate:.0f}",
            f"{summary.mean(arm, 'seconds').estimate:.1f}",
        )
        for arm in summary.config.arms
    ]


def _csv(summary: Summary) -> str:
    """A line for each net."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ROW, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for arm in summary.config.arms:
        writer.writerows({"arm": arm, **net} for net in summary.nets(arm))
    return file.getvalue()


def _readme(summary: Summary, saved: record.Json, masks: bool) -> str:
    config = summary.config
    devices = (net["device"] for arm in config.arms for net in summary.nets(arm))
    data = "scikit-learn's digits" if config.on_digits else Path(config.data).name or "the embedded tiny Shakespeare"
    lines = [
        "# Residual: sparse against dense, fp8 against fp32, learned against fixed",
        "",
        f"Does a residual net of {config.layers} block-sparse layers match a dense one of equal size, in fp8 too, and",
        "is a pattern of blocks that is learned better than the one it began as?",
        "",
        "![scores of every arm, and their differences](residual.png)",
        "",
        *markdown(_heads(summary), _rows(summary)),
        "",
        *_about(summary),
        "",
        *(f"- {line}" for line in findings(summary)),
        "",
        *(["![blocks before and after learning](masks.png)", ""] if masks else []),
        "## How",
        "",
        "Method: studies/residual/README.md.",
        "",
        f"- data: {data}{f' (SHA-256 {config.sha256})' if config.sha256 else ''}",
        *circumstances(saved, devices),
        "",
        "Files: `results.csv` (a line for each net), `results.json` (what follows), `config.json`, and for each arm",
        "`metrics.jsonl` and `result.json`, with curves and masks.",
    ]
    return "\n".join(lines) + "\n"


def _about(summary: Summary) -> list[str]:
    what = "each image with fresh noise, `clean` without" if summary.config.on_digits else "windows of the test text"
    equal = f"±{summary.config.margin:g} {summary.unit(summary.score)}"
    return [
        f"Means over {summary.config.seeds} seeds with 95% intervals, of held-out rows ({what}). Differences are of",
        "equal seeds, which have the same data and batches, and where nets have one shape the same first pattern and",
        f"weights; less is better. Equality is claimed by two one-sided tests alone, within {equal}.",
        "Each interval is for itself: with so many, one in twenty may miss. *Moved*: blocks that learning put",
        "elsewhere. *Seconds*: of training a net, with whatever else the machine did.",
    ]
