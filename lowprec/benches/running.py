"""What the benches share: which rows are wanted, on which devices, held to the twin, timed beside each other."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any, Protocol, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import lowprec
from lowprec.benches import Settings
from lowprec.studies.record import commit, device_name
from lowprec.timing import Call, Seconds, clocks, threads, time_in_rounds


class Row(Protocol):
    """What every row of a bench has: a name of its own, and whose code it is."""

    @property
    def name(self) -> str: ...
    @property
    def by(self) -> str: ...


AnyRow = TypeVar("AnyRow", bound=Row)

NAMED = 60
"""Rows that an error names, at most."""

Peers = dict[str, tuple[str, Callable[[], Iterator[Any]]]]
"""By name: the package that has the version, and the rows, whose making imports it."""


def theirs(cases: list[AnyRow], peers: Peers) -> tuple[list[AnyRow], dict[str, str]]:
    """Torch's rows and those of peers that can be imported, and of each the version, or why it is not there."""
    cases, found = list(cases), {"torch": str(torch.__version__)}
    for name, (package, rows) in peers.items():
        try:
            cases += list(rows())
            found[name] = _version(package)
        except ImportError as error:
            found[name] = f"not installed ({error})" if isinstance(error, ModuleNotFoundError) else f"fails: {error}"
        except Exception as error:  # a peer that breaks when it is imported must not take the bench with it
            found[name] = f"fails: {line_of(error)}"
    return cases, found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed"


def wanted(every: Sequence[AnyRow], only: str, always: Iterable[str]) -> list[AnyRow]:
    """The rows that a pattern names, and those that others are measured by."""
    chosen = {case.name for case in every if fnmatchcase(case.name, only) or only in case.name}
    if not chosen:
        names = [case.name for case in every]
        more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
        raise ValueError(f"no row matches {only!r}; there are {'; '.join([*names[:NAMED], *more])}")
    return [case for case in every if case.name in chosen.union(always)]


def devices(settings: Settings) -> list[torch.device]:
    """Those that are wanted and there."""
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [
        *([torch.device("cpu")] if "cpu" in settings.devices else []),
        *(cuda if "cuda" in settings.devices else []),
    ]


def thread_counts(device: torch.device) -> list[int]:
    """One and all on the CPU."""
    return sorted({1, torch.get_num_threads()}) if device.type == "cpu" else [torch.get_num_threads()]


def prepare(
    cases: Iterable[AnyRow],
    check: Callable[[AnyRow], None],
    start: Callable[[AnyRow], Call],
    absent: tuple[type[Exception], ...] = (),
) -> tuple[dict[str, Call], dict[str, str], dict[str, str]]:
    """The calls that can be timed, and why the others cannot.

    Args:
        cases: the rows.
        check: raises where a row's result is wrong.
        start: gives its call.
        absent: what a row raises for something that this build or device does not do.

    Returns:
        Calls; what is wrong with others (a wrong result, or whatever they raised); what is not there.
    """
    calls, failed, missing = {}, {}, {}
    for case in cases:
        try:
            check(case)
            call = start(case)
            call(0)
        except absent as error:
            missing[case.name] = line_of(error)
        except Exception as error:  # no row may take the others with it
            failed[case.name] = line_of(error)
        else:
            calls[case.name] = call
    return calls, failed, missing


def line_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def timed(
    settings: Settings, device: torch.device, calls: dict[str, Call], what: str, rounds: int, budget: float
) -> dict[str, Seconds]:
    """`time_in_rounds`, with a line of progress."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[row]}"))
    with Progress(*columns, console=settings.console, transient=True, disable=settings.console is None) as progress:
        task = progress.add_task(what, total=len(calls) * (rounds + 1), row="")
        return time_in_rounds(calls, device, rounds, budget, lambda name: progress.update(task, advance=1, row=name))


def by_threads(
    settings: Settings, device: torch.device, calls: dict[str, Call], rounds: int, budget: float, what: str = ""
) -> Iterator[tuple[int, dict[str, Seconds]]]:
    """`timed` with each number of threads in turn, which stays set while the caller looks at the result."""
    counts = thread_counts(device)
    for count in counts:
        words = [str(device), *([f"{count} threads"] if len(counts) > 1 else []), *([what] if what else [])]
        with threads(count):
            yield count, timed(settings, device, calls, ", ".join(words), rounds, budget)


def machine(device: torch.device, count: int) -> dict[str, Any]:
    """What a record says of a device and the threads that it had; as it is now."""
    return {
        "device": str(device),
        "name": device_name(device),
        "threads": count,
        "clocks": clocks(device),
        "load": list(os.getloadavg()),
    }


def record_of(bench: str, found: dict[str, str], runs: list[dict[str, Any]], ours: set[str]) -> dict[str, Any]:
    """The record of a bench, whose runs name what `failed`."""
    return {
        "bench": bench,
        "lowprec": lowprec.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": lowprec._ops.libraries,
        "peers": found,
        "ok": not any(ours & set(run["failed"]) for run in runs),
        "runs": runs,
    }
