"""Registered operators: schemas, fake kernels, batching rules, and the compiled libraries that override them.

Each op is defined here with the eager twin as its kernel for every device. Loading a compiled library replaces that
kernel on its device; the package computes the same bits without any. Only this file names `torch.ops.lowprec`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowprec import (
    eager,
    eager_accumulate,
    eager_block,
    eager_fused,
    eager_hopper,
    eager_sparse,
    eager_statistics,
)
from lowprec.accumulator import HOPPER, LEAVES, Accumulator, Level
from lowprec.adapt import adapt as _adapt
from lowprec.formats import RULES, SPECIALS, Block, BlockFormat, FloatFormat
from lowprec.packing import pack_rows, row_bytes, unpack_rows
from lowprec.rounding import Rounding

_CAST = "Tensor x, int[] format, int rounding, bool saturate, Tensor? seed, Tensor? offset, int random_bits"
_BLOCKS = "Tensor x, int[] format, int dim, int rounding, bool saturate, Tensor? seed, Tensor? offset, int random_bits"
_SPARSE = "Tensor x, Tensor w, Tensor table, Tensor? gate, int outputs, bool first, bool transpose"
_UPDATE = "Tensor[] x, Tensor[] dy, Tensor table, Tensor? gate, int blocks, int block, bool first"
_LIBRARY: Any = torch.library.Library("lowprec", "DEF")  # type: ignore[no-untyped-call]
_MODES = tuple(Rounding)


@lru_cache(maxsize=1024)
def format_of(fields: tuple[int, ...]) -> FloatFormat:
    """The format whose `fields` an op was given."""
    ebits, mbits, bias, specials, subnormals = fields
    return FloatFormat(ebits, mbits, bias=bias, specials=SPECIALS[specials], subnormals=bool(subnormals))


@lru_cache(maxsize=1024)
def block_format_of(fields: tuple[int, ...]) -> BlockFormat:
    """The block format whose `fields` an op was given."""
    rows, columns, rule, tensor_scale = fields[5:9]
    block: Block = (rows, columns) if rows else columns or "tensor"
    scale = format_of(fields[9:]) if fields[9:] else "e8m0"
    return BlockFormat(format_of(fields[:5]), block, scale=scale, rule=RULES[rule], tensor_scale=bool(tensor_scale))


@lru_cache(maxsize=1024)
def accumulator_of(fields: tuple[int, ...]) -> Accumulator:
    """The accumulator whose `fields` an op was given."""
    leaf, terms, has_product = fields[:3]
    levels = [
        Level(each[0] or None, format_of(each[1:6]), _MODES[each[6]], bool(each[7]))
        for each in (fields[start : start + 8] for start in range(8, len(fields), 8))
    ]
    return Accumulator(levels, format_of(fields[3:8]) if has_product else None, leaf=LEAVES[leaf], terms=terms)


def bits_of(fields: list[int]) -> int:
    """Width of a float format's codes."""
    return 1 + fields[0] + fields[1]


