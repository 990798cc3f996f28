"""Wrapping, reporting and unwrapping: what changes in a model, what does not, and what is refused."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, get_overridable_functions, resolve_name
from torch.utils.checkpoint import checkpoint

import lowprec as lp
from lowprec.coverage import COVERED, NOT_COVERED
from tests.oracle import DA, DW, POLICY, A, Call, W, leaves

EMPTY = lp.Policy()


class Block(nn.Module):
    """Modules, a functional product with a parameter of its own, and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)) @ self.weight.t())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one pass; leaves no gradients behind."""
    y = model(x)
    y.pow(2).sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [y.detach(), *gradients]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def attributes(model: nn.Module) -> list[tuple[str, list[str]]]:
    return [(type(module).__name__, list(vars(module))) for module in model.modules()]


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


# In place, and back.


def test_wrap_works_in_place_and_unwrap_undoes_it() -> None:
    model = Model()
    before, seen = step(model, X), attributes(model)
    parameters = list(model.parameters())
    assert lp.wrap(model, "fp8") is model
    assert not same(step(model, X), before)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in parameters)
    assert lp.unwrap(model) is model
    assert same(step(model, X), before)
    assert attributes(model) == seen


def test_unwrapping_what_is_not_wrapped_does_nothing() -> None:
    model = Model()
    seen = attributes(model)
    assert lp.unwrap(model) is model
    assert attributes(model) == seen


def test_an_empty_policy_installs_nothing() -> None:
    model = Model()
    before, seen = step(model, X), attributes(model)
    for policy in (EMPTY, lp.Policy(overrides={"head": None, "layers": EMPTY})):
        lp.wrap(model, policy)
        assert attributes(model) == seen
        assert same(step(model, X), before)


def test_wrapping_twice_replaces_the_policy_and_its_counters() -> None:
    model = lp.wrap(Model(), "fp8")
    step(model, X)
    lp.wrap(model, "bf16")
    assert all(row.calls == 0 for row in lp.report(model).rows)
    again = lp.wrap(lp.unwrap(copy.deepcopy(model)), "bf16")
    assert same(step(model, X), step(again, X))
    assert lp.unwrap(lp.wrap(model, EMPTY)) is model
    assert "forward" not in vars(model)


def test_a_forward_of_the_instances_own_is_kept() -> None:
    model = nn.Linear(8, 3)
    own = model.forward = lambda x: F.linear(2 * x, model.weight)
    lp.wrap(model, POLICY)
    assert torch.equal(model(X), F.linear(lp.quantize(2 * X, A), lp.quantize(model.weight, W)))
    assert lp.unwrap(model).forward is own


def test_a_forward_put_on_top_afterwards_survives() -> None:
    model = lp.wrap(nn.Linear(8, 3), POLICY)
    inner = model.forward
    model.forward = lambda x: inner(x) + 1
    rounded = F.linear(lp.quantize(X, A), lp.quantize(model.weight, W)) + model.bias
    assert torch.equal(model(X), rounded + 1)
    lp.unwrap(model)
    assert torch.equal(model(X), F.linear(X, model.weight, model.bias) + 1)
    lp.wrap(model, POLICY)
    assert torch.equal(model(X), rounded + 1)


def test_signatures_classes_and_hooks_stay() -> None:
    plain, model = Model(), lp.wrap(Model(), "fp8")
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(model.head.forward) == inspect.signature(plain.head.forward)
    assert type(model.head) is nn.Linear
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert repr(model) == repr(plain)


def test_keyword_arguments_and_hooks_reach_the_module() -> None:
    model = lp.wrap(nn.Linear(8, 3), POLICY)
    seen = []
    model.register_forward_hook(lambda module, args, y: seen.append(y))
    assert model(input=X) is seen[0]


def test_a_model_goes_when_its_last_name_goes() -> None:
    gc.disable()
    try:
        model = lp.wrap(Model(), "fp8")
        step(model, X)
        gone, forward = weakref.ref(model), model.forward
        del model
        assert gone() is None
        with pytest.raises(ReferenceError, match="this forward's module is gone"):
            forward(X)
    finally:
        gc.enable()


# Copies and checkpoints.


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_whole_and_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = lp.wrap(Model(), lp.Policy(A, W, DA, DW, overrides={"layers.0.first": None, "head": "bf16"}))
    before = step(model, X)
    other = copied(model)
    assert same(step(other, X), before)
    assert [row.calls for row in lp.report(other).rows] == [2 * row.calls for row in lp.report(model).rows]
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert same(step(model, X), before)
    assert not same(step(other, X), before)
    assert inspect.signature(other.head.forward) == inspect.signature(model.head.forward)
    assert "forward" not in vars(lp.unwrap(other).head)
    assert same(step(model, X), before), "unwrapping a copy leaves the original wrapped"


def test_state_dicts_know_nothing_of_the_policy() -> None:
    plain, model = Model(), lp.wrap(Model(), "fp8")
    step(model, X)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_buffers()] == []
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert same(step(lp.wrap(plain, "fp8"), X), step(model, X))


# Regions.


def test_overrides_replace_the_policy_beneath_them() -> None:
    policy = lp.Policy(A, W, DA, DW, overrides={"layers.0.*": None, "layers.*.first": "bf16", "head": lp.Policy(W)})
    model = lp.wrap(Model(), policy)
    untouched = copy.deepcopy(lp.unwrap(copy.deepcopy(model)).layers[0])
    step(model, X)
    report = lp.report(model)
    assert report.overridden == ("layers.0",)
    formats = {row.path: row.formats.activation for row in report.rows}
    assert formats == {
        "layers.1": A,
        "layers.1.first": str(lp.format("bf16")),
        "layers.1.second.0": A,
        "layers.1.second.2": A,
        "head": str(lp.format(W)),
    }
    assert torch.equal(model.layers[0](X), untouched(X))


def test_functional_calls_belong_to_the_module_that_makes_them() -> None:
    model = lp.wrap(Block(), lp.Policy(A, W, overrides={"first": None, "second": None, "norm": None}))
    hidden = model.second(model.first(X))
    assert torch.equal(model(X), model.norm(lp.quantize(hidden, A) @ lp.quantize(model.weight, W).t()))
    model = lp.wrap(Block(), lp.Policy(overrides={"first": POLICY}))
    hidden = F.linear(lp.quantize(X, A), lp.quantize(model.first.weight, W)) + model.first.bias
    assert torch.equal(model(X), model.norm(model.second(hidden) @ model.weight.t()))


class Spy(TorchFunctionMode):
    """Notes every function that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_region_without_policy_keeps_torchs_fast_path_and_other_modes() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x))

    model = Outer().eval()
    lp.wrap(model, lp.Policy("1-4-3", overrides={"encoder": None}))
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        model(x)
    assert "aten::_transformer_encoder_layer_fwd" in {event.key for event in profile.key_averages()}
    with torch.no_grad(), Spy() as spy:
        model(x)
    assert F.layer_norm in spy.seen, "a mode from outside still sees what runs there"


