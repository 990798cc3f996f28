"""Studies: data, training, statistics, what is left on disk, and runs that are stopped at any point."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowprec import studies
from lowprec.studies import capacity, data, engine, options, record, regression, train
from lowprec.studies.capacity import cell
from lowprec.studies.capacity.config import Config
from lowprec.studies.capacity.model import ByteModel
from lowprec.studies.capacity.summary import findings, summarise
from lowprec.studies.train import Plan, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
TEXT = b"to be, or not to be: that is the question. " * 60

TINY = {"widths": "8,12", "seeds": "2", "embedding": "8", "batch": "4", "length": "8", "epochs": "0.25", "save": "0.2"}
"""Settings of a run of a few seconds, on a short text."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`TINY` with its text: the beginning of the embedded one."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(data.read(data.EMBEDDED)[:20_000])
    return {**TINY, "data": str(path)}


# Data.


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress], ids=["plain", "xz", "gz"])
def test_any_file_of_bytes(pack: Any, tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    path.write_bytes(pack(TEXT))
    corpus = data.load(str(path))
    parts = torch.cat([corpus.train, corpus.valid, corpus.test])
    assert parts.dtype == torch.uint8
    assert bytes(corpus.symbols[i] for i in parts) == TEXT
    assert corpus.symbols == bytes(sorted(set(TEXT)))
    assert [len(part) for part in corpus[3:]] == [2322, 129, 129]
    assert [len(part) for part in data.load(str(path), (2, 1, 1))[3:]] == [1290, 645, 645]


def test_the_embedded_text() -> None:
    corpus = data.load()
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert len(corpus.symbols) == 65
    assert len(corpus.train) == 1_115_394 - 2 * 55_769


PACKED, ZIPPED = lzma.compress(TEXT), gzip.compress(TEXT, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file"),
        (b"", "is empty"),
        (lzma.compress(b""), "is empty"),
        (PACKED[:-20], "damaged or cut short"),
        (PACKED[:40] + b"\0\0\0\0" + PACKED[44:], "damaged or cut short"),
        (ZIPPED[:-4], "damaged or cut short"),
        (ZIPPED[:30] + b"\0\0\0\0" + ZIPPED[34:], "damaged or cut short"),
        (b"short", "need a part of"),
    ],
    ids=["missing", "empty", "empty xz", "cut xz", "damaged xz", "cut gz", "damaged gz", "short"],
)
def test_bad_files_are_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        studies.run("capacity", {**TINY, "data": str(path)}, out=tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_stripes_read_every_row_in_order() -> None:
    text = torch.arange(50, dtype=torch.uint8)
    stripes = data.Stripes(text, rows=3, length=4, offsets=[0, 40])
    assert (stripes.stripe, stripes.chunks) == (16, 4)
    second = stripes.chunk(torch.tensor(1))
    assert second.dtype == torch.int64
    assert second.shape == (2, 5, 3)
    assert second[0, :, 0].tolist() == [4, 5, 6, 7, 8]
    assert second[0, :, 2].tolist() == [36, 37, 38, 39, 40]
    assert second[1, :, 1].tolist() == [10, 11, 12, 13, 14]  # 40 + 16 + 4, around the end
    assert torch.equal(stripes.chunk(torch.tensor(5)), second)


# Training.


def test_adam_is_torchs() -> None:
    plan = Plan(updates=100, lr=1e-2, warmup=0, clip=1e9, ema=0.5)
    flat, steps = torch.randn(2, 7, dtype=torch.float64), torch.randn(5, 2, 7, dtype=torch.float64)
    theirs = flat.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=1.0, betas=train.BETAS, eps=train.EPS)
    first, second, average = torch.zeros_like(flat), torch.zeros_like(flat), flat.clone()
    expected_average = flat.clone()
    for t, grad in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (100 - t) / 100
        theirs.grad = grad
        optimizer.step()
        train.adam(plan, flat, grad.clone(), first, second, average, torch.tensor(t))
        torch.testing.assert_close(flat, theirs.detach())
        decay = min(0.5, (1 + t) / (10 + t))
        expected_average = decay * expected_average + (1 - decay) * flat
        torch.testing.assert_close(average, expected_average)


