"""Nearest-even rounding in a handful of element-wise operations: what a recurrent step can fuse with its neighbours.

`lowprec.quantize` is one opaque operator. Inside a compiled step, or where no compiled library serves a device, the
same bits come faster from plain arithmetic; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowprec import _ops
from lowprec.eager import CONTAINERS
from lowprec.formats import FloatFormat
from lowprec.rounding import Rounding

Cast = Callable[[Tensor], Tensor]


def caster(fmt: FloatFormat | None, dtype: torch.dtype, device_type: str, fuse: bool = False) -> Cast:
    """The cast of one role: nearest even; `ieee` formats overflow to infinity, others saturate; no format, no cast.

    Args:
        fmt: the format of the role.
        dtype: of the values that will be cast.
        device_type: "cpu" or "cuda".
        fuse: whether the cast is part of a step that `torch.compile` sees.
    """
    if fmt is None:
        return lambda x: x
    if is_short(fmt, dtype) and (fuse or _ops.libraries.get(device_type) != "loaded"):
        return nearest_even(fmt, dtype)
    fields, mode, saturate = fmt.fields, Rounding.nearest_even.number, not _overflows(fmt)
    return lambda x: _ops.quantize(x, fields, mode, saturate, None, None, 32)


def _overflows(fmt: FloatFormat) -> bool:
    return fmt.specials == "ieee"


def is_short(fmt: FloatFormat, dtype: torch.dtype) -> bool:
    """Whether `nearest_even` serves: an ordinary format well inside the dtype's range.

    Without mantissa bits, ties to the even code are not ties to the even multiple of the spacing.
    """
    precision, bias, _ = CONTAINERS[dtype]
    ordinary = fmt.ebits > 0 and fmt.mbits > 0 and fmt.subnormals and fmt.has_negative_zero and not _overflows(fmt)
    inside = fmt.emin - fmt.mbits > -bias and fmt.emax + precision - 1 - fmt.mbits < bias
    return ordinary and inside and fmt.mbits + 3 <= precision


def nearest_even(fmt: FloatFormat, dtype: torch.dtype) -> Cast:
    """`lowprec.quantize(x, fmt)` for tensors of a dtype, where `is_short`.

    Adding 1.5 · 2^k, so that the sum's last bit weighs as much as the format's at x, leaves the rounding to the adder.
    """
    precision, bias, integer = CONTAINERS[dtype]
    fraction = precision - 1
    largest, exponent_mask = fmt.max, (2 * bias + 1) << fraction
    lowest, raise_by, half = (fmt.emin + bias) << fraction, (fraction - fmt.mbits) << fraction, 1 << (fraction - 1)

    def cast(x: Tensor) -> Tensor:
        clipped = x.clamp(-largest, largest)
        exponent = (clipped.view(integer) & exponent_mask).clamp(min=lowest)
        shift = ((exponent + raise_by) | half).view(dtype)
        return ((clipped + shift) - shift).copysign(x)

    return cast
