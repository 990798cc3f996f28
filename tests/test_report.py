"""What the report says beyond counts: noise, entropy, records, and what it writes for TensorBoard."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowprec as lp
from lowprec.policy import ROLES
from lowprec.report import Report, Row

X = torch.linspace(-3, 3, 60).reshape(10, 6)


def trained(policy: lp.Policy | str = "fp8", x: torch.Tensor = X) -> Report:
    torch.manual_seed(0)
    model = lp.wrap(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), policy)
    model(x).square().mean().backward()
    return lp.report(model)


def test_statistics_are_those_of_each_tensor() -> None:
    policy = lp.Policy.recipe("fp8")
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    (row,) = lp.report(_run(model, policy)).rows
    for role, x, fmt in (("activation", X, policy.activation), ("weight", model.weight, policy.weight)):
        found, count = lp.measure(x, fmt).numbers(), row.counts[role]  # type: ignore[arg-type]
        assert (count.elements, count.saturated, count.flushed) == (
            found["count"],
            found["saturated"],
            found["flushed"],
        )
        assert count.amax == found["amax"]
        assert [count.mean, count.std, count.sqnr_db, row.entropy(role)] == pytest.approx(
            [found["mean"], found["std"], found["sqnr_db"], found["code_entropy"]]
        )


def _run(model: nn.Module, policy: lp.Policy) -> nn.Module:
    lp.wrap(model, policy)(X).sum().backward()
    return model


def test_codes_are_counted_up_to_eight_bits() -> None:
    rows = trained(lp.Policy("bf16", "1-4-3", "1-2-1", None)).rows
    assert all(set(row.codes) == {"weight", "activation_grad"} for row in rows)
    assert [sum(row.codes["weight"]) for row in rows] == [24, 8]
    assert max(code for row in rows for code, n in enumerate(row.codes["activation_grad"]) if n) < 16
    assert math.isnan(rows[0].entropy("activation"))
    assert 0 < rows[0].entropy("weight") <= math.log2(24)


def test_counts_add_up_as_one_tensor_would() -> None:
    one, two = trained().rows
    both = one.counts["activation"] + two.counts["activation"]
    assert both.elements == 60 + 40
    assert both.amax == max(one.counts["activation"].amax, two.counts["activation"].amax)
    assert both.squares == one.counts["activation"].squares + two.counts["activation"].squares


def test_records_hold_everything() -> None:
    report = trained()
    records = report.records()
    assert [(r["path"], r["role"]) for r in records] == [(path, role) for path in ("0", "2") for role in ROLES]
    assert set(records[0]) == {
        *("path", "kind", "role", "format", "calls", "elements", "saturated", "flushed", "nan"),
        *("amax", "mean", "std", "sqnr_db", "code_entropy"),
    }
    assert records[0]["format"] == "1-4-3"


def test_frame_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="needs pandas"):
        trained().frame()


def test_frame_is_the_records() -> None:
    pytest.importorskip("pandas")
    report = trained()
    assert report.frame().to_dict("records") == report.records()


def test_nan_is_said() -> None:
    x = X.clone()
    x[0, :2] = math.nan
    assert "NaN: 2 in activation of 0; " in str(trained(x=x)).replace(", ", "; ")
    assert "NaN:" not in str(trained())


class Recorder:
    """What a SummaryWriter was told."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int | None]] = {}
        self.histograms: dict[str, dict[str, Any]] = {}

    def add_scalar(self, tag: str, value: float, step: int | None) -> None:
        assert tag not in self.scalars
        self.scalars[tag] = (value, step)

    def add_histogram_raw(self, tag: str, **histogram: Any) -> None:
        assert tag not in self.histograms
        self.histograms[tag] = histogram


def test_scalars_for_tensorboard() -> None:
    report, writer = trained(), Recorder()
    report.write(writer, 7)
    first = report.rows[0].counts["activation"]
    assert writer.scalars["lowprec/0/linear/activation/sqnr_db"] == (first.sqnr_db, 7)
    assert writer.scalars["lowprec/2/linear/weight/flushed_percent"] == (
        report.rows[1].counts["weight"].flushed_percent,
        7,
    )
    assert len(writer.scalars) == 2 * 4 * 8
    assert all(math.isfinite(value) for value, _ in writer.scalars.values())


def test_histograms_for_tensorboard() -> None:
    report, writer = trained(), Recorder()
    report.write(writer, 7, prefix="run")
    assert set(writer.histograms) == {f"run/{path}/{role}/codes" for path in "02" for role in ROLES}
    found = writer.histograms["run/0/weight/codes"]
    codes = report.rows[0].codes["weight"]
    places = [-(code - 128) if code >= 128 else code for code, n in enumerate(codes) for _ in range(n)]
    assert (found["min"], found["max"], found["num"]) == (min(places), max(places), 24)
    assert (found["sum"], found["sum_squares"]) == (sum(places), sum(place**2 for place in places))
    assert len(found["bucket_limits"]) == len(found["bucket_counts"]) == 255
    assert found["bucket_limits"] == sorted(found["bucket_limits"])
    assert found["global_step"] == 7


def test_nothing_is_written_of_what_did_not_run() -> None:
    writer = Recorder()
    lp.report(lp.wrap(nn.Sequential(nn.Linear(2, 2)), "fp8")).write(writer)
    assert not writer.scalars
    assert not writer.histograms


def test_tensorboard_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:  # type: ignore[no-untyped-call]
        trained().write(writer, 3)
    assert any(path.stat().st_size for path in tmp_path.iterdir())


def test_a_row_has_counts_without_codes() -> None:
    row = trained().rows[0]
    assert math.isnan(Row(row.path, row.kind, row.formats, row.calls, row.counts).entropy("weight"))
