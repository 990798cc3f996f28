"""Products of block-sparse weights: forward, their input gradient, and the update over a list of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowprec import _ops, blocksparse
from lowprec.accumulate import AccumulatorLike, BackwardLike, is_stochastic, round_to
from lowprec.block_tables import Tables
from lowprec.blocksparse import checked
from lowprec.cast import FormatLike, draw, fields_of, mode_of, names_of, require_float
from lowprec.eager import CONTAINERS
from lowprec.fused_matmul import cast_product, require_no_cast, words_of, written_dtype
from lowprec.rounding import Rounding
from lowprec.sparse.layout import BlockLayout

FEATURES = ("last", "first")
"""Where a tensor has its features: (N, C) or (C, N)."""


def matmul(
    x: Tensor,
    w: Tensor,
    layout: BlockLayout,
    *,
    features: str = "last",
    gate: Tensor | None = None,
    accumulator: AccumulatorLike | None = None,
    x_format: FormatLike | None = None,
    w_format: FormatLike | None = None,
    out_format: FormatLike | None = None,
    backward: BackwardLike = None,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    codes: bool = True,
    statistics: bool = False,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
) -> Any:
    """Multiply by block-sparse weights: y = x · W, whose absent blocks cost nothing.

    The terms of an output are the products of the blocks present in its column, in ascending input feature. Under an
    accumulator they are summed as `lowprec.matmul` would sum them, the same bits on every device; R of the words of
    stochastic levels is that of the longest column. Without one, float32 is summed in float32 one term after the
    other, as the accumulator "fp32" says, and so is all but float64 on the CPU; CUDA sums 16-bit values and codes by
    tensor cores in float32, in a fixed order of its own; float64 is summed in float64.

    Differentiable to any order in x, w and gate, where those are values and the product is not cast.

    Args:
        x: values [..., inputs], or [inputs, ...] where features are "first": float64, float32, float16 or bfloat16, any
            strides; or codes of `x_format`, uint8.
        w: [blocks, block, block], of x's dtype, or codes of `w_format`.
        layout: of w.
        features: "last" for (N, C), "first" for (C, N), of x and y alike.
        gate: float32 [blocks]: each block is multiplied by its gate, rounded to w's dtype, and the product rounded to
            that. A block whose gate is 0 is left out: what x holds there, NaN too, does not count.
        accumulator: an `Accumulator` or its string, or None.
        x_format: a format up to 8 bits, where x is codes. Codes of both become bfloat16 where that holds every value,
            or float16, or float32; beside values they become those's dtype.
        w_format: likewise.
        out_format: what the product is cast to, from its float32 sums.
        backward: accumulators of the gradients: None for the same one, one for both, or the pair (dx, dw).
        rounding: of the cast, as in `quantize`; also saturate, random_bits.
        saturate: as in `quantize`.
        codes: whether the cast gives codes of `out_format`, or values.
        statistics: whether to return (result, `Statistics`) of the cast.
        dtype: of the result: x's by default, float32 for codes. Of values with an `out_format`: float32, bfloat16 or
            float16.
        seed: as in `quantize`. With an `out_format` the cast draws at `offset` and the accumulator at `offset` + 1, as
            in `fused.matmul`; without one, the accumulator at `offset`, and its gradients further on.
        offset: as in `quantize`.
        generator: as in `quantize`.
        random_bits: as in `quantize`, for the cast.

    Returns:
        [..., outputs] or [outputs, ...]: values, or codes with an `out_format`; with `statistics` a pair.

    Raises:
        TypeError: for a tensor or an argument of a wrong type.
        ValueError: for a number of features that is not the layout's, weights of another shape, gates that are not
            finite (checked on the CPU alone: on a GPU that would mean waiting for it), tensors on several devices, an
            unknown format, accumulator or axis, or an unfit seed.

    Source: docs/sparse.md; openai/blocksparse (Gray, Radford, Kingma 2017).
    """
    operands = _operands(layout, features, gate, x=(x, x_format), w=(w, w_format))
    require_features("x", x, layout.inputs, "inputs", features)
    words = (seed, offset, generator)
    if out_format is None:
        require_no_cast(False, statistics)
        return _multiply(operands, False, accumulator, backward, dtype, words)
    cast = (out_format, rounding, saturate, codes, statistics, dtype, random_bits)
    return _multiply_and_cast(operands, False, accumulator, cast, words)


def input_grad(
    dy: Tensor,
    w: Tensor,
    layout: BlockLayout,
    *,
    features: str = "last",
    gate: Tensor | None = None,
    accumulator: AccumulatorLike | None = None,
    dy_format: FormatLike | None = None,
    w_format: FormatLike | None = None,
    out_format: FormatLike | None = None,
    backward: BackwardLike = None,
    rounding: Rounding | str = "nearest_even",
    saturate: bool = True,
    codes: bool = True,
    statistics: bool = False,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    random_bits: int = 32,
) -> Any:
    """The gradient of `matmul` in its input: dx = dy · Wᵀ, its terms in ascending output feature.

    Args, results and errors are those of `matmul`, with dy [..., outputs] or [outputs, ...] for x.
    """
    operands = _operands(layout, features, gate, dy=(dy, dy_format), w=(w, w_format))
    require_features("dy", dy, layout.outputs, "outputs", features)
    words = (seed, offset, generator)
    if out_format is None:
        require_no_cast(False, statistics)
        return _multiply(operands, True, accumulator, backward, dtype, words)
    cast = (out_format, rounding, saturate, codes, statistics, dtype, random_bits)
    return _multiply_and_cast(operands, True, accumulator, cast, words)


def weight_grad(
    pairs: Sequence[tuple[Tensor, Tensor]],
    layout: BlockLayout,
    *,
    features: str = "last",
    out: Tensor | None = None,
    beta: float = 0.0,
    accumulator: AccumulatorLike | None = None,
    gate: Tensor | None = None,
    x_format: FormatLike | None = None,
    dy_format: FormatLike | None = None,
    dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The update of block-sparse weights: dW = Σ xᵀ · dy over pairs, of the blocks that are present.

    The terms of a weight go by pair, then by token, as one sum, which is rounded once into the result. Sums are formed
    as in `matmul`. Not differentiable.

    Args:
        pairs: at least one (x, dy), each x [..., inputs] and dy [..., outputs] with as many tokens, or features first;
            pairs may differ in their tokens but not in their dtypes. Values or codes, as in `matmul`.
        layout: of the weights.
        features: "last" or "first", of x and dy alike.
        out: where to write, [blocks, block, block]: out = beta · out + dW, the product and the sum each rounded in
            float32 (of float64 in float64), then once into out's dtype.
        beta: what `out` counts; with 0 it is not read.
        accumulator: an `Accumulator` or its string, or None as in `matmul`.
        gate: float32 [blocks], of the product whose update this is: each block is multiplied by its gate in float32.
        x_format: a format up to 8 bits, where x is codes.
        dy_format: likewise.
        dtype: of the result; by default out's, else x's, else float32 for codes.
        seed: as in `quantize`, for stochastic levels; also offset, generator.
        offset: as in `quantize`.
        generator: as in `quantize`.

    Returns:
        [blocks, block, block]; `out` if given.

    Raises:
        TypeError, ValueError: as `matmul`; for no pairs, pairs that do not match, an unfit out, or a beta without one.
    """
    several = update_operands(pairs, layout, features, gate, x_format, dy_format)
    xs, dys = [each.left for each in several], [each.right for each in several]
    first = several[0]
    fields, drawn = _summing(first, accumulator, (seed, offset, generator))
    where = (xs, dys, first.tables.update, gate, layout.blocks, layout.block, first.first)
    formats = first.formats
    if out is None:
        if beta:
            raise ValueError(f"beta is what out counts: give out, or leave beta out; got {beta!r}")
        return blocksparse.update(*where, fields, *drawn, *formats, _result(dtype, first))
    _require_out(out, layout, first, dtype)
    if not fields:
        _ops.sparse_weight_grad_out(*where, *formats, out, float(beta))
        return out
    sums = blocksparse.update(*where, fields, *drawn, *formats, first.carrier)
    return out.copy_(round_to(out.to(sums.dtype) * beta + sums if beta else sums, out.dtype))


