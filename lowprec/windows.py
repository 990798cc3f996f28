"""Convolutions as matrix products, all of whose sums are contractions: nothing is added up outside them.

Every product here is of [groups, M, K] and [groups, K, N]. Windows of an image are columns: K runs over the channels of
a group and, within each, over the places of the kernel in row-major order; N runs over the batch and the places of the
result. Outside an image there are zeros, which take part in the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

Multiply = Callable[[Tensor, Tensor], Tensor]
"""Takes the matrices of a product."""


class Geometry(NamedTuple):
    """What a convolution is apart from its operands, in the order of `torch.convolution`."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def result(x: Tensor, weight: Tensor, how: Geometry, multiply: Multiply) -> Tensor:
    """The convolution of x [N, channels, ...]."""
    if how.transposed:
        return _scatter(x, weight, how, how.output_padding, multiply)
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in _each(x.shape[2:], weight.shape[2:], how)
    ]
    return _gather(x, weight, how, sizes, multiply)


def input_gradient(dy: Tensor, sizes: Sequence[int], weight: Tensor, how: Geometry, multiply: Multiply) -> Tensor:
    """The gradient of images of some sizes: a convolution the other way round."""
    if how.transposed:
        return _gather(dy, weight, how, sizes, multiply)
    rest = [
        wanted - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for wanted, (size, kernel, stride, padding, dilation) in zip(
            sizes, _each(dy.shape[2:], weight.shape[2:], how), strict=True
        )
    ]
    return _scatter(dy, weight, how, rest, multiply)


def weight_gradient(dy: Tensor, x: Tensor, weight: Sequence[int], how: Geometry, multiply: Multiply) -> Tensor:
    """The gradient of a weight of some shape: K runs over the batch and the places of the smaller image."""
    image, windows = (x, dy) if how.transposed else (dy, x)
    columns = _columns(windows, weight[2:], how, image.shape[2:])
    return multiply(_rows(image, how.groups), columns.mT).reshape(weight)


def _gather(x: Tensor, weight: Tensor, how: Geometry, sizes: Sequence[int], multiply: Multiply) -> Tensor:
    """Each result from its own window: weight [outputs, inputs of a group, ...]."""
    matrix = weight.reshape(how.groups, weight.shape[0] // how.groups, count(weight.shape[1:]))
    y = multiply(matrix, _columns(x, weight.shape[2:], how, sizes))
    return _image(y, x.shape[0], sizes)


def _scatter(x: Tensor, weight: Tensor, how: Geometry, rest: Sequence[int], multiply: Multiply) -> Tensor:
    """The transpose of `_gather`, as windows over x with zeros between: weight [inputs, outputs of a group, ...].

    Its places, and so the order of the sum, are those of the window: the kernel's turned round.
    """
    n = weight.dim() - 2
    inputs, outputs, *kernel = weight.shape
    turned = weight.flip(list(range(2, n + 2))).reshape(how.groups, inputs // how.groups, outputs, *kernel)
    matrix = turned.transpose(1, 2).reshape(how.groups, outputs, count([inputs // how.groups, *kernel]))
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(how.dilation, weight.shape[2:], strict=True)]
    edges = [(r - p, r - p + more) for r, p, more in zip(reach, how.padding, rest, strict=True)]
    wide = _padded(_widened(x, how.stride), edges)
    plain = how._replace(stride=[1] * n, padding=[0] * n)
    sizes = [size - r for size, r in zip(wide.shape[2:], reach, strict=True)]
    return _image(multiply(matrix, _columns(wide, weight.shape[2:], plain, sizes)), x.shape[0], sizes)


def _columns(x: Tensor, kernel: Sequence[int], how: Geometry, sizes: Sequence[int]) -> Tensor:
    """The first windows of x [N, channels, ...], `sizes` of them: [groups, channels of a group · places, N · sizes]."""
    n = len(kernel)
    x = _padded(x, [(p, p) for p in how.padding])
    for d in range(n):
        windows = x.unfold(2 + d, how.dilation[d] * (kernel[d] - 1) + 1, how.stride[d])
        x = windows.narrow(2 + d, 0, sizes[d])[..., :: how.dilation[d]]
    channels = x.shape[1] // how.groups
    x = x.reshape(x.shape[0], how.groups, channels, *x.shape[2:])
    x = x.permute(1, 2, *range(n + 3, 2 * n + 3), 0, *range(3, n + 3))
    return x.reshape(how.groups, channels * count(kernel), x.shape[n + 2] * count(sizes))


def _rows(x: Tensor, groups: int) -> Tensor:
    """An image [N, channels, ...] as [groups, channels of a group, N · places]."""
    return x.transpose(0, 1).reshape(groups, x.shape[1] // groups, x.shape[0] * count(x.shape[2:]))


def _image(y: Tensor, batch: int, sizes: Sequence[int]) -> Tensor:
    """The inverse of `_rows`."""
    return y.reshape(y.shape[0] * y.shape[1], batch, *sizes).transpose(0, 1).contiguous()


def _widened(x: Tensor, stride: list[int]) -> Tensor:
    """An image with zeros between its places."""
    for d, step in enumerate(stride, 2):
        apart = F.pad(x.unsqueeze(d + 1).movedim(d + 1, -1), (0, step - 1)).movedim(-1, d + 1)
        x = apart.flatten(d, d + 1).narrow(d, 0, (x.shape[d] - 1) * step + 1)
    return x


def _padded(x: Tensor, edges: Sequence[tuple[int, int]]) -> Tensor:
    """An image with zeros around it, or with less of it where there are fewer than none."""
    return F.pad(x, [number for edge in reversed(edges) for number in edge])


def count(sizes: Sequence[int]) -> int:
    """The product of sizes, by steps that torch's compiler follows."""
    product = 1
    for size in sizes:
        product *= size
    return product


def _each(sizes: Sequence[int], kernel: Sequence[int], how: Geometry) -> zip[tuple[int, int, int, int, int]]:
    """Size, kernel, stride, padding and dilation of every dimension of an image."""
    return zip(sizes, kernel, how.stride, how.padding, how.dilation, strict=True)