def test_a_mode_entered_inside_a_model_stays_in_its_place() -> None:
    spy = Spy()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with spy:
                return self.inside(x) @ self.outside(x).t()

    model = lp.wrap(Outer(), lp.Policy("1-4-3", overrides={"outside": None, "inside": "bf16"}))
    inside = F.linear(lp.quantize(X, "bf16"), lp.quantize(model.inside.weight, "bf16")) + model.inside.bias
    outside = F.linear(X, model.outside.weight, model.outside.bias)
    assert torch.equal(model(X), lp.quantize(inside, "1-4-3") @ lp.quantize(outside, "1-4-3").t())
    assert spy.seen.count(F.linear) == 2
    assert torch._C._len_torch_function_stack() == 0


def test_the_default_device_still_holds() -> None:
    model = lp.wrap(Call(lambda x: x @ torch.eye(8)), POLICY)
    with torch.device("meta"):
        assert torch.empty(1).is_meta
        assert model(torch.empty(2, 8)).is_meta


def test_an_error_in_a_forward_leaves_no_mode_behind() -> None:
    model = lp.wrap(Model(), "fp8")
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 7))
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("how", ["shared module", "tied weight"])
def test_shared_parts(how: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.one = self.two = nn.Linear(8, 8)

        def forward(self, indices: Tensor) -> Tensor:
            return self.head(self.two(self.one(self.embedding(indices))))

    if how == "shared module":
        with pytest.raises(ValueError, match="overrides split a module that is both 'one' and 'two'"):
            lp.wrap(Tied(), lp.Policy("1-4-3", overrides={"two": None}))
    model = lp.wrap(Tied(), POLICY)
    model(torch.tensor([1, 2])).sum().backward()
    assert [row.calls for row in lp.report(model).rows if row.path == "one"] == [2]
    assert model.head.weight is model.embedding.weight
    assert lp.wrap(copy.deepcopy(model), POLICY).one is not model.one


def test_parametrizations() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))
    lp.wrap(model, POLICY)
    y = model(X)
    assert torch.equal(y, F.linear(lp.quantize(X, A), lp.quantize(model.weight, W)) + model.bias)
    y.sum().backward()
    assert model.parametrizations.weight.original0.grad is not None
    later = nn.utils.parametrizations.weight_norm(lp.wrap(nn.Linear(8, 3), POLICY))
    assert torch.equal(later(X), F.linear(lp.quantize(X, A), lp.quantize(later.weight, W)) + later.bias)
    assert "forward" not in vars(lp.unwrap(later))


