"""The casts as users call them: every dtype, shape and stride, `out=`, random draws, and the largest formats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops, eager, reference
from lowprec.eager import CONTAINERS, code_dtype
from lowprec.formats import NAMES, SPECIALS, FloatFormat
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal, bits, neighbourhood, patterns, special_values
from tests.engines import DTYPES, Engine, engines, float64, holds
from tests.judge import as_codes, as_values, judge, place
from tests.strategies import possible

BY_SIZE = {8: ["e4m3fn", "1-4-3", "e2m1fn", "1-0-7"], 16: ["bf16", "fp16", "1-5-6"], 32: ["tf32", "fp32", "1-8-14"]}


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Numbers over the range of an 8-bit format, its ties and overflow among them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.randint(-8, 9, shape, generator=generator).double().exp2()
    return x.to(dtype).to(device)


# Shapes and strides.


def strided(device: torch.device) -> dict[str, Tensor]:
    """One tensor of each kind of memory layout."""
    x = sample((4, 6, 5, 8), device=device)
    return {
        "contiguous": x,
        "transposed": x.transpose(1, 3),
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": x[1:, ::2, :, 3:],
        "every other": x[..., ::2],
        "expanded": x[:, :1].expand(4, 6, 5, 8),
        "one number expanded": x[0, 0, 0, 0].expand(3, 4),
        "offset": x.flatten()[7:],
        "odd offset in bytes": x.half().flatten()[1:],
        "flipped": x.flip(0),
        "windows": x.flatten().unfold(0, 5, 2),
        "negated view": torch.complex(x, x).conj().imag,
        "zero-dim": x[0, 0, 0, 0],
        "empty": x[:0],
        "empty inside": x[:, :, :0].transpose(0, 3),
        "one element": x[:1, :1, :1, :1],
    }


LAYOUTS = list(strided(torch.device("cpu")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, device: torch.device) -> None:
    x = strided(device)[layout]
    for fmt, mode in itertools.product(("e4m3fn", "e5m2"), ("nearest_even", "stochastic")):
        plain = x.clone(memory_format=torch.contiguous_format)
        how = {"rounding": mode, "seed": 3, "offset": 4}
        assert_bits_equal(lp.quantize(x, fmt, **how), lp.quantize(plain, fmt, **how))
        codes = lp.encode(plain, fmt, **how)
        assert_bits_equal(lp.encode(x, fmt, **how), codes)
        like_x = torch.empty_like(x, dtype=torch.uint8).copy_(codes)
        assert_bits_equal(lp.decode(like_x, fmt, dtype=x.dtype), lp.decode(codes, fmt, dtype=x.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_strides_of_empty_like(layout: str, device: torch.device) -> None:
    x = strided(device)[layout]
    for result in (lp.quantize(x, "e4m3fn"), lp.encode(x, "e4m3fn")):
        assert result.shape == x.shape
        assert result.stride() == torch.empty_like(x).stride()
        assert result.device == x.device
        assert not result.is_neg()
    assert lp.quantize(x, "e4m3fn").data_ptr() != x.data_ptr() or x.numel() == 0


def test_channels_last_is_kept(device: torch.device) -> None:
    x = sample((2, 3, 4, 5), device=device).to(memory_format=torch.channels_last)
    for result in (lp.quantize(x, "e5m2"), lp.encode(x, "e5m2"), lp.decode(lp.encode(x, "e5m2"), "e5m2")):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (3,), (17,), (65, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = sample(shape, dtype, device)
    values, codes = lp.quantize(x, "e4m3fn"), lp.encode(x, "e4m3fn")
    assert (values.shape, values.dtype, values.device) == (x.shape, x.dtype, x.device)
    assert (codes.shape, codes.dtype, codes.device) == (x.shape, torch.uint8, x.device)
    assert_bits_equal(lp.decode(codes, "e4m3fn", dtype=dtype), values, given=x)


def test_large_tensors_go_through_every_parallel_path(device: torch.device) -> None:
    """Sizes around vectors and thread blocks, compared with the same numbers cast a few at a time."""
    for count in (1023, 1024, 1025, 100_003):
        x = sample((count,), device=device)
        expected = torch.cat([lp.quantize(part, "e4m3fn") for part in x.split(997)])
        assert_bits_equal(lp.quantize(x, "e4m3fn"), expected, given=x)


def test_parameters_and_inference_tensors() -> None:
    x = torch.nn.Parameter(sample((3, 4)))
    assert_bits_equal(lp.encode(x, "e4m3fn"), lp.encode(x.detach(), "e4m3fn"))
    with torch.inference_mode():
        assert_bits_equal(lp.quantize(sample((3, 4)), "e4m3fn"), lp.quantize(x, "e4m3fn"))


# Formats.


@pytest.mark.parametrize(("width", "name"), [(width, name) for width, names in BY_SIZE.items() for name in names])
def test_codes_have_the_smallest_dtype(width: int, name: str, device: torch.device) -> None:
    x = sample((50,), torch.float64, device)
    codes = lp.encode(x, name)
    assert codes.dtype == {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}[width]
    assert_bits_equal(lp.decode(codes, name, dtype=torch.float64), lp.quantize(x, name), given=x)


def test_a_format_argument_takes_what_format_takes() -> None:
    x = sample((50,))
    expected = lp.quantize(x, lp.format("e4m3fn"))
    for spec in ("e4m3fn", "1-4-3:specials=fn", torch.float8_e4m3fn):
        assert_bits_equal(lp.quantize(x, spec), expected)
        assert_bits_equal(lp.decode(lp.encode(x, spec), spec), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_native_codes_view_as_torchs_types(dtype: torch.dtype, device: torch.device) -> None:
    x = sample((200,), device=device)
    native = lp.encode(x, dtype).view(dtype)
    assert_bits_equal(native.float(), lp.quantize(x, dtype), given=x)
    assert_bits_equal(lp.decode(native), native.float())
    assert_bits_equal(lp.decode(native, "1-4-3"), lp.decode(native.view(torch.uint8), "1-4-3"))


def test_bits_above_the_format_are_ignored(device: torch.device) -> None:
    codes = torch.arange(256, device=device).to(torch.uint8)
    assert_bits_equal(lp.decode(codes, "e2m1fn"), lp.decode(codes & 15, "e2m1fn"))
    wide = torch.arange(65536, device=device).to(torch.uint16)
    assert_bits_equal(lp.decode(wide, "1-4-5"), lp.decode((wide.to(torch.int32) & 1023).to(torch.uint16), "1-4-5"))


@pytest.mark.parametrize(
    "split", [(ebits, mbits) for ebits in range(8) for mbits in range(8 - ebits) if ebits + mbits], ids=str
)
def test_a_dtype_that_cannot_hold_a_format_is_refused(split: tuple[int, int]) -> None:
    """Exactly where some value changes in the dtype: every format up to 8 bits, biases over float16's whole range.

    Formats of a single magnitude aside, of which the kernels ask for a spacing too.
    """
    for specials, subnormals in itertools.product(SPECIALS, (True, False)):
        plain = possible(*split, specials=specials, subnormals=subnormals)
        for bias in range(-23, 40, 6) if plain and len(plain.values()) > 3 else ():
            fmt = plain.with_bias(bias)
            for dtype in DTYPES:
                if holds(fmt, dtype):
                    lp.quantize(torch.zeros(0, dtype=dtype), fmt)
                    lp.decode(torch.zeros(0, dtype=torch.uint8), fmt, dtype=dtype)
                else:
                    with pytest.raises(ValueError, match=f"{dtype} cannot hold .*, a value of {fmt}"):
                        lp.quantize(torch.zeros(0, dtype=dtype), fmt)
                    with pytest.raises(ValueError, match="cannot hold"):
                        lp.decode(torch.zeros(0, dtype=torch.uint8), fmt, dtype=dtype)


@pytest.mark.parametrize("bias", ["bias=1070", "emax=1022"])
@pytest.mark.parametrize("specials", SPECIALS)
def test_biases_at_the_ends_of_float64(specials: str, bias: str, device: torch.device) -> None:
    """`encode` serves any bias from any dtype: the values of a format may all lie beyond the dtype's."""
    for subnormals in ("on", "off"):
        fmt = lp.format(f"1-4-3:specials={specials},subnormals={subnormals},{bias}")
        for dtype in DTYPES:
            x = torch.cat([special_values(dtype), sample((100,), dtype), neighbourhood(fmt, dtype)])
            placed = place(float64(x), fmt)
            for engine, mode, saturate in itertools.product(engines(device), list(Rounding)[:6], (True, False)):
                expected = as_codes(judge(placed, mode, saturate), torch.uint8)
                how = f"{fmt}, {mode}, {saturate}, {engine}"
                assert_bits_equal(engine.encode(x, fmt, mode, saturate), expected, given=x, what=how)


