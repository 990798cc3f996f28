"""Products of codes under an accumulator, cast on the way out: what training in 8 bits multiplies by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowprec import _ops
from lowprec import accumulate as sums
from lowprec.accumulate import AccumulatorLike, accumulator_fields
from lowprec.cast import FormatLike, decode, draw, fields_of, mode_of, names_of
from lowprec.eager import container_of
from lowprec.eager_statistics import FIELDS
from lowprec.formats import float_format
from lowprec.measure import Statistics, conclude
from lowprec.rounding import Rounding

_WRITTEN = (torch.float32, torch.bfloat16, torch.float16)


def matmul(
    a: Tensor,
    b: Tensor,
    accumulator: AccumulatorLike,
    *,
    a_format: FormatLike | None = None,
    b_format: FormatLike | None = None,
    out_format: FormatLike | None = None,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    codes: bool = False,
    statistics: bool = False,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
) -> Any:
    """Multiply matrices of values or codes under an accumulator, and cast the product to a format.

    The bits are those of `decode`, `lowprec.matmul`, then `quantize` or `encode`, each of which rounds once or not at
    all. With tensor-core leaves the cast happens where the sums are, before they are written. Not differentiable.

    Args:
        a: [M, K] or [..., M, K]: values as `lowprec.matmul` takes them, or codes of `a_format` as `encode` gives them.
        b: [K, N] or [..., K, N], likewise.
        accumulator: an `Accumulator` or its string.
        a_format: the format of a's codes, up to 8 bits. They become bfloat16 where that holds every value, or float16,
            or float32.
        b_format: likewise; both operands take the first dtype that holds the values of both.
        out_format: what the product is rounded to; None leaves it as the accumulator gives it.
        rounding: how it is rounded to that; as in `quantize`.
        saturate: as in `quantize`.
        codes: whether to return codes of `out_format` instead of values.
        statistics: whether to return (result, `Statistics`) of the cast, as `measure` has them. They take a second pass
            over the product: their sums have an order of their own (docs/statistics.md).
        dtype: of values, float32 if None: float32, bfloat16 or float16, and it must hold `out_format`. Without
            an `out_format` as in `lowprec.matmul`.
        seed: as in `quantize`; the cast draws at `offset`, stochastic levels of the accumulator at `offset` + 1.
        offset: as in `quantize`.
        generator: as in `quantize`.
        random_bits: as in `quantize`, for the cast.

    Returns:
        Values or codes in the shape that torch.matmul gives; with `statistics` a pair.

    Raises:
        TypeError, ValueError: as `decode`, `lowprec.matmul` and `quantize`; for codes or statistics without a format.

    Source: docs/fused.md.
    """
    a, b = _operands(a.detach(), b.detach(), a_format, b_format)
    if out_format is None:
        require_no_cast(codes, statistics)
        words = words_of(a, _draws(accumulator), seed, offset, generator)
        return sums.matmul(a, b, accumulator, dtype=dtype, seed=words[0], offset=_further(words[1]))
    to = fields_of(out_format, None if codes else written_dtype(dtype))
    how = (to, *mode_of(rounding, saturate, random_bits))
    words = words_of(a, rounding == "stochastic" or _draws(accumulator), seed, offset, generator)
    if not statistics and _is_fusable(a, b, accumulator):
        return _cast_at_once(a, b, accumulator, words, how, random_bits, codes, written_dtype(dtype))
    product = sums.matmul(a, b, accumulator, seed=words[0], offset=_further(words[1]))
    cast = (*how, *(words if rounding == "stochastic" else (None, None)), random_bits)
    return cast_product(product, cast, codes, statistics, written_dtype(dtype))


# Operands.


def _operands(a: Tensor, b: Tensor, a_format: FormatLike | None, b_format: FormatLike | None) -> tuple[Tensor, Tensor]:
    """Both operands as values: codes in the first dtype that holds the values of both formats."""
    if a_format is None and b_format is None:
        return a, b
    own = a.dtype if a_format is None else b.dtype if b_format is None else None
    left, right = (None if fmt is None else _spelled(fmt) for fmt in (a_format, b_format))
    dtype = getattr(torch, _common_dtype(left, right, own))
    left_values = a if a_format is None else decode(a, a_format, dtype=dtype)
    return left_values, b if b_format is None else decode(b, b_format, dtype=dtype)


def _spelled(fmt: FormatLike) -> str | torch.dtype:
    return fmt if isinstance(fmt, torch.dtype) else str(fmt)


@_ops.constant
def _common_dtype(left: str | torch.dtype | None, right: str | torch.dtype | None, own: torch.dtype | None) -> str:
    """The name of the dtype for codes of one format or two: `own`, that of values beside them, or the first that fits.

    Raises:
        ValueError: where none holds them.
    """
    formats = [float_format(fmt) for fmt in (left, right) if fmt is not None]
    wide = [str(fmt) for fmt in formats if fmt.bits > 8]
    if wide:
        raise ValueError(f"a_format and b_format have up to 8 bits, got {', '.join(wide)}")
    dtype = container_of(formats, own)
    if dtype is None:
        names = " and ".join(map(str, formats))
        raise ValueError(f"codes of {names} have values that {own or 'float32'} cannot hold")
    return str(dtype).removeprefix("torch.")


def written_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of cast values, float32 by default."""
    if dtype is not None and dtype not in _WRITTEN:
        raise TypeError(f"dtype must be one of {names_of(_WRITTEN)}, got {dtype}")
    return torch.float32 if dtype is None else dtype


