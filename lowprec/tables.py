"""Formats in the terminal: what there is, what each one holds, and where its values lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction

from rich import box
from rich.table import Table
from rich.text import Text

from lowprec import reference
from lowprec.formats import BLOCK_NAMES, NAMES, Block, BlockFormat, FloatFormat
from lowprec.formats import float_format as lookup

NORMAL, SUBNORMAL, SPECIAL, FAINT = "bright_blue", "dark_orange", "magenta", "bright_black"
_COLOURS = {"normal": NORMAL, "subnormal": SUBNORMAL, "infinity": SPECIAL, "NaN": SPECIAL, "zero": "default"}

SLIDES = ("1-5-2", "1-4-3", "1-3-4", "1-5-2:emax=1", "1-4-3:emax=9")
"""The formats of the 2017 slides, under the strings that users type."""

P3109 = (
    "IEEE P3109: p3109_k<K>p<P> for K = 3..16 bits and precision P, with the suffix f for the finite domain; "
    "--all lists them."
)
OTHERS = "Any 1-e-m[:key=value,...] is a format too, with the keys bias, emax, specials and subnormals (on or off)."


# Numbers as text.


def product(x: float) -> str:
    """A finite number, not negative, exactly: significand times a power of two, `1.75·2^8`; or `2^-6`, or `1.5`."""
    if x == 0:
        return "0"
    fraction, exponent = math.frexp(x)
    significand, power = _exact(2 * fraction), f"2^{exponent - 1}"
    if exponent == 1:
        return significand
    return power if significand == "1" else f"{significand}·{power}"


def _exact(x: float) -> str:
    """A significand in decimal; every digit of it up to 24 bits."""
    return f"{x:.23f}".rstrip("0").rstrip(".")


def decimal(x: float) -> str:
    """A number in decimal, seven digits at most, marked where they are not all."""
    text = f"{x:.7g}"
    return text if Fraction(text) == Fraction(x) else f"≈ {text}"


def special_codes(fmt: FloatFormat) -> str:
    """The codes that are no finite number, counted: `±∞, 6 NaN`."""
    nans = _nan_codes(fmt)
    return ", ".join(["±∞"] * fmt.has_inf + [f"{nans} NaN"] * (nans > 0)) or "none"


def _nan_codes(fmt: FloatFormat) -> int:
    return {"finite": 0, "ieee": 2 * fmt.mantissa_mask, "fn": 2, "fnuz": 1, "p3109": 1}[fmt.specials]


def finite_values(fmt: FloatFormat) -> int:
    """How many different finite values a format has; zero is one."""
    positive = fmt.max_code if fmt.subnormals else fmt.max_code - fmt.mantissa_mask
    return 2 * positive + 1


# The list of all formats.


def groups(everything: bool = False) -> Iterator[tuple[str, Mapping[str, FloatFormat]]]:
    """Named formats under the headings that they are listed by; those of P3109 only if `everything`."""
    plain = {name: fmt for name, fmt in NAMES.items() if not name.startswith("p3109")}
    yield "8 bits", {name: fmt for name, fmt in plain.items() if fmt.bits == 8}
    yield "6 and 4 bits", {name: fmt for name, fmt in plain.items() if fmt.bits < 8}
    yield "16 and more", {name: fmt for name, fmt in plain.items() if fmt.bits > 8}
    yield "2017 slides", {spec: lookup(spec) for spec in SLIDES}
    if everything:
        yield "IEEE P3109", {name: fmt for name, fmt in NAMES.items() if name.startswith("p3109")}


def listing(width: int, everything: bool = False) -> Table:
    """The named formats in one table that fits `width` columns."""
    table = Table(box=None, padding=(0, 1 if width < 100 else 2, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("string form", style=FAINT, no_wrap=True)
    for header in ("bits", "bias", "emax", "max", "min\nnormal", "min\nsubnormal"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("specials", no_wrap=True)
    for heading, formats in groups(everything):
        table.add_row()
        table.add_row(Text(heading, style="bold"))
        for name, fmt in formats.items():
            table.add_row(name, *_summary(fmt, narrow=width < 100))
    return table


def _summary(fmt: FloatFormat, narrow: bool) -> tuple[str, ...]:
    form = str(fmt).replace(":", ":\n").replace(",", ",\n") if narrow else str(fmt)
    ends = (
        f"{fmt.max:.{3 if narrow and fmt.max >= 1e6 else 6}g}",
        *("–" if end is None else product(end) for end in (fmt.min_normal, fmt.min_subnormal)),
    )
    return form, str(fmt.bits), str(fmt.bias), str(fmt.emax), *ends, fmt.specials


# Block formats.

BFP = (
    "bfp<bits>/<block> is classical block floating point, block[<element>]/<block> has any element; "
    "a block is n, <rows>x<columns> or tensor."
)


def blocks() -> Table:
    """The named block formats."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True)
    for header in ("element", "block", "scale", "bits an element"):
        table.add_column(header, no_wrap=True)
    table.add_row()
    table.add_row(Text("Blocks that share a scale", style="bold"))
    for name, fmt in BLOCK_NAMES.items():
        table.add_row(name, name_of(fmt.element), _shape(fmt.block), name_of(fmt.scale), f"{_bits_each(fmt):g}")
    return table


