"""Block formats: strings, the standard's conversions by value, every engine against the exact judge, packed tensors."""

from __future__ import annotations

import importlib
import math
import pickle
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowprec as lp
from lowprec import _ops, eager_block, reference, reference_block
from lowprec.formats import BLOCK_NAMES, RULES, FloatFormat
from lowprec.packing import pack_rows
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal, bits, special_values
from tests.strategies import dtypes, formats, modes, random_bits, words64

NAMED = [*BLOCK_NAMES, "bfp8/64", "bfp8/16x16", "bfp8/tensor", "bfp4/5", "block[e4m3fn]/1x128"]


def block_format(text: str) -> lp.BlockFormat:
    fmt = lp.format(text)
    assert isinstance(fmt, lp.BlockFormat)
    return fmt


# Formats.


@pytest.mark.parametrize("text", NAMED)
@pytest.mark.parametrize("rule", RULES)
def test_strings_name_formats(text: str, rule: str) -> None:
    fmt = block_format(text if "nvfp4" in text else f"{text}:rule={rule}")
    assert lp.format(str(fmt)) == fmt
    assert lp.format(fmt) is fmt
    assert pickle.loads(pickle.dumps(fmt)) == fmt
    assert hash(block_format(str(fmt))) == hash(fmt)
    assert repr(fmt) == f"lowprec.format('{fmt}')"


def test_names_mean_what_the_standard_says() -> None:
    elements = {
        "mxfp8_e4m3": (448.0, 8, 8),
        "mxfp8_e5m2": (57344.0, 15, 8),
        "mxfp6_e3m2": (28.0, 4, 6),
        "mxfp6_e2m3": (7.5, 2, 6),
        "mxfp4": (6.0, 2, 4),
        "mxint8": (127 / 64, 0, 8),
    }
    for name, (largest, emax, width) in elements.items():
        fmt = block_format(name)
        assert (fmt.element.max, fmt.element.emax, fmt.bits) == (largest, emax, width)
        assert (fmt.block, fmt.scale, fmt.rule, fmt.tensor_scale) == (32, "e8m0", "floor", False)
    values = block_format("mxint8").element.values()
    assert values.tolist() == [m / 64 for m in range(-127, 128)]
    nvfp4 = lp.BlockFormat("e2m1fn", 16, scale="e4m3fn", tensor_scale=True)
    assert (str(nvfp4), lp.format("nvfp4")) == ("nvfp4", nvfp4)
    assert str(lp.BlockFormat("1-0-7", (16, 16))) == "bfp8/16x16"
    assert str(lp.BlockFormat("e4m3fn", [2, 3], rule="ceil")) == "block[1-4-3:specials=fn]/2x3:rule=ceil"


NO_FORMATS = """
bfp8/0 bfp1/8 bfp8/3x bfp8/3x4x5 bfp8/٣ mxfp4/3 mxfp4: mxfp4:rule=up mxfp4:rule=ceil, mxfp4:rule=ceil,rule=ceil
mxfp4:tensor_scale=on nvfp4:rule=ceil nvfp4:tensor_scale=yes block[mxfp4]/3 block[1-4-3]/8:scale=[1-4-3]
block[1-5-12]/8:scale=e4m3fn block[1-4-3:bias=1000]/8
"""


