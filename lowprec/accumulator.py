"""Accumulators: in what order a sum of K terms is formed, and where it is rounded. Plain data, no torch.

A sum is a tree, told by its levels from the leaves up. Each level adds consecutive groups of its inputs from left to
right, and rounds every partial sum, exact until then, once. So the order of a sum is part of its definition, and not
of the machine that computes it (docs/accumulate.md).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lowprec.formats import FloatFormat, float_format, require_int
from lowprec.rounding import Rounding

LEAVES = ("terms", "exact", "tensor_core", "hopper_fp8", "hopper_fp16")
"""What the lowest level adds up, in the order that kernels know them by: the terms themselves, one unrounded sum of
all, or partial sums by a tensor core, real or modelled."""


class TensorCore(NamedTuple):
    """The arithmetic of one step (docs/hopper.md).

    Products and accumulator are aligned to the largest exponent among them and cut below `fraction_bits` digits; their
    exact sum is cut to `kept_bits` behind its leading digit.
    """

    step: int
    fraction_bits: int
    kept_bits: int
    precision: int
    """Digits of an operand's significand."""
    floor: int = -133
    """The exponent to which all is aligned at the least."""

    @property
    def unit(self) -> float:
        """A step's error relative to the sum of its terms' magnitudes, at most; no operand being subnormal."""
        return math.expm1(math.log1p(self.step * 2.0**-self.fraction_bits) + math.log1p(2.0**-self.kept_bits))


HOPPER = {"hopper_fp8": TensorCore(32, 13, 13, 4), "hopper_fp16": TensorCore(16, 25, 23, 11)}
"""Hopper's tensor cores with fp8 operands, and with fp16 or bf16 operands, as measured on an H100."""

_STEPS = {"tensor_core": 16, **{leaf: core.step for leaf, core in HOPPER.items()}}
"""How many terms a tensor core adds at once."""

MAX_LEVELS = 16
"""So many levels a kernel has room for."""

_NEAREST = (Rounding.nearest_even, Rounding.nearest_away)


@dataclass(frozen=True, init=False)
class Level:
    """One level of a sum: groups of `fan_in` inputs are added left to right, each partial sum rounded once.

    The first input of a group is rounded too. The last group may be short.

    Args:
        fan_in: inputs of a group; None takes all that is left.
        fmt: the format of the partial sums, or its string.
        rounding: how they are rounded, one of `Rounding`.
        saturate: whether sums beyond the largest value become that; by default they do unless the format is "ieee".

    Raises:
        ValueError: for a fan_in below 1, or an unknown format or rounding mode.
        TypeError: for arguments of a wrong type.
    """

    fan_in: int | None
    fmt: FloatFormat
    rounding: Rounding
    saturate: bool

    def __init__(
        self,
        fan_in: int | None,
        fmt: FloatFormat | str | object,
        rounding: Rounding | str = "nearest_even",
        saturate: bool | None = None,
    ) -> None:
        if fan_in is not None:
            require_int("fan_in", fan_in)
            if fan_in < 1:
                raise ValueError(f"fan_in must be at least 1, or None for all that is left, got {fan_in}")
        if saturate is not None and not isinstance(saturate, bool):
            raise TypeError(f"saturate must be a bool or None, got {saturate!r}")
        object.__setattr__(self, "fan_in", fan_in)
        object.__setattr__(self, "fmt", float_format(fmt))
        object.__setattr__(self, "rounding", Rounding.of(rounding))
        object.__setattr__(self, "saturate", self.saturates_by_default if saturate is None else saturate)

    @property
    def saturates_by_default(self) -> bool:
        return self.fmt.specials != "ieee"

    @property
    def unit(self) -> float:
        """The largest relative error of one rounding, between the smallest normal and the largest value."""
        return 2.0 ** -(self.fmt.mbits + (self.rounding in _NEAREST))

    @property
    def fields(self) -> list[int]:
        """Eight integers that determine the level, as the kernels take them."""
        return [self.fan_in or 0, *self.fmt.fields, self.rounding.number, int(self.saturate)]

    def __str__(self) -> str:
        words = [str(self.fmt) if self.fan_in is None else f"{self.fan_in}*{self.fmt}"]
        if self.rounding is not Rounding.nearest_even:
            words.append(str(self.rounding))
        if self.saturate != self.saturates_by_default:
            words.append("saturate" if self.saturate else "overflow")
        return " ".join(words)


