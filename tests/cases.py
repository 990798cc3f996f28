"""One row for each registered op: arguments to call it with. A new op takes a row here and has its checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowprec.accumulator import Accumulator
from lowprec.adapt import new_state
from lowprec.block_tables import Tables, tables_of
from lowprec.formats import format as lookup
from lowprec.rounding import Rounding

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """An op of the namespace `lowprec`, by name, and argument lists that make fresh tensors on a device.

    `pure`: calling it twice with equal arguments gives equal results.
    """

    name: str
    arguments: Callable[[torch.device], list[Arguments]]
    pure: bool = True

    @property
    def op(self) -> Any:
        return getattr(torch.ops.lowprec, self.name).default

    def __str__(self) -> str:
        return self.name


def _numbers(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-9, 9, 60, device=device).to(dtype).reshape(3, 4, 5)


def _codes(device: torch.device) -> Tensor:
    return torch.arange(60, dtype=torch.uint8, device=device).reshape(3, 4, 5)


def _modes(device: torch.device, text: str) -> list[Arguments]:
    """Format, rounding, saturate, seed, offset, random_bits: one mode without a draw, and two draws."""
    fields = lookup(text).fields
    seed = torch.tensor(7, device=device)
    return [
        (fields, Rounding.nearest_even.number, True, None, None, 32),
        (fields, Rounding.stochastic.number, False, torch.tensor(7), torch.tensor(8), 8),
        (fields, Rounding.stochastic.number, True, seed, None, 16),
    ]


def _casts(
    extra: Callable[[Tensor], Arguments] = lambda x: (), text: str = "e4m3fn"
) -> Callable[[torch.device], list[Arguments]]:
    """Every mode on several dtypes and layouts; `extra` makes the last argument, an output, from the first."""

    def arguments(device: torch.device) -> list[Arguments]:
        x = _numbers(device)
        inputs = [x, x.double().transpose(0, 2), x.half()[:, ::2], x.bfloat16()[:0], x[0, 0, 0]]
        return [(each, *how, *extra(each)) for each in inputs for how in _modes(device, text)]

    return arguments


def _statistics(x: Tensor) -> Arguments:
    """Shift, statistics, and a histogram for some."""
    histogram = torch.zeros(256, dtype=torch.int64, device=x.device) if x.dim() else None
    return None, torch.zeros(9, dtype=torch.float64, device=x.device), histogram


def _adaptations(device: torch.device) -> list[Arguments]:
    """Every kind of bias, on several dtypes and layouts and on a call that measures nothing."""
    x = _numbers(device)
    inputs = [x, x.double().transpose(0, 2), x.half()[:, ::2], x.bfloat16()[:0], x[0, 0, 0]]
    rules = [(0, None, 0), (1, None, 0), (1, 2.0, 0), (2, None, 4), (3, 0.5, 0)]
    return [
        (each, new_state([7], history)[0].to(device), kind, 7, 2, stdv, 1024, history)
        for each in inputs
        for kind, stdv, history in rules
    ]


def _block_casts(
    extra: Callable[[Tensor, list[int]], Arguments] = lambda x, fields: (),
) -> Callable[[torch.device], list[Arguments]]:
    """Blocks along every dimension, tiles, whole tensors and tensor scales, on several dtypes and layouts."""

    def arguments(device: torch.device) -> list[Arguments]:
        x = _numbers(device)
        inputs = [x, x.double().transpose(0, 2), x.half()[:, ::2], x.bfloat16()[:0], x[0, 0, 0]]
        formats = ["block[1-4-3]/3", "mxfp4:rule=ceil", "bfp8/2x3", "bfp6/tensor", "nvfp4", "mxint8"]
        rows = []
        for i, text in enumerate(formats):
            fields = [int(field) for field in lookup(text).fields]
            each = inputs[i % len(inputs)]
            for dim, how in zip((0, -1, max(each.dim() - 2, 0)), _modes(device, "e4m3fn"), strict=True):
                rows.append((each, fields, dim, *how[1:], *extra(each, fields)))
        return rows

    return arguments


def _packed(device: torch.device) -> list[Arguments]:
    """Codes, scales and tensor scales as `encode_block` gives them."""
    rows = []
    for text in ("mxfp6_e3m2", "bfp8/2x3", "nvfp4", "bfp6/tensor"):
        fields = lookup(text).fields
        codes, scales, second = torch.ops.lowprec.encode_block(
            _numbers(device), fields, 1, Rounding.nearest_even.number, True, None, None, 32
        )
        second = second if fields[8] else None
        rows += [(codes, scales, second, fields, 1, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return rows


def _both_layouts(device: torch.device) -> list[Arguments]:
    """Every mode on several dtypes and layouts, with values, codes and nothing as either result."""
    x = _numbers(device)
    inputs = [x, x.double().transpose(0, 2), x.half()[:, ::2], x.bfloat16()[:0]]
    kinds = [(torch.uint8, None), (None, torch.uint8), (torch.uint8, torch.uint8)]

    def target(x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=device)

    results = [(each, how, kind) for each in inputs for how, kind in zip(_modes(device, "e5m2"), kinds, strict=True)]
    pairs = [(each, *how, target(each, kind[0]), target(each.mT, kind[1])) for each, how, kind in results]
    alone = [(x, *how, None, target(x.mT, None)) for how in _modes(device, "e4m3fn")]
    return pairs[:3] + alone + pairs[3:]


def _activations(device: torch.device) -> list[Arguments]:
    """Every activation and mode on several dtypes and layouts, with numbers and vectors as scale and bias."""
    x = _numbers(device)
    inputs = [x, x.double().transpose(0, 2), x.half()[:, ::2], x.bfloat16()[:0], x[0, 0, 0]]
    ways = list(zip(_modes(device, "e4m3fn"), (False, True, False), strict=True))
    vectors = [(None, None), (torch.tensor(2.0), None), (torch.tensor(0.5), torch.tensor(-1.0, dtype=torch.float64))]
    rows = [(each, *how, 6 - i, *vectors[i % 3], -1, codes) for each in inputs for i, (how, codes) in enumerate(ways)]
    vector = torch.linspace(-1, 2, 4, device=device)
    return [*rows, *((x, *how, i, vector, vector.half(), 1, codes) for i, (how, codes) in enumerate(ways))]


def _sums(device: torch.device) -> list[Arguments]:
    """Sums of values and of codes in several dtypes and layouts, rounded to a format or to the dtype's own."""
    x, codes = _numbers(device), _codes(device)
    formats: list[list[int]] = [lookup("e4m3fn").fields, []]
    ys = [x.clone(), x.half().transpose(0, 1), x.bfloat16()[:0], x.double()]
    terms = [*((y, y.float() / 3, formats[1]) for y in ys), (x, codes, formats[0])]
    return [
        (y.clone(), term, formats[n % 2], of, *how[1:])
        for n, how in enumerate(_modes(device, "e4m3fn"))
        for y, term, of in terms
        if y.dtype != torch.float64 or n != 1
    ]


