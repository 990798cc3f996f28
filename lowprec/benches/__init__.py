"""Benches: one folder each, found by name and run by `lowprec bench NAME`.

A bench is a package in this folder with QUESTION (one line), run(settings), which times its rows, leaves a record, its
table and a picture in a folder, and returns the record, and show(record, out, console), which prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Settings:
    """What to run and where to leave it.

    Attributes:
        out: folder for the record.
        devices: "cpu", "cuda" (which is every CUDA device).
        quick: smaller tensors and fewer rounds.
        only: pattern (fnmatch), or part, of the names of the rows to time.
        elements: of each tensor; None for the bench's own choice.
        console: where progress is shown.
    """

    out: Path
    devices: tuple[str, ...] = DEVICES
    quick: bool = False
    only: str = "*"
    elements: int | None = None
    console: Console | None = None

    def __post_init__(self) -> None:
        for device in self.devices:
            if device not in DEVICES:
                raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
        if self.devices == ("cuda",) and not torch.cuda.is_available():
            raise ValueError("device 'cuda' is not available: this machine has no CUDA device, or this torch no CUDA")


def names() -> list[tuple[str, str]]:
    """Every bench's name and question."""
    return [(name, str(_bench(name).QUESTION)) for name in _names()]


def run(name: str, settings: Settings) -> dict[str, Any]:
    """Run a bench.

    Args:
        name: of the bench.
        settings: what to run and where to leave it.

    Returns:
        The record, as it is on disk.

    Raises:
        ValueError: for an unknown name or device, or a pattern that no row matches.
        OSError: when the folder cannot be written.
    """
    if name not in _names():
        raise ValueError(f"unknown bench {name!r}; there are {', '.join(_names())}")
    record: dict[str, Any] = _bench(name).run(settings)
    return record


def show(name: str, record: dict[str, Any], out: Path, console: Console) -> None:
    """Print the tables of a record, and where it lies."""
    _bench(name).show(record, out, console)


def _names() -> list[str]:
    return [module.name for module in iter_modules(__path__) if module.ispkg]


def _bench(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
