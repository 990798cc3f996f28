"""Fused casts: more than one thing done to a tensor while it is read once.

`transpose` casts into both layouts, `activate` scales, adds a bias, applies an activation function and casts,
`accumulate_` adds to a tensor and casts the sum, `matmul` multiplies codes and casts the product.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lowprec import _ops
from lowprec.cast import (
    FormatLike,
    _codes_and_format,
    _require_apart,
    draw,
    fields_of,
    mode_of,
    names_of,
    require_float,
)
from lowprec.eager import CONTAINERS, code_dtype
from lowprec.eager_fused import ACTIVATIONS, along
from lowprec.fused_matmul import matmul as matmul
from lowprec.rounding import Rounding

Kind = Literal["values", "codes"] | None
"""What a cast gives: values, codes, or nothing."""

_KINDS = ("values", "codes", None)
_MOST_STOCHASTIC_BITS = 27  # mantissa bits of a format into which an exact sum's first 32 bits below them are known


def transpose(
    x: Tensor,
    fmt: FormatLike,
    *,
    outputs: tuple[Kind, Kind] = ("values", "codes"),
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
) -> tuple[Tensor | None, Tensor | None]:
    """Cast a tensor into its own layout and into that of its transpose, from one read.

    Both results have the bits that `quantize` and `encode` give, stochastic rounding included: an element's index is
    that in x. Gradients pass straight through values; codes have none.

    Args:
        x: float64, float32, float16 or bfloat16, shape (..., R, C), any strides and device.
        fmt: the format, its string or dtype. For values, x's dtype must hold each of its finite values.
        outputs: what to give as x, and what as its transpose: "values", "codes" or None.
        rounding: as in `quantize`.
        saturate: as in `quantize`.
        seed: as in `quantize`.
        offset: as in `quantize`.
        generator: as in `quantize`.
        random_bits: as in `quantize`.

    Returns:
        The results, or None where `outputs` has it: shapes (..., R, C) and (..., C, R), both contiguous; values in x's
        dtype, codes in that of `encode`.

    Raises:
        TypeError, ValueError: as `quantize`; for fewer than two dimensions or other outputs.
    """
    require_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions, got shape {tuple(x.shape)}")
    if not isinstance(outputs, tuple) or len(outputs) != 2 or any(kind not in _KINDS for kind in outputs):
        raise ValueError(f'outputs must be a pair of "values", "codes" or None, got {outputs!r}')
    fields = fields_of(fmt, x.dtype if "values" in outputs else None)
    args = (fields, *mode_of(rounding, saturate, random_bits), *draw(x, rounding, seed, offset, generator), random_bits)
    rows, columns = Transpose.apply(x, *args, *outputs)  # type: ignore[no-untyped-call]
    return rows, columns


class Transpose(torch.autograd.Function):
    """The op with a straight-through gradient to its values."""

    @staticmethod
    def forward(
        x: Tensor,
        format: list[int],
        rounding: int,
        saturate: bool,
        seed: Tensor | None,
        offset: Tensor | None,
        random_bits: int,
        rows_kind: Kind,
        columns_kind: Kind,
    ) -> tuple[Tensor | None, Tensor | None]:
        # Spelled out: dynamo tells a forward without ctx by the number of its parameters.
        *batch, height, width = x.shape
        rows = _target(x, [*batch, height, width], rows_kind, format)
        columns = _target(x, [*batch, width, height], columns_kind, format)
        _ops.cast_transpose(x, format, rounding, saturate, seed, offset, random_bits, rows, columns)
        return rows, columns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.mark_non_differentiable(*(out for out in output if out is not None and not out.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, columns = grads
        rows = rows if rows is not None and rows.is_floating_point() else None
        columns = columns.transpose(-1, -2) if columns is not None and columns.is_floating_point() else None
        grad = rows if columns is None else columns if rows is None else rows + columns
        return (grad, None, None, None, None, None, None, None, None)


def _target(x: Tensor, shape: list[int], kind: Kind, format: list[int]) -> Tensor | None:
    """Where the op is to write one of its results."""
    if kind is None:
        return None
    return torch.empty(shape, dtype=x.dtype if kind == "values" else code_dtype(format), device=x.device)


def activate(
    x: Tensor,
    fmt: FormatLike,
    activation: str = "none",
    *,
    scale: float | Tensor | None = None,
    bias: float | Tensor | None = None,
    dim: int = -1,
    codes: bool = False,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
) -> Tensor:
    """Round act(scale · x + bias) to a format.

    Computed in float64 by the same operations in the same order on every device, then rounded once: the same bits
    everywhere. docs/fused.md gives those operations, their accuracy and what they make of special values. NaN in x
    stays as it is, bit for bit; what becomes NaN is the dtype's positive quiet NaN.

    Gradients of x, scale and bias pass straight through the cast, times the activation's derivative; once
    differentiable.

    Args:
        x: float64, float32, float16 or bfloat16, any shape, strides and device.
        fmt: the format, its string or dtype. For values, x's dtype must hold each of its finite values.
        activation: "none", "relu", "relu2" (its square), "sigmoid", "tanh", "silu" or "gelu" (the form with tanh).
        scale: a number, or a float tensor with no dimension or with one as long as x is along `dim`.
        bias: likewise.
        dim: the dimension of x along which scale and bias lie.
        codes: whether to return codes instead of values; these have no gradient.
        rounding: as in `quantize`.
        saturate: as in `quantize`.
        seed: as in `quantize`.
        offset: as in `quantize`.
        generator: as in `quantize`.
        random_bits: as in `quantize`.

    Returns:
        Values in x's dtype or codes as those of `encode`, in x's shape, contiguous.

    Raises:
        TypeError, ValueError: as `quantize`; for an unknown activation, or a scale or bias of another shape or device.
    """
    require_float("x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if x.dim() and not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be within x's {x.dim()} dimensions, got {dim}")
    factor, summand = _vector(x, "scale", scale, dim), _vector(x, "bias", bias, dim)
    fields = fields_of(fmt, None if codes else x.dtype)
    args = (fields, *mode_of(rounding, saturate, random_bits), *draw(x, rounding, seed, offset, generator), random_bits)
    rest = (ACTIVATIONS.index(activation), factor, summand, dim)
    if codes:
        factor, summand = (each if each is None else each.detach() for each in (factor, summand))
        result: Tensor = _ops.activate(x.detach(), *args, rest[0], factor, summand, dim, True)
    else:
        result = Activate.apply(x, *args, *rest)  # type: ignore[no-untyped-call]
    return result


def _vector(x: Tensor, name: str, value: float | Tensor | None, dim: int) -> Tensor | None:
    """A scale or bias as a float tensor without dimensions or with one."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    require_float(name, value)
    if value.dim() > min(1, x.dim()) or (value.dim() == 1 and value.shape[0] != x.shape[dim]):
        raise ValueError(
            f"{name} must have no dimension, or one as long as dimension {dim} of x of shape {tuple(x.shape)}, "
            f"got shape {tuple(value.shape)}"
        )
    if value.device != x.device and not (value.dim() == 0 and value.device.type == "cpu"):
        raise ValueError(f"{name} must be on {x.device} like x, or a number on the CPU, got {value.device}")
    return value


