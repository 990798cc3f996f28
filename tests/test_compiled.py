"""The compiled kernels against the eager twin, bit for bit: every format kind, dtype, mode, layout and machine state.

Where a library is not compiled the op is the eager twin itself, and these tests hold trivially for that device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

from lowprec import _ops, eager, eager_statistics
from lowprec import format as lookup
from lowprec.cast import require_holds
from lowprec.eager import CONTAINERS, code_dtype
from lowprec.formats import SPECIALS, FloatFormat
from lowprec.rounding import Rounding
from lowprec.testing import assert_bits_equal, bits, special_values

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = tuple(CONTAINERS)
SPLITS = [(4, 3), (5, 2), (3, 4), (2, 1), (3, 0), (1, 2), (0, 5), (0, 7)]
WIDE = [(5, 10), (8, 7), (11, 4), (8, 0), (0, 15), (8, 10), (8, 23), (11, 20), (6, 25), (0, 24), (0, 31)]
MODES = tuple(Rounding)
E4M3 = lookup("e4m3fn")


def formats_of(ebits: int, mbits: int, specials: str) -> Iterator[FloatFormat]:
    """Formats of one split and kind, their values in the middle of float64's range, at float32's ends and beyond."""
    for subnormals in (True, False):
        try:
            fmt = FloatFormat(ebits, mbits, specials=specials, subnormals=subnormals)
        except ValueError:
            continue
        low, high = fmt.emin - fmt.mbits, fmt.emax
        shifts = [0, 3, -7, -149 - low, -126 - fmt.emin, 127 - high, -24 - low, -14 - fmt.emin, 600, -700]
        for shift in dict.fromkeys(shifts):
            if low + shift >= -1074 and high + shift <= 1023:
                yield fmt.with_bias(fmt.bias - shift)


@lru_cache(maxsize=64)
def inputs(fmt: FloatFormat, dtype: torch.dtype) -> Tensor:
    """Special bit patterns, random ones, and neighbours of codes and of what lies between two: about 900 numbers."""
    generator = torch.Generator().manual_seed(fmt.bits * 1000 + fmt.bias % 997)
    integer, width = CONTAINERS[dtype].integer, 8 * dtype.itemsize
    anything = torch.randint(-(1 << (width - 1)), (1 << (width - 1)) - 1, (200,), generator=generator).to(integer)
    first = 1 << fmt.mbits
    chosen = torch.randint(0, fmt.max_code + 1, (12,), generator=generator).tolist()
    codes = {code for c in (0, first, fmt.max_code, *chosen) for code in (c - 1, c, c + 1) if 0 <= code < fmt.max_code}
    pairs = torch.tensor([[fmt.magnitude(code), fmt.magnitude(code + 1)] for code in sorted(codes)])
    lower, step = pairs[:, :1], pairs.diff(dim=1)
    points = (lower + step * torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5])).to(dtype).flatten()
    around = torch.cat([bits(points) + step for step in (-1, 0, 1)])
    return torch.cat([anything.view(dtype), special_values(dtype), around.view(dtype), -around.view(dtype)])


@contextmanager
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def holds(fmt: FloatFormat, dtype: torch.dtype) -> bool:
    try:
        require_holds(fmt, dtype)
    except ValueError:
        return False
    return True


def check(name: str, x: Tensor, fmt: FloatFormat, rounding: Rounding, *how: object) -> None:
    """An op and its twin give the same bits, strides, statistics and histogram."""
    mine, theirs = (counters(x, fmt) if name == "quantize_statistics" else () for _ in range(2))
    actual = getattr(_ops, name)(x, fmt.fields, rounding.number, *how, *mine)
    twin = eager_statistics if mine else eager
    expected = getattr(twin, name)(x, fmt, rounding, *how, *theirs)
    what = f"{name} to {fmt}, {rounding.value}, {how}"
    assert_bits_equal(actual, expected, given=x, what=what)
    assert actual.stride() == expected.stride(), what
    for counted, wanted in zip(mine[1:], theirs[1:], strict=True):
        if counted is not None:
            assert_bits_equal(counted, wanted, what=what)


def counters(x: Tensor, fmt: FloatFormat) -> tuple[Tensor | None, ...]:
    """Shift, statistics, and a histogram of codes of up to 16 bits."""
    stats = torch.zeros(9, dtype=torch.float64, device=x.device)
    histogram = torch.zeros(1 << fmt.bits, dtype=torch.int64, device=x.device) if fmt.bits <= 16 else None
    return None, stats, histogram


def draws(device: torch.device) -> Iterator[tuple[Tensor | None, Tensor | None, int]]:
    """Seeds, offsets and random bits, in turn, without end."""
    words = [None, torch.tensor(1), torch.tensor(-(2**63) + 12345), torch.tensor(2**62 + 7, device=device)]
    return cycle((seed, offset, n) for n, seed, offset in product((32, 16, 8), words, reversed(words)))


@pytest.mark.parametrize("specials", SPECIALS)
@pytest.mark.parametrize(("ebits", "mbits"), SPLITS + WIDE)
def test_casts_agree(device: torch.device, ebits: int, mbits: int, specials: str) -> None:
    draw, flip = draws(device), cycle((True, False))
    with default_float64():
        cases = list(zip(formats_of(ebits, mbits, specials), cycle(DTYPES), strict=False))
        cases += list(zip(formats_of(ebits, mbits, specials), cycle((torch.float32,)), strict=False))
        for (fmt, dtype), rounding in product(dict.fromkeys(cases), MODES):
            x = inputs(fmt, dtype).to(device)
            # An odd number of modes: each format meets each mode saturating in the one op or in the other.
            saturate = next(flip)
            check("encode", x, fmt, rounding, saturate, *next(draw))
            if holds(fmt, dtype):
                check("quantize_statistics", x, fmt, rounding, not saturate, *next(draw))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("specials", SPECIALS)
def test_decode_agrees(device: torch.device, dtype: torch.dtype, specials: str) -> None:
    for ebits, mbits in SPLITS + WIDE:
        for fmt in formats_of(ebits, mbits, specials):
            if holds(fmt, dtype):
                code = code_dtype(fmt.fields)
                anything = torch.randint(0, 1 << 32, (300,))
                special = torch.tensor([0, 1, fmt.max_code, fmt.max_code + 1, fmt.top_code, fmt.sign_code])
                codes = torch.cat([anything, special, special | fmt.sign_code, torch.arange(256)]).to(code).to(device)
                actual = _ops.decode(codes, fmt.fields, dtype)
                assert_bits_equal(actual, eager.decode(codes, fmt, dtype), given=codes, what=f"decode {fmt}")


def layouts(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one dtype, of codes too, in every kind of layout."""

    def numbers(*shape: int) -> Tensor:
        index = torch.arange(torch.Size(shape).numel(), device=device).reshape(shape)
        return (index * 0.37 - 20 if dtype.is_floating_point else index).to(dtype)

    image = numbers(2, 3, 4, 5)
    return {
        "contiguous": numbers(6, 7),
        "zero-dim": numbers(1)[0],
        "empty": numbers(3, 0, 2),
        "transposed": numbers(37, 41).t(),
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "permuted": image.permute(3, 0, 2, 1),
        "every other": numbers(12, 10)[::2, 1::3],
        "expanded": numbers(5, 1).expand(5, 9),
        "ones among the sizes": numbers(1, 8, 1, 3).transpose(0, 2).transpose(1, 3),
        "part of a row": numbers(9, 33)[:, 5:],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", [Rounding.nearest_even, Rounding.stochastic])
def test_layouts(device: torch.device, dtype: torch.dtype, rounding: Rounding) -> None:
    how = (True, torch.tensor(5), None, 32)
    for x in layouts(device, dtype).values():
        check("quantize", x, E4M3, rounding, *how)
        check("quantize_statistics", x, E4M3, rounding, *how)
        check("encode", x, E4M3, rounding, *how)


@pytest.mark.parametrize("fmt", ["1-4-3", "1-5-10", "tf32"])
def test_layouts_of_codes(device: torch.device, fmt: str) -> None:
    for given in layouts(device, code_dtype(lookup(fmt).fields)).values():
        actual = _ops.decode(given, lookup(fmt).fields, torch.float32)
        expected = eager.decode(given, lookup(fmt), torch.float32)
        assert_bits_equal(actual, expected, given=given)
        assert actual.stride() == expected.stride()


def targets(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Tensors of x's shape in other layouts, to be written into."""
    yield torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    order = list(reversed(range(x.dim())))
    yield torch.empty([x.shape[i] for i in order], dtype=dtype, device=x.device).permute(order)
    yield torch.empty((*x.shape, 2), dtype=dtype, device=x.device)[..., 1]


@pytest.mark.parametrize("rounding", [Rounding.nearest_even, Rounding.stochastic])
def test_out_takes_any_layout(device: torch.device, rounding: Rounding) -> None:
    how = (rounding.number, True, torch.tensor(3), None, 16)
    for x in layouts(device, torch.float32).values():
        values = eager.quantize(x, E4M3, rounding, *how[1:])
        codes = eager.encode(x, E4M3, rounding, *how[1:])
        for out in targets(x, torch.float32):
            _ops.quantize_out(x, E4M3.fields, *how, out)
            assert_bits_equal(out, values, given=x)
            _ops.decode_out(codes, E4M3.fields, out)
            assert_bits_equal(out, values, given=x)
        for out in targets(x, torch.uint8):
            _ops.encode_out(x, E4M3.fields, *how, out)
            assert_bits_equal(out, codes, given=x)


def test_out_may_be_the_input(device: torch.device) -> None:
    x = torch.randn(50_001, device=device)
    expected = eager.quantize(x, E4M3, Rounding.up, True, None, None, 32)
    _ops.quantize_out(x, E4M3.fields, Rounding.up.number, True, None, None, 32, x)
    assert_bits_equal(x, expected)


SIZES = [*range(20), 31, 33, 2047, 2048, 2049, 4100, 35_003]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tail_and_alignment(device: torch.device, dtype: torch.dtype) -> None:
    storage = torch.randn(SIZES[-1] + 8, device=device).to(dtype)
    draw = draws(device)
    for size, shift in product(SIZES, (0, 1, 2, 3, 5)):
        x = storage[shift : shift + size]
        check("quantize_statistics", x, E4M3, Rounding.nearest_away, True, None, None, 32)
        check("quantize", x, E4M3, Rounding.stochastic, True, *next(draw))
        check("encode", x, E4M3, Rounding.stochastic, True, *next(draw))
        codes = _ops.encode(storage, E4M3.fields, 0, True, None, None, 32)[shift : shift + size]
        assert_bits_equal(_ops.decode(codes, E4M3.fields, dtype), eager.decode(codes, E4M3, dtype))


def results(x: Tensor, fmt: FloatFormat) -> list[Tensor]:
    """What every op makes of x in every mode."""
    how = (True, torch.tensor(11), torch.tensor(22), 32)
    codes = [_ops.encode(x, fmt.fields, mode.number, *how) for mode in MODES]
    values = [_ops.quantize(x, fmt.fields, mode.number, *how) for mode in MODES]
    return [*codes, *values, *(_ops.decode(code, fmt.fields, x.dtype) for code in codes)]


@contextmanager
def flushing() -> Iterator[bool]:
    """Subnormal operands and results of the CPU's floating-point operations become zero."""
    yield torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flush_to_zero_changes_no_bit(device: torch.device, dtype: torch.dtype) -> None:
    least = {torch.float32: -149, torch.float64: -1074}[dtype]
    fmt = FloatFormat(5, 2, bias=-1 - least)
    step = 1 << (CONTAINERS[dtype].precision - 8)
    x = (torch.arange(-300, 300) * step).to(CONTAINERS[dtype].integer).abs().view(dtype).to(device)
    x = torch.cat([x, -x])
    expected = results(x, fmt)
    with flushing() as supported:
        if supported:
            assert float(torch.full((), 2.0**-1070, dtype=torch.float64) * 1.0) == 0.0
        actual = results(x, fmt)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_bits_equal(mine, theirs)


def test_thread_count_changes_no_bit() -> None:
    x = torch.randn(300_001) * 100
    stats, codes = torch.zeros(3, 9, dtype=torch.float64), torch.zeros(3, 256, dtype=torch.int64)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(x, E4M3))
        _ops.quantize_statistics(x, E4M3.fields, *REST, None, stats[threads - 1], codes[threads - 1])
    torch.set_num_threads(before)
    for other in found[1:]:
        for mine, theirs in zip(other, found[0], strict=True):
            assert_bits_equal(mine, theirs)
    for rows in (stats, codes):
        assert_bits_equal(rows, rows[:1].expand_as(rows).contiguous())


REST = (0, True, None, None, 32)
FIELDS = E4M3.fields
# Calls that Python never makes, for it has checked.
WRONG: dict[str, Callable[[Tensor], object]] = {
    "dtype": lambda x: _ops.quantize(x.to(torch.int32), FIELDS, *REST),
    "dtype too narrow": lambda x: _ops.quantize(x.half(), lookup("1-8-7").fields, *REST),
    "fields": lambda x: _ops.quantize(x, FIELDS[:4], *REST),
    "no such format": lambda x: _ops.encode(x, [40, 3, 0, 0, 1], *REST),
    "mode": lambda x: _ops.quantize(x, FIELDS, 7, *REST[1:]),
    "random bits": lambda x: _ops.quantize(x, FIELDS, 6, True, None, None, 7),
    "seed": lambda x: _ops.quantize(x, FIELDS, 6, True, torch.ones(2), None, 32),
    "stats": lambda x: _ops.quantize_statistics(x, FIELDS, *REST, None, x.new_zeros(8, dtype=torch.float64), None),
    "dtype of stats": lambda x: _ops.quantize_statistics(x, FIELDS, *REST, None, x.new_zeros(9), None),
    "histogram": lambda x: _ops.quantize_statistics(
        x, FIELDS, *REST, None, x.new_zeros(9, dtype=torch.float64), x.new_zeros(255, dtype=torch.int64)
    ),
    "shape of out": lambda x: _ops.quantize_out(x, FIELDS, *REST, x[:2]),
    "dtype of out": lambda x: _ops.encode_out(x, FIELDS, *REST, x),
    "codes": lambda x: _ops.decode(x, FIELDS, torch.float32),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_second_fence(device: torch.device, call: Callable[[Tensor], object]) -> None:
    if _ops.libraries[device.type] == "loaded":
        with pytest.raises(RuntimeError):
            call(torch.ones(3, device=device))


@pytest.mark.gpu
def test_a_replayed_graph_draws_with_the_new_seed() -> None:
    x, seed = torch.randn(10_000, device="cuda"), torch.tensor(1, device="cuda")
    how = (E4M3.fields, Rounding.stochastic.number, True, seed, seed, 32)
    _ops.quantize(x, *how)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _ops.quantize(x, *how)
    for value in (5, -6):
        seed.fill_(value)
        graph.replay()
        assert_bits_equal(out, eager.quantize(x, E4M3, Rounding.stochastic, True, seed, seed, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [Rounding.nearest_even, Rounding.stochastic])
def test_more_elements_than_an_int_counts(rounding: Rounding) -> None:
    first, count = 2**31 - 16, 93
    x = torch.full((first + count,), 0.3, dtype=torch.bfloat16, device="cuda")
    x[first:] = torch.randn(count, device="cuda")
    codes = _ops.encode(x, E4M3.fields, rounding.number, True, torch.tensor(9), None, 32)
    index = torch.arange(first, first + count)
    zero = torch.tensor(0)
    words = torch.stack(eager.philox((torch.tensor(9), zero), (zero, zero), index // 4))[index % 4, torch.arange(count)]
    parts = eager.unpack(x[first:].cpu())
    expected = eager.round_code(parts, E4M3, rounding, True, words, 32).code
    assert (codes[first:].cpu() & 0x7F).tolist() == expected.tolist()
    values = _ops.decode(codes, E4M3.fields, torch.bfloat16)
    assert_bits_equal(values[first:], eager.decode(codes[first:].clone(), E4M3, torch.bfloat16))
