"""The rows: ours, as a table of cases. Peers are in their own file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops, fused
from lowprec.benches.casts.buffers import COLUMNS, Buffers
from lowprec.cast import fields_of
from lowprec.rounding import Rounding
from lowprec.timing import Call

Goal = Literal["copy", "quantize", "encode", "decode", "stochastic", "block", "statistics", "transposed", "none"]

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SHORT = {FLOAT32: "fp32", BFLOAT16: "bf16"}
FORMATS = ("1-4-3", "1-5-2", "e4m3fn", "1-0-7", "e4m3fnuz")
BLOCK_FORMATS = {"mxfp8_e4m3": 1 / 32, "mxfp4": 1 / 32, "nvfp4": 1 / 16, "bfp8/64": 1 / 64}
"""Block formats, and bytes of the scales for each element."""


@dataclass(frozen=True)
class Case:
    """A row: what to call, on which bytes, and what it is measured by.

    Attributes:
        name: unique.
        goal: which of the targets holds, if any.
        moved: bytes read and written, for each element.
        make: gives the call, from buffers.
        by: whose code it is.
        devices: where it runs.
    """

    name: str
    goal: Goal
    moved: float
    make: Callable[[Buffers], Call]
    by: str = "lowprec"
    devices: tuple[str, ...] = ("cpu", "cuda")


def rotating(inputs: list[Tensor], outputs: list[Tensor], call: Callable[[Tensor, Tensor], object]) -> Call:
    """The call on the inputs and outputs of each number in turn."""
    return lambda i: call(inputs[i % len(inputs)], outputs[i % len(outputs)])


def ours() -> list[Case]:
    """Every row of ours."""
    parts = (_quantize, _encode, _decode, _stochastic, _packed, _statistics, _blocks, _fused)
    return [case for part in parts for case in part()]


def _to_values(dtype: torch.dtype, fmt: str, goal: Goal = "quantize", **how: Any) -> Case:
    def make(buffers: Buffers) -> Call:
        options = how | ({"seed": buffers.seed} if goal == "stochastic" else {})
        return rotating(
            buffers.inputs(dtype), buffers.outputs(dtype), lambda x, out: lp.quantize(x, fmt, out=out, **options)
        )

    return Case(f"quantize {SHORT[dtype]} to {fmt}{_words(how)}", goal, 2 * dtype.itemsize, make)


def _to_codes(dtype: torch.dtype, fmt: str, goal: Goal = "encode", **how: Any) -> Case:
    def make(buffers: Buffers) -> Call:
        options = how | ({"seed": buffers.seed} if goal == "stochastic" else {})
        return rotating(
            buffers.inputs(dtype), buffers.outputs(torch.uint8), lambda x, out: lp.encode(x, fmt, out=out, **options)
        )

    return Case(f"encode {SHORT[dtype]} to {fmt}{_words(how)}", goal, dtype.itemsize + 1, make)


def _words(how: dict[str, Any]) -> str:
    words = (f"dim {value}" if name == "dim" else str(value) for name, value in how.items())
    return f", {' '.join(words)}" if how else ""


def _quantize() -> Iterator[Case]:
    for dtype in (FLOAT32, BFLOAT16):
        yield from (_to_values(dtype, fmt) for fmt in FORMATS)
        yield _to_values(dtype, "1-4-3", rounding="up")


def _encode() -> Iterator[Case]:
    for dtype in (FLOAT32, BFLOAT16):
        yield from (_to_codes(dtype, fmt) for fmt in ("1-4-3", "e4m3fn", "e5m2", "e4m3fnuz"))


def _decode() -> Iterator[Case]:
    for dtype in (FLOAT32, BFLOAT16):
        for fmt in ("e4m3fn", "e4m3fnuz"):

            def make(buffers: Buffers, dtype: torch.dtype = dtype, fmt: str = fmt) -> Call:
                return rotating(
                    buffers.codes(fmt),
                    buffers.outputs(dtype),
                    lambda codes, out: lp.decode(codes, fmt, dtype=dtype, out=out),
                )

            yield Case(f"decode {fmt} to {SHORT[dtype]}", "decode", 1 + dtype.itemsize, make)


def _stochastic() -> Iterator[Case]:
    for dtype in (FLOAT32, BFLOAT16):
        for bits in (32, 16, 8):
            yield _to_values(dtype, "1-4-3", "stochastic", rounding="stochastic", random_bits=bits)
        yield _to_codes(dtype, "e4m3fn", "stochastic", rounding="stochastic", random_bits=32)


def _packed() -> Iterator[Case]:
    for fmt, size in (("e2m1fn", 0.5), ("e3m2fn", 0.75)):

        def encoding(buffers: Buffers, fmt: str = fmt) -> Call:
            x = buffers.inputs(FLOAT32)
            return rotating(x, x, lambda x, _: lp.encode(x, fmt, pack=True))

        def decoding(buffers: Buffers, fmt: str = fmt) -> Call:
            packed = buffers.codes(fmt, pack=True)
            return rotating(packed, packed, lambda codes, _: lp.decode(codes, fmt, size=COLUMNS))

        yield Case(f"encode fp32 to {fmt}, packed", "encode", 4 + size, encoding)
        yield Case(f"decode packed {fmt} to fp32", "decode", 4 + size, decoding)


def _statistics() -> Iterator[Case]:
    for dtype in (FLOAT32, BFLOAT16):

        def rounded(buffers: Buffers, dtype: torch.dtype = dtype) -> Call:
            x, how = (
                buffers.inputs(dtype),
                (fields_of("1-4-3"), Rounding.nearest_even.number, True, None, None, 32, None),
            )

            def call(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
                stats = torch.zeros(9, dtype=torch.float64, device=buffers.device)
                return _ops.quantize_statistics(x, *how, stats, None), stats

            return rotating(x, x, call)

        def measured(buffers: Buffers, dtype: torch.dtype = dtype) -> Call:
            x = buffers.inputs(dtype)
            return rotating(x, x, lambda x, _: lp.measure(x, "1-4-3"))

        yield Case(f"quantize {SHORT[dtype]} to 1-4-3, statistics", "statistics", 2 * dtype.itemsize, rounded)
        yield Case(f"measure {SHORT[dtype]} in 1-4-3", "none", dtype.itemsize, measured)


def _blocks() -> Iterator[Case]:
    for fmt, scales in BLOCK_FORMATS.items():
        for dtype in (FLOAT32, BFLOAT16):

            def values(buffers: Buffers, dtype: torch.dtype = dtype, fmt: str = fmt) -> Call:
                return rotating(
                    buffers.inputs(dtype), buffers.outputs(dtype), lambda x, out: lp.quantize(x, fmt, out=out)
                )

            def codes(buffers: Buffers, dtype: torch.dtype = dtype, fmt: str = fmt) -> Call:
                x = buffers.inputs(dtype)
                return rotating(x, x, lambda x, _: lp.encode(x, fmt))

            # A scale for the whole tensor takes a read of its own before.
            first = dtype.itemsize if fmt == "nvfp4" else 0
            yield Case(f"quantize {SHORT[dtype]} to {fmt}", "block", first + 2 * dtype.itemsize, values)
            yield Case(f"encode {SHORT[dtype]} to {fmt}", "block", first + dtype.itemsize + 1 + scales, codes)
    for dtype in (FLOAT32, BFLOAT16):
        yield _to_values(dtype, "mxfp8_e4m3", "block", dim=0)
        yield _to_values(dtype, "bfp8/16x16", "block")


def _fused() -> Iterator[Case]:
    for dtype in (FLOAT32, BFLOAT16):
        width, short = dtype.itemsize, SHORT[dtype]

        def over(call: Callable[[Tensor], object], dtype: torch.dtype = dtype) -> Callable[[Buffers], Call]:
            return lambda buffers: rotating(buffers.inputs(dtype), buffers.inputs(dtype), lambda x, _: call(x))

        yield Case(
            f"{short} to 1-4-3 and transposed codes",
            "transposed",
            2 * width + 1,
            over(lambda x: fused.transpose(x, "1-4-3")),
        )
        yield Case(
            f"gelu of {short} to 1-4-3 codes",
            "none",
            width + 1,
            over(lambda x: fused.activate(x, "1-4-3", "gelu", codes=True)),
        )
        yield Case(
            f"relu of {short} to 1-4-3 values", "none", 2 * width, over(lambda x: fused.activate(x, "1-4-3", "relu"))
        )

    def adding(buffers: Buffers) -> Call:
        sums = buffers.outputs(FLOAT32, "sum")
        return rotating(buffers.inputs(BFLOAT16), sums, lambda x, y: fused.accumulate_(y, x, "1-5-10"))

    yield Case("add bf16 to fp32, rounded to 1-5-10", "none", 10, adding)