@pytest.mark.parametrize("text", NO_FORMATS.split())
def test_what_is_no_block_format(text: str) -> None:
    with pytest.raises(ValueError, match="format|block|rule|scale|1-0-0|float64|float32"):
        lp.format(text)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [(("e4m3fn", 1.5), {}), (("e4m3fn", True), {}), ((3, 32), {}), (("e4m3fn", 32), {"tensor_scale": 1})],
)
def test_wrong_types(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        lp.BlockFormat(*arguments, **options)


# The standard's conversion, by value: k = floor(log2 amax) - emax, elements rounded to nearest even, saturating.


def scales_and_values(x: list[float], fmt: str, device: torch.device) -> tuple[list[int], list[float]]:
    """Exponents of the scales, and the values."""
    tensor = torch.tensor(x, device=device)
    packed = lp.encode(tensor, fmt)
    values = lp.decode(packed)
    assert_bits_equal(lp.quantize(tensor, fmt), values, given=tensor)
    return [code - 127 for code in packed.scales.tolist()], values.tolist()


BELOW = 1 - 2.0**-24  # one ulp below a power of two in float32, times that power


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("fmt", "x", "scale", "values"),
    [
        # amax a power of two, and one ulp below it: whoever rounds log2 has the scale of the former for both
        ("mxfp8_e4m3", [1024.0], 2, [1024.0]),
        ("mxfp8_e4m3", [1024 * BELOW], 1, [896.0]),
        ("mxfp8_e5m2", [1024 * BELOW], -6, [896.0]),
        ("mxfp4", [1024 * BELOW, 500.0, 65.0], 7, [768.0, 512.0, 64.0]),
        # elements past the largest one saturate: 7 and 7.9 with scale 1
        ("mxfp4", [7.9, -7.0, 5.1, 2.5, 0.25], 0, [6.0, -6.0, 6.0, 2.0, 0.0]),
        ("mxfp6_e3m2", [31.0, -1.0], 0, [28.0, -1.0]),
        ("mxfp6_e2m3", [7.9, 0.0625, 0.1875], 0, [7.5, 0.0, 0.25]),
        ("mxint8", [1.999, -1.0, 1 / 128, 3 / 128], 0, [127 / 64, -1.0, 0.0, 2 / 64]),
        # the same numbers by the other rules
        ("mxfp4:rule=ceil", [7.9, -7.0, 5.1], 1, [8.0, -8.0, 6.0]),
        ("mxfp4:rule=ceil", [6.0], 0, [6.0]),
        ("mxfp4:rule=nearest", [7.9, -7.0, 5.1], 1, [8.0, -8.0, 6.0]),
        ("mxfp4:rule=nearest", [7.0, 1.0], 1, [8.0, 1.0]),
        ("mxfp4:rule=nearest", [6.9, 1.0], 0, [6.0, 1.0]),
        # zeros, and the ends of the range of scales
        ("mxfp8_e4m3", [0.0, -0.0], -127, [0.0, -0.0]),
        ("mxfp8_e4m3", [2.0**-149, 2.0**-127], -127, [0.0, 2.0**-127]),
        ("mxfp8_e4m3", [2.0**-149 * 2**14], -127, [2.0**-135]),
        ("mxfp8_e4m3", [3.0e38, 1.0e38], 119, [448 * 2.0**119, 144 * 2.0**119]),
        # an infinity takes no part in the scale, unless it is alone; it saturates
        ("mxfp4", [math.inf, 1.0], -2, [1.5, 1.0]),
        ("mxfp4", [-math.inf, 0.0], 125, [-6 * 2.0**125, 0.0]),
        ("mxfp8_e5m2", [-math.inf, 1.0], -15, [-57344 * 2.0**-15, 1.0]),
    ],
)
def test_conversion_by_value(fmt: str, x: list[float], scale: int, values: list[float], device: torch.device) -> None:
    scales, found = scales_and_values(x, fmt, device)
    assert scales == [scale]
    assert_bits_equal(torch.tensor(found), torch.tensor(values))


def test_a_nan_stays_one_and_marks_its_block(device: torch.device) -> None:
    x = torch.tensor([1.0, -math.nan, 2.0, 4.0, 5.0, 6.0], device=device)
    fmt = "block[e4m3fn]/3"
    rounded, packed = lp.quantize(x, fmt), lp.encode(x, fmt)
    assert_bits_equal(rounded, x)
    assert packed.scales.tolist() == [255, 127 + 2 - 8]
    assert lp.decode(packed).tolist()[3:] == [4.0, 5.0, 6.0]
    assert lp.decode(packed)[:3].isnan().all()


def test_codes_of_mxint8_are_twos_complement(device: torch.device) -> None:
    x = torch.tensor([127.0, -127.0, -1.0, -0.0, 64.0], device=device) / 64
    packed = lp.encode(x, "mxint8")
    assert packed.codes.view(torch.int8).tolist() == [127, -127, -1, 0, 64]
    assert_bits_equal(lp.decode(packed), torch.where(x == 0, 0.0, x))


@pytest.mark.sanitize
def test_nvfp4_by_value(device: torch.device) -> None:
    """A tensor scale of 1, block scales of 448 and less, and codes from the quotient."""
    x = torch.zeros(48, device=device)
    x[0], x[1], x[16], x[17] = 2688.0, 1344.0, 5.9, -1.0
    packed = lp.encode(x, "nvfp4")
    assert packed.tensor_scale is not None
    assert packed.tensor_scale.item() == 1.0
    assert packed.scales.tolist() == [0x7E, 0x38, 0]  # 448; 5.9 / 6 to 1; 0
    assert packed.codes[:2].tolist() == [7, 5]
    assert lp.decode(packed)[16:18].tolist() == [6.0, -1.0]
    assert not packed.codes[32:].any()


