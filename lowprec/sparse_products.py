"""Block-sparse products with their operands and gradients rounded.

A handler as those of `lowprec.products`. Float formats round each operand once. Blocks of a format lie along what each
of the three products sums over, inside the layer's own blocks; accumulators of a policy go before the layer's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowprec import _ops, blocksparse
from lowprec.accumulate import AccumulatorLike, BackwardLike, is_stochastic
from lowprec.accumulator import LEAVES
from lowprec.bias import Rule
from lowprec.block_tables import Tables
from lowprec.blocked import factor, finish, gradient_roles, pair, term
from lowprec.blocksparse import apply_product, declared, flatten, gradients, unflatten
from lowprec.cast import draw
from lowprec.formats import BlockFormat
from lowprec.policy import ROLES
from lowprec.roles import AS_IT_IS, Role, Roles, round_both
from lowprec.sums import Draw, Sums, operand_dtypes


def matmul(
    roles: Roles,
    function: Any,
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
    """As `blocksparse.matmul`: x takes the role of an activation, w that of a weight; gates are not rounded."""
    how: dict[str, Any] = {"first": first, "transpose": transpose, "dtype": dtype}
    if roles.by_contraction:
        sums = _sums(roles, accumulator, backward)
        y = _by_contraction(roles, x, w, gate, tables, sums, (seed, offset, generator), **how)
    else:
        how |= {"accumulator": accumulator, "backward": backward}
        how |= {"seed": seed, "offset": offset, "generator": generator}
        y = function(roles.operand(x), roles.weight(w), gate, tables, **how)
    return _finish(roles, y, bias, first)


def _finish(roles: Roles, y: Tensor, bias: Tensor | None, first: bool) -> Tensor:
    """Add a bias, whose gradient sums the rounded dY, and round dY unless that is done in blocks."""
    if bias is not None:
        shaped = blocksparse.beside(roles.learnt(bias).to(y.dtype), y, first)
        dim = 0 if first else -1
        y = y + (term(roles, shaped, y, dim) if roles.in_blocks("activation_grad") else roles.spread(shaped, y))
    return finish(roles, y)


def _sums(roles: Roles, accumulator: AccumulatorLike | None, backward: BackwardLike) -> Sums:
    """The policy's accumulators; where it has none, the product's own."""
    given = backward if isinstance(backward, tuple | list) else (backward, backward)
    own = [None if each is None else str(each) for each in (accumulator, *(each or accumulator for each in given))]
    sums = roles.sums(False, True)
    return sums._replace(
        forward=own[0] if sums.forward is None else sums.forward,
        left=own[1] if sums.left is None else sums.left,
        right=own[2] if sums.right is None else sums.right,
    )


def _by_contraction(
    roles: Roles,
    x: Tensor,
    w: Tensor,
    gate: Tensor | None,
    tables: Tables,
    sums: Sums,
    words: Any,
    *,
    first: bool,
    transpose: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """A product, not finished, that knows what each of its three products sums over."""
    if roles.blocks:
        _require_blocks_inside(roles, w.shape[-1], first)
    flat, rest = flatten(x, first)
    features, tokens = (0, 1) if first else (1, 0)
    inputs = pair(roles, factor(roles, flat), features, tokens)
    weights = pair(roles, factor(roles, w, True), *((2, 1) if transpose else (1, 2)))
    of_dx, of_dw = gradient_roles(roles)
    drawn = sums.draw(inputs.forward) if sums.state is not None else _own_draw(inputs.forward, sums, words)
    how = (*tables, transpose, first, *of_dx[:4], *of_dw[:4], *sums[:6], *drawn, dtype or inputs.forward.dtype)
    y: Tensor = SparseMatmul.apply(*inputs, *weights, gate, *how)  # type: ignore[no-untyped-call]
    return unflatten(y, rest, first)


def _own_draw(x: Tensor, sums: Sums, words: Any) -> Draw:
    """Seed and offset of a product that brings its accumulators along."""
    seed, offset, generator = words
    each = [declared(text, x.dtype, x.device) for text in sums[:3]]
    return draw(x, "stochastic" if any(map(is_stochastic, each)) else "nearest_even", seed, offset, generator)


class SparseMatmul(torch.autograd.Function):
    """A block-sparse product with other operands in the place of x and w where gradients are formed."""

    @staticmethod
    def forward(
        x: Tensor,
        x_again: Tensor | None,
        w: Tensor,
        w_again: Tensor | None,
        gate: Tensor | None,
        fprop: Tensor,
        bprop: Tensor,
        update: Tensor,
        shape: tuple[int, int],
        transpose: bool,
        first: bool,
        of_dx: str | None,
        of_dx_stats: Tensor | None,
        of_dx_codes: Tensor | None,
        of_dx_state: Tensor | None,
        of_dw: str | None,
        of_dw_stats: Tensor | None,
        of_dw_codes: Tensor | None,
        of_dw_state: Tensor | None,
        forward: str | None,
        left: str | None,
        right: str | None,
        left_rule: str | None,
        right_rule: str | None,
        gradient_rule: str | None,
        seed: Tensor | None,
        offset: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        # Spelled out: dynamo tells a forward without ctx by the number of its parameters.
        table, outputs = (bprop, shape[0]) if transpose else (fprop, shape[1])
        x, w, fields, words = _prepared(x, w, forward, (left_rule, right_rule), (seed, offset))
        return blocksparse.product(x, w, table, gate, outputs, first, transpose, fields, *words, [], [], dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, x_again, w, w_again, gate, *tables = inputs[:8]
        again = x if x_again is None else x_again, w if w_again is None else w_again
        ctx.save_for_backward(*again, w, gate, *tables)
        ctx.shape, ctx.transpose, ctx.first, ctx.of_dx, ctx.of_dw = *inputs[8:11], inputs[11:15], inputs[15:19]
        ctx.sums, ctx.words = inputs[19:25], inputs[25:27]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_again, w, gate, fprop, bprop, update = ctx.saved_tensors  # once: checkpointing allows no second time
        tables, sums = Tables(fprop, bprop, update, ctx.shape), Sums(*ctx.sums)
        features, tokens = (0, 1) if ctx.first else (1, 0)
        dx = dw = dgate = None
        if ctx.needs_input_grad[0]:
            dy = round_both(grads[0], Role(*ctx.of_dx)._replace(dim=features), AS_IT_IS)
            rules, words = (sums.gradient_rule, sums.right_rule), _after(ctx.words, 1)
            dx = _again(dy, w_again, gate, tables, not ctx.transpose, ctx.first, sums.left, rules, words, x.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[4]:
            dy = round_both(grads[0], Role(*ctx.of_dw)._replace(dim=tokens), AS_IT_IS)
            rules, words = (sums.left_rule, sums.gradient_rule), _after(ctx.words, 2)
            a, b, fields, words = _prepared(x, dy, sums.right, rules, words)
            how = (*tables, *w.shape[:2], ctx.first, fields, *words, True)
            dw, dgate = gradients((b, a) if ctx.transpose else (a, b), w, gate, how, ctx.needs_input_grad[4])
        return dx, None, dw, None, dgate, *[None] * 23


def _again(
    a: Tensor,
    w: Tensor,
    gate: Tensor | None,
    tables: Tables,
    transpose: bool,
    first: bool,
    accumulator: str | None,
    rules: tuple[str | None, str | None],
    words: Draw,
    dtype: torch.dtype,
) -> Tensor:
    """A product in a backward pass, differentiable once more."""
    a, w, fields, words = _prepared(a, w, accumulator, rules, words)
    if not torch.is_grad_enabled():
        table, outputs = tables.direction(transpose)
        return blocksparse.product(a, w, table, gate, outputs, first, transpose, fields, *words, [], [], dtype)
    how = (transpose, first, fields, fields, fields, *words, True, dtype)
    return apply_product(a, w, gate, *tables, *how)


def _prepared(
    a: Tensor, b: Tensor, accumulator: str | None, rules: tuple[str | None, str | None], words: Draw
) -> tuple[Tensor, Tensor, list[int], Draw]:
    """Operands in the dtypes in which an accumulator multiplies them, its integers, and its random words if any."""
    fields = declared(accumulator, a.dtype, a.device)
    left, right = _dtypes(accumulator, *rules, a.dtype)
    return a.to(left), b.to(right), fields, words if is_stochastic(fields) else (None, None)


def _dtypes(
    accumulator: str | None, left: str | None, right: str | None, dtype: torch.dtype
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which operands that were rounded by rules are multiplied: narrow ones by tensor cores."""
    if accumulator is None or not _has_own_operands(accumulator):
        return dtype, dtype
    first, second = operand_dtypes(accumulator, left, right, dtype).split()
    return getattr(torch, first), getattr(torch, second)


