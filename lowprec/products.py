"""Products with their operands and gradients rounded: matrix products, linear maps, convolutions and embeddings.

A handler takes the roles of the call, torch's own function and that function's arguments. It calls that function on
rounded operands and rounds the gradient of what comes out. To cover another function, add a row to `HANDLERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec import contractions
from lowprec.blocked import convolve, factor, finish, term, times
from lowprec.contractions import Contraction, contract, matmul
from lowprec.lookups import look_up
from lowprec.roles import Roles, is_learnt
from lowprec.windows import Geometry

Handler = Callable[..., Any]


def product(roles: Roles, function: Handler, *args: Any, **kwargs: Any) -> Tensor:
    """A product of all the floating-point tensors among the arguments, wherever they stand.

    With `out=` torch's own rules hold: no gradient may be asked for.
    """
    operands = {name: value for name, value in kwargs.items() if name != "out"}
    if roles.by_contraction:
        y = contract(_CONTRACTIONS.get(function), roles, function, args, operands)
        return y if kwargs.get("out") is None else torch.mul(y, 1, out=kwargs["out"])
    kwargs |= map_tensors(roles.operand, operands)
    y = function(*map_tensors(roles.operand, args), **kwargs)
    return roles.result(y) if kwargs.get("out") is None else y


def added(op: Callable[[Tensor, Tensor], Tensor], contraction: Contraction) -> Handler:
    """The handler of alpha · (a op b) + beta · input.

    A learnt input is a bias: its gradient sums the rounded dY, and is rounded. Any other is a term added in full
    precision to a finished product, so that the gradient of a residual is not rounded.
    """

    def handler(
        roles: Roles,
        function: Handler,
        input: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor | None = None,
    ) -> Tensor:
        y = _scaled_product(roles, a, b, alpha)
        if beta == 0:  # torch then ignores the input, NaN and all
            return torch.mul(finish(roles, y), 1, out=out)
        if not is_learnt(input):
            return torch.add(finish(roles, y), input, alpha=beta, out=out)
        bias = roles.learnt(input).to(y.dtype)
        if roles.blocks and roles.in_blocks("activation_grad"):
            return torch.add(y, term(roles, bias, y), alpha=beta, out=out)
        y = torch.add(y, roles.spread(bias, y), alpha=beta, out=out)
        return y if y is out else roles.result(y)

    def _scaled_product(roles: Roles, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        if roles.by_contraction:
            blocked = contraction(roles, factor(roles, a), factor(roles, b), alpha)
            assert blocked is not None
            return blocked
        y = op(roles.operand(a), roles.operand(b))
        return y if alpha == 1 else y * alpha

    return handler


def added_in_place(op: Callable[[Tensor, Tensor], Tensor], contraction: Contraction) -> Handler:
    """The handler of the same, written into the input."""
    handler = added(op, contraction)

    def write(roles: Roles, function: Handler, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input.copy_(handler(roles, function, input, *args, **kwargs))

    return write


def _addbmm(a: Tensor, b: Tensor) -> Tensor:
    """The sum over the batch of its matrix products."""
    return torch.addbmm(a.new_zeros(()), a, b, beta=0)


def linear(roles: Roles, function: Handler, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Input · weightᵀ + bias, as `F.linear`."""
    if roles.by_contraction:
        return finish(roles, matmul(roles, factor(roles, input), factor(roles, weight, True).map(_transposed)), bias)
    return roles.result(function(roles.operand(input), roles.weight(weight)), bias)


