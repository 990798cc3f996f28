"""Sums in the place of torch's own: what a policy's accumulators make of products, and of sums over dimensions.

Whatever one of these does in the forward pass, it does in the backward pass as well, to any order of derivative.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec import _ops, recompute
from lowprec.accumulate import accumulator_fields, round_to, sum_over, tree
from lowprec.accumulator import LEAVES, Accumulator
from lowprec.bias import Rule
from lowprec.formats import BlockFormat, float_format
from lowprec.windows import count

STRIDE = 8
"""Between the offsets of two calls: each of them may draw for so many sums, forwards and backwards."""


class Sums(NamedTuple):
    """How a product a · b sums up its terms: for the result, and for the gradients of a and of b.

    Accumulators are strings, None where torch does it. Then come the rules by which a, b and the gradient were rounded,
    for tensor cores, and the state of stochastic rounding.
    """

    forward: str | None = None
    left: str | None = None
    right: str | None = None
    left_rule: str | None = None
    right_rule: str | None = None
    gradient_rule: str | None = None
    state: Tensor | None = None

    @property
    def has_any(self) -> bool:
        """Whether any of the three is not torch's own."""
        return self.forward is not None or self.left is not None or self.right is not None

    def of_left(self) -> Sums:
        """Those of da = dy · bᵀ, itself a product."""
        return Sums(self.left, self.forward, self.right, self.gradient_rule, self.right_rule)

    def of_right(self) -> Sums:
        """Those of db = aᵀ · dy."""
        return Sums(self.right, self.left, self.forward, self.left_rule, self.gradient_rule)

    def turned(self) -> Sums:
        """Those of bᵀ · aᵀ."""
        return Sums(self.forward, self.right, self.left, self.right_rule, self.left_rule, self.gradient_rule)

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


def product(a: Tensor, b: Tensor, sums: Sums, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """The product of [..., M, K] and [..., K, N], of one batch shape, in their dtype. Not differentiable."""
    if sums.forward is None:
        return torch.matmul(a, b)
    if a.dtype != b.dtype:
        raise ValueError(f"both operands of a product must have one dtype, got {a.dtype} and {b.dtype}")
    fields = accumulator_fields(sums.forward, torch.float64 if a.dtype == torch.float64 else torch.float32)
    batch = count(a.shape[:-2])
    left, right = a.reshape(batch, *a.shape[-2:]), b.reshape(batch, *b.shape[-2:])
    if fields[0] > LEAVES.index("exact"):
        dtypes = operand_dtypes(sums.forward, sums.left_rule, sums.right_rule, a.dtype).split()
        left, right = (x.to(getattr(torch, name)) for x, name in zip((left, right), dtypes, strict=True))
    return round_to(tree(left, right, fields, seed, offset).view(*a.shape[:-1], b.shape[-1]), a.dtype)


class Total(torch.autograd.Function):
    """The sum over some dimensions, which stay as ones, in float32 (float64 of float64)."""

    @staticmethod
    def forward(x: Tensor, dims: list[int], accumulator: str, seed: Tensor | None, offset: Tensor | None) -> Tensor:
        carrier = torch.float64 if x.dtype == torch.float64 else torch.float32
        totals = sum_over(x, dims, accumulator_fields(accumulator, carrier), seed, offset)
        return totals.view([1 if d in dims else size for d, size in enumerate(x.shape)])

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


# What tensor cores take: operands in a narrow dtype, into which those of a product are cast, exactly.

_DTYPES = {
    "tensor_core": ("bfloat16", "float16"),
    "hopper_fp16": ("bfloat16", "float16"),
    "hopper_fp8": ("float8_e4m3fn", "float8_e5m2"),
}


@_ops.constant
def operand_dtypes(accumulator: str, left: str | None, right: str | None, dtype: torch.dtype) -> str:
    """The names of the dtypes of both operands, of their rules and the dtype that they have.

    Raises:
        ValueError: where none holds them.
    """
    return _narrowest(accumulator, left, right, str(dtype).removeprefix("torch."))


@lru_cache(maxsize=1024)
def _narrowest(accumulator: str, left: str | None, right: str | None, own: str) -> str:
    leaf = Accumulator.parse(accumulator).leaf
    names = _DTYPES[leaf]
    fits = [[name for name in names if name == own or _fits(rule, name)] for rule in (left, right)]
    if leaf != "hopper_fp8":  # whose operands alone may differ in dtype
        fits = [[name for name in fits[0] if name in fits[1]]] * 2
    if not all(fits):
        raise ValueError(
            f"accumulator {accumulator!r} multiplies {' or '.join(names)}: operands of a product are {own}, rounded "
            f"to {left or 'nothing less'} and {right or 'nothing less'}, which do not fit"
        )
    return " ".join(own if own in each else each[0] for each in fits)


def _fits(text: str | None, name: str) -> bool:
    """Whether a dtype holds what a rule gives; measured biases and blocks' scales are taken not to reach below it."""
    if text is None:
        return False
    rule, wide = Rule.parse(text), float_format(_NAMES[name])
    fmt = rule.fmt
    if isinstance(fmt, BlockFormat):
        return name == "bfloat16" and fmt.scale == "e8m0" and not fmt.tensor_scale and fmt.element.mbits < 8
    if rule.is_measured:
        return name == "bfloat16" and fmt.mbits < 8
    finer = 1 - fmt.bias - fmt.mbits >= 1 - wide.bias - wide.mbits  # the least spacing of values
    return fmt.mbits <= wide.mbits and fmt.max <= wide.max and finer and wide.has_inf >= fmt.has_inf


_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "e4m3fn", "float8_e5m2": "e5m2"}
