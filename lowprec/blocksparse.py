"""Block-sparse products with gradients, below `lowprec.sparse`.

A layer has I input and O output blocks of b features; its weights w [blocks, b, b] are the blocks that are present,
[in, out] within each, in row-major order of the mask. What is summed in which order: docs/sparse.md.
"""

from __future__ import annotations

from typing import Any

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
from lowprec.block_tables import Tables
from lowprec.cast import QuickApply, draw
from lowprec.eager import container_of
from lowprec.eager_sparse import by_gates, carrier_of
from lowprec.modes import announced, narrowed

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
    return by_gates(sums, gate).to(w.dtype), dgate


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
