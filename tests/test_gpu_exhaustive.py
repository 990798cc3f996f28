"""A part of what gpu_exhaustive.py does in full, so that every run of the GPU tests covers all binades in all modes."""

from __future__ import annotations

import pytest
import torch

from lowprec.rounding import Rounding
from tests.gpu_exhaustive import FORMATS, OPERATIONS, Row, run, table


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu_over_all_binades() -> None:
    """Every 1,021st of the 2^32 float32 inputs, in chunks whose last one is short."""
    rows = run(step=1021, seconds=600, size=1 << 20)
    assert len(rows) == len(Rounding) * len(FORMATS) * len(OPERATIONS)
    assert all(row.inputs == -(-(1 << 32) // 1021) for row in rows)
    assert not [row for row in rows if row.differences]


def test_a_difference_is_found_and_shown() -> None:
    """The comparison itself, on tensors that differ in one bit of one element."""
    row = Row("1-4-3", "up", "encode")
    given, codes = torch.tensor([1.0, 1.01, -0.0]), torch.tensor([0x38, 0x39, 0x80], dtype=torch.uint8)
    row.add(given, codes, codes)
    row.add(given, codes, codes ^ torch.tensor([0, 0, 0x80], dtype=torch.uint8))
    assert (row.inputs, row.differences) == (6, 1)
    assert row.first == "0x80000000: CPU 0x80, CUDA 0x0"
    every = [
        Row(fmt, "up", operation, differences=int(operation == "encode")) for fmt in FORMATS for operation in OPERATIONS
    ]
    assert table(every).splitlines()[1].split() == ["up", *["0", "/", "1"] * 3]
