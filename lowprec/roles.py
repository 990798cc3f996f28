"""Roles: rounding a product's operands and gradients, and keeping statistics of what that did."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lowprec import _ops
from lowprec.bias import draws_of, how_of, is_block, next_use
from lowprec.cast import QuickApply
from lowprec.eager_statistics import FIELDS
from lowprec.policy import ROLES, TORCHS_SUMS, Accumulators, Formats
from lowprec.slots import Slots
from lowprec.straight_through import ForwardMode
from lowprec.sums import TORCHS_OWN, Reducing, Sums

STATS = (len(ROLES), len(FIELDS))
"""Shape of one op's statistics: a row for each role, as `quantize_statistics` fills it."""
CODES = (len(ROLES), 256)
"""Shape of a module's histograms: a row for each role, of the codes of formats up to 8 bits."""


class Counters(NamedTuple):
    """Where a product counts, on its operands' device: float64 of shape `STATS` and int64 of shape `CODES`."""

    stats: Tensor
    codes: Tensor


class Role(NamedTuple):
    """How one tensor is rounded in one direction: its rule, a row of each counter, and the state of its cast.

    All None: not at all. `dim` is along which the blocks of a block format lie, if not as the rule has it.
    """

    rule: str | None = None
    stats: Tensor | None = None
    codes: Tensor | None = None
    state: Tensor | None = None
    dim: int | None = None


AS_IT_IS = Role()
"""The role of a tensor that is not rounded."""

STATEFUL = (*ROLES, "accumulator", "reduction")
"""What may have a state: the cast of each role, and sums that are rounded stochastically, of products and others."""

States = tuple[Slots | None, ...]
"""Where each of those has its states; None where it needs none."""


class Roles:
    """Rounds the operands and gradients of one product by their roles.

    Args:
        formats: the rule of each role, or None.
        counters: where to count; None counts nothing.
        again: whether this is a recomputation, whose forward pass has been counted.
        states: of the casts; None where no rule needs any, or there is nothing to measure.
        device: of the operands.
        blocks: whether any role takes a block format.
        accumulators: how sums are formed.
    """

    def __init__(
        self,
        formats: Formats,
        counters: Counters | None = None,
        *,
        again: bool = False,
        states: States | None = None,
        device: torch.device | None = None,
        blocks: bool = False,
        accumulators: Accumulators = TORCHS_SUMS,
    ) -> None:
        self.formats = formats
        self.backward_counters = counters
        self.forward_counters = None if again else counters
        self.states = states
        self.device = device
        self.blocks = blocks
        self.accumulators = accumulators
        self.by_contraction = blocks or accumulators.of_products
        self.left_out = False

    def sums(self, left_is_learnt: bool, right_is_learnt: bool) -> Sums:
        """How a product sums up; its gradients by whether they are of a weight."""
        if not self.accumulators.of_products:
            return TORCHS_OWN
        forward, input_grad, weight_grad, _ = self.accumulators
        left, right = (weight_grad if learnt else input_grad for learnt in (left_is_learnt, right_is_learnt))
        activation, weight, gradient, _ = self.formats
        of_left, of_right = (weight if learnt else activation for learnt in (left_is_learnt, right_is_learnt))
        state = self._state(STATEFUL.index("accumulator"))
        return Sums(forward, left, right, of_left, of_right, gradient, state)

    def leave_out(self) -> None:
        """Note that torch sums up what an accumulator was to."""
        self.left_out = self.left_out or self.accumulators.of_products

    def reducing(self) -> Reducing | None:
        """How the next op that is no product sums up; None for torch's own way."""
        accumulator = self.accumulators.reduction
        return None if accumulator is None else Reducing(accumulator, self._state(STATEFUL.index("reduction")))

    def spread(self, bias: Tensor, y: Tensor) -> Tensor:
        """A bias in the shape of a product, if its gradient is not summed torch's own way."""
        how = self.reducing()
        return bias if how is None else how.begin(y).spread(bias, y)

    def in_blocks(self, name: str) -> bool:
        """Whether a role takes a block format."""
        rule = self.formats[ROLES.index(name)]
        return rule is not None and is_block(rule)

    def operand(self, x: Tensor) -> Tensor:
        """Round an operand: as a weight if it is learnt, else as an activation. Integers and masks stay."""
        return self.weight(x) if is_learnt(x) else self.activation(x)

    def activation(self, x: Tensor, role: Role | None = None) -> Tensor:
        """Round an activation; one that comes in steps is given the role that all of its steps share."""
        return self._round(x, role or self.forward("activation"), AS_IT_IS) if x.is_floating_point() else x

    def weight(self, x: Tensor) -> Tensor:
        """Round a weight, and its gradient dW once that is formed."""
        return self._round(x, self.forward("weight"), self.backward("weight_grad")) if x.is_floating_point() else x

    def learnt(self, x: Tensor) -> Tensor:
        """Leave a parameter as it is, and round its gradient once that is formed."""
        return self._round(x, AS_IT_IS, self.backward("weight_grad"))

    def rows(self, x: Tensor) -> Tensor:
        """Round rows that were looked up in a weight, and their gradient dY."""
        return self._round(x, self.forward("weight"), self.backward("activation_grad"))

    def gradient(self, y: Tensor, role: Role | None = None) -> Tensor:
        """Leave a product as it is, and round its gradient dY; steps share a role that is given."""
        return self._round(y, AS_IT_IS, role or self.backward("activation_grad"))

    def result(self, y: Tensor, bias: Tensor | None = None, role: Role | None = None) -> Tensor:
        """Finish a product: add the bias in the product's dtype, then round the gradient, which both then see."""
        return self.gradient(y if bias is None else y + self.spread(self.learnt(bias).to(y.dtype), y), role)

    def forward(self, name: str) -> Role:
        """The role of the next tensor that is rounded in the forward pass."""
        return self._role(ROLES.index(name), self.forward_counters)

    def backward(self, name: str) -> Role:
        """The role of the next tensor whose gradient is rounded."""
        return self._role(ROLES.index(name), self.backward_counters)

    def _role(self, index: int, counters: Counters | None) -> Role:
        rule = self.formats[index]
        if rule is None:
            return AS_IT_IS
        state = self._state(index)
        if counters is None:
            return Role(rule, None, None, state)
        return Role(rule, counters.stats[index], counters.codes[index], state)

    def _state(self, index: int) -> Tensor | None:
        slots = None if self.states is None else self.states[index]
        return None if slots is None or self.device is None else slots.take(self.device)

    def _round(self, x: Tensor, forward: Role, backward: Role) -> Tensor:
        return round_both(x, forward, backward) if x.is_floating_point() else x


