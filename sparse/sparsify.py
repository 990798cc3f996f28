"""Dense models made sparse: linear layers and 1x1 convolutions in the blocks of a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.policy import matches
from lowprec.sparse import patterns
from lowprec.sparse.convolution import Conv2d
from lowprec.sparse.growth import best, energies
from lowprec.sparse.layout import BLOCKS, BlockLayout
from lowprec.sparse.linear import Linear
from lowprec.sparse.patterns.draws import share, whole

PatternLike = str | Callable[[int, int, float | None, int], Tensor]
"""A pattern's name, or a function of (inputs, outputs, density, seed) that gives a mask."""

INITS = ("rescale", "keep", "fresh")
"""What the blocks that stay start from."""

_REPORT = "_sparsity"


@dataclass(frozen=True)
class Converted:
    """A layer that is sparse now: its pattern and layout, and how many weights it had before and has now."""

    pattern: str
    layout: BlockLayout
    before: int
    after: int


@dataclass(frozen=True)
class Left:
    """A layer that is as it was: what it is, how many weights it has, and why."""

    kind: str
    weights: int
    reason: str


@dataclass(frozen=True)
class SparsityReport:
    """What `sparsify` did to a model, by module path; `str()` is a table."""

    converted: Mapping[str, Converted]
    left: Mapping[str, Left]

    def __str__(self) -> str:
        before, after = (sum(getattr(each, name) for each in self.converted.values()) for name in ("before", "after"))
        lines = [f"{_layers(self.converted)} sparse: {after:,} of {before:,} weights, {after / before:.1%}"]
        rows = [
            (path, each.pattern, f"{each.layout.inputs} -> {each.layout.outputs}", f"{each.layout.blocks} blocks of "
             f"{each.layout.block}", f"{each.layout.density:.1%}")
            for path, each in self.converted.items()
        ]  # fmt: skip
        lines += _columns(rows)
        if self.left:
            lines.append(f"{_layers(self.left)} as before: {sum(e.weights for e in self.left.values()):,} weights")
            lines += _columns([(path, each.kind, f"{each.weights:,}", each.reason) for path, each in self.left.items()])
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (dict(self.converted), dict(self.left))


class ChannelsLast(nn.Module):
    """A layer over images [N, H, W, C], for images [N, C, H, W]: views both ways, without a copy.

    Args:
        layer: a `sparse.Conv2d` with features last, or any other layer of that order.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'], in torch's channels_last order; or [C, H, W] likewise."""
        images = x if x.dim() == 4 else x[None]
        y: Tensor = self.layer(images.movedim(1, -1)).movedim(-1, 1)
        return y if x.dim() == 4 else y[0]


