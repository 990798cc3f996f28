"""Policies with accumulators: every sum of a wrapped model in the order and the format that the policy says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowprec as lp
from lowprec.accumulator import Accumulator
from tests.test_wrap_blocks import Call, random
from tests.test_wrap_casts import same, step

Y, DX, DW = "1-6-9", "pairwise:1-5-8", "chunk4:1-6-9/fp32"
A, G = "1-4-3", "1-5-2:emax=1"
POLICY = lp.Policy(A, A, G, None, (Y, DX, DW))

Binary = Callable[[Tensor, Tensor], Tensor]


def q(x: Tensor, fmt: str | None) -> Tensor:
    return x.detach() if fmt is None else lp.quantize(x.detach(), fmt)


def product(a: Tensor, b: Tensor, accumulator: str) -> Tensor:
    """The product of matrices, or of batches of them, under an accumulator, rounded to the operands' dtype."""
    return lp.matmul(a.detach(), b.detach(), accumulator, dtype=a.dtype)


def products(a: Tensor, b: Tensor, dy: Tensor, of_a: str = DX, of_b: str = DX) -> list[Tensor]:
    """y = a · b of matrices under `POLICY`, and both gradients, written out."""
    a, b, dy = q(a, A), q(b, A), q(dy, G)
    return [product(a, b, Y), product(dy, b.mT, of_a), product(a.mT, dy, of_b)]


