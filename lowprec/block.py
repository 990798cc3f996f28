"""Block formats on tensors: values, packed codes with their scales, and files of these.

`lowprec.cast` checks the arguments that all casts share, and comes here for block formats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from lowprec import _ops, eager_block
from lowprec.eager import code_dtype
from lowprec.eager_block import tiling
from lowprec.formats import BlockFormat
from lowprec.formats import format as lookup
from lowprec.packing import row_bytes
from lowprec.straight_through import ForwardMode, StraightThrough


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in a block format: what `lowprec.encode` gives and `lowprec.decode` takes.

    A pytree of its tensors, so that it passes through `torch.compile` and `torch.func`.

    Attributes:
        codes: element codes in the tensor's shape: uint8 for elements up to 8 bits, else uint16 or uint32. If they are
            packed densely, uint8 with rows of ceil(size · bits / 8) bytes, low bits first.
        scales: uint8 codes of the scales. Of the tensor's shape, but with ceil(n / block) entries along `dim`; for
            tiles, fewer entries along the last two dimensions; 0-dim for a whole tensor.
        format: the block format.
        dim: the dimension that blocks lie along; tiles and whole-tensor blocks take no notice.
        tensor_scale: 0-dim float32, in formats that have one.
        size: of the last dimension, where codes are packed densely; else None.
    """

    codes: Tensor
    scales: Tensor
    format: BlockFormat
    dim: int
    tensor_scale: Tensor | None = None
    size: int | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor whose codes these are."""
        shape = self.codes.shape
        return shape if self.size is None else torch.Size([*shape[:-1], self.size])

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return sum(each.nbytes for each in (self.codes, self.scales, self.tensor_scale) if each is not None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same codes on another device."""
        move = {"device": device, "non_blocking": non_blocking}
        second = None if self.tensor_scale is None else self.tensor_scale.to(**move)  # type: ignore[call-overload]
        codes, scales = self.codes.to(**move), self.scales.to(**move)  # type: ignore[call-overload]
        return replace(self, codes=codes, scales=scales, tensor_scale=second)

    def cpu(self) -> Packed:
        """The same codes on the CPU."""
        return self.to("cpu")

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, which `Packed.load` reads; for several in one file see `save_packed`."""
        save_packed({"packed": self}, path)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> Packed:
        """Read a file that holds one packed tensor; ValueError if it holds several or none."""
        found = load_packed(path, device)
        if len(found) != 1:
            raise ValueError(f"{path} holds {len(found)} packed tensors: read them with load_packed")
        return next(iter(found.values()))


def _flatten(packed: Packed) -> tuple[list[Any], tuple[Any, ...]]:
    tensors = [packed.codes, packed.scales, packed.tensor_scale]
    return [each for each in tensors if each is not None], (packed.format, packed.dim, packed.size)


def _unflatten(tensors: Any, rest: tuple[Any, ...]) -> Packed:
    codes, scales, *second = tensors
    return Packed(codes, scales, rest[0], rest[1], second[0] if second else None, rest[2])


_pytree.register_pytree_node(Packed, _flatten, _unflatten, serialized_type_name="lowprec.Packed")


# Files.


def save_packed(packed: Mapping[str, Packed], path: str | Path) -> None:
    """Write packed tensors, by name, to one safetensors file.

    Tensors are `<name>.codes`, `<name>.scales` and, in formats that have one, `<name>.tensor_scale`; the metadata has
    for each name its format, dim and size as JSON.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, each in packed.items():
        parts = {"codes": each.codes, "scales": each.scales, "tensor_scale": each.tensor_scale}
        tensors |= {f"{name}.{key}": part.contiguous() for key, part in parts.items() if part is not None}
        metadata[name] = json.dumps({"format": str(each.format), "dim": each.dim, "size": each.size})
    save_file(tensors, str(path), metadata=metadata)


def load_packed(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Packed]:
    """Read what `save_packed` wrote, bit for bit."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt", device=str(device)) as file:
        keys = set(file.keys())
        described = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        return {name: _read(file, keys, name, **how) for name, how in described.items()}


def _read(file: Any, keys: set[str], name: str, format: str, dim: int, size: int | None) -> Packed:
    fmt = lookup(format)
    if not isinstance(fmt, BlockFormat):
        raise ValueError(f"{name} is in {format}, which is no block format")
    second = file.get_tensor(f"{name}.tensor_scale") if f"{name}.tensor_scale" in keys else None
    return Packed(file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scales"), fmt, dim, second, size)


# Casts. `torch.compile` must see a format's integers as constants, so it travels as a string; see `lowprec.cast`.


def is_block(fmt: object) -> bool:
    """Whether a format, or its string, is a block format."""
    return isinstance(fmt, BlockFormat) or (isinstance(fmt, str) and _names_block(fmt))


@_ops.constant
def _names_block(text: str) -> bool:
    return isinstance(lookup(text), BlockFormat)


def block_fields(fmt: BlockFormat | str, dtype: torch.dtype | None = None) -> list[int]:
    """The integers of a block format whose elements a dtype, if given, must hold with some scale.

    Raises:
        ValueError: where it holds them with none.
    """
    return [int(field) for field in _describe(str(fmt), dtype).split()]


@_ops.constant
def _describe(text: str, dtype: torch.dtype | None) -> str:
    return _cached_fields(text, dtype)


@lru_cache(maxsize=1024)
def _cached_fields(text: str, dtype: torch.dtype | None) -> str:
    fmt = _block_format(text)
    if dtype is not None and fmt.scale == "e8m0":
        eager_block.scale_range(fmt, dtype)
    return " ".join(map(str, fmt.fields))


@_ops.constant
def _block_format(text: str) -> BlockFormat:
    fmt = lookup(text)
    assert isinstance(fmt, BlockFormat)
    return fmt


@_ops.constant
def _fits(text: str, dtype: torch.dtype) -> bool:
    """Whether a dtype holds every element with some scale."""
    try:
        _cached_fields(text, dtype)
    except ValueError:
        return False
    return True


@_ops.constant
def same(text: str, other: str) -> bool:
    """Whether two strings name one block format."""
    return _block_format(text) == _block_format(other)


def call_of(text: str, x: Tensor, dim: int) -> tuple[Any, ...]:
    """The first arguments of the op that rounds x: the format's integers and the dimension, checked."""
    fields = block_fields(text, x.dtype)
    _require_dim(x.shape, dim)
    return fields, dim


