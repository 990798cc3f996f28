"""All 2^32 float32 inputs through 1-5-2, 1-4-3 and 1-3-4 in every mode: CUDA against the CPU library, bit for bit.

From the root of the checkout: `python -m tests.gpu_exhaustive --out DIR`. Writes DIR/gpu_exhaustive.json and prints a
table last. `nearest_even` comes first; other modes follow while they are likely to end within `--seconds`. What the CPU
library itself computes is checked against the reference by test_exhaustive.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops
from lowprec.rounding import Rounding
from lowprec.testing import bits

FORMATS = ("1-5-2", "1-4-3", "1-3-4")
OPERATIONS = {"quantize": (lp.quantize, torch.float32), "encode": (lp.encode, torch.uint8)}
CHUNK = 1 << 26


@dataclass
class Row:
    """One operation on one format in one mode: how many inputs it had, and where the two devices differ."""

    format: str
    rounding: str
    operation: str
    inputs: int = 0
    differences: int = 0
    first: str = ""

    def add(self, given: Tensor, cpu: Tensor, cuda: Tensor) -> None:
        """Compare results that lie on the GPU."""
        differs = bits(cpu) != bits(cuda)
        count = int(differs.sum())
        self.inputs += given.numel()
        self.differences += count
        if count and not self.first:
            where = differs.nonzero()[0]
            words = [int(bits(x)[where].item()) % (1 << 8 * x.dtype.itemsize) for x in (given, cpu, cuda)]
            self.first = "{:#010x}: CPU {:#x}, CUDA {:#x}".format(*words)


def chunks(step: int, size: int = CHUNK) -> Iterator[Tensor]:
    """Every `step`-th of the 2^32 bit patterns, as float32 on the GPU, `size` at a time."""
    span = size * step
    for start in range(0, 1 << 32, span):
        stop = min(start + span, 1 << 32)
        yield torch.arange(start, stop, step, device="cuda").to(torch.int32).view(torch.float32)


class Compare:
    """Both devices' casts of one chunk, into pinned memory that is allocated once."""

    def __init__(self, size: int) -> None:
        self.given = torch.empty(size, pin_memory=True)
        self.results = {
            name: torch.empty(size, dtype=dtype, pin_memory=True) for name, (_, dtype) in OPERATIONS.items()
        }

    def __call__(self, x: Tensor, row: Row) -> None:
        cast, _ = OPERATIONS[row.operation]
        # The index of stochastic rounding counts within a chunk, whose first pattern is the seed.
        seed = int(bits(x)[0].item())
        given, result = self.given[: len(x)], self.results[row.operation][: len(x)]
        cast(given, row.format, rounding=row.rounding, seed=seed, out=result)
        row.add(x, result.to(x.device), cast(x, row.format, rounding=row.rounding, seed=seed))

    def load(self, x: Tensor) -> None:
        self.given[: len(x)].copy_(x)


def run_mode(mode: Rounding, step: int, compare: Compare) -> list[Row]:
    """One pass over the inputs: every format and operation in one mode."""
    rows = [Row(fmt, mode.value, operation) for fmt in FORMATS for operation in OPERATIONS]
    for x in chunks(step, len(compare.given)):
        compare.load(x)
        for row in rows:
            compare(x, row)
    return rows


def run(step: int = 1, seconds: float = 200, size: int = CHUNK) -> list[Row]:
    """As many modes as time allows, `nearest_even` first."""
    begin, rows, longest = time.monotonic(), [], 0.0
    compare = Compare(min(size, -(-(1 << 32) // step)))
    for mode in Rounding:
        start = time.monotonic()
        if rows and start - begin + longest > seconds:
            print(f"{mode.value}: left out, {seconds:.0f} s would not suffice")
            continue
        rows += run_mode(mode, step, compare)
        longest = max(longest, time.monotonic() - start)
        print(
            f"{mode.value}: {time.monotonic() - start:.1f} s, {sum(row.differences for row in rows)} differences so far"
        )
    return rows


def table(rows: list[Row]) -> str:
    """Differences by mode and format, `quantize` / `encode`."""
    lines = [f"{'rounding':14s}" + "".join(f"{fmt:>16s}" for fmt in FORMATS)]
    for mode in dict.fromkeys(row.rounding for row in rows):
        by = {(row.format, row.operation): row.differences for row in rows if row.rounding == mode}
        lines.append(
            f"{mode:14s}" + "".join(f"{' / '.join(str(by[fmt, op]) for op in OPERATIONS):>16s}" for fmt in FORMATS)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_exhaustive.json")
    parser.add_argument("--step", type=int, default=1, help="take every so many-th input")
    parser.add_argument("--seconds", type=float, default=200, help="begin no mode that may end later")
    arguments = parser.parse_args()
    if _ops.libraries != {"cpu": "loaded", "cuda": "loaded"}:
        parser.error(f"needs both compiled libraries, found {_ops.libraries}")
    begin = time.monotonic()
    rows = run(arguments.step, arguments.seconds)
    taken = time.monotonic() - begin
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "lowprec": lp.__version__,
        "threads": torch.get_num_threads(),
        "inputs": rows[0].inputs,
        "seconds": round(taken, 1),
        "rows": [asdict(row) for row in rows],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu_exhaustive.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['device']}, {rows[0].inputs:,} inputs, differing bits of quantize / encode, {taken:.0f} s in all")
    print(table(rows))
    print("\n".join(f"{row.format} {row.rounding} {row.operation}: {row.first}" for row in rows if row.first))
    raise SystemExit(1 if any(row.differences for row in rows) else 0)


if __name__ == "__main__":
    main()
