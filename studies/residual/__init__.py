"""Residual: does a block-sparse net match a dense one of equal size, in fp8 too, or better it? See README.md."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lowprec.studies import data, engine
from lowprec.studies.residual import model, training
from lowprec.studies.residual.config import DENSE, FULL, MARGINS, QUICK, Arm, Config
from lowprec.studies.residual.task import digits

__all__ = ["QUESTION", "QUICK", "Config", "prepare", "run"]

QUESTION = "Does a block-sparse residual net match a dense one of equal size, in fp8 too, and better if it rewires?"


def prepare(config: Config) -> Config:
    """Check settings against the data and the machine, and fill in what they leave open.

    Raises:
        ValueError: for data that are missing, damaged, too short or not the expected ones, a pattern that does not fit
            the width, or a missing device.
    """
    device = engine.device_of(config.device)
    for name in config.arms:
        pattern = Arm.parse(name).pattern
        if pattern != DENSE:
            model.layouts(config, pattern, 0)
    margin = config.margin or MARGINS[config.on_digits]
    if config.on_digits:
        digits()
        return replace(config, device=device, margin=margin)
    corpus = data.load(config.data, config.split)
    corpus.require(config.sha256)
    if min(len(corpus.train), len(corpus.test)) <= config.window:
        raise ValueError(f"data: training and test parts need more than {config.window} bytes each")
    return replace(config, sha256=corpus.sha256, device=device, margin=margin)


def run(config: Config, folder: Path) -> None:
    """Run the arms that are not done, then write the results; shows both on the terminal."""
    console = Console(highlight=False)
    total = config.seeds * config.updates
    slowest_first = sorted(
        config.arms, key=lambda name: (Arm.parse(name).format == FULL, Arm.parse(name).pattern == DENSE)
    )
    parts = [
        engine.Part(name, folder / "cells" / name, total, partial(training.run, config, Arm.parse(name)))
        for name in slowest_first
    ]
    if engine.run_all(parts, config, console, "arms"):
        from lowprec.studies.residual import report  # not needed, and slow to load, in the processes of the arms

        report.write(config, [part.folder for part in parts], folder, console)
