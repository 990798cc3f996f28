"""Attention under a policy: q, k, the probabilities and v rounded, masks never; all options as torch has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowprec as lp
from tests.oracle import DA, POLICY, A, Call, W, back, leaves

EXACT = lp.Policy("fp32", "fp32", "fp32", "fp32")
"""Rounds float32 to float32: the handlers run, and must compute what torch computes."""


def qkv(*, heads: int = 4, groups: int = 1, length: int = 6, keys: int = 6) -> list[Tensor]:
    shapes = [(2, heads, length, 8), (2, heads // groups, keys, 8), (2, heads // groups, keys, 8)]
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_every_operand_and_gradient(causal: bool) -> None:
    given = leaves(*qkv())
    y = lp.wrap(Call(lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal)), POLICY)(*given)
    dy = torch.randn_like(y)
    y.backward(dy)

    inputs = leaves(*given)
    q, k, v = (lp.quantize(x, A) for x in inputs)
    scores = back(q @ k.mT, DA) * 8**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    expected = back(lp.quantize(scores.softmax(-1), A) @ v, DA)
    expected.backward(dy)
    assert torch.equal(y, expected)
    assert all(torch.equal(x.grad, other.grad) for x, other in zip(given, inputs, strict=True))


def test_a_learnt_query_is_a_weight() -> None:
    q, k, v = qkv()
    module = lp.wrap(Call(lambda k, v, q: F.scaled_dot_product_attention(q, k, v), q), POLICY)
    q, k_, v_ = lp.quantize(q, W), lp.quantize(k, A), lp.quantize(v, A)
    expected = lp.quantize((q @ k_.mT * 8**-0.5).softmax(-1), A) @ v_
    assert torch.equal(module(k, v), expected)


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3},
    "float": {"attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(0))},
    "a row masked throughout": {"attn_mask": (torch.arange(6) != 2)[:, None].expand(6, 6)},
    "scale": {"scale": 0.5},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(options: dict[str, Any], groups: int, dtype: torch.dtype) -> None:
    def attention(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x, enable_gqa=groups > 1, **options)

    tensors = [x.to(dtype) for x in qkv(groups=groups)]
    options = {name: x.to(dtype) if name == "attn_mask" and x.is_floating_point() else x for name, x in options.items()}
    policy = EXACT if dtype == torch.float32 else lp.Policy("bf16", "bf16", "bf16", "bf16")
    given, inputs = leaves(*tensors), leaves(*tensors)
    y, expected = lp.wrap(Call(attention), policy)(*given), attention(*inputs)
    y.sum().backward()
    expected.sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, **close)
    for x, other in zip(given, inputs, strict=True):
        torch.testing.assert_close(x.grad, other.grad, **close)


def test_dropout() -> None:
    torch.manual_seed(0)
    q, k, v = qkv(length=64, keys=64)
    y = lp.wrap(Call(lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.5)), EXACT)(q, k, torch.ones_like(v))
    assert y.std() > 0.05
    assert abs(y.mean() - 1) < 0.05


def test_masks_keep_their_values() -> None:
    mask = torch.full((6, 6), -1234.567)
    mask.fill_diagonal_(-1.2345678)
    q, k, v = qkv()
    y = lp.wrap(Call(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask)), lp.Policy("1-4-3"))(q, k, v)
    assert torch.equal(y, lp.quantize(v, "1-4-3"))


def test_a_causal_mask_and_another_are_refused() -> None:
    module = lp.wrap(Call(lambda *x: F.scaled_dot_product_attention(*x, torch.zeros(6, 6), is_causal=True)), EXACT)
    with pytest.raises(ValueError, match="is_causal=True needs attn_mask=None"):
        module(*qkv())


def test_autocast() -> None:
    def attention(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x)

    with torch.autocast("cpu", torch.bfloat16):
        y, expected = lp.wrap(Call(attention), "bf16")(*(inputs := qkv())), attention(*inputs)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.02)


# nn.MultiheadAttention.

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 5, "vdim": 7},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "bias_kv and zero attention": {"add_bias_kv": True, "add_zero_attn": True},
    "batch first": {"batch_first": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 6 + [True], [False] * 4 + [True] * 3])},
    "float padding": {"key_padding_mask": torch.tensor([[0.0] * 7, [-1.5] * 7])},
    "bool mask": {"attn_mask": torch.ones(6, 7).triu(2).bool()},
    "float mask for each head": {"attn_mask": torch.randn(8, 6, 7, generator=torch.Generator().manual_seed(0))},
    "both masks": {
        "attn_mask": torch.ones(6, 7).triu(2).bool(),
        "key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3]),
    },
    "causal": {"attn_mask": torch.ones(6, 7).triu(1).bool(), "is_causal": True, "need_weights": False},
}


def compare(layer: nn.MultiheadAttention, inputs: list[Tensor], options: dict[str, Any]) -> None:
    wrapped = lp.wrap(copy.deepcopy(layer), EXACT)
    one = inputs[0] is inputs[1]
    given, others = leaves(*inputs), leaves(*inputs)
    if one:
        given, others = given[:1] * 3, others[:1] * 3
    (y, weights), (expected, expected_weights) = wrapped(*given, **options), layer(*others, **options)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    pairs = zip([*given, *wrapped.parameters()], [*others, *layer.parameters()], strict=True)
    for x, other in pairs:
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("call", CALLS)
def test_multi_head_attention(layer: str, call: str) -> None:
    options = LAYERS[layer]
    sizes = [16, options.get("kdim", 16), options.get("vdim", 16)]
    inputs = [torch.randn(length, 2, size) for length, size in zip([6, 7, 7], sizes, strict=True)]
    if "batch_first" in options:
        inputs = [x.transpose(0, 1) for x in inputs]
    compare(nn.MultiheadAttention(16, 4, **options), inputs, CALLS[call])


@pytest.mark.parametrize("batched", [False, True])
def test_self_attention(batched: bool) -> None:
    x = torch.randn(6, 2, 16) if batched else torch.randn(6, 16)
    padding = torch.tensor([[False] * 6, [False] * 5 + [True]]) if batched else torch.tensor([False] * 5 + [True])
    compare(nn.MultiheadAttention(16, 4), [x, x, x], {"key_padding_mask": padding})


def test_static_keys_and_values() -> None:
    layer, x = nn.MultiheadAttention(16, 4), torch.randn(6, 2, 16)
    static = {"static_k": torch.randn(8, 5, 4), "static_v": torch.randn(8, 5, 4)}

    def attention(x: Tensor) -> Tensor:
        weights = (layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0)
        out = (layer.out_proj.weight, layer.out_proj.bias)
        return F.multi_head_attention_forward(x, x, x, 16, 4, *weights, *out, **static)[0]

    torch.testing.assert_close(lp.wrap(Call(attention), EXACT)(x), attention(x), rtol=1e-5, atol=1e-6)


def test_projections_and_products_are_rounded() -> None:
    layer = lp.wrap(nn.MultiheadAttention(16, 4, batch_first=True), POLICY)
    (x,) = leaves(torch.randn(2, 6, 16))
    y, weights = layer(x, x, x)
    dy = torch.randn_like(y)
    y.backward(dy)

    (x_,) = leaves(x)
    w, b = leaves(layer.in_proj_weight, layer.in_proj_bias)
    projected = back(lp.quantize(x_, A).transpose(0, 1) @ lp.quantize(w, W).T + b, DA)
    q, k, v = (part.reshape(6, 8, 4).transpose(0, 1) for part in projected.chunk(3, -1))
    q, k, v = (lp.quantize(part, A) for part in (q, k, v))
    probabilities = (back(q @ k.mT, DA) * 0.5).softmax(-1)
    attended = back(lp.quantize(probabilities, A) @ v, DA).transpose(0, 1).reshape(6, 2, 16)
    out = F.linear(lp.quantize(attended, A), lp.quantize(layer.out_proj.weight, W)) + layer.out_proj.bias
    expected = back(out, DA).transpose(0, 1)
    expected.backward(dy)
    assert torch.equal(y, expected)
    assert torch.equal(weights, probabilities.view(2, 4, 6, 6).mean(1))
    assert torch.equal(x.grad, x_.grad)
    assert torch.equal(layer.in_proj_weight.grad, lp.quantize(w.grad, POLICY.weight_grad))
    assert torch.equal(layer.in_proj_bias.grad, lp.quantize(b.grad, POLICY.weight_grad))


def test_an_input_of_another_width_is_refused() -> None:
    layer = lp.wrap(nn.MultiheadAttention(16, 4), EXACT)
    with pytest.raises(ValueError, match="query must have 16 features, got 8"):
        layer(*[torch.randn(6, 2, 8)] * 3)


def test_dropout_of_probabilities_stops_in_evaluation() -> None:
    layer = lp.wrap(nn.MultiheadAttention(16, 4, dropout=0.9), EXACT)
    x = torch.randn(6, 2, 16)
    assert (layer(x, x, x)[1] == 0).any()
    layer.eval()
    assert (layer(x, x, x)[1] > 0).all()
