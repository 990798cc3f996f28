"""Block-sparse products: the tables that kernels follow, and a product with gradients below `lowprec.sparse`.

A layer has I input and O output blocks of b features; its weights w [blocks, b, b] are the blocks that are present,
[in, out] within each, in row-major order of the mask. What is summed in which order: docs/sparse.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec import _ops
from lowprec.accumulate import (
    AccumulatorLike,
    BackwardLike,
    accumulator_fields,
    for_mode,
    is_stochastic,
    require_device,
    require_operands,
    round_to,
)
from lowprec.cast import QuickApply, draw
from lowprec.eager import container_of
from lowprec.eager_sparse import carrier_of
from lowprec.modes import announced, narrowed


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
    plan = product_plan(lengths, len(weights), block)
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


# Products.


@announced
def matmul(
    x: Tensor,
    w: Tensor,
    gate: Tensor | None,
    tables: Tables,
    *,
    bias: Tensor | None = None,
    first: bool = False,
    transpose: bool = False,
    accumulator: AccumulatorLike | None = None,
    backward: BackwardLike = None,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The product of x and block-sparse weights, differentiable to any order; its arguments are taken as checked.

    Modes that override torch's functions see this one, and autocast casts x and w.

    Args:
        x: values [..., I·b], or [I·b, ...] if features come `first`; of O·b features if `transpose`.
        w: [blocks, b, b], of x's dtype.
        gate: float32 [blocks], or None.
        tables: of the layer.
        bias: [features of the result], added to the rounded product in its dtype, or None.
        first: whether features are the first dimension.
        transpose: whether to multiply by the transposed weights, as an input gradient does.
        accumulator: how sums are formed; None for sums in float32, of float64 in float64, as docs/sparse.md says.
        backward: of the gradients: None for the same one, one for both, or the pair (dx, dw).
        dtype: of the result, x's if None.
        seed: for stochastic levels, as in `lowprec.matmul`.
        offset: likewise.
        generator: likewise.
    """
    x, w = narrowed(x), narrowed(w)
    trees = _trees(x, accumulator, backward)
    given = seed is not None or generator is not None
    draws = is_stochastic(trees[0]) or (given and any(map(is_stochastic, trees[1:])))
    words = draw(x, "stochastic" if draws else "nearest_even", seed, offset, generator)
    flat, rest = flatten(x, first)
    how = (*tables, transpose, first, *trees, *words, given, dtype or x.dtype)
    y = unflatten(apply_product(flat, w, gate, *how), rest, first)
    return y if bias is None else y + beside(bias.to(y.dtype), y, first)


def beside(bias: Tensor, y: Tensor, first: bool) -> Tensor:
    """A number for each feature in a shape in which it is broadcast to a product."""
    return bias.view(-1, *[1] * (y.dim() - 1)) if first else bias


def _trees(
    x: Tensor, accumulator: AccumulatorLike | None, backward: BackwardLike
) -> tuple[list[int], list[int], list[int]]:
    """The integers of the accumulators of a product and of its gradients; none where nothing is declared."""
    pair = backward if isinstance(backward, tuple | list) else (backward, backward)
    if len(pair) != 2:
        raise ValueError(f"backward must be None, an accumulator, or a pair of them (dx, dw), got {backward!r}")
    forward, left, right = (
        checked(accumulator if each is None else each, x.dtype, x.device) for each in (accumulator, *pair)
    )
    return forward, left, right


def checked(accumulator: AccumulatorLike | None, dtype: torch.dtype, device: torch.device) -> list[int]:
    """As `declared`, of operands that are multiplied as they are: errors for what the accumulator does not take."""
    fields = declared(accumulator, dtype, device)
    if fields:
        require_operands(fields, x=dtype)
        require_device(fields, device)
    return fields


def declared(accumulator: AccumulatorLike | None, dtype: torch.dtype, device: torch.device) -> list[int]:
    """The integers of the accumulator of operands of a dtype; none where sums are the device's own.

    With None given, float32 is summed in float32 one term after the other, and on the CPU so are 16-bit values. CUDA
    multiplies those by tensor cores. float64 is summed in float64.
    """
    carrier = torch.float64 if dtype == torch.float64 else torch.float32
    if accumulator is not None:
        return accumulator_fields(accumulator, carrier)
    if dtype == torch.float64 or (dtype != torch.float32 and device.type == "cuda"):
        return []
    return accumulator_fields("fp32", carrier)


