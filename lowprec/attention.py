"""Attention with q, k, the probabilities and v rounded as the operands of its two products; masks never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec import reductions
from lowprec.blocked import Factor, factor, finish, times
from lowprec.products import Handler, linear
from lowprec.roles import Roles


def scaled_dot_product_attention(
    roles: Roles,
    function: Handler,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of q [..., L, E], k [..., S, E], v [..., S, V] -> [..., L, V], as torch's function of that name.

    Raises:
        ValueError: for is_causal=True together with a mask.
    """
    if is_causal:
        if attn_mask is not None:
            raise ValueError("is_causal=True needs attn_mask=None, got both: each sets the mask")
        attn_mask = _causal(query, key)
    groups = query.size(-3) // key.size(-3) if enable_gqa else 1
    return _attend(roles, query, key, value, attn_mask, dropout_p, scale, groups)[0]


def _attend(
    roles: Roles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The result and the probabilities, unrounded; the mask is added, or marks by True what takes part.

    The scale is applied to the scores, so that q and k are rounded as they come. Probabilities are computed in at
    least float32 and rounded from there. A query to which every key is masked gets zero.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    if roles.by_contraction:
        return _attend_by_contraction(roles, (query, key, value), mask, dropout, scale, groups)
    query, key, value = roles.operand(query), roles.operand(key), roles.operand(value)
    if groups > 1:
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = roles.result(query @ key.mT) * scale
    probabilities = _softmax(roles, scores, mask)
    if dropout > 0:
        probabilities = F.dropout(probabilities, dropout)
    return roles.result(roles.operand(probabilities).to(value.dtype) @ value), probabilities


def _attend_by_contraction(
    roles: Roles, operands: tuple[Tensor, ...], mask: Tensor | None, dropout: float, scale: float, groups: int
) -> tuple[Tensor, Tensor]:
    """The same by products that know what they sum over: operands in blocks lie along it, accumulators follow it."""
    query, key, value = (factor(roles, x) for x in operands)
    shared = groups > 1 and roles.accumulators.of_products
    if groups > 1 and not shared:
        key, value = (each.map(lambda x: x.repeat_interleave(groups, -3)) for each in (key, value))

    def multiply(a: Factor, b: Factor, dtype: torch.dtype | None = None) -> Tensor:
        if not shared:
            return times(roles, a, b, dtype=dtype)
        # Heads that share a key, or a value, side by side, so that its gradient sums over them as well.
        apart = a.map(lambda x: x.reshape(*x.shape[:-3], x.shape[-3] // groups, groups, *x.shape[-2:]))
        return times(roles, apart, b.map(lambda x: x.unsqueeze(-3)), dtype=dtype).flatten(-4, -3)

    scores = finish(roles, multiply(query, key.map(lambda x: x.mT))) * scale
    probabilities = _softmax(roles, scores, mask)
    dropped = F.dropout(probabilities, dropout) if dropout else probabilities
    return finish(roles, multiply(factor(roles, dropped), value, value.x.dtype)), probabilities


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Which of [S] keys each of [L] queries sees: those up to its own place."""
    return torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()


def _softmax(roles: Roles, scores: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities [..., L, S] in at least float32; zero in a row that is masked throughout."""
    how = roles.reducing()
    dtype = torch.promote_types(scores.dtype, torch.float32)

    def softmax(x: Tensor) -> Tensor:
        return x.softmax(-1, dtype=dtype) if how is None else reductions.softmax(how, x.to(dtype), -1)

    if mask is None:
        return softmax(scores)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    return softmax(scores.masked_fill(nothing, 0.0)).masked_fill(nothing, 0.0)


def multi_head_attention(
    roles: Roles,
    function: Handler,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Projected attention of q [L, N, E], k and v [S, N, E], or all without N -> [L, N, E], weights [N, L, S].

    `is_causal` takes the mask's place where torch lets it. The weights are the probabilities before rounding.
    """
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True needs attn_mask, got None: it says only that the mask is causal")
    batched = query.dim() == 3
    if not batched:
        query, key, value = _each(lambda x: x.unsqueeze(1), query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    if width != embed_dim_to_check:
        raise ValueError(f"query must have {embed_dim_to_check} features, got {width}")
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    query, key, value = _project(roles, query, key, value, weights, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        key, value = (
            torch.cat([x, roles.spread(b, x[:1]).expand_as(x[:1])]) for x, b in ((key, bias_k), (value, bias_v))
        )
    query, key, value = (x.reshape(x.size(0), batch * num_heads, -1).transpose(0, 1) for x in (query, key, value))
    key, value = key if static_k is None else static_k, value if static_v is None else static_v
    if add_zero_attn:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    if is_causal and key_padding_mask is None and not need_weights:
        mask: Tensor | None = _causal(query, key)
    else:
        mask = _merge(attn_mask, key_padding_mask, num_heads, key.size(1), query.dtype)
    y, probabilities = _attend(roles, query, key, value, mask, dropout_p if training else 0.0)
    y = linear(roles, F.linear, y.transpose(0, 1).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    y = y if batched else y.squeeze(1)
    return y, _shown(roles, probabilities, num_heads, average_attn_weights, batched) if need_weights else None


def _each(function: Callable[[Tensor], Tensor], *xs: Tensor) -> list[Tensor]:
    """A function of every tensor, called once for those that are the same: self-attention stays one."""
    done: list[tuple[Tensor, Tensor]] = []
    for x in xs:
        seen = [y for other, y in done if other is x]
        done.append((x, seen[0] if seen else function(x)))
    return [y for _, y in done]


def _project(
    roles: Roles,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | tuple[Any, ...] | None,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """The three in-projections, by weights in one or three pieces; those of a single input as one product."""
    if weights is None or (isinstance(weights, tuple) and any(w is None for w in weights)):
        raise ValueError("in_proj_weight, or q_proj_weight, k_proj_weight and v_proj_weight, must be given")
    if isinstance(weights, Tensor) and query is key and key is value:
        return linear(roles, F.linear, query, weights, bias).chunk(3, -1)
    weights = weights.chunk(3) if isinstance(weights, Tensor) else weights
    biases = (None, None, None) if bias is None else bias.chunk(3)
    inputs = zip((query, key, value), weights, biases, strict=True)
    return tuple(linear(roles, F.linear, x, w, b) for x, w, b in inputs)


def _merge(mask: Tensor | None, padding: Tensor | None, heads: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """The masks of attention and of padding as one, to be added to scores [N · heads, L, S].

    True marks what takes no part. Keys appended by the layer itself take part always.
    """
    masks = []
    if mask is not None:
        masks.append(_additive(mask if mask.dim() == 3 else mask.unsqueeze(0), length, dtype))
    if padding is not None:
        masks.append(_additive(padding, length, dtype).repeat_interleave(heads, 0).unsqueeze(1))
    return masks[0] if len(masks) == 1 else masks[0] + masks[1] if masks else None


def _additive(mask: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return F.pad(mask, (0, length - mask.size(-1)))


def _shown(roles: Roles, probabilities: Tensor, heads: int, average: bool, batched: bool) -> Tensor:
    """The weights as the caller asked for them: [N, L, S], or [N, heads, L, S] unless averaged; N if it was given."""
    weights = probabilities.view(-1, heads, *probabilities.shape[1:])
    if average:
        weights = (
            weights.mean(1)
            if roles.accumulators.reduction is None
            else reductions.add_up(roles, torch.mean, weights, 1)
        )
    return weights if batched else weights.squeeze(0)


HANDLERS: dict[Handler, tuple[str, Handler]] = {
    F.scaled_dot_product_attention: ("attention", scaled_dot_product_attention),
    F.multi_head_attention_forward: ("multi_head_attention", multi_head_attention),
}
"""What is covered here: torch's function, the name that a report gives it, and its handler."""