Kernel = Callable[..., Any]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def constant(function: AnyFunction) -> AnyFunction:
    """Mark a function whose result `torch.compile` may take as a constant for each set of arguments.

    The public `torch.compiler.assume_constant_result` does the same and imports the whole compiler for it, which
    doubles the time that `import lowprec` takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _define(
    schema: str, kernel: Kernel, fake: Kernel, *, batched: bool = True, rule: Kernel | None = None, tags: Any = ()
) -> None:
    """Register one op: its eager kernel on every device, its fake kernel and its batching rule.

    The rule is that of elementwise ops, if `batched`, unless another is given.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowprec::{name}", fake, lib=_LIBRARY)
    if batched or rule:
        op = getattr(torch.ops.lowprec, name)
        over = rule or batch

        def call(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
            return over(op, info, dims, args)

        torch.library.register_vmap(f"lowprec::{name}", call, lib=_LIBRARY)


def batch(op: Kernel, info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Batching rule of an elementwise op: one call over the batched tensor, whose index is the one that counts.

    Seeds or offsets that are batched themselves take a call for each.
    """
    batched = {i: dim for i, dim in enumerate(dims) if isinstance(dim, int)}
    if set(batched) == {0}:
        return op(*args), batched[0]

    def sample(n: int) -> list[Any]:
        return [arg.select(batched[i], n) if i in batched else arg for i, arg in enumerate(args)]

    return torch.stack([op(*sample(n)) for n in range(info.batch_size)]), 0


def batch_block(op: Kernel, info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Batching rule of a cast to a block format: one call, where blocks and their scales stay within samples.

    The index that random words go by is that of the batched tensor, its batch dimension first. Tensor scales, and seeds
    or offsets that are batched themselves, take a call for each sample.
    """
    fields, dim = args[1:3]
    fmt = block_format_of(tuple(fields))
    if fmt.tensor_scale or not isinstance(dims[0], int) or any(isinstance(each, int) for each in dims[1:]):
        return sample_by_sample(op, info, dims, args)
    x = args[0].movedim(dims[0], 0)
    flat = eager_block.over_batch(info.batch_size, x.shape[1:], fmt, dim)
    if x.numel() == 0:
        return sample_by_sample(op, info, dims, args)
    result = op(x.reshape(flat.shape), flat.format.fields, flat.dim, *args[3:])
    if isinstance(result, Tensor):
        return result.reshape(x.shape), 0
    codes, scales, _ = result
    nothing = x.new_empty((info.batch_size, 0), dtype=torch.float32)
    return (codes.reshape(x.shape), scales.reshape(flat.scales), nothing), (0, 0, 0)


def batch_encode_packed(op: Kernel, info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Batching rule of `encode_packed`: codes by the index in the batched tensor, then the rows of its samples."""
    codes, dim = batch(encode, info, dims, args)
    return batch_rows(pack_codes, info, (dim,), (codes, bits_of(args[1])))


def batch_rows(op: Kernel, info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Batching rule of an op on rows: the batch comes first, and a sample that is a number is a row of one."""
    x = args[0].movedim(dims[0], 0)
    return op(x.unsqueeze(1) if x.dim() == 1 else x, *args[1:]), 0


def batch_sums(op: Kernel, info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Batching rule of `accumulate`: the rows of all samples in one call, whose index is the one that counts."""
    if any(isinstance(dim, int) for dim in dims[1:]):
        return sample_by_sample(op, info, dims, args)
    x = args[0].movedim(dims[0], 0)
    return op(x.flatten(0, 1), *args[1:]).unflatten(0, x.shape[:2]), 0


def batch_matmul(op: Kernel, info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Tensor, int]:
    """Batching rule of `matmul`: likewise for the products of all samples."""
    if any(isinstance(dim, int) for dim in dims[2:]):
        return sample_by_sample(op, info, dims, args)
    a, b = (
        x.movedim(dim, 0) if isinstance(dim, int) else x.expand(info.batch_size, *x.shape)
        for x, dim in zip(args[:2], dims[:2], strict=True)
    )
    return op(a.flatten(0, 1), b.flatten(0, 1), *args[2:]).unflatten(0, a.shape[:2]), 0


def sample_by_sample(op: Kernel, info: Any, dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Batching rule of any op: a call for each sample."""
    results = [
        op(*(arg.select(dim, n) if isinstance(dim, int) else arg for arg, dim in zip(args, dims, strict=True)))
        for n in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _eager(function: Kernel) -> Kernel:
    """An op's kernel from a function of `eager`: the format and the rounding mode come as integers."""

    def kernel(x: Tensor, format: list[int], rounding: int, *args: Any) -> Tensor:
        result: Tensor = function(x, format_of(tuple(format)), _MODES[rounding], *args)
        return result

    return kernel


def _into(kernel: Kernel) -> Kernel:
    """The kernel that writes into its last argument what `kernel` returns."""

    def write(*args: Any) -> None:
        args[-1].copy_(kernel(*args[:-1]))

    return write


def _eager_block(function: Kernel) -> Kernel:
    """As `_eager`, for a function of `eager_block`."""

    def kernel(x: Tensor, format: list[int], dim: int, rounding: int, *args: Any) -> Any:
        return function(x, block_format_of(tuple(format)), dim, _MODES[rounding], *args)

    return kernel


def _decode(codes: Tensor, format: list[int], dtype: torch.dtype) -> Tensor:
    return eager.decode(codes, format_of(tuple(format)), dtype)


def _decode_out(codes: Tensor, format: list[int], out: Tensor) -> None:
    out.copy_(_decode(codes, format, out.dtype))


def _encode_packed(x: Tensor, format: list[int], *args: Any) -> Tensor:
    return pack_rows(encode(x, format, *args), bits_of(format))


def _decode_packed(dense: Tensor, format: list[int], size: int, dtype: torch.dtype) -> Tensor:
    values: Tensor = decode(unpack_rows(dense, bits_of(format), size), format, dtype)
    return values


def _activate(x: Tensor, format: list[int], rounding: int, *args: Any) -> Tensor:
    *cast, activation, scale, bias, dim, codes = args
    name = eager_fused.ACTIVATIONS[activation]
    result: Tensor = _eager(eager_fused.activate)(x, format, rounding, *cast, name, scale, bias, dim, codes)
    return result


def _accumulate(y: Tensor, x: Tensor, format: list[int], x_format: list[int], rounding: int, *args: Any) -> None:
    fmt, x_fmt = (format_of(tuple(fields)) if fields else None for fields in (format, x_format))
    eager_fused.accumulate_(y, x, fmt, x_fmt, _MODES[rounding], *args)


def _sums(x: Tensor, accumulator: list[int], seed: Tensor | None, offset: Tensor | None) -> Tensor:
    return eager_accumulate.accumulate(x, accumulator_of(tuple(accumulator)), seed, offset)


def _matmul(a: Tensor, b: Tensor, accumulator: list[int], seed: Tensor | None, offset: Tensor | None) -> Tensor:
    return eager_accumulate.matmul(a, b, accumulator_of(tuple(accumulator)), seed, offset)


def _hopper_leaves(a: Tensor, b: Tensor, kind: int, terms: int) -> Tensor:
    return eager_hopper.leaves(a, b, HOPPER[LEAVES[kind]], terms)


def _no_tensor_cores(a: Tensor, *args: Any) -> Tensor:
    raise RuntimeError(
        f"tensor_core leaves are what the hardware gives: they need the compiled kernels and a CUDA device, got a on "
        f"{a.device}; hopper_fp16 and hopper_fp8 model Hopper's on any device"
    )


def _operand(x: Tensor, format: list[int]) -> eager_sparse.Operand:
    return eager_sparse.Operand(x, format_of(tuple(format)) if format else None)


def _operands(tensors: list[Tensor], format: list[int]) -> list[eager_sparse.Operand]:
    return [_operand(x, format) for x in tensors]


def _sparse_matmul(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    *how, x_format, w_format, dtype = args
    y = eager_sparse.matmul(_operand(x, x_format), _operand(w, w_format), *how)
    return y.to(dtype)


def _sparse_matmul_cast(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    *how, codes, dtype = args[7:]
    y = sparse_matmul(x, w, *args[:7], torch.float32)
    result: Tensor = encode(y, *how) if codes else quantize(y, *how).to(dtype)
    return result


def _sparse_matmul_accumulate(x: Tensor, w: Tensor, *args: Any) -> Tensor:
    *how, accumulator, seed, offset, x_format, w_format = args
    how += [accumulator_of(tuple(accumulator)), seed, offset]
    return eager_sparse.matmul_accumulate(_operand(x, x_format), _operand(w, w_format), *how)


def _sparse_weight_grad(x: list[Tensor], dy: list[Tensor], *args: Any) -> Tensor:
    table, gate, blocks, block, first, x_format, dy_format, dtype = args
    pairs = _operands(x, x_format), _operands(dy, dy_format)
    return eager_sparse.weight_grad(*pairs, table, blocks, gate, block, first).to(dtype)


def _sparse_weight_grad_out(x: list[Tensor], dy: list[Tensor], *args: Any) -> None:
    *how, out, beta = args
    dw = sparse_weight_grad(x, dy, *how, torch.float64 if out.dtype == torch.float64 else torch.float32)
    out.copy_(dw + out.to(dw.dtype) * beta if beta else dw)


def _sparse_weight_grad_accumulate(x: list[Tensor], dy: list[Tensor], *args: Any) -> Tensor:
    table, gate, blocks, block, first, accumulator, seed, offset, x_format, dy_format = args
    tree = accumulator_of(tuple(accumulator))
    pairs = _operands(x, x_format), _operands(dy, dy_format)
    return eager_sparse.weight_grad_accumulate(*pairs, table, blocks, gate, block, first, tree, seed, offset)


def _draw_seed() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


def _fake_none(*args: Any) -> None:
    return None


def _fake_values(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_codes(x: Tensor, format: list[int], *args: Any) -> Tensor:
    return torch.empty_like(x, dtype=eager.code_dtype(format))


def _fake_activate(x: Tensor, format: list[int], *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=eager.code_dtype(format) if args[-1] else x.dtype)


def _rows(x: Tensor, last: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*(x.shape or (1,))[:-1], last), dtype=dtype)


def _fake_encode_packed(x: Tensor, format: list[int], *args: Any) -> Tensor:
    return _fake_pack(x, bits_of(format))


def _fake_decode_packed(dense: Tensor, format: list[int], size: int, dtype: torch.dtype) -> Tensor:
    return _rows(dense, size, dtype)


def _fake_pack(codes: Tensor, bits: int) -> Tensor:
    return _rows(codes, row_bytes((codes.shape or (1,))[-1], bits), torch.uint8)


def _fake_unpack(dense: Tensor, bits: int, size: int) -> Tensor:
    return _rows(dense, size, torch.uint8)


def _fake_decode(codes: Tensor, format: list[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _decode_block(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, format: list[int], dim: int, dtype: torch.dtype
) -> Tensor:
    return eager_block.decode(codes, scales, tensor_scale, block_format_of(tuple(format)), dim, dtype)


def _fake_encode_block(x: Tensor, format: list[int], dim: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    fmt = block_format_of(tuple(format))
    scales = x.new_empty(eager_block.tiling(x.shape, fmt, dim).scales, dtype=torch.uint8)
    tensor_scale = x.new_empty(() if fmt.tensor_scale else (0,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=eager.code_dtype(format)), scales, tensor_scale


def _fake_decode_block(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, format: list[int], dim: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _carrier(x: Tensor) -> torch.dtype:
    """The dtype in which sums of x are carried."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_sums(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_carrier(x))


def _fake_matmul(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty((*a.shape[:2], b.shape[2]), dtype=_carrier(a))


def _fake_hopper_leaves(a: Tensor, b: Tensor, kind: int, terms: int) -> Tensor:
    (batch, rows, K), columns = a.shape, b.shape[2]
    return a.new_empty((batch, rows, columns, eager_hopper.leaf_count(K, terms)), dtype=torch.float32)


def _fake_tensor_core_leaves(a: Tensor, b: Tensor, terms: int) -> Tensor:
    return _fake_hopper_leaves(a, b, 0, terms)


def _fake_products(a: Tensor, b: Tensor, *args: Any) -> Tensor:
    return a.new_empty((*a.shape[:2], b.shape[2]), dtype=torch.float32)


def _fake_products_cast(
    a: Tensor,
    b: Tensor,
    accumulator: list[int],
    seed: Tensor | None,
    offset: Tensor | None,
    format: list[int],
    *args: Any,
) -> Tensor:
    codes, dtype = args[-2:]
    return a.new_empty((*a.shape[:2], b.shape[2]), dtype=eager.code_dtype(format) if codes else dtype)


def _sparse_shape(x: Tensor, w: Tensor, outputs: int, first: bool) -> tuple[int, int]:
    features = outputs * w.shape[-1]
    return (features, x.shape[1]) if first else (x.shape[0], features)


def _fake_sparse_matmul(
    x: Tensor, w: Tensor, table: Tensor, gate: Tensor | None, outputs: int, first: bool, *args: Any
) -> Tensor:
    return x.new_empty(_sparse_shape(x, w, outputs, first), dtype=args[-1])


def _fake_sparse_matmul_cast(
    x: Tensor, w: Tensor, table: Tensor, gate: Tensor | None, outputs: int, first: bool, *args: Any
) -> Tensor:
    format, codes, dtype = args[3], *args[-2:]
    shape = _sparse_shape(x, w, outputs, first)
    return x.new_empty(shape, dtype=eager.code_dtype(format) if codes else dtype)


def _fake_sparse_matmul_accumulate(
    x: Tensor, w: Tensor, table: Tensor, gate: Tensor | None, outputs: int, first: bool, *args: Any
) -> Tensor:
    return x.new_empty(_sparse_shape(x, w, outputs, first), dtype=_carrier(x))


def _fake_sparse_weight_grad(
    x: list[Tensor], dy: list[Tensor], table: Tensor, gate: Tensor | None, blocks: int, block: int, *args: Any
) -> Tensor:
    return table.new_empty((blocks, block, block), dtype=args[-1])


def _fake_sparse_weight_grad_accumulate(
    x: list[Tensor], dy: list[Tensor], table: Tensor, gate: Tensor | None, blocks: int, block: int, *args: Any
) -> Tensor:
    return table.new_empty((blocks, block, block), dtype=_carrier(x[0]))


def _fake_seed() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _fake_use(x: Tensor, state: Tensor, *args: Any) -> Tensor:
    return torch.empty(3, dtype=torch.int64, device=state.device)


def _adapt_batched(info: Any, dims: tuple[Any, ...], x: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, None]:
    """One call for the whole batch: a state is that of a tensor, not of its samples."""
    return adapt(x, state, *args), None


_define(f"quantize({_CAST}, Tensor? shift=None, int[] place=[]) -> Tensor", _eager(eager.quantize), _fake_values)
_define(
    f"quantize_statistics({_CAST}, Tensor? shift, Tensor(a!) stats, Tensor(b!)? codes) -> Tensor",
    _eager(eager_statistics.quantize_statistics),
    _fake_values,
    batched=False,
)
_define(f"quantize_out({_CAST}, Tensor(a!) out) -> ()", _into(_eager(eager.quantize)), _fake_none, batched=False)
_define(f"encode({_CAST}) -> Tensor", _eager(eager.encode), _fake_codes)
_define(f"encode_out({_CAST}, Tensor(a!) out) -> ()", _into(_eager(eager.encode)), _fake_none, batched=False)
_define("decode(Tensor codes, int[] format, ScalarType dtype) -> Tensor", _decode, _fake_decode)
_define("decode_out(Tensor codes, int[] format, Tensor(a!) out) -> ()", _decode_out, _fake_none, batched=False)
_define(
    "adapt(Tensor x, Tensor(a!) state, int kind, int emax, int pad, float? stdv, int frequency, int history) -> Tensor",
    _adapt,
    _fake_use,
    batched=False,
)
torch.library.register_vmap("lowprec::adapt", _adapt_batched, lib=_LIBRARY)
_define(f"quantize_block({_BLOCKS}) -> Tensor", _eager_block(eager_block.quantize), _fake_values, rule=batch_block)
_define(
    f"quantize_block_out({_BLOCKS}, Tensor(a!) out) -> ()",
    _into(_eager_block(eager_block.quantize)),
    _fake_none,
    batched=False,
)
_define(
    f"encode_block({_BLOCKS}) -> (Tensor, Tensor, Tensor)",
    _eager_block(eager_block.encode),
    _fake_encode_block,
    rule=batch_block,
)
_define(
    f"quantize_block_statistics({_BLOCKS}, Tensor(a!) stats, Tensor(b!)? codes) -> Tensor",
    _eager_block(eager_block.quantize_statistics),
    _fake_values,
    batched=False,
)
_define(
    "decode_block(Tensor codes, Tensor scales, Tensor? tensor_scale, int[] format, int dim, ScalarType dtype)"
    " -> Tensor",
    _decode_block,
    _fake_decode_block,
    rule=sample_by_sample,
)
_define(
    f"cast_transpose({_CAST}, Tensor(a!)? rows, Tensor(b!)? columns) -> ()",
    _eager(eager_fused.cast_transpose),
    _fake_none,
    batched=False,
)
_define(
    f"activate({_CAST}, int activation, Tensor? scale, Tensor? bias, int dim, bool codes) -> Tensor",
    _activate,
    _fake_activate,
    batched=False,
)
_define(
    "accumulate_(Tensor(a!) y, Tensor x, int[] format, int[] x_format, int rounding, bool saturate, Tensor? seed, "
    "Tensor? offset, int random_bits) -> ()",
    _accumulate,
    _fake_none,
    batched=False,
)
_define(
    "accumulate(Tensor x, int[] accumulator, Tensor? seed, Tensor? offset) -> Tensor",
    _sums,
    _fake_sums,
    rule=batch_sums,
)
_define(
    "matmul(Tensor a, Tensor b, int[] accumulator, Tensor? seed, Tensor? offset) -> Tensor",
    _matmul,
    _fake_matmul,
    rule=batch_matmul,
)
_define(
    "hopper_leaves(Tensor a, Tensor b, int kind, int terms) -> Tensor",
    _hopper_leaves,
    _fake_hopper_leaves,
    rule=batch_matmul,
)
_define(
    "tensor_core_leaves(Tensor a, Tensor b, int terms) -> Tensor",
    _no_tensor_cores,
    _fake_tensor_core_leaves,
    rule=batch_matmul,
)
_define(
    "tensor_core_matmul(Tensor a, Tensor b, int[] accumulator, Tensor? seed, Tensor? offset) -> Tensor",
    _no_tensor_cores,
    _fake_products,
    rule=batch_matmul,
)
_define(
    "tensor_core_matmul_cast(Tensor a, Tensor b, int[] accumulator, Tensor? seed, Tensor? offset, int[] format, "
    "int rounding, bool saturate, Tensor? cast_seed, Tensor? cast_offset, int random_bits, bool codes, "
    "ScalarType dtype) -> Tensor",
    _no_tensor_cores,
    _fake_products_cast,
    batched=False,
)
_define(
    f"sparse_matmul({_SPARSE}, int[] x_format, int[] w_format, ScalarType dtype) -> Tensor",
    _sparse_matmul,
    _fake_sparse_matmul,
    rule=sample_by_sample,
)
_define(
    f"sparse_matmul_cast({_SPARSE}, int[] x_format, int[] w_format, int[] format, int rounding, bool saturate, "
    "Tensor? seed, Tensor? offset, int random_bits, bool codes, ScalarType dtype) -> Tensor",
    _sparse_matmul_cast,
    _fake_sparse_matmul_cast,
    batched=False,
)
_define(
    f"sparse_matmul_accumulate({_SPARSE}, int[] accumulator, Tensor? seed, Tensor? offset, int[] x_format, "
    "int[] w_format) -> Tensor",
    _sparse_matmul_accumulate,
    _fake_sparse_matmul_accumulate,
    rule=sample_by_sample,
)
_define(
    f"sparse_weight_grad({_UPDATE}, int[] x_format, int[] dy_format, ScalarType dtype) -> Tensor",
    _sparse_weight_grad,
    _fake_sparse_weight_grad,
    batched=False,
)
_define(
    f"sparse_weight_grad_out({_UPDATE}, int[] x_format, int[] dy_format, Tensor(a!) out, float beta) -> ()",
    _sparse_weight_grad_out,
    _fake_none,
    batched=False,
)
_define(
    f"sparse_weight_grad_accumulate({_UPDATE}, int[] accumulator, Tensor? seed, Tensor? offset, int[] x_format, "
    "int[] dy_format) -> Tensor",
    _sparse_weight_grad_accumulate,
    _fake_sparse_weight_grad_accumulate,
    batched=False,
)
_define(f"encode_packed({_CAST}) -> Tensor", _encode_packed, _fake_encode_packed, rule=batch_encode_packed)
_define(
    "decode_packed(Tensor codes, int[] format, int size, ScalarType dtype) -> Tensor",
    _decode_packed,
    _fake_decode_packed,
    rule=batch_rows,
)
_define("pack_codes(Tensor codes, int bits) -> Tensor", pack_rows, _fake_pack, rule=batch_rows)
_define("unpack_codes(Tensor codes, int bits, int size) -> Tensor", unpack_rows, _fake_unpack, rule=batch_rows)
_define("draw_seed() -> Tensor", _draw_seed, _fake_seed, batched=False, tags=(torch.Tag.nondeterministic_seeded,))

quantize = torch.ops.lowprec.quantize.default
quantize_statistics = torch.ops.lowprec.quantize_statistics.default
quantize_out = torch.ops.lowprec.quantize_out.default
encode = torch.ops.lowprec.encode.default
encode_out = torch.ops.lowprec.encode_out.default
decode = torch.ops.lowprec.decode.default
accumulate = torch.ops.lowprec.accumulate.default
matmul = torch.ops.lowprec.matmul.default
hopper_leaves = torch.ops.lowprec.hopper_leaves.default
encode_packed = torch.ops.lowprec.encode_packed.default
decode_packed = torch.ops.lowprec.decode_packed.default
pack_codes = torch.ops.lowprec.pack_codes.default
unpack_codes = torch.ops.lowprec.unpack_codes.default
decode_out = torch.ops.lowprec.decode_out.default
adapt = torch.ops.lowprec.adapt.default
quantize_block = torch.ops.lowprec.quantize_block.default
quantize_block_out = torch.ops.lowprec.quantize_block_out.default
quantize_block_statistics = torch.ops.lowprec.quantize_block_statistics.default
encode_block = torch.ops.lowprec.encode_block.default
decode_block = torch.ops.lowprec.decode_block.default
cast_transpose = torch.ops.lowprec.cast_transpose.default
activate = torch.ops.lowprec.activate.default
accumulate_ = torch.ops.lowprec.accumulate_.default
tensor_core_leaves = torch.ops.lowprec.tensor_core_leaves.default
tensor_core_matmul = torch.ops.lowprec.tensor_core_matmul.default
tensor_core_matmul_cast = torch.ops.lowprec.tensor_core_matmul_cast.default
sparse_matmul = torch.ops.lowprec.sparse_matmul.default
sparse_matmul_cast = torch.ops.lowprec.sparse_matmul_cast.default
sparse_matmul_accumulate = torch.ops.lowprec.sparse_matmul_accumulate.default
sparse_weight_grad = torch.ops.lowprec.sparse_weight_grad.default
sparse_weight_grad_out = torch.ops.lowprec.sparse_weight_grad_out.default
sparse_weight_grad_accumulate = torch.ops.lowprec.sparse_weight_grad_accumulate.default
draw_seed = torch.ops.lowprec.draw_seed.default

# Gradients that torch has as operators alone.
convolution_back = torch.ops.aten.convolution_backward.default
layer_norm_back = torch.ops.aten.native_layer_norm_backward.default
sigmoid_back = torch.ops.aten.sigmoid_backward.default
tanh_back = torch.ops.aten.tanh_backward.default


def _load(name: str, wanted: bool) -> str:
    """Load one compiled library; what became of it, in a few words."""
    if os.environ.get("LOWPREC_EAGER", "") not in ("", "0"):
        return "off: LOWPREC_EAGER is set"
    if not wanted:
        return "off: this torch has no CUDA"
    path = Path(__file__).with_name("_lib") / f"lowprec_{name}.so"
    if not path.exists():
        return "not compiled"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"failed to load: {error}"
    return "loaded"


libraries = {"cpu": _load("cpu", True), "cuda": _load("cuda", torch.version.cuda is not None)}
"""What became of each compiled library: "loaded", or why not. The eager twin serves where none is."""
