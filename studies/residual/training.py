"""One arm of the study: a net for each seed, trained, scored now and then, and scored at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowprec as lp
from lowprec import sparse
from lowprec.policy import Policy
from lowprec.studies import record
from lowprec.studies.capacity import cell
from lowprec.studies.engine import Stop
from lowprec.studies.residual.config import FULL, Arm, Config
from lowprec.studies.residual.model import build
from lowprec.studies.residual.task import Batch, task_of
from lowprec.studies.train import WARM_UP_RUNS, Plan, learning_rate

POINTS = 10
"""How often a net is scored on its way; it can stop after each."""


def run(config: Config, arm: Arm, folder: Path, stop: Stop) -> None:
    """Train and score every seed of an arm; those that are done already stay."""
    device = torch.device(config.device)
    set_up(device)
    files = [folder / f"seed-{seed}.json" for seed in range(config.seeds)]
    for seed, file in enumerate(files):
        if not file.exists():
            record.rewind(folder / "metrics.jsonl", seed * config.updates)
            result = train(config, arm, seed, device, folder, stop)
            if result is None:
                return
            record.write_json(file, result)
    record.write_json(folder / "result.json", {"arm": str(arm), "seeds": [record.read_json(file) for file in files]})
    for file in files:
        file.unlink()


def set_up(device: torch.device) -> None:
    """Strict float32, and one thread of a process on a CPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    else:
        torch.set_num_threads(1)


def train(config: Config, arm: Arm, seed: int, device: torch.device, folder: Path, stop: Stop) -> record.Json | None:
    """Train and score one net; None where it was stopped.

    Raises:
        ValueError: for a loss that is no longer finite.
    """
    run = Run(config, arm, seed, device)
    before, seconds, curve = masks(run.net), 0.0, []
    for point in range(POINTS):
        began, first, last = time.perf_counter(), *(config.updates * each // POINTS for each in (point, point + 1))
        loss = run.advance(first, last)
        seconds += time.perf_counter() - began
        if not math.isfinite(loss):
            raise ValueError(f"{folder.name}: the loss is no longer finite at update {last}; try a smaller lr")
        curve.append({"update": last, "loss": loss} | run.score(run.task.held()))
        speed = round((last - first) * config.batch / (time.perf_counter() - began))
        line = {"update": seed * config.updates + last, "seed": seed, "speed": speed}
        record.append(folder / "metrics.jsonl", curve[-1] | line)
        if stop() and last < config.updates:
            return None
    kept = {"masks": {"before": before, "after": masks(run.net)}} if before and not seed else {}
    return {"seed": seed} | run.result() | {"curve": curve, "seconds": round(seconds, 1)} | kept


class Run:
    """A net in training."""

    def __init__(self, config: Config, arm: Arm, seed: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.task = task_of(config, seed, device)
        self.net = build(config, arm, self.task, seed).to(device)
        self.policy = None if arm.format == FULL else Policy.recipe(arm.format)
        if self.policy:
            lp.wrap(self.net, self.policy, strict=True)
        self.plan = Plan(config.updates, config.lr, config.warmup, math.inf, 0.0)
        self.captures = config.graph and device.type == "cuda"
        rate = torch.tensor(config.lr, device=device) if self.captures else config.lr
        self.optimizer = torch.optim.Adam(self.net.parameters(), rate, fused=True, capturable=self.captures)
        self.learn = self._captured() if self.captures else self._learn
        self.moved = 0
        self.rewiring = self._rewiring() if arm.learned else None

    def _rewiring(self) -> sparse.Rewiring:
        config = self.config
        return sparse.Rewiring(
            self.net, self.optimizer, until=config.last_rewiring, share=config.share, every=config.every
        )

    def advance(self, first: int, last: int) -> float:
        """Make some updates; their mean loss in bits."""
        total = torch.zeros((), device=self.device)
        for number in range(first, last):
            total += self.update(number)
        return float(total) / max(last - first, 1) / math.log(2)

    def update(self, number: int) -> Tensor:
        """One update; its loss."""
        rate = float(learning_rate(self.plan, torch.tensor(number, dtype=torch.float64)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate) if self.captures else rate
        rows = self.config.rows(number)
        learn = self.learn if rows == self.config.batch else self._learn  # rewiring hooks only what runs eagerly
        loss = learn(*self.task.batch(number, rows))
        for each in self.rewiring.step() if self.rewiring else ():
            self.moved += int((each.after.mask & ~each.before.mask).sum())
        return loss

    def _learn(self, rows: Tensor, truth: Tensor) -> Tensor:
        with self.container():
            logits = self.net(rows)
        loss = cross_entropy(logits.float(), truth)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def _captured(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`_learn` of one batch as a CUDA graph; the net and the optimizer are left as they were."""
        before = [parameter.detach().clone() for parameter in self.net.parameters()]
        batch = self.task.batch(0, self.config.batch)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._learn(*batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._learn(*batch)
        with torch.no_grad():
            for parameter, value in zip(self.net.parameters(), before, strict=True):
                parameter.copy_(value)
                for state in self.optimizer.state[parameter].values():
                    state.zero_()

        def replay(rows: Tensor, truth: Tensor) -> Tensor:
            for place, given in zip(batch, (rows, truth), strict=True):
                place.copy_(given)
            graph.replay()
            return loss

        return replay

    def container(self) -> AbstractContextManager[None]:
        """bfloat16 for the operands on a GPU, where it holds all that is rounded."""
        dtype = cell.container(self.policy, self.device)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @torch.no_grad()
    def score(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Percentage of rows whose class is not the likeliest, and bits of a row's class."""
        wrong, nats, count = (torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(3))
        for rows, truth in batches:
            with self.container():
                logits = self.net(rows).float()
            wrong += (logits.argmax(1) != truth).sum()
            nats += cross_entropy(logits, truth, reduction="sum")
            count += len(truth)
        return {"error": float(100 * wrong / count), "bits": float(nats / count) / math.log(2)}

    def result(self) -> record.Json:
        """Scores and sizes at the end."""
        clean = {"clean": self.score(self.task.clean())["error"]} if self.config.on_digits else {}
        sizes = {"parameters": sum(p.numel() for p in self.net.parameters()), "width": self.net.width}
        more = {"moved": self.moved, "device": record.device_name(self.device)}
        return sizes | self.score(self.task.held()) | clean | more


def masks(net: nn.Module) -> list[list[str]]:
    """The mask of each sparse layer as rows of 0 and 1; none of a dense net."""
    layers = [layer.layout.mask.tolist() for layer in net.modules() if isinstance(layer, sparse.Linear)]
    return [["".join(str(int(present)) for present in row) for row in mask] for mask in layers]