# Arguments.


class _Operands(NamedTuple):
    """Two operands in two dimensions, the fields of their formats, the tables, and how tokens lie."""

    left: Tensor
    right: Tensor
    formats: tuple[list[int], list[int]]
    gate: Tensor | None
    tables: Tables
    first: bool
    rest: torch.Size
    values: torch.dtype

    @property
    def carrier(self) -> torch.dtype:
        return torch.float64 if self.values == torch.float64 else torch.float32


def _operands(
    layout: BlockLayout, features: str, gate: Tensor | None, **operands: tuple[Any, FormatLike | None]
) -> _Operands:
    """The operands of a product, checked: the first by features, the second weights."""
    _require_layout(layout)
    first = is_first(features)
    (left_name, left), (right_name, right) = operands.items()
    x, x_fields = _operand(left_name, *left)
    w, w_fields = _operand(right_name, *right)
    layout.require_weights(right_name, w)
    values = _common((left_name, x, x_fields), (right_name, w, w_fields))
    _require_gate(gate, layout, x)
    _require_dimension(left_name, x)
    flat, rest = blocksparse.flatten(x, first)
    return _Operands(flat, w, (x_fields, w_fields), gate, layout.tables(x.device), first, rest, values)


def update_operands(
    pairs: Sequence[tuple[Tensor, Tensor]],
    layout: BlockLayout,
    features: str = "last",
    gate: Tensor | None = None,
    x_format: FormatLike | None = None,
    dy_format: FormatLike | None = None,
) -> list[_Operands]:
    """The pairs of an update, checked, in two dimensions."""
    several = [_update_operands(layout, features, gate, x, x_format, dy, dy_format) for x, dy in _listed(pairs)]
    _require_alike([each.left for each in several], [each.right for each in several])
    return several


