"""Block-sparse products on tensors, in plain torch: any device, nothing compiled.

The terms of an output are the products of the blocks present in its column, in ascending order of the feature that is
summed over; those of an update go by pair, then by token. Under an accumulator the bits are those of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec import eager
from lowprec.accumulator import HOPPER, Accumulator
from lowprec.eager import container_of
from lowprec.eager_accumulate import Places, within
from lowprec.eager_hopper import leaves
from lowprec.formats import FloatFormat

_AT_ONCE = 1 << 22  # numbers of an update's operands that are gathered at once, to bound the memory


class Operand(NamedTuple):
    """A tensor of values, or of codes of a format up to 8 bits."""

    tensor: Tensor
    format: FloatFormat | None


class Columns(NamedTuple):
    """Output blocks that have equally many blocks: which they are [G], their input blocks and weights [G, L]."""

    outputs: Tensor
    inputs: Tensor
    weights: Tensor


def columns_of(table: Tensor, outputs: int, count: int) -> Iterator[Columns]:
    """The columns of a direction's table, by how many of the `count` blocks they have; those without any left out."""
    offsets = table[: outputs + 1].long()
    pairs = table[outputs + 1 : outputs + 1 + 2 * count].view(count, 2).long()
    lengths = offsets.diff()
    for length in sorted(set(lengths.tolist())):
        if length:
            which = (lengths == length).nonzero().squeeze(1)
            places = offsets[which].unsqueeze(1) + torch.arange(length, device=table.device)
            yield Columns(which, *pairs[places].unbind(-1))


def values_of(left: Operand, right: Operand) -> tuple[Tensor, Tensor]:
    """Both operands as values of one dtype.

    Raises:
        ValueError: where no dtype holds the values of the formats, or not that of the values beside codes.
    """
    formats = [fmt for _, fmt in (left, right) if fmt is not None]
    if not formats:
        return left.tensor, right.tensor
    own = next((tensor.dtype for tensor, fmt in (left, right) if fmt is None), None)
    dtype = container_of(formats, own)
    if dtype is None:
        names = " and ".join(map(str, formats))
        raise ValueError(f"codes of {names} have values that {own or 'float32'} cannot hold")
    x, w = (tensor if fmt is None else eager.decode(tensor, fmt, dtype) for tensor, fmt in (left, right))
    return x, w


