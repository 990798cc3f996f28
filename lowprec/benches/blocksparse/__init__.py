"""How fast are block-sparse products, beside dense ones, the device's limits and peers?"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch

from lowprec.benches import Settings, running
from lowprec.benches.blocksparse import cases, peers, report
from lowprec.benches.blocksparse.cases import Case
from lowprec.benches.blocksparse.check import Checks
from lowprec.benches.blocksparse.limits import measured_limits
from lowprec.benches.blocksparse.targets import beside
from lowprec.studies.kernels.work import SIDES, Operands, Pool
from lowprec.timing import Call, Captured, captured, threads

QUESTION = "How fast are block-sparse products, beside dense ones, the device's limits and peers?"

STEP = 128
"""Widths of the dense layer are multiples of it, so that every block divides every width."""

ROUNDS, QUICK_ROUNDS = 7, 5
BUDGET = {"cpu": 1.0, "cuda": 0.2}
"""Seconds of calls after which a slow row on such a device takes no further part."""

SLOW = 0.1
"""Seconds of a call on a GPU above which a row fails: a kernel is missing, and the eager twin would take minutes."""

ABSENT = (NotImplementedError, ImportError)
"""What a row raises for something that this build or device does not have; it is said, and is no failure."""


Run = dict[str, Any]


def run(settings: Settings) -> Run:
    """Time the rows on every device that is wanted and there, and write record, tables and picture."""
    ours = cases.ours()
    theirs, found = peers.theirs(ours)
    every = [case for case in (*ours, *theirs) if case.essential or not settings.quick]
    chosen = running.wanted(every, settings.only, ())
    wanted = running.wanted(every, settings.only, beside(chosen))
    settings.out.mkdir(parents=True, exist_ok=True)
    runs = [run for device in running.devices(settings) for run in _runs(settings, device, wanted)]
    record = running.record_of("blocksparse", found, runs, {case.name for case in ours})
    report.write(record, settings.out)
    return record


show = report.show


def _runs(settings: Settings, device: torch.device, wanted: list[Case]) -> list[Run]:
    """One run for a GPU; on the CPU one with a single thread and one with all."""
    pool, checks = Pool(device), Checks(device)
    runs = {count: _begin(settings, device, count) for count in running.thread_counts(device)}
    for what, rows in _groups(case for case in wanted if device.type in case.devices):
        start = partial(_start, side=_side(settings, device), pool=pool, graphs=_shared_memory(device))
        calls, failed, missing = _prepare(rows, checks, start)
        for run in runs.values():
            run["failed"] |= failed
            run["missing"] |= missing
        try:
            _time(settings, device, what, [case for case in rows if case.name in calls], calls, runs)
        except RuntimeError as error:  # of the device: what was timed before is kept
            for run in runs.values():
                run["failed"] |= dict.fromkeys(calls, running.line_of(error))
    return [running.machine(device, count) | run for count, run in runs.items()]


def _begin(settings: Settings, device: torch.device, count: int) -> Run:
    """A run without rows."""
    with threads(count):
        found = measured_limits(device)
    return {"side": _side(settings, device), "limits": found, "failed": {}, "missing": {}, "rows": []}


def _time(
    settings: Settings, device: torch.device, what: str, rows: list[Case], calls: dict[str, Call], runs: dict[int, Run]
) -> None:
    """Time rows beside each other, with each number of threads, into its run."""
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    graphs = {name for name, call in calls.items() if isinstance(call, Captured)}
    for count, seconds in running.by_threads(settings, device, calls, rounds, BUDGET[device.type], what):
        run = runs[count]
        run["rows"] += report.rows(rows, seconds, graphs, run | {"device": str(device)})


def _shared_memory(device: torch.device) -> Any:
    """What the graphs of a group share."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def _side(settings: Settings, device: torch.device) -> int:
    """The width of the dense layer."""
    if settings.elements is None:
        return SIDES[device.type]
    return max(round(math.sqrt(settings.elements) / STEP), 1) * STEP


def _groups(wanted: Iterable[Case]) -> Iterator[tuple[str, list[Case]]]:
    """Rows of one density and number of tokens, ours first: what others do to the device comes after."""

    def key(case: Case) -> tuple[float, int]:
        return case.work.widening, case.work.tokens

    for (_, tokens), group in groupby(sorted(wanted, key=key), key):
        rows = sorted(group, key=lambda case: case.by != "lowprec")
        yield f"{rows[0].work.density}, N={tokens}", rows


def _prepare(
    rows: list[Case], checks: Checks, start: Callable[[Case], Call]
) -> tuple[dict[str, Call], dict[str, str], dict[str, str]]:
    """The calls that can be timed, which of the others are wrong, and which are not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peers: torch's BSR is beta, its kernels are not tuned for these sizes
        return running.prepare(rows, checks, start, ABSENT)


def _start(case: Case, side: int, pool: Pool, graphs: Any = None) -> Call:
    """A row's call, on a GPU in a graph; as it is where it cannot be captured."""
    call = case.make(Operands(case.work, case.work.layout(side), pool))
    call(0)
    if pool.device.type == "cuda":
        _require_quick(call, pool.device)
    with suppress(RuntimeError):
        call = captured(call, pool.device, graphs)
    return call


def _require_quick(call: Call, device: torch.device) -> None:
    """TimeoutError for a call that takes too long when it is not the first."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call(1)
    torch.cuda.synchronize(device)
    if (seconds := time.perf_counter() - begin) > SLOW:
        raise TimeoutError(f"a call takes {seconds:.2g} s: left out")
