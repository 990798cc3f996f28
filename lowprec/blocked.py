"""Products whose operands are rounded in blocks, along the dimension that each of the three products sums over.

For y = a · b the blocks of a and b lie along the contraction. The backward products sum over other dimensions: there
dY, a and b are rounded again, from full precision, along those. So every factor comes twice, and a function of its own
takes each to its place. A role that takes no block format is rounded once, as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec import _ops
from lowprec.roles import AS_IT_IS, Role, Roles, is_learnt, round_both


class Factor(NamedTuple):
    """An operand, and the role by which it is yet to be rounded in blocks; None if it is as it shall be."""

    x: Tensor
    role: str | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Factor:
        """The same operand in another shape."""
        return Factor(function(self.x), self.role)


class Pair(NamedTuple):
    """An operand as the forward product sees it, and as the other operand's gradient does."""

    forward: Tensor
    again: Tensor


def factor(roles: Roles, x: Tensor, learnt: bool | None = None) -> Factor:
    """An operand, rounded unless that is to be done in blocks; the gradient of a weight is rounded once formed."""
    is_weight = is_learnt(x) if learnt is None else learnt
    name = "weight" if is_weight else "activation"
    if not x.is_floating_point() or not roles.in_blocks(name):
        return Factor(roles.weight(x) if is_weight else roles.activation(x), None)
    return Factor(roles.learnt(x) if is_weight else x, name)


def pair(roles: Roles, operand: Factor, dim: int, other: int, parts: int = 1, other_parts: int = 1) -> Pair:
    """Round an operand along `dim` and, for the other operand's gradient, along `other`.

    A dimension made of several parts, which no sum crosses, is rounded along each of them.
    """
    if operand.role is None:
        return Pair(_narrowed(operand.x), _narrowed(operand.x))
    first, second = roles.forward(operand.role), uncounted(roles.forward(operand.role))
    forward = _narrowed(_along(operand.x, first, dim, parts))
    if not torch.is_grad_enabled():
        return Pair(forward, forward)
    return Pair(forward, _narrowed(_along(operand.x, second, other, other_parts)))


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
    return round_both(bias.expand_as(y), AS_IT_IS, role)


def times(roles: Roles, a: Factor, b: Factor, alpha: float = 1, dtype: torch.dtype | None = None) -> Tensor:
    """A product alpha · a · b of [..., M, K] and [..., K, N], not finished; a matrix b meets all rows of a as one.

    With a dtype, a is taken to it once it is rounded.
    """
    if b.x.dim() == 2 and a.x.dim() > 2:
        rows = a.x.shape[:-1]
        flat = a.map(lambda x: x.reshape(-1, x.shape[-1]))
        return times(roles, flat, b, alpha, dtype).reshape(*rows, b.x.shape[-1])
    batch = torch.broadcast_shapes(a.x.shape[:-2], b.x.shape[:-2])  # type: ignore[no-untyped-call]
    a, b = (each.map(lambda x: x.expand(*batch, *x.shape[-2:])) for each in (a, b))
    left = pair(roles, a, -1, -2)
    if dtype is not None:
        left = Pair(left.forward.to(dtype), left.again.to(dtype))
    return matmul(left, pair(roles, b, -2, -1), gradient_roles(roles), alpha)


def matmul(a: Pair, b: Pair, gradients: tuple[Role, Role], alpha: float = 1) -> Tensor:
    """The product of rounded operands of one batch shape."""
    y: Tensor = Matmul.apply(*a, *b, *gradients[0][:4], *gradients[1][:4], float(alpha))  # type: ignore[no-untyped-call]
    return y


class Matmul(torch.autograd.Function):
    """alpha · a · b, with other operands in the place of a and b where gradients are formed."""

    @staticmethod
    def forward(
        a: Tensor,
        a_again: Tensor,
        b: Tensor,
        b_again: Tensor,
        first: str | None,
        first_stats: Tensor | None,
        first_codes: Tensor | None,
        first_state: Tensor | None,
        second: str | None,
        second_stats: Tensor | None,
        second_codes: Tensor | None,
        second_state: Tensor | None,
        alpha: float,
    ) -> Tensor:
        y = torch.matmul(a, b)
        return y if alpha == 1 else y * alpha

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[3])
        ctx.first, ctx.second, ctx.alpha = inputs[4:8], inputs[8:12], inputs[12]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            dy = round_both(grads[0], Role(*ctx.first)._replace(dim=-1), AS_IT_IS)
            da = _scaled(torch.matmul(dy, b.mT), ctx.alpha)
        if ctx.needs_input_grad[2]:
            dy = round_both(grads[0], Role(*ctx.second)._replace(dim=-2), AS_IT_IS)
            db = _scaled(torch.matmul(a.mT, dy), ctx.alpha)
        return da, None, db, *[None] * 10


class Geometry(NamedTuple):
    """What a convolution is apart from its operands, in the order of `torch.convolution`."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def convolve(roles: Roles, x: Factor, weight: Factor, how: Geometry) -> Tensor:
    """A convolution of [N, channels, ...], not finished.

    Blocks lie along the channels that a product sums over, at each place of the kernel. The gradient of the weight
    sums over the batch and over places, which shift against each other: its blocks lie along the batch, which does not.
    """
    inputs = pair(roles, x, 1, 0, how.groups)
    summed = (0, 1, how.groups, 1) if how.transposed else (1, 0, 1, how.groups)
    weights = pair(roles, weight, *summed)
    first, second = gradient_roles(roles)
    y: Tensor = Convolution.apply(*inputs, *weights, *first[:4], *second[:4], *how)  # type: ignore[no-untyped-call]
    return y


class Convolution(torch.autograd.Function):
    """As `Matmul`, for `torch.convolution`."""

    @staticmethod
    def forward(
        x: Tensor,
        x_again: Tensor,
        weight: Tensor,
        weight_again: Tensor,
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
    ) -> Tensor:
        return torch.convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], inputs[3])
        ctx.first, ctx.second, ctx.how = inputs[4:8], inputs[8:12], inputs[12:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        groups = ctx.how[-1]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dy = _along(grads[0], Role(*ctx.first), 1, groups)
            dx = _ops.convolution_back(dy, x, weight, None, *ctx.how, [True, False, False])[0]
        if ctx.needs_input_grad[2]:
            dy = _along(grads[0], Role(*ctx.second), 0, 1)
            dweight = _ops.convolution_back(dy, x, weight, None, *ctx.how, [False, True, False])[1]
        return dx, None, dweight, *[None] * 15


def uncounted(role: Role) -> Role:
    """The same role for a tensor that has been counted."""
    return role._replace(stats=None, codes=None)


def _along(x: Tensor, role: Role, dim: int, parts: int) -> Tensor:
    """Round along a dimension, or along each of the parts that it is made of."""
    if parts == 1:
        return round_both(x, role._replace(dim=dim), AS_IT_IS)
    apart = x.unflatten(dim, (parts, -1))  # type: ignore[no-untyped-call]
    return round_both(apart, role._replace(dim=dim + 1), AS_IT_IS).flatten(dim, dim + 1)


def _narrowed(x: Tensor) -> Tensor:
    """As autocast would hand it to a product."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _scaled(x: Tensor, alpha: float) -> Tensor:
    return x if alpha == 1 else x * alpha
