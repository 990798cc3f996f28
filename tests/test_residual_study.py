"""The residual study: equal sizes, equal draws, statistics, and runs that say what their numbers say."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowprec import sparse, studies
from lowprec.studies import data, engine, intervals, options, record, residual
from lowprec.studies.residual import model, task, training
from lowprec.studies.residual.config import QUICK, Arm, Config
from lowprec.studies.residual.summary import Summary, findings

pytestmark = pytest.mark.usefixtures("one_thread")

ARMS = ("fp32-dense", "fp32-watts_strogatz", "fp32-watts_strogatz-learned", "fp8-watts_strogatz")
TINY = {
    "arms": ",".join(ARMS),
    "width": "64",
    "block": "8",
    "density": "0.3",
    "enter": "balanced_random",
    "layers": "2",
    "window": "4",
    "embedding": "4",
    "scored": "100",
    "seeds": "2",
    "batch": "8",
    "updates": "20",
    "every": "4",
    "wider": "2",
    "warmup": "2",
    "workers": "1",
}
"""Settings of a run of a few seconds, on a short text."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(data.read(data.EMBEDDED)[:20_000])
    return {**TINY, "data": str(path)}


def config_of(words: dict[str, str], **changed: Any) -> Config:
    return residual.prepare(replace(options.parse(Config, words, {}), **changed))


