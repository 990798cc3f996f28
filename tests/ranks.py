"""Sums over ranks, in processes of their own; started by tests/test_distributed.py."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lowprec as lp
from lowprec import reference, sparse
from lowprec.accumulate import sum as sum_by_tree
from lowprec.formats import float_format
from lowprec.testing import assert_bits_equal

SIZES = (0, 1, 7, 100)
"""Elements: fewer than ranks, not a multiple of them, none."""

SUMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("1-5-2", {}),
    ("pairwise:bf16", {}),
    ("exact", {"wire": "1-5-2:emax=1"}),
    ("chunk2:1-6-9/fp32", {"wire": "bf16"}),
)
HOOKS = (*SUMS, ("1-5-2 stochastic", {"seed": 3}))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def gradient(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """What a rank gives: every process can make that of every other."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def on_the_wire(x: Tensor, wire: str | None) -> Tensor:
    """x as the others see it; codes are decoded to float32."""
    if wire is None:
        return x
    fmt = float_format(wire)
    return lp.quantize(x.double(), fmt, saturate=fmt.specials != "ieee").float()


def same_everywhere(x: Tensor, what: str) -> None:
    """Compare a tensor with rank 0's."""
    first = x.clone()
    dist.broadcast(first.view(torch.uint8), 0)
    assert_bits_equal(x, first, what=f"{what}, rank {dist.get_rank()} beside rank 0")


def check_sums(device: torch.device) -> None:
    """`all_reduce` against one process that has every rank's tensor."""
    for accumulator, options in SUMS:
        for dtype in DTYPES:
            for size in SIZES:
                mine = gradient(dist.get_rank(), size, dtype).to(device)
                total = lp.distributed.all_reduce(mine, accumulator, **options)
                assert_bits_equal(mine.cpu(), gradient(dist.get_rank(), size, dtype), what="the argument")
                rows = [on_the_wire(gradient(rank, size, dtype), options.get("wire")) for rank in _ranks()]
                expected = on_the_wire(sum_by_tree(torch.stack(rows), 0, accumulator), options.get("wire")).to(dtype)
                assert_bits_equal(total.cpu(), expected, what=f"{accumulator}, {options}, {dtype}, {size}")
                same_everywhere(total.view(-1), "the sum")
    strided = gradient(dist.get_rank(), 12, torch.float32).to(device).view(3, 4).T
    assert lp.distributed.all_reduce(strided, "exact").shape == (4, 3)


def _ranks() -> range:
    return range(dist.get_world_size())


class Model(nn.Module):
    """Layers whose gradients fill several buckets; sizes are odd, so that shares are uneven."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        shapes = ((31, 13), (13, 17), (17, 3))
        self.weights = nn.ParameterList([torch.randn(shape, generator=generator).to(dtype) / 4 for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        """[N, 31] -> [N, 3]"""
        for weight in self.weights:
            x = (x @ weight).tanh()
        return x


def batch(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 31, generator=torch.Generator().manual_seed(50 + rank)).to(dtype)


def gradients_alone(rank: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Those of one rank's batch, without anyone else."""
    model = Model(dtype).to(device)
    model(batch(rank, dtype).to(device)).square().sum().backward()
    return [_grad(weight) for weight in model.weights]


def _grad(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def check_steps(device: torch.device) -> None:
    """The gradients of `DistributedDataParallel` against the mean that one process makes of every rank's."""
    for dtype in (torch.float32, torch.bfloat16):
        alone = [gradients_alone(rank, dtype, device) for rank in _ranks()]
        for i, (accumulator, options) in enumerate(HOOKS):
            model = Model(dtype).to(device)
            devices = [device.index] if device.type == "cuda" else None
            as_view = (i + (dtype is torch.bfloat16)) % 2 == 0
            ddp = DistributedDataParallel(model, devices, gradient_as_bucket_view=as_view, bucket_cap_mb=0.0005)
            ddp.register_comm_hook(None, lp.distributed.comm_hook(accumulator, **options))
            expected = [mean(parts, accumulator, options.get("wire")) for parts in zip(*alone, strict=True)]
            for _ in range(2):
                ddp.zero_grad()
                ddp(batch(dist.get_rank(), dtype).to(device)).square().sum().backward()
                for weight, average in zip(model.weights, expected, strict=True):
                    same_everywhere(_grad(weight).reshape(-1), accumulator)
                    if "stochastic" not in accumulator:
                        assert_bits_equal(_grad(weight).cpu(), average, what=f"{accumulator}, {options}, {dtype}")


def mean(parts: Sequence[Tensor], accumulator: str, wire: str | None) -> Tensor:
    """The sum in rank order, divided and rounded once by exact fractions."""
    total = sum_by_tree(torch.stack([on_the_wire(part.cpu(), wire) for part in parts]), 0, accumulator)
    fmt = float_format(wire or parts[0].dtype)
    saturate = fmt.specials != "ieee"
    quotients = [Fraction(value) / len(parts) if value else value for value in total.double().flatten().tolist()]
    rounded = [reference.quantize(quotient, fmt, saturate=saturate) for quotient in quotients]
    return torch.tensor(rounded, dtype=torch.float64).view(parts[0].shape).to(parts[0].dtype)


def sparse_layer(device: torch.device) -> sparse.Linear:
    """The same on every rank."""
    torch.manual_seed(3)
    layout = sparse.BlockLayout(sparse.patterns.balanced_random(6, 6, 0.3), 8)
    return sparse.Linear(layout, dtype=torch.float64).to(device)


def features(rank: int) -> Tensor:
    return torch.randn(9, 48, generator=torch.Generator().manual_seed(70 + rank), dtype=torch.float64)


def check_rewiring(device: torch.device) -> None:
    """Learned layouts are the same on every rank, and those of one process that has every rank's batch."""
    alone, shared = sparse_layer(device), sparse_layer(device)
    ddp = DistributedDataParallel(shared, [device.index] if device.type == "cuda" else None)
    group: Any = dist.group.WORLD
    together = sparse.Rewiring(ddp, every=1, until=9, share=0.6, reduce="l2", group=group)
    expected = sparse.Rewiring(alone, every=1, until=9, share=0.6, reduce="l2")
    ddp(features(dist.get_rank()).to(device)).square().sum().backward()
    alone(torch.cat([features(rank) for rank in _ranks()]).to(device)).square().sum().backward()
    [change], [other] = together.step(), expected.step()
    assert change.after == other.after != change.before
    same_everywhere(shared.mask.view(-1), "the layout")


def run(rank: int, count: int, folder: Path, backend: str) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    try:
        check_sums(device)
        check_steps(device)
        check_rewiring(device)
        dist.barrier()  # none hangs up while another still reads
    finally:
        dist.destroy_process_group()
