"""Settings of the residual study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lowprec.policy import recipes
from lowprec.sparse import patterns
from lowprec.studies.options import require, setting

FULL = "fp32"
"""The format that rounds nothing."""

DENSE = "dense"
LEARNED = "learned"
DIGITS = "digits"
"""The data that are not a file of bytes."""

SIDE = 8
"""Pixels along each side of a digit."""

MARGINS = {True: 1.0, False: 0.02}
"""Within which two arms count as equal: percentage points of error on digits; bits per character on text."""

QUICK: dict[str, Any] = {
    "arms": ("fp32-dense", "fp32-watts_strogatz", "fp8-watts_strogatz", "fp32-watts_strogatz-learned"),
    "seeds": 2,
    "updates": 40,
    "every": 10,
    "warmup": 10,
}
"""The small version: seconds on two CPU cores."""


class Arm(NamedTuple):
    """One way to train: a format, a pattern of blocks or "dense", and whether the pattern is learned from there on."""

    format: str
    pattern: str
    learned: bool

    @classmethod
    def parse(cls, name: str) -> Arm:
        """From FORMAT-PATTERN or FORMAT-PATTERN-learned; ValueError for what is none."""
        front, _, last = name.rpartition("-")
        learned = last == LEARNED
        format, _, pattern = front.rpartition("-") if learned else (front, "", last)
        if format not in (FULL, *recipes) or pattern.partition(":")[0] not in patterns.NAMES:
            kinds = f"one of {FULL}, {', '.join(recipes)}, and of {', '.join(patterns.NAMES)}"
            raise ValueError(f"arms must be FORMAT-PATTERN or FORMAT-PATTERN-learned, of {kinds}; got {name!r}")
        if learned and pattern == DENSE:
            raise ValueError(f"arms: {name!r} has no blocks to learn, a dense net has them all")
        return cls(format, pattern, learned)

    def __str__(self) -> str:
        return "-".join([self.format, self.pattern, *([LEARNED] if self.learned else [])])


@dataclass(frozen=True)
class Config:
    """Settings, checked."""

    data: str = setting(DIGITS, "digits: scikit-learn's; or a file of bytes, plain or packed; empty: the embedded text")
    sha256: str = setting("", "digest that the unpacked text must have")
    split: tuple[int, ...] = setting((90, 5, 5), "proportions of training, validation and test text")
    arms: tuple[str, ...] = setting(
        (
            "fp32-dense",
            "fp32-watts_strogatz",
            "fp32-watts_strogatz-learned",
            "fp32-block_diagonal",
            "fp32-block_diagonal-learned",
            "fp8-dense",
            "fp8-watts_strogatz",
        ),
        "FORMAT-PATTERN or FORMAT-PATTERN-learned; the first is the base",
    )
    width: int = setting(160, "features of the sparse nets; the dense net's follow from equal parameters")
    block: int = setting(8, "features of a block along each side")
    density: float = setting(0.1, "share of blocks that are present")
    enter: str = setting(DENSE, "pattern of blocks, of that density too, of what comes into sparse nets; or dense")
    layers: int = setting(10, "hidden layers")
    window: int = setting(16, "symbols from which the next one is predicted, in text")
    embedding: int = setting(32, "features of a symbol")
    noise: float = setting(0.7, "of digits: deviation of what is added to every pixel, pixels having a deviation of 1")
    shift: int = setting(1, "of digits: pixels by which they are moved at most, each way")
    copies: int = setting(8, "of digits: how often each held-out image is drawn, with noise, to be scored")
    scored: int = setting(65536, "of text: windows of the test part that are scored")
    seeds: int = setting(8, "of weights, patterns, batches and, of digits, the images held out: 0, 1, ...")
    batch: int = setting(128, "rows of a batch")
    updates: int = setting(800, "of each net")
    lr: float = setting(3e-3, "peak learning rate of Adam")
    warmup: int = setting(50, "updates until that peak; from there it falls linearly to 0")
    every: int = setting(80, "updates from one rewiring to the next, where the pattern is learned")
    wider: int = setting(8, "batches in one at the updates that rewire, by whose gradient blocks grow; in every arm")
    share: float = setting(0.5, "of the blocks that the first rewiring moves; a cosine takes it to 0")
    until: float = setting(0.6, "share of the updates after which the pattern stays")
    margin: float = setting(0.0, "within which arms count as equal; 0: 1 point of error, or 0.02 bits per character")
    device: str = setting("auto", "cpu, cuda or auto")
    graph: bool = setting(False, "whether updates on a GPU are captured in a CUDA graph", how=True)
    cells: tuple[str, ...] = setting((), "only these arms now; empty: all", how=True)
    workers: int = setting(0, "processes at a time; 0: one for each CPU core, or one for the GPU", how=True)
    minutes: float = setting(0.0, "stop after so long, to go on later; 0: no limit", how=True)

    def __post_init__(self) -> None:
        for name in ("width", "layers", "window", "embedding", "seeds", "batch", "updates", "lr", "every", "wider"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("copies", "scored"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("noise", "shift", "warmup", "margin", "workers", "minutes"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("density", "share", "until"):
            require(0 < getattr(self, name) <= 1, name, "above 0 and at most 1", getattr(self, name))
        require(self.width % self.block == 0, "width", f"a multiple of the block, {self.block}", self.width)
        known = self.enter.partition(":")[0] in patterns.NAMES
        require(known, "enter", f"one of {', '.join(patterns.NAMES)}", self.enter)
        whole = self.enter == DENSE or self.features % self.block == 0
        require(whole, "block", f"such that it divides the {self.features} features that come in", self.block)
        require(len(self.split) == 3 and min(self.split) > 0, "split", "three numbers above 0", self.split)
        require(len(set(self.arms)) == len(self.arms) > 0, "arms", "distinct, and one at least", self.arms)
        names = tuple(str(Arm.parse(arm)) for arm in self.arms)
        require(set(self.cells) <= set(names), "cells", f"among {', '.join(names)}", self.cells)
        require(self.device in ("auto", "cpu", "cuda"), "device", "cpu, cuda or auto", self.device)

    @property
    def on_digits(self) -> bool:
        return self.data == DIGITS

    @property
    def features(self) -> int:
        """That come in."""
        return SIDE**2 if self.on_digits else self.window * self.embedding

    def rows(self, update: int) -> int:
        """Of the batch of an update, the same in every arm."""
        rewires = (update + 1) % self.every == 0 and update + 1 < self.last_rewiring
        return self.batch * self.wider if rewires else self.batch

    @property
    def last_rewiring(self) -> int:
        """The number of updates after which patterns stay."""
        return max(1, round(self.until * self.updates))

    @property
    def blocks(self) -> int:
        """Blocks of features along one side of a layer."""
        return self.width // self.block