def run(function: Binary, a: Tensor, b: Tensor, policy: lp.Policy = POLICY) -> list[Tensor]:
    """The result under a policy, strictly, and the gradients of both operands, for a random dY."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = lp.wrap(Call(function), policy, strict=True)(a, b)
    y.backward(random(*y.shape, seed=9))
    return [y.detach(), a.grad, b.grad]


# Policies.


def test_a_policy_has_one_accumulator_or_three() -> None:
    one, three = lp.Policy(accumulator="1-6-9"), lp.Policy(accumulator=("1-6-9", None, "pairwise:bf16"))
    assert one.accumulator == Accumulator.parse("1-6-9")
    assert one == lp.Policy(accumulator=["1-6-9"] * 3) == lp.Policy(accumulator=Accumulator.parse("1-6-9"))
    assert one.accumulators == ("1-6-9", "1-6-9", "1-6-9", None)
    assert three.accumulators[:3] == ("1-6-9", None, "pairwise:1-8-7:specials=ieee")
    assert one != three
    assert not three.is_empty
    assert lp.Policy(accumulator=(None, None, None)).is_empty
    assert lp.Policy(accumulator=(None, None, None)).accumulator is None
    assert not lp.Policy(reduction="fp32").is_empty


@pytest.mark.parametrize(
    "policy",
    [
        lp.Policy(A, accumulator="chunk64:1-6-9/fp32"),
        lp.Policy(A, A, G, None, ("1-6-9 stochastic", None, "exact:fp32"), {"head": None}, reduction="pairwise:bf16"),
    ],
)
def test_such_policies_are_values(policy: lp.Policy) -> None:
    assert eval(repr(policy), {"Policy": lp.Policy}) == policy
    for copied in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert (copied, hash(copied)) == (policy, hash(policy))
        assert copied.accumulators == policy.accumulators


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"accumulator": "1-99"}, ValueError, "accumulator '1-99'"),
        ({"accumulator": 8}, TypeError, "accumulator must be an Accumulator, its string, three of them"),
        ({"accumulator": ("1-6-9", None)}, ValueError, "accumulator must be one or three"),
        ({"reduction": "1-6-9;product=bf16"}, ValueError, "reduction must sum terms as they are, or exactly"),
        ({"reduction": "hopper_fp8"}, ValueError, "reduction must sum terms as they are, or exactly"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        lp.Policy(**arguments)
    assert str(raised.value).startswith(message)


# Matrix products.


def test_a_linear_layer_is_three_products() -> None:
    x, dy = random(3, 7, 12).requires_grad_(), random(3, 7, 5, seed=1)
    model = lp.wrap(nn.Linear(12, 5), POLICY, strict=True)
    y = model(x)
    y.backward(dy)
    expected, dx, dw = products(x.reshape(-1, 12), model.weight.t(), dy.reshape(-1, 5), of_b=DW)
    assert torch.equal(y, expected.reshape(3, 7, 5) + model.bias)
    assert torch.equal(x.grad.reshape(-1, 12), dx)
    assert torch.equal(model.weight.grad, dw.t())
    assert torch.equal(model.bias.grad, q(dy, G).sum((0, 1)))


@pytest.mark.parametrize("place", range(3))
def test_each_product_may_be_torchs_own(place: int) -> None:
    accumulator = [None, None, None]
    accumulator[place] = Y
    found = run(lambda a, b: F.linear(a, b), random(6, 9), random(4, 9, seed=1), lp.Policy(accumulator=accumulator))
    plain = run(lambda a, b: F.linear(a, b), random(6, 9), random(4, 9, seed=1), lp.Policy())
    a, b, dy = random(6, 9), random(4, 9, seed=1), random(6, 4, seed=9)
    own = [product(a, b.t(), Y), product(dy, b, Y), product(a.t(), dy, Y).t()]
    assert same(found, [own[k] if k == place else plain[k] for k in range(3)])


MATRICES: dict[str, Binary] = {
    "@": lambda a, b: a @ b,
    "mm": torch.mm,
    "method": lambda a, b: a.matmul(b),
    "linalg": torch.linalg.matmul,
    "reverse": lambda a, b: Tensor.__rmatmul__(b, a),
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "turned": lambda a, b: torch.einsum("jk, ij -> ik", b, a),
    "tensordot": lambda a, b: torch.tensordot(a, b, 1),
    "inner": lambda a, b: torch.inner(a, b.t()),
    "addmm": lambda a, b: torch.addmm(torch.zeros(()), a, b),
    "beta 0": lambda a, b: torch.addmm(torch.full((), torch.nan), a, b, beta=0),
    "rows of three dimensions": lambda a, b: (a.unflatten(0, (3, -1)) @ b).flatten(0, 1),
    "addbmm": lambda a, b: torch.addbmm(
        torch.zeros(()), a.unflatten(1, (5, -1)).transpose(0, 1), b.unflatten(0, (5, -1))
    ),
}


@pytest.mark.parametrize("function", MATRICES.values(), ids=MATRICES)
def test_matrix_products(function: Binary) -> None:
    a, b = random(6, 20), random(20, 7, seed=1)
    expected = products(a, b, random(6, 7, seed=9))
    found = run(function, a, b)
    assert same(found, expected)


BATCHES: dict[str, Binary] = {
    "@": lambda a, b: a @ b,
    "bmm": torch.bmm,
    "einsum": lambda a, b: torch.einsum("nij,njk->nik", a, b),
    "baddbmm": lambda a, b: torch.baddbmm(torch.zeros(()), a, b),
    "vectors": lambda a, b: torch.stack([torch.stack([a[n] @ c for c in b[n].mT], -1) for n in range(3)]),
}


@pytest.mark.parametrize("function", BATCHES.values(), ids=BATCHES)
def test_batches(function: Binary) -> None:
    a, b = random(3, 5, 12), random(3, 12, 4, seed=1)
    expected = products(a, b, random(3, 5, 4, seed=9))
    found = run(function, a, b)
    assert torch.equal(found[0], expected[0])
    assert function is BATCHES["vectors"] or same(found, expected)


def test_what_is_broadcast_is_summed_within_its_gradients_contraction() -> None:
    """a [2, 1, 3, 5, K] and b [4, 1, K, 6]: the gradient of each sums over what it lacks, with its rows or columns."""
    a, b = random(2, 1, 3, 5, 8), random(4, 1, 8, 6, seed=1)
    y, da, db = run(torch.matmul, a, b)
    ga, gb, dy = q(a, A), q(b, A), q(random(*y.shape, seed=9), G)
    wide = [x.expand(*y.shape[:-2], *x.shape[-2:]).contiguous() for x in (ga, gb)]
    assert torch.equal(y, product(*wide, Y))
    # da: over (4, 6) for each of [2, 1, 3, 5]; db: over (2, 3, 5) for each of [4].
    rows = dy.permute(0, 2, 3, 1, 4).reshape(30, 24)
    assert torch.equal(da.reshape(30, 8), product(rows, gb.permute(0, 1, 3, 2).reshape(24, 8), DX))
    columns = dy.permute(0, 2, 3, 1, 4).reshape(30, 24)
    assert torch.equal(db.permute(2, 0, 1, 3).reshape(8, 24), product(ga.reshape(30, 8).t(), columns, DX))


def test_results_are_rounded_once_to_the_dtype() -> None:
    a, b = random(5, 30).bfloat16(), random(30, 4, seed=1).bfloat16()
    y, da, _ = run(torch.matmul, a.float().bfloat16(), b, lp.Policy(accumulator="fp32"))
    wide = product(a.float(), b.float(), "fp32")
    assert y.dtype == da.dtype == torch.bfloat16
    assert torch.equal(y, wide.bfloat16())


def test_copies_of_a_wrapped_model_sum_alike() -> None:
    x = random(3, 12)
    model = lp.wrap(nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4)), POLICY)
    expected = step(model, x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(step(copied, x), expected)
    assert not same(step(lp.unwrap(model), x), expected)


# Convolutions: kernel, stride, padding, dilation, groups (and output_padding).

PLAIN = {
    "plain": (3, 1, 0, 1, 1),
    "strided, in groups": (3, 2, 1, 1, 2),
    "dilated": (2, 3, 2, 2, 1),
    "one place": (1, 2, 0, 1, 1),
    "same": (3, 1, "same", 2, 2),
    "each channel by itself": (3, 2, 1, 1, 4),
}
TRANSPOSED = {
    "plain": (3, 1, 0, 1, 1, 0),
    "strided, in groups": (3, 2, 1, 1, 2, 1),
    "more of it": (2, 3, 2, 2, 1, 2),
    "one place": (1, 2, 0, 1, 1, 1),
    "padded by more than the kernel": (3, 2, 3, 1, 4, 0),
    "more by the dilation": (2, 1, 0, 3, 1, 2),
}


def convolution(n: int, geometry: tuple[object, ...]) -> nn.Module:
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    size, *rest = geometry
    make = getattr(nn, f"Conv{'Transpose' if len(geometry) == 6 else ''}{n}d")
    torch.manual_seed(0)
    return make(4, 8, size, **dict(zip(names, rest, strict=False)))


def gradients(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(random(*y.shape, seed=9).to(y.dtype) if dy is None else dy)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "geometry",
    [*PLAIN.values(), *TRANSPOSED.values()],
    ids=[*PLAIN, *(f"transposed, {name}" for name in TRANSPOSED)],
)
def test_convolutions_are_torchs(n: int, geometry: tuple[object, ...]) -> None:
    """All geometries, summed without error, within a rounding of torch's in float64."""
    layer, x = convolution(n, geometry), random(2, 4, *[7, 8, 6][:n])
    wide = copy.deepcopy(layer).double()
    found = gradients(lp.wrap(layer, lp.Policy(accumulator="exact:fp32", reduction="exact:fp32"), strict=True), x)
    for ours, theirs in zip(found, gradients(wide, x.double()), strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=1e-6)


