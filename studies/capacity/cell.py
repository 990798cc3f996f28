"""One cell of the study: every seed of one format and width, trained together, then scored."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from lowprec.cast import quantize
from lowprec.formats import FloatFormat
from lowprec.policy import Policy
from lowprec.studies import data, record
from lowprec.studies.capacity.config import FULL, Config
from lowprec.studies.capacity.model import ByteModel
from lowprec.studies.engine import Stop
from lowprec.studies.train import Plan, Trainer

LINES = 200
"""Lines of metrics that a cell writes; it can stop after each."""

SHARE = 20
"""Between two checkpoints a cell trains at least so many times as long as it takes to write one."""


def run(config: Config, format: str, width: int, folder: Path, stop: Stop) -> None:
    """Train and score the cell of a format and width: `train` with the format's recipe."""
    policy = None if format == FULL else Policy.recipe(format)
    train(config, policy, width, {"format": format, "width": width}, folder, stop)


def train(config: Config, policy: Policy | None, width: int, name: dict[str, Any], folder: Path, stop: Stop) -> None:
    """Train and score a cell, going on from its checkpoint.

    Leaves metrics.jsonl, checkpoint.pt until it is done, and result.json, which begins with `name`, when it is.

    Raises:
        ValueError: for a damaged checkpoint, or a loss that is no longer finite.
        OSError: for a full disk.
    """
    device = torch.device(config.device)
    _set_up(device, config)
    corpus = data.load(config.data, config.split)
    trainer = _trainer(config, policy, width, corpus, device)
    state = _restored(trainer, folder) or {"seconds": 0.0, "devices": []}
    state["devices"] = list(dict.fromkeys([*state["devices"], record.device_name(device)]))
    if device.type == "cuda":
        trainer.capture()
    if _train(trainer, config, folder, state, stop):
        result = name | _scores(trainer, config, corpus) | _costs(trainer, config, state)
        record.write_json(folder / "result.json", result)
        (folder / "checkpoint.pt").unlink()


def updates(config: Config, corpus: data.Corpus) -> int:
    """Updates that a cell makes."""
    return max(1, round(config.epochs * data.Stripes(corpus.train, config.batch, config.length, [0]).chunks))


def _set_up(device: torch.device, config: Config) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    else:
        torch.set_num_threads(1)


def _trainer(config: Config, policy: Policy | None, width: int, corpus: data.Corpus, device: torch.device) -> Trainer:
    options = {"policy": policy, "container": container(policy, device), "compile": config.compile}
    seeds = range(config.seeds)
    model = ByteModel(len(corpus.symbols), width, config.steps, config.embedding, seeds, **options).to(device)
    offsets = [_offset(seed, len(corpus.train)) for seed in seeds]
    stripes = data.Stripes(corpus.train.to(device), config.batch, config.length, offsets)
    h, c = torch.zeros(2, config.seeds, config.batch, width, device=device)
    plan = Plan(updates(config, corpus), config.lr, config.warmup, config.clip, config.ema)
    return Trainer(model, stripes, (h, c), plan, config.compile)


def _offset(seed: int, length: int) -> int:
    """Where a seed begins to read."""
    return int(torch.randint(length, (), generator=torch.Generator().manual_seed(seed)))


def container(policy: Policy | None, device: torch.device) -> torch.dtype | None:
    """bfloat16 on a GPU, for its rate, where it holds all that is stored; else float32."""
    stored = policy.float_formats[:3] if policy else (None,)
    return torch.bfloat16 if device.type == "cuda" and all(map(_fits_bfloat16, stored)) else None


def _fits_bfloat16(fmt: FloatFormat | None) -> bool:
    try:
        return fmt is not None and quantize(torch.empty(0, dtype=torch.bfloat16), fmt).numel() == 0
    except ValueError:
        return False


def _restored(trainer: Trainer, folder: Path) -> record.Json | None:
    state = record.load_checkpoint(folder / "checkpoint.pt")
    if state:
        trainer.restore(state["tensors"])
    record.rewind(folder / "metrics.jsonl", int(trainer.count))
    return state


def _train(trainer: Trainer, config: Config, folder: Path, state: record.Json, stop: Stop) -> bool:
    """Train to the end, or until told to stop; whether it is the end."""
    done, total = int(trainer.count), trainer.plan.updates
    due = time.monotonic() + config.save
    while done < total and not stop():
        began = time.perf_counter()
        lap = min(math.ceil(total / LINES), total - done)
        bpc = [nats / math.log(2) for nats in trainer.advance(lap).tolist()]
        done, seconds = done + lap, time.perf_counter() - began
        state["seconds"] += seconds
        _note(folder, done, bpc, trainer.symbols * lap / seconds)
        if done == total or stop() or time.monotonic() > due:
            began = time.monotonic()
            record.save_checkpoint(folder / "checkpoint.pt", state | {"tensors": trainer.tensors()})
            due = time.monotonic() + max(config.save, SHARE * (time.monotonic() - began))
    return done == total


def _note(folder: Path, update: int, bpc: list[float], speed: float) -> None:
    mean = sum(bpc) / len(bpc)
    if not math.isfinite(mean):
        raise ValueError(f"{folder.name}: the loss is no longer finite at update {update}; try a smaller lr")
    record.append(folder / "metrics.jsonl", {"update": update, "bpc": mean, "seeds": bpc, "speed": round(speed)})


def _scores(trainer: Trainer, config: Config, corpus: data.Corpus) -> dict[str, Any]:
    """Bits per character of every seed on the validation and the test text."""
    scores = {}
    for name, text in (("valid", corpus.valid), ("test", corpus.test)):
        rows = max(1, min(config.batch, (len(text) - 1) // config.length))
        stripes = data.Stripes(text.to(trainer.weights.device), rows, config.length, [0])
        scores[name] = trainer.score(stripes, rows)
    return scores


def _costs(trainer: Trainer, config: Config, state: record.Json) -> dict[str, Any]:
    symbols = trainer.symbols * trainer.plan.updates
    return {
        "seeds": list(range(config.seeds)),
        "parameters": trainer.weights.shape[1],
        "updates": trainer.plan.updates,
        "symbols": symbols // config.seeds,
        "seconds": round(state["seconds"], 1),
        "speed": round(symbols / state["seconds"]),
        "devices": state["devices"],
    }
