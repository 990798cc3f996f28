"""The judge itself: against the definitions written out, published values, and its own array forms."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from lowprec import reference
from lowprec.formats import NAMES, SPECIALS, FloatFormat
from lowprec.formats import format as lookup
from lowprec.rounding import Rounding
from lowprec.testing import canonical_codes, neighbourhood, special_values
from tests.engines import float64
from tests.judge import grid, judge, place, words

SMALL = [
    lookup(f"1-{split}:specials={specials}{subnormals}")
    for split in ("2-0", "2-1", "3-2")
    for specials in SPECIALS
    for subnormals in ("", ",subnormals=off")
    if not (split == "2-0" and specials == "ieee")
] + [lookup("1-0-3"), lookup("1-0-4:specials=fn"), lookup("1-0-3:specials=fnuz"), lookup("1-0-3:specials=p3109")]
DETERMINISTIC = [mode for mode in Rounding if mode is not Rounding.stochastic]


@cache
def magnitude_grid(fmt: FloatFormat) -> list[tuple[int, Fraction]]:
    """Magnitude codes and values of the grid without bound, a few binades past the largest value, from the formula."""
    rows = []
    for code in range(fmt.max_code + 1 + 3 * (1 << fmt.mbits)):
        exponent, mantissa = (code >> fmt.mbits, code % (1 << fmt.mbits)) if fmt.ebits else (0, code)
        significand = Fraction(mantissa + (1 << fmt.mbits) * (exponent > 0), 1 << fmt.mbits)
        if exponent or fmt.subnormals or code == 0:
            rows.append((code, significand * Fraction(2) ** (max(exponent, 1) - fmt.bias)))
    return rows


def samples(fmt: FloatFormat) -> list[Fraction]:
    """Values, midpoints, and points a third and a hair beside them."""
    values = [value for _, value in magnitude_grid(fmt)]
    between = [
        low + (high - low) * part
        for low, high in itertools.pairwise(values)
        for part in (
            Fraction(1, 10**9),
            Fraction(1, 3),
            Fraction(1, 2),
            Fraction(1, 2) + Fraction(1, 10**9),
            Fraction(3, 4),
        )
    ]
    return values[:-1] + between


def choose(fmt: FloatFormat, mode: Rounding, x: Fraction, negative: bool) -> int:
    """What the contract says, by search: the code on the grid without bound."""
    rows = magnitude_grid(fmt)
    place = bisect_right(rows, x, key=lambda row: row[1]) - 1
    (low, below), (high, above) = rows[place], rows[place + 1]
    if x == below:
        return low
    toward = {
        Rounding.toward_zero: low,
        Rounding.up: low if negative else high,
        Rounding.down: high if negative else low,
    }
    if mode in toward:
        return toward[mode]
    # Zero is even and, where the normals follow it at once, the smallest of these odd.
    odd = high if low == 0 or low % 2 == 0 else low
    if mode is Rounding.to_odd:
        return odd
    if x - below != above - x:
        return low if x - below < above - x else high
    return high if mode is Rounding.nearest_away else low + high - odd


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_rounding_is_the_definition_by_search(fmt: FloatFormat) -> None:
    for x, negative, mode in itertools.product(samples(fmt), (False, True), DETERMINISTIC):
        signed = -x if negative else x
        assert reference.round_magnitude(fmt, signed, mode, 0, 32) == choose(fmt, mode, x, negative), (signed, mode)


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_stochastic_rounding_is_the_definition(fmt: FloatFormat) -> None:
    """Upper iff F + word >= 2^bits, F the fraction truncated to those bits."""
    fractions = (Fraction(0), Fraction(1, 10**12), Fraction(1, 3), Fraction(1, 2), 1 - Fraction(1, 10**12))
    for (low, below), (high, above) in itertools.pairwise(magnitude_grid(fmt)):
        for fraction, random_bits in itertools.product(fractions, (32, 16, 8)):
            x = below + (above - below) * fraction
            truncated = math.floor(fraction * 2**random_bits)
            for word in {0, 1, 2**random_bits - truncated - 1, min(2**random_bits - truncated, 2**random_bits - 1)}:
                expected = high if truncated + word >= 2**random_bits else low
                assert reference.round_magnitude(fmt, x, Rounding.stochastic, word, random_bits) == expected


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_an_exact_value_never_moves(fmt: FloatFormat) -> None:
    for code, mode in itertools.product(canonical_codes(fmt).tolist(), Rounding):
        value = reference.decode(code, fmt)
        assert reference.encode(value, fmt, mode, saturate=False, word=2**32 - 1) == code


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "e4m3fn",
            {0x00: 0.0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x7E: 448.0, 0x80: -0.0, 0xFE: -448.0},
        ),
        ("e5m2", {0x01: 2**-16, 0x04: 2**-14, 0x3C: 1.0, 0x7B: 57344.0, 0x7C: math.inf, 0xFC: -math.inf}),
        ("e4m3", {0x01: 2**-9, 0x77: 240.0, 0x78: math.inf}),
        ("e3m4", {0x01: 2**-6, 0x30: 1.0, 0x6F: 15.5, 0x70: math.inf}),
        ("e4m3fnuz", {0x01: 2**-10, 0x40: 1.0, 0x7F: 240.0, 0xFF: -240.0}),
        ("e5m2fnuz", {0x01: 2**-17, 0x40: 1.0, 0x7F: 57344.0}),
        ("e4m3b11fnuz", {0x01: 2**-13, 0x58: 1.0, 0x7F: 30.0}),
        ("e2m1fn", dict(enumerate([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]))),
        ("e2m3fn", {0x01: 0.125, 0x1F: 7.5}),
        ("e3m2fn", {0x01: 0.0625, 0x1F: 28.0}),
        ("bf16", {0x0001: 2**-133, 0x3F80: 1.0, 0x7F7F: 3.3895313892515355e38, 0x7F80: math.inf}),
        ("fp16", {0x0001: 2**-24, 0x3C00: 1.0, 0x7BFF: 65504.0, 0x7C00: math.inf}),
        ("tf32", {0x1FC00: 1.0, 0x3FBFF: 3.4011621342146535e38, 0x3FC00: math.inf}),
        ("fp32", {0x00000001: 2**-149, 0x3F800000: 1.0, 0x7F7FFFFF: 3.4028234663852886e38, 0x7F800000: math.inf}),
        ("p3109_k8p4", {0x01: 2**-10, 0x40: 1.0, 0x7E: 224.0, 0x7F: math.inf, 0xFF: -math.inf}),
        ("p3109_k8p3", {0x01: 2**-17, 0x40: 1.0, 0x7E: 49152.0, 0x7F: math.inf}),
        ("p3109_k8p1", {0x00: 0.0, 0x01: 2**-63, 0x40: 1.0, 0x7E: 2.0**62}),
        ("p3109_k8p4f", {0x7F: 240.0}),
        ("p3109_k3p2", {0x00: 0.0, 0x01: 0.5, 0x02: 1.0, 0x03: math.inf, 0x05: -0.5, 0x07: -math.inf}),
        ("1-4-3", {0x01: 2**-9, 0x7F: 480.0, 0xFF: -480.0}),
        ("1-4-3:emax=9", {0x7F: 960.0, 0x01: 2**-8}),
        ("1-5-2:emax=1", {0x7F: 3.5, 0x01: 2**-31}),
        ("1-0-3", {0x1: 0.25, 0x7: 1.75, 0xF: -1.75}),
        ("1-4-3:subnormals=off", {0x01: 0.0, 0x07: 0.0, 0x08: 2**-6, 0x87: -0.0}),
        ("1-4-3:specials=fnuz,subnormals=off", {0x07: 0.0, 0x87: 0.0, 0x88: -(2**-7)}),
    ],
)
def test_published_values(name: str, values: dict[int, float]) -> None:
    """OCP OFP8 tables 1 and 2, OCP MX tables 5 and 6, IEEE 754, the P3109 interim report, and the formula by hand."""
    for code, value in values.items():
        decoded = reference.decode(code, lookup(name))
        assert (decoded, math.copysign(1, decoded)) == (value, math.copysign(1, value)), hex(code)


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("e4m3fn", [0x7F, 0xFF]),
        ("e5m2", [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]),
        ("e4m3fnuz", [0x80]),
        ("e5m2fnuz", [0x80]),
        ("p3109_k8p4", [0x80]),
        ("1-4-3", []),
    ],
)
def test_published_nans(name: str, codes: list[int]) -> None:
    assert [code for code in range(256) if math.isnan(reference.decode(code, lookup(name)))] == codes


MAX, INF, NAN = "max", "inf", "nan"


@pytest.mark.parametrize(
    ("mode", "positive", "negative"),
    [
        ("nearest_even", INF, INF),
        ("nearest_away", INF, INF),
        ("toward_zero", MAX, MAX),
        ("up", INF, MAX),
        ("down", MAX, INF),
        ("to_odd", MAX, MAX),
        ("stochastic", INF, INF),
    ],
)
@pytest.mark.parametrize("specials", SPECIALS)
def test_overflow(mode: str, positive: str, negative: str, specials: str) -> None:
    """Far past the largest value: IEEE 754's rule where nothing saturates, NaN for a missing infinity."""
    fmt = FloatFormat(3, 2, specials=specials)
    for x, result in ((1e9, positive), (-1e9, negative)):
        wanted = math.copysign({MAX: fmt.max, INF: math.inf if fmt.has_inf else math.nan}[result], x)
        wanted = math.copysign(fmt.max, x) if specials == "finite" else wanted
        got = reference.quantize(x, fmt, mode, saturate=False, word=2**32 - 1)
        assert repr(got) == repr(wanted)
        assert math.copysign(1, got) == math.copysign(1, x)
        assert reference.quantize(x, fmt, mode, saturate=True) == math.copysign(fmt.max, x)


