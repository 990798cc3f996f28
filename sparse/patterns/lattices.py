"""Small worlds after Watts and Strogatz (1998): near neighbours on a ring or a torus, some of them moved far away."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowprec.sparse.patterns.draws import Draws, Integers, Mask, budget, diagonal, share, whole


def watts_strogatz(n_in: int, n_out: int, density: float, rewire: float = 0.5, seed: int = 0) -> Tensor:
    """Each output is connected to its nearest inputs on a ring; then a share of the connections moves to any inputs.

    Distance is that from the diagonal: output j stands at input j mod n_in (with fewer outputs than inputs, input i at
    output i mod n_out). Moving keeps an output's number of inputs: the new ones are drawn evenly from all those that it
    is not connected to, the one just left included. The diagonal never moves. At rewire = 0 the mask is a band around
    the diagonal, at 1 it is random but for the diagonal.

    Unlike in the graphs of openai/blocksparse, which are undirected, (i, j) does not imply (j, i).

    Args:
        n_in: input blocks.
        n_out: output blocks.
        density: share of the blocks that are present; round(density · n_in · n_out) of them exactly, but at least the
            max(n_in, n_out) of the diagonal.
        rewire: share of the blocks off the diagonal that move; round(rewire · their number) of them exactly.
        seed: not negative; the same mask on every machine.

    Returns:
        bool [n_in, n_out].

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for sizes below 1, or a density or rewire outside [0, 1].
    """
    blocks = budget(n_in, n_out, density)
    return _small_world((1, min(n_in, n_out)), n_in, n_out, blocks, rewire, seed)


def watts_strogatz_2d(
    shape_in: tuple[int, int], shape_out: tuple[int, int], density: float, rewire: float = 0.5, seed: int = 0
) -> Tensor:
    """As `watts_strogatz`, with the blocks of neurons on a torus: a grid whose opposite edges meet.

    Blocks count along the rows of their grid. Output (y, x) stands at input (y mod rows, x), or the other way round.

    Args:
        shape_in: rows and columns of the input blocks' grid.
        shape_out: those of the outputs; as many columns.
        density: as in `watts_strogatz`, exact likewise.
        rewire: as in `watts_strogatz`.
        seed: as in `watts_strogatz`.

    Returns:
        bool [inputs, outputs].

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for shapes that are no pairs of positive numbers, or have different columns; for a density or rewire
            outside [0, 1].
    """
    (rows_in, columns), (rows_out, columns_out) = _grid("shape_in", shape_in), _grid("shape_out", shape_out)
    if columns != columns_out:
        raise ValueError(f"shape_in and shape_out must have as many columns, got {shape_in} and {shape_out}")
    n_in, n_out = rows_in * columns, rows_out * columns
    blocks = budget(n_in, n_out, density)
    return _small_world((min(rows_in, rows_out), columns), n_in, n_out, blocks, rewire, seed)


def squarest(n_in: int, n_out: int) -> int:
    """The number of columns for which the grid of the fewer blocks is closest to a square."""
    smaller, common = min(n_in, n_out), math.gcd(n_in, n_out)
    divisors = [columns for columns in range(1, common + 1) if common % columns == 0]
    return min(divisors, key=lambda columns: max(columns * columns, smaller) / min(columns * columns, smaller))


def _grid(name: str, shape: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"{name} must be a pair of numbers, rows and columns, got {shape!r}")
    return whole(f"{name}[0]", shape[0]), whole(f"{name}[1]", shape[1])


def _small_world(grid: tuple[int, int], n_in: int, n_out: int, blocks: int, rewire: float, seed: int) -> Tensor:
    draws = Draws(seed)
    mask = _lattice(grid, max(n_in, n_out), blocks)
    mask = mask if n_in <= n_out else mask.T
    return torch.from_numpy(_rewired(mask, share("rewire", rewire), draws))


def _lattice(grid: tuple[int, int], larger: int, blocks: int) -> Mask:
    """The nearest blocks to the diagonal: [blocks of the grid, larger].

    The last distance that the budget reaches, it reaches in part: at places evenly apart.
    """
    rows, columns = grid
    node = np.arange(larger)
    y, x = np.divmod(node % (rows * columns), columns)
    whole_offsets, rest = divmod(blocks, larger)
    dy, dx = np.divmod(_by_distance(grid), columns)
    neighbour = ((y + dy[:, None]) % rows) * columns + (x + dx[:, None]) % columns
    mask = np.zeros((rows * columns, larger), dtype=np.bool_)
    mask[neighbour[:whole_offsets], node] = True
    if rest:
        some = np.arange(rest) * larger // rest
        mask[neighbour[whole_offsets, some], some] = True
    return mask


def _by_distance(grid: tuple[int, int]) -> Integers:
    """All places of a torus, the nearest to place 0 first; equally near ones in their order."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    dy, dx = np.minimum(y, grid[0] - y), np.minimum(x, grid[1] - x)
    return np.argsort(dy * dy + dx * dx, kind="stable")


def _rewired(mask: Mask, rewire: float, draws: Draws) -> Mask:
    movable = np.flatnonzero(mask & ~diagonal(*mask.shape))
    moved = movable[draws.order(len(movable))[: round(rewire * len(movable))]]
    kept = mask.copy()
    kept.reshape(-1)[moved] = False
    counts = np.bincount(moved % mask.shape[1], minlength=mask.shape[1])
    return kept | draws.choose(~kept.T, counts).T
