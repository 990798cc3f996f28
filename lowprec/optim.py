"""Optimizers whose weights, gradients and state are held in given formats: a wrapper around any torch optimizer.

The wrapped optimizer computes as it always does, in float32. What it reads and what it leaves behind is rounded.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowprec import _ops
from lowprec.cast import RANDOM_BITS, FormatLike, fields_of
from lowprec.eager import CONTAINERS
from lowprec.formats import FloatFormat, float_format
from lowprec.formats import format as lookup
from lowprec.rounding import Rounding

MASTERS = ("fp32", "bf16", "none")
"""What the wrapped optimizer updates: a copy in one of these formats, or the low-precision weights themselves."""

ROUNDING = {"gradient": "nearest_even", "state": "stochastic", "update": "stochastic", "weight": "nearest_even"}
"""How each role is rounded by default. What is carried from step to step is rounded stochastically: small changes to
it would be lost to nearest rounding, every time."""

_MASTER, _SEED, _STEP = "lowprec.master", "lowprec.seed", "lowprec.step"  # keys in a state_dict


class LowPrecision(torch.optim.Optimizer):
    """Any torch optimizer, with weights, gradients and state held in given formats.

    A step rounds the gradients, lets the wrapped optimizer update the master weights, and rounds its state, the
    masters and, from them, the weights that the model sees. Building the wrapper rounds the weights for the first time.
    It is itself an optimizer: learning rate schedulers, GradScaler, hooks, `zero_grad`, `add_param_group` and
    checkpoints work as before. With every format None or that of the tensors themselves (fp32 for float32) it equals
    the wrapped optimizer to the bit.

    *Held in a format* means that every element is a value of it. The tensors keep their dtype: weights and gradients
    that of the parameter, masters and state float32 (float64 for float64 parameters). The bits are those of a machine
    that stores the formats; the memory is not. Where neither a 16-bit parameter nor a weight format needs a master,
    the parameter is its own.

    The random words of an element depend on the seed, the step, the parameter's position in the optimizer, the role
    (for state, its name) and the element's row-major index in the full parameter, and on nothing else: with equal
    gradients, every way to shard (DTensor, FSDP2) over any number of processes gives the same bits.

    Args:
        optimizer: the optimizer to wrap; from here on it is stepped through the wrapper alone. Its parameters are
            float64, float32, float16 or bfloat16, ordinary tensors or DTensors that are sharded in one way at most.
        weight: the format of the weights that the model sees. None: that of the parameter's dtype.
        gradient: the format that `.grad` is rounded to, in place, when a step begins.
        state: the format of the optimizer's state: of every floating-point tensor of the parameter's shape, or by name,
            such as {"exp_avg": "bf16", "exp_avg_sq": "1-5-10"}. Step counters are never touched.
        master: "fp32", "bf16": the update goes to a master copy in this format; a new weight is the rounded master.
            "none": to the low-precision weights themselves, so that what rounding loses is lost.
        rounding: a `Rounding` mode for all roles, or modes by role; the others are as in `ROUNDING`. Roles: "gradient",
            "state", "update" (of masters, or of weights without one) and "weight" (from its master).
        saturate: whether overflow becomes the largest value of a format; None: except in `ieee` formats, where a
            divergence must show.
        seed: of stochastic rounding. All processes of one training must have the same, hence a constant by default.
        random_bits: 32, 16 or 8, of each random word.

    Formats are anything that `lowprec.format` takes, block formats excepted.

    Raises:
        TypeError: for arguments or parameters of a wrong type.
        ValueError: for an unknown format, mode, role or state name (state names at the first step that has a state),
            a dtype that cannot hold its format, a DTensor sharded in more than one way, or LBFGS with anything but
            weight and gradient formats over fp32 masters.
    """

    optimizer: torch.optim.Optimizer
    _formats: _Formats
    _rounder: _Rounder
    _slots: list[_Slot]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        weight: FormatLike | None = None,
        gradient: FormatLike | None = None,
        state: FormatLike | Mapping[str, FormatLike] | None = None,
        master: str = "fp32",
        rounding: Rounding | str | Mapping[str, Rounding | str] | None = None,
        saturate: bool | None = None,
        seed: int = 0,
        random_bits: int = 32,
    ) -> None:
        formats = _Formats(_format("weight", weight), _format("gradient", gradient), _state_formats(state), master)
        _require_fit(optimizer, formats)
        draws = _Draws(_checked_seed(seed))
        rounder = _Rounder(_modes(rounding), saturate, random_bits, draws)
        # What torch's own __init__ does, save the lists of parameters and state: those are the wrapped optimizer's.
        super().__setstate__({"optimizer": optimizer, "_formats": formats, "_rounder": rounder, "_slots": []})
        self._add_slots(self.param_groups)

    # What an optimizer has.

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's own."""
        return self.optimizer.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's own, with the model's parameters in them."""
        return self.optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state by the model's parameters; the masters are in `state_dict`."""
        states = self.optimizer.state
        found = {slot.parameter: states[slot.carried] for slot in self._slots if slot.carried in states}
        return defaultdict(dict, found)

    @property
    def masters(self) -> dict[Tensor, Tensor]:
        """What the wrapped optimizer updates in a parameter's place, by parameter; none that is its own master."""
        return {slot.parameter: slot.carried for slot in self._slots if slot.separate}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, after those that are there; their weights are rounded."""
        self.optimizer.add_param_group(param_group)
        try:
            self._add_slots(self.param_groups[-1:])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss, where a closure computes it with the low-precision weights."""
        if closure is None:
            self._take_gradients()
        with self._carrying():
            loss = self.optimizer.step() if closure is None else self.optimizer.step(self._evaluation(closure))
        self._settle()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, with the masters, the seed and the step counter: all that a run resumes from."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self._carrying():
            saved: dict[str, Any] = self.optimizer.state_dict()
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in saved["state"].items()}
        for slot in self._slots:
            if slot.separate and self._formats.master != "none":
                state.setdefault(slot.position, {})[_MASTER] = slot.carried.detach()
        draws = self._rounder.draws
        groups = [{**group, _SEED: draws.seed, _STEP: draws.step.clone()} for group in saved["param_groups"]]
        saved = {**saved, "state": state, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = result if (result := after(self, saved)) is not None else saved
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`, or from one of the wrapped optimizer alone: then masters are the model's weights.

        As ever, the weights themselves come from the model's own `state_dict`.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = result if (result := before(self, state_dict)) is not None else state_dict
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in state_dict["state"].items()}
        groups = [dict(group) for group in state_dict["param_groups"]]
        keys = itertools.chain.from_iterable(group["params"] for group in groups)
        masters = [state[key].pop(_MASTER, None) if key in state else None for key in keys]
        draws = [(group.pop(_SEED, None), group.pop(_STEP, None)) for group in groups]
        state = {key: value for key, value in state.items() if value != {}}
        with self._carrying():
            self.optimizer.load_state_dict({**state_dict, "state": state, "param_groups": groups})
        for slot, master in zip(self._slots, masters, strict=True):
            slot.carry(slot.parameter if master is None else master)
        if draws and draws[0] != (None, None):
            self._rounder.draws.load(*draws[0])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "_formats", "_rounder", "_slots")}

    def __repr__(self) -> str:
        formats, rounder = self._formats, self._rounder
        given = {**vars(formats), "rounding": rounder.modes, "saturate": rounder.saturate, "seed": rounder.draws.seed}
        return f"LowPrecision({self.optimizer!r}, {', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # The parts of a step.

    @torch.no_grad()
    def _add_slots(self, groups: list[dict[str, Any]]) -> None:
        first = len(self._slots)
        parameters = [parameter for group in groups for parameter in group["params"]]
        slots = [_slot(first + i, parameter, self._formats) for i, parameter in enumerate(parameters)]
        for slot in slots:
            self._rounder.draws.counter(slot.parameter.device)
            self._move_state(slot)
            self._round_state(slot, mode="nearest_even")
            self._round(slot, slot.carried, "update", slot.carried_format, mode="nearest_even")
            self._publish(slot)
        self._slots.extend(slots)

    def _move_state(self, slot: _Slot) -> None:
        """Hand the state that an optimizer has already, Adagrad from the start, to what it now updates."""
        states = self.optimizer.state
        if slot.separate and slot.parameter in states:
            states[slot.carried] = {
                name: value.to(slot.carried.dtype) if _is_whole(value, slot) else value
                for name, value in states.pop(slot.parameter).items()
            }

    @contextmanager
    def _listed(self, attribute: str, then: str) -> Iterator[None]:
        """Put the slots' "carried" or "parameter" tensors into the parameter lists for a while."""
        self._list(attribute)
        try:
            yield
        finally:
            self._list(then)

    def _list(self, attribute: str) -> None:
        rest = iter(self._slots)
        for group in self.param_groups:
            slots = itertools.islice(rest, len(group["params"]))
            group["params"][:] = [getattr(slot, attribute) for slot in slots]  # in place: LBFGS keeps its list

    def _carrying(self) -> AbstractContextManager[None]:
        """The wrapped optimizer sees what it updates, not the model's parameters."""
        return self._listed("carried", then="parameter")

    def _evaluation(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, which sees low-precision weights and leaves low-precision gradients, however often called."""
        first = True

        def evaluate() -> Any:
            nonlocal first
            with self._listed("parameter", then="carried"):
                if not first:
                    self._publish_again()
                first = False
                loss = closure()
                self._take_gradients()
            return loss

        return evaluate

    @torch.no_grad()
    def _publish_again(self) -> None:
        self._rounder.draws.advance()
        for slot in self._slots:
            self._publish(slot)

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for slot in self._slots:
            gradient = slot.parameter.grad
            if gradient is not None:
                self._round(slot, gradient, "gradient", self._formats.gradient)
            if slot.separate:
                if self._formats.master == "none":
                    slot.carry(slot.parameter)  # which then holds all there is
                slot.carried.grad = None if gradient is None else gradient.detach().to(slot.carried.dtype)

    def _settle(self) -> None:
        """Round what the step left behind."""
        self._require_known_state()
        for slot in self._slots:
            self._round_state(slot)
            self._round(slot, slot.carried, "update", slot.carried_format)
            self._publish(slot)
            if slot.separate:
                slot.carried.grad = None
        self._rounder.draws.advance()

    def _publish(self, slot: _Slot) -> None:
        if slot.separate:
            rounded = self._round(slot, slot.carried, "weight", slot.seen_format, inplace=False)
            _local(slot.parameter).copy_(_local(rounded))

    def _round_state(self, slot: _Slot, mode: str | None = None) -> None:
        for name, value in self.optimizer.state.get(slot.carried, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                fmt = self._formats.of_state(name, _is_whole(value, slot))
                self._round(slot, value, "state", fmt, mode=mode, name=name)

    def _require_known_state(self) -> None:
        seen = {name for slot in self._slots for name in self.optimizer.state.get(slot.carried, {})}
        if isinstance(self._formats.state, dict) and seen:
            unknown = sorted(set(self._formats.state) - seen)
            if unknown:
                raise ValueError(f"state names {', '.join(unknown)}; the optimizer has {', '.join(sorted(seen))}")

    def _round(
        self,
        slot: _Slot,
        x: Tensor,
        role: str,
        fmt: str | None,
        *,
        mode: str | None = None,
        name: str = "",
        inplace: bool = True,
    ) -> Tensor:
        if fmt is None or (_is_own(fmt, x.dtype) and not self._rounder.saturates(fmt)):
            return x
        if x.layout != torch.strided:
            raise ValueError(f"a {role} must be dense to be rounded, got {x.layout} for parameter {slot.position}")
        stream = f"{slot.position}/{role}/{name}"
        return self._rounder.round(x, fmt, mode or self._rounder.modes[role], stream, inplace)


# Arguments.


def _format(name: str, fmt: FormatLike | None) -> str | None:
    """A format by its string, in which it travels, copies and pickles."""
    if fmt is None:
        return None
    found = lookup(fmt)
    if not isinstance(found, FloatFormat):
        raise ValueError(f"{name} must be a format of single elements, got the block format {found}")
    return str(found)


def _state_formats(state: FormatLike | Mapping[str, FormatLike] | None) -> str | dict[str, str] | None:
    if not isinstance(state, Mapping):
        return _format("state", state)
    if not all(isinstance(name, str) for name in state):
        raise TypeError(f"state must be a format or formats by name, got keys {list(state)!r}")
    if "step" in state:
        raise ValueError("state must not name 'step': step counters are never rounded")
    given = {name: _format(f"state[{name!r}]", fmt) for name, fmt in state.items()}
    return {name: fmt for name, fmt in given.items() if fmt is not None}


def _modes(rounding: Rounding | str | Mapping[str, Rounding | str] | None) -> dict[str, str]:
    if rounding is None:
        return ROUNDING
    given = rounding if isinstance(rounding, Mapping) else dict.fromkeys(ROUNDING, rounding)
    for role in given:
        if role not in ROUNDING:
            raise ValueError(f"rounding must name roles out of {', '.join(ROUNDING)}, got {role!r}")
    return {**ROUNDING, **{role: Rounding.of(mode).value for role, mode in given.items()}}


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, the same in every process, got {seed!r}")
    return seed


def _require_fit(optimizer: torch.optim.Optimizer, formats: _Formats) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LowPrecision):
        raise TypeError("optimizer must not be a LowPrecision already")
    if formats.master not in MASTERS:
        raise ValueError(f"master must be one of {', '.join(MASTERS)}, got {formats.master!r}")
    if isinstance(optimizer, torch.optim.LBFGS) and (formats.state or formats.master != "fp32"):
        raise ValueError("LBFGS searches inside a step: it takes weight and gradient formats, master='fp32', no state")


@dataclass
class _Formats:
    """The formats of each role as strings, None for that of the tensor itself."""

    weight: str | None
    gradient: str | None
    state: str | dict[str, str] | None
    master: str

    def of_state(self, name: str, whole: bool) -> str | None:
        """The format of a state tensor; `whole`: it has the parameter's shape."""
        if isinstance(self.state, dict):
            return self.state.get(name)
        return self.state if whole and name != "step" else None

    def of_state_all(self) -> list[str]:
        """Every format that state may take."""
        return list(self.state.values()) if isinstance(self.state, dict) else [self.state] if self.state else []


# One parameter.


@dataclass(eq=False)
class _Slot:
    """A parameter, what the wrapped optimizer updates in its place (perhaps itself), and the formats of both."""

    position: int
    parameter: Tensor
    carried: Tensor
    carried_format: str | None
    seen_format: str | None

    @property
    def separate(self) -> bool:
        return self.carried is not self.parameter

    def carry(self, values: Tensor) -> None:
        if self.separate:
            self.carried.copy_(values)


def _is_whole(value: Any, slot: _Slot) -> bool:
    """Whether a piece of state is a floating-point tensor of the parameter's shape."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == slot.carried.shape


def _slot(position: int, parameter: Tensor, formats: _Formats) -> _Slot:
    dtype = parameter.dtype
    if dtype not in CONTAINERS:
        raise TypeError(f"parameters must be one of {', '.join(map(str, CONTAINERS))}, got {dtype}")
    _place(parameter)
    wide = torch.promote_types(dtype, torch.float32)
    own = str(lookup(dtype)) if dtype != wide else None
    seen = formats.weight or own
    carried = {"fp32": None, "bf16": str(lookup("bf16")), "none": seen}[formats.master]
    for fmt, holder in [(seen, dtype), (formats.gradient, dtype), *((fmt, wide) for fmt in formats.of_state_all())]:
        if fmt is not None:
            fields_of(fmt, holder)
    if dtype == wide and (seen is None or _is_own(seen, dtype) or formats.master == "none"):
        return _Slot(position, parameter, parameter, carried, None)
    copy = torch.nn.Parameter(parameter.detach().to(wide, copy=True), requires_grad=parameter.requires_grad)
    return _Slot(position, parameter, copy, carried, seen if formats.master != "none" else None)


@lru_cache(maxsize=256)
def _is_own(fmt: str, dtype: torch.dtype) -> bool:
    """Whether a format is just what a dtype holds."""
    return dtype != torch.float64 and lookup(fmt) == lookup(dtype)


@lru_cache(maxsize=256)
def _is_ieee(fmt: str) -> bool:
    return float_format(fmt).specials == "ieee"


# Rounding, and where its random words come from.


@dataclass
class _Rounder:
    """How tensors are rounded, in place or into a new one."""

    modes: dict[str, str]
    saturate: bool | None
    random_bits: int
    draws: _Draws

    def __post_init__(self) -> None:
        if self.random_bits not in RANDOM_BITS:
            raise ValueError(f"random_bits must be 32, 16 or 8, got {self.random_bits!r}")
        if self.saturate is not None and not isinstance(self.saturate, bool):
            raise TypeError(f"saturate must be a bool or None, got {self.saturate!r}")

    def saturates(self, fmt: str) -> bool:
        return not _is_ieee(fmt) if self.saturate is None else self.saturate

    def round(self, x: Tensor, fmt: str, mode: str, stream: str, inplace: bool) -> Tensor:
        """Round the part of a tensor that is here; `stream` names the random words, of which each step has its own."""
        local, place = _local(x), []
        seed = offset = None
        if mode == "stochastic":
            seed, offset = self.draws.key(stream, local.device), self.draws.counter(local.device)
            place = _place(x)
        how = (fields_of(fmt, x.dtype), Rounding.of(mode).number, self.saturates(fmt), seed, offset, self.random_bits)
        if inplace and not place:
            _ops.quantize_out(local, *how, local)
            return local
        rounded: Tensor = _ops.quantize(local, *how, None, place)
        return local.copy_(rounded) if inplace else rounded


@dataclass
class _Draws:
    """The seed, the step counter on each device, and the key of each stream of random words.

    Kernels read keys and counters from the device when they run, so that a replayed CUDA graph, which counts steps
    itself, draws new words.
    """

    seed: int
    counters: dict[torch.device, Tensor] = field(default_factory=dict)
    keys: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    @property
    def step(self) -> Tensor:
        """Steps taken: int64, 0-dim, on one of the devices."""
        return next(iter(self.counters.values()))

    def counter(self, device: torch.device) -> Tensor:
        if device not in self.counters:
            zero = torch.zeros((), dtype=torch.int64, device=device)
            self.counters[device] = zero.copy_(self.step) if self.counters else zero
        return self.counters[device]

    def advance(self) -> None:
        for counter in self.counters.values():
            counter += 1

    def key(self, stream: str, device: torch.device) -> Tensor:
        """The 64-bit key of a stream: the BLAKE2b digest of "seed/stream"."""
        if (stream, device) not in self.keys:
            # Filled by a kernel: a copy from the host could not be captured in a CUDA graph.
            self.keys[stream, device] = torch.full((), self._digest(stream), dtype=torch.int64, device=device)
        return self.keys[stream, device]

    def _digest(self, stream: str) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{stream}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def load(self, seed: int, step: Tensor) -> None:
        """Go on from a saved seed and counter, in the tensors that are there: captured graphs read these."""
        self.seed = seed
        for (stream, _), key in self.keys.items():
            key.fill_(self._digest(stream))
        for counter in self.counters.values():
            counter.copy_(step)


def _is_distributed(x: Tensor) -> bool:
    # Without this module, whose import takes long, there is no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _local(x: Tensor) -> Tensor:
    """The part of a tensor that is here, in its own memory."""
    local: Tensor = x.to_local() if _is_distributed(x) else x  # type: ignore[attr-defined]
    return local


def _place(x: Tensor) -> list[int]:
    """Where the elements that are here stand in the full tensor: [start, width, pitch], or [] where all are here.

    Local element i, in row-major order, is element start + (i // width) · pitch + i % width.
    """
    if not _is_distributed(x):
        return []
    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    split = [(i, how) for i, how in enumerate(placements) if mesh.size(i) > 1 and not how.is_replicate()]
    if not split:
        return []
    [(axis, how), *others] = split
    if others or not how.is_shard() or type(how).__name__ != "Shard":
        raise ValueError(f"DTensors must be replicated or sharded in one dimension, got {placements} on {mesh}")
    return place_of_shard(x.shape, how.dim, mesh.size(axis), mesh.get_local_rank(axis))


def place_of_shard(shape: Sequence[int], dim: int, count: int, rank: int) -> list[int]:
    """[start, width, pitch] of shard `rank` of `count`, as `torch.chunk` cuts a tensor along a dimension."""
    inner = math.prod(shape[dim + 1 :])
    size = -(-shape[dim] // count)
    begin, end = min(rank * size, shape[dim]), min((rank + 1) * size, shape[dim])
    return [begin * inner, max(end - begin, 1) * inner, shape[dim] * inner]
