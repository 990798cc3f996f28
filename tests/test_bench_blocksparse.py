"""`lowprec bench blocksparse`: rows are what they are called, records agree with themselves, failures show."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import lowprec as lp
from lowprec import benches, timing
from lowprec.benches import blocksparse
from lowprec.benches.blocksparse import cases, check, limits, peers, report, targets
from lowprec.benches.blocksparse.cases import PATTERN, Case
from lowprec.studies.kernels import work as works
from lowprec.studies.kernels.work import BACKWARD, DENSE, FORWARD, Operands, Pool, Work, call_of, dense_call
from lowprec.testing import assert_bits_equal

SIDE = 128
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread", "small_pool")

PAST_CACHE = works.PAST_CACHE


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "PAST_CACHE", 1 << 22)


@pytest.fixture(scope="module")
def small() -> Any:
    """Few and small rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "BLOCKS", (16, 64))
        patch.setattr(cases, "KINDS", ("bf16", "fp32"))
        for name in ("TOKENS", "ENDS"):
            patch.setattr(cases, name, (4,))
        patch.setattr(check, "TOKENS", 3)
        patch.setattr(works, "PAST_CACHE", 1 << 22)
        patch.setattr(limits, "PAST_CACHE", 1 << 20)
        patch.setattr(limits, "EDGES", {"cpu": 32})
        patch.setattr(blocksparse, "QUICK_ROUNDS", 3)
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def _absent(works: object) -> Any:
    raise ModuleNotFoundError("No module named 'none'")


def _broken(works: dict[Work, bool]) -> Any:
    def make(operands: Operands) -> timing.Call:
        raise RuntimeError("no such kernel")

    yield Case(next(iter(works)), make, "broken", essential=True)


@pytest.fixture(scope="module")
def record(folder: Path, small: pytest.MonkeyPatch) -> dict[str, Any]:
    """The essential rows, with a peer that is not there and one that fails."""
    small.setattr(peers, "PEERS", {"none": ("none", _absent), "broken": ("torch", _broken)})
    return benches.run("blocksparse", benches.Settings(folder, ("cpu",), quick=True, elements=SIDE**2))


# Rows.


def test_rows_have_names_of_their_own_and_what_they_are_measured_by() -> None:
    ours = cases.ours()
    every = [*ours, *peers._torchs({case.work: case.essential for case in ours})]
    names = {case.name: case for case in every}
    assert len(names) == len(every)
    assert targets.beside(ours) <= set(names)
    essential = [case for case in ours if case.essential]
    assert all(names[name].essential for name in targets.beside(essential))


def test_rows_are_those_that_targets_are_about() -> None:
    essential = {case.work for case in cases.ours() if case.essential}
    for op, block, tokens, kind in product(cases.PRODUCTS, cases.BLOCKS, cases.ENDS, cases.KINDS):
        densities = {w.density for w in essential if (w.op, w.block, w.tokens, w.kind) == (op, block, tokens, kind)}
        assert densities == {"100%", "25%", "11%", "3.3%"}
    every = {case.work for case in cases.ours()}
    assert {work.pattern for work in every} == {DENSE, *cases.SHORT}
    assert {work.tokens for work in every} == {64, 128, 512}


def test_layers_have_equally_many_weights() -> None:
    for block, pattern in product((8, 64), cases.SHORT):
        layout = Work("fprop", "bf16", "last", block, 64, 5.5, pattern).layout(512)
        assert (layout.inputs, layout.blocks * block**2) == (2816, 512**2)
    assert Work("fprop", "bf16", "last", 128, 128, 2.0, PATTERN).layout(512).mask[:2, :2].all()


@pytest.mark.parametrize("features", ["last", "first"])
@pytest.mark.parametrize("op", works.OPS)
def test_a_call_computes_what_its_name_says(op: str, features: str) -> None:
    operands = Operands(Work(op, "fp32", features, 8, 3, 1.0, "sample"), check.sample(8), Pool(CPU))
    layout, last = operands.layout, features == "last"
    w = layout.to_dense(operands.w(1)).double()
    pairs = [works.pair(operands, i) for i in _numbers(op)]
    rows = [tuple(t.double() if last else t.T.double() for t in pair) for pair in pairs]
    x, dy = rows[0]
    expected = {"fprop": lambda: x @ w, "bprop": lambda: dy @ w.T}.get(op)
    if expected is None:
        result = call_of(operands)(1)
        dw = layout.from_dense(sum(x.T @ dy for x, dy in rows))
        torch.testing.assert_close(result, dw.float(), rtol=1e-5, atol=1e-5)
    else:
        y = expected() if last else expected().T
        torch.testing.assert_close(call_of(operands)(1), y.float(), rtol=1e-5, atol=1e-5)


