"""`lowprec doctor`: what is compiled, which devices there are, which kernel would run where, and whether it is right.

Everything here is asked of torch's dispatcher and of the kernels themselves; nothing is inferred from file names.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lowprec import __version__, _ops, reference
from lowprec.cast import decode, encode, quantize
from lowprec.formats import FloatFormat
from lowprec.formats import float_format as lookup
from lowprec.rounding import Rounding

Array = np.ndarray[Any, Any]

CHECKED = ("1-5-2", "1-4-3", "1-3-4", "e4m3fn", "e5m2", "e4m3fnuz", "e2m1fn", "1-0-7", "1-5-2:subnormals=off")
"""Formats of the self-check: every kind of specials, with and without subnormals and exponent bits."""


# The facts.


def examine() -> dict[str, Any]:
    """Everything that `doctor` says, as plain data that JSON can hold."""
    devices = list(_devices())
    checks = [_check(device["device"]) for device in devices]
    return {
        "lowprec": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "LOWPREC_EAGER": os.environ.get("LOWPREC_EAGER"),
        "libraries": dict(_ops.libraries),
        "devices": devices,
        "kernels": kernels(any(device["device"] != "cpu" for device in devices)),
        "self_check": checks,
        "ok": all(check["ok"] for check in checks),
    }


def _devices() -> Iterator[dict[str, Any]]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield {"device": "cpu", "name": _cpu_name(), "capability": capability, "threads": torch.get_num_threads()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old warns; the answer, no device, is the same
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        yield {"device": f"cuda:{index}", "name": name, "capability": f"sm_{major}{minor}", "threads": None}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def kernels(cuda: bool) -> dict[str, dict[str, str]]:
    """For each registered op, which kernel a call on the CPU or on a CUDA device would run."""
    ops = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowprec::"))
    return {
        op.removeprefix("lowprec::"): {"cpu": _kernel(op, "CPU"), "cuda": _kernel(op, "CUDA") if cuda else "no device"}
        for op in ops
    }


def _kernel(op: str, key: str) -> str:
    """Compiled libraries register under a device's own key; the eager twin registers under the one for all devices."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        return "compiled"
    eager = torch._C._dispatch_has_kernel_for_dispatch_key(op, "CompositeExplicitAutograd")
    return "eager twin" if eager else "none"


# The self-check: what runs against the judge.


class Case(NamedTuple):
    """One comparison of a kernel with the reference; both compute the same bits, or `bad` says where not."""

    name: str
    inputs: Array
    got: Array
    expected: Array


def _check(device: str) -> dict[str, Any]:
    """Compare the kernels of one device with the reference; stop at the first difference."""
    count = 0
    try:
        for case in _cases(torch.device(device)):
            wrong = np.flatnonzero(case.got != case.expected)
            if wrong.size:
                return {"device": device, "ok": False, "values": count, "verdict": _difference(case, int(wrong[0]))}
            count += case.got.size
    except RuntimeError as error:  # a library that does not fit the device
        return {"device": device, "ok": False, "values": count, "verdict": f"failed: {error}"}
    return {
        "device": device,
        "ok": True,
        "values": count,
        "verdict": f"{count:,} results equal the reference, bit for bit",
    }


def _difference(case: Case, at: int) -> str:
    got, expected = case.got[at], case.expected[at]
    return f"{case.name}: {case.inputs[at]!r} gives {got!r}, the reference {expected!r}"


