"""Each covered function under a policy, bit for bit: every role by hand, from torch's own kernels and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowprec as lp
from tests.oracle import DA, DW, POLICY, A, Call, W, leaves

ROLES = {"a": A, "w": W}


def check(function: Callable[..., Tensor], operands: list[Tensor], roles: str, *, plain: Any = None) -> None:
    """A single product of operands in the given roles ("a" or "w", one letter each): y, and every gradient.

    The last operand is a parameter of the module if its role is "w". `plain` is the function to compare with, if not
    the same.
    """
    learnt = roles.endswith("w")
    module = lp.wrap(Call(function, operands[-1] if learnt else None), POLICY)
    inputs = leaves(*operands[: len(operands) - learnt])
    y = module(*inputs)
    dy = torch.randn_like(y)
    y.backward(dy)
    given = [*inputs, *([module.weight] if learnt else [])]

    rounded = leaves(*(lp.quantize(x, ROLES[role]) for x, role in zip(operands, roles, strict=True)))
    expected = (plain or function)(*rounded)
    grads = torch.autograd.grad(expected, rounded, lp.quantize(dy, DA))
    assert torch.equal(y, expected)
    for x, grad, role in zip(given, grads, roles, strict=True):
        assert torch.equal(x.grad, lp.quantize(grad, DW) if role == "w" else grad)
    assert not torch.equal(y, (plain or function)(*operands)), "nothing was rounded: the case shows nothing"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def pair(name: str, function: Callable[..., Tensor], a: tuple[int, ...], b: tuple[int, ...]) -> Any:
    return pytest.param(function, a, b, id=name)


PRODUCTS = [
    pair("matmul", torch.matmul, (3, 5), (5, 4)),
    pair("@", lambda a, b: a @ b, (2, 3, 5), (5, 4)),
    pair("Tensor.matmul", lambda a, b: a.matmul(b), (3, 5), (5,)),
    pair("Tensor.__rmatmul__", lambda a, b: b.__rmatmul__(a), (3, 5), (5, 4)),
    pair("linalg.matmul", torch.linalg.matmul, (3, 5), (5, 4)),
    pair("mm", torch.mm, (3, 5), (5, 4)),
    pair("Tensor.mm", lambda a, b: a.mm(mat2=b), (3, 5), (5, 4)),
    pair("bmm", torch.bmm, (2, 3, 5), (2, 5, 4)),
    pair("Tensor.bmm", lambda a, b: a.bmm(b), (2, 3, 5), (2, 5, 4)),
    pair("mv", torch.mv, (3, 5), (5,)),
    pair("dot", torch.dot, (5,), (5,)),
    pair("vdot", torch.vdot, (5,), (5,)),
    pair("vecdot", torch.linalg.vecdot, (3, 5), (3, 5)),
    pair("inner", torch.inner, (3, 5), (4, 5)),
    pair("outer", torch.outer, (3,), (4,)),
    pair("ger", lambda a, b: a.ger(b), (3,), (4,)),
    pair("kron", torch.kron, (2, 3), (3, 2)),
    pair("einsum", lambda a, b: torch.einsum("bij,kj->bki", a, b), (2, 3, 5), (4, 5)),
    pair("einsum of a list", lambda a, b: torch.einsum("ij,jk", [a, b]), (3, 5), (5, 4)),
    pair("einsum of subscripts", lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), (3, 5), (5, 4)),
    pair("tensordot", lambda a, b: torch.tensordot(a, b, dims=([1], [0])), (3, 5), (5, 4)),
    pair("multi_dot", lambda a, b: torch.linalg.multi_dot([a, b]), (3, 5), (5, 4)),
    pair("F.linear", F.linear, (2, 3, 5), (4, 5)),
    pair("conv1d", lambda x, w: F.conv1d(x, w, padding="same"), (2, 4, 9), (6, 4, 3)),
    pair("conv1d, unbatched", F.conv1d, (4, 9), (6, 4, 3)),
    pair("conv2d", lambda x, w: F.conv2d(x, w, stride=2, groups=2), (2, 4, 7, 7), (6, 2, 3, 3)),
    pair("conv3d", lambda x, w: F.conv3d(x, w, dilation=2), (1, 2, 6, 6, 6), (3, 2, 2, 2, 2)),
    pair("conv_transpose1d", lambda x, w: F.conv_transpose1d(x, w, stride=2), (2, 4, 9), (4, 6, 3)),
    pair(
        "conv_transpose2d",
        lambda x, w: F.conv_transpose2d(x, w, output_padding=1, stride=2),
        (2, 4, 5, 5),
        (4, 3, 3, 3),
    ),
    pair("conv_transpose3d", F.conv_transpose3d, (1, 2, 4, 4, 4), (2, 3, 2, 2, 2)),
    pair("convolution", lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1), (2, 4, 9), (6, 4, 3)),
]


@pytest.mark.parametrize(("function", "a", "b"), PRODUCTS)
def test_product(function: Any, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check(function, [normal(*a), normal(*b)], "aw")


MATRIX = [case for case in PRODUCTS if "conv" not in case.id and "linear" not in case.id]


@pytest.mark.parametrize(("function", "a", "b"), MATRIX)
def test_product_of_activations(function: Any, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check(function, [normal(*a), normal(*b)], "aa")


# Biases: added after the product, in the model's dtype; their gradient sums the rounded dY, then is rounded itself.

SUMMED_OVER = {"linear": (0, 1), "conv1d": (0, 2), "conv2d": (0, 2, 3), "conv3d": (0, 2, 3, 4), "bilinear": 0}
BIASED = [
    ("linear", nn.Linear(5, 4), [(2, 3, 5)]),
    ("conv1d", nn.Conv1d(4, 6, 3), [(2, 4, 9)]),
    ("conv1d", nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), [(2, 4, 9)]),
    ("conv2d", nn.Conv2d(4, 6, 3, stride=2), [(2, 4, 7, 7)]),
    ("conv3d", nn.Conv3d(2, 3, 2), [(1, 2, 4, 4, 4)]),
    ("conv1d", nn.ConvTranspose1d(4, 6, 3), [(2, 4, 9)]),
    ("conv2d", nn.ConvTranspose2d(4, 6, 3), [(2, 4, 5, 5)]),
    ("conv3d", nn.ConvTranspose3d(2, 3, 2), [(1, 2, 4, 4, 4)]),
    ("bilinear", nn.Bilinear(3, 5, 4), [(6, 3), (6, 5)]),
]


@pytest.mark.parametrize(("kind", "layer", "shapes"), BIASED, ids=[type(case[1]).__name__ for case in BIASED])
def test_bias(kind: str, layer: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    layer = copy.deepcopy(layer)
    plain = copy.deepcopy(layer)
    inputs = [normal(*shape) for shape in shapes]
    given = leaves(*inputs)
    y = lp.wrap(layer, POLICY)(*given)
    dy = torch.randn_like(y)
    y.backward(dy)

    rounded = leaves(*(lp.quantize(x, A) for x in inputs))
    plain.bias = None
    plain.weight.data = lp.quantize(plain.weight.data, W)
    bias = layer.bias.view(-1, *[1] * (0 if kind in ("linear", "bilinear") else y.dim() - 2))
    expected = plain(*rounded)
    grads = torch.autograd.grad(expected, [plain.weight, *rounded], lp.quantize(dy, DA))
    assert torch.equal(y, expected + bias)
    assert torch.equal(layer.weight.grad, lp.quantize(grads[0], DW))
    assert torch.equal(layer.bias.grad, lp.quantize(lp.quantize(dy, DA).sum(SUMMED_OVER[kind]), DW))
    assert all(torch.equal(x.grad, grad) for x, grad in zip(given, grads[1:], strict=True))


ADDED = [
    pytest.param("addmm", torch.mm, (4,), (3, 5), (5, 4), id="addmm"),
    pytest.param("addmv", torch.mv, (3,), (3, 5), (5,), id="addmv"),
    pytest.param("addr", torch.outer, (3, 4), (3,), (4,), id="addr"),
    pytest.param("baddbmm", torch.bmm, (2, 3, 4), (2, 3, 5), (2, 5, 4), id="baddbmm"),
    pytest.param("addbmm", lambda a, b: torch.bmm(a, b).sum(0), (3, 4), (2, 3, 5), (2, 5, 4), id="addbmm"),
]


@pytest.mark.parametrize(("name", "op", "c", "a", "b"), ADDED)
def test_a_learnt_addend_is_a_bias(name: str, op: Any, c: Any, a: Any, b: Any) -> None:
    bias, x, w = normal(*c), normal(*a), normal(*b)
    module = lp.wrap(Call(lambda x, w, bias: getattr(torch, name)(bias, x, w), bias), POLICY)
    given = leaves(x, w)
    y = module(*given)
    dy = torch.randn_like(y)
    y.backward(dy)
    rounded = leaves(lp.quantize(x, A), lp.quantize(w, A))
    grads = torch.autograd.grad(op(*rounded), rounded, lp.quantize(dy, DA))
    torch.testing.assert_close(y, op(*rounded) + bias, rtol=1e-6, atol=1e-6)
    summed = lp.quantize(dy, DA).sum_to_size(bias.shape)
    assert torch.equal(module.weight.grad, lp.quantize(summed, DW))
    assert all(torch.equal(x.grad, grad) for x, grad in zip(given, grads, strict=True))


@pytest.mark.parametrize(("name", "op", "c", "a", "b"), ADDED)
@pytest.mark.parametrize("form", ["function", "method", "in place"])
def test_any_other_addend_stays_in_full_precision(form: str, name: str, op: Any, c: Any, a: Any, b: Any) -> None:
    x, w = normal(*a), normal(*b)
    addend = normal(*op(x, w).shape)

    def call(addend: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if form == "function":
            return getattr(torch, name)(addend, x, w, beta=0.5, alpha=2)
        if form == "method":
            return getattr(addend, name)(x, w, beta=0.5, alpha=2)
        return getattr(addend.clone(), f"{name}_")(x, w, beta=0.5, alpha=2)

    given = leaves(addend, x, w)
    y = lp.wrap(Call(call), POLICY)(*given)
    dy = torch.randn_like(y)
    y.backward(dy)
    rounded = leaves(lp.quantize(x, A), lp.quantize(w, A))
    grads = torch.autograd.grad(op(*rounded) * 2, rounded, lp.quantize(dy, DA))
    torch.testing.assert_close(y, op(*rounded) * 2 + addend * 0.5, rtol=1e-6, atol=1e-6)
    assert torch.equal(given[0].grad, dy * 0.5)
    assert all(torch.equal(x.grad, grad) for x, grad in zip(given[1:], grads, strict=True))


@pytest.mark.parametrize(("name", "op", "c", "a", "b"), ADDED)
def test_beta_zero_ignores_the_addend(name: str, op: Any, c: Any, a: Any, b: Any) -> None:
    x, w = normal(*a), normal(*b)
    addend = torch.full(op(x, w).shape, math.nan)
    y = lp.wrap(Call(lambda *xs: getattr(torch, name)(*xs, beta=0)), POLICY)(addend, x, w)
    torch.testing.assert_close(y, op(lp.quantize(x, A), lp.quantize(w, A)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mm", "matmul", "addmm"])
def test_out(name: str) -> None:
    tensors = [normal(4, 4) for _ in range(3 if name == "addmm" else 2)]
    out = torch.zeros(4, 4)
    module = lp.wrap(Call(lambda *xs: getattr(torch, name)(*xs, out=out)), POLICY)
    y = module(*tensors)
    *addend, a, b = tensors
    assert y is out
    torch.testing.assert_close(out, sum(addend) + lp.quantize(a, A) @ lp.quantize(b, A), rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="out=... arguments don't support automatic differentiation"):
        module(*leaves(*tensors))


# What is learnt, and what is no product.

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda w: w,
    "transposed": lambda w: w.t(),
    "T": lambda w: w.T,
    "a row of views": lambda w: w.view(2, 2, 4)[1].unsqueeze(0).expand(3, 2, 4).transpose(1, 2),
    "a chunk": lambda w: w.chunk(2)[0].mT,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_parameter_are_weights(view: str, compiled: bool, mode: Any) -> None:
    module = lp.wrap(Call(lambda x, w: x @ VIEWS[view](w), normal(4, 4)), POLICY)
    if compiled:
        torch.compiler.reset()
        module = torch.compile(module, backend="eager", fullgraph=True)
    x = normal(3, 4)
    with mode():
        y = module(x)
    assert torch.equal(y, lp.quantize(x, A) @ VIEWS[view](lp.quantize(module.weight.detach(), W)))


def test_what_is_computed_from_a_parameter_is_an_activation() -> None:
    module = lp.wrap(Call(lambda x, w: x @ (w * 2), normal(4, 4)), POLICY)
    x = normal(3, 4)
    assert torch.equal(module(x), lp.quantize(x, A) @ lp.quantize(module.weight * 2, A))


def test_the_weight_of_linear_is_a_weight_however_it_comes() -> None:
    x, w = normal(3, 4), normal(5, 4)
    assert torch.equal(lp.wrap(Call(F.linear), POLICY)(x, w), F.linear(lp.quantize(x, A), lp.quantize(w, W)))


def test_a_learnt_input_is_a_weight() -> None:
    module = lp.wrap(Call(lambda w, x: F.linear(x, w), normal(3, 4)), POLICY)
    w = normal(5, 4)
    module(w).sum().backward()
    assert torch.equal(module(w), F.linear(lp.quantize(module.weight, W), lp.quantize(w, W)))
    assert torch.equal(module.weight.grad, lp.quantize(module.weight.grad, DW))


def test_integers_and_lone_operands_are_no_products() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        steps = torch.arange(12).view(3, 4)
        return steps @ steps.T, torch.einsum("ij->ji", x), torch.einsum("ii->i", x[:, :3])

    module = lp.wrap(Call(function), POLICY, strict=True)
    x = normal(3, 4)
    for y, expected in zip(module(x), function(x), strict=True):
        assert torch.equal(y, expected)
    assert not lp.report(module).rows


def test_multi_dot_and_einsum_take_many() -> None:
    a, b, c = normal(3, 4), normal(4, 5), normal(5, 2)
    rounded = [lp.quantize(x, A) for x in (a, b, c)]
    y = lp.wrap(Call(lambda *xs: torch.linalg.multi_dot(xs)), POLICY)(a, b, c)
    assert torch.equal(y, torch.linalg.multi_dot(rounded))
    y = lp.wrap(Call(lambda *xs: torch.einsum("ij,jk,kl->il", *xs)), POLICY)(a, b, c)
    assert torch.equal(y, torch.einsum("ij,jk,kl->il", *rounded))


# Embeddings: products of one-hot rows with the table.


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding(options: dict[str, Any]) -> None:
    layer = lp.wrap(nn.Embedding(10, 6, **options), POLICY)
    plain = nn.Embedding(10, 6, _weight=lp.quantize(layer.weight.detach(), W), **options)
    indices = torch.tensor([[1, 2, 3, 3], [3, 0, 0, 9]])
    y, expected = layer(indices), plain(indices)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(lp.quantize(dy, DA))
    assert torch.equal(y, expected)
    assert layer.weight.grad.is_sparse == plain.weight.grad.is_sparse
    assert torch.equal(layer.weight.grad.to_dense(), lp.quantize(plain.weight.grad.to_dense(), DW))


def test_embedding_renormalises_the_table_itself() -> None:
    layer, plain = nn.Embedding(10, 6, max_norm=1.0), nn.Embedding(10, 6, max_norm=1.0)
    plain.weight.data.copy_(layer.weight.data)
    indices = torch.tensor([1, 2, 3])
    y = lp.wrap(layer, POLICY)(indices)
    expected = plain(indices)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(y, lp.quantize(expected, W))
    y.sum().backward()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_embedding_bag(mode: str, weighted: bool) -> None:
    if weighted and mode != "sum":
        mode = "sum"
    layer = lp.wrap(nn.EmbeddingBag(10, 6, mode=mode), POLICY)
    plain = nn.EmbeddingBag(10, 6, mode=mode, _weight=lp.quantize(layer.weight.detach(), W))
    indices = torch.tensor([[1, 2, 3, 3], [3, 0, 0, 9]])
    samples = normal(2, 4) if weighted else None
    y = layer(indices, per_sample_weights=samples)
    expected = plain(indices, per_sample_weights=lp.quantize(samples, A) if weighted else None)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(lp.quantize(dy, DA))
    assert torch.equal(y, expected)
    assert torch.equal(layer.weight.grad, lp.quantize(plain.weight.grad, DW))


# Dtypes, autocast, overflow.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    policy = lp.Policy("1-4-3", "1-3-4", "1-4-3", "1-4-2")
    layer = lp.wrap(nn.Linear(5, 4).to(dtype), policy)
    x = normal(3, 5).to(dtype)
    y = layer(x)
    y.sum().backward()
    expected = F.linear(lp.quantize(x, "1-4-3"), lp.quantize(layer.weight, "1-3-4")) + layer.bias
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert layer.weight.grad.dtype == dtype


@pytest.mark.parametrize("role", ["activation", "weight", "activation_grad", "weight_grad"])
def test_a_format_that_the_dtype_cannot_hold_is_refused_in_the_forward_pass(role: str) -> None:
    layer = lp.wrap(nn.Linear(5, 4).half(), lp.Policy(**{role: "1-5-2:emax=1"}))
    with pytest.raises(ValueError, match="torch.float16 cannot hold"):
        layer(normal(3, 5).half())


def test_autocast() -> None:
    layer = lp.wrap(nn.Linear(5, 4), POLICY)
    x = normal(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    rounded = lp.quantize(x, A).bfloat16(), lp.quantize(layer.weight, W).bfloat16()
    assert torch.equal(y, F.linear(*rounded) + layer.bias.bfloat16())
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.bias.grad, lp.quantize(torch.full((4,), 3.0), DW))


def test_autocast_to_a_dtype_that_cannot_hold_the_format_is_refused() -> None:
    layer = lp.wrap(nn.Linear(5, 4), "bf16")
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="torch.float16 cannot hold"):
        layer(normal(3, 5))


def test_ieee_formats_overflow_and_others_saturate() -> None:
    x = torch.tensor([[1e30, 1.0]])
    weight = torch.eye(2)
    for format, expected in [("e5m2", math.inf), ("1-5-2", 114688.0), ("e4m3fn", 448.0), ("p3109_k8p4", 224.0)]:
        module = lp.wrap(Call(F.linear), lp.Policy(activation=format))
        assert module(x, weight)[0, 0].item() == expected
    assert lp.wrap(Call(F.linear), "bf16")(torch.tensor([[3.4e38, 1.0]]), weight)[0, 0].item() == math.inf


@pytest.mark.parametrize("missing", ["activation", "weight", "activation_grad", "weight_grad"])
def test_a_role_of_none_is_in_full_precision(missing: str) -> None:
    policy = lp.Policy(**{"activation": A, "weight": W, "activation_grad": DA, "weight_grad": DW, missing: None})

    def rounding(role: str) -> Callable[[Tensor], Tensor]:
        format = getattr(policy, role)
        return (lambda x: x) if format is None else (lambda x: lp.quantize(x, format))

    layer = lp.wrap(nn.Linear(5, 4), policy)
    (x,) = leaves(normal(3, 5))
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    x_, w_ = leaves(rounding("activation")(x), rounding("weight")(layer.weight))
    expected = F.linear(x_, w_)
    dx, dw = torch.autograd.grad(expected, [x_, w_], rounding("activation_grad")(dy))
    assert torch.equal(y, expected + layer.bias)
    assert torch.equal(x.grad, dx)
    assert torch.equal(layer.weight.grad, rounding("weight_grad")(dw))
    assert torch.equal(layer.bias.grad, rounding("weight_grad")(rounding("activation_grad")(dy).sum(0)))


def test_channels_last_is_kept() -> None:
    layer = lp.wrap(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), POLICY)
    x = normal(2, 4, 8, 8).to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_the_result_may_be_changed_in_place() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3, bias=False), nn.ReLU(inplace=True)
    )
    lp.wrap(model, POLICY)
    model(normal(2, 3, 8, 8)).sum().backward()
    module = lp.wrap(Call(lambda x, w: (x @ w).mul_(2).relu_(), normal(4, 4)), POLICY)
    (x,) = leaves(normal(3, 4))
    y = module(x)
    y.backward(torch.ones_like(y))
    dy = lp.quantize(2 * (y > 0).float(), DA)
    assert torch.equal(x.grad, dy @ lp.quantize(module.weight, W).T)


def test_gradients_of_gradients() -> None:
    module = lp.wrap(Call(lambda x, w: torch.tanh(x @ w), normal(4, 4)), lp.Policy("fp32", "fp32", "fp32", "fp32"))
    (x,) = leaves(normal(3, 4))

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        (dx,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), x)[0]

    exact = second(lambda x: torch.tanh(x @ module.weight))
    torch.testing.assert_close(second(module), exact)


def test_functional_transforms() -> None:
    layer = lp.wrap(nn.Linear(4, 4), POLICY)
    x = normal(3, 4)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        one = torch.func.grad(loss)(parameters, x[i])
        assert all(torch.equal(each[name][i], one[name]) for name in parameters)
    _, tangent = torch.func.jvp(lambda x: layer(x), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, F.linear(torch.ones_like(x), lp.quantize(layer.weight, W)))