def test_each_replica_is_clipped_by_its_own_norm() -> None:
    grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    zeros = [torch.zeros(2, 2) for _ in range(4)]
    train.adam(Plan(10, 0.0, 0, 1.0, 0.9), zeros[0], grad, *zeros[1:], torch.tensor(0))
    torch.testing.assert_close(grad, torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_learning_rate_rises_then_falls() -> None:
    plan = Plan(updates=10, lr=1.0, warmup=4, clip=1.0, ema=0.9)
    rates = [float(train.learning_rate(plan, torch.tensor(t).double())) for t in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-3:] == pytest.approx([2 / 6, 1 / 6, 0])


def tiny_trainer(seeds: range, policy: str | None = None, updates: int = 6) -> Trainer:
    corpus = data.load(split=(1, 1, 30))
    model = ByteModel(len(corpus.symbols), 8, 2, 4, seeds, policy=policy)
    stripes = data.Stripes(corpus.train[:200], 3, 8, [5 * seed for seed in seeds])
    h, c = torch.zeros(2, len(seeds), 3, 8)
    return Trainer(model, stripes, (h, c), Plan(updates, 1e-2, 2, 1.0, 0.9))


def test_seeds_do_not_see_each_other() -> None:
    together, alone = tiny_trainer(range(3)), tiny_trainer(range(1, 2))
    torch.testing.assert_close(together.advance(6)[1:2], alone.advance(6))
    torch.testing.assert_close(together.weights[1:2], alone.weights)
    text = data.Stripes(data.load().valid[:100], 2, 8, [0])
    assert together.score(text, 2)[1] == pytest.approx(alone.score(text, 2)[0])


def test_states_carry_on_and_begin_again_each_epoch() -> None:
    trainer, seen = tiny_trainer(range(1), updates=20), []
    model = trainer.model
    trainer.model = lambda chunk, state: seen.append(state[1].clone()) or model(chunk, state)  # type: ignore[assignment]
    chunks = trainer.stripes.chunks
    trainer.advance(chunks + 2)
    assert [bool(c.any()) for c in seen] == [False, *[True] * (chunks - 1), False, True]


def test_scores_are_of_the_averaged_weights_in_bits() -> None:
    trainer = tiny_trainer(range(2))
    trainer.advance(4)
    before = trainer.weights.clone()
    text = data.Stripes(data.load().valid[:100], 2, 8, [0])
    scores = trainer.score(text, 2)
    assert torch.equal(trainer.weights, before)
    trainer.weights.copy_(trainer.average)
    h, c = torch.zeros(2, 2, 2, 8)
    nats = []
    for number in range(text.chunks):
        chunk = text.chunk(torch.tensor(number)).expand(2, -1, -1)
        part, (h, c) = trainer.model(chunk, (h, c))
        nats.append(part)
    expected = torch.cat(nats, 1).double().mean((1, 2)) / math.log(2)
    assert scores == pytest.approx(expected.tolist())


def test_the_model_is_a_softmax_over_symbols() -> None:
    model = ByteModel(5, 8, 2, 4, range(2))
    state = (torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))
    chunks = [torch.tensor([1, 3, last]).view(1, 3, 1).expand(2, 3, 1) for last in range(5)]
    nats = torch.stack([model(chunk, state)[0][:, 1, 0] for chunk in chunks])
    torch.testing.assert_close((-nats).exp().sum(0), torch.ones(2))
    assert not torch.equal(model.embedding[0], model.embedding[1])


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [None, "fp8"])
def test_a_captured_update_is_the_update(policy: str | None) -> None:
    container = {"container": torch.bfloat16} if policy else {}
    trainers = []
    for _ in range(2):
        corpus = data.load()
        model = ByteModel(len(corpus.symbols), 64, 3, 16, range(2), policy=policy, **container).cuda()
        stripes = data.Stripes(corpus.train[:4000].cuda(), 8, 16, [0, 7])
        h, c = torch.zeros(2, 2, 8, 64, device="cuda")
        trainers.append(Trainer(model, stripes, (h, c), Plan(60, 1e-2, 5, 1.0, 0.9)))
    trainers[1].capture()
    losses = [trainer.advance(40) for trainer in trainers]
    assert torch.equal(losses[0], losses[1])
    for name, tensor in trainers[0].tensors().items():
        assert torch.equal(tensor, trainers[1].tensors()[name]), name