def is_learnt(x: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(x, Parameter) or isinstance(x._base, Parameter)


def round_both(x: Tensor, forward: Role, backward: Role) -> Tensor:
    """Round a tensor in the forward pass and its gradient in the backward pass, each by its own role.

    To any order of derivative, and in forward mode.

    Raises:
        ValueError: where x's dtype, or the one that autocast will cast x to, cannot hold a format.
    """
    if forward.rule is None and backward.rule is None:
        return x
    if backward.rule is not None:
        how_of(backward.rule, x.dtype)
    if torch.is_grad_enabled():
        function = RoundBoth if torch.compiler.is_compiling() else EagerRoundBoth
        values: Tensor = function.apply(x, *forward, *backward)  # type: ignore[no-untyped-call]
        return values
    return _round(x, forward)


def _round(x: Tensor, role: Role) -> Tensor:
    if role.rule is None:
        return x
    how = how_of(role.rule, x.dtype)
    seed = offset = shift = None
    if role.state is not None:
        *words, shift = next_use(x.detach(), how, role.state)
        seed, offset = draws_of(how, *words)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        narrow = how_of(role.rule, torch.get_autocast_dtype(x.device.type))
        shift = None if shift is None else shift.clamp(narrow.least, narrow.most)
    dim = [] if how.dim is None else [how.dim if role.dim is None else role.dim]
    args = (x, how.fields, *dim, how.rounding, how.saturate, seed, offset, how.random_bits)
    bits = 1 + how.fields[0] + how.fields[1]
    histogram = None if role.codes is None or bits > 8 else role.codes[: 1 << bits]
    values: Tensor
    if how.dim is not None:
        blocks = _ops.quantize_block if role.stats is None else _ops.quantize_block_statistics
        values = blocks(*args) if role.stats is None else blocks(*args, role.stats, histogram)
    elif role.stats is None:
        values = _ops.quantize(*args, shift)
    else:
        values = _ops.quantize_statistics(*args, shift, role.stats, histogram)
    return values


class RoundBoth(torch.autograd.Function):
    """`round_both` as a differentiable op, on the members of its roles."""

    @staticmethod
    def forward(
        x: Tensor,
        forward: str | None,
        forward_stats: Tensor | None,
        forward_codes: Tensor | None,
        forward_state: Tensor | None,
        forward_dim: int | None,
        backward: str | None,
        backward_stats: Tensor | None,
        backward_codes: Tensor | None,
        backward_state: Tensor | None,
        backward_dim: int | None,
    ) -> Tensor:
        # Detached, the unrounded tensor is neither a copy nor a view, so that what follows may change it in place.
        role = Role(forward, forward_stats, forward_codes, forward_state, forward_dim)
        return x.detach() if forward is None else _round(x, role)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.role = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return round_both(grads[0], Role(*ctx.role), AS_IT_IS), *[None] * 10

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return EagerRoundBoth.apply(*args), in_dims[0]


class EagerRoundBoth(QuickApply, ForwardMode, RoundBoth):
    """`RoundBoth` with what `torch.compile` refuses to trace: sparse gradients and forward mode."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not grads[0].is_sparse:
            return RoundBoth.backward(ctx, *grads)
        # An embedding's sparse gradient lists a row once for every use: it is formed when the uses are summed.
        formed = grads[0].coalesce().clone()
        formed._values().copy_(round_both(formed.values(), Role(*ctx.role), AS_IT_IS))
        return formed, *[None] * 10
