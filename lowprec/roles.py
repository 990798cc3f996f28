"""Roles: rounding a product's operands and gradients, and keeping statistics of what that did."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lowprec import _ops
from lowprec.cast import QuickApply, fields_of
from lowprec.eager_statistics import FIELDS
from lowprec.formats import SPECIALS
from lowprec.policy import ROLES, Formats
from lowprec.rounding import Rounding

STATS = (len(ROLES), len(FIELDS))
"""Shape of one op's statistics: a row for each role, as `quantize_statistics` fills it."""
CODES = (len(ROLES), 256)
"""Shape of a module's histograms: a row for each role, of the codes of formats up to 8 bits."""

_NEAREST_EVEN = Rounding.nearest_even.number
_IEEE = SPECIALS.index("ieee")


class Counters(NamedTuple):
    """Where a product counts, on its operands' device: float64 of shape `STATS` and int64 of shape `CODES`.

    Or where a tensor of one role does: a row of either.
    """

    stats: Tensor
    codes: Tensor


class Roles:
    """Rounds the operands and gradients of one product by their roles.

    Args:
        formats: the format of each role, or None.
        counters: where to count; None counts nothing.
        again: whether this is a recomputation, whose forward pass has been counted.
    """

    def __init__(self, formats: Formats, counters: Counters | None = None, *, again: bool = False) -> None:
        self.formats = formats
        self.backward_counters = counters
        self.forward_counters = None if again else counters

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
        forwards = self._role(forward, self.forward_counters)
        return round_both(x, *forwards, *self._role(backward, self.backward_counters))

    def _role(self, role: str | None, counters: Counters | None) -> tuple[str | None, Counters | None]:
        """A role's format and its counters."""
        index = -1 if role is None else ROLES.index(role)
        format = None if role is None else self.formats[index]
        if format is None or counters is None:
            return format, None
        return format, Counters(counters.stats[index], counters.codes[index])


def is_learnt(x: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(x, Parameter) or isinstance(x._base, Parameter)


def round_both(
    x: Tensor,
    forward: str | None,
    forward_counters: Counters | None,
    backward: str | None,
    backward_counters: Counters | None,
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
        counters = (*(forward_counters or (None, None)), *(backward_counters or (None, None)))
        values: Tensor = function.apply(x, forward, backward, *counters)  # type: ignore[no-untyped-call]
        return values
    return x if forward is None else _round(x, forward, *(forward_counters or (None, None)))


def _round(x: Tensor, format: str, stats: Tensor | None, codes: Tensor | None) -> Tensor:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        fields_of(format, torch.get_autocast_dtype(x.device.type))
    fields = fields_of(format, x.dtype)
    args = (x, fields, _NEAREST_EVEN, fields[3] != _IEEE, None, None, 32)
    bits = 1 + fields[0] + fields[1]
    histogram = None if codes is None or bits > 8 else codes[: 1 << bits]
    quantized = _ops.quantize(*args) if stats is None else _ops.quantize_statistics(*args, None, stats, histogram)
    values: Tensor = quantized
    return values


class RoundBoth(torch.autograd.Function):
    """`round_both` as a differentiable op."""

    @staticmethod
    def forward(
        x: Tensor,
        forward: str | None,
        backward: str | None,
        forward_stats: Tensor | None,
        forward_codes: Tensor | None,
        backward_stats: Tensor | None,
        backward_codes: Tensor | None,
    ) -> Tensor:
        # Detached, the unrounded tensor is neither a copy nor a view, so that what follows may change it in place.
        return x.detach() if forward is None else _round(x, forward, forward_stats, forward_codes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.format, ctx.counters = inputs[2], inputs[5:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _round_gradient(ctx, grads[0]), None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return EagerRoundBoth.apply(*args), in_dims[0]


def _round_gradient(ctx: Any, grad: Tensor) -> Tensor:
    stats, codes = ctx.counters
    return round_both(grad, ctx.format, None if stats is None else Counters(stats, codes), None, None)


class EagerRoundBoth(QuickApply, RoundBoth):
    """`RoundBoth` with what `torch.compile` refuses to trace: sparse gradients and forward mode."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not grads[0].is_sparse:
            return RoundBoth.backward(ctx, *grads)
        # An embedding's sparse gradient lists a row once for every use: it is formed when the uses are summed.
        formed = grads[0].coalesce().clone()
        formed._values().copy_(_round_gradient(ctx, formed.values()))
        return formed, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[0]
        return tangent.clone()
