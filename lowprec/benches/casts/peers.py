"""The rows of others: torch's own casts, and the libraries that are installed.

A peer is called as its documentation says, and gives its result in a new tensor where it offers no other way.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lowprec.benches import running
from lowprec.benches.casts.buffers import Buffers
from lowprec.benches.casts.cases import BFLOAT16, FLOAT32, SHORT, Case, Goal, rotating
from lowprec.timing import Call

NATIVE = {"bf16": torch.bfloat16, "e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def theirs() -> tuple[list[Case], dict[str, str]]:
    """Rows of torch and of the peers that can be imported, and of each peer the version, or why it is not there."""
    return running.theirs(list(_torch()), PEERS)


def copy_name(dtype: torch.dtype) -> str:
    """The row of torch's copy, by which bandwidth is measured."""
    return f"copy {SHORT[dtype]}"


def cast_name(dtype: torch.dtype) -> str:
    """The row of torch's cast to float8_e4m3fn, by which encoding on the CPU is measured."""
    return f"torch cast {SHORT[dtype]} to e4m3fn"


def _torch() -> Iterator[Case]:
    for dtype in (FLOAT32, BFLOAT16):
        yield _written(copy_name(dtype), dtype, dtype, "copy")
        for name, target in NATIVE.items():
            if target != dtype:
                yield _written(f"torch cast {SHORT[dtype]} to {name}", dtype, target)
        yield _from_float8(dtype)


def _written(name: str, source: torch.dtype, target: torch.dtype, goal: Goal = "none") -> Case:
    def make(buffers: Buffers) -> Call:
        return rotating(buffers.inputs(source), buffers.outputs(target), lambda x, out: out.copy_(x))

    return Case(name, goal, source.itemsize + target.itemsize, make, by="torch")


def _from_float8(dtype: torch.dtype) -> Case:
    def make(buffers: Buffers) -> Call:
        codes = [codes.view(torch.float8_e4m3fn) for codes in buffers.codes("e4m3fn")]
        return rotating(codes, buffers.outputs(dtype), lambda x, out: out.copy_(x))

    return Case(f"torch cast e4m3fn to {SHORT[dtype]}", "none", 1 + dtype.itemsize, make, by="torch")