def test_fixed_point_far_past_its_largest_code(device: torch.device) -> None:
    """e = 0 goes on at the same spacing: a large number has a code far past any integer, and still overflows."""
    x = torch.tensor([1e300, -1e300, 1e18, 2.0**62, 2.0**63, 2.0**64, 2.0**100 + 2.0**60], dtype=torch.float64)
    for specials, engine in itertools.product(("finite", "fn", "fnuz", "p3109"), engines(device)):
        fmt = lp.format(f"1-0-7:specials={specials}")
        for mode, saturate in itertools.product(list(Rounding)[:6], (True, False)):
            judged = judge(place(float64(x), fmt), mode, saturate)
            assert_bits_equal(engine.encode(x, fmt, mode, saturate), as_codes(judged, torch.uint8), given=x)
            assert_bits_equal(engine.quantize(x, fmt, mode, saturate), as_values(judged, x), given=x)


def wide_formats() -> list[FloatFormat]:
    """Formats past the reach of tables, up to 32 bits."""
    splits = ("8-14", "8-23", "10-21", "5-26", "0-31", "1-30", "8-10", "0-20")
    kinds = (
        "",
        ":specials=fnuz",
        ":specials=p3109",
        ":subnormals=off",
        ":specials=fn,subnormals=off",
        ":specials=ieee",
    )
    texts = [f"1-{split}{kind}" for split in splits for kind in kinds]
    return [lp.format(text) for text in texts if not (text.startswith("1-0") and ("off" in text or "ieee" in text))]


