"""The tables of a block layout: which weights each output block meets, and what CUDA kernels plan ahead.

Made by sorting and counting, in sizes that are known beforehand, so that a GPU makes them without a word to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """What kernels walk, int32 on one device, and the layer's size in blocks.

    `fprop` and `bprop`: where each output block's pairs begin, one more for the end; then the pairs (input block,
    weight), by output block and then input block. `update`: (input block, output block) of each weight; then the
    weights in Morton order of those. What kernels plan ahead follows.
    """

    fprop: Tensor
    bprop: Tensor
    update: Tensor
    shape: tuple[int, int]

    def direction(self, transpose: bool) -> tuple[Tensor, int]:
        """The table of fprop, or of bprop, and how many output blocks that has."""
        return (self.bprop, self.shape[0]) if transpose else (self.fprop, self.shape[1])


def tables_of(mask: Tensor, blocks: int, block: int) -> Tables:
    """The tables of a mask, on its device and without waiting for it: in a CUDA graph too, then as often as replayed.

    Args:
        mask: bool [I, O].
        blocks: how many are True.
        block: features of a block along each side.
    """
    inputs, outputs = mask.shape
    flat = mask.flatten()
    present = flat.to(torch.int8).sort(descending=True, stable=True).indices[:blocks]
    i, j = present // outputs, present % outputs
    names = torch.arange(blocks, device=mask.device)
    by_column = (j * inputs + i).sort().indices
    fprop = _direction(mask.sum(0), i[by_column], by_column, block)
    bprop = _direction(mask.sum(1), j, names, block)
    order = _morton(i, j).sort(stable=True).indices
    sections = [torch.stack([i, j], 1).flatten(), order]
    if mask.is_cuda and blocks:
        sections += update_plan(i, j, (inputs, outputs), block)
    update = torch.cat(sections).to(torch.int32)
    return Tables(fprop, bprop, update, (inputs, outputs))


def _direction(lengths: Tensor, inputs: Tensor, weights: Tensor, block: int) -> Tensor:
    """The table of one direction from the blocks of each output, and its pairs."""
    start = lengths.new_zeros(1)
    pairs = torch.stack([inputs, weights], 1).flatten()
    plan: tuple[Tensor, ...] = ()
    if lengths.is_cuda:
        plan = *product_plan(lengths, len(weights), block), share_plan(lengths, block)
    return torch.cat([start, lengths.cumsum(0), pairs, *(each.flatten() for each in plan)]).to(torch.int32)


def _morton(i: Tensor, j: Tensor) -> Tensor:
    """Place on the Z-order curve: the bits of both numbers, below 2^16, in turn."""
    return (_spread(i) << 1) | _spread(j)


def _spread(n: Tensor) -> Tensor:
    """The bits of a number below 2^16, each with a zero above it."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        n = (n | (n << shift)) & mask
    return n


# The plan of products on CUDA.