@pytest.mark.parametrize("specials", SPECIALS)
def test_infinity(specials: str) -> None:
    fmt = FloatFormat(3, 2, specials=specials)
    for x, mode in itertools.product((math.inf, -math.inf), Rounding):
        assert reference.quantize(x, fmt, mode) == math.copysign(fmt.max, x)
        got = reference.quantize(x, fmt, mode, saturate=False)
        missing = fmt.max if specials == "finite" else math.nan
        assert repr(abs(got)) == repr(math.inf if fmt.has_inf else missing)
        assert math.copysign(1, got) == math.copysign(1, x)


def test_overflow_begins_half_a_step_past_the_largest_value() -> None:
    """A finite number rounds with an unbounded exponent first: 464 is the tie between 448 and 480 in e4m3fn."""
    fmt = NAMES["e4m3fn"]
    below, above = math.nextafter(464.0, 0.0), math.nextafter(464.0, math.inf)
    assert reference.quantize(464.0, fmt, saturate=False) == 448.0
    assert reference.quantize(below, fmt, "nearest_away", saturate=False) == 448.0
    assert math.isnan(reference.quantize(464.0, fmt, "nearest_away", saturate=False))
    assert math.isnan(reference.quantize(above, fmt, saturate=False))
    assert reference.quantize(above, fmt) == 448.0
    assert reference.quantize(1e300, fmt, "to_odd", saturate=False) == 448.0


