"""The report on a wrapped model: what every op rounded, and what was not covered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from lowprec.coverage import KINDS
from lowprec.entry import entry_of
from lowprec.policy import ROLES, TORCHS_SUMS, Accumulators, Formats, and_above
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
        not_covered=tuple(
            f"{name} in {path or '(model)'}"
            for path, _, region in regions
            for name in (*region.missed, *(f"the sums of {kind}" for kind in region.left_out))
        ),
        overridden=tuple(path for path in overridden if path.rpartition(".")[0] not in overridden),
        computed=tuple(computed),
        elementwise=tuple(path for path, module, _ in regions if path not in busy and _holds_parameters(module)),
    )


@dataclass(frozen=True)
class Count:
    """What rounding did to the tensors of one role. Sums are over finite elements; see docs/statistics.md.

    Attributes:
        elements: how many were rounded.
        saturated: how many rounded past the largest finite magnitude, whether they then became it or infinite.
        flushed: how many were nonzero and became zero.
        nan: how many were NaN.
        amax: the largest |x|.
        absolute: Σ|x|.
        total: Σx.
        squares: Σx².
        error: Σ(result - x)².
    """

    elements: int = 0
    saturated: int = 0
    flushed: int = 0
    nan: int = 0
    amax: float = 0.0
    absolute: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    error: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.elements + other.elements,
            self.saturated + other.saturated,
            self.flushed + other.flushed,
            self.nan + other.nan,
            max(self.amax, other.amax),
            self.absolute + other.absolute,
            self.total + other.total,
            self.squares + other.squares,
            self.error + other.error,
        )

    @property
    def saturated_percent(self) -> float:
        return 100 * self.saturated / max(self.elements, 1)

    @property
    def flushed_percent(self) -> float:
        return 100 * self.flushed / max(self.elements, 1)

    @property
    def mean(self) -> float:
        """Of |x|, infinities counted as zeros; NaN without elements."""
        return self._per_number(self.absolute)

    @property
    def std(self) -> float:
        """Population standard deviation of x, infinities counted as zeros; NaN without elements."""
        variance = self._per_number(self.squares) - self._per_number(self.total) ** 2
        return math.sqrt(max(variance, 0.0)) if self.elements > self.nan else math.nan

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels: inf where rounding was exact, NaN without a signal."""
        if not self.error:
            return math.inf if self.squares else math.nan
        return 10 * math.log10(self.squares / self.error) if self.squares else -math.inf

    def _per_number(self, total: float) -> float:
        numbers = self.elements - self.nan
        return total / numbers if numbers else math.nan


@dataclass(frozen=True)
class Row:
    """One kind of op in one module.

    Attributes:
        path: of the module whose forward called the op; "" is the model itself.
        kind: linear, matmul, conv2d, lstm, ...
        formats: of each role as a string, None for full precision.
        calls: how often it ran.
        counts: for each role.
        codes: for each role how often each code came out, of formats up to 8 bits: all ops of the module together.
        emaxes: for each role whose bias is measured, the exponent of the largest value now, for each of its tensors in
            order: all ops of the module together.
        accumulators: of products and of other sums, as strings; None for torch's own way.
        left_out: whether a call of the op had sums for which the policy has an accumulator, and torch formed them.
    """

    path: str
    kind: str
    formats: Formats
    calls: int
    counts: dict[str, Count]
    codes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    emaxes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    accumulators: Accumulators = TORCHS_SUMS
    left_out: bool = False

    @property
    def sums(self) -> str:
        """Whose sums they are: torch's, if the policy has none or did not reach one of them; "-" of none."""
        if not self.calls:
            return "-"
        return "torch's" if self.left_out or not any(self.accumulators) else "policy's"

    @property
    def forward(self) -> Count:
        """Operands, activations and weights together."""
        return self.counts["activation"] + self.counts["weight"]

    @property
    def gradient(self) -> Count:
        """dY, dW and the bias gradient together."""
        return self.counts["activation_grad"] + self.counts["weight_grad"]

    def entropy(self, role: str) -> float:
        """Bits of entropy in a role's codes, all ops of the module together; NaN where none were counted."""
        codes = np.array(self.codes.get(role, ()), dtype=np.float64)
        share = codes[codes > 0] / max(codes.sum(), 1)
        return float(-(share * np.log2(share)).sum() + 0.0) if len(share) else math.nan

    def records(self) -> Iterator[dict[str, Any]]:
        """All of it, a flat dictionary for each role that has a format."""
        for role, format in zip(ROLES, self.formats, strict=True):
            if format is not None:
                yield {
                    "path": self.path,
                    "kind": self.kind,
                    "role": role,
                    "format": format,
                    "calls": self.calls,
                    **{name: getattr(self.counts[role], name) for name in _RECORDED},
                    "code_entropy": self.entropy(role),
                }