# Statistics.


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062047), (2, 4.30265273), (3, 3.18244631), (10, 2.22813885), (61, 1.99962358)]
)
def test_t_quantiles(freedom: int, quantile: float) -> None:
    assert regression.t_quantile(0.95, freedom) == pytest.approx(quantile, rel=1e-8)


def noisy(seed: int, sigma: float, n: int = 40) -> tuple[list[str], list[float], list[float]]:
    """Two lines of slope -0.2 that lie 0.05 apart."""
    rng = np.random.default_rng(seed)
    groups, x = ["a", "b"] * n, np.repeat(np.linspace(0, 1, n), 2)
    y = 2 - 0.2 * x + 0.05 * np.tile([0, 1], n) + rng.normal(0, sigma, 2 * n)
    return groups, x.tolist(), y.tolist()


def test_one_group_is_a_straight_line_fit() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    y = 3 * x + 1 + rng.normal(size=20)
    fitted = regression.fit(["a"] * 20, x.tolist(), y.tolist())
    line, covariance = np.polyfit(x, y, 1, cov=True)
    assert fitted.slope().estimate == pytest.approx(line[0])
    assert fitted.at("a", 2.0) == pytest.approx(np.polyval(line, 2.0))
    assert np.sqrt(fitted.covariance[1, 1]) == pytest.approx(np.sqrt(covariance[0, 0]))


def test_without_noise_the_numbers_come_back() -> None:
    fitted = regression.fit(*noisy(0, 1e-9))
    assert fitted.slope().estimate == pytest.approx(-0.2)
    assert fitted.offset("b", "a").estimate == pytest.approx(0.05)
    assert fitted.shift("b", "a").estimate == pytest.approx(0.25)
    difference, p = fitted.matches("b", "a", 0.25, margin=0.01)
    assert difference.estimate == pytest.approx(0, abs=1e-8)
    assert p < 1e-6
    assert fitted.matches("b", "a", 0.0, margin=0.01)[1] > 0.999


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    fits = [regression.fit(*noisy(seed, 0.05)) for seed in range(400)]
    for truth, interval in [
        (0.05, lambda f: f.offset("b", "a")),
        (-0.2, lambda f: f.slope()),
        (0.25, lambda f: f.shift("b", "a")),
    ]:
        held = sum(interval(f).low <= truth <= interval(f).high for f in fits)
        assert 364 <= held <= 394  # binomial, 400 of 0.95: outside in one case of 500


def test_equality_is_claimed_exactly_when_the_interval_lies_within() -> None:
    claims = set()
    for seed in range(50):
        difference, p = regression.fit(*noisy(seed, 0.05)).matches("b", "a", 0.25, margin=0.02)
        assert (p < 0.05) == (max(-difference.low, difference.high) < 0.02)
        claims.add(p < 0.05)
    assert claims == {True, False}


def test_a_shift_without_a_slope_is_unbounded() -> None:
    shift = regression.fit(*noisy(0, 5.0)).shift("b", "a")
    assert not shift.bounded


def test_too_few_points_have_no_slope() -> None:
    with pytest.raises(ValueError, match="two widths"):
        regression.fit(["a", "a", "b"], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0])


