"""The report on a wrapped model: what every op rounded, and what was not covered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from lowprec.coverage import KINDS
from lowprec.entry import entry_of
from lowprec.policy import ROLES, Formats, and_above
from lowprec.region import Region


def report(model: nn.Module) -> Report:
    """What a policy did in a wrapped model since it was wrapped, and what it does not cover; `str()` is a table.

    Raises:
        ValueError: for a model that is not wrapped, or under an empty policy.
    """
    wrapped = list(_wrapped(model))
    if not wrapped:
        raise ValueError("model is under no policy: lowprec.wrap puts it under one, and an empty one does nothing")
    regions = [(path, module, region) for path, module, region in wrapped if region is not None]
    outside = [(path, module) for path, module, region in wrapped if region is None]
    computed = [path for path, module in outside if isinstance(module, ParametrizationList)]
    overridden = [path for path, _ in outside if not {*computed}.intersection(and_above(path))]
    rows = [row for path, module, region in regions for row in _rows(path, module, region)]
    busy = {row.path for row in rows}
    return Report(
        rows=tuple(rows),
        not_covered=tuple(f"{name} in {path or '(model)'}" for path, _, region in regions for name in region.missed),
        overridden=tuple(path for path in overridden if path.rpartition(".")[0] not in overridden),
        computed=tuple(computed),
        elementwise=tuple(path for path, module, _ in regions if path not in busy and _holds_parameters(module)),
    )


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
        computed: parametrizations, which compute a weight in full precision before it is rounded.
        elementwise: modules with parameters of their own that no product was seen to use: normalisations, say. By the
            contract they stay in full precision.
    """

    rows: tuple[Row, ...]
    not_covered: tuple[str, ...]
    overridden: tuple[str, ...]
    computed: tuple[str, ...]
    elementwise: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*_legend(self.rows), "", *_table(self.rows), "", *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        yield "NOT covered: " + ("; ".join(self.not_covered) or "nothing that was seen") + "."
        if self.overridden:
            yield f"Full precision, by an override: {_listed(self.overridden)}."
        if self.computed:
            yield f"Full precision, where a weight is computed from parameters: {_listed(self.computed)}."
        if self.elementwise:
            yield f"Full precision, with parameters that no product was seen to use: {_listed(self.elementwise)}."


# Gathering what the regions know.

_KIND_OF: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Bilinear: "bilinear",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding_bag",
    nn.MultiheadAttention: "multi_head_attention",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
    nn.LSTMCell: "lstm_cell",
    nn.GRUCell: "gru_cell",
    nn.RNNCell: "rnn_cell",
}
_KIND_OF |= {
    getattr(nn, f"Conv{form}{n}d"): f"conv{form and '_transpose'}{n}d" for form in ("", "Transpose") for n in (1, 2, 3)
}
_PARTS = (NonDynamicallyQuantizableLinear, ParametrizationList)
"""Modules that only hold the parameters of the module around them."""


def _wrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module, Region | None]]:
    for path, module in model.named_modules():
        entry = entry_of(module)
        if entry is not None:
            yield path, module, entry.region


def _rows(path: str, module: nn.Module, region: Region) -> Iterator[Row]:
    own = _kind_of(module)
    for kind, calls, roles in zip(KINDS, region.calls.tolist(), region.stats.tolist(), strict=True):
        if calls or kind == own:
            counts = {role: Count(*map(int, row[:4])) for role, row in zip(ROLES, roles, strict=True)}
            yield Row(path, kind, region.formats, calls, counts)


def _kind_of(module: nn.Module) -> str | None:
    """The op that a module of torch's own is there to call."""
    if isinstance(module, _PARTS):
        return None
    return next((kind for base, kind in _KIND_OF.items() if isinstance(module, base)), None)


def _holds_parameters(module: nn.Module) -> bool:
    return not isinstance(module, _PARTS) and any(True for _ in module.parameters(recurse=False))


# Writing it down.

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


def _listed(paths: Sequence[str], most: int = 8) -> str:
    """The first paths, and how many there are if that is not all."""
    rest = f", ... ({len(paths)} in all)" if len(paths) > most else ""
    return ", ".join(map(_name, paths[:most])) + rest
