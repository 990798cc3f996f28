"""The accumulation study and its theory: bounds hold, laws are near, and a run says what its numbers say."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowprec as lp
from lowprec import studies
from lowprec.accumulator import Accumulator, Level
from lowprec.reference_accumulate import accumulate, term
from lowprec.rounding import Rounding
from lowprec.studies import accumulation, data, record
from lowprec.studies.accumulation import sums
from lowprec.studies.accumulation.config import Config
from lowprec.studies.accumulation.summary import Summary, findings
from lowprec.studies.accumulation.theory import SITUATIONS, Moments, Situation, law, partial_sums

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent

TINY = {
    "shapes": "sequential,pairwise",
    "lengths": "16,64,256",
    "bits": "9",
    "elements": "4096",
    "draws": "2",
    "training_bits": "2",
    "split": "90,5,5",
    "hidden": "8",
    "embedding": "8",
    "batch": "4",
    "updates": "10",
}
"""Settings of a run of a few seconds."""


# The bound.

levels = st.builds(
    Level,
    st.integers(2, 5),
    st.sampled_from(["1-7-1", "1-7-3", "1-7-6", "1-6-9"]),
    st.sampled_from(list(Rounding)),
)
accumulators = st.builds(
    lambda inner, last: Accumulator([*inner, last]),
    st.lists(levels, max_size=2),
    st.one_of(levels, st.builds(Level, st.none(), st.just("1-7-4"), st.sampled_from(list(Rounding)))),
)


@given(accumulators, st.integers(1, 40), st.integers(0, 2**32), st.booleans())
def test_no_error_exceeds_its_bound(accumulator: Accumulator, K: int, seed: int, positive: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(K, generator=generator).tolist()
    terms = [abs(t) for t in terms] if positive else terms
    result = accumulate([term(t) for t in terms], accumulator, seed=seed)
    error = abs(Fraction(result) - sum(map(Fraction, terms)))
    assert error <= Fraction(accumulator.error_bound(K) * (1 + 1e-12)) * sum(abs(Fraction(t)) for t in terms)


@pytest.mark.parametrize("K", [2, 8, 32])
@pytest.mark.parametrize("rounding", ["toward_zero", "nearest_even"])
def test_sums_come_near_their_bound(rounding: str, K: int) -> None:
    """Every term but the first is a little less than what would count, and is lost."""
    accumulator = Accumulator([Level(None, "1-7-9", rounding)])
    lost = accumulator.levels[0].unit * (1 - 2**-12)
    terms = torch.tensor([1.0, *[lost] * (K - 1)])
    result = float(lp.sum(terms, 0, accumulator))
    assert result == 1
    assert float(terms.sum()) - result > 0.4 * accumulator.error_bound(K) * float(terms.sum())


@pytest.mark.parametrize(
    ("text", "K", "depth"),
    [
        ("1-6-9", 4096, 4096),
        ("chunk64:1-6-9/1-6-9", 4096, 127),
        ("chunk64:1-6-9/fp32", 4096, 128),
        ("pairwise:1-6-9", 4096, 13),
        ("pairwise:1-6-9", 4097, 14),
        ("pairwise:1-6-9", 1, 1),
        ("4*1-6-9", 4096, 19),
        ("exact:1-6-9", 4096, 1),
        ("1-6-9", 0, 0),
        ("pairwise:1-6-9;product=bf16", 8, 5),
    ],
)
def test_depth_is_the_theorys(text: str, K: int, depth: int) -> None:
    accumulator = Accumulator.parse(text)
    assert accumulator.depth(K) == depth
    if ";" not in text and "fp32" not in text:
        assert accumulator.error_bound(K) == pytest.approx((1 + 2**-10) ** depth - 1)


def test_a_bound_may_be_infinite() -> None:
    assert Accumulator.parse("1-6-2").error_bound(1 << 20) == math.inf


def test_the_documented_bounds() -> None:
    page = (ROOT / "docs" / "accumulate-theory.md").read_text()
    for text, words in (("pairwise:1-6-9", "13, 0.0128"), ("1-6-9", "53.5"), ("chunk64:1-6-9/1-6-9", "0.132")):
        assert f"{Accumulator.parse(text).error_bound(4096):.3g}" in words
        assert words in page


# The law.


@pytest.mark.parametrize("shape", ["sequential", "chunked", "pairwise"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_errors_follow_the_law(situation: Situation, shape: str) -> None:
    config, K = Config(elements=1 << 18), 256
    accumulator = config.accumulator(shape, 12, situation.rounding.value)
    t = sums.normals((1024, K), torch.Generator().manual_seed(1))
    t = t.abs() if situation.same_sign else t
    error = lp.sum(t, 1, accumulator).double() - t.double().sum(1)
    norm = t.double().sum(1) if situation.same_sign else t.double().square().sum(1).sqrt()
    moments = Moments(float(t.abs().mean()), float(t.square().mean()))
    measured = float((error / norm).square().mean().sqrt())
    assert measured == pytest.approx(law(situation, accumulator, K, moments), rel=0.12)


@given(st.integers(1, 300), st.sampled_from(["1-6-9", "chunk8:1-6-9/1-6-9", "chunk8:1-6-9/fp32", "pairwise:bf16"]))
def test_the_law_counts_every_rounding(K: int, text: str) -> None:
    accumulator = Accumulator.parse(text)
    counted = list(partial_sums(accumulator, K))
    assert max(terms for _, terms, _ in counted) >= K
    if not K & (K - 1):  # groups are full
        repeats = sum(run.inputs for run in accumulator.runs(K)) - sum(count for count, _, _ in counted)
        groups = [-(-run.inputs // (run.level.fan_in or run.inputs)) for run in list(accumulator.runs(K))[1:]]
        assert repeats == (0 if "fp32" in text else sum(groups))


def test_terms_of_fp8_are_products_that_float32_holds() -> None:
    t = sums.fp8_products((10, 100), torch.Generator().manual_seed(0))
    assert torch.equal(lp.quantize(t, "1-7-6"), t)
    assert not torch.equal(lp.quantize(t, "1-7-5"), t)


# A run.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`TINY` with its text: the beginning of the embedded one."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(data.read(data.EMBEDDED)[:20_000])
    return {**TINY, "data": str(path)}


@pytest.fixture(scope="module")
def finished(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is stopped between its parts, then gone on with."""
    folder = tmp_path_factory.mktemp("accumulation") / "out"
    some = {"workers": "1", "cells": "sums-fp8-truncated,pairwise-2"}
    studies.run("accumulation", {**tiny, **some}, out=folder, quick=True)
    assert not (folder / "results.json").exists()
    studies.run("accumulation", {"workers": "2", "cells": ""}, out=folder, resume=True)
    return folder