def part_blocks(outputs: int, blocks: int, block: int) -> int:
    """The blocks beyond which an output comes in parts. The kernel's launch knows the same number."""
    return max(-(-2 * blocks // max(outputs, 400)), 256 // block)


def product_plan(lengths: Tensor, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """What thread blocks of a product take up, in rows: output, its first pair, how many, and the output's parts.

    Outputs as a whole, those of more than twice the mean's blocks first, the longest of them foremost; the others stay
    as they are, since neighbours share inputs in many patterns. And outputs in parts of whole stages of 64 features,
    none longer than `part_blocks`, up to those; rows that are not needed have output -1.

    Args:
        lengths: how many blocks each output has, int64.
        blocks: how many there are.
        block: features of a block along each side.
    """
    outputs, begins = len(lengths), lengths.cumsum(0) - lengths
    order = lengths.clamp_min(2 * blocks // outputs).sort(descending=True, stable=True).indices
    whole = torch.stack([order, begins[order], lengths[order], torch.ones_like(order)], 1)
    most = part_blocks(outputs, blocks, block)
    counts = ((lengths + most - 1) // most).clamp_min(1)
    ends = counts.cumsum(0)
    row = torch.arange(outputs + blocks // most, device=lengths.device)
    output = torch.searchsorted(ends, row, right=True)
    there, output = output < outputs, output.clamp_max(outputs - 1)
    length, count = lengths[output], counts[output]
    stage = 64 // block
    share = ((length + stage - 1) // stage + count - 1) // count * stage
    start = torch.minimum((row - ends[output] + count) * share, length)
    parts = [torch.where(there, output, -1), begins[output] + start, torch.minimum(share, length - start), count]
    return whole, torch.stack(parts, 1)


SHARES = {8: (660, 16), 16: (528, 8), 32: (396, 2), 64: (264, 1)}
"""For each size of blocks: the shares of a product of codes, and the blocks of a stage. The kernel knows these, too."""


def share_plan(lengths: Tensor, block: int) -> Tensor:
    """Where equal shares of a product of codes begin: rows of an output, and the first pairs of it and the next two.

    An output costs a stage beside its own blocks. There is one row more than shares, for the end of the last one.

    Args:
        lengths: how many blocks each output has, int64.
        block: features of a block along each side.
    """
    count, stage = SHARES[block]
    outputs = torch.arange(len(lengths) + 3, device=lengths.device)
    begins = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])[outputs.clamp(max=len(lengths))]
    starts = (begins + stage * outputs)[: len(lengths) + 1]
    place = torch.arange(count + 1, device=lengths.device) * starts[-1] // count
    output = torch.searchsorted(starts, place, right=True) - 1
    return torch.stack([output, begins[output], begins[output + 1], begins[output + 2]], 1)


# The plan of the update on CUDA.

UPDATE_TILES = {8: 160, 16: 64, 32: 16, 64: 4}
"""How many blocks of each size a thread block computes together, its tile. The kernel knows these numbers, too."""

_PANELS = (1, 2, 4, 8, 16, 32, 64, 128)


def update_plan(i: Tensor, j: Tensor, shape: tuple[int, int], block: int) -> list[Tensor]:
    """Which blocks a thread block of the update computes together: sections of the table, flat.

    Blocks are walked input by input within panels of output blocks, and every so many make a tile. A tile reads its
    inputs and outputs once, so the panel's width is the one that makes tiles share the most. Of each tile: how many
    inputs, outputs and fragments it has; the inputs; the outputs; and the fragments, each a pair of places among the
    inputs (the second in the upper 16 bits), a place among the outputs, and one or two weights, -1 for none. Two
    blocks of 8 in one column share a fragment, since an instruction takes 16 rows.

    Args:
        i: input block of each weight, int64.
        j: output block of each.
        shape: of the mask.
        block: features of a block along each side.
    """
    tile = torch.arange(len(i), device=i.device) // UPDATE_TILES[block]
    pairs = block == 8
    costs = torch.stack([_tile_cost(i, j, tile, shape, width, pairs) for width in _PANELS])
    width = 2 ** costs.argmin()  # no list of numbers: copying one to the device would break a graph's capture
    order = _panel_order(i, j, shape, width)
    return _tiles(i[order], j[order], order, tile, shape, UPDATE_TILES[block], pairs)


def _panel_order(i: Tensor, j: Tensor, shape: tuple[int, int], width: int | Tensor) -> Tensor:
    return ((j // width * shape[0] + i) * width + j % width).argsort()


def _tile_cost(i: Tensor, j: Tensor, tile: Tensor, shape: tuple[int, int], width: int, pairs: bool) -> Tensor:
    """What tiles from panels of a width read, and what they compute, where that differs."""
    order = _panel_order(i, j, shape, width)
    rows = _starts((tile * shape[0] + i[order]).sort().values)
    columns = _starts((tile * shape[1] + j[order]).sort().values)
    reads = rows.sum() + columns.sum()
    return 2 * reads + _pair_starts(columns).sum() if pairs else reads


def _starts(keys: Tensor) -> Tensor:
    """Where a run of equal keys begins."""
    return torch.cat([keys.new_ones(1, dtype=torch.bool), keys[1:] != keys[:-1]])


def _pair_starts(starts: Tensor) -> Tensor:
    """Where every second element of each run is, its first included."""
    place = torch.arange(len(starts), device=starts.device)
    return (place - torch.where(starts, place, 0).cummax(0).values) % 2 == 0


def _tiles(
    i: Tensor, j: Tensor, weights: Tensor, tile: Tensor, shape: tuple[int, int], size: int, pairs: bool
) -> list[Tensor]:
    """The sections of `update_plan` from the blocks in their order."""
    row_of, rows, row_counts = _distinct(i, tile, shape[0], size)
    column_of, columns, column_counts = _distinct(j, tile, shape[1], size)
    by_column = ((tile * shape[1] + j) * shape[0] + i).argsort()
    runs = _starts((tile * shape[1] + j)[by_column])
    first = _pair_starts(runs) if pairs else torch.ones_like(runs)
    row_of, column_of, weights = row_of[by_column], column_of[by_column], weights[by_column]
    place, counts = _numbered(first, tile, size)
    partner = torch.cat([~first[1:], first.new_zeros(1)])
    fragments = torch.zeros(len(rows) + 1, 4, dtype=torch.int64, device=i.device)  # one more, for what is no first
    second_row = torch.where(partner, row_of.roll(-1), row_of)
    second_weight = torch.where(partner, weights.roll(-1), -1)
    values = torch.stack([row_of | second_row << 16, column_of, weights, second_weight], 1)
    fragments[torch.where(first, place, len(rows))] = values
    counts = torch.stack([row_counts, column_counts, counts, torch.zeros_like(counts)], 1)
    return [counts.flatten(), rows, columns, fragments[:-1].flatten()]


def _distinct(index: Tensor, tile: Tensor, bound: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block, its index's place among those of its tile; those, so many places to a tile; how many they are."""
    keys, order = (tile * bound + index).sort()
    place, counts = _numbered(_starts(keys), tile, size)
    listed = torch.zeros(len(counts) * size, dtype=torch.int64, device=index.device)
    listed[place] = keys % bound
    places = torch.empty_like(place)
    places[order] = place - tile * size
    return places, listed, counts


def _numbered(first: Tensor, tile: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Places of elements in sorted tiles, where `first` ones take the next, and how many each tile has."""
    number = first.cumsum(0) - 1
    tiles = -(-len(tile) // size)
    start = number[::size]
    last = number[(torch.arange(tiles, device=tile.device) * size + size - 1).clamp(max=len(tile) - 1)]
    return number - start[tile] + tile * size, last - start + 1