def _called(
    by: str,
    what: str,
    moved: float,
    call: Callable[[Tensor], Any],
    dtype: torch.dtype = FLOAT32,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    """A row that gives its result in a new tensor."""

    def make(buffers: Buffers) -> Call:
        x = buffers.inputs(dtype)
        return rotating(x, x, lambda x, _: call(x))

    return Case(f"{by} {what}", "none", moved, make, by=by, devices=devices)


def _ml_dtypes() -> Iterator[Case]:
    ml_dtypes = import_module("ml_dtypes")
    for name in ("float8_e4m3fn", "float8_e5m2"):
        target = getattr(ml_dtypes, name)

        def call(x: Tensor, target: Any = target) -> Any:
            return x.numpy().astype(target)

        yield _called("ml_dtypes", f"fp32 to {name[7:]}", 5, call, devices=("cpu",))


def _qtorch() -> Iterator[Case]:
    quant = import_module("qtorch.quant")
    for mode in ("nearest", "stochastic"):

        def call(x: Tensor, mode: str = mode) -> Any:
            return quant.float_quantize(x, exp=4, man=3, rounding=mode)

        yield _called("qtorch", f"fp32 to 1-4-3, {mode}", 8, call)
    yield _called(
        "qtorch", "fp32, blocks of 8 bits", 8, lambda x: quant.block_quantize(x, wl=8, dim=0, rounding="nearest")
    )


def _torchao() -> Iterator[Case]:
    mx = import_module("torchao.prototype.mx_formats.mx_tensor")
    nvfp4 = import_module("torchao.prototype.mx_formats.nvfp4_tensor")

    def to_mx(x: Tensor) -> Any:
        return mx.to_mx(x, torch.float8_e4m3fn, 32)

    def to_nvfp4(x: Tensor) -> Any:
        return nvfp4.nvfp4_quantize(x)

    for dtype in (FLOAT32, BFLOAT16):
        yield _called("torchao", f"{SHORT[dtype]} to mxfp8_e4m3", dtype.itemsize + 1 + 1 / 32, to_mx, dtype)
        yield _called("torchao", f"{SHORT[dtype]} to nvfp4", dtype.itemsize + 0.5 + 1 / 16, to_nvfp4, dtype)


def _microxcaling() -> Iterator[Case]:
    mx = import_module("mx")
    elements, blocks = import_module("mx.elemwise_ops"), import_module("mx.mx_ops")
    specs = mx.finalize_mx_specs({"w_elem_format": "fp8_e4m3", "a_elem_format": "fp8_e4m3", "block_size": 32})

    def element(x: Tensor) -> Any:
        return elements._quantize_elemwise(x, "fp8_e4m3", round="even")

    def block(x: Tensor) -> Any:
        return blocks.quantize_mx_op(x, specs, elem_format="fp8_e4m3", axes=[-1], round="even")

    yield _called("microxcaling", "fp32 to e4m3", 8, element)
    yield _called("microxcaling", "fp32 to mxfp8_e4m3", 8, block)


def _pychop() -> Iterator[Case]:
    pychop = import_module("pychop")
    pychop.backend("torch")
    for mode, name in ((1, "nearest"), (5, "stochastic")):
        chop = pychop.Chop(exp_bits=4, sig_bits=3, rmode=mode)
        yield _called("pychop", f"fp32 to 1-4-3, {name}", 8, chop)


class _Options(ctypes.Structure):
    """CPFloat's `optstruct`, from its cpfloat_definitions.h."""

    _fields_ = (
        ("format", ctypes.c_char * 15),
        ("precision", ctypes.c_uint),
        ("emin", ctypes.c_int),
        ("emax", ctypes.c_int),
        ("explim", ctypes.c_int),
        ("infinity", ctypes.c_int),
        ("round", ctypes.c_int),
        ("saturation", ctypes.c_int),
        ("subnormal", ctypes.c_int),
        ("flip", ctypes.c_int),
        ("p", ctypes.c_double),
        ("seeds", ctypes.c_void_p * 3),
    )


def _cpfloat() -> Iterator[Case]:
    path = os.environ.get("CPFLOAT") or ctypes.util.find_library("cpfloat")
    if path is None:
        raise ModuleNotFoundError("no libcpfloat.so: name it in CPFLOAT")
    library = ctypes.CDLL(path)
    library.cpfloatf.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(_Options))
    for mode, name in ((1, "nearest"), (5, "stochastic")):
        options = _Options(precision=4, emin=-6, emax=8, explim=1, infinity=0, round=mode, saturation=1, subnormal=1)

        def call(x: Tensor, out: Tensor, options: _Options = options) -> int:
            library.omp_set_num_threads(torch.get_num_threads())
            status: int = library.cpfloatf(out.data_ptr(), x.data_ptr(), x.numel(), options)
            return status

        def make(buffers: Buffers, call: Callable[[Tensor, Tensor], int] = call) -> Call:
            return rotating(buffers.inputs(FLOAT32), buffers.outputs(FLOAT32), call)

        yield Case(f"CPFloat fp32 to e4m3, {name}", "none", 8, make, by="CPFloat", devices=("cpu",))


PEERS: running.Peers = {
    "ml_dtypes": ("ml_dtypes", _ml_dtypes),
    "qtorch": ("qtorch", _qtorch),
    "torchao": ("torchao", _torchao),
    "microxcaling": ("microxcaling", _microxcaling),
    "pychop": ("pychop", _pychop),
    "CPFloat": ("cpfloat", _cpfloat),
}
"""Peers: the package that has the version, and the rows, whose making imports it."""
