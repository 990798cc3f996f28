"""Blocks that are pruned and grown: which ones, in what order, and with what in them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowprec import sparse
from lowprec.sparse.growth import energies

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def layout_of(rows: int, columns: int, density: float, seed: int = 0, block: int = 8) -> sparse.BlockLayout:
    """Any mask, empty rows and columns included."""
    generator = torch.Generator().manual_seed(seed)
    return sparse.BlockLayout(torch.rand(rows, columns, generator=generator) < density, block)


def weights(layout: sparse.BlockLayout, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(layout.weight_shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


layouts = st.builds(layout_of, st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))


# Pruning.


@given(layouts, st.data())
def test_the_strongest_stay(layout: sparse.BlockLayout, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, layout.blocks))
    w = weights(layout)
    after, kept = sparse.prune(w, layout, keep)
    assert kept == sparse.BlockLayout(kept.mask, 8)  # it has as many blocks as it says
    assert kept.blocks == keep
    norms = w.double().square().sum(dim=(1, 2))
    strongest = sorted(range(layout.blocks), key=lambda block: (-float(norms[block]), block))[:keep]
    assert torch.equal(after, w[sorted(strongest)])
    where = torch.zeros(layout.blocks, dtype=torch.bool)
    where[strongest] = True
    expected = layout.mask.clone()
    expected[layout.mask] = where
    assert torch.equal(kept.mask, expected)


def test_shares_and_masks_of_blocks() -> None:
    layout = layout_of(5, 7, 0.6)
    w = weights(layout)
    number, share = sparse.prune(w, layout, round(0.4 * layout.blocks)), sparse.prune(w, layout, 0.4)
    mask = sparse.prune(w, layout, number[1].mask)
    flags = sparse.prune(w, layout, number[1].mask[layout.mask])
    for after, kept in (share, mask, flags):
        assert torch.equal(after, number[0])
        assert kept == number[1]
    assert sparse.prune(w, layout, 1.0)[1] == layout
    assert sparse.prune(w, layout, 0)[1].blocks == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_blocks_the_first_stay(dtype: torch.dtype, device: torch.device) -> None:
    layout = sparse.BlockLayout(torch.ones(4, 5, dtype=torch.bool, device=device), 16)
    w = weights(layout, dtype=dtype)[:1].expand(20, 16, 16).to(device)
    after, kept = sparse.prune(torch.where(torch.arange(20, device=device).view(-1, 1, 1) == 13, 2 * w, w), layout, 3)
    assert kept.mask.flatten().nonzero()[:, 0].tolist() == [0, 1, 13]
    assert torch.equal(after, torch.stack([w[0], w[0], 2 * w[0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_the_same_bits_in_any_order_of_memory(dtype: torch.dtype, device: torch.device) -> None:
    w = weights(layout_of(4, 4, 0.9), dtype=dtype)
    expected = []
    for block in w.double().flatten(1).tolist():
        terms = [value * value for value in block]
        while len(terms) > 1:
            half = len(terms) // 2
            terms = [left + right for left, right in zip(terms[:half], terms[half:], strict=True)]
        expected.append(terms[0])
    assert energies(w.to(device)).tolist() == expected
    assert energies(w.to(device).transpose(1, 2).contiguous().transpose(1, 2)).tolist() == expected


def test_pruning_is_differentiable() -> None:
    layout = layout_of(4, 4, 0.8)
    w = weights(layout, dtype=torch.float64).requires_grad_()
    after, kept = sparse.prune(w, layout, 5)
    after.sum().backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    assert w.grad.sum() == 5 * 64
    assert torch.equal(layout.to_dense(w.grad), kept.to_dense(torch.ones_like(after)))


def test_wrong_keeps() -> None:
    layout = layout_of(4, 4, 0.5)
    w = weights(layout)
    n = layout.blocks
    with pytest.raises(ValueError, match=f"keep must be at most the {n} blocks that are present, got {n + 1}"):
        sparse.prune(w, layout, n + 1)
    with pytest.raises(ValueError, match="keep must be at least 0, got -1"):
        sparse.prune(w, layout, -1)
    for keep in (1.5, math.nan):
        with pytest.raises(ValueError, match="keep must be from 0 to 1"):
            sparse.prune(w, layout, keep)
    for wrong in (True, "half", None):
        with pytest.raises(TypeError, match="keep must be an int"):
            sparse.prune(w, layout, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keep must be an int, a float or a bool tensor, got torch.float32"):
        sparse.prune(w, layout, torch.ones(n))
    with pytest.raises(ValueError, match=r"keep must have shape .* or \(4, 4\), got \(4,\)"):
        sparse.prune(w, layout, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep must be within the layout's mask, got block"):
        sparse.prune(w, layout, ~layout.mask)
    with pytest.raises(ValueError, match="w must have the shape"):
        sparse.prune(w[:-1], layout, 1)
    with pytest.raises(ValueError, match="w must be finite, got a norm that is not, of block 2"):
        sparse.prune(w.index_fill(0, torch.tensor(2), math.nan), layout, 1)
    with pytest.raises(TypeError, match="w must be a dense tensor"):
        sparse.prune(w.to(torch.uint8), layout, 1)


# Growing.


@given(layouts, st.data())
def test_blocks_grow_where_scores_are_largest(layout: sparse.BlockLayout, data: st.DataObject) -> None:
    absent = int((~layout.mask).sum())
    count = data.draw(st.integers(0, absent))
    scores = torch.randint(0, 4, layout.shape, generator=torch.Generator().manual_seed(1)).float()  # many are equal
    scores[layout.mask] = math.nan
    w = weights(layout)
    after, grown = sparse.grow(w, layout, scores, count)
    ranked = sorted((-float(scores.flatten()[at]), at) for at in (~layout.mask).flatten().nonzero()[:, 0].tolist())
    mask = layout.mask.flatten().clone()
    mask[[at for _, at in ranked[:count]]] = True
    assert torch.equal(grown.mask.flatten(), mask)
    assert grown.blocks == layout.blocks + count
    assert torch.equal(grown.to_dense(after), layout.to_dense(w))


def test_new_blocks_start_as_told() -> None:
    layout = layout_of(4, 5, 0.4)
    w, count = weights(layout), 6
    init = weights(layout, seed=9)[:1].repeat(count, 1, 1) * torch.arange(1, count + 1).view(-1, 1, 1)
    after, grown = sparse.grow(w, layout, torch.rand(4, 5), count, init=init)
    new = grown.mask & ~layout.mask
    assert torch.equal(after[new[grown.mask]], init)
    assert torch.equal(after[~new[grown.mask]], w)


def test_what_is_pruned_last_grows_back() -> None:
    layout = layout_of(5, 5, 0.5)
    w = weights(layout)
    fewer, pruned = sparse.prune(w, layout, layout.blocks - 3)
    again, grown = sparse.grow(fewer, pruned, layout.mask.float(), 3, init=w[~pruned.mask[layout.mask]])
    assert grown == layout
    assert torch.equal(again, w)


def test_wrong_scores() -> None:
    layout = layout_of(4, 5, 0.4)
    w, absent = weights(layout), int((~layout.mask).sum())
    scores = torch.rand(4, 5)
    with pytest.raises(
        ValueError, match=f"count must be at most the {absent} blocks that are absent, got {absent + 1}"
    ):
        sparse.grow(w, layout, scores, absent + 1)
    with pytest.raises(TypeError, match="count must be an int"):
        sparse.grow(w, layout, scores, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scores must have the shape of the mask, \(4, 5\), got \(5, 4\)"):
        sparse.grow(w, layout, scores.T, 1)
    with pytest.raises(TypeError, match="scores must be a floating-point tensor, got torch.int64"):
        sparse.grow(w, layout, scores.long(), 1)
    i, j = (~layout.mask).nonzero()[0].tolist()
    for wrong in (math.nan, math.inf, -math.inf):
        scores[i, j] = wrong
        with pytest.raises(ValueError, match="scores must be finite where blocks are absent"):
            sparse.grow(w, layout, scores, 1)
    for init in (torch.zeros(2, 8, 8), torch.zeros(1, 8, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match="init must be torch.float32 of shape"):
            sparse.grow(w, layout, torch.rand(4, 5), 1, init=init)


# Scores.


def pair(
    layout: sparse.BlockLayout, tokens: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, layout.inputs, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(tokens, layout.outputs, generator=generator, dtype=torch.float64).to(dtype),
    )


def blocks_of(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1] // 8, 8)


def test_scores_by_their_definitions(device: torch.device) -> None:
    layout = sparse.BlockLayout(layout_of(3, 5, 0.4).mask.to(device), 8)
    pairs = [tuple(each.to(device) for each in pair(layout, tokens, tokens)) for tokens in (7, 0, 12)]
    dense = sum(x.T @ dy for x, dy in pairs).reshape(3, 8, 5, 8)
    expected = {
        "exact": dense.square().sum(dim=(1, 3)).sqrt(),
        "l2": sum(blocks_of(x).norm(dim=2).T @ blocks_of(dy).norm(dim=2) for x, dy in pairs),
        "max": sum(blocks_of(x).abs().amax(2).T @ blocks_of(dy).abs().amax(2) for x, dy in pairs),
    }
    for reduce, scores in expected.items():
        found = sparse.absent_scores(pairs, layout, reduce=reduce)
        assert found.shape == (3, 5)
        assert (found[layout.mask] == -math.inf).all()
        torch.testing.assert_close(found[~layout.mask], scores[~layout.mask], rtol=1e-12, atol=0)
        first = sparse.absent_scores([(x.T, dy.T) for x, dy in pairs], layout, features="first", reduce=reduce)
        torch.testing.assert_close(first, found, rtol=1e-12, atol=0)
    assert (expected["l2"] >= expected["exact"]).all()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(7, 3, 0.3)
    pairs = [pair(layout, 6, 1), pair(layout, 4, 2)]
    whole = sparse.absent_scores(pairs, layout, reduce="exact")
    for elements in (1, 2 * 8 * layout.outputs, 3 * 8 * layout.outputs):
        monkeypatch.setattr(sparse.growth, "_CHUNK", elements)
        torch.testing.assert_close(sparse.absent_scores(pairs, layout, reduce="exact"), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_summed_in_float32_at_least(dtype: torch.dtype) -> None:
    layout = layout_of(3, 3, 0.3)
    for reduce in ("l2", "max", "exact"):
        scores = sparse.absent_scores([pair(layout, 5, 1, dtype)], layout, reduce=reduce)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wide = sparse.absent_scores([tuple(each.double() for each in pair(layout, 5, 1, dtype))], layout, reduce=reduce)
        torch.testing.assert_close(scores.double(), wide, rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_the_loss() -> None:
    """The exact score of an absent block is the size of the gradient that it gets once it is there."""
    layout = layout_of(4, 4, 0.5)
    full = sparse.BlockLayout(torch.ones(4, 4, dtype=torch.bool), 8)
    x, _ = pair(layout, 9, 3)
    w = full.from_dense(layout.to_dense(weights(layout, dtype=torch.float64))).requires_grad_()
    y = sparse.matmul(x, w, full)
    y.retain_grad()
    y.sin().sum().backward()  # type: ignore[no-untyped-call]
    assert y.grad is not None
    assert w.grad is not None
    scores = sparse.absent_scores([(x, y.grad)], layout, reduce="exact")
    absent = ~layout.mask
    torch.testing.assert_close(scores[absent], w.grad.flatten(1).norm(dim=1).view(4, 4)[absent], rtol=1e-12, atol=0)


def test_wrong_pairs() -> None:
    layout = layout_of(3, 5, 0.4)
    x, dy = pair(layout, 4, 0)
    with pytest.raises(ValueError, match="reduce must be one of l2, max, exact, got 'mean'"):
        sparse.absent_scores([(x, dy)], layout, reduce="mean")
    with pytest.raises(ValueError, match="features"):
        sparse.absent_scores([(x.T, dy.T)], layout)
    with pytest.raises(ValueError, match="same tokens"):
        sparse.absent_scores([(x, dy[:2])], layout)
    with pytest.raises(ValueError, match="at least one"):
        sparse.absent_scores([], layout)
    with pytest.raises(ValueError, match="one dtype and device in all pairs"):
        sparse.absent_scores([(x, dy), (x.float(), dy.float())], layout)


# Carrying.


@given(layouts, st.integers(0, 99), st.floats(0, 1))
def test_kept_blocks_keep_what_they_have(before: sparse.BlockLayout, seed: int, density: float) -> None:
    after = layout_of(*before.shape, density, seed)
    w = weights(before)
    carried = sparse.carry(w, before, after)
    assert torch.equal(after.to_dense(carried), before.to_dense(w) * after.to_dense(after.zeros() + 1))
    assert torch.equal(sparse.carry(w[:, 0, 0], before, after), carried[:, 0, 0])
    exact = sparse.carry(torch.arange(before.blocks), before, after)
    assert exact.dtype == torch.int64


def test_wrong_layouts_to_carry_between() -> None:
    before, after = layout_of(3, 5, 0.4), layout_of(5, 3, 0.4)
    with pytest.raises(ValueError, match="before and after must have one shape and block"):
        sparse.carry(weights(before), before, after)
    with pytest.raises(ValueError, match="x must have"):
        sparse.carry(weights(before)[1:], before, before)
    with pytest.raises(TypeError, match="after must be a BlockLayout"):
        sparse.carry(weights(before), before, None)  # type: ignore[arg-type]
