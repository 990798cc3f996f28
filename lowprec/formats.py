"""Number formats: what a code means. Plain data, no torch.

A format is `1-e-m` (sign, exponent bits, mantissa bits) with an integer bias, a policy for special values and a
switch for subnormals. Everything else is derived. To add a named format, add one entry to `NAMES`. A block format is
such a format for the elements, a block shape and a scale that each block shares; its names are in `BLOCK_NAMES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, overload

import numpy as np

SPECIALS = ("finite", "ieee", "fn", "fnuz", "p3109")
"""Kinds of special values, in the order that kernels know them by (docs/numerics.md, section 1)."""

_NO_NEGATIVE_ZERO = ("fnuz", "p3109")


def require_int(name: str, value: object) -> None:
    """TypeError unless an argument is an int, which a bool is not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


@dataclass(frozen=True, init=False, repr=False)
class FloatFormat:
    """A `1-e-m` floating-point format: frozen, hashable, picklable, equal by value.

    A code is sign, exponent field E, mantissa field M, from the top bit down. Its value is
    (-1)^s · (1 + M/2^m) · 2^(E - bias) for E > 0 and (-1)^s · M · 2^(1 - bias - m) for E = 0, or ±0 there when
    `subnormals` is off. With no exponent bits every code is of the second kind: sign-magnitude fixed point.

    Args:
        ebits: exponent bits e, at least 0.
        mbits: mantissa bits m, at least 0.
        bias: exponent bias; default 2^(e-1) - 1 (`fnuz`, `p3109`: 2^(e-1); 0 when e = 0).
        emax: the exponent of the largest finite value, the other way to give the bias; not both.
        specials: "finite" (every code is a number), "ieee" (E all ones: infinities and NaNs), "fn" (E and M all ones:
            NaN), "fnuz" (the code of -0: NaN, no infinity, no -0) or "p3109" (as fnuz, and the largest magnitude
            codes are infinities).
        subnormals: whether E = 0 holds numbers other than zero.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for more than 32 bits; 1-0-0; e = 0 with `ieee` or with subnormals off; `ieee` with m = 0; a
            format without a finite nonzero value; a value that float64 cannot hold; both bias and emax.

    Source: IEEE 754; OCP 8-bit floating point specification 1.0; IEEE P3109 interim report; the 2017 slides "Small
    World Network Architectures" for the notation and for `finite`.
    """

    ebits: int
    mbits: int
    bias: int
    specials: str
    subnormals: bool
    _text: str = field(compare=False)

    def __init__(
        self,
        ebits: int,
        mbits: int,
        *,
        bias: int | None = None,
        emax: int | None = None,
        specials: str = "finite",
        subnormals: bool = True,
    ) -> None:
        require_int("ebits", ebits)
        require_int("mbits", mbits)
        if specials not in SPECIALS:
            raise ValueError(f"specials must be one of {', '.join(SPECIALS)}, got {specials!r}")
        if not isinstance(subnormals, bool):
            raise TypeError(f"subnormals must be a bool, got {subnormals!r}")
        if bias is not None and emax is not None:
            raise ValueError("give bias or emax, not both: each determines the other")
        _check_split(ebits, mbits, specials, subnormals)
        for name, value in (("ebits", ebits), ("mbits", mbits), ("specials", specials), ("subnormals", subnormals)):
            object.__setattr__(self, name, value)
        if emax is not None:
            require_int("emax", emax)
            bias = self._exponent(self.max_code, 0) - emax
        elif bias is None:
            bias = _default_bias(ebits, specials)
        require_int("bias", bias)
        object.__setattr__(self, "bias", bias)
        self._check_float64()
        object.__setattr__(self, "_text", self._describe())

    def _check_float64(self) -> None:
        low = self.emin - self.mbits
        if low < -1074 or self.emax > 1023:
            raise ValueError(
                f"bias {self.bias} puts values of 1-{self.ebits}-{self.mbits} between 2^{low} and 2^{self.emax + 1}: "
                "float64 cannot hold them (2^-1074 to 2^1024)"
            )

    def _exponent(self, code: int, bias: int) -> int:
        """floor(log2) of the value of a nonzero magnitude code under a bias."""
        exponent, mantissa = code >> self.mbits, code & self.mantissa_mask
        return exponent - bias if exponent else mantissa.bit_length() - self.mbits - bias

    # Derived quantities. A magnitude code is a code without its sign; value grows with it.

    @property
    def bits(self) -> int:
        """Width of a code in bits, sign included."""
        return 1 + self.ebits + self.mbits

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value; also of the spacing below it, times 2^m."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite value: floor(log2(max))."""
        return self._exponent(self.max_code, self.bias)

    @property
    def mantissa_mask(self) -> int:
        return (1 << self.mbits) - 1

    @property
    def top_code(self) -> int:
        """The largest magnitude code, finite or not."""
        return (1 << (self.ebits + self.mbits)) - 1

    @property
    def max_code(self) -> int:
        """The magnitude code of the largest finite value."""
        return _max_code(self.ebits, self.mbits, self.specials)

    @property
    def sign_code(self) -> int:
        """The code with only the sign bit set: -0, or NaN in `fnuz` and `p3109`."""
        return 1 << (self.bits - 1)

    @property
    def has_inf(self) -> bool:
        return self.specials in ("ieee", "p3109")

    @property
    def has_nan(self) -> bool:
        return self.specials != "finite"

    @property
    def has_negative_zero(self) -> bool:
        return self.specials not in _NO_NEGATIVE_ZERO

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.magnitude(self.max_code)

    @property
    def min_normal(self) -> float | None:
        """The smallest value with E > 0; None where no finite code has E > 0."""
        code = 1 << self.mbits
        return self.magnitude(code) if self.ebits and code <= self.max_code else None

    @property
    def min_subnormal(self) -> float | None:
        """The smallest nonzero value with E = 0; None without subnormals or when m = 0."""
        return self.magnitude(1) if self.subnormals and self.mbits else None

    def magnitude(self, code: int) -> float:
        """The value of a finite magnitude code, exactly, as a float64."""
        exponent, mantissa = code >> self.mbits, code & self.mantissa_mask
        if not exponent and not self.subnormals:
            return 0.0
        significand = mantissa + (1 << self.mbits if exponent else 0)
        return float(np.ldexp(float(significand), max(exponent, 1) - self.bias - self.mbits))

    def values(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Every finite value once, ascending, as float64: shape (count,). For formats up to 16 bits."""
        if self.bits > 16:
            raise ValueError(f"values() lists formats up to 16 bits; {self} has {self.bits}")
        positive = self._magnitudes
        return np.concatenate([-positive[:0:-1], positive])

    @cached_property
    def _magnitudes(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        codes = np.arange(self.max_code + 1)
        exponent, mantissa = codes >> self.mbits, codes & self.mantissa_mask
        significand = (mantissa + ((exponent > 0) << self.mbits)).astype(np.float64)
        values = np.ldexp(significand, np.maximum(exponent, 1) - self.bias - self.mbits)
        return values if self.subnormals else np.concatenate([[0.0], values[exponent > 0]])

    def with_bias(self, bias: int) -> FloatFormat:
        """The same format with another exponent bias."""
        return FloatFormat(self.ebits, self.mbits, bias=bias, specials=self.specials, subnormals=self.subnormals)

    def with_emax(self, emax: int) -> FloatFormat:
        """The same format with the exponent of its largest finite value at `emax`."""
        return FloatFormat(self.ebits, self.mbits, emax=emax, specials=self.specials, subnormals=self.subnormals)

    @property
    def fields(self) -> list[int]:
        """The five integers that determine the format, as the kernels take them."""
        return [self.ebits, self.mbits, self.bias, SPECIALS.index(self.specials), int(self.subnormals)]

    def __str__(self) -> str:
        return self._text

    def _describe(self) -> str:
        options = []
        if self.bias != _default_bias(self.ebits, self.specials):
            options.append(f"bias={self.bias}")
        if self.specials != "finite":
            options.append(f"specials={self.specials}")
        if not self.subnormals:
            options.append("subnormals=off")
        return f"1-{self.ebits}-{self.mbits}" + (":" + ",".join(options) if options else "")

    def __repr__(self) -> str:
        return f"lowprec.format('{self}')"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("ebits", "mbits", "bias", "specials", "subnormals", "_text")}


def _default_bias(ebits: int, specials: str) -> int:
    if ebits == 0:
        return 0
    return (1 << (ebits - 1)) - (0 if specials in _NO_NEGATIVE_ZERO else 1)


def _max_code(ebits: int, mbits: int, specials: str) -> int:
    top = (1 << (ebits + mbits)) - 1
    return {"finite": top, "fnuz": top, "fn": top - 1, "p3109": top - 1, "ieee": top - (1 << mbits)}[specials]


def _check_split(ebits: int, mbits: int, specials: str, subnormals: bool) -> None:
    """Refuse the combinations of bits and specials that are no format."""
    name = f"1-{ebits}-{mbits}"
    if ebits < 0 or mbits < 0:
        raise ValueError(f"ebits and mbits must be at least 0, got {name}")
    if 1 + ebits + mbits > 32:
        raise ValueError(f"a format has at most 32 bits, {name} has {1 + ebits + mbits}")
    if ebits == 0 and (mbits == 0 or specials == "ieee" or not subnormals):
        raise ValueError(f"{name}: without exponent bits a format needs mantissa bits, subnormals and no ieee specials")
    if specials == "ieee" and mbits == 0:
        raise ValueError(f"{name}: ieee specials need a mantissa bit to tell NaN from infinity")
    if _max_code(ebits, mbits, specials) < (1 if subnormals else 1 << mbits):
        raise ValueError(f"{name} with specials={specials!r} and subnormals={subnormals} has no finite nonzero value")


def _integer(text: str) -> int:
    """Decimal digits and a sign; `int` alone would also take spaces, underscores and other alphabets' digits."""
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        raise ValueError(text)
    return int(text)


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "bias": _integer,
    "emax": _integer,
    "specials": str,
    "subnormals": {"on": True, "off": False}.__getitem__,
}
_SPLIT = re.compile(r"1-(\d+)-(\d+)(?::(.*))?", re.ASCII)

