"""Studies: one folder each, found by name and run by `lowprec study NAME`.

A study is a package in this folder with QUESTION (one line), Config (a frozen dataclass of settings), QUICK (those of
its small version), prepare(config), which checks them and fills in what they leave open, and run(config, folder),
which leaves its results in the folder and goes on from what it finds there.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from lowprec.studies import options as settings
from lowprec.studies import record

ENGINES = ("local",)


def names() -> list[tuple[str, str]]:
    """Every study's name and question."""
    return [(name, str(_study(name).QUESTION)) for name in _names()]


def run(
    name: str,
    options: Mapping[str, str],
    *,
    out: Path,
    quick: bool = False,
    resume: bool = False,
    engine: str = "local",
) -> Path:
    """Run a study, or go on with it.

    Args:
        name: of the study.
        options: its settings, as words.
        out: folder for the results: new or empty, or with `resume` that of the run to go on with.
        quick: start from the settings of the small version.
        resume: go on with a run, to the same numbers as if it had never stopped. Settings that are not named are that
            run's own.
        engine: "local": processes on this machine.

    Returns:
        The folder.

    Raises:
        ValueError: for an unknown name, engine or setting, an unfit folder, or settings other than those of the run
            to go on with.
        KeyboardInterrupt: after Ctrl-C, once everything is saved.
        OSError: for a full disk or a killed process; what was saved stays.
    """
    if name not in _names():
        raise ValueError(f"unknown study {name!r}; there are {', '.join(_names())}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    study = _study(name)
    if resume:
        study.run(study.prepare(_resumed(study, name, options, out, quick)), out)
        return out
    config = study.prepare(settings.parse(study.Config, options, study.QUICK if quick else {}))
    record.start(out, {"study": name, "quick": quick, "config": settings.what(config)})
    study.run(config, out)
    return out


def _resumed(study: ModuleType, name: str, options: Mapping[str, str], out: Path, quick: bool) -> Any:
    """The settings of the run in a folder; ValueError where what is asked for differs from them."""
    saved = record.reopen(out)
    if saved["study"] != name or (quick and not saved["quick"]):
        raise ValueError(f"{out} holds a run of {saved['study']}{' --quick' * saved['quick']}")
    before = {key: tuple(value) if isinstance(value, list) else value for key, value in saved["config"].items()}
    config = settings.parse(study.Config, options, before)
    asked = settings.what(config)
    changed = [f"{key}={before[key]!r}, not {asked[key]!r}" for key in asked if before.get(key) != asked[key]]
    if changed:
        raise ValueError(f"{out} holds a run with {'; '.join(changed)}: keep its settings, or name another --out")
    return config


def _names() -> list[str]:
    return [module.name for module in iter_modules(__path__) if module.ispkg]


def _study(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