def _cases(device: torch.device) -> Iterator[Case]:
    for fmt in map(lookup, CHECKED):
        x = _probes(fmt)
        for rounding in (mode for mode in Rounding if mode is not Rounding.stochastic):
            yield from _deterministic(device, fmt, x, rounding)
        yield _stochastic(device, fmt, x[:: max(len(x) // 64, 1)])


def _probes(fmt: FloatFormat) -> Array:
    """Every value of a format, every midpoint, their float32 neighbours, and what lies past the largest value."""
    values = np.append(fmt.values(), [2 * fmt.max, -2 * fmt.max])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    around = [np.nextafter(points, np.float32(towards)) for towards in (-np.inf, np.inf)]
    special = np.array([-0.0, np.inf, -np.inf, np.nan], dtype=np.float32)
    return np.concatenate([points, *around, special])


def _deterministic(device: torch.device, fmt: FloatFormat, x: Array, rounding: Rounding) -> Iterator[Case]:
    """Codes of all probes, their values, and the values of those codes."""
    tensor = torch.from_numpy(x).to(device)
    for saturate in (True, False):
        name = f"{fmt} with {rounding.value}, saturate={saturate}"
        expected = reference.encode_array(x.astype(np.float64), fmt, rounding, saturate)
        decoded = reference.decode_array(expected, fmt).astype(np.float32)
        codes = encode(tensor, fmt, rounding=rounding, saturate=saturate)
        yield Case(f"encode to {name}", x, codes.cpu().numpy().astype(np.int64), expected)
        yield Case(f"decode from {name}", expected, _bits(decode(codes, fmt)), _bits(decoded))
        values = quantize(tensor, fmt, rounding=rounding, saturate=saturate)
        yield Case(f"quantize to {name}", x, _bits(values), _bits(np.where(np.isnan(x), x, decoded)))


def _stochastic(device: torch.device, fmt: FloatFormat, x: Array) -> Case:
    """Codes of a few probes under one seed; each element has a random word of its own."""
    words = [reference.random_word(seed=1, offset=2, index=i) for i in range(len(x))]
    expected = [
        reference.encode(float(each), fmt, "stochastic", word=word) for each, word in zip(x, words, strict=True)
    ]
    codes = encode(torch.from_numpy(x).to(device), fmt, rounding="stochastic", seed=1, offset=2)
    return Case(f"encode to {fmt} with stochastic", x, codes.cpu().numpy().astype(np.int64), np.array(expected))


def _bits(values: torch.Tensor | Array) -> Array:
    """Float32 values as integers, so that -0 differs from 0; every NaN as one."""
    array = np.ascontiguousarray(values.cpu().numpy() if isinstance(values, torch.Tensor) else values, dtype=np.float32)
    return np.where(np.isnan(array), np.iinfo(np.int32).max, array.view(np.int32))


# The report for people.


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what `examine` found."""
    for title, table in (("Versions", _version_table), ("Devices", _device_table), ("Kernels", _kernel_table)):
        console.print(f"[bold]{title}[/bold]")
        console.print(table(facts))
    console.print("[bold]Self-check[/bold]")
    for check in facts["self_check"]:
        mark = "[green]right[/green]" if check["ok"] else "[bold red]WRONG[/bold red]"
        console.print(f"{mark}  {check['device']}: ", end="")
        console.print(check["verdict"], markup=False)
    for line in advice(facts):
        console.print(f"\n{line}", markup=False)


def _table(*headers: str) -> Table:
    frame = box.SIMPLE_HEAD if headers else None
    table = Table(box=frame, show_header=bool(headers), padding=(0, 2, 0, 0), pad_edge=False)
    for header in headers:
        table.add_column(header)
    return table


def _version_table(facts: dict[str, Any]) -> Table:
    table = _table()
    for name in ("lowprec", "python", "torch"):
        table.add_row(name, facts[name])
    table.add_row("CUDA of torch", facts["cuda"] or "none")
    table.add_row("LOWPREC_EAGER", facts["LOWPREC_EAGER"] or "not set")
    for name, state in facts["libraries"].items():
        table.add_row(f"compiled library, {name}", state)
    return table


def _device_table(facts: dict[str, Any]) -> Table:
    table = _table("device", "name", "capability", "threads")
    for device in facts["devices"]:
        table.add_row(device["device"], device["name"], device["capability"], str(device["threads"] or ""))
    return table


def _kernel_table(facts: dict[str, Any]) -> Table:
    table = _table("op", "on cpu", "on cuda")
    for op, places in facts["kernels"].items():
        table.add_row(op, *(f"[{_TONES[place]}]{place}" for place in (places["cpu"], places["cuda"])))
    return table


_TONES = {"compiled": "green", "eager twin": "yellow", "no device": "bright_black", "none": "bold red"}


def advice(facts: dict[str, Any]) -> Iterator[str]:
    """What to know or do about it, in plain words."""
    libraries = facts["libraries"]
    if facts["LOWPREC_EAGER"] not in (None, "", "0"):
        yield "LOWPREC_EAGER is set, so the eager twin runs everywhere: the same bits, slower."
    elif libraries["cpu"] == "not compiled":
        yield "Nothing is compiled for the CPU. Everything works and gives the same bits, slower. " + BUILD
    for name, state in libraries.items():
        if state.startswith("failed"):
            yield (f"The compiled {name} library does not load; the eager twin serves in its place. " + BUILD)
    if len(facts["devices"]) > 1 and libraries["cuda"] == "not compiled":
        yield "There is a GPU, but no compiled CUDA library: casts on it run as torch operations. " + BUILD
    if not facts["ok"]:
        yield "The self-check failed: do not trust this installation's results. LOWPREC_EAGER=1 avoids compiled code."


BUILD = (
    "To compile: `make build` in a checkout, or reinstall with `pip install --no-build-isolation` beside torch, "
    "scikit-build-core, CMake and a C++ compiler (and nvcc, for CUDA)."
)
