"""What is multiplied: a block-sparse product of some kind and size, its operands, and the call that is timed.

Layers are square. A *widening* of 2 is twice as wide as the dense layer with equally many weights, at a density of 25%.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec import sparse
from lowprec.cast import encode
from lowprec.sparse import patterns
from lowprec.timing import Call

FORWARD, BACKWARD = "1-4-3:emax=8", "1-5-2:emax=1"
"""The formats of codes: weights and activations, and gradients."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.uint8}
"""Of operands, by kind: values, or codes."""

OPS = ("fprop", "bprop", "update", "update of 8", "8 updates")
"""y = x W; dx = dy Wᵀ; dW = xᵀ dy; that over a list of eight pairs (x, dy), and by eight calls that add up."""

DENSE = "dense"
"""The pattern in which every block is present: the only one of a widening of 1."""

SIDES = {"cuda": 3584, "cpu": 512}
"""Width of the dense layer: 12.85 million weights, and 0.26 million."""

PAST_CACHE = 128 << 20
"""Bytes to go through before an operand is read again: more than the last level of cache holds."""

_TILE = 1 << 20
"""Random numbers that are drawn; operands repeat them."""


def density_of(widening: float) -> str:
    """Of a layer with as many weights as the dense one, in words."""
    return f"{100 / widening**2:.2g}%" if widening > 1 else "100%"


@dataclass(frozen=True)
class Work:
    """A product.

    Attributes:
        op: one of `OPS`.
        kind: "bf16", "fp32", or "fp8" for codes.
        features: "last" for (N, C), "first" for (C, N).
        block: features of a block; 0 for a dense product.
        tokens: N.
        widening: the layer's width over that of the dense one with equally many weights.
        pattern: as `sparse.patterns.build` knows it.
    """

    op: str
    kind: str
    features: str
    block: int
    tokens: int
    widening: float
    pattern: str

    @property
    def density(self) -> str:
        """In words, as 25%."""
        return density_of(self.widening)

    @property
    def pairs(self) -> int:
        """How many products it adds up."""
        return 8 if "8" in self.op else 1

    @property
    def of_values(self) -> Work:
        """The nearest that torch has: in bfloat16 for codes."""
        return replace(self, kind="bf16") if self.kind == "fp8" else self

    @property
    def dense(self) -> Work:
        """The product of a dense layer as wide, by torch: the one whose block is 0."""
        return replace(self.of_values, block=0, pattern=DENSE)

    def layout(self, side: int, seed: int = 0) -> sparse.BlockLayout:
        """That of the layer, where the dense one has so many features along each side."""
        return layout_of(self.pattern, self.widening, self.block, side, seed)

    def flops(self, layout: sparse.BlockLayout) -> int:
        """Floating-point operations, two for each weight and token."""
        return layout.flops(self.tokens) * self.pairs

    def bytes(self, layout: sparse.BlockLayout) -> int:
        """Of what must be read and written: weights, activations and result, each once."""
        width = DTYPES[self.kind].itemsize
        weights, tokens = layout.blocks * layout.block**2, self.tokens * (layout.inputs + layout.outputs)
        written = 4 if self.pairs > 1 else max(width, 2) if self.op == "update" else width
        return weights * written + tokens * width * self.pairs


@lru_cache(maxsize=64)
def layout_of(pattern: str, widening: float, block: int, side: int, seed: int) -> sparse.BlockLayout:
    """A square layout with as many blocks as the dense one has, and its diagonal at least.

    Blocks above 64, which peers have, are made of those of 64.
    """
    n, parts = round(side * widening) // (block or 64), max(block // 64, 1)
    mask = patterns.build(pattern, n, n, None if pattern == DENSE else 1 / widening**2, seed)
    return sparse.BlockLayout(mask.repeat_interleave(parts, 0).repeat_interleave(parts, 1), min(block or 64, 64))