class Activate(torch.autograd.Function):
    """The op with gradients that pass straight through its cast."""

    @staticmethod
    def forward(
        x: Tensor,
        format: list[int],
        rounding: int,
        saturate: bool,
        seed: Tensor | None,
        offset: Tensor | None,
        random_bits: int,
        activation: int,
        scale: Tensor | None,
        bias: Tensor | None,
        dim: int,
    ) -> Tensor:
        # Spelled out: dynamo tells a forward without ctx by the number of its parameters.
        values: Tensor = _ops.activate(
            x, format, rounding, saturate, seed, offset, random_bits, activation, scale, bias, dim, False
        )
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *_, activation, scale, bias, dim = inputs
        ctx.save_for_backward(x, scale, bias)
        ctx.activation, ctx.dim = activation, dim

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, bias = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        t, factor = x.to(wide), None
        if scale is not None:
            factor = along(scale, x, ctx.dim).to(wide)
            t = t * factor
        if bias is not None:
            t = t + along(bias, x, ctx.dim).to(wide)
        grad = grads[0].to(wide) * derivative(t, ACTIVATIONS[ctx.activation])
        for_scale = None if scale is None else _summed(grad * x.to(wide), scale, x, ctx.dim)
        for_bias = None if bias is None else _summed(grad, bias, x, ctx.dim)
        for_x = (grad if factor is None else grad * factor).to(x.dtype)
        return (for_x, None, None, None, None, None, None, None, for_scale, for_bias, None)


