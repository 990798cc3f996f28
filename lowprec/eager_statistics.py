"""Statistics of a cast in plain torch: any device, nothing compiled, the same bits as the compiled kernels.

Counts are exact. Sums are float64, in one fixed order (docs/statistics.md): 1024 lanes, of which lane l adds up
elements l, l + 1024, ... of a page of 16384, starting from +0; then the lanes pairwise, neighbours first; then the
pages as the elements of one longer page. The kernels in cuda/include/lowprec/statistics.h follow the same steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.eager import CONTAINERS, Rounded, Unpacked, full_codes, quantize_parts, random_words, unpack
from lowprec.formats import FloatFormat
from lowprec.rounding import Rounding

FIELDS = ("elements", "saturated", "flushed", "nan", "amax", "absolute", "total", "squares", "error")
"""The places of a vector of statistics: four counts, max |x|, Σ|x|, Σx, Σx² and Σe², e = result - x."""

LANES = 1024
ROWS = 16
PAGE = LANES * ROWS

_AMAX = FIELDS.index("amax")
LEAST = (1023 - 448) << 52
"""The bits of 2^-448: smaller float64 magnitudes count as zero in sums, or a square or difference might be subnormal,
which modes of the machine change."""


def quantize_statistics(
    x: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    saturate: bool,
    seed: Tensor | None,
    offset: Tensor | None,
    random_bits: int,
    shift: Tensor | None,
    stats: Tensor,
    codes: Tensor | None,
) -> Tensor:
    """`eager.quantize`, which also adds to float64 `stats` (`FIELDS`) and counts result codes in int64 `codes`."""
    word = random_words(x, seed, offset, random_bits) if rounding is Rounding.stochastic else None
    values, parts, rounded = quantize_parts(x, fmt, rounding, saturate, word, random_bits, shift)
    gather(x, values, parts, rounded, fmt, rounding, stats, codes)
    return values


def gather(
    x: Tensor,
    values: Tensor,
    parts: Unpacked,
    rounded: Rounded,
    fmt: FloatFormat,
    rounding: Rounding,
    stats: Tensor,
    codes: Tensor | None,
) -> None:
    """Add what a cast of x gave to its statistics."""
    if x.numel() == 0:
        return
    regular = ~(parts.nan | parts.infinite)
    saturated = rounded.overflow & ~parts.nan
    flushed = regular & (parts.significand != 0) & (rounded.code == 0)
    before, after = numbers(x), numbers(values)
    error = torch.where(regular & values.isfinite(), after - before, 0.0)
    terms = torch.stack([before.abs(), before, before * before, error * error])
    sums = add_up(in_order(terms, x, rounding is Rounding.stochastic))
    elements = torch.ones_like(saturated)
    counts = torch.stack([elements, saturated, flushed, parts.nan]).reshape(4, -1).sum(1)
    merge(stats, torch.cat([counts.to(torch.float64), largest(x).reshape(1), sums]))
    if codes is not None:
        found = full_codes(parts, rounded, fmt).reshape(-1)
        codes.scatter_add_(0, found, torch.ones_like(found))


def sums(x: Tensor) -> Tensor:
    """[finite elements, max |x|, Σ|x|, Σx²] over the finite elements of a tensor: float64 of shape (4,)."""
    if x.numel() == 0:
        return torch.zeros(4, dtype=torch.float64, device=x.device)
    finite = x.isfinite().sum().to(torch.float64)
    magnitudes = numbers(x).abs()
    both = add_up(in_order(torch.stack([magnitudes, magnitudes * magnitudes]), x, False))
    return torch.cat([torch.stack([finite, largest(x)]), both])


def merge(stats: Tensor, more: Tensor) -> None:
    """Take a vector of statistics into another, in place: amax by its maximum, the others by their sums."""
    # Bits of positive numbers compare as the numbers do, whatever the machine makes of subnormal ones.
    amax = torch.maximum(stats.view(torch.int64)[_AMAX], more.view(torch.int64)[_AMAX])
    stats += more
    stats.view(torch.int64)[_AMAX] = amax


def numbers(x: Tensor) -> Tensor:
    """The elements of a float tensor as sums take them: float64, zero where infinite or NaN."""
    if x.dtype == torch.float64:
        magnitude = x.view(torch.int64) & ~(-1 << 63)
        counts = (magnitude >= LEAST) & (magnitude < 2047 << 52)
        return torch.where(counts, x.view(torch.int64), 0).view(torch.float64)
    parts = unpack(x)
    # Both factors and the product are normal numbers of float64, or zero.
    magnitude = parts.significand.to(torch.float64) * ((parts.exponent + 1023) << 52).view(torch.float64)
    signed = torch.where(parts.negative, -magnitude, magnitude)
    return torch.where(parts.infinite | parts.nan, 0.0, signed)


def largest(x: Tensor) -> Tensor:
    """Max |x| over the finite elements of a tensor that has any elements: 0-dim float64, zero if none is finite."""
    precision, bias, integer = CONTAINERS[x.dtype]
    magnitude = x.view(integer) & torch.iinfo(integer).max
    bits = torch.where(magnitude >> (precision - 1) == 2 * bias + 1, 0, magnitude).amax()
    return bits.view(torch.float64) if x.dtype == torch.float64 else numbers(bits.view(x.dtype))


def in_order(terms: Tensor, x: Tensor, logical: bool) -> Tensor:
    """Terms of the sums over x, of shape (n, *x.shape), as (n, elements) in the order in which casts walk x.

    Where the elements fill a block of memory that is their order there, whatever the dimensions are called. Otherwise,
    and wherever the index of an element matters, it is row-major.
    """
    dims = sorted((d for d in range(x.dim()) if x.shape[d] != 1), key=lambda d: (x.stride(d), x.shape[d]))
    filled = 1
    for d in dims:
        logical = logical or x.stride(d) != filled
        filled *= x.shape[d]
    if logical:
        return terms.reshape(len(terms), -1)
    single = [d for d in range(x.dim()) if x.shape[d] == 1]
    return terms.permute(0, *(1 + d for d in (*single, *reversed(dims)))).reshape(len(terms), -1)


def add_up(terms: Tensor) -> Tensor:
    """Sums over the last dimension of float64 terms of shape (n, elements), in the one fixed order: shape (n,)."""
    pages = -(-terms.shape[1] // PAGE)
    if pages <= 1:
        return _page(terms)
    padded = torch.nn.functional.pad(terms, (0, pages * PAGE - terms.shape[1]))
    return _page(_page(padded.reshape(len(terms), pages, PAGE)))


def _page(terms: Tensor) -> Tensor:
    """Sums over the last dimension: lanes, then the tree. Elements that are missing would add +0, and are left out."""
    count = terms.shape[-1]
    lanes = min(LANES, 1 << (count - 1).bit_length())
    padded = torch.nn.functional.pad(terms, (0, -count % lanes))
    lane = torch.zeros_like(padded[..., :lanes])
    for row in padded.unflatten(-1, (-1, lanes)).unbind(-2):  # type: ignore[no-untyped-call]
        lane = lane + row
    while lane.shape[-1] > 1:
        lane = lane[..., 0::2] + lane[..., 1::2]
    return lane[..., 0]