def windows(x: Tensor, kernel: tuple[int, ...], stride: int, dilation: int, places: tuple[int, ...]) -> Tensor:
    """What a kernel sees of a padded image [N, C, H, W]: [C · kernel places, N · places], one place after another."""
    rows = [
        x[:, c, i * dilation :: stride, j * dilation :: stride][:, : places[0], : places[1]].reshape(-1)
        for c in range(x.shape[1])
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.stack(rows)


def image(y: Tensor, batch: int, places: tuple[int, ...]) -> Tensor:
    return y.reshape(y.shape[0], batch, *places).transpose(0, 1)


def written_out(x: Tensor, weight: Tensor, dy: Tensor, stride: int, padding: int, dilation: int) -> list[Tensor]:
    """y, dX and dW of a convolution of one group as matrix products of windows, in the order of docs/wrap.md."""
    kernel, places, batch = tuple(weight.shape[2:]), tuple(dy.shape[2:]), x.shape[0]
    seen = windows(F.pad(x, [padding] * 4), kernel, stride, dilation, places)
    y = image(product(weight.flatten(1), seen, Y), batch, places)
    dw = product(dy.transpose(0, 1).flatten(1), seen.t(), DW).reshape(weight.shape)
    # dX: dY with zeros between its places and around, seen by the kernel turned round.
    reach = [dilation * (size - 1) for size in kernel]
    wide = x.new_zeros(batch, dy.shape[1], *(size + r for size, r in zip(x.shape[2:], reach, strict=True)))
    for i in range(places[0]):
        for j in range(places[1]):
            wide[:, :, reach[0] - padding + i * stride, reach[1] - padding + j * stride] = dy[:, :, i, j]
    turned = weight.flip(2, 3).transpose(0, 1).flatten(1)
    dx = image(product(turned, windows(wide, kernel, 1, dilation, tuple(x.shape[2:])), DX), batch, tuple(x.shape[2:]))
    return [y, dx, dw]


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_order_of_a_convolution(stride: int, padding: int, dilation: int, groups: int) -> None:
    layer = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation, groups)
    x = random(2, 4, 8, 9)
    y, dx, dw, _ = gradients(lp.wrap(layer, POLICY, strict=True), x)
    dy = q(random(*y.shape, seed=9), G)
    parts = [t.chunk(groups, d) for t, d in ((q(x, A), 1), (q(layer.weight, A), 0), (dy, 1))]
    expected = [written_out(*part, stride, padding, dilation) for part in zip(*parts, strict=True)]
    assert torch.equal(y, torch.cat([part[0] for part in expected], 1) + layer.bias.view(-1, 1, 1))
    assert torch.equal(dx, torch.cat([part[1] for part in expected], 1))
    assert torch.equal(dw, torch.cat([part[2] for part in expected], 0))


def test_a_transposed_convolution_has_its_products_exchanged() -> None:
    """Its y is the dX of a convolution with the same weight, its dX that one's y, its dW the same sum."""
    layer = nn.ConvTranspose2d(4, 6, (3, 2), 2, 1, output_padding=1, bias=False)
    x, policy = random(2, 4, 5, 6), lp.Policy(accumulator=("1-6-9", "pairwise:1-5-8", DW))
    y, dx, dw, _ = gradients_without_bias(lp.wrap(layer, policy, strict=True), x)
    other = nn.Conv2d(6, 4, (3, 2), 2, 1, bias=False)
    other.weight.data.copy_(layer.weight.data)
    lp.wrap(other, lp.Policy(accumulator=("pairwise:1-5-8", "1-6-9", DW)), strict=True)
    image = random(*y.shape, seed=9).requires_grad_()
    back = other(image)
    back.backward(x)
    assert torch.equal(dx, back)
    assert torch.equal(y, image.grad)
    assert torch.equal(dw, other.weight.grad)