def test_parametrizations_compute_in_full_precision() -> None:
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 3))
    nn.utils.parametrizations.spectral_norm(model[1])
    lp.wrap(model.eval(), POLICY, strict=True)
    hidden = F.linear(lp.quantize(X, A), lp.quantize(model[0].weight, W)) + model[0].bias
    expected = F.linear(lp.quantize(hidden, A), lp.quantize(model[1].weight, W)) + model[1].bias
    assert torch.equal(model(X), expected)
    report = lp.report(model)
    assert [row.path for row in report.rows] == ["0", "1"]
    assert report.computed == ("0.parametrizations.weight", "1.parametrizations.weight")
    assert not report.overridden


# Activation checkpointing: what is recomputed is rounded as before, and counted once.


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(x @ self.weight)) @ self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("override", [{}, {"inner": None}])
def test_checkpointing(reentrant: bool, override: dict[str, None]) -> None:
    plain = Checkpointed(None)
    model = Checkpointed(reentrant)
    model.load_state_dict(plain.state_dict())
    policy = lp.Policy(A, W, DA, DW, overrides=override)
    lp.wrap(plain, policy)
    lp.wrap(model, policy)
    (x,) = leaves(X)
    assert same(step(model, x), step(plain, x))
    assert lp.report(model).rows == lp.report(plain).rows
    lp.unwrap(model), lp.unwrap(plain)
    assert same(step(model, x), step(plain, x))


# Strict, and the report.


