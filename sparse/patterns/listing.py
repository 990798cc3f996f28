"""Patterns in the terminal: what each mask holds."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from torch import Tensor

from lowprec.sparse.patterns.reach import mixing


def listing(masks: Mapping[str, Tensor], steps: int) -> Table:
    """A row for each mask: blocks, density, fan-out of inputs, fan-in of outputs, and the mixing of square ones."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("pattern", overflow="fold", min_width=17)
    for name in ("blocks", "density", "fan-out", "fan-in"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"% by step 1..{steps}" if steps else "", no_wrap=True)
    for name, mask in masks.items():
        square = mask.shape[0] == mask.shape[1]
        reached = " ".join(f"{100 * share:3.0f}" for share in mixing(mask, steps)) if square else "not square"
        blocks = int(mask.sum())
        table.add_row(name, str(blocks), f"{blocks / mask.numel():.1%}", _range(mask, 1), _range(mask, 0), reached)
    return table


def _range(mask: Tensor, dim: int) -> str:
    counts = mask.sum(dim=dim)
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low}..{high}"