def require_no_cast(codes: bool, statistics: bool) -> None:
    """ValueError for what only a cast gives."""
    if codes or statistics:
        raise ValueError("codes and statistics are those of a cast: give an out_format")


# Random words: one seed for the accumulator and for the cast.


def words_of(
    a: Tensor,
    draws: bool,
    seed: int | Tensor | None,
    offset: int | Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Seed and offset of the cast; none where neither it nor the accumulator draws."""
    found, start = draw(a, "stochastic" if draws else "nearest_even", seed, offset, generator)
    if draws and found is None:  # a seed of 0
        found = torch.zeros((), dtype=torch.int64, device="cpu")
    return found, start


def _draws(accumulator: AccumulatorLike) -> bool:
    return sums.is_stochastic(accumulator_fields(accumulator, torch.float32))


def _further(offset: Tensor | None) -> Tensor | int:
    return 1 if offset is None else offset + 1


# Casts.


def _is_fusable(a: Tensor, b: Tensor, accumulator: AccumulatorLike) -> bool:
    """Whether leaves are a tensor core's, added up in one level where they are formed."""
    fields = accumulator_fields(accumulator, torch.float32)
    dims = a.dim() >= 2 and b.dim() >= 2 and (b.dim() == 2 or a.shape[:-2] == b.shape[:-2])
    return a.is_cuda and dims and sums._is_one_level_of_tensor_core(fields)


def _cast_at_once(
    a: Tensor,
    b: Tensor,
    accumulator: AccumulatorLike,
    words: tuple[Tensor | None, Tensor | None],
    how: tuple[Any, ...],
    random_bits: int,
    codes: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The product and its cast in one kernel. All rows are those of one product where b has no batch."""
    sums._require_factors(a, b)
    fields = accumulator_fields(accumulator, torch.float32)
    sums.require_operands(fields, a=a.dtype, b=b.dtype)
    shape = (*a.shape[:-1], b.shape[-1])
    count = math.prod(b.shape[:-2])
    left = a.reshape(1, -1, a.shape[-1]) if b.dim() == 2 else a.reshape(count, *a.shape[-2:])
    right = b.reshape(count, *b.shape[-2:])
    seed, offset = words
    again = None if seed is None else torch.as_tensor(_further(offset), dtype=torch.int64)
    product: Tensor = _ops.tensor_core_matmul_cast(
        left, right, fields, seed, again, *how, seed, offset, random_bits, codes, dtype
    )
    return product.reshape(shape)


def cast_product(product: Tensor, cast: tuple[Any, ...], codes: bool, statistics: bool, dtype: torch.dtype) -> Any:
    """The cast of a product, and what it did to it."""
    if not statistics:
        return _ops.encode(product, *cast) if codes else _ops.quantize(product, *cast).to(dtype)
    bits = _ops.bits_of(cast[0])
    stats = torch.zeros(len(FIELDS), dtype=torch.float64, device=product.device)
    histogram = torch.zeros(1 << bits, dtype=torch.int64, device=product.device) if bits <= 16 else None
    values = _ops.quantize_statistics(product, *cast, None, stats, histogram)
    found: Statistics = conclude(stats, histogram, product.isfinite().sum())
    return (_ops.encode(product, *cast) if codes else values.to(dtype)), found