def test_strict_names_op_and_module() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Call(lambda x: torch.cdist(x, x))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.raises(ValueError, match="torch.*cdist in module 'inner' is not covered"):
        lp.wrap(Distances(), "fp8", strict=True)(X)
    lp.wrap(Distances(), lp.Policy("1-4-3", overrides={"inner": None}), strict=True)(X)
    model = lp.wrap(Distances(), "fp8")
    assert torch.equal(model(X), torch.cdist(X, X))
    model(X)
    (line,) = lp.report(model).not_covered
    assert re.fullmatch(r"torch\S*cdist in inner", line)
    assert f"NOT covered: {line}." in str(lp.report(model))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("matmul of torch.complex64", lambda x: (x + 0j) @ (x + 0j).T),
        ("aten.mm", lambda x: torch.ops.aten.mm(x, x.T)),
        ("aten.mm.default", lambda x: torch.ops.aten.mm.default(x, x.T)),
        ("mm of torch.float32 (torch.sparse_coo)", lambda x: torch.mm(x.to_sparse(), x.T)),
        ("torch.linalg.matrix_power", lambda x: torch.linalg.matrix_power(x[:, :4], 3)),
        ("torch.linalg.solve", lambda x: torch.linalg.solve(x[:, :4], x)),
        ("torch.Tensor.matrix_exp", lambda x: x[:, :4].matrix_exp()),
        ("torch.nn.functional.conv_tbc", lambda x: F.conv_tbc(x[None], x[None].mT[:, :, :4], torch.zeros(4))),
    ],
)
def test_what_is_not_covered_is_said(name: str, function: Callable[[Tensor], Tensor]) -> None:
    module = lp.wrap(Call(function), POLICY)
    assert torch.equal(module(X).to_dense(), function(X).to_dense())
    (line,) = lp.report(module).not_covered
    assert line.startswith(name)
    with pytest.raises(ValueError, match=re.escape(name)):
        lp.wrap(Call(function), POLICY, strict=True)(X)


LIBRARY = torch.library.Library("lowprec_test_wrap", "DEF")
LIBRARY.define("scale(Tensor x, Tensor w) -> Tensor")
LIBRARY.impl("scale", lambda x, w: x * w, "CompositeExplicitAutograd")
LIBRARY.define("my_attention(Tensor x) -> Tensor")
LIBRARY.impl("my_attention", lambda x: x.clone(), "CompositeExplicitAutograd")


def test_an_op_from_elsewhere_counts_if_it_takes_something_learnt() -> None:
    ops = torch.ops.lowprec_test_wrap
    model = Call(lambda x, w: ops.my_attention(ops.scale(x, torch.ones(8)) + ops.scale(x, w)), torch.randn(8))
    lp.wrap(model, "fp8")
    with torch.no_grad():
        model(X)
    lines = lp.report(model).not_covered
    assert lines == ("lowprec_test_wrap.scale in (model)", "lowprec_test_wrap.my_attention in (model)")
    scale = lp.wrap(Call(lambda x: ops.scale(x, torch.ones(8))), "fp8", strict=True)
    scale(X)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts_are_not_covered() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 3)))))
    with pytest.raises(ValueError, match="ScriptModule '0' in module '1' is not covered"):
        lp.wrap(model, "fp8", strict=True)
    assert "forward" not in vars(model), "a refused model is left as it was"
    lp.wrap(model, "fp8")(X)
    assert lp.report(model).not_covered == ("ScriptModule '0' in 1",)
    with pytest.raises(ValueError, match="model is a ScriptModule"):
        lp.wrap(model[1][0], "fp8")


# Names that hold a product, sought by a rule of the test's own; and those that only look like it.
PRODUCT = re.compile(
    r"mm$|mm_$|mv$|mv_$|matmul|linear|conv|dot$|einsum|attention|rnn|lstm|gru$|gru_|embed|_cell|cdist|pdist|inner$|outer$"
    r"|\bger$|kron|addr|\bcov$|corrcoef|matrix_(exp|power)|lowrank|lobpcg|householder|ormqr|solve(_|$)|inverse|\binv|pinv|dot"
)
NO_PRODUCT = re.compile(r"resolve_|embedding_loss|diag_embed|slice_inverse|fbgemm_(linear_quantize|pack)|resize_as")