class Gated(NamedTuple):
    """The operands of a product, by blocks: x [I, N, b] and w [blocks, K, b], multiplied by the gates."""

    x: Tensor
    w: Tensor
    closed: Tensor | None

    def gather(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """The operands of columns of L blocks: [G, N, L·b] and [G, L·b, b]."""
        x, w = self.x[columns.inputs], self.w[columns.weights]
        if self.closed is not None:  # what x holds there does not count
            x = x.masked_fill(self.closed[columns.weights][..., None, None], 0)
        groups, length, tokens, block = x.shape
        return x.transpose(1, 2).reshape(groups, tokens, length * block), w.reshape(groups, length * block, block)


def by_blocks(x: Tensor, block: int, first: bool) -> Tensor:
    """Features by block: [blocks, N, b], from [C, N] if `first`, else from [N, C]."""
    if first:
        return x.reshape(x.shape[0] // block, block, x.shape[1]).transpose(1, 2)
    return x.reshape(x.shape[0], x.shape[1] // block, block).transpose(0, 1)


def by_gates(blocks: Tensor, gate: Tensor) -> Tensor:
    """Blocks [n, b, b] times their gates [n], rounded to their dtype; zeros, whatever they held, where it is 0."""
    return (blocks * gate.to(blocks.dtype)[:, None, None]).masked_fill(gate[:, None, None] == 0, 0)


def gated(x: Tensor, w: Tensor, gate: Tensor | None, first: bool, transpose: bool) -> Gated:
    """The operands of fprop, or if `transpose` of bprop."""
    if gate is not None:
        w = by_gates(w, gate)
    closed = None if gate is None else gate == 0
    return Gated(by_blocks(x, w.shape[-1], first), w.transpose(1, 2) if transpose else w, closed)


def features_of(y: Tensor, first: bool) -> Tensor:
    """An output by blocks, [blocks, N, b], as [C, N] if `first`, else as [N, C]; contiguous."""
    return (y.transpose(1, 2).flatten(0, 1) if first else y.transpose(0, 1).flatten(1)).contiguous()


def carrier_of(x: Tensor) -> torch.dtype:
    """The dtype in which sums are carried."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul(
    x: Operand, w: Operand, table: Tensor, gate: Tensor | None, outputs: int, first: bool, transpose: bool
) -> Tensor:
    """The product of x [N, C] or [C, N] and block-sparse w, in float64 for float64, else summed in float32."""
    left, right = values_of(x, w)
    operands = gated(left, right, gate, first, transpose)
    carrier = carrier_of(left)
    y = left.new_zeros((outputs, *operands.x.shape[1:]), dtype=carrier)
    for columns in columns_of(table, outputs, right.shape[0]):
        a, b = operands.gather(columns)
        y[columns.outputs] = torch.bmm(a.to(carrier), b.to(carrier))
    return features_of(y, first)


def matmul_accumulate(
    x: Operand,
    w: Operand,
    table: Tensor,
    gate: Tensor | None,
    outputs: int,
    first: bool,
    transpose: bool,
    accumulator: Accumulator,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The same under an accumulator. All outputs have as many random words as the longest column needs."""
    left, right = _native(x, w, accumulator, gate) or values_of(x, w)
    operands = gated(left, right, gate, first, transpose)
    y = left.new_zeros((outputs, *operands.x.shape[1:]), dtype=carrier_of(left))
    index = features_of(y, first)
    index = by_blocks(torch.arange(y.numel(), device=y.device).view(index.shape), right.shape[-1], first)
    groups = list(columns_of(table, outputs, right.shape[0]))
    longest = max((each.inputs.shape[1] for each in groups), default=0) * right.shape[-1]
    for columns in groups:
        places = Places(index[columns.outputs], accumulator.roundings(longest))
        y[columns.outputs] = product(*operands.gather(columns), accumulator, places, seed, offset)
    return features_of(y, first)


def _native(
    x: Operand, w: Operand, accumulator: Accumulator, gate: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Codes as torch's float8 tensors, where the accumulator models the tensor cores that multiply those.

    A gated weight is no code any more.
    """
    if accumulator.leaf != "hopper_fp8" or gate is not None:
        return None
    native = [(each.tensor, _FLOAT8.get(str(each.format))) for each in (x, w)]
    left, right = (tensor if dtype is None else tensor.view(dtype) for tensor, dtype in native)
    return (left, right) if all(dtype for _, dtype in native) else None


_FLOAT8 = {"1-4-3:specials=fn": torch.float8_e4m3fn, "1-5-2:specials=ieee": torch.float8_e5m2}


def product(
    a: Tensor, b: Tensor, accumulator: Accumulator, places: Places, seed: Tensor | None, offset: Tensor | None
) -> Tensor:
    """Products of [G, M, K] and [G, K, N] under an accumulator, whatever its leaves, as part of a result.

    Raises:
        RuntimeError: for tensor-core leaves, which are the hardware's.
    """
    if accumulator.leaf == "tensor_core":
        raise RuntimeError(
            "tensor_core leaves are what the hardware gives: they need the compiled kernels and a CUDA device, got "
            f"operands on {a.device}; hopper_fp16 and hopper_fp8 model Hopper's on any device"
        )
    if accumulator.leaf not in HOPPER:
        return within(a, b, accumulator, places, seed, offset)
    parts = leaves(a, b, HOPPER[accumulator.leaf], accumulator.terms)
    above = Accumulator(accumulator.levels)
    rows = Places(places.outputs.reshape(1, -1, 1), places.roundings)
    return within(parts.flatten(0, 2).unsqueeze(0), None, above, rows, seed, offset).view(parts.shape[:3])


# Updates.


def _pairs(
    x: list[Operand], dy: list[Operand], first: bool, block: int, accumulator: Accumulator | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens of all pairs one after the other, by blocks: [I, K, b] and [O, K, b]."""
    native = [accumulator and _native(*pair, accumulator) for pair in zip(x, dy, strict=True)]
    values = [known or values_of(*pair) for known, *pair in zip(native, x, dy, strict=True)]
    left, right = (torch.cat(side, int(first)) for side in zip(*values, strict=True))
    return by_blocks(left, block, first), by_blocks(right, block, first)


def _updates(
    left: Tensor, right: Tensor, table: Tensor, count: int, gate: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Some blocks at a time: which, x [n, b, K], dy [n, K, b], and their gates."""
    where = table[: 2 * count].view(count, 2).long()
    size = max(_AT_ONCE // max(left.shape[1] * left.shape[2], 1), 1)
    for start in range(0, count, size):
        some = slice(start, min(start + size, count))
        i, j = where[some].unbind(1)
        gates = None if gate is None else gate[some]
        yield some, left[i].transpose(1, 2), right[j], gates


def weight_grad(
    x: list[Operand], dy: list[Operand], table: Tensor, count: int, gate: Tensor | None, block: int, first: bool
) -> Tensor:
    """The update [blocks, b, b] of pairs (x, dy), in float64 for float64, else summed in float32."""
    left, right = _pairs(x, dy, first, block)
    carrier = carrier_of(left)
    dw = left.new_zeros((count, block, block), dtype=carrier)
    for some, a, b, gates in _updates(left, right, table, count, gate):
        sums = torch.bmm(a.to(carrier), b.to(carrier))
        dw[some] = sums if gates is None else by_gates(sums, gates)
    return dw


def weight_grad_accumulate(
    x: list[Operand],
    dy: list[Operand],
    table: Tensor,
    count: int,
    gate: Tensor | None,
    block: int,
    first: bool,
    accumulator: Accumulator,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """The same under an accumulator."""
    left, right = _pairs(x, dy, first, block, accumulator)
    dw = left.new_zeros((count, block, block), dtype=carrier_of(left))
    index = torch.arange(dw.numel(), device=dw.device).view(dw.shape)
    for some, a, b, gates in _updates(left, right, table, count, gate):
        places = Places(index[some], accumulator.roundings(left.shape[1]))
        sums = product(a, b, accumulator, places, seed, offset)
        dw[some] = sums if gates is None else by_gates(sums, gates)
    return dw
