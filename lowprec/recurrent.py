"""Recurrent networks: the hidden state is rounded at every step as the operand of its product; c never is.

Torch's own kernels keep the state to themselves, so each layer is a loop over its steps here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowprec.blocked import Pair, factor, gradient_roles, matmul, pair, uncounted
from lowprec.modes import narrowed
from lowprec.products import Handler
from lowprec.roles import AS_IT_IS, Role, Roles, round_both
from lowprec.sums import Sums, product

State = tuple[Tensor, ...]
"""(h, c) of an LSTM, (h,) of the others; [N, features] each."""


class Product:
    """A product with one weight that every step makes with another state, by roles that all steps share.

    Under an accumulator the gradient of the weight is one sum, over all steps that `begin` announces.

    Args:
        roles: of the whole call.
        weight: [gates, features], rounded here once for all steps.
    """

    ports: Iterator[Tensor] | None = None

    def __init__(self, roles: Roles, weight: Tensor) -> None:
        self.roles = roles
        self.state = roles.forward("activation")
        if roles.by_contraction:
            self.pair = weight_pair(roles, weight)
            self.sums = roles.sums(False, True)
            self.again = uncounted(roles.forward("activation")) if roles.in_blocks("activation") else None
            self.gradients = gradient_roles(roles)
        else:
            self.weight = roles.weight(weight)

    def begin(self, sizes: list[int], backwards: bool) -> None:
        """Say how many rows each step will have, in the order of the sequence, and whether that is gone backwards."""
        formed = torch.is_grad_enabled() and self.roles.by_contraction and self.pair.forward.requires_grad
        if not formed or self.sums.right is None or torch.compiler.is_compiling():
            return
        weight, self.pair = self.pair.forward, detached(self.pair)
        self.seen = Seen(backwards, [])
        draw = self.sums.draw(weight)
        rows: Tensor = Port.apply(weight, sum(sizes), self.seen, self.gradients[1], self.sums, *draw)  # type: ignore[no-untyped-call]
        ports = torch.split(rows, sizes)
        self.ports = iter(reversed(ports) if backwards else ports)

    def __call__(self, h: Tensor) -> Tensor:
        """[N, features] -> [N, gates], its gradient yet to be rounded if that is not done in blocks."""
        if not self.roles.by_contraction:
            return F.linear(self.roles.activation(h, self.state), self.weight)
        if self.again is None:
            state = Pair(narrowed(self.roles.activation(h, self.state)))
        else:
            forward = narrowed(round_both(h, self.state._replace(dim=-1), AS_IT_IS))
            state = Pair(forward, narrowed(round_both(h, self.again._replace(dim=-2), AS_IT_IS)))
        y = matmul(state, self.pair, self.gradients, self.sums)
        if self.ports is None:
            return y
        self.seen.states.append((state.forward if state.again is None else state.again).detach())
        joined: Tensor = Join.apply(y, next(self.ports))  # type: ignore[no-untyped-call]
        return joined


def detached(pair: Pair) -> Pair:
    """An operand whose own gradient is formed elsewhere."""
    return Pair(pair.forward.detach(), None if pair.again is None else pair.again.detach())


class Seen(NamedTuple):
    """The states that a product has met, in the order of its steps, and whether that is the sequence's backwards."""

    backwards: bool
    states: list[Tensor]

    def rows(self) -> Tensor:
        """All of them in the sequence's order."""
        return torch.cat(self.states[::-1] if self.backwards else self.states)


