"""Number formats: what a code means. Plain data, no torch.

A format is `1-e-m` (sign, exponent bits, mantissa bits) with an integer bias, a policy for special values and a
switch for subnormals. Everything else is derived. To add a named format, add one entry to `NAMES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

SPECIALS = ("finite", "ieee", "fn", "fnuz", "p3109")
"""Kinds of special values, in the order that kernels know them by (docs/numerics.md, section 1)."""

_NO_NEGATIVE_ZERO = ("fnuz", "p3109")


def _require_int(name: str, value: object) -> None:
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
        _require_int("ebits", ebits)
        _require_int("mbits", mbits)
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
            _require_int("emax", emax)
            bias = self._exponent(self.max_code, 0) - emax
        elif bias is None:
            bias = _default_bias(ebits, specials)
        _require_int("bias", bias)
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


def format(spec: FloatFormat | str | object) -> FloatFormat:
    """Look up or parse a format.

    Args:
        spec: a format (returned as it is); a name of `NAMES`; a string `1-e-m[:key=value,...]` with keys bias, emax,
            specials and subnormals (on or off); or a torch or ml_dtypes dtype such as `torch.float8_e4m3fn`.

    Raises:
        ValueError: for an unknown name, a malformed string or an impossible format.
        TypeError: for anything else.
    """
    if isinstance(spec, FloatFormat):
        return spec
    if isinstance(spec, str):
        return _parse(spec)
    name = getattr(spec, "name", None) or getattr(spec, "__name__", None) or str(spec).removeprefix("torch.")
    if name in _DTYPES:
        return NAMES[_DTYPES[name]]
    raise TypeError(f"expected a format, a format string or a floating-point dtype up to 32 bits, got {spec!r}")


@lru_cache(maxsize=1024)
def _parse(text: str) -> FloatFormat:
    if text in NAMES:
        return NAMES[text]
    match = _SPLIT.fullmatch(text)
    if match is None:
        known = ", ".join(name for name in NAMES if not name.startswith("p3109"))
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