def name_of(fmt: FloatFormat | str) -> str:
    """The name of a float format, or its string where it has none."""
    return next((name for name, named in NAMES.items() if named == fmt), str(fmt))


def _bits_each(fmt: BlockFormat) -> float:
    """Bits that an element takes, its share of a full block's scale included."""
    if isinstance(fmt.block, str):
        return fmt.bits
    return fmt.bits + 8 / math.prod(_sizes(fmt.block))


def block_properties(name: str, fmt: BlockFormat) -> Table:
    """What follows from a block format's definition, its elements apart."""
    table = _properties_table()
    for row in _block_properties(name, fmt):
        table.add_row(*row)
    return table


def _block_properties(name: str, fmt: BlockFormat) -> Iterator[tuple[str, str]]:
    if name != str(fmt):
        yield "string form", str(fmt)
    yield "block", "the whole tensor" if fmt.block == "tensor" else f"{_shape(fmt.block)} elements"
    yield "bits an element", f"{_bits_each(fmt):g}: {fmt.bits}, and its share of an 8-bit scale"
    if fmt.scale == "e8m0":
        yield "scale", "e8m0: a power of two, 2^-127 .. 2^127"
        yield "its exponent", _RULES[fmt.rule]
    else:
        by = f"({fmt.element.max:g} · tensor scale)" if fmt.tensor_scale else f"{fmt.element.max:g}"
        yield "scale", f"{name_of(fmt.scale)}: amax / {by}, rounded to nearest even"
    if fmt.tensor_scale and isinstance(fmt.scale, FloatFormat):
        yield "tensor scale", f"float32: the tensor's amax / ({fmt.element.max:g} · {fmt.scale.max:g})"
    yield "element codes", "two's complement" if fmt.twos_complement else "sign and magnitude"


_RULES = {
    "floor": "floor: floor(log2 amax) - emax of the element; the largest elements may saturate",
    "ceil": "ceil: the least k with amax <= max of the element · 2^k; nothing saturates",
    "nearest": "nearest: as floor, of amax rounded to the element's significant bits",
}


def _shape(block: Block) -> str:
    return block if isinstance(block, str) else "x".join(map(str, _sizes(block)))


def _sizes(block: int | tuple[int, int]) -> tuple[int, ...]:
    return block if isinstance(block, tuple) else (block,)


# One format.


def properties(name: str, fmt: FloatFormat) -> Table:
    """What follows from a format's definition."""
    table = _properties_table()
    for row in _properties(name, fmt):
        table.add_row(*row)
    return table


def _properties_table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style=FAINT, no_wrap=True)
    table.add_column()
    return table


def _properties(name: str, fmt: FloatFormat) -> Iterator[tuple[str, str]]:
    also = [other for other, same in NAMES.items() if same == fmt and other != name]
    yield "string form", str(fmt)
    if also:
        yield "also named", ", ".join(also)
    yield "bits", f"{fmt.bits}: 1 sign, {fmt.ebits} exponent, {fmt.mbits} mantissa"
    yield "bias, emin, emax", f"{fmt.bias}, {fmt.emin}, {fmt.emax}"
    for label, value in (("max", fmt.max), ("min normal", fmt.min_normal), ("min subnormal", fmt.min_subnormal)):
        texts = [] if value is None else dict.fromkeys((decimal(value), product(value)))
        yield label, " = ".join(texts) or "none"
    zero = "+0 and -0 counted once" if fmt.has_negative_zero else "one zero"
    yield "finite values", f"{finite_values(fmt):,}, {zero}"
    yield "specials", f"{fmt.specials}: {special_codes(fmt)}"


