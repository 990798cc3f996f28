"""Measured biases: when one is measured, and what the measurement makes of its state. On tensors, nothing compiled.

A cast with a bias that is measured keeps an int64 vector of `HEADER` numbers and its history. Everything happens on
the device that holds it, without a word to the host. The kernels in cuda/include/lowprec/adapt.h follow the same steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.eager import floor_log2, unpack
from lowprec.eager_statistics import sums

BIASES = ("static", "dynamic", "delayed", "sampled")
"""Kinds of bias management, in the order that kernels know them by."""

CALLS, SHIFT, SEED = range(3)
"""Places in a state: calls so far; how far the bias lies below the format's own; the seed of stochastic rounding."""

HEADER = 5
"""Numbers before the history. The two after the seed are the kernels' own, and zero between calls."""

NOTHING = -4096
"""In the place of an exponent: nothing was measured. Below the exponent of every number of float64."""


def is_due(call: int, frequency: int) -> bool:
    """Whether a sampled bias is measured at a call, counted from 1.

    The calls are 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, ...: from 16 on four to a power of two, until
    they are `frequency` apart.

    Source: docs/numerics.md, section 4; the 2017 quantization of openai/blocksparse.
    """
    doublings = call.bit_length() - 3 if call >= 16 else (call >= 6) + (call >= 12)
    return call % min(1 << doublings, frequency) == 0


def _is_due(call: Tensor, frequency: int) -> Tensor:
    """The same on the device."""
    few = (call >= 6).to(torch.int64) + (call >= 12).to(torch.int64)
    doublings = torch.where(call >= 16, floor_log2(call) - 2, few)
    return call % (torch.ones_like(call) << doublings).clamp(max=frequency) == 0


def new_state(seeds: list[int], history: int) -> Tensor:
    """States of casts that have not run, int64 of shape [seeds, HEADER + history]."""
    states = torch.zeros(len(seeds), HEADER + history, dtype=torch.int64, device="cpu")
    states[:, SEED] = torch.tensor(seeds, dtype=torch.int64, device="cpu")
    states[:, HEADER:] = NOTHING
    return states


def adapt(
    x: Tensor, state: Tensor, kind: int, emax: int, pad: int, stdv: float | None, frequency: int, history: int
) -> Tensor:
    """Count a call of a cast, measure x if that is due, and say what the call is to use.

    Args:
        x: what is about to be rounded.
        state: int64 of at least HEADER + history numbers, on x's device; changed in place.
        kind: place of the kind of bias in `BIASES`.
        emax: exponent of the largest finite value under the format's own bias.
        pad: as of `lowprec.Cast`.
        stdv: likewise.
        frequency: likewise.
        history: how many exponents the state remembers.

    Returns:
        int64 [3]: calls before this one, shift, seed.
    """
    used = state[:3].clone()
    state[CALLS] += 1
    if not kind or x.numel() == 0:
        return used
    due = _is_due(state[CALLS], frequency) if BIASES[kind] == "sampled" else torch.ones_like(state[CALLS]) > 0
    own = exponent_of(x, stdv)
    known = due & (own != NOTHING)
    past = state[HEADER : HEADER + history]
    before = past.max() if BIASES[kind] == "delayed" else torch.full_like(own, NOTHING)
    shift = torch.where(before == NOTHING, own, before) + (pad - emax)
    state[SHIFT] = torch.where(known, shift, state[SHIFT])
    if BIASES[kind] == "delayed":
        past.copy_(torch.where(known, torch.cat([own.reshape(1), past[:-1]]), past))
    used[SHIFT] = state[SHIFT]
    return used


def exponent_of(x: Tensor, stdv: float | None = None) -> Tensor:
    """floor(log2 M) of a tensor that has elements, `NOTHING` if none is finite and nonzero: int64, 0-dim.

    M is the largest magnitude or, with stdv, mean |x| + stdv · sqrt(E[x²] - E[|x|]²), over the finite elements.
    """
    if stdv is None:
        return _largest_exponent(x)
    count, _, absolute, squares = sums(x).unbind()
    mean = absolute / count
    deviation = (squares / count - mean * mean).clamp(min=0).sqrt()
    m = mean + stdv * deviation
    # Where sums overflow, or all that there is counts as zero in them, the largest magnitude serves.
    usable = m.isfinite() & (m > 0)
    return torch.where(usable, _largest_exponent(m), _largest_exponent(x))


def _largest_exponent(x: Tensor) -> Tensor:
    parts = unpack(x)
    counted = (parts.significand != 0) & ~parts.infinite & ~parts.nan
    return torch.where(counted, floor_log2(parts.significand) + parts.exponent, NOTHING).max()
