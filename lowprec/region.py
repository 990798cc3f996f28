"""A region: the stretch of a forward pass in which one policy holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowprec import recompute
from lowprec.accumulator import Accumulator
from lowprec.bias import Rule, is_block
from lowprec.coverage import HANDLERS, KINDS, NOT_REDUCED, REDUCTIONS, is_unfit, missed
from lowprec.policy import ROLES, Accumulators, Formats
from lowprec.products import tensors
from lowprec.roles import CODES, STATEFUL, STATS, Counters, Roles, States
from lowprec.slots import Slots

Function = Callable[..., Any]

_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Region(TorchFunctionMode):
    """Sees every torch function called in the forward of one module, and hands the products to their handlers.

    At most one region is on torch's stack of modes at a time: a module inside another replaces its region.

    Args:
        path: of the module.
        formats: of each role.
        accumulators: of products and of other sums.
        strict: whether an op that is not covered raises ValueError; otherwise it is remembered for the report.
        device: where to count at first; the counters follow the operands.
        place: of the module in the model, by which the casts' random bits differ from those of other modules.
    """

    def __init__(
        self,
        path: str,
        formats: Formats,
        accumulators: Accumulators,
        strict: bool,
        device: torch.device,
        place: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.formats = formats
        self.accumulators = accumulators
        self.strict = strict
        self.missed: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self.slots = (
            *(_slots(rule, len(ROLES) * place + k, device) for k, rule in enumerate(formats)),
            _draws(accumulators[:3], device),
            _draws(accumulators[3:], device),
        )
        self.blocks = any(rule is not None and is_block(rule) for rule in formats)
        self.has_state = any(slots is not None for slots in self.slots)
        with torch.inference_mode(False):
            self._keep(
                torch.zeros(len(KINDS), dtype=torch.int64, device=device),
                torch.zeros(len(KINDS), *STATS, dtype=torch.float64, device=device),
                torch.zeros(*CODES, dtype=torch.int64, device=device),
            )

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in HANDLERS:
            return self._product(func, args, kwargs)
        if func is torch.utils.checkpoint.checkpoint:  # only the compiler lets a mode see this one
            return func(_inside(self, args[0]), *args[1:], **kwargs)
        name = missed(func, args, kwargs)
        if name is not None:
            self.miss(name)
        if self.accumulators.reduction is not None:
            return self._reduction(func, args, kwargs)
        return func(*args, **kwargs)

    def _reduction(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sums that are no products, where the policy says how they are formed; anything else as it is."""
        if func not in REDUCTIONS and func not in NOT_REDUCED:
            return func(*args, **kwargs)
        operands = list(tensors(args, kwargs))
        if operands and func in REDUCTIONS and not any(is_unfit(x) for x in operands):
            kind, handler = REDUCTIONS[func]
            return self._handled(kind, handler, operands[0], func, args, kwargs)
        if operands:
            self.leave_out(KINDS[REDUCTIONS[func][0]] if func in REDUCTIONS else NOT_REDUCED[func])
        return func(*args, **kwargs)

    def _handled(
        self,
        kind: int,
        handler: Function,
        x: Tensor,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        roles = self._roles(kind, x)
        result = handler(roles, func, *args, **kwargs)
        if roles.left_out:
            self.leave_out(KINDS[kind])
        return result

    def _product(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind, fewest, handler = HANDLERS[func]
        operands = list(tensors(args, kwargs))
        if len(operands) < fewest:  # of integers, or an einsum that only moves or sums
            return func(*args, **kwargs)
        for x in operands:
            if is_unfit(x):
                self.miss(f"{KINDS[kind]} of {x.dtype} ({x.layout})")
                return func(*args, **kwargs)
        return self._handled(kind, handler, operands[0], func, args, kwargs)

    def _roles(self, kind: int, x: Tensor) -> Roles:
        """The roles of a product, and where to count it: on the device of its operands."""
        states = self._states() if self.has_state and x.device.type != "meta" else None
        if x.device.type == "meta" or not _counting():
            return self._rounding(None, False, states, x.device)
        if self.calls.device != x.device:
            with torch.inference_mode(False):
                self._keep(self.calls.to(x.device), self.stats.to(x.device), self.codes.to(x.device))
        again = _recomputing()
        if not again:
            self.calls[kind].add_(1)
        return self._rounding(Counters(self.stats[kind], self.codes), again, states, x.device)

    def _rounding(self, counters: Counters | None, again: bool, states: States | None, device: torch.device) -> Roles:
        return Roles(
            self.formats,
            counters,
            again=again,
            states=states,
            device=device,
            blocks=self.blocks,
            accumulators=self.accumulators,
        )

    def _states(self) -> States | None:
        """The states of a product's casts; none on fake tensors, which have no values to measure."""
        if torch.compiler.is_compiling():
            if torch.compiler._is_exporting_flag:
                raise ValueError("casts that keep a state cannot be exported: unwrap the model, or wrap it statically")
        elif torch._C._get_dispatch_mode(_FAKE) is not None:
            return None
        return self.slots

    def note(self, name: str, x: Tensor) -> None:
        """Count a call of an op, as the report names it, that rounds by itself and sums its products, but these alone,
        as the policy says.
        """
        self._roles(KINDS.index(name), x)
        if self.accumulators.reduction is not None:
            self.leave_out(name)

    def miss(self, name: str) -> None:
        """Refuse or remember something that is not covered."""
        if self.strict:
            raise ValueError(
                f"{name} in module {self.path!r} is not covered by the policy: give that module the override None, "
                "or wrap without strict=True"
            )
        if name not in self.missed:
            self.missed = (*self.missed, name)

    def leave_out(self, kind: str) -> None:
        """Refuse or remember a covered op whose sums no accumulator of the policy forms."""
        if self.strict:
            raise ValueError(
                f"the sums of {kind} in module {self.path!r} are not covered by the policy's accumulators: override "
                "that module with a policy that has none, or wrap without strict=True"
            )
        if kind not in self.left_out:
            self.left_out = (*self.left_out, kind)

    def _keep(self, calls: Tensor, stats: Tensor, codes: Tensor) -> None:
        """Hold the counters: calls of each kind of op, statistics of each kind and role, codes of each role."""
        self.calls, self.stats, self.codes = calls, stats, codes
        for counter in (calls, stats, codes):
            # What `torch._dynamo.mark_static_address` sets, without importing the compiler: a CUDA graph may write
            # here.
            counter._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


def _slots(rule: str | None, place: int, device: torch.device) -> Slots | None:
    """The states of a role, if its rule needs any."""
    return None if rule is None or not Rule.parse(rule).has_state else Slots(rule, place, device)


def _draws(accumulators: tuple[str | None, ...], device: torch.device) -> Slots | None:
    """The states of sums that are rounded stochastically, if any are. Each set draws a seed of its own."""
    if not any(text is not None and Accumulator.parse(text).is_stochastic for text in accumulators):
        return None
    return Slots("fp32 | rounding=stochastic", 0, device)


def _counting() -> bool:
    """Whether what runs now counts: not inside torch.func's transforms, exported or on fake tensors."""
    if torch.compiler.is_compiling():
        return not torch.compiler._is_exporting_flag
    return torch._C._functorch.peek_interpreter_stack() is None and torch._C._get_dispatch_mode(_FAKE) is None


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def take() -> tuple[Region | None, int]:
    """Take the active region, if any, off torch's stack of modes, and say where it lay. Other modes stay."""
    size = torch._C._len_torch_function_stack()
    for place in reversed(range(size)):
        if isinstance(torch._C._get_function_stack_at(place), Region):
            above = [torch._C._pop_torch_function_stack() for _ in range(size - 1 - place)]
            region = torch._C._pop_torch_function_stack()
            _push(above)
            return region, place
    return None, 0


def put_back(region: Region | None, place: int) -> None:
    """Undo `take`."""
    if region is not None:
        above = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack() - place)]
        torch._C._push_on_torch_function_stack(region)
        _push(above)


