"""What torch's ambient modes do to our own functions: function modes see them, and autocast casts their operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def announced(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function visible to torch's function modes, `lowprec.wrap` among them, as torch's own functions are.

    `torch.overrides.has_torch_function` knows of no modes in compiled code; this does.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._len_torch_function_stack():
            return function(*args, **kwargs)
        mode = torch._C._pop_torch_function_stack()
        try:
            return mode.__torch_function__(call, (), args, kwargs)  # type: ignore[no-any-return]
        finally:
            torch._C._push_on_torch_function_stack(mode)

    return call


def narrowed(x: Tensor) -> Tensor:
    """As autocast would hand it to a product."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if is_narrowed(x) else x


def is_narrowed(x: Tensor) -> bool:
    """Whether autocast is on where a tensor is, and casts tensors of its dtype."""
    return x.device.type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
