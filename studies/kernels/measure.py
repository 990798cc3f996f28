"""One width: every product of a layer, sparse and dense, timed side by side, several times over."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from lowprec.sparse import BlockLayout
from lowprec.studies import record
from lowprec.studies.engine import Stop
from lowprec.studies.kernels.config import Config
from lowprec.studies.kernels.work import DENSE, Operands, Pool, Work, call_of, dense_call
from lowprec.timing import captured, time_in_rounds

BUDGET = 1.0
"""Seconds of calls after which a slow product takes no further part in a run."""


def run(config: Config, widening: float, folder: Path, stop: Stop) -> None:
    """Measure what is left of one width; leaves result.json."""
    device, metrics = torch.device(config.device), folder / "metrics.jsonl"
    pool, lines = Pool(device), record.lines(metrics)
    record.rewind(metrics, len(lines))  # a line cut short goes
    for repeat in range(len(lines), config.repeats):
        if stop():
            return
        record.append(metrics, {"update": repeat + 1, "rows": _repeat(config, widening, repeat, pool)})
    rows = [row | {"repeat": line["update"] - 1} for line in record.lines(metrics) for row in line["rows"]]
    where = {"width": config.width(widening), "widening": widening}
    record.write_json(folder / "result.json", where | {"device": record.device_name(device), "rows": rows})


def _repeat(config: Config, widening: float, repeat: int, pool: Pool) -> list[record.Json]:
    """A row for each product, with the median of its rounds."""
    operands = {work: Operands(work, work.layout(config.side, repeat), pool) for work in _works(config, widening)}
    memory = torch.cuda.graph_pool_handle() if pool.device.type == "cuda" else None
    calls = {
        str(work): captured((call_of if work.block else dense_call)(each), pool.device, memory)
        for work, each in operands.items()
    }
    seconds = time_in_rounds(calls, pool.device, config.rounds, BUDGET)
    return [_row(work, each.layout) | {"seconds": seconds[str(work)].median} for work, each in operands.items()]


def _works(config: Config, widening: float) -> Iterator[Work]:
    """Every product, and the dense ones beside them."""
    pattern = config.pattern if widening > 1 else DENSE
    for op, kind, tokens in product(config.ops, config.kinds, config.tokens):
        works = [Work(op, kind, config.features, block, tokens, widening, pattern) for block in config.blocks]
        yield from (*works, works[0].dense)


def _row(work: Work, layout: BlockLayout) -> record.Json:
    where = {"op": work.op, "kind": work.kind, "tokens": work.tokens, "block": work.block}
    return where | {"flops": work.flops(layout)}
