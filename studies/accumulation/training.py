"""The byte model trained with every product of its MLSTM, forward and backward, under one accumulator."""

from __future__ import annotations

from pathlib import Path

from lowprec.policy import Policy
from lowprec.studies import capacity, data
from lowprec.studies.accumulation.config import FULL, Config
from lowprec.studies.capacity import cell
from lowprec.studies.engine import Stop


def names(config: Config) -> list[str]:
    """Every cell: the base, then pairwise-9 and the like."""
    return [FULL, *(f"{shape}-{bits}" for bits in config.training_bits for shape in config.shapes)]


def settings(config: Config) -> capacity.Config:
    """Those of the capacity study's cells, by whose code these are trained."""
    corpus = data.load(config.data, config.split)
    chunks = data.Stripes(corpus.train, config.batch, config.length, [0]).chunks
    names = ("data", "sha256", "split", "seeds", "steps", "embedding", "batch", "length", "lr", "warmup", "save")
    return capacity.Config(
        **{name: getattr(config, name) for name in names},
        widths=(config.hidden,),
        epochs=config.updates / chunks,
        device=config.device,
        tf32=False,
    )


def run(config: Config, name: str, folder: Path, stop: Stop) -> None:
    """Train and score one cell, every seed of it; goes on from its checkpoint."""
    operands = Policy() if config.recipe == FULL else Policy.recipe(config.recipe)
    shape, _, bits = name.rpartition("-")
    accumulator = config.accumulator(shape, int(bits)) if shape else None
    roles = (operands.activation, operands.weight, operands.activation_grad, operands.weight_grad)
    policy = Policy(*roles, accumulator=accumulator)
    cell.train(settings(config), policy, config.hidden, {"accumulator": name}, folder, stop)