_ACCUMULATORS = ("1-6-9", "chunk3:1-5-2 stochastic/fp32", "pairwise:bf16 down;product=1-4-3", "exact:e4m3fn")


def _accumulators(device: torch.device, inputs: list[Arguments]) -> list[Arguments]:
    """Every accumulator on several inputs, with seeds on both devices."""
    seeds = [(torch.tensor(7, device=device), None), (torch.tensor(7), torch.tensor(8))]
    return [
        (*each, Accumulator.parse(text).fields, *seeds[n % 2])
        for n, each in enumerate(inputs)
        for text in _ACCUMULATORS
    ]


def _rows(device: torch.device) -> list[Arguments]:
    """Rows to sum, of several dtypes and layouts, and none."""
    x = _numbers(device).reshape(12, 5)
    inputs = [x, x.double().t(), x.half()[::2, ::2], x.bfloat16()[:0], x[:, :0]]
    return _accumulators(device, [(each,) for each in inputs])


def _factors(device: torch.device) -> list[Arguments]:
    """Matrices to multiply, of several dtypes and layouts, and empty ones."""
    a, b = _numbers(device), _numbers(device).flip(0).transpose(1, 2)
    pairs = [(a, b), (a.double(), b.double()[:, :, ::2]), (a.half()[:, ::2], b.half().contiguous())]
    pairs += [(a.bfloat16(), b.bfloat16()[:, :, :0]), (a[:1].expand(3, 4, 5), b), (a[..., :0], b[:, :0])]
    return _accumulators(device, pairs)