def gradients_without_bias(layer: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(random(*y.shape, seed=9))
    return [y.detach(), x.grad, layer.weight.grad, None]


@pytest.mark.parametrize("place", range(3))
def test_each_product_of_a_convolution_may_be_torchs_own(place: int) -> None:
    layer, x = nn.Conv2d(4, 6, 3, 2, 1), random(2, 4, 8, 9)
    plain = gradients(copy.deepcopy(layer), x)
    accumulator = [None, None, None]
    accumulator[place] = Y
    found = gradients(lp.wrap(layer, lp.Policy(accumulator=accumulator), strict=True), x)
    assert [torch.equal(a, b) for a, b in zip(found[:3], plain, strict=False)] == [k != place for k in range(3)]


def test_single_images_and_no_images() -> None:
    layer = lp.wrap(nn.Conv2d(4, 6, 3, padding="same"), POLICY, strict=True)
    x = random(2, 4, 5, 5)
    assert torch.equal(layer(x)[1], layer(x[1]))
    nothing = x[:0].requires_grad_()
    layer(nothing).sum().backward()
    assert not layer.weight.grad.any()


# Embeddings.


@pytest.mark.parametrize("length", [5, 40])
@pytest.mark.parametrize("padding", [None, -3])
def test_an_embedding_is_a_product_of_one_hot_rows(length: int, padding: int | None) -> None:
    """For tables shorter and longer than the lookups."""
    torch.manual_seed(0)
    model = lp.wrap(nn.Embedding(length, 6, padding), lp.Policy(A, A, G, None, (Y, DX, DW)), strict=True)
    tokens, dy = torch.randint(length, (3, 7)), random(3, 7, 6, seed=9)
    y = model(tokens)
    y.backward(dy)
    assert torch.equal(y, q(model.weight, A)[tokens])
    one_hot = F.one_hot(tokens.flatten(), length).float()
    if padding is not None:
        one_hot[:, padding] = 0
    assert torch.equal(model.weight.grad, product(one_hot.t(), q(dy, G).reshape(21, 6), DW))


def test_an_embedding_of_nothing() -> None:
    model = lp.wrap(nn.Embedding(5, 6), POLICY, strict=True)
    model(torch.zeros(0, 3, dtype=torch.int64)).sum().backward()
    assert not model.weight.grad.any()


# Attention and recurrent layers.


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_two_products(causal: bool) -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    query, key, value = (random(2, 3, 6, 4, seed=k) for k in range(3))
    operands = [x.clone().requires_grad_() for x in (query, key, value)]
    policy = lp.Policy(A, A, G, None, (Y, DX, DW), reduction="pairwise:1-6-9")
    y = lp.wrap(Attention(), policy, strict=True)(*operands)
    dy = random(*y.shape, seed=9)
    y.backward(dy)
    scores = product(q(query, A), q(key, A).mT, Y) * 4**-0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    p = exponentials / lp.sum(exponentials, -1, "pairwise:1-6-9", keepdim=True)
    assert torch.equal(y, product(q(p, A), q(value, A), Y))
    assert torch.equal(operands[2].grad, product(q(p, A).mT, q(dy, G), DX))
    assert all(x.grad is not None for x in operands)


def test_heads_that_share_keys_sum_their_gradients_in_one_contraction() -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    query, key, value = random(2, 6, 5, 4), random(2, 2, 7, 4, seed=1), random(2, 2, 7, 4, seed=2).requires_grad_()
    y = lp.wrap(Attention(), lp.Policy(accumulator=Y), strict=True)(query, key, value)
    dy = random(*y.shape, seed=9)
    y.backward(dy)
    scores = product(query, key.repeat_interleave(3, 1).mT, Y) * 4**-0.5
    p = scores.softmax(-1)
    assert torch.equal(y, product(p, value.detach().repeat_interleave(3, 1), Y))
    rows, columns = p.reshape(2, 2, 15, 7), dy.reshape(2, 2, 15, 4)
    assert torch.equal(value.grad, product(rows.mT, columns, Y))


def test_multi_head_attention_is_its_products() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), random(3, 5, 8)
    wide = copy.deepcopy(model).double()
    lp.wrap(model, lp.Policy(accumulator="exact:fp32", reduction="exact:fp32"), strict=True)
    found, expected = (each(t, t, t)[0] for each, t in ((model, x), (wide, x.double())))
    torch.testing.assert_close(found, expected.float())
    rounded = lp.wrap(model, lp.Policy(accumulator="1-5-4"))(x, x, x)[0]
    assert not torch.allclose(rounded, found, atol=1e-3)


class Steps(nn.Module):
    """A recurrent layer's steps as linear layers, to be wrapped as any others."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(6, 20), nn.Linear(5, 20, bias=False)
        self.input.weight, self.hidden.weight = lstm.weight_ih_l0, lstm.weight_hh_l0
        self.input.bias = lstm.bias_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.input(x)
        h = c = x.new_zeros(x.shape[1], 5)
        outputs, self.states, self.gates = [], [], []
        for gates in inputs:
            self.states.append(h.detach())
            self.gates.append(gates + self.hidden(h))
            if self.gates[-1].requires_grad:
                self.gates[-1].retain_grad()
            i, f, g, o = self.gates[-1].chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs)


@pytest.mark.parametrize("formats", [(None, None, None), (A, A, G), (None, "mxfp8_e4m3", None)])
def test_a_recurrent_layer_is_its_linear_layers(formats: tuple[str | None, ...]) -> None:
    """But for the gradient of the state's weight, which is one sum over the rows of all steps."""
    policy = lp.Policy(*formats, accumulator=(Y, DX, DW), reduction="1-6-9")
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 5)
    nn.init.zeros_(lstm.bias_hh_l0)
    steps, x = lp.wrap(Steps(copy.deepcopy(lstm)), policy, strict=True), random(4, 3, 6)
    lp.wrap(lstm, policy, strict=True)
    found, expected = lstm(x)[0], steps(x)
    dy = random(*found.shape, seed=9)
    found.backward(dy)
    expected.backward(dy)
    assert torch.equal(found, expected)
    assert torch.equal(lstm.weight_ih_l0.grad, steps.input.weight.grad)
    states, gates = q(torch.cat(steps.states), formats[0]), q(torch.cat([z.grad for z in steps.gates]), formats[2])
    assert torch.equal(lstm.weight_hh_l0.grad, product(states.t(), gates, DW).t())
    assert torch.equal(lstm.bias_ih_l0.grad, steps.input.bias.grad)


