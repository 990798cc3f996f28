"""Policies: which format each role of a product takes, how its sums are formed, and where another policy takes over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from lowprec.accumulator import LEAVES, Accumulator
from lowprec.bias import Cast, Rule, plain_format
from lowprec.cast import FormatLike
from lowprec.formats import BlockFormat, FloatFormat, format

ROLES = ("activation", "weight", "activation_grad", "weight_grad")
"""The four roles of a product y = a · b, in the order that counters know them by."""

RoleLike = FormatLike | BlockFormat | Cast
"""What a role takes: a format in any form, or a cast as the template of one for every tensor of that role."""

AccumulatorLike = Accumulator | str
Three = tuple[Accumulator | None, Accumulator | None, Accumulator | None]
"""The accumulators of a product, of the gradients of its activations, and of that of its weight."""


class Formats(NamedTuple):
    """The rule of each role as its string, which is the format's where that says all; None for full precision.

    That is what traced code may read.
    """

    activation: str | None
    weight: str | None
    activation_grad: str | None
    weight_grad: str | None


class Accumulators(NamedTuple):
    """How sums are formed, as strings; None for torch's own way. Likewise.

    `forward`, `input_grad` and `weight_grad` are of products: of y, of the gradients of operands that are not learnt,
    and of those that are. `reduction` is of all other sums.
    """

    forward: str | None = None
    input_grad: str | None = None
    weight_grad: str | None = None
    reduction: str | None = None

    @property
    def of_products(self) -> bool:
        """Whether any sum of a product is formed by an accumulator."""
        return self.forward is not None or self.input_grad is not None or self.weight_grad is not None


TORCHS_SUMS = Accumulators()
"""All sums formed torch's own way."""


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Policy:
    """A format, or None for full precision, for each role of every product y = a · b (+ bias) in a model.

    In the place of a format, a `Cast` says more about how to round, and is a template: every tensor that takes the role
    gets a state of its own. Frozen, hashable and picklable; equal by value, the order of `overrides` included.

    Args:
        activation: operands that are not learnt.
        weight: the weight of linear, convolution and embedding, or any parameter or view of one.
        activation_grad: the gradient dY, rounded once, as the operand of both backward products.
        weight_grad: dW once formed, and the bias gradient, which sums the rounded dY.
        accumulator: how products sum up their terms, an `Accumulator` or its string; or three of them, each of which
            may be None: for y, for the gradients of activations, and for those of weights. None is torch's own way.
        overrides: other policies for parts of the model: patterns (fnmatch) on module paths, each with a policy, the
            name of a recipe, or None for full precision. The first pattern that matches a module, or one above it,
            replaces the whole policy there. `layer.*` covers `layer` itself too.
        reduction: how all other sums are formed: those of normalisations, softmax, `sum` and `mean`, and the gradients
            of biases (docs/wrap.md). An accumulator of terms or an exact one.

    Raises:
        ValueError: for an unknown format, accumulator or recipe, overrides inside an override, or a `reduction` that
            only products have.
        TypeError: for arguments of a wrong type.
    """

    activation: FloatFormat | BlockFormat | Cast | None
    weight: FloatFormat | BlockFormat | Cast | None
    activation_grad: FloatFormat | BlockFormat | Cast | None
    weight_grad: FloatFormat | BlockFormat | Cast | None
    accumulator: Accumulator | Three | None
    overrides: Mapping[str, Policy | None]
    reduction: Accumulator | None

    def __init__(
        self,
        activation: RoleLike | None = None,
        weight: RoleLike | None = None,
        activation_grad: RoleLike | None = None,
        weight_grad: RoleLike | None = None,
        accumulator: AccumulatorLike | Sequence[AccumulatorLike | None] | None = None,
        overrides: Mapping[str, Policy | str | None] = MappingProxyType({}),
        *,
        reduction: AccumulatorLike | None = None,
    ) -> None:
        given = (activation, weight, activation_grad, weight_grad)
        for name, value in zip(ROLES, given, strict=True):
            object.__setattr__(self, name, _role(name, value))
        object.__setattr__(self, "accumulator", _accumulator(accumulator))
        object.__setattr__(self, "overrides", MappingProxyType(dict(_overrides(overrides))))
        object.__setattr__(self, "reduction", _reduction(reduction))

    @staticmethod
    def recipe(name: str) -> Policy:
        """A ready policy by its name in `lowprec.recipes`; ValueError lists the names."""
        if name not in recipes:
            raise ValueError(f"recipe must be one of {', '.join(recipes)}, got {name!r}")
        return recipes[name]

    @property
    def formats(self) -> Formats:
        """The four roles as strings."""
        return Formats(*(None if value is None else str(Rule.of(value)) for value in self._roles))

    @property
    def accumulators(self) -> Accumulators:
        """The accumulators of products and of other sums as strings."""
        of_products = self.accumulator if isinstance(self.accumulator, tuple) else (self.accumulator,) * 3
        return Accumulators(*(None if each is None else str(each) for each in (*of_products, self.reduction)))

    @property
    def float_formats(self) -> tuple[FloatFormat | None, ...]:
        """The four roles for code that rounds by hand, to float formats and nearest even.

        Raises:
            ValueError: for a role that is a block format or a cast.
        """
        return tuple(plain_format(rule) for rule in self.formats)

    @property
    def is_empty(self) -> bool:
        """Whether every role is in full precision and every sum torch's own, overrides apart."""
        return all(value is None for value in (*self._roles, self.accumulator, self.reduction))

    def for_module(self, path: str) -> Policy | None:
        """The policy in force in the module at a path: the first override that covers it, else this one."""
        pattern = self.pattern_for(path)
        return self if pattern is None else self.overrides[pattern]

    def pattern_for(self, path: str) -> str | None:
        """The first pattern of the overrides that matches a module's path or one above it."""
        return next((pattern for pattern in self.overrides if matches(pattern, path)), None)

    @property
    def _roles(self) -> tuple[FloatFormat | BlockFormat | Cast | None, ...]:
        return self.activation, self.weight, self.activation_grad, self.weight_grad

    def _key(self) -> tuple[Any, ...]:
        return *self.formats, *self.accumulators, *self.overrides.items()

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Policy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        given = {name: value for name, value in zip(ROLES, self._roles, strict=True) if value is not None}
        named = [f"{name}={value if isinstance(value, Cast) else str(value)!r}" for name, value in given.items()]
        if self.accumulator is not None:
            three = isinstance(self.accumulator, tuple)
            named.append(f"accumulator={tuple(self.accumulators[:3]) if three else str(self.accumulator)!r}")
        if self.overrides:
            named.append(f"overrides={dict(self.overrides)}")
        if self.reduction is not None:
            named.append(f"reduction={str(self.reduction)!r}")
        return f"Policy({', '.join(named)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (*self._roles, self.accumulator, dict(self.overrides), self.reduction)