@pytest.mark.parametrize(
    ("name", "positive", "negative"),
    [
        ("e5m2", 0x7E, 0xFE),
        ("fp16", 0x7E00, 0xFE00),
        ("e4m3fn", 0x7F, 0xFF),
        ("e4m3fnuz", 0x80, 0x80),
        ("p3109_k8p4", 0x80, 0x80),
        ("1-4-3", 0x7F, 0x7F),
        ("1-3-1:specials=ieee", 0x0F, 0x1F),
    ],
)
def test_nan_codes(name: str, positive: int, negative: int) -> None:
    fmt = lookup(name)
    assert reference.encode(math.nan, fmt) == reference.encode(math.nan, fmt, saturate=False) == positive
    assert reference.encode(math.copysign(math.nan, -1), fmt) == negative


def test_zero_keeps_its_sign_where_the_format_has_one() -> None:
    for name, code in (("e4m3fn", 0x80), ("e4m3fnuz", 0), ("p3109_k8p4", 0), ("1-4-3:subnormals=off", 0x80)):
        for x in (-0.0, -1e-30):
            assert reference.encode(x, lookup(name), "toward_zero") == code


def test_a_fixed_point_format_goes_on_at_the_same_spacing() -> None:
    """e = 0: past the maximum 1.75 of 1-0-3 the next value would be 2, and overflow begins at their midpoint."""
    fmt = lookup("1-0-3:specials=fnuz")
    assert reference.quantize(1.8749, fmt, saturate=False) == 1.75
    assert math.isnan(reference.quantize(1.875, fmt, saturate=False))
    assert reference.neighbours(fmt, Fraction(10)) == (40, 41, False)


def test_powers_of_two_tie_by_the_exponents_last_bit() -> None:
    fmt = lookup("1-3-0")  # 0, 2^-2, 2^-1, ...: codes 0, 1, 2, ...
    assert [reference.encode(x, fmt) for x in (0.125, 0.375, 0.75, 1.5, 3.0)] == [0, 2, 2, 4, 4]


def test_without_subnormals_zero_is_even_and_the_smallest_normal_odd() -> None:
    fmt = lookup("1-4-3:subnormals=off")
    low = fmt.magnitude(8)
    assert reference.quantize(low / 2, fmt) == 0
    assert reference.quantize(math.nextafter(low / 2, 1), fmt) == low
    assert reference.quantize(low / 1000, fmt, "to_odd") == low
    assert reference.quantize(low / 1000, fmt, "up") == low
    assert reference.quantize(low * (1 + 1 / 16), fmt) == low, "as a lower neighbour its own code counts, which is even"


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**64 - 1, 2**64 - 1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0A4093822, (0x85A308D3243F6A88, 0x0370734413198A2E), "d16cfe09 94fdcceb 5001e420 24126ea1"),
        (1, (0, 2), "e73404cf 8cedc5d3 3f071736 0a0afddd"),
    ],
)
def test_philox_known_answers(key: int, counter: tuple[int, int], expected: str) -> None:
    """Three vectors of Salmon et al.'s Random123, and that of docs/numerics.md. Counters as (group, offset)."""
    group, offset = counter
    assert [f"{word:08x}" for word in reference.philox(key, offset, group)] == expected.split()


