"""Patterns of blocks: exact budgets, the diagonal, the same everywhere, and the shape that each is named for."""

from __future__ import annotations

import hashlib
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowprec.sparse import patterns
from lowprec.sparse.patterns.draws import Draws

RANDOM = ["watts_strogatz", "watts_strogatz_2d", "barabasi_albert", "balanced_random"]
SHAPES = [(1, 1), (1, 5), (5, 1), (7, 10), (10, 7), (12, 12), (8, 32), (32, 8)]

pytestmark = pytest.mark.usefixtures("one_thread")


def diagonal(n_in: int, n_out: int) -> Tensor:
    """By its definition, block by block."""
    return torch.tensor([[i % n_out == j % n_in for j in range(n_out)] for i in range(n_in)])


def away(mask: Tensor) -> Tensor:
    """How far each block off the diagonal lies from it, round the ring."""
    i, j = torch.nonzero(mask, as_tuple=True)
    n = mask.shape[0]
    return torch.minimum((i - j) % n, (j - i) % n)


sizes = st.integers(1, 24)
densities = st.floats(0, 1)


# Every pattern.


@given(st.sampled_from(RANDOM), sizes, sizes, densities, st.integers(0, 2**70))
def test_budgets_are_exact_and_the_diagonal_is_there(
    name: str, n_in: int, n_out: int, density: float, seed: int
) -> None:
    mask = patterns.build(name, n_in, n_out, density, seed)
    assert mask.dtype == torch.bool
    assert mask.shape == (n_in, n_out)
    assert mask.is_contiguous()
    assert int(mask.sum()) == max(round(density * n_in * n_out), n_in, n_out) == patterns.budget(n_in, n_out, density)
    assert mask[diagonal(n_in, n_out)].all()