def test_a_dtype_bounds_the_scales(device: torch.device) -> None:
    """float16 holds e5m2 elements with scales from 2^-8 to 1."""
    x = torch.tensor([65504.0, 1.0, 2.0**-24, 0.0, 0.0, 0.0], dtype=torch.float16, device=device)
    packed = lp.encode(x, "block[e5m2]/2")
    assert packed.scales.tolist() == [127, 127 - 8, 127 - 8]
    with pytest.raises(ValueError, match="bfloat16 cannot hold"):
        lp.quantize(x.bfloat16(), "bfp16/4")
    wide = lp.encode(torch.tensor([1.0, 3.0], dtype=torch.bfloat16, device=device), "bfp16/4")
    assert lp.decode(wide).tolist() == [1.0, 3.0]


# Every engine against the judge.


@st.composite
def block_formats(draw: st.DrawFn) -> lp.BlockFormat:
    """Named ones and any other."""
    if draw(st.booleans()):
        return block_format(draw(st.sampled_from(NAMED)))
    size = st.integers(1, 9)
    block = draw(st.one_of(size, st.tuples(size, size), st.just("tensor")))
    if draw(st.integers(0, 3)) == 0:
        scale = draw(st.sampled_from(["e4m3fn", "e5m2", "e4m3fnuz", "1-4-3:specials=p3109", "1-0-7:specials=fn"]))
        return _possible(draw(formats(16)), block, scale=scale, tensor_scale=draw(st.booleans()))
    return _possible(draw(formats()), block, rule=draw(st.sampled_from(RULES)))


def _possible(element: FloatFormat, block: Any, **options: Any) -> lp.BlockFormat:
    element = FloatFormat(
        element.ebits, element.mbits, specials=element.specials, subnormals=element.subnormals, emax=element.emax % 16
    )
    try:
        return lp.BlockFormat(element, block, **options)
    except ValueError:
        assume(False)
        raise


