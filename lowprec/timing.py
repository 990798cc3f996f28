"""Timing calls side by side: every call in every round, so that ratios come from one run."""

from __future__ import annotations

import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Call = Callable[[int], object]
"""Does the work once, on the input of that number."""

BURST = 4
"""Calls that a CUDA measurement spans, so that the device never waits for the host."""

REPLAY = 2e-3
"""Seconds that the replay of a graph takes, about, so that its start does not count."""

MOST = 32
"""Calls in a graph, at most."""


@dataclass(frozen=True)
class Seconds:
    """Time of one call: median and quartiles over rounds."""

    low: float
    median: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Seconds:
        """The summary of at least one sample."""
        low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
        return cls(low, median, high, len(samples))


class Captured:
    """A CUDA graph of calls 0 .. count - 1 in turn, so that the host has no part in what is measured."""

    def __init__(self, graph: torch.cuda.CUDAGraph, count: int, call: Call) -> None:
        self.graph, self.count = graph, count
        self.call = call  # and with it the tensors that the graph reads

    def __call__(self, turn: int) -> None:
        self.graph.replay()


def captured(call: Call, device: torch.device, pool: Any = None) -> Call:
    """The call in a CUDA graph, as often as makes a measurement of some length; on the CPU the call as it is.

    Args:
        call: run here twice before.
        device: where it runs.
        pool: what graphs share that never run at once (`torch.cuda.graph_pool_handle`): results overwrite one another.

    Raises:
        RuntimeError: where the call cannot be captured, as it waits for the device, say.
    """
    if device.type != "cuda":
        return call
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(device)):
        call(0)
        count = min(max(round(REPLAY / _seconds(call)), 2), MOST)
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            for i in range(count):
                call(i)
        finally:
            graph.capture_end()
    return Captured(graph, count, call)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Graphs are not captured on the default stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _seconds(call: Call) -> float:
    """Of a call that is not the first, roughly; RuntimeError where it waits for the device."""
    torch.cuda.synchronize()
    begin = _mark()
    with _no_waiting():
        call(1)
    end = _mark()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


@contextmanager
def _no_waiting() -> Iterator[None]:
    """RuntimeError for what waits for the device; a capture that it broke would leave its memory pool in disorder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all of it is found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use that many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_in_rounds(
    calls: Mapping[str, Call],
    device: torch.device,
    rounds: int,
    budget: float,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Seconds]:
    """Time every call once a round, in an order that changes, after one round that does not count.

    Args:
        calls: by name; each is given the round's number.
        device: whose clock counts: CUDA events, or the time that passes.
        rounds: how many.
        budget: seconds after which a call takes no part in further rounds, once it has three samples.
        progress: told the name of each call that was timed.

    Returns:
        Seconds of one call, by name.
    """
    clock = _cuda_samples if device.type == "cuda" else _cpu_samples
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        names = [name for name in calls if _wanted(samples[name], budget)]
        random.Random(turn).shuffle(names)  # or a row would always find the cache as the same other one left it
        wanted = {name: calls[name] for name in names}
        for name, seconds in clock(wanted, device, turn, progress):
            if turn:
                samples[name].append(seconds)
    return {name: Seconds.of(each) for name, each in samples.items()}


def _wanted(samples: list[float], budget: float) -> bool:
    return len(samples) < 3 or sum(samples) < budget


def _cpu_samples(
    calls: Mapping[str, Call], device: torch.device, turn: int, progress: Callable[[str], object]
) -> Iterator[tuple[str, float]]:
    for name, call in calls.items():
        begin = time.perf_counter()
        call(turn)
        yield name, time.perf_counter() - begin
        progress(name)


def _cuda_samples(
    calls: Mapping[str, Call], device: torch.device, turn: int, progress: Callable[[str], object]
) -> Iterator[tuple[str, float]]:
    """Everything is queued first: the events between the calls are read when all is done."""
    with torch.cuda.device(device):
        marks = [_mark()]
        for name, call in calls.items():
            begin = _mark()
            for i in range(_burst(call)):
                call(BURST * turn + i)
            marks += [begin, _mark()]
            progress(name)
        torch.cuda.synchronize()
    for name, begin, end in zip(calls, marks[1::2], marks[2::2], strict=True):
        call = calls[name]
        each = call.count if isinstance(call, Captured) else 1
        yield name, begin.elapsed_time(end) / 1000 / (_burst(call) * each)


def _burst(call: Call) -> int:
    return 1 if isinstance(call, Captured) else BURST


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def clocks(device: torch.device) -> dict[str, str]:
    """What the driver says of a GPU's clocks and power; nothing where it cannot be asked."""
    if device.type != "cuda":
        return {}
    fields = ("name", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
    query = ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (word.strip() for word in done.stdout.split(",")), strict=False))