@pytest.mark.parametrize("fmt", wide_formats(), ids=str)
def test_wide_formats_against_the_scalar_reference(fmt: FloatFormat, device: torch.device) -> None:
    near = [
        fmt.magnitude(code) for code in (1, 2, 3, (1 << fmt.mbits) - 1, 1 << fmt.mbits, fmt.max_code - 1, fmt.max_code)
    ]
    around = torch.tensor(
        [value * (1 + step * 2.0**-24) for value in near for step in (-1, 0, 1, 1 / 3)], dtype=torch.float64
    )
    x = torch.cat([around, -around, sample((10,), torch.float64), special_values(torch.float64)])
    drawn = [reference.random_word(5, 6, i) for i in range(len(x))]
    for mode, saturate in itertools.product(Rounding, (True, False)):
        pairs = list(zip(x.tolist(), drawn, strict=True))
        expected = [reference.encode(value, fmt, mode, saturate, word) for value, word in pairs]
        wanted = torch.tensor(expected, dtype=torch.int64).to(code_dtype(fmt.fields))
        for engine in engines(device):
            codes = engine.encode(x, fmt, mode, saturate, 5, 6)
            assert_bits_equal(codes, wanted, given=x, what=f"{fmt}, {mode}, {saturate}, {engine}")
            values = torch.where(x.isnan(), x, engine.decode(codes, fmt, torch.float64))
            rounded = engine.quantize(x, fmt, mode, saturate, 5, 6)
            same = values.isnan() | (bits(values) == bits(rounded))
            assert same.all()
            assert_bits_equal(rounded.isnan(), values.isnan())
            assert_bits_equal(rounded.signbit()[rounded.isnan()], x.signbit()[rounded.isnan()])


# No double rounding.


@pytest.mark.parametrize(
    ("value", "fmt", "expected"),
    [
        (-431.99999999999994, "e4m3fn", -416.0),  # in float32 it is the tie 432, which would go to 448
        (1 + 2.0**-4 + 2.0**-40, "e4m3fn", 1.125),  # in float32 it is the tie 1.0625, which would go to 1
        (1 + 2.0**-8 - 2.0**-50, "bf16", 1.0),
        (1 + 2.0**-8 + 2.0**-50, "bf16", 1 + 2.0**-7),
        (1 + 2.0**-11 + 2.0**-40, "fp16", 1 + 2.0**-10),
        (2.0**-10 * (1 + 2.0**-40), "e4m3fn", 2.0**-9),  # just past half the smallest subnormal
        (2.0**-10, "e4m3fn", 0.0),
        (3 * 2.0**-10 * (1 - 2.0**-45), "e4m3fn", 2.0**-9),
        (2.0**-150 * (1 + 2.0**-30), "fp32", 2.0**-149),
        (464 * (1 - 2.0**-50), "1-4-3:emax=8,specials=fn", 448.0),
    ],
)
def test_float64_rounds_once(value: float, fmt: str, expected: float, device: torch.device) -> None:
    for sign in (1, -1):
        x = torch.tensor([sign * value], dtype=torch.float64, device=device)
        assert lp.quantize(x, fmt).item() == sign * expected
        assert lp.decode(lp.encode(x, fmt), fmt, dtype=torch.float64).item() == sign * expected


