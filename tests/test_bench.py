"""Benches: records are whole and agree with themselves, rows are right, wrong words get one line."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

import lowprec as lp
from lowprec import benches, timing
from lowprec.benches import casts
from lowprec.benches.casts import cases, peers, report
from lowprec.benches.casts.buffers import Buffers
from lowprec.benches.twin import EagerTwin
from lowprec.cli import app

SMALL = 1 << 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    """The rows of ours and of torch, quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(casts, "SAMPLE", SMALL)
        patch.setattr(peers, "PEERS", {"ml_dtypes": peers.PEERS["ml_dtypes"], "none": ("none", _absent)})
        return benches.run("casts", benches.Settings(folder, ("cpu",), quick=True, elements=SMALL))


def _absent() -> Any:
    raise ModuleNotFoundError("No module named 'none'")


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})


def test_every_row_is_there_and_none_is_wrong(record: dict[str, Any]) -> None:
    names = [case.name for case in (*peers._torch(), *peers._ml_dtypes(), *cases.ours())]
    assert len(set(names)) == len(names)
    assert record["ok"]
    assert [run["threads"] for run in record["runs"]] == sorted({1, torch.get_num_threads()})
    for run in record["runs"]:
        assert [row["row"] for row in run["rows"]] == names
        assert run["failed"] == {}
        assert run["elements"] == SMALL


def test_the_numbers_belong_together(record: dict[str, Any]) -> None:
    for run in record["runs"]:
        copy = next(row for row in run["rows"] if row["row"] == "copy fp32")
        assert copy["of_copy"] == 1
        for row in run["rows"]:
            assert 0 < row["low"] <= row["seconds"] <= row["high"]
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
            assert row["melem_per_s"] == pytest.approx(SMALL / row["seconds"] / 1e6)
            assert row["of_copy"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"])
            assert (row["target"] is None) == (row["met"] is None) == (row["unit"] is None)
            assert row["met"] is None or row["met"] == (row[row["unit"]] >= row["target"])
            assert row["by"] == "lowprec" or row["target"] is None


def test_targets_are_those_of_the_cpu(record: dict[str, Any]) -> None:
    for run in record["runs"]:
        rows = {row["row"]: row for row in run["rows"]}
        cores = min(run["threads"], 2)
        assert rows["quantize fp32 to 1-4-3"]["target"] == 350 * cores
        assert rows["quantize bf16 to 1-4-3, stochastic 8"]["target"] == 225 * cores
        cast = rows["torch cast bf16 to e4m3fn"]["melem_per_s"]
        assert rows["encode bf16 to e5m2"]["target"] == pytest.approx(0.8 * cast)
        assert rows["decode e4m3fn to fp32"]["target"] is None


def test_targets_on_a_gpu_are_shares_of_the_copy() -> None:
    every = [*peers._torch(), *cases.ours()]
    seconds = {case.name: timing.Seconds(1.0, 1.0, 1.0, 3) for case in every}
    rows = {row["row"]: row for row in report.rows(every, seconds, {"device": "cuda:0", "elements": 8, "threads": 1})}
    assert rows["quantize bf16 to 1-0-7"]["target"] == rows["decode e4m3fn to bf16"]["target"] == 0.92
    assert rows["encode fp32 to e4m3fn, stochastic 32"]["target"] == 0.85
    assert rows["quantize bf16 to 1-0-7"]["of_copy"] == 0.5


def test_files(record: dict[str, Any], folder: Path) -> None:
    assert json.loads((folder / "results.json").read_text()) == record
    with Image.open(folder / "casts.png") as picture:
        assert picture.size[0] > 500
    page = (folder / "README.md").read_text()
    assert all(f"| {row['row']} |" in page for run in record["runs"] for row in run["rows"])
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(run["rows"]) for run in record["runs"])
    assert float(rows[0]["seconds"]) == record["runs"][0]["rows"][0]["seconds"]


