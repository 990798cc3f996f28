"""What a cast does to a tensor, in numbers: saturation, flushing, noise, and how many of the codes it uses."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils import _pytree

from lowprec import _ops
from lowprec.cast import FormatLike, call_of
from lowprec.eager_statistics import FIELDS
from lowprec.rounding import Rounding


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a cast, as 0-dim tensors on its device: counts int64, all else float64.

    Nothing here waits for a GPU but `numbers()` and `str()`. A pytree, so that it passes through `torch.compile`.

    Attributes:
        count: elements.
        saturated: how many rounded past the largest finite magnitude, infinities included, whatever they became.
        flushed: how many were finite and nonzero and became zero.
        nan: how many were NaN.
        amax: the largest finite |x|; 0 if there is none.
        mean: of |x| over finite elements; NaN if there is none.
        std: population standard deviation of x over finite elements; NaN if there is none.
        sqnr_db: signal to quantization noise, 10 · log10(Σx² / Σ(result - x)²) over elements that are finite before and
            after: inf where the cast is exact, NaN without a signal. Overflow to infinity is no noise: see `saturated`.
        code_entropy: bits of entropy in the result's codes: how many of the format's bits the tensor really uses. NaN
            for formats of more than 16 bits.
    """

    count: Tensor
    saturated: Tensor
    flushed: Tensor
    nan: Tensor
    amax: Tensor
    mean: Tensor
    std: Tensor
    sqnr_db: Tensor
    code_entropy: Tensor

    def numbers(self) -> dict[str, float]:
        """All of it as Python numbers, by name; counts are ints. Waits for the device."""
        return {f.name: getattr(self, f.name).item() for f in fields(self)}

    def __str__(self) -> str:
        n = self.numbers()
        share = {name: f"{100 * n[name] / max(n['count'], 1):.3g}%" for name in ("saturated", "flushed")}
        return (
            f"{n['count']} elements, {share['saturated']} saturated, {share['flushed']} flushed to zero, "
            f"{n['nan']} NaN; amax {n['amax']:.4g}, mean |x| {n['mean']:.4g}, std {n['std']:.4g}; "
            f"SQNR {n['sqnr_db']:.2f} dB; code entropy {n['code_entropy']:.2f} bits"
        )


def _flatten(statistics: Statistics) -> tuple[list[Tensor], None]:
    return [getattr(statistics, f.name) for f in fields(statistics)], None


_pytree.register_pytree_node(
    Statistics,
    _flatten,
    lambda leaves, _: Statistics(*leaves),
    serialized_type_name="lowprec.Statistics",
)


def measure(
    x: Tensor,
    fmt: FormatLike,
    *,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
    dim: int = -1,
) -> Statistics:
    """What `quantize` with the same arguments would do to a tensor.

    On a GPU nothing waits for the device; works under `torch.compile` and in CUDA graphs. Not differentiable.

    Raises:
        TypeError, ValueError: as `quantize`.

    Source: docs/statistics.md.
    """
    blocks, args = call_of(x, fmt, rounding, saturate, seed, offset, generator, random_bits, dim)
    x, bits = x.detach(), 1 + args[0][0] + args[0][1]
    stats = torch.zeros(len(FIELDS), dtype=torch.float64, device=x.device)
    codes = torch.zeros(1 << bits, dtype=torch.int64, device=x.device) if bits <= 16 else None
    if blocks:
        _ops.quantize_block_statistics(x, *args, stats, codes)
    else:
        _ops.quantize_statistics(x, *args, None, stats, codes)
    return conclude(stats, codes, x.isfinite().sum())


def conclude(stats: Tensor, codes: Tensor | None, finite: Tensor) -> Statistics:
    """The statistics that a vector and a histogram of codes stand for."""
    count, saturated, flushed, nan = stats[:4].to(torch.int64).unbind()
    amax, absolute, total, squares, error = stats[4:].unbind()
    variance = squares / finite - (total / finite) ** 2
    return Statistics(
        count=count,
        saturated=saturated,
        flushed=flushed,
        nan=nan,
        amax=amax,
        mean=absolute / finite,
        std=variance.clamp(min=0).sqrt(),
        sqnr_db=10 * (squares / error).log10(),
        code_entropy=torch.full_like(amax, math.nan) if codes is None else entropy(codes),
    )


def entropy(codes: Tensor) -> Tensor:
    """Bits of entropy of a histogram, over its last dimension; NaN where that is empty."""
    share = codes.to(torch.float64) / codes.sum(-1, keepdim=True)
    bits: Tensor = torch.special.entr(share).sum(-1) / math.log(2)
    return bits
