"""What the tests of `wrap` compute by hand: rounding in either direction, as plain as it can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lowprec as lp

# One format for each role, all different, so that no role can stand in for another.
A, W, DA, DW = "1-4-3", "1-3-4:bias=5", "1-5-2:emax=1", "1-4-2:emax=3"
POLICY = lp.Policy(A, W, DA, DW)


class Call(nn.Module):
    """A function of inputs and, last, of a parameter if one is given."""

    def __init__(self, function: Callable[..., Any], weight: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = None if weight is None else nn.Parameter(weight.clone())

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs) if self.weight is None else self.function(*inputs, self.weight)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that ask for gradients."""
    return [x.detach().clone().requires_grad_() for x in tensors]


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, format: str) -> Tensor:
        ctx.format = format
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return lp.quantize(dy, ctx.format), None


def back(y: Tensor, format: str) -> Tensor:
    """The same values; the gradient is rounded on its way back."""
    return _Back.apply(y, format)
