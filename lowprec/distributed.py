"""Sums over processes as trees in a chosen arithmetic: in the order of the ranks, and the same bits on every rank.

A tensor is cut into a share for each rank. The ranks trade their parts of the shares (all-to-all), each sums its own
share over the ranks, rank 0 first, and the sums are gathered: as many bytes as an all-reduce moves.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad

from lowprec.accumulate import AccumulatorLike
from lowprec.accumulate import sum as sum_by_tree
from lowprec.accumulator import Accumulator
from lowprec.cast import FormatLike, decode, encode, fields_of, quantize, require_float
from lowprec.formats import FloatFormat
from lowprec.formats import float_format as lookup

if TYPE_CHECKING:
    from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
    from torch.futures import Future

    Hook = Callable[[ProcessGroup | None, GradBucket], Future[Tensor]]

WIRE_BITS = 16
"""The widest format whose codes travel."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


def comm_hook(accumulator: AccumulatorLike, wire: FormatLike | None = None, *, seed: int | None = None) -> Hook:
    """A communication hook that averages gradients by a tree, for `ddp.register_comm_hook(group, hook)`.

    `ddp` is a `DistributedDataParallel` over gloo or NCCL; `group` is its process group, None for the default one. Each
    element is the sum of the ranks' gradients in the accumulator's arithmetic, rank 0's first, divided by the number of
    ranks; the quotient is rounded once, to nearest even, to the gradients' dtype (with `wire`, to that format). The
    bits are the same on every rank.

    On a GPU the exchange runs beside backward, on a stream of its own, and the host never waits. Over gloo the hook
    returns when a bucket's parts are traded and summed; the sums are gathered beside backward.

    Args:
        accumulator: how to sum over the ranks.
        wire: a float format of up to 16 bits, in which gradients and means travel as codes; None for the gradients' own
            dtype. Rounding is to nearest even; what is too large saturates, but goes to infinity in an `ieee` format. A
            `finite` format has no code for NaN, and would hide one.
        seed: of stochastic rounding in the accumulator: the hook's calls draw at offsets 0, 1, ...; with None each call
            draws a seed of its own.

    Raises:
        TypeError, ValueError: for what is no accumulator, no format, or a wire format of more than 16 bits.

    Source: docs/distributed.md.
    """
    how, streams, calls = Exchange.of(accumulator, wire), _Streams(), itertools.count()

    def start(buffer: Tensor, group: ProcessGroup | None) -> Future[Tensor]:
        with streams.beside(buffer.device):
            return how.start_mean(buffer, group, seed, next(calls))

    # A lambda has no annotations: torch refuses a hook whose own are strings.
    return lambda group, bucket: start(bucket.buffer(), group)