NAMES: dict[str, FloatFormat] = {
    # OCP 8-bit floating point specification and ml_dtypes
    "e4m3fn": FloatFormat(4, 3, specials="fn"),
    "e5m2": FloatFormat(5, 2, specials="ieee"),
    "e4m3": FloatFormat(4, 3, specials="ieee"),
    "e3m4": FloatFormat(3, 4, specials="ieee"),
    "e4m3fnuz": FloatFormat(4, 3, specials="fnuz"),
    "e5m2fnuz": FloatFormat(5, 2, specials="fnuz"),
    "e4m3b11fnuz": FloatFormat(4, 3, bias=11, specials="fnuz"),
    # OCP Microscaling elements
    "e2m1fn": FloatFormat(2, 1),
    "e2m3fn": FloatFormat(2, 3),
    "e3m2fn": FloatFormat(3, 2),
    # 16 bits and more
    "bf16": FloatFormat(8, 7, specials="ieee"),
    "fp16": FloatFormat(5, 10, specials="ieee"),
    "tf32": FloatFormat(8, 10, specials="ieee"),
    "fp32": FloatFormat(8, 23, specials="ieee"),
}
# IEEE P3109: signed formats of K bits with precision P; extended domain, and finite domain with the suffix f.
NAMES |= {
    f"p3109_k{k}p{p}{suffix}": FloatFormat(k - p, p - 1, specials=specials)
    for k in range(3, 17)
    for p in range(1, k)
    for suffix, specials in (("", "p3109"), ("f", "fnuz"))
    if k - p <= 11
}