def _summed(grad: Tensor, vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """A gradient shaped like x as that of a number or vector along one dimension."""
    others = [i for i in range(x.dim()) if not vector.dim() or i != dim % x.dim()]
    return (grad.sum(others) if others else grad).to(vector.dtype).to(vector.device)


def derivative(t: Tensor, activation: str) -> Tensor:
    """The derivative of an activation at t, in t's dtype; that of relu at 0 is 0."""
    if activation == "none":
        return torch.ones_like(t)
    if activation == "relu":
        return (t > 0).to(t.dtype)
    if activation == "relu2":
        return 2 * t.clamp(min=0)
    if activation == "tanh":
        return 1 - t.tanh() ** 2
    if activation == "sigmoid":
        return t.sigmoid() * (-t).sigmoid()
    if activation == "silu":
        return t.sigmoid() * (1 + t * (-t).sigmoid())
    # gelu is t · sigmoid(z) with z = a · (t + b · t^3).
    a, b = 1.5957691216057308, 0.044715
    z = a * (t + b * t**3)
    return z.sigmoid() * (1 + t * (-z).sigmoid() * a * (1 + 3 * b * t**2))


def accumulate_(
    y: Tensor,
    x: Tensor,
    fmt: FormatLike | None = None,
    *,
    x_format: FormatLike | None = None,
    rounding: Rounding | str = "nearest_even",
    saturate: bool | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
) -> Tensor:
    """Replace y by y + x, rounded to a format: the sum is exact before its one rounding.

    Infinities and zeros follow IEEE 754. A NaN in y stays, bit for bit; other sums that are NaN become the dtype's
    quiet NaN. Not differentiable.

    Args:
        y: float64, float32, float16 or bfloat16, any shape, strides and device; written into.
        x: numbers of any of these dtypes; a tensor of one of torch's float8 dtypes; or codes of `x_format` as `encode`
            gives them. Of y's shape and device, any strides; y itself, or apart from it in memory.
        fmt: the format of the result, which y's dtype must hold; None for all of y's dtype.
        x_format: the format of codes.
        rounding: a mode of `Rounding`. "stochastic" serves formats up to 27 mantissa bits, so not float64 as a whole.
        saturate: as in `quantize`; by default a format with `ieee` specials does not saturate, and others do.
        seed: as in `quantize`; an element's index is that in y.
        offset: as in `quantize`.
        generator: as in `quantize`.
        random_bits: as in `quantize`.

    Returns:
        y.

    Raises:
        TypeError, ValueError: as `quantize`; for x of another shape or device, or codes without a format.
    """
    require_float("y", y)
    x, x_fields = _terms(y, x, x_format)
    fields = [] if fmt is None else fields_of(fmt, y.dtype)
    _require_exact(y, fields, rounding)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        raise ValueError("accumulate_ is not differentiable: detach the tensors or use torch.no_grad()")
    if not torch.compiler.is_compiling():
        _require_apart(x, y)
    limit = bool(fields) and fields[3] != _IEEE if saturate is None else saturate
    args = (*mode_of(rounding, limit, random_bits), *draw(y, rounding, seed, offset, generator), random_bits)
    _ops.accumulate_(y, x, fields, x_fields, *args)
    return y


_IEEE = fields_of("e5m2")[3]


def _terms(y: Tensor, x: Tensor, x_format: FormatLike | None) -> tuple[Tensor, list[int]]:
    """What to add, and the integers of the format of its codes: none for a dtype of ours."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if (x.shape, x.device) != (y.shape, y.device):
        raise ValueError(
            f"x must have y's shape {tuple(y.shape)} and device {y.device}, got {tuple(x.shape)} on {x.device}"
        )
    if x.dtype in CONTAINERS:
        if x_format is not None:
            raise ValueError(f"x_format is that of codes, but x holds values: {x.dtype}")
        return x, []
    x, x_format = _codes_and_format(x, x_format)
    fields = fields_of(x_format)
    if x.dtype != code_dtype(fields):
        raise TypeError(f"x must be one of {names_of(CONTAINERS)}, or {code_dtype(fields)} codes, got {x.dtype}")
    return x, fields


def _require_exact(y: Tensor, fields: list[int], rounding: Rounding | str) -> None:
    mbits = fields[1] if fields else CONTAINERS[y.dtype].precision - 1
    if rounding == "stochastic" and mbits > _MOST_STOCHASTIC_BITS:
        raise ValueError(
            f"rounding: stochastic sums are exact up to {_MOST_STOCHASTIC_BITS} mantissa bits, got {mbits}: "
            "give a narrower fmt or another mode"
        )
