"""The eager twin in place of the compiled kernels, for whatever is called: what a row must compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowprec.testing import assert_bits_equal


class EagerTwin(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within a `with` block, our operators run their eager kernels on any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator comes by here."""
        if func.namespace == "lowprec":
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Compare the tensors in two results bit by bit; AssertionError names the first difference."""
    ours, theirs = ([leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (actual, expected))
    assert ours, f"{what}: no tensor to compare"
    for mine, other in zip(ours, theirs, strict=True):
        assert_bits_equal(mine, other, what=what)