def _update_operands(
    layout: BlockLayout,
    features: str,
    gate: Tensor | None,
    x: Tensor,
    x_format: FormatLike | None,
    dy: Tensor,
    dy_format: FormatLike | None,
) -> _Operands:
    """One pair of an update, checked."""
    _require_layout(layout)
    first = is_first(features)
    (x, x_fields), (dy, dy_fields) = _operand("x", x, x_format), _operand("dy", dy, dy_format)
    values = _common(("x", x, x_fields), ("dy", dy, dy_fields))
    _require_gate(gate, layout, x)
    for name, tensor, size, which in (("x", x, layout.inputs, "inputs"), ("dy", dy, layout.outputs, "outputs")):
        _require_dimension(name, tensor)
        require_features(name, tensor, size, which, features)
    (flat_x, rest), (flat_dy, rest_of_dy) = blocksparse.flatten(x, first), blocksparse.flatten(dy, first)
    if rest != rest_of_dy:
        raise ValueError(f"x and dy of a pair must have the same tokens, got {tuple(x.shape)} and {tuple(dy.shape)}")
    tables = layout.tables(x.device)
    return _Operands(flat_x.detach(), flat_dy.detach(), (x_fields, dy_fields), gate, tables, first, rest, values)


def _listed(pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
    listed = list(pairs)
    if not listed or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in listed):
        raise ValueError("pairs must be a list of at least one (x, dy)")
    return listed


