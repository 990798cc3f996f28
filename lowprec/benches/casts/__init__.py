"""How fast are the casts, beside the device's own copy and beside peers? Run it by `lowprec bench casts`."""

from __future__ import annotations

import os
import platform
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import lowprec
from lowprec.benches import Settings
from lowprec.benches.casts import cases, peers, report
from lowprec.benches.casts.buffers import Buffers
from lowprec.benches.casts.cases import BFLOAT16, FLOAT32, Case
from lowprec.benches.timing import Call, clocks, threads, time_in_rounds
from lowprec.benches.twin import EagerTwin, assert_same
from lowprec.studies.record import commit, device_name

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
    wanted = _wanted(every, settings.only)
    settings.out.mkdir(parents=True, exist_ok=True)
    runs = [run for device in _devices(settings) for run in _runs(settings, device, wanted)]
    ours = {case.name for case in every if case.by == "lowprec"}
    record: dict[str, Any] = {
        "bench": "casts",
        "lowprec": lowprec.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": lowprec._ops.libraries,
        "peers": found,
        "ok": not any(ours & set(run["failed"]) for run in runs),
        "runs": runs,
    }
    report.write(record, settings.out)
    return record


show = report.show


def _wanted(every: list[Case], only: str) -> list[Case]:
    """The rows that a pattern names, and those that others are measured by."""
    chosen = {case.name for case in every if fnmatchcase(case.name, only) or only in case.name}
    if not chosen:
        raise ValueError(f"no row matches {only!r}; there are {'; '.join(case.name for case in every)}")
    base = {name(dtype) for name in (peers.copy_name, peers.cast_name) for dtype in (FLOAT32, BFLOAT16)}
    return [case for case in every if case.name in chosen | base]


def _devices(settings: Settings) -> list[torch.device]:
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [
        *([torch.device("cpu")] if "cpu" in settings.devices else []),
        *(cuda if "cuda" in settings.devices else []),
    ]


def _runs(settings: Settings, device: torch.device, wanted: list[Case]) -> list[dict[str, Any]]:
    """One run for a GPU; on the CPU one with a single thread and one with all."""
    here = [case for case in wanted if device.type in case.devices]
    elements = settings.elements or ELEMENTS[device.type][settings.quick]
    buffers = Buffers(device, elements)
    calls, failed = _prepare(here, buffers)
    counts = sorted({1, torch.get_num_threads()}) if device.type == "cpu" else [torch.get_num_threads()]
    results = []
    for count in counts:
        with threads(count):
            seconds = _timed(settings, device, calls, f"{device}, {count} threads" if len(counts) > 1 else str(device))
        run = {
            "device": str(device),
            "name": device_name(device),
            "threads": count,
            "elements": buffers.elements,
            "clocks": clocks(device),
            "load": list(os.getloadavg()),
            "failed": failed,
        }
        run["rows"] = report.rows([case for case in here if case.name in calls], seconds, run)
        results.append(run)
    return results


def _timed(settings: Settings, device: torch.device, calls: dict[str, Call], what: str) -> dict[str, Any]:
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[row]}"))
    with Progress(*columns, console=settings.console, transient=True, disable=settings.console is None) as progress:
        task = progress.add_task(what, total=len(calls) * (rounds + 1), row="")
        return time_in_rounds(
            calls, device, rounds, BUDGET[device.type], lambda name: progress.update(task, advance=1, row=name)
        )


def _prepare(here: list[Case], buffers: Buffers) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that can be timed, and why the others cannot: a wrong result, or whatever they raise."""
    calls, failed = {}, {}
    for case in here:
        try:
            _check(case, buffers.device)
            call = case.make(buffers)
            call(0)
        except Exception as error:  # no row may take the others with it
            failed[case.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            calls[case.name] = call
    return calls, failed


def _check(case: Case, device: torch.device) -> None:
    """Hold a row of ours to the eager twin on a sample; AssertionError names the first difference."""
    if case.by == "lowprec":
        with EagerTwin():
            expected = case.make(Buffers(device, SAMPLE))(0)
        assert_same(case.make(Buffers(device, SAMPLE))(0), expected, "wrong result")
