"""Sums of a model that are no products, by a policy's accumulator: normalisations, softmax, losses, sums and means.

Each is written as elementwise steps in float32 (float64 of float64), totals over dimensions and broadcasts. The
gradient of a broadcast is a total, so that the backward pass has no other sums either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.products import Handler
from lowprec.roles import Roles
from lowprec.sums import Reducing, Reduction
from lowprec.windows import count


def softmax(how: Reducing, x: Tensor, dim: int) -> Tensor:
    """exp(x - max) over its sum, along a dimension, in x's dtype."""
    if x.dim() == 0 or x.numel() == 0:
        return x.softmax(dim)
    exponentials, total, sums = _exponentials(how, x, dim)
    return exponentials / sums.spread(total, x)


def log_softmax(how: Reducing, x: Tensor, dim: int) -> Tensor:
    """The logarithm of that, as x - max - log(sum)."""
    if x.dim() == 0 or x.numel() == 0:
        return x.log_softmax(dim)
    _, total, sums = _exponentials(how, x, dim)
    return x - _largest(x, dim) - sums.spread(total.log(), x)


def _exponentials(how: Reducing, x: Tensor, dim: int) -> tuple[Tensor, Tensor, Reduction]:
    sums = how.begin(x)
    exponentials = (x - _largest(x, dim)).exp()
    return exponentials, sums.total(exponentials, [dim % x.dim()]), sums


def _largest(x: Tensor, dim: int) -> Tensor:
    return x.detach().amax(dim, keepdim=True)


def normalized(sums: Reduction, x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) over some dimensions, the mean and the variance; these stay as ones."""
    n = count([x.shape[d] for d in dims])
    mean = sums.total(x, dims) / n
    centred = x - sums.spread(mean, x)
    variance = sums.total(centred.square(), dims) / n
    return centred * sums.spread((variance + eps).rsqrt(), x), mean, variance


def _affine(sums: Reduction, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Weight · x + bias, where both have a shape in which they are broadcast to x."""
    if weight is not None:
        x = x * sums.spread(weight.to(x.dtype).reshape(shape), x)
    return x if bias is None else x + sums.spread(bias.to(x.dtype).reshape(shape), x)


# Handlers: they take the roles of the call, torch's own function and that function's arguments.


def _how(roles: Roles) -> Reducing:
    how = roles.reducing()
    assert how is not None
    return how


def _begin(roles: Roles, x: Tensor) -> Reduction:
    return _how(roles).begin(x)


def _carried(x: Tensor) -> Tensor:
    """A tensor in the dtype in which its sums are carried."""
    return x if x.dtype == torch.float64 else x.float()


def _dtype(x: Tensor, chosen: torch.dtype | None = None, *, in_autocast: bool = True) -> torch.dtype:
    """That of a result: what was asked for, else x's own, or float32 where CUDA's autocast has it so."""
    if chosen is not None:
        return chosen
    narrow = in_autocast and x.is_cuda and x.dtype != torch.float64
    return torch.float32 if narrow and torch.is_autocast_enabled("cuda") else x.dtype


