"""`lowprec bench accumulate`: records agree with themselves, rows are right, what is missing is said."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from lowprec import benches, timing
from lowprec.benches import accumulate, running
from lowprec.benches.accumulate import cases, floor, peers, report
from lowprec.benches.accumulate.operands import Operands, Size
from lowprec.testing import assert_bits_equal

EDGE = 24

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    """The rows of ours and of torch, quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate, "SAMPLE", Size(5, 6, 9))
        patch.setattr(peers, "PEERS", {"none": ("none", _absent)})
        return benches.run("accumulate", benches.Settings(folder, ("cpu",), quick=True, elements=EDGE**2))


def _absent() -> Any:
    raise ModuleNotFoundError("No module named 'none'")


def test_every_row_is_there_or_said_to_be_missing(record: dict[str, Any]) -> None:
    every = [*peers.torchs(), *cases.ours()]
    names = [case.name for case in every if "cpu" in case.devices]
    assert len(set(names)) == len(names)
    assert record["ok"], record["runs"][0]["failed"]
    for run in record["runs"]:
        assert run["failed"] == {}
        assert [name for name in names if name not in run["missing"]] == [row["row"] for row in run["rows"]]
        assert all("tensor_core" in name for name in run["missing"])


def test_the_numbers_belong_together(record: dict[str, Any]) -> None:
    for run in record["runs"]:
        dense = next(row for row in run["rows"] if row["row"] == peers.DENSE)
        assert dense["of_dense"] == 1
        for row in run["rows"]:
            assert row["terms"] == EDGE ** (2 if "sum" in row["row"] else 3)
            assert 0 < row["low"] <= row["seconds"] <= row["high"]
            assert row["rate"] == pytest.approx(row["terms"] / row["seconds"])
            assert row["of_dense"] is None or row["of_dense"] == pytest.approx(row["rate"] / dense["rate"])
            assert (row["target"] is None) == (row["met"] is None)
            assert row["met"] is None or row["met"] == (row["rate"] >= row["target"])
            assert row["by"] == "lowprec" or row["target"] is None


def test_targets() -> None:
    every = [case for case in (*peers.torchs(), *cases.ours()) if case.shrink == 1]
    seconds = {case.name: timing.Seconds(1.0, 1.0, 1.0, 3) for case in every}
    size = [100, 100, 100]
    gpu = {"device": "cuda:0", "threads": 1, "size": size, "issue_rate": 33.45e12}
    rows = {row["row"]: row for row in report.rows(every, seconds, gpu)}
    assert rows["1-6-9, fp32"]["target"] == 2.4e12
    assert rows["1-6-9, fp8"]["target"] == 3.5e12
    assert rows["1-6-9, fp32"]["floor"] == 33.45e12 / floor.INSTRUCTIONS["rare ties"]
    assert rows["bf16, bf16"]["target"] == 20e12
    assert rows["1-6-9 stochastic, fp8"]["target"] == 1.5e12
    assert rows["tensor_core64:1-6-9, bf16"]["target"] == 0.5 * 1e6
    assert rows["tensor_core64:1-6-9, bf16"]["met"]
    cpu = gpu | {"device": "cpu", "threads": 4, "issue_rate": None}
    rows = {row["row"]: row for row in report.rows(every, seconds, cpu)}
    assert rows["1-6-9, fp32"]["target"] == 4e9
    assert rows["1-6-9, fp32"]["floor"] is None
    assert rows["bf16, bf16"]["target"] is None


def test_a_smaller_row_counts_its_own_terms() -> None:
    case = cases.Case("peer", "none", lambda operands: lambda i: None, by="peer", shrink=4)
    operands = Operands(torch.device("cpu"), Size(64, 32, 10))
    a, b = operands.smaller(case.shrink).pair("fp32")
    assert case.terms(operands.size) == a.shape[0] * b.shape[1] * a.shape[1] == 16 * 8 * 10


def test_operands_are_what_they_are_called() -> None:
    operands = Operands(torch.device("cpu"), Size(40, 30, 50))
    a, b = operands.pair("fp8")
    tiny, small = operands.pair("tiny")
    assert_bits_equal(tiny, a * 2.0**-18)
    assert float((tiny @ small).abs().median()) < 2.0**-30, "the smallest normal of 1-6-9"
    assert b.dtype == torch.float32
    assert operands.pair("e4m3fn")[0].dtype == torch.float8_e4m3fn


def test_files(record: dict[str, Any], folder: Path) -> None:
    assert json.loads((folder / "results.json").read_text()) == record
    with Image.open(folder / "accumulate.png") as picture:
        assert picture.size[0] > 500
    page = (folder / "README.md").read_text()
    assert all(f"| {row['row']} |" in page for run in record["runs"] for row in run["rows"])
    assert all(name in page for run in record["runs"] for name in run["missing"])
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["seconds"]) == record["runs"][0]["rows"][0]["seconds"]


def test_the_table_fits_and_names_what_is_missing(record: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    slow = copy.deepcopy(record)
    for row in (row for run in slow["runs"] for row in run["rows"] if row["target"]):
        row |= {"met": False, "of_floor": 0.123, "rate": 1.23e9, "seconds": 12.3456}
    slow["runs"][0]["missing"] = {"tensor_core64:1-6-9, bf16": "NotImplementedError: not on a CPU"}
    benches.show("accumulate", slow, Path("there"), console)
    text = console.export_text()
    assert "…" not in text
    assert "none: not installed" in text
    assert "tensor_core64:1-6-9, bf16: not there (NotImplementedError" in text


def test_what_is_absent_is_no_failure_and_what_is_wrong_is() -> None:
    def raising(error: Exception) -> Any:
        def make(operands: Operands) -> timing.Call:
            raise error

        return make

    rows = [
        cases.Case("absent", "none", raising(NotImplementedError("no such leaves"))),
        cases.Case("wrong", "none", raising(AssertionError("differs in 3 elements"))),
    ]
    none = Operands(torch.device("cpu"), Size(1, 1, 1))
    calls, failed, missing = running.prepare(rows, lambda row: None, lambda row: row.make(none), accumulate.ABSENT)
    assert calls == {}
    assert failed == {"wrong": "AssertionError: differs in 3 elements"}
    assert missing == {"absent": "NotImplementedError: no such leaves"}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    result = benches.run("accumulate", benches.Settings(tmp_path, ("cuda",), quick=True, elements=256**2))
    assert result["ok"], [run["failed"] for run in result["runs"]]
    assert all(run["issue_rate"] for run in result["runs"])
