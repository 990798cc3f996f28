"""The plan of the block-sparse update on CUDA: every block once, and at the places that its fragment names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowprec.block_tables import UPDATE_TILES, update_plan

SHAPES = [((1, 1), 1.0), ((5, 3), 0.5), ((40, 33), 0.2), ((70, 90), 0.05), ((48, 48), 1.0), ((200, 1), 0.7)]


def mask_of(shape: tuple[int, int], density: float) -> Tensor:
    mask = torch.rand(shape) < density
    mask[0, 0] = True
    return mask


def plan_of(mask: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, inputs, outputs and fragments of each tile."""
    i, j = mask.nonzero().unbind(1)
    size = UPDATE_TILES[block]
    counts, inputs, outputs, fragments = update_plan(i, j, tuple(mask.shape), block)
    return counts.view(-1, 4), inputs.view(-1, size), outputs.view(-1, size), fragments.view(-1, size, 4)


@pytest.mark.parametrize("block", UPDATE_TILES)
@pytest.mark.parametrize(("shape", "density"), SHAPES)
def test_every_block_is_in_one_fragment_by_its_places(shape: tuple[int, int], density: float, block: int) -> None:
    mask = mask_of(shape, density)
    coordinates = mask.nonzero()
    weights: list[Tensor] = []
    for counts, inputs, outputs, fragments in zip(*plan_of(mask, block), strict=True):
        rows, columns, used, _ = counts.tolist()
        places, column, weight, second = fragments[:used].unbind(1)
        assert int((places & 0xFFFF).max()) < rows
        assert int(column.max()) < columns
        for lists, count in ((inputs, rows), (outputs, columns)):
            assert len(lists[:count].unique()) == count
        for place, each in ((places & 0xFFFF, weight), (places >> 16, second)):
            there = each >= 0
            found = torch.stack([inputs[place[there]], outputs[column[there]]], 1)
            assert torch.equal(found, coordinates[each[there]])
            weights.append(each[there])
        assert block == 8 or bool((second == -1).all())
    assert torch.equal(torch.cat(weights).sort().values, torch.arange(len(coordinates)))


def test_dense_tiles_share_what_they_read() -> None:
    """A tile of n by m blocks reads n + m, and of 8 features two blocks make a fragment."""
    mask = torch.ones(64, 64, dtype=torch.bool)
    for block, reads in ((64, 4), (32, 8), (16, 16)):
        counts = plan_of(mask, block)[0]
        assert bool((counts[:, :2].sum(1) == reads).all())
    counts = plan_of(mask, 8)[0]
    assert bool((counts[:-1, 2] == UPDATE_TILES[8] // 2).all())


def test_diagonal_tiles_share_nothing() -> None:
    counts = plan_of(torch.eye(50, dtype=torch.bool), 16)[0]
    assert counts[0].tolist() == [50, 50, 50, 0]
