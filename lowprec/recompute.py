"""Activation checkpointing: what is recomputed is rounded as it was the first time.

`torch.utils.checkpoint` calls a function once more in the backward pass. By then a policy's region is left, and casts
that keep a state have moved on. So torch's two implementations are given functions that take along what the region
says must be, and a tape: the first pass writes down what every such cast used, and the second one reads it from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor

Function = Callable[..., Any]

carriers: list[Callable[[Function], Function]] = []
"""Each makes, of a function that is about to be checkpointed, one that may be called in the backward pass."""

_REENTRANT = checkpointing.CheckpointFunction
_GENERATOR = checkpointing._checkpoint_without_reentrant_generator


class _Tapes(threading.local):
    """The tapes in force, the innermost last: a list is written to, an iterator is read from.

    Of each thread, since the backward pass of a device has its own.
    """

    def __init__(self) -> None:
        self.stack: list[list[Tensor] | Iterator[Tensor]] = []


_tapes = _Tapes()


def used(say: Callable[[], Tensor]) -> Tensor:
    """What a call of a cast uses: what `say` says or, in a recomputation, what it said the first time."""
    if torch.compiler.is_compiling() or not _tapes.stack:
        return say()
    writing = []
    for tape in reversed(_tapes.stack):
        if not isinstance(tape, list):
            use = next(tape, None)
            break
        writing.append(tape)
    else:
        use = say()
    if use is None:
        raise RuntimeError("a checkpointed function casts more tensors when it is recomputed than it did at first")
    for written in writing:
        written.append(use)
    return use


@contextmanager
def _on(tape: list[Tensor] | Iterator[Tensor]) -> Iterator[None]:
    """Put a tape in force; take it out again wherever it then lies, as a generator may be closed late."""
    _tapes.stack.append(tape)
    try:
        yield
    finally:
        _tapes.stack[:] = [other for other in _tapes.stack if other is not tape]


def _recomputed(function: Function, tape: list[Tensor]) -> Function:
    """What recomputation is to call in the place of a function."""
    for carrier in carriers:
        function = carrier(function)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _on(iter(tape)):
            return function(*args, **kwargs)

    return run


class _Carrying(_REENTRANT):
    """Reentrant checkpointing, which calls one function in both passes."""

    @staticmethod
    def forward(ctx: Any, run_function: Any, preserve_rng_state: Any, *args: Any) -> Any:
        tape: list[Tensor] = []
        again, function = _recomputed(run_function, tape), run_function

        def run(*args: Any) -> Any:
            return function(*args)

        with _on(tape):
            outputs = _REENTRANT.forward(ctx, run, preserve_rng_state, *args)  # type: ignore[no-untyped-call]
        function = again
        return outputs


def _carrying(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """The other implementation: it calls its own function only to recompute, and waits during the first pass."""
    tape: list[Tensor] = []
    with _on(tape):
        yield from _GENERATOR(_recomputed(fn, tape), *args, **kwargs)


def install() -> None:
    """Make torch's activation checkpointing take regions and tapes along; once is enough."""
    checkpointing.CheckpointFunction = _Carrying  # type: ignore[misc]
    checkpointing._checkpoint_without_reentrant_generator = _carrying