@pytest.mark.parametrize("make", [nn.GRU, nn.RNN, nn.LSTM])
def test_recurrent_networks_are_torchs(make: type[nn.GRU]) -> None:
    torch.manual_seed(0)
    plain = make(6, 5, num_layers=2, bidirectional=True)
    model, x = (
        lp.wrap(copy.deepcopy(plain), lp.Policy(accumulator="fp32", reduction="fp32"), strict=True),
        random(4, 3, 6),
    )
    for found, expected in zip(step_of(model, x), step_of(plain, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_packed_sequences_and_projections_are_torchs() -> None:
    torch.manual_seed(0)
    plain = nn.LSTM(6, 5, num_layers=2, bidirectional=True, proj_size=3)
    x = nn.utils.rnn.pack_padded_sequence(random(5, 3, 6), [5, 3, 2])
    model = lp.wrap(copy.deepcopy(plain), lp.Policy(accumulator="exact:fp32", reduction="exact:fp32"), strict=True)
    for found, expected in zip(step_of(model, x), step_of(plain, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_gru_sums_the_bias_of_its_state_over_all_steps() -> None:
    torch.manual_seed(0)
    gru, x = nn.GRU(6, 5), random(4, 3, 6)
    biases = gru.bias_hh_l0.detach().expand(4, 3, 15).clone().requires_grad_()
    inputs, h, outputs = F.linear(x, gru.weight_ih_l0, gru.bias_ih_l0), x.new_zeros(3, 5), []
    for step_inputs, bias in zip(inputs, biases, strict=True):
        hidden = F.linear(h, gru.weight_hh_l0) + bias
        (x_r, x_z, x_n), (h_r, h_z, h_n) = step_inputs.chunk(3, -1), hidden.chunk(3, -1)
        z, n = (x_z + h_z).sigmoid(), (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        outputs.append(h := n + z * (h - n))
    torch.stack(outputs).square().sum().backward()
    lp.wrap(gru, lp.Policy(reduction="1-6-5"), strict=True)(x)[0].square().sum().backward()
    assert torch.equal(gru.bias_hh_l0.grad, lp.sum(biases.grad, (0, 1), "1-6-5"))
    over_time = torch.stack([lp.sum(step_bias, 0, "1-6-5") for step_bias in biases.grad]).sum(0)
    assert not torch.equal(gru.bias_hh_l0.grad, over_time)


def step_of(model: nn.Module, x: Tensor | nn.utils.rnn.PackedSequence) -> list[Tensor]:
    y = model(x)[0]
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


# Sums that are no products.

EXACT = lp.Policy(reduction="exact:fp32")
CLASSES = torch.tensor([[0, 5, 1, -100, 3], [2, 2, 0, 4, 5], [1, 1, 1, 3, 0], [5, 4, 3, 2, 1]])
REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": lambda x, *_: x.sum(),
    "sum of some": lambda x, *_: torch.sum(x, (-1, 0), keepdim=True),
    "sum in float64": lambda x, *_: x.sum(1, dtype=torch.float64),
    "mean": lambda x, *_: x.mean((0, 2)),
    "mean of one": lambda x, *_: torch.mean(x, dim=1, keepdim=True),
    "softmax": lambda x, *_: F.softmax(x, 1),
    "softmax, method": lambda x, *_: x.softmax(-1),
    "softmax in float64": lambda x, *_: torch.softmax(x, 0, torch.float64),
    "log_softmax": lambda x, *_: F.log_softmax(x, 1),
    "layer_norm": lambda x, w, b: F.layer_norm(x, (6, 5), w, b),
    "layer_norm, plain": lambda x, *_: F.layer_norm(x, (5,)),
    "rms_norm": lambda x, w, _: F.rms_norm(x, (6, 5), w),
    "group_norm": lambda x, w, b: F.group_norm(x, 3, w[:, 0], b[:, 0]),
    "batch_norm": lambda x, w, b: F.batch_norm(x, None, None, w[:, 0], b[:, 0], training=True),
    "batch_norm, running": lambda x, w, b: F.batch_norm(x, torch.zeros(6), torch.ones(6), w[:, 0], b[:, 0]),
    "cross_entropy": lambda x, *_: F.cross_entropy(x, CLASSES),
    "cross_entropy, weighted": lambda x, *_: F.cross_entropy(x, CLASSES, torch.arange(1.0, 7.0)),
    "cross_entropy, each": lambda x, *_: F.cross_entropy(x, CLASSES, reduction="none"),
    "cross_entropy, sum": lambda x, *_: F.cross_entropy(x, CLASSES, reduction="sum"),
    "cross_entropy of one": lambda x, *_: F.cross_entropy(x[0, :, 0], CLASSES[0, 0]),
    "nll_loss": lambda x, *_: F.nll_loss(x, CLASSES),
    "mse_loss": lambda x, *_: F.mse_loss(x, x.detach().flip(0)),
    "adaptive_avg_pool1d": lambda x, *_: F.adaptive_avg_pool1d(x, 1),
    "adaptive_avg_pool2d": lambda x, *_: F.adaptive_avg_pool2d(x, (1, 1)),
    "linear": lambda x, w, b: F.linear(x, w, b[:, 0]),
    "conv1d": lambda x, w, b: F.conv1d(x, w.unflatten(1, (1, 5))[:, :, :2].expand(6, 6, 2), b[:, 0]),
    "addmm": lambda x, w, b: torch.addmm(b[:, 0], x[0], w.t()),
}


class Weighted(nn.Module):
    """A function of a tensor, and of two parameters, as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(random(6, 5, seed=1)), nn.Parameter(random(6, 5, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def all_gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(random(*y.shape, seed=9).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("function", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_are_torchs(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Summed without error, within a few roundings of torch's; in the shapes and dtypes of torch's."""
    x = random(4, 6, 5).to(dtype)
    if dtype == torch.bfloat16 and function in (
        REDUCTIONS["batch_norm, running"],
        REDUCTIONS["cross_entropy, weighted"],
    ):
        return
    models = [Weighted(function).to(dtype) for _ in range(2)]
    lp.wrap(models[0], EXACT, strict=True)
    for found, expected in zip(*(all_gradients(model, x) for model in models), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.04
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


R = "chunk4:1-6-9/1-8-12:emax=127"


def total(x: Tensor, dims: int | tuple[int, ...], accumulator: str = R) -> Tensor:
    return lp.sum(x, dims, accumulator, keepdim=True)


def test_layer_norm_written_out() -> None:
    model, x = lp.wrap(nn.LayerNorm(10), lp.Policy(reduction=R), strict=True), random(3, 4, 10)
    nn.init.normal_(model.weight)
    y, dx, dweight, dbias = all_gradients(model, x)
    dy = random(3, 4, 10, seed=9)
    centred = x - total(x, 2) / 10
    scale = (total(centred.square(), 2) / 10 + model.eps).rsqrt()
    assert torch.equal(y, centred * scale * model.weight + model.bias)
    assert torch.equal(dweight, total(dy * (centred * scale), (0, 1)).reshape(10))
    assert torch.equal(dbias, total(dy, (0, 1)).reshape(10))
    upstream = dy * model.weight.detach()
    dscale = total(upstream * centred, 2)
    dcentred = upstream * scale + (dscale * (-0.5 * scale**3) / 10) * (2 * centred)
    torch.testing.assert_close(dx, dcentred - total(dcentred, 2) / 10, atol=1e-6, rtol=1e-5)


def test_softmax_and_means_written_out() -> None:
    x = random(3, 10)
    exponentials = (x - x.amax(1, keepdim=True)).exp()
    found = all_gradients(lp.wrap(Weighted(lambda x, *_: x.softmax(1)), lp.Policy(reduction=R), strict=True), x)
    assert torch.equal(found[0], exponentials / total(exponentials, 1))
    mean = lp.wrap(Weighted(lambda x, *_: x.mean()), lp.Policy(reduction=R), strict=True)(x)
    assert torch.equal(mean, lp.sum(x, None, R) / 30)


def test_a_bias_gradient_is_a_sum_over_rows() -> None:
    model, x = lp.wrap(nn.Linear(5, 4), lp.Policy(activation_grad=G, reduction=R), strict=True), random(3, 7, 5)
    *_, bias = all_gradients(model, x)
    assert torch.equal(bias, total(q(random(3, 7, 4, seed=9), G), (0, 1)).reshape(4))
    layer = lp.wrap(nn.Conv2d(2, 4, 3), lp.Policy(reduction=R), strict=True)
    *_, bias = all_gradients(layer, random(2, 2, 6, 6))
    assert torch.equal(bias, total(random(2, 4, 4, 4, seed=9), (0, 2, 3)).reshape(4))


def test_running_statistics_follow() -> None:
    plain = nn.BatchNorm2d(3)
    model, x = lp.wrap(copy.deepcopy(plain), EXACT, strict=True), random(2, 3, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_second_derivatives() -> None:
    def twice(model: nn.Module) -> Tensor:
        x = random(3, 10).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(dx.pow(3).sum(), x)
        return found

    policy = lp.Policy(accumulator="exact:fp32", reduction="exact:fp32")
    for function in (
        lambda x, *_: x.softmax(-1),
        lambda x, *_: F.layer_norm(x, (10,)),
        lambda x, *_: x @ x.t(),
        lambda x, *_: F.conv1d(x[:, None], x[:2, None, :3], stride=2),
    ):
        found = twice(lp.wrap(Weighted(function), policy, strict=True))
        torch.testing.assert_close(found, twice(Weighted(function)), atol=1e-3, rtol=1e-3)


# What is left to torch, and said.


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.table(tokens)))


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "kron": lambda x: torch.kron(x, x),
    "multi_dot": lambda x: torch.linalg.multi_dot([x, x, x]),
    "einsum": lambda x: torch.einsum("ij,jk,kl->il", x, x, x),
    "bilinear": lambda x: F.bilinear(x, x, x.expand(2, 4, 4)),
    "embedding_bag": lambda x: F.embedding_bag(torch.tensor([[0, 2]]), x),
}


@pytest.mark.parametrize("name", LEFT)
def test_products_of_no_single_contraction_are_torchs_and_said_to_be(name: str) -> None:
    x, policy = random(4, 4), lp.Policy(accumulator=(Y, None, None))
    model = lp.wrap(Weighted(lambda x, *_: LEFT[name](x)), policy)
    assert torch.equal(model(x), LEFT[name](x))
    report = lp.report(model)
    assert report.not_covered == (f"the sums of {name} in (model)",)
    assert [row.sums for row in report.rows] == ["torch's"]
    with pytest.raises(ValueError, match=f"the sums of {name} in module '' are not covered"):
        lp.wrap(model, policy, strict=True)(x)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("std", torch.std),
        ("logsumexp", lambda x: torch.logsumexp(x, 0)),
        ("cumsum", lambda x: x.cumsum(0)),
        ("huber_loss", lambda x: F.huber_loss(x, x)),
        ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x[None], 2)),
        ("cross_entropy", lambda x: F.cross_entropy(x, x)),
    ],
)
def test_reductions_that_are_not_covered_are_said(name: str, function: Callable[[Tensor], Tensor]) -> None:
    x, model = random(4, 4), Weighted(lambda x, *_: function(x))
    lp.wrap(model, lp.Policy(A), strict=True)(x)
    assert torch.equal(lp.wrap(model, EXACT)(x), function(x))
    assert lp.report(model).not_covered == (f"the sums of {name} in (model)",)
    with pytest.raises(ValueError, match="not covered by the policy's accumulators"):
        lp.wrap(model, EXACT, strict=True)(x)