def kind(fmt: FloatFormat, code: int) -> str:
    """What a code stands for: normal, subnormal, zero, infinity or NaN."""
    value = reference.decode(code, fmt)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinity"
    if value == 0:
        return "zero"
    return "normal" if (code & (fmt.sign_code - 1)) >> fmt.mbits else "subnormal"


def codes(fmt: FloatFormat) -> Table:
    """Every code of a format up to 8 bits: each row a magnitude, with the codes of both signs."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for header in ("s = 0", "s = 1", "binary"):
        table.add_column(header, no_wrap=True)
    for header in ("value", "decimal"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for magnitude in range(fmt.sign_code):
        if magnitude and fmt.mbits > 1 and not magnitude & fmt.mantissa_mask:
            table.add_section()
        for row in _code_rows(fmt, magnitude):
            table.add_row(*row, style=_COLOURS[row[-1]])
    return table


def _code_rows(fmt: FloatFormat, magnitude: int) -> Iterator[tuple[str, ...]]:
    """One row for both signs of a magnitude; two where they mean different things."""
    positive, negative = magnitude, magnitude | fmt.sign_code
    names = [f"0x{code:02x}" for code in (positive, negative)]
    if kind(fmt, positive) == kind(fmt, negative):
        yield *names, _fields(fmt, magnitude, "s"), *_value(fmt, positive, "±"), kind(fmt, positive)
    else:
        yield names[0], "", _fields(fmt, magnitude, "0"), *_value(fmt, positive, "+"), kind(fmt, positive)
        yield "", names[1], _fields(fmt, magnitude, "1"), *_value(fmt, negative, "-"), kind(fmt, negative)


def _fields(fmt: FloatFormat, magnitude: int, sign: str) -> str:
    """The bits of a code, its fields apart."""
    digits = f"{magnitude:0{fmt.bits - 1}b}"
    return " ".join(filter(None, [sign, digits[: fmt.ebits], digits[fmt.ebits :]]))


def _value(fmt: FloatFormat, code: int, sign: str) -> tuple[str, str]:
    value = abs(reference.decode(code, fmt))
    if math.isnan(value):
        return "NaN", ""
    if math.isinf(value):
        return f"{sign}∞", ""
    if value == 0:
        signed = sign == "±" and fmt.has_negative_zero
        return f"{sign if signed else ''}0", ""
    return f"{sign}{product(value)}", decimal(value)


def binades(fmt: FloatFormat, everything: bool = False) -> Table:
    """A format too large to list, summed up by binade; the middle ones are left out unless `everything`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for header in ("from", "below", "values", "spacing", "codes (s = 0)"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    rows = list(_binades(fmt))
    hidden = 0 if everything or len(rows) <= 20 else len(rows) - 16
    for row in rows[:8] if hidden else rows:
        table.add_row(*row, style=_COLOURS[row[-1]])
    if hidden:
        table.add_row("...", "...", style=FAINT)
        table.add_row(Text(f"{hidden} binades more", FAINT))
        for row in rows[-8:]:
            table.add_row(*row, style=_COLOURS[row[-1]])
    return table


def _binades(fmt: FloatFormat) -> Iterator[tuple[str, ...]]:
    """From the smallest values to the largest: ends, count, spacing, codes and kind."""
    size = 1 << fmt.mbits
    for start in range(0, fmt.max_code + 1, size):
        first, last = max(start, 1), min(start + size - 1, fmt.max_code)
        exponent = max(start >> fmt.mbits, 1)
        if start or (fmt.subnormals and fmt.mbits):
            yield (
                product(fmt.magnitude(first)),
                product(math.ldexp(1.0, exponent - fmt.bias + (start > 0))),
                f"{last - first + 1:,}",
                product(math.ldexp(1.0, exponent - fmt.bias - fmt.mbits)),
                f"{_hex(fmt, first)} .. {_hex(fmt, last)}",
                "normal" if start else "subnormal",
            )


def _hex(fmt: FloatFormat, code: int) -> str:
    return f"0x{code:0{(fmt.bits + 3) // 4}x}"
