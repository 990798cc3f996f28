"""Sums in the place of torch's own: what a policy's accumulators make of products, and of sums over dimensions.

Whatever one of these does in the forward pass, it does in the backward pass as well, to any order of derivative.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec import _ops, recompute
from lowprec.accumulator import Accumulator
from lowprec.bias import Rule
from lowprec.cast import fields_of
from lowprec.formats import BlockFormat
from lowprec.policy import Formats
from lowprec.windows import count

STRIDE = 8
"""Between the offsets of two calls: each of them may draw for so many sums, forwards and backwards."""


class Sums(NamedTuple):
    """How a product a · b sums up its terms: for the result, and for the gradients of a and of b.

    Accumulators are strings, None where torch does it. `narrow` is a dtype that holds both operands exactly, and
    `narrow_back` one that holds them and the gradient, where tensor cores ask for one. `state` is of stochastic
    rounding.
    """

    forward: str | None = None
    left: str | None = None
    right: str | None = None
    narrow: torch.dtype | None = None
    narrow_back: torch.dtype | None = None
    state: Tensor | None = None

    @property
    def has_any(self) -> bool:
        """Whether any of the three is not torch's own."""
        return self.forward is not None or self.left is not None or self.right is not None

    def of_left(self) -> Sums:
        """Those of da = dy · bᵀ, itself a product."""
        return Sums(self.left, self.forward, self.right, self.narrow_back, self.narrow_back)

    def of_right(self) -> Sums:
        """Those of db = aᵀ · dy."""
        return Sums(self.right, self.left, self.forward, self.narrow_back, self.narrow_back)

    def draw(self, like: Tensor) -> Draw:
        """The random words of the next product."""
        return draw(like, self.state)


TORCHS_OWN = Sums()
"""The sums of a product that no accumulator has a part in."""

Draw = tuple[Tensor | None, Tensor | None]
"""Seed and offset; None where nothing is drawn."""


def draw(like: Tensor, state: Tensor | None) -> Draw:
    """Count a call in a state of stochastic rounding on the device of a tensor: what this call draws with."""
    if state is None:
        return None, None
    calls, _, seed = recompute.used(lambda: _ops.adapt(like.detach(), state, 0, 0, 0, None, 1, 0)).unbind()
    return seed, calls * STRIDE


