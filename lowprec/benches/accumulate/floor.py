"""How fast a GPU could be at best: how many lane-instructions it issues, over how many a term needs."""

from __future__ import annotations

import torch

from lowprec.timing import clocks

LANES = 128
"""Lane-instructions that a multiprocessor issues in one cycle: four schedulers, 32 lanes each (sm_80, sm_90)."""

INSTRUCTIONS = {"fp32": 1.0, "native": 1.0, "truncated": 2.2, "rare ties": 4.6, "narrow": 5.1, "stochastic": 18.5}
"""Issue slots that a term needs, by the way that CUDA takes, shared loads included.

fp32: one fused multiply-add. native: half a packed one in fp16 or bf16, which takes two cycles. The others are a
multiply-add and its rounding, counted in machine code (docs/kernels/accumulate.md): truncated, rare ties (any operands)
and narrow (operands of few digits). stochastic: a quarter of ten Philox rounds besides.
"""


def issue_rate(device: torch.device) -> float | None:
    """Lane-instructions a second at the largest clock; None where the driver does not say it."""
    words = clocks(device).get("clocks.max.sm", "").split()
    if not words or not words[0].isdigit():
        return None
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return float(count * LANES * int(words[0]) * 1e6)


def floor_of(arithmetic: str | None, rate: float | None) -> float | None:
    """Terms a second, if nothing but issue held them up."""
    return None if arithmetic is None or rate is None else rate / INSTRUCTIONS[arithmetic]