_RECORDED = ("elements", "saturated", "flushed", "nan", "amax", "mean", "std", "sqnr_db")


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
        first = _named_with_sums if any(any(row.accumulators) for row in self.rows) else _named_with_calls
        tables = [*_table(self.rows, first, _LOSSES), "", *_table(self.rows, _named, _NOISE)]
        return "\n".join([*_legend(self.rows), "", *tables, "", *self._remarks()])

    def records(self) -> list[dict[str, Any]]:
        """Every statistic, as a flat dictionary for each op and role that has a format: what JSON and tables take."""
        return [record for row in self.rows for record in row.records()]

    def frame(self) -> Any:
        """The records as a pandas DataFrame; ImportError where pandas is not installed."""
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise ImportError("frame() needs pandas: install it, or use records()") from error
        return pandas.DataFrame(self.records())

    def write(self, writer: Any, step: int | None = None, *, prefix: str = "lowprec") -> None:
        """Write every statistic as a scalar, and the codes of each role as a histogram.

        Tags are `<prefix>/<module path>/<op>/<role>/<statistic>` and `<prefix>/<module path>/<role>/codes`. Codes are
        numbered by magnitude, negative ones below zero. What has no number is left out.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar` and
                `add_histogram_raw`.
            step: of training.
            prefix: of every tag.
        """
        for record in self.records():
            where = f"{prefix}/{_name(record['path'])}/{record['kind']}/{record['role']}"
            for name, value in _scalars(record):
                writer.add_scalar(f"{where}/{name}", value, step)
        for row in {row.path: row for row in self.rows}.values():
            for role, codes in row.codes.items():
                if any(codes):
                    tag = f"{prefix}/{_name(row.path)}/{role}/codes"
                    writer.add_histogram_raw(tag, **_histogram(codes), global_step=step)

    def _remarks(self) -> Iterator[str]:
        measured = {row.path: row.emaxes for row in self.rows if row.emaxes}
        if measured:
            each = (f"{_name(path)} {', '.join(_spans(emaxes))}" for path, emaxes in measured.items())
            yield f"Measured, exponents of the largest value now: {'; '.join(each)}."
        nans = [f"{r['nan']} in {r['role']} of {_name(r['path'])}" for r in self.records() if r["nan"]]
        if nans:
            yield f"NaN: {_listed(nans)}."
        yield "NOT covered: " + ("; ".join(self.not_covered) or "nothing that was seen") + "."
        if self.overridden:
            yield f"Full precision, by an override: {_listed(self.overridden)}."
        if self.computed:
            yield f"Full precision, where a weight is computed from parameters: {_listed(self.computed)}."
        if self.elementwise:
            yield f"Full precision, with parameters that no product was seen to use: {_listed(self.elementwise)}."


