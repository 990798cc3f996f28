"""Rows that are looked up in a table: the product of one-hot rows with it, of which only the gradient has sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowprec.blocked import again
from lowprec.roles import Roles
from lowprec.sums import Sums


def look_up(roles: Roles, index: Tensor, table: Tensor, padding: int | None) -> Tensor:
    """The rows of a table [V, D] for an index of any shape; the gradient of a row is summed by an accumulator.

    Its terms are the dY of all lookups in row-major order, zeros for those of other rows. A row of padding has none.
    """
    of_rows = roles.sums(False, True)
    sums = Sums(of_rows.right, None, None, of_rows.gradient_rule, of_rows.gradient_rule)
    rows: Tensor = Lookup.apply(table, index, padding, *sums[:6], *of_rows.draw(table))  # type: ignore[no-untyped-call]
    return rows


class Lookup(torch.autograd.Function):
    """`torch.embedding`, with an accumulator for the gradient of the table."""

    @staticmethod
    def forward(
        table: Tensor,
        index: Tensor,
        padding: int | None,
        forward: str | None,
        left: str | None,
        right: str | None,
        left_rule: str | None,
        right_rule: str | None,
        gradient_rule: str | None,
        seed: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        return torch.embedding(table, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        table, index, ctx.padding, *sums, ctx.seed, ctx.offset = inputs
        ctx.save_for_backward(index)
        ctx.length, ctx.sums = table.shape[0], tuple(sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        index, dy = index.reshape(-1), grads[0].reshape(-1, grads[0].shape[-1])
        offset = None if ctx.offset is None else ctx.offset + 2
        return _summed(index, dy, ctx.length, ctx.padding, Sums(*ctx.sums), ctx.seed, offset), *[None] * 10


def _summed(
    index: Tensor, dy: Tensor, length: int, padding: int | None, sums: Sums, seed: Tensor | None, offset: Tensor | None
) -> Tensor:
    """For each of `length` rows the sum of its dy [T, D]: of all of them or, if that is less, of all lookups."""
    lookups = index.shape[0]
    rows = torch.arange(length, device=index.device) if length <= lookups else index
    chosen = rows.unsqueeze(1) == index
    totals = again(chosen.to(dy.dtype), dy, sums, seed, offset)
    if length > lookups:  # of lookups of one row all give that row the sum of the first
        first = totals[chosen.to(torch.uint8).argmax(1)] if lookups else totals
        totals = dy.new_zeros(length, dy.shape[1]).index_put((index,), first)
    if padding is None:
        return totals
    return totals.masked_fill((torch.arange(length, device=index.device) == padding).unsqueeze(1), 0.0)
