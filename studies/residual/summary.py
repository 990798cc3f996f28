"""What the scores say: each arm against the dense net, each learned pattern against its start, with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lowprec.studies.intervals import below, equality, mean, plain, text
from lowprec.studies.record import Json
from lowprec.studies.regression import Interval
from lowprec.studies.residual.config import FULL, Arm, Config

UNITS = {
    True: {"error": "points of error", "clean": "points of error without noise", "bits": "bits"},
    False: {"bits": "bits per character"},
}
"""What differences of each number are measured in, on digits and on text; less is better."""


class Equality(NamedTuple):
    """An arm against the base: the difference with its 95% interval and its 90% one; p of the two one-sided tests.

    p: of both, that they are equal within the margin; p_no_worse: of one, that the arm is no worse by the margin.
    """

    arm: str
    key: str
    difference: Interval
    within: Interval
    p: float
    p_no_worse: float


class Gain(NamedTuple):
    """One arm against another: differences with their 95% intervals, by what is measured; the first is the score."""

    arm: str
    other: str
    by: dict[str, Interval]


@dataclass(frozen=True)
class Summary:
    """Every arm's nets, one for each seed. Differences are of equal seeds, which see the same batches."""

    config: Config
    cells: list[Json]

    @property
    def score(self) -> str:
        """What arms are compared by; less is better."""
        return "error" if self.config.on_digits else "bits"

    @property
    def accuracies(self) -> tuple[str, ...]:
        """What equality is tested in."""
        return ("error", "clean") if self.config.on_digits else ("bits",)

    def unit(self, key: str) -> str:
        return UNITS[self.config.on_digits][key]

    @property
    def base(self) -> str:
        return self.config.arms[0]

    def nets(self, arm: str) -> list[Json]:
        return list(next(cell for cell in self.cells if cell["arm"] == arm)["seeds"])

    def of(self, arm: str, key: str) -> list[float]:
        """One number of each seed's net."""
        return [net[key] for net in self.nets(arm)]

    def mean(self, arm: str, key: str) -> Interval:
        return mean(self.of(arm, key))

    def curve(self, arm: str, key: str) -> tuple[list[int], list[Interval]]:
        """Updates, and the means of a number then."""
        points = list(zip(*(net["curve"] for net in self.nets(arm)), strict=True))
        return [nets[0]["update"] for nets in points], [mean([net[key] for net in nets]) for nets in points]

    def differences(self, arm: str, other: str, key: str) -> list[float]:
        return [a - b for a, b in zip(self.of(arm, key), self.of(other, key), strict=True)]

    def equalities(self) -> list[Equality]:
        """Every arm but the base."""
        found = []
        for key in self.accuracies:
            for arm in self.config.arms[1:]:
                differences = self.differences(arm, self.base, key)
                within, p = equality(differences, self.config.margin)
                worse = below(differences, self.config.margin)
                found.append(Equality(arm, key, mean(differences), within, p, worse))
        return found

    def learned(self) -> list[Gain]:
        """Every learned pattern against its start."""
        return [self._gain(name, str(arm._replace(learned=False))) for name, arm in self._arms() if arm.learned]

    def formats(self) -> list[Gain]:
        """Every arm in another format against the same in full precision."""
        return [self._gain(name, str(arm._replace(format=FULL))) for name, arm in self._arms() if arm.format != FULL]

    def _arms(self) -> Iterator[tuple[str, Arm]]:
        """Arms whose fixed pattern and full precision are there to be compared with."""
        for name in self.config.arms:
            arm = Arm.parse(name)
            others = {str(arm._replace(learned=False)), str(arm._replace(format=FULL))}
            if others <= set(self.config.arms):
                yield name, arm

    def _gain(self, arm: str, other: str) -> Gain:
        by = {key: mean(self.differences(arm, other, key)) for key in (self.score, "bits")}
        return Gain(arm, other, by)


# In words.

FORMS = {"error": ".2f", "clean": ".2f", "bits": ".4f"}
"""How each number is written."""


def findings(summary: Summary) -> list[str]:
    """The conclusions, each with its interval."""
    if summary.config.seeds < 2:
        return ["One seed alone has no interval: nothing can be concluded."]
    lines = [_against_base(summary, each) for each in summary.equalities()]
    lines += [_learned(summary, gain) for gain in summary.learned()]
    return [*lines, *(_format(summary, gain) for gain in summary.formats())]


def _against_base(summary: Summary, found: Equality) -> str:
    margin, form = summary.config.margin, f"+{FORMS[found.key]}"
    shown = "shown" if found.p < 0.05 else "not shown"
    verdict = _verdict(found.difference, "it is better", "it is worse")
    difference = f"{text(found.difference, form)} {summary.unit(found.key)}"
    within = f"90%: {found.within.low:{form}} to {found.within.high:{form}}, p = {found.p:.2g}"
    line = (
        f"{found.arm} less {summary.base}: {difference}; {verdict}; equality within ±{margin:g} is {shown} ({within})"
    )
    no_worse = f", that it is no worse by {margin:g} is shown (p = {found.p_no_worse:.2g})"
    return line + (no_worse if found.p_no_worse < 0.05 <= found.p else "") + "."


def _learned(summary: Summary, gain: Gain) -> str:
    return f"{gain.arm} less its fixed start: {_each(summary, gain, 'learning is better', 'learning is worse')}."


def _format(summary: Summary, gain: Gain) -> str:
    return f"{gain.arm} less {gain.other}: {_each(summary, gain, 'it is better', 'that is its cost')}."


def _each(summary: Summary, gain: Gain, below: str, above: str) -> str:
    """Each measure with a verdict of its own."""
    return "; ".join(
        f"{text(effect, f'+{FORMS[key]}')} {summary.unit(key)}: {_verdict(effect, below, above)}"
        for key, effect in gain.by.items()
    )


def _verdict(effect: Interval, below: str, above: str) -> str:
    return below if effect.high < 0 else above if effect.low > 0 else "no difference is shown"


# On disk.


def as_json(summary: Summary) -> Json:
    """What follows from the nets' scores, for results.json; these are in results.csv."""
    equalities = [
        {"arm": each.arm, "against": summary.base, "of": each.key, "difference": plain(each.difference)}
        | {"within": plain(each.within), "margin": summary.config.margin, "p_equal": each.p}
        | {"p_no_worse": each.p_no_worse}
        for each in summary.equalities()
    ]
    gains = [
        {"arm": gain.arm, "against": gain.other} | {key: plain(effect) for key, effect in gain.by.items()}
        for gain in [*summary.learned(), *summary.formats()]
    ]
    return {"score": summary.score, "findings": findings(summary), "equalities": equalities, "gains": gains}
