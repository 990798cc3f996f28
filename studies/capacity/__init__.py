"""Capacity: how much wider must a model in 8-bit arithmetic be to match one in float32? See README.md."""

from __future__ import annotations

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
    if engine.run_all(parts, config, console, "cells", fresh=config.device == "cuda"):
        from lowprec.studies.capacity import report  # not needed, and slow to load, in the processes of the cells

        report.write(config, [part.folder for part in parts], folder, console)


def _format_and_width(name: str) -> tuple[str, int]:
    format, _, width = name.rpartition("-")
    return format, int(width)