def _spans(emaxes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """For each role, the exponents of its tensors from the least to the largest."""
    for role, values in emaxes.items():
        least, most = min(values), max(values)
        yield f"{_SHORT[ROLES.index(role)]} {least}" + (f" to {most}" if most > least else "")


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
    codes = {role: tuple(row) for role, row in zip(ROLES, region.codes.tolist(), strict=True) if any(row)}
    emaxes = {role: found for role, found in _emaxes(region) if found}
    for kind, calls, roles in zip(KINDS, region.calls.tolist(), region.stats.tolist(), strict=True):
        if calls or kind == own:
            counts = {role: Count(*map(int, row[:4]), *row[4:]) for role, row in zip(ROLES, roles, strict=True)}
            sums = region.accumulators, kind in region.left_out
            yield Row(path, kind, region.formats, calls, counts, codes, emaxes, *sums)


def _emaxes(region: Region) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Roles whose bias is measured, with the exponents that this has come to."""
    for role, slots in zip(ROLES, region.slots[: len(ROLES)], strict=True):
        if slots is not None and slots.is_measured:
            yield role, slots.emaxes()


def _kind_of(module: nn.Module) -> str | None:
    """The op that a module is there to call: torch's own by this table, others if they say so in `lowprec_op`."""
    if isinstance(module, _PARTS):
        return None
    said = getattr(type(module), "lowprec_op", None)
    return next((kind for base, kind in _KIND_OF.items() if isinstance(module, base)), said)


def _holds_parameters(module: nn.Module) -> bool:
    return not isinstance(module, _PARTS) and any(True for _ in module.parameters(recurse=False))


# Writing it down.

_SHORT = ("a", "w", "da", "dw")
_SUMS = ("y", "activation gradient", "weight gradient", "others")
_Policy = tuple[Formats, Accumulators]
_Column = tuple[str, Callable[[Row, str], str]]
"""A heading over four columns, one for each role, and what stands there."""


def _legend(rows: Sequence[Row]) -> Iterator[str]:
    yield f"Roles: {', '.join(f'{short} = {role}' for short, role in zip(_SHORT, ROLES, strict=True))}"
    for number, (formats, accumulators) in enumerate(_policies(rows), 1):
        yield f"Formats [{number}]: " + ", ".join(
            f"{short} {format or 'full precision'}" for short, format in zip(_SHORT, formats, strict=True)
        )
        if any(accumulators):
            yield f"Sums [{number}]: " + ", ".join(
                f"{name} {text or 'by torch'}" for name, text in zip(_SUMS, accumulators, strict=True)
            )


def _policies(rows: Sequence[Row]) -> list[_Policy]:
    return list(dict.fromkeys((row.formats, row.accumulators) for row in rows))


def _table(rows: Sequence[Row], names: _Names, columns: Sequence[_Column]) -> list[str]:
    """Aligned lines: names to the left, numbers to the right, in groups under their headings."""
    heads, cells_of = names
    cells = [(*heads, *_SHORT * len(columns))]
    for row in rows:
        numbers = [text(row, role) for _, text in columns for role in ROLES]
        cells.append((*cells_of(row, _policies(rows)), *numbers))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    widths[len(heads) :] = [max(6, width) for width in widths[len(heads) :]]
    left = {i for i, head in enumerate(heads) if head != "calls"}
    lines = [
        "  ".join(cell.ljust(widths[i]) if i in left else cell.rjust(widths[i]) for i, cell in enumerate(line)).rstrip()
        for line in cells
    ]
    above = " " * sum(2 + width for width in widths[: len(heads)])
    for n, (heading, _) in enumerate(columns):
        first = len(heads) + 4 * n
        above += heading.ljust(sum(2 + width for width in widths[first : first + 4]))
    return [above.rstrip(), *lines]


_Names = tuple[tuple[str, ...], Callable[[Row, list[_Policy]], tuple[str, ...]]]
"""Headings of a table's first columns, and what stands there."""

_named: _Names = (("module", "op"), lambda row, _: (_name(row.path), row.kind))
_named_with_calls: _Names = (
    ("module", "op", "formats", "calls"),
    lambda row, policies: (_name(row.path), row.kind, f"[{_place(row, policies)}]", str(row.calls)),
)
_named_with_sums: _Names = (
    ("module", "op", "formats", "sums", "calls"),
    lambda row, policies: (_name(row.path), row.kind, f"[{_place(row, policies)}]", row.sums, str(row.calls)),
)


def _place(row: Row, policies: list[_Policy]) -> int:
    return policies.index((row.formats, row.accumulators)) + 1


def _percent(value: float, count: Count) -> str:
    if not count.elements:
        return "-"
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"


def _decimal(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


_LOSSES: Sequence[_Column] = (
    ("saturated %", lambda row, role: _percent(row.counts[role].saturated_percent, row.counts[role])),
    ("flushed to zero %", lambda row, role: _percent(row.counts[role].flushed_percent, row.counts[role])),
)
_NOISE: Sequence[_Column] = (
    ("signal to noise, dB", lambda row, role: _decimal(row.counts[role].sqnr_db)),
    ("code entropy, bits", lambda row, role: _decimal(row.entropy(role))),
)


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record, counts as percentages of the elements."""
    if not record["elements"]:
        return
    for name in ("saturated", "flushed", "nan"):
        yield f"{name}_percent", 100 * record[name] / record["elements"]
    for name in ("amax", "mean", "std", "sqnr_db", "code_entropy"):
        if math.isfinite(record[name]):
            yield name, record[name]


def _histogram(codes: tuple[int, ...]) -> dict[str, Any]:
    """A histogram of codes as `add_histogram_raw` takes it: code c, without its sign bit, stands at ±c."""
    half = len(codes) // 2
    counts = np.array([*reversed(codes[half:]), *codes[:half]], dtype=np.float64)
    places = np.array([*range(1 - half, 1), *range(half)], dtype=np.float64)
    # Each bin ends halfway to the next; those of the two zeros are one.
    counts[half] += counts[half - 1]
    counts, places = np.delete(counts, half - 1), np.delete(places, half - 1)
    seen = places[counts > 0]
    return {
        "min": float(seen.min()),
        "max": float(seen.max()),
        "num": float(counts.sum()),
        "sum": float((counts * places).sum()),
        "sum_squares": float((counts * places**2).sum()),
        "bucket_limits": (places + 0.5).tolist(),
        "bucket_counts": counts.tolist(),
    }


def _name(path: str) -> str:
    return path or "(model)"


def _listed(paths: Sequence[str], most: int = 8) -> str:
    """The first paths, and how many there are if that is not all."""
    rest = f", ... ({len(paths)} in all)" if len(paths) > most else ""
    return ", ".join(map(_name, paths[:most])) + rest
