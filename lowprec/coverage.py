"""What a policy reaches: the functions that are covered, and those that look like a product and are not.

Whatever this torch offers under a product's name and no handler covers counts as not covered, so that a later torch
cannot slip a product past in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from lowprec import _ops, attention, blocksparse, products, recurrent, reductions, sparse_products
from lowprec.eager import CONTAINERS
from lowprec.roles import is_learnt

Function = Callable[..., Any]

COVERED: dict[Function, tuple[str, products.Handler]] = products.HANDLERS | attention.HANDLERS | recurrent.HANDLERS
COVERED[blocksparse.matmul] = ("sparse_matmul", sparse_products.matmul)
"""Torch's function, the name that a report gives it, and its handler."""

KINDS = tuple(dict.fromkeys(name for name, _ in (*COVERED.values(), *reductions.HANDLERS.values())))
"""Those names, and those of the sums that are no products, each once: an op's counters are found by its place here."""

HANDLERS = {
    function: (KINDS.index(name), 1 if name.startswith("embedding") else 2, handler)
    for function, (name, handler) in COVERED.items()
}
"""The same with the name's place, and the fewest floating-point tensors that make a product."""

REDUCTIONS = {function: (KINDS.index(name), handler) for function, (name, handler) in reductions.HANDLERS.items()}
"""The functions that sum up other than by products, with the name's place; handled where a policy says how."""

_REDUCTION = re.compile(
    r"(^|_)(sum|mean|nansum|nanmean|var|std|trace|logsumexp|cumsum|logcumsumexp|kl_div|dist)(_|$)|loss$|entropy"
    r"|norm(alize)?$|softm(ax|in)$|(avg|lp)_pool|(^|_)fold$|interpolate$|upsample|cosine_similarity$|index_add|scatter_add"
    r"|scatter_reduce|index_reduce|segment_reduce|sum_to_size"
)
_SUMS_NOTHING = re.compile(r"weight_norm$|renorm|backward|(^|_)set_|_check|max_norm|grad_norm")

_PRODUCT = re.compile(
    r"mm(_|$)|mv(_|$)|matmul|linear|conv|dot(_|$)|einsum|attention|attn|rnn|lstm|gru(_|$)|embedding|cdist|pdist|inner$"
    r"|outer$|(^|_)ger$|kron$|addr(_|$)|cov$|corrcoef|matrix_(exp|power)|lowrank|lobpcg|householder|ormqr|multi_dot"
    r"|encoder_layer|gemm|(^|_|sp|tensor)solve(_|$)|inverse$|(^|_)p?inv(_|$)|tensorinv|tensordot|vecdot|lstsq|matrix_multiply"
)
_OTHERWISE = re.compile(
    r"loss$|^_?upsample|renorm|affine|return_inverse|slice_inverse|quantize(_|$)|pack|convert|search|flatten|reorder|precision"
    r"|linear_combination|convolution_mode|semi_structured_(apply|tile)|backward|nested|weights$"
)
_PLACES = {
    "torch": torch,
    "torch.nn.functional": F,
    "torch.Tensor": Tensor,
    "torch.linalg": torch.linalg,
    "torch.sparse": torch.sparse,
    "torch._C._nn": torch._C._nn,
}
_OPS = (OpOverload, OpOverloadPacket, HigherOrderOperator)
_TORCHS_OWN = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional", "inductor", "higher_order", "lowprec")


def looks_like_a_product(name: str) -> bool:
    """Whether a function of that name multiplies and sums, as far as the name tells."""
    return bool(_PRODUCT.search(name)) and not _OTHERWISE.search(name)


def _not_covered() -> Iterator[tuple[Function, str]]:
    for place, module in _PLACES.items():
        for name in dir(module):
            function = getattr(module, name, None)
            if looks_like_a_product(name) and callable(function) and function not in COVERED:
                yield function, f"{place}.{name}"


NOT_COVERED: dict[Function, str] = dict(_not_covered())
"""Functions that look like a product and have no handler, with their names."""


def _not_reduced() -> Iterator[tuple[Function, str]]:
    for module in _PLACES.values():
        for name in dir(module):
            function = getattr(module, name, None)
            sums = _REDUCTION.search(name) and not _SUMS_NOTHING.search(name)
            if sums and callable(function) and function not in REDUCTIONS and function not in NOT_COVERED:
                yield function, name.strip("_")


NOT_REDUCED: dict[Function, str] = dict(_not_reduced())
"""Functions that look as if they sum up and have no handler, with their names."""


def missed(function: Function, args: Any, kwargs: Any) -> str | None:
    """The name of a function that should have a handler and has none; None for all that is no product.

    An op from elsewhere counts if its name is that of a product, or if it takes something learnt: its inside cannot
    be seen.
    """
    name = NOT_COVERED.get(function)
    if name is not None or not isinstance(function, _OPS):
        return name
    name = _product_op(function)
    if name is None and _is_foreign(function) and any(is_learnt(x) for x in products.tensors(args, kwargs)):
        name = str(function)
    return name


@_ops.constant
def _product_op(op: Any) -> str | None:
    """A registered op's name, if it is that of a product."""
    return str(op) if looks_like_a_product(str(op).split(".")[-1 if "." not in str(op) else 1]) else None


@_ops.constant
def _is_foreign(op: Any) -> bool:
    return getattr(op, "namespace", None) or str(op).partition(".")[0] not in _TORCHS_OWN


def is_unfit(x: Tensor) -> bool:
    """Whether a floating-point or complex tensor is of a kind that casts do not take."""
    return x.dtype not in CONTAINERS or x.layout != torch.strided or x.is_nested
