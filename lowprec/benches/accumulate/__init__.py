"""How fast are sums and products under an accumulator, beside the device's limits and peers?"""

from __future__ import annotations

from typing import Any

import torch

from lowprec.benches import Settings, running
from lowprec.benches.accumulate import cases, peers, report
from lowprec.benches.accumulate.cases import Case
from lowprec.benches.accumulate.floor import issue_rate
from lowprec.benches.accumulate.operands import Operands, Size
from lowprec.benches.twin import EagerTwin, assert_same
from lowprec.timing import Call

QUESTION = "How fast are sums and products under an accumulator, beside the device's limits and peers?"

SIZES = {"cpu": (Size(512, 512, 512), Size(128, 128, 128)), "cuda": (Size(4096, 4096, 4096), Size(1024, 1024, 1024))}
"""Rows, columns and terms of a product, in full and with `quick`."""

ROUNDS, QUICK_ROUNDS = 11, 3
BUDGET = {"cpu": 4.0, "cuda": 0.4}
"""Seconds of calls after which a slow row on such a device takes no further part."""

SAMPLE = Size(33, 40, 70)
"""On which each row of ours is compared with the eager twin before it is timed."""

ABSENT = (NotImplementedError, ValueError, TypeError)
"""What a row raises for something that this build or device does not have; it is said, and is no failure."""


def run(settings: Settings) -> dict[str, Any]:
    """Time the rows on every device that is wanted and there, and write record, tables and picture."""
    theirs, found = running.theirs(list(peers.torchs()), peers.PEERS)
    every = [*theirs, *cases.ours()]
    wanted = running.wanted(every, settings.only, {peers.DENSE})
    settings.out.mkdir(parents=True, exist_ok=True)
    runs = [run for device in running.devices(settings) for run in _runs(settings, device, wanted)]
    record = running.record_of("accumulate", found, runs, {case.name for case in every if case.by == "lowprec"})
    report.write(record, settings.out)
    return record


show = report.show


def _runs(settings: Settings, device: torch.device, wanted: list[Case]) -> list[dict[str, Any]]:
    """One run for a GPU; on the CPU one with a single thread and one with all."""
    here = [case for case in wanted if device.type in case.devices]
    size = _size(settings, device)
    calls, failed, missing = _prepare(here, Operands(device, size))
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    results = []
    for count, seconds in running.by_threads(settings, device, calls, rounds, BUDGET[device.type]):
        run = running.machine(device, count) | {
            "size": list(size),
            "issue_rate": issue_rate(device),
            "failed": failed,
            "missing": missing,
        }
        run["rows"] = report.rows([case for case in here if case.name in calls], seconds, run)
        results.append(run)
    return results


def _size(settings: Settings, device: torch.device) -> Size:
    if settings.elements is None:
        return SIZES[device.type][settings.quick]
    edge = max(round(settings.elements**0.5), 1)
    return Size(edge, edge, edge)


def _prepare(here: list[Case], operands: Operands) -> tuple[dict[str, Call], dict[str, str], dict[str, str]]:
    """The calls that can be timed, which of the others are wrong, and which are not there."""
    return running.prepare(
        here, lambda case: _check(case, operands.device), lambda case: case.make(operands.smaller(case.shrink)), ABSENT
    )


def _check(case: Case, device: torch.device) -> None:
    """Hold a row of ours to the eager twin on a sample; AssertionError names the first difference."""
    if case.by == "lowprec" and case.has_twin:
        with EagerTwin():
            expected = case.make(Operands(device, SAMPLE))(0)
        assert_same(case.make(Operands(device, SAMPLE))(0), expected, "wrong result")