def _numbers(op: str) -> range:
    return range(8, 16) if "8" in op else range(1, 2)


@pytest.mark.parametrize("features", ["last", "first"])
@pytest.mark.parametrize("op", cases.PRODUCTS)
def test_dense_products_are_those_of_equal_operands(op: str, features: str) -> None:
    work = Work(op, "fp32", features, 8, 3, 1.0, DENSE)
    operands = Operands(work, work.layout(16), Pool(CPU))
    layout = operands.layout
    dense = dense_call(operands)(0)
    if op == "update":
        torch.testing.assert_close(layout.from_dense(dense), call_of(operands)(0))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operands, "w", lambda self, i: layout.from_dense(self.dense(i)))
        torch.testing.assert_close(dense, call_of(operands)(0))


def test_codes_are_of_the_formats_that_are_named() -> None:
    work = Work("fprop", "fp8", "last", 8, 3, 1.0, "sample")
    operands = Operands(work, check.sample(8), Pool(CPU))
    y = call_of(operands)(0)
    assert y.dtype == torch.uint8
    x, w = lp.decode(operands.x(0), FORWARD), operands.layout.to_dense(lp.decode(operands.w(0), FORWARD))
    assert_bits_equal(y, lp.encode(x @ w, FORWARD))
    assert float(lp.decode(operands.dy(0), BACKWARD).abs().max()) <= lp.format(BACKWARD).max


def test_operands_are_rotated_past_the_cache() -> None:
    work = Work("fprop", "bf16", "last", 64, 64, 5.5, PATTERN)
    operands = Operands(work, work.layout(512), Pool(CPU))
    count = works.PAST_CACHE // operands.w(0).nbytes
    assert len({operands.w(i).data_ptr() for i in range(count)}) == count
    assert operands.w(count).data_ptr() == operands.w(0).data_ptr()
    assert count >= 8
    assert PAST_CACHE > 100e6, "more than the second-level cache of an H100 holds twice over"


