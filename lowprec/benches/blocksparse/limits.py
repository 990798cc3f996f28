"""How fast a product could be at best: its bytes at the device's own copy, or its operations at dense products."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from lowprec.studies.kernels.work import PAST_CACHE
from lowprec.timing import Call, captured, time_in_rounds

EDGES = {"cuda": 4096, "cpu": 1024}
"""Rows, columns and terms of the dense product that counts as the device's best."""

ROUNDS, BUDGET = 7, 0.5

Limits = dict[str, float]
"""Bytes a second ("copy": read and written), operations a second by kind of operand."""


def measured_limits(device: torch.device) -> Limits:
    """Those that this device has, as measured now."""
    calls: dict[str, Call] = {}
    for name, (make, _) in _MEASURED.items():
        with suppress(Exception):  # what a device does not have is no limit that can be measured
            calls[name] = captured(make(device), device)
    seconds = time_in_rounds(calls, device, ROUNDS, BUDGET)
    return {name: _MEASURED[name][1](device) / each.median for name, each in seconds.items()}


def floor(found: Limits, kind: str, size: int, flops: int) -> float | None:
    """Seconds below which no product of so many bytes and operations comes; None where a limit is not known."""
    rate = found.get(kind, found.get("bf16"))
    return None if rate is None or "copy" not in found else max(size / found["copy"], flops / rate)


def _copy(device: torch.device) -> Call:
    source = torch.ones(PAST_CACHE // 4, device=device)
    target = torch.empty_like(source)
    return lambda i: target.copy_(source)


def _matmul(dtype: torch.dtype) -> Callable[[torch.device], Call]:
    def make(device: torch.device) -> Call:
        edge = EDGES[device.type]
        a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        return lambda i: torch.matmul(a, b)

    return make


def _scaled(device: torch.device) -> Call:
    """Products of float8 numbers, by cuBLAS."""
    if device.type != "cuda":
        raise NotImplementedError("only CUDA has products of float8 numbers")
    edge = EDGES[device.type]
    a, b = (torch.randn(edge, edge, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    how: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return lambda i: torch._scaled_mm(a, b.T, **how)


def _flops(device: torch.device) -> int:
    return 2 * EDGES[device.type] ** 3


_MEASURED: dict[str, tuple[Callable[[torch.device], Call], Callable[[torch.device], int]]] = {
    "copy": (_copy, lambda device: 2 * PAST_CACHE),
    "bf16": (_matmul(torch.bfloat16), _flops),
    "fp32": (_matmul(torch.float32), _flops),
    "fp8": (_scaled, _flops),
}
"""What is called, and how many bytes or operations that is."""
