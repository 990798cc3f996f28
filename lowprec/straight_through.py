"""What differentiable casts share: a gradient that passes straight through, in both modes and to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """A function of a tensor and seven arguments more, which hands its gradient on to the tensor."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, None, None, None, None, None, None, None)


class ForwardMode(torch.autograd.Function):
    """A function that hands the tangent of its first argument on, which `torch.compile` refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tangent: Tensor = tangents[0]
        return tangent.clone()
