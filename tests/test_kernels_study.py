"""The kernels study: a run that stops goes on, keeps its rows, and says what its times say."""

from __future__ import annotations

import csv
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import pytest

from lowprec import studies
from lowprec.studies import kernels, record
from lowprec.studies.kernels import measure
from lowprec.studies.kernels import work as works
from lowprec.studies.kernels.config import Config
from lowprec.studies.kernels.summary import Summary, as_json, findings

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "side": "64",
    "widenings": "1,2",
    "tokens": "4",
    "ops": "fprop,update",
    "kinds": "fp8",
    "blocks": "16,32",
    "repeats": "2",
    "rounds": "2",
    "device": "cpu",
}
"""Settings of a run of a second or two."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one width, then of the other."""
    folder = tmp_path_factory.mktemp("kernels") / "out"
    studies.run("kernels", {**TINY, "cells": "128"}, out=folder, quick=True)
    assert not (folder / "results.json").exists()
    studies.run("kernels", {"cells": ""}, out=folder, resume=True)
    return folder


def test_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "cells", "results.json", "results.csv", "README.md", "kernels.png"}
    assert (finished / "kernels.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "README.md").read_text()
    assert "](kernels.png)" in page
    assert all(line in page for line in record.read_json(finished / "results.json")["findings"])
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    products = 2 * 2 + 2  # two blocks, and the dense product, of fprop and update
    assert len(rows) == 2 * 2 * products
    assert {(row["width"], row["repeat"]) for row in rows} == {("64", "0"), ("64", "1"), ("128", "0"), ("128", "1")}


def test_sparse_layers_have_as_many_weights_as_the_dense_one(finished: Path) -> None:
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["flops"]) for row in rows if row["block"] != "0"} == {2 * 4 * 64**2}
    assert {int(row["flops"]) for row in rows if row["block"] == "0" and row["width"] == "128"} == {2 * 4 * 128**2}


def test_a_width_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(works, "PAST_CACHE", 1 << 22)
    monkeypatch.setattr(measure, "time_in_rounds", _fake_times)
    words = {"side": 64, "tokens": (4,), "ops": ("fprop",), "kinds": ("fp32",), "blocks": (16,), "repeats": 3}
    config = Config(**words, rounds=1, device="cpu", widenings=(1.0, 2.0))
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) > 1

    measure.run(config, 2.0, tmp_path, stop)
    assert not (tmp_path / "result.json").exists()
    metrics = tmp_path / "metrics.jsonl"
    first = record.lines(metrics)[0]
    metrics.write_bytes(metrics.read_bytes() + b'{"update": 2, "ro')  # the line of a run that was killed
    measure.run(config, 2.0, tmp_path, lambda: False)
    assert record.lines(metrics)[0] == first
    result = record.read_json(tmp_path / "result.json")
    assert [row["repeat"] for row in result["rows"]] == [0, 0, 1, 1, 2, 2]


def _fake_times(calls: dict[str, Callable[[int], object]], *how: Any) -> dict[str, Any]:
    from lowprec.timing import Seconds

    return {name: Seconds(1.0, 1.0, 1.0, 1) for name in calls}


# What the numbers say.


def _summary(seconds: Callable[[int, int, int], float], repeats: int = 3) -> Summary:
    """Of fprop at widths 64, 128 and 256, from the seconds of a block (0: dense), a widening and a repeat."""
    config = Config(side=64, widenings=(1.0, 2.0, 4.0), tokens=(8,), ops=("fprop",), kinds=("fp8",), blocks=(16,))

    def row(block: int, widening: int, repeat: int) -> record.Json:
        where = {"op": "fprop", "kind": "fp8" if block else "bf16", "tokens": 8, "block": block, "repeat": repeat}
        return where | {"flops": 1e9, "seconds": seconds(block, widening, repeat)}

    cells = [
        {
            "width": 64 * widening,
            "widening": widening,
            "device": "cpu",
            "rows": [row(block, widening, r) for r in range(repeats) for block in (16, 0)],
        }
        for widening in (1, 2, 4)
    ]
    return Summary(config, cells)


def test_speeds_and_their_growth() -> None:
    noise = (0.99, 1.0, 1.01)
    summary = _summary(lambda block, w, r: noise[r] * (w**2 if not block else 2.0 * w**-0.5))
    [curve] = summary.curves
    assert curve.speed[1].estimate == pytest.approx(1e9 / 2 * 2**0.5, rel=1e-3)
    assert curve.speed[1].low < curve.speed[1].estimate < curve.speed[1].high
    assert curve.doubling is not None
    assert log2(curve.doubling.estimate) == pytest.approx(0.5)
    assert [ratio.estimate for ratio in curve.of_dense] == pytest.approx([0.5, 4 / 2**0.5, 16.0])
    assert curve.dense == pytest.approx([1e9, 1e9 / 4, 1e9 / 16], rel=1e-3)
    [line] = findings(summary)
    assert line == (
        "fprop, fp8, N = 8: speed grows with width for b = 16; faster than a dense layer from 25% down for b = 16."
    )


def test_findings_claim_no_more_than_the_intervals_show() -> None:
    [flat] = findings(_summary(lambda block, w, r: 1.0 + (0.3 * r if block and w < 4 else 0.0)))
    assert "no change of speed is shown for b = 16" in flat
    assert "not shown to be faster than a dense layer for b = 16" in flat
    [falling] = findings(_summary(lambda block, w, r: (1.0 + 0.001 * r) * w))
    assert "speed falls with width for b = 16" in falling
    [once] = as_json(_summary(lambda block, w, r: 1.0 * w, repeats=1))["curves"]
    assert once["speed"][0]["high"] is None
    assert once["faster_from"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"blocks": "12"}, "blocks must be among 8, 16, 32, 64"),
        ({"widenings": "2,1"}, "widenings must be ascending"),
        ({"pattern": "small_world"}, "pattern must be one of"),
        ({"side": "100"}, "side must be so that blocks of 32 divide every width"),
        ({"cells": "65"}, "cells must be among 64, 128"),
        ({"kinds": "int8"}, "kinds must be among bf16, fp32, fp8"),
    ],
)
def test_wrong_settings(words: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        studies.run("kernels", {**TINY, **words}, out=tmp_path / "out", quick=True)


def test_it_is_listed() -> None:
    assert ("kernels", kernels.QUESTION) in studies.names()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    studies.run("kernels", {**TINY, "side": "256", "tokens": "64", "device": "cuda"}, out=tmp_path / "out")
    assert record.read_json(tmp_path / "out" / "results.json")["widths"] == [256, 512]
