"""Settings of the capacity study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowprec.policy import recipes
from lowprec.studies.options import distinct, require, setting

FULL = "fp32"
"""The format that rounds nothing."""

QUICK: dict[str, Any] = {
    "widths": (80, 104),
    "seeds": 3,
    "steps": 3,
    "batch": 32,
    "length": 16,
    "epochs": 0.69,
    "lr": 1e-2,
    "warmup": 50,
    "device": "cpu",
}
"""The small version: about two minutes on two CPU cores, on the embedded text."""


@dataclass(frozen=True)
class Config:
    """Settings, checked."""

    data: str = setting("", "a file of bytes, plain or packed by xz or gzip; empty: the embedded text")
    sha256: str = setting("", "digest that the unpacked text must have")
    split: tuple[int, ...] = setting((90, 5, 5), "proportions of training, validation and test text")
    formats: tuple[str, ...] = setting((FULL, "fp8"), "fp32 or names of recipes; the first is the base")
    widths: tuple[int, ...] = setting((1120, 1216, 1280), "hidden features")
    seeds: int = setting(4, "replicas of each cell: seeds 0, 1, ...")
    steps: int = setting(5, "internal steps")
    embedding: int = setting(64, "features of the embedding")
    batch: int = setting(256, "rows of text for each seed")
    length: int = setting(64, "timesteps of a chunk, through which gradients flow")
    epochs: float = setting(4.0, "passes over the training text")
    lr: float = setting(2e-3, "peak learning rate of Adam")
    warmup: int = setting(500, "updates until that peak; from there it falls linearly to 0")
    clip: float = setting(1.0, "largest norm of a seed's gradient")
    ema: float = setting(0.999, "decay of the averaged weights, which are scored")
    margin: float = setting(0.003, "bits per character within which two formats count as equal")
    device: str = setting("auto", "cpu, cuda or auto")
    tf32: bool = setting(True, "whether float32 products on a GPU are TF32")
    compile: bool = setting(False, "whether timesteps and optimizer run under torch.compile")
    cells: tuple[str, ...] = setting((), "only these cells now, as fp8-1120; empty: all", how=True)
    workers: int = setting(0, "processes at a time; 0: one for each CPU core, or one for the GPU", how=True)
    minutes: float = setting(0.0, "stop after so long, to go on later; 0: no limit", how=True)
    save: float = setting(20.0, "seconds between checkpoints", how=True)

    def __post_init__(self) -> None:
        for name in ("seeds", "embedding", "batch", "length", "epochs", "lr", "clip", "margin"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("warmup", "workers", "minutes", "save"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        require(self.steps >= 2, "steps", "at least 2", self.steps)
        require(0 <= self.ema < 1, "ema", "in [0, 1)", self.ema)
        require(len(self.split) == 3 and min(self.split) > 0, "split", "three numbers above 0", self.split)
        require(distinct(self.widths) and min(self.widths) > 0, "widths", "distinct numbers above 0", self.widths)
        known = (FULL, *recipes)
        good = distinct(self.formats) and set(self.formats) <= set(known)
        require(good, "formats", f"distinct names among {', '.join(known)}", self.formats)
        require(self.device in ("auto", "cpu", "cuda"), "device", "cpu, cuda or auto", self.device)
        require(set(self.cells) <= set(self.names()), "cells", f"among {', '.join(self.names())}", self.cells)

    def names(self) -> list[str]:
        """Every cell, in the order in which they run: a base and what is compared with it are neighbours."""
        return [f"{format}-{width}" for width in self.widths for format in self.formats]
