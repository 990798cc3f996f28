"""What holds for every format, mode and number: hypothesis looks for the exception."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowprec as lp
from lowprec import reference
from lowprec.eager import code_dtype
from lowprec.formats import FloatFormat
from lowprec.rounding import Rounding
from lowprec.testing import all_codes, assert_bits_equal, bits
from tests.engines import DTYPES, engines
from tests.strategies import dtypes, formats, modes, numbers, random_bits, tensors, words64

MIRROR = {mode: mode for mode in Rounding} | {Rounding.up: Rounding.down, Rounding.down: Rounding.up}


@st.composite
def casts(draw: st.DrawFn, max_bits: int = 32) -> tuple[Tensor, FloatFormat]:
    """A tensor and a format that its dtype holds."""
    dtype = draw(dtypes)
    fmt = draw(formats(max_bits, dtype))
    return draw(tensors(fmt, dtype)), fmt


@given(casts(), modes, st.booleans(), words64, words64, random_bits)
@settings(max_examples=300)
def test_every_engine_is_the_reference(
    device: torch.device,
    cast: tuple[Tensor, FloatFormat],
    mode: Rounding,
    saturate: bool,
    seed: int,
    offset: int,
    rb: int,
) -> None:
    x, fmt = cast
    words = [reference.random_word(seed, offset, i, rb) for i in range(len(x))]
    scalars = [
        (math.copysign(v, -1.0 if s else 1.0), w)
        for v, s, w in zip(x.tolist(), x.signbit().tolist(), words, strict=True)
    ]
    codes = torch.tensor([reference.encode(v, fmt, mode, saturate, w, rb) for v, w in scalars], dtype=torch.int64)
    values = torch.tensor([reference.quantize(v, fmt, mode, saturate, w, rb) for v, w in scalars], dtype=torch.float64)
    for engine in engines(device):
        how = (mode, saturate, seed, offset, rb)
        assert_bits_equal(
            engine.encode(x, fmt, *how), codes.to(code_dtype(fmt.fields)), given=x, what=f"{fmt} {engine}"
        )
        rounded = engine.quantize(x, fmt, *how)
        stand_in = values.isnan() & ~x.isnan()
        assert_bits_equal(rounded[x.isnan()], x[x.isnan()], what=f"{fmt} {engine}")
        assert_bits_equal(rounded.signbit(), values.signbit() & ~x.isnan() | x.signbit() & x.isnan(), given=x)
        assert rounded[stand_in].isnan().all()
        kept = ~values.isnan()
        assert_bits_equal(rounded[kept], values[kept].to(x.dtype), given=x[kept], what=f"{fmt} {engine}")


@given(casts(), modes, modes, st.booleans(), words64)
def test_rounding_twice_is_rounding_once(
    cast: tuple[Tensor, FloatFormat], mode: Rounding, again: Rounding, saturate: bool, seed: int
) -> None:
    x, fmt = cast
    once = lp.quantize(x, fmt, rounding=mode, saturate=saturate, seed=seed)
    twice = lp.quantize(once, fmt, rounding=again, saturate=saturate, seed=seed + 1)
    assert_bits_equal(twice, once, given=x)


@given(casts(), modes, words64)
def test_codes_mean_the_values(cast: tuple[Tensor, FloatFormat], mode: Rounding, seed: int) -> None:
    """decode(encode(x)) = quantize(x), NaN aside."""
    x, fmt = cast
    for saturate in (True, False):
        how: dict[str, Any] = {"rounding": mode, "saturate": saturate, "seed": seed}
        decoded = lp.decode(lp.encode(x, fmt, **how), fmt, dtype=x.dtype)
        rounded = lp.quantize(x, fmt, **how)
        kept = ~rounded.isnan()
        assert_bits_equal(decoded[kept], rounded[kept], given=x[kept])
        assert decoded[~kept].isnan().all() or not fmt.has_nan


@given(casts(), st.sampled_from(list(Rounding)[:6]), st.booleans())
def test_rounding_is_monotonic(cast: tuple[Tensor, FloatFormat], mode: Rounding, saturate: bool) -> None:
    x, fmt = cast
    ordered = x[~x.isnan()].sort().values
    rounded = lp.quantize(ordered, fmt, rounding=mode, saturate=saturate)
    rounded = rounded[~rounded.isnan()]
    assert (rounded[1:] >= rounded[:-1]).all()


@given(casts(), words64)
def test_stochastic_rounding_is_monotonic_for_one_word(cast: tuple[Tensor, FloatFormat], seed: int) -> None:
    """At one index, so at one word, a larger number never becomes a smaller one."""
    x, fmt = cast
    ordered = x[~x.isnan()].sort().values
    rounded = [
        lp.quantize(value, fmt, rounding="stochastic", seed=seed).item() for value in ordered.abs().sort().values
    ]
    assert all(low <= high for low, high in itertools.pairwise(rounded))


def negated(x: Tensor) -> Tensor:
    """-x by its bits: torch's own loses the sign of a bfloat16 NaN."""
    return (bits(x) ^ bits(torch.tensor(-0.0, dtype=x.dtype))).view(x.dtype)