def test_every_function_of_torch_that_looks_like_a_product_is_covered_or_known_not_to_be() -> None:
    functions = {f for overridable in get_overridable_functions().values() for f in overridable}
    products = {f: name for f in functions if PRODUCT.search(name := (resolve_name(f) or "").split(".")[-1])}
    unknown = [n for f, n in products.items() if f not in COVERED and f not in NOT_COVERED and not NO_PRODUCT.search(n)]
    assert not unknown
    assert len(products) > 100
    assert not set(COVERED) & set(NOT_COVERED)
    others = re.compile(r"encoder_layer|gemm|lstsq|vecdot|tensorinv|_mm|loss|norm|pool|act|softmax")
    wrongly = [name for name in NOT_COVERED.values() if not PRODUCT.search(name) and not others.search(name)]
    assert not wrongly


def test_report_before_the_first_run_lists_the_modules() -> None:
    rows = lp.report(lp.wrap(Model(), "fp8")).rows
    paths = [f"layers.{i}.{part}" for i in (0, 1) for part in ("first", "second.0", "second.2")]
    assert [row.path for row in rows] == [*paths, "head"]
    assert {row.kind for row in rows} == {"linear"}
    assert all(row.calls == 0 and row.forward.elements == 0 for row in rows)


def test_report_counts_to_the_digit() -> None:
    model = lp.wrap(nn.Linear(4, 2), lp.Policy("1-2-1", "1-2-1", "1-2-1", "1-2-1"))
    largest, smallest = lp.format("1-2-1").max, lp.format("1-2-1").min_subnormal
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1e9, -1e9, 0.0], [smallest / 8, smallest, largest, 1.0]]))
    x = torch.tensor([[1.0, 2.0, smallest / 4, 0.0], [1e9, float("inf"), -1e9, float("nan")]])
    for _ in range(3):
        model(x).backward(torch.tensor([[1e9, 0.0], [smallest / 8, 1.0]]))
    (row,) = lp.report(model).rows
    assert (row.path, row.kind, row.calls) == ("", "linear", 3)
    counts = {role: (c.elements, c.saturated, c.flushed, c.nan) for role, c in row.counts.items()}
    assert counts["activation"] == (24, 9, 3, 3)
    assert counts["weight"] == (24, 6, 3, 0)
    assert counts["activation_grad"] == (12, 3, 3, 0)
    # dY rounds to [[max, 0], [0, 1]]: dW = [[max·1, max·2, 0, nan], [max, max, -max, nan]], db = [max, 1].
    assert counts["weight_grad"] == (30, 3, 0, 6)
    assert row.counts["activation"].saturated_percent == 37.5
    assert row.forward.flushed_percent == 12.5
    assert row.gradient.elements == 42


