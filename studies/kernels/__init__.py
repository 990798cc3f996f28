"""Kernels: how does the speed of block-sparse products change with width at equally many weights? See README.md."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lowprec.studies import engine
from lowprec.studies.kernels import measure
from lowprec.studies.kernels.config import QUICK, Config
from lowprec.studies.kernels.work import SIDES

__all__ = ["QUESTION", "QUICK", "Config", "prepare", "run"]

QUESTION = "How does the speed of block-sparse products change with width, at equally many weights?"


def prepare(config: Config) -> Config:
    """Check settings against the machine, and fill in what they leave open.

    Raises:
        ValueError: for a missing device, a width that blocks do not divide, or a cell that is none of the widths.
    """
    device = engine.device_of(config.device)
    config = replace(config, device=device, side=config.side or SIDES[device])
    if unknown := set(config.cells) - set(config.names()):
        raise ValueError(f"cells must be among {', '.join(config.names())}, got {', '.join(sorted(unknown))}")
    return config


def run(config: Config, folder: Path) -> None:
    """Measure the widths that are not done, then write the results; shows both on the terminal."""
    console = Console(highlight=False)
    parts = [
        engine.Part(name, folder / "cells" / name, config.repeats, partial(measure.run, config, widening))
        for name, widening in zip(config.names(), config.widenings, strict=True)
    ]
    if engine.run_all(parts, config, console, "widths"):
        from lowprec.studies.kernels import report  # not needed, and slow to load, in the processes of the widths

        report.write(config, [part.folder for part in parts], folder, console)