def test_the_table_fits_and_names_what_is_missing(record: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    missed = copy.deepcopy(record)
    for row in (row for run in missed["runs"] for row in run["rows"] if row["target"]):
        row |= {"target": 2755.0, "unit": "melem_per_s", "met": False}
    benches.show("casts", missed, Path("there"), console)
    text = console.export_text()
    assert "…" not in text
    assert "none: not installed" in text
    for run in record["runs"]:
        assert all(row["row"] in text for row in run["rows"])


def test_a_wrong_row_is_not_timed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(buffers: Buffers) -> timing.Call:
        return lambda i: lp.quantize(buffers.inputs(torch.float32)[0], "1-4-3" if twins[-1] else "1-4-2")

    twins = [False]
    monkeypatch.setattr(EagerTwin, "__enter__", lambda self: twins.append(True))
    monkeypatch.setattr(EagerTwin, "__exit__", lambda self, *error: twins.append(False))
    calls, failed = casts._prepare([cases.Case("bad", "quantize", 8, make)], Buffers(torch.device("cpu"), SMALL))
    assert calls == {}
    assert re.match(r"AssertionError: wrong result: .* differs in \d+ of 65536 elements", failed["bad"])


def test_the_twin_runs_our_operators_eagerly() -> None:
    x = torch.randn(100)
    with EagerTwin():
        values = lp.quantize(x, "1-4-3", rounding="stochastic", seed=5)
    assert torch.equal(values, lp.quantize(x, "1-4-3", rounding="stochastic", seed=5))


def test_slow_calls_leave_early(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def taking(seconds: float) -> timing.Call:
        def call(i: int) -> None:
            now[0] += seconds

        return call

    seconds = timing.time_in_rounds({"slow": taking(2.0), "quick": taking(0.5)}, torch.device("cpu"), 9, budget=3.0)
    assert (seconds["slow"].rounds, seconds["quick"].rounds) == (3, 6)
    assert (seconds["slow"].median, seconds["quick"].median) == (2.0, 0.5)


def test_inputs_are_rotated_past_the_cache() -> None:
    buffers = Buffers(torch.device("cpu"), 1 << 22)
    inputs = buffers.inputs(torch.bfloat16)
    assert len({x.data_ptr() for x in inputs}) == len(inputs) == 8
    assert sum(x.nbytes for x in Buffers(torch.device("cpu"), 1 << 24).inputs(torch.float32)) >= 128 << 20


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    settings = benches.Settings(tmp_path, ("cuda",), quick=True, elements=1 << 20)
    result = benches.run("casts", settings)
    assert result["ok"], [run["failed"] for run in result["runs"]]
    assert len(result["runs"]) == torch.cuda.device_count()


# The command.


def test_only_some_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casts, "ELEMENTS", {"cpu": (SMALL, SMALL)})
    monkeypatch.setattr(casts, "SAMPLE", SMALL)
    monkeypatch.setattr(peers, "PEERS", {})
    done = call("casts", "--quick", "--device", "cpu", "--only", "decode*", "--out", str(tmp_path / "new"), "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "new" / "results.json").read_text())
    decoding = [row["row"] for row in printed["runs"][0]["rows"] if row["by"] == "lowprec"]
    assert decoding
    assert all(name.startswith("decode") for name in decoding)


def test_benches_are_listed() -> None:
    assert "casts" in call("list").stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["cast"], ["unknown bench 'cast'", "casts"]),
        (["casts", "--device", "tpu"], ["device must be one of cpu, cuda, got 'tpu'"]),
        (["casts", "--only", "nothing like it"], ["no row matches 'nothing like it'"]),
    ],
)
def test_wrong_words(words: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", {})
    done = call(*words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert all(part in done.stderr for part in parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_cuda_device() -> None:
    done = call("casts", "--device", "cuda")
    assert done.exit_code == 2
    assert "no CUDA device" in done.stderr


def test_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(settings: benches.Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(casts, "run", interrupt)
    done = call("casts", "--out", str(tmp_path))
    assert done.exit_code == 130
    assert "stopped" in done.stderr