def test_the_report_says_whose_sums_they_are() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    model = lp.wrap(Mixed(), lp.Policy(A, accumulator=Y, reduction=R, overrides={"head": lp.Policy(A)}))
    model(tokens).sum().backward()
    report = lp.report(model)
    assert {row.path: (row.kind, row.sums) for row in report.rows} == {
        "table": ("embedding", "policy's"),
        "norm": ("layer_norm", "policy's"),
        "head": ("linear", "torch's"),
    }
    assert not report.not_covered
    text = str(report)
    assert f"Sums [1]: y {Y}, activation gradient {Y}, weight gradient {Y}, others {Accumulator.parse(R)}" in text
    assert "sums" not in str(lp.report(lp.wrap(model, lp.Policy(A))))
    model.table.scale_grad_by_freq = True
    with pytest.raises(ValueError, match="the sums of embedding in module 'table'"):
        lp.wrap(model, lp.Policy(accumulator=Y), strict=True)(tokens)
    lp.wrap(model, lp.Policy(accumulator=(Y, Y, None)), strict=True)(tokens)
    with torch.no_grad():
        lp.wrap(model, lp.Policy(accumulator=Y), strict=True)(tokens)


def test_overrides_replace_accumulators_too() -> None:
    x, weight = random(3, 8), random(8, 8, seed=1)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    for layer in model:
        layer.weight.data.copy_(weight)
    lp.wrap(model, lp.Policy(accumulator=Y, overrides={"1": None, "2": lp.Policy(accumulator="pairwise:1-5-3")}))
    first = product(x, weight.t(), Y)
    second = first @ weight.t()
    assert torch.equal(model(x), product(second, weight.t(), "pairwise:1-5-3"))
    again = lp.wrap(model, lp.Policy(accumulator="1-5-3"))  # which replaces all of that
    assert torch.equal(again[0](x), product(x, weight.t(), "1-5-3"))


