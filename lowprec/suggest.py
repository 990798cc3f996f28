"""Which format of a given width keeps the most of a tensor: the split of its bits and its bias, with the evidence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowprec import _ops
from lowprec.block import block_fields
from lowprec.cast import fields_of, require_float
from lowprec.eager_statistics import FIELDS, LEAST
from lowprec.entry import entry_of
from lowprec.formats import BLOCK_NAMES, BlockFormat, FloatFormat
from lowprec.formats import format as lookup
from lowprec.measure import conclude
from lowprec.policy import ROLES, Policy
from lowprec.wrap import wrap

BITS = range(2, 17)
"""Widths that a suggestion is made for."""


@dataclass(frozen=True)
class Candidate:
    """A format and what nearest-even, saturating rounding to it did to the tensor; see `lowprec.Statistics`."""

    format: FloatFormat | BlockFormat
    sqnr_db: float
    saturated_percent: float
    flushed_percent: float
    code_entropy: float

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of a table, under `_HEADS`."""
        percents = (self.saturated_percent, self.flushed_percent)
        numbers = [f"{self.sqnr_db:.2f}", *(f"{value:.3f}" for value in percents), f"{self.code_entropy:.2f}"]
        return str(self.format), str(self.format.emax) if isinstance(self.format, FloatFormat) else "", *numbers


_HEADS = ("format", "emax", "SQNR dB", "saturated %", "flushed %", "entropy bits")


@dataclass(frozen=True)
class Suggestion:
    """The format that keeps the most signal of one tensor, and the evidence; `str()` is a table.

    Attributes:
        candidates: each split of the bits at its best bias, the highest signal-to-noise ratio first. Empty for a tensor
            without a finite nonzero number, which every format holds.
        blocks: block formats of that width, which have a scale for each block on top of it; the best first.
        casts: how many casts were tried.
    """

    candidates: tuple[Candidate, ...]
    blocks: tuple[Candidate, ...]
    casts: int

    @property
    def best(self) -> Candidate | None:
        """The first candidate; None without any."""
        return self.candidates[0] if self.candidates else None

    @property
    def runner_up(self) -> Candidate | None:
        """The next one with other values; None without any. 1-0-m has those of 1-1-(m-1)."""
        fixed_point = self.format is not None and self.format.ebits < 2
        others = (each for each in self.candidates[1:] if not (fixed_point and each.format.fields[0] < 2))
        return next(others, None)

    @property
    def format(self) -> FloatFormat | None:
        """The best candidate's format; None without any."""
        found = self.best
        return found.format if found is not None and isinstance(found.format, FloatFormat) else None

    def __str__(self) -> str:
        if not self.candidates:
            return "no finite nonzero number: any format will do"
        lines = [_HEADS, *(candidate.cells for candidate in self.candidates)]
        if self.blocks:
            lines += [("beside them, in blocks:", *[""] * 5), *(candidate.cells for candidate in self.blocks)]
        return "\n".join(_aligned(lines))


