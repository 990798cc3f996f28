"""Casts that manage their own bias: what a rule says, and the module that follows it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowprec import _ops, block, recompute
from lowprec.adapt import BIASES, CALLS, HEADER, SHIFT, new_state
from lowprec.block import block_fields
from lowprec.cast import RANDOM_BITS, FormatLike, apply, fields_of, quantize, require_float
from lowprec.eager import shift_range
from lowprec.formats import BlockFormat, FloatFormat, format
from lowprec.rounding import Rounding

_STOCHASTIC = Rounding.stochastic.number


@dataclass(frozen=True)
class Rule:
    """How a tensor is cast, without the state that this may take: the arguments of `Cast`, checked.

    `str` is the format's own string where nothing else is out of the ordinary, and parses back; traced code carries it.
    """

    fmt: FloatFormat | BlockFormat
    rounding: Rounding = Rounding.nearest_even
    saturate: bool = True
    bias: str = "static"
    frequency: int = 1024
    pad: int = 2
    stdv: float | None = None
    history: int = 16
    seed: int | None = None
    random_bits: int = 32
    dim: int = -1

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        if self.random_bits not in RANDOM_BITS:
            raise ValueError(f"random_bits must be 32, 16 or 8, got {self.random_bits!r}")
        if type(self.saturate) is not bool:
            raise TypeError(f"saturate must be a bool, got {self.saturate!r}")
        for name in ("pad", "dim", "frequency", "history", *(() if self.seed is None else ("seed",))):
            _require_int(name, getattr(self, name), least=1 if name in ("frequency", "history") else None)
        self._check_stdv()
        if isinstance(self.fmt, BlockFormat) and self.is_measured:
            raise ValueError(f"bias must be 'static' for {self.fmt}, whose blocks have a bias each, got {self.bias!r}")

    def _check_stdv(self) -> None:
        if self.stdv is None:
            return
        if isinstance(self.stdv, bool) or not isinstance(self.stdv, int | float):
            raise TypeError(f"stdv must be a number or None, got {self.stdv!r}")
        if not (math.isfinite(self.stdv) and self.stdv >= 0):
            raise ValueError(f"stdv must be finite and not negative, got {self.stdv!r}")

    @staticmethod
    def of(value: FormatLike | BlockFormat | Cast) -> Rule:
        """The rule of a cast; of a format it is to round to nearest even, `ieee` formats overflowing to infinity."""
        return value.rule if isinstance(value, Cast) else _plain(format(value))

    @staticmethod
    def parse(text: str) -> Rule:
        """The rule that has this string."""
        return _parse(text)

    @property
    def is_measured(self) -> bool:
        """Whether the bias comes from tensors."""
        return self.bias != "static"

    @property
    def has_state(self) -> bool:
        """Whether a call differs from the one before it: by its bias, or by its random bits."""
        return self.is_measured or self.draws

    @property
    def draws(self) -> bool:
        """Whether rounding is stochastic."""
        return self.rounding is Rounding.stochastic

    @property
    def width(self) -> int:
        """Numbers in a state."""
        return HEADER + self.past

    @property
    def past(self) -> int:
        """How many exponents a state remembers."""
        return self.history if self.bias == "delayed" else 0

    def options(self) -> dict[str, Any]:
        """What differs from the defaults of `Cast`."""
        return {f.name: getattr(self, f.name) for f in fields(self)[1:] if getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        if self == _plain(self.fmt):
            return str(self.fmt)
        plain = _plain(self.fmt)
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        options = [f"{name}={value}" for name, value in given.items() if value != getattr(plain, name)]
        return f"{self.fmt} | " + ", ".join(options)


def _plain(fmt: FloatFormat | BlockFormat) -> Rule:
    return Rule(fmt, saturate=isinstance(fmt, BlockFormat) or fmt.specials != "ieee")


@lru_cache(maxsize=1024)
def _parse(text: str) -> Rule:
    name, _, options = text.partition(" | ")
    given = dict(option.split("=") for option in options.split(", ") if option)
    rule = _plain(format(name))
    return Rule(rule.fmt, **({"saturate": rule.saturate} | {key: _VALUES[key](value) for key, value in given.items()}))


_VALUES: dict[str, Any] = {
    "rounding": Rounding,
    "saturate": "True".__eq__,
    "bias": str,
    "stdv": float,
    **dict.fromkeys(("frequency", "pad", "history", "seed", "random_bits", "dim"), int),
}


def plain_format(text: str | None) -> FloatFormat | None:
    """The float format that is all a rule says, None for None; ValueError for any other rule."""
    if text is None:
        return None
    rule = _parse(text)
    if isinstance(rule.fmt, BlockFormat) or rule != _plain(rule.fmt):
        raise ValueError(f"this layer rounds by hand, to float formats as they are: it cannot take {text!r}")
    return rule.fmt


def _require_int(name: str, value: object, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class How(NamedTuple):
    """A rule as the ops take it: arguments of `quantize`, arguments of `adapt`, and which shifts the dtype holds."""

    fields: list[int]
    rounding: int
    saturate: bool
    random_bits: int
    kind: int
    emax: int
    pad: int
    frequency: int
    history: int
    least: int
    most: int
    stdv: float | None
    dim: int | None


def how_of(rule: str, dtype: torch.dtype) -> How:
    """Read a rule for tensors of a dtype; `fields` and `dim` are of a block format, or `dim` is None.

    Raises:
        ValueError: where the dtype cannot hold the format; with a measured bias, whatever that is.
    """
    return _read(_describe(rule, dtype)) if torch.compiler.is_compiling() else _how(rule, dtype)


@lru_cache(maxsize=4096)
def _how(rule: str, dtype: torch.dtype) -> How:
    return _read(_described(rule, dtype))


def _read(text: str) -> How:
    *numbers, stdv, dim = text.split()
    rounding, saturate, random_bits, kind, emax, pad, frequency, history, least, most, *fields = map(int, numbers)
    m, along = None if stdv == "None" else float(stdv), None if dim == "None" else int(dim)
    rest = (kind, emax, pad, frequency, history, least, most, m, along)
    return How(fields, rounding, bool(saturate), random_bits, *rest)


@_ops.constant
def _describe(rule: str, dtype: torch.dtype) -> str:
    return _described(rule, dtype)


@lru_cache(maxsize=4096)
def _described(text: str, dtype: torch.dtype) -> str:
    """A rule's numbers as a string, which `torch.compile` takes as a constant."""
    rule = _parse(text)
    fmt = rule.fmt
    dim: int | None = None
    emax, shifts = 0, (0, 0)
    if isinstance(fmt, BlockFormat):
        block_fields(fmt, dtype)
        dim = rule.dim
    else:
        emax, shifts = fmt.emax, shift_range(fmt, dtype)
        if not rule.is_measured:
            fields_of(fmt, dtype)
    numbers = [rule.rounding.number, int(rule.saturate), rule.random_bits, BIASES.index(rule.bias), emax]
    return " ".join(map(str, [*numbers, rule.pad, rule.frequency, rule.past, *shifts, *fmt.fields, rule.stdv, dim]))