# Random bits, recomputation, compiled code, autocast.


class Layers(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)
        self.conv, self.checkpointed = nn.Conv1d(1, 3, 3, padding=1), checkpointed

    def block(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(x)).relu() @ torch.ones(9, 9, device=x.device)
        return self.conv(self.down(x)[:, None]).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


STOCHASTIC = lp.Policy(A, A, G, None, "1-6-7 stochastic", reduction="1-6-7 stochastic")
POLICIES = {"formats": lp.Policy(A, A, G, None, (Y, DX, DW), reduction=R), "stochastic": STOCHASTIC}


def seeded(model: nn.Module, policy: lp.Policy) -> nn.Module:
    torch.manual_seed(1)
    return lp.wrap(model, policy, strict=True)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_recomputation_sums_the_same(policy: lp.Policy) -> None:
    x = random(5, 6)
    plain, saving = (seeded(Layers(each), policy) for each in (False, True))
    for _ in range(3):
        assert same(step(plain, x), step(saving, x))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_compiled_is_eager(policy: lp.Policy) -> None:
    model = seeded(Layers(), policy)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for k in range(2):
        assert same(step(model, random(5, 6, seed=k)), step(compiled, random(5, 6, seed=k)))


def test_stochastic_sums_draw_anew_at_every_call_and_from_torchs_seed() -> None:
    x = random(5, 6)
    model = seeded(Layers(), STOCHASTIC)
    first = step(model, x)
    assert not same(step(model, x), first)
    assert same(step(seeded(Layers(), STOCHASTIC), x), first)


