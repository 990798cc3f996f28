"""Products that know what each of their three products sums over: for operands in blocks, and for accumulators.

For y = a · b the blocks of a and b lie along the contraction. The backward products sum over other dimensions: there
dY, a and b are rounded again, from full precision, along those. So every factor comes twice, and a function of its own
takes each to its place. A role that takes no block format is rounded once, as everywhere else. The same function sums
up by the accumulators that the policy gives each of the three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec import _ops, windows
from lowprec.modes import narrowed
from lowprec.roles import AS_IT_IS, Role, Roles, is_learnt, round_both
from lowprec.sums import Sums, product
from lowprec.windows import Geometry, Multiply


class Factor(NamedTuple):
    """An operand, the role by which it is yet to be rounded in blocks, or None, and whether it is a weight."""

    x: Tensor
    role: str | None
    is_weight: bool

    def map(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """The same operand in another shape."""
        return self._replace(x=function(self.x))


class Pair(NamedTuple):
    """An operand as the forward product sees it, and as the other operand's gradient does if that is not the same."""

    forward: Tensor
    again: Tensor | None = None


def factor(roles: Roles, x: Tensor, learnt: bool | None = None) -> Factor:
    """An operand, rounded unless that is to be done in blocks; the gradient of a weight is rounded once formed."""
    is_weight = is_learnt(x) if learnt is None else learnt
    name = "weight" if is_weight else "activation"
    if not x.is_floating_point() or not roles.in_blocks(name):
        return Factor(roles.weight(x) if is_weight else roles.activation(x), None, is_weight)
    return Factor(roles.learnt(x) if is_weight else x, name, is_weight)


def pair(roles: Roles, operand: Factor, dim: int, other: int, parts: int = 1, other_parts: int = 1) -> Pair:
    """Round an operand along `dim` and, for the other operand's gradient, along `other`.

    A dimension made of several parts, which no sum crosses, is rounded along each of them.
    """
    if operand.role is None:
        return Pair(narrowed(operand.x))
    first, second = roles.forward(operand.role), uncounted(roles.forward(operand.role))
    forward = narrowed(_along(operand.x, first, dim, parts))
    if not torch.is_grad_enabled():
        return Pair(forward)
    return Pair(forward, narrowed(_along(operand.x, second, other, other_parts)))


def settle(roles: Roles, operand: Factor) -> Tensor:
    """The operand of a product that has no form here: its blocks lie as its rule says, along the last dimension."""
    return operand.x if operand.role is None else round_both(operand.x, roles.forward(operand.role), AS_IT_IS)


def gradient_roles(roles: Roles) -> tuple[Role, Role]:
    """The roles of dY in the two backward products; none where dY is not rounded in blocks."""
    if not roles.in_blocks("activation_grad"):
        return AS_IT_IS, AS_IT_IS
    return roles.backward("activation_grad"), uncounted(roles.backward("activation_grad"))


def finish(roles: Roles, y: Tensor, bias: Tensor | None = None, dim: int = -1) -> Tensor:
    """Add a bias, whose gradient sums the dY that the gradient of the first operand sees; round a plain dY."""
    if not roles.in_blocks("activation_grad"):
        return roles.result(y, bias)
    return y if bias is None else y + term(roles, roles.learnt(bias).to(y.dtype), y, dim)


