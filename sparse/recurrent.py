"""LSTM and multiplicative LSTM with internal steps, each operand, stored activation and gradient in its own format.

Plain torch: one timestep and its gradient, written by hand, so that every rounding is on the page. Weight gradients are
formed once for a chunk of timesteps, from the rounded operands of them all. Faster kernels are held to this.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowprec._ops import layer_norm_back, sigmoid_back, tanh_back
from lowprec.accumulate import matmul
from lowprec.bias import plain_format
from lowprec.cast import quantize
from lowprec.formats import FloatFormat
from lowprec.policy import TORCHS_SUMS, Accumulators, Policy, as_policy
from lowprec.region import Region, put_back, take
from lowprec.sparse.rounding import caster

EPS = 1e-6
"""Added to the variance in every layer norm."""

FORGET = 1
"""Index of the forget gate; the gates' order is input, forget, output, update (the candidate u)."""

State = tuple[Tensor, Tensor]
"""Hidden state h and cell state c."""

Formats = tuple[FloatFormat | None, FloatFormat | None, FloatFormat | None, FloatFormat | None]
"""Of the roles activation, weight, activation_grad and weight_grad; None for full precision."""


class Linear(NamedTuple):
    """A linear map to G groups of H features, each with its own layer norm (none where `gain` is None).

    weight: [R, in, G·H], rounded; gain, bias: [R, 1, G, H].
    """

    weight: Tensor
    gain: Tensor | None
    bias: Tensor


class Norm(NamedTuple):
    """What the gradient of a layer norm reads: its input z [R, N, G, H]; mean and 1/deviation [R, N, G, 1]."""

    z: Tensor
    mean: Tensor
    scale: Tensor


class Saved(NamedTuple):
    """What the gradient of a timestep reads.

    operands: what each linear map was given; norms: of each; first: LN_0(W_0 h), before its product with m;
    gates: σ(i), σ(f), σ(o) [R, N, 3, H]; update: tanh(u); before: c before the step; squashed: tanh(c) after it.
    """

    operands: tuple[Tensor, ...]
    norms: tuple[Norm | None, ...]
    first: Tensor | None
    gates: Tensor
    update: Tensor
    before: Tensor
    squashed: Tensor


class Back(NamedTuple):
    """Gradients of a linear map: of its product z [R, N, G, H], rounded; of its gain and bias [R, 1, G, H]."""

    z: Tensor
    gain: Tensor | None
    bias: Tensor


class Gradients(NamedTuple):
    """Gradients of a timestep: of h and c before it, of its inputs, and of each linear map."""

    h: Tensor
    c: Tensor
    inputs: Tensor
    maps: tuple[Back, ...]


def product(x: Tensor, w: Tensor, accumulator: str | None) -> Tensor:
    """Batched x · w under an accumulator, if there is one; bfloat16 operands are summed and returned in float32."""
    if accumulator is not None:
        return matmul(x, w, accumulator, dtype=None if x.dtype == torch.bfloat16 else x.dtype)
    if x.dtype != torch.bfloat16:
        return torch.bmm(x, w)
    return torch.bmm(x, w, out_dtype=torch.float32) if x.is_cuda else torch.bmm(x.float(), w.float())


