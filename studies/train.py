"""Training of stacked replicas: Adam, clipping and weight averages on one flat tensor, one update after another.

On a GPU an update is captured once in a CUDA graph, data, learning rate and counter included, so that the host does
nothing but replay it. On a CPU the same update runs as it is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowprec.studies.data import Stripes

State = tuple[Tensor, Tensor]

BETAS = (0.9, 0.999)
EPS = 1e-8
WARM_UP_RUNS = 3
"""Updates before a capture, which compile and allocate what the captured one will use."""


class Plan(NamedTuple):
    """How to train.

    updates: how many; lr: the peak, reached after `warmup` updates, then falling linearly to 0 at the end;
    clip: largest norm of a replica's gradient; ema: decay of the weight average, which begins as (1 + t) / (10 + t).
    """

    updates: int
    lr: float
    warmup: int
    clip: float
    ema: float


def learning_rate(plan: Plan, count: Tensor) -> Tensor:
    """Of the update after `count` (float64)."""
    falling = (plan.updates - count) / max(plan.updates - plan.warmup, 1)
    return plan.lr * torch.minimum((count + 1) / max(plan.warmup, 1), falling).clamp(0, 1)


def flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Move R-leading parameters into one tensor [R, P], of which they become views."""
    flat = torch.cat([p.detach().flatten(1) for p in parameters], 1)
    end = 0
    for p in parameters:
        begin, end = end, end + p[0].numel()
        p.data = flat[:, begin:end].view(p.shape)
    return flat


class Trainer:
    """A model in training, and all that a checkpoint of it holds.

    Args:
        model: called as model(text, state) -> (nats [R, T, N], state); parameters lead with R.
        stripes: the text.
        state: h and c at the beginning, zeros, [R, N, H].
        plan: how to train.
        compile: whether the optimizer runs under `torch.compile`.
    """

    def __init__(self, model: nn.Module, stripes: Stripes, state: State, plan: Plan, compile: bool = False) -> None:
        self.model, self.stripes, self.plan = model, stripes, plan
        self.parameters = list(model.parameters())
        self.weights = flatten(self.parameters)
        self.grad = torch.zeros_like(self.weights)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.average = self.weights.clone()
        self.h, self.c = state
        self.count = torch.zeros((), dtype=torch.int64, device=self.weights.device)
        self.nats = self.weights.new_zeros(len(self.weights), dtype=torch.float64)
        self.adam = torch.compile(adam, dynamic=False) if compile else adam
        self.run: Callable[[], None] = self.update

    @property
    def symbols(self) -> int:
        """Symbols that an update reads, of all replicas."""
        return self.h.shape[0] * self.h.shape[1] * self.stripes.length

    def update(self) -> None:
        """One update, in tensors alone: nothing of it is decided on the host."""
        carry = (self.count % self.stripes.chunks != 0).to(self.h.dtype)
        nats, (h, c) = self.model(self.stripes.chunk(self.count), (self.h * carry, self.c * carry))
        loss = nats.mean((1, 2))
        grads = torch.autograd.grad(loss.sum(), self.parameters)
        torch.cat([grad.flatten(1) for grad in grads], 1, out=self.grad)
        with torch.no_grad():
            self.h.copy_(h)
            self.c.copy_(c)
            self.nats += loss
            self.adam(self.plan, self.weights, self.grad, self.first, self.second, self.average, self.count)

    def advance(self, updates: int) -> Tensor:
        """Make some updates; the mean loss of each replica over them, in nats, float64 [R]."""
        self.nats.zero_()
        for _ in range(updates):
            self.run()
        return (self.nats / updates).cpu()

    def capture(self) -> None:
        """Record an update in a CUDA graph and run that from now on; numbers are as if this had not happened."""
        before = {name: tensor.clone() for name, tensor in self.tensors().items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self.update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update()
        self.run = graph.replay
        self.restore(before)

    def tensors(self) -> dict[str, Tensor]:
        """All that the next update depends on."""
        names = ("weights", "first", "second", "average", "h", "c", "count")
        return {name: getattr(self, name) for name in names}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Go back to where `tensors` were saved."""
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])

    @torch.no_grad()
    def score(self, text: Stripes, rows: int) -> list[float]:
        """Bits per symbol of each replica on a text, by the averaged weights."""
        training = self.weights.clone()
        self.weights.copy_(self.average)
        shape = (len(self.weights), rows, self.h.shape[-1])
        state = (self.h.new_zeros(shape), self.c.new_zeros(shape))
        total = torch.zeros_like(self.nats)
        for number in range(text.chunks):
            chunk = text.chunk(torch.tensor(number, device=text.text.device)).expand(len(self.weights), -1, -1)
            nats, state = self.model(chunk, state)
            total += nats.double().sum((1, 2))
        self.weights.copy_(training)
        symbols = text.chunks * text.length * rows
        return [nats / symbols / math.log(2) for nats in total.tolist()]


def adam(
    plan: Plan, weights: Tensor, grad: Tensor, first: Tensor, second: Tensor, average: Tensor, count: Tensor
) -> None:
    """One step of Adam on [R, P], each replica's gradient clipped by its own norm; the average follows."""
    t = count.double()
    norm = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    grad.mul_((plan.clip / (norm + EPS)).clamp(max=1.0))
    first.lerp_(grad, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    scale = (learning_rate(plan, t) / (1 - BETAS[0] ** (t + 1))).to(weights.dtype)
    correction = (1 - BETAS[1] ** (t + 1)).rsqrt().to(weights.dtype)
    weights.sub_(first * scale / (second.sqrt() * correction + EPS))
    decay = ((1 + t) / (10 + t)).clamp(max=plan.ema)
    average.lerp_(weights, (1 - decay).to(weights.dtype))
    count.add_(1)
