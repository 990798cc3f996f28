"""The implementations of casts and sums, called alike, so that one test holds all of them to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec import _ops, eager, eager_accumulate
from lowprec.accumulator import Accumulator
from lowprec.formats import FloatFormat
from lowprec.rounding import Rounding
from tests.judge import grid

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Engine:
    """The eager twin, or the registered ops (which are the compiled kernels where those are loaded), on one device.

    Tensors come from the CPU and go back there.
    """

    device: torch.device
    registered: bool

    def __str__(self) -> str:
        return f"{'registered ops' if self.registered else 'eager twin'} on {self.device}"

    def quantize(self, x: Tensor, fmt: FloatFormat, *how: Any) -> Tensor:
        """`how`: rounding, then optionally saturate, seed, offset, random_bits."""
        return self._cast("quantize", x, fmt, *how)

    def encode(self, x: Tensor, fmt: FloatFormat, *how: Any) -> Tensor:
        """As `quantize`."""
        return self._cast("encode", x, fmt, *how)

    def decode(self, codes: Tensor, fmt: FloatFormat, dtype: torch.dtype) -> Tensor:
        codes = codes.to(self.device)
        values = _ops.decode(codes, fmt.fields, dtype) if self.registered else eager.decode(codes, fmt, dtype)
        return values.cpu()

    def sums(self, x: Tensor, accumulator: Accumulator, seed: int = 0, offset: int = 0) -> Tensor:
        """Of the rows of x [O, K]."""
        return self._accumulate("accumulate", (x,), accumulator, seed, offset)

    def matmul(self, a: Tensor, b: Tensor, accumulator: Accumulator, seed: int = 0, offset: int = 0) -> Tensor:
        """The product of [B, M, K] and [B, K, N]."""
        return self._accumulate("matmul", (a, b), accumulator, seed, offset)

    def _accumulate(
        self, name: str, inputs: tuple[Tensor, ...], accumulator: Accumulator, seed: int, offset: int
    ) -> Tensor:
        inputs, draws = tuple(x.to(self.device) for x in inputs), (torch.tensor(seed), torch.tensor(offset))
        if self.registered:
            result: Tensor = getattr(_ops, name)(*inputs, accumulator.fields, *draws)
        else:
            result = getattr(eager_accumulate, name)(*inputs, accumulator, *draws)
        return result.cpu()

    def _cast(
        self,
        name: str,
        x: Tensor,
        fmt: FloatFormat,
        rounding: Rounding,
        saturate: bool = True,
        seed: int = 0,
        offset: int = 0,
        random_bits: int = 32,
    ) -> Tensor:
        rest = (saturate, torch.tensor(seed), torch.tensor(offset), random_bits)
        x = x.to(self.device)
        if self.registered:
            result: Tensor = getattr(_ops, name)(x, fmt.fields, rounding.number, *rest)
        else:
            result = getattr(eager, name)(x, fmt, rounding, *rest)
        return result.cpu()


def engines(device: torch.device) -> list[Engine]:
    """Every implementation on a device; on the CPU the registered ops only where they are not the eager twin itself."""
    registered = [Engine(device, True)] if device.type != "cpu" or _ops.libraries["cpu"] == "loaded" else []
    return [Engine(device, False), *registered]


@lru_cache(maxsize=4096)
def holds(fmt: FloatFormat, dtype: torch.dtype) -> bool:
    """Whether a dtype holds every finite value of a format, by trying each."""
    values = torch.from_numpy(grid(fmt).values[:-1])
    return torch.equal(values.to(dtype).to(torch.float64), values)


def float64(x: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The numbers of a float tensor as numpy float64, exactly, NaN's signs kept."""
    values = x.to(torch.float64).numpy()
    return np.copysign(values, np.where(x.signbit().numpy(), -1.0, 1.0))