def add_up(
    roles: Roles,
    function: Handler,
    input: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The sum over all dimensions or some, or the mean, rounded to the dtype once more."""
    averages = function in (torch.mean, Tensor.mean)
    input = input.to(torch.float64) if dtype == torch.float64 else input
    dims = [dim] if isinstance(dim, int) else list(dim or range(input.dim()))
    shaped = input if input.dim() else input.unsqueeze(0)
    dims = [d % shaped.dim() for d in dims] if input.dim() else [0]
    y = _begin(roles, input).total(shaped, dims)
    if averages:
        y = y / count([shaped.shape[d] for d in dims])
    y = y.reshape([size for d, size in enumerate(y.shape) if d not in dims] if not keepdim else y.shape)
    y = y.reshape(()) if input.dim() == 0 else y
    y = y.to(_dtype(input, dtype, in_autocast=not averages))
    return y if out is None else torch.mul(y, 1, out=out)


def _along(handled: Callable[[Reducing, Tensor, int], Tensor]) -> Handler:
    """The handler of softmax or its logarithm."""

    def handler(
        roles: Roles,
        function: Handler,
        input: Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if isinstance(_stacklevel, torch.dtype):  # which is the dtype's place in all but torch.nn.functional
            dtype = _stacklevel
        if dim is None:
            dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)  # type: ignore[attr-defined]
        y = handled(_how(roles), _carried(input if dtype is None else input.to(dtype)), dim)
        return y.to(_dtype(input, dtype))

    return handler


def layer_norm(
    roles: Roles,
    function: Handler,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """As `F.layer_norm`."""
    x, sums = _carried(input), _begin(roles, input)
    y, _, _ = normalized(sums, x, _last(x, normalized_shape), eps)
    return _affine(sums, y, weight, bias, normalized_shape).to(_dtype(input))


def rms_norm(
    roles: Roles,
    function: Handler,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """As `F.rms_norm`."""
    x, sums = _carried(input), _begin(roles, input)
    dims = _last(x, normalized_shape)
    mean = sums.total(x.square(), dims) / count(normalized_shape)
    scale = (mean + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return _affine(sums, x * sums.spread(scale, x), weight, None, normalized_shape).to(_dtype(input))


def _last(x: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    n = len(normalized_shape)
    if tuple(x.shape[x.dim() - n :]) != tuple(normalized_shape):
        raise ValueError(f"normalized_shape must be the last dimensions of the input, {tuple(x.shape)}")
    return list(range(x.dim() - n, x.dim()))


def group_norm(
    roles: Roles,
    function: Handler,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """As `F.group_norm`: over the channels of a group and all places."""
    if input.shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {input.shape[1]} channels, got {num_groups}")
    x, sums = _carried(input), _begin(roles, input)
    apart = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:])
    y, _, _ = normalized(sums, apart, list(range(2, apart.dim())), eps)
    return _affine(sums, y.reshape(x.shape), weight, bias, _channels(x)).to(_dtype(input))


def batch_norm(
    roles: Roles,
    function: Handler,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `F.batch_norm`: over the batch and all places, or by running statistics."""
    x, sums, shape = _carried(input), _begin(roles, input), _channels(input)
    if training:
        F._verify_batch_size(list(input.shape))  # type: ignore[attr-defined]
        y, mean, variance = normalized(sums, x, [d for d in range(x.dim()) if d != 1], eps)
        n = x.numel() // x.shape[1]
        _follow(running_mean, mean, momentum)
        _follow(running_var, variance * (n / (n - 1)), momentum)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean and running_var must be given, unless training")
        mean, scale = running_mean.to(x.dtype), (running_var.to(x.dtype) + eps).rsqrt()
        y = (x - mean.reshape(shape)) * scale.reshape(shape)
    return _affine(sums, y, weight, bias, shape).to(input.dtype)


def _channels(x: Tensor) -> list[int]:
    """The shape in which a number for each channel is broadcast to x [N, channels, ...]."""
    return [1, x.shape[1], *[1] * (x.dim() - 2)]


@torch.no_grad()
def _follow(running: Tensor | None, now: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(now.reshape(running.shape).to(running.dtype), alpha=momentum)


def cross_entropy(
    roles: Roles,
    function: Handler,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As `F.cross_entropy` of classes [N, ...]; of probabilities, or smoothed, it is left to torch and noted."""
    if target.is_floating_point() or label_smoothing or size_average is not None or reduce is not None:
        rest = (weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        return _left_to_torch(roles, function, input, target, *rest)
    logs = log_softmax(_how(roles), _carried(input), 0 if input.dim() == 1 else 1)
    return _likelihood(roles, logs, target, weight, ignore_index, reduction).to(_loss_dtype(input))


def nll_loss(
    roles: Roles,
    function: Handler,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As `F.nll_loss`."""
    if size_average is not None or reduce is not None:
        return _left_to_torch(roles, function, input, target, weight, size_average, ignore_index, reduce, reduction)
    return _likelihood(roles, _carried(input), target, weight, ignore_index, reduction).to(_loss_dtype(input))


def _likelihood(
    roles: Roles, logs: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """The negative logarithms of classes, weighted; in the mean their sum over that of the weights."""
    classes = 0 if logs.dim() == 1 else 1
    ignored = target == ignore_index
    chosen = target.masked_fill(ignored, 0)
    scale = logs.new_ones(()) if weight is None else weight.to(logs.dtype)[chosen]
    scale = scale.expand(target.shape).masked_fill(ignored, 0.0)
    picked = logs.gather(classes, chosen.unsqueeze(classes)).squeeze(classes)
    return _reduced(roles, (-picked * scale).masked_fill(ignored, 0.0), scale, reduction)


def mse_loss(
    roles: Roles,
    function: Handler,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """As `F.mse_loss` of tensors of one shape."""
    if size_average is not None or reduce is not None or weight is not None or input.shape != target.shape:
        return _left_to_torch(roles, function, input, target, size_average, reduce, reduction, weight)
    errors = (_carried(input) - _carried(target)).square()
    return _reduced(roles, errors, None, reduction).to(_loss_dtype(input, target))


def _reduced(roles: Roles, losses: Tensor, scale: Tensor | None, reduction: str) -> Tensor:
    """Losses as they are, their sum, or their sum over that of their weights, or over their number."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if reduction == "none":
        return losses
    sums = _begin(roles, losses)
    total = sums.total(losses.reshape(-1), [0]).reshape(())
    if reduction == "sum":
        return total
    return total / (losses.numel() if scale is None else sums.total(scale.reshape(-1), [0]).reshape(()))


def _loss_dtype(*xs: Tensor) -> torch.dtype:
    """That of a loss: float32 in autocast, else what its operands come to."""
    dtype = torch.promote_types(xs[0].dtype, xs[-1].dtype)
    return torch.float32 if _in_autocast(xs[0]) and dtype != torch.float64 else dtype


def _in_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def adaptive_average(roles: Roles, function: Handler, input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """As `F.adaptive_avg_pool2d` and its kin down to one place; of several, windows may overlap: left to torch."""
    n = _POOLS[function]
    sizes = [output_size] * n if isinstance(output_size, int) else list(output_size)
    if sizes != [1] * n:
        return _left_to_torch(roles, function, input, output_size)
    return add_up(roles, torch.mean, input, list(range(-n, 0)), keepdim=True)


_POOLS: dict[Handler, int] = {
    torch.adaptive_avg_pool1d: 1,  # which is that of torch.nn.functional too
    F.adaptive_avg_pool2d: 2,
    F.adaptive_avg_pool3d: 3,
}


def _left_to_torch(roles: Roles, function: Handler, *args: object) -> Tensor:
    roles.left_out = True
    result: Tensor = function(*args)
    return result


HANDLERS: dict[Handler, tuple[str, Handler]] = {
    F.layer_norm: ("layer_norm", layer_norm),
    torch.layer_norm: ("layer_norm", layer_norm),
    F.rms_norm: ("rms_norm", rms_norm),
    torch.rms_norm: ("rms_norm", rms_norm),
    F.group_norm: ("group_norm", group_norm),
    F.batch_norm: ("batch_norm", batch_norm),
    F.cross_entropy: ("cross_entropy", cross_entropy),
    F.nll_loss: ("nll_loss", nll_loss),
    F.mse_loss: ("mse_loss", mse_loss),
}
HANDLERS |= {function: (f"adaptive_avg_pool{n}d", adaptive_average) for function, n in _POOLS.items()}
HANDLERS |= {place.softmax: ("softmax", _along(softmax)) for place in (torch, Tensor, F)}
HANDLERS |= {place.log_softmax: ("log_softmax", _along(log_softmax)) for place in (torch, Tensor, F)}
HANDLERS |= {getattr(place, name): (name, add_up) for name in ("sum", "mean") for place in (torch, Tensor)}
"""What is covered here: torch's function, the name that a report gives it, and its handler."""