@given(casts(), modes, st.booleans(), words64, random_bits)
def test_signs_mirror(cast: tuple[Tensor, FloatFormat], mode: Rounding, saturate: bool, seed: int, rb: int) -> None:
    """Rounding -x up is rounding x down; every other mode looks at the magnitude alone."""
    x, fmt = cast
    how: dict[str, Any] = {"saturate": saturate, "seed": seed, "random_bits": rb}
    rounded = lp.quantize(x, fmt, rounding=mode, **how)
    mirrored = negated(lp.quantize(negated(x), fmt, rounding=MIRROR[mode], **how))
    zero = (rounded == 0) & (not fmt.has_negative_zero)
    assert_bits_equal(mirrored.abs()[zero], rounded[zero])
    assert_bits_equal(mirrored[~zero & ~x.isnan()], rounded[~zero & ~x.isnan()], given=x[~zero & ~x.isnan()])


@given(formats(max_bits=12), modes, words64, dtypes)
def test_values_of_the_format_stay(fmt: FloatFormat, mode: Rounding, seed: int, dtype: torch.dtype) -> None:
    values = torch.from_numpy(fmt.values())
    assume(torch.equal(values.to(dtype).double(), values))
    x = values.to(dtype)
    for saturate in (True, False):
        assert_bits_equal(lp.quantize(x, fmt, rounding=mode, saturate=saturate, seed=seed), x, given=x)


@given(casts(), modes, words64)
def test_results_are_values_of_the_format(cast: tuple[Tensor, FloatFormat], mode: Rounding, seed: int) -> None:
    """And one of the two neighbours: no value of the format lies between a number and what it became."""
    x, fmt = cast
    assume(fmt.bits <= 16)
    x = x[~x.isnan()].double()
    values = fmt.values()
    rounded = lp.quantize(x, fmt, rounding=mode, seed=seed).numpy()
    assert np.isin(rounded, values).all()
    inside = np.clip(x.numpy(), -fmt.max, fmt.max)
    between = np.searchsorted(values, np.maximum(inside, rounded), "left") - np.searchsorted(
        values, np.minimum(inside, rounded), "right"
    )
    assert (between <= 0).all()


@given(casts(max_bits=16))
def test_the_directions_enclose_and_the_nearest_is_nearest(cast: tuple[Tensor, FloatFormat]) -> None:
    x, fmt = cast
    x = x[~x.isnan()].double().clamp(-fmt.max, fmt.max)
    by = {mode: lp.quantize(x, fmt, rounding=mode, seed=0) for mode in Rounding}
    down, up = by[Rounding.down], by[Rounding.up]
    assert (down <= x).all()
    assert (x <= up).all()
    assert_bits_equal(by[Rounding.toward_zero].abs(), torch.where(x < 0, up, down).abs())
    for rounded in by.values():
        assert ((rounded == down) | (rounded == up)).all()
    # Halves are exact, where differences of tiny and large numbers need not be.
    middle = down / 2 + up / 2
    for mode in (Rounding.nearest_even, Rounding.nearest_away):
        assert (by[mode][x < middle] == down[x < middle]).all()
        assert (by[mode][x > middle] == up[x > middle]).all()
    exact = down == up
    odd = lp.encode(by[Rounding.to_odd], fmt).to(torch.int64) % 2 == 1
    first = torch.tensor(fmt.magnitude(1 << fmt.mbits) if not fmt.subnormals else 0.0, dtype=torch.float64)
    assert (exact | odd | ((by[Rounding.to_odd].abs() == first) & (first > 0))).all()