def product(
    a: Tensor,
    b: Tensor,
    accumulator: str | None,
    narrow: torch.dtype | None,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The product of [..., M, K] and [..., K, N], of one batch shape, in their dtype. Not differentiable."""
    if accumulator is None:
        return torch.matmul(a, b)
    if a.dtype != b.dtype:
        raise ValueError(f"both operands of a product must have one dtype, got {a.dtype} and {b.dtype}")
    left, right = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    y: Tensor = _ops.matmul(left, right, accumulator_fields(accumulator, a.dtype), seed, offset)
    return y.reshape(*a.shape[:-1], b.shape[-1]).to(a.dtype)


class Total(torch.autograd.Function):
    """The sum over some dimensions, which stay as ones, in float32 (float64 of float64)."""

    @staticmethod
    def forward(x: Tensor, dims: list[int], accumulator: str, seed: Tensor | None, offset: Tensor | None) -> Tensor:
        kept = [d for d in range(x.dim()) if d not in dims]
        rows = count([x.shape[d] for d in kept])
        length = count([x.shape[d] for d in dims])
        matrix = x.permute(kept + dims).reshape(rows, length)
        totals: Tensor = _ops.accumulate(matrix, accumulator_fields(accumulator, x.dtype), seed, offset)
        return totals.reshape([1 if d in dims else size for d, size in enumerate(x.shape)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.accumulator, ctx.seed, ctx.offset = inputs
        ctx.shape, ctx.dtype = list(x.shape), x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        spread: Tensor = Spread.apply(grads[0], ctx.shape, ctx.accumulator, ctx.seed, ctx.offset)  # type: ignore[no-untyped-call]
        return spread.to(ctx.dtype), None, None, None, None


class Spread(torch.autograd.Function):
    """A tensor broadcast to a shape, whose gradient sums over the dimensions that this adds or widens."""

    @staticmethod
    def forward(x: Tensor, shape: list[int], accumulator: str, seed: Tensor | None, offset: Tensor | None) -> Tensor:
        return x.expand(shape).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, shape, ctx.accumulator, ctx.seed, ctx.offset = inputs
        ctx.shape, ctx.dtype = list(x.shape), x.dtype
        sizes = [1] * (len(shape) - x.dim()) + list(x.shape)
        ctx.dims = [d for d, size in enumerate(sizes) if size == 1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total: Tensor = Total.apply(grads[0], ctx.dims, ctx.accumulator, ctx.seed, ctx.offset)  # type: ignore[no-untyped-call]
        return total.reshape(ctx.shape).to(ctx.dtype), None, None, None, None


class Reducing(NamedTuple):
    """How an op that is no product sums up: by which accumulator, and with what state if that draws."""

    accumulator: str
    state: Tensor | None

    def begin(self, like: Tensor) -> Reduction:
        """The sums of a call of the op, on a tensor's device."""
        return Reduction(self.accumulator, *draw(like, self.state))


class Reduction:
    """The sums of one call. Each of them, the backward pass included, draws random words of its own."""

    def __init__(self, accumulator: str, seed: Tensor | None, offset: Tensor | None) -> None:
        self.accumulator = accumulator
        self.seed, self.offset = seed, offset
        self.taken = 0

    def total(self, x: Tensor, dims: list[int]) -> Tensor:
        """The sum over dimensions, which stay as ones, in float32 (float64 of float64)."""
        y: Tensor = Total.apply(x, dims, self.accumulator, self.seed, self._next())  # type: ignore[no-untyped-call]
        return y

    def spread(self, x: Tensor, like: Tensor) -> Tensor:
        """A tensor in the shape of another one, which it is broadcast to."""
        y: Tensor = Spread.apply(x, list(like.shape), self.accumulator, self.seed, self._next())  # type: ignore[no-untyped-call]
        return y

    def _next(self) -> Tensor | None:
        self.taken += 1
        return None if self.offset is None else self.offset + (self.taken - 1)


# What tensor cores take.


def narrow_dtypes(formats: Formats) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes of 16 bits that hold the operands of a policy's products exactly, forwards and backwards.

    A measured bias, or a block's scale, is taken to stay above the smallest normal of bfloat16.
    """
    operands = formats[:2]
    return _narrow(operands), _narrow((*operands, formats.activation_grad))


def _narrow(rules: tuple[str | None, ...]) -> torch.dtype | None:
    return next((dtype for dtype in _NARROW if all(_fits(rule, dtype) for rule in rules)), None)


_NARROW = (torch.bfloat16, torch.float16)


def _fits(text: str | None, dtype: torch.dtype) -> bool:
    if text is None:
        return False
    rule = Rule.parse(text)
    fmt = rule.fmt
    if isinstance(fmt, BlockFormat):
        return dtype == torch.bfloat16 and fmt.scale == "e8m0" and not fmt.tensor_scale and fmt.element.mbits < 8
    if rule.is_measured:
        return dtype == torch.bfloat16 and fmt.mbits < 8
    try:
        fields_of(fmt, dtype)
    except ValueError:
        return False
    return True


# Reading an accumulator. As a format, it travels through traced code as a string.


def accumulator_fields(text: str, dtype: torch.dtype) -> list[int]:
    """The integers of an accumulator for operands of a dtype, whose sums the carrier must hold.

    Raises:
        ValueError: where it does not: float32, or float64 for float64.
    """
    return [int(field) for field in _describe(text, dtype).split()]


@_ops.constant
def _describe(text: str, dtype: torch.dtype) -> str:
    return _described(text, dtype)


@lru_cache(maxsize=1024)
def _described(text: str, dtype: torch.dtype) -> str:
    accumulator = Accumulator.parse(text)
    carrier = torch.float64 if dtype == torch.float64 else torch.float32
    for fmt in [level.fmt for level in accumulator.levels] + ([accumulator.product] if accumulator.product else []):
        fields_of(fmt, carrier)
    return " ".join(map(str, accumulator.fields))
