"""The rows of others: torch's own products, and the libraries that are installed.

A peer is called as its documentation says, and its result is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowprec.benches import running
from lowprec.benches.accumulate.cases import Case
from lowprec.benches.accumulate.operands import Operands
from lowprec.timing import Call

DENSE = "torch.matmul, bf16"
"""The row by which tensor-core rows are measured."""


def torchs() -> Iterator[Case]:
    """Products and sums whose order and rounding are the library's own."""
    yield _torch("torch.matmul, fp32", "fp32", torch.matmul)
    yield _torch(DENSE, "bf16", torch.matmul)
    yield Case("torch._scaled_mm, e4m3fn", "none", _scaled, by="torch", devices=("cuda",))
    yield _torch("torch.sum, fp32", "fp32", lambda a, _: a.sum(1), sums=True)


def _torch(name: str, kind: str, call: Callable[[Tensor, Tensor], object], sums: bool = False) -> Case:
    def make(operands: Operands) -> Call:
        a, b = operands.pair(kind)
        return lambda i: call(a, b)

    return Case(name, "none", make, by="torch", sums=sums)


def _scaled(operands: Operands) -> Call:
    a, b = operands.pair("e4m3fn")
    b, one = b.T.contiguous().T, torch.ones((), device=b.device)  # by columns, as it must lie
    how: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return lambda i: torch._scaled_mm(a, b, **how)


def _mptorch() -> Iterator[Case]:
    multiply = import_module("mptorch.quant").float_mm
    for words, options in (
        ("fma nearest", {"rounding": "nearest", "fma": True}),
        ("fma stochastic", {"rounding": "stochastic", "fma": True}),
        ("mul+add nearest", {"rounding": "nearest", "fma": False}),
    ):

        def make(operands: Operands, options: dict[str, Any] = options) -> Call:
            a, b = operands.pair("fp32")
            return lambda i: multiply(a, b, man_add=9, exp_add=6, man_mul=9, exp_mul=6, **options)

        name = f"MPTorch 1-6-9, {words}"
        yield Case(name, "none", make, by="MPTorch", devices=("cuda",))
        yield Case(name, "none", make, by="MPTorch", devices=("cpu",), shrink=8)


def _apytypes() -> Iterator[Case]:
    apytypes = import_module("apytypes")

    def make(operands: Operands) -> Call:
        a, b = operands.pair("fp8")
        x = apytypes.APyFloatArray.from_array(a.double().numpy(), exp_bits=4, man_bits=3)
        y = apytypes.APyFloatArray.from_array(b.double().numpy(), exp_bits=5, man_bits=2)

        def call(i: int) -> object:
            with apytypes.APyFloatAccumulatorContext(exp_bits=6, man_bits=9):
                return x @ y

        return call

    yield Case("APyTypes 1-6-9, fp8", "none", make, by="APyTypes", devices=("cpu",), shrink=4)


PEERS: running.Peers = {"MPTorch": ("mptorch", _mptorch), "APyTypes": ("apytypes", _apytypes)}
"""Peers: the package that has the version, and the rows, whose making imports it."""
