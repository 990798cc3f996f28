"""Policies of block formats: each of a product's three products rounds its operands along what it sums over."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowprec as lp
from tests.test_wrap_casts import same, same_states, step

A, W, G = "mxfp8_e4m3", "mxfp4", "mxfp8_e5m2"
POLICY = lp.Policy(A, W, G)

Casting = Callable[..., Tensor]
Shape = tuple[int, ...]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def q(x: Tensor, fmt: str, dim: int) -> Tensor:
    return lp.quantize(x.detach(), fmt, dim=dim)


def product(a: Tensor, b: Tensor, dy: Tensor, of_a: str = A, of_b: str = A) -> list[Tensor]:
    """y = a · b of matrices, and both gradients, written out."""
    y = q(a, of_a, -1) @ q(b, of_b, -2)
    da = q(dy, G, -1) @ q(b, of_b, -1).mT
    db = q(a, of_a, -2).mT @ q(dy, G, -2)
    return [y, da, db]


class Call(nn.Module):
    """A function of two tensors as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


def run(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, policy: lp.Policy = POLICY) -> list[Tensor]:
    """The result under a policy and the gradients of both operands, for a random dY."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = lp.wrap(Call(function), policy)(a, b)
    y.backward(random(*y.shape, seed=9))
    return [y.detach(), a.grad, b.grad]


# Linear layers.


def test_a_linear_layer_is_six_casts() -> None:
    x, dy = random(3, 37, 70).requires_grad_(), random(3, 37, 40, seed=1)
    model = lp.wrap(nn.Linear(70, 40), POLICY)
    y = model(x)
    y.backward(dy)
    rows, weight, gradient = x.reshape(-1, 70), model.weight, dy.reshape(-1, 40)
    expected, dx, dw = product(rows, weight.t(), gradient, of_b=W)
    assert torch.equal(y, expected.reshape(3, 37, 40) + model.bias)
    assert torch.equal(x.grad.reshape(-1, 70), dx)
    assert torch.equal(model.weight.grad, dw.t())
    assert torch.equal(model.bias.grad, q(gradient, G, -1).reshape(3, 37, 40).sum((0, 1)))


def test_roles_of_other_kinds_are_rounded_once() -> None:
    x, dy = random(5, 70).requires_grad_(), random(5, 40, seed=1)
    model = lp.wrap(nn.Linear(70, 40), lp.Policy(A, "1-4-3", "1-5-2:emax=1", "bf16"))
    y = model(x)
    y.backward(dy)
    weight, gradient = lp.quantize(model.weight.detach(), "1-4-3"), lp.quantize(dy, "1-5-2:emax=1")
    assert torch.equal(y, q(x, A, -1) @ weight.t() + model.bias)
    assert torch.equal(x.grad, gradient @ weight)
    dw = (q(x, A, 0).t() @ gradient).t()
    assert torch.equal(model.weight.grad, lp.quantize(dw, "bf16"))
    assert torch.equal(model.bias.grad, lp.quantize(gradient.sum(0), "bf16"))


@pytest.mark.parametrize("roles", [{"activation_grad": G}, {"activation": A}, {"weight": W}])
def test_one_role_alone(roles: dict[str, str]) -> None:
    model = lp.wrap(nn.Linear(33, 9, bias=False), lp.Policy(**roles))
    x, dy = random(4, 33).requires_grad_(), random(4, 9, seed=1)
    y = model(x)
    y.backward(dy)

    def cast(role: str) -> Casting:
        return lambda t, dim: q(t, roles[role], dim) if role in roles else t

    a, w, g = cast("activation"), cast("weight"), cast("activation_grad")
    assert torch.equal(y, a(x, -1) @ w(model.weight, 1).t())
    assert torch.equal(x.grad, g(dy, -1) @ w(model.weight, 0))
    assert torch.equal(model.weight.grad, (a(x, 0).t() @ g(dy, 0)).t())


def test_a_format_for_weight_gradients_lies_along_their_last_dimension() -> None:
    model = lp.wrap(nn.Linear(40, 9, bias=False), lp.Policy(weight_grad=A))
    x, dy = random(4, 40), random(4, 9, seed=1)
    model(x).backward(dy)
    assert torch.equal(model.weight.grad, q((x.t() @ dy).t(), A, -1))


# Other products, as the matrix product that they are.

MATRICES = {
    "@": lambda a, b: a @ b,
    "mm": torch.mm,
    "matmul": torch.matmul,
    "method": lambda a, b: a.matmul(b),
    "linalg": torch.linalg.matmul,
    "reverse": lambda a, b: Tensor.__rmatmul__(b, a),
    "einsum": lambda a, b: torch.einsum("ij,jk->ik", a, b),
    "einsum, no result": lambda a, b: torch.einsum("ij,jk", a, b),
    "einsum, turned": lambda a, b: torch.einsum("jk, ij -> ki", b, a).t(),
    "tensordot": lambda a, b: torch.tensordot(a, b, 1),
    "inner": lambda a, b: torch.inner(a, b.t()),
    "addmm": lambda a, b: torch.addmm(torch.zeros(()), a, b),
    "beta 0": lambda a, b: torch.addmm(torch.full((), torch.nan), a, b, beta=0),
    "rows of three dimensions": lambda a, b: (a.unflatten(0, (3, -1)) @ b).flatten(0, 1),
    "linear": lambda a, b: F.linear(a, b.t()),
    "addbmm": lambda a, b: torch.addbmm(
        torch.zeros(()), a.unflatten(1, (5, -1)).transpose(0, 1), b.unflatten(0, (5, -1))
    ),
}


@pytest.mark.parametrize("function", MATRICES.values(), ids=MATRICES)
def test_matrix_products(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = random(36, 70), random(70, 45, seed=1)
    weight = W if function is MATRICES["linear"] else A
    assert same(run(function, a, b), product(a, b, random(36, 45, seed=9), of_b=weight))


BATCHES = {
    "@": lambda a, b: a @ b,
    "bmm": torch.bmm,
    "einsum": lambda a, b: torch.einsum("nij,njk->nik", a, b),
    "tied": lambda a, b: torch.einsum("nij,njk->ink", a, b).transpose(0, 1),
    "baddbmm": lambda a, b: torch.baddbmm(torch.zeros(()), a, b),
}


@pytest.mark.parametrize("function", BATCHES.values(), ids=BATCHES)
def test_batches(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = random(3, 10, 40), random(3, 40, 7, seed=1)
    assert same(run(function, a, b), product(a, b, random(3, 10, 7, seed=9)))


def alone(x: Tensor) -> Tensor:
    """A vector whose numbers are rounded each by itself: a contraction of length one."""
    return q(x.unsqueeze(-1), A, -1).squeeze(-1)


def along(x: Tensor) -> Tensor:
    return q(x, A, -1)


VECTORS = {
    "dot": (torch.dot, along, along, (40,), (40,)),
    "mv": (torch.mv, along, along, (5, 40), (40,)),
    "addmv": (lambda a, b: torch.addmv(torch.zeros(()), a, b), along, along, (5, 40), (40,)),
    "outer": (torch.outer, alone, alone, (5,), (7,)),
    "addr": (lambda a, b: torch.addr(torch.zeros(()), a, b), alone, alone, (5,), (7,)),
    "row": (torch.matmul, along, lambda x: q(x, A, 0), (40,), (40, 3)),
    "vecdot": (torch.linalg.vecdot, along, along, (5, 40), (5, 40)),
}


@pytest.mark.parametrize(("function", "of_a", "of_b", "shape_a", "shape_b"), VECTORS.values(), ids=VECTORS)
def test_vectors(function: Casting, of_a: Casting, of_b: Casting, shape_a: Shape, shape_b: Shape) -> None:
    a, b = random(*shape_a), random(*shape_b, seed=1)
    y, da, db = run(function, a, b)
    torch.testing.assert_close(y, function(of_a(a), of_b(b)))
    assert (da.shape, db.shape) == (a.shape, b.shape)


def test_alpha_comes_after_the_rounded_gradient() -> None:
    a, b, dy = random(36, 70), random(70, 45, seed=1), random(36, 45, seed=9)
    y, da, db = product(a, b, dy)
    assert same(run(lambda a, b: torch.addmm(torch.zeros(()), a, b, alpha=0.3), a, b), [y * 0.3, da * 0.3, db * 0.3])


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.kron(a, b),
        lambda a, b: torch.einsum("ij,jk,kl->il", a, b, a),
        lambda a, b: torch.einsum("...j,jk->...k", a, b),
        lambda a, b: torch.linalg.multi_dot([a, b, a]),
    ],
)
def test_what_is_no_single_contraction_is_rounded_along_last_dimensions(
    function: Callable[[Tensor, Tensor], Tensor],
) -> None:
    a, b = random(6, 6), random(6, 6, seed=1)
    y, da, db = run(function, a, b)
    rounded = [x.requires_grad_() for x in (q(a, A, -1), q(b, A, -1))]
    expected = function(*rounded)
    gradients = torch.autograd.grad(expected, rounded, q(random(*y.shape, seed=9), G, -1))
    assert same([y, da, db], [expected, *gradients])


# Convolutions, attention, embeddings, recurrent layers.


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_convolutions(make: type[nn.Conv2d]) -> None:
    """Along channels forwards and for dX, along the batch for dW."""
    layer = make(40, 36, 3, stride=2, padding=1)
    x = random(5, 40, *[7] * (layer.weight.dim() - 2)).requires_grad_()
    plain = copy.deepcopy(layer)
    y = lp.wrap(layer, POLICY)(x)
    dy = random(*y.shape, seed=9)
    y.backward(dy)
    summed, kept = (0, 1) if "Transpose" in make.__name__ else (1, 0)

    def products(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = plain._conv_forward(x, weight, None) if summed else _transposed(x, weight)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]

    def _transposed(x: Tensor, weight: Tensor) -> Tensor:
        function = F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d
        return function(x, weight, None, layer.stride, layer.padding)

    forward, _, _ = products(q(x, A, 1), q(plain.weight, W, summed), dy)
    _, dx, _ = products(x.detach(), q(plain.weight, W, kept), q(dy, G, 1))
    _, _, dw = products(q(x, A, 0), plain.weight.detach(), q(dy, G, 0))
    shape = (-1, *[1] * (layer.weight.dim() - 2))
    assert torch.equal(y, forward + plain.bias.view(shape))
    assert same([x.grad, layer.weight.grad], [dx, dw])
    assert torch.equal(layer.bias.grad, q(dy, G, 1).sum((0, *range(2, dy.dim()))))


@pytest.mark.parametrize("make", [nn.Conv1d, nn.ConvTranspose1d])
def test_groups_are_convolutions_of_their_own(make: type[nn.Conv1d]) -> None:
    whole = make(80, 72, 3, groups=2)
    parts = [make(40, 36, 3) for _ in range(2)]
    axis = 0
    for k, part in enumerate(parts):
        part.weight.data.copy_(whole.weight.data.chunk(2, axis)[k])
        part.bias.data.copy_(whole.bias.data.chunk(2)[k])
    x = random(5, 80, 9)
    y = lp.wrap(whole, POLICY)(x)
    dy = random(*y.shape, seed=9)
    y.backward(dy)
    ys = [lp.wrap(part, POLICY)(x.chunk(2, 1)[k]) for k, part in enumerate(parts)]
    for k, each in enumerate(ys):
        each.backward(dy.chunk(2, 1)[k])
    torch.testing.assert_close(y, torch.cat(ys, 1))
    torch.testing.assert_close(whole.weight.grad, torch.cat([part.weight.grad for part in parts], axis))


def test_paddings_by_name_and_single_images() -> None:
    same_, valid = nn.Conv2d(8, 4, (4, 3), padding="same", dilation=2), nn.Conv2d(8, 4, 3, padding="valid")
    x = random(2, 8, 9, 9)
    for layer in (same_, valid):
        expected = layer._conv_forward(q(x, A, 1), q(layer.weight, W, 1), layer.bias)
        torch.testing.assert_close(lp.wrap(layer, POLICY)(x), expected)
        torch.testing.assert_close(layer(x[0]), expected[0])


def test_attention() -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    operands = [random(2, 3, 40, 36, seed=k).requires_grad_() for k in range(3)]
    query, key, value = (x.detach() for x in operands)
    y = lp.wrap(Attention(), POLICY)(*operands)
    dy = random(*y.shape, seed=9)
    y.backward(dy)
    scores = (q(query, A, -1) @ q(key, A, -1).mT) * 36**-0.5
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    assert torch.equal(y, q(p, A, -1) @ q(value, A, -2))
    assert torch.equal(operands[2].grad, q(p, A, -2).mT @ q(dy, G, -2))
    dp = q(dy, G, -1) @ q(value, A, -1).mT
    ds = torch._softmax_backward_data(dp, p, -1, torch.float32).masked_fill(~mask, 0.0) * 36**-0.5
    torch.testing.assert_close(operands[0].grad, q(ds, G, -1) @ q(key.mT, A, -1).mT)


def test_embedding_rows_lie_along_features() -> None:
    model = lp.wrap(nn.Embedding(10, 40), POLICY)
    index, dy = torch.tensor([1, 3, 1]), random(3, 40, seed=1)
    y = model(index)
    y.backward(dy)
    assert torch.equal(y, q(model.weight[index], W, -1))
    assert torch.equal(model.weight.grad, torch.zeros(10, 40).index_add(0, index, q(dy, G, -1)))


class Steps(nn.Module):
    """An LSTM's steps as linear layers, to be wrapped as any others."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(40, 4 * 33), nn.Linear(33, 4 * 33, bias=False)
        self.input.weight, self.hidden.weight = lstm.weight_ih_l0, lstm.weight_hh_l0
        self.input.bias = lstm.bias_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.input(x)
        h = c = x.new_zeros(x.shape[1], 33)
        outputs = []
        for gates in inputs:
            i, f, g, o = (gates + self.hidden(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs)


def test_a_recurrent_layer_is_its_linear_layers() -> None:
    lstm = nn.LSTM(40, 33)
    nn.init.zeros_(lstm.bias_hh_l0)
    x = random(5, 4, 40)
    steps = lp.wrap(Steps(copy.deepcopy(lstm)), POLICY)
    lp.wrap(lstm, POLICY)
    y = lstm(x)[0]
    dy = random(*y.shape, seed=9)
    y.backward(dy)
    expected = steps(x)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(lstm.weight_ih_l0.grad, steps.input.weight.grad)
    torch.testing.assert_close(lstm.weight_hh_l0.grad, steps.hidden.weight.grad)
    torch.testing.assert_close(lstm.bias_ih_l0.grad, steps.input.bias.grad)


# Whole models, under every recipe.


class Model(nn.Module):
    """A small language model: embeddings, causal attention, feed-forward layers, tied weights."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.checkpointed = checkpointed

    def block(self, x: Tensor) -> Tensor:
        parts = [part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)]
        x = x + self.out(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.norms[2](x) @ self.tokens.weight.t()


TOKENS = torch.randint(50, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", lp.recipes)
def test_a_model_trains_under_every_recipe(recipe: str) -> None:
    model = lp.wrap(Model(), recipe, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    report = lp.report(model)
    assert not report.not_covered
    kinds = {row.kind: row for row in report.rows}
    assert {"embedding", "linear", "attention", "matmul"} <= set(kinds)
    assert kinds["linear"].forward.elements > 0


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4", "fp8-sampled"])
def test_recomputation_rounds_the_same(recipe: str) -> None:
    plain, saving = (lp.wrap(Model(each), recipe) for each in (False, True))
    lp.unwrap(saving).load_state_dict(plain.state_dict(), strict=False)
    torch.manual_seed(1)
    lp.wrap(plain, recipe)
    torch.manual_seed(1)
    lp.wrap(saving, recipe)
    for _ in range(3):
        assert same(step(plain, TOKENS), step(saving, TOKENS))
        assert same_states(plain, saving)


@pytest.mark.parametrize("recipe", ["mxfp8", "nvfp4"])
def test_compiled_is_eager(recipe: str) -> None:
    plain = lp.wrap(nn.Sequential(nn.Linear(40, 33), nn.GELU(), nn.Linear(33, 8)), recipe)
    compiled = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    for k in range(2):
        x = random(5, 40, seed=k)
        assert same(step(plain, x), step(compiled, x))


def test_second_derivatives_see_the_rounded_operands() -> None:
    a, b = random(4, 40).requires_grad_(), random(40, 5, seed=1).requires_grad_()
    model = lp.wrap(Call(torch.matmul), POLICY)
    (da,) = torch.autograd.grad(model(a, b).sum(), a, create_graph=True)
    (db,) = torch.autograd.grad(da.square().sum(), b)
    rounded = q(b, A, -1).requires_grad_()
    expected = (q(torch.ones(4, 5), G, -1) @ rounded.mT).square().sum()
    assert torch.equal(db, torch.autograd.grad(expected, rounded)[0])


def test_under_autocast() -> None:
    model = lp.wrap(nn.Linear(40, 8), POLICY)
    x, dy = random(5, 40).requires_grad_(), random(5, 8, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.backward(dy)
    a, w = q(x, A, -1).bfloat16(), q(model.weight, W, -1).bfloat16()
    assert torch.equal(y, F.linear(a, w) + model.bias.bfloat16())
    assert torch.equal(x.grad, (q(dy, G, -1) @ q(model.weight, W, 0).bfloat16()).float())
