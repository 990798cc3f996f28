"""Casts: round a tensor to a format, as values or as codes, and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec import _ops, block
from lowprec.block import Packed
from lowprec.eager import CONTAINERS, code_dtype, hardest_values, holds
from lowprec.formats import BlockFormat, FloatFormat
from lowprec.formats import float_format as lookup
from lowprec.packing import row_bytes
from lowprec.rounding import Rounding
from lowprec.straight_through import ForwardMode, StraightThrough

FormatLike = FloatFormat | BlockFormat | str | torch.dtype
"""What a format argument takes: a format, its string, or the torch dtype of that format."""

RANDOM_BITS = (32, 16, 8)


def quantize(
    x: Tensor,
    fmt: FormatLike,
    *,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
    dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Round every element of a tensor to a value of a format, once, from its own dtype.

    The gradient passes straight through. NaN stays as it is, bit for bit.

    Args:
        x: float64, float32, float16 or bfloat16, any shape, strides and device.
        fmt: the format, its string or dtype. x's dtype must hold each of its finite values. In a block format each
            block has a scale of its own, with which the dtype holds every element.
        rounding: a mode of `Rounding`.
        saturate: whether what rounds past the largest finite magnitude, infinities included, becomes that magnitude.
            If not, it becomes ±infinity (or, in directed modes, stays as IEEE 754 has it), NaN where the format has no
            infinity; a `finite` format always saturates.
        seed: an int or a 0-dim int64 tensor on the CPU or on x's device, for stochastic rounding: element i (row-major
            order) draws a word that depends on seed, offset and i alone.
        offset: likewise.
        generator: draws the seed instead (not under `torch.compile`); with neither, torch's default CPU generator does.
        random_bits: random bits for each element: 32, 16 or 8.
        dim: along which a block format's blocks lie; tiles lie over the last two dimensions whatever it is.
        out: where to write, of x's shape, dtype and device, any strides; neither differentiable nor vmappable.

    Returns:
        Values in x's shape, dtype and strides; `out` if given.

    Raises:
        TypeError: for a tensor or an argument of a wrong type.
        ValueError: for an unknown format or mode, a dtype that cannot hold the format, or an unfit `out` or seed.

    Source: docs/numerics.md, sections 1 to 4.
    """
    blocks, args = call_of(x, fmt, rounding, saturate, seed, offset, generator, random_bits, dim)
    if blocks:
        return block.quantize(x, args) if out is None else _write(_ops.quantize_block_out, x, args, out, x.dtype)
    if out is not None:
        return _write(_ops.quantize_out, x, args, out, x.dtype)
    return apply(x, *args)


def call_of(
    x: Tensor,
    fmt: FormatLike,
    rounding: Rounding | str,
    saturate: bool,
    seed: int | Tensor | None,
    offset: int | Tensor,
    generator: torch.Generator | None,
    random_bits: int,
    dim: int,
) -> tuple[bool, tuple[Any, ...]]:
    """Whether a cast is to a block format, and what its op takes after x: the arguments of `quantize`, checked."""
    require_float("x", x)
    blocks = block.is_block(fmt)
    call = block.call_of(str(fmt), x, dim) if blocks else (fields_of(fmt, x.dtype),)
    draws = draw(x, rounding, seed, offset, generator)
    return blocks, (*call, *mode_of(rounding, saturate, random_bits), *draws, random_bits)


def apply(x: Tensor, *args: Any, shift: Tensor | None = None) -> Tensor:
    """The op `quantize` on arguments that have been checked, differentiable."""
    function = Quantize if torch.compiler.is_compiling() else DualQuantize
    values: Tensor = function.apply(x, *args, shift)  # type: ignore[no-untyped-call]
    return values


