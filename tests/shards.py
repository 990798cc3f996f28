"""Optimizers over sharded parameters, in processes of their own; started by tests/test_optim.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lowprec as lp
from lowprec.testing import assert_bits_equal

SETTINGS = (
    {"weight": "1-4-3", "gradient": "1-5-2:emax=1", "state": "1-5-4", "rounding": "stochastic"},
    {"weight": "1-4-3", "gradient": "1-5-2:emax=1", "state": "bf16", "master": "bf16"},
    {"weight": "1-5-4", "master": "none", "random_bits": 8},
)
SHAPES = ((6, 4), (5, 4, 3), (7,), (1, 3))


class Model(nn.Module):
    """Parameters of several shapes: some have unevenly many rows for two processes, the last a row for one alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES])


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def start(model: Model, settings: dict[str, Any]) -> lp.optim.LowPrecision:
    return lp.optim.LowPrecision(torch.optim.Adam(model.parameters(), lr=0.05), **settings)


def train(model: Model, optimizer: lp.optim.LowPrecision, steps: range = range(3)) -> lp.optim.LowPrecision:
    """Steps with the same gradients, however the parameters are sharded."""
    for step in steps:
        for parameter, gradient in zip(model.parameters(), gradients(step), strict=True):
            sharded = isinstance(parameter, DTensor)
            parameter.grad = (
                distribute_tensor(gradient, parameter.device_mesh, parameter.placements) if sharded else gradient
            )
        optimizer.step()
    return optimizer


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def compare(model: Model, settings: dict[str, Any], what: str) -> None:
    """Weights and moments against those of an unsharded model."""
    alone = Model()
    expected, actual = train(alone, start(alone, settings)), train(model, start(model, settings))
    for i, (ours, theirs) in enumerate(zip(model.parameters(), alone.parameters(), strict=True)):
        assert_bits_equal(full(ours.detach()), theirs.detach(), what=f"{what}, weight {i}")
        for name in ("exp_avg", "exp_avg_sq"):
            assert_bits_equal(full(actual.state[ours][name]), expected.state[theirs][name], what=f"{what}, {name} {i}")


def distributed(mesh: DeviceMesh, dim: int | None) -> Model:
    model = Model()
    for i, weight in enumerate(model.weights):
        placement = Replicate() if dim is None or dim >= weight.dim() else Shard(dim)
        model.weights[i] = nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement]))
    return model


def resume(mesh: DeviceMesh, folder: Path) -> None:
    """A run that goes on from a distributed checkpoint against one that never stopped."""
    whole, resumed = (fully_shard(Model(), mesh=mesh) for _ in range(2))
    optimizer, again = start(whole, SETTINGS[1]), start(resumed, SETTINGS[1])
    train(whole, optimizer)
    checkpoint.save(
        dict(zip(("model", "optimizer"), get_state_dict(whole, optimizer), strict=True)), checkpoint_id=folder
    )
    train(whole, optimizer, range(3, 6))
    saved = dict(zip(("model", "optimizer"), get_state_dict(resumed, again), strict=True))
    checkpoint.load(saved, checkpoint_id=folder)
    set_state_dict(resumed, again, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    train(resumed, again, range(3, 6))
    for actual, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert_bits_equal(full(actual.detach()), full(expected.detach()), what="resumed")


def refuse(mesh: DeviceMesh) -> None:
    """What is in no one place in the whole parameter; a dimension of one process is no sharding."""
    flat = init_device_mesh("cpu", (1, dist.get_world_size()))
    taken = DTensor.from_local(torch.ones(4, 4), flat, [Shard(0), Shard(1)])
    lp.optim.LowPrecision(torch.optim.SGD([nn.Parameter(taken)]))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match="replicated or sharded in one dimension"):
        lp.optim.LowPrecision(torch.optim.SGD([partial]))


def run(rank: int, count: int, folder: Path) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    try:
        for settings in SETTINGS:
            for dim in (None, 0, 1):
                compare(distributed(mesh, dim), settings, f"dimension {dim}")
            model = fully_shard(Model(), mesh=mesh)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            compare(model, settings, "FSDP2")
        resume(mesh, folder / "checkpoint")
        refuse(mesh)
        dist.barrier()  # neither hangs up while the other still reads
    finally:
        dist.destroy_process_group()
