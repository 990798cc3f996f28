"""Recurrent networks under a policy: the hidden state rounded at every step, c never; all options as torch has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lowprec as lp
from tests.oracle import DA, DW, POLICY, A, W, back, leaves

EXACT = lp.Policy("fp32", "fp32", "fp32", "fp32")
"""Rounds float32 to float32: the handlers run, and must compute what torch computes."""

NETWORKS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers": {"num_layers": 3},
    "both directions": {"bidirectional": True},
    "layers in both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "num_layers": 2},
    "batch first": {"batch_first": True},
}
PROJECTED = {
    "projected": {"proj_size": 3},
    "projected layers in both directions, no bias": {
        "proj_size": 3,
        "num_layers": 2,
        "bidirectional": True,
        "bias": False,
    },
}
CASES = [
    *[pytest.param(kind, options, id=f"{kind}, {name}") for kind in NETWORKS for name, options in OPTIONS.items()],
    *[pytest.param("lstm", options, id=f"lstm, {name}") for name, options in PROJECTED.items()],
]


def flat(result: Any) -> list[Tensor]:
    """Output and states of a network."""
    y, states = result
    y = y.data if isinstance(y, PackedSequence) else y
    return [y, *(states if isinstance(states, tuple) else (states,))]


def assert_same(network: nn.Module, call: Callable[[nn.Module, Tensor], Any], x: Tensor) -> None:
    """A network under the exact policy computes what it does without, gradients included."""
    wrapped = lp.wrap(copy.deepcopy(network), EXACT)
    (given,), (other,) = leaves(x), leaves(x)
    outputs, expected = flat(call(wrapped, given)), flat(call(network, other))
    for y, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    sum(y.pow(2).sum() for y in outputs).backward()
    sum(y.pow(2).sum() for y in expected).backward()
    pairs = zip([given, *wrapped.parameters()], [other, *network.parameters()], strict=True)
    for tensor, wanted in pairs:
        torch.testing.assert_close(tensor.grad, wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_whole_sequences(kind: str, options: dict[str, Any]) -> None:
    assert_same(NETWORKS[kind](4, 5, **options), lambda network, x: network(x), torch.randn(6, 3, 4))


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_packed_sequences(kind: str, options: dict[str, Any]) -> None:
    first = options.get("batch_first", False)

    def call(network: nn.Module, x: Tensor) -> Any:
        lengths = torch.tensor([3, 6, 5, 1])
        return network(pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False))

    assert_same(NETWORKS[kind](4, 5, **options), call, torch.randn(4, 6, 4) if first else torch.randn(6, 4, 4))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("batched", [False, True])
def test_given_states(kind: str, batched: bool) -> None:
    shape = (3, 5) if batched else (5,)
    states = [torch.randn(2, *shape) for _ in range(2 if kind == "lstm" else 1)]
    hx = tuple(states) if kind == "lstm" else states[0]
    network = NETWORKS[kind](4, 5, num_layers=2)
    assert_same(network, lambda network, x: network(x, hx), torch.randn(6, 3, 4) if batched else torch.randn(6, 4))


CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("bias", [False, True])
def test_cells(cell: Callable[..., nn.RNNCellBase], bias: bool) -> None:
    def call(network: nn.Module, x: Tensor) -> tuple[Tensor, Any]:
        state = network(x[0])
        state = network(x[1], state)
        return state if isinstance(state, tuple) else (state, state)

    assert_same(cell(4, 5, bias=bias), call, torch.randn(2, 3, 4))


def test_dropout_between_layers() -> None:
    network = lp.wrap(nn.LSTM(4, 64, num_layers=2, dropout=1.0, bias=False), EXACT)
    x = torch.randn(3, 2, 4)
    assert not network(x)[0].any()
    assert network(x)[1][0][0].any()
    assert network.eval()(x)[0].any()


# Every role by hand.


def by_hand(weights: list[Tensor], x: Tensor, step: Callable[..., tuple[Tensor, ...]], states: int) -> list[Tensor]:
    """A layer as the contract says it: weights rounded once, inputs and hidden state at every step, gradients too."""
    w_ih, w_hh, b_ih, b_hh = weights
    state = tuple(torch.zeros(x.size(1), w_hh.size(1)) for _ in range(states))
    outputs = []
    for x_t in lp.quantize(x, A).unbind(0):
        h = lp.quantize(state[0], A)
        products = F.linear(x_t, lp.quantize(w_ih, W)), F.linear(h, lp.quantize(w_hh, W))
        state = step(*products, b_ih, b_hh, *state)
        outputs.append(state[0])
    return [torch.stack(outputs), *state]


def lstm_step(ih: Tensor, hh: Tensor, b_ih: Tensor, b_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = back(ih + (b_ih + b_hh) + hh, DA).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(ih: Tensor, hh: Tensor, b_ih: Tensor, b_hh: Tensor, h: Tensor) -> tuple[Tensor]:
    (i_r, i_z, i_n), (h_r, h_z, h_n) = back(ih + b_ih, DA).chunk(3, -1), back(hh + b_hh, DA).chunk(3, -1)
    r, z = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
    n = (i_n + r * h_n).tanh()
    return (n + z * (h - n),)


def tanh_step(ih: Tensor, hh: Tensor, b_ih: Tensor, b_hh: Tensor, h: Tensor) -> tuple[Tensor]:
    return (back(ih + (b_ih + b_hh) + hh, DA).tanh(),)


STEPS = {"lstm": (lstm_step, 2), "gru": (gru_step, 1), "tanh": (tanh_step, 1)}


@pytest.mark.parametrize("kind", STEPS)
def test_every_operand_and_gradient(kind: str) -> None:
    network = lp.wrap(NETWORKS[kind](4, 5), POLICY)
    (x,) = leaves(torch.randn(6, 3, 4))
    outputs = flat(network(x))
    step, states = STEPS[kind]
    weights = leaves(*network.parameters())
    (x_,) = leaves(x)
    expected = by_hand(weights, x_, step, states)
    for y, wanted in zip(outputs, [expected[0], *(state[None] for state in expected[1:])], strict=True):
        assert torch.equal(y, wanted)
    outputs[0].sum().backward()
    expected[0].sum().backward()
    # Sums over the steps may be formed in another order before their one rounding.
    torch.testing.assert_close(x.grad, x_.grad, rtol=1e-5, atol=1e-6)
    for parameter, wanted in zip(network.parameters(), weights, strict=True):
        assert torch.equal(parameter.grad, lp.quantize(parameter.grad, DW))
        torch.testing.assert_close(parameter.grad, lp.quantize(wanted.grad, DW), rtol=0.13, atol=1e-3)
        agreeing = (parameter.grad == lp.quantize(wanted.grad, DW)).float().mean()
        assert agreeing > 0.9


def test_the_state_is_rounded_at_every_step_and_c_is_not() -> None:
    network = lp.wrap(nn.LSTM(1, 1), lp.Policy(activation="1-2-0"))
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(1.0)
    y, (_, c) = network(torch.ones(4, 1, 1))
    h, state = torch.zeros(1, 1), torch.zeros(1, 1)
    for t in range(4):
        gates = 3 + lp.quantize(h, "1-2-0")
        state = gates.sigmoid() * state + gates.sigmoid() * gates.tanh()
        h = gates.sigmoid() * state.tanh()
        assert torch.equal(y[t], h)
    assert torch.equal(c[0], state)
    assert not torch.equal(state, lp.quantize(state, "1-2-0"))


def test_a_projected_state_is_rounded_before_and_after() -> None:
    network = lp.wrap(nn.LSTM(4, 5, proj_size=3, bias=False), lp.Policy(A, W))
    w_ih, w_hh, w_hr = (lp.quantize(p, W) for p in network.parameters())
    x = torch.randn(3, 2, 4)
    h, c = torch.zeros(2, 3), torch.zeros(2, 5)
    y, _ = network(x)
    for t in range(3):
        i, f, g, o = (F.linear(lp.quantize(x[t], A), w_ih) + F.linear(lp.quantize(h, A), w_hh)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = F.linear(lp.quantize(o.sigmoid() * c.tanh(), A), w_hr)
        assert torch.equal(y[t], h)


def test_counts() -> None:
    network = lp.wrap(nn.LSTM(4, 5, num_layers=2, bidirectional=True), POLICY)
    network(torch.randn(6, 3, 4))[0].sum().backward()
    (row,) = lp.report(network).rows
    inputs = 6 * 3 * (4 + 10)
    states = 6 * 3 * 5 * 4
    assert (row.kind, row.calls) == ("lstm", 1)
    assert row.counts["activation"].elements == inputs + states
    assert row.counts["weight"].elements == sum(p.numel() for p in network.parameters() if p.dim() == 2)
    assert row.counts["activation_grad"].elements == 6 * 3 * 20 * 4
    assert row.counts["weight_grad"].elements == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
def test_autocast(kind: str) -> None:
    network = NETWORKS[kind](4, 5, num_layers=2)
    wrapped = lp.wrap(copy.deepcopy(network), "bf16")
    x = torch.randn(6, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, expected = flat(wrapped(x)), flat(network(x))
    for y, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, wanted.to(y.dtype), rtol=0.05, atol=0.02)


def test_an_empty_sequence_is_refused() -> None:
    network = lp.wrap(nn.LSTM(4, 5), POLICY)
    with pytest.raises(ValueError, match=r"at least one step, got shape \(0, 3, 4\)"):
        network(torch.randn(0, 3, 4))
    assert network(torch.randn(3, 0, 4))[0].shape == (3, 0, 5)
