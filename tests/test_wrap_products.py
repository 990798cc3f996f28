"""Each covered function under a policy, bit for bit: every role by hand, from torch's own kernels and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowprec as lp

# One format for each role, all different, so that no role can stand in for another.
A, W, DA, DW = "1-4-3", "1-3-4:bias=5", "1-5-2:emax=1", "1-4-2:emax=3"
ROLES = {"a": A, "w": W}
POLICY = lp.Policy(A, W, DA, DW)


class Call(nn.Module):
    """A function of inputs and of one parameter."""

    def __init__(self, function: Callable[..., Any], weight: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = None if weight is None else nn.Parameter(weight.clone())

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs) if self.weight is None else self.function(*inputs, self.weight)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def check(function: Callable[..., Tensor], operands: list[Tensor], roles: str, *, plain: Any = None) -> None:
    """A single product of operands in the given roles ("a" or "w", one letter each): y, and every gradient.

    The last operand is a parameter of the module if its role is "w". `plain` is the function to compare with, if not
    the same.
    """
    learnt = roles.endswith("w")
    module = lp.wrap(Call(function, operands[-1] if learnt else None), POLICY)
    inputs = leaves(*operands[: len(operands) - learnt])
    y = module(*inputs)
    dy = torch.randn_like(y)
    y.backward(dy)
    given = [*inputs, *([module.weight] if learnt else [])]

    rounded = leaves(*(lp.quantize(x, ROLES[role]) for x, role in zip(operands, roles, strict=True)))
    expected = (plain or function)(*rounded)
    grads = torch.autograd.grad(expected, rounded, lp.quantize(dy, DA))
    assert torch.equal(y, expected)
    for x, grad, role in zip(given, grads, roles, strict=True):
        assert torch.equal(x.grad, lp.quantize(grad, DW) if role == "w" else grad)
    assert not torch.equal(y, (plain or function)(*operands)), "nothing was rounded: the case shows nothing"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


PAIRS: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {}


def pair(name: str, function: Callable[..., Tensor], a: tuple[int, ...], b: tuple[int, ...]) -> Any:
    return pytest.param(function, a, b, id=name)


PRODUCTS = [
    pair("matmul", torch.matmul, (3, 5), (5, 4)),
    pair("@", lambda a, b: a @ b, (2, 3, 5), (5, 4)),
    pair("Tensor.matmul", lambda a, b: a.matmul(b), (3, 5), (5,)),
    pair("Tensor.__rmatmul__", lambda a, b: b.__rmatmul__(a), (3, 5), (5, 4)),
    pair("linalg.matmul", torch.linalg.matmul, (3, 5), (5, 4)),
    pair("mm", torch.mm, (3, 5), (5, 4)),
    pair("Tensor.mm", lambda a, b: a.mm(mat2=b), (3, 5), (5, 4)),
    pair("bmm", torch.bmm, (2, 3, 5), (2, 5, 4)),
    pair("Tensor.bmm", lambda a, b: a.bmm(b), (2, 3, 5), (2, 5, 4)),
    pair("mv", torch.mv, (3, 5), (5,)),
    pair("dot", torch.dot, (5,), (5,)),
    pair("vdot", torch.vdot, (5,), (5,)),
    pair("vecdot", torch.linalg.vecdot, (3, 5), (3, 5)),
    pair("inner", torch.inner, (3, 5), (4, 5)),
    pair("outer", torch.outer, (3,), (4,)),
    pair("ger", lambda a, b: a.ger(b), (3,), (4,)),
    pair("kron", torch.kron, (2, 3), (3, 2)),
    pair("einsum", lambda a, b: torch.einsum("bij,kj->bki", a, b), (2, 3, 5), (4, 5)),
    pair("einsum of a list", lambda a, b: torch.einsum("ij,jk", [a, b]), (3, 5), (5, 4)),
    pair("einsum of subscripts", lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), (3, 5), (5, 4)),
    pair("tensordot", lambda a, b: torch.tensordot(a, b, dims=([1], [0])), (3, 5), (5, 4)),
    pair("multi_dot", lambda a, b: torch.linalg.multi_dot([a, b]), (3, 5), (5, 4)),
    pair("F.linear", F.linear, (2, 3, 5), (4, 5)),
    pair("conv1d", lambda x, w: F.conv1d(x, w, padding="same"), (2, 4, 9), (6, 4, 3)),
    pair("conv1d, unbatched", F.conv1d, (4, 9), (6, 4, 3)),
    pair("conv2d", lambda x, w: F.conv2d(x, w, stride=2, groups=2), (2, 4, 7, 7), (6, 2, 3, 3)),
    pair("conv3d", lambda x, w: F.conv3d(x, w, dilation=2), (1, 2, 6, 6, 6), (3, 2, 2, 2, 2)),
    pair("conv_transpose1d", lambda x, w: F.conv_transpose1d(x, w, stride=2), (2, 4, 9), (4, 6, 3)),
    pair("conv_transpose2d", lambda x, w: F.conv_transpose2d(x, w, output_padding=1, stride=2), (2, 4, 5, 5), (4, 3, 3, 3)),
    pair("conv_transpose3d", F.conv_transpose3d, (1, 2, 4, 4, 4), (2, 3, 2, 2, 2)),
    pair("convolution", lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1), (2, 4, 9), (6, 4, 3)),
]


@pytest.mark.parametrize(("function", "a", "b"), PRODUCTS)
def test_product(function: Any, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check(function, [normal(*a), normal(*b)], "aw")


MATRIX = [case for case in PRODUCTS if "conv" not in case.id and "linear" not in case.id]


@pytest.mark.parametrize(("function", "a", "b"), MATRIX)
def test_product_of_activations(function: Any, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check(function, [normal(*a), normal(*b)], "aa")
