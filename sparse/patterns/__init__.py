"""Which blocks of a layer are present: patterns as masks, bool [input blocks, output blocks], the same everywhere.

Every pattern has the diagonal, and exactly as many blocks as its density says. docs/patterns.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec.sparse.patterns.attachment import barabasi_albert
from lowprec.sparse.patterns.balanced import balanced_random
from lowprec.sparse.patterns.draws import budget, share, whole
from lowprec.sparse.patterns.lattices import squarest, watts_strogatz, watts_strogatz_2d
from lowprec.sparse.patterns.reach import mixing

__all__ = [
    "NAMES",
    "balanced_random",
    "barabasi_albert",
    "block_diagonal",
    "budget",
    "build",
    "dense",
    "mixing",
    "watts_strogatz",
    "watts_strogatz_2d",
]


def dense(n_in: int, n_out: int) -> Tensor:
    """Every block.

    Args:
        n_in: input blocks.
        n_out: output blocks.

    Returns:
        bool [n_in, n_out].

    Raises:
        TypeError: for sizes that are no integers.
        ValueError: for sizes below 1.
    """
    return torch.ones(whole("n_in", n_in), whole("n_out", n_out), dtype=torch.bool)


def block_diagonal(n_in: int, n_out: int, groups: int) -> Tensor:
    """Groups of inputs and outputs that are connected inside, and to nothing else: a density of about 1 / groups.

    The fewer of inputs and outputs are cut into groups of equal size to within one; of the others, number j is in the
    group of j modulo their number. Where the sizes differ, the blocks of the diagonal are repeated side by side.

    Args:
        n_in: input blocks.
        n_out: output blocks.
        groups: how many, up to min(n_in, n_out).

    Returns:
        bool [n_in, n_out].

    Raises:
        TypeError: for arguments that are no integers.
        ValueError: for sizes below 1, or groups outside 1 .. min(n_in, n_out).
    """
    smaller = min(whole("n_in", n_in), whole("n_out", n_out))
    if whole("groups", groups) > smaller:
        raise ValueError(
            f"groups must be at most {smaller}, the fewer of {n_in} inputs and {n_out} outputs, got {groups}"
        )
    i, j = np.ogrid[:n_in, :n_out]
    return torch.from_numpy(np.asarray(i % smaller * groups // smaller == j % smaller * groups // smaller))


def build(name: str, n_in: int, n_out: int, density: float | None = None, seed: int = 0) -> Tensor:
    """A pattern by its name, with its own arguments behind a colon: `watts_strogatz:rewire=0.3`.

    Args:
        name: one of `NAMES`. `watts_strogatz_2d` takes the grid's number of columns, `columns`, by default the one for
            which it is closest to a square; `block_diagonal` takes `groups`, by default round(1 / density).
        n_in: input blocks.
        n_out: output blocks.
        density: share of the blocks; not for `dense`, nor beside `groups`.
        seed: for the patterns that are random.

    Returns:
        bool [n_in, n_out].

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for an unknown name or key, a value that cannot be read, a density that is missing or one too many,
            and what the patterns themselves refuse.
    """
    if not isinstance(name, str):
        raise TypeError(f"pattern must be a string, one of {', '.join(NAMES)}, got {type(name).__name__}")
    kind, _, words = name.partition(":")
    if kind not in _KINDS:
        raise ValueError(f"unknown pattern {name!r}: there are {', '.join(NAMES)}")
    make, keys = _KINDS[kind]
    whole("n_in", n_in), whole("n_out", n_out)
    return make(n_in, n_out, density, seed=seed, **_arguments(name, words, keys))


def _arguments(name: str, words: str, keys: dict[str, type]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words.split(",") if words else []:
        key, _, value = word.partition("=")
        if key not in keys or key in found:
            raise ValueError(f"pattern {name!r}: {key!r} must be one of {', '.join(keys) or 'no keys'}, and stand once")
        try:
            found[key] = keys[key](value)
        except ValueError:
            raise ValueError(f"pattern {name!r}: {key} must be {_KIND_OF[keys[key]]}, got {value!r}") from None
    return found


def _given(density: float | None) -> float:
    if density is None:
        raise ValueError("density must be given for this pattern, got None")
    return share("density", density)


def _random(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda n_in, n_out, density, **given: make(n_in, n_out, _given(density), **given)


def _torus(n_in: int, n_out: int, density: float | None, columns: int | None = None, **given: Any) -> Tensor:
    columns = squarest(n_in, n_out) if columns is None else whole("columns", columns)
    if n_in % columns or n_out % columns:
        raise ValueError(f"columns must divide {n_in} inputs and {n_out} outputs, got {columns}")
    return watts_strogatz_2d((n_in // columns, columns), (n_out // columns, columns), _given(density), **given)


def _groups(n_in: int, n_out: int, density: float | None, seed: int, groups: int | None = None) -> Tensor:
    if groups is None:
        groups = min(max(1, round(1 / max(_given(density), 1e-9))), n_in, n_out)
    elif density is not None:
        raise ValueError(f"density must be left out beside groups={groups}, got {density}")
    return block_diagonal(n_in, n_out, groups)


def _all(n_in: int, n_out: int, density: float | None, seed: int) -> Tensor:
    if density not in (None, 1):
        raise ValueError(f"density must be left out, or 1, for the pattern dense, got {density}")
    return dense(n_in, n_out)


_KINDS: dict[str, tuple[Callable[..., Tensor], dict[str, type]]] = {
    "watts_strogatz": (_random(watts_strogatz), {"rewire": float}),
    "watts_strogatz_2d": (_torus, {"rewire": float, "columns": int}),
    "barabasi_albert": (_random(barabasi_albert), {"extra": int}),
    "balanced_random": (_random(balanced_random), {}),
    "block_diagonal": (_groups, {"groups": int}),
    "dense": (_all, {}),
}
_KIND_OF = {int: "an integer", float: "a number"}

NAMES = tuple(_KINDS)
"""The patterns that `build` knows."""