def _push(modes: list[Any]) -> None:
    for mode in reversed(modes):
        torch._C._push_on_torch_function_stack(mode)


Places = tuple[int, ...]
"""How many states of each role a forward pass has taken."""

START: Places = (0,) * len(STATEFUL)


def _places(region: Region) -> Places:
    return tuple(0 if slots is None else slots.taken for slots in region.slots)


def _go_to(region: Region, places: Places) -> None:
    for slots, taken in zip(region.slots, places, strict=True):
        if slots is not None:
            slots.taken = taken


def run_in(
    region: Region | None,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    places: Places | None = START,
) -> Any:
    """Call a function in a region, or in full precision for None, whatever region is active outside.

    Its tensors take states from `places` on, after which the region is where it was; or, for None, as it stands.
    """
    outer = take()
    try:
        if region is None:
            return function(*args, **kwargs)
        if places is None or not region.has_state:
            with region:
                return function(*args, **kwargs)
        before = _places(region)
        _go_to(region, places)
        try:
            with region:
                return function(*args, **kwargs)
        finally:
            _go_to(region, before)
    finally:
        put_back(*outer)


# Activation checkpointing calls a function once more in the backward pass, when no region is active.


def carried(function: Function) -> Function:
    """A function that takes the active region along to wherever it is called, and what states come next there."""
    region = active()
    if region is None:
        return function
    places = _places(region)

    def run(*args: Any, **kwargs: Any) -> Any:
        return run_in(region, function, args, kwargs, places)

    return run


recompute.carriers.append(carried)


def _inside(region: Region, function: Function) -> Function:
    """A function that runs in a region, in compiled code, which is traced once for both passes."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return run_in(region, function, args, kwargs, None)

    return run


def active() -> Region | None:
    """The region that holds now."""
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    return next((mode for mode in modes if isinstance(mode, Region)), None)