_DTYPES = {f"float8_{name}": name for name in NAMES if name.startswith(("e3", "e4", "e5"))}
_DTYPES |= {"float6_e2m3fn": "e2m3fn", "float6_e3m2fn": "e3m2fn", "float4_e2m1fn": "e2m1fn"}
_DTYPES |= {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


RULES = ("floor", "ceil", "nearest")
"""How a block's power-of-two scale follows from its amax, in the order that kernels know the rules by."""

Block = int | tuple[int, int] | str
"""A block's shape: so many elements along a dimension, a tile (rows, columns) of the last two, or "tensor"."""


@dataclass(frozen=True, init=False, repr=False)
class BlockFormat:
    """Elements of a float format in blocks that share a scale: frozen, hashable, picklable, equal by value.

    A block of numbers x is element codes q and one scale s, x = s · q. With the power-of-two scale `e8m0` (codes 0..254
    for 2^-127..2^127, 255 for NaN) the scale is a shared exponent bias. With a float format as the scale, s is the
    block's amax divided by the largest element, rounded to nearest even. `tensor_scale` adds a float32 scale s_t for
    the whole tensor, amax / (largest element · largest scale), by which blocks are divided first.

    Args:
        element: the format of the elements, or its string.
        block: how many elements along a dimension, a tile (rows, columns) of the last two dimensions, or "tensor".
            Sizes need not divide: the last block is short.
        scale: "e8m0", or a float format of up to 8 bits that has NaN, or its string.
        rule: for `e8m0`, how the exponent k follows from amax. "floor": floor(log2 amax) - emax, so that elements may
            saturate; "ceil": the least k with amax <= max · 2^k; "nearest": the exponent of amax rounded (ties to even)
            to as many bits as the largest element has, minus emax.
        tensor_scale: whether the tensor has a scale too; needs a float format as the scale.

    Raises:
        TypeError: for arguments of a wrong type.
        ValueError: for an unknown rule or scale, a block without elements, a rule with a float scale, a tensor scale
            with e8m0, or values that float64 (with a float scale: float32, and elements up to 16 bits) cannot hold.

    Source: OCP Microscaling Formats 1.0 for `e8m0`, `floor` and the MX names; NVIDIA's description of NVFP4.
    """

    element: FloatFormat
    block: Block
    scale: FloatFormat | str
    rule: str
    tensor_scale: bool
    _text: str = field(compare=False)

    def __init__(
        self,
        element: FloatFormat | str | object,
        block: Block,
        *,
        scale: FloatFormat | str = "e8m0",
        rule: str = "floor",
        tensor_scale: bool = False,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if not isinstance(tensor_scale, bool):
            raise TypeError(f"tensor_scale must be a bool, got {tensor_scale!r}")
        object.__setattr__(self, "element", float_format(element))
        object.__setattr__(self, "block", _block(block))
        object.__setattr__(self, "scale", scale if scale == "e8m0" else float_format(scale))
        object.__setattr__(self, "rule", rule)
        object.__setattr__(self, "tensor_scale", tensor_scale)
        _check_scale(self)
        object.__setattr__(self, "_text", _block_text(self))

    @property
    def bits(self) -> int:
        """Width of an element's code in bits, sign included."""
        return self.element.bits

    @property
    def twos_complement(self) -> bool:
        """Whether element codes are stored as two's complement: e = 0 with one zero, as OCP's INT8."""
        return self.element.ebits == 0 and self.element.specials == "fnuz"

    @property
    def significant_bits(self) -> int:
        """Significant bits of the largest element."""
        lacking = max(self.element.emin - self.element.emax, 0)
        return self.element.mbits + 1 - lacking

    @property
    def carry(self) -> int:
        """The least 53-bit significand of amax with which the scale's exponent is one more than by `floor`."""
        if self.rule == "ceil":
            return int(np.frexp(self.element.max)[0] * 2.0**53) + 1
        return (1 << 53) - (1 << (52 - self.significant_bits) if self.rule == "nearest" else 0)

    @property
    def fields(self) -> list[int]:
        """The integers that determine the format, as the kernels take them.

        The element's five; rows and columns of a block (0 rows: along a dimension, 0 columns too: the whole tensor),
        the rule and the tensor scale; with a float scale its five.
        """
        if self.block == "tensor":
            rows, columns = 0, 0
        else:
            rows, columns = self.block if isinstance(self.block, tuple) else (0, int(self.block))
        scale = self.scale.fields if isinstance(self.scale, FloatFormat) else []
        return [*self.element.fields, rows, columns, RULES.index(self.rule), int(self.tensor_scale), *scale]

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"lowprec.format('{self}')"


def _block(block: object) -> Block:
    """A block's shape, checked."""
    if block == "tensor":
        return "tensor"
    sizes = tuple(block) if isinstance(block, (tuple, list)) else (block,)
    for size in sizes:
        require_int("block", size)
    if len(sizes) > 2 or len(sizes) == 0 or min(sizes) < 1:
        raise ValueError(f"block must be a size, a tile (rows, columns) or 'tensor', sizes at least 1, got {block!r}")
    return sizes if isinstance(block, (tuple, list)) and len(sizes) == 2 else sizes[0]


def _check_scale(fmt: BlockFormat) -> None:
    """Refuse scales that numbers and codes could not be told by."""
    element, scale = fmt.element, fmt.scale
    if not isinstance(scale, FloatFormat):
        if fmt.tensor_scale:
            raise ValueError("tensor_scale needs a float format as the scale, such as e4m3fn")
        if not _within(element, -1074 + 127, 1023 - 127):
            raise ValueError(f"float64 cannot hold {element} with every scale from 2^-127 to 2^127")
        return
    if fmt.rule != "floor":
        raise ValueError(f"rule is how e8m0 scales are chosen; one of {scale} is rounded to nearest even")
    if scale.bits > 8 or not scale.has_nan:
        raise ValueError(f"scale must be e8m0 or a float format of up to 8 bits that has NaN, got {scale}")
    if element.bits > 16 or not _within(element, -149, 127) or not _within(scale, -149, 127):
        raise ValueError(f"with a float scale the element has up to 16 bits and float32 holds both: {element}, {scale}")


def _within(fmt: FloatFormat, low: int, high: int) -> bool:
    """Whether the format's last bits and largest value lie between 2^low and 2^(high + 1)."""
    return fmt.emin - fmt.mbits >= low and fmt.emax <= high


def _block_text(fmt: BlockFormat) -> str:
    """The shortest string that means the format."""
    options = [] if fmt.rule == "floor" else [f"rule={fmt.rule}"]
    for name, named in BLOCK_NAMES.items():
        if _but_rule(fmt) == _but_rule(named):
            return name + (":" + options[0] if options else "")
    plain = fmt.scale == "e8m0" and fmt.element == FloatFormat(0, max(fmt.element.mbits, 1))
    head = f"bfp{fmt.bits}" if plain else f"block[{fmt.element}]"
    size = f"{fmt.block[0]}x{fmt.block[1]}" if isinstance(fmt.block, tuple) else fmt.block
    if fmt.scale != "e8m0":
        options.append(f"scale=[{fmt.scale}]")
    if fmt.tensor_scale:
        options.append("tensor_scale=on")
    return f"{head}/{size}" + (":" + ",".join(options) if options else "")


def _but_rule(fmt: BlockFormat) -> tuple[object, ...]:
    return fmt.element, fmt.block, fmt.scale, fmt.tensor_scale


BLOCK_NAMES: dict[str, BlockFormat] = {}
"""Block formats by name; `bfp<bits>/<block>` and `block[<element>]/<block>` are not listed. Filled below."""


@overload
def format(spec: FloatFormat) -> FloatFormat: ...


@overload
def format(spec: object) -> FloatFormat | BlockFormat: ...


def format(spec: object) -> FloatFormat | BlockFormat:
    """Look up or parse a format.

    Args:
        spec: a format (returned as it is); a name of `NAMES` or `BLOCK_NAMES`; a string `1-e-m[:key=value,...]` with
            keys bias, emax, specials and subnormals (on or off); a block format's `bfp<bits>/<block>` or
            `block[<element>]/<block>`, the block being n, <rows>x<columns> or tensor, with keys rule, scale (in
            brackets) and tensor_scale (on or off); or a torch or ml_dtypes dtype such as `torch.float8_e4m3fn`.

    Raises:
        ValueError: for an unknown name, a malformed string or an impossible format.
        TypeError: for anything else.
    """
    if isinstance(spec, (FloatFormat, BlockFormat)):
        return spec
    if isinstance(spec, str):
        return _parse(spec)
    name = getattr(spec, "name", None) or getattr(spec, "__name__", None) or str(spec).removeprefix("torch.")
    if name in _DTYPES:
        return NAMES[_DTYPES[name]]
    raise TypeError(f"expected a format, a format string or a floating-point dtype up to 32 bits, got {spec!r}")


def float_format(spec: object) -> FloatFormat:
    """`format`, where only a float format will do: ValueError for a block format."""
    fmt = format(spec)
    if isinstance(fmt, BlockFormat):
        raise ValueError(f"expected a float format, got the block format {fmt}")
    return fmt


@lru_cache(maxsize=1024)
def _parse(text: str) -> FloatFormat | BlockFormat:
    if "/" in text or text.partition(":")[0] in BLOCK_NAMES:
        return _parse_block(text)
    return _parse_float(text)


_BLOCK = re.compile(
    r"(?P<name>[a-z]\w*)(?![\w/\[])|(?:bfp(?P<bits>\d+)|block\[(?P<element>[^\]]*)\])"
    r"/(?:(?P<rows>\d+)x(?P<columns>\d+)|(?P<size>\d+)|tensor)",
    re.ASCII,
)
_BLOCK_OPTION = re.compile(r"(rule|scale|tensor_scale)=(\[[^\]]*\]|[^,\[\]]*)(?:,|$)", re.ASCII)


def _parse_block(text: str) -> BlockFormat:
    match = _BLOCK.match(text)
    rest = text[match.end() :] if match else ""
    if match is None or (rest and (rest[0] != ":" or not _BLOCK_OPTION.match(rest, 1))):
        raise ValueError(
            f"unknown block format {text!r}: expected bfp<bits>/<block> or block[<element>]/<block>, the block being "
            f"n, <rows>x<columns> or tensor, or one of {', '.join(BLOCK_NAMES)}, then [:key=value,...]"
        )
    return _with_block_options(_block_head(match), text, rest[1:])


def _block_head(match: re.Match[str]) -> BlockFormat:
    """The format that a string names before its options."""
    if match["name"]:
        return BLOCK_NAMES[match["name"]]
    size: Block = int(match["size"]) if match["size"] else "tensor"
    block = (int(match["rows"]), int(match["columns"])) if match["rows"] else size
    element = FloatFormat(0, int(match["bits"]) - 1) if match["bits"] else _parse_float(match["element"])
    return BlockFormat(element, block)


def _with_block_options(head: BlockFormat, text: str, rest: str) -> BlockFormat:
    options: dict[str, Any] = {}
    while rest:
        match = _BLOCK_OPTION.match(rest)
        if match is None or match[1] in options or (match[0].endswith(",") and match.end() == len(rest)):
            raise ValueError(f"format {text!r}: expected each of rule, scale, tensor_scale at most once, got {rest!r}")
        options[match[1]] = match[2].removeprefix("[").removesuffix("]")
        rest = rest[match.end() :]
    if (switch := options.get("tensor_scale")) is not None:
        if switch not in ("on", "off"):
            raise ValueError(f"format {text!r}: {switch!r} is no value for tensor_scale")
        options["tensor_scale"] = switch == "on"
    given = {"scale": head.scale, "rule": head.rule, "tensor_scale": head.tensor_scale} | options
    return BlockFormat(head.element, head.block, **given)


@lru_cache(maxsize=1024)
def _parse_float(text: str) -> FloatFormat:
    if text in NAMES:
        return NAMES[text]
    match = _SPLIT.fullmatch(text)
    if match is None:
        known = ", ".join([*(name for name in NAMES if not name.startswith("p3109")), *BLOCK_NAMES])
        raise ValueError(f"unknown format {text!r}: expected 1-e-m[:key=value,...], p3109_k<K>p<P> or one of {known}")
    options: dict[str, Any] = {}
    for item in match[3].split(",") if match[3] is not None else []:
        key, _, value = item.partition("=")
        if key not in _OPTIONS or key in options:
            raise ValueError(f"format {text!r}: expected each of {', '.join(_OPTIONS)} at most once, got {item!r}")
        try:
            options[key] = _OPTIONS[key](value)
        except (ValueError, KeyError):
            raise ValueError(f"format {text!r}: {value!r} is no value for {key}") from None
    return FloatFormat(int(match[1]), int(match[2]), **options)


# OCP Microscaling Formats 1.0, and NVIDIA's NVFP4.
BLOCK_NAMES["mxfp8_e4m3"] = BlockFormat("e4m3fn", 32)
BLOCK_NAMES["mxfp8_e5m2"] = BlockFormat("e5m2", 32)
BLOCK_NAMES["mxfp6_e3m2"] = BlockFormat("e3m2fn", 32)
BLOCK_NAMES["mxfp6_e2m3"] = BlockFormat("e2m3fn", 32)
BLOCK_NAMES["mxfp4"] = BlockFormat("e2m1fn", 32)
BLOCK_NAMES["mxint8"] = BlockFormat(FloatFormat(0, 7, specials="fnuz"), 32)
BLOCK_NAMES["nvfp4"] = BlockFormat("e2m1fn", 16, scale="e4m3fn", tensor_scale=True)
