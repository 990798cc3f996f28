"""Roles: rounding a product's operands and gradients, and counting what that did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lowprec import _ops
from lowprec.cast import QuickApply, fields_of
from lowprec.formats import SPECIALS
from lowprec.policy import ROLES, Formats
from lowprec.rounding import Rounding

COUNTERS = (1 + len(ROLES), 4)
"""Shape of one op's counters: row 0 holds the calls, then a row for each role, as `quantize_count` fills it."""

_NEAREST_EVEN = Rounding.nearest_even.number
_IEEE = SPECIALS.index("ieee")


class Roles:
    """Rounds the operands and gradients of one product by their roles.

    Args:
        formats: the format of each role, or None.
        counts: where to count, int64 of shape `COUNTERS`, on the operands' device; None counts nothing.
        again: whether this is a recomputation, whose forward pass has been counted.
    """

    def __init__(self, formats: Formats, counts: Tensor | None = None, *, again: bool = False) -> None:
        self.formats = formats
        self.backward_counts = counts
        self.forward_counts = None if again else counts

    def operand(self, x: Tensor) -> Tensor:
        """Round an operand: as a weight if it is learnt, else as an activation. Integers and masks stay."""
        return self.weight(x) if is_learnt(x) else self.activation(x)

    def activation(self, x: Tensor) -> Tensor:
        return self._round(x, "activation", None)

    def weight(self, x: Tensor) -> Tensor:
        """Round a weight, and its gradient dW once that is formed."""
        return self._round(x, "weight", "weight_grad")

    def learnt(self, x: Tensor) -> Tensor:
        """Leave a parameter as it is, and round its gradient once that is formed."""
        return self._round(x, None, "weight_grad")

    def rows(self, x: Tensor) -> Tensor:
        """Round rows that were looked up in a weight, and their gradient dY."""
        return self._round(x, "weight", "activation_grad")

    def gradient(self, y: Tensor) -> Tensor:
        """Leave a product as it is, and round its gradient dY."""
        return self._round(y, None, "activation_grad")

    def result(self, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """Finish a product: add the bias in the product's dtype, then round the gradient, which both then see."""
        return self.gradient(y if bias is None else y + self.learnt(bias).to(y.dtype))

    def _round(self, x: Tensor, forward: str | None, backward: str | None) -> Tensor:
        if not x.is_floating_point():
            return x
        forwards = self._role(forward, self.forward_counts)
        return round_both(x, *forwards, *self._role(backward, self.backward_counts))

    def _role(self, role: str | None, counts: Tensor | None) -> tuple[str | None, Tensor | None]:
        """A role's format and its counters."""
        index = -1 if role is None else ROLES.index(role)
        format = None if role is None else self.formats[index]
        return format, None if format is None or counts is None else counts[1 + index]


def is_learnt(x: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(x, Parameter) or isinstance(x._base, Parameter)


def round_both(
    x: Tensor,
    forward: str | None,
    forward_counts: Tensor | None,
    backward: str | None,
    backward_counts: Tensor | None,
) -> Tensor:
    """Round a tensor in the forward pass and its gradient in the backward pass, each to its own format or not at all.

    Nearest even; ieee formats overflow to infinity, others saturate. To any order of derivative, and in forward mode.

    Raises:
        ValueError: where x's dtype, or the one that autocast will cast x to, cannot hold a format.
    """
    if forward is None and backward is None:
        return x
    if backward is not None:
        fields_of(backward, x.dtype)
    if torch.is_grad_enabled():
        function = RoundBoth if torch.compiler.is_compiling() else EagerRoundBoth
        values: Tensor = function.apply(x, forward, backward, forward_counts, backward_counts)  # type: ignore[no-untyped-call]
        return values
    return x if forward is None else _round(x, forward, forward_counts)


def _round(x: Tensor, format: str, counts: Tensor | None) -> Tensor:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        fields_of(format, torch.get_autocast_dtype(x.device.type))
    fields = fields_of(format, x.dtype)
    args = (x, fields, _NEAREST_EVEN, fields[3] != _IEEE, None, None, 32)
    values: Tensor = _ops.quantize(*args) if counts is None else _ops.quantize_count(*args, counts)
    return values


class RoundBoth(torch.autograd.Function):
    """`round_both` as a differentiable op."""

    @staticmethod
    def forward(
        x: Tensor,
        forward: str | None,
        backward: str | None,
        forward_counts: Tensor | None,
        backward_counts: Tensor | None,
    ) -> Tensor:
        # Detached, the unrounded tensor is neither a copy nor a view, so that what follows may change it in place.
        return x.detach() if forward is None else _round(x, forward, forward_counts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.format, ctx.counts = inputs[2], inputs[4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return round_both(grads[0], ctx.format, ctx.counts, None, None), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return EagerRoundBoth.apply(*args), in_dims[0]


class EagerRoundBoth(QuickApply, RoundBoth):
    """`RoundBoth` with what `torch.compile` refuses to trace: sparse gradients and forward mode."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not grads[0].is_sparse:
            return RoundBoth.backward(ctx, *grads)
        # An embedding's sparse gradient lists a row once for every use: it is formed when the uses are summed.
        formed = grads[0].coalesce().clone()
        formed._values().copy_(round_both(formed.values(), ctx.format, ctx.counts, None, None))
        return formed, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[0]
        return tangent.clone()