def code_call_of(text: str, x: Tensor, dim: int) -> tuple[Any, ...]:
    """The same for codes, for which any dtype will do."""
    fields = block_fields(text)
    _require_dim(x.shape, dim)
    return fields, dim


def quantize(x: Tensor, args: tuple[Any, ...]) -> Tensor:
    """`lowprec.quantize`; `args` are those of the op, format first."""
    function = QuantizeBlock if torch.compiler.is_compiling() else DualQuantizeBlock
    values: Tensor = function.apply(x, *args)  # type: ignore[no-untyped-call]
    return values


def encode(x: Tensor, text: str, args: tuple[Any, ...], pack: bool) -> Packed:
    """`lowprec.encode`; `args` are those of the op, format first.

    Where x's dtype is too narrow for the elements with any scale, x goes by float64, which changes no number.
    """
    fields, dim = args[:2]
    bits = 1 + fields[0] + fields[1]
    codes, scales, tensor_scale = _ops.encode_block(x if _fits(text, x.dtype) else x.double(), *args)
    size = None
    if pack and bits < 8:
        size = x.shape[-1] if x.dim() else 1
        codes = _ops.pack_codes(codes, bits)
    return Packed(codes, scales, _block_format(text), dim, tensor_scale if fields[8] else None, size)


def decode(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`lowprec.decode`: the exact product of code and scales, rounded once (to nearest even) into the dtype."""
    fields = block_fields(packed.format)
    _require_whole(packed, fields)
    # The width from the fields: under `torch.compile` they are constants.
    bits = 1 + fields[0] + fields[1]
    codes = packed.codes if packed.size is None else _ops.unpack_codes(packed.codes, bits, packed.size)
    values: Tensor = _ops.decode_block(codes, packed.scales, packed.tensor_scale, fields, packed.dim, dtype)
    return values


def _require_dim(shape: torch.Size, dim: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r}")
    rank = max(len(shape), 1)
    if not -rank <= dim < rank:
        raise ValueError(f"dim must be from {-rank} to {rank - 1} for a tensor of shape {tuple(shape)}, got {dim}")


def _require_whole(packed: Packed, fields: list[int]) -> None:
    """ValueError where codes, scales and format do not belong together."""
    _require_dim(packed.shape, packed.dim)
    scales = _scales_shape(packed)
    wanted = torch.uint8 if packed.size is not None else code_dtype(fields)
    if packed.codes.dtype != wanted or packed.scales.dtype != torch.uint8:
        raise TypeError(
            f"codes must be {wanted} and scales torch.uint8, got {packed.codes.dtype} and {packed.scales.dtype}"
        )
    if packed.scales.shape != scales:
        raise ValueError(f"scales must be of shape {tuple(scales)}, got {tuple(packed.scales.shape)}")
    if packed.size is not None and packed.codes.shape[-1] != row_bytes(packed.size, 1 + fields[0] + fields[1]):
        raise ValueError(f"codes must have rows for {packed.size} elements, got {tuple(packed.codes.shape)}")
    second = packed.tensor_scale
    if (second is not None) != bool(fields[8]) or (second is not None and second.dtype != torch.float32):
        raise ValueError(f"tensor_scale must be a 0-dim float32 tensor in formats that have one, got {second!r}")


def _scales_shape(packed: Packed) -> tuple[int, ...]:
    return tiling(packed.shape, packed.format, packed.dim).scales


class QuantizeBlock(StraightThrough):
    """The op with a straight-through gradient, to any order."""

    @staticmethod
    def forward(
        x: Tensor,
        format: list[int],
        dim: int,
        rounding: int,
        saturate: bool,
        seed: Tensor | None,
        offset: Tensor | None,
        random_bits: int,
    ) -> Tensor:
        # Spelled out: dynamo tells a forward without ctx by the number of its parameters.
        values: Tensor = _ops.quantize_block(x, format, dim, rounding, saturate, seed, offset, random_bits)
        return values

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _ops.batch_block(DualQuantizeBlock.apply, info, in_dims, args)


class DualQuantizeBlock(ForwardMode, QuantizeBlock):
    """`QuantizeBlock` in forward mode too, which `torch.compile` refuses to trace."""