def test_random_words_split_from_the_low_end() -> None:
    four = reference.philox(1, 2, 0)
    assert [reference.random_word(1, 2, i) for i in range(4)] == list(four)
    assert [reference.random_word(1, 2, i, 16) for i in range(3)] == [four[0] & 0xFFFF, four[0] >> 16, four[1] & 0xFFFF]
    assert [reference.random_word(1, 2, i, 8) for i in (0, 1, 3, 4, 15)] == [0xCF, 0x04, 0xE7, 0xD3, 0x0A]
    assert reference.random_word(1, 2, 8, 16) == reference.philox(1, 2, 1)[0] & 0xFFFF
    assert reference.random_word(1, 2, 16, 8) == reference.philox(1, 2, 1)[0] & 0xFF
    assert reference.random_word(-1, 2, 0) == reference.random_word(2**64 - 1, 2, 0)


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_arrays_agree_with_scalars(fmt: FloatFormat) -> None:
    x = float64(torch.cat([neighbourhood(fmt, torch.float64), special_values(torch.float64)]))
    for mode, saturate in itertools.product(DETERMINISTIC, (True, False)):
        expected = [reference.encode(value, fmt, mode, saturate) for value in x.tolist()]
        assert reference.encode_array(x, fmt, mode, saturate).tolist() == expected
        assert judge(place(x, fmt), mode, saturate).codes.tolist() == expected


@pytest.mark.parametrize("random_bits", [32, 16, 8])
@pytest.mark.parametrize("fmt", SMALL[::3], ids=str)
def test_the_array_judge_agrees_with_scalars_stochastically(fmt: FloatFormat, random_bits: int) -> None:
    x = float64(torch.cat([neighbourhood(fmt), special_values(torch.float32)]))
    drawn = words(len(x), 7, 8, random_bits)
    judged = judge(place(x, fmt), Rounding.stochastic, False, drawn, random_bits)
    how = (Rounding.stochastic, False)
    pairs = list(zip(x.tolist(), drawn.tolist(), strict=True))
    assert judged.codes.tolist() == [reference.encode(v, fmt, *how, int(word), random_bits) for v, word in pairs]
    values = np.array([reference.quantize(v, fmt, *how, int(word), random_bits) for v, word in pairs])
    np.testing.assert_array_equal(judged.values, values)
    np.testing.assert_array_equal(np.signbit(judged.values), np.signbit(values))


def test_the_array_judges_grid_is_the_references() -> None:
    for fmt in (*list(NAMES.values())[::3], NAMES["bf16"], NAMES["tf32"], NAMES["p3109_k16p5f"]):
        table = grid(fmt)
        picked = np.unique(np.linspace(0, len(table.codes) - 2, 50).astype(int))
        for code, value in zip(table.codes[picked].tolist(), table.values[picked].tolist(), strict=True):
            assert Fraction(value) == reference.grid(fmt, code)
        assert table.codes[-1] == fmt.max_code + 1


def test_tables_reach_the_end_of_float64() -> None:
    """The value past the largest is 2^1024 there, which no float64 reaches: it is where toward_zero would change."""
    fmt, mode = NAMES["p3109_k12p1f"], "toward_zero"
    x = np.array([fmt.max, math.nextafter(fmt.max, 0), math.nextafter(math.inf, 0), 2.0**-1074])
    assert reference.encode_array(x, fmt, mode).tolist() == [reference.encode(v, fmt, mode) for v in x.tolist()]


def test_decode_array_agrees_with_decode() -> None:
    fmt = NAMES["e5m2"]
    codes = np.arange(256).reshape(16, 16)
    expected = np.array([reference.decode(code, fmt) for code in range(256)]).reshape(16, 16)
    np.testing.assert_array_equal(reference.decode_array(codes, fmt), expected)


def test_fractions_are_numbers_too() -> None:
    third = Fraction(1, 3)
    assert reference.quantize(third, NAMES["fp32"]) == float(np.float32(1 / 3))
    assert reference.quantize(-third, NAMES["e4m3fn"]) == -0.34375
    assert reference.encode(Fraction(0), NAMES["e4m3fn"]) == 0
