"""The rows: ours, as a table of cases. Peers are in their own file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

import lowprec as lp
from lowprec.accumulator import Accumulator
from lowprec.benches.accumulate.operands import Operands
from lowprec.timing import Call

Goal = Literal["exact", "exact sums", "stochastic", "native", "tensor core", "none"]


@dataclass(frozen=True)
class Case:
    """A row: what to call, and what it is measured by.

    Attributes:
        name: unique.
        goal: which of the targets holds, if any.
        make: gives the call, from operands.
        arithmetic: what its floor is counted by, a key of `floor.INSTRUCTIONS`; None where there is none.
        sums: whether it sums the rows of one matrix, and does not multiply two.
        has_twin: whether the eager twin computes the same bits.
        shrink: by how much rows and columns are divided, for a peer that takes too long.
        by: whose code it is.
        devices: where it runs.
    """

    name: str
    goal: Goal
    make: Callable[[Operands], Call]
    arithmetic: str | None = None
    sums: bool = False
    has_twin: bool = True
    shrink: int = 1
    by: str = "lowprec"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def terms(self, size: Sequence[int]) -> int:
        """Terms that a call adds."""
        rows, columns, terms = size
        return rows * terms if self.sums else max(rows // self.shrink, 1) * max(columns // self.shrink, 1) * terms


def ours() -> list[Case]:
    """Every row of ours."""
    return [*_rounded(), *_native(), *_trees(), *_tensor_cores(), *_sums()]


def _matmul(kind: str, accumulator: str, goal: Goal, arithmetic: str | None, has_twin: bool = True) -> Case:
    how = Accumulator.parse(accumulator)

    def make(operands: Operands) -> Call:
        a, b = operands.pair(kind)
        seed = torch.tensor(7, device=a.device) if how.is_stochastic else None
        return lambda i: lp.matmul(a, b, how, seed=seed)

    return Case(f"{accumulator}, {kind}", goal, make, arithmetic, has_twin=has_twin)


def _from_codes(accumulator: str) -> Case:
    """Codes of 1-4-3 and 1-5-2 in, codes of 1-4-3 out, in one kernel."""
    how: dict[str, Any] = {"a_format": "1-4-3", "b_format": "1-5-2", "out_format": "1-4-3", "codes": True}

    def make(operands: Operands) -> Call:
        a, b = operands.pair("codes")
        return lambda i: lp.fused.matmul(a, b, accumulator, **how)

    return Case(f"{accumulator}, codes to codes", "tensor core", make, has_twin=False)


def _rounded() -> Iterator[Case]:
    """One running sum, rounded once at every term."""
    yield _matmul("fp8", "1-6-9", "exact sums", "narrow")
    yield _matmul("fp8 in bf16", "1-6-9", "exact sums", "narrow")
    yield _matmul("tiny", "1-6-9", "exact", "narrow")
    yield _matmul("fp32", "1-6-9", "exact", "rare ties")
    yield _matmul("fp8", "1-5-2", "exact", "narrow")
    yield _matmul("fp32", "1-5-2", "exact", "rare ties")
    yield _matmul("fp32", "1-6-9 toward_zero", "exact", "truncated")
    yield _matmul("fp8", "1-6-9 stochastic", "stochastic", "stochastic")
    yield _matmul("fp32", "1-6-9 stochastic", "stochastic", "stochastic")


def _native() -> Iterator[Case]:
    """Formats whose arithmetic the hardware has."""
    yield _matmul("fp32", "fp32", "none", "fp32")
    yield _matmul("fp16", "fp16", "native", "native")
    yield _matmul("bf16", "bf16", "native", "native")


def _trees() -> Iterator[Case]:
    yield _matmul("fp8", "chunk64:1-6-9/1-6-9", "exact", "narrow")
    yield _matmul("fp8", "chunk64:1-6-9/fp32", "exact", "narrow")
    yield _matmul("fp32", "chunk64:1-6-9/fp32", "exact", "rare ties")
    yield _matmul("fp8", "pairwise:1-6-9", "none", None)
    yield _matmul("fp32", "pairwise:1-6-9", "none", None)
    yield _matmul("fp8", "exact:fp32", "none", None)
    yield _matmul("fp32", "exact:fp32", "none", None)


def _tensor_cores() -> Iterator[Case]:
    """Leaves by tensor cores, whose arithmetic is the hardware's own, and the models of it."""
    for kind in ("bf16", "e4m3fn"):
        for k in (64, 128):
            for outer in ("1-6-9", "fp32"):
                yield _matmul(kind, f"tensor_core{k}:{outer}", "tensor core", None, has_twin=False)
    for k in (64, 128):
        yield _from_codes(f"tensor_core{k}:1-6-9")
    yield _matmul("bf16", "hopper_fp16:fp32", "none", None)
    yield _matmul("e4m3fn", "hopper_fp8@128:fp32", "none", None)


def _sums() -> Iterator[Case]:
    for accumulator in ("1-6-9", "chunk64:1-6-9/fp32", "pairwise:1-6-9", "exact:fp32", "fp32"):
        how = Accumulator.parse(accumulator)

        def make(operands: Operands, how: Accumulator = how) -> Call:
            x, _ = operands.pair("fp32")
            return lambda i: lp.sum(x, 1, how)

        yield Case(f"sum, {accumulator}", "none", make, sums=True)