def _require_alike(xs: list[Tensor], dys: list[Tensor]) -> None:
    for name, tensors in (("x", xs), ("dy", dys)):
        kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
        if len(kinds) > 1:
            raise ValueError(f"{name} must have one dtype and device in all pairs, got {sorted(map(str, kinds))}")


def _require_layout(layout: object) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout, got {type(layout).__name__}")


def is_first(features: object) -> bool:
    """Whether features are the first dimension; ValueError for what says neither that nor that they are the last."""
    if features not in FEATURES:
        raise ValueError(f'features must be "last" for (N, C) or "first" for (C, N), got {features!r}')
    return features == "first"


def _operand(name: str, x: Any, fmt: FormatLike | None) -> tuple[Tensor, list[int]]:
    """An operand and the integers of its codes' format; none of values."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize == 1:
        x, fmt = x.view(torch.uint8), x.dtype if fmt is None else fmt
    if fmt is None:
        require_float(name, x)
        return x, []
    fields = fields_of(fmt)
    if _ops.bits_of(fields) > 8:
        raise ValueError(f"{name}_format must have up to 8 bits, got {fmt}")
    if not isinstance(x, Tensor) or x.dtype != torch.uint8:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be codes of {name}_format, uint8, got {given}")
    return x, fields


def _common(*operands: tuple[str, Tensor, list[int]]) -> torch.dtype:
    """The dtype in which two operands are multiplied."""
    (left, x, x_fields), (right, w, w_fields) = operands
    if x.device != w.device:
        raise ValueError(f"{left} and {right} must be on one device, got {x.device} and {w.device}")
    if not x_fields and not w_fields:
        if x.dtype != w.dtype:
            raise ValueError(f"{left} and {right} must have one dtype, got {x.dtype} and {w.dtype}")
        return x.dtype
    own = str(x.dtype if not x_fields else w.dtype if not w_fields else "").removeprefix("torch.")
    name = blocksparse.values_dtype(own, x_fields, w_fields)
    if not name:
        raise ValueError(f"{own or 'float32'} cannot hold all values of {left}_format and {right}_format")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _require_dimension(name: str, x: Tensor) -> None:
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, that of its features")


def require_features(name: str, x: Tensor, size: int, which: str, features: str) -> None:
    """ValueError for a tensor that does not have so many inputs or outputs where its features are to be."""
    dim, other = (0, -1) if features == "first" else (-1, 0)
    if x.dim() and x.shape[dim] == size:
        return
    mixed = " (its other side has as many: are features the other axis?)" if x.dim() and x.shape[other] == size else ""
    raise ValueError(
        f'{name} must have {size} {which} in its {features} dimension (features="{features}"), got shape '
        f"{tuple(x.shape)}{mixed}"
    )


def _require_gate(gate: Tensor | None, layout: BlockLayout, x: Tensor) -> None:
    if gate is None:
        return
    if not isinstance(gate, Tensor) or gate.dtype != torch.float32 or gate.shape != (layout.blocks,):
        given = f"{gate.dtype} of shape {tuple(gate.shape)}" if isinstance(gate, Tensor) else type(gate).__name__
        raise ValueError(f"gate must be float32 of shape ({layout.blocks},), one for each block, got {given}")
    if gate.device != x.device:
        raise ValueError(f"gate must be on {x.device}, got {gate.device}")
    if gate.device.type == "cpu" and not torch.compiler.is_compiling() and not gate.isfinite().all():
        where = int((~gate.isfinite()).nonzero()[0])
        raise ValueError(f"gate must be finite, got {float(gate[where])} for block {where}")


def _require_out(out: object, layout: BlockLayout, operands: _Operands, dtype: torch.dtype | None) -> None:
    layout.require_weights("out", out)
    assert isinstance(out, Tensor)
    if out.dtype not in CONTAINERS or (dtype or out.dtype) != out.dtype or out.device != operands.left.device:
        raise ValueError(f"out must be {dtype or 'values'} on {operands.left.device}, got {out.dtype} on {out.device}")
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError("out= is not differentiable: detach it or use torch.no_grad()")


def _result(dtype: torch.dtype | None, operands: _Operands) -> torch.dtype:
    """The dtype of a result: that of the left operand's values by default, float32 of codes."""
    if dtype is not None and dtype not in CONTAINERS:
        raise TypeError(f"dtype must be one of {names_of(CONTAINERS)}, got {dtype}")
    if dtype is not None:
        return dtype
    return torch.float32 if operands.formats[0] else operands.left.dtype