@torch.no_grad()
def sparsify(
    model: nn.Module,
    pattern: PatternLike,
    density: float | None = None,
    block: int = 32,
    *,
    only: str | Sequence[str] = "*",
    skip: str | Sequence[str] = (),
    init: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make the linear layers and 1x1 convolutions of a model block-sparse, in place.

    Each `nn.Linear` becomes a `sparse.Linear`, each 1x1 `nn.Conv2d` of one group a `sparse.Conv2d` between two views
    (`ChannelsLast`); dtype, device, bias, `requires_grad` and training mode stay. Make the optimizer afterwards:
    weights are new parameters. What cannot be converted is left as it is and listed, with the reason, by `report`:
    layers whose features the block does not divide, that share their parameters with another module, have hooks or a
    parametrization, or are of a subclass, whose parent may read the weight (as that of `nn.MultiheadAttention` does).
    The fast path of `nn.TransformerEncoderLayer`, which reads weights too, is switched off where one of its was
    converted. Nothing is changed where an argument is refused.

    Args:
        model: any module.
        pattern: as of `patterns.build`, "magnitude" for the blocks of the largest l2 norm, or a function of (input
            blocks, output blocks, density, seed) that gives a bool mask.
        density: share of the blocks that stay.
        block: 8, 16, 32 or 64.
        only: patterns (fnmatch) of the module paths that are converted, a module's for all beneath it.
        skip: patterns of those that are not.
        init: "rescale": the dense weights, times the square root of inputs / inputs that are left for each output,
            which keeps the variance of what random weights give; "keep": the dense weights; "fresh": as a new
            `sparse.Linear`. By default "keep" with "magnitude" and "rescale" with all others.
        seed: of the patterns; each layer's own comes from this one and its path.

    Returns:
        The model; a new layer where the model itself is one.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for what `patterns.build` and `BlockLayout` refuse, an unknown init, a pattern of paths that matches
            no module, or when no layer is converted.
    """
    _require(model, block, init)
    whole("seed", seed, least=0)
    choose = _Choice(_paths("only", only, model), _paths("skip", skip, model), block, _owners(model))
    layers = {path: module for path, module in model.named_modules() if _is_layer(path, module)}
    left = {path: each for path, module in layers.items() if (each := choose.left(path, module)) is not None}
    chosen = {path: module for path, module in layers.items() if path not in left}
    if not chosen:
        reasons = "; ".join(f"{path or '(model)'}: {each.reason}" for path, each in left.items())
        raise ValueError(f"model has no layer to convert: {reasons or 'none with a weight matrix'}")
    layouts = {path: _layout(module, pattern, density, block, _seed_of(seed, path)) for path, module in chosen.items()}
    init = init or ("keep" if pattern == "magnitude" else "rescale")
    made = {id(module): _sparse(module, layouts[path], init) for path, module in chosen.items()}
    model = _replace(model, made)
    converted = {path: _record(pattern, layouts[path]) for path in chosen}
    _remember(model, converted, left)
    return model


def report(model: nn.Module) -> SparsityReport:
    """What `sparsify` did to a model, in one call or several.

    Raises:
        ValueError: for a model that it did nothing to.
    """
    found = model.__dict__.get(_REPORT)
    if not isinstance(found, SparsityReport):
        raise ValueError("model was not made sparse: lowprec.sparse.sparsify does that")
    return found


# Which layers.


@dataclass(frozen=True)
class _Choice:
    """What decides whether a layer is converted."""

    only: tuple[str, ...]
    skip: tuple[str, ...]
    block: int
    owners: Mapping[int, list[str]]

    def left(self, path: str, module: nn.Module) -> Left | None:
        """Why a layer is left as it is; None if it is not."""
        reason = self._reason(path, module)
        weights = sum(each.numel() for each in module._parameters.values() if each is not None and each.dim() > 1)
        return None if reason is None else Left(type(module).__name__, weights, reason)

    def _reason(self, path: str, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Linear | nn.Conv2d):
            return "no linear layer or 1x1 convolution"
        if not any(matches(pattern, path) for pattern in self.only):
            return "not in only"
        if any(matches(pattern, path) for pattern in self.skip):
            return "in skip"
        return _unfit(module) or self._shared(module, path) or _undivided(module, self.block)

    def _shared(self, module: nn.Module, path: str) -> str | None:
        for name, parameter in module._parameters.items():
            others = [other for other in self.owners.get(id(parameter), []) if other != path]
            if others:
                return f"{name} is also that of {others[0] or '(model)'}"
        return None


def _unfit(module: nn.Linear | nn.Conv2d) -> str | None:
    """Why a layer is none that can be converted."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return "parametrized" if hasattr(module, "parametrizations") else "a subclass, whose weight others may read"
    if isinstance(module, nn.Conv2d):
        if module.kernel_size != (1, 1) or module.groups != 1:
            return f"a {module.kernel_size[0]}x{module.kernel_size[1]} convolution in {module.groups} groups"
        if module.padding_mode != "zeros":
            return f"padded by {module.padding_mode}"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "has hooks" if any(hooks) else None


def _undivided(module: nn.Module, block: int) -> str | None:
    sizes = dict(zip(("outputs", "inputs"), _matrix(module).shape, strict=True))
    wrong = [f"{size} {name}" for name, size in reversed(sizes.items()) if size % block or not size]
    return f"{' and '.join(wrong)}: no multiple of {block}" if wrong else None


def _is_layer(path: str, module: nn.Module) -> bool:
    """Whether a module has a weight of its own that is more than a vector, or computes one; sparse layers apart."""
    own = any(parameter is not None and parameter.dim() > 1 for parameter in module._parameters.values())
    matrix = (own or isinstance(module, nn.Linear | nn.Conv2d)) and not isinstance(module, Linear)
    return matrix and "parametrizations" not in path.split(".")


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The paths of the modules that own each parameter."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return owners


def _paths(name: str, given: str | Sequence[str], model: nn.Module) -> tuple[str, ...]:
    """Patterns of paths, each of which matches some module."""
    listed = (given,) if isinstance(given, str) else tuple(given)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must be a pattern or several, got {pattern!r}")
        if not any(matches(pattern, path) for path, _ in model.named_modules()):
            raise ValueError(f"{name} must match modules of the model, got {pattern!r}, which matches none")
    return listed


# What they become.


def _layout(module: nn.Module, pattern: PatternLike, density: float | None, block: int, seed: int) -> BlockLayout:
    matrix = _matrix(module).T
    inputs, outputs = (size // block for size in matrix.shape)
    if pattern == "magnitude":
        mask = _strongest(matrix, density, block)
    elif isinstance(pattern, str):
        mask = patterns.build(pattern, inputs, outputs, density, seed)
    else:
        mask = pattern(inputs, outputs, density, seed)
        if not isinstance(mask, Tensor) or mask.shape != (inputs, outputs):
            given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"pattern must give a mask of shape {(inputs, outputs)}, got {given}")
    return BlockLayout(mask.to(matrix.device), block)


def _strongest(matrix: Tensor, density: float | None, block: int) -> Tensor:
    """The mask of the blocks of the largest norm: round(density · blocks) of them."""
    if density is None:
        raise ValueError("density must be given for magnitude, got None")
    every = torch.ones([size // block for size in matrix.shape], dtype=torch.bool, device=matrix.device)
    strength = energies(BlockLayout(every, block).from_dense(matrix))
    chosen = best(strength, every.flatten(), round(share("density", density) * every.numel()))
    return torch.zeros_like(every.flatten()).index_fill(0, chosen, True).view_as(every)


def _sparse(module: nn.Module, layout: BlockLayout, init: str) -> nn.Module:
    layer: Linear
    if isinstance(module, nn.Conv2d):
        layer = Conv2d.from_dense(module, layout, "last")
    else:
        assert isinstance(module, nn.Linear)
        layer = Linear.from_dense(module, layout)
    if init == "fresh":
        layer.reset_parameters()
    elif init == "rescale":
        counts = layout.mask.sum(0).clamp(min=1).to(layer.weight.device)
        scale = (layout.shape[0] / counts.to(torch.float64)).sqrt().to(layer.weight.dtype)
        layer.weight.mul_(scale[layout.coordinates[:, 1].to(scale.device), None, None])
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            getattr(layer, name).requires_grad_(getattr(module, name).requires_grad)
    return ChannelsLast(layer).train(module.training) if isinstance(module, nn.Conv2d) else layer


def _replace(model: nn.Module, made: Mapping[int, nn.Module]) -> nn.Module:
    """The model with the new layers in the places of the old ones, all of them where one has several."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    for module in model.modules():
        _leave_fast_path(module)
    return made.get(id(model), model)


def _leave_fast_path(module: nn.Module) -> None:
    """Have torch's encoder layers call their linear layers, not read their weights."""
    if isinstance(module, nn.TransformerEncoderLayer) and _is_sparse(module):
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder) and any(_is_sparse(layer) for layer in module.layers):
        module.use_nested_tensor = False


def _is_sparse(module: nn.Module) -> bool:
    return any(isinstance(each, Linear) for each in module.modules())


def _matrix(module: nn.Module) -> Tensor:
    """The weight [outputs, inputs] of a linear layer or 1x1 convolution."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.flatten(1)


def _seed_of(seed: int, path: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{path}".encode(), digest_size=8).digest(), "little")


# The rest.


def _require(model: object, block: object, init: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if block not in BLOCKS or isinstance(block, bool):
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    if init is not None and init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")


def _record(pattern: PatternLike, layout: BlockLayout) -> Converted:
    name = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", type(pattern).__name__)
    return Converted(name, layout, layout.inputs * layout.outputs, layout.blocks * layout.block**2)


def _remember(model: nn.Module, converted: dict[str, Converted], left: dict[str, Left]) -> None:
    earlier = model.__dict__.get(_REPORT)
    both = {**earlier.converted, **converted} if earlier else converted
    model.__dict__[_REPORT] = _restored(both, {path: each for path, each in left.items() if path not in both})


def _restored(converted: dict[str, Converted], left: dict[str, Left]) -> SparsityReport:
    return SparsityReport(MappingProxyType(converted), MappingProxyType(left))


def _layers(listed: Mapping[str, object]) -> str:
    return "1 layer is" if len(listed) == 1 else f"{len(listed)} layers are"


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Rows with their words below each other."""
    table = [("(model)" if not row[0] else row[0], *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