def test_a_stochastic_product_draws_as_matmul_does() -> None:
    accumulator = "1-6-7 stochastic"
    model, x = seeded(nn.Linear(12, 5, bias=False), lp.Policy(accumulator=accumulator)), random(7, 12)
    for call in range(2):
        y, dx, dw = all_gradients(model, x)
        seed = model.state_dict()["lowprec.accumulator"][0, 2]
        a, w = x.clone().requires_grad_(), model.weight.detach().t().clone().requires_grad_()
        expected = lp.matmul(a, w, accumulator, seed=seed, offset=8 * call)
        expected.backward(random(7, 5, seed=9))
        assert same([y, dx, dw], [expected.detach(), a.grad, w.grad.t()])
        model.weight.grad = None


def test_states_of_stochastic_sums_are_saved() -> None:
    x = random(5, 6)
    model = seeded(Layers(), STOCHASTIC)
    step(model, x)
    saved = copy.deepcopy(model.state_dict())
    assert any(key.endswith("lowprec.up.accumulator") for key in saved)
    expected = step(model, x)
    other = lp.wrap(Layers(), STOCHASTIC)
    other.load_state_dict(saved)
    assert same(step(other, x), expected)
    lp.unwrap(other).load_state_dict({k: v for k, v in saved.items() if not k.startswith("lowprec.")})
    assert not any("lowprec" in key for key in lp.wrap(other, POLICY).state_dict())


def test_under_autocast() -> None:
    model = lp.wrap(nn.Linear(12, 5), lp.Policy(accumulator="fp32", reduction="fp32"), strict=True)
    x, dy = random(7, 12).requires_grad_(), random(7, 5, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.backward(dy)
    a, w = x.detach().bfloat16(), model.weight.detach().bfloat16()
    assert torch.equal(y, product(a, w.t(), "fp32") + model.bias.bfloat16())
    assert torch.equal(x.grad, product(dy, w, "fp32").float())
    assert torch.equal(model.weight.grad, product(a.t(), dy, "fp32").t().float())
    assert torch.equal(model.bias.grad, lp.sum(dy, 0, "fp32", dtype=torch.bfloat16).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    model, x = lp.wrap(nn.Linear(12, 5, dtype=dtype), lp.Policy(accumulator=Y), strict=True), random(7, 12).to(dtype)
    y = model(x)
    assert y.dtype == dtype
    assert torch.equal(y, product(x, model.weight.t(), Y) + model.bias)


def test_a_carrier_must_hold_the_accumulator() -> None:
    model = lp.wrap(nn.Linear(4, 4), lp.Policy(accumulator="1-9-8"))
    with pytest.raises(ValueError, match="cannot hold"):
        model(random(2, 4))


@pytest.mark.parametrize("accumulator", ["tensor_core64", "hopper_fp8"])
def test_tensor_cores_need_operands_that_fit(accumulator: str) -> None:
    policy = lp.Policy("1-5-12", "1-4-3", accumulator=accumulator)
    with pytest.raises(ValueError, match="do not fit"):
        lp.wrap(nn.Linear(64, 4), policy)(random(2, 64))


@pytest.mark.parametrize(
    ("formats", "accumulator", "dtypes"),
    [
        (("e4m3fn", "e4m3fn", "e5m2"), "hopper_fp8@32:fp32", (torch.float8_e4m3fn, torch.float8_e5m2)),
        (("bf16", "1-4-3", "1-5-2"), "hopper_fp16:1-8-13:specials=ieee", (torch.bfloat16, torch.bfloat16)),
        (("1-4-10", "fp16", "e5m2"), "hopper_fp16", (torch.float16, torch.float16)),
    ],
)
def test_modelled_tensor_cores_see_narrow_operands(
    formats: tuple[str, ...], accumulator: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    model, x = nn.Linear(64, 5, bias=False), random(7, 64)
    y, dx, dw = all_gradients(lp.wrap(model, lp.Policy(*formats, accumulator=accumulator), strict=True), x)
    a, w = q(x, formats[0]).to(dtypes[0]), q(model.weight, formats[1]).to(dtypes[0])
    dy = q(random(7, 5, seed=9), formats[2]).to(dtypes[1])
    assert torch.equal(y, lp.matmul(a, w.t(), accumulator))
    assert torch.equal(dx, lp.matmul(dy, w, accumulator))
    assert torch.equal(dw.t(), lp.matmul(a.t(), dy, accumulator))


def test_products_take_a_tensor_that_meets_itself() -> None:
    x = random(4, 4)
    assert torch.equal(lp.wrap(Weighted(lambda x, *_: x @ x), lp.Policy(accumulator=Y))(x), product(x, x, Y))


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_cuda_sums_as_the_cpu_does(policy: lp.Policy) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 40), nn.ReLU(), nn.Linear(40, 4)
    )
    models, x = [seeded(copy.deepcopy(model), policy) for _ in range(2)], random(3, 2, 6, 6)
    for _ in range(2):
        found = step(models[1].cuda(), x.cuda())
        assert same([each.cpu() for each in found], step(models[0], x))
