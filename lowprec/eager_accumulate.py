"""Sums and matrix products under an accumulator, in plain torch: any device, nothing compiled, the kernels' bits."""

from __future__ import annotations

from torch import Tensor

from lowprec.accumulator import Accumulator


def accumulate(x: Tensor, accumulator: Accumulator, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """Sums of the rows of x [O, K] -> [O]."""
    raise NotImplementedError


def matmul(a: Tensor, b: Tensor, accumulator: Accumulator, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """The product of [B, M, K] and [B, K, N] -> [B, M, N]."""
    raise NotImplementedError