def encode(
    x: Tensor,
    fmt: FormatLike,
    *,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
    dim: int = -1,
    pack: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Round every element of a tensor to a format and return its code: sign, exponent, mantissa from the top bit down.

    Arguments, rounding and overflow are those of `quantize`, but any dtype serves any format. NaN keeps its sign and
    becomes the quiet NaN in `ieee`, all ones in `fn`, the one NaN of `fnuz` and `p3109`, and the largest positive code
    in a `finite` format, which has none. Not differentiable. `pack` stores codes of fewer than 8 bits densely, low bits
    first, each row (the last dimension) beginning a byte.

    Returns:
        Codes in x's shape and strides: uint8 for formats up to 8 bits, uint16 up to 16, else uint32; `out` if given.
        Codes of native formats view as torch's float8 types. With `pack`, uint8 of shape [..., ceil(n · bits / 8)].
        For a block format a `Packed`: element codes and scales; a block that holds a NaN has the scale NaN.

    Raises:
        TypeError, ValueError: as `quantize`.
    """
    require_float("x", x)
    blocks = block.is_block(fmt)
    if out is not None and (pack or blocks):
        raise ValueError("out= takes the plain codes of a float format: not packed ones, and not those of blocks")
    call = block.code_call_of(str(fmt), x, dim) if blocks else (fields_of(fmt),)
    args = (*call, *mode_of(rounding, saturate, random_bits), *draw(x, rounding, seed, offset, generator), random_bits)
    if blocks:
        return block.encode(x.detach(), str(fmt), args, pack)
    fields = call[0]
    if out is not None:
        return _write(_ops.encode_out, x, args, out, code_dtype(fields))
    op = _ops.encode_packed if pack and _ops.bits_of(fields) < 8 else _ops.encode
    return op(x.detach(), *args)


def decode(
    codes: Tensor | Packed,
    fmt: FormatLike | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The values of codes, exactly; of a `Packed`, each code times its scales, rounded once (to nearest even).

    Args:
        codes: as `encode` returns them; or a tensor of one of torch's float8 dtypes, which then is the default format.
            Bits above the format's width are ignored.
        fmt: the format, its string or dtype; a `Packed` names its own.
        dtype: float64, float32, float16 or bfloat16; it must hold every finite value of a float format.
        size: of the last dimension, where `encode` stored codes densely.
        out: where to write, of the codes' shape and device and of `dtype`, any strides.

    Returns:
        Values in the codes' shape and strides; `out` if given. A NaN code gives a quiet NaN, with its sign in `ieee`
        and `fn`.

    Raises:
        TypeError: for codes of another integer type than `encode` gives, or a dtype that is not one of the four.
        ValueError: for an unknown format, a dtype that cannot hold it, an unfit `out`, or no format at all.
    """
    if dtype not in CONTAINERS:
        raise TypeError(f"dtype must be one of {names_of(CONTAINERS)}, got {dtype}")
    if isinstance(codes, Packed):
        return _decode_packed(codes, fmt, dtype, size, out)
    codes, fmt = _codes_and_format(codes, fmt)
    fields = fields_of(fmt, dtype)
    if size is not None:
        _require_rows(codes, fields, size)
        if out is None:
            return _decode_rows(codes, fields, size, dtype)
        loose: Tensor = _ops.unpack_codes(codes, _ops.bits_of(fields), size)
        codes = loose
    if codes.dtype != code_dtype(fields):
        raise TypeError(f"codes of {fmt} are {code_dtype(fields)}, got {codes.dtype}")
    if out is not None:
        return _write(_ops.decode_out, codes, (fields,), out, dtype)
    values: Tensor = _ops.decode(codes, fields, dtype)
    return values


def _decode_rows(dense: Tensor, fields: list[int], size: int, dtype: torch.dtype) -> Tensor:
    values: Tensor = _ops.decode_packed(dense, fields, size, dtype)
    return values


def _decode_packed(
    packed: Packed, fmt: FormatLike | None, dtype: torch.dtype, size: int | None, out: Tensor | None
) -> Tensor:
    if fmt is not None and (not block.is_block(fmt) or not block.same(str(fmt), str(packed.format))):
        raise ValueError(f"fmt must be left out, or be that of the packed codes, {packed.format}; got {fmt}")
    if size is not None or out is not None:
        raise ValueError("size= and out= are for the codes of float formats: packed codes know their size")
    return block.decode(packed, dtype)


def _require_rows(dense: Tensor, fields: list[int], size: int) -> None:
    bits = _ops.bits_of(fields)
    if bits >= 8:
        raise ValueError(f"size is for codes of fewer than 8 bits, which can be stored densely; these have {bits}")
    if dense.dtype != torch.uint8 or dense.dim() == 0 or dense.shape[-1] != row_bytes(size, bits):
        raise ValueError(
            f"codes of {size} elements a row must be uint8 with {row_bytes(size, bits)} bytes in the last dimension, "
            f"got {dense.dtype} of shape {tuple(dense.shape)}"
        )


class Quantize(StraightThrough):
    """The op with a straight-through gradient, to any order."""

    @staticmethod
    def forward(
        x: Tensor,
        format: list[int],
        rounding: int,
        saturate: bool,
        seed: Tensor | None,
        offset: Tensor | None,
        random_bits: int,
        shift: Tensor | None,
    ) -> Tensor:
        # Spelled out: dynamo tells a forward without ctx by the number of its parameters.
        values: Tensor = _ops.quantize(x, format, rounding, saturate, seed, offset, random_bits, shift)
        return values

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _ops.batch(DualQuantize.apply, info, in_dims, args)


class QuickApply(torch.autograd.Function):
    """`apply` without the binding of default arguments, which takes longer than a small cast."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class DualQuantize(QuickApply, ForwardMode, Quantize):
    """`Quantize` in forward mode too, which `torch.compile` refuses to trace."""


# Reading a format. `torch.compile` must see its integers as constants: a format travels as a string, which it never
# makes symbolic, and is looked up outside its sight.


def fields_of(fmt: FormatLike, dtype: torch.dtype | None = None) -> list[int]:
    """The integers of a format that a dtype, if given, must hold."""
    spec = str(fmt) if isinstance(fmt, (FloatFormat, BlockFormat)) else fmt
    return [int(field) for field in _describe(spec, dtype).split()]


@_ops.constant
def _describe(spec: str | torch.dtype, dtype: torch.dtype | None) -> str:
    return _cached_fields(lookup(spec), dtype)


@lru_cache(maxsize=4096)
def _cached_fields(fmt: FloatFormat, dtype: torch.dtype | None) -> str:
    if dtype is not None:
        require_holds(fmt, dtype)
    return " ".join(map(str, fmt.fields))


def require_holds(fmt: FloatFormat, dtype: torch.dtype) -> None:
    """Refuse a dtype that cannot hold every finite value of a format."""
    for value in hardest_values(fmt):
        if not holds(dtype, value):
            raise ValueError(f"{dtype} cannot hold {value!r}, a value of {fmt}: use a wider dtype, or encode")


def require_float(name: str, x: object) -> None:
    """TypeError for what casts do not take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in CONTAINERS or x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor of {names_of(CONTAINERS)}, got {x.dtype} ({x.layout})")


def names_of(dtypes: Any) -> str:
    """The names of dtypes, as errors list them."""
    return ", ".join(str(dtype) for dtype in dtypes)


def mode_of(rounding: Rounding | str, saturate: bool, random_bits: int) -> tuple[int, bool]:
    """The number of a rounding mode and whether it saturates, both checked with the random bits."""
    if random_bits not in RANDOM_BITS:
        raise ValueError(f"random_bits must be 32, 16 or 8, got {random_bits!r}")
    if not isinstance(saturate, bool):
        raise TypeError(f"saturate must be a bool, got {saturate!r}")
    return Rounding.of(rounding).number, saturate


def _codes_and_format(codes: Tensor, fmt: FormatLike | None) -> tuple[Tensor, FormatLike]:
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be a tensor, got {type(codes).__name__}")
    if codes.is_floating_point() and codes.dtype.itemsize == 1:
        return codes.view(torch.uint8), codes.dtype if fmt is None else fmt
    if fmt is None:
        raise ValueError(f"fmt is needed to decode {codes.dtype}: only torch's float8 tensors name their own format")
    return codes, fmt


# Random seeds.


def draw(
    x: Tensor,
    rounding: Rounding | str,
    seed: int | Tensor | None,
    offset: int | Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Seed and offset as tensors; (None, None) where the mode draws nothing."""
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both: the generator's one use is to draw a seed")
    if rounding != "stochastic":
        return None, None
    if x.is_cuda and not (isinstance(seed, Tensor) and seed.is_cuda) and _capturing():
        raise ValueError(
            "seed must be a tensor on the device to capture stochastic rounding in a CUDA graph: any other seed would "
            "be frozen, and every replay would draw the same bits"
        )
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        seed = torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator)
    elif seed is None:
        seed = _ops.draw_seed()
    return _word(x, "seed", seed), _word(x, "offset", offset)


def _capturing() -> bool:
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _word(x: Tensor, name: str, value: int | Tensor) -> Tensor | None:
    """A 64-bit word as a 0-dim int64 tensor, ints taken mod 2^64; None for 0."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 0:
            raise ValueError(f"{name} must be a 0-dim int64 tensor, got {value.dtype} of shape {tuple(value.shape)}")
        if value.device.type != "cpu" and value.device != x.device:
            raise ValueError(f"{name} must be on the CPU or on {x.device}, got {value.device}")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or a 0-dim int64 tensor, got {value!r}")
    if not -(2**63) <= value < 2**63:
        value = (value + 2**63) % 2**64 - 2**63
    return torch.tensor(value, dtype=torch.int64, device="cpu") if value else None


# Writing into a given tensor.


def _write(op: Callable[..., None], x: Tensor, args: tuple[Any, ...], out: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if (out.shape, out.dtype, out.device) != (x.shape, dtype, x.device):
        raise ValueError(
            f"out must be {dtype} of shape {tuple(x.shape)} on {x.device}, "
            f"got {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("out= is not differentiable: detach the tensors or use torch.no_grad()")
    if not torch.compiler.is_compiling():
        _require_unbatched(x, out)
        _require_apart(x, out)
    op(x, *args, out)
    return out


def _require_unbatched(*tensors: Tensor) -> None:
    if any(torch._C._functorch.is_batchedtensor(tensor) for tensor in tensors):
        raise ValueError("out= is not vmappable: cast without it under torch.vmap")


def _require_apart(x: Tensor, out: Tensor) -> None:
    """ValueError where writing one element of `out` would change another one, or an element of x not yet read."""
    if out.numel() and any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError("out must not be expanded: several of its elements share one place in memory")
    (first, last), (begin, end) = here, there = _span(x), _span(out)
    same = here == there and x.stride() == out.stride() and x.dtype == out.dtype
    if not same and x.device == out.device and first < end and begin < last:
        raise ValueError("out must be x itself or share no memory with it")


def _span(x: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a tensor reaches; none if it has no elements or no data."""
    if x.numel() == 0 or x.is_meta or hasattr(x, "fake_mode"):
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()