def test_report_is_a_table() -> None:
    model = lp.wrap(Model(), lp.Policy(A, W, DA, overrides={"layers.1": None, "head": "bf16"}))
    step(model, X)
    text = str(lp.report(model))
    lines = text.splitlines()
    assert lines[0] == "Roles: a = activation, w = weight, da = activation_grad, dw = weight_grad"
    assert "w 1-3-4:bias=5" in lines[1]
    assert "dw full precision" in lines[1]
    head = next(line for line in lines if line.startswith("head"))
    assert head.split()[:4] == ["head", "linear", "[2]", "1"]
    assert "Full precision, by an override: layers.1." in lines
    assert "Full precision, with parameters that no product was seen to use: layers.0.norm." in lines
    assert "NOT covered: nothing that was seen." in lines
    table = [line for line in lines if line.startswith(("module", "layers.0", "head"))]
    losses, noise = table[: len(table) // 2], table[len(table) // 2 :]
    for part in (losses, noise):
        assert len({line.index("linear") for line in part if " linear " in line}) == 1
        assert len({len(line) for line in part}) == 1
    assert max(map(len, lines[: lines.index(noise[-1])])) <= 120


def test_long_lists_are_cut_in_the_table_alone() -> None:
    report = lp.report(lp.wrap(nn.Sequential(nn.Linear(2, 2), *[nn.LayerNorm(2) for _ in range(12)]), "fp8"))
    assert len(report.elementwise) == 12
    assert str(report).endswith("1, 2, 3, 4, 5, 6, 7, 8, ... (12 in all).")


def test_counters_survive_inference_mode_and_follow_the_device() -> None:
    model = lp.wrap(nn.Linear(8, 3), POLICY)
    with torch.inference_mode():
        model(X)
    model(X).sum().backward()
    model.double()(X.double())
    assert [row.calls for row in lp.report(model).rows] == [3]


@pytest.mark.gpu
def test_counters_follow_the_model_to_another_device() -> None:
    model = lp.wrap(Model(), POLICY)
    step(model, X)
    cpu = lp.report(model).rows
    model.cuda()
    with torch.inference_mode():
        model(X.cuda())
    step(model, X.cuda())
    rows = lp.report(model).rows
    assert [row.calls for row in rows] == [3 * row.calls for row in cpu]
    first = next(row for row in rows if row.path == "layers.0.first")
    assert first.counts["activation"].elements == 3 * X.numel()


def test_meta_and_fake_tensors_pass_uncounted() -> None:
    model = lp.wrap(nn.Linear(8, 3, device="meta"), POLICY)
    assert model(torch.empty(2, 8, device="meta")).shape == (2, 3)
    model.to_empty(device="cpu")(X)
    assert [row.calls for row in lp.report(model).rows] == [1]
    model = lp.wrap(nn.Linear(8, 3), POLICY)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(X)).shape == (4, 3)
    assert [row.calls for row in lp.report(model).rows] == [0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torch_jit_is_refused_and_torch_export_is_not() -> None:
    model = lp.wrap(nn.Linear(8, 3), "fp8-forward")
    with pytest.raises(ValueError, match="cannot be traced by torch.jit: use torch.export, or unwrap it"):
        torch.jit.trace(model, X)
    program = torch.export.export(model, (X,)).module()
    assert torch.equal(program(2 * X), model(2 * X))
    assert [row.calls for row in lp.report(model).rows] == [1], "an exported program rounds, and counts nothing"


# Refusals.


@pytest.mark.parametrize(
    ("model", "policy", "error", "message"),
    [
        (lambda x: x, "fp8", TypeError, "model must be a torch.nn.Module, got function"),
        (nn.Linear(2, 2), 8, TypeError, "policy must be a Policy or the name of a recipe, got int"),
        (
            nn.Linear(2, 2),
            "fp9",
            ValueError,
            "recipe must be one of bf16, fp8, fp8-forward, fp8-sampled, mxfp8, nvfp4, got 'fp9'",
        ),
        (
            Model(),
            lp.Policy("1-4-3", overrides={"heads": None}),
            ValueError,
            "overrides: 'heads' matches no module of the model, which has layers, layers.0, layers.0.first",
        ),
        (
            nn.Linear(2, 2),
            lp.Policy("1-4-3", overrides={"layer.*": None}),
            ValueError,
            "overrides: 'layer.*' matches no module of the model, which has none",
        ),
        (
            nn.Sequential(nn.MultiheadAttention(4, 2)),
            lp.Policy("1-4-3", overrides={"*.out_proj": None}),
            ValueError,
            "overrides split '0': a MultiheadAttention computes with its out_proj as one",
        ),
    ],
)
def test_refusals(model: Any, policy: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        lp.wrap(model, policy)
    assert str(raised.value).startswith(message)
    assert not isinstance(model, nn.Module) or "forward" not in vars(model)


def test_a_refused_policy_leaves_the_old_one() -> None:
    model = lp.wrap(Model(), "fp8")
    before = step(model, X)
    with pytest.raises(ValueError, match="matches no module"):
        lp.wrap(model, lp.Policy(overrides={"heads": None}))
    assert same(step(model, X), before)


def test_report_of_what_is_not_wrapped() -> None:
    for model in (Model(), lp.wrap(Model(), EMPTY)):
        with pytest.raises(ValueError, match="model is under no policy"):
            lp.report(model)