class Pool:
    """Random numbers on a device, normal before rounding, from which operands are taken: made once, and shared.

    Each number of a call has operands of its own, until `PAST_CACHE` bytes are used up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[tuple[str, bool, str], Tensor] = {}
        self._outgrown: list[Tensor] = []  # graphs still read them

    def take(self, kind: str, shape: tuple[int, ...], number: int, weight: bool = False, fmt: str = FORWARD) -> Tensor:
        """An operand: of deviation 1, or if a weight 2^-5; codes of `fmt` where the kind is "fp8"."""
        numbers = self._numbers(kind, weight, fmt)
        size = torch.Size(shape).numel()
        if size > len(numbers):
            self._outgrown.append(numbers)
            numbers = numbers.repeat(-(-size // len(numbers)))
            self._made[kind, weight, fmt] = numbers
        start = number % (len(numbers) // size) * size
        return numbers[start : start + size].view(shape)

    def _numbers(self, kind: str, weight: bool, fmt: str) -> Tensor:
        key = kind, weight, fmt
        if key not in self._made:
            tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(int(weight))).to(self.device)
            tile = tile * 2.0**-5 if weight else tile
            numbers = encode(tile, fmt) if kind == "fp8" else tile.to(DTYPES[kind])
            assert isinstance(numbers, Tensor)
            self._made[key] = numbers.repeat(max(PAST_CACHE // numbers.nbytes, 1))
        return self._made[key]


@dataclass(frozen=True)
class Operands:
    """Those of a product, by the number of the call."""

    work: Work
    layout: sparse.BlockLayout
    pool: Pool

    def x(self, number: int) -> Tensor:
        """Activations."""
        return self.pool.take(self.work.kind, self._shape(self.layout.inputs), number)

    def dy(self, number: int) -> Tensor:
        """Gradients."""
        return self.pool.take(self.work.kind, self._shape(self.layout.outputs), number, fmt=BACKWARD)

    def w(self, number: int) -> Tensor:
        """Weights."""
        return self.pool.take(self.work.kind, self.layout.weight_shape, number, weight=True)

    def dense(self, number: int) -> Tensor:
        """The weights of a dense layer as wide."""
        return self.pool.take(self.work.kind, (self.layout.inputs, self.layout.outputs), number, weight=True)

    def _shape(self, features: int) -> tuple[int, int]:
        tokens = self.work.tokens
        return (features, tokens) if self.work.features == "first" else (tokens, features)


# Calls.


def call_of(operands: Operands) -> Call:
    """The product, by lowprec."""
    work, layout = operands.work, operands.layout
    how: dict[str, Any] = {"features": work.features}
    if work.op == "fprop":
        how |= {"x_format": FORWARD, "w_format": FORWARD, "out_format": FORWARD} if work.kind == "fp8" else {}
        return lambda i: sparse.matmul(operands.x(i), operands.w(i), layout, **how)
    if work.op == "bprop":
        how |= {"dy_format": BACKWARD, "w_format": FORWARD, "out_format": BACKWARD} if work.kind == "fp8" else {}
        return lambda i: sparse.input_grad(operands.dy(i), operands.w(i), layout, **how)
    how |= {"x_format": FORWARD, "dy_format": BACKWARD} if work.kind == "fp8" else {}
    if work.op == "update":
        dtype = torch.bfloat16 if work.kind == "fp8" else DTYPES[work.kind]
        return lambda i: sparse.weight_grad([pair(operands, i)], layout, dtype=dtype, **how)
    outs = [layout.zeros(device=operands.pool.device, dtype=torch.float32) for _ in range(2)]
    return _by_list(operands, outs, how) if work.op == "update of 8" else _by_calls(operands, outs, how)


def pair(operands: Operands, number: int) -> tuple[Tensor, Tensor]:
    """What an update takes."""
    return operands.x(number), operands.dy(number)


def _by_list(operands: Operands, outs: list[Tensor], how: dict[str, Any]) -> Call:
    def call(i: int) -> Tensor:
        pairs, out = [pair(operands, 8 * i + k) for k in range(8)], outs[i % len(outs)]
        sparse.weight_grad(pairs, operands.layout, out=out, **how)
        return out

    return call


def _by_calls(operands: Operands, outs: list[Tensor], how: dict[str, Any]) -> Call:
    def call(i: int) -> Tensor:
        out = outs[i % len(outs)]
        for k in range(8):
            sparse.weight_grad([pair(operands, 8 * i + k)], operands.layout, out=out, beta=float(k > 0), **how)
        return out

    return call


def dense_call(operands: Operands) -> Call:
    """The same product by torch's dense matmul, of a layer as wide."""
    op, last = operands.work.op, operands.work.features == "last"
    if op == "update":
        return lambda i: torch.matmul(*_outer(*pair(operands, i), last))

    def call(i: int) -> Tensor:
        w = operands.dense(i) if op == "fprop" else operands.dense(i).T
        x = operands.x(i) if op == "fprop" else operands.dy(i)
        return torch.matmul(x, w) if last else torch.matmul(w.T, x)

    return call


def _outer(x: Tensor, dy: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    return (x.T, dy) if last else (x, dy.T)
