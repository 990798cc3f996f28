"""Torch's products of two operands as matrix products [..., M, K] · [..., K, N], so that blocks know where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lowprec.blocked import Factor, factor, finish, settle, times
from lowprec.roles import Roles

Contraction = Callable[..., Tensor | None]
"""Takes the roles and torch's arguments, with factors in the place of tensors; None where it knows no such form."""


def matmul(roles: Roles, a: Factor, b: Factor) -> Tensor:
    """As `torch.matmul`, vectors included."""
    if a.x.dim() == 1:
        return matmul(roles, a.map(lambda x: x.unsqueeze(0)), b).squeeze(-2 if b.x.dim() > 1 else 0)
    if b.x.dim() == 1:
        return times(roles, a, b.map(lambda x: x.unsqueeze(1))).squeeze(-1)
    return times(roles, a, b)


def reverse_matmul(roles: Roles, a: Factor, b: Factor) -> Tensor:
    """As `Tensor.__rmatmul__`."""
    return matmul(roles, b, a)


def outer(roles: Roles, a: Factor, b: Factor) -> Tensor:
    """Of vectors: a contraction of length one."""
    return times(roles, a.map(lambda x: x.unsqueeze(1)), b.map(lambda x: x.unsqueeze(0)))


def inner(roles: Roles, a: Factor, b: Factor) -> Tensor | None:
    """Over the last dimensions of both."""
    return tensordot(roles, a, b, ([-1], [-1])) if a.x.dim() and b.x.dim() else None


def vecdot(roles: Roles, a: Factor, b: Factor, *, dim: int = -1) -> Tensor:
    """Over one dimension, the others in parallel."""
    rows = a.map(lambda x: x.movedim(dim, -1).unsqueeze(-2))
    columns = b.map(lambda x: x.movedim(dim, -1).unsqueeze(-1))
    return times(roles, rows, columns).squeeze(-1).squeeze(-1)


def tensordot(roles: Roles, a: Factor, b: Factor, dims: Any = 2) -> Tensor | None:
    """Over the last `dims` dimensions of a and the first of b, or over those listed for each."""
    if isinstance(dims, Tensor):
        return None
    if isinstance(dims, int):
        dims = (range(a.x.dim() - dims, a.x.dim()), range(dims))
    summed = [[d % each.x.dim() for d in listed] for each, listed in zip((a, b), dims, strict=True)]
    kept = [[d for d in range(each.x.dim()) if d not in out] for each, out in zip((a, b), summed, strict=True)]
    if any(a.x.shape[i] != b.x.shape[j] for i, j in zip(*summed, strict=True)):
        return None
    shape = [each.x.shape[d] for each, dims in zip((a, b), kept, strict=True) for d in dims]
    rows, columns = (_count(each.x, dims) for each, dims in zip((a, b), kept, strict=True))
    length = _count(a.x, summed[0])
    left = a.map(lambda x: x.permute(kept[0] + summed[0]).reshape(rows, length))
    right = b.map(lambda x: x.permute(summed[1] + kept[1]).reshape(length, columns))
    return times(roles, left, right).reshape(shape)


def einsum(roles: Roles, equation: Any, *operands: Any) -> Tensor | None:
    """Of two operands whose indices each stand for a dimension of both, of one, or of the sum; no diagonals."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    a, b = operands
    names = _indices(equation, a.x.dim(), b.x.dim())
    if names is None:
        return None
    of_a, of_b, of_y = names
    sizes = dict(zip(of_a + of_b, (*a.x.shape, *b.x.shape), strict=True))
    if any(sizes[name] != size for name, size in zip(of_a, a.x.shape, strict=True)):
        return None  # broadcast
    batch = [name for name in of_y if name in of_a and name in of_b]
    rows = [name for name in of_a if name in of_y and name not in of_b]
    columns = [name for name in of_b if name in of_y and name not in of_a]
    summed = [name for name in of_a if name in of_b and name not in of_y]
    left = a.map(lambda x: _arranged(x, of_a, batch, rows, summed))
    right = b.map(lambda x: _arranged(x, of_b, batch, summed, columns))
    y = times(roles, left, right).reshape([sizes[name] for name in batch + rows + columns])
    return y.permute([(batch + rows + columns).index(name) for name in of_y])


def _indices(equation: str, *dims: int) -> tuple[str, str, str] | None:
    """The indices of both operands and of the result; None for those that are no plain contraction."""
    left, arrow, of_y = equation.replace(" ", "").partition("->")
    of_a, _, of_b = left.partition(",")
    if not arrow:
        of_y = "".join(sorted(name for name in set(of_a + of_b) if (of_a + of_b).count(name) == 1))
    known = set(of_a) | set(of_b)
    plain = all(len(set(names)) == len(names) and "." not in names for names in (of_a, of_b, of_y))
    alone = (set(of_a) ^ set(of_b)) - set(of_y)
    fits = (len(of_a), len(of_b)) == dims and set(of_y) <= known
    return (of_a, of_b, of_y) if plain and fits and not alone else None


def _arranged(x: Tensor, names: str, *groups: list[str]) -> Tensor:
    """Dimensions in the order of three groups, each group as one dimension."""
    order = [names.index(name) for group in groups for name in group]
    sizes = [_count(x, [names.index(name) for name in group]) for group in groups]
    return x.permute(order).reshape(sizes)


def _count(x: Tensor, dims: list[int]) -> int:
    count = 1
    for d in dims:
        count *= x.shape[d]
    return count


def addbmm(roles: Roles, a: Factor, b: Factor, alpha: float = 1) -> Tensor:
    """The sum over the batch of its matrix products, as one product over the batch and the contraction."""
    rows = a.map(lambda x: x.transpose(0, 1).flatten(1))
    return times(roles, rows, b.map(lambda x: x.flatten(0, 1)), alpha)


def addr(roles: Roles, a: Factor, b: Factor, alpha: float = 1) -> Tensor:
    """The outer product."""
    return times(roles, a.map(lambda x: x.unsqueeze(1)), b.map(lambda x: x.unsqueeze(0)), alpha)


def addmv(roles: Roles, a: Factor, b: Factor, alpha: float = 1) -> Tensor:
    """Matrix times vector."""
    return times(roles, a, b.map(lambda x: x.unsqueeze(1)), alpha).squeeze(1)


def contract(
    contraction: Contraction | None, roles: Roles, function: Callable[..., Any], args: Any, kwargs: Any
) -> Tensor:
    """A product in blocks along its contraction or, where it has no such form, along its operands' last dimensions."""
    args, kwargs = _factors(roles, args), _factors(roles, kwargs)
    y = None if contraction is None else contraction(roles, *args, **kwargs)
    if y is not None:
        return finish(roles, y)
    roles.leave_out()
    y = function(*_settled(roles, args), **_settled(roles, kwargs))
    return roles.result(y)


def _factors(roles: Roles, tree: Any) -> Any:
    """Nested arguments with a factor in the place of every tensor."""
    if isinstance(tree, Tensor):
        return factor(roles, tree)
    if isinstance(tree, dict):
        return {key: _factors(roles, item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_factors(roles, item) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree


def _settled(roles: Roles, tree: Any) -> Any:
    """The same with rounded tensors."""
    if isinstance(tree, Factor):
        return settle(roles, tree)
    if isinstance(tree, dict):
        return {key: _settled(roles, item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_settled(roles, item) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    return tree
