"""The matrices that rows multiply: made once for each kind, and shared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.cast import encode, quantize


class Size(NamedTuple):
    """Of a product [rows, terms] · [terms, columns]."""

    rows: int
    columns: int
    terms: int


class Operands:
    """Random matrices, normal with a standard deviation of 1 before rounding; the same for the same size.

    Kinds: "fp32", in float32; "fp8", an activation in 1-4-3 and a gradient in 1-5-2, in float32; "tiny", those times
    powers of two that make sums in 1-6-9 subnormal; "fp8 in bf16", the same in bfloat16; "codes", the same as codes;
    "bf16", "fp16", "e4m3fn": in those dtypes.
    """

    def __init__(self, device: torch.device, size: Size) -> None:
        self.device, self.size = device, size
        self._made: dict[str, tuple[Tensor, Tensor]] = {}

    def smaller(self, by: int) -> Operands:
        """Those of a row that would take too long: rows and columns divided by so much."""
        if by == 1:
            return self
        rows, columns, terms = self.size
        return Operands(self.device, Size(max(rows // by, 1), max(columns // by, 1), terms))

    def pair(self, kind: str) -> tuple[Tensor, Tensor]:
        """[rows, terms] and [terms, columns] of a kind."""
        if kind not in self._made:
            shapes = (self.size.rows, self.size.terms), (self.size.terms, self.size.columns)
            a, b = (self._normal(seed, shape) for seed, shape in enumerate(shapes))
            self._made[kind] = _rounded(a, b, kind)
        return self._made[kind]

    def _normal(self, seed: int, shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)


def _rounded(a: Tensor, b: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "codes":
        return encode(a, "1-4-3"), encode(b, "1-5-2")
    if kind == "fp8 in bf16":
        return quantize(a, "1-4-3").bfloat16(), quantize(b, "1-5-2").bfloat16()
    if kind in ("fp8", "tiny"):
        scale = 2.0**-18 if kind == "tiny" else 1.0
        return quantize(a, "1-4-3") * scale, quantize(b, "1-5-2") * scale
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3fn": torch.float8_e4m3fn}.get(kind, torch.float32)
    return a.to(dtype), b.to(dtype)
