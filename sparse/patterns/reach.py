"""How fast a signal spreads through a pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowprec.sparse.patterns.draws import whole


def mixing(mask: Tensor | Sequence[Tensor], steps: int) -> list[float]:
    """The share of all nodes that a signal from one node has reached after each step, the mean over where it starts.

    A step goes from the inputs of a layer to its outputs, which are the inputs of the next step: a recurrent layer's
    internal steps, or a stack of layers. Where the diagonal is present what is reached stays reached.

    Args:
        mask: bool [n, n], of every step; or several masks that take turns, where each has as many inputs as the one
            before it has outputs. The gates of a recurrent cell, [n, 4·n], are one step to n nodes:
            `mask.unflatten(1, (4, n)).any(1)`.
        steps: how many, at least 0.

    Returns:
        `steps` numbers from 0 to 1; the first is the density.

    Raises:
        TypeError: for masks that are not bool, or steps that are no integer.
        ValueError: for masks that are no matrices, are empty, or do not follow one another.
    """
    masks = [mask] if isinstance(mask, Tensor) else list(mask)
    _require_chain(masks, whole("steps", steps, least=0))
    shares: list[float] = []
    reached = masks[0]
    for step in range(steps):
        link = masks[step % len(masks)]
        if step and not (len(masks) == 1 and _stays(reached, link)):
            reached = reached.to(torch.float32) @ link.to(torch.float32) > 0
        shares.append(int(reached.sum()) / reached.numel())
    return shares


def _stays(reached: Tensor, link: Tensor) -> bool:
    """Whether all have reached all, which one more step then does not change."""
    return bool(reached.all()) and bool(link.any(dim=0).all())


def _require_chain(masks: Sequence[Tensor], steps: int) -> None:
    if not masks:
        raise ValueError("mask must be a mask or at least one of them, got none")
    for mask in masks:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool tensors, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2 or not mask.numel():
            raise ValueError(f"mask must be [inputs, outputs], with at least one of each, got {tuple(mask.shape)}")
    for step in range(1, steps):
        before, after = masks[(step - 1) % len(masks)], masks[step % len(masks)]
        if before.shape[1] != after.shape[0]:
            raise ValueError(
                f"mask must have as many inputs as the step before has outputs: step {step + 1} has {after.shape[0]}, "
                f"step {step} has {before.shape[1]} (a single mask must be square)"
            )
