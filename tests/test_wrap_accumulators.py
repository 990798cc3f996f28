"""Policies with accumulators: every sum of a wrapped model in the order and the format that the policy says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowprec as lp
from lowprec import _ops
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
    """The product of matrices, or of batches of them, under an accumulator."""
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (a, b)]
    y = _ops.matmul(*flat, Accumulator.parse(accumulator).fields, None, None)
    return y.reshape(*a.shape[:-1], b.shape[-1]).to(a.dtype)


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
