"""Wrap any model in a precision policy, in place, and undo it.

Every module gets an `Entry` in front of its forward, which runs the original one in the module's own region. Nothing
else about a module changes: not its class, its parameters, its hooks or its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lowprec import recompute, states
from lowprec.entry import Entry, entry_of
from lowprec.policy import Accumulators, Formats, Policy, and_above, as_policy, matches
from lowprec.region import Region

Model = TypeVar("Model", bound=nn.Module)


def wrap(model: Model, policy: Policy | str, *, strict: bool = False) -> Model:
    """Put a model under a precision policy, in place, replacing any that it is under.

    Parameters stay as they are, in full precision: only what goes into and comes out of each product is rounded.

    Args:
        model: any module. It may be trained, compiled, copied, pickled and checkpointed as before.
        policy: or the name of one of `lowprec.recipes`. A module under an empty policy runs untouched.
        strict: raise ValueError where a product or a module with weights is not covered, now or when it first runs.

    Returns:
        The model.

    Raises:
        TypeError: for a model or policy of a wrong type.
        ValueError: for an unknown recipe; an override that matches no module, splits a module that is used in two
            places, or picks a part of a module that computes as one; with `strict`, a module that is not covered. The
            model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    plan = list(_plan(model, as_policy("policy", policy), strict))
    unwrap(model)
    for module, region in plan:
        Entry(module, region).install()
    if plan:
        recompute.install()
        states.attach(model)
    return model


def unwrap(model: Model) -> Model:
    """Take a model, or a part of one, out of its policy: it is then as it was before. The model is returned."""
    for module in model.modules():
        states.detach(module)
        entry = entry_of(module)
        if entry is not None:
            entry.remove()
    return model


# Planning: which module gets which region.


def _plan(model: nn.Module, policy: Policy, strict: bool) -> Iterator[tuple[nn.Module, Region | None]]:
    """The modules to enter, each with its region, or None where that ends. Outside every region there is no entry.

    A parametrization computes a weight from parameters: it is no product of the network, and stays in full precision.
    """
    regions: dict[str, Region] = {}
    computed = {path for path, module in model.named_modules() if isinstance(module, ParametrizationList)}
    for module, (path, *others) in _paths(model, policy).items():
        rules = _in_force(policy, path)
        if any(_in_force(policy, other) != rules for other in others):
            raise ValueError(f"overrides split a module that is both {path!r} and {others[0]!r}")
        if isinstance(module, nn.MultiheadAttention) and _in_force(policy, f"{path}.out_proj") != rules:
            raise ValueError(f"overrides split {path!r}: a MultiheadAttention computes with its out_proj as one")
        if isinstance(module, torch.jit.ScriptModule):
            _note_script(path, regions)
        elif _has_forward(module) and rules is not None and computed.isdisjoint(and_above(path)):
            regions[path] = Region(path, *rules, strict, _device(module, model), len(regions))
            yield module, regions[path]
        elif _has_forward(module) and any(_in_force(policy, above) for above in and_above(path)):
            yield module, None


def _paths(model: nn.Module, policy: Policy) -> dict[nn.Module, list[str]]:
    """Every module with all of its paths; ValueError for an override that matches none."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    names = [path for all_paths in paths.values() for path in all_paths]
    for pattern in policy.overrides:
        if not any(matches(pattern, path) for path in names):
            known = ", ".join(names[1:9]) + (", ..." if len(names) > 9 else "")
            raise ValueError(f"overrides: {pattern!r} matches no module of the model, which has {known or 'none'}")
    return paths


def _in_force(policy: Policy, path: str) -> tuple[Formats, Accumulators] | None:
    """The formats and accumulators that hold at a path; None for full precision."""
    here = policy.for_module(path)
    return None if here is None or here.is_empty else (here.formats, here.accumulators)


def _has_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def _note_script(path: str, regions: dict[str, Region]) -> None:
    """A compiled script shows nothing of what it calls: the module around it reports it, unless a script too."""
    around = path.rpartition(".")[0]
    if not path:
        raise ValueError("model is a ScriptModule: what it calls cannot be seen; wrap the module it was made from")
    if around in regions:
        regions[around].miss(f"ScriptModule {path.rpartition('.')[2]!r}")


def _device(*modules: nn.Module) -> torch.device:
    """Where the first parameter lies; counters follow the operands from there."""
    device = next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