def flatten(x: Tensor, first: bool) -> tuple[Tensor, torch.Size]:
    """A tensor of two dimensions, features and all others, and the sizes of those."""
    rest = x.shape[1:] if first else x.shape[:-1]
    return (x.reshape(x.shape[0], rest.numel()) if first else x.reshape(rest.numel(), x.shape[-1])), rest


def unflatten(y: Tensor, rest: torch.Size, first: bool) -> Tensor:
    """A result of two dimensions with the sizes that were flattened."""
    return y.view(y.shape[0], *rest) if first else y.view(*rest, y.shape[1])


def apply_product(*args: Any) -> Tensor:
    """`Product` of its arguments, in whatever mode torch is."""
    y: Tensor = for_mode(Product, DualProduct).apply(*args)
    return y


def apply_update(*args: Any) -> Tensor:
    """`Update` likewise."""
    dw: Tensor = for_mode(Update, DualUpdate).apply(*args)
    return dw


class Product(torch.autograd.Function):
    """The product of values in two dimensions, or if `transpose` that by the transposed weights."""

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        gate: Tensor | None,
        fprop: Tensor,
        bprop: Tensor,
        update: Tensor,
        shape: tuple[int, int],
        transpose: bool,
        first: bool,
        fields: list[int],
        left: list[int],
        right: list[int],
        seed: Tensor | None,
        offset: Tensor | None,
        given: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        # Spelled out: dynamo tells a forward without ctx by the number of its parameters.
        table, outputs = (bprop, shape[0]) if transpose else (fprop, shape[1])
        return product(x, w, table, gate, outputs, first, transpose, fields, seed, offset, [], [], dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.shape, ctx.transpose, ctx.first, _, ctx.left, ctx.right, seed, offset, ctx.given, _ = inputs
        ctx.save_for_backward(*operands, seed, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, w, gate, *tables, seed, offset = ctx.saved_tensors  # once: checkpointing allows no second time
        words, where = (seed, offset), (*tables, ctx.shape)
        dy = dy.to(x.dtype)
        dx = dw = dgate = None
        if ctx.needs_input_grad[0]:
            trees = (ctx.left, ctx.left, ctx.right)
            drawn = _words(ctx.left, x, words, ctx.given, 1)
            how = (not ctx.transpose, ctx.first, *trees, *drawn, ctx.given, x.dtype)
            dx = apply_product(dy, w, gate, *where, *how)
        if any(ctx.needs_input_grad[1:3]):
            pair = (dy, x) if ctx.transpose else (x, dy)
            drawn = _words(ctx.right, x, words, ctx.given, 2)
            blocks, block, _ = w.shape
            what: tuple[Any, ...] = (*where, blocks, block, ctx.first, ctx.right, *drawn, ctx.given)
            dw, dgate = gradients(pair, w, gate, what, ctx.needs_input_grad[2])
        return (dx, dw, dgate, *[None] * 13)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """The tokens of all samples in one product, by which random words go too."""
        if not isinstance(in_dims[0], int) or any(isinstance(dim, int) for dim in in_dims[1:]):
            return _ops.sample_by_sample(DualProduct.apply, info, in_dims, args)
        x, first = args[0].movedim(in_dims[0], int(args[8])), int(args[8])
        y = apply_product(x.flatten(first, first + 1), *args[1:])
        return (y.view(len(y), *x.shape[1:]) if first else y.view(*x.shape[:2], y.shape[1])), first


class DualProduct(QuickApply, Product):
    """`Product` in forward mode too, which `torch.compile` refuses to trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Product.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])
        ctx.rest = inputs[3:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, w, gate = ctx.saved_tensors[:3]
        dx, dw, dgate = tangents[:3]
        pairs = ((dx, w, gate), (x, dw, gate), (x, w, dgate))
        terms = [each for each, tangent in zip(pairs, (dx, dw, dgate), strict=True) if tangent is not None]
        return sum(apply_product(*each, *ctx.rest) for each in terms)


def gradients(
    pair: tuple[Tensor, Tensor], w: Tensor, gate: Tensor | None, how: tuple[Any, ...], of_gate: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of weights and of gates."""
    if not of_gate or gate is None:
        return apply_update(*pair, gate, *how, w.dtype), None
    sums = apply_update(*pair, None, *how, carrier_of(w))
    dgate = (sums * w.to(sums.dtype)).sum((1, 2)).to(gate.dtype)
    return close(sums, gate).to(w.dtype), dgate


def close(sums: Tensor, gate: Tensor) -> Tensor:
    """An update under gates: nothing where one is closed."""
    factor = gate.to(sums.dtype)[:, None, None]
    return (sums * factor).masked_fill(factor == 0, 0)


def _words(fields: list[int], x: Tensor, words: Any, given: bool, further: int) -> tuple[Tensor | None, Tensor | None]:
    """Seed and offset of a gradient, so much further on than the product's; none where it does not draw."""
    seed, offset = words
    if not is_stochastic(fields):
        return None, None
    if not given:
        return draw(x, "stochastic", None, 0, None)
    return seed, torch.tensor(further, device="cpu") if offset is None else offset + further


class Update(torch.autograd.Function):
    """The update of one pair: x_iᵀ · dy_j for each weight (i, j)."""

    @staticmethod
    def forward(
        x: Tensor,
        dy: Tensor,
        gate: Tensor | None,
        fprop: Tensor,
        bprop: Tensor,
        table: Tensor,
        shape: tuple[int, int],
        blocks: int,
        block: int,
        first: bool,
        fields: list[int],
        seed: Tensor | None,
        offset: Tensor | None,
        given: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        return update([x], [dy], table, gate, blocks, block, first, fields, seed, offset, [], [], dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.shape, _, _, ctx.first, ctx.fields, seed, offset, ctx.given, _ = inputs
        ctx.save_for_backward(*operands, seed, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dw,) = grads
        x, dy, gate, *tables, seed, offset = ctx.saved_tensors
        dw = dw.to(x.dtype)
        results: list[Tensor | None] = [None, None]
        for place, factor in ((0, dy), (1, x)):
            if ctx.needs_input_grad[place]:
                drawn = _words(ctx.fields, x, (seed, offset), ctx.given, place + 1)
                trees = (ctx.fields, ctx.fields, ctx.fields)
                how = (place == 0, ctx.first, *trees, *drawn, ctx.given, x.dtype)
                results[place] = apply_product(factor, dw, gate, *tables, ctx.shape, *how)
        return (*results, *[None] * 13)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _ops.sample_by_sample(DualUpdate.apply, info, in_dims, args)


class DualUpdate(QuickApply, Update):
    """`Update` in forward mode too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Update.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])
        ctx.rest = inputs[2:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, dy = ctx.saved_tensors[:2]
        terms = [pair for pair in ((tangents[0], dy), (x, tangents[1])) if all(each is not None for each in pair)]
        return sum(apply_update(*pair, *ctx.rest) for pair in terms)


# The ops, by whether sums are declared.


def product(
    x: Tensor,
    w: Tensor,
    table: Tensor,
    gate: Tensor | None,
    outputs: int,
    first: bool,
    transpose: bool,
    fields: list[int],
    seed: Tensor | None,
    offset: Tensor | None,
    x_format: list[int],
    w_format: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The product of values or codes in two dimensions, rounded once into a dtype. Not differentiable."""
    where = (x, w, table, gate, outputs, first, transpose)
    if fields:
        sums: Tensor = _ops.sparse_matmul_accumulate(*where, fields, seed, offset, x_format, w_format)
        return round_to(sums, dtype)
    return _ops.sparse_matmul(*where, x_format, w_format, dtype)  # type: ignore[no-any-return]


def update(
    x: list[Tensor],
    dy: list[Tensor],
    table: Tensor,
    gate: Tensor | None,
    blocks: int,
    block: int,
    first: bool,
    fields: list[int],
    seed: Tensor | None,
    offset: Tensor | None,
    x_format: list[int],
    dy_format: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The update of pairs of values or codes, rounded once into a dtype. Not differentiable."""
    where = (x, dy, table, gate, blocks, block, first)
    if fields:
        sums: Tensor = _ops.sparse_weight_grad_accumulate(*where, fields, seed, offset, x_format, dy_format)
        return round_to(sums, dtype)
    return _ops.sparse_weight_grad(*where, x_format, dy_format, dtype)  # type: ignore[no-any-return]


@_ops.constant
def values_dtype(own: str, *fields: list[int]) -> str:
    """The name of the dtype in which values of `own`, if any, and codes are multiplied; "" if none serves."""
    formats = [_ops.format_of(tuple(each)) for each in fields if each]
    dtype = container_of(formats, getattr(torch, own) if own else None)
    return "" if dtype is None else str(dtype).removeprefix("torch.")
