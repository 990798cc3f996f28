"""The residual net: a projection, hidden layers h + W · relu(norm(h)), a norm and a projection to classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from lowprec import sparse
from lowprec.studies.residual.config import DENSE, Arm, Config
from lowprec.studies.residual.task import Task


class Residual(nn.Module):
    """Hidden layers are dense, or block sparse, as is the projection of what comes in; the last projection is dense.

    Weights begin normal: of projections with variance 1 / fan-in, of hidden layers with 2 / (fan-in · layers), the
    fan-in of an output being what reaches it, so that dense and sparse nets begin with features of one size.

    Args:
        task: says what comes in and what goes out.
        embedding: features of a symbol, where rows are symbols.
        width: hidden features.
        layers: how many hidden layers, where they are dense, or the layout of each.
        enter: the layout of the first projection; None where that is dense.
        draws: where the weights come from.
    """

    def __init__(
        self,
        task: Task,
        embedding: int,
        width: int,
        layers: int | Sequence[sparse.BlockLayout],
        enter: sparse.BlockLayout | None = None,
        draws: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(task.symbols, embedding) if task.symbols else None
        self.enter = nn.Linear(task.features, width) if enter is None else sparse.Linear(enter)
        if isinstance(layers, int):
            self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        else:
            self.hidden = nn.ModuleList(sparse.Linear(layout) for layout in layers)
        self.norms = nn.ModuleList(sparse.LayerNorm(width) for _ in range(len(self.hidden) + 1))
        self.leave = nn.Linear(width, task.classes)
        self._reset(draws)

    @torch.no_grad()
    def _reset(self, draws: torch.Generator | None) -> None:
        if self.embedding is not None:
            self.embedding.weight.normal_(generator=draws)
        for linear in (self.enter, *self.hidden, self.leave):
            assert isinstance(linear, nn.Linear | sparse.Linear)
            linear.weight.normal_(generator=draws)
            linear.weight.mul_(_deviation(linear, 1 if linear in (self.enter, self.leave) else 2 / len(self.hidden)))
            linear.bias.zero_()  # type: ignore[union-attr]

    def forward(self, rows: Tensor) -> Tensor:
        """Features [N, features] or symbols [N, window] -> logits [N, classes]."""
        h = self.enter(rows if self.embedding is None else self.embedding(rows).flatten(1))
        for norm, linear in zip(self.norms, self.hidden, strict=False):
            h = h + linear(relu(norm(h)))
        logits: Tensor = self.leave(self.norms[-1](h))
        return logits


def _deviation(linear: nn.Linear | sparse.Linear, variance: float) -> Tensor | float:
    """Of initial weights whose outputs shall have a variance; for sparse ones [blocks, 1, 1]."""
    if isinstance(linear, sparse.Linear):
        fan_in = linear.layout.mask.sum(0) * linear.layout.block
        return (variance / fan_in.clamp(min=1)).sqrt()[linear.layout.coordinates[:, 1]][:, None, None]
    return math.sqrt(variance / linear.in_features)


def build(config: Config, arm: Arm, task: Task, seed: int) -> Residual:
    """The net of an arm and seed, on the CPU. Arms of one seed and pattern begin alike."""
    draws = torch.Generator().manual_seed(seed)
    if arm.pattern == DENSE:
        return Residual(task, config.embedding, dense_width(config, task), config.layers, None, draws)
    hidden, enter = layouts(config, arm.pattern, seed), entrance(config, seed)
    return Residual(task, config.embedding, config.width, hidden, enter, draws)


def layouts(config: Config, pattern: str, seed: int) -> list[sparse.BlockLayout]:
    """Those of the hidden layers, a draw for each where the pattern is random."""
    n = config.blocks
    masks = (
        sparse.patterns.build(pattern, n, n, config.density, config.layers * seed + layer)
        for layer in range(config.layers)
    )
    return [sparse.BlockLayout(mask, config.block) for mask in masks]


def entrance(config: Config, seed: int) -> sparse.BlockLayout | None:
    """That of the first projection of sparse nets; None where it is dense."""
    if config.enter == DENSE:
        return None
    inputs = config.features // config.block
    mask = sparse.patterns.build(config.enter, inputs, config.blocks, config.density, seed)
    return sparse.BlockLayout(mask, config.block)


def dense_width(config: Config, task: Task) -> int:
    """The least width at which a dense net has as many parameters as any sparse one: it is never the smaller."""
    patterns = {Arm.parse(name).pattern for name in config.arms} - {DENSE}
    budget = sparse.patterns.budget(config.blocks, config.blocks, config.density)
    blocks = max((layouts(config, pattern, 0)[0].blocks for pattern in patterns), default=budget)  # groups may differ
    enter = entrance(config, 0)
    entering = enter.blocks * config.block**2 if enter else None
    wanted = parameters(config, task, config.width, blocks * config.block**2, entering)
    return next(width for width in range(1, wanted) if parameters(config, task, width, width**2) >= wanted)


def parameters(config: Config, task: Task, width: int, weights: int, entering: int | None = None) -> int:
    """How many a net has: `weights` in each hidden layer's weight; in the first projection's `entering`, or all."""
    projections = (task.features * width if entering is None else entering) + width + (width + 1) * task.classes
    return task.symbols * config.embedding + projections + config.layers * (weights + 3 * width) + 2 * width
