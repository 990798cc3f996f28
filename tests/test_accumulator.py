"""Accumulators as data: what they take, their strings, and what their depth and bounds say."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec import reference_accumulate as judge
from lowprec._ops import accumulator_of
from lowprec.accumulator import Accumulator, Level
from lowprec.formats import format as lookup
from lowprec.rounding import Rounding

FORMATS = ("1-2-1", "1-5-2", "1-6-9", "e4m3fn", "bf16", "fp32", "1-0-7", "1-4-3:bias=9,subnormals=off")
TEXTS = (
    "1-6-9",
    "chunk64:1-6-9/fp32",
    "64*1-6-9/fp32",
    "pairwise:bf16",
    "exact",
    "exact:1-4-3",
    "tensor_core64",
    "tensor_core128:1-6-9 stochastic",
    "hopper_fp8",
    "hopper_fp8@128:fp32",
    "hopper_fp16@64:bf16",
    "4*1-5-2 stochastic/8*bf16 overflow/fp32 saturate",
    "1-6-9 overflow;product=bf16",
    "3*1-6-9/2*bf16",
)

levels = st.builds(
    Level,
    st.none() | st.integers(2, 9),
    st.sampled_from(FORMATS),
    st.sampled_from(list(Rounding)),
    st.none() | st.booleans(),
)
accumulators = st.builds(Accumulator, st.lists(levels, min_size=1, max_size=4), st.none() | st.sampled_from(FORMATS))


@pytest.mark.parametrize("text", TEXTS)
def test_strings_parse_back(text: str) -> None:
    accumulator = Accumulator.parse(text)
    assert Accumulator.parse(str(accumulator)) == accumulator
    assert eval(repr(accumulator), {"lowprec": __import__("lowprec.accumulator").accumulator}) == accumulator
    assert accumulator_of(tuple(accumulator.fields)) == accumulator
    assert pickle.loads(pickle.dumps(accumulator)) == accumulator


@given(accumulators)
def test_every_accumulator_parses_back(accumulator: Accumulator) -> None:
    assert Accumulator.parse(str(accumulator)) == accumulator
    assert hash(Accumulator.parse(str(accumulator))) == hash(accumulator)
    assert accumulator_of(tuple(accumulator.fields)) == accumulator


def test_short_names_are_levels() -> None:
    assert Accumulator.parse("chunk64:1-6-9/fp32") == Accumulator([Level(64, "1-6-9"), Level(None, "fp32")])
    assert Accumulator.parse("pairwise:bf16") == Accumulator.pairwise("bf16") == Accumulator([Level(2, "bf16")])
    assert Accumulator.parse("1-6-9") == Accumulator.sequential("1-6-9")
    assert Accumulator.parse("tensor_core64:1-6-9") == Accumulator.tensor_core(64, "1-6-9")
    assert Accumulator.parse("hopper_fp8@128:fp32") == Accumulator.hopper_fp8(128)
    assert Accumulator.chunked(4, "1-5-2", "fp32").levels[0].saturate
    assert not Accumulator.chunked(4, "1-5-2", "fp32").levels[1].saturate


@pytest.mark.parametrize(
    "text",
    [
        "",
        "foo",
        "chunk:1-6-9",
        "chunk0:fp32/fp32",
        "1*fp32",
        "pairwise:2*fp32",
        "pairwise:fp32/fp32/",
        "exact:fp32/fp32",
        "tensor_core10",
        "hopper_fp8@16",
        "1-6-9 foo",
        "1-6-9;x=1",
        "bfp8/64",
        "1-6-9 up down",
        "exact:fp32;product=x",
    ],
)
def test_other_strings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accumulator"):
        Accumulator.parse(text)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="fan_in must be at least 1"):
        Level(0, "fp32")
    with pytest.raises(TypeError, match="fan_in"):
        Level(2.0, "fp32")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="saturate"):
        Level(None, "fp32", saturate=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounding must be one of"):
        Level(None, "fp32", "nearest")
    for count in (0, 17):
        with pytest.raises(ValueError, match=f"levels must be 1 to 16, got {count}"):
            Accumulator([Level(2, "fp32")] * count)
    with pytest.raises(TypeError, match="of the type Level"):
        Accumulator(["fp32"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="leaf must be one of"):
        Accumulator([Level(None, "fp32")], leaf="wmma")
    with pytest.raises(ValueError, match="takes no product format"):
        Accumulator([Level(None, "fp32")], "bf16", leaf="hopper_fp16")
    with pytest.raises(ValueError, match="k must be at least 1"):
        Accumulator.tensor_core(0)
    with pytest.raises(TypeError, match="accumulator must be"):
        Accumulator.parse(3)  # type: ignore[arg-type]


def test_depth() -> None:
    assert [Accumulator.pairwise("bf16").depth(K) for K in (0, 1, 2, 3, 4, 5, 64)] == [0, 1, 2, 3, 3, 4, 7]
    assert [Accumulator.sequential("bf16").depth(K) for K in (0, 1, 100)] == [0, 1, 100]
    assert Accumulator.chunked(64, "1-6-9", "fp32").depth(1000) == 64 + 16
    assert Accumulator.chunked(64, "1-6-9", "1-6-9").depth(1000) == 64 + 15
    assert Accumulator([Level(64, "1-6-9"), Level(None, "1-6-9", "up")]).depth(1000) == 64 + 16
    assert Accumulator([Level(None, "1-6-9")], "bf16").depth(10) == 11
    assert Accumulator.exact("bf16").depth(1000) == 1
    with pytest.raises(ValueError, match="K must be at least 0"):
        Accumulator.exact().depth(-1)


def test_numbers_of_roundings() -> None:
    tree = Accumulator([Level(3, "bf16"), Level(2, "fp32")])
    assert [(run.inputs, run.first) for run in tree.runs(17)] == [(17, 0), (6, 17), (3, 23), (2, 26)]
    assert tree.roundings(17) == 28
    assert Accumulator.exact().roundings(99) == 1
    assert Accumulator.pairwise("fp32").roundings(0) == 0


def test_a_tree_of_ones_does_not_stagnate() -> None:
    ones = [judge.term(1.0)] * 64
    assert judge.accumulate(ones, Accumulator.sequential("1-5-2")) == 8
    assert judge.accumulate(ones, Accumulator.pairwise("1-5-2")) == 64


@given(
    st.lists(st.integers(-(2**20), 2**20).map(lambda n: n / 2**14), min_size=1, max_size=40),
    st.sampled_from(["1-8-4", "pairwise:1-8-3", "chunk5:1-8-3 up/1-8-6", "3*1-8-2 toward_zero/bf16", "exact:1-8-2"]),
)
def test_the_bound_holds(numbers: list[float], text: str) -> None:
    accumulator = Accumulator.parse(text)
    result = judge.accumulate([judge.term(x) for x in numbers], accumulator)
    error = abs(Fraction(result) - sum(map(Fraction, numbers)))
    assert error <= Fraction(accumulator.error_bound(len(numbers))) * sum(abs(Fraction(x)) for x in numbers)


def test_the_bound_of_a_tensor_core_is_its_own() -> None:
    with pytest.raises(ValueError, match="the hardware defines"):
        Accumulator.tensor_core(64).error_bound(128)


def test_formats_are_looked_up() -> None:
    assert Level(None, "bf16").fmt == lookup("bf16")
    with pytest.raises(ValueError, match="unknown format"):
        Level(None, "bf17")
