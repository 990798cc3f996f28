"""Sums over processes: the same bits on every rank, and those of one process that has every rank's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowprec as lp
from tests import ranks


@pytest.mark.parametrize("count", [2, 3])
def test_gloo(count: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ranks.run, (count, tmp_path, "gloo"), nprocs=count)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2])
def test_nccl(count: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    torch.multiprocessing.spawn(ranks.run, (count, tmp_path, "nccl"), nprocs=count)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"accumulator": "1-6-9/"}, ValueError, "accumulator '1-6-9/'"),
        ({"accumulator": 3}, TypeError, "accumulator must be"),
        ({"accumulator": "fp32", "wire": "tf32"}, ValueError, "wire must be a format of up to 16 bits, got .* of 19"),
        ({"accumulator": "fp32", "wire": "1-9-2"}, ValueError, "torch.float32 cannot hold"),
        ({"accumulator": "fp32", "wire": "nothing"}, ValueError, "nothing"),
    ],
)
def test_what_is_refused(words: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lp.distributed.comm_hook(**words)


def test_only_float_tensors() -> None:
    with pytest.raises(TypeError, match="tensor must be"):
        lp.distributed.all_reduce(torch.arange(3), "fp32")
