"""What a format is: names, strings, derived quantities, refusals, and being plain data."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given

import lowprec as lp
from lowprec import reference
from lowprec.formats import NAMES, SPECIALS, FloatFormat
from tests.strategies import formats


@pytest.mark.parametrize(
    ("name", "text", "largest", "smallest"),
    [
        ("e4m3fn", "1-4-3:specials=fn", 448.0, 2**-9),
        ("e5m2", "1-5-2:specials=ieee", 57344.0, 2**-16),
        ("e4m3", "1-4-3:specials=ieee", 240.0, 2**-9),
        ("e3m4", "1-3-4:specials=ieee", 15.5, 2**-6),
        ("e4m3fnuz", "1-4-3:specials=fnuz", 240.0, 2**-10),
        ("e5m2fnuz", "1-5-2:specials=fnuz", 57344.0, 2**-17),
        ("e4m3b11fnuz", "1-4-3:bias=11,specials=fnuz", 30.0, 2**-13),
        ("e2m1fn", "1-2-1", 6.0, 0.5),
        ("e2m3fn", "1-2-3", 7.5, 0.125),
        ("e3m2fn", "1-3-2", 28.0, 0.0625),
        ("bf16", "1-8-7:specials=ieee", (2 - 2**-7) * 2.0**127, 2**-133),
        ("fp16", "1-5-10:specials=ieee", 65504.0, 2**-24),
        ("tf32", "1-8-10:specials=ieee", (2 - 2**-10) * 2.0**127, 2**-136),
        ("fp32", "1-8-23:specials=ieee", (2 - 2**-23) * 2.0**127, 2**-149),
    ],
)
def test_names_mean_what_everyone_means(name: str, text: str, largest: float, smallest: float) -> None:
    fmt = lp.format(name)
    assert str(fmt) == text
    assert (fmt.max, fmt.min_subnormal) == (largest, smallest)


def test_the_table_has_no_other_names() -> None:
    ocp = {"e4m3fn", "e5m2", "e4m3", "e3m4", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e2m1fn", "e2m3fn", "e3m2fn"}
    assert {name for name in NAMES if not name.startswith("p3109")} == ocp | {"bf16", "fp16", "tf32", "fp32"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("p3109")])
def test_p3109_names(name: str) -> None:
    """K bits, precision P, bias 2^(K-P-1), as its interim report has it; the suffix f is its finite domain."""
    bits, precision = (int(part) for part in name.removeprefix("p3109_k").rstrip("f").split("p"))
    fmt = NAMES[name]
    assert (fmt.bits, fmt.mbits + 1, fmt.bias) == (bits, precision, 2 ** (bits - precision - 1))
    assert fmt.has_inf != name.endswith("f")
    assert not fmt.has_negative_zero
    assert math.isnan(reference.decode(1 << (bits - 1), fmt))
    assert reference.decode(1 << (bits - 2), fmt) == 1.0


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "e4m3fn"),
        (torch.float8_e5m2, "e5m2"),
        (torch.float8_e4m3fnuz, "e4m3fnuz"),
        (torch.float8_e5m2fnuz, "e5m2fnuz"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp16"),
        (torch.float32, "fp32"),
        (ml_dtypes.float8_e4m3b11fnuz, "e4m3b11fnuz"),
        (ml_dtypes.float8_e3m4, "e3m4"),
        (ml_dtypes.float6_e2m3fn, "e2m3fn"),
        (ml_dtypes.float4_e2m1fn, "e2m1fn"),
        (np.dtype(ml_dtypes.float8_e4m3), "e4m3"),
        (np.dtype("float16"), "fp16"),
        (np.float32, "fp32"),
    ],
    ids=str,
)
def test_dtypes_name_formats(dtype: object, name: str) -> None:
    assert lp.format(dtype) == NAMES[name]


@pytest.mark.parametrize(
    "bad", [None, 8, 4.3, b"1-4-3", [1, 4, 3], torch.float64, torch.int8, torch.float8_e8m0fnu, int, torch.nn.Linear]
)
def test_what_is_no_format_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError, match="expected a format"):
        lp.format(bad)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "e4m3fnz",
        "E4M3FN",
        "1-4",
        "2-4-3",
        "0-4-3",
        "1-4-3 ",
        " 1-4-3",
        "1-4-3\n",
        "1--4-3",
        "1-4--3",
        "1-x-3",
        "1-4-3:",
        "1-4-3,bias=3",
        "1-4-3:bias",
        "1-4-3:bias=",
        "1-4-3:bias=x",
        "1-4-3:bias=1.5",
        "1-4-3:bias=3,",
        "1-4-3:bias=3,bias=3",
        "1-4-3:Bias=3",
        "1-4-3:bias=1_0",
        "1-4-3:bias= 3",
        "1-4-3:subnormals=yes",
        "1-4-3:subnormals=True",
        "1-4-3:specials=OCP",
        "1-4-3:radix=2",
        "1-4-3:bias=3,emax=4",
        "1-٤-٣",
        "1-4-3:bias=٣",
        "p3109_k8p8",
        "p3109_k17p5",
        "p3109_k8p0",
        "1-999999999999-1",
        "1-4-3:bias=" + "9" * 5000,
    ],
)
def test_bad_strings_are_value_errors(text: str) -> None:
    with pytest.raises(ValueError, match="format|specials|not both"):
        lp.format(text)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown format 'fp8'.*1-e-m.*e4m3fn, e5m2.*fp32"):
        lp.format("fp8")


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((8, 24), {}, "at most 32 bits"),
        ((31, 1), {}, "at most 32 bits"),
        ((0, 0), {}, "1-0-0"),
        ((0, 3), {"specials": "ieee"}, "without exponent bits"),
        ((0, 3), {"subnormals": False}, "without exponent bits"),
        ((4, 0), {"specials": "ieee"}, "mantissa bit"),
        ((1, 1), {"specials": "ieee", "subnormals": False}, "no finite nonzero value"),
        ((1, 0), {"specials": "fn"}, "no finite nonzero value"),
        ((1, 0), {"specials": "p3109"}, "no finite nonzero value"),
        ((0, 1), {"specials": "fn"}, "no finite nonzero value"),
        ((-1, 3), {}, "at least 0"),
        ((4, -3), {}, "at least 0"),
        ((12, 3), {}, "float64 cannot hold"),
        ((4, 3), {"bias": 1073}, "float64 cannot hold"),
        ((4, 3), {"emax": 1024}, "float64 cannot hold"),
        ((4, 3), {"bias": 10**30}, "float64 cannot hold"),
        ((4, 3), {"bias": 7, "emax": 8}, "not both"),
        ((4, 3), {"specials": "ocp"}, "specials must be one of finite, ieee, fn, fnuz, p3109"),
    ],
)
def test_impossible_formats_are_refused(args: tuple[int, int], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloatFormat(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((4.0, 3), {}),
        (("4", 3), {}),
        ((True, 3), {}),
        ((4, None), {}),
        ((4, 3), {"bias": 7.0}),
        ((4, 3), {"bias": True}),
        ((4, 3), {"emax": 8.0}),
        ((4, 3), {"subnormals": 1}),
        ((4, 3), {"subnormals": "on"}),
    ],
)
def test_fields_of_a_wrong_type_are_type_errors(args: tuple[int, int], options: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        FloatFormat(*args, **options)  # type: ignore[arg-type]


def test_float64s_ends_are_allowed() -> None:
    assert FloatFormat(4, 3, bias=1072).min_subnormal == 2.0**-1074
    assert FloatFormat(4, 3, emax=1023).max == 1.875 * 2.0**1023


@pytest.mark.parametrize("specials", SPECIALS)
@pytest.mark.parametrize("ebits", range(1, 9))
def test_default_bias(ebits: int, specials: str) -> None:
    if ebits == 1 and specials == "ieee":
        assert FloatFormat(1, 2, specials="ieee").bias == 0
        return
    expected = 2 ** (ebits - 1) - (0 if specials in ("fnuz", "p3109") else 1)
    assert FloatFormat(ebits, 2, specials=specials).bias == expected


def test_the_slides_formats() -> None:
    """Gradients 2^1 .. 2^-31: 1-5-2 with emax = 1. Activations to 2^9: 1-4-3 with emax = 9."""
    gradient, activation = lp.format("1-5-2:emax=1"), lp.format("1-4-3:emax=9")
    assert (gradient.max, gradient.min_subnormal) == (3.5, 2**-31)
    assert gradient == lp.format("1-5-2:bias=30")
    assert math.floor(math.log2(activation.max)) == 9


def test_derived_quantities() -> None:
    fmt = lp.format("e5m2")
    assert (fmt.bits, fmt.ebits, fmt.mbits, fmt.bias, fmt.emax, fmt.emin) == (8, 5, 2, 15, 15, -14)
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (57344.0, 2**-14, 2**-16)
    assert (fmt.has_inf, fmt.has_nan, fmt.has_negative_zero) == (True, True, True)
    assert fmt.fields == [5, 2, 15, 1, 1]
    kinds = {kind: FloatFormat(4, 3, specials=kind) for kind in SPECIALS}
    assert [kind for kind in kinds if kinds[kind].has_inf] == ["ieee", "p3109"]
    assert [kind for kind in kinds if not kinds[kind].has_nan] == ["finite"]


@pytest.mark.parametrize(
    ("text", "normal", "subnormal"),
    [("1-4-3:subnormals=off", 2**-6, None), ("1-3-0", 0.25, None), ("1-0-3", None, 0.25)],
)
def test_smallest_values(text: str, normal: float | None, subnormal: float | None) -> None:
    """No min_subnormal without subnormals or when m = 0; no min_normal when e = 0."""
    assert (lp.format(text).min_normal, lp.format(text).min_subnormal) == (normal, subnormal)


@given(formats(max_bits=12))
def test_values_are_every_finite_value_once_ascending(fmt: FloatFormat) -> None:
    decoded = [reference.decode(code, fmt) for code in range(1 << fmt.bits)]
    expected = sorted({value for value in decoded if math.isfinite(value)})
    values = fmt.values()
    assert values.dtype == np.float64
    assert values.tolist() == expected
    assert max(expected) == fmt.max == fmt.magnitude(fmt.max_code)
    smallest = min(value for value in expected if value > 0)
    assert smallest == (fmt.min_subnormal if fmt.min_subnormal is not None else fmt.min_normal)


def test_values_stop_at_16_bits() -> None:
    assert len(lp.format("fp16").values()) == 2 * 31 * 1024 - 1
    with pytest.raises(ValueError, match="up to 16 bits"):
        lp.format("tf32").values()


@given(formats())
def test_strings_parse_back(fmt: FloatFormat) -> None:
    assert lp.format(str(fmt)) == fmt
    assert str(lp.format(str(fmt))) == str(fmt)
    assert eval(repr(fmt), {"lowprec": lp}) == fmt


@given(formats())
def test_formats_are_plain_data(fmt: FloatFormat) -> None:
    again = [pickle.loads(pickle.dumps(fmt, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*again, copy.copy(fmt), copy.deepcopy(fmt), lp.format(fmt)):
        assert other == fmt
        assert hash(other) == hash(fmt)
        assert (str(other), other.fields) == (str(fmt), fmt.fields)


@given(formats(), formats())
def test_equality_is_by_value(one: FloatFormat, other: FloatFormat) -> None:
    assert (one == other) == (one.fields == other.fields)


def test_a_pickle_leaves_cached_tables_behind() -> None:
    fmt = lp.format("fp16")
    fmt.values()
    assert len(pickle.dumps(fmt)) < 500


@given(formats())
def test_bias_and_emax_are_two_names_of_one_thing(fmt: FloatFormat) -> None:
    how = {"specials": fmt.specials, "subnormals": fmt.subnormals}
    assert FloatFormat(fmt.ebits, fmt.mbits, emax=fmt.emax, **how) == fmt
    assert fmt.with_emax(fmt.emax) == fmt.with_bias(fmt.bias) == fmt
    assert 2.0**fmt.emax <= fmt.max <= 2.0**fmt.emax * (2 - 2.0**-fmt.mbits)
    if fmt.emax > 0:
        lower = fmt.with_emax(fmt.emax - 1) if fmt.emin - fmt.mbits > -1074 else fmt
        assert fmt.bias + fmt.emax == lower.bias + lower.emax
        assert lower.max in (fmt.max, fmt.max / 2)


def test_a_format_is_frozen() -> None:
    fmt = lp.format("1-4-3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bias = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        fmt.other = 3  # type: ignore[attr-defined]


def test_formats_serve_as_keys() -> None:
    table = {lp.format("e5m2"): 1}
    assert table[lp.format("1-5-2:specials=ieee")] == 1
    assert lp.format("1-5-2") not in table
    assert lp.format("1-5-2") != "1-5-2"


@given(formats(max_bits=10))
def test_magnitude_is_the_references_grid(fmt: FloatFormat) -> None:
    for code in range(0, fmt.max_code + 1, max(1, fmt.max_code // 50)):
        assert Fraction(fmt.magnitude(code)) == reference.grid(fmt, code)
