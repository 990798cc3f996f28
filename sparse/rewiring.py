"""Learned sparsity: while a model trains, its weakest blocks move to where the gradient asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lowprec.blocksparse import flatten
from lowprec.optim import LowPrecision
from lowprec.sparse.growth import REDUCTIONS, best, carry, energies, gradient_scores
from lowprec.sparse.layout import BlockLayout
from lowprec.sparse.linear import Linear
from lowprec.sparse.patterns.draws import Draws, share, whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.utils.hooks import RemovableHandle

SCORES = ("gradient", "random")
"""What decides where blocks grow: RigL's gradient, or SET's chance."""


class Rewired(NamedTuple):
    """A layer whose blocks moved: what belongs to them elsewhere, as an average of weights, `sparse.carry` moves."""

    name: str
    before: BlockLayout
    after: BlockLayout


class Rewiring:
    """A scheduler that keeps each sparse layer's number of blocks, and moves some of them every so many steps.

    When a step is due, the share · blocks weakest blocks of a layer (by l2 norm) are dropped, and as many grow where
    the dense gradient of that step is largest by block, or at random. As in RigL a dropped block may come straight
    back; then nothing about it changes. New blocks start at zero. In place and by the same order on every device:

    - the layer's weight, its gradient, its gates (those of new blocks are 1) and, through `Linear.set_layout`, its
      tables: parameters stay the same objects, and compiled code and captured CUDA graphs follow;
    - the optimizer's state of these, and the masters of a `lowprec.optim.LowPrecision`: kept blocks keep theirs, new
      ones start at zero.

    Call `step()` after every `optimizer.step()`. Only when the next one is `due` do layers remember their input and the
    gradient of their output; on all others it costs nothing and never waits for the GPU. The due step itself must run
    eagerly: neither a captured CUDA graph nor compiled code calls hooks. Where its gradient is not finite, as when
    GradScaler skips a step, the layer waits for the next step. Weights are ordinary tensors, not sharded ones.

    Args:
        model: a module, or sparse layers by name or in a list. Layers whose weight needs no gradient are left alone.
        optimizer: what trains them, or None.
        until: no layer is rewired from this step on.
        share: of the blocks that move at first; it falls to zero at `until` as a cosine.
        every: how many steps lie between.
        score: "gradient" or "random".
        reduce: how the gradient of a block becomes a number: "exact", "l2" or "max", as in `absent_scores`.
        seed: of random scores, the same in all processes.
        group: the processes over which gradients' scores are summed: those of a `DistributedDataParallel`, whose
            layouts would drift apart otherwise.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for values out of range, no sparse layer, a parametrized weight, or layers that share a weight but
            not a layout.

    Source: Evci et al. 2020 (RigL), Mocanu et al. 2018 (SET).
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Linear] | Iterable[Linear],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        until: int,
        share: float = 0.3,
        every: int = 100,
        score: str = "gradient",
        reduce: str = "exact",
        seed: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
        self.optimizer, self.group = optimizer, group
        self.until, self.every, self.seed = whole("until", until), whole("every", every), whole("seed", seed, least=0)
        self.share = _share(share)
        self.score, self.reduce = _one_of("score", score, SCORES), _one_of("reduce", reduce, REDUCTIONS)
        self._steps = 0
        self._sites = list(_sites(model))
        self._listen()

    @torch.no_grad()
    def step(self) -> list[Rewired]:
        """Count a step, and rewire what is due.

        Returns:
            The layers that were.

        Raises:
            RuntimeError: when a layer is due whose input and gradient never came by.
        """
        self._steps += 1
        done = []
        if self._is_due(self._steps):
            for site in self._sites:
                site.waiting = True
        for site in self._sites:
            if site.waiting and (after := self._rewired(site)) is not None:
                done.append(Rewired(site.name, site.layout, after))
                self._apply(site, after)
        self._listen()
        return done

    @property
    def due(self) -> bool:
        """Whether the step to come has to run eagerly, since layers need its gradient."""
        return any(site.handles for site in self._sites)

    def fraction(self, step: int) -> float:
        """The share of blocks that move at a step: a cosine from `share` to zero at `until`."""
        return self.share / 2 * (1 + math.cos(math.pi * min(step, self.until) / self.until))

    def state_dict(self) -> dict[str, Any]:
        """The step and who waits; layouts are the layers' own."""
        return {"steps": self._steps, "waiting": [site.name for site in self._sites if site.waiting]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._steps = whole("steps", state_dict["steps"], least=0)
        for site in self._sites:
            site.waiting = site.name in state_dict["waiting"]
        self._listen()

    # When.

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 and step < self.until

    def _listen(self) -> None:
        """Have those layers remember the next step that will need it."""
        due = self._is_due(self._steps + 1)
        for site in self._sites:
            site.listen(self.score == "gradient" and (due or site.waiting))

    # What moves.

    def _rewired(self, site: _Site) -> BlockLayout | None:
        """Where a layer's blocks will be; None while its gradient is not finite."""
        layout = site.layout
        scores = self._scores(site)
        if not bool(scores.isfinite().all()):
            return None
        site.waiting = False
        stay = layout.blocks - round(self.fraction(self._steps) * layout.blocks)
        strength = energies(self._master(site.weight))
        i, j = layout.coordinates.unbind(1)
        strongest = best(strength, torch.ones_like(strength, dtype=torch.bool), stay)
        kept = (i * layout.shape[1] + j)[strongest.to(i.device)]
        mask = torch.zeros_like(layout.mask.flatten()).index_fill(0, kept, True)
        grown = best(scores.flatten(), ~mask, layout.blocks - stay)
        return BlockLayout(mask.index_fill(0, grown, True).view(layout.shape), layout.block, blocks=layout.blocks)

    def _scores(self, site: _Site) -> Tensor:
        layout = site.layout
        if self.score == "random":
            name = blake2b(f"{self.seed}/{site.name}/{self._steps}".encode(), digest_size=8).digest()
            order = Draws(int.from_bytes(name, "little")).order(layout.mask.numel())
            return torch.from_numpy(order.astype(np.float64)).view(layout.shape).to(layout.mask.device)
        if not site.pairs:
            raise RuntimeError(
                f"{site.name} is due to be rewired, but no gradient came by since the last step: is it used, does it "
                "run eagerly, and is step() called once after each optimizer.step()?"
            )
        scores = site.scores(self.reduce)
        if self.group is not None:
            torch.distributed.all_reduce(scores, group=self.group)
        return scores.to(layout.mask.device)

    # What follows.

    def _master(self, parameter: Tensor) -> Tensor:
        masters = self.optimizer.masters if isinstance(self.optimizer, LowPrecision) else {}
        return masters.get(parameter, parameter)

    def _apply(self, site: _Site, after: BlockLayout) -> None:
        before = site.layout
        for tensor, fill in self._belongings(site):
            tensor.copy_(carry(tensor, before, after, fill=fill))
        for layer in site.layers:
            layer.set_layout(after)

    def _belongings(self, site: _Site) -> Iterator[tuple[Tensor, float]]:
        """All that has an entry for each block, and what a new block's is."""
        gates = [layer.gate for layer in site.layers if layer.gate is not None]
        for parameter, new in ((site.weight, 0.0), *((gate, 1.0) for gate in gates)):
            yield parameter, new
            if self._master(parameter) is not parameter:
                yield self._master(parameter), new
            state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
            others = [parameter.grad if parameter.is_leaf else None, *state.values()]
            yield from ((each, 0.0) for each in others if isinstance(each, Tensor) and each.shape == parameter.shape)


# Layers.


@dataclass(eq=False)
class _Site:
    """A weight, the layers that multiply by it, and what they were given and gave back in the step at hand."""

    name: str
    layers: list[Linear]
    waiting: bool = False
    pairs: list[tuple[Linear, Tensor, Tensor]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        return self.layers[0].weight

    @property
    def layout(self) -> BlockLayout:
        return self.layers[0].layout

    def listen(self, wanted: bool) -> None:
        """Forget the step that was, and remember the next or not."""
        self.pairs.clear()
        if wanted and not self.handles:
            self.handles = [layer.register_forward_hook(self._hook(layer)) for layer in self.layers]
        elif not wanted:
            for handle in self.handles:
                handle.remove()
            self.handles = []

    def _hook(self, layer: Linear) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def remember(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            if y.requires_grad:
                x = args[0].detach()
                y.register_hook(lambda dy: self.pairs.append((layer, x, dy.detach())))  # type: ignore[no-untyped-call]

        return remember

    def scores(self, reduce: str) -> Tensor:
        """The size of the gradient of each block, [inputs, outputs], over all calls of the step."""
        tokens = [_tokens(layer, layer.product_input(x), dy) for layer, x, dy in self.pairs]
        wide = torch.promote_types(tokens[0][0].dtype, torch.float32)
        return gradient_scores([(x.to(wide), dy.to(wide)) for x, dy in tokens], self.layout, reduce=reduce)


def _tokens(layer: Linear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """A pair as [tokens, features]."""
    first = layer.features == "first"
    (x, _), (dy, _) = flatten(x, first), flatten(dy, first)
    return (x.T, dy.T) if first else (x, dy)


def _sites(model: nn.Module | Mapping[str, Linear] | Iterable[Linear]) -> Iterator[_Site]:
    found: dict[int, _Site] = {}
    for name, layer in _layers(model):
        if not isinstance(layer, Linear):
            raise TypeError(f"model must be a module or sparse layers, got {type(layer).__name__} for {name}")
        if not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"{name} has a parametrized weight, which cannot be rewired")
        if layer.weight.requires_grad:
            site = found.setdefault(id(layer.weight), _Site(name, []))
            site.layers.append(layer)
            if layer.layout != site.layout:
                raise ValueError(f"{site.name} and {name} share a weight: they must have one layout")
    if not found:
        raise ValueError("model must have sparse layers whose weight needs a gradient, got none")
    yield from found.values()


def _layers(model: nn.Module | Mapping[str, Linear] | Iterable[Linear]) -> list[tuple[str, Any]]:
    if isinstance(model, nn.Module):
        return [(name or "model", each) for name, each in model.named_modules() if isinstance(each, Linear)]
    if isinstance(model, Mapping):
        return list(model.items())
    return [(f"layer {i}", layer) for i, layer in enumerate(model)]


def _share(value: float) -> float:
    if not 0 < share("share", value) <= 1:
        raise ValueError(f"share must be above 0, got {value}")
    return value


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value