@st.composite
def inputs(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """Tensors of up to 3 dimensions whose numbers lie together, with some special ones among them."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7]), max_size=2))
    shape.insert(draw(st.integers(0, len(shape))), draw(st.sampled_from([1, 4, 33])))
    shape = draw(st.sampled_from([shape, []]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 2.0 ** torch.randint(-4, 4, shape, generator=generator) * 2.0 ** draw(st.integers(-150, 130))
    if draw(st.booleans()):
        x = torch.where(x == 0, x, x.sign() * x.abs().log2().round().exp2())
    x = x.to(dtype)
    if draw(st.booleans()):
        special = special_values(dtype)
        index = torch.randint(len(special), shape, generator=generator)
        x = torch.where(torch.rand(shape, generator=generator) < 0.15, special[index], x)
    return x


def signed(x: Tensor) -> list[float]:
    """The numbers of a tensor in row-major order, the signs of NaNs kept."""
    flat = x.reshape(-1)
    pairs = zip(flat.tolist(), flat.signbit().tolist(), strict=True)
    return [math.copysign(value, -1.0 if minus else 1.0) for value, minus in pairs]


@given(st.data(), block_formats(), dtypes, modes, st.booleans(), words64, random_bits)
@settings(max_examples=250)
def test_every_engine_is_the_reference(
    device: torch.device,
    data: st.DataObject,
    fmt: lp.BlockFormat,
    dtype: torch.dtype,
    mode: Rounding,
    saturate: bool,
    seed: int,
    rb: int,
) -> None:
    x = data.draw(inputs(dtype))
    dim = data.draw(st.integers(-max(x.dim(), 1), max(x.dim(), 1) - 1))
    name = str(dtype).removeprefix("torch.")
    words = [reference.random_word(seed, 3, i, rb) for i in range(x.numel())]
    how = (mode, saturate, torch.tensor(seed), torch.tensor(3), rb)
    try:
        judged = reference_block.quantize(signed(x), x.shape, fmt, dim, name, mode, saturate, words, rb)
    except ValueError:
        with pytest.raises(ValueError, match="cannot hold"):
            eager_block.quantize(x, fmt, dim, *how)
        return
    numbers = (mode.number, *how[1:])
    there = x.to(device)
    for values, (codes, scales, second) in (
        (eager_block.quantize(there, fmt, dim, *how), eager_block.encode(there, fmt, dim, *how)),
        (
            _ops.quantize_block(there, fmt.fields, dim, *numbers),
            _ops.encode_block(there, fmt.fields, dim, *numbers),
        ),
    ):
        check_values(values.cpu(), judged.values, x)
        assert codes.reshape(-1).tolist() == judged.codes
        assert scales.reshape(-1).tolist() == judged.scales
        assert scales.shape == reference_block.scales_shape(x.shape, fmt, dim)
        assert second.tolist() == (judged.tensor_scale if fmt.tensor_scale else [])
        check_decoding(fmt, dim, codes, scales, second, judged, data.draw(dtypes))


def check_values(values: Tensor, expected: list[float], x: Tensor) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(x.shape)
    minus = torch.tensor([math.copysign(1, value) < 0 for value in expected], dtype=torch.bool).reshape(x.shape)
    nan = wanted.isnan()
    assert torch.equal(values.isnan(), nan)
    assert_bits_equal(values[x.isnan()], x[x.isnan()])
    assert_bits_equal(values[~nan], wanted[~nan].to(x.dtype), given=x[~nan])
    assert torch.equal(values.signbit()[~x.isnan()], minus[~x.isnan()])


def check_decoding(
    fmt: lp.BlockFormat,
    dim: int,
    codes: Tensor,
    scales: Tensor,
    second: Tensor,
    judged: reference_block.Quantized,
    dtype: torch.dtype,
) -> None:
    packed = lp.Packed(codes, scales, fmt, dim, second if fmt.tensor_scale else None)
    name = str(dtype).removeprefix("torch.")
    expected = reference_block.decode(judged.codes, judged.scales, judged.tensor_scale, codes.shape, fmt, dim, name)
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(codes.shape)
    for found in (
        lp.decode(packed, dtype=dtype),
        eager_block.decode(codes, scales, packed.tensor_scale, fmt, dim, dtype),
    ):
        assert torch.equal(found.cpu().isnan(), wanted.isnan())
        assert_bits_equal(found.cpu()[~wanted.isnan()], wanted[~wanted.isnan()].to(dtype))


@given(st.sampled_from(NAMED), st.integers(0, 2**20), dtypes, modes, st.integers(0, 70))
@settings(max_examples=60)
def test_devices_and_lengths_agree_on_many_blocks(
    device: torch.device, text: str, seed: int, dtype: torch.dtype, mode: Rounding, extra: int
) -> None:
    """Tensors long enough for every kernel's quick way and its tail, aligned or not, against the eager twin."""
    fmt = block_format(text)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 512 + extra * (seed % 2), generator=generator) * 2.0 ** torch.randint(
        -130 if dtype != torch.float16 else -20, 12, (6, 1), generator=generator
    )
    x = x.to(dtype)
    if seed % 3 == 0:
        special = special_values(dtype)
        x.view(-1)[torch.randint(x.numel(), (9,), generator=generator)] = special[seed % len(special)]
    x = x.to(device)[:, seed % 2 :]
    for dim in (-1, 0):
        how = (saturate := bool(seed % 5), torch.tensor(seed), None, 32)
        expected = eager_block.quantize(x, fmt, dim, mode, *how)
        assert_bits_equal(_ops.quantize_block(x, fmt.fields, dim, mode.number, *how), expected, given=x)
        wanted = eager_block.encode(x, fmt, dim, mode, *how)
        for one, other in zip(_ops.encode_block(x, fmt.fields, dim, mode.number, *how), wanted, strict=True):
            assert_bits_equal(one, other, what=f"{fmt} {mode} {saturate}")


