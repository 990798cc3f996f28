"""Capacity: how much wider must a model in 8-bit arithmetic be to match one in float32? See README.md."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lowprec.studies import data, engine
from lowprec.studies.capacity import cell
from lowprec.studies.capacity.config import QUICK, Config

__all__ = ["QUESTION", "QUICK", "Config", "prepare", "run"]

QUESTION = "How much wider must an fp8 byte model be to match fp32, in bits per character?"


def prepare(config: Config) -> Config:
    """Check settings against the text and the machine, and fill in what they leave open.

    Raises:
        ValueError: for a text that is missing, damaged, too short or not the expected one, or a missing device.
    """
    device = engine.device_of(config.device)
    corpus = data.load(config.data, config.split)
    corpus.require(config.sha256)
    cell.updates(config, corpus)
    if min(len(corpus.valid), len(corpus.test)) <= config.length:
        raise ValueError(f"data: validation and test parts need more than {config.length} bytes each")
    return replace(config, sha256=corpus.sha256, device=device)


def run(config: Config, folder: Path) -> None:
    """Run the cells that are not done, then write the results; shows both on the terminal."""
    console = Console(highlight=False)
    total = cell.updates(config, data.load(config.data, config.split))
    parts = [
        engine.Part(name, folder / "cells" / name, total, partial(cell.run, config, *_format_and_width(name)))
        for name in config.names()
    ]
    chosen = [part for part in parts if not config.cells or part.name in config.cells]
    try:
        engine.run(chosen, _workers(config, chosen), config.minutes, console, fresh=config.device == "cuda")
    except KeyboardInterrupt:
        _say_where(parts, console)
        raise
    if all(part.done for part in parts):
        from lowprec.studies.capacity import report  # not needed, and slow to load, in the processes of the cells

        report.write(config, [part.folder for part in parts], folder, console)
    else:
        _say_where(parts, console)


def _format_and_width(name: str) -> tuple[str, int]:
    format, _, width = name.rpartition("-")
    return format, int(width)


def _workers(config: Config, parts: list[engine.Part]) -> int:
    most = 1 if config.device == "cuda" else len(os.sched_getaffinity(0))
    return config.workers or max(1, min(most, len(parts)))


def _say_where(parts: list[engine.Part], console: Console) -> None:
    """One line for each cell that is not done."""
    console.print(f"{sum(part.done for part in parts)} of {len(parts)} cells are done; saved of the others:")
    for part in parts:
        if not part.done:
            console.print(f"  {part.name}: update {part.last()['update']} of {part.total}")
    console.print("go on with --resume")