def bilinear(
    roles: Roles, function: Handler, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """input1ᵀ · weight · input2 + bias, as `F.bilinear`: one product of three operands, blocks along the last dims."""
    roles.leave_out()
    return roles.result(function(roles.operand(input1), roles.operand(input2), roles.weight(weight)), bias)


def convolution(
    roles: Roles,
    function: Handler,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """A convolution of torch's, in any number of dimensions, transposed or not."""
    if roles.by_contraction:
        return _blocked_convolution(roles, function, input, weight, bias, args, kwargs)
    y = function(roles.operand(input), roles.weight(weight), None, *args, **kwargs)
    if bias is None:
        return roles.result(y)
    shaped = roles.learnt(bias).to(y.dtype).view(-1, *[1] * (weight.dim() - 2))
    return roles.result(y + roles.spread(shaped, y))


def _blocked_convolution(
    roles: Roles,
    function: Handler,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    n = weight.dim() - 2
    names = _ARGUMENTS[
        "general" if function is torch.convolution else "transposed" if _transposes(function) else "plain"
    ]
    given = dict(zip(names, args, strict=False)) | kwargs
    numbers = {name: _each_dimension(given.get(name, default), n) for name, default in _DEFAULTS.items()}
    x = input if input.dim() == weight.dim() else input.unsqueeze(0)
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        x, numbers["padding"] = _padded(x, padding, weight, numbers["dilation"])
    transposed = bool(given.get("transposed", _transposes(function)))
    how = Geometry(**numbers, transposed=transposed, groups=given.get("groups", 1))
    y = convolve(roles, factor(roles, x), factor(roles, weight, True), how)
    if bias is not None:
        learnt = roles.learnt(bias).to(y.dtype).view(-1, *[1] * n)
        y = y + (term(roles, learnt, y, 1) if roles.in_blocks("activation_grad") else roles.spread(learnt, y))
    y = finish(roles, y)
    return y if x is input or input.dim() == weight.dim() else y.squeeze(0)


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
_ARGUMENTS = {
    "plain": ("stride", "padding", "dilation", "groups"),
    "transposed": ("stride", "padding", "output_padding", "groups", "dilation"),
    "general": ("stride", "padding", "dilation", "transposed", "output_padding", "groups"),
}
"""What follows the bias in torch's three kinds of convolution."""


def _transposes(function: Handler) -> bool:
    return function in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _each_dimension(value: Any, n: int) -> list[int]:
    """One number for all of n dimensions, or one for each."""
    if isinstance(value, str):
        return [0] * n
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


def _padded(x: Tensor, padding: str, weight: Tensor, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """An input with what "same" adds to it, the larger half behind, and no padding left; "valid" adds nothing."""
    n = weight.dim() - 2
    if padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        x = F.pad(x, [part for total in reversed(totals) for part in (total // 2, total - total // 2)])
    return x, [0] * n


def _transposed(x: Tensor) -> Tensor:
    return x.t()


def embedding(
    roles: Roles,
    function: Handler,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The rows of a rounded table; only rows that are looked up get rounded, which gives the same bits."""
    table, summed = roles.learnt(weight), roles.accumulators.weight_grad is not None
    if summed and max_norm is None and not scale_grad_by_freq and not sparse:
        padding = None if padding_idx is None else padding_idx % weight.shape[0]
        return roles.rows(look_up(roles, input, table, padding))
    if summed and weight.requires_grad and torch.is_grad_enabled():
        roles.left_out = True
    return roles.rows(function(input, table, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse))


def embedding_bag(roles: Roles, function: Handler, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Sums, means or maxima of the rows of a rounded table; weights of samples are activations."""
    roles.leave_out()
    if kwargs.get("per_sample_weights") is not None:
        kwargs["per_sample_weights"] = roles.operand(kwargs["per_sample_weights"])
    return roles.result(function(input, roles.weight(weight), *args, **kwargs))


def tensors(*trees: Any) -> Iterator[Tensor]:
    """Every floating-point or complex tensor in nested arguments."""
    for tree in trees:
        if isinstance(tree, Tensor):
            if tree.is_floating_point() or tree.is_complex():
                yield tree
        elif isinstance(tree, (list, tuple)):
            yield from tensors(*tree)
        elif isinstance(tree, dict):
            yield from tensors(*tree.values())


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Nested arguments with a function applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [map_tensors(function, item) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def _both(name: str) -> list[Handler]:
    """A function of torch and the method of that name, where this torch has them."""
    return [getattr(place, name) for place in (torch, Tensor) if hasattr(place, name)]


_MATRIX = ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "kron", "chain_matmul")
_ADDED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Contraction]] = {
    "addmm": (torch.mm, times),
    "addmv": (torch.mv, contractions.addmv),
    "addr": (torch.outer, contractions.addr),
    "baddbmm": (torch.bmm, times),
    "addbmm": (_addbmm, contractions.addbmm),
}
_LINALG = ("matmul", "multi_dot", "vecdot")
_FORMS: dict[str, Contraction] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), matmul),
    **dict.fromkeys(("outer", "ger"), contractions.outer),
    "inner": contractions.inner,
}
_CONTRACTIONS: dict[Handler, Contraction] = {
    torch.einsum: contractions.einsum,
    torch.tensordot: contractions.tensordot,
    torch.linalg.matmul: matmul,
    torch.linalg.vecdot: contractions.vecdot,
    Tensor.__matmul__: matmul,
    Tensor.__rmatmul__: contractions.reverse_matmul,
}
_CONTRACTIONS |= {function: form for name, form in _FORMS.items() for function in _both(name)}
_CONVOLUTIONS = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))

HANDLERS: dict[Handler, tuple[str, Handler]] = {
    F.linear: ("linear", linear),
    F.bilinear: ("bilinear", bilinear),
    F.embedding: ("embedding", embedding),
    F.embedding_bag: ("embedding_bag", embedding_bag),
    torch.convolution: ("convolution", convolution),
    torch.einsum: ("einsum", product),
    torch.tensordot: ("tensordot", product),
    Tensor.__matmul__: ("matmul", product),
    Tensor.__rmatmul__: ("matmul", product),
}
HANDLERS |= {function: (name, product) for name in _MATRIX for function in _both(name)}
HANDLERS |= {getattr(torch.linalg, name): (name, product) for name in _LINALG}
HANDLERS |= {getattr(F, name): (name, convolution) for name in _CONVOLUTIONS}
HANDLERS |= {function: (name, added(*op)) for name, op in _ADDED.items() for function in _both(name)}
HANDLERS |= {function: (name, added_in_place(*op)) for name, op in _ADDED.items() for function in _both(f"{name}_")}
"""What is covered here: torch's function, the name that a report gives it, and its handler."""
