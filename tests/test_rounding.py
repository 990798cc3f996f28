"""The modes: their names and numbers, and one predicate each, the same on bools, numpy arrays and tensors."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

import lowprec as lp
from lowprec.rounding import GOES_UP, OVERFLOWS, Rest, Rounding

CASES = [Rest(*flags) for flags in itertools.product((False, True), repeat=6)]


def test_modes_come_in_the_order_that_kernels_know() -> None:
    names = ["nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd", "stochastic"]
    assert [mode.value for mode in Rounding] == names
    assert [mode.number for mode in Rounding] == list(range(7))
    assert lp.Rounding is Rounding


def test_a_mode_is_its_name() -> None:
    for mode in Rounding:
        assert Rounding.of(mode) is Rounding.of(mode.value) is mode
        assert mode == mode.value
        assert pickle.loads(pickle.dumps(mode)) is mode


@pytest.mark.parametrize("bad", ["nearest", "NEAREST_EVEN", "", "rne", 0, None])
def test_an_unknown_mode_lists_the_known_ones(bad: object) -> None:
    with pytest.raises(ValueError, match="rounding must be one of nearest_even, .*, stochastic, got"):
        Rounding.of(bad)  # type: ignore[arg-type]


def test_every_mode_has_its_rules() -> None:
    assert set(GOES_UP) == set(OVERFLOWS) == set(Rounding)


@pytest.mark.parametrize("mode", Rounding)
def test_predicates(mode: Rounding) -> None:
    """The rule of each mode, said once more in plain words."""
    for rest in CASES:
        expected = {
            Rounding.nearest_even: rest.above or (rest.tie and rest.odd),
            Rounding.nearest_away: rest.above or rest.tie,
            Rounding.toward_zero: False,
            Rounding.up: rest.inexact and not rest.negative,
            Rounding.down: rest.inexact and rest.negative,
            Rounding.to_odd: rest.inexact and not rest.odd,
            Rounding.stochastic: rest.carry,
        }[mode]
        assert GOES_UP[mode](rest) is expected


@pytest.mark.parametrize("mode", Rounding)
def test_predicates_are_the_same_on_arrays(mode: Rounding) -> None:
    expected = [GOES_UP[mode](rest) for rest in CASES]
    columns = list(zip(*CASES, strict=True))
    as_numpy = GOES_UP[mode](Rest(*(np.array(column) for column in columns)))
    as_torch = GOES_UP[mode](Rest(*(torch.tensor(column) for column in columns)))
    assert as_numpy.tolist() == as_torch.tolist() == expected
    assert as_torch.dtype == torch.bool
    signs = torch.tensor([False, True])
    assert OVERFLOWS[mode](signs).tolist() == [OVERFLOWS[mode](False), OVERFLOWS[mode](True)]


def test_overflow_is_ieees() -> None:
    """IEEE 754-2019, section 7.4; to_odd never leaves the finite numbers; stochastic goes with the nearest modes."""
    table = {mode.value: (OVERFLOWS[mode](False), OVERFLOWS[mode](True)) for mode in Rounding}
    both, none = (True, True), (False, False)
    assert table == {
        "nearest_even": both,
        "nearest_away": both,
        "toward_zero": none,
        "up": (True, False),
        "down": (False, True),
        "to_odd": none,
        "stochastic": both,
    }
