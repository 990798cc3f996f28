"""Scale-free patterns after Barabási and Albert (1999): blocks arrive one by one and join those that have most."""

from __future__ import annotations

import bisect

import numpy as np
import torch
from torch import Tensor

from lowprec.sparse.patterns.draws import Draws, Integers, Mask, budget, diagonal, whole


def barabasi_albert(n_in: int, n_out: int, density: float, extra: int = 0, seed: int = 0) -> Tensor:
    """Preferential attachment: a few blocks of neurons have most of the connections, and all others reach them.

    Nodes arrive one by one. Each joins m earlier ones, drawn in proportion to the blocks that they have by then, their
    diagonal block included; the first m nodes are all connected, which is the full leading square of
    openai/blocksparse. So that the budget is met exactly, some nodes, evenly apart, join m + 1. Square masks are
    symmetric, but for one block where the budget is odd.

    Where the sizes differ, node t is input t and output t as long as both exist; after that it is one more of the
    larger side, and joins nodes of the smaller one.

    Args:
        n_in: input blocks.
        n_out: output blocks.
        density: share of the blocks that are present; round(density · n_in · n_out) of them exactly, but at least the
            max(n_in, n_out) of the diagonal.
        extra: how many of these blocks are random instead: each pair of them connects a node that has the fewest with
            any other.
        seed: not negative; the same mask on every machine.

    Returns:
        bool [n_in, n_out].

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for sizes below 1, a density outside [0, 1], or an extra beyond the budget.
    """
    blocks = budget(n_in, n_out, density) - max(n_in, n_out)
    if whole("extra", extra, least=0) > blocks:
        raise ValueError(f"extra must be at most {blocks}, the blocks beside the diagonal, got {extra}")
    draws = Draws(seed)
    smaller, larger = sorted((n_in, n_out))
    joins = _joins(smaller, larger, blocks - extra)
    mask = _attach(joins, smaller, draws)
    _fill_evenly(mask, blocks + larger - int(mask.sum()), draws)
    return torch.from_numpy(mask if n_in <= n_out else np.ascontiguousarray(mask.T))


def _joins(smaller: int, larger: int, blocks: int) -> Integers:
    """How many earlier nodes each node joins, so that all take so many blocks, or one less.

    A node of both sides takes two blocks for each: to it and back.
    """
    node = np.arange(larger)
    room = np.where(node < smaller, node, smaller - 1)
    price = np.where(node < smaller, 2, 1)

    def cost(each: int) -> int:
        return int((price * np.minimum(room, each)).sum())

    each = bisect.bisect_right(range(smaller), blocks, key=cost) - 1
    joins = np.minimum(room, each)
    _one_more(joins, price, np.flatnonzero(room > each), blocks - cost(each))
    return joins


def _one_more(joins: Integers, price: Integers, able: Integers, blocks: int) -> None:
    """Let some nodes, evenly apart, join one more, for so many blocks or one less."""
    total = int(price[able].sum())
    credit = 0
    for node in able.tolist():
        credit += blocks * int(price[node])
        if credit >= total * int(price[node]):
            joins[node] += 1
            credit -= total * int(price[node])


def _attach(joins: Integers, smaller: int, draws: Draws) -> Mask:
    """Let the nodes arrive: [smaller, larger], the diagonal included."""
    larger = len(joins)
    mask = diagonal(smaller, larger)
    ends = np.empty(smaller + 2 * int(joins.sum()), dtype=np.int64)  # every node as often as it has blocks
    count = 0
    for node, wanted in enumerate(joins.tolist()):
        own, known = node % smaller, min(node, smaller)
        if wanted:
            joined = _distinct(ends[:count], wanted, own if node >= smaller else -1, known, draws)
            mask[joined, node] = True
            ends[count : count + wanted] = joined
            count += wanted
        if node < smaller:
            if wanted:
                mask[node, joined] = True
            ends[count : count + wanted + 1] = node
            count += wanted + 1
    return mask


def _distinct(ends: Integers, wanted: int, own: int, known: int, draws: Draws) -> Integers:
    """So many different ones of the known nodes, other than `own`, by drawing from `ends` until they are found."""
    if wanted == known - (own >= 0):
        return np.flatnonzero(np.arange(known) != own)
    found = np.empty(0, dtype=np.int64)
    while len(found) < wanted:
        found = np.concatenate([found, ends[draws.below(len(ends), 2 * wanted)]])
        found = found[found != own]
        found = found[np.sort(np.unique(found, return_index=True)[1])]  # in the order in which they came
    return found[:wanted]


def _fill_evenly(mask: Mask, blocks: int, draws: Draws) -> None:
    """Add so many blocks in place: a node that has the fewest, and any that it is not connected to, both ways."""
    held = mask.sum(axis=0)
    while blocks:
        node = draws.pick(np.flatnonzero(held == held.min()))
        other = draws.pick(np.flatnonzero(~mask[:, node]))
        for row, column in ((other, node), (node, other)):
            if blocks and row < len(mask) and not mask[row, column]:
                mask[row, column] = True
                held[column] += 1
                blocks -= 1
