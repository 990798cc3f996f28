"""Accumulation: how does a sum's error grow with its length, its order and its accumulator's bits? See README.md."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from lowprec.studies import data, engine
from lowprec.studies.accumulation import sums, training
from lowprec.studies.accumulation.config import QUICK, Config
from lowprec.studies.accumulation.theory import SITUATIONS

__all__ = ["QUESTION", "QUICK", "Config", "prepare", "run"]

QUESTION = "How does a sum's error grow with its length and its accumulator's bits: sequential, chunked, pairwise?"


def prepare(config: Config) -> Config:
    """Check settings against the text and the machine, and fill in what they leave open.

    Raises:
        ValueError: for a text that is missing, damaged, too short or not the expected one, or a missing device.
    """
    device = engine.device_of(config.device)
    if unknown := set(config.cells) - {part.name for part in _parts(config, Path())}:
        known = ", ".join(part.name for part in _parts(config, Path()))
        raise ValueError(f"cells must be among {known}, got {', '.join(sorted(unknown))}")
    if "training" not in config.parts:
        return replace(config, device=device)
    corpus = data.load(config.data, config.split)
    corpus.require(config.sha256)
    training.settings(config)
    if min(len(corpus.valid), len(corpus.test)) <= config.length:
        raise ValueError(f"data: validation and test parts need more than {config.length} bytes each")
    return replace(config, sha256=corpus.sha256, device=device)


def run(config: Config, folder: Path) -> None:
    """Run the parts that are not done, then write the results; shows both on the terminal."""
    console = Console(highlight=False)
    parts = _parts(config, folder)
    if engine.run_all(parts, config, console, "parts", fresh=config.device == "cuda"):
        from lowprec.studies.accumulation import report  # not needed, and slow to load, in the processes of the parts

        measured = [part.folder for part in parts if _is_sum(part)]
        trained = [part.folder for part in parts if not _is_sum(part)]
        report.write(config, measured, trained, folder, console)


def _parts(config: Config, folder: Path) -> list[engine.Part]:
    """The cells of the training, the longest work first, and the sums."""
    parts = []
    if "training" in config.parts:
        parts += [
            engine.Part(name, folder / "cells" / name, config.updates, partial(training.run, config, name))
            for name in training.names(config)
        ]
    if "sums" in config.parts:
        parts += [
            engine.Part(
                f"sums-{terms}-{situation.name}",
                folder / "cells" / f"sums-{terms}-{situation.name}",
                sums.total(config),
                partial(sums.run, config, terms, situation),
            )
            for terms in sums.TERMS
            for situation in SITUATIONS
        ]
    return parts


def _is_sum(part: engine.Part) -> bool:
    return part.name.startswith("sums-")
