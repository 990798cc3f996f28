"""Settings of the kernels study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowprec.sparse import patterns
from lowprec.sparse.layout import BLOCKS
from lowprec.studies.kernels.work import DTYPES
from lowprec.studies.options import distinct, require, setting

OPS = ("fprop", "bprop", "update")

QUICK: dict[str, Any] = {
    "side": 256,
    "widenings": (1.0, 2.0, 3.0, 5.5),
    "tokens": (32,),
    "kinds": ("bf16",),
    "repeats": 4,
    "rounds": 9,
    "device": "cpu",
}
"""The small version: seconds on two CPU cores."""


@dataclass(frozen=True)
class Config:
    """Settings, checked."""

    side: int = setting(0, "width of the dense layer; 0: 3584 (12.85 million weights) on a GPU, 512 on the CPU")
    widenings: tuple[float, ...] = setting(
        (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.5, 5.5), "widths over that of the dense layer, ascending"
    )
    tokens: tuple[int, ...] = setting((64, 512), "numbers of tokens, N")
    ops: tuple[str, ...] = setting(OPS, "fprop, bprop and update, or some of them")
    kinds: tuple[str, ...] = setting(("bf16", "fp8"), "operands: bf16, fp32, or fp8 for codes")
    blocks: tuple[int, ...] = setting(BLOCKS, "sizes of blocks: 8, 16, 32, 64, or some of them")
    features: str = setting("last", "last for (N, C), first for (C, N)")
    pattern: str = setting("barabasi_albert", "of the blocks; a name that sparse.patterns.build knows")
    repeats: int = setting(5, "runs of each width, each with a pattern of its own: seeds 0, 1, ...")
    rounds: int = setting(11, "times that a run measures each product; it keeps the median")
    device: str = setting("auto", "cpu, cuda or auto")
    cells: tuple[str, ...] = setting((), "only these widths now, as 7168; empty: all", how=True)
    workers: int = setting(1, "processes at a time; more than one measure each other", how=True)
    minutes: float = setting(0.0, "stop after so long, to go on later; 0: no limit", how=True)

    def __post_init__(self) -> None:
        for name in ("repeats", "rounds", "workers"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("side", "minutes"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name, known in (("ops", OPS), ("kinds", tuple(DTYPES)), ("blocks", BLOCKS)):
            value = getattr(self, name)
            among = ", ".join(map(str, known))
            require(distinct(value) and set(value) <= set(known), name, f"among {among}", value)
        require(distinct(self.tokens) and min(self.tokens) > 0, "tokens", "distinct numbers above 0", self.tokens)
        rising = list(self.widenings) == sorted(set(self.widenings)) and min(self.widenings, default=0) >= 1
        require(rising, "widenings", "ascending numbers from 1 on", self.widenings)
        require(self.features in ("last", "first"), "features", "last or first", self.features)
        require(self.device in ("auto", "cpu", "cuda"), "device", "cpu, cuda or auto", self.device)
        kind = self.pattern.partition(":")[0]
        require(kind in patterns.NAMES, "pattern", f"one of {', '.join(patterns.NAMES)}", self.pattern)
        largest = max(self.blocks)
        for widening in self.widenings if self.side else ():
            whole = self.side * widening % largest == 0
            require(whole, "side", f"so that blocks of {largest} divide every width", self.side)

    def width(self, widening: float) -> int:
        """Features of a layer, once `side` is known."""
        return round(self.side * widening)

    def names(self) -> list[str]:
        """Every cell: a width."""
        return [str(self.width(widening)) for widening in self.widenings]
