"""What hypothesis draws: formats and accumulators of every kind, numbers near where they round, tensors."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from lowprec.accumulator import Accumulator, Level
from lowprec.cast import require_holds
from lowprec.eager import CONTAINERS
from lowprec.formats import SPECIALS, FloatFormat
from lowprec.formats import float_format as lookup
from lowprec.rounding import Rounding
from lowprec.testing import bits, neighbourhood, special_values

WELL_KNOWN = tuple(
    map(lookup, ("1-2-1", "1-5-2", "1-6-9", "e4m3fn", "e5m2fnuz", "p3109_k8p4", "1-0-7", "bf16", "fp32"))
)
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
        require_holds(fmt, dtype)
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


@st.composite
def accumulators(draw: st.DrawFn, dtype: torch.dtype) -> Accumulator:
    """Up to three levels, or an exact sum; formats that the carrier of a dtype holds, any mode, fan-ins mostly odd."""
    carrier = torch.float64 if dtype == torch.float64 else torch.float32

    def level(fan_ins: list[int | None]) -> Level:
        fmt = draw(st.one_of(st.sampled_from(WELL_KNOWN), formats(16, carrier), formats(32, carrier)))
        return Level(draw(st.sampled_from(fan_ins)), fmt, draw(modes), draw(st.sampled_from([None, True, False])))

    product = draw(st.one_of(st.none(), st.none(), formats(32, carrier)))
    if draw(st.integers(0, 4)) == 0:
        return Accumulator([level([None])], product, leaf="exact")
    lower = [level([1, 2, 3, 5, 7, 8, None]) for _ in range(draw(st.integers(0, 2)))]
    return Accumulator([*lower, level([2, 3, 5, 8, None])], product)


def terms(shape: tuple[int, ...], dtype: torch.dtype, fmt: FloatFormat, seed: int) -> Tensor:
    """Numbers whose sums and products fall where a format rounds, by a seed.

    Of many magnitudes around the format's own, few values (ties, cancellation), any bits, or zeros and special values.
    """
    rng = np.random.default_rng(seed)
    middle = (fmt.emin - fmt.mbits + fmt.emax) // 4  # a product of two such numbers is amid the format's
    kind = rng.integers(4)
    if kind == 2:
        width = 8 * dtype.itemsize
        integer = rng.integers(-(1 << (width - 1)), 1 << (width - 1), shape, dtype=np.int64)
        return torch.from_numpy(integer).to(CONTAINERS[dtype].integer).view(dtype)
    if kind == 1:
        x = np.ldexp(rng.integers(-4, 5, shape).astype(np.float64), middle + rng.integers(-1, 2))
    else:
        x = np.ldexp(rng.standard_normal(shape), middle + rng.integers(-fmt.mbits - 2, 3, shape))
    if kind == 3:
        special = rng.choice([0.0, -0.0, math.inf, -math.inf, math.nan, fmt.max, -fmt.max], shape)
        x = np.where(rng.random(shape) < 0.2, special, x)
    return torch.from_numpy(np.asarray(x)).to(dtype)


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
