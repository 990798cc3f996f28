"""Dense codes: the bytes by their definition, and there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowprec.packing import pack_rows, row_bytes, unpack_rows

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
