"""What the scores say: each arm against the dense net, each learned pattern against its start, with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lowprec.studies.intervals import equality, mean, plain, text
from lowprec.studies.record import Json
from lowprec.studies.regression import Interval
from lowprec.studies.residual.config import FULL, Arm, Config


class Equality(NamedTuple):
    """An arm against the base: the difference with its 95% interval and its 90% one, p of two one-sided tests."""

    arm: str
    difference: Interval
    within: Interval
    p: float


class Gain(NamedTuple):
    """One arm against another: differences with their 95% intervals, of the score and of bits."""

    arm: str
    other: str
    score: Interval
    bits: Interval


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
    def unit(self) -> str:
        return "points of error" if self.config.on_digits else "bits per character"

    @property
    def form(self) -> str:
        """How a score is written."""
        return ".2f" if self.config.on_digits else ".4f"

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
        for arm in self.config.arms[1:]:
            differences = self.differences(arm, self.base, self.score)
            found.append(Equality(arm, mean(differences), *equality(differences, self.config.margin)))
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
        return Gain(arm, other, *(mean(self.differences(arm, other, key)) for key in (self.score, "bits")))


# In words.


def findings(summary: Summary) -> list[str]:
    """The conclusions, each with its interval."""
    if summary.config.seeds < 2:
        return ["One seed alone has no interval: nothing can be concluded."]
    lines = [_against_base(summary, each) for each in summary.equalities()]
    lines += [_learned(summary, gain) for gain in summary.learned()]
    return [*lines, *(_format(summary, gain) for gain in summary.formats())]


def _against_base(summary: Summary, found: Equality) -> str:
    margin, form = summary.config.margin, f"+{summary.form}"
    shown = "shown" if found.p < 0.05 else "not shown"
    verdict = _verdict(found.difference, "it is better", "it is worse")
    return (
        f"{found.arm} less {summary.base}: {text(found.difference, form)} {summary.unit}; {verdict}; equality within "
        f"±{margin:g} is {shown} (90%: {found.within.low:{form}} to {found.within.high:{form}}, p = {found.p:.2g})."
    )


def _learned(summary: Summary, gain: Gain) -> str:
    verdict = _verdict(gain.score, "learning is better", "learning is worse")
    return f"{gain.arm} less its fixed start: {_both(summary, gain)}; {verdict}."


def _format(summary: Summary, gain: Gain) -> str:
    verdict = _verdict(gain.score, "it is better", "that is its cost")
    return f"{gain.arm} less {gain.other}: {_both(summary, gain)}; {verdict}."


def _both(summary: Summary, gain: Gain) -> str:
    score = f"{text(gain.score, f'+{summary.form}')} {summary.unit}"
    return score if summary.score == "bits" else f"{score}, {text(gain.bits, '+.4f')} bits"


def _verdict(effect: Interval, below: str, above: str) -> str:
    return below if effect.high < 0 else above if effect.low > 0 else "no difference is shown"


# On disk.


def as_json(summary: Summary) -> Json:
    """What follows from the nets' scores, for results.json; these are in results.csv."""
    equalities = [
        {"arm": each.arm, "against": summary.base, "difference": plain(each.difference), "within": plain(each.within)}
        | {"margin": summary.config.margin, "p_equal": each.p}
        for each in summary.equalities()
    ]
    gains = [
        {"arm": gain.arm, "against": gain.other, summary.score: plain(gain.score), "bits": plain(gain.bits)}
        for gain in [*summary.learned(), *summary.formats()]
    ]
    return {"score": summary.score, "findings": findings(summary), "equalities": equalities, "gains": gains}
