"""Normalisation over features that come last or first, and weight norm of block-sparse layers."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowprec.eager_sparse import carrier_of
from lowprec.sparse.layout import BlockLayout
from lowprec.sparse.linear import Features, Linear
from lowprec.sparse.ops import is_first, require_features

L = TypeVar("L", bound=Linear)


class LayerNorm(nn.Module):
    """Layer norm over features: (x - mean) / sqrt(variance + eps), times a gain, plus a bias, for every token.

    Where features come last it is `torch.nn.LayerNorm`; where they come first the same numbers, transposed.

    Args:
        size: features C.
        features: "last" for x [..., C], "first" for x [C, ...].
        eps: added to the variance.
        affine: whether there are a gain ("weight", initially one) and a bias, both [C].
        bias: whether, if so, there is a bias, initially zero.
        device, dtype: of the parameters.

    Raises:
        ValueError: for another `features`; when called, for x without C features there.

    Source: Ba, Kiros and Hinton 2016.
    """

    def __init__(
        self,
        size: int,
        features: Features = "last",
        *,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.features, self.first = _size(size), eps, features, is_first(features)
        gain = torch.empty(size, device=device, dtype=dtype) if affine else None
        self.weight = None if gain is None else nn.Parameter(gain)
        self.bias = nn.Parameter(torch.empty_like(gain)) if gain is not None and bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gain one, bias zero."""
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                parameter.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each token: [..., C] or [C, ...], to the same shape, contiguous."""
        require_features("x", x, self.size, "features", self.features)
        if not self.first:
            return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        rows = F.layer_norm(x.movedim(0, -1), (self.size,), self.weight, self.bias, self.eps)
        return rows.movedim(-1, 0).contiguous()

    def extra_repr(self) -> str:
        return f"{self.size}, features={self.features!r}, eps={self.eps}, affine={self.weight is not None}"


class BatchNorm(nn.modules.batchnorm._NormBase):
    """Batch norm of every feature over all tokens: `torch.nn.BatchNorm2d`'s numbers for x [C, N, H, W].

    Args:
        size: features C.
        features: "first" for x [C, ...], "last" for x [..., C].
        eps, momentum, affine, track_running_stats, device, dtype: as for `torch.nn.BatchNorm2d`.

    Raises:
        ValueError: for another `features`; when called, for x without C features there, or one token in training.

    Source: Ioffe and Szegedy 2015.
    """

    def __init__(
        self,
        size: int,
        features: Features = "first",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(_size(size), eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.features, self.first = features, is_first(features)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each feature: [C, ...] or [..., C], to the same shape; running statistics follow in training."""
        require_features("x", x, self.num_features, "features", self.features)
        batch = self.training or self.running_mean is None
        follows = self.training and self.track_running_stats
        momentum = self._momentum() if follows else 0.0
        kept = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if kept else (None, None)
        # Channels are the second dimension to torch: with a first one of size one nothing moves.
        seen = x.reshape((1, self.num_features, -1) if self.first else (-1, self.num_features))
        y = F.batch_norm(seen, *running, self.weight, self.bias, batch, momentum, self.eps)
        return y.reshape(x.shape)

    def _momentum(self) -> float:
        """The weight of this batch in the running statistics: that of a cumulative mean if None is given."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        of_torch: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{of_torch}, features={self.features!r}"


def _size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive int, got {size!r}")
    return size


# Weight norm.


def weight_norm(layer: L, *, eps: float = 1e-12) -> L:
    """Give each output feature of a block-sparse layer a weight of length g: w = g · v / |v|, g and v learnt.

    |v| is the l2 norm over all weights of the blocks that are present in an output feature's column; its square is
    taken to be at least `eps`. Sums are in float32 (float64 of float64), in a fixed order. It is a parametrization of
    `weight` (`torch.nn.utils.parametrize`), in place: v is `parametrizations.weight.original1` and g [output features]
    `original0`, initially the weight and its norm. `parametrize.remove_parametrizations(layer, "weight")` undoes it.

    Args:
        layer: a `sparse.Linear` or `sparse.Conv2d`.
        eps: the least square of a norm.

    Returns:
        The layer.

    Raises:
        TypeError: for another layer.
        ValueError: for a layer whose weight is normalised already.

    Source: Salimans and Kingma 2016; openai/blocksparse's `l2_normalize` for the least square.
    """
    if not isinstance(layer, Linear):
        raise TypeError(f"layer must be a sparse.Linear or a sparse.Conv2d, got {type(layer).__name__}")
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError("layer: its weight is parametrized already")
    parametrize.register_parametrization(layer, "weight", WeightNorm(layer.layout, eps))
    return layer


class WeightNorm(nn.Module):
    """The parametrization behind `weight_norm`: gains [output features] and v [blocks, block, block] to weights."""

    def __init__(self, layout: BlockLayout, eps: float) -> None:
        super().__init__()
        self.layout, self.eps = layout, eps

    def set_layout(self, layout: BlockLayout) -> None:
        """Follow the layer to another layout."""
        self.layout = layout

    def forward(self, gain: Tensor, v: Tensor) -> Tensor:
        """Gains times v / |v|, in v's dtype."""
        wide = v.to(carrier_of(v))
        scale = gain.to(carrier_of(gain)) * self._squares(wide).rsqrt()
        return (wide * self.layout.spread(scale)).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gains and v that give a weight: its norms, and itself."""
        return self._squares(weight.to(carrier_of(weight))).sqrt().to(weight.dtype), weight

    def _squares(self, v: Tensor) -> Tensor:
        return self.layout.column_sums(v.square()).clamp(min=self.eps)