def test_a_pool_keeps_what_it_outgrows() -> None:
    pool = Pool(CPU)
    before = pool.take("bf16", (4,), 0)
    grown = pool.take("bf16", (works.PAST_CACHE // 2 + 1,), 0)
    assert before.untyped_storage().data_ptr() != grown.untyped_storage().data_ptr()
    assert pool._outgrown[0].data_ptr() == before.data_ptr()


def test_bytes_and_operations() -> None:
    def of(op: str, kind: str) -> tuple[int, int]:
        work = Work(op, kind, "last", 64, 64, 2.0, PATTERN)
        layout = work.layout(512)
        return work.flops(layout), work.bytes(layout)

    weights, tokens = 512**2, 64 * 2 * 1024
    assert of("fprop", "bf16") == (2 * 64 * weights, 2 * (weights + tokens))
    assert of("bprop", "fp8") == (2 * 64 * weights, weights + tokens)
    assert of("update", "fp8") == (2 * 64 * weights, 2 * weights + tokens)
    assert of("update of 8", "bf16") == of("8 updates", "bf16") == (16 * 64 * weights, 4 * weights + 16 * tokens)


# What a row is held to.


def test_targets() -> None:
    def goal(work: Work, device: str = "cuda:0", **seconds: float) -> Any:
        names = {
            "dense": targets.dense_name(work),
            "bsr": targets.bsr_name(work),
            "sibling": targets._sibling(work)[1],
        }
        return targets.target(work, {str(names[key]): value for key, value in seconds.items()}, device)

    work = Work("fprop", "bf16", "last", 64, 64, 5.5, PATTERN)
    assert goal(work) == (14e-6, "14 µs")
    assert goal(work, dense=9e-6, bsr=10e-6) == (9e-6, "dense")
    assert goal(replace(work, tokens=512, block=8), dense=1e-5) == (1e-5, "dense")
    assert goal(replace(work, tokens=512, block=8, widening=3.0), dense=1e-5) is None
    assert goal(replace(work, tokens=512, block=32, widening=3.0), dense=1e-5) == (1e-5, "dense")
    assert goal(replace(work, kind="fp8"), sibling=1.0) == (0.7, "0.7 bf16")
    assert goal(replace(work, op="update"), sibling=1.0, bsr=1.2) == (1.2, "torch BSR")
    assert goal(replace(work, op="update", block=8), sibling=1.0) == (1.3, "1.3 fprop")
    assert goal(replace(work, op="update of 8"), sibling=3.0) == (2.0, "eight calls / 1.5")
    assert goal(replace(work, op="8 updates"), sibling=3.0) is None
    assert goal(replace(work, kind="fp32"), "cpu", dense=1.0, bsr=2.0) == (2.0, "torch BSR")


def test_floors() -> None:
    found = {"copy": 2e12, "bf16": 500e12}
    assert limits.floor(found, "bf16", 10**9, 10**9) == 10**9 / 2e12
    assert limits.floor(found, "fp8", 1, 10**15) == 2.0
    assert limits.floor({}, "bf16", 1, 1) is None


def test_limits_are_measured(small: object) -> None:
    found = limits.measured_limits(CPU)
    assert set(found) == {"copy", "bf16", "fp32"}
    assert all(rate > 0 for rate in found.values())


def test_a_wrong_product_fails_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lp.sparse.matmul
    results: list[Any] = []

    def wrong(*args: Any, **how: Any) -> Any:
        results.append(right(*args, **how))
        return results[-1] * (1 if len(results) == 1 else 2)  # the twin is asked first

    monkeypatch.setattr(lp.sparse, "matmul", wrong)
    checks = check.Checks(CPU)
    row = Case(Work("fprop", "fp32", "last", 8, 64, 1.0, DENSE))
    for _ in range(2):
        with pytest.raises(AssertionError, match="wrong result"):
            checks(row)
    assert len(results) == 2


def test_sums_of_a_device_may_differ_by_a_rounding() -> None:
    y = torch.randn(1000).bfloat16().double()
    check._assert_close(y * (1 + 2.0**-8), y, check.STEPS["bf16"])
    with pytest.raises(AssertionError, match="wrong result: off by"):
        check._assert_close(y * 1.1, y, check.STEPS["bf16"])


# The record.


def test_every_row_is_there_or_said_to_be_missing(record: dict[str, Any]) -> None:
    assert record["ok"], record["runs"][0]["failed"]
    names = {case.name for case in cases.ours() if case.essential}
    for run in record["runs"]:
        assert names <= {row["row"] for row in run["rows"]}
        assert [name.split()[0] for name in run["failed"]] == ["broken"]
        assert set(run["failed"].values()) == {"RuntimeError: no such kernel"}
        assert all(name.startswith("BSR update") for name in run["missing"])
    assert record["peers"]["none"] == "not installed (No module named 'none')"


def test_the_numbers_belong_together(record: dict[str, Any]) -> None:
    for run in record["runs"]:
        rows = {row["row"]: row for row in run["rows"]}
        assert len(rows) == len(run["rows"])
        for row in run["rows"]:
            assert 0 < row["low"] <= row["seconds"] <= row["high"]
            assert row["flops_per_s"] == pytest.approx(row["flops"] / row["seconds"])
            assert row["of_floor"] == pytest.approx(row["floor"] / row["seconds"])
            assert (row["target"] is None) == (row["met"] is None) == (row["reason"] is None)
            assert row["met"] is None or row["met"] == (row["seconds"] <= row["target"])
            assert row["by"] == "lowprec" or row["target"] is None
            dense = rows.get(f"dense {row['op']} {row['kind']} {row['features']} {row['density']} N=4")
            if row["by"] == "lowprec" and row["kind"] != "fp8" and dense:
                assert row["of_dense"] == pytest.approx(dense["seconds"] / row["seconds"])
            assert row["width"] in (SIDE, 2 * SIDE, 3 * SIDE, 5.5 * SIDE)


def test_files(record: dict[str, Any], folder: Path) -> None:
    assert json.loads((folder / "results.json").read_text()) == record
    with Image.open(folder / "blocksparse.png") as picture:
        assert picture.size[0] > 500
    page = (folder / "README.md").read_text()
    assert "RuntimeError: no such kernel" in page
    lines = sum(len(run["rows"]) + len(run["failed"]) for run in record["runs"])
    assert page.count("\n| ") == lines + 2 * page.count("\n### ")
    assert "| failed |" in page
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["seconds"]) == record["runs"][0]["rows"][0]["seconds"]


def test_the_table_fits_and_names_what_is_missing(record: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    slow = copy.deepcopy(record)
    run = slow["runs"][0]
    run["rows"][1] |= {"of_bsr": None, "failed_beside": ["of_bsr"]}
    for row in run["rows"]:
        row |= {"seconds": 12.345e-3, "of_dense": 123.4, "of_floor": 0.012, "flops_per_s": 123.4e9}
        row |= {"target": 12.34e-3, "met": False}
    run["rows"][0]["row"] = "update of 8 bf16 first b=16 random 100% N=4"
    benches.show("blocksparse", slow, Path("there"), console)
    text = console.export_text()
    assert "…" not in text
    assert "no such kernel" in text
    assert "none: not installed" in text


def test_many_rows_are_told_briefly(record: dict[str, Any]) -> None:
    run = copy.deepcopy(record["runs"][0])
    extra = [run["rows"][0] | {"row": f"more {i}", "essential": False} for i in range(report.MANY)]
    run["rows"] += extra
    assert len(report.shown(run)) == len(run["rows"]) - len(extra)
    assert f"{len(extra)} further rows: results.csv" in list(report._remarks(run))


def test_only_some_rows_and_what_they_are_measured_by(
    tmp_path: Path, small: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", {})
    settings = benches.Settings(tmp_path, ("cpu",), quick=True, elements=SIDE**2, only="fprop fp32 last b=16 BA 25% *")
    found = {row["row"] for row in benches.run("blocksparse", settings)["runs"][0]["rows"]}
    row = "fprop fp32 last b=16 BA 25% N=4"
    assert found == {row, "dense fprop fp32 last 25% N=4", f"BSR {row}"}


def test_a_device_that_fails_ends_no_run(
    tmp_path: Path, small: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setattr(blocksparse.running, "timed", fail)
    settings = benches.Settings(tmp_path, ("cpu",), quick=True, elements=SIDE**2, only="update bf16 last b=64 BA *")
    result = benches.run("blocksparse", settings)
    assert not result["ok"]
    assert set(result["runs"][0]["failed"].values()) == {"RuntimeError: the device is gone"}
    assert "the device is gone" in (tmp_path / "README.md").read_text()


def test_a_replay_counts_as_many_calls_as_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Mark:
        def __init__(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    def calling(turn: int) -> None:
        now[0] += 1.0  # milliseconds

    class Graph:
        def replay(self) -> None:
            now[0] += 30.0

    monkeypatch.setattr(timing, "_mark", Mark)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    graph: Any = Graph()
    calls = {"plain": calling, "graph": timing.Captured(graph, 10, calling)}
    seconds = timing.time_in_rounds(calls, torch.device("cuda"), 3, budget=1.0)
    assert seconds["plain"].median == pytest.approx(1e-3)
    assert seconds["graph"].median == pytest.approx(3e-3)


def test_the_cpu_captures_nothing() -> None:
    def call(i: int) -> None:
        raise AssertionError("not called")

    assert timing.captured(call, CPU) is call


def test_what_has_no_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    blocksparse._require_quick(lambda i: None, CPU)
    with pytest.raises(TimeoutError, match=r"a call takes 0\.\d+ s: left out"):
        blocksparse._require_quick(lambda i: time.sleep(blocksparse.SLOW * 1.2), CPU)


# On a GPU.


@pytest.mark.gpu
def test_calls_are_captured_in_graphs() -> None:
    device = torch.device("cuda", 0)
    x = torch.zeros(4, device=device)
    call = timing.captured(lambda i: x.add_(1), device)
    assert isinstance(call, timing.Captured)
    before = x.clone()
    call(0)
    assert torch.equal(x, before + call.count)
    with pytest.raises(RuntimeError):
        timing.captured(lambda i: x.sum().item(), device)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "TOKENS", (64,))
    monkeypatch.setattr(cases, "ENDS", (64,))
    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setattr(peers, "BSR_DEVICES", {"bf16": (), "fp32": ()})  # Triton compiles for long
    settings = benches.Settings(tmp_path, ("cuda",), quick=True, elements=SIDE**2)
    result = benches.run("blocksparse", settings)
    assert result["ok"], [run["failed"] for run in result["runs"]]
    ours = [row for run in result["runs"] for row in run["rows"] if row["by"] == "lowprec"]
    assert all(row["graph"] for row in ours)
