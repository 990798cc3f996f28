"""The rows of others: torch's dense product, its BSR tensors, and the block-sparse products of other libraries.

A peer is called as its documentation says, and its result is not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowprec.benches import running
from lowprec.benches.blocksparse.cases import PRODUCTS, Case
from lowprec.studies.kernels.work import DTYPES, PAST_CACHE, Operands, Work, dense_call
from lowprec.timing import MOST, Call

DENSE_NAME, BSR_NAME = "dense", "BSR"
"""Torch's rows."""

BSR_DEVICES = {"bf16": ("cuda",), "fp32": ("cpu",)}
"""Where torch multiplies BSR tensors: by Triton, and by MKL, which knows float32 alone."""

STK_BLOCK = 128
"""stk has no other blocks."""

Works = dict[Work, bool]
"""Work, and whether its row is essential."""


def theirs(ours: list[Case]) -> tuple[list[Case], dict[str, str]]:
    """The rows beside those of ours: torch's, and of the peers that can be imported; and the versions of these."""
    works = {case.work: case.essential for case in ours}
    peers: running.Peers = {name: (package, partial(rows, works)) for name, (package, rows) in PEERS.items()}
    return running.theirs(list(_torchs(works)), peers)


def dense_work(work: Work) -> Work | None:
    """What torch's dense product does beside a row of ours."""
    return work.dense if work.op in PRODUCTS else None


def bsr_work(work: Work) -> Work | None:
    """What torch's BSR product does beside a row of ours; Triton multiplies blocks of 16 or more."""
    return work.of_values if work.op in PRODUCTS and work.block >= 16 else None


def _torchs(works: Works) -> Iterator[Case]:
    for work, essential in _beside(works, dense_work).items():
        yield Case(work, dense_call, DENSE_NAME, essential)
    for work, essential in _beside(works, bsr_work).items():
        yield Case(work, _bsr, BSR_NAME, essential, BSR_DEVICES[work.kind])


def _beside(works: Works, beside: Callable[[Work], Work | None]) -> Works:
    """What peers do beside ours, each once."""
    found: Works = {}
    for work, essential in works.items():
        if peer := beside(work):
            found[peer] = found.get(peer, False) or essential
    return found


# Sparse matrices: offsets of rows, columns, values, and shape.


def _matrices(operands: Operands, mask: Tensor, make: Callable[..., Any]) -> list[Any]:
    """Some with the blocks of a mask and other values each, by `make`."""
    work, device = operands.work, operands.pool.device
    offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(device, torch.int32)
    columns = mask.nonzero()[:, 1].to(device, torch.int32)
    shape = (mask.shape[0] * work.block, mask.shape[1] * work.block)
    values = (int(mask.sum()), work.block, work.block)
    count = min(-(-PAST_CACHE // (torch.Size(values).numel() * DTYPES[work.kind].itemsize)), MOST)
    numbers = (operands.pool.take(work.kind, values, i, weight=True) for i in range(count))
    return [make(offsets, columns, each, shape) for each in numbers]


def _transposed(operands: Operands) -> Tensor:
    """The mask of a matrix that stands on the left of x: Wᵀ in fprop, W in bprop."""
    mask = operands.layout.mask
    return mask.T if operands.work.op == "fprop" else mask


def _input(operands: Operands, i: int) -> Tensor:
    return operands.x(i) if operands.work.op == "fprop" else operands.dy(i)


# torch.


def _bsr(operands: Operands) -> Call:
    """Products of a BSR tensor, which stands on the left, with (C, N): of (N, C) a transposed view."""
    last, cuda = operands.work.features == "last", operands.pool.device.type == "cuda"
    if operands.work.op == "update":
        return _sampled(operands, last)
    weights = _matrices(operands, _transposed(operands), torch.sparse_bsr_tensor)
    multiply = _triton("bsr_dense_mm") if cuda else None

    def call(i: int) -> Tensor:
        w, x = weights[i % len(weights)], _input(operands, i)
        out = torch.empty_like(x)  # as large, since layers are square
        x, y = (x.T, out.T) if last else (x, out)
        return torch.mm(w, x) if multiply is None else multiply(w, x, out=y)

    return call


def _sampled(operands: Operands, last: bool) -> Call:
    """xᵀ · dy where blocks are present."""
    sample = _triton("sampled_addmm")
    outs = _matrices(operands, operands.layout.mask, torch.sparse_bsr_tensor)

    def call(i: int) -> object:
        x, dy = operands.x(i), operands.dy(i)
        left, right = (x.T, dy) if last else (x, dy.T)
        out = outs[i % len(outs)]
        return sample(out, left, right, beta=0.0, out=out)

    return call


def _triton(name: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] | None = getattr(import_module("torch.sparse._triton_ops"), name, None)
    if kernel is None:
        raise NotImplementedError(f"torch's {name} needs Triton")
    return kernel


# Others.


def _torchao(works: Works) -> Iterator[Case]:
    """F.linear by its tensor subclass: the forward product alone."""
    tensor = import_module("torchao.sparsity.blocksparse").BlockSparseTensor

    def make(operands: Operands) -> Call:
        block = operands.work.block
        weights = _matrices(
            operands,
            operands.layout.mask.T,
            lambda at, columns, values, shape: tensor(torch.Size(shape), block, at, columns, values),
        )
        return lambda i: torch.nn.functional.linear(operands.x(i), weights[i % len(weights)], None)

    for work, essential in works.items():
        if (work.op, work.kind, work.features) == ("fprop", "bf16", "last") and work.block >= 16:
            yield Case(work, make, "torchao", essential, ("cuda",))


def _stk(works: Works) -> Iterator[Case]:
    """Products of dense and sparse matrices, in blocks of 128 and float16."""
    stk = import_module("stk")

    def matrix(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Any:
        rows = torch.repeat_interleave(offsets.diff().long()).to(torch.int16)
        return stk.Matrix(shape, values.half(), rows, columns.to(torch.int16), offsets)

    def make(operands: Operands) -> Call:
        weights = _matrices(operands, operands.layout.mask[::2, ::2], matrix)
        x = [_input(operands, i).half() for i in range(len(weights))]
        back = operands.work.op == "bprop"
        return lambda i: stk.ops.dds(x[i % len(x)], weights[i % len(x)].t() if back else weights[i % len(x)])

    for work, essential in works.items():
        alike = (work.kind, work.features, work.block) == ("bf16", "last", 64)
        if alike and work.op in ("fprop", "bprop") and not work.tokens % STK_BLOCK:
            yield Case(replace(work, block=STK_BLOCK), make, "stk", essential, ("cuda",))


PEERS: dict[str, tuple[str, Callable[[Works], Iterator[Case]]]] = {
    "torchao": ("torchao", _torchao),
    "stk": ("stanford-stk", _stk),
}
"""Peers: the package that has the version, and the rows, whose making imports it."""
