"""Sums, dot products and matrix products under an accumulator: any order, any format, the same bits everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec import _ops
from lowprec.accumulator import HOPPER, LEAVES, Accumulator
from lowprec.cast import QuickApply, apply, draw, fields_of, names_of, require_float
from lowprec.eager import CONTAINERS, hardest_values, holds
from lowprec.eager_fused import to_float64
from lowprec.eager_hopper import DTYPES, FLOAT8
from lowprec.formats import FloatFormat
from lowprec.rounding import Rounding

AccumulatorLike = Accumulator | str
"""What an accumulator argument takes: an `Accumulator` or its string."""

BackwardLike = AccumulatorLike | tuple[AccumulatorLike, AccumulatorLike] | None
"""The accumulators of a product's two gradients: the same as the product's (None), one for both, or a pair."""


def sum(
    x: Tensor,
    dim: int | Sequence[int] | None,
    accumulator: AccumulatorLike,
    *,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sum a tensor over dimensions under an accumulator: in its order, each partial sum rounded once as it says.

    Terms go in x's row-major order. The gradient is that of any sum: it reaches every term.

    Args:
        x: float64, float32, float16 or bfloat16, any shape, strides and device.
        dim: a dimension or several; None for all.
        accumulator: an `Accumulator` or its string. Its product format does not count: there are no products.
        keepdim: whether the dimensions stay, with size 1.
        dtype: of the result, into which it is rounded once more, to nearest even; by default float64 for float64,
            float32 otherwise, in which sums are carried.
        seed: as in `quantize`, for stochastic levels; output o (row-major) draws at its n-th of R roundings the word of
            index o · R + n.
        offset: as in `quantize`.
        generator: as in `quantize`.

    Returns:
        The sums, +0 where there are no terms.

    Raises:
        TypeError: for a tensor or an argument of a wrong type.
        ValueError: for an unknown accumulator, one whose formats the carrier cannot hold or that is made of products
            (tensor cores), a dimension that x lacks, or an unfit seed.

    Source: docs/numerics.md, section 5.
    """
    require_float("x", x)
    dims = _dimensions(x, dim)
    carrier = _carrier(x.dtype)
    fields = accumulator_fields(accumulator, carrier)
    if fields[0] > LEAVES.index("exact"):
        raise ValueError(f"accumulator: a tensor core adds products, and sum() has none to add; got {accumulator}")
    draws = draw(x, "stochastic" if is_stochastic(fields) else "nearest_even", seed, offset, generator)
    sums: Tensor = for_mode(Sum, DualSum).apply(x, dims, fields, *draws, _result(dtype, carrier))
    return _unreduced(sums, dims) if keepdim else sums


