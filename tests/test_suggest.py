"""`lowprec.suggest`: against every format there is, and what it makes of a model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lowprec as lp
from lowprec.formats import FloatFormat
from lowprec.testing import assert_bits_equal


def samples(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3000, generator=generator)
    heavy = x * (torch.randn(3000, generator=generator) * 2).exp()
    return {
        "normal": x,
        "heavy tails": heavy,
        "one outlier": torch.cat([x * 1e-2, torch.tensor([300.0])]),
        "all positive": x.abs() + 1,
        "tiny": x * 2.0**-120,
        "not finite": torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])]),
        "bfloat16": heavy.to(torch.bfloat16),
        "float16": x.half(),
        "float64": x.double() * 1e-100,
    }


def error_of(x: Tensor, fmt: FloatFormat) -> float:
    x = x[x.isfinite()]
    return float((lp.quantize(x, fmt).double() - x.double()).square().sum())


def every_bias(x: Tensor, ebits: int, mbits: int) -> list[FloatFormat]:
    """Formats of a split from one that wastes all of its binades down to one that saturates nearly everything."""
    top = math.frexp(float(x[x.isfinite()].abs().max()))[1]
    found = []
    for emax in range(top + (1 << ebits) + mbits, top - 43, -1):
        try:
            fmt = FloatFormat(ebits, mbits, emax=emax)
            lp.quantize(x[:1], fmt)
        except ValueError:
            continue
        found.append(fmt)
    return found


@pytest.mark.parametrize("name", samples(torch.device("cpu")))
@pytest.mark.parametrize("bits", [4, 8])
def test_no_format_does_better(name: str, bits: int, device: torch.device) -> None:
    x = samples(device)[name].to(device)
    suggestion = lp.suggest(x, bits)
    assert suggestion.casts < 60
    splits = {each.format.fields[0]: each.format for each in suggestion.candidates}
    for ebits in range(bits):
        formats = every_bias(x, ebits, bits - 1 - ebits)
        if not formats:
            assert ebits not in splits
            continue
        least = min(error_of(x, fmt) for fmt in formats)
        assert error_of(x, splits[ebits]) == pytest.approx(least, rel=1e-9)
    ratios = [each.sqnr_db for each in suggestion.candidates]
    assert ratios == sorted(ratios, reverse=True)


def test_the_evidence_is_what_measure_says(device: torch.device) -> None:
    x = samples(device)["heavy tails"].to(device)
    suggestion = lp.suggest(x)
    for each in (*suggestion.candidates, *suggestion.blocks):
        found = lp.measure(x, each.format).numbers()
        assert each.sqnr_db == found["sqnr_db"]
        assert each.code_entropy == found["code_entropy"]
        assert each.saturated_percent == pytest.approx(100 * found["saturated"] / found["count"])
        assert each.flushed_percent == pytest.approx(100 * found["flushed"] / found["count"])
    assert {each.format for each in suggestion.blocks} == {
        lp.format(name) for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "bfp8/32")
    }


def test_known_answers() -> None:
    powers = 2.0 ** torch.arange(-30, 31)
    best = lp.suggest(powers, 8).best
    assert best is not None
    assert best.sqnr_db == math.inf
    assert lp.suggest(torch.linspace(-1, 1, 10_001), 8).format in (
        lp.FloatFormat(1, 6, emax=0),
        lp.FloatFormat(1, 6, emax=-1),
    )
    assert lp.suggest(samples(torch.device("cpu"))["float16"], 8).format is not None


def test_exact_ties_go_to_the_wider_range() -> None:
    suggestion = lp.suggest(torch.tensor([1.0, -2.0, 0.0]), 8)
    assert suggestion.format is not None
    assert suggestion.format.ebits == 7
    assert suggestion.format.emax == 2


def test_the_runner_up_has_other_values() -> None:
    suggestion = lp.suggest(torch.linspace(-1, 1, 10_001), 8)
    assert [each.format.fields[0] for each in suggestion.candidates[:2]] == [1, 0]
    assert suggestion.runner_up is suggestion.candidates[2]


def test_nothing_to_keep() -> None:
    for x in (torch.zeros(4), torch.empty(0), torch.tensor([math.nan, math.inf])):
        suggestion = lp.suggest(x)
        assert suggestion.best is suggestion.runner_up is suggestion.format is None
        assert str(suggestion) == "no finite nonzero number: any format will do"


def test_same_answer_each_time(device: torch.device) -> None:
    x = samples(device)["heavy tails"].to(device)
    assert lp.suggest(x) == lp.suggest(x)
    assert str(lp.suggest(x.cpu())) == str(lp.suggest(x))


def test_several_tensors() -> None:
    named = samples(torch.device("cpu"))
    found = lp.suggest(named, 6)
    assert list(found) == list(named)
    assert found["normal"] == lp.suggest(named["normal"], 6)
    listed = lp.suggest(list(named.values()), 6)
    assert [listed[i] for i in range(len(named))] == list(found.values())
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["tensor", "best"]
    assert len(lines) == 1 + len(named)


def test_text_is_a_table() -> None:
    lines = str(lp.suggest(samples(torch.device("cpu"))["normal"])).splitlines()
    assert lines[0].split() == ["format", "emax", "SQNR", "dB", "saturated", "%", "flushed", "%", "entropy", "bits"]
    assert "beside them, in blocks:" in lines[9]
    assert max(map(len, lines)) <= 120


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) @ self.head
        return y


def test_model() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(20, 8)
    before = copy.deepcopy(model.state_dict())
    found = lp.suggest(model, inputs=x, loss=lambda y: y.square().mean())
    assert set(found) == {
        (p, r) for p in ("", "body.0", "body.2") for r in ("activation", "weight", "activation_grad", "weight_grad")
    }
    assert found["body.0", "activation"] == lp.suggest(x)
    assert found["body.2", "weight"] == lp.suggest(model.body[2].weight)
    assert found["", "activation"] == lp.suggest(model.body(x))
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name])
    with pytest.raises(ValueError, match="under no policy"):
        lp.report(model)


def test_policy_of_a_model_is_in_force() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(20, 8)
    found = lp.suggest(model, 6, inputs=(x,), loss=lambda y: y.square().mean())
    policy = found.policy()
    lp.wrap(model, policy)
    model(x).square().mean().backward()
    rows = {row.path: row for row in lp.report(model).rows}
    for (path, role), suggestion in found.items():
        assert getattr(rows[path].formats, role) == str(suggestion.format)
    again = lp.suggest(model, 6, inputs=x, loss=lambda y: y.square().mean())
    assert again["body.0", "activation"] == found["body.0", "activation"]
    assert lp.report(model).rows == tuple(rows.values()), "a wrapped model stays under its policy, and counts nothing"


def test_forward_alone() -> None:
    found = lp.suggest(nn.Linear(4, 4), inputs=torch.randn(5, 4))
    assert set(found) == {("", "activation"), ("", "weight")}
    assert found.policy().activation_grad is None


def test_arguments() -> None:
    x = torch.randn(4)
    for bits in (1, 17):
        with pytest.raises(ValueError, match="bits must be from 2 to 16"):
            lp.suggest(x, bits)
    with pytest.raises(TypeError, match="bits must be an int"):
        lp.suggest(x, 8.0)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="inputs is needed"):
        lp.suggest(nn.Linear(2, 2), inputs=None)
    with pytest.raises(TypeError, match=r"x\['a'\] must be"):
        lp.suggest({"a": torch.arange(3)})
