"""Block formats on tensors, in plain torch: any device, nothing compiled, the same bits as the compiled kernels.

As in `lowprec.eager` everything is integer arithmetic on bit patterns, in int64. A tensor is seen as [batch, rows,
columns], contiguous, in tiles that are all of one size but for short last ones; see `Tiling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec import eager
from lowprec.eager import CONTAINERS, Rounded, Unpacked, code_dtype, floor_log2
from lowprec.eager_statistics import gather
from lowprec.formats import NAMES, Block, BlockFormat, FloatFormat
from lowprec.rounding import Rounding

_TOP = 52  # the leading bit of a normalised significand


class Tiling(NamedTuple):
    """How blocks lie in a tensor.

    Its shape as [batch, rows, columns], the size of a tile, how many tiles there are, and the shape of the scales.
    """

    shape: tuple[int, int, int]
    rows: int
    columns: int
    grid: tuple[int, int, int]
    scales: tuple[int, ...]

    def reduce(self, x: Tensor) -> Tensor:
        """The largest of each tile's non-negative integers; 0 where it has none: [batch, rows, columns] of tiles."""
        (batch, rows, columns), grid = self.shape, self.grid
        if x.numel() == 0:
            return x.new_zeros(grid)
        below, right = grid[1] * self.rows - rows, grid[2] * self.columns - columns
        padded = torch.nn.functional.pad(x, (0, right, 0, below))
        return padded.reshape(batch, grid[1], self.rows, grid[2], self.columns).amax((2, 4))

    def expand(self, x: Tensor) -> Tensor:
        """Each tile's number for each of its elements."""
        across = x.reshape(self.grid).repeat_interleave(self.columns, 2)[:, :, : self.shape[2]]
        return across.repeat_interleave(self.rows, 1)[:, : self.shape[1]]


def tiling(shape: Sequence[int], fmt: BlockFormat, dim: int) -> Tiling:
    """The tiling of a tensor; `dim` matters only to blocks along a dimension."""
    shape = tuple(shape)
    if fmt.block == "tensor":
        count = math.prod(shape)
        return Tiling((1, 1, count), 1, max(count, 1), (1, 1, 1), ())
    if isinstance(fmt.block, tuple):
        return _two_dimensional(shape, *fmt.block)
    return _along(shape, int(fmt.block), dim)