def dot(
    a: Tensor,
    b: Tensor,
    accumulator: AccumulatorLike,
    *,
    backward: BackwardLike = None,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The dot product of two vectors under an accumulator: `matmul` of 1-dim tensors, as torch.dot.

    Raises:
        TypeError, ValueError: as `matmul`; for tensors that are not 1-dim.
    """
    for name, x in (("a", a), ("b", b)):
        require_float(name, x)
        if x.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {tuple(x.shape)}")
    return matmul(a, b, accumulator, backward=backward, dtype=dtype, seed=seed, offset=offset, generator=generator)


def matmul(
    a: Tensor,
    b: Tensor,
    accumulator: AccumulatorLike,
    *,
    backward: BackwardLike = None,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multiply matrices under an accumulator: in its order, every sum rounded once as it says.

    Each product of two numbers is exact, or rounded first if the accumulator says so; each partial sum is exact before
    its one rounding.

    The gradients are such products too, dA = dY · Bᵀ and dB = Aᵀ · dY. For an operand that was broadcast the sum runs
    over the batch dimensions it lacks and then over the other dimension, as one sum under the accumulator. Stochastic
    levels draw at offset + 1 for dA and offset + 2 for dB; with no seed given each draws its own. A gradient is rounded
    once more, to nearest even, into its tensor's dtype. Gradients of gradients use the accumulator of the gradient.

    Args:
        a: float64, float32, float16 or bfloat16: [K], [M, K] or [..., M, K], any strides and device. The model of
            Hopper's fp8 tensor cores takes float8_e4m3fn and float8_e5m2 (docs/hopper.md), and neither takes float64.
        b: likewise [K], [K, N] or [..., K, N]; batch dimensions are broadcast as in torch.matmul. Operands of two
            dtypes are carried into a wider one, exactly.
        accumulator: an `Accumulator` or its string.
        backward: the accumulators of the gradients: None for the same one, one for both, or the pair (dA, dB).
        dtype: of the result, into which it is rounded once more, to nearest even; by default float64 if an operand is,
            float32 otherwise, in which sums are carried.
        seed: as in `quantize`, for stochastic levels; output o (row-major) draws at its n-th of R roundings the word of
            index o · R + n.
        offset: as in `quantize`.
        generator: as in `quantize`.

    Returns:
        The product in the shape that torch.matmul gives it, +0 where K = 0.

    Raises:
        TypeError: for a tensor or an argument of a wrong type.
        ValueError: for shapes that do not multiply, tensors on two devices, an unknown accumulator, one whose formats
            the carrier cannot hold, or an unfit seed.

    Source: docs/numerics.md, section 5.
    """
    _require_factors(a, b)
    carrier = _carrier(a.dtype, b.dtype)
    fields, left, right = _fields_of_all(accumulator, backward, carrier)
    result = _result(dtype, carrier)
    require_operands(fields, a=a.dtype, b=b.dtype)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        require_operands(left, gradient=result, b=b.dtype)
        require_operands(right, a=a.dtype, gradient=result)
    given = seed is not None or generator is not None
    draws = is_stochastic(fields) or (given and (is_stochastic(left) or is_stochastic(right)))
    words = draw(a, "stochastic" if draws else "nearest_even", seed, offset, generator)
    n = max(a.dim(), b.dim(), 2)
    args = (fields, left, right, *words, given, carrier, result)
    product: Tensor = for_mode(Matmul, DualMatmul).apply(_matrices(a, n, 0), _matrices(b, n, -1), *args)
    product = product.squeeze(-2) if a.dim() == 1 else product
    return product.squeeze(-1) if b.dim() == 1 else product


def _matrices(x: Tensor, dims: int, vector: int) -> Tensor:
    """An operand with as many dimensions as the other one; a vector has a new one first (a row) or last (a column)."""
    x = x.unsqueeze(vector) if x.dim() == 1 else x
    return x[(None,) * (dims - x.dim())]


# Arguments.


def _require_factors(a: Tensor, b: Tensor) -> None:
    """Errors for operands that do not multiply."""
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor) or x.dtype not in FLOAT8:
            require_float(name, x)
    if a.device != b.device:
        raise ValueError(f"a and b must be on one device, got {a.device} and {b.device}")
    shapes = f"got shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError(f"a and b must have at least one dimension, {shapes}")
    if a.shape[-1] != b.shape[max(b.dim() - 2, 0)]:
        raise ValueError(f"a must have as many columns as b has rows, {shapes}")
    for m, n in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]), strict=False):
        if m != n and m != 1 and n != 1:
            raise ValueError(f"the batch dimensions of a and b must broadcast, {shapes}")


def require_operands(fields: list[int], **dtypes: torch.dtype) -> None:
    """TypeError for dtypes that are no operands of an accumulator; the model of tensor cores has its own."""
    leaf = LEAVES[fields[0]]
    allowed = DTYPES if leaf == "hopper_fp8" else DTYPES[len(FLOAT8) :] if leaf in HOPPER else tuple(CONTAINERS)
    if leaf == "tensor_core":
        _require_tensor_core(dtypes)
        allowed = DTYPES
    for name, dtype in dtypes.items():
        if dtype not in allowed:
            raise TypeError(f"{name} must be one of {names_of(allowed)} for {leaf}, got {dtype}")


def require_device(fields: list[int], device: torch.device) -> None:
    """ValueError where an accumulator needs tensor cores and its operands are elsewhere."""
    if LEAVES[fields[0]] == "tensor_core" and device.type != "cuda":
        raise ValueError(
            "tensor_core leaves are what the hardware gives, and need a CUDA device; hopper_fp16 and hopper_fp8 model "
            f"Hopper's on any device; got operands on {device}"
        )


def _require_tensor_core(dtypes: dict[str, torch.dtype]) -> None:
    """ValueError for what is no pair of operands of a tensor core: of one 16-bit dtype, or of float8."""
    kinds = {"float8" if dtype in FLOAT8 else str(dtype) for dtype in dtypes.values()}
    if len(kinds) > 1 or not all(dtype in DTYPES[:-1] for dtype in dtypes.values()):
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            "tensor_core multiplies operands that are both bfloat16, both float16, or each one of "
            f"{names_of(FLOAT8)}: cast them first, got {given}"
        )