# Arms and settings.


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("fp32-dense", ("fp32", "dense", False)),
        ("fp8-forward-watts_strogatz:rewire=0.1-learned", ("fp8-forward", "watts_strogatz:rewire=0.1", True)),
        ("fp8-block_diagonal", ("fp8", "block_diagonal", False)),
    ],
)
def test_arms_are_named_by_what_they_are(name: str, parts: tuple[str, str, bool]) -> None:
    assert Arm.parse(name) == parts
    assert str(Arm.parse(name)) == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"arms": "fp9-dense"}, "arms must be FORMAT-PATTERN.*got 'fp9-dense'"),
        ({"arms": "fp32-ring"}, "arms must be FORMAT-PATTERN.*watts_strogatz.*got 'fp32-ring'"),
        ({"arms": "fp32-dense-learned"}, "has no blocks to learn"),
        ({"arms": "fp32-dense,fp32-dense"}, "arms must be distinct"),
        ({"cells": "fp8-dense"}, "cells must be among fp32-dense"),
        ({"width": "60"}, "width must be a multiple of the block, 8"),
        ({"enter": "ring"}, "enter must be one of .*watts_strogatz.*got 'ring'"),
        ({"window": "3"}, "block must be such that it divides the 12 features"),
        ({"share": "0"}, "share must be above 0"),
        ({"until": "1.5"}, "until must be above 0 and at most 1"),
        ({"seeds": "0"}, "seeds must be above 0"),
        ({"arms": "fp32-watts_strogatz:wire=1"}, "wire"),
        ({"sha256": "0"}, "has SHA-256"),
        ({"window": "30000"}, "more than 30000 bytes"),
    ],
)
def test_wrong_settings_are_named(words: dict[str, str], message: str, tiny: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        studies.run("residual", {**tiny, **words}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_setting_says_what_it_means() -> None:
    assert all(field.metadata["meaning"] for field in Config.__dataclass_fields__.values())
    assert QUICK.keys() <= Config.__dataclass_fields__.keys()


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    task.digits.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"lowprec\[studies\]"):
        residual.prepare(Config())


# Data.


def test_windows_of_a_text_and_what_follows(tiny: dict[str, str]) -> None:
    config, corpus = config_of(tiny), data.load(tiny["data"])
    text = task.Text(config, 0, torch.device("cpu"))
    rows, truth = text.batch(3, 8)
    places = corpus.train.unfold(0, 5, 1).long()
    assert rows.shape == (8, 4)
    assert all(bool((places == torch.cat([row, end[None]])).all(1).any()) for row, end in zip(rows, truth, strict=True))
    held = list(text.held())
    assert sum(len(truth) for _, truth in held) == 100
    assert torch.equal(torch.cat([held[0][0][0], held[0][1][:1]]), corpus.test[:5].long())


def test_draws_depend_on_seed_and_update_alone(tiny: dict[str, str]) -> None:
    config = config_of(tiny)
    one, same, other = (task.Text(config, seed, torch.device("cpu")) for seed in (1, 1, 2))
    one.batch(0, 8)
    assert torch.equal(one.batch(1, 8)[0], same.batch(1, 8)[0])
    assert not torch.equal(one.batch(1, 8)[0], one.batch(2, 8)[0])
    assert not torch.equal(one.batch(1, 8)[0], other.batch(1, 8)[0])


def test_digits_are_held_out_and_disturbed() -> None:
    pytest.importorskip("sklearn")
    config = Config(copies=2, noise=0.0)
    first, again, other = (task.Digits(config, seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert len(first.images) == 1797 - task.HELD
    images, _ = task.digits()
    assert math.isclose(float(images.std()), 1, rel_tol=1e-5)
    assert torch.equal(torch.cat([first.images, first.held_images]).sort(0).values, images.sort(0).values)
    assert torch.equal(first.batch(5, 16)[0], again.batch(5, 16)[0])
    assert not torch.equal(first.held_images, other.held_images)
    still = task.Digits(replace(config, shift=0), 0, torch.device("cpu"))
    assert all(torch.equal(rows, still.held_images) for rows, _ in still.held())
    for rows, truth in first.held():
        assert torch.equal(truth, first.held_truth)
        ways = [
            torch.roll(first.held_images.view(-1, 8, 8), (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
        ]
        inner = torch.stack([(way - rows.view(-1, 8, 8))[:, 1:-1, 1:-1].abs().amax((1, 2)) for way in ways])
        assert bool((inner.amin(0) == 0).all())
    noisy = task.Digits(replace(config, noise=0.5, shift=0), 0, torch.device("cpu"))
    assert float((next(noisy.held())[0] - noisy.held_images).std()) == pytest.approx(0.5, rel=0.02)


# Nets.


@pytest.mark.parametrize("enter", ["dense", "balanced_random"])
@pytest.mark.parametrize("pattern", ["watts_strogatz", "block_diagonal"])
def test_nets_are_of_equal_size(pattern: str, enter: str, tiny: dict[str, str]) -> None:
    config = config_of(tiny, arms=("fp32-dense", f"fp32-{pattern}"), cells=(), enter=enter)
    text = task.Text(config, 0, torch.device("cpu"))
    nets = [model.build(config, Arm("fp32", name, False), text, 0) for name in ("dense", pattern)]
    dense, blocks = (sum(p.numel() for p in net.parameters()) for net in nets)
    width, entering = nets[0].width, nets[1].enter.weight.numel()
    assert (dense, blocks) == (
        model.parameters(config, text, width, width**2),
        model.parameters(config, text, 64, nets[1].hidden[0].weight.numel(), entering),
    )
    assert (entering == text.features * 64) == (enter == "dense")
    assert blocks <= dense
    assert model.parameters(config, text, width - 1, (width - 1) ** 2) < blocks


def test_the_net_is_what_it_says(tiny: dict[str, str]) -> None:
    config = config_of(tiny)
    text = task.Text(config, 0, torch.device("cpu"))
    net = model.build(config, Arm("fp32", "watts_strogatz", False), text, 0)
    rows, _ = text.batch(0, 8)
    h = net.enter(net.embedding(rows).flatten(1))
    for norm, linear in zip(net.norms[:2], net.hidden, strict=True):
        assert isinstance(linear, sparse.Linear)
        h = h + linear.to_dense()(norm(h).relu())
    torch.testing.assert_close(net(rows), net.leave(net.norms[2](h)))
    assert not torch.equal(net.hidden[0].layout.mask, net.hidden[1].layout.mask)


def test_arms_of_a_seed_begin_alike(tiny: dict[str, str]) -> None:
    config = config_of(tiny)
    text = task.Text(config, 0, torch.device("cpu"))
    nets = [model.build(config, Arm.parse(name), text, 1).state_dict() for name in ARMS[1:]]
    assert all(torch.equal(value, other[key]) for other in nets[1:] for key, value in nets[0].items())
    other = model.build(config, Arm.parse(ARMS[1]), text, 2)
    assert not torch.equal(nets[0]["enter.weight"], other.enter.weight)


def test_features_begin_of_one_size() -> None:
    config = Config(width=640, data="")
    text = task.Text(config, 0, torch.device("cpu"))
    for name in ("dense", "watts_strogatz", "barabasi_albert"):
        net = model.build(config, Arm("fp32", name, False), text, 0)
        for linear in net.hidden:
            weight = linear.weight if name == "dense" else linear.to_dense().weight
            gain = weight.detach().square().sum(1) * config.layers / 2
            assert float(gain.mean()) == pytest.approx(1, abs=0.1)


def test_batches_that_rewire_are_wider_in_every_arm() -> None:
    config = Config(updates=100, every=10, until=0.5, batch=3, wider=4)
    assert [update + 1 for update in range(100) if config.rows(update) == 12] == [10, 20, 30, 40]
    assert {config.rows(update) for update in range(100)} == {3, 12}


# Statistics.


def test_equality_is_claimed_exactly_when_the_interval_lies_within() -> None:
    rng, claims = np.random.default_rng(0), []
    for _ in range(200):
        differences = rng.normal(rng.normal(0, 0.3), 0.5, rng.integers(2, 12)).tolist()
        within, p = intervals.equality(differences, 0.6)
        claims.append(p < 0.05)
        assert claims[-1] == (max(-within.low, within.high) < 0.6)
    assert set(claims) == {True, False}


def test_intervals_of_means() -> None:
    rng = np.random.default_rng(0)
    found = [intervals.mean(rng.normal(0.3, 1, 5).tolist()) for _ in range(400)]
    assert 364 <= sum(each.low <= 0.3 <= each.high for each in found) <= 394  # binomial, 400 of 0.95
    one = intervals.mean([0.5])
    assert (one.estimate, one.bounded, intervals.plain(one)["low"]) == (0.5, False, None)
    assert intervals.equality([0.0], 1.0)[1] == 1.0
    assert intervals.equality([0.5, 0.5], 1.0)[1] == 0.0
    assert intervals.below([-3.0, -2.0, -4.0], 1.0) == pytest.approx(0.01010205, rel=1e-6)
    assert intervals.plus_minus(intervals.mean([1.0, 2.0]), "+.1f") == "+1.5 ± 6.4"


def net_of(arm: str, error: float, bits: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "seeds": [{"error": error + 0.1 * (-1) ** seed, "clean": error / 2, "bits": bits} for seed in range(4)],
    }


def test_findings_say_what_the_scores_say() -> None:
    scores = {ARMS[0]: (5.0, 0.3), ARMS[1]: (5.2, 0.3), ARMS[2]: (3.0, 0.2), ARMS[3]: (7.0, 0.4)}
    config = Config(arms=ARMS, seeds=4, margin=1.0)
    cells = [net_of(arm, *score) for arm, score in scores.items()]
    cells[1]["seeds"][0]["error"] += 0.8
    equal, better, worse, clean, *_, learned, cost = findings(Summary(config, cells))
    assert "fp32-watts_strogatz less fp32-dense: +0.40" in equal
    assert "no difference is shown" in equal
    assert "equality within ±1 is shown" in equal
    assert "it is better; equality within ±1 is not shown" in better
    assert "that it is no worse by 1 is shown" in better
    assert "no worse" not in equal + worse
    assert "it is worse; equality within ±1 is not shown" in worse
    assert (
        "+0.10 [95%: +0.10 to +0.10] points of error without noise; it is worse; equality within ±1 is shown" in clean
    )
    assert "points of error: learning is better; -0.1000" in learned
    assert learned.endswith("bits: learning is better.")
    assert cost.startswith("fp8-watts_strogatz less fp32-watts_strogatz: +1.60")
    assert cost.endswith("bits: that is its cost.")
    assert findings(Summary(replace(config, seeds=1), cells)) == [
        "One seed alone has no interval: nothing can be concluded."
    ]


# Runs.


@pytest.fixture(scope="module")
def finished(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    studies.run("residual", tiny, out=folder)
    return folder


def results(folder: Path) -> dict[str, Any]:
    return {arm: json.loads((folder / "cells" / arm / "result.json").read_text())["seeds"] for arm in ARMS}


def test_a_run_leaves_its_results(finished: Path) -> None:
    names = ("config.json", "cells", "results.json", "results.csv", "residual.png", "masks.png", "README.md")
    assert {path.name for path in finished.iterdir()} == set(names)
    assert all((finished / name).read_bytes().startswith(b"\x89PNG") for name in ("residual.png", "masks.png"))
    rows = list(csv.DictReader((finished / "results.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == [arm for arm in ARMS for _ in range(2)]
    page, found = (finished / "README.md").read_text(), json.loads((finished / "results.json").read_text())
    assert found["score"] == "bits"
    assert all(f"- {line}\n" in page for line in found["findings"])
    assert len(found["findings"]) == 3 + 1 + 1


def test_learning_moves_blocks_and_keeps_their_number(finished: Path) -> None:
    nets = results(finished)
    assert "masks" not in nets["fp32-dense"][0]
    masks = {arm: nets[arm][0]["masks"] for arm in ARMS[1:]}
    before, after = masks[ARMS[1]]["before"], masks[ARMS[1]]["after"]
    assert before == after == masks[ARMS[2]]["before"]
    learned = masks[ARMS[2]]["after"]
    assert len(before) == 1 + 2
    assert learned != before
    assert ["".join(layer).count("1") for layer in learned] == ["".join(layer).count("1") for layer in before]
    assert all(net["moved"] == 0 for net in nets[ARMS[1]])
    assert all(net["moved"] > 0 for net in nets[ARMS[2]])
    assert len({net["parameters"] for arm in ARMS[1:] for net in nets[arm]}) == 1


def test_nets_learn_and_fp8_is_another_net(finished: Path) -> None:
    nets = results(finished)
    for arm in ARMS:
        assert all(net["bits"] < net["curve"][0]["bits"] for net in nets[arm])
    assert nets[ARMS[3]][0]["bits"] != nets[ARMS[1]][0]["bits"]


def test_a_stopped_run_goes_on_to_the_same_numbers(finished: Path, tiny: dict[str, str], tmp_path: Path) -> None:
    config, arm, calls = config_of(tiny), Arm.parse(ARMS[2]), iter([False] * 13 + [True] * 9)
    training.run(config, arm, tmp_path, lambda: next(calls))
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "seed-0.json").exists()
    assert not (tmp_path / "seed-1.json").exists()
    training.run(config, arm, tmp_path, lambda: False)
    whole, again = (
        {k: [n[k] for n in nets] for k in ("bits", "curve", "moved")}
        for nets in (
            results(finished)[ARMS[2]],
            record.read_json(tmp_path / "result.json")["seeds"],
        )
    )
    assert whole == again
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "result.json"}
    updates = [line["update"] for line in record.lines(tmp_path / "metrics.jsonl")]
    assert updates == list(range(2, 42, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("arm", ["fp32-dense", ARMS[2], "fp8-watts_strogatz-learned"])
def test_a_captured_update_is_the_update(arm: str, tiny: dict[str, str]) -> None:
    config = config_of(tiny, device="cuda", block=32, width=256, embedding=16, enter="balanced_random")
    training.set_up(torch.device("cuda"))
    runs = [
        training.Run(replace(config, graph=graph), Arm.parse(arm), 0, torch.device("cuda")) for graph in (False, True)
    ]
    losses = [run.advance(0, 20) for run in runs]
    assert losses[0] == losses[1]
    assert runs[0].moved == runs[1].moved
    assert (runs[0].moved > 0) == arm.endswith("learned")
    for one, other in zip(*(run.net.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_is_named(tiny: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no longer finite at update .*; try a smaller lr"):
        training.run(config_of(tiny, lr=1e30, warmup=0), Arm.parse(ARMS[0]), tmp_path, lambda: False)


def test_progress_says_what_a_part_has_reached(tmp_path: Path) -> None:
    record.append(tmp_path / "metrics.jsonl", {"update": 3, "loss": 1.25, "speed": 1000})
    part = engine.Part("arm", tmp_path, 9, lambda folder, stop: None)
    assert engine._state(part.last()) == "1.250 bits  1,000 rows/s"
