"""The model of Hopper's tensor cores on tensors, in plain torch: any device, the same bits as the compiled kernels.

Integer arithmetic throughout. The kernels' own is in cuda/include/lowprec/hopper.h; what is modelled, and how that was
established, in docs/hopper.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowprec.accumulator import TensorCore
from lowprec.eager import Unpacked, floor_log2, unpack

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (*FLOAT8, torch.float16, torch.bfloat16, torch.float32)
"""The dtypes of operands."""

_NOWHERE = -8192  # the exponent of zero, below all others
_INFINITY, _SIGN, _NAN = 0x7F800000, 0x80000000, 0x7FFFFFFF


def min_exponent(dtype: torch.dtype) -> int:
    """Exponent of a dtype's smallest normal number, and of its subnormal ones."""
    return math.frexp(torch.finfo(dtype).smallest_normal)[1] - 1


def leaf_count(K: int, terms: int) -> int:
    """Leaves of `terms` terms each, 0 for all, that K terms make."""
    return -(-K // terms) if terms else min(K, 1)


def operands(x: Tensor, core: TensorCore) -> Unpacked:
    """The integers of operands: |x| = significand · 2^(exponent - precision + 1), where finite.

    Of a longer significand the digits beyond the core's precision are dropped.
    """
    parts = unpack(x.to(torch.float32) if x.dtype in FLOAT8 else x)
    leading = floor_log2(parts.significand) + parts.exponent
    exponent = leading.clamp(min=min_exponent(x.dtype))
    shift = parts.exponent - exponent + core.precision - 1
    significand = (parts.significand << shift.clamp(0, 62)) >> (-shift).clamp(0, 62)
    finite = ~(parts.infinite | parts.nan)
    significand = torch.where(finite, significand, 0)
    exponent = torch.where(significand == 0, _NOWHERE, exponent)
    return Unpacked(parts.negative, significand, exponent, parts.infinite, parts.nan)


def leaves(a: Tensor, b: Tensor, core: TensorCore, terms: int) -> Tensor:
    """Partial sums of the products a @ b as a tensor core forms them, each from an accumulator of +0 on.

    Args:
        a: [B, M, K], one of `DTYPES`, any strides.
        b: [B, K, N], likewise.
        core: the arithmetic.
        terms: terms of a leaf, a multiple of `core.step`; 0 for all.

    Returns:
        float32 [B, M, N, L], L = ceil(K / terms), or 1; 0 if K is.

    Raises:
        TypeError: for another dtype.
        ValueError: for shapes that do not go together, or other numbers of terms.
    """
    _check(a, b, core, terms)
    (batch, rows, K), columns = a.shape, b.shape[2]
    count = leaf_count(K, terms)
    size = terms or -(-K // core.step) * core.step
    accumulator = torch.zeros((batch, rows, columns, count), dtype=torch.int64, device=a.device)
    left = _steps(operands(a, core), count, size, core.step)
    right = _steps(operands(b.transpose(1, 2), core), count, size, core.step)
    for n in range(size // core.step if count else 0):
        x = Unpacked(*(part[:, :, None, :, n] for part in left))
        y = Unpacked(*(part[:, None, :, :, n] for part in right))
        accumulator = step(x, y, accumulator, core)
    return accumulator.to(torch.int32).view(torch.float32)


def _check(a: Tensor, b: Tensor, core: TensorCore, terms: int) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(f"a must be [B, M, K] and b [B, K, N], got {tuple(a.shape)} and {tuple(b.shape)}")
    if terms < 0 or terms % core.step:
        raise ValueError(f"terms must be a multiple of {core.step}, or 0, got {terms}")


def _steps(parts: Unpacked, count: int, size: int, step: int) -> Unpacked:
    """Lines of operands [B, lines, K] as [B, lines, leaves, steps, step], filled up with zeros."""

    def split(part: Tensor, fill: int) -> Tensor:
        padded = torch.nn.functional.pad(part, (0, count * size - part.shape[-1]), value=fill)
        return padded.reshape(*part.shape[:-1], count, size // step, step)

    return Unpacked(*(split(part, _NOWHERE if part is parts.exponent else 0) for part in parts))


def step(x: Unpacked, y: Unpacked, accumulator: Tensor, core: TensorCore) -> Tensor:
    """The accumulator's bits, in int64, after one step, whose `operands` lie along the last dimension."""
    magnitude = accumulator & ~_SIGN
    field = (magnitude >> 23).clamp(min=1)
    largest = torch.where(magnitude == 0, core.floor, field - 127)
    for k in range(core.step):
        largest = torch.maximum(largest, x.exponent[..., k] + y.exponent[..., k])
    lowest = largest - core.fraction_bits
    significand = magnitude - ((field - 1) << 23)
    total = _place(significand, field - 127 - 23 - lowest, accumulator >= _SIGN)
    for k in range(core.step):
        product = x.significand[..., k] * y.significand[..., k]
        exponent = x.exponent[..., k] + y.exponent[..., k] - 2 * (core.precision - 1)
        total = total + _place(product, exponent - lowest, x.negative[..., k] ^ y.negative[..., k])
    special = _special(x, y, accumulator)
    return torch.where(special != 0, special, _result(total, lowest, core))


def _place(significand: Tensor, exponent: Tensor, negative: Tensor) -> Tensor:
    """Significands times 2^exponent, cut to integers, with their signs. None but zeros lie far above."""
    placed = (significand << exponent.clamp(0, 32)) >> (-exponent).clamp(0, 62)
    return torch.where(negative, -placed, placed)


def _result(total: Tensor, lowest: Tensor, core: TensorCore) -> Tensor:
    """The bits of total · 2^lowest in float32, cut to the core's digits. Zeros are positive."""
    magnitude = total.abs()
    leading = floor_log2(magnitude)
    exponent = lowest + leading
    missing = (-126 - exponent).clamp(min=0)
    bits = (magnitude << (39 - leading).clamp(max=39)) >> (39 - 23 + missing).clamp(max=62)
    bits = bits >> (23 - core.kept_bits) << (23 - core.kept_bits)
    bits = torch.where(exponent > 127, _INFINITY, bits + ((exponent + missing + 126) << 23))
    bits = torch.where(total < 0, bits | _SIGN, bits)
    return torch.where((magnitude == 0) | (missing > 23), 0, bits)


def _special(x: Unpacked, y: Unpacked, accumulator: Tensor) -> Tensor:
    """The bits of a step's NaN or infinity; 0 where all is finite."""
    infinite = x.infinite | y.infinite
    zero = ((x.significand == 0) & ~x.infinite) | ((y.significand == 0) & ~y.infinite)
    negative = x.negative ^ y.negative
    magnitude = accumulator & ~_SIGN
    nan = (x.nan | y.nan | (infinite & zero)).any(-1) | (magnitude > _INFINITY)
    up = (infinite & ~negative).any(-1) | (accumulator == _INFINITY)
    down = (infinite & negative).any(-1) | (accumulator == (_INFINITY | _SIGN))
    result = torch.where(up, _INFINITY, torch.where(down, _INFINITY | _SIGN, 0))
    return torch.where(nan | (up & down), _NAN, result)
