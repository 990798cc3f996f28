"""Every format up to 8 bits, over every code and everywhere that rounding can go wrong; named formats over all inputs.

Formats: all 35 splits 1-e-m with 1 + e + m <= 8, times the five kinds of specials, times subnormals on and off, as far
as they exist (282 of them), each with its default bias, with its smallest spacing at float32's own (2^-149), and with
its largest exponent at float32's own (127). For each of them:

- every code decodes as the scalar reference says, into every dtype that holds the format, and encodes back;
- every value, every midpoint, the next value past the largest, and the two float32 neighbours of each of these, with
  both signs, infinities and NaNs, are rounded as the reference says in all modes, saturating or not; with the default
  bias also from float64, float16 and bfloat16, and stochastically with 32, 16 and 8 random bits;
- stochastic rounding carries exactly at fraction + word = 1, and not one unit below.

Named formats: all 65,536 bfloat16 and all 65,536 float16 inputs; all modes for the named formats and P3109 formats of 8
bits, `nearest_even` and `stochastic` for the other P3109 formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from lowprec import reference
from lowprec.eager import code_dtype
from lowprec.formats import NAMES, SPECIALS, FloatFormat
from lowprec.rounding import Rounding
from lowprec.testing import (
    all_codes,
    assert_bits_equal,
    bits,
    canonical_codes,
    neighbourhood,
    patterns,
    special_values,
)
from tests import judge as judges
from tests.engines import DTYPES, Engine, engines, float64, holds
from tests.judge import Array, Judged, as_codes, as_values, judge, place

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = [(ebits, mbits) for ebits in range(8) for mbits in range(8 - ebits) if ebits + mbits > 0]
DETERMINISTIC = [mode for mode in Rounding if mode is not Rounding.stochastic]
SEED, OFFSET = 2**40 + 12345, 2**33 + 7


def formats_of(ebits: int, mbits: int) -> Iterator[FloatFormat]:
    """Every format of a split with its default bias."""
    for specials in SPECIALS:
        for subnormals in (True, False):
            try:
                yield FloatFormat(ebits, mbits, specials=specials, subnormals=subnormals)
            except ValueError:
                continue


def biased(ebits: int, mbits: int) -> Iterator[FloatFormat]:
    """Every format of a split with its default bias, the largest and the smallest that float32 holds."""
    for fmt in formats_of(ebits, mbits):
        yield from dict.fromkeys([fmt, fmt.with_bias(150 - mbits), fmt.with_emax(127)])


def inputs(fmt: FloatFormat, dtype: torch.dtype) -> Tensor:
    return torch.cat([neighbourhood(fmt, dtype), special_values(dtype)])


@lru_cache(maxsize=8)
def random_words(count: int, random_bits: int) -> Array:
    return judges.words(count, SEED, OFFSET, random_bits)


def _words_for(x: Tensor, random_bits: int) -> Array:
    return random_words(2048 if len(x) <= 2048 else 65536, random_bits)[: len(x)]


def check(engine: Engine, x: Tensor, fmt: FloatFormat, judged: Judged, *how: object) -> None:
    """One cast of one engine against the judge: codes always, values where the dtype holds them."""
    what = f"{fmt}, {how}, {engine}"
    assert_bits_equal(engine.encode(x, fmt, *how), as_codes(judged, code_dtype(fmt.fields)), given=x, what=what)
    if holds(fmt, x.dtype):
        assert_bits_equal(engine.quantize(x, fmt, *how), as_values(judged, x), given=x, what=what)


def check_deterministic(
    device: torch.device, x: Tensor, fmt: FloatFormat, saturating: tuple[bool, ...] = (True, False)
) -> None:
    placed = place(float64(x), fmt)
    for mode in DETERMINISTIC:
        for saturate in saturating:
            judged = judge(placed, mode, saturate)
            for engine in engines(device):
                check(engine, x, fmt, judged, mode, saturate)


def check_stochastic(device: torch.device, x: Tensor, fmt: FloatFormat, random_bits: int, saturate: bool) -> None:
    words = _words_for(x, random_bits)
    judged = judge(place(float64(x), fmt), Rounding.stochastic, saturate, words, random_bits)
    for engine in engines(device):
        check(engine, x, fmt, judged, Rounding.stochastic, saturate, SEED, OFFSET, random_bits)


def test_every_split_is_there() -> None:
    formats = [fmt for split in SPLITS for fmt in formats_of(*split)]
    assert len(SPLITS) == 35
    assert len(set(formats)) == len(formats) == 282


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_code_decodes_as_the_reference_says(split: tuple[int, int], device: torch.device) -> None:
    for fmt in biased(*split):
        codes = all_codes(fmt)
        expected = torch.tensor([reference.decode(code, fmt) for code in codes.tolist()], dtype=torch.float64)
        for dtype in DTYPES:
            if holds(fmt, dtype):
                judged = Judged(codes.numpy(), expected.numpy(), expected.isnan().numpy())
                signs = torch.zeros(len(codes), dtype=dtype).copysign(expected.signbit().to(dtype) * -2 + 1)
                for engine in engines(device):
                    decoded = engine.decode(codes, fmt, dtype)
                    assert_bits_equal(decoded, as_values(judged, signs), given=codes, what=f"{fmt}, {engine}")


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_code_round_trips(split: tuple[int, int], device: torch.device) -> None:
    """encode(decode(code)) = code in every mode: infinities where it does not saturate, NaNs always."""
    for fmt in biased(*split):
        codes = canonical_codes(fmt)
        for engine in engines(device):
            values = engine.decode(codes, fmt, torch.float32)
            for mode in Rounding:
                what = f"{fmt}, {mode}, {engine}"
                assert_bits_equal(engine.encode(values, fmt, mode, False), codes, given=values, what=what)
                kept = ~values.isinf()
                assert_bits_equal(engine.encode(values, fmt, mode)[kept], codes[kept], given=values[kept], what=what)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_other_code_encodes_back_to_the_canonical_one(split: tuple[int, int], device: torch.device) -> None:
    """What is no canonical code is a NaN or, with subnormals off, a zero, and encodes to the canonical one."""
    for fmt in formats_of(*split):
        canonical = set(canonical_codes(fmt).tolist())
        others = torch.tensor([code for code in all_codes(fmt).tolist() if code not in canonical], dtype=torch.uint8)
        expected = [reference.encode(reference.decode(code, fmt), fmt) for code in others.tolist()]
        assert canonical.issuperset(expected)
        for engine in engines(device):
            values = engine.decode(others, fmt, torch.float32)
            assert (values.isnan() | (values == 0)).all()
            again = engine.encode(values, fmt, Rounding.nearest_even)
            assert_bits_equal(again, torch.tensor(expected, dtype=torch.uint8), given=others, what=f"{fmt}, {engine}")


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_neighbourhood_rounds_as_the_reference_says(split: tuple[int, int], device: torch.device) -> None:
    for fmt in biased(*split):
        check_deterministic(device, inputs(fmt, torch.float32), fmt)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_neighbourhood_in_other_dtypes(split: tuple[int, int], device: torch.device) -> None:
    for fmt in formats_of(*split):
        check_deterministic(device, inputs(fmt, torch.float64), fmt)
        for dtype in (torch.float16, torch.bfloat16):
            check_deterministic(device, inputs(fmt, dtype), fmt, (False,))


@pytest.mark.parametrize("random_bits", [32, 16, 8])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_neighbourhood_stochastically(split: tuple[int, int], random_bits: int, device: torch.device) -> None:
    for fmt in formats_of(*split):
        for dtype in (torch.float32, torch.float64):
            check_stochastic(device, inputs(fmt, dtype), fmt, random_bits, dtype is torch.float64)


@pytest.mark.parametrize("random_bits", [32, 16, 8])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_stochastic_rounding_carries_exactly_at_one(
    split: tuple[int, int], random_bits: int, device: torch.device
) -> None:
    """Between each two codes: fraction + word = 1 goes up; one unit of the last random bit less stays."""
    drawn = random_words(2048, random_bits)
    unit = 2.0**-random_bits
    for fmt in formats_of(*split):
        grid = fmt.values()[len(fmt.values()) // 2 :]
        low, high = np.tile(grid[:-1], 2), np.tile(grid[1:], 2)
        word = drawn[: len(low)]
        short = np.repeat([0.0, 1.0], len(grid) - 1)
        fraction = 1 - (word + short) * unit
        possible = fraction >= 0
        x = torch.from_numpy(np.where(possible, low + (high - low) * fraction, low))
        goes_up = (short == 0) & (word > 0) | (fraction == 1)
        expected = torch.from_numpy(np.where(goes_up, high, low))
        for engine in engines(device):
            rounded = engine.quantize(x, fmt, Rounding.stochastic, True, SEED, OFFSET, random_bits)
            assert_bits_equal(rounded, expected, given=x, what=f"{fmt}, {engine}")


def is_main(name: str) -> bool:
    return not name.startswith("p3109") or name.startswith("p3109_k8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if is_main(name) and name != "fp32"])
def test_all_16_bit_inputs_into_named_formats(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check_deterministic(device, patterns(dtype), NAMES[name])
    for random_bits in (32, 16, 8):
        check_stochastic(device, patterns(dtype), NAMES[name], random_bits, random_bits != 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if not is_main(name)])
def test_all_16_bit_inputs_into_p3109_formats(name: str, dtype: torch.dtype, device: torch.device) -> None:
    fmt, x = NAMES[name], patterns(dtype)
    judged = judge(place(float64(x), fmt), Rounding.nearest_even)
    for engine in engines(device):
        check(engine, x, fmt, judged, Rounding.nearest_even)
    check_stochastic(device, x, fmt, 32, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_all_16_bit_inputs_into_fp32(dtype: torch.dtype, device: torch.device) -> None:
    """float32 holds every 16-bit number, so that its code is the number's own float32 pattern; only NaNs change."""
    x, fmt = patterns(dtype), NAMES["fp32"]
    exact = bits(x.to(torch.float32)).to(torch.int64) & 0xFFFFFFFF
    quiet = (x.signbit().to(torch.int64) << 31) + 0x7FC00000
    expected = torch.where(x.isnan(), quiet, exact).to(torch.uint32)
    for engine in engines(device):
        for mode in Rounding:
            assert_bits_equal(engine.encode(x, fmt, mode, False), expected, given=x, what=f"{mode}, {engine}")
