"""Text for byte-level models: any file of bytes, packed or not, as symbols in striped batches."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import zlib
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EMBEDDED = Path(__file__).parent / "text" / "tinyshakespeare.txt.xz"
"""The text that serves when none is named."""

_PACKED = {b"\xfd7zXZ\x00": lzma.decompress, b"\x1f\x8b": gzip.decompress}


class Corpus(NamedTuple):
    """A text split in three, as indices into `symbols`, the bytes that occur in it: uint8 [length]."""

    name: str
    sha256: str
    symbols: bytes
    train: Tensor
    valid: Tensor
    test: Tensor

    def require(self, sha256: str) -> None:
        """ValueError unless the text has this digest; an empty one stands for any."""
        if sha256 not in ("", self.sha256):
            raise ValueError(f"data: {self.name} has SHA-256 {self.sha256}, not {sha256}")


@lru_cache(maxsize=1)
def load(path: str = "", split: tuple[int, ...] = (90, 5, 5)) -> Corpus:
    """Read a text and split it; the last one read is kept.

    Args:
        path: a file of bytes, plain or packed by xz or gzip (told by its first bytes); empty for the embedded text.
        split: proportions of the training, validation and test parts, which follow one another in the text.

    Raises:
        ValueError: for a missing, unreadable, empty or damaged file.
    """
    file = Path(path) if path else EMBEDDED
    text = read(file)
    symbols = np.unique(np.frombuffer(text, dtype=np.uint8))
    index = np.zeros(256, dtype=np.uint8)
    index[symbols] = np.arange(len(symbols))
    coded = torch.from_numpy(index[np.frombuffer(text, dtype=np.uint8)])
    valid, test = (len(text) * part // sum(split) for part in split[1:])
    ends = [0, len(text) - valid - test, len(text) - test, len(text)]
    parts = (coded[first:last] for first, last in pairwise(ends))
    return Corpus(file.name, hashlib.sha256(text).hexdigest(), symbols.tobytes(), *parts)


def read(file: Path) -> bytes:
    """The unpacked bytes of a file."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"data: cannot read {file}: {error.strerror}") from None
    unpack = next((unpack for magic, unpack in _PACKED.items() if raw.startswith(magic)), bytes)
    try:
        text = unpack(raw)
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"data: {file} is damaged or cut short: {error}") from None
    if not text:
        raise ValueError(f"data: {file} is empty")
    return text


class Stripes:
    """A text cut into rows of equal length that are read side by side, chunk after chunk.

    Replica r, row n begins at `offsets[r] + n · stripe`, and the text is a ring; a chunk is [R, length + 1, rows]: what
    goes in and, one later, what should come out.

    Args:
        text: uint8 [L].
        rows: rows N.
        length: timesteps T of a chunk.
        offsets: where each of the R replicas begins.

    Raises:
        ValueError: for a text without one chunk in each row.
    """

    def __init__(self, text: Tensor, rows: int, length: int, offsets: list[int]) -> None:
        self.text, self.length = text, length
        self.stripe = (len(text) - 1) // rows
        self.chunks = self.stripe // length
        if not self.chunks:
            need = rows * length + 1
            raise ValueError(f"data: {rows} rows of {length} need a part of {need} bytes, this one has {len(text)}")
        starts = torch.tensor(offsets)[:, None, None] + torch.arange(rows) * self.stripe
        self.index = (starts + torch.arange(length + 1)[:, None]).to(text.device)

    def chunk(self, number: Tensor) -> Tensor:
        """Chunk `number` (an int64 tensor, 0-dim) of the pass it falls in: int64 [R, length + 1, rows]."""
        at = self.index + number % self.chunks * self.length
        return self.text[at % len(self.text)].long()