def is_block(rule: str) -> bool:
    """Whether a rule has a block format."""
    return _names_block(rule) if torch.compiler.is_compiling() else _has_block(rule)


@_ops.constant
def _names_block(rule: str) -> bool:
    return _has_block(rule)


@lru_cache(maxsize=1024)
def _has_block(rule: str) -> bool:
    return isinstance(_parse(rule).fmt, BlockFormat)


def next_use(x: Tensor, how: How, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count a call on x in a state: the seed, the offset and the shift that this call rounds with."""
    if state.device != x.device:
        raise ValueError(f"x is on {x.device} and the cast's state on {state.device}: move the cast with .to()")
    rest = (how.kind, how.emax, how.pad, how.stdv, how.frequency, how.history)
    calls, shift, seed = recompute.used(lambda: _ops.adapt(x, state, *rest)).unbind()
    return seed, calls, shift


def draws_of(how: How, seed: Tensor, offset: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Seed and offset where the rounding mode draws, else None."""
    return (seed, offset) if how.rounding == _STOCHASTIC else (None, None)


class Cast(nn.Module):
    """Round tensors to a format whose bias may follow them, one tensor of a network over its calls.

    The gradient passes straight through. What is measured is the exponent of M, the tensor's largest magnitude over
    its finite elements; the bias then makes exponent(M) + pad the exponent of the format's largest value, as far as
    the tensor's dtype holds that. A tensor without a finite nonzero element changes nothing. All of it happens on the
    tensor's device, also in compiled code and in replayed CUDA graphs.

    Args:
        fmt: the format, its string or dtype; a block format has a bias for each block, and takes "static" alone.
        rounding, saturate, random_bits: as for `quantize`.
        bias: "static", the format's own. "dynamic", from each tensor itself. "delayed", from the largest M of the
            `history` calls before; from the tensor itself while there is none. "sampled", from the tensor itself at
            calls 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, ... until they are `frequency` apart, and held
            in between.
        frequency: the most calls from one measurement to the next, for "sampled".
        pad: how far, in binades, the format reaches above M.
        stdv: if given, M = mean |x| + stdv · sqrt(E[x²] - E[|x|]²) instead.
        history: how many calls "delayed" looks back on.
        seed: of stochastic rounding; the number of calls before is its offset. Drawn from torch's default CPU
            generator if None.
        dim: along which a block format's blocks lie.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument out of its range, or a measured bias with a block format; when called, for a dtype
            that cannot hold the format, under a measured bias whatever that is.

    Source: docs/numerics.md, section 4.
    """

    state: Tensor

    def __init__(
        self,
        fmt: FormatLike,
        *,
        rounding: Rounding | str = "nearest_even",
        saturate: bool = True,
        bias: str = "static",
        frequency: int = 1024,
        pad: int = 2,
        stdv: float | None = None,
        history: int = 16,
        seed: int | None = None,
        random_bits: int = 32,
        dim: int = -1,
    ) -> None:
        super().__init__()
        mode = Rounding.of(rounding)
        self.rule = Rule(format(fmt), mode, saturate, bias, frequency, pad, stdv, history, seed, random_bits, dim)
        self._text = str(self.rule)
        if self.rule.has_state:
            recompute.install()
            self.register_buffer("state", new_state([first_seed(self.rule)], self.rule.past)[0])

    def forward(self, x: Tensor) -> Tensor:
        """Values in x's shape, dtype and strides."""
        rule = self.rule
        if not rule.has_state:
            return quantize(x, rule.fmt, rounding=rule.rounding, saturate=rule.saturate, dim=rule.dim)
        require_float("x", x)
        how = how_of(self._text, x.dtype)
        seed, offset, shift = next_use(x.detach(), how, self.state)
        args = (how.rounding, how.saturate, *draws_of(how, seed, offset), how.random_bits)
        if isinstance(rule.fmt, BlockFormat):
            return block.quantize(x, (*block.call_of(str(rule.fmt), x, rule.dim), *args))
        return apply(x, how.fields, *args, shift=shift)

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value now (of a block's elements); reading it waits for the device."""
        fmt = self.rule.fmt
        shift = int(self.state[SHIFT]) if self.rule.is_measured else 0
        return (fmt.element if isinstance(fmt, BlockFormat) else fmt).emax + shift

    @property
    def calls(self) -> int:
        """Calls so far, of a cast that counts them; reading it waits for the device."""
        return int(self.state[CALLS]) if self.rule.has_state else 0

    def extra_repr(self) -> str:
        options = [f"{name}={_plainly(value)}" for name, value in self.rule.options().items()]
        return ", ".join([repr(str(self.rule.fmt)), *options])


def _plainly(value: object) -> str:
    return repr(str(value)) if isinstance(value, str) else repr(value)


def first_seed(rule: Rule) -> int:
    """The seed of a cast as a signed 64-bit word; zero where nothing is drawn."""
    if not rule.draws:
        return 0
    return int(_ops.draw_seed()) if rule.seed is None else (rule.seed + 2**63) % 2**64 - 2**63
