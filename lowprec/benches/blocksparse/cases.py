"""The rows: ours, as a table of cases. Peers are in their own file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from lowprec.studies.kernels.work import DENSE, Operands, Work, call_of
from lowprec.timing import Call

BLOCKS = (8, 16, 32, 64)
TOKENS = (64, 128, 512)
ENDS = (64, 512)
"""The numbers of tokens that have targets."""

WIDENINGS = (1.0, 2.0, 3.0, 5.5)
"""100%, 25%, 11% and 3.3% at equally many weights."""

WIDEST = WIDENINGS[-1]
KINDS = ("bf16", "fp8", "fp32")
PRODUCTS = ("fprop", "bprop", "update")
LISTS = ("update of 8", "8 updates")
PATTERN = "barabasi_albert"
"""The pattern of rows that do not compare patterns."""

SHORT = {
    PATTERN: "BA",
    "watts_strogatz:rewire=0.5": "WS0.5",
    "watts_strogatz:rewire=0.2": "WS0.2",
    "balanced_random": "random",
}
"""Patterns of layers that are not dense, and what rows call them."""


@dataclass(frozen=True)
class Case:
    """A row: what to call, and what it is beside.

    Attributes:
        work: what it multiplies.
        make: gives the call, from operands.
        by: whose code it is.
        essential: whether it has a target, or is what a target is measured by: all that `quick` runs.
        devices: where it runs.
    """

    work: Work
    make: Callable[[Operands], Call] = call_of
    by: str = "lowprec"
    essential: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def name(self) -> str:
        """Unique."""
        return name_of(self.work, self.by)


def name_of(work: Work, by: str = "lowprec") -> str:
    """A row in words; last comes what the title of its group says."""
    block = f"b={work.block} {SHORT.get(work.pattern, work.pattern)}" if work.block else ""
    parts = ("" if by == "lowprec" else by, work.op, work.kind, work.features, block, where_of(work))
    return " ".join(filter(None, parts))


def where_of(work: Work) -> str:
    """Density and tokens."""
    return f"{work.density} N={work.tokens}"


def ours() -> list[Case]:
    """Every row of ours."""
    essential = set(_essential())
    every = dict.fromkeys((*_essential(), *_patterns(), *_kinds(), *_lists()))
    return [Case(work, essential=work in essential) for work in every]


def _works(
    ops: tuple[str, ...], kinds: tuple[str, ...], features: tuple[str, ...], tokens: tuple[int, ...]
) -> Iterator[Work]:
    """Rows of one pattern, over all densities and blocks."""
    for widening, n, op, kind, where, block in product(WIDENINGS, tokens, ops, kinds, features, BLOCKS):
        yield Work(op, kind, where, block, n, widening, PATTERN if widening > 1 else DENSE)


def _essential() -> Iterator[Work]:
    """What performance targets are about, and float32 beside it."""
    yield from _works(PRODUCTS, KINDS, ("last",), ENDS)
    widest = _works(PRODUCTS, ("bf16",), ("first",), ENDS), _works(("fprop", "update"), ("fp8",), ("first",), ENDS)
    lists = _works(LISTS, ("bf16",), ("last",), ENDS)
    yield from (work for works in (*widest, lists) for work in works if work.widening == WIDEST)


def _patterns() -> Iterator[Work]:
    for work in _works(PRODUCTS, ("bf16",), ("last",), TOKENS):
        yield from (replace(work, pattern=name) for name in (SHORT if work.widening > 1 else (DENSE,)))


def _kinds() -> Iterator[Work]:
    yield from _works(PRODUCTS, KINDS, ("last", "first"), TOKENS)


def _lists() -> Iterator[Work]:
    yield from _works(LISTS, ("bf16", "fp8"), ("last", "first"), TOKENS)