def term(roles: Roles, bias: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    """A bias in the shape of a product, for the sum of whose dY it takes that rounded along `dim`."""
    role = uncounted(roles.backward("activation_grad"))._replace(dim=dim)
    return round_both(roles.spread(bias, y).expand_as(y), AS_IT_IS, role)


def times(roles: Roles, a: Factor, b: Factor, alpha: float = 1, dtype: torch.dtype | None = None) -> Tensor:
    """A product alpha · a · b of [..., M, K] and [..., K, N], not finished; a matrix b meets all rows of a as one.

    With a dtype, a is taken to it once it is rounded.
    """
    if b.x.dim() == 2 and a.x.dim() > 2:
        rows = a.x.shape[:-1]
        flat = a.map(lambda x: x.reshape(-1, x.shape[-1]))
        return times(roles, flat, b, alpha, dtype).reshape(*rows, b.x.shape[-1])
    if a.x.shape[:-2] != b.x.shape[:-2]:
        if roles.accumulators.of_products:
            return _times_apart(roles, a, b, alpha, dtype)
        batch = torch.broadcast_shapes(a.x.shape[:-2], b.x.shape[:-2])  # type: ignore[no-untyped-call]
        a, b = (each.map(lambda x: x.expand(*batch, *x.shape[-2:])) for each in (a, b))
    left = pair(roles, a, -1, -2)
    if dtype is not None:
        left = Pair(left.forward.to(dtype), None if left.again is None else left.again.to(dtype))
    sums = roles.sums(a.is_weight, b.is_weight)
    return matmul(left, pair(roles, b, -2, -1), gradient_roles(roles), sums, alpha)


def _times_apart(roles: Roles, a: Factor, b: Factor, alpha: float, dtype: torch.dtype | None) -> Tensor:
    """The same where operands are broadcast, so that the sum over what one lacks is part of its gradient's contraction.

    Batch dimensions that b lacks become rows of a, and those that a lacks columns of b.
    """
    n = max(a.x.dim(), b.x.dim()) - 2
    a, b = (each.map(lambda x: x.reshape(*[1] * (n + 2 - x.dim()), *x.shape)) for each in (a, b))
    batch = list(torch.broadcast_shapes(a.x.shape[:-2], b.x.shape[:-2]))  # type: ignore[no-untyped-call]
    rows = [d for d in range(n) if b.x.shape[d] == 1]
    columns = [d for d in range(n) if a.x.shape[d] == 1 and d not in rows]
    shared = [d for d in range(n) if d not in rows and d not in columns]
    left = a.map(lambda x: x.permute(shared + columns + rows + [n, n + 1]).flatten(len(shared), -2))
    right = b.map(lambda x: x.permute(shared + rows + [n] + columns + [n + 1]).flatten(len(shared) + len(rows) + 1))
    right = right.map(lambda x: x.flatten(len(shared), -2))
    y = times(roles, left, right, alpha, dtype)
    order = [*shared, *rows, n, *columns, n + 1]
    sizes = [*batch, a.x.shape[-2], b.x.shape[-1]]
    return y.reshape([sizes[d] for d in order]).permute([order.index(d) for d in range(n + 2)])


def matmul(a: Pair, b: Pair, gradients: tuple[Role, Role], sums: Sums, alpha: float = 1) -> Tensor:
    """The product of rounded operands of one batch shape."""
    draw = sums.draw(a.forward)
    first, second = gradients
    if a.forward is b.forward:  # torch's compiler refuses to see one tensor twice
        b = b._replace(forward=b.forward.view(b.forward.shape))
    y: Tensor = Matmul.apply(*a, *b, *first[:4], *second[:4], float(alpha), *sums[:6], *draw)  # type: ignore[no-untyped-call]
    return y


class Matmul(torch.autograd.Function):
    """alpha · a · b, with other operands in the place of a and b where gradients are formed."""

    @staticmethod
    def forward(
        a: Tensor,
        a_again: Tensor | None,
        b: Tensor,
        b_again: Tensor | None,
        first: str | None,
        first_stats: Tensor | None,
        first_codes: Tensor | None,
        first_state: Tensor | None,
        second: str | None,
        second_stats: Tensor | None,
        second_codes: Tensor | None,
        second_state: Tensor | None,
        alpha: float,
        forward: str | None,
        left: str | None,
        right: str | None,
        left_rule: str | None,
        right_rule: str | None,
        gradient_rule: str | None,
        seed: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        sums = Sums(forward, left, right, left_rule, right_rule, gradient_rule)
        return _scaled(product(a, b, sums, seed, offset), alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, a_again, b, b_again = inputs[:4]
        ctx.save_for_backward(a if a_again is None else a_again, b if b_again is None else b_again)
        ctx.first, ctx.second, ctx.alpha = inputs[4:8], inputs[8:12], inputs[12]
        ctx.sums, ctx.seed, ctx.offset = inputs[13:19], *inputs[19:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        sums = Sums(*ctx.sums)
        da = db = None
        if ctx.needs_input_grad[0]:
            dy = round_both(grads[0], Role(*ctx.first)._replace(dim=-1), AS_IT_IS)
            da = _scaled(again(dy, b.mT, sums.of_left(), ctx.seed, _after(ctx.offset, 1)), ctx.alpha)
        if ctx.needs_input_grad[2]:
            dy = round_both(grads[0], Role(*ctx.second)._replace(dim=-2), AS_IT_IS)
            db = _scaled(again(a.mT, dy, sums.of_right(), ctx.seed, _after(ctx.offset, 2)), ctx.alpha)
        return da, None, db, *[None] * 18


def again(a: Tensor, b: Tensor, sums: Sums, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """A product in a backward pass, differentiable once more."""
    if not sums.has_any:
        return torch.matmul(a, b)
    if not torch.is_grad_enabled():
        return product(a, b, sums, seed, offset)
    y: Tensor = Matmul.apply(a, None, b, None, *[None] * 8, 1.0, *sums[:6], seed, offset)  # type: ignore[no-untyped-call]
    return y


def _after(offset: Tensor | None, places: int) -> Tensor | None:
    return None if offset is None else offset + places


def convolve(roles: Roles, x: Factor, weight: Factor, how: Geometry) -> Tensor:
    """A convolution of [N, channels, ...], not finished.

    Blocks lie along the channels that a product sums over, at each place of the kernel. The gradient of the weight
    sums over the batch and over places, which shift against each other: its blocks lie along the batch, which does not.
    """
    inputs = pair(roles, x, 1, 0, how.groups)
    summed = (0, 1, how.groups, 1) if how.transposed else (1, 0, 1, how.groups)
    weights = pair(roles, weight, *summed)
    first, second = gradient_roles(roles)
    sums = roles.sums(x.is_weight, weight.is_weight)
    rest = (*how, *sums[:6], *sums.draw(x.x))
    y: Tensor = Convolution.apply(*inputs, *weights, *first[:4], *second[:4], *rest)  # type: ignore[no-untyped-call]
    return y


class Convolution(torch.autograd.Function):
    """As `Matmul`, for `torch.convolution`; what an accumulator sums up is the matrix product of `windows`."""

    @staticmethod
    def forward(
        x: Tensor,
        x_again: Tensor | None,
        weight: Tensor,
        weight_again: Tensor | None,
        first: str | None,
        first_stats: Tensor | None,
        first_codes: Tensor | None,
        first_state: Tensor | None,
        second: str | None,
        second_stats: Tensor | None,
        second_codes: Tensor | None,
        second_state: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
        forward: str | None,
        left: str | None,
        right: str | None,
        left_rule: str | None,
        right_rule: str | None,
        gradient_rule: str | None,
        seed: Tensor | None,
        offset: Tensor | None,
    ) -> Tensor:
        how = Geometry(stride, padding, dilation, transposed, output_padding, groups)
        if forward is None:
            return torch.convolution(x, weight, None, *how)
        sums = Sums(forward, left, right, left_rule, right_rule, gradient_rule)
        return windows.result(x, weight, how, _by(sums.turned(), seed, offset))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, a_again, b, b_again = inputs[:4]
        ctx.save_for_backward(a if a_again is None else a_again, b if b_again is None else b_again)
        ctx.first, ctx.second, ctx.how = inputs[4:8], inputs[8:12], inputs[12:18]
        ctx.sums, ctx.seed, ctx.offset = inputs[18:24], *inputs[24:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        how, sums = Geometry(*ctx.how), Sums(*ctx.sums)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dy = _along(grads[0], Role(*ctx.first), 1, how.groups)
            if sums.left is None:
                dx = _ops.convolution_back(dy, x, weight, None, *how, [True, False, False])[0]
            else:
                multiply = _by(sums.of_left().turned(), ctx.seed, _after(ctx.offset, 1))
                dx = windows.input_gradient(dy, x.shape[2:], weight, how, multiply)
        if ctx.needs_input_grad[2]:
            dy = _along(grads[0], Role(*ctx.second), 0, 1)
            if sums.right is None:
                dweight = _ops.convolution_back(dy, x, weight, None, *how, [False, True, False])[1]
            else:
                turned = sums.of_right() if how.transposed else sums.of_right().turned()
                multiply = _by(turned, ctx.seed, _after(ctx.offset, 2))
                dweight = windows.weight_gradient(dy, x, weight.shape, how, multiply)
        return dx, None, dweight, *[None] * 23


def _by(sums: Sums, seed: Tensor | None, offset: Tensor | None) -> Multiply:
    """The product of a convolution's matrices, a weight's or the smaller image's to the left."""
    return lambda a, b: again(a, b, sums, seed, offset)


def uncounted(role: Role) -> Role:
    """The same role for a tensor that has been counted."""
    return role._replace(stats=None, codes=None)


def _along(x: Tensor, role: Role, dim: int, parts: int) -> Tensor:
    """Round along a dimension, or along each of the parts that it is made of."""
    if parts == 1:
        return round_both(x, role._replace(dim=dim), AS_IT_IS)
    apart = x.unflatten(dim, (parts, -1))  # type: ignore[no-untyped-call]
    return round_both(apart, role._replace(dim=dim + 1), AS_IT_IS).flatten(dim, dim + 1)


def _scaled(x: Tensor, alpha: float) -> Tensor:
    return x if alpha == 1 else x * alpha
