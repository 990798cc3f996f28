"""States of a policy's casts in `state_dict`: keys under `lowprec.` of the module that was wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lowprec.entry import entry_of
from lowprec.roles import STATEFUL
from lowprec.slots import Slots

_KEY = "lowprec."


def attach(model: nn.Module) -> None:
    """Save and load the states with a wrapped model; once is enough."""
    detach(model)
    model.register_state_dict_post_hook(_save)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_load)  # type: ignore[no-untyped-call]


def detach(module: nn.Module) -> None:
    """Undo `attach`. Hooks are told by what they call: a copied model's handles are still those of the original."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_save, _load):
                del hooks[key]


def _slots(model: nn.Module) -> Iterator[tuple[str, Slots]]:
    """The states of every module's casts and sums, where there are any, by key."""
    for path, module in model.named_modules():
        entry = entry_of(module)
        if entry is not None and entry.region is not None:
            for role, slots in zip(STATEFUL, entry.region.slots, strict=True):
                if slots is not None:
                    yield f"{_KEY}{path}.{role}" if path else f"{_KEY}{role}", slots


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, slots in _slots(module):
        rows = slots.read()
        if len(rows):
            state_dict[prefix + key] = rows


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Take the states out of what is loaded, wherever this policy has a use for them or not."""
    if "lowprec" in module._modules:  # whose own keys these are
        return
    errors = rest[-1]
    known = dict(_slots(module))
    for key in [key for key in state_dict if key.startswith(prefix + _KEY)]:
        rows, slots = state_dict.pop(key), known.get(key.removeprefix(prefix))
        try:
            if slots is not None:
                slots.load(rows.cpu())
        except ValueError as error:
            errors.append(f"{key}: {error}")
