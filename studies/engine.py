"""Runs the parts of a study side by side, each in a process of its own, shows how far they are, and stops cleanly.

A part is a function that leaves its results in a folder and goes on from there when it is run again. The parent only
watches the metrics that the parts append; a part whose parent is gone ends at once, as by a kill.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from signal import SIG_BLOCK, SIG_UNBLOCK, SIGINT, pthread_sigmask
from typing import NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lowprec.studies import record

POLL_SECONDS = 0.25
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

Stop = Callable[[], bool]
"""Whether to save and return as soon as possible."""


def device_of(wanted: str) -> str:
    """The device that a setting names, "auto" being a GPU where there is one; ValueError for one that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: this machine, or this torch, has no CUDA device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


class HowToRun(Protocol):
    """The settings of a study that say how it is run; `options` describes each."""

    @property
    def device(self) -> str: ...
    @property
    def cells(self) -> tuple[str, ...]: ...
    @property
    def workers(self) -> int: ...
    @property
    def minutes(self) -> float: ...


class Part(NamedTuple):
    """One part of a study.

    work: called with the folder and a `Stop`; to be pickled. It leaves `result.json` in the folder when it is done.
    total: updates that it makes; each line of its metrics says how many it has made, its bits per character, its speed.
    """

    name: str
    folder: Path
    total: int
    work: Callable[[Path, Stop], None]

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").exists()

    def last(self) -> record.Json:
        """The latest line of metrics."""
        return (record.lines(self.folder / "metrics.jsonl") or [{"update": 0}])[-1]


def run_all(parts: Sequence[Part], config: HowToRun, console: Console, noun: str, fresh: bool = False) -> bool:
    """Run the parts that a study's settings choose; whether all are done now, after saying where the others are.

    Args:
        parts: of the study, named in `config.cells` where not all are to be run.
        config: device, workers, minutes and cells.
        console: where the progress is shown.
        noun: what parts are called.
        fresh: whether each part has a process of its own.

    Raises:
        KeyboardInterrupt, ChildProcessError, OSError, ValueError: as `run`.
    """
    chosen = [part for part in parts if not config.cells or part.name in config.cells]
    most = 1 if config.device == "cuda" else len(os.sched_getaffinity(0))
    workers = config.workers or max(1, min(most, len(chosen)))
    try:
        run(chosen, workers, config.minutes, console, fresh)
    except KeyboardInterrupt:
        _say_where(parts, console, noun)
        raise
    done = all(part.done for part in parts)
    if not done:
        _say_where(parts, console, noun)
    return done


def _say_where(parts: Sequence[Part], console: Console, noun: str) -> None:
    """One line for each part that is not done."""
    console.print(f"{sum(part.done for part in parts)} of {len(parts)} {noun} are done; saved of the others:")
    for part in parts:
        if not part.done:
            console.print(f"  {part.name}: update {part.last()['update']} of {part.total}")
    console.print("go on with --resume")


def run(parts: Sequence[Part], workers: int, minutes: float, console: Console, fresh: bool = False) -> None:
    """Run what is not done yet.

    Args:
        parts: in the order to begin them.
        workers: processes at a time.
        minutes: after which everything saves and stops; 0 for no limit.
        console: where the progress is shown.
        fresh: whether each part has a process of its own, so that a GPU's memory is free again after each.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once everything is saved.
        ChildProcessError: when a process was killed.
        OSError, ValueError: what a part raised, once the others are saved.
    """
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    context = get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(
        workers, context, _enter, initargs=(stop, os.getpid()), max_tasks_per_child=1 if fresh else None
    )
    with _uninterrupted():
        futures = [pool.submit(_work, part) for part in parts if not part.done]
    try:
        with _shown(parts, console) as show:
            _watch(futures, stop, deadline, show)
    except BrokenProcessPool:
        raise ChildProcessError("a process of the study was killed (out of memory, perhaps)") from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes begun in here never see Ctrl-C, which a terminal sends to all: the parent says when to stop."""
    pthread_sigmask(SIG_BLOCK, {SIGINT})
    try:
        yield
    finally:
        pthread_sigmask(SIG_UNBLOCK, {SIGINT})


def _watch(futures: list[Future[None]], stop: Event, deadline: float, show: Callable[[], None]) -> None:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
        show()
        for future in done:
            future.result()
        if time.monotonic() > deadline:
            stop.set()


# In the processes.

_stop: Event | None = None


def _enter(stop: Event, parent: int) -> None:
    global _stop
    _stop = stop
    _keep_memory()
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _keep_memory() -> None:
    """Let glibc keep freed memory: a training loop that maps its tensors anew each time loses a fifth of its speed."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        allocator.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        allocator.mallopt(M_MMAP_THRESHOLD, 2**30)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def _work(part: Part) -> None:
    assert _stop is not None
    if _stop.is_set():
        return
    part.folder.mkdir(parents=True, exist_ok=True)
    with record.locked(part.folder):
        part.work(part.folder, _stop.is_set)


# On the screen.


@contextmanager
def _shown(parts: Sequence[Part], console: Console) -> Iterator[Callable[[], None]]:
    """A line for each part; the function brings them up to date."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {part.name: progress.add_task(part.name, total=part.total, start=False, state="") for part in parts}

        def show() -> None:
            for part in parts:
                _show(progress, tasks[part.name], part)

        show()
        yield show
        show()


def _show(progress: Progress, task: TaskID, part: Part) -> None:
    line = part.last()
    if line["update"] and not progress.tasks[task].started:
        progress.start_task(task)
    progress.update(task, completed=line["update"], state=_state(line))


def _state(line: record.Json) -> str:
    if "bpc" in line:
        return f"{line['bpc']:.3f} bpc  {line['speed']:,.0f} char/s"
    return f"{line['loss']:.3f} bits  {line['speed']:,.0f} rows/s" if "loss" in line else ""
