"""The tensors that rows read and write: made once, and shared, since a gigabyte each is soon too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lowprec as lp

COLUMNS = 4096
PAST_CACHE = 128 << 20
"""Bytes to go through before an input is read again: more than the last level of cache holds."""


class Buffers:
    """Random inputs and places for outputs, all of shape (rows, 4096).

    Inputs are normal with a standard deviation of 1, made from a seed, and rotated: call i reads the one of number
    i mod slots.
    """

    def __init__(self, device: torch.device, elements: int) -> None:
        self.device = device
        self.shape = (max(elements // COLUMNS, 1), COLUMNS)
        self.elements = self.shape[0] * COLUMNS
        self.seed = torch.tensor(7, device=device)
        self._made: dict[Any, list[Tensor]] = {}

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Inputs of a dtype."""
        return self._slots(("x", dtype), dtype, self._normal)

    def outputs(self, dtype: torch.dtype, what: str = "out") -> list[Tensor]:
        """Places to write to, zeros at first."""
        return self._slots((what, dtype), dtype, lambda i, dtype: self._zeros(dtype))

    def codes(self, fmt: str, pack: bool = False) -> list[Tensor]:
        """Codes of the float32 inputs."""

        def make(i: int, dtype: torch.dtype) -> Tensor:
            codes = lp.encode(self._normal(i, torch.float32), fmt, pack=pack)
            assert isinstance(codes, Tensor)
            return codes

        return self._slots(("codes", fmt, pack), torch.uint8, make)

    def _slots(self, key: Any, dtype: torch.dtype, make: Callable[[int, torch.dtype], Tensor]) -> list[Tensor]:
        if key not in self._made:
            count = max(1, -(-PAST_CACHE // (self.elements * dtype.itemsize)))
            self._made[key] = [make(i, dtype) for i in range(min(count, 8))]
        return self._made[key]

    def _normal(self, i: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(i)
        return torch.randn(self.shape, generator=generator, device=self.device).to(dtype)

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.shape, dtype=dtype, device=self.device)