def test_fp32_is_the_processors_own_rounding(device: torch.device) -> None:
    """float64 to float32, subnormals, ties and overflow included."""
    generator = torch.Generator().manual_seed(2)
    pattern = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=generator).view(torch.float64)
    ties = (patterns(torch.float32, 0, 2**31, 99_991).double() + patterns(torch.float32, 1, 2**31, 99_991).double()) / 2
    x = torch.cat([pattern, ties, -ties, sample((1000,), torch.float64) * 2.0**-130, special_values(torch.float64)])
    x = x[~x.isnan()]
    assert_bits_equal(lp.encode(x.to(device), "fp32", saturate=False).cpu(), x.float().view(torch.uint32), given=x)


def test_bf16_and_fp16_are_torchs_own_rounding_of_float32(device: torch.device) -> None:
    x = torch.cat([patterns(torch.float32, step=65_521), sample((5000,)), special_values(torch.float32)])
    x = x[~x.isnan()]
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        codes = lp.encode(x.to(device), name, saturate=False).cpu()
        assert_bits_equal(codes, x.to(dtype).view(torch.uint16), given=x)


# Special values.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_keeps_its_bits(dtype: torch.dtype, device: torch.device) -> None:
    x = special_values(dtype)
    x = x[x.isnan()]
    for name, mode, saturate in itertools.product(("1-4-3", "e4m3fnuz", "e5m2"), Rounding, (True, False)):
        fmt = lp.format(name)
        for engine in engines(device):
            assert_bits_equal(engine.quantize(x, fmt, mode, saturate) if holds(fmt, dtype) else x, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_of_zeros_infinities_and_stand_ins(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-12, -(2.0**-12)], dtype=dtype, device=device)
    rounded = lp.quantize(x, "1-3-2", rounding="toward_zero")
    assert rounded.signbit().tolist() == [False, True] * 3
    assert lp.quantize(x, "1-3-2:specials=fnuz", rounding="toward_zero").signbit().tolist()[:2] == [False, False]
    missing = lp.quantize(x, "1-3-2:specials=fn", saturate=False)[2:4]
    assert missing.isnan().all()
    assert missing.cpu().signbit().tolist() == [False, True]  # torch's own, on CUDA, loses the sign of a float16 NaN


# Writing into a given tensor.


