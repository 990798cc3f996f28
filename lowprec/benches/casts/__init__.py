"""How fast are the casts, beside the device's own copy and beside peers? Run it by `lowprec bench casts`."""

from __future__ import annotations

from typing import Any

import torch

from lowprec.benches import Settings, running
from lowprec.benches.casts import cases, peers, report
from lowprec.benches.casts.buffers import Buffers
from lowprec.benches.casts.cases import BFLOAT16, FLOAT32, Case
from lowprec.benches.twin import EagerTwin, assert_same
from lowprec.timing import Call

QUESTION = "How fast are the casts, beside the device's own copy and beside peers?"

ELEMENTS = {"cpu": (1 << 24, 1 << 20), "cuda": (1 << 28, 1 << 26)}
"""Elements of a tensor, in full and with `quick`."""

ROUNDS, QUICK_ROUNDS = 25, 5
BUDGET = {"cpu": 8.0, "cuda": 0.5}
"""Seconds of calls after which a slow row on such a device takes no further part."""

SAMPLE = 1 << 16
"""Elements on which each row of ours is compared with the eager twin before it is timed."""


def run(settings: Settings) -> dict[str, Any]:
    """Time the rows on every device that is wanted and there, and write record, tables and picture."""
    theirs, found = peers.theirs()
    every = [*theirs, *cases.ours()]
    base = {name(dtype) for name in (peers.copy_name, peers.cast_name) for dtype in (FLOAT32, BFLOAT16)}
    wanted = running.wanted(every, settings.only, base)
    settings.out.mkdir(parents=True, exist_ok=True)
    runs = [run for device in running.devices(settings) for run in _runs(settings, device, wanted)]
    record = running.record_of("casts", found, runs, {case.name for case in every if case.by == "lowprec"})
    report.write(record, settings.out)
    return record


show = report.show


def _runs(settings: Settings, device: torch.device, wanted: list[Case]) -> list[dict[str, Any]]:
    """One run for a GPU; on the CPU one with a single thread and one with all."""
    here = [case for case in wanted if device.type in case.devices]
    buffers = Buffers(device, settings.elements or ELEMENTS[device.type][settings.quick])
    calls, failed = _prepare(here, buffers)
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    results = []
    for count, seconds in running.by_threads(settings, device, calls, rounds, BUDGET[device.type]):
        run = running.machine(device, count) | {"elements": buffers.elements, "failed": failed}
        run["rows"] = report.rows([case for case in here if case.name in calls], seconds, run)
        results.append(run)
    return results


def _prepare(here: list[Case], buffers: Buffers) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that can be timed, and why the others cannot: a wrong result, or whatever they raise."""
    calls, failed, _ = running.prepare(here, lambda case: _check(case, buffers.device), lambda case: case.make(buffers))
    return calls, failed


def _check(case: Case, device: torch.device) -> None:
    """Hold a row of ours to the eager twin on a sample; AssertionError names the first difference."""
    if case.by == "lowprec":
        with EagerTwin():
            expected = case.make(Buffers(device, SAMPLE))(0)
        assert_same(case.make(Buffers(device, SAMPLE))(0), expected, "wrong result")