def all_reduce(
    tensor: Tensor,
    accumulator: AccumulatorLike,
    group: ProcessGroup | None = None,
    *,
    wire: FormatLike | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """The sum of all ranks' tensors by a tree, rank 0's first: the same bits on every rank. Not differentiable.

    Every rank of the group calls it, with a tensor of the same shape and dtype. Sums are those of the accumulator,
    rounded once more, to nearest even, to the tensor's dtype (with `wire`, to that format).

    Args:
        tensor: float64, float32, float16 or bfloat16, any shape and strides, on a device that the group works on.
        accumulator: how to sum over the ranks.
        group: of processes; None for the default one.
        wire: as for `comm_hook`.
        seed: of stochastic rounding, as for `lowprec.sum`.
        offset: likewise. Of R ranks, rank r sums its share of the elements, ceil(n / R) in row-major order, and draws
            for it at offset · R + r.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        TypeError, ValueError: for another kind of tensor, and as `comm_hook`.
    """
    require_float("tensor", tensor)
    how, flat = Exchange.of(accumulator, wire), tensor.detach().reshape(-1)
    share = how.pack(how.sum_of_share(flat, group, seed, offset), tensor.dtype)
    whole, _ = _gather(share, group)
    return how.unpack(whole)[: flat.numel()].to(tensor.dtype).view(tensor.shape)


@dataclass(frozen=True)
class Exchange:
    """How to sum over ranks, and the format in which numbers travel: None for their own dtype."""

    accumulator: Accumulator
    wire: FloatFormat | None

    @classmethod
    def of(cls, accumulator: AccumulatorLike, wire: FormatLike | None) -> Exchange:
        """From checked arguments."""
        fmt = None if wire is None else lookup(wire)
        if fmt is not None and fmt.bits > WIRE_BITS:
            raise ValueError(f"wire must be a format of up to {WIRE_BITS} bits, got {fmt} of {fmt.bits}")
        if fmt is not None:
            fields_of(fmt, torch.float32)  # in which the codes are summed
        return cls(Accumulator.parse(accumulator), fmt)

    def start_mean(self, x: Tensor, group: ProcessGroup | None, seed: int | None, offset: int) -> Future[Tensor]:
        """Put the mean over ranks in the place of x [n]; the future holds x once it is there."""
        total = self.sum_of_share(x, group, seed, offset)
        whole, work = _gather(self.pack(_quotient(total, dist.get_world_size(group)), x.dtype), group, wait=False)

        def finish(_: Future[Any]) -> Tensor:
            return x.copy_(self.unpack(whole)[: x.numel()])

        return work.get_future().then(finish)  # type: ignore[no-any-return]

    def sum_of_share(
        self, x: Tensor, group: ProcessGroup | None, seed: int | Tensor | None, offset: int | Tensor
    ) -> Tensor:
        """Trade the parts of x [n] -> the sum over ranks of this rank's share [ceil(n / ranks)], float32 or float64."""
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        parts = self.pack(pad(x, (0, -x.numel() % ranks)), x.dtype)
        received = torch.empty_like(parts)
        dist.all_to_all_single(_bytes(received), _bytes(parts), group=group)
        rows = self.unpack(received).view(ranks, -1)
        return sum_by_tree(rows, 0, self.accumulator, seed=seed, offset=offset * ranks + rank)

    def pack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round [n] once, for the journey: to codes of the wire format, or to a dtype."""
        if self.wire is not None:
            codes: Tensor = encode(x, self.wire, saturate=self.wire.specials != "ieee")
            return codes
        if x.dtype != torch.float64 or dtype.itemsize > 2:
            return x.to(dtype)
        # torch goes from float64 to 16 bits by way of float32, which would round twice.
        return quantize(x, dtype, saturate=False).to(dtype)

    def unpack(self, packed: Tensor) -> Tensor:
        """What `pack` gave, as numbers."""
        return packed if self.wire is None else decode(packed, self.wire)


def _quotient(total: Tensor, ranks: int) -> Tensor:
    """The mean, in float64, of which one more rounding is right.

    The quotient of a float32 by a number below 2^28 is never so near to the middle between two float32, without being
    in it, that float64 would put it there; nor of coarser formats.
    """
    return total.double() / ranks


def _gather(share: Tensor, group: ProcessGroup | None, wait: bool = True) -> tuple[Tensor, Any]:
    """Every rank's share, one behind the other; with `wait` off, once the work that is returned is done."""
    whole = share.new_empty(share.numel() * dist.get_world_size(group))
    return whole, _all_gather(_bytes(whole), _bytes(share), group=group, async_op=not wait)


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as bytes: no backend takes every dtype, and all of them take these."""
    return x.view(torch.uint8)


class _Streams:
    """A stream for each GPU, beside the one that backward runs on."""

    def __init__(self) -> None:
        self.made: dict[torch.device, torch.cuda.Stream] = {}

    @contextlib.contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """Run what is inside after the work that is queued so far; on a CPU, at once."""
        if device.type != "cuda":
            yield
            return
        if device not in self.made:
            self.made[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self.made[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
