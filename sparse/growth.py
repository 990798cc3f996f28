"""Layouts that change: blocks that are pruned and grown, and what follows them from one layout to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowprec.cast import require_float
from lowprec.sparse.layout import BlockLayout
from lowprec.sparse.ops import update_operands
from lowprec.sparse.patterns.draws import share, whole

REDUCTIONS = ("l2", "max", "exact")
"""How the gradient of a block becomes one number."""

_CHUNK = 1 << 24
"""Elements of the dense gradient that are held at once: 64 MiB of float32."""


def prune(w: Tensor, layout: BlockLayout, keep: int | float | Tensor) -> tuple[Tensor, BlockLayout]:
    """Drop the weakest blocks: those of the smallest l2 norm. Differentiable in w; waits for the GPU.

    Norms are added up in float64 in one order, and of equal norms the block that comes first in the layout stays: the
    same blocks on every device.

    Args:
        w: values [blocks, block, block].
        layout: of w.
        keep: how many blocks stay: a number of them (int), a share (float; round(share · blocks)), or a bool tensor of
            the blocks themselves, [blocks] or, as a mask that is True only where the layout is, [inputs, outputs].

    Returns:
        The remaining weights and their layout.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for a keep that is more than there is, or does not fit the layout; for weights that are not finite,
            where norms decide.
    """
    layout.require_weights("w", w)
    require_float("w", w)
    kept = _chosen(keep, layout) if isinstance(keep, Tensor) else _strongest(w, _number(keep, layout.blocks))
    positions = _positions(layout).index_select(0, kept.to(layout.mask.device))
    mask = torch.zeros_like(layout.mask.flatten()).index_fill(0, positions, True)
    after = BlockLayout(mask.view(layout.shape), layout.block, blocks=len(kept))
    return w.index_select(0, kept.to(w.device)), after


def grow(
    w: Tensor, layout: BlockLayout, scores: Tensor, count: int, *, init: Tensor | None = None
) -> tuple[Tensor, BlockLayout]:
    """Add blocks where the scores of absent ones are largest. Differentiable in w and init; waits for the GPU.

    Of equal scores the block that comes first in row-major order is taken.

    Args:
        w: values [blocks, block, block].
        layout: of w.
        scores: floating point [input blocks, output blocks], as of `absent_scores`; those of present blocks are not
            read.
        count: how many blocks to add.
        init: what they start as, [count, block, block] of w's dtype, in row-major order of where they are; None for
            zero.

    Returns:
        The weights and their layout.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for scores or an init of a wrong shape, scores of absent blocks that are not finite, or a count that
            is negative or above the number of absent blocks.
    """
    layout.require_weights("w", w)
    require_float("w", w)
    _require_scores(scores, layout)
    absent = layout.mask.numel() - layout.blocks
    if whole("count", count, least=0) > absent:
        raise ValueError(f"count must be at most the {absent} blocks that are absent, got {count}")
    fresh = _fresh(init, count, w)
    new = best(scores.to(layout.mask.device), ~layout.mask, count)
    after = BlockLayout(
        layout.mask.flatten().index_fill(0, new, True).view(layout.shape), layout.block, blocks=layout.blocks + count
    )
    order = torch.argsort(torch.cat([_positions(layout), new])).to(w.device)
    return torch.cat([w, fresh]).index_select(0, order), after


def absent_scores(
    pairs: Sequence[tuple[Tensor, Tensor]], layout: BlockLayout, *, features: str = "last", reduce: str = "l2"
) -> Tensor:
    """How much each absent block would lower the loss: the size of the gradient that it would have.

    "exact" is the l2 norm of the block of dW = Σ xᵀ · dy, at the cost of the dense update, in pieces of 64 MiB. "l2"
    and "max" are the block_reduced_full_dw of openai/blocksparse, block² times as cheap: each block of x and of dy is
    reduced to its l2 norm, or its largest magnitude, for each token; these are multiplied and summed over tokens. "l2"
    is a bound on "exact", which it meets where the gradients of tokens do not cancel.

    Args:
        pairs: at least one (x, dy) of values, as in `weight_grad`.
        layout: of the weights.
        features: "last" or "first", of x and dy alike.
        reduce: "l2", "max" or "exact".

    Returns:
        [input blocks, output blocks], float32 (float64 of float64), -infinity where a block is present.

    Raises:
        TypeError, ValueError: as `weight_grad`, and for an unknown reduce.
    """
    scores = gradient_scores(pairs, layout, features=features, reduce=reduce)
    return scores.masked_fill(layout.mask.to(scores.device), -torch.inf)


def carry(x: Tensor, before: BlockLayout, after: BlockLayout, *, fill: float = 0.0) -> Tensor:
    """What belongs to the blocks of one layout, as another has them: weights, optimizer states, averages, gates.

    Args:
        x: [blocks, ...] of `before`.
        before: a layout.
        after: another of the same shape.
        fill: what new blocks have.

    Returns:
        [blocks, ...] of `after`: blocks of both keep what they have.

    Raises:
        TypeError: for what are no layouts.
        ValueError: for layouts of different shapes, or an x that is not of `before`.
    """
    for name, layout in (("before", before), ("after", after)):
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"{name} must be a BlockLayout, got {type(layout).__name__}")
    if before.shape != after.shape or before.block != after.block:
        raise ValueError(f"before and after must have one shape and block, got {before} and {after}")
    if x.dim() == 0 or len(x) != before.blocks:
        raise ValueError(f"x must have {before.blocks} blocks in its first dimension, got shape {tuple(x.shape)}")
    if not before.blocks:
        return x.new_full((after.blocks, *x.shape[1:]), fill)
    found = torch.full((before.mask.numel(),), -1, device=before.mask.device)
    found[_positions(before)] = torch.arange(before.blocks, device=found.device)
    source = found[_positions(after).to(found.device)].to(x.device)
    carried = x.index_select(0, source.clamp(min=0))
    return torch.where((source >= 0).view(-1, *[1] * (x.dim() - 1)), carried, torch.full_like(carried, fill))


# What is strong.


def energies(w: Tensor) -> Tensor:
    """The square of the l2 norm of each block of values, float64 [blocks], the same bits on every device."""
    squares = w.detach().to(torch.float64).square().flatten(1)
    while squares.shape[1] > 1:  # b² is a power of two
        squares = squares[:, : squares.shape[1] // 2] + squares[:, squares.shape[1] // 2 :]
    return squares[:, 0]  # without the square root, of which devices round the last bit in different ways


def gradient_scores(
    pairs: Sequence[tuple[Tensor, Tensor]], layout: BlockLayout, *, features: str = "last", reduce: str = "l2"
) -> Tensor:
    """`absent_scores` of all blocks, the present ones too."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    several = [
        (_tokens(each.left, each.first), _tokens(each.right, each.first))
        for each in update_operands(pairs, layout, features)
    ]
    if reduce == "exact":
        return _exact(several, layout)
    order = 2.0 if reduce == "l2" else torch.inf
    x, dy = (torch.cat([_reduced(pair[side], layout.block, order) for pair in several]) for side in (0, 1))
    return x.T @ dy


