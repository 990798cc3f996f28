"""Block layouts: which blocks of a weight matrix are present, and the tables that kernels follow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowprec.block_tables import Tables, tables_of
from lowprec.blocksparse import apply_product, apply_update, declared
from lowprec.eager_sparse import carrier_of, columns_of

BLOCKS = (8, 16, 32, 64)
"""The sizes of blocks."""

_NO_DRAW = (None, None, False)


class BlockLayout:
    """Which blocks of a weight matrix are present: frozen, validated, equal by value, and shared by many weights.

    Weights w are [blocks, block, block], [in, out] within each; w[i] is the i-th True of `mask` in row-major order.
    Rectangular layers, empty rows and columns and no blocks at all are layouts too.

    Args:
        mask: bool [input blocks, output blocks], on any device; it is copied.
        block: features of a block along each side: 8, 16, 32 or 64.
        blocks: how many blocks are present, if known: a mask on a GPU is then not waited for, nor checked against it.

    Raises:
        TypeError: for a mask that is no bool tensor.
        ValueError: for a mask that is not two-dimensional or has an empty side, and for another block size.

    Source: openai/blocksparse (Gray, Radford, Kingma 2017); docs/sparse.md.
    """

    mask: Tensor
    block: int
    blocks: int
    _tables: dict[str, Tables]

    def __init__(self, mask: Tensor, block: int = 32, *, blocks: int | None = None) -> None:
        _require_mask(mask)
        if type(block) is not int or block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
        if blocks is not None and (type(blocks) is not int or not 0 <= blocks <= mask.numel()):
            raise ValueError(f"blocks must be an int from 0 to {mask.numel()}, got {blocks!r}")
        count = int(mask.sum()) if blocks is None else blocks
        self._set(mask=mask.detach().clone(), block=block, blocks=count, _tables={})

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a BlockLayout is frozen: make another one to change {name}")

    # What it is.

    @property
    def shape(self) -> tuple[int, int]:
        """Input blocks and output blocks."""
        inputs, outputs = self.mask.shape
        return inputs, outputs

    @property
    def inputs(self) -> int:
        """Input features."""
        return self.shape[0] * self.block

    @property
    def outputs(self) -> int:
        """Output features."""
        return self.shape[1] * self.block

    @property
    def density(self) -> float:
        """The share of blocks that are present."""
        return self.blocks / self.mask.numel()

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """The shape of weights, [blocks, block, block]."""
        return self.blocks, self.block, self.block

    def flops(self, n: int) -> int:
        """Floating-point operations of a product with n tokens: two for each weight and token."""
        return 2 * n * self.blocks * self.block**2

    @property
    def coordinates(self) -> Tensor:
        """The input and output block of each weight, int64 [blocks, 2], on the mask's device."""
        return self.tables(self.mask.device).update[: 2 * self.blocks].view(self.blocks, 2).long()

    @property
    def T(self) -> BlockLayout:
        """The layout of the transposed matrix, whose weights `transpose` gives."""
        return BlockLayout(self.mask.T, self.block, blocks=self.blocks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        same = (self.shape, self.block, self.blocks) == (other.shape, other.block, other.blocks)
        return same and torch.equal(self.mask.cpu(), other.mask.cpu())

    def __hash__(self) -> int:
        return hash((self.shape, self.block, self.blocks))

    def __repr__(self) -> str:
        inputs, outputs = self.shape
        return f"BlockLayout({inputs}x{outputs} blocks of {self.block}, {self.blocks} present: {self.density:.1%})"

    # Its tables.

    def tables(self, device: torch.device | str) -> Tables:
        """The tables of this layout on a device: made once, but for those that belong to a CUDA graph."""
        key = str(torch.device(device))
        tables = self._tables.get(key)
        if tables is not None:
            return tables
        if torch.compiler.is_compiling() or (key.startswith("cuda") and torch.cuda.is_current_stream_capturing()):
            return tables_of(self.mask.to(device), self.blocks, self.block)
        with torch.inference_mode(False):  # those who come later may want gradients
            self._tables[key] = tables_of(self.mask.to(device), self.blocks, self.block)
        return self._tables[key]

    # Its weights.

    def empty(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Weights without values."""
        return torch.empty(self.weight_shape, device=device, dtype=dtype)

    def zeros(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Weights of zero."""
        return torch.zeros(self.weight_shape, device=device, dtype=dtype)

    def identity(
        self, scale: float = 1.0, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Weights that pass features on: `scale` times the identity in blocks (i, j), i = j modulo the shorter side.

        Blocks that are not present pass nothing. For a square layout with its diagonal this is the identity.
        """
        i, j = self.coordinates.unbind(1)
        inputs, outputs = self.shape
        on = (i % outputs == j % inputs).to(device=device or i.device, dtype=dtype or torch.get_default_dtype())
        eye = torch.eye(self.block, device=on.device, dtype=on.dtype)
        return scale * on[:, None, None] * eye

    def orthogonal(
        self,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Random weights with orthonormal columns within each block column: of all features that reach a block, b.

        Drawn and orthogonalised on the CPU in float64, so that a seed gives the same weights on every device.
        """
        w = torch.empty(self.weight_shape, dtype=torch.float64)
        table = self.tables("cpu").fprop
        for columns in columns_of(table, self.shape[1], self.blocks):
            groups, length = columns.weights.shape
            draws = torch.randn(groups, length * self.block, self.block, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(draws)
            q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # the one of all signs that is uniform
            w[columns.weights] = q.unflatten(1, (length, self.block))
        return w.to(device=device or self.mask.device, dtype=dtype or torch.get_default_dtype())

    def to_dense(self, w: Tensor) -> Tensor:
        """Weights as a matrix [inputs, outputs], zero where no block is. Differentiable."""
        self.require_weights("w", w)
        i, j = self.coordinates.to(w.device).unbind(1)
        blocks = w.new_zeros((*self.shape, self.block, self.block)).index_put((i, j), w)
        return blocks.transpose(1, 2).reshape(self.inputs, self.outputs)

    def from_dense(self, dense: Tensor) -> Tensor:
        """The weights of a matrix [inputs, outputs]: its blocks that are present. Differentiable."""
        if not isinstance(dense, Tensor) or dense.shape != (self.inputs, self.outputs):
            shape = tuple(dense.shape) if isinstance(dense, Tensor) else type(dense).__name__
            raise ValueError(
                f"dense must have the shape [inputs, outputs] = {(self.inputs, self.outputs)}, got {shape}"
            )
        i, j = self.coordinates.to(dense.device).unbind(1)
        (rows, columns), block = self.shape, self.block
        return dense.reshape(rows, block, columns, block).transpose(1, 2)[i, j]

    def transpose(self, w: Tensor) -> Tensor:
        """The weights of the transposed matrix, as its layout `T` has them."""
        self.require_weights("w", w)
        order = self.tables(w.device).fprop[self.shape[1] + 1 :][1 : 2 * self.blocks : 2]
        return w[order.long()].transpose(1, 2)

    def norm(self, w: Tensor) -> Tensor:
        """The l2 norm of the weights of each output feature, [outputs], summed in float32 (float64 of float64).

        Differentiable; the gradient of a norm of zero is zero.
        """
        self.require_weights("w", w)
        squares = self.column_sums(w.to(carrier_of(w)).square())
        none = squares == 0
        return squares.masked_fill(none, 1).sqrt().masked_fill(none, 0).to(w.dtype)

    def column_sums(self, w: Tensor) -> Tensor:
        """The sum of the weights of each output feature, [outputs]: the product with one token of ones."""
        ones, fields = w.new_ones(1, self.inputs), declared(None, w.dtype, w.device)
        how = (False, False, fields, fields, fields, *_NO_DRAW, w.dtype)
        return apply_product(ones, w, None, *self.tables(w.device), *how).squeeze(0)

    def spread(self, x: Tensor) -> Tensor:
        """A number for each output feature [outputs] as one for each weight: the gradient of `column_sums`."""
        ones, fields = x.new_ones(1, self.inputs), declared(None, x.dtype, x.device)
        how = (self.blocks, self.block, False, fields, *_NO_DRAW, x.dtype)
        return apply_update(ones, x.unsqueeze(0), None, *self.tables(x.device), *how)

    def require_weights(self, name: str, w: object) -> None:
        """Errors for what are no weights of this layout."""
        if not isinstance(w, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(w).__name__}")
        if w.shape != self.weight_shape:
            raise ValueError(
                f"{name} must have the shape [blocks, block, block] = {self.weight_shape}, got {tuple(w.shape)}"
            )

    # Keeping it.

    def save(self, path: str | Path) -> None:
        """Write the layout to a file, .npz: a bit for each block."""
        mask = self.mask.cpu().numpy()
        np.savez_compressed(path, mask=np.packbits(mask), shape=np.array(mask.shape), block=np.array(self.block))

    @staticmethod
    def load(path: str | Path) -> BlockLayout:
        """The layout that `save` wrote.

        Raises:
            ValueError: for another file.
        """
        with np.load(path, allow_pickle=False) as file:
            if not {"mask", "shape", "block"} <= set(file.files):
                raise ValueError(f"{path} holds no block layout")
            shape = tuple(int(size) for size in file["shape"])
            bits = np.unpackbits(file["mask"], count=math.prod(shape))
            return BlockLayout(torch.from_numpy(bits.astype(bool).reshape(shape)), int(file["block"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.mask.cpu(), self.block, self.blocks)

    def __deepcopy__(self, memo: object) -> BlockLayout:
        return self


def _restore(mask: Tensor, block: int, blocks: int) -> BlockLayout:
    return BlockLayout(mask, block, blocks=blocks)


def _require_mask(mask: object) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {given}")
    if mask.dim() != 2 or 0 in mask.shape or max(mask.shape) >= 1 << 16:
        raise ValueError(
            f"mask must be [input blocks, output blocks], each from 1 to {(1 << 16) - 1}, got shape {tuple(mask.shape)}"
        )