def _restored(*given: Any) -> Policy:
    """A pickled policy."""
    *positional, reduction = given
    return Policy(*positional, reduction=reduction)


def matches(pattern: str, path: str) -> bool:
    """Whether an override's pattern covers a module's path: it matches the path itself or that of a module above."""
    stem = pattern.removesuffix(".*")
    return any(fnmatchcase(above, pattern) or fnmatchcase(above, stem) for above in and_above(path))


def and_above(path: str) -> Iterator[str]:
    """A module's path and those of the modules around it, the model's own "" included."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield path


def as_policy(name: str, value: object) -> Policy:
    """A policy, given as one or as the name of a recipe."""
    if isinstance(value, str):
        return Policy.recipe(value)
    if not isinstance(value, Policy):
        raise TypeError(f"{name} must be a Policy or the name of a recipe, got {type(value).__name__}")
    return value


def _role(name: str, value: RoleLike | None) -> FloatFormat | BlockFormat | Cast | None:
    try:
        return value if value is None or isinstance(value, Cast) else format(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _accumulator(given: AccumulatorLike | Sequence[AccumulatorLike | None] | None) -> Accumulator | Three | None:
    """One for all three products where they share it, None if none has one."""
    if given is None or isinstance(given, str | Accumulator):
        return None if given is None else Accumulator.parse(given)
    if not isinstance(given, list | tuple):
        raise TypeError(
            "accumulator must be an Accumulator, its string, three of them (for the result, for the gradients of "
            f"activations and for those of weights) or None, got {type(given).__name__}"
        )
    if len(given) != 3:
        raise ValueError(
            "accumulator must be one or three: for the result, for the gradients of activations and for those of "
            f"weights; got {len(given)}"
        )
    forward, input_grad, weight_grad = (None if each is None else Accumulator.parse(each) for each in given)
    return forward if forward == input_grad == weight_grad else (forward, input_grad, weight_grad)


def _reduction(given: AccumulatorLike | None) -> Accumulator | None:
    if given is None:
        return None
    parsed = Accumulator.parse(given)
    if parsed.leaf not in LEAVES[:2] or parsed.product is not None:
        raise ValueError(f"reduction must sum terms as they are, or exactly; {given} is for products alone")
    return parsed


def _overrides(given: Mapping[str, Policy | str | None]) -> Iterator[tuple[str, Policy | None]]:
    if not isinstance(given, Mapping):
        raise TypeError(f"overrides must be a mapping from patterns to policies, got {type(given).__name__}")
    for pattern, value in given.items():
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern of overrides must be a string, got {pattern!r}")
        policy = None if value is None else as_policy(f"overrides[{pattern!r}]", value)
        if policy is not None and policy.overrides:
            raise ValueError(f"overrides[{pattern!r}] has overrides of its own: give them to the outer policy")
        yield pattern, policy


def _recipes() -> Iterator[tuple[str, Policy]]:
    def sampled(fmt: str) -> Cast:
        return Cast(fmt, bias="sampled")

    forward, backward = "1-4-3:emax=8", "1-5-2:emax=1"
    yield "bf16", Policy("bf16", "bf16", "bf16", "bf16")
    yield "fp8", Policy(forward, forward, backward, backward)
    yield "fp8-forward", Policy(forward, forward)
    yield "fp8-sampled", Policy(sampled(forward), sampled(forward), sampled(backward), sampled(backward))
    yield "mxfp8", Policy("mxfp8_e4m3", "mxfp8_e4m3", "mxfp8_e5m2")
    yield "nvfp4", Policy("nvfp4", "nvfp4", Cast("nvfp4", rounding="stochastic"))


with torch.random.fork_rng(devices=[]):  # a template draws a seed of its own, which is not to be missed elsewhere
    recipes: Mapping[str, Policy] = MappingProxyType(dict(_recipes()))
"""Ready policies by name. "bf16": every role, overflowing to infinity. "fp8": 1-4-3 forward up to 2^8, 1-5-2 gradients
up to 2^1, saturating. "fp8-forward": the same forward, with a backward pass in full precision. "fp8-sampled": as "fp8",
every tensor's bias measured on the schedule of 2017. "mxfp8": e4m3 forward and e5m2 gradients in blocks of 32 along
each product's contraction. "nvfp4": e2m1 in blocks of 16, dY rounded stochastically, as in NVIDIA's recipe of 2025."""
