"""The report on a wrapped model: what every op rounded, and what was not covered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowprec.policy import ROLES, Formats


@dataclass(frozen=True)
class Count:
    """What rounding did to the tensors of one role.

    Attributes:
        elements: how many were rounded.
        saturated: how many rounded past the largest finite magnitude, whether they then became it or infinite.
        flushed: how many were nonzero and became zero.
        nan: how many were NaN.
    """

    elements: int = 0
    saturated: int = 0
    flushed: int = 0
    nan: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.elements + other.elements,
            self.saturated + other.saturated,
            self.flushed + other.flushed,
            self.nan + other.nan,
        )

    @property
    def saturated_percent(self) -> float:
        return 100 * self.saturated / max(self.elements, 1)

    @property
    def flushed_percent(self) -> float:
        return 100 * self.flushed / max(self.elements, 1)


@dataclass(frozen=True)
class Row:
    """One kind of op in one module.

    Attributes:
        path: of the module whose forward called the op; "" is the model itself.
        kind: linear, matmul, conv2d, lstm, ...
        formats: of each role as a string, None for full precision.
        calls: how often it ran.
        counts: for each role.
    """

    path: str
    kind: str
    formats: Formats
    calls: int
    counts: dict[str, Count]

    @property
    def forward(self) -> Count:
        """Operands, activations and weights together."""
        return self.counts["activation"] + self.counts["weight"]

    @property
    def gradient(self) -> Count:
        """dY, dW and the bias gradient together."""
        return self.counts["activation_grad"] + self.counts["weight_grad"]


@dataclass(frozen=True)
class Report:
    """What a policy did in a model; `str()` is a table.

    Attributes:
        rows: every op that ran, and every module known to be one that has not run yet.
        not_covered: what holds a product or weights and the policy does not reach, by op and module path.
        overridden: the modules that an override leaves in full precision.
        elementwise: modules with parameters of their own that no product was seen to use: normalisations, say. By the
            contract they stay in full precision.
    """

    rows: tuple[Row, ...]
    not_covered: tuple[str, ...]
    overridden: tuple[str, ...]
    elementwise: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*_legend(self.rows), "", *_table(self.rows), "", *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        yield "NOT covered: " + ("; ".join(self.not_covered) or "nothing that was seen") + "."
        if self.overridden:
            yield f"Full precision, by an override: {_listed(self.overridden)}."
        if self.elementwise:
            yield f"Full precision, with parameters that no product was seen to use: {_listed(self.elementwise)}."


_SHORT = ("a", "w", "da", "dw")
_HEAD = ("module", "op", "formats", "calls", *_SHORT, *_SHORT)


def _legend(rows: Sequence[Row]) -> Iterator[str]:
    yield f"Roles: {', '.join(f'{short} = {role}' for short, role in zip(_SHORT, ROLES, strict=True))}"
    for number, formats in enumerate(_policies(rows), 1):
        yield f"Formats [{number}]: " + ", ".join(
            f"{short} {format or 'full precision'}" for short, format in zip(_SHORT, formats, strict=True)
        )


def _policies(rows: Sequence[Row]) -> list[Formats]:
    return list(dict.fromkeys(row.formats for row in rows))


def _table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines: names to the left, numbers to the right, two groups of percentages under their headings."""
    policies = _policies(rows)
    cells = [_HEAD, *(_cells(row, policies.index(row.formats) + 1) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD))]
    widths[4:] = [max(6, width) for width in widths[4:]]
    lines = ["  ".join(_aligned(i, cell, widths[i]) for i, cell in enumerate(line)).rstrip() for line in cells]
    left, group = sum(widths[:4]) + 2 * 4, sum(widths[4:8]) + 2 * 4
    return [" " * left + "saturated %".ljust(group) + "flushed to zero %", *lines]


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _cells(row: Row, policy: int) -> tuple[str, ...]:
    counts = [row.counts[role] for role in ROLES]
    saturated = [_percent(count.saturated_percent, count) for count in counts]
    flushed = [_percent(count.flushed_percent, count) for count in counts]
    return _name(row.path), row.kind, f"[{policy}]", str(row.calls), *saturated, *flushed


def _percent(value: float, count: Count) -> str:
    if not count.elements:
        return "-"
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"


def _name(path: str) -> str:
    return path or "(model)"


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(map(_name, paths))
