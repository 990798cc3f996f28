"""Dense codes: the bytes by their definition, and there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowprec as lp
from lowprec import _ops
from lowprec.packing import pack_rows, row_bytes, unpack_rows
from lowprec.testing import assert_bits_equal
from tests.engines import DTYPES

WIDTHS = range(1, 9)


def by_definition(row: list[int], bits: int) -> list[int]:
    """One integer whose digits are the codes, cut into bytes from the low end."""
    number = sum(code << (i * bits) for i, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) * bits // 8), "little"))


def random_codes(shape: tuple[int, ...], bits: int, device: torch.device) -> Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8).to(device)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8, 33])
def test_bytes_by_their_definition(bits: int, size: int, device: torch.device) -> None:
    codes = random_codes((3, 2, size), bits, device)
    dense = pack_rows(codes, bits)
    assert dense.shape == (3, 2, row_bytes(size, bits))
    assert dense.flatten(0, 1).tolist() == [by_definition(row, bits) for row in codes.flatten(0, 1).tolist()]
    assert torch.equal(unpack_rows(dense, bits, size), codes)


def test_known_bytes() -> None:
    assert pack_rows(torch.tensor([0x1, 0x2, 0xF], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack_rows(torch.tensor([0x3F, 0, 0, 0x3F, 1], dtype=torch.uint8), 6).tolist() == [0x3F, 0, 0xFC, 1]


@pytest.mark.parametrize("bits", [4, 6])
def test_any_strides(bits: int, device: torch.device) -> None:
    codes = random_codes((5, 6, 7), bits, device)
    for view in (codes.transpose(0, 2), codes[..., ::2], codes[:, :1].expand(5, 6, 7), codes.flip(2), codes[:0]):
        dense = pack_rows(view, bits)
        assert torch.equal(dense, pack_rows(view.contiguous(), bits))
        assert torch.equal(unpack_rows(dense, bits, view.shape[-1]), view)


def test_a_number_is_a_row_of_one(device: torch.device) -> None:
    dense = pack_rows(torch.tensor(5, dtype=torch.uint8, device=device), 6)
    assert dense.tolist() == [5]
    assert unpack_rows(dense, 6, 1).tolist() == [5]


def test_padding_is_ignored(device: torch.device) -> None:
    dense = pack_rows(random_codes((4, 3), 6, device), 6)
    filled = dense.clone()
    filled[:, -1] |= 0xFC
    assert torch.equal(unpack_rows(filled, 6, 3), unpack_rows(dense, 6, 3))


FORMATS = ("1-1-0", "e2m1fn", "1-2-2", "e3m2fn", "1-3-3:specials=ieee")


@pytest.mark.sanitize
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_casts_are_casts(fmt: str, dtype: torch.dtype, device: torch.device) -> None:
    """In rows of every size about a group of eight, in every layout, drawn by the same index."""
    for size in (0, 1, 8, 31, 2050):
        x = torch.randn(5, size).to(device, dtype)
        for view in (x, x.mT, x[::2], x[:, 1:], x[0]):
            for how in ({}, {"rounding": "stochastic", "seed": 3, "random_bits": 16}):
                codes, dense = lp.encode(view, fmt, **how), lp.encode(view, fmt, pack=True, **how)
                bits = lp.format(fmt).bits
                assert_bits_equal(dense, pack_rows(codes, bits))
                values = lp.decode(dense, fmt, size=view.shape[-1], dtype=dtype)
                assert_bits_equal(values, lp.decode(codes, fmt, dtype=dtype).contiguous())
                out = torch.empty_like(values)
                assert_bits_equal(lp.decode(dense, fmt, size=view.shape[-1], dtype=dtype, out=out), values)


@pytest.mark.sanitize
@pytest.mark.parametrize("bits", WIDTHS)
def test_registered_ops_pack_as_the_eager_twin(bits: int, device: torch.device) -> None:
    for shape in ((3, 5), (2, 4, 16), (4099,), (7, 2049), (0, 3), (3, 0), ()):
        codes = random_codes(shape, bits, device)
        dense = _ops.pack_codes(codes, bits)
        assert_bits_equal(dense, pack_rows(codes, bits))
        size = shape[-1] if shape else 1
        assert_bits_equal(_ops.unpack_codes(dense, bits, size), unpack_rows(dense, bits, size))


def test_samples_of_a_batch_are_packed_apart() -> None:
    x = torch.randn(3, 4, 5)
    for dim in (0, 1, 2):
        dense = torch.func.vmap(lambda x: lp.encode(x, "e2m1fn", pack=True), in_dims=dim)(x)
        assert_bits_equal(dense, torch.stack([lp.encode(part, "e2m1fn", pack=True) for part in x.unbind(dim)]))
    rows = torch.func.vmap(lambda x: lp.encode(x, "e2m1fn", pack=True))(x[0, 0])
    assert rows.shape == (5, 1)
    values = torch.func.vmap(lambda x: lp.decode(x, "e2m1fn", size=5))(lp.encode(x, "e2m1fn", pack=True))
    assert_bits_equal(values, lp.quantize(x, "e2m1fn"))