def _dimensions(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    """The dimensions to sum over, ascending."""
    if dim is None:
        return list(range(x.dim()))
    given: Sequence[Any] = dim if isinstance(dim, tuple | list) else [dim]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in given):
        raise TypeError(f"dim must be an int, several, or None, got {dim!r}")
    count = max(x.dim(), 1)  # torch lets a number be summed over its dimension 0 too
    if not all(-count <= each < count for each in given):
        raise ValueError(f"dim must be within x's {x.dim()} dimensions, got {dim!r}")
    dims = sorted([each % count for each in given])
    if not dims or len(set(dims)) != len(dims):
        raise ValueError(f"dim must name one dimension or several different ones, got {dim!r}")
    return dims[: x.dim()]


def _result(dtype: torch.dtype | None, carrier: torch.dtype) -> torch.dtype:
    """The dtype of a result."""
    if dtype is not None and dtype not in CONTAINERS:
        raise TypeError(f"dtype must be one of {names_of(CONTAINERS)}, got {dtype}")
    return carrier if dtype is None else dtype


def _carrier(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which sums of numbers of these dtypes are carried."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


# Reading an accumulator. As with formats, `torch.compile` must see its integers as constants (see `lowprec.cast`).


def accumulator_fields(accumulator: AccumulatorLike, carrier: torch.dtype) -> list[int]:
    """The integers of an accumulator, whose formats a carrier must hold."""
    if not isinstance(accumulator, Accumulator | str):
        raise TypeError(f"accumulator must be an Accumulator or a string, got {accumulator!r}")
    return [int(field) for field in _describe(str(accumulator), carrier).split()]


def _fields_of_all(
    accumulator: AccumulatorLike, backward: BackwardLike, carrier: torch.dtype
) -> tuple[list[int], list[int], list[int]]:
    """The integers of a product's accumulator and of those of its gradients."""
    pair = backward if isinstance(backward, tuple | list) else (backward, backward)
    if len(pair) != 2:
        raise ValueError(f"backward must be None, an accumulator, or a pair of them (dA, dB), got {backward!r}")
    left, right = (accumulator if each is None else each for each in pair)
    return (
        accumulator_fields(accumulator, carrier),
        accumulator_fields(left, carrier),
        accumulator_fields(right, carrier),
    )


@_ops.constant
def _describe(text: str, carrier: torch.dtype) -> str:
    return _cached_fields(text, carrier)


@lru_cache(maxsize=4096)
def _cached_fields(text: str, carrier: torch.dtype) -> str:
    accumulator = Accumulator.parse(text)
    for n, level in enumerate(accumulator.levels):
        _require_carried(f"level {n}", level.fmt, carrier, text)
    if accumulator.product is not None:
        _require_carried("the product format", accumulator.product, carrier, text)
    return " ".join(map(str, accumulator.fields))


def _require_carried(what: str, fmt: FloatFormat, carrier: torch.dtype, text: str) -> None:
    for value in hardest_values(fmt):
        if not holds(carrier, value):
            raise ValueError(
                f"accumulator {text!r}: {what} is {fmt}, of which {carrier} cannot hold {value!r}; sums are carried in "
                "float32, or in float64 if an operand is float64"
            )


def is_stochastic(fields: list[int]) -> bool:
    """Whether any level draws random words."""
    return Rounding.stochastic.number in fields[14::8]


# Products.


def for_mode(plain: Any, dual: Any) -> Any:
    """The one that `torch.compile` can trace, or the one that works in forward mode too."""
    return plain if torch.compiler.is_compiling() else dual


class Matmul(torch.autograd.Function):
    """Products of matrices [..., M, K] and [..., K, N] with as many dimensions, whose gradients are such products."""

    @staticmethod
    def forward(
        a: Tensor,
        b: Tensor,
        fields: list[int],
        left: list[int],
        right: list[int],
        seed: Tensor | None,
        offset: Tensor | None,
        given: bool,
        carrier: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        # Spelled out: dynamo tells a forward without ctx by the number of its parameters.
        return round_to(_product(a, b, fields, seed, offset, carrier), dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _, ctx.left, ctx.right, seed, offset, ctx.given, ctx.carrier, _ = inputs
        ctx.save_for_backward(a, b, seed, offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        a, b, *words = ctx.saved_tensors  # once: checkpointing allows no second time
        n = dy.dim() - 2
        da = db = None
        if ctx.needs_input_grad[0]:
            kept, summed = _split(a, dy)
            factors = _gather(dy, kept, [n], [*summed, n + 1]), _gather(b, kept, [*summed, n + 1], [n])
            da = _gradient(ctx, a, *factors, ctx.left, words, 1)
        if ctx.needs_input_grad[1]:
            kept, summed = _split(b, dy)
            factors = _gather(a, kept, [n + 1], [*summed, n]), _gather(dy, kept, [*summed, n], [n + 1])
            db = _gradient(ctx, b, *factors, ctx.right, words, 2)
        return (da, db, None, None, None, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if any(isinstance(dim, int) for dim in in_dims[2:]):
            return _ops.sample_by_sample(DualMatmul.apply, info, in_dims, args)
        a, b = (
            x.movedim(dim, 0) if isinstance(dim, int) else x.unsqueeze(0)
            for x, dim in zip(args[:2], in_dims[:2], strict=True)
        )
        return DualMatmul.apply(a, b, *args[2:]), 0


class DualMatmul(QuickApply, Matmul):
    """`Matmul` in forward mode too, which `torch.compile` refuses to trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Matmul.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])
        ctx.rest = inputs[2:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        a, b = ctx.saved_tensors[:2]
        da, db = tangents[:2]
        terms = [pair for pair in ((da, b), (a, db)) if pair[0] is not None and pair[1] is not None]
        products = [DualMatmul.apply(*pair, *ctx.rest) for pair in terms]
        return products[0] if len(products) == 1 else products[0] + products[1]


def _product(
    a: Tensor, b: Tensor, fields: list[int], seed: Tensor | None, offset: Tensor | None, carrier: torch.dtype
) -> Tensor:
    """The product [..., M, N] in its carrier."""
    if not _has_own_operands(fields) and (a.dtype != b.dtype or _carrier(a.dtype) != carrier):
        a, b = _carry(a, carrier), _carry(b, carrier)
    batch = [n if m == 1 else m for m, n in zip(a.shape[:-2], b.shape[:-2], strict=True)]
    (height, depth), width = a.shape[-2:], b.shape[-1]
    if math.prod(b.shape[:-2]) == 1:  # one product over all rows, which has the same outputs in the same order
        a, b = a.reshape(1, math.prod(batch) * height, depth), b.reshape(1, depth, width)
    else:
        count = math.prod(batch)
        a = a.expand(*batch, height, depth).reshape(count, height, depth)
        b = b.expand(*batch, depth, width).reshape(count, depth, width)
    return tree(a, b, fields, seed, offset).view(*batch, height, width)


def tree(a: Tensor, b: Tensor, fields: list[int], seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """The product of [B, M, K] and [B, K, N], with the leaves that the accumulator names."""
    if _is_hopper(fields):
        return _above(_ops.hopper_leaves(a, b, *fields[:2]), fields, seed, offset)
    if LEAVES[fields[0]] == "tensor_core":
        return _tensor_core(a, b, fields, seed, offset)
    product: Tensor = _ops.matmul(a, b, fields, seed, offset)
    return product


def _tensor_core(a: Tensor, b: Tensor, fields: list[int], seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """The product with leaves by tensor cores: one level over all of them is added up where they are formed."""
    require_operands(fields, a=a.dtype, b=b.dtype)
    require_device(fields, a.device)
    step = 32 if a.dtype in FLOAT8 else 16
    if fields[1] % step:
        raise ValueError(f"tensor_core adds {step} terms of {a.dtype} at once: give k a multiple, got {fields[1]}")
    if _is_one_level_of_tensor_core(fields):
        product: Tensor = _ops.tensor_core_matmul(a, b, fields, seed, offset)
        return product
    return _above(_ops.tensor_core_leaves(a, b, fields[1]), fields, seed, offset)


def _above(leaves: Tensor, fields: list[int], seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """What the levels above leaves [B, M, N, count] make of them."""
    sums: Tensor = _ops.accumulate(leaves.flatten(0, 2), [0, 0, *fields[2:]], seed, offset)
    return sums.reshape(leaves.shape[:3])


def _is_hopper(fields: list[int]) -> bool:
    """Whether leaves follow the model of Hopper's tensor cores, to which an operand's own dtype matters."""
    return LEAVES[fields[0]] in HOPPER


def _is_one_level_of_tensor_core(fields: list[int]) -> bool:
    """Whether all leaves, a tensor core's, are added up in one level."""
    return LEAVES[fields[0]] == "tensor_core" and len(fields) == 16 and fields[8] == 0


def _has_own_operands(fields: list[int]) -> bool:
    """Whether an operand's own dtype matters, as it does to tensor cores."""
    return fields[0] > LEAVES.index("exact")


def _carry(x: Tensor, carrier: torch.dtype) -> Tensor:
    """The same numbers in a carrier. By integers into float64, since a conversion may flush subnormals."""
    return to_float64(x) if carrier == torch.float64 else x.to(carrier)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A result in another dtype, rounded to nearest even: from float64 once, where torch goes by way of float32.

    What a differentiable function returns must be a tensor of its own: up to 2.11, torch's compiler loses the gradient
    where `to` or `reshape` hands another one through. `view` does not.
    """
    if x.dtype == dtype:
        return x
    if torch.float64 not in (x.dtype, dtype):
        return x.to(dtype)
    if dtype == torch.float64:
        return to_float64(x)
    fields = fields_of(dtype)
    codes = _ops.encode(x, fields, Rounding.nearest_even.number, False, None, None, 32)
    rounded: Tensor = _ops.decode(codes, fields, dtype)
    return rounded


def _split(x: Tensor, dy: Tensor) -> tuple[list[int], list[int]]:
    """The batch dimensions that an operand has, and those along which it was broadcast."""
    summed = [i for i in range(dy.dim() - 2) if x.shape[i] != dy.shape[i]]
    return [i for i in range(dy.dim() - 2) if i not in summed], summed


def _gather(x: Tensor, kept: list[int], rows: list[int], columns: list[int]) -> Tensor:
    """Matrices [*kept, rows, columns], of which the last two run over several dimensions each."""
    shape = [x.shape[i] for i in kept] + [math.prod([x.shape[i] for i in dims]) for dims in (rows, columns)]
    return x.permute(*kept, *rows, *columns).reshape(shape)


def _gradient(ctx: Any, x: Tensor, a: Tensor, b: Tensor, fields: list[int], words: Any, further: int) -> Tensor:
    """The product of a and b that is the gradient of x, in its shape and dtype; its words lie further on."""
    seed, offset = words
    if not is_stochastic(fields):
        seed = offset = None
    elif ctx.given:
        offset = torch.tensor(further, device="cpu") if offset is None else offset + further
    else:
        seed, offset = draw(a, "stochastic", None, 0, None)
    carrier = _carrier(ctx.carrier, a.dtype, b.dtype)
    args = (fields, fields, fields, seed, offset, ctx.given, carrier, x.dtype)
    gradient: Tensor = for_mode(Matmul, DualMatmul).apply(a, b, *args)
    return gradient.reshape(x.shape)


# Sums.


def sum_over(x: Tensor, dims: list[int], fields: list[int], seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """The sums over some dimensions, those of the others in row-major order, in their carrier. Not differentiable."""
    kept = [i for i in range(x.dim()) if i not in dims]
    rows, length = (math.prod([x.shape[i] for i in each]) for each in (kept, dims))
    sums: Tensor = _ops.accumulate(x.permute([*kept, *dims]).reshape(rows, length), fields, seed, offset)
    return sums


class Sum(torch.autograd.Function):
    """The sum over dimensions, whose gradient reaches every term."""

    @staticmethod
    def forward(
        x: Tensor, dims: list[int], fields: list[int], seed: Tensor | None, offset: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        shape = [size for i, size in enumerate(x.shape) if i not in dims]
        return round_to(sum_over(x, dims, fields, seed, offset).view(shape), dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dims, *_ = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        if dy.dtype == torch.float64 and ctx.dtype.itemsize == 2:  # see `round_to`; this has a gradient itself
            dy = apply(dy, fields_of(ctx.dtype), Rounding.nearest_even.number, False, None, None, 32)
        dx = _unreduced(dy, ctx.dims).expand(ctx.shape).to(ctx.dtype)
        return (dx, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if any(isinstance(dim, int) for dim in in_dims[1:]):
            return _ops.sample_by_sample(DualSum.apply, info, in_dims, args)
        x, dims, *rest = args
        x = x.movedim(in_dims[0], 0)
        return DualSum.apply(x, [dim + 1 for dim in dims], *rest), 0


class DualSum(QuickApply, Sum):
    """`Sum` in forward mode too, which `torch.compile` refuses to trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        Sum.setup_context(ctx, inputs, output)
        ctx.rest = inputs[1:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return DualSum.apply(tangents[0], *ctx.rest)


def _unreduced(sums: Tensor, dims: list[int]) -> Tensor:
    """Sums with the dimensions that were summed over, of size 1."""
    for dim in dims:
        sums = sums.unsqueeze(dim)
    return sums
