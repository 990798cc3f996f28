"""What a row is measured by: other rows of the same density and tokens, and the targets of one H100."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from lowprec.benches.blocksparse.cases import PRODUCTS, WIDEST, Case, name_of
from lowprec.benches.blocksparse.peers import BSR_NAME, DENSE_NAME, bsr_work, dense_work
from lowprec.studies.kernels.work import Work

WITHIN = {
    64: {64: 14e-6, 32: 20e-6, 16: 28e-6, 8: 40e-6},
    512: {64: 60e-6, 32: 110e-6, 16: 200e-6, 8: 380e-6},
}
"""Seconds of fprop and bprop in bfloat16 at the lowest density on one H100, by tokens and block."""

DENSITY = {64: dict.fromkeys((8, 16, 32, 64), 0.25), 512: {64: 0.25, 32: 0.15, 16: 0.08, 8: 0.04}}
"""From which density down those are faster than the dense product, by tokens and block."""

CODES, UPDATE, LIST = 0.7, 1.3, 1 / 1.5
"""The time of codes over that of bfloat16, of an update over that of fprop, of a list of eight over eight calls."""


def beside(cases: Iterable[Case]) -> set[str]:
    """The names of the rows by which these are measured."""
    ours = [case.work for case in cases if case.by == "lowprec"]
    return {name for work in ours for name in (dense_name(work), bsr_name(work), _sibling(work)[1]) if name}


def dense_name(work: Work) -> str | None:
    """The row of torch's dense product beside one of ours."""
    dense = dense_work(work)
    return None if dense is None else name_of(dense, DENSE_NAME)


def bsr_name(work: Work) -> str | None:
    """The row of torch's BSR product beside one of ours."""
    bsr = bsr_work(work)
    return None if bsr is None else name_of(bsr, BSR_NAME)


def _sibling(work: Work) -> tuple[float, str | None, str]:
    """The row of ours by which another is measured: which share of its time, its name, and in words."""
    if work.op == "update of 8":
        return LIST, name_of(replace(work, op="8 updates")), "eight calls / 1.5"
    if work.op == "update" and work.kind != "fp32":
        return UPDATE, name_of(replace(work, op="fprop")), "1.3 fprop"
    if work.op in PRODUCTS and work.kind == "fp8":
        return CODES, name_of(replace(work, kind="bf16")), "0.7 bf16"
    return 1.0, None, ""


def target(work: Work, seconds: Mapping[str, float], device: str) -> tuple[float, str] | None:
    """Within how many seconds a row of ours should be, and why; the hardest where there are several.

    Args:
        work: of the row.
        seconds: of every row, by name.
        device: "cpu", or a CUDA device; on the CPU there is no target but torch's BSR product.
    """
    candidates = list(_candidates(work, seconds, device != "cpu"))
    return min(candidates) if candidates else None


def _candidates(work: Work, seconds: Mapping[str, float], cuda: bool) -> Iterator[tuple[float, str]]:
    bsr, dense = (seconds.get(name or "") for name in (bsr_name(work), dense_name(work)))
    if work.kind != "fp8" and bsr is not None:
        yield bsr, "torch BSR"
    share, sibling, words = _sibling(work)
    if cuda and sibling is not None and sibling in seconds:
        yield share * seconds[sibling], words
    if cuda and work.kind == "bf16" and work.op in ("fprop", "bprop") and work.tokens in WITHIN:
        if work.widening == WIDEST:
            yield (limit := WITHIN[work.tokens][work.block]), f"{limit * 1e6:g} µs"
        if dense is not None and work.widening**-2 <= DENSITY[work.tokens][work.block]:
            yield dense, "dense"