def _few_codes(device: torch.device) -> list[Tensor]:
    """Codes that fit into 4 bits; as bytes, rows of 3 and of 15."""
    codes = (_codes(device) % 16).reshape(20, 3)
    return [codes, codes.reshape(4, 15)[:, :12], codes.transpose(0, 1), codes[:0], codes[0, 0]]


def _dense_codes(device: torch.device) -> list[Arguments]:
    """Every byte as 4-bit and as 6-bit codes."""
    dense = torch.arange(240, dtype=torch.uint8, device=device).reshape(20, 12)
    rows = [
        (dense, "e2m1fn", 24),
        (dense[:, :7], "e3m2fn", 9),
        (dense.mT[:, :3], "e2m3fn", 4),
        (dense[:0], "e2m1fn", 23),
    ]
    return [
        (x, lookup(text).fields, size, dtype) for x, text, size in rows for dtype in (torch.float32, torch.bfloat16)
    ]


def _hopper_operands(device: torch.device) -> list[Arguments]:
    """Operands of every dtype, strides, short and several leaves, and none; float8, which opcheck cannot take, last."""
    a = torch.linspace(-9, 9, 2 * 3 * 70, device=device).reshape(2, 3, 70)
    b = torch.linspace(-3, 4, 2 * 70 * 5, device=device).reshape(2, 70, 5)
    wide = [(a, b), (a.half()[:, :, :16], b.half()[:, :16]), (a.bfloat16(), b.mT.contiguous().mT.bfloat16())]
    narrow = [(a.to(torch.float8_e4m3fn), b.to(torch.float8_e5m2)), (a[:, :0].to(torch.float8_e5m2), b)]
    none = [(a[:, :, :0], b[:, :0])]
    return [(*pair, *how) for pair in (*wide, *none, *narrow) for how in ((3, 64), (4, 16), (4, 0))]