class Port(torch.autograd.Function):
    """Where the gradients of every step's product come together: zeros [rows, gates], of which each step takes its own.

    The gradient of the weight [features, gates] is then one product, statesᵀ · dY over the rows of all steps. Which
    states there were is known by then.
    """

    @staticmethod
    def forward(
        weight: Tensor, rows: int, seen: Seen, role: Role, sums: Sums, seed: Tensor | None, offset: Tensor | None
    ) -> Tensor:
        return weight.new_zeros(()).expand(rows, weight.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.seen, ctx.role, ctx.sums, ctx.seed, ctx.offset = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = round_both(grads[0], ctx.role._replace(dim=-2), AS_IT_IS)
        offset = None if ctx.offset is None else ctx.offset + 2
        return product(ctx.seen.rows().mT, dy, ctx.sums.of_right(), ctx.seed, offset), *[None] * 6


class Join(torch.autograd.Function):
    """A step's product as it is, whose gradient goes to a port as well."""

    @staticmethod
    def forward(y: Tensor, port: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


class Layer:
    """One layer in one direction, its weights rounded once for all steps, its state by one cast for all of them.

    Args:
        roles: of the whole call.
        weights: w_ih [gates, inputs], w_hh [gates, features] and, for an LSTM with projections, w_hr.
        biases: b_ih and b_hh, [gates] each, or neither.
    """

    def __init__(self, roles: Roles, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        self.roles = roles
        w_ih, *others = weights
        self.w_ih = weight_pair(roles, w_ih) if roles.by_contraction else roles.weight(w_ih)
        self.sums = roles.sums(False, True)
        self.hidden, *self.projection = [Product(roles, w) for w in others]
        self.biases = [roles.learnt(b) for b in biases]
        self.reducing = roles.reducing() if biases else None
        in_blocks = roles.blocks and roles.in_blocks("activation_grad")
        # A gradient in blocks is rounded in each product, and once more for the biases.
        self.of_biases = uncounted(roles.backward("activation_grad")) if in_blocks else None
        self.gates = AS_IT_IS if in_blocks else roles.backward("activation_grad")
        self.projected = roles.backward("activation_grad") if self.projection and not in_blocks else AS_IT_IS

    def begin(self, sizes: list[int], backwards: bool) -> None:
        """Say what steps there will be, as `Product.begin`."""
        for each in (self.hidden, *self.projection):
            each.begin(sizes, backwards)

    def inputs(self, x: Tensor | Pair) -> Tensor:
        """The product with rounded inputs, for all steps at once: [..., inputs] -> [..., gates]."""
        return self.plus(self.product(x), self.biases)

    def product(self, x: Tensor | Pair) -> Tensor:
        """The same without biases. A pair is of rows: [rows, inputs] -> [rows, gates]."""
        if isinstance(x, Pair) and isinstance(self.w_ih, Pair):
            return matmul(x, self.w_ih, gradient_roles(self.roles), self.sums)
        assert isinstance(x, Tensor)
        assert isinstance(self.w_ih, Tensor)
        return F.linear(x, self.w_ih)

    def plus(self, y: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """Add biases, whose gradient sums the rounded one of the gates."""
        if not biases:
            return y
        bias: Any = sum(b.to(y.dtype) for b in biases)
        return self.raised(y, bias if self.reducing is None else self.reducing.begin(y).spread(bias, y))

    def raised(self, y: Tensor, bias: Tensor) -> Tensor:
        """Add a bias whose gradient is summed up as it is to be."""
        return y + (bias if self.of_biases is None else round_both(bias.expand_as(y), AS_IT_IS, self.of_biases))

    def step(self, x: Tensor, state: State) -> State:
        """The state after a step, from that step's `inputs` and the state before."""
        raise TypeError(f"{type(self).__name__} has no step")


class LSTM(Layer):
    """The gates i, f, g, o; their gradient is rounded once and serves both products."""

    def step(self, x: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = self.roles.gradient(x + self.hidden(h), self.gates).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        for project in self.projection:
            h = self.roles.gradient(project(h), self.projected)
        return h, c


class GRU(Layer):
    """The gates r, z, n. The reset gate scales the state's product, so the two products have each its own gradient."""

    of_steps: Iterator[Tensor] | None = None

    def begin(self, sizes: list[int], backwards: bool) -> None:
        super().begin(sizes, backwards)
        if self.biases and self.reducing is not None and not torch.compiler.is_compiling():
            bias = narrowed(self.biases[1])
            rows = torch.split(self.reducing.begin(bias).spread(bias, bias.expand(sum(sizes), -1)), sizes)
            self.of_steps = iter(reversed(rows) if backwards else rows)

    def inputs(self, x: Tensor | Pair) -> Tensor:
        y = self.plus(self.product(x), self.biases[:1])
        return self.roles.gradient(y) if self.of_biases is None else y

    def step(self, x: Tensor, state: State) -> State:
        (h,) = state
        y = self.hidden(h)
        y = self.plus(y, self.biases[1:]) if self.of_steps is None else self.raised(y, next(self.of_steps).to(y.dtype))
        hidden = self.roles.gradient(y, self.gates)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), hidden.chunk(3, -1)
        z = (x_z + h_z).sigmoid()
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return (n + z * (h - n),)


class Tanh(Layer):
    """A plain recurrent layer."""

    def step(self, x: Tensor, state: State) -> State:
        return (self.roles.gradient(x + self.hidden(state[0]), self.gates).tanh(),)


class Relu(Layer):
    """A plain recurrent layer with rectified units."""

    def step(self, x: Tensor, state: State) -> State:
        return (self.roles.gradient(x + self.hidden(state[0]), self.gates).relu(),)


def weight_pair(roles: Roles, weight: Tensor) -> Pair:
    """A weight [gates, features] as the second operand of a product that knows its contraction."""
    return pair(roles, factor(roles, weight, True).map(lambda w: w.t()), -2, -1)


def _entering(roles: Roles, x: Tensor) -> Tensor | Pair:
    """The rounded inputs of a layer, [..., inputs]; for products that know their contraction as rows."""
    if not roles.by_contraction:
        return roles.operand(x)
    return pair(roles, factor(roles, x).map(lambda x: x.reshape(-1, x.shape[-1])), -1, -2)


def network(kind: type[Layer]) -> Handler:
    """The handler of torch's function for layers of a kind, of padded or of packed sequences."""

    def handler(roles: Roles, function: Handler, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        sizes = None
        if not isinstance(args[2], bool):  # packed: the sizes of the batch at each step come first
            sizes, args = args[0].tolist(), args[1:]
        hx, params, has_biases, layers, dropout, train, bidirectional, *batch_first = args
        across = bool(batch_first) and batch_first[0]
        if not input.size(1 if across else 0):
            raise ValueError(f"input must have at least one step, got shape {tuple(input.shape)}")
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        weights = Weights(kind, params, has_biases, layers * (1 + bidirectional))
        run = _run_uncompiled if torch.compiler.is_compiling() and not torch._dynamo.config.allow_rnn else _run
        y, states = run(
            roles,
            weights,
            input.transpose(0, 1) if across else input,
            sizes,
            states,
            1 + bidirectional,
            dropout * train,
        )
        return (y.transpose(0, 1) if across else y, *states)

    return handler


def cell(kind: type[Layer]) -> Handler:
    """The handler of torch's function for one step of a kind of layer."""

    def handler(
        roles: Roles, function: Handler, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None
    ) -> Tensor | State:
        layer = kind(roles, (w_ih, w_hh), [b for b in biases if b is not None])
        state = layer.step(layer.inputs(_entering(roles, input)), (hx,) if isinstance(hx, Tensor) else tuple(hx))
        return state[0] if isinstance(hx, Tensor) else state

    return handler


class Weights(NamedTuple):
    """A network's kind of layer and torch's flat list: w_ih, w_hh, then b_ih, b_hh if there are biases, then w_hr."""

    kind: type[Layer]
    flat: Sequence[Tensor]
    biases: bool
    layers: int


def _layers(roles: Roles, weights: Weights) -> list[Layer]:
    size = len(weights.flat) // weights.layers
    groups = [weights.flat[k * size : (k + 1) * size] for k in range(weights.layers)]
    others = 4 if weights.biases else 2
    return [weights.kind(roles, [*g[:2], *g[others:]], g[2:others]) for g in groups]


def _run(
    roles: Roles,
    weights: Weights,
    x: Tensor,
    sizes: list[int] | None,
    states: State,
    directions: int,
    dropout: float,
) -> tuple[Tensor, State]:
    """All layers over [T, N, inputs], or packed [sum of sizes, inputs]: the last one's output and every final state."""
    layers, finals = _layers(roles, weights), []
    for first in range(0, len(layers), directions):
        x = F.dropout(x, dropout) if first and dropout else x
        rounded, outputs = _entering(roles, x), []
        for k in range(first, first + directions):
            inputs = layers[k].inputs(rounded)
            inputs = inputs.reshape(*x.shape[:-1], inputs.shape[-1])
            steps = inputs.unbind(0) if sizes is None else torch.split(inputs, sizes)
            layers[k].begin([step.size(0) for step in steps], k > first)
            ys, final = _scan(layers[k].step, steps, tuple(state[k] for state in states), k > first)
            outputs.append(torch.stack(ys) if sizes is None else torch.cat(ys))
            finals.append(final)
        x = torch.cat(outputs, -1) if directions > 1 else outputs[0]
    return x, tuple(torch.stack(final) for final in zip(*finals, strict=True))


def _run_uncompiled(*args: Any) -> tuple[Tensor, State]:
    """`_run` as torch's compiler sees its own recurrent networks: not at all, rather than step by step."""
    result: tuple[Tensor, State] = torch.compiler.disable(_run)(*args)  # type: ignore[no-untyped-call]
    return result


# What `torch.compiler.disable` sets, which imports the compiler: here it does so only when it is called.
_run_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]


def _scan(
    step: Callable[[Tensor, State], State], inputs: Sequence[Tensor], initial: State, backwards: bool
) -> tuple[list[Tensor], State]:
    """Outputs in the inputs' order, and the final state. Sequences are sorted by length: the last rows are shortest.

    Forwards, sequences end as the batch shrinks; backwards, they begin as it grows.
    """
    order = list(reversed(inputs)) if backwards else list(inputs)
    state = tuple(s[: order[0].size(0)] for s in initial)
    outputs, ended = [], []
    for x in order:
        now, before = x.size(0), state[0].size(0)
        if now < before:
            ended.append(tuple(s[now:] for s in state))
            state = tuple(s[:now] for s in state)
        elif now > before:
            state = tuple(torch.cat([s, s0[before:now]]) for s, s0 in zip(state, initial, strict=True))
        state = step(x, state)
        outputs.append(state[0])
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)) if ended else state
    return outputs[::-1] if backwards else outputs, final


_KINDS: dict[str, type[Layer]] = {"lstm": LSTM, "gru": GRU, "rnn_tanh": Tanh, "rnn_relu": Relu}

HANDLERS: dict[Handler, tuple[str, Handler]] = {
    getattr(torch, name): (name.partition("_")[0], network(kind)) for name, kind in _KINDS.items()
}
HANDLERS |= {
    getattr(torch, f"{name}_cell"): (f"{name.partition('_')[0]}_cell", cell(kind)) for name, kind in _KINDS.items()
}
"""What is covered here: torch's function, the name that a report gives it, and its handler."""
