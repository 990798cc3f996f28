"""Sums of random numbers under every accumulator, beside the exact ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lowprec.accumulate import sum as sum_by_tree
from lowprec.cast import quantize
from lowprec.studies import record
from lowprec.studies.accumulation.config import Config
from lowprec.studies.accumulation.theory import SITUATIONS, Situation
from lowprec.studies.engine import Stop

MOST = 4096
"""Sums of one draw, at most."""


def fp8_products(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Products of an activation in 1-4-3 and a gradient in 1-5-2, normal before rounding; exact in float32."""
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    return quantize(x, "1-4-3") * quantize(g, "1-5-2")


def normals(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(shape, generator=generator)


TERMS = {"fp32": normals, "fp8": fp8_products}
"""Where terms come from: [sums, K], of mean 0."""


def names() -> list[str]:
    """Every kind of term in every situation, as fp8-truncated."""
    return [f"{terms}-{situation.name}" for terms in TERMS for situation in SITUATIONS]


def total(config: Config) -> int:
    """Steps of one part: a draw of one length each."""
    return len(config.lengths) * config.draws


def run(config: Config, terms: str, situation: Situation, folder: Path, stop: Stop) -> None:
    """Measure one kind of terms in one situation; leaves result.json, and begins again where it was stopped."""
    torch.set_num_threads(1)
    device = torch.device(config.device)
    record.rewind(folder / "metrics.jsonl", 0)
    rows: list[record.Json] = []
    for step in range(total(config)):
        if stop():
            return
        K, seed = config.lengths[step // config.draws], step % config.draws
        rows += _rows(config, terms, situation, K, seed, device)
        record.append(folder / "metrics.jsonl", {"update": step + 1})
    name = {"terms": terms, "situation": situation.name}
    record.write_json(folder / "result.json", name | {"device": record.device_name(device), "rows": rows})


def _rows(
    config: Config, terms: str, situation: Situation, K: int, seed: int, device: torch.device
) -> Iterator[record.Json]:
    """A row for each accumulator, on the same numbers."""
    t = TERMS[terms]((min(MOST, config.elements // K), K), torch.Generator().manual_seed(seed)).to(device)
    t = t.abs() if situation.same_sign else t
    exact, total, square = sum_by_tree(t, -1, "exact:fp32").double(), _sum(t.abs()), _sum(t.square())
    norm = total if situation.same_sign else square.sqrt()
    of_t = {"mean": float(total.mean()) / K, "square": float(square.mean()) / K}
    for shape in config.shapes:
        for bits in config.bits:
            accumulator = config.accumulator(shape, bits, situation.rounding.value)
            error = (sum_by_tree(t, -1, accumulator).double() - exact).abs()
            where = {"shape": shape, "bits": bits, "K": K, "seed": seed, "sums": len(t)}
            bound = float((error / total).max()) / accumulator.error_bound(K)
            yield where | of_t | _statistics(error / norm) | {"of_bound": bound}


def _sum(x: Tensor) -> Tensor:
    return x.double().sum(-1)


def _statistics(error: Tensor) -> dict[str, float]:
    """Of relative errors [sums]: root mean square, median, 9th decile, largest."""
    middle, high = error.quantile(torch.tensor([0.5, 0.9], dtype=error.dtype, device=error.device)).tolist()
    return {"rms": float(error.square().mean().sqrt()), "median": middle, "high": high, "max": float(error.max())}