# Products.

_Words = tuple[int | Tensor | None, int | Tensor, torch.Generator | None]


def _summing(
    operands: _Operands, accumulator: AccumulatorLike | None, words: _Words
) -> tuple[list[int], tuple[Tensor | None, Tensor | None]]:
    """The integers of an accumulator and its random words."""
    fields = checked(accumulator, operands.values, operands.left.device)
    return fields, draw(operands.left, "stochastic" if is_stochastic(fields) else "nearest_even", *words)


def _multiply(
    operands: _Operands,
    transpose: bool,
    accumulator: AccumulatorLike | None,
    backward: BackwardLike,
    dtype: torch.dtype | None,
    words: _Words,
) -> Tensor:
    """The product in the shape of its result: differentiable if both operands are values."""
    x, w, formats, gate, tables, first, rest, _ = operands
    if formats == ([], []):
        seed, offset, generator = words
        y = blocksparse.matmul(
            x,
            w,
            gate,
            tables,
            first=first,
            transpose=transpose,
            accumulator=accumulator,
            backward=backward,
            dtype=dtype,
            seed=seed,
            offset=offset,
            generator=generator,
        )
        return blocksparse.unflatten(y, rest, first)
    fields, drawn = _summing(operands, accumulator, words)
    y = _sums(operands, transpose, fields, drawn, _result(dtype, operands))
    return blocksparse.unflatten(y, rest, first)


def _sums(
    operands: _Operands,
    transpose: bool,
    fields: list[int],
    drawn: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """The product in two dimensions, not differentiable."""
    return blocksparse.product(*_where(operands, transpose), fields, *drawn, *operands.formats, dtype)


def _where(operands: _Operands, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, bool, bool]:
    """What every op of a product takes first, without a graph."""
    x, w, _, gate, tables, first, _, _ = operands
    table, outputs = tables.direction(transpose)
    return x.detach(), w.detach(), table, None if gate is None else gate.detach(), outputs, first, transpose


def _multiply_and_cast(
    operands: _Operands, transpose: bool, accumulator: AccumulatorLike | None, cast: tuple[Any, ...], words: _Words
) -> Any:
    """The product cast to a format, and what that did to it if asked for."""
    out_format, rounding, saturate, codes, statistics, dtype, random_bits = cast
    written = written_dtype(dtype)
    fields = checked(accumulator, operands.values, operands.left.device)
    how = (fields_of(out_format, None if codes else written), *mode_of(rounding, saturate, random_bits))
    seed, offset = words_of(operands.left, is_stochastic(fields) or rounding == "stochastic", *words)
    drawn = (seed, offset) if rounding == "stochastic" else (None, None)
    if fields or statistics or operands.values == torch.float64:
        further = None if seed is None else torch.as_tensor(1 if offset is None else offset + 1, dtype=torch.int64)
        y = _sums(operands, transpose, fields, (seed, further), operands.carrier)
        result = cast_product(y, (*how, *drawn, random_bits), codes, statistics, written)
    else:
        where = (*_where(operands, transpose), *operands.formats)
        result = _ops.sparse_matmul_cast(*where, *how, *drawn, random_bits, codes, written)
    if statistics:
        return blocksparse.unflatten(result[0], operands.rest, operands.first), result[1]
    return blocksparse.unflatten(result, operands.rest, operands.first)
