"""Wrap any model in a precision policy, in place, report on it, and undo it.

Every module gets an `Entry` in front of its forward, which runs the original one in the module's own region. Nothing
else about a module changes: not its class, its parameters, its hooks or its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, update_wrapper
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from lowprec import recompute
from lowprec.coverage import KINDS
from lowprec.policy import ROLES, Formats, Policy, and_above, as_policy, matches
from lowprec.region import Region, run_in
from lowprec.report import Count, Report, Row

Model = TypeVar("Model", bound=nn.Module)

_ENTRY = "_lowprec_entry"


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
    return model


def unwrap(model: Model) -> Model:
    """Take a model, or a part of one, out of its policy: it is then as it was before. The model is returned."""
    for module in model.modules():
        entry = entry_of(module)
        if entry is not None:
            entry.remove()
    return model


def report(model: nn.Module) -> Report:
    """What a policy did in a wrapped model since it was wrapped, and what it does not cover; `str()` is a table.

    Raises:
        ValueError: for a model that is not wrapped, or under an empty policy.
    """
    wrapped = list(_wrapped(model))
    if not wrapped:
        raise ValueError("model is under no policy: lowprec.wrap puts it under one, and an empty one does nothing")
    regions = [(path, module, region) for path, module, region in wrapped if region is not None]
    outside = [path for path, _, region in wrapped if region is None]
    rows = [row for path, module, region in regions for row in _rows(path, module, region)]
    busy = {row.path for row in rows}
    return Report(
        rows=tuple(rows),
        not_covered=tuple(f"{name} in {path or '(model)'}" for path, _, region in regions for name in region.missed),
        overridden=tuple(path for path in outside if path.rpartition(".")[0] not in outside),
        elementwise=tuple(path for path, module, _ in regions if path not in busy and _holds_parameters(module)),
    )


class Entry:
    """Stands in front of a module's forward and runs it in a region, or in full precision where that is None.

    It is an attribute of the module, not a hook or another class: torch's fast paths, and whatever looks at the class
    or the signature, see the module as it was.
    """

    def __init__(self, module: nn.Module, region: Region | None) -> None:
        self.module = module
        self.region = region
        self.original = module.__dict__.get("forward")

    @property
    def forward(self) -> MethodType:
        """What the module's forward is while this is installed."""
        kind: Any = type(self.module)
        return MethodType(_like_forward_of(kind), self)

    def install(self) -> None:
        self.module.__dict__.update({_ENTRY: self, "forward": self.forward})

    def remove(self) -> None:
        """Give the module its forward back; if someone has wrapped it again since, only step aside in there."""
        self.region = None
        attributes = self.module.__dict__
        del attributes[_ENTRY]
        if getattr(attributes.get("forward"), "__self__", None) is self:
            del attributes["forward"]
            if self.original is not None:
                attributes["forward"] = self.original


def _forward(self: Entry, *args: Any, **kwargs: Any) -> Any:
    if self.original is not None:
        return run_in(self.region, self.original, args, kwargs)
    return run_in(self.region, type(self.module).forward, (self.module, *args), kwargs)


@cache
def _like_forward_of(kind: Any) -> Any:
    """`_forward` with the signature of a class's own, and with code of its own.

    `torch.compile` keeps what it compiled by code: classes that shared one would share its limit on recompilations.
    """
    code = _forward.__code__.replace(co_name="forward", co_qualname=f"{kind.__qualname__}.forward")
    function = update_wrapper(FunctionType(code, globals()), kind.forward)
    function.__name__ = "forward"  # under which pickle finds it again, on the entry
    return function


def entry_of(module: nn.Module) -> Entry | None:
    """The entry in front of a module, if there is one."""
    return module.__dict__.get(_ENTRY)


# Planning: which module gets which region.


def _plan(model: nn.Module, policy: Policy, strict: bool) -> Iterator[tuple[nn.Module, Region | None]]:
    """The modules to enter, each with its region, or None where that ends. Outside every region there is no entry."""
    regions: dict[str, Region] = {}
    for module, (path, *others) in _paths(model, policy).items():
        formats = _in_force(policy, path)
        if any(_in_force(policy, other) != formats for other in others):
            raise ValueError(f"overrides split a module that is both {path!r} and {others[0]!r}")
        if isinstance(module, nn.MultiheadAttention) and _in_force(policy, f"{path}.out_proj") != formats:
            raise ValueError(f"overrides split {path!r}: a MultiheadAttention computes with its out_proj as one")
        if isinstance(module, torch.jit.ScriptModule):
            _note_script(path, regions)
        elif _has_forward(module) and formats is not None:
            regions[path] = Region(path, formats, strict, _device(module, model))
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


def _in_force(policy: Policy, path: str) -> Formats | None:
    """The formats that hold at a path; None for full precision."""
    here = policy.for_module(path)
    return None if here is None or here.is_empty else here.formats


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


# Reporting.

_KIND_OF: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Bilinear: "bilinear",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding_bag",
    nn.MultiheadAttention: "multi_head_attention",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
    nn.LSTMCell: "lstm_cell",
    nn.GRUCell: "gru_cell",
    nn.RNNCell: "rnn_cell",
}
_KIND_OF |= {
    getattr(nn, f"Conv{form}{n}d"): f"conv{form and '_transpose'}{n}d" for form in ("", "Transpose") for n in (1, 2, 3)
}
_PARTS = (NonDynamicallyQuantizableLinear, ParametrizationList)
"""Modules that only hold the parameters of the module around them."""


def _wrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module, Region | None]]:
    for path, module in model.named_modules():
        entry = entry_of(module)
        if entry is not None:
            yield path, module, entry.region


def _rows(path: str, module: nn.Module, region: Region) -> Iterator[Row]:
    own = _kind_of(module)
    for kind, (first, *roles) in zip(KINDS, region.counts.tolist(), strict=True):
        if first[0] or kind == own:
            counts = {role: Count(*row) for role, row in zip(ROLES, roles, strict=True)}
            yield Row(path, kind, region.formats, first[0], counts)


def _kind_of(module: nn.Module) -> str | None:
    """The op that a module of torch's own is there to call."""
    if isinstance(module, _PARTS):
        return None
    return next((kind for base, kind in _KIND_OF.items() if isinstance(module, base)), None)


def _holds_parameters(module: nn.Module) -> bool:
    return not isinstance(module, _PARTS) and any(True for _ in module.parameters(recurse=False))