def test_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    pictures = {"accumulation.png", "training.png"}
    assert names == {"config.json", "cells", "results.json", "results.csv", "README.md", *pictures}
    assert all((finished / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    page = (finished / "README.md").read_text()
    assert all(f"]({name})" in page for name in pictures)
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 3 * 2 + 3 * 2


def test_results_are_whole(finished: Path) -> None:
    results = record.read_json(finished / "results.json")
    assert [cell["accumulator"] for cell in results["cells"]] == ["fp32", "sequential-2", "pairwise-2"]
    assert len(results["curves"]) == 6 * 2
    for path in finished.glob("cells/sums-*/result.json"):
        for row in record.read_json(path)["rows"]:
            assert 0 <= row["median"] <= row["high"] <= row["max"]
            assert row["of_bound"] <= 1
    assert results["lost"]["fp32"]["estimate"] == 0
    assert any("none is further from the exact one than its bound" in line for line in results["findings"])


def test_the_same_part_gives_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    config = replace(Config(), **_settings(finished))
    sums.run(config, "fp8", SITUATIONS[0], tmp_path, lambda: False)
    again, before = (
        record.read_json(path / "result.json") for path in (tmp_path, finished / "cells/sums-fp8-truncated")
    )
    assert again == before


def _settings(folder: Path) -> dict[str, Any]:
    saved = record.read_json(folder / "config.json")["config"]
    return {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}


def test_findings_say_what_the_numbers_say() -> None:
    config = Config(lengths=(16, 64, 256), bits=(9,), draws=3, shapes=("sequential", "pairwise"))
    parts = [
        {
            "terms": "fp32",
            "situation": "truncated",
            "rows": [
                {
                    "shape": shape,
                    "bits": 9,
                    "K": K,
                    "seed": seed,
                    "sums": 4,
                    "mean": 0.8,
                    "square": 1.0,
                    "of_bound": 0.5,
                }
                | {"rms": 2**-9 * (1 + 0.01 * seed) * (K if shape == "sequential" else 1 + 0.2 * math.log2(K))}
                for shape in config.shapes
                for K in config.lengths
                for seed in range(3)
            ],
        }
    ]
    scores = {"fp32": [2.0, 2.1], "sequential-2": [2.5, 2.601], "pairwise-2": [2.3, 2.401]}
    cells = [{"accumulator": name, "test": test} for name, test in scores.items()]
    sequential, pairwise, bound, _, lost, order = findings(Summary(config, parts, cells))
    assert "the error grows as K^a with a = 1.00" in sequential
    assert "each doubling of K adds 0.202" in pairwise
    assert "the worst error is 0.50 of it" in bound
    assert lost.startswith("In training, pairwise sums, m = 2: +0.3005")
    assert lost.endswith("it is lost.")
    assert "m = 2, sequential less pairwise: +0.2000" in order
    assert order.endswith("pairwise is better.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shapes": "spiral"}, "shapes must be among sequential, chunked, pairwise"),
        ({"lengths": "16,8,4"}, "lengths must be three or more ascending"),
        ({"elements": "5"}, "elements must be at least the longest length"),
        ({"ebits": "8"}, "ebits must be from 2 to 7"),
        ({"recipe": "fp9"}, "recipe must be one of fp32"),
        ({"cells": "sums-fp9"}, "cells must be among fp32, sequential-2"),
    ],
)
def test_bad_settings_are_named(words: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        studies.run("accumulation", words, out=tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_every_setting_is_documented() -> None:
    def typed(value: Any) -> str:
        several = isinstance(value, tuple)
        return (
            ",".join(map(str, value)) if several else f"{value:g}" if isinstance(value, float) else f"{value}"
        ).lower()

    page = (ROOT / "docs" / "studies.md").read_text().partition("| accumulation's setting |")[2].splitlines()
    for name, field in Config.__dataclass_fields__.items():
        row = next(line for line in page if line.startswith(f"| `{name}` |"))
        default, quick = (cell.strip() for cell in row.split("|")[2:4])
        assert default == {"data": "the embedded text", "cells": "all"}.get(name, typed(field.default))
        assert quick == typed(accumulation.QUICK.get(name, ""))