def _has_own_operands(accumulator: str) -> bool:
    """Whether leaves multiply narrow dtypes alone, as tensor cores do."""
    return declared(accumulator, torch.float32, torch.device("cpu"))[0] > LEAVES.index("exact")


def _after(words: Draw, places: int) -> Draw:
    seed, offset = words
    if seed is None:
        return None, None
    return seed, torch.tensor(places, device="cpu") if offset is None else offset + places


# Blocks of a format within the blocks of a layer.


def _require_blocks_inside(roles: Roles, block: int, first: bool) -> None:
    """ValueError for a format whose blocks cross those of the layer, of which some are absent."""
    for name, rule in zip(ROLES[:3], roles.formats, strict=False):
        side = None if rule is None else _crosses(rule, block, name, first)
        if side:
            raise ValueError(
                f"{name}: blocks of {side} in {rule} cross a block-sparse layer's blocks of {block}, along which its "
                "products sum: take a format whose blocks divide them, or override the module with another policy"
            )


@_ops.constant
def _crosses(rule: str, block: int, name: str, first: bool) -> int:
    """The size of a format's blocks along features, if that does not divide the layer's; 0 if it does."""
    fmt = Rule.parse(rule).fmt
    if not isinstance(fmt, BlockFormat) or fmt.block == "tensor":
        return 0
    if isinstance(fmt.block, tuple):
        sides = fmt.block if name == "weight" else fmt.block[:1] if first else fmt.block[1:]
    else:
        sides = (int(fmt.block),)
    return next((side for side in sides if block % side), 0)