# On disk.


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", fsync)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    record.save_checkpoint(path, {"x": torch.ones(3)})
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="the disk is full: .*what was saved before is whole"):
        record.save_checkpoint(path, {"x": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    state = record.load_checkpoint(path)
    assert state is not None
    assert torch.equal(state["x"], torch.ones(3))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b[:90] + b"?" + b[91:], lambda b: b""]
)
def test_a_damaged_checkpoint_is_not_read(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    record.save_checkpoint(path, {"x": torch.ones(3)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or cut short"):
        record.load_checkpoint(path)


def test_a_line_cut_short_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for update in range(3):
        record.append(path, {"update": update})
    path.write_bytes(path.read_bytes()[:-6])
    assert record.lines(path) == [{"update": 0}, {"update": 1}]
    record.rewind(path, 0)
    assert path.read_text() == '{"update": 0}\n'


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.1)
    with (
        record.locked(tmp_path),
        pytest.raises(ValueError, match="another process is at work"),
        record.locked(tmp_path),
    ):
        pass
    with record.locked(tmp_path):
        pass


# Settings.


def test_words_become_settings() -> None:
    words = {"widths": "8,16", "lr": "1e-3", "compile": "yes", "formats": "fp32", "data": "some/path"}
    config = options.parse(Config, words, {"seeds": 3})
    assert (config.widths, config.lr, config.compile, config.formats) == ((8, 16), 1e-3, True, ("fp32",))
    assert (config.seeds, config.data, config.epochs) == (3, "some/path", 4.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"width": "8"}, "unknown setting 'width'; there are data, .*widths"),
        ({"seeds": "two"}, "seeds must be a whole number, got 'two'"),
        ({"widths": "8,x"}, "widths must be a whole number, or several with commas"),
        ({"compile": "maybe"}, "compile must be true or false"),
        ({"widths": "8,8"}, "widths must be distinct"),
        ({"widths": ""}, "widths must be distinct"),
        ({"formats": "fp9"}, "formats must be distinct names among fp32, bf16, fp8"),
        ({"seeds": "0"}, "seeds must be above 0"),
        ({"lr": "nan"}, "lr must be above 0"),
        ({"steps": "1"}, "steps must be at least 2"),
        ({"device": "tpu"}, "device must be cpu, cuda or auto"),
        ({"cells": "fp8-9"}, "cells must be among fp32-80"),
        ({"split": "90,10"}, "split must be three"),
        ({"sha256": "0"}, "has SHA-256 86c4e6.*, not 0"),
    ],
)
def test_wrong_settings_are_named(words: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        studies.run("capacity", words, out=tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_wrong_names_are_named(tmp_path: Path) -> None:
    assert ("capacity", capacity.QUESTION) in studies.names()
    with pytest.raises(ValueError, match="unknown study 'capacities'; there are accumulation, capacity"):
        studies.run("capacities", {}, out=tmp_path)
    with pytest.raises(ValueError, match="engine must be one of local"):
        studies.run("capacity", {}, out=tmp_path, engine="ray")


def test_every_setting_says_what_it_means() -> None:
    assert all(field.metadata["meaning"] for field in Config.__dataclass_fields__.values())


# Runs.


def scores(folder: Path) -> list[Any]:
    """Every number that must not depend on how often a run was stopped."""
    cells = json.loads((folder / "results.json").read_text())["cells"]
    names = sorted(path.name for path in (folder / "cells").iterdir())
    metrics = [record.lines(folder / "cells" / name / "metrics.jsonl") for name in names]
    laps = [[(line["update"], line["seeds"]) for line in lines] for lines in metrics]
    return [*((c["format"], c["width"], c["valid"], c["test"], c["symbols"]) for c in cells), *laps]


@pytest.fixture(scope="session")
def finished(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    studies.run("capacity", tiny, out=folder, quick=True)
    return folder


def test_a_run_leaves_its_results(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("config.json", "cells", "results.json", "results.csv", "capacity.png", "README.md")
    }
    result = json.loads((finished / "results.json").read_text())
    assert [(c["format"], c["width"]) for c in result["cells"]] == [
        *(("fp32", 8), ("fp8", 8), ("fp32", 12), ("fp8", 12))
    ]
    assert result["regression"]["formats"].keys() == {"fp8"}
    assert (finished / "capacity.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((finished / "results.csv").read_text().splitlines()))
    assert [float(row["test"]) for row in rows] == [bpc for c in result["cells"] for bpc in c["test"]]
    assert all(2 < float(row["test"]) < 7 for row in rows)
    readme = (finished / "README.md").read_text()
    assert all(line in readme for line in result["findings"])
    assert result["cells"][0]["test"] != result["cells"][1]["test"]
    assert not list(finished.rglob("*.part"))
    assert not list(finished.rglob("checkpoint.pt"))


def test_a_finished_run_is_only_reported_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = scores(finished)
    studies.run("capacity", {}, out=finished, resume=True)
    assert scores(finished) == before
    assert "Bits per character" in capsys.readouterr().out


def test_folders_are_not_mixed_up(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a run: go on with it by --resume"):
        studies.run("capacity", TINY, out=finished, quick=True)
    with pytest.raises(ValueError, match="holds a run with seeds=2, not 3; lr=0.01, not 0.02"):
        studies.run("capacity", {"lr": "0.02", "seeds": "3"}, out=finished, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        studies.run("capacity", {}, out=tmp_path / "none", resume=True)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        studies.run("capacity", TINY, out=tmp_path, quick=True)


@pytest.fixture(scope="session")
def config(tiny: dict[str, str]) -> Config:
    return capacity.prepare(options.parse(Config, tiny, capacity.QUICK))


@pytest.fixture(scope="session")
def whole_cell(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cell")
    cell.run(config, "fp8", 8, folder, lambda: False)
    return folder


def same_cell(one: Path, other: Path) -> bool:
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    return all(results[0][name] == results[1][name] for name in ("valid", "test", "updates", "symbols", "seeds"))


def test_a_cell_stopped_again_and_again(config: Config, whole_cell: Path, tmp_path: Path) -> None:
    calls = 0
    while not (tmp_path / "result.json").exists():
        asked = iter([False, *[False] * 29, *[True] * 5])
        cell.run(config, "fp8", 8, tmp_path, lambda asked=asked: next(asked))  # type: ignore[misc]
        calls += 1
    assert calls > 3
    assert same_cell(whole_cell, tmp_path)
    updates = [line["update"] for line in record.lines(tmp_path / "metrics.jsonl")]
    assert updates == [line["update"] for line in record.lines(whole_cell / "metrics.jsonl")]


def test_a_cell_on_a_full_disk(
    config: Config, whole_cell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, save = 0, record.save_checkpoint

    def fail_later(path: Path, state: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 5:
            full_disk(monkeypatch)
        save(path, state)

    monkeypatch.setattr(record, "save_checkpoint", fail_later)
    with pytest.raises(OSError, match="the disk is full"):
        cell.run(config, "fp8", 8, tmp_path, lambda: False)
    monkeypatch.undo()
    cell.run(config, "fp8", 8, tmp_path, lambda: False)
    assert same_cell(whole_cell, tmp_path)


def test_a_loss_that_is_not_finite_is_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no longer finite at update .*; try a smaller lr"):
        cell.run(replace(config, lr=1e30), "fp32", 8, tmp_path, lambda: False)


def test_a_time_limit_stops_cleanly(tiny: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    studies.run("capacity", {**tiny, "minutes": "0.001", "cells": "fp8-12"}, out=out, quick=True)
    said = capsys.readouterr().out
    assert "0 of 4 cells are done" in said
    assert not (out / "results.json").exists()


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "lowprec", "study", "capacity", "--out", str(folder), *words]
    # A shell ignores Ctrl-C in what it runs in the background, and so would every process from there on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def stopped(process: subprocess.Popen[str], folder: Path, sign: signal.Signals, group: bool) -> tuple[int, str]:
    """Send a signal to a run, or to all its processes, once it has saved and gone on; its exit code and output."""

    def progress() -> int:
        paths = [path for path in folder.glob("cells/*/metrics.jsonl") if path.with_name("checkpoint.pt").exists()]
        return sum(len(record.lines(path)) for path in paths)

    deadline, before = time.monotonic() + 120, None
    while before is None or progress() < before + 10:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
        before = before if before is not None else progress() or None
    os.killpg(process.pid, sign) if group else process.send_signal(sign)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_ctrl_c_and_kill_then_resume(tiny: dict[str, str], finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [f"{key}={value}" for key, value in tiny.items()]
    process = command(folder, "--quick", *settings, "workers=1")
    code, output = stopped(process, folder, signal.SIGINT, group=True)
    assert code == 130, output
    assert "4 cells are done; saved of the others:" in output
    assert "Traceback" not in output
    assert not (folder / "results.json").exists()
    code, _ = stopped(command(folder, "--resume", "workers=1"), folder, signal.SIGKILL, group=False)
    assert code == -signal.SIGKILL
    process = command(folder, "--resume")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert scores(folder) == scores(finished)


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    part = engine.Part("dies", tmp_path / "part", 1, die)
    with pytest.raises(ChildProcessError, match="was killed"):
        engine.run([part], 1, 0.0, engine.Console(quiet=True))


def die(folder: Path, stop: engine.Stop) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# What is said.


def fake_cells(config: Config, cost: float, slope: float, sigma: float) -> list[record.Json]:
    rng = np.random.default_rng(0)
    return [
        {
            "format": format,
            "width": width,
            "test": (2 + slope * math.log(width / 96) + cost * (format != "fp32") + rng.normal(0, sigma, 8)).tolist(),
        }
        for width in config.widths
        for format in config.formats
    ]


def test_findings_say_what_the_numbers_say() -> None:
    config = Config(widths=(96, 104), formats=("fp32", "fp8"))
    summary = summarise(config, fake_cells(config, cost=0.02, slope=-0.3, sigma=0.001))
    assert summary.width_needed("fp8").estimate == pytest.approx(math.exp(0.02 / 0.3) - 1, rel=0.1)
    width, cost, needed, claim = findings(summary)
    assert width.startswith("+8.6% width changes bits per character by -0.02")
    assert width.endswith("wider is better.")
    assert cost.startswith("fp8 changes bits per character by +0.019")
    assert cost.endswith("that is its cost.")
    assert needed.startswith("fp8 needs +6")
    assert "not shown" in claim
    free = summarise(config, fake_cells(config, cost=-math.log(1216 / 1120) * -0.3, slope=-0.3, sigma=0.0005))
    assert "equality within ±0.003 is shown" in findings(free)[3]


def test_one_width_has_no_slope() -> None:
    config = Config(widths=(96,), formats=("fp32", "fp8"))
    summary = summarise(config, fake_cells(config, 0.02, -0.3, 0.001))
    assert summary.fit is None
    assert "no slope" in findings(summary)[0]


def test_flat_parameters_are_views() -> None:
    layer = nn.ParameterList([torch.randn(2, 3, 4), torch.randn(2, 5)])
    expected = [p.clone() for p in layer]
    flat = train.flatten(list(layer))
    assert flat.shape == (2, 17)
    assert all(torch.equal(p, e) for p, e in zip(layer, expected, strict=True))
    flat.zero_()
    assert not any(p.any() for p in layer)


def test_every_setting_is_documented() -> None:
    def typed(value: Any) -> str:
        text = (
            ",".join(map(str, value))
            if isinstance(value, tuple)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
        return text.lower()

    page = (ROOT / "docs" / "studies.md").read_text().splitlines()
    for name, field in Config.__dataclass_fields__.items():
        row = next(line for line in page if line.startswith(f"| `{name}` |"))
        default, quick = (cell.strip() for cell in row.split("|")[2:4])
        assert default == {"data": "the embedded text", "cells": "all"}.get(name, typed(field.default))
        assert quick == typed(capacity.QUICK.get(name, ""))
