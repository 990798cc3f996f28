"""The number line of a format in text: one mark for each column of the terminal that holds values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from rich.text import Text

from lowprec.formats import FloatFormat
from lowprec.tables import FAINT, NORMAL, SUBNORMAL, product

Array = np.ndarray[Any, Any]

ONE, SEVERAL, BINADE = "│", "█", "┃"


def near_zero(fmt: FloatFormat, width: int) -> Iterator[Text]:
    """The values from zero on, through the subnormals and the first binades, linearly: heading, marks, scale."""
    limit = detail(fmt)
    cell = 2.0 ** math.ceil(math.log2(limit / (width - 8)))
    yield heading("Near zero, linear", f"one column is {product(cell)}")
    values = magnitudes(fmt)
    values = values[values <= limit]
    yield marks(fmt, np.append(0.0, values), np.append(0, values / cell).astype(np.int64))
    powers = 2.0 ** np.arange(math.ceil(math.log2(cell)), math.floor(math.log2(limit)) + 1)
    yield scale([(0, "0"), *((int(power / cell), product(power)) for power in powers[::-1])], width)


def whole_range(fmt: FloatFormat, width: int) -> Iterator[Text]:
    """All positive values on a log2 axis: heading, marks, scale."""
    values = magnitudes(fmt)
    mantissa, exponent = np.frexp(values)
    low, high = int(exponent[0]) - 1, int(exponent[-1])
    room = width - 6
    columns, step = max(room // (high - low), 1), -(-(high - low) // room)
    unit = f"one binade is {columns} columns" if step == 1 else f"one column is {step} binades"
    yield heading("The whole range, log2", unit.replace(" 1 columns", " one column"))
    within = np.floor(np.log2(2 * mantissa) * columns).astype(np.int64)
    yield marks(fmt, values, ((exponent - 1 - low) * columns + within) // step)
    names = [((k - low) * columns // step, f"2^{k}") for k in range(low, high)]
    apart = -(-(1 + max(len(name) for _, name in names)) * step // columns)
    yield scale([names[0], names[-1], *names[::apart]], width)


def detail(fmt: FloatFormat) -> float:
    """How far from zero the change from subnormal to normal spacing is worth seeing."""
    if fmt.min_normal is None or fmt.max <= 8 * fmt.min_normal:
        return fmt.max
    return 4 * fmt.min_normal


def magnitudes(fmt: FloatFormat) -> Array:
    """Positive finite values, ascending; for more than 10 mantissa bits only evenly spaced ones of each binade."""
    step = 1 << max(fmt.mbits - 10, 0)
    powers = 1 << np.arange(fmt.mbits, dtype=np.int64)
    codes = np.unique(np.concatenate([powers, np.arange(step, fmt.max_code + 1, step), [fmt.max_code]]))
    exponent, mantissa = codes >> fmt.mbits, codes & fmt.mantissa_mask
    significand = (mantissa + ((exponent > 0) << fmt.mbits)).astype(np.float64)
    values: Array = np.ldexp(significand, np.maximum(exponent, 1) - fmt.bias - fmt.mbits)
    return values[(codes <= fmt.max_code) & ((exponent > 0) | fmt.subnormals)]


def marks(fmt: FloatFormat, values: Array, columns: Array) -> Text:
    """One line: a mark in each column that holds values, coloured by whether they are normal."""
    line = [(" ", "")] * (int(columns.max()) + 1)
    first = math.inf if fmt.min_normal is None else fmt.min_normal
    for column, at, count in zip(*np.unique(columns, return_index=True, return_counts=True), strict=True):
        value = float(values[at])
        starts_binade = value >= first and math.frexp(value)[0] == 0.5
        mark = SEVERAL if count > 1 else BINADE if starts_binade else ONE
        line[column] = (mark, "default" if value == 0 else NORMAL if value >= first else SUBNORMAL)
    return Text.assemble(*line, no_wrap=True)


def scale(labels: Iterable[tuple[int, str]], width: int) -> Text:
    """Labels that start below their columns; those that would touch one before them in the list are left out."""
    line = [" "] * width
    for column, text in labels:
        end = column + len(text)
        if end <= width and all(cell == " " for cell in line[max(column - 1, 0) : end + 1]):
            line[column:end] = text
    return Text("".join(line).rstrip(), style=FAINT, no_wrap=True)


def heading(text: str, unit: str) -> Text:
    """What a line shows, and how much of it one column is."""
    return Text.assemble((text, "bold"), (f"  {unit}", FAINT))
