"""Sums and matrix products under an accumulator, in plain torch: any device, nothing compiled, the kernels' bits.

Works on the bit patterns alone, as `eager` does. Outputs, and the groups of a level, go side by side; the terms of a
group one after the other. A term is wide enough for an exact product, a sum of two for its one rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowprec import eager
from lowprec.accumulator import Accumulator, Level, Run
from lowprec.eager import Unpacked, floor_log2, unpack
from lowprec.formats import FloatFormat
from lowprec.rounding import Rounding

_LIMB = 54  # bits of each of a term's two integers: room for two significands of 53
_MASK = (1 << _LIMB) - 1
_HALF = _LIMB // 2
_HALF_MASK = (1 << _HALF) - 1
_NOTHING = -(1 << 13)  # the exponent of zero: far below that of any product
_KEPT = 63  # bits of an exact sum that go on to be rounded, beside a sticky one

_DIGIT = 32  # bits of each integer of a sum in unbounded precision
_DIGIT_MASK = (1 << _DIGIT) - 1
_DIGITS = {torch.float32: (-404, 24), torch.float64: (-2254, 138)}
"""Exponent of the lowest digit and count of digits, for the products of any 2^32 numbers of a dtype."""

_AT_ONCE = 1 << 18  # numbers that are worked on at once, to bound the memory


def accumulate(x: Tensor, accumulator: Accumulator, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """Sums of the rows of x [O, K] -> [O], float64 for float64, else float32."""
    return _outputs(x.unsqueeze(0), None, accumulator, seed, offset).reshape(-1)


def matmul(a: Tensor, b: Tensor, accumulator: Accumulator, seed: Tensor | None, offset: Tensor | None) -> Tensor:
    """The product of [B, M, K] and [B, K, N] of one dtype -> [B, M, N], float64 for float64, else float32."""
    return _outputs(a, b.transpose(1, 2), accumulator, seed, offset)


class _Draws(NamedTuple):
    """What random words depend on, beside the number of a rounding: which output, and how many roundings each has."""

    output: Tensor
    roundings: int
    seed: Tensor | None
    offset: Tensor | None

    def words(self, run: Run, size: int) -> Iterator[Tensor | None]:
        """For each of `size` steps the words of all groups of a level [B, M, N, G]; None if it draws none."""
        level, inputs, first = run
        if level.rounding is not Rounding.stochastic:
            yield from (None for _ in range(size))
            return
        places = torch.arange(first, first + inputs, size, device=self.output.device)
        together = max(_AT_ONCE // (self.output.numel() * places.numel()), 1)  # philox costs as much as a step
        for begin in range(0, size, together):
            steps = torch.arange(begin, min(begin + together, size), device=places.device)
            index = self.output[..., None, None] * self.roundings + (steps.unsqueeze(-1) + places)
            yield from eager.words_at(index, self.seed, self.offset).unbind(-2)


class Places(NamedTuple):
    """Where outputs stand among those of a larger result, which random words go by."""

    outputs: Tensor
    roundings: int


def within(
    a: Tensor,
    b: Tensor | None,
    accumulator: Accumulator,
    places: Places,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    """`matmul` of [B, M, K] and [B, K, N], or sums of the rows of a [B, M, K] -> [B, M, 1], as part of a result.

    Each output draws by its row-major index there, and every one has so many `roundings`.
    """
    return _outputs(a, None if b is None else b.transpose(1, 2), accumulator, seed, offset, places)


def _outputs(
    a: Tensor,
    b: Tensor | None,
    accumulator: Accumulator,
    seed: Tensor | None,
    offset: Tensor | None,
    places: Places | None = None,
) -> Tensor:
    """Products of the rows of a [B, M, K] and of b [B, N, K], or sums of the rows of a, where N is 1."""
    *rows, count = a.shape
    carrier = torch.float64 if a.dtype == torch.float64 else torch.float32
    result = a.new_zeros((*rows, 1 if b is None else b.shape[1]), dtype=carrier)
    if count == 0 or result.numel() == 0:
        return result
    left = _normalise(unpack(a.unsqueeze(2)))
    right = None if b is None else _normalise(unpack(b.unsqueeze(1)))
    if places is None:
        index = torch.arange(result.numel(), device=a.device).reshape(result.shape)
        places = Places(index, accumulator.roundings(count))
    for i, j, k in _tiles(result.shape, _width(accumulator, count, carrier)):
        numbers = Unpacked(*(field[i, j] for field in left))
        others = None if right is None else Unpacked(*(field[i, :, k] for field in right))
        draws = _Draws(places.outputs[i, j, k], places.roundings, seed, offset)
        result[i, j, k] = _tree(_Terms(numbers, others, accumulator.product, carrier), count, accumulator, draws)
    return result


def _width(accumulator: Accumulator, count: int, carrier: torch.dtype) -> int:
    """How many numbers one output of so many terms has side by side."""
    if accumulator.leaf == "exact":
        return count + _DIGITS[carrier][1]
    return -(-count // (accumulator.levels[0].fan_in or count))


def _tiles(shape: torch.Size, width: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of the outputs, each as many as may be worked on at once; at least one."""
    sizes, room = [], max(_AT_ONCE // width, 1)
    for size in reversed(shape):
        sizes.append(min(size, room))
        room = max(room // size, 1)
    columns, rows, batches = (
        [slice(i, i + n) for i in range(0, size, n)] for size, n in zip(reversed(shape), sizes, strict=True)
    )
    yield from ((i, j, k) for i in batches for j in rows for k in columns)


def _tree(terms: _Terms, count: int, accumulator: Accumulator, draws: _Draws) -> Tensor:
    """All levels, from the leaves up, of outputs with `count` terms -> [B, M, N]."""
    if accumulator.leaf == "exact":
        (level,) = accumulator.levels
        total = _exact_sum(terms.take(0, 1), level.rounding is Rounding.down, terms.carrier)
        (word,) = draws.words(Run(level, 1, 0), 1)
        return _round(total, level, word, terms.carrier).squeeze(-1)
    for run in accumulator.runs_of(count):
        sums = _sequential(terms, run, draws)
        terms = _Terms(_normalise(unpack(sums)), None, None, terms.carrier)
    return sums.squeeze(-1)


def _sequential(terms: _Terms, run: Run, draws: _Draws) -> Tensor:
    """One level: the sums of its groups [B, M, N, G]."""
    level, inputs, _ = run
    size = min(level.fan_in or inputs, inputs)
    words = draws.words(run, size)
    sums = _round(_collapse(terms.take(0, size)), level, next(words), terms.carrier)
    for n, word in enumerate(words, 1):
        term = terms.take(n, size)
        groups = term.high.shape[-1]  # the last group may be short
        running = _widen(_normalise(unpack(sums[..., :groups])))
        exact = _add(running, term, level.rounding is Rounding.down)
        word = None if word is None else word[..., :groups]
        sums = torch.cat([_round(exact, level, word, terms.carrier), sums[..., groups:]], -1)
    return sums


def _round(exact: _Exact, level: Level, word: Tensor | None, carrier: torch.dtype) -> Tensor:
    return _values(exact, level.fmt, level.rounding, level.saturate, word, carrier)


def _values(
    exact: _Exact, fmt: FloatFormat, rounding: Rounding, saturate: bool, word: Tensor | None, carrier: torch.dtype
) -> Tensor:
    x, sticky = exact
    rounded = eager.round_code(x, fmt, rounding, saturate, word, 32, sticky)
    return eager.values_of(rounded, x.negative, fmt, carrier).masked_fill(x.nan, torch.nan)


# Terms.


class _Term(NamedTuple):
    """Numbers (high · 2^54 + low) · 2^exponent in magnitude, below 2^108 and from 2^106 on; zeros as 0 · 2^_NOTHING.

    All int64 or bool [B, M, N, G]; those that broadcast may lack sizes.
    """

    negative: Tensor
    high: Tensor
    low: Tensor
    exponent: Tensor
    infinite: Tensor
    nan: Tensor


class _Terms(NamedTuple):
    """What a level adds up: numbers [B, M, N, K], or their products with others, rounded to `product` if given."""

    numbers: Unpacked
    others: Unpacked | None
    product: FloatFormat | None
    carrier: torch.dtype

    def take(self, first: int, step: int) -> _Term:
        """Terms first, first + step, ...: of every group of `step` the one at `first`."""
        numbers = Unpacked(*(field[..., first::step] for field in self.numbers))
        if self.others is None:
            return _widen(numbers)
        term = _multiply(numbers, Unpacked(*(field[..., first::step] for field in self.others)))
        if self.product is None:
            return term
        values = _values(_collapse(term), self.product, Rounding.nearest_even, True, None, self.carrier)
        return _widen(_normalise(unpack(values)))


def _normalise(parts: Unpacked) -> Unpacked:
    """The same numbers with the leading bit of the significand at 53."""
    zero = parts.significand == 0
    shift = torch.where(zero, 0, _LIMB - 1 - floor_log2(parts.significand))
    exponent = torch.where(zero, _NOTHING, parts.exponent - shift)
    return parts._replace(significand=parts.significand << shift, exponent=exponent)


def _widen(x: Unpacked) -> _Term:
    """Normalised numbers as terms."""
    zero = torch.zeros_like(x.significand)
    return _Term(x.negative, x.significand, zero, x.exponent - _LIMB, x.infinite, x.nan)


def _multiply(a: Unpacked, b: Unpacked) -> _Term:
    """The exact products of normalised numbers, by halves of their significands."""
    (a1, a0), (b1, b0) = ((x.significand >> _HALF, x.significand & _HALF_MASK) for x in (a, b))
    cross = a1 * b0 + a0 * b1
    low = a0 * b0 + ((cross & _HALF_MASK) << _HALF)
    high = a1 * b1 + (cross >> _HALF) + (low >> _LIMB)
    a_zero, b_zero = a.significand == 0, b.significand == 0
    nan = a.nan | b.nan | (a.infinite & b_zero) | (a_zero & b.infinite)
    return _Term(a.negative ^ b.negative, high, low & _MASK, a.exponent + b.exponent, a.infinite | b.infinite, nan)


# Sums, exact but for a sticky bit.


class _Exact(NamedTuple):
    """Numbers, and where their magnitudes lie above what the significands say, by less than one unit of these."""

    numbers: Unpacked
    sticky: Tensor


def _add(s: _Term, t: _Term, down: bool) -> _Exact:
    """The sum; `down`: the sign of a zero that is no sum of zeros of one sign.

    Bits of the smaller one are lost only if it lies so far below that the sum keeps more than are rounded.
    """
    exponent = torch.maximum(s.exponent, t.exponent)
    s_high, s_low, s_lost = _shift_right(s, exponent - s.exponent)
    t_high, t_low, t_lost = _shift_right(t, exponent - t.exponent)
    opposite = s.negative ^ t.negative
    sign = 1 - 2 * opposite.to(torch.int64)
    low = s_low + sign * t_low
    high = s_high + sign * t_high + (low >> _LIMB)
    flip = high < 0
    lost = s_lost | t_lost  # and only of the smaller one: never of both
    low = torch.where(flip, -(low & _MASK), low & _MASK) - (lost & opposite).to(torch.int64)
    high = torch.where(flip, -high, high) + (low >> _LIMB)
    low = low & _MASK
    zero = (high | low) == 0
    negative = torch.where(zero & opposite, torch.full_like(zero, down), s.negative ^ flip)
    infinite = s.infinite | t.infinite
    negative = torch.where(infinite, torch.where(s.infinite, s.negative, t.negative), negative)
    nan = s.nan | t.nan | (s.infinite & t.infinite & opposite)
    return _collapse(_Term(negative, high, low, exponent, infinite, nan), lost)


def _shift_right(x: _Term, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes shifted right, as high and low, and whether any bit was lost."""
    far = by >= _LIMB
    high, low = torch.where(far, 0, x.high), torch.where(far, x.high, x.low)
    near = torch.where(far, by - _LIMB, by).clamp(max=_LIMB)
    below = (torch.ones_like(near) << near) - 1
    lost = ((low & below) != 0) | (far & (x.low != 0))
    return high >> near, (low >> near) | ((high << (_LIMB - near)) & _MASK), lost


def _collapse(x: _Term, sticky: Tensor | None = None) -> _Exact:
    """The first bits of magnitudes, to be rounded; the others, and what `sticky` says lies below them, as sticky."""
    leading = torch.where(x.high > 0, floor_log2(x.high) + _LIMB, floor_log2(x.low))
    by = (leading - (_KEPT - 1)).clamp(min=0)
    significand = (x.high << (_LIMB - by)) | (x.low >> by)
    rest = (x.low & ((torch.ones_like(by) << by) - 1)) != 0
    numbers = Unpacked(x.negative, significand, x.exponent + by, x.infinite, x.nan)
    return _Exact(numbers, rest if sticky is None else rest | sticky)


# Sums in unbounded precision.


def _exact_sum(terms: _Term, down: bool, carrier: torch.dtype) -> _Exact:
    """The sums of all terms [B, M, N, K] -> [B, M, N, 1]."""
    digits, negative = _carry(_deposit(terms, carrier))
    high, low, exponent, sticky = _leading_digits(digits, _DIGITS[carrier][0])
    minus = terms.negative
    positive_zeros = ~minus & ((terms.high | terms.low) == 0)
    zero_sign = ~_all(positive_zeros) if down else _all(minus)
    negative = torch.where((high | low) == 0, zero_sign, negative)
    rise, fall = _any(terms.infinite & ~minus), _any(terms.infinite & minus)
    negative = torch.where(rise | fall, fall, negative)
    nan = _any(terms.nan) | (rise & fall)
    return _collapse(_Term(negative, high, low, exponent, rise | fall, nan), sticky)


def _all(x: Tensor) -> Tensor:
    return x.all(-1, keepdim=True)


def _any(x: Tensor) -> Tensor:
    return x.any(-1, keepdim=True)


def _deposit(terms: _Term, carrier: torch.dtype) -> Tensor:
    """The sums of the finite terms as digits [B, M, N, D], the lowest first, each with a sign and not yet carried."""
    base, count = _DIGITS[carrier]
    digits = terms.high.new_zeros((*terms.high.shape[:-1], count))
    sign = torch.where(terms.infinite | terms.nan, 0, 1 - 2 * terms.negative.to(torch.int64))
    halves = (terms.low & _HALF_MASK, terms.low >> _HALF, terms.high & _HALF_MASK, terms.high >> _HALF)
    for n, half in enumerate(halves):
        place = (terms.exponent - base + n * _HALF).clamp(min=0)
        at, piece = place // _DIGIT, half << (place % _DIGIT)
        digits.scatter_add_(-1, at, (piece & _DIGIT_MASK) * sign)
        digits.scatter_add_(-1, at + 1, (piece >> _DIGIT) * sign)
    return digits


def _carry(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes as digits from 0 to 2^32 - 1, and whether they are negative [..., 1]."""
    carry, carried = torch.zeros_like(digits[..., 0]), []
    for digit in digits.unbind(-1):
        carried.append((digit + carry) & _DIGIT_MASK)
        carry = (digit + carry) >> _DIGIT
    negative, magnitude = carry < 0, []
    carry = negative.to(torch.int64)
    for digit in carried:  # of a negative number the two's complement
        digit = torch.where(negative, _DIGIT_MASK - digit, digit) + carry
        magnitude.append(digit & _DIGIT_MASK)
        carry = digit >> _DIGIT
    return torch.stack(magnitude, -1), negative.unsqueeze(-1)


def _leading_digits(digits: Tensor, base: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """High, low and exponent of the first three digits that count, and whether any below is not zero: [..., 1]."""
    places = torch.arange(digits.shape[-1], device=digits.device)
    last = torch.where(digits != 0, places, 0).amax(-1, keepdim=True).clamp(min=2) - 2
    third, second, first = (digits.gather(-1, last + n) for n in range(3))
    high, low = (first << 10) | (second >> 22), ((second & ((1 << 22) - 1)) << _DIGIT) | third
    return high, low, base + _DIGIT * last, _any((digits != 0) & (places < last))
