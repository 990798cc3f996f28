"""An entry: what stands in front of a wrapped module's forward."""

from __future__ import annotations

from functools import cache, update_wrapper
from types import FunctionType, MethodType
from typing import Any
from weakref import ref

import torch
from torch import nn

from lowprec.region import Region, run_in

_ENTRY = "_lowprec_entry"


class Entry:
    """Stands in front of a module's forward and runs it in a region, or in full precision where that is None.

    It is an attribute of the module, not a hook or another class: torch's fast paths, and whatever looks at the class
    or the signature, see the module as it was. It knows the module by a weak reference, so that a model and its memory
    go when the last name for it goes.
    """

    def __init__(self, module: nn.Module, region: Region | None) -> None:
        self.module = ref(module)
        self.region = region
        self.installed = False
        self.original = module.__dict__.get("forward")

    @property
    def forward(self) -> MethodType:
        """What the module's forward is while this is installed."""
        kind: Any = type(self.module())
        return MethodType(_like_forward_of(kind), self)

    def install(self) -> None:
        self.installed = True
        self._attributes().update({_ENTRY: self, "forward": self.forward})

    def remove(self) -> None:
        """Give the module its forward back; if someone has put another on top since, only step aside beneath it."""
        self.installed = False
        attributes = self._attributes()
        del attributes[_ENTRY]
        if getattr(attributes.get("forward"), "__self__", None) is self:
            del attributes["forward"]
            if self.original is not None:
                attributes["forward"] = self.original

    def _attributes(self) -> dict[str, Any]:
        """Those of the module itself, past whatever `__setattr__` it has."""
        return vars(self.module())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": self.module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, module=ref(state["module"]))


def _forward(self: Entry, *args: Any, **kwargs: Any) -> Any:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise ValueError("a model under a policy cannot be traced by torch.jit: use torch.export, or unwrap it")
    function = self.original
    if function is None:
        module = self.module()
        if module is None:
            raise ReferenceError("this forward's module is gone: a wrapped module's forward does not keep it alive")
        function, args = type(module).forward, (module, *args)
    return run_in(self.region, function, args, kwargs) if self.installed else function(*args, **kwargs)


@cache
def _like_forward_of(kind: Any) -> Any:
    """`_forward` with the signature of a class's own, and with code of its own.

    `torch.compile` keeps what it compiled by code: classes that shared one would share its limit on recompilations.
    """
    code = _forward.__code__.replace(co_name="forward", co_qualname=f"{kind.__qualname__}.forward")
    function = update_wrapper(FunctionType(code, globals()), kind.forward, updated=())
    function.__name__ = "forward"  # under which pickle finds it again, on the entry
    return function


def entry_of(module: nn.Module) -> Entry | None:
    """The entry in front of a module, if there is one."""
    return module.__dict__.get(_ENTRY)
