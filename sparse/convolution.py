"""Separable convolutions whose 1x1 part is block-sparse, over images with channels first or last.

Images are [C, N, H, W] ("CNHW"), which to a block-sparse product is [C, tokens], or [N, H, W, C], which is [tokens, C].
torch's pooling layers take CNHW as it is: they treat the first two dimensions alike.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.accumulate import AccumulatorLike
from lowprec.sparse.layout import BlockLayout
from lowprec.sparse.linear import Features, Linear
from lowprec.sparse.ops import require_features

Groups = Literal["depthwise"] | int


def to_cn(x: Tensor) -> Tensor:
    """[N, C, ...] as [C, N, ...], contiguous: images, or rows of features, for layers whose features come first."""
    return _exchanged(x)


def from_cn(x: Tensor) -> Tensor:
    """[C, N, ...] as [N, C, ...], contiguous: the inverse of `to_cn`."""
    return _exchanged(x)


def _exchanged(x: Tensor) -> Tensor:
    if x.dim() < 2:
        raise ValueError(f"x must have two dimensions or more, got shape {tuple(x.shape)}")
    return x.transpose(0, 1).contiguous()


class Conv2d(Linear):
    """A spatial convolution within channels or groups of them, then a block-sparse 1x1 convolution, then a bias.

    With `kernel_size` 1 there is only the latter: a `sparse.Linear` over channels at every place that the stride and
    the padding with zeros leave.

    Args:
        layout: of the 1x1 convolution, from input to output channels.
        kernel_size: of the spatial convolution, and its stride, padding and dilation: an int, or a pair (H, W).
        stride: as above.
        padding: as above; zeros.
        dilation: as above.
        groups: of the spatial convolution, which keeps the number of channels: "depthwise" for each by itself, or how
            many groups of channels there are; 1 is a dense convolution.
        bias: whether there is a bias, [output channels].
        features: "first" for x [C, N, H, W], "last" for x [N, H, W, C], which torch convolves without a copy.
        accumulator, gate, device, dtype: as for `sparse.Linear`; an accumulator is for the 1x1 convolution.

    Attributes:
        spatial: the weight of the spatial convolution, [C, C / groups, *kernel_size], or None; initially as that of
            `torch.nn.Conv2d`.
        weight, bias, gate, layout: as for `sparse.Linear`.

    Shapes: [C, N, H, W] -> [C', N, H', W'], or [N, H, W, C] -> [N, H', W', C']; H' and W' as in `torch.nn.Conv2d`.

    Raises:
        TypeError, ValueError: as `sparse.Linear`, for images of other than four dimensions, and for sizes or groups
            that are none or do not divide the channels.
    """

    spatial: Tensor | None

    def __init__(
        self,
        layout: BlockLayout,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: Groups = "depthwise",
        bias: bool = True,
        features: Features = "first",
        *,
        accumulator: AccumulatorLike | None = None,
        gate: bool | Tensor = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layout, bias, features, accumulator=accumulator, gate=gate, device=device, dtype=dtype)
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        self.padding = _pair("padding", padding, 0)
        self.groups = self.inputs if groups == "depthwise" else _groups(groups, self.inputs)
        shape = (self.inputs, self.inputs // self.groups, *self.kernel_size)
        spatial = None if self.kernel_size == (1, 1) else torch.empty(shape, device=device, dtype=dtype)
        self.register_parameter("spatial", None if spatial is None else nn.Parameter(spatial))
        self._reset_spatial()

    def reset_parameters(self) -> None:
        """Give the weights and the bias their initial values; gates stay."""
        super().reset_parameters()
        self._reset_spatial()

    def _reset_spatial(self) -> None:
        spatial = self._parameters.get("spatial")
        if spatial is not None:
            nn.init.kaiming_uniform_(spatial, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images [C, N, H, W], or with features last [N, H, W, C]."""
        if x.dim() != 4:
            layout = "[C, N, H, W]" if self.first else "[N, H, W, C]"
            raise ValueError(f"x must be images {layout}, got shape {tuple(x.shape)}")
        require_features("x", x, self.inputs, "inputs", self.features)
        return super().forward(self.product_input(x))

    def product_input(self, x: Tensor) -> Tensor:
        """What the block-sparse product reads: the images after the spatial convolution."""
        spatial = self.spatial  # once: it may be computed
        return self._sampled(x) if spatial is None else self._convolved(x, spatial)

    def _convolved(self, x: Tensor, spatial: Tensor) -> Tensor:
        """The spatial convolution, on a view in torch's order [N, C, H, W]."""
        there = (0, 1) if self.first else (-1, 1)
        images = x.movedim(*there)
        y = F.conv2d(images, spatial, None, self.stride, self.padding, self.dilation, self.groups)
        return y.movedim(*reversed(there))

    def _sampled(self, x: Tensor) -> Tensor:
        """The places that a kernel of size one is applied to."""
        (down, across), (below, right) = self.stride, self.padding
        edges = [right, right, below, below]
        if self.first:
            return F.pad(x, edges)[:, :, ::down, ::across] if any(edges) else x[:, :, ::down, ::across]
        x = F.pad(x, [0, 0, *edges]) if any(edges) else x
        return x[:, ::down, ::across]

    @classmethod
    def from_dense(  # type: ignore[override]
        cls, conv: nn.Conv2d, layout: BlockLayout, features: Features = "first", **options: Any
    ) -> Conv2d:
        """A layer with the blocks of a dense 1x1 convolution that are present, its bias, stride and padding.

        Args:
            conv: 1x1, of as many channels as the layout.
            layout: of the new layer.
            features: of the new layer, by which its images are laid out: not as torch has them.
            **options: its accumulator and gate.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d, got {type(conv).__name__}")
        if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(f"conv must be 1x1, in one group and padded with zeros, got {conv}")
        padding = 0 if isinstance(conv.padding, str) else conv.padding
        options |= {"stride": conv.stride, "padding": padding, "features": features}
        return cls._filled(conv.weight[:, :, 0, 0].T, conv.bias, layout, **options).train(conv.training)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A `torch.nn.Conv2d` with the same weights, both convolutions in one.

        It takes images [N, C, H, W].
        """
        how = (self.kernel_size, self.stride, self.padding, self.dilation)
        conv = nn.Conv2d(self.inputs, self.outputs, *how, bias=self.bias is not None).to(self.weight)
        conv.train(self.training).weight.copy_(self._dense_weight())
        if self.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.bias)
        return conv

    def _dense_weight(self) -> Tensor:
        """[outputs, inputs, *kernel_size]: for each output, the sum over the channels that the spatial one gives."""
        matrix = self._matrix()
        if self.spatial is None:
            return matrix.T[:, :, None, None]
        by_group = matrix.T.reshape(self.outputs, self.groups, -1)
        spatial = self.spatial.reshape(self.groups, -1, *self.spatial.shape[1:])
        return torch.einsum("ogc,gcihw->ogihw", by_group, spatial).flatten(1, 2)

    def extra_repr(self) -> str:
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in names)])


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(isinstance(each, bool) or not isinstance(each, int) or each < least for each in pair):
        raise ValueError(f"{name} must be an int from {least} up, or a pair of them, got {value!r}")
    return pair


def _groups(groups: object, channels: int) -> int:
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups must be 'depthwise' or divide the {channels} channels, got {groups!r}")
    return groups