class Suggestions(Mapping[Any, Suggestion]):
    """A suggestion for each of several tensors, by name; `str()` is a table with a line for each."""

    def __init__(self, found: Mapping[Any, Suggestion]) -> None:
        self._found: dict[Any, Suggestion] = dict(found)

    def __getitem__(self, name: Any) -> Suggestion:
        return self._found[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __str__(self) -> str:
        heads = ("tensor", "best", *_HEADS[2:5], "entropy", "runner-up", "dB", "in blocks", "dB")
        return "\n".join(_aligned([heads, *(_line(_text(name), each) for name, each in self.items())]))


class ModelSuggestion(Suggestions):
    """A suggestion for each role of each module, by (path, role)."""

    def policy(self) -> Policy:
        """The best format of each role in each module, as overrides of a policy; what was not seen is left as it is."""
        paths = {path: self._formats(path) for path, _ in self}
        top = paths.pop("", {})
        # A pattern covers what lies beneath it, and the first one wins: so the deepest come first.
        deepest_first = sorted(paths, key=lambda path: -path.count("."))
        return Policy(**top, overrides={path: Policy(**paths[path]) for path in deepest_first})

    def _formats(self, path: str) -> dict[str, Any]:
        return {role: self[path, role].format for role in ROLES if (path, role) in self}


@overload
def suggest(x_or_model: Tensor, bits: int = 8, *, dim: int = -1) -> Suggestion: ...


@overload
def suggest(x_or_model: Mapping[Any, Tensor] | Sequence[Tensor], bits: int = 8, *, dim: int = -1) -> Suggestions: ...


@overload
def suggest(
    x_or_model: nn.Module,
    bits: int = 8,
    *,
    inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    dim: int = -1,
) -> ModelSuggestion: ...


def suggest(
    x_or_model: Tensor | Mapping[Any, Tensor] | Sequence[Tensor] | nn.Module,
    bits: int = 8,
    *,
    inputs: Any = None,
    loss: Callable[[Any], Tensor] | None = None,
    dim: int = -1,
) -> Suggestion | Suggestions:
    """The split 1-e-m and the bias that keep the most signal of each tensor.

    Every split of the bits is tried, at every bias that could be its best: what a bias loses to saturation alone, told
    by a histogram of exponents, rules out all that saturate more. What is left is measured by real casts (nearest even,
    saturating), so the answer is exact, and the same each time. Ties go to the wider range.

    Args:
        x_or_model: a tensor; a mapping or sequence of them; or a model, wrapped or not, which stays as it is: a copy of
            it runs on `inputs`, in full precision.
        bits: of a code, with its sign: 2 to 16.
        inputs: of the model: its one argument, or a tuple of arguments.
        loss: takes the model's output to a scalar, from which gradients flow back. Without it no gradient is seen.
        dim: along which block formats lie, whose figures stand beside.

    Returns:
        A `Suggestion`; for several tensors `Suggestions` by name or index; for a model a `ModelSuggestion` by module
        path and role, whose `policy()` puts the formats to use.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for a width out of range, or a model without inputs.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int, got {bits!r}")
    if bits not in BITS:
        raise ValueError(f"bits must be from {BITS[0]} to {BITS[-1]}, got {bits}")
    if isinstance(x_or_model, nn.Module):
        if inputs is None:
            raise ValueError("inputs is needed to see what a model computes: give its argument, or a tuple of them")
        seen = _watch(x_or_model, inputs, loss)
        return ModelSuggestion({key: _search(tensors, bits, dim) for key, tensors in seen.items()})
    if isinstance(x_or_model, Tensor):
        return _search([_checked("x", x_or_model)], bits, dim)
    named = x_or_model.items() if isinstance(x_or_model, Mapping) else enumerate(x_or_model)
    return Suggestions({name: _search([_checked(f"x[{name!r}]", x)], bits, dim) for name, x in named})


def _checked(name: str, x: Tensor) -> Tensor:
    require_float(name, x)
    return x.detach()


# The search.


class _Search:
    """Casts of tensors that share a format, and the best of them for each split."""

    def __init__(self, tensors: list[Tensor], dim: int) -> None:
        self.tensors = tensors
        self.dim = dim
        self.casts = 0
        self.finite = torch.stack([x.isfinite().sum() for x in tensors]).sum()
        exponents = torch.stack([_exponents(x) for x in tensors]).sum(0).tolist()
        self.exponents = {place - 1023: count for place, count in enumerate(exponents) if count}

    def best_of(self, ebits: int, mbits: int) -> Candidate | None:
        """The best bias of a split; None where no bias suits the dtype."""
        best: Candidate | None = None
        least = math.inf
        for emax in range(self._widest(ebits, mbits), min(self.exponents) - 2, -1):
            fmt = self._usable(ebits, mbits, emax)
            if fmt is None:
                continue
            if self._lost(fmt) >= least:
                break
            candidate, error = self.measured(fmt, fields_of(fmt))
            if error < least:
                best, least = candidate, error
        return best

    def _widest(self, ebits: int, mbits: int) -> int:
        """The least emax that is above all numbers, and whose smallest values the dtype holds if it holds any.

        A wider format has no value within the range of the numbers that this one lacks.
        """
        least = max(self.exponents) + 1
        wider = range(least, least + (1 << ebits) + mbits)
        return next((emax for emax in wider if self._usable(ebits, mbits, emax)), least)

    def _usable(self, ebits: int, mbits: int, emax: int) -> FloatFormat | None:
        try:
            fmt = FloatFormat(ebits, mbits, emax=emax)
            for x in self.tensors:
                fields_of(fmt, x.dtype)
        except ValueError:
            return None
        return fmt

    def _lost(self, fmt: FloatFormat) -> float:
        """No more than the squared error of what saturates: each number lies at or above the power of its exponent."""
        over = ((2.0**exponent - fmt.max, n) for exponent, n in self.exponents.items() if 2.0**exponent > fmt.max)
        return sum((n * distance * distance for distance, n in over), 0.0)

    def measured(self, fmt: FloatFormat | BlockFormat, fields: list[int]) -> tuple[Candidate, float]:
        """A candidate and its squared error."""
        self.casts += 1
        device = self.tensors[0].device
        stats = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        codes = torch.zeros(1 << fmt.bits, dtype=torch.int64, device=device)
        for x in self.tensors:
            if isinstance(fmt, BlockFormat):
                _ops.quantize_block_statistics(x, fields, self.dim, 0, True, None, None, 32, stats, codes)
            else:
                _ops.quantize_statistics(x, fields, 0, True, None, None, 32, None, stats, codes)
        n = conclude(stats, codes, self.finite).numbers()
        share = 100 / max(n["count"], 1)
        figures = (n["sqnr_db"], share * n["saturated"], share * n["flushed"], n["code_entropy"])
        return Candidate(fmt, *figures), float(stats[FIELDS.index("error")])


def _exponents(x: Tensor) -> Tensor:
    """How many finite numbers there are of each exponent, counted from -1023; not those that sums take for zero."""
    magnitude = x.to(torch.float64).view(torch.int64) & ~(-1 << 63)
    kept = (magnitude >= LEAST) & (magnitude < 2047 << 52)
    return torch.bincount((magnitude[kept] >> 52), minlength=2047)


def _search(tensors: list[Tensor], bits: int, dim: int) -> Suggestion:
    search = _Search(tensors, dim)
    if not search.exponents:
        return Suggestion((), (), 0)
    # From the widest range to the narrowest, so that ties, which a stable sort keeps in order, go to the wider one.
    found = [search.best_of(ebits, bits - 1 - ebits) for ebits in range(bits - 1, -1, -1)]
    blocks = [_block(search, name) for name in _block_names(bits)]
    return Suggestion(_ranked(found), _ranked(blocks), search.casts)


def _ranked(found: Sequence[Candidate | None]) -> tuple[Candidate, ...]:
    return tuple(sorted((each for each in found if each is not None), key=lambda each: -each.sqnr_db))


def _block_names(bits: int) -> list[str]:
    """The named block formats of a width, and block floating point in blocks of 32."""
    named = [name for name, fmt in BLOCK_NAMES.items() if fmt.bits == bits]
    return [*named, f"bfp{bits}/32"]


def _block(search: _Search, name: str) -> Candidate | None:
    fmt = lookup(name)
    assert isinstance(fmt, BlockFormat)
    try:
        fields = [block_fields(fmt, x.dtype) for x in search.tensors]
    except ValueError:
        return None
    return search.measured(fmt, fields[0])[0]


# What a model computes.

_ANY = "1-4-3"  # a format that every dtype holds; nothing is rounded to it


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what would be rounded, by where it would be counted, and lets it pass as it is."""

    def __init__(self, places: dict[int, tuple[str, str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places = places
        self.seen: dict[tuple[str, str], list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _ops.quantize_statistics:
            return func(*args, **(kwargs or {}))
        x, stats = args[0], args[8]
        self.seen.setdefault(self.places[stats.data_ptr()], []).append(x.detach().clone())
        return x.clone()


def _watch(model: nn.Module, inputs: Any, loss: Callable[[Any], Tensor] | None) -> dict[tuple[str, str], list[Tensor]]:
    """The tensors of each role in each module, in one pass over the inputs."""
    model = wrap(copy.deepcopy(model), Policy(_ANY, _ANY, _ANY, _ANY))
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    watch = _Watch(dict(_places(model)))
    with watch, torch.set_grad_enabled(loss is not None):
        output = model(*arguments)
        if loss is not None:
            loss(output).backward()  # type: ignore[no-untyped-call]
    return watch.seen


def _places(model: nn.Module) -> Iterator[tuple[int, tuple[str, str]]]:
    """The address of every row of statistics, and whose it is."""
    for path, module in model.named_modules():
        entry = entry_of(module)
        if entry is not None and entry.region is not None:
            for kind in entry.region.stats:
                yield from ((row.data_ptr(), (path, role)) for row, role in zip(kind, ROLES, strict=True))


# Writing it down.


def _line(name: str, suggestion: Suggestion) -> tuple[str, ...]:
    best, other = suggestion.best, suggestion.runner_up
    if best is None:
        return name, "any", *[""] * 8
    block = suggestion.blocks[0] if suggestion.blocks else None
    format, _, *numbers = best.cells
    return name, format, *numbers, *_short(other), *_short(block)


def _short(candidate: Candidate | None) -> tuple[str, str]:
    return ("-", "-") if candidate is None else (str(candidate.format), f"{candidate.sqnr_db:.2f}")


def _text(name: Any) -> str:
    return " ".join(part or "(model)" for part in name) if isinstance(name, tuple) else str(name)


def _aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns: text to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = [all(_is_number(line[i]) for line in lines[1:]) for i in range(len(widths))]
    for line in lines:
        cells = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        yield "  ".join(cells).rstrip()


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return cell == "-"
    return True
