"""A study's settings: a frozen dataclass, filled from the words of the command line.

A field's metadata say what it means, and whether it belongs to the run alone ("how": workers, time limits), so that it
may change when a run is gone on with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Config = TypeVar("Config")

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def setting(default: Any, meaning: str, how: bool = False) -> Any:
    """A field of a Config."""
    return field(default=default, metadata={"meaning": meaning, "how": how})


def require(good: bool, name: str, wanted: str, got: object) -> None:
    """ValueError where a setting is not good."""
    if not good:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")


def distinct(values: tuple[Any, ...]) -> bool:
    """Whether there is a value, and none twice."""
    return bool(values) and len(set(values)) == len(values)


def what(config: Any) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    return {f.name: getattr(config, f.name) for f in fields(config) if not f.metadata["how"]}


def parse(kind: type[Config], words: Mapping[str, str], start: Mapping[str, Any]) -> Config:
    """Settings from words, over those of `start`, over the defaults.

    Raises:
        ValueError: for an unknown key, or a word that is no value for it.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key in words:
        if key not in known:
            raise ValueError(f"unknown setting {key!r}; there are {', '.join(known)}")
    return kind(**{**start, **{key: _value(key, word, hints[key]) for key, word in words.items()}})


def _value(key: str, word: str, hint: Any) -> Any:
    try:
        if get_origin(hint) is tuple:
            return tuple(_scalar(part, get_args(hint)[0]) for part in word.split(",") if part)
        return _scalar(word, hint)
    except (KeyError, ValueError):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        one = names[get_args(hint)[0] if get_origin(hint) is tuple else hint]
        wanted = f"{one}, or several with commas" if get_origin(hint) is tuple else one
        raise ValueError(f"{key} must be {wanted}, got {word!r}") from None


def _scalar(word: str, hint: type) -> Any:
    return _WORDS[word.lower()] if hint is bool else hint(word)