@pytest.mark.sanitize
@pytest.mark.parametrize("text", ["mxfp8_e4m3", "mxint8", "nvfp4", "bfp8/16x16", "bfp8/tensor"])
def test_large_tensors(text: str, device: torch.device) -> None:
    """Several threads and thread blocks; the twin is right for any size."""
    x = torch.randn(300, 1024, device=device, generator=torch.Generator(device).manual_seed(1))
    fmt = block_format(text)
    how = (True, torch.tensor(5), None, 32)
    for mode in (Rounding.nearest_even, Rounding.stochastic):
        for dim in (-1, 0):
            expected = eager_block.quantize(x, fmt, dim, mode, *how)
            assert_bits_equal(_ops.quantize_block(x, fmt.fields, dim, mode.number, *how), expected, given=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nvfp4_at_thresholds_and_ends(dtype: torch.dtype, device: torch.device) -> None:
    """Ties of elements and of scales, numbers near both ends of the dtype, and blocks that hold no number."""
    how = (True, None, None, 32)
    fmt, mode = block_format("nvfp4"), Rounding.nearest_even
    grid = torch.randint(-24, 25, (33, 48)) / 4
    wide = torch.randn(33, 48) * torch.exp2(torch.randint(-20, 1, (33, 1)))
    special = torch.randn(33, 48)
    special[0, :3], special[1] = torch.tensor([math.inf, math.nan, -0.0]), math.inf
    largest = torch.finfo(dtype).max
    for x in (grid, wide, special, grid * largest / 6, grid * torch.finfo(dtype).tiny, wide / 2688):
        x = x.to(dtype).to(device)
        expected = eager_block.quantize(x, fmt, -1, mode, *how)
        assert_bits_equal(_ops.quantize_block(x, fmt.fields, -1, mode.number, *how), expected, given=x)
        twin = eager_block.encode(x, fmt, -1, mode, *how)
        for one, other in zip(_ops.encode_block(x, fmt.fields, -1, mode.number, *how), twin, strict=True):
            assert_bits_equal(one, other)


@pytest.mark.parametrize("text", NAMED)
def test_rounding_twice_is_rounding_once(text: str, device: torch.device) -> None:
    """Of blocks whose largest element has the exponent it had: by `floor` always."""
    assume_power = block_format(text).scale == "e8m0"
    x = torch.randn(4, 130, device=device, generator=torch.Generator(device).manual_seed(2))
    once = lp.quantize(x, text)
    if assume_power:
        assert_bits_equal(lp.quantize(once, text), once)
    assert_bits_equal(lp.decode(lp.encode(x, text)), once)


def test_error_is_within_the_spacing() -> None:
    """An independent bound: |x - q| <= half a spacing at amax, where nothing saturates."""
    x = torch.randn(64, 96, dtype=torch.float64)
    for text in ("bfp8/32:rule=ceil", "bfp6/8:rule=ceil"):
        fmt = block_format(text)
        size = int(fmt.block)
        error = (lp.quantize(x, fmt) - x).abs().reshape(64, -1, size).amax(-1)
        amax = x.abs().reshape(64, -1, size).amax(-1)
        assert (error <= amax * 2.0 ** (1 - fmt.element.mbits)).all()


# Layouts and transformations.


@pytest.mark.sanitize
@pytest.mark.parametrize("text", ["mxfp4", "bfp8/2x3", "bfp6/tensor", "nvfp4"])
def test_strides_and_outputs(text: str, device: torch.device) -> None:
    x = torch.randn(6, 5, 40, device=device)
    views = [x, x.transpose(0, 2), x[:, ::2, 1:], x[0, 0, 0].expand(3, 4), x.permute(2, 0, 1)[::3]]
    for view in views:
        for how in ({}, {"rounding": "stochastic", "seed": 5}):
            expected = lp.quantize(view.contiguous(), text, dim=0, **how)
            found = lp.quantize(view, text, dim=0, **how)
            assert_bits_equal(found, expected)
            assert found.stride() == torch.empty_like(view).stride()
            whole = torch.zeros((*view.shape, 2), device=device)
            assert lp.quantize(view, text, dim=0, out=whole[..., 0], **how).data_ptr() == whole.data_ptr()
            assert_bits_equal(whole[..., 0], expected)
            assert not whole[..., 1].any()
            packed = lp.encode(view, text, dim=0, **how)
            assert packed.shape == view.shape
            assert_bits_equal(lp.decode(packed), expected)
    in_place = x.clone()
    lp.quantize(in_place, text, out=in_place)
    assert_bits_equal(in_place, lp.quantize(x, text))


def test_the_gradient_passes_straight_through(device: torch.device) -> None:
    x = torch.randn(3, 40, device=device, requires_grad=True)
    upstream = torch.randn(3, 40, device=device)
    for text in ("mxfp8_e4m3", "nvfp4", "bfp4/2x2"):
        (gradient,) = torch.autograd.grad(lp.quantize(x, text), x, upstream)
        assert_bits_equal(gradient, upstream)
    _, tangent = torch.func.jvp(lambda y: lp.quantize(y, "mxfp4"), (x.detach(),), (upstream,))
    assert_bits_equal(tangent, upstream)


@pytest.mark.parametrize("text", ["mxfp4", "bfp8/2x3", "bfp6/tensor", "nvfp4", "mxint8"])
def test_vmap_is_a_loop(text: str, device: torch.device) -> None:
    """Blocks stay within samples, wherever the batch dimension is."""
    x = torch.randn(3, 4, 5, device=device)
    for batch in range(3):
        samples = x.unbind(batch)
        for dim in (0, -1):
            expected = torch.stack([lp.quantize(sample, text, dim=dim) for sample in samples])
            found = torch.vmap(lambda s, dim=dim: lp.quantize(s, text, dim=dim), in_dims=batch)(x)
            assert_bits_equal(found, expected)
            packed = torch.vmap(lambda s, dim=dim: lp.encode(s, text, dim=dim), in_dims=batch)(x)
            each = [lp.encode(sample, text, dim=dim) for sample in samples]
            assert_bits_equal(packed.codes, torch.stack([one.codes for one in each]))
            assert_bits_equal(packed.scales, torch.stack([one.scales for one in each]))
    vector = torch.randn(7, device=device)
    assert_bits_equal(
        torch.vmap(lambda s: lp.quantize(s, text))(vector), torch.stack([lp.quantize(v, text) for v in vector])
    )
    gradients = torch.vmap(torch.func.grad(lambda s: (lp.quantize(s, text) ** 2).sum()))(x)
    assert_bits_equal(gradients, torch.stack([2 * lp.quantize(sample, text) for sample in x]))


@pytest.mark.parametrize("text", ["mxfp8_e4m3", "nvfp4"])
def test_compiled_functions(text: str, device: torch.device) -> None:
    x = torch.randn(4, 70, device=device)

    @torch.compile(fullgraph=True)
    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
        rounded = lp.quantize(x, text, dim=0, rounding="stochastic", seed=3)
        return rounded, lp.decode(lp.encode(x, text, pack=True), dtype=torch.bfloat16)

    rounded, decoded = there_and_back(x)
    assert_bits_equal(rounded, lp.quantize(x, text, dim=0, rounding="stochastic", seed=3))
    assert_bits_equal(decoded, lp.decode(lp.encode(x, text), dtype=torch.bfloat16))

    @torch.compile(fullgraph=True)
    def packed(x: Tensor) -> lp.Packed:
        return lp.encode(x, text)

    expected = lp.encode(x, text)
    found = packed(x)
    assert isinstance(found, lp.Packed)
    assert (found.format, found.dim, found.size) == (expected.format, -1, None)
    assert_bits_equal(found.codes, expected.codes)
    assert_bits_equal(found.scales, expected.scales)


@pytest.mark.sanitize
def test_statistics_are_those_of_the_cast(device: torch.device) -> None:
    x = torch.randn(5, 64, device=device)
    x[0, 0], x[1, 0], x[2, 0] = math.inf, math.nan, 1e-20
    fmt = block_format("mxfp4")
    stats = torch.zeros(9, dtype=torch.float64, device=device)
    codes = torch.zeros(16, dtype=torch.int64, device=device)
    call = (fmt.fields, -1, Rounding.nearest_even.number, True, None, None, 32)
    values = _ops.quantize_block_statistics(x, *call, stats, codes)
    assert_bits_equal(values, lp.quantize(x, fmt))
    found = lp.encode(x, fmt).codes.reshape(-1).to(torch.int64)
    assert torch.equal(codes, torch.bincount(found, minlength=16))
    finite = x[x.isfinite()]
    flushed = ((values == 0) & (x != 0)).sum().item()
    assert stats[:1].tolist() + stats[2:5].tolist() == [320, flushed, 1, finite.abs().max().item()]
    scale = (lp.encode(x.nan_to_num(0.0), fmt).scales.to(torch.float64) - 127).exp2().repeat_interleave(32, 1)
    beyond = x.double().abs() / scale
    assert stats[1].item() == (beyond > 7).sum().item() + ((beyond == 7) & x.isfinite()).sum().item()
    error = (values.double() - x.double())[x.isfinite()]
    expected = [finite.double().abs().sum(), finite.double().sum(), (finite.double() ** 2).sum(), (error**2).sum()]
    assert stats[5:].tolist() == pytest.approx([value.item() for value in expected], rel=1e-12)


@pytest.mark.parametrize("text", ["mxfp8_e4m3", "mxint8", "nvfp4", "bfp8/2x3", "bfp6/tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_have_the_bits_of_the_twin(text: str, dtype: torch.dtype, device: torch.device) -> None:
    """More than a page of elements, infinities, NaNs, zeros, and strides, whatever which sums are row-major."""
    fmt = block_format(text)
    x = (torch.randn(70, 3, 100) * 10 ** torch.randn(70, 3, 100)).to(dtype)
    x[0, 0, :5] = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1e-20])
    x[3:6] = 0
    x = x.to(device)
    for view in (x, x.transpose(0, 2), x[:, 1, ::2]):
        for mode in (Rounding.nearest_even, Rounding.down, Rounding.stochastic):
            how = (mode is not Rounding.down, torch.tensor(5), None, 32)
            stats = [torch.zeros(9, dtype=torch.float64, device=device) for _ in range(2)]
            codes = [torch.zeros(1 << fmt.element.bits, dtype=torch.int64, device=device) for _ in range(2)]
            expected = eager_block.quantize_statistics(view, fmt, -1, mode, *how, stats[0], codes[0])
            found = _ops.quantize_block_statistics(view, fmt.fields, -1, mode.number, *how, stats[1], codes[1])
            assert_bits_equal(found, expected, given=view)
            assert_bits_equal(stats[1], stats[0])
            assert torch.equal(codes[1], codes[0])


# Errors.


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: lp.quantize(x, "mxfp4", dim=2), ValueError),
        (lambda x: lp.quantize(x, "mxfp4", dim=1.0), TypeError),
        (lambda x: lp.encode(x, "mxfp4", out=torch.empty_like(x, dtype=torch.uint8)), ValueError),
        (lambda x: lp.decode(lp.encode(x, "mxfp4"), "mxfp8_e4m3"), ValueError),
        (lambda x: lp.decode(lp.encode(x, "mxfp4"), dtype=torch.int32), TypeError),
        (lambda x: lp.decode(replace(lp.encode(x, "mxfp4"), scales=torch.zeros(1, dtype=torch.uint8))), ValueError),
        (lambda x: lp.decode(replace(lp.encode(x, "mxfp4"), tensor_scale=torch.ones(()))), ValueError),
        (lambda x: lp.decode(lp.encode(x, "mxfp4").codes, "mxfp4"), ValueError),
        (lambda x: lp.Packed.load("nothing.safetensors"), FileNotFoundError),
    ],
)
def test_errors(call: Any, error: type[Exception], device: torch.device) -> None:
    with pytest.raises(error):
        call(torch.ones(2, 3, device=device))


