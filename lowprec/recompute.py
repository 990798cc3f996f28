"""Activation checkpointing under a policy: what is recomputed is rounded as it was the first time.

`torch.utils.checkpoint` calls a function once more in the backward pass, when no region is active. Modules bring their
own region back, but functional calls in the function itself would go unrounded, and gradients be wrong in silence. So
its two implementations are given functions that take the active region along. Outside a region they are unchanged.
"""

from __future__ import annotations

from typing import Any

import torch.utils.checkpoint as checkpointing

from lowprec.region import carried

_REENTRANT = checkpointing.CheckpointFunction
_GENERATOR = checkpointing._checkpoint_without_reentrant_generator


class _Carrying(_REENTRANT):
    """Reentrant checkpointing of a function that takes its region along."""

    @staticmethod
    def forward(ctx: Any, run_function: Any, preserve_rng_state: Any, *args: Any) -> Any:
        return _REENTRANT.forward(ctx, carried(run_function), preserve_rng_state, *args)  # type: ignore[no-untyped-call]


def _carrying(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """The other implementation, likewise."""
    return _GENERATOR(carried(fn), *args, **kwargs)


def install() -> None:
    """Make torch's activation checkpointing take regions along; once is enough."""
    checkpointing.CheckpointFunction = _Carrying  # type: ignore[misc]
    checkpointing._checkpoint_without_reentrant_generator = _carrying