@pytest.mark.parametrize("name", RANDOM)
def test_the_seed_decides(name: str) -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    one, same, other = (patterns.build(name, 40, 40, 0.2, seed) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()  # type: ignore[index]


DIGESTS = {
    "watts_strogatz:rewire=0.3": "cfc930e2417c8b01",
    "watts_strogatz_2d:rewire=0.7": "4543e5b9f1037520",
    "barabasi_albert:extra=31": "f7788cd0d9867414",
    "balanced_random": "d27f9b15d177ac42",
}


@pytest.mark.parametrize(("name", "digest"), DIGESTS.items())
def test_masks_are_the_same_on_every_machine(name: str, digest: str) -> None:
    """Saved models and studies name a pattern and a seed: what these mean never changes."""
    found = hashlib.sha256()
    for n_in, n_out in [(48, 48), (30, 48), (48, 30)]:
        found.update(np.packbits(patterns.build(name, n_in, n_out, 0.2, seed=7).numpy()).tobytes())
    assert found.hexdigest()[:16] == digest


# Watts and Strogatz.


@given(sizes, densities)
def test_without_rewiring_a_ring_is_a_band(n: int, density: float) -> None:
    mask = patterns.watts_strogatz(n, n, density, rewire=0.0)
    whole, rest = divmod(int(mask.sum()), n)
    assert int(away(mask).max()) == math.ceil((whole + (rest > 0) - 1) / 2)
    assert set(mask.sum(dim=0).tolist()) <= {whole, whole + 1}


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_outputs_of_a_ring_stand_at_their_diagonal(n_in: int, n_out: int) -> None:
    mask = patterns.watts_strogatz(n_in, n_out, 3 / min(n_in, n_out) if min(n_in, n_out) > 3 else 1.0, rewire=0.0)
    smaller = min(n_in, n_out)
    i, j = torch.nonzero(mask, as_tuple=True)
    apart = (i - j) % smaller
    assert torch.minimum(apart, smaller - apart).max() <= 1


def test_rewiring_moves_exactly_its_share_and_keeps_each_fan_in() -> None:
    before = patterns.watts_strogatz(200, 200, 0.1, rewire=0.0)
    for rewire in (0.25, 0.5, 1.0):
        after = patterns.watts_strogatz(200, 200, 0.1, rewire=rewire, seed=2)
        moved = int((before & ~after).sum())
        chosen = round(rewire * (int(before.sum()) - 200))
        back = chosen * rewire * int(before.sum()) / before.numel()  # of those that moved, some came back by chance
        assert chosen - 1.5 * back - 20 < moved <= chosen
        assert torch.equal(after.sum(dim=0), before.sum(dim=0))


def test_all_rewired_is_random() -> None:
    """Distances from the diagonal are spread evenly: chi-squared over 25 classes, seeds fixed."""
    mask = patterns.watts_strogatz(250, 250, 0.2, rewire=1.0, seed=3)
    counts = torch.bincount((away(mask)[away(mask) > 0] - 1) // 5, minlength=25)[:25].double()
    expected = counts.mean()
    assert float(((counts - expected) ** 2 / expected).sum()) < 60  # 24 degrees of freedom: 1 in 10^4


def test_a_torus_connects_the_nearest_in_both_directions() -> None:
    mask = patterns.watts_strogatz_2d((6, 8), (6, 8), 5 / 48, rewire=0.0)
    for node in range(48):
        y, x = divmod(node, 8)
        near = {(y, x), (y, (x + 1) % 8), (y, (x - 1) % 8), ((y + 1) % 6, x), ((y - 1) % 6, x)}
        assert {divmod(i, 8) for i in torch.nonzero(mask[:, node])[:, 0].tolist()} == near


def test_a_torus_of_one_row_is_the_ring() -> None:
    one = patterns.watts_strogatz_2d((1, 30), (1, 30), 0.2, 0.4, seed=9)
    assert torch.equal(one, patterns.watts_strogatz(30, 30, 0.2, 0.4, seed=9))
    assert torch.equal(one, patterns.build("watts_strogatz_2d:rewire=0.4,columns=30", 30, 30, 0.2, seed=9))


@pytest.mark.parametrize(
    ("n_in", "n_out", "columns"), [(48, 48, 6), (64, 256, 8), (256, 64, 8), (13, 13, 1), (15, 30, 3)]
)
def test_grids_are_as_square_as_they_can_be(n_in: int, n_out: int, columns: int) -> None:
    default = patterns.build("watts_strogatz_2d", n_in, n_out, 0.3, 1)
    assert torch.equal(default, patterns.build(f"watts_strogatz_2d:columns={columns}", n_in, n_out, 0.3, 1))


# Barabási and Albert.


def test_a_few_nodes_have_most_of_the_connections() -> None:
    """The share of nodes with k connections falls as k^-3, not as a bell."""
    n, m = 1000, 5
    mask = patterns.barabasi_albert(n, n, (2 * m * n - m * (m + 1) + n) / n**2, seed=1)
    held = mask.sum(dim=0) - 1
    assert int(held.sum()) == 2 * m * n - m * (m + 1)  # exactly m each
    assert int(held.min()) == m
    random = (
        patterns.balanced_random(n, n, 0.01).sum(dim=0).max(),
        patterns.watts_strogatz(n, n, 0.01, 1.0).sum(1).max(),
    )
    assert int(held.max()) > 4 * int(max(random))
    for k in (10, 20, 40):
        above, law = float((held >= k).double().mean()), m * (m + 1) / (k * (k + 1))  # Bollobás et al. 2001
        assert 0.5 * law < above < 1.6 * law


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_square_masks_are_symmetric_and_full_in_front(density: float) -> None:
    n = 60
    mask = patterns.barabasi_albert(n, n, density)
    assert int((mask ^ mask.T).sum()) == 2 * ((int(mask.sum()) - n) % 2)
    edges = (int(mask.sum()) - n) // 2
    m = max(m for m in range(n) if m * n - m * (m + 1) // 2 <= edges)
    assert mask[: m + 1, : m + 1].sum() >= (m + 1) ** 2 - 1
    assert set(mask.triu(1).sum(dim=0)[m + 1 :].tolist()) <= {m, m + 1, m + 2}


@pytest.mark.parametrize(("n_in", "n_out"), [(100, 400), (400, 100)])
def test_the_larger_side_joins_the_hubs_of_the_smaller(n_in: int, n_out: int) -> None:
    mask = patterns.barabasi_albert(n_in, n_out, 0.05, seed=4)
    held = mask.sum(dim=1 if n_in < n_out else 0).sort(descending=True).values
    assert int(held[0]) > 4 * float(held.double().mean())
    assert int(mask.sum(dim=0 if n_in < n_out else 1).min()) >= 1


@given(sizes, sizes, densities, st.data())
def test_extra_blocks_are_part_of_the_budget(n_in: int, n_out: int, density: float, data: st.DataObject) -> None:
    blocks = patterns.budget(n_in, n_out, density)
    extra = data.draw(st.integers(0, blocks - max(n_in, n_out)))
    mask = patterns.barabasi_albert(n_in, n_out, density, extra, seed=1)
    assert int(mask.sum()) == blocks
    assert mask[diagonal(n_in, n_out)].all()


def test_extra_blocks_go_to_those_that_have_fewest() -> None:
    plain, mixed = (patterns.barabasi_albert(80, 80, 0.1, extra=extra) for extra in (0, 200))
    assert mixed.sum(dim=0).max() < plain.sum(dim=0).max()
    only = patterns.barabasi_albert(80, 80, 0.1, extra=patterns.budget(80, 80, 0.1) - 80)
    assert only.sum(dim=0).max() <= 2 * only.sum(dim=0).min() + 2


# Balanced, grouped, all.


@given(sizes, sizes, densities, st.integers(0, 99))
def test_balance_is_to_within_one(n_in: int, n_out: int, density: float, seed: int) -> None:
    mask = patterns.balanced_random(n_in, n_out, density, seed)
    for dim in (0, 1):
        counts = mask.sum(dim=dim)
        assert int(counts.max()) - int(counts.min()) <= 1


def test_balanced_masks_are_random() -> None:
    """Every block off the diagonal is there as often as every other, over many seeds; nothing of the start is left."""
    often = sum(patterns.balanced_random(12, 12, 0.25, seed).double() for seed in range(400))
    off = often[~torch.eye(12, dtype=torch.bool)] / 400
    deviation = math.sqrt(2 / 11 * 9 / 11 / 400)
    assert float((off - 2 / 11).abs().max()) < 5 * deviation


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_groups_are_closed(n_in: int, n_out: int) -> None:
    smaller = min(n_in, n_out)
    for groups in {1, max(1, smaller // 3), smaller}:
        mask = patterns.block_diagonal(n_in, n_out, groups)
        assert mask[diagonal(n_in, n_out)].all()
        rows = {tuple(row) for row in mask.tolist()}
        assert len(rows) == groups
        assert torch.equal(
            sum(torch.tensor(row, dtype=torch.int64) for row in rows), torch.ones(n_out, dtype=torch.int64)
        )


def test_densities_of_groups() -> None:
    assert torch.equal(patterns.build("block_diagonal", 12, 12, 0.25), patterns.block_diagonal(12, 12, 4))
    assert torch.equal(patterns.build("block_diagonal:groups=3", 12, 24), patterns.block_diagonal(12, 24, 3))
    assert torch.equal(patterns.build("block_diagonal", 12, 12, 0.0), torch.eye(12, dtype=torch.bool))
    assert patterns.dense(3, 4).all()
    assert patterns.build("dense", 3, 4, 1).shape == (3, 4)


# Mixing.


@given(st.sampled_from(RANDOM), st.integers(1, 16), densities, st.integers(0, 6))
def test_mixing_counts_who_is_reached(name: str, n: int, density: float, steps: int) -> None:
    mask = patterns.build(name, n, n, density, 1)
    expected = []
    for step in range(1, steps + 1):
        paths = torch.linalg.matrix_power(mask.to(torch.float64), step)
        expected.append(int((paths > 0).sum()) / n**2)
    assert patterns.mixing(mask, steps) == expected


def test_mixing_of_extremes() -> None:
    assert patterns.mixing(patterns.dense(9, 9), 3) == [1.0, 1.0, 1.0]
    assert patterns.mixing(torch.eye(8, dtype=torch.bool), 3) == [1 / 8] * 3
    assert patterns.mixing(patterns.block_diagonal(12, 12, 4), 4) == [1 / 4] * 4
    band = patterns.watts_strogatz(40, 40, 3 / 40, rewire=0.0)
    assert patterns.mixing(band, 4) == [3 / 40, 5 / 40, 7 / 40, 9 / 40]


def test_mixing_without_a_diagonal_counts_where_a_signal_is() -> None:
    """A ring that only passes on, and a sink from which nothing comes back."""
    ring = torch.roll(torch.eye(5, dtype=torch.bool), 1, dims=1)
    assert patterns.mixing(ring, 3) == [0.2] * 3
    into = torch.tensor([[False, True], [False, False]])
    assert patterns.mixing(into, 3) == [0.25, 0.0, 0.0]
    star = torch.tensor([[True, True], [True, True], [True, True]])
    drain = torch.tensor([[True, False, False], [True, False, False]])
    assert patterns.mixing([star, drain], 4) == [1.0, 1 / 3, 1.0, 1 / 3]


def test_small_worlds_mix_faster_than_lattices() -> None:
    shares = {rewire: patterns.mixing(patterns.watts_strogatz(128, 128, 0.06, rewire), 3) for rewire in (0.0, 0.1, 0.5)}
    assert shares[0.0][2] < shares[0.1][2] < shares[0.5][2]
    assert patterns.mixing(patterns.barabasi_albert(128, 128, 0.06), 2)[1] > shares[0.5][1]


# Names and wrong arguments.


def test_names_pass_their_arguments_on() -> None:
    assert set(patterns.NAMES) == {*RANDOM, "block_diagonal", "dense"}
    ring = patterns.build("watts_strogatz:rewire=0.3", 20, 30, 0.4, seed=2)
    assert torch.equal(ring, patterns.watts_strogatz(20, 30, 0.4, 0.3, 2))
    grown = patterns.build("barabasi_albert:extra=7", 20, 30, 0.4, seed=2)
    assert torch.equal(grown, patterns.barabasi_albert(20, 30, 0.4, 7, 2))


@pytest.mark.parametrize("name", RANDOM)
def test_wrong_sizes_and_densities(name: str) -> None:
    for density in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="density must be from 0 to 1, got"):
            patterns.build(name, 4, 4, density)
    for density in ("0.1", True, 1j, Fraction(1, 2), torch.tensor(0.1)):
        with pytest.raises(TypeError, match="density must be a number from 0 to 1, got"):
            patterns.build(name, 4, 4, density)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="density must be given"):
        patterns.build(name, 4, 4)
    with pytest.raises(ValueError, match="n_in must be at least 1, got 0"):
        patterns.build(name, 0, 4, 0.1)
    with pytest.raises(TypeError, match="n_out must be an int, got 4.0"):
        patterns.build(name, 4, 4.0, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        patterns.build(name, 4, 4, 0.1, seed=-1)
    with pytest.raises(TypeError, match="seed must be an int, got None"):
        patterns.build(name, 4, 4, 0.1, seed=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ring", "unknown pattern 'ring': there are watts_strogatz, "),
        ("watts_strogatz:extra=3", "'extra' must be one of rewire, and stand once"),
        ("watts_strogatz:rewire=0.1,rewire=0.2", "'rewire' must be one of rewire, and stand once"),
        ("watts_strogatz:rewire", "rewire must be a number, got ''"),
        ("watts_strogatz:rewire=1.5", "rewire must be from 0 to 1, got 1.5"),
        ("watts_strogatz_2d:columns=5", "columns must divide 12 inputs and 12 outputs, got 5"),
        ("watts_strogatz_2d:columns=0", "columns must be at least 1, got 0"),
        ("barabasi_albert:extra=half", "extra must be an integer, got 'half'"),
        ("barabasi_albert:extra=61", "extra must be at most 60, the blocks beside the diagonal, got 61"),
        ("barabasi_albert:extra=-1", "extra must be at least 0, got -1"),
        ("balanced_random:m=3", "'m' must be one of no keys"),
        ("block_diagonal:groups=3", "density must be left out beside groups=3, got 0.5"),
        ("dense", "density must be left out, or 1, for the pattern dense, got 0.5"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        patterns.build(name, 12, 12, 0.5)


def test_other_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="pattern must be a string"):
        patterns.build(3, 4, 4, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups must be at most 4, the fewer of 4 inputs and 8 outputs, got 5"):
        patterns.block_diagonal(4, 8, 5)
    with pytest.raises(ValueError, match="shape_in must be a pair of numbers"):
        patterns.watts_strogatz_2d((4,), (4, 4), 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape_in and shape_out must have as many columns"):
        patterns.watts_strogatz_2d((4, 2), (2, 4), 0.1)


def test_wrong_masks_for_mixing() -> None:
    with pytest.raises(ValueError, match="step 2 has 4, step 1 has 6 .a single mask must be square."):
        patterns.mixing(patterns.dense(4, 6), 2)
    assert patterns.mixing(patterns.dense(4, 6), 1) == [1.0]
    with pytest.raises(TypeError, match="mask must be bool tensors, got torch.float32"):
        patterns.mixing(torch.ones(3, 3), 2)
    with pytest.raises(ValueError, match="at least one of each"):
        patterns.mixing(torch.ones(0, 0, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match="got none"):
        patterns.mixing([], 2)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        patterns.mixing(patterns.dense(3, 3), -1)


# Draws.


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_choices_are_candidates_and_so_many(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    candidates = np.random.default_rng(seed).random((rows, columns)) < 0.5
    counts = np.array([data.draw(st.integers(0, int(row.sum()))) for row in candidates])
    chosen = Draws(seed).choose(candidates, counts)
    assert (chosen.sum(axis=1) == counts).all()
    assert not (chosen & ~candidates).any()


def test_draws_are_even() -> None:
    counts = np.bincount(Draws(1).below(10, 100_000), minlength=10)
    assert len(counts) == 10
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 34  # chi-squared, 9 degrees of freedom: 1 in 10^4
    assert sorted(Draws(2).order(50).tolist()) == list(range(50))
