"""Statistics: counts against the reference, sums against the written-out order, bit for bit."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

import lowprec as lp
from lowprec import _ops, reference
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal, neighbourhood, special_values

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# Counting.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts(dtype: torch.dtype, device: torch.device) -> None:
    """[elements, saturated, flushed, nan], added to; what passes the largest magnitude counts, whatever it became."""
    fmt = lp.format("e4m3fn")
    x = torch.tensor(
        [0.0, -0.0, 1.0, 448.0, 460.0, 470.0, -1e4, math.inf, math.nan, 2.0**-11, -(2.0**-10)], dtype=dtype
    )
    for saturate, (mode, saturated, flushed) in itertools.product(
        (True, False),
        [
            (Rounding.nearest_even, 3, 2),
            (Rounding.toward_zero, 2, 2),
            (Rounding.up, 4, 1),
            (Rounding.nearest_away, 3, 1),
        ],
    ):
        counts = torch.tensor([100, 200, 300, 400], device=device)
        args = (fmt.fields, mode.number, saturate, None, None, 32)
        values = _ops.quantize_count(x.to(device), *args, counts)
        assert counts.tolist() == [100 + len(x), 200 + saturated, 300 + flushed, 401]
        assert_bits_equal(values, _ops.quantize(x.to(device), *args))


@pytest.mark.parametrize("mode", Rounding)
def test_counts_agree_with_the_reference(mode: Rounding, device: torch.device) -> None:
    x = torch.cat([neighbourhood(lp.format("1-3-2")), special_values(torch.float32)])
    for text in ("1-3-2", "1-3-2:specials=fnuz", "1-3-2:specials=ieee,subnormals=off", "1-0-5:bias=3"):
        fmt, counts = lp.format(text), torch.zeros(4, dtype=torch.int64, device=device)
        _ops.quantize_count(x.to(device), fmt.fields, mode.number, False, None, None, 32, counts)
        drawn = [reference.random_word(0, 0, i) for i in range(len(x))]
        saturated = flushed = 0
        for value, word in zip(x.tolist(), drawn, strict=True):
            if math.isfinite(value):
                code = reference.round_magnitude(fmt, Fraction(value), mode, word, 32)
                saturated += code > fmt.max_code
                flushed += code == 0 and value != 0
        saturated += int(x.isinf().sum())
        assert counts.tolist() == [len(x), saturated, flushed, int(x.isnan().sum())]