def _two_dimensional(shape: tuple[int, ...], rows: int, columns: int) -> Tiling:
    whole = (1,) * (2 - len(shape)) + shape
    batch, height, width = math.prod(whole[:-2]), whole[-2], whole[-1]
    grid = batch, -(-height // rows), -(-width // columns)
    scales = (*whole[:-2], *grid[1:])[len(whole) - len(shape) :]
    return Tiling((batch, height, width), min(rows, max(height, 1)), min(columns, max(width, 1)), grid, scales)


def _along(shape: tuple[int, ...], size: int, dim: int) -> Tiling:
    whole = shape or (1,)
    dim %= len(whole)
    outer, length, inner = math.prod(whole[:dim]), whole[dim], math.prod(whole[dim + 1 :])
    blocks, size = -(-length // size), min(size, max(length, 1))
    scales = (*whole[:dim], blocks, *whole[dim + 1 :]) if shape else ()
    if dim == len(whole) - 1:
        return Tiling((1, outer, length), 1, size, (1, outer, blocks), scales)
    return Tiling((outer, length, inner), size, 1, (outer, blocks, inner), scales)


class Batched(NamedTuple):
    """A block cast of every sample of a batch as one cast over the batch, whose first dimension the samples lie along.

    The shape to give the batch, the format, the dimension, and the shape of the scales.
    """

    shape: tuple[int, ...]
    format: BlockFormat
    dim: int
    scales: tuple[int, ...]


def over_batch(batch: int, sample: Sequence[int], fmt: BlockFormat, dim: int) -> Batched:
    """How to cast samples of one shape, blocks keeping within samples; not for formats with a tensor scale."""
    sample = tuple(sample)
    scales = (batch, *tiling(sample, fmt, dim).scales)
    if fmt.block == "tensor":
        count = math.prod(sample)
        return Batched((batch, max(count, 1)), replaced(fmt, max(count, 1)), -1, scales)
    if isinstance(fmt.block, tuple):
        return Batched((batch, *(1,) * (2 - len(sample)), *sample), fmt, -1, scales)
    whole = sample or (1,)
    return Batched((batch, *whole), fmt, dim % len(whole) + 1, scales)


def replaced(fmt: BlockFormat, block: Block) -> BlockFormat:
    """The same format with blocks of another shape."""
    return BlockFormat(fmt.element, block, scale=fmt.scale, rule=fmt.rule, tensor_scale=fmt.tensor_scale)


def scale_range(fmt: BlockFormat, dtype: torch.dtype) -> tuple[int, int]:
    """The least and the largest exponent of an e8m0 scale with which a dtype holds every element.

    Raises:
        ValueError: where there is none.
    """
    low, high = eager.shift_range(fmt.element, dtype)
    low, high = max(low, -127), min(high, 127)
    if low > high:
        raise ValueError(f"{dtype} cannot hold {fmt.element} with any scale from 2^-127 to 2^127: use a wider dtype")
    return low, high


class Number(NamedTuple):
    """Magnitudes as significand · 2^exponent, int64."""

    significand: Tensor
    exponent: Tensor


def _normalise(x: Number, top: int) -> Number:
    """The same number with its leading bit at `top`; zero stays."""
    up = torch.where(x.significand == 0, 0, top - floor_log2(x.significand))
    return Number(x.significand << up, x.exponent - up)


def _divide(x: Number, by: Number, width: int) -> Number:
    """The quotient with at least 74 - width bits, the last one set where more would follow: as good as exact.

    The divisor, not 0, has at most `width` bits.
    """
    x, by = _normalise(x, _TOP), _normalise(by, width - 1)
    extra = 61 - width
    high, rest = x.significand // by.significand, x.significand % by.significand
    low, rest = (rest << extra) // by.significand, (rest << extra) % by.significand
    return Number((high << extra) + low | (rest != 0), x.exponent - by.exponent - extra)


def _constant(x: float, like: Tensor) -> Number:
    """A positive float64 for every element of another tensor, its significand as short as can be."""
    numerator, denominator = x.as_integer_ratio()
    zeros = (numerator & -numerator).bit_length() - 1
    exponent = zeros - (denominator.bit_length() - 1)
    return Number(torch.full_like(like, numerator >> zeros), torch.full_like(like, exponent))


def _magnitude(code: Tensor, fmt: FloatFormat) -> Number:
    """The value of finite magnitude codes."""
    field, mantissa = code >> fmt.mbits, code & fmt.mantissa_mask
    significand = torch.where(field > 0, mantissa + (1 << fmt.mbits), mantissa if fmt.subnormals else 0)
    return Number(significand, field.clamp(min=1) - (fmt.bias + fmt.mbits))


def _nearest(x: Number, fmt: FloatFormat) -> Tensor:
    """Magnitude codes of the nearest values, ties to even, saturating."""
    no = torch.zeros_like(x.significand, dtype=torch.bool)
    parts = Unpacked(no, x.significand, x.exponent, no, no)
    return eager.round_code(parts, fmt, Rounding.nearest_even, True, None, 32).code


class Blocks(NamedTuple):
    """What a block's scale follows from: the largest finite magnitude, and whether infinities, NaNs are there."""

    amax: Tensor
    infinite: Tensor
    nan: Tensor

    def number(self) -> Number:
        """The largest magnitude as integers."""
        parts = eager.unpack(self.amax)
        return Number(parts.significand, parts.exponent)


def _measure(x: Tensor, parts: Unpacked, tiles: Tiling) -> Blocks:
    integer, sign = CONTAINERS[x.dtype].integer, 8 * x.dtype.itemsize - 1
    magnitude = x.view(integer).to(torch.int64) & ((1 << sign) - 1)
    amax = tiles.reduce(torch.where(parts.infinite | parts.nan, 0, magnitude))
    infinite, nan = (tiles.reduce(flag.to(torch.int64)) > 0 for flag in (parts.infinite, parts.nan))
    return Blocks(amax.to(integer).view(x.dtype), infinite, nan)


def _tensor_scale(blocks: Blocks, fmt: BlockFormat, scale: FloatFormat) -> Tensor:
    """The tensor's scale, 0-dim float32: amax / (largest element · largest scale), rounded to nearest even.

    A tensor without finite nonzero values, but with infinities, counts as holding the dtype's largest number.
    """
    dtype = blocks.amax.dtype
    bits = blocks.amax.view(CONTAINERS[dtype].integer)
    amax = bits.amax() if bits.numel() else bits.new_zeros(())
    amax = torch.where((amax == 0) & blocks.infinite.any(), eager._special_bits(dtype)[0] - 1, amax)
    parts = eager.unpack(amax.to(bits.dtype).view(dtype))
    largest = _constant(fmt.element.max * scale.max, parts.significand)
    quotient = _divide(Number(parts.significand, parts.exponent), largest, 31)
    return _nearest(quotient, NAMES["fp32"]).to(torch.int32).view(torch.float32)


def _scale_codes(blocks: Blocks, fmt: BlockFormat, tensor_scale: Tensor | None) -> Tensor:
    """Codes of the scales, int64, NaNs left aside."""
    amax = blocks.number()
    zero = amax.significand == 0
    if not isinstance(fmt.scale, FloatFormat):
        low, high = scale_range(fmt, blocks.amax.dtype)
        amax = _normalise(amax, _TOP)
        carry = (amax.significand >= fmt.carry).to(torch.int64)
        k = (amax.exponent + _TOP - fmt.element.emax + carry).clamp(low, high)
        return torch.where(zero, torch.where(blocks.infinite, high, low), k) + 127
    divisor = _constant(fmt.element.max, amax.significand)
    if tensor_scale is not None:
        divisor = _product(divisor, eager.unpack(tensor_scale))
    nothing = divisor.significand == 0
    quotient = _divide(amax, divisor._replace(significand=torch.where(nothing, 1, divisor.significand)), 40)
    code = torch.where(nothing, 0, _nearest(quotient, fmt.scale))
    return torch.where(zero & blocks.infinite, fmt.scale.max_code, code)


def _product(x: Number, by: Number | Unpacked) -> Number:
    return Number(x.significand * by.significand, x.exponent + by.exponent)


class Scales(NamedTuple):
    """Each element's scale: its magnitude, whether it is negative, and whether it is no finite number."""

    value: Number
    negative: Tensor
    nan: Tensor


def _scales(code: Tensor, fmt: BlockFormat, tensor_scale: Tensor | None) -> Scales:
    """What the codes of scales mean, together with the tensor's scale."""
    if not isinstance(fmt.scale, FloatFormat):
        return Scales(Number(torch.ones_like(code), code - 127), torch.zeros_like(code) > 0, code == 255)
    magnitude = code & (fmt.scale.sign_code - 1)
    negative = code & fmt.scale.sign_code > 0
    nan = magnitude > fmt.scale.max_code
    if not fmt.scale.has_negative_zero:
        nan = nan | (code == fmt.scale.sign_code)
    value = _magnitude(magnitude.clamp(max=fmt.scale.max_code), fmt.scale)
    if tensor_scale is None:
        return Scales(value, negative, nan)
    second = eager.unpack(tensor_scale)
    return Scales(_product(value, second), negative ^ second.negative, nan | second.infinite | second.nan)


class Cast(NamedTuple):
    """A tensor's elements, their codes, and the codes of their blocks' scales. Shaped as the tiling has it."""

    parts: Unpacked
    rounded: Rounded
    scales: Scales
    scale_codes: Tensor
    tensor_scale: Tensor | None
    blocks: Blocks


def _cast(
    x: Tensor,
    fmt: BlockFormat,
    tiles: Tiling,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
) -> Cast:
    word = eager.random_words(x, seed, offset, random_bits) if rounding is Rounding.stochastic else None
    word = word.reshape(tiles.shape) if word is not None else None
    x = x.reshape(tiles.shape)
    parts = eager.unpack(x)
    blocks = _measure(x, parts, tiles)
    tensor_scale = None
    if fmt.tensor_scale and isinstance(fmt.scale, FloatFormat):
        tensor_scale = _tensor_scale(blocks, fmt, fmt.scale)
    codes = _scale_codes(blocks, fmt, tensor_scale)
    scales = _scales(tiles.expand(codes), fmt, tensor_scale)
    scaled = _scaled(parts, scales.value, isinstance(fmt.scale, FloatFormat))
    rounded = eager.round_code(scaled, fmt.element, rounding, saturate, word, random_bits)
    # A scale of 0 makes every element +0.
    nothing = scales.value.significand == 0
    rounded = Rounded(*(torch.where(nothing, 0, field).to(field.dtype) for field in rounded))
    parts = parts._replace(negative=parts.negative & (~nothing | parts.nan))
    return Cast(parts, rounded, scales, codes, tensor_scale, blocks)


def _scaled(parts: Unpacked, scale: Number, is_float: bool) -> Unpacked:
    """The elements divided by their scales."""
    if not is_float:
        return parts._replace(exponent=parts.exponent - scale.exponent)
    divisor = scale._replace(significand=scale.significand.clamp(min=1))
    quotient = _divide(Number(parts.significand, parts.exponent), divisor, 31)
    return parts._replace(significand=quotient.significand, exponent=quotient.exponent)


def quantize(
    x: Tensor,
    fmt: BlockFormat,
    dim: int,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
) -> Tensor:
    """Values, in x's dtype and shape; NaN keeps its bits. See `lowprec.quantize`."""
    tiles = tiling(x.shape, fmt, dim)
    cast = _cast(x, fmt, tiles, rounding, saturate, seed, offset, random_bits)
    return _values(x, fmt, cast)


def quantize_statistics(
    x: Tensor,
    fmt: BlockFormat,
    dim: int,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
    stats: Tensor,
    codes: Tensor | None,
) -> Tensor:
    """`quantize`, which also adds to float64 `stats` and counts element codes in int64 `codes`.

    See `eager_statistics.quantize_statistics`. Codes are counted as sign and magnitude.
    """
    tiles = tiling(x.shape, fmt, dim)
    cast = _cast(x, fmt, tiles, rounding, saturate, seed, offset, random_bits)
    values = _values(x, fmt, cast)
    parts = Unpacked(*(field.reshape(x.shape) for field in cast.parts))
    rounded = Rounded(*(field.reshape(x.shape) for field in cast.rounded))
    gather(x.contiguous(), values, parts, rounded, fmt.element, rounding, stats, codes)
    return values


def _values(x: Tensor, fmt: BlockFormat, cast: Cast) -> Tensor:
    negative = _signed(cast.parts.negative, cast.rounded.code, fmt.element)
    bits = _multiply(_magnitude(cast.rounded.code, fmt.element), cast.scales, negative, x.dtype)
    infinity, nan = eager._special_bits(x.dtype)
    sign = cast.parts.negative.to(torch.int64) << eager._sign_bit(x.dtype)
    bits = torch.where(cast.rounded.infinite, sign | (infinity if fmt.element.has_inf else nan), bits)
    values = eager._as_values(bits, x.dtype).reshape(x.shape)
    return torch.empty_like(x).copy_(torch.where(cast.parts.nan.reshape(x.shape), x, values))


def _signed(negative: Tensor, code: Tensor, fmt: FloatFormat) -> Tensor:
    return negative & ((code != 0) | fmt.has_negative_zero)


def _multiply(x: Number, scales: Scales, negative: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits, in a dtype, of elements times scales, rounded to nearest even; infinity past the largest number."""
    significand, exponent = x.significand * scales.value.significand, x.exponent + scales.value.exponent
    precision, bias, _ = CONTAINERS[dtype]
    leading = floor_log2(significand)
    spacing = (leading + exponent - (precision - 1)).clamp(min=2 - bias - precision)
    dropped = (spacing - exponent).clamp(max=eager._FAR)
    kept = eager._shift_right(significand, dropped)
    rest = eager._rest(significand, dropped, kept, negative, None, 32)
    kept = kept + (rest.above | (rest.tie & rest.odd))
    bits = kept + ((spacing + (bias + precision - 2)) << (precision - 1))
    bits = torch.where(significand == 0, 0, bits.clamp(max=eager._special_bits(dtype)[0]))
    return bits | ((negative ^ scales.negative).to(torch.int64) << eager._sign_bit(dtype))


def encode(
    x: Tensor,
    fmt: BlockFormat,
    dim: int,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Element codes in x's shape, codes of the scales, and the tensor's scale: float32, () or (0,). Contiguous."""
    tiles = tiling(x.shape, fmt, dim)
    cast = _cast(x, fmt, tiles, rounding, saturate, seed, offset, random_bits)
    codes = stored(eager.full_codes(cast.parts, cast.rounded, fmt.element), fmt)
    nan = 255 if not isinstance(fmt.scale, FloatFormat) else nan_scale(fmt.scale)
    scale_codes = torch.where(cast.blocks.nan, nan, cast.scale_codes)
    tensor_scale = cast.tensor_scale
    if tensor_scale is None:
        tensor_scale = torch.empty(0, dtype=torch.float32, device=x.device)
    codes = codes.reshape(x.shape).to(code_dtype(fmt.element.fields)).contiguous()
    return codes, scale_codes.reshape(tiles.scales).to(torch.uint8).contiguous(), tensor_scale


def nan_scale(fmt: FloatFormat) -> int:
    """The code of NaN in a scale's format."""
    if not fmt.has_negative_zero:
        return fmt.sign_code
    return fmt.top_code if fmt.specials == "fn" else fmt.max_code + 1 + (1 << (fmt.mbits - 1))


def stored(code: Tensor, fmt: BlockFormat) -> Tensor:
    """Codes of elements as they are stored, and back: two's complement, where the one more code stays NaN's."""
    sign = fmt.element.sign_code
    return torch.where(code > sign, 3 * sign - code, code) if fmt.twos_complement else code


def decode(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, fmt: BlockFormat, dim: int, dtype: torch.dtype
) -> Tensor:
    """Values of codes, the exact product rounded once into the dtype. See `lowprec.decode`."""
    tiles, element = tiling(codes.shape, fmt, dim), fmt.element
    scale = _scales(tiles.expand(scales.to(torch.int64)), fmt, tensor_scale)
    code = stored(codes.reshape(tiles.shape).to(torch.int64) & ((element.sign_code << 1) - 1), fmt)
    negative, magnitude = code >= element.sign_code, code & (element.sign_code - 1)
    infinity, quiet = eager._special_bits(dtype)
    value = _magnitude(magnitude.clamp(max=element.max_code), element)
    bits = _multiply(value, scale, _signed(negative, magnitude, element), dtype)
    sign = (negative ^ scale.negative).to(torch.int64) << eager._sign_bit(dtype)
    infinite = (magnitude == element.max_code + 1) & element.has_inf & (scale.value.significand != 0)
    bits = torch.where(infinite, sign | infinity, bits)
    bits = torch.where((magnitude > element.max_code) & ~infinite, sign | quiet, bits)
    nan = scale.nan if element.has_negative_zero else scale.nan | (code == element.sign_code)
    bits = torch.where(nan, quiet, bits)
    return eager._as_values(bits, dtype).reshape(codes.shape).contiguous()
