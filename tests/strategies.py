"""What hypothesis draws: formats of every kind, numbers near where they round, tensors of any shape and strides."""

from __future__ import annotations

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from lowprec.cast import _require_holds
from lowprec.formats import SPECIALS, FloatFormat
from lowprec.rounding import Rounding
from lowprec.testing import bits, neighbourhood, special_values

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
modes = st.sampled_from(list(Rounding))
dtypes = st.sampled_from(DTYPES)
random_bits = st.sampled_from([32, 16, 8])
words64 = st.integers(-(2**63), 2**63 - 1)


def possible(*args: int, **options: object) -> FloatFormat | None:
    """The format, or None where these fields make none."""
    try:
        return FloatFormat(*args, **options)  # type: ignore[arg-type]
    except ValueError:
        return None


def fits(fmt: FloatFormat, dtype: torch.dtype) -> bool:
    try:
        _require_holds(fmt, dtype)
    except ValueError:
        return False
    return True


@st.composite
def formats(draw: st.DrawFn, max_bits: int = 32, dtype: torch.dtype | None = None) -> FloatFormat:
    """Any format up to `max_bits`; one that `dtype` holds, if given. Biases may lie anywhere in float64's range."""
    ebits = draw(st.integers(0, min(10, max_bits - 2)))
    mbits = draw(st.integers(0 if ebits else 1, max_bits - 1 - ebits))
    fmt = possible(ebits, mbits, specials=draw(st.sampled_from(SPECIALS)), subnormals=draw(st.booleans()))
    assume(fmt is not None)
    low, high = {None: (-1074, 1023), torch.float16: (-24, 15)}.get(dtype, (-149, 127))
    room = (high - fmt.emax, fmt.emin - fmt.mbits - low)
    assume(room[0] + room[1] >= 0)
    shift = draw(st.one_of(st.just(0), st.integers(-room[1], room[0]))) if min(room) >= 0 else room[0]
    fmt = fmt.with_bias(fmt.bias - shift)
    assume(dtype is None or fits(fmt, dtype))
    return fmt


def numbers(fmt: FloatFormat, dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Bit patterns of a dtype as float64: anything, the special ones, or near a value or a midpoint of the format."""
    width = 8 * dtype.itemsize
    integer = {64: torch.int64, 32: torch.int32, 16: torch.int16}[width]
    anything = st.integers(-(1 << (width - 1)), (1 << (width - 1)) - 1)
    choices = [anything, st.sampled_from(bits(special_values(dtype)).tolist())]
    if fmt.bits <= 10:
        choices.append(st.sampled_from(bits(neighbourhood(fmt, dtype)).tolist()))
    return st.one_of(choices).map(lambda pattern: torch.tensor(pattern, dtype=integer).view(dtype).double().item())


def tensors(fmt: FloatFormat, dtype: torch.dtype, max_size: int = 40) -> st.SearchStrategy[Tensor]:
    """1-dim tensors of such numbers."""
    return st.lists(numbers(fmt, dtype), max_size=max_size).map(lambda values: torch.tensor(values, dtype=dtype))
