"""Random patterns in which all inputs have as many connections, and all outputs too."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lowprec.sparse.patterns.draws import Draws, Mask, budget, diagonal


def balanced_random(n_in: int, n_out: int, density: float, seed: int = 0) -> Tensor:
    """The diagonal and random blocks, equally many in every row and in every column to within one.

    Where the counts cannot all be the same, the first rows and columns have the one more. Two rows at a time exchange
    blocks at random, which keeps all counts (the curveball of Strona et al. 2014), until nothing of the start is left.

    Args:
        n_in: input blocks.
        n_out: output blocks.
        density: share of the blocks that are present; round(density · n_in · n_out) of them exactly, but at least the
            max(n_in, n_out) of the diagonal.
        seed: not negative; the same mask on every machine.

    Returns:
        bool [n_in, n_out].

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for sizes below 1, or a density outside [0, 1].
    """
    mask = _diagonals(n_in, n_out, budget(n_in, n_out, density))
    fixed, draws = diagonal(n_in, n_out), Draws(seed)
    for _ in range(2 * n_in.bit_length()):
        _exchange(mask, fixed, draws)
    return torch.from_numpy(mask)


def _diagonals(n_in: int, n_out: int, blocks: int) -> Mask:
    """Blocks along one wrapped diagonal after the other, the first one that of every pattern: all counts are even."""
    step = np.arange(blocks)
    mask = np.zeros((n_in, n_out), dtype=np.bool_)
    mask[step % n_in, (step + step // math.lcm(n_in, n_out)) % n_out] = True
    return mask


def _exchange(mask: Mask, fixed: Mask, draws: Draws) -> None:
    """Pair the rows at random, in place: of the blocks that one has and the other not, each gets as many as before."""
    order = draws.order(len(mask))
    first, second = order[: len(mask) // 2], order[len(mask) // 2 : len(mask) // 2 * 2]
    differ = (mask[first] ^ mask[second]) & ~fixed[first] & ~fixed[second]
    pair, column = np.nonzero(differ)
    shuffled = np.lexsort((draws.words(len(pair)), pair))
    start = np.cumsum(differ.sum(axis=1)) - differ.sum(axis=1)
    wins = np.empty(len(pair), dtype=np.bool_)
    wins[shuffled] = np.arange(len(pair)) - start[pair] < (mask[first] & differ).sum(axis=1)[pair]
    mask[first[pair], column] = wins
    mask[second[pair], column] = ~wins
