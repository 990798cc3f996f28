"""Whether a row of ours is right: one small product of each sort is held to the eager twin."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowprec import sparse
from lowprec.benches.blocksparse.cases import Case
from lowprec.benches.twin import EagerTwin, assert_same
from lowprec.cast import decode
from lowprec.studies.kernels.work import BACKWARD, FORWARD, Operands, Pool, Work, call_of

TOKENS = 24

STEPS = {"bf16": 2.0**-7, "fp8": 2.0**-2}
"""By how much a rounding may go the other way where sums are a device's own: a step of the format, relative."""

SMALLEST = 2.0**-8
"""The same for what is near zero; weights are near 2^-5, their sums near 1."""


class Checks:
    """Each sort of product, checked when a row of it is the first."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, Pool(device)
        self._wrong: dict[Work, Exception | None] = {}

    def __call__(self, case: Case) -> None:
        """What a row of ours raises, or AssertionError where it is wrong, naming the first difference."""
        if case.by != "lowprec":
            return
        sort = replace(case.work, tokens=TOKENS, widening=1.0, pattern="sample")
        if sort not in self._wrong:
            self._wrong[sort] = self._check(sort)
        if error := self._wrong[sort]:
            raise error

    def _check(self, work: Work) -> Exception | None:
        try:
            self._compare(work)
        except Exception as error:  # of every row of this sort
            return error
        return None

    def _compare(self, work: Work) -> None:
        operands = Operands(work, sample(work.block), self.pool)
        with EagerTwin():
            expected = call_of(operands)(0)
        actual = call_of(operands)(0)
        if self.device.type == "cpu" or work.kind == "fp32":
            assert_same(actual, expected, "wrong result")
        else:
            _assert_close(_values(actual, work), _values(expected, work), STEPS[work.kind])


def sample(block: int) -> sparse.BlockLayout:
    """A small rectangular layout with an empty row and an empty column."""
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[2], mask[:, 1] = False, False
    return sparse.BlockLayout(mask, block)


def _values(result: object, work: Work) -> Tensor:
    assert isinstance(result, Tensor)
    if result.dtype != torch.uint8:
        return result.double()
    values = decode(result, FORWARD if work.op == "fprop" else BACKWARD)
    return values.double()


def _assert_close(actual: Tensor, expected: Tensor, step: float) -> None:
    """Within a rounding of sums that are formed in another order."""
    off = (actual - expected).abs() - step * expected.abs()
    assert bool((off <= SMALLEST).all()), f"wrong result: off by {float(off.max()):.3g} at most"