# Packed tensors.


@pytest.mark.parametrize("text", NAMED)
@pytest.mark.parametrize("pack", [True, False])
def test_files(text: str, pack: bool, tmp_path: Path, device: torch.device) -> None:
    x = torch.randn(3, 5, 37, device=device)
    packed = lp.encode(x, text, dim=1, pack=pack)
    packed.save(tmp_path / "one.safetensors")
    loaded = lp.Packed.load(tmp_path / "one.safetensors", device)
    same_packed(loaded, packed)
    same_packed(loaded.cpu().to(device), packed)
    assert_bits_equal(lp.decode(loaded), lp.quantize(x, text, dim=1))
    assert loaded.shape == x.shape
    assert loaded.nbytes == packed.codes.nbytes + packed.scales.nbytes + 4 * ("nvfp4" in text)


def same_packed(one: lp.Packed, other: lp.Packed) -> None:
    assert (one.format, one.dim, one.size, one.device) == (other.format, other.dim, other.size, other.device)
    assert_bits_equal(one.codes, other.codes)
    assert_bits_equal(one.scales, other.scales)
    assert (one.tensor_scale is None) == (other.tensor_scale is None)
    if one.tensor_scale is not None and other.tensor_scale is not None:
        assert_bits_equal(one.tensor_scale, other.tensor_scale)


