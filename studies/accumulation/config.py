"""Settings of the accumulation study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowprec.accumulator import Accumulator
from lowprec.policy import recipes
from lowprec.studies.options import distinct, require, setting

FULL = "fp32"
"""The training cell whose products are torch's own, and the recipe that rounds no operand."""

SHAPES = ("sequential", "chunked", "pairwise")
PARTS = ("sums", "training")

QUICK: dict[str, Any] = {
    "lengths": (16, 64, 256, 1024, 4096),
    "bits": (5, 9),
    "elements": 1 << 16,
    "draws": 3,
    "training_bits": (2, 4),
    "seeds": 2,
    "hidden": 32,
    "steps": 2,
    "embedding": 16,
    "batch": 8,
    "length": 8,
    "updates": 60,
}
"""The small version: seconds on two CPU cores."""


@dataclass(frozen=True)
class Config:
    """Settings, checked."""

    parts: tuple[str, ...] = setting(PARTS, "sums of random numbers, training, or both")
    shapes: tuple[str, ...] = setting(SHAPES, "sequential, chunked and pairwise, or some of them")
    chunk: int = setting(64, "terms of a chunk")
    ebits: int = setting(7, "exponent bits of accumulators: 7 keep overflow and underflow out of the question")
    lengths: tuple[int, ...] = setting((16, 64, 256, 1024, 4096, 16384, 65536), "terms of a sum, ascending")
    bits: tuple[int, ...] = setting((5, 7, 9, 13), "mantissa bits of accumulators for sums")
    elements: int = setting(1 << 20, "terms of one draw, of all its sums together")
    draws: int = setting(5, "draws of random numbers: seeds 0, 1, ...")
    training_bits: tuple[int, ...] = setting((1, 2, 3, 4, 6), "mantissa bits of accumulators in training")
    recipe: str = setting(FULL, "format of the operands in training: fp32, or the name of a recipe")
    data: str = setting("", "a file of bytes, plain or packed by xz or gzip; empty: the embedded text")
    sha256: str = setting("", "digest that the unpacked text must have")
    split: tuple[int, ...] = setting((98, 1, 1), "proportions of training, validation and test text")
    hidden: int = setting(96, "hidden features")
    seeds: int = setting(4, "replicas of each cell of the training: seeds 0, 1, ...")
    steps: int = setting(3, "internal steps")
    embedding: int = setting(64, "features of the embedding")
    batch: int = setting(16, "rows of text for each seed")
    length: int = setting(16, "timesteps of a chunk, through which gradients flow")
    updates: int = setting(600, "updates of each cell of the training")
    lr: float = setting(1e-2, "peak learning rate of Adam")
    warmup: int = setting(50, "updates until that peak; from there it falls linearly to 0")
    device: str = setting("auto", "cpu, cuda or auto")
    cells: tuple[str, ...] = setting((), "only these parts now, as sums-fp8-truncated; empty: all", how=True)
    workers: int = setting(0, "processes at a time; 0: one for each CPU core, or one for the GPU", how=True)
    minutes: float = setting(0.0, "stop after so long, to go on later; 0: no limit", how=True)
    save: float = setting(20.0, "seconds between checkpoints", how=True)

    def __post_init__(self) -> None:
        for name in ("draws", "seeds", "hidden", "embedding", "batch", "length", "updates", "lr"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("warmup", "workers", "minutes", "save"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name, known in (("parts", PARTS), ("shapes", SHAPES)):
            value = getattr(self, name)
            require(distinct(value) and set(value) <= set(known), name, f"among {', '.join(known)}", value)
        require(self.steps >= 2, "steps", "at least 2", self.steps)
        require(self.chunk >= 2, "chunk", "at least 2", self.chunk)
        require(len(self.split) == 3 and min(self.split) > 0, "split", "three numbers above 0", self.split)
        rising = len(self.lengths) > 2 and list(self.lengths) == sorted(set(self.lengths)) and self.lengths[0] > 1
        require(rising, "lengths", "three or more ascending numbers above 1", self.lengths)
        require(self.elements >= self.lengths[-1], "elements", "at least the longest length", self.elements)
        require(2 <= self.ebits <= 7, "ebits", "from 2 to 7, which float32 holds", self.ebits)
        for name in ("bits", "training_bits"):
            value = getattr(self, name)
            require(distinct(value) and all(1 <= m <= 20 for m in value), name, "distinct, from 1 to 20", value)
        known_recipes = (FULL, *recipes)
        require(self.recipe in known_recipes, "recipe", f"one of {', '.join(known_recipes)}", self.recipe)
        require(self.device in ("auto", "cpu", "cuda"), "device", "cpu, cuda or auto", self.device)

    def accumulator(self, shape: str, bits: int, rounding: str = "nearest_even") -> Accumulator:
        """The accumulator of a shape, all of whose levels have so many mantissa bits."""
        level = f"1-{self.ebits}-{bits} {rounding}"
        return Accumulator.parse(
            {"chunked": f"chunk{self.chunk}:{level}/{level}", "pairwise": f"pairwise:{level}"}.get(shape, level)
        )
