"""Dense storage of narrow codes, in plain torch: any device, nothing compiled, the same bytes as the compiled kernels.

Codes of fewer than 8 bits lie one after another, low bits first: two 4-bit codes to a byte, four 6-bit codes to three.
Each row (the last dimension) starts on a byte of its own, and what is left of its last byte is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_bytes(size: int, bits: int) -> int:
    """Bytes that a row of `size` codes takes."""
    return -(-size * bits // 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Store codes densely.

    Args:
        codes: uint8 of shape [..., n], each below 2^bits; a 0-dim tensor is a row of one code.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 of shape [..., ceil(n · bits / 8)], contiguous.
    """
    codes = codes.reshape(1) if codes.dim() == 0 else codes
    size, (share, width) = codes.shape[-1], _group(bits)
    bytes_ = _regroup(codes, share, bits, width, 8)
    return bytes_[..., : row_bytes(size, bits)].contiguous()


def unpack_rows(dense: Tensor, bits: int, size: int) -> Tensor:
    """The codes of `pack_rows`.

    Args:
        dense: uint8 of shape [..., ceil(size · bits / 8)].
        bits: width of a code, 1 to 8.
        size: codes in a row.

    Returns:
        uint8 of shape [..., size], contiguous.
    """
    share, width = _group(bits)
    return _regroup(dense, width, 8, share, bits)[..., :size].contiguous()


def _group(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and those bytes; 56 bits at most."""
    bytes_ = bits // math.gcd(bits, 8)
    return 8 * bytes_ // bits, bytes_


def _regroup(rows: Tensor, share: int, bits: int, new_share: int, new_bits: int) -> Tensor:
    """Each `share` numbers of so many bits, the last ones short, as `new_share` numbers of `new_bits`."""
    groups = -(-rows.shape[-1] // share)
    padded = torch.nn.functional.pad(rows, (0, groups * share - rows.shape[-1])).to(torch.int64)
    words = padded.reshape(*rows.shape[:-1], groups, share) << _places(share, bits, rows.device)
    parts = words.sum(-1, keepdim=True) >> _places(new_share, new_bits, rows.device)
    return (parts & ((1 << new_bits) - 1)).to(torch.uint8).flatten(-2)


def _places(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * bits, bits, device=device)
