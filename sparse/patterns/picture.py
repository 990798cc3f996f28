"""Pictures of patterns: which blocks are present, how many connections neurons have, and how fast a signal spreads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from lowprec.chart import COLOURS, DASHES, style
from lowprec.sparse.patterns.reach import mixing

_MASK = ListedColormap(["white", COLOURS[0]])
_INPUTS, _OUTPUTS = COLOURS[1], COLOURS[2]


def draw_patterns(masks: Mapping[str, Tensor], path: Path, *, steps: int = 6) -> None:
    """Save a picture (PNG) of masks, a column for each, and below them how those that are square mix.

    Args:
        masks: bool [input blocks, output blocks], under the names to show.
        path: the file to write.
        steps: how far mixing is followed.

    Raises:
        ValueError: with no mask.
        OSError: when the file cannot be written.
    """
    if not masks:
        raise ValueError("masks must have at least one mask, got none")
    square = {name: mask for name, mask in masks.items() if mask.shape[0] == mask.shape[1]}
    mixed = {name: mixing(mask, steps) for name, mask in square.items()} if steps else {}
    tallest = max(min(2.8 * len(mask) / mask.shape[1], 3.4) for mask in masks.values())
    heights = [tallest + 0.6, 2.2, *[2.5] * bool(mixed)]
    with style():
        room = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.06)
        figure = Figure(figsize=(max(3.3 * len(masks), 5.2), sum(heights) + 0.8), layout=room)
        grid = figure.add_gridspec(len(heights), len(masks), height_ratios=heights)
        classes = _classes(masks.values())
        for column, (name, mask) in enumerate(masks.items()):
            _draw_mask(figure.add_subplot(grid[0, column]), name, mask)
            _draw_connections(figure.add_subplot(grid[1, column]), mask, classes, first=column == 0)
        if mixed:
            _draw_mixing(figure.add_subplot(grid[2, :]), mixed)
        figure.savefig(path, format="png")


def _draw_mask(axes: Axes, name: str, mask: Tensor) -> None:
    axes.imshow(mask.cpu().numpy(), cmap=_MASK, vmin=0, vmax=1, interpolation="nearest", resample=False)
    density = int(mask.sum()) / mask.numel()
    axes.set_title(f"{name.replace(':', ', ')}\n{int(mask.sum())} blocks, {density:.1%}", fontsize=10)
    axes.set_xlabel("output block")
    axes.set_ylabel("input block")
    axes.spines[:].set_visible(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))


def _classes(masks: Iterable[Tensor]) -> Tensor:
    """The classes of a histogram of connections, the same for all masks: their edges."""
    counts = torch.cat([mask.sum(dim=dim).cpu() for mask in masks for dim in (0, 1)])
    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // 40)
    return torch.arange(low, high + width + 1, width, dtype=torch.float64) - 0.5


def _draw_connections(axes: Axes, mask: Tensor, classes: Tensor, first: bool) -> None:
    """How many inputs, and how many outputs, have so many blocks, on a logarithmic axis: hubs are few."""
    lines = (("inputs", 1, _INPUTS, DASHES[0]), ("outputs", 0, _OUTPUTS, DASHES[1]))
    for name, dim, colour, dash in lines:
        held = torch.histogram(mask.sum(dim=dim).cpu().double(), classes).hist
        axes.stairs(held.numpy(), classes.numpy(), color=colour, linestyle=dash, label=name, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 3 * max(mask.shape))
    width = round(float(classes[1] - classes[0]))
    axes.set_xlabel("blocks" if width == 1 else f"blocks, {width} to a class")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(True)
    if first:
        axes.set_ylabel("inputs, outputs")
        axes.set_title("Connections")
        axes.legend(loc="upper right", ncols=2)


def _draw_mixing(axes: Axes, mixed: Mapping[str, list[float]]) -> None:
    for (name, shares), colour, dash in zip(
        mixed.items(), itertools.cycle(COLOURS), itertools.cycle(DASHES), strict=False
    ):
        axes.plot(
            range(len(shares) + 1), [0.0, *shares], color=colour, linestyle=dash, marker="o", markersize=4, label=name
        )
    axes.set_title("Mixing: share of neurons reached from one")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, 1.03)
    axes.set_xlim(left=0)
    axes.grid(True)
    if len(mixed) > 1:
        axes.legend(loc="best", frameon=True, edgecolor="none")