class Run(NamedTuple):
    """A level at work: how many inputs it has, and the number of its first rounding among all of an output's."""

    level: Level
    inputs: int
    first: int


@dataclass(frozen=True, init=False, repr=False)
class Accumulator:
    """A sum of K terms as a tree of levels, from the leaves up: frozen, hashable, picklable, equal by value.

    Every level runs once, the last one again and again until one value is left. In a matrix product the terms are
    exact products, or rounded first (nearest even, saturating) to `product`.

    Args:
        levels: at least one `Level`; the last has a fan_in of at least 2, or None.
        product: the format of the products, or its string; None keeps them exact.
        leaf: what the lowest level adds: "terms", or one of `LEAVES` as the constructors `exact`, `tensor_core`,
            `hopper_fp8` and `hopper_fp16` say it.
        terms: how many terms a leaf takes; 0 for all, and for the leaf "terms".

    Raises:
        ValueError: for no levels or too many, a last level that would never end, or a leaf that does not go with the
            rest.
        TypeError: for arguments of a wrong type.
    """

    levels: tuple[Level, ...]
    product: FloatFormat | None
    leaf: str
    terms: int
    _text: str = field(compare=False)

    def __init__(
        self,
        levels: Iterable[Level],
        product: FloatFormat | str | object | None = None,
        *,
        leaf: str = "terms",
        terms: int = 0,
    ) -> None:
        object.__setattr__(self, "levels", tuple(levels))
        object.__setattr__(self, "product", None if product is None else float_format(product))
        object.__setattr__(self, "leaf", leaf)
        object.__setattr__(self, "terms", terms)
        self._check_levels()
        self._check_leaf()
        object.__setattr__(self, "_text", self._describe())

    def _check_levels(self) -> None:
        for level in self.levels:
            if not isinstance(level, Level):
                raise TypeError(f"levels must be of the type Level, got {level!r} of type {type(level).__name__}")
        if not 1 <= len(self.levels) <= MAX_LEVELS:
            raise ValueError(f"levels must be 1 to {MAX_LEVELS}, got {len(self.levels)}")
        if self.levels[-1].fan_in == 1:
            raise ValueError("the last level repeats until one value is left: its fan_in must be None or at least 2")

    def _check_leaf(self) -> None:
        if self.leaf not in LEAVES:
            raise ValueError(f"leaf must be one of {', '.join(LEAVES)}, got {self.leaf!r}")
        require_int("terms", self.terms)
        if self.terms < 0 or (self.terms and self.leaf not in _STEPS):
            raise ValueError(f"terms must be 0 for the leaf {self.leaf!r}, or at least 0, got {self.terms}")
        if self.leaf == "exact" and (len(self.levels) > 1 or self.levels[0].fan_in is not None):
            raise ValueError("an exact sum is rounded once: it takes one level, of fan_in None")
        if self.leaf in _STEPS and self.product is not None:
            raise ValueError(f"products within a tensor core are exact: {self.leaf} takes no product format")
        if self.leaf in _STEPS and self.terms % _STEPS[self.leaf]:
            raise ValueError(
                f"{self.leaf} adds {_STEPS[self.leaf]} terms at once: a leaf must take a multiple, got {self.terms}"
            )

    @staticmethod
    def sequential(fmt: FloatFormat | str | object) -> Accumulator:
        """One running sum, rounded to nearest even at every term."""
        return Accumulator([Level(None, fmt)])

    @staticmethod
    def chunked(size: int, inner: FloatFormat | str | object, outer: FloatFormat | str | object) -> Accumulator:
        """Running sums of `size` terms in one format, and a running sum of those in another."""
        return Accumulator([Level(size, inner), Level(None, outer)])

    @staticmethod
    def pairwise(fmt: FloatFormat | str | object) -> Accumulator:
        """A balanced tree: neighbours are added, then neighbouring sums, until one is left."""
        return Accumulator([Level(2, fmt)])

    @staticmethod
    def exact(fmt: FloatFormat | str | object = "fp32") -> Accumulator:
        """The sum in unbounded precision, rounded once."""
        return Accumulator([Level(None, fmt)], leaf="exact")

    @staticmethod
    def tensor_core(k: int, outer: FloatFormat | str | object = "fp32") -> Accumulator:
        """Chunks of k terms by the device's own tensor cores, a multiple of 16, and a running sum of those."""
        require_int("k", k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return Accumulator([Level(None, outer)], leaf="tensor_core", terms=k)

    @staticmethod
    def hopper_fp8(promote: int = 0, outer: FloatFormat | str | object = "fp32") -> Accumulator:
        """The arithmetic of Hopper's fp8 tensor cores; every `promote` terms go to a running sum above them.

        `promote` is a multiple of 32, and 0 for never; DeepSeek-V3 promotes every 128. Operands are float8_e4m3fn or
        float8_e5m2 (docs/hopper.md).
        """
        return Accumulator([Level(None, outer)], leaf="hopper_fp8", terms=promote)

    @staticmethod
    def hopper_fp16(promote: int = 0, outer: FloatFormat | str | object = "fp32") -> Accumulator:
        """The arithmetic of Hopper's fp16 and bf16 tensor cores; `promote` is a multiple of 16."""
        return Accumulator([Level(None, outer)], leaf="hopper_fp16", terms=promote)

    @staticmethod
    def parse(text: str | Accumulator) -> Accumulator:
        """The accumulator that a string describes, or that it is already.

        Levels are joined by "/", each `[fan_in*]format [rounding] [saturate|overflow]`, as in "64*1-6-9/fp32". Short
        names come first, then a colon: "chunk64:1-6-9/fp32" says the same, "pairwise:bf16" is "2*bf16", "exact:fp32",
        "tensor_core64:1-6-9", "hopper_fp8:fp32", "hopper_fp8@128:fp32". At the end ";product=bf16" may stand.

        Raises:
            ValueError: for a string that says none.
            TypeError: for what is neither string nor Accumulator.
        """
        if isinstance(text, Accumulator):
            return text
        if not isinstance(text, str):
            raise TypeError(f"accumulator must be an Accumulator or a string, got {type(text).__name__}")
        try:
            return _parse(text)
        except ValueError as error:
            raise ValueError(
                f"accumulator {text!r}: {error}; expected levels such as '1-6-9', '64*1-6-9/fp32', "
                "'chunk64:1-6-9/fp32', 'pairwise:bf16', 'exact:fp32', 'tensor_core64:fp32' or 'hopper_fp8@128:fp32'"
            ) from None

    @property
    def fields(self) -> list[int]:
        """The integers that determine the accumulator, as the kernels take them.

        Leaf, terms, whether there is a product format and its five; then eight for each level.
        """
        product = [1, *self.product.fields] if self.product else [0] * 6
        levels = [field for level in self.levels for field in level.fields]
        return [LEAVES.index(self.leaf), self.terms, *product, *levels]

    @property
    def is_stochastic(self) -> bool:
        """Whether any level draws random words."""
        return any(level.rounding is Rounding.stochastic for level in self.levels)

    def leaves(self, K: int) -> int:
        """How many values of K terms enter the lowest level."""
        if self.leaf == "terms":
            return K
        return min(K, 1) if self.terms == 0 else -(-K // self.terms)

    def runs(self, K: int) -> Iterator[Run]:
        """The levels that K terms pass, as often as they run. No terms pass none."""
        return self.runs_of(self.leaves(K))

    def runs_of(self, count: int) -> Iterator[Run]:
        """The levels that so many leaves pass."""
        first = 0
        for place, level in enumerate(self.levels):
            while count:
                yield Run(level, count, first)
                first += count
                count = -(-count // (level.fan_in or count))
                if count == 1 or place + 1 < len(self.levels):
                    break

    def roundings(self, K: int) -> int:
        """How often an output of K terms is rounded, which is how many random words it may draw."""
        return sum(run.inputs for run in self.runs(K))

    def depth(self, K: int) -> int:
        """Roundings on the longest path from a term to the sum that can change a value, a product's included.

        Sequential: K; pairwise: 1 + ceil(log2 K). A group's first rounding counts where its level's format or rounding
        is not that of the level below. Within a tensor core each step counts as one.
        """
        return sum(count for count, _ in self._path(K))

    def error_bound(self, K: int) -> float:
        """A bound of |error| / Σ|t| over all sums of K terms, barring overflow and underflow.

        The product of 1 + u along the longest path, less 1, where u is the unit roundoff of each rounding there
        (docs/accumulate-theory.md).

        In the model of Hopper's tensor cores a step counts as one rounding, and no operand may be subnormal.

        Raises:
            ValueError: for the leaf "tensor_core", whose arithmetic the hardware defines.
        """
        growth = sum(count * math.log1p(unit) for count, unit in self._path(K))
        return math.expm1(growth) if growth < math.log(sys.float_info.max) else math.inf

    def _path(self, K: int) -> Iterator[tuple[int, float]]:
        """The roundings on the longest path: how many, and the unit roundoff of each."""
        require_int("K", K)
        if K < 0:
            raise ValueError(f"K must be at least 0, got {K}")
        if K and self.product:
            yield 1, Level(None, self.product).unit
        if K and self.leaf in _STEPS:
            yield from self._leaf_path(min(K, self.terms or K))
        below = None
        for level, inputs, _ in self.runs(K):
            same = below is not None and (below.fmt, below.rounding) == (level.fmt, level.rounding)
            yield min(inputs, level.fan_in or inputs) - same, level.unit
            below = level

    def _leaf_path(self, terms: int) -> Iterator[tuple[int, float]]:
        if self.leaf in HOPPER:
            core = HOPPER[self.leaf]
            yield -(-terms // core.step), core.unit
            return
        raise ValueError(f"{self.leaf}: the hardware defines its roundings, for which there is no bound here")

    def __str__(self) -> str:
        return self._text

    def _describe(self) -> str:
        levels = "/".join(map(str, self.levels))
        product = f";product={self.product}" if self.product else ""
        if self.leaf != "terms":
            return f"{self._leaf_text()}:{levels}{product}"
        if [level.fan_in for level in self.levels] == [2]:
            return f"pairwise:{levels.removeprefix('2*')}{product}"
        first, *rest = self.levels
        if first.fan_in is not None and [level.fan_in for level in rest] == [None]:
            return f"chunk{first.fan_in}:{levels.partition('*')[2]}{product}"
        return levels + product

    def _leaf_text(self) -> str:
        if self.leaf == "tensor_core":
            return f"{self.leaf}{self.terms}"
        return f"{self.leaf}@{self.terms}" if self.terms else self.leaf

    def __repr__(self) -> str:
        return f"lowprec.Accumulator.parse('{self}')"


_HEAD = re.compile(
    r"(chunk(?P<chunk>\d+)|pairwise|exact|tensor_core(?P<k>\d+)|(?P<hopper>hopper_fp(8|16))(@(?P<promote>\d+))?)(:|$)"
)
_LEVEL = re.compile(r"((?P<fan_in>\d+)\*)?(?P<format>[^ *]+)(?P<words>( [a-z_]+)*)", re.ASCII)


def _parse(text: str) -> Accumulator:
    text, _, product = text.partition(";")
    if product and not product.startswith("product="):
        raise ValueError(f"unknown option {product!r}")
    head = _HEAD.match(text)
    body = text[head.end() :] if head else text
    if not body and head and head[0].startswith(("exact", "tensor_core", "hopper")):
        body = "fp32"
    fan_in = (
        "" if head is None else f"{head['chunk']}*" if head["chunk"] else "2*" if text.startswith("pairwise") else ""
    )
    levels = [_parse_level(each) for each in (fan_in + body).split("/")]
    if fan_in and any("*" in each for each in body.split("/")):
        raise ValueError("a short name and 'fan_in*' exclude each other")
    leaf, terms = _parse_leaf(text, head)
    return Accumulator(levels, product.removeprefix("product=") or None, leaf=leaf, terms=terms)


def _parse_leaf(text: str, head: re.Match[str] | None) -> tuple[str, int]:
    if head is None or text.startswith(("chunk", "pairwise")):
        return "terms", 0
    if head["k"]:
        return "tensor_core", int(head["k"])
    return head["hopper"] or "exact", int(head["promote"] or 0)


def _parse_level(text: str) -> Level:
    match = _LEVEL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no level")
    words = match["words"].split()
    saturate = {"saturate": True, "overflow": False}.get(words[-1]) if words else None
    if saturate is not None:
        words.pop()
    if len(words) > 1:
        raise ValueError(f"{text!r} names more than one rounding mode")
    fan_in = int(match["fan_in"]) if match["fan_in"] else None
    return Level(fan_in, match["format"], words[0] if words else "nearest_even", saturate)