class Cell:
    """The arithmetic of one timestep, for R replicas, N rows, H features.

    Elementwise work is in the dtype `wide`; operands and stored values in `container`, which holds their formats.
    Internal steps: `maps` = (W_0, ..., W_K-1, gates) and `inputs` = (m, a) [R, N, 2, H]. Without them: maps = (gates,)
    and inputs [R, N, 4, H] are added to the gates. `keep`: [R, N, H], the scaled dropout mask of u, or None.
    """

    def __init__(
        self,
        formats: Formats,
        wide: torch.dtype,
        container: torch.dtype,
        device_type: str,
        accumulators: Accumulators = TORCHS_SUMS,
        fuse: bool = False,
    ) -> None:
        activation, weight, grad, weight_grad = formats
        self.round, self.round_grad = (caster(fmt, wide, device_type, fuse) for fmt in (activation, grad))
        self.round_weight, self.round_weight_grad = (caster(fmt, wide, device_type) for fmt in (weight, weight_grad))
        self.wide, self.container, self.sums = wide, container, accumulators
        maybe_compile = partial(torch.compile, dynamic=False) if fuse else lambda function: function
        self.step, self.step_back = maybe_compile(self._step), maybe_compile(self._step_back)
        self.linear, self.linear_back = maybe_compile(self._linear), maybe_compile(self._linear_back)

    def hold(self, x: Tensor) -> Tensor:
        """A rounded tensor, as it is stored."""
        return x.to(self.container)

    def make_linear(self, weight: Tensor, gain: Tensor | None, bias: Tensor) -> Linear:
        weight = self.hold(self.round_weight(weight.detach()))
        return Linear(weight, None if gain is None else gain.detach(), bias.detach())

    def _linear(self, x: Tensor, p: Linear) -> tuple[Tensor, Norm | None]:
        """[R, N, in] -> LN(x · W) [R, N, G, H]; the product and the output of the norm are both rounded."""
        z = product(x, p.weight, self.sums.forward).view(*x.shape[:-1], *p.bias.shape[-2:])
        if p.gain is None:
            return z + p.bias, None
        z = self.round(z)
        normal, mean, scale = torch.native_layer_norm(z, z.shape[-1:], None, None, EPS)
        return self.round(torch.addcmul(p.bias, normal, p.gain)), Norm(self.hold(z), mean, scale)

    def _linear_back(self, dy: Tensor, p: Linear, norm: Norm | None) -> Back:
        """The gradient of a linear map from that of its output; this and the product's are rounded."""
        dy = self.round_grad(dy)
        bias = dy.sum(1, keepdim=True)
        if norm is None or p.gain is None:
            return Back(self.hold(dy), None, bias)
        z, shape, mask = norm.z.to(self.wide), norm.z.shape[-1:], [True, False, False]
        dz = layer_norm_back(dy * p.gain, z, shape, norm.mean, norm.scale, None, None, mask)[0]
        gain = (dy * ((z - norm.mean) * norm.scale)).sum(1, keepdim=True)
        return Back(self.hold(self.round_grad(dz)), gain, bias)

    def _step(
        self, h: Tensor, c: Tensor, inputs: Tensor, maps: tuple[Linear, ...], keep: Tensor | None
    ) -> tuple[Tensor, Tensor, Saved]:
        """One timestep: h, as it is stored, and c [R, N, H] -> the next ones."""
        operands, norms, first = [h], [], None
        for k, p in enumerate(maps[:-1]):
            y, norm = self._linear(operands[-1], p)
            y = y.squeeze(-2)
            if k == 0:
                first = self.hold(y)
                y = self.round(y * inputs[..., 0, :])
            else:
                y = self.round(y + inputs[..., 1, :]).relu() if k == 1 else y.relu()
            norms.append(norm)
            operands.append(self.hold(y))
        y, norm = self._linear(operands[-1], maps[-1])
        y = y + inputs if first is None else y
        gates, u = y[..., :3, :].sigmoid(), y[..., 3, :]
        u = (u if keep is None else u * keep).tanh()
        i, f, o = gates.unbind(-2)
        after = torch.addcmul(f * c, i, u)
        squashed = after.tanh()
        h = self.hold(self.round(o * squashed))
        return h, after, Saved(tuple(operands), (*norms, norm), first, gates, u, c, squashed)

    def _step_back(
        self,
        doutput: Tensor,
        dh: Tensor,
        dc: Tensor,
        saved: Saved,
        inputs: Tensor,
        maps: tuple[Linear, ...],
        keep: Tensor | None,
    ) -> Gradients:
        """The gradient of a timestep, from those of its output and of h and c in the next one."""
        dgates, dc = self._gates_back(doutput + dh, dc, saved, keep)
        backs, dinputs = [self._linear_back(dgates, maps[-1], saved.norms[-1])], [dgates]
        for k in reversed(range(len(maps) - 1)):
            dx = self.input_back(backs[0].z, maps[k + 1])
            if k == 0:
                assert saved.first is not None
                dinputs = [dx * saved.first, *dinputs]
                dx = dx * inputs[..., 0, :]
            else:
                dx = dx * (saved.operands[k + 1] > 0)
                dinputs = [dx]
            backs.insert(0, self._linear_back(dx.unsqueeze(-2), maps[k], saved.norms[k]))
        dh = self.input_back(backs[0].z, maps[0])
        return Gradients(dh, dc, torch.stack(dinputs, -2) if len(maps) > 1 else dgates, tuple(backs))

    def _gates_back(self, dh: Tensor, dc: Tensor, saved: Saved, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of the gates' inputs and of c before the step."""
        (i, f, o), u = saved.gates.unbind(-2), saved.update
        dc = dc + tanh_back(dh * o, saved.squashed)
        du = tanh_back(dc * i, u)
        parts = (dc * u, i), (dc * saved.before, f), (dh * saved.squashed, o)
        gates = [sigmoid_back(grad, gate) for grad, gate in parts]
        return torch.stack([*gates, du if keep is None else du * keep], -2), dc * f

    def input_back(self, dz: Tensor, p: Linear) -> Tensor:
        """The gradient of what a linear map was given, from that of its product."""
        return product(dz.flatten(-2), p.weight.mT, self.sums.input_grad)

    def weight_back(self, x: Tensor, dz: Tensor) -> Tensor:
        """The gradient of a weight, from all rows of a chunk at once: formed, then rounded."""
        return self.round_weight_grad(product(x.mT, dz.flatten(-2), self.sums.weight_grad))


compiled_cell = lru_cache(maxsize=256)(partial(Cell, fuse=True))
"""One cell for all layers of a kind, so that its steps are compiled once."""


class Chunk(torch.autograd.Function):
    """T timesteps and their gradient. Not for `vmap`, forward mode or double backward: stack replicas instead."""

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, x: Tensor, h_0: Tensor, c_0: Tensor, keep: Tensor | None, *parameters: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [R, T, N, in], h_0 and c_0: [R, N, H] -> every h [R, T, N, H], and the last h and c."""
        first, *others = (cell.make_linear(*parameters[k : k + 3]) for k in range(0, len(parameters), 3))
        maps, keeps = tuple(others), [None] * x.shape[1] if keep is None else keep.unbind(1)
        rows = cell.hold(cell.round(x)).flatten(1, 2)
        y, norm = cell.linear(rows, first)
        inputs = (cell.hold(y) if norm else y).view(*x.shape[:3], *y.shape[-2:]).unbind(1)
        h, c, hs, tape = cell.hold(cell.round(h_0)), c_0, [], []
        for inputs_t, keep_t in zip(inputs, keeps, strict=True):
            h, c, saved = cell.step(h, c, inputs_t, maps, keep_t)
            hs.append(h)
            tape.append(saved)
        ctx.save_for_backward(x, h_0, c_0, *parameters)
        ctx.cell, ctx.first, ctx.rows, ctx.norm = cell, first, rows, norm
        ctx.maps, ctx.inputs, ctx.keeps, ctx.tape = maps, inputs, keeps, tape
        return torch.stack(hs, 1).to(cell.wide), h.to(cell.wide, copy=True), c.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Back through the timesteps, then each linear map once."""
        _ = ctx.saved_tensors  # raises where one was changed in place since
        dhs, dh, dc = grads
        cell, back = ctx.cell, []
        for t in reversed(range(len(ctx.tape))):
            step = cell.step_back(dhs[:, t], dh, dc, ctx.tape[t], ctx.inputs[t], ctx.maps, ctx.keeps[t])
            dh, dc = step.h, step.c
            back.append(step)
        back.reverse()
        first = cell.linear_back(_rows([step.inputs for step in back]), ctx.first, ctx.norm)
        dx = cell.input_back(first.z, ctx.first).view(*dhs.shape[:3], -1)
        parameters = [cell.weight_back(ctx.rows, first.z), first.gain, first.bias]
        for k in range(len(ctx.maps)):
            x = _rows([saved.operands[k] for saved in ctx.tape])
            z, gain, bias = zip(*(step.maps[k] for step in back), strict=True)
            parameters += [cell.weight_back(x, _rows(z)), _total(gain), _total(bias)]
        return None, dx, dh, dc, None, *parameters


def _total(steps: Sequence[Tensor | None]) -> Tensor | None:
    """The sum over timesteps of what each of them has, or none has."""
    return None if steps[0] is None else torch.stack(steps).sum(0)  # type: ignore[arg-type]


def _rows(steps: Sequence[Tensor]) -> Tensor:
    """T tensors [R, N, ...] -> [R, T·N, ...]."""
    return torch.stack(list(steps), 1).flatten(1, 2)


class Recurrent(nn.Module):
    """What both layers share. The linear map `name` has the parameters weight_name, gain_name and bias_name."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        maps: dict[str, tuple[int, int]],
        *,
        layer_norm: bool = True,
        policy: Policy | str | None = None,
        replicas: int | None = None,
        dropout: float = 0.0,
        container: torch.dtype | None = None,
        compile: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        self.input_size, self.hidden_size, self.replicas = input_size, hidden_size, replicas
        self.policy = None if policy is None else as_policy("policy", policy)
        self.container, self.compile_step, self.dropout, self.maps = container, compile, dropout, tuple(maps)
        _require_container(container, self._formats())
        lead = () if replicas is None else (replicas,)
        for name, (inputs, groups) in maps.items():
            shapes = {"weight": (*lead, inputs, groups * hidden_size), "bias": (*lead, groups, hidden_size)}
            shapes |= {"gain": shapes["bias"]} if layer_norm else {}
            for kind, shape in shapes.items():
                self.register_parameter(f"{kind}_{name}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights: identity, tiled where not square. Gains: one. Biases: zero, but one for the forget gate."""
        for name, p in self.named_parameters():
            if name.startswith("weight"):
                p.copy_(_tiled_identity(p))
            else:
                p.fill_(float(name.startswith("gain")))
        self.get_parameter(f"bias_{self.maps[-1]}")[..., FORGET, :] = 1.0

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run a chunk of T timesteps.

        Args:
            x: [T, N, input_size]; with replicas [R, T, N, input_size].
            state: h and c, each [N, hidden_size], with replicas [R, N, hidden_size]; zeros by default.

        Returns:
            Every h [T, N, hidden_size] (with replicas [R, T, N, hidden_size]), and the state after the chunk: to be
            detached, where it is carried into the next one.

        Raises:
            ValueError: for other shapes.
            TypeError: for another dtype than the parameters'.
        """
        self._check(x, *state or ())
        x = x.unsqueeze(0) if self.replicas is None else x
        shape = (x.shape[0], x.shape[2], self.hidden_size)
        h, c = (part.reshape(shape) for part in state) if state else (x.new_zeros(shape), x.new_zeros(shape))
        hs, h, c = self._run(x, h, c)
        return (hs, (h, c)) if self.replicas is not None else (hs[0], (h[0], c[0]))

    def extra_repr(self) -> str:
        options = {"replicas": self.replicas, "dropout": self.dropout or None, "policy": self.policy}
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        return ", ".join([str(self.input_size), str(self.hidden_size), *given])

    def _run(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk, out of sight of `lowprec.wrap` and autocast: what is rounded here is rounded by hand."""
        region, place = take()
        try:
            formats = self._formats() if region is None else self._formats_of(region, x)
            sums = self._sums() if region is None else region.accumulators
            make_cell = compiled_cell if self.compile_step else Cell
            cell = make_cell(formats, x.dtype, self.container or x.dtype, x.device.type, sums)
            with torch.autocast(x.device.type, enabled=False):
                results = Chunk.apply(cell, x, h, c, self._keep(x), *self._flat())  # type: ignore[no-untyped-call]
        finally:
            put_back(region, place)
        hs, h, c = results
        return hs, h, c

    def _formats(self) -> Formats:
        activation, weight, grad, weight_grad = self.policy.float_formats if self.policy else (None,) * 4
        return activation, weight, grad, weight_grad

    def _sums(self) -> Accumulators:
        return self.policy.accumulators if self.policy else TORCHS_SUMS

    def _formats_of(self, region: Region, x: Tensor) -> Formats:
        """Those of the policy that the layer was wrapped in, instead of its own."""
        region.note("lstm", x)
        activation, weight, grad, weight_grad = (
            None if rule is None else plain_format(rule) for rule in region.formats
        )
        formats = activation, weight, grad, weight_grad
        _require_container(self.container, formats)
        return formats

    def _flat(self) -> list[Tensor | None]:
        """Every map's weight [R, in, G·H], gain and bias [R, 1, G, H]."""
        flat: list[Tensor | None] = []
        for name in self.maps:
            for kind in ("weight", "gain", "bias"):
                p = getattr(self, f"{kind}_{name}", None)
                if p is not None:
                    p = p.unsqueeze(0) if self.replicas is None else p
                    p = p if kind == "weight" else p.unsqueeze(1)
                flat.append(p)
        return flat

    def _keep(self, x: Tensor) -> Tensor | None:
        """The scaled dropout mask of u: [R, T, N, H]."""
        if not (self.training and self.dropout):
            return None
        return nn.functional.dropout(x.new_ones(*x.shape[:3], self.hidden_size), self.dropout)

    def _check(self, x: Tensor, *state: Tensor) -> None:
        lead = () if self.replicas is None else (self.replicas,)
        axes, good = "R, T, N"[3 * (not lead) :], x.dim() == 3 + len(lead) and x.shape[: len(lead)] == lead
        if not good or x.shape[-1] != self.input_size or x.shape[-3] == 0:
            also = f", R = {self.replicas}" if lead else ""
            raise ValueError(f"x must be [{axes}, {self.input_size}] with T > 0{also}; got {list(x.shape)}")
        wanted = (*lead, x.shape[-2], self.hidden_size)
        dtype = self.get_parameter(f"weight_{self.maps[0]}").dtype
        for name, part in zip("xhc", (x, *state), strict=False):
            if name != "x" and part.shape != wanted:
                raise ValueError(f"{name} must be {list(wanted)}, got {list(part.shape)}")
            if part.dtype != dtype:
                raise TypeError(f"{name} must be {dtype} like the parameters, got {part.dtype}")


def _tiled_identity(like: Tensor) -> Tensor:
    rows, columns = like.shape[-2:]
    i, j = torch.arange(rows, device=like.device), torch.arange(columns, device=like.device)
    return (i[:, None] == j % rows).to(like.dtype)


def _require_container(container: torch.dtype | None, formats: Formats) -> None:
    """A container must hold what is stored in it: activations, weights and gradients of activations."""
    if container is None:
        return
    for name, fmt in zip(("activation", "weight", "activation_grad"), formats, strict=False):
        if fmt is None:
            raise ValueError(f"container={container} stores rounded values: the policy must give {name} a format")
        quantize(torch.empty(0, dtype=container), fmt)


class LSTM(Recurrent):
    """A long short-term memory layer.

    i, f, o, u = V h + W x (+ biases); c' = σ(f) c + σ(i) tanh(u); h' = σ(o) tanh(c').

    With `layer_norm`, each gate's V h and W x have their own layer norm, with gain and bias. Initially weights are the
    identity, tiled where not square, and the forget gate's bias is 1, once.

    Args:
        input_size, hidden_size: features of x and h.
        layer_norm: whether linear maps are normalised.
        policy: the format of each role, or the name of a recipe. Operands (x, h, the weights), and with layer norm its
            inputs and outputs, are rounded to `activation` or `weight`; their gradients to `activation_grad`; a
            weight's gradient, once formed for the chunk, to `weight_grad`. To nearest, ties to even; ieee formats
            overflow to infinity, others saturate. c, the statistics of layer norms, gains, biases and the parameters
            themselves keep full precision. Every product, forward and backward, is summed by the policy's accumulator;
            other sums are torch's. `lowprec.wrap` puts its policy in the place of this one.
        replicas: R independent layers, stacked; None for one without the leading dimension.
        dropout: probability of dropping elements of u, in training.
        container: the dtype that operands and stored values take, which must hold their formats: bfloat16 runs products
            at its full rate, with float32 sums. None: the dtype of x.
        compile: whether a timestep and its gradient run under `torch.compile`.

    Shapes: x [T, N, input_size] -> [T, N, hidden_size], as `torch.nn.LSTM` without layers.

    Source: Hochreiter and Schmidhuber 1997; Ba, Kiros and Hinton 2016 for layer norm.
    """

    def __init__(self, input_size: int, hidden_size: int, *, layer_norm: bool = False, **options: Any) -> None:
        _require_counts(input_size=input_size, hidden_size=hidden_size, replicas=options.get("replicas") or 1)
        maps = {"input": (input_size, 4), "hidden": (hidden_size, 4)}
        super().__init__(input_size, hidden_size, maps, layer_norm=layer_norm, **options)


class MLSTM(Recurrent):
    """A multiplicative LSTM with K internal steps, layer norm after every linear map.

        m = LN_m(W_m x), a = LN_a(W_a x)                                  precomputed for the chunk
        z_0 = LN_0(W_0 h) m;  z_1 = relu(LN_1(W_1 z_0) + a);  z_k = relu(LN_k(W_k z_k-1)) for k = 2 .. K-1
        i, f, o, u = LN_g(V_g z_K-1), four norms;  c' = σ(f) c + σ(i) tanh(u);  h' = σ(o) tanh(c')

    The input enters at m and a alone. Each LN has a gain and a bias, and eps 1e-6. Initially weights are the identity,
    tiled for W_m and W_a, and the forget gate's bias is 1, once.

    Args:
        input_size, hidden_size: features of x and h.
        steps: internal steps K, at least 2.
        policy, replicas, dropout, container, compile: as for `LSTM`, which says what is rounded.

    Shapes: x [T, N, input_size] -> [T, N, hidden_size]; with replicas, R leads everywhere.

    Source: the 2017 slides "Small World Network Architectures"; Krause et al. 2016 for the multiplicative LSTM.
    """

    def __init__(self, input_size: int, hidden_size: int, steps: int = 5, **options: Any) -> None:
        _require_counts(input_size=input_size, hidden_size=hidden_size, replicas=options.get("replicas") or 1)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise ValueError(f"steps must be an int of at least 2: one takes m, the next one a; got {steps!r}")
        self.steps = steps
        maps = {"input": (input_size, 2), **{f"step{k}": (hidden_size, 1) for k in range(steps)}}
        super().__init__(input_size, hidden_size, maps | {"gates": (hidden_size, 4)}, **options)


def _require_counts(**counts: object) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