@given(st.data(), formats(max_bits=16), modes, st.booleans(), words64)
def test_equal_numbers_round_alike_whatever_their_dtype(
    data: st.DataObject, fmt: FloatFormat, mode: Rounding, saturate: bool, seed: int
) -> None:
    narrow = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    x = data.draw(tensors(fmt, narrow))
    how: dict[str, Any] = {"rounding": mode, "saturate": saturate, "seed": seed}
    for wide in (torch.float32, torch.float64):
        kept = ~x.isnan()
        assert_bits_equal(lp.encode(x, fmt, **how)[kept], lp.encode(x.to(wide), fmt, **how)[kept], given=x[kept])


@given(formats(max_bits=16), dtypes, dtypes)
def test_codes_decode_alike_whatever_the_dtype(fmt: FloatFormat, one: torch.dtype, other: torch.dtype) -> None:
    codes = all_codes(fmt)[:: max(1, 2 ** (fmt.bits - 8))]
    try:
        first, second = lp.decode(codes, fmt, dtype=one), lp.decode(codes, fmt, dtype=other)
    except ValueError:
        assume(False)
    assert_bits_equal(first.double().nan_to_num(3.0), second.double().nan_to_num(3.0), given=codes)
    assert_bits_equal(first.signbit(), second.signbit(), given=codes)


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A view of a tensor: permuted, sliced with steps, expanded, flipped, narrowed to nothing."""
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(shape, generator=generator) * 4
    x = x.permute(draw(st.permutations(range(x.dim()))))
    for dim, size in enumerate(x.shape):
        start = draw(st.integers(0, max(size - 1, 0)))
        x = x.transpose(0, dim)[start :: draw(st.integers(1, 3))].transpose(0, dim)
    if draw(st.booleans()):
        x = x.unsqueeze(0).expand(3, *x.shape)
    if draw(st.booleans()):
        x = x.flip(draw(st.integers(0, x.dim() - 1)))
    return x


@given(views(), modes, words64)
def test_strides_do_not_matter(device: torch.device, x: Tensor, mode: Rounding, seed: int) -> None:
    x = x.to(device)
    how: dict[str, Any] = {"rounding": mode, "seed": seed}
    expected = lp.quantize(x.contiguous(), "e4m3fn", **how)
    assert_bits_equal(lp.quantize(x, "e4m3fn", **how), expected)
    assert lp.quantize(x, "e4m3fn", **how).stride() == torch.empty_like(x).stride()
    out = torch.empty_like(x)
    assert_bits_equal(lp.quantize(x, "e4m3fn", out=out, **how), expected)
    whole = torch.zeros((*x.shape, 2), device=device)
    assert_bits_equal(lp.quantize(x, "e4m3fn", out=whole[..., 0], **how), expected)
    assert not whole[..., 1].any()


@pytest.mark.gpu
@given(casts(), modes, st.booleans(), words64, words64, random_bits)
@settings(max_examples=300)
def test_devices_agree(
    cast: tuple[Tensor, FloatFormat], mode: Rounding, saturate: bool, seed: int, offset: int, rb: int
) -> None:
    x, fmt = cast
    how: dict[str, Any] = {"rounding": mode, "saturate": saturate, "seed": seed, "offset": offset, "random_bits": rb}
    assert_bits_equal(lp.quantize(x.cuda(), fmt, **how), lp.quantize(x, fmt, **how), given=x)
    assert_bits_equal(lp.encode(x.cuda(), fmt, **how), lp.encode(x, fmt, **how), given=x)


# Stochastic rounding.


def probability(x: float, fmt: FloatFormat, rb: int, count: int = 2**16) -> float:
    """How often x goes to its upper neighbour in magnitude, over `count` elements of one tensor."""
    upper = lp.quantize(torch.tensor(x, dtype=torch.float64), fmt, rounding="up" if x > 0 else "down").item()
    repeated = torch.full((count,), x, dtype=torch.float64)
    rounded = lp.quantize(repeated, fmt, rounding="stochastic", seed=12345, offset=6, random_bits=rb)
    return (rounded == upper).double().mean().item()


@pytest.mark.parametrize("rb", [32, 16, 8])
@pytest.mark.parametrize("fraction", [0.0, 1 / 256, 0.1, 0.25, 0.5, 2 / 3, 0.875, 255 / 256, 0.999])
@pytest.mark.parametrize(
    ("fmt", "low", "step"),
    [("e5m2", 1.0, 0.25), ("e4m3fn", -(2.0**-9), -(2.0**-9)), ("1-4-3:subnormals=off", 0.0, 2.0**-6)],
)
def test_the_mean_is_within_its_binomial_bound(fmt: str, low: float, step: float, fraction: float, rb: int) -> None:
    """Five standard deviations of 65,536 draws around the fraction, truncated to the random bits."""
    exact = math.floor(fraction * 2**rb) / 2**rb
    found = probability(low + step * fraction, lp.format(fmt), rb) if fraction else 0.0
    assert abs(found - exact) <= 5 * math.sqrt(exact * (1 - exact) / 2**16)
    assert abs(exact - fraction) <= 2.0**-rb


@given(st.integers(0, 255), st.integers(0, 2**20 - 1))
@settings(max_examples=30)
def test_the_probability_is_exact_at_8_bits(numerator: int, below: int) -> None:
    """Over all 256 words: x between 1 and 1.25 goes up in exactly floor(256 · fraction) cases, whatever comes below."""
    fmt = lp.format("e5m2")
    x = 1 + 0.25 * (numerator + below / 2**20) / 256
    ups = [reference.quantize(x, fmt, "stochastic", True, word, 8) == 1.25 for word in range(256)]
    assert sum(ups) == numerator
    assert ups == sorted(ups), "the largest words carry"


def first_index_of_every_byte(seed: int) -> list[int]:
    """For each byte the first element that draws it as its 8-bit word."""
    found: dict[int, int] = {}
    for index in range(8192):
        found.setdefault(reference.random_word(seed, 0, index, 8), index)
    return [found[byte] for byte in range(256)]


def test_the_tensors_probability_is_exact_at_8_bits(device: torch.device) -> None:
    """The same through a tensor, at 256 elements that between them draw every byte once."""
    indices = torch.tensor(first_index_of_every_byte(seed=77))
    for numerator in (0, 1, 100, 128, 255):
        x = torch.full((8192,), 1 + 0.25 * numerator / 256, device=device)
        rounded = lp.quantize(x, "e5m2", rounding="stochastic", seed=77, random_bits=8).cpu()
        assert int((rounded[indices] == 1.25).sum()) == numerator


@given(words64, words64, st.integers(1, 200), random_bits)
def test_a_longer_tensor_draws_the_same_words(seed: int, offset: int, count: int, rb: int) -> None:
    x = torch.linspace(1, 2, 200)
    how: dict[str, Any] = {"rounding": "stochastic", "seed": seed, "offset": offset, "random_bits": rb}
    assert_bits_equal(lp.quantize(x[:count], "e5m2", **how), lp.quantize(x, "e5m2", **how)[:count])


def test_words_of_different_seeds_offsets_and_elements_are_unrelated() -> None:
    """No pair of 64 streams agrees more often than chance: 4096 coin tosses each, within six standard deviations."""
    x = torch.full((4096,), 1.125)
    streams = [
        lp.quantize(x, "e5m2", rounding="stochastic", seed=seed, offset=offset) == 1.25
        for seed, offset in itertools.product(range(8), range(8))
    ]
    tosses = torch.stack(streams).double() * 2 - 1
    correlation = (tosses @ tosses.T).fill_diagonal_(0).abs().max().item()
    assert correlation <= 6 * math.sqrt(4096)
    lagged = max((tosses[:, lag:] * tosses[:, :-lag]).sum(1).abs().max().item() for lag in (1, 2, 3, 4, 8, 16))
    assert lagged <= 6 * math.sqrt(4096)


@given(st.sampled_from(DTYPES), st.data())
def test_patterns_survive_a_round_trip(dtype: torch.dtype, data: st.DataObject) -> None:
    """The tests' own tool: numbers are drawn by their bits, and a NaN keeps them."""
    fmt = lp.format("1-0-1")
    x = torch.tensor([data.draw(numbers(fmt, dtype))], dtype=dtype)
    assert_bits_equal(x, bits(x).view(dtype))