def _tokens(x: Tensor, first: bool) -> Tensor:
    """An operand as [tokens, features], in which sums are formed."""
    return (x.T if first else x).to(torch.promote_types(x.dtype, torch.float32))


def _reduced(x: Tensor, block: int, order: float) -> Tensor:
    """One number for each token and block."""
    norms: Tensor = torch.linalg.vector_norm(x.reshape(len(x), x.shape[1] // block, block), order, dim=2)
    return norms


def _exact(pairs: list[tuple[Tensor, Tensor]], layout: BlockLayout) -> Tensor:
    (inputs, outputs), block = layout.shape, layout.block
    rows = max(1, _CHUNK // (layout.outputs * block))
    parts = []
    for start in range(0, inputs, rows):
        wanted = slice(start * block, (start + rows) * block)
        gradient = sum((x[:, wanted].T @ dy for x, dy in pairs[1:]), pairs[0][0][:, wanted].T @ pairs[0][1])
        parts.append(torch.linalg.vector_norm(gradient.view(-1, block, outputs, block), dim=(1, 3)))
    return torch.cat(parts)


# Which blocks.


def best(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Where the largest scores among candidates are: flat positions, ascending, int64 [count].

    Args:
        scores: [...], finite at the candidates; of equal ones the first is better.
        candidates: bool of the same shape, at least `count` of them.
        count: how many.
    """
    ranked = scores.masked_fill(~candidates, -torch.inf).flatten().sort(descending=True, stable=True)
    return ranked.indices[:count].sort().values


def _strongest(w: Tensor, count: int) -> Tensor:
    strength = energies(w)
    if not bool(strength.isfinite().all()):
        raise ValueError(
            f"w must be finite, got a norm that is not, of block {int((~strength.isfinite()).nonzero()[0])}"
        )
    return best(strength, torch.ones_like(strength, dtype=torch.bool), count)


def _number(keep: Any, blocks: int) -> int:
    """How many blocks stay."""
    if isinstance(keep, float):
        return round(share("keep", keep) * blocks)
    if whole("keep", keep, least=0) > blocks:
        raise ValueError(f"keep must be at most the {blocks} blocks that are present, got {keep}")
    return int(keep)


def _chosen(keep: Tensor, layout: BlockLayout) -> Tensor:
    """The ids of the blocks that a bool tensor keeps."""
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be an int, a float or a bool tensor, got {keep.dtype}")
    if keep.shape not in ((layout.blocks,), layout.shape):
        raise ValueError(f"keep must have shape ({layout.blocks},) or {layout.shape}, got {tuple(keep.shape)}")
    keep = keep.to(layout.mask.device)
    if keep.dim() == 2:
        if bool((keep & ~layout.mask).any()):
            i, j = (keep & ~layout.mask).nonzero()[0].tolist()
            raise ValueError(f"keep must be within the layout's mask, got block {i, j}, which is absent")
        keep = keep[layout.mask]
    return keep.nonzero()[:, 0]


def _positions(layout: BlockLayout) -> Tensor:
    """Where the blocks are in the flattened mask, ascending, int64 [blocks]."""
    i, j = layout.coordinates.unbind(1)
    return i * layout.shape[1] + j


def _require_scores(scores: object, layout: BlockLayout) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        given = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a floating-point tensor, got {given}")
    if scores.shape != layout.shape:
        raise ValueError(f"scores must have the shape of the mask, {layout.shape}, got {tuple(scores.shape)}")
    wrong = ~scores.isfinite() & ~layout.mask.to(scores.device)
    if bool(wrong.any()):
        i, j = wrong.nonzero()[0].tolist()
        raise ValueError(f"scores must be finite where blocks are absent, got {float(scores[i, j])} at {i, j}")


def _fresh(init: Tensor | None, count: int, w: Tensor) -> Tensor:
    if init is None:
        return w.new_zeros(count, *w.shape[1:])
    shape = (count, *w.shape[1:])
    if not isinstance(init, Tensor) or init.shape != shape or init.dtype != w.dtype or init.device != w.device:
        given = (
            f"{init.dtype} {tuple(init.shape)} on {init.device}" if isinstance(init, Tensor) else type(init).__name__
        )
        raise ValueError(f"init must be {w.dtype} of shape {shape} on {w.device}, got {given}")
    return init
