"""`lowprec.measure`: its numbers against plain arithmetic, and where it may be called."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lowprec as lp
from lowprec.formats import FloatFormat
from tests.strategies import dtypes, fits, formats, tensors


def test_numbers(device: torch.device) -> None:
    x = torch.tensor([0.0, 3.0, -4.0, 1000.0, 1e-9, math.inf, math.nan], device=device)
    found = lp.measure(x, "e4m3fn").numbers()
    squares, error = 9 + 16 + 1e6, 552.0**2 + float(torch.tensor(1e-9)) ** 2
    mean, total = 1007 / 5, 999 / 5
    assert [found[name] for name in ("count", "saturated", "flushed", "nan", "amax")] == [7, 2, 1, 1, 1000]
    assert found["mean"] == pytest.approx(mean, rel=1e-12)
    assert found["std"] == pytest.approx(math.sqrt(squares / 5 - total**2), rel=1e-12)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(squares / error), rel=1e-12)
    assert found["code_entropy"] == pytest.approx(4 / 7 * math.log2(7 / 2) + 3 / 7 * math.log2(7))


@given(st.data(), formats(max_bits=16, dtype=torch.float32), dtypes)
def test_against_exact_sums(data: st.DataObject, fmt: FloatFormat, dtype: torch.dtype) -> None:
    dtype = dtype if fits(fmt, dtype) else torch.float32
    if dtype == torch.float64:  # whose sums leave out what is very small, and may overflow
        dtype = torch.float32
    x = data.draw(tensors(fmt, dtype))
    found, y = lp.measure(x, fmt).numbers(), lp.quantize(x, fmt)
    kept = [Fraction(v) for v in x.tolist() if math.isfinite(v)]
    error = [Fraction(b) - Fraction(a) for a, b in zip(x.tolist(), y.tolist(), strict=True) if math.isfinite(a)]
    assert found["count"] == len(x)
    assert found["amax"] == float(max(map(abs, kept), default=0))
    if not kept:
        assert math.isnan(found["mean"])
        return
    assert found["mean"] == pytest.approx(float(sum(map(abs, kept)) / len(kept)), rel=1e-12)
    signal, noise = sum(v * v for v in kept), sum(e * e for e in error)
    if noise:
        assert found["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-9)
    else:
        assert found["sqnr_db"] == math.inf if signal else math.isnan(found["sqnr_db"])


@pytest.mark.parametrize("mbits", [3, 5, 7, 9, 11])
def test_noise_of_uniform_numbers_is_near_theory(mbits: int, device: torch.device) -> None:
    """Fixed point with 2M steps over a uniform range: signal M²/3, noise 1/12; so 6.02 dB for each bit."""
    fmt, largest = lp.FloatFormat(0, mbits), (1 << mbits) - 1
    x = (torch.rand(200_000, dtype=torch.float64) * 2 - 1).to(device) * fmt.max
    found = lp.measure(x, fmt).numbers()
    assert found["sqnr_db"] == pytest.approx(20 * math.log10(2 * largest), abs=0.1)
    assert found["code_entropy"] == pytest.approx(mbits + 1, abs=0.2)


def test_what_has_no_number(device: torch.device) -> None:
    nothing = lp.measure(torch.empty(0, device=device), "1-4-3").numbers()
    assert (nothing["count"], nothing["amax"]) == (0, 0)
    assert all(math.isnan(nothing[name]) for name in ("mean", "std", "sqnr_db", "code_entropy"))
    zeros = lp.measure(torch.zeros(5, device=device), "1-4-3").numbers()
    assert (zeros["mean"], zeros["std"], zeros["code_entropy"]) == (0, 0, 0)
    assert math.isnan(zeros["sqnr_db"])
    wide = lp.measure(torch.randn(5, device=device), "tf32").numbers()
    assert math.isnan(wide["code_entropy"])
    assert lp.measure(torch.ones(5, device=device), "1-4-3").numbers()["sqnr_db"] == math.inf


@pytest.mark.parametrize("fmt", ["mxfp8_e4m3", "mxfp4", "nvfp4", "bfp8/16", "bfp6/4x4", "mxint8"])
def test_block_formats(fmt: str, device: torch.device) -> None:
    x = torch.randn(32, 48, device=device) * torch.logspace(-3, 3, 48, device=device)
    for dim in (0, 1):
        found = lp.measure(x, fmt, dim=dim).numbers()
        y = lp.quantize(x, fmt, dim=dim)
        error = (y - x).double()
        wanted = 10 * (x.double().square().sum() / error.square().sum()).log10().item()
        assert found["sqnr_db"] == pytest.approx(wanted, abs=1e-6)
        assert found["flushed"] == int(((y == 0) & (x != 0)).sum())
        assert 0 < found["code_entropy"] <= lp.format(fmt).bits


def test_arguments_are_those_of_quantize(device: torch.device) -> None:
    x = torch.randn(4000, device=device)
    one, same, other = (lp.measure(x, "1-4-3", rounding="stochastic", seed=seed).numbers() for seed in (1, 1, 2))
    assert one == same != other
    assert lp.measure(x * 1e5, "e5m2", saturate=False).numbers()["saturated"] > 0
    with pytest.raises(ValueError, match="rounding"):
        lp.measure(x, "1-4-3", rounding="odd")
    with pytest.raises(ValueError, match="cannot hold"):
        lp.measure(x.half(), "1-8-3")
    with pytest.raises(TypeError, match="x must be"):
        lp.measure([1.0], "1-4-3")  # type: ignore[arg-type]


def test_text_says_it_plainly() -> None:
    text = str(lp.measure(torch.tensor([1.0, 2.0, 500.0, 1e-9]), "e4m3fn"))
    assert text.startswith("4 elements, 25% saturated, 25% flushed to zero, 0 NaN; amax 500, mean |x| 125.8")


def test_gradients_stay_out_of_it(device: torch.device) -> None:
    x = torch.randn(8, device=device, requires_grad=True)
    assert not lp.measure(x, "1-4-3").mean.requires_grad


def test_compiles(device: torch.device) -> None:
    x = torch.randn(300, device=device) * 100

    def noise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = lp.measure(x, "e4m3fn")
        return found.sqnr_db, found.saturated

    compiled = torch.compile(noise, fullgraph=True)(x)
    assert [float(each) for each in compiled] == pytest.approx([float(each) for each in noise(x)])


@pytest.mark.gpu
def test_in_a_graph() -> None:
    x = torch.randn(50_000, device="cuda")
    lp.measure(x, "e4m3fn")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lp.measure(x, "e4m3fn")
    x.copy_(torch.randn_like(x) * 500)
    graph.replay()
    assert found.numbers() == lp.measure(x, "e4m3fn").numbers()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error for whatever waits for the device, as far as torch sees it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    x = torch.randn(50_000, device="cuda")
    lp.measure(x, "e4m3fn")
    with no_synchronisation():
        lp.measure(x, "e4m3fn")