def test_several_in_one_file(tmp_path: Path) -> None:
    named = {f"layer.{i}.weight": lp.encode(torch.randn(4, 40), text) for i, text in enumerate(NAMED)}
    lp.save_packed(named, tmp_path / "all.safetensors")
    loaded = lp.load_packed(tmp_path / "all.safetensors")
    assert loaded.keys() == named.keys()
    for name in named:
        same_packed(loaded[name], named[name])
    with pytest.raises(ValueError, match="holds"):
        lp.Packed.load(tmp_path / "all.safetensors")


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0), (0, 3), (2, 3, 9)])
def test_dense_codes(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device)
    for text, width in (("mxfp4", 4), ("mxfp6_e3m2", 6), ("nvfp4", 4), ("bfp5/3", 5)):
        dense, loose = lp.encode(x, text, pack=True), lp.encode(x, text)
        last = shape[-1] if shape else 1
        assert dense.codes.shape == (*shape[:-1], -(-last * width // 8))
        assert_bits_equal(dense.codes, pack_rows(loose.codes, width))
        if shape:
            assert dense.shape == x.shape
            assert_bits_equal(lp.decode(dense), lp.decode(loose))
    whole = lp.encode(x, "mxfp8_e4m3", pack=True)
    assert whole.size is None
    plain = lp.encode(x, "e2m1fn", pack=True)
    if shape:
        assert_bits_equal(lp.decode(plain, "e2m1fn", size=shape[-1]), lp.quantize(x, "e2m1fn"))


def test_bits_of_dense_codes() -> None:
    """Low bits first."""
    x = torch.tensor([0.5, 6.0, -1.0])
    assert lp.encode(x, "mxfp4", pack=True).codes.tolist() == [0x71, 0x0A]


# Second opinions.


@pytest.fixture(scope="module")
def torchao() -> Any:
    """torchao's MX and NVFP4 casts; importing them warns of other things."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
        return importlib.import_module("torchao.prototype.mx_formats")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "mode"), [("floor", "FLOOR"), ("ceil", "RCEIL"), ("nearest", "EVEN")])
def test_torchao_mx(torchao: Any, rule: str, mode: str, dtype: torch.dtype) -> None:
    """The same scales and codes; but its scale of an all-zero block is 2^-127 where bfloat16 bounds ours."""
    x = (torch.randn(256, 128) * torch.exp2(torch.randint(-20, 20, (256, 1)))).to(dtype)
    x[0], x[1, 0] = 0.0, 1024 * (1 - 2.0**-8)
    elements = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp4": torch.float4_e2m1fn_x2}
    for text, element in (elements | {"mxfp6_e2m3": "fp6_e2m3", "mxfp6_e3m2": "fp6_e3m2"}).items():
        scales, codes = torchao.mx_tensor.to_mx(x, element, 32, torchao.config.ScaleCalculationMode[mode])
        ours = lp.encode(x, f"{text}:rule={rule}", pack=text == "mxfp4")
        assert torch.equal(codes.view(torch.uint8).reshape(ours.codes.shape), ours.codes)
        assert torch.equal(scales.view(torch.uint8).reshape(ours.scales.shape)[1:], ours.scales[1:])
        assert not scales.view(torch.uint8).reshape(ours.scales.shape)[0].any()


def test_torchao_nvfp4(torchao: Any) -> None:
    """The same from float32, but for the scale of a zero block: 2^-6, where ours is 0."""
    x = torch.randn(256, 128)
    x[0] = 0.0
    tensor_scale = torchao.nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    scales, codes = torchao.nvfp4_tensor.nvfp4_quantize(x, 16, tensor_scale)
    ours = lp.encode(x, "nvfp4", pack=True)
    assert ours.tensor_scale is not None
    assert_bits_equal(tensor_scale.reshape(()), ours.tensor_scale)
    assert torch.equal(codes.view(torch.uint8), ours.codes)
    found = scales.view(torch.uint8).reshape(ours.scales.shape)
    assert torch.equal(found[1:], ours.scales[1:])
    assert (found[0].tolist(), ours.scales[0].tolist()) == ([found[0, 0].item()] * 8, [0] * 8)
    assert found[0].all()


def test_the_rules_are_ordered() -> None:
    """floor <= nearest <= ceil, and they differ by one at most; ceil never saturates."""
    x = torch.randn(256, 32, dtype=torch.float64)
    k = {rule: lp.encode(x, f"mxfp4:rule={rule}").scales.int() for rule in RULES}
    assert ((k["floor"] <= k["nearest"]) & (k["nearest"] <= k["ceil"]) & (k["ceil"] <= k["floor"] + 1)).all()
    scale = (k["ceil"].double() - 127).exp2()
    assert (x.abs() <= 6 * scale).all()
    assert (x.abs().amax(1, keepdim=True) > 3 * scale).all(), "the least such scale"


def test_the_judge_has_the_least_ceiling() -> None:
    fmt = block_format("mxfp8_e4m3:rule=ceil")
    for amax in (Fraction(448), Fraction(449), Fraction(1, 3)):
        k = reference_block.exponent(amax, fmt)
        assert amax <= 448 * Fraction(2) ** k
        assert amax > 448 * Fraction(2) ** (k - 1)


def test_bits_are_seen() -> None:
    """The tests' own tool tells zeros apart."""
    assert bits(torch.tensor(-0.0)).item() != bits(torch.tensor(0.0)).item()