def reversed_strides(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape whose first dimension lies innermost."""
    order = list(range(x.dim()))[::-1]
    return torch.empty(x.shape[::-1], dtype=dtype, device=x.device).permute(order)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "sliced", "zero-dim", "empty"])
@pytest.mark.parametrize("make", [reversed_strides, lambda x, dtype: torch.empty_like(x, dtype=dtype)])
def test_out(layout: str, make: Callable[[Tensor, torch.dtype], Tensor], device: torch.device) -> None:
    x = strided(device)[layout]
    for how in ({}, {"rounding": "stochastic", "seed": 5, "offset": 6, "random_bits": 8}):
        values, codes, decoded = (make(x, dtype) for dtype in (x.dtype, torch.uint8, torch.bfloat16))
        assert lp.quantize(x, "e4m3fn", out=values, **how) is values
        assert_bits_equal(values, lp.quantize(x, "e4m3fn", **how), given=x)
        assert lp.encode(x, "e4m3fn", out=codes, **how) is codes
        assert_bits_equal(codes, lp.encode(x, "e4m3fn", **how), given=x)
        assert lp.decode(codes, "e4m3fn", dtype=torch.bfloat16, out=decoded) is decoded
        assert_bits_equal(decoded, lp.decode(codes, "e4m3fn", dtype=torch.bfloat16))


def test_out_may_be_the_input_itself(device: torch.device) -> None:
    for x in (sample((100,), device=device), sample((8, 9), device=device).t()):
        expected = lp.quantize(x, "e4m3fn")
        assert_bits_equal(lp.quantize(x, "e4m3fn", out=x), expected)


def test_out_leaves_the_rest_of_its_storage_alone(device: torch.device) -> None:
    whole = torch.full((6, 8), 7.0, device=device)
    lp.quantize(sample((3, 4), device=device), "e4m3fn", out=whole[::2, ::2])
    assert (whole[1::2] == 7).all()
    assert (whole[:, 1::2] == 7).all()


# Random draws.


def expected_stochastic(x: Tensor, seed: int, offset: int, random_bits: int) -> Tensor:
    """By the scalar reference, elements numbered in row-major order."""
    fmt = NAMES["e5m2"]
    rounded = [
        reference.quantize(
            value, fmt, "stochastic", True, reference.random_word(seed, offset, i, random_bits), random_bits
        )
        for i, value in enumerate(x.flatten().tolist())
    ]
    return torch.tensor(rounded, dtype=x.dtype).reshape(x.shape)


@pytest.mark.parametrize("random_bits", [32, 16, 8])
@pytest.mark.parametrize(
    ("seed", "offset"), [(0, 0), (1, 2), (2**63 - 1, -1), (-5, 2**33), (2**64 - 1, 2**64 + 3), (2**32, 2**32)]
)
def test_words_depend_on_seed_offset_and_row_major_index(
    seed: int, offset: int, random_bits: int, device: torch.device
) -> None:
    x = sample((5, 7, 3), device=device).transpose(0, 2)
    expected = expected_stochastic(x, seed, offset, random_bits)
    how = {"rounding": "stochastic", "random_bits": random_bits}
    assert_bits_equal(lp.quantize(x, "e5m2", seed=seed, offset=offset, **how).cpu(), expected)
    signed = [(n + 2**63) % 2**64 - 2**63 for n in (seed, offset)]
    for where in {"cpu", device.type}:
        tensors = {name: torch.tensor(n, device=where) for name, n in zip(("seed", "offset"), signed, strict=True)}
        assert_bits_equal(lp.quantize(x, "e5m2", **tensors, **how).cpu(), expected)


def test_a_huge_tensors_index_goes_on_counting(device: torch.device) -> None:
    """The last elements of 2^20 draw the words of their own index."""
    count = 1 << 20
    x = torch.full((count,), 1.125, device=device)
    for random_bits in (32, 16, 8):
        rounded = lp.quantize(x, "e5m2", rounding="stochastic", seed=9, offset=10, random_bits=random_bits)
        for i in (0, 4095, 4096, count // 2 + 1, count - 1):
            word = reference.random_word(9, 10, i, random_bits)
            assert rounded[i].item() == reference.quantize(1.125, NAMES["e5m2"], "stochastic", True, word, random_bits)


def test_manual_seed_governs_the_default_draw(device: torch.device) -> None:
    x = sample((500,), device=device)
    draws = []
    for start in (7, 7, 8):
        torch.manual_seed(start)
        draws.append((lp.quantize(x, "e5m2", rounding="stochastic"), lp.encode(x, "e5m2", rounding="stochastic")))
    assert_bits_equal(draws[0][0], draws[1][0])
    assert_bits_equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not torch.equal(draws[0][0], lp.decode(draws[0][1], "e5m2")), "two calls draw two seeds"
    torch.manual_seed(7)
    seed = torch.empty((), dtype=torch.int64).random_()
    assert_bits_equal(lp.quantize(x, "e5m2", rounding="stochastic", seed=seed), draws[0][0])


def test_a_generator_supplies_one_seed_a_call(device: torch.device) -> None:
    x = sample((500,), device=device)
    before = torch.get_rng_state()
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for _ in range(2):
        seed = torch.empty((), dtype=torch.int64).random_(generator=twin)
        rounded = lp.quantize(x, "e5m2", rounding="stochastic", generator=generator)
        assert_bits_equal(rounded, lp.quantize(x, "e5m2", rounding="stochastic", seed=seed))
    assert torch.equal(before, torch.get_rng_state()), "the default generator is left alone"


def test_only_stochastic_rounding_draws() -> None:
    before = torch.get_rng_state()
    for mode in list(Rounding)[:6]:
        lp.quantize(sample((5,)), "e5m2", rounding=mode)
        lp.encode(sample((5,)), "e5m2", rounding=mode)
    lp.quantize(sample((5,)), "e5m2", rounding="stochastic", seed=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
def test_a_cuda_generator_serves_a_cuda_tensor() -> None:
    x = sample((500,), device="cuda")
    first, second = (
        lp.quantize(x, "e5m2", rounding="stochastic", generator=torch.Generator("cuda").manual_seed(4))
        for _ in range(2)
    )
    assert_bits_equal(first, second)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x = sample((300_001,))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(lp.quantize(x, "e5m2", rounding="stochastic", seed=1))
    torch.set_num_threads(threads)
    assert_bits_equal(results[0], results[1])
    assert_bits_equal(results[0], results[2])


def test_flush_to_zero_changes_nothing() -> None:
    """float32 subnormals are numbers, whatever the processor's mode."""
    x = patterns(torch.float32, 0, 1 << 23, 9973)
    fmt = lp.format("1-4-3:bias=146")
    expected = [engine.quantize(x, fmt, Rounding.nearest_even) for engine in engines(torch.device("cpu"))]
    if not torch.set_flush_denormal(True):
        return  # this processor has no such mode
    try:
        found = [engine.quantize(x, fmt, Rounding.nearest_even) for engine in engines(torch.device("cpu"))]
    finally:
        torch.set_flush_denormal(False)
    for before, after in zip(expected, found, strict=True):
        assert_bits_equal(after, before, given=x)


def test_engines_are_told_apart() -> None:
    """The eager twin is always among what these tests check, and the compiled kernels where they are loaded."""
    found = engines(torch.device("cpu"))
    assert not found[0].registered
    assert [engine.registered for engine in found[1:]] == [True] * (_ops.libraries["cpu"] == "loaded")
    assert all(isinstance(engine, Engine) for engine in found)
    assert set(CONTAINERS) == set(DTYPES)


SHIFTS = (-400, -130, -3, 0, 5, 130, 400)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["1-4-3", "1-5-2:emax=1", "1-0-7", "e4m3fnuz", "e5m2", "1-3-2:subnormals=off"])
def test_a_shift_lowers_the_bias_as_far_as_the_dtype_holds_the_values(
    device: torch.device, text: str, dtype: torch.dtype
) -> None:
    fmt = lp.format(text)
    low, high = eager.shift_range(fmt, dtype)
    x = torch.cat([special_values(dtype), torch.randn(4096).to(dtype) * 9]).to(device)
    for shift in (*SHIFTS, low, high):
        moved = fmt.with_bias(fmt.bias - min(max(shift, low), high))
        for home in (device, torch.device("cpu")):
            by = torch.tensor(shift, device=home)
            got = _ops.quantize(x, fmt.fields, 0, False, None, None, 32, by)
            assert_bits_equal(got, lp.quantize(x, moved, saturate=False))
            assert_bits_equal(got, eager.quantize(x, fmt, Rounding.nearest_even, False, None, None, 32, by))


def test_a_shift_needs_a_dtype_that_holds_the_format_at_some_bias() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        eager.shift_range(lp.format("1-5-10"), torch.bfloat16)
    with pytest.raises(ValueError, match="cannot hold"):
        eager.shift_range(lp.format("1-6-3"), torch.float16)


@pytest.mark.parametrize("random_bits", [32, 16, 8])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_shard_draws_the_words_of_the_whole(device: torch.device, dim: int, random_bits: int) -> None:
    x = torch.randn(7, 33, 10, device=device)
    seed = torch.tensor(3)
    whole = lp.quantize(x, "1-4-3", rounding="stochastic", seed=seed, random_bits=random_bits)
    inner = math.prod(x.shape[dim + 1 :])
    for begin, end in ((0, 2), (1, x.shape[dim])):
        shard = x.narrow(dim, begin, end - begin).contiguous()
        at = [begin * inner, (end - begin) * inner, x.shape[dim] * inner]
        args = (shard, lp.format("1-4-3").fields, Rounding.stochastic.number, True, seed, None, random_bits)
        assert_bits_equal(_ops.quantize(*args, None, at), whole.narrow(dim, begin, end - begin))