def _tensor_core_operands(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Operands of every pair of dtypes, strides, and none; float8, which opcheck cannot take, last. None on a CPU."""
    if device.type == "cpu":
        return []
    a = torch.linspace(-9, 9, 2 * 3 * 70, device=device).reshape(2, 3, 70)
    b = torch.linspace(-3, 4, 2 * 70 * 5, device=device).reshape(2, 70, 5)
    wide = [(a.half()[:, :, :48], b.half()[:, :48]), (a.bfloat16(), b.mT.contiguous().mT.bfloat16())]
    return [
        *wide,
        (a.bfloat16()[:, :, :0], b.bfloat16()[:, :0]),
        (a.bfloat16()[:, :0], b.bfloat16()),
        (a.to(torch.float8_e4m3fn), b.to(torch.float8_e5m2)),
    ]


def _tensor_core_products(device: torch.device) -> list[Arguments]:
    """Sums by every way: plain, rounded with either overflow, and in any format and mode, drawn too."""
    sums = ["fp32", "1-6-9", "bf16", "1-5-2 down", "1-4-3 stochastic"]
    accumulators = [Accumulator.parse(f"tensor_core{k}:{text}") for k in (32, 64) for text in sums]
    return [
        (*pair, accumulator.fields, torch.tensor(7) if accumulator.is_stochastic else None, None)
        for pair in _tensor_core_operands(device)
        for accumulator in accumulators
    ]


def _tensor_core_casts(device: torch.device) -> list[Arguments]:
    """Values in each dtype and codes, by every mode; none overflows to NaN, which opcheck holds unequal to itself."""
    fields = Accumulator.parse("tensor_core64:1-6-9").fields
    kinds = [(True, torch.float32), (False, torch.bfloat16), (False, torch.float16)]
    return [
        (*pair, fields, None, None, *how, *kind)
        for pair in _tensor_core_operands(device)
        for how, kind in zip(_modes(device, "e5m2"), kinds, strict=True)
    ]


def _sparse_layer(device: torch.device) -> tuple[Tables, Tensor, Tensor]:
    """The tables of 3 by 4 blocks, one column and one row of them empty; weights of blocks of 8; gates, one closed."""
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool, device=device)
    w = torch.linspace(-2, 3, 5 * 64, device=device).reshape(5, 8, 8)
    return tables_of(mask, 5, 8), w, torch.tensor([1.0, 0.0, 0.3, -2.0, 1.0], device=device)


def _sparse_products(device: torch.device) -> list[tuple[Arguments, Arguments]]:
    """What comes before and after the accumulator: directions, axes, dtypes, strides, codes, gates, no tokens."""
    tables, w, gate = _sparse_layer(device)
    forward, backward = (tables.fprop, None, 4), (tables.bprop, None, 3)
    x, dy = (torch.linspace(-9, 9, 5 * n, device=device).reshape(5, n) for n in (24, 32))
    codes, bytes_ = (torch.arange(each.numel(), device=device).to(torch.uint8) % 120 for each in (x, w))
    fields = lookup("1-4-3").fields
    return [
        ((x, w, *forward, False, False), ([], [])),
        ((dy.t(), w, *backward, True, True), ([], [])),
        ((x.bfloat16()[::2], w.bfloat16(), tables.fprop, gate, 4, False, False), ([], [])),
        ((codes.view(x.shape), bytes_.view(w.shape), *forward, False, False), (fields, fields)),
        ((x.half(), bytes_.view(w.shape), *forward, False, False), ([], fields)),
        ((x[:0], w, *forward, False, False), ([], [])),
        ((dy.double(), w.double(), *backward, False, True), ([], [])),
    ]


def _sparse_updates(device: torch.device) -> list[tuple[Arguments, Arguments]]:
    """Likewise for updates: one pair and several of other lengths."""
    tables, _, gate = _sparse_layer(device)
    x, dy = (torch.linspace(-9, 9, 5 * n, device=device).reshape(5, n) for n in (24, 32))
    codes = torch.arange(x.numel(), device=device).to(torch.uint8).view(x.shape) % 120
    layer, gates = (tables.update, None, 5, 8), (tables.update, gate, 5, 8)
    return [
        (([x], [dy], *layer, False), ([], [])),
        (([x.t(), x[:2].t()], [dy.t(), dy[1:3].t()], *layer, True), ([], [])),
        (([x.bfloat16()[::2]], [dy.bfloat16()[::2]], *gates, False), ([], [])),
        (([codes], [dy.half()], *layer, False), (lookup("1-4-3").fields, [])),
        (([x[:0]], [dy[:0]], *layer, False), ([], [])),
        (([x.double(), x.double()], [dy.double(), dy.double()], *gates, False), ([], [])),
    ]


def _sparse_dtype(arguments: Arguments) -> torch.dtype:
    """The dtype of a result that is not declared."""
    x = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
    return x.dtype if x.is_floating_point() else torch.float32


def _sparse_sums(cases: list[tuple[Arguments, Arguments]]) -> list[Arguments]:
    """Cases of products or of updates, each under an accumulator."""
    texts = ("fp32", "1-5-2", "chunk4:1-6-9/fp32", "pairwise:1-6-9", "1-4-3 stochastic")
    trees = [Accumulator.parse(texts[i % len(texts)]) for i in range(len(cases))]
    return [
        (*where, tree.fields, torch.tensor(7) if tree.is_stochastic else None, None, *formats)
        for (where, formats), tree in zip(cases, trees, strict=True)
    ]


def _sparse_casts(device: torch.device) -> list[Arguments]:
    cases = [case for case in _sparse_products(device) if _sparse_dtype(case[0]) != torch.float64]
    kinds = [(True, torch.float32), (False, torch.bfloat16), (False, torch.float16)]
    hows = _modes(device, "1-4-3")
    return [(*where, *formats, *hows[i % 3], *kinds[i % 3]) for i, (where, formats) in enumerate(cases)]


CASES = [
    Case("adapt", _adaptations),
    Case("quantize", _casts()),
    Case("quantize", _casts(lambda x: (torch.tensor(-2), [3, 4, 9]))),
    Case("quantize_out", _casts(lambda x: (torch.empty_like(x),))),
    Case("quantize_statistics", _casts(_statistics)),
    Case("encode", _casts(text="1-5-6:specials=ieee")),
    Case("encode_out", _casts(lambda x: (torch.empty_like(x, dtype=torch.uint8),))),
    Case(
        "decode",
        lambda device: [
            (codes, lookup("e4m3fn").fields, dtype)
            for codes in (_codes(device), _codes(device).transpose(0, 1), _codes(device)[0, 0, 0])
            for dtype in (torch.float32, torch.bfloat16)
        ],
    ),
    Case(
        "decode_out",
        lambda device: [
            (_codes(device), lookup("e4m3fn").fields, torch.empty(3, 4, 5, dtype=dtype, device=device))
            for dtype in (torch.float64, torch.float16)
        ],
    ),
    Case("quantize_block", _block_casts()),
    Case("quantize_block_out", _block_casts(lambda x, fields: (torch.empty_like(x),))),
    Case(
        "quantize_block_statistics",
        _block_casts(
            lambda x, fields: (
                torch.zeros(9, dtype=torch.float64, device=x.device),
                torch.zeros(2 ** (1 + fields[0] + fields[1]), dtype=torch.int64, device=x.device),
            )
        ),
    ),
    Case("encode_block", _block_casts()),
    Case("decode_block", _packed),
    Case("cast_transpose", _both_layouts),
    Case("activate", _activations),
    Case("accumulate_", _sums),
    Case("accumulate", _rows),
    Case("matmul", _factors),
    Case("hopper_leaves", _hopper_operands),
    Case(
        "tensor_core_leaves",
        lambda device: [(*pair, terms) for pair in _tensor_core_operands(device) for terms in (32, 64, 0)],
    ),
    Case("tensor_core_matmul", _tensor_core_products),
    Case("tensor_core_matmul_cast", _tensor_core_casts),
    Case("encode_packed", _casts(text="e3m2fn")),
    Case("decode_packed", _dense_codes),
    Case("pack_codes", lambda device: [(codes, 4) for codes in _few_codes(device)]),
    Case("unpack_codes", lambda device: [(codes, 6, 4 * codes.shape[-1] // 3) for codes in _few_codes(device)[:2]]),
    Case(
        "sparse_matmul",
        lambda device: [(*case[0], *case[1], _sparse_dtype(case[0])) for case in _sparse_products(device)],
    ),
    Case("sparse_matmul_cast", _sparse_casts),
    Case("sparse_matmul_accumulate", lambda device: _sparse_sums(_sparse_products(device))),
    Case(
        "sparse_weight_grad",
        lambda device: [(*case[0], *case[1], _sparse_dtype(case[0])) for case in _sparse_updates(device)],
    ),
    Case(
        "sparse_weight_grad_out",
        lambda device: [
            (*case[0], *case[1], torch.ones(5, 8, 8, dtype=_sparse_dtype(case[0]), device=device), beta)
            for case in _sparse_updates(device)
            for beta in (0.0, 0.5)
        ],
    ),
    Case("sparse_weight_grad_accumulate", lambda device: _sparse_sums(_sparse_updates(device))),
    Case("draw_seed", lambda device: [()], pure=False),
]
