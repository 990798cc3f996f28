"""A linear layer whose weight is block-sparse."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowprec.accumulate import AccumulatorLike
from lowprec.accumulator import Accumulator
from lowprec.block_tables import Tables
from lowprec.blocksparse import matmul
from lowprec.eager_sparse import by_gates
from lowprec.modes import is_narrowed
from lowprec.sparse.layout import BlockLayout
from lowprec.sparse.ops import is_first, require_features

Features = Literal["last", "first"]
"""Where a tensor has its features: [..., C] or [C, ...]."""

Self = TypeVar("Self", bound="Linear")


class Linear(nn.Module):
    """y = x · W + bias, where W [inputs, outputs] has values only in the blocks of a layout.

    Args:
        layout: which blocks are present.
        bias: whether there is a bias, [outputs].
        features: "last" for x [..., inputs] -> [..., outputs], "first" for x [inputs, ...] -> [outputs, ...].
        accumulator: how products sum up, forwards and backwards, an `Accumulator` or its string; None for sums in
            float32, as docs/sparse.md says. `lowprec.wrap` puts those of its policy in its place, where it has any.
        gate: a factor for each block, by which its weights are multiplied: True for a learnt one, initially one; a
            tensor [blocks] for a fixed one, in float32. A block whose gate is 0 is as if it were not there, and has no
            gradient.
        device, dtype: of the weight and the bias.

    Attributes:
        weight: [blocks, block, block], [in, out] within each, initially uniform up to 1/√fan-in either way, the fan-in
            of an output being the number of features that reach it.
        bias: [outputs] or None, initially likewise, and zero where nothing reaches an output.
        gate: [blocks] or None.
        layout: which blocks are present. Its mask is a buffer, and so part of `state_dict`: loading another mask with
            as many blocks changes the layout.
        inputs, outputs: how many features x and y have.

    Raises:
        TypeError, ValueError: for a layout, features, an accumulator or a gate that is none, and gates that are not
            finite. When called, for x of another dtype than the weight (but for autocast), of another size, or with
            its features elsewhere.
    """

    lowprec_op: ClassVar[str] = "sparse_matmul"
    weight: Tensor
    bias: Tensor | None
    gate: Tensor | None
    mask: Tensor
    _tables: Tables

    def __init__(
        self,
        layout: BlockLayout,
        bias: bool = True,
        features: Features = "last",
        *,
        accumulator: AccumulatorLike | None = None,
        gate: bool | Tensor = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"layout must be a BlockLayout, got {type(layout).__name__}")
        self.layout, self.features, self.first = layout, features, is_first(features)
        self.inputs, self.outputs = layout.inputs, layout.outputs
        self.accumulator = None if accumulator is None else str(accumulator)
        if accumulator is not None:
            Accumulator.parse(accumulator)
        self.weight = nn.Parameter(layout.empty(device=device, dtype=dtype))
        biases = torch.empty(layout.outputs, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if biases is None else nn.Parameter(biases))
        self._make_gate(gate)
        self.register_buffer("mask", layout.mask.detach().clone().to(self.weight.device))
        self._follow()
        self.reset_parameters()

    def _make_gate(self, gate: bool | Tensor) -> None:
        if isinstance(gate, bool):
            made = torch.ones(self.layout.blocks, dtype=torch.float32, device=self.weight.device)
            self.register_parameter("gate", nn.Parameter(made) if gate else None)
            return
        if not isinstance(gate, Tensor) or gate.shape != (self.layout.blocks,) or not gate.is_floating_point():
            given = f"{gate.dtype} {tuple(gate.shape)}" if isinstance(gate, Tensor) else repr(gate)
            raise ValueError(f"gate must be True, False or floats [{self.layout.blocks}], one per block, got {given}")
        if not gate.isfinite().all():
            raise ValueError("gate must be finite: it has infinities or NaN")
        self.register_buffer("gate", gate.detach().to(self.weight.device, torch.float32, copy=True))

    # What it computes.

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], or with features first [inputs, ...] -> [outputs, ...]."""
        weight = self.weight  # once: it may be computed
        require_features("x", x, self.inputs, "inputs", self.features)
        if x.dtype != weight.dtype and not (is_narrowed(x) and is_narrowed(weight)):
            raise TypeError(f"x must be {weight.dtype} like the weight, got {x.dtype}")
        tables = self._tables if self._tables.fprop.device == x.device else self.layout.tables(x.device)
        gate = None if self.gate is None else self.gate.float()
        return matmul(x, weight, gate, tables, bias=self.bias, first=self.first, accumulator=self.accumulator)

    def product_input(self, x: Tensor) -> Tensor:
        """What the block-sparse product reads, of the layer's input."""
        return x

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give the weight and the bias their initial values; gates stay."""
        device, dtype = self.weight.device, self.weight.dtype
        fan_in = self.layout.mask.sum(0).to(device) * self.layout.block
        bounds = fan_in.clamp(min=1).to(dtype).rsqrt() * (fan_in > 0)
        columns = self.layout.coordinates[:, 1].to(device)
        self.weight.uniform_(-1, 1).mul_(bounds[columns, None, None])
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_(bounds.repeat_interleave(self.layout.block))

    # The layout, and what follows it.

    def set_layout(self, layout: BlockLayout) -> None:
        """Put another layout in the place of this one: of the same shape, and with as many blocks of the same size.

        Weight i is then that of the i-th block of the new layout; values are left for the caller to move. Compiled code
        and captured CUDA graphs follow, since tables are written to where they lie.

        Raises:
            TypeError: for what is no layout.
            ValueError: for a layout that does not fit.
        """
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"layout must be a BlockLayout, got {type(layout).__name__}")
        here = self.layout
        if (layout.shape, layout.weight_shape) != (here.shape, here.weight_shape):
            raise ValueError(f"layout must have the shape, block and number of blocks of {here}, got {layout}")
        for own, other in zip(self._tables[:3], layout.tables(self._tables.fprop.device)[:3], strict=True):
            own.copy_(other)
        self.layout = layout
        self.mask.copy_(layout.mask)
        computing: Any = self.parametrizations if parametrize.is_parametrized(self, "weight") else {"weight": ()}
        for each in computing["weight"]:
            if hasattr(each, "set_layout"):
                each.set_layout(layout)

    @torch.no_grad()
    def _follow(self) -> None:
        """Have the mask, and tables of this layer's own, on the device that the layer is on."""
        self.mask.copy_(self.layout.mask)
        made = self.layout.tables(self.mask.device)
        with torch.inference_mode(False):
            self._tables = Tables(made.fprop.clone(), made.bprop.clone(), made.update.clone(), made.shape)

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()  # `to_empty` leaves the mask without values
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        mask = state_dict.get(f"{prefix}mask")
        if mask is not None:
            if mask.shape != self.mask.shape or int(mask.sum()) != self.layout.blocks:
                errors: list[str] = rest[-1]
                errors.append(
                    f"{prefix}mask: {tuple(mask.shape)} blocks, {int(mask.sum())} of them present, do not fit a layer "
                    f"of {self.layout}: a layer takes another mask with as many blocks present, and no other"
                )
                return
            mask = mask.detach().to("cpu", torch.bool, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._follow()
        if mask is not None and not torch.equal(mask, self.layout.mask.cpu()):
            self.set_layout(BlockLayout(mask, self.layout.block))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tables"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._follow()

    # Dense and back.

    @classmethod
    def from_dense(cls, linear: nn.Linear, layout: BlockLayout, features: Features = "last", **options: Any) -> Linear:
        """A layer with the blocks of a dense one that are present, and its bias; the others are dropped.

        Args:
            linear: of as many features as the layout.
            layout: of the new layer.
            features: of the new layer.
            **options: its accumulator and gate.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        return cls._filled(linear.weight.T, linear.bias, layout, features=features, **options).train(linear.training)

    @classmethod
    @torch.no_grad()
    def _filled(cls: type[Self], matrix: Tensor, bias: Tensor | None, layout: BlockLayout, **options: Any) -> Self:
        """A layer with the weights of a matrix [inputs, outputs] and a bias, in their dtype and on their device."""
        if matrix.shape != (layout.inputs, layout.outputs):
            raise ValueError(f"layout must be of {' to '.join(map(str, matrix.shape))} features, got {layout}")
        layer = cls(layout, bias=bias is not None, device=matrix.device, dtype=matrix.dtype, **options)
        layer.weight.copy_(layout.from_dense(matrix))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        return layer

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """A `torch.nn.Linear` with the same weights, gates applied, zero where there are no blocks.

        It takes features last.
        """
        linear = nn.Linear(self.inputs, self.outputs, self.bias is not None, self.weight.device, self.weight.dtype)
        linear.train(self.training).weight.copy_(self._matrix().T)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def _matrix(self) -> Tensor:
        """The weights as a dense matrix [inputs, outputs]."""
        weight = self.weight
        if self.gate is not None:
            weight = by_gates(weight, self.gate.float())
        return self.layout.to_dense(weight)

    def extra_repr(self) -> str:
        layout = self.layout
        options = {"bias": self.bias is not None, "features": self.features, "accumulator": self.accumulator}
        given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        size = f"{self.inputs}, {self.outputs}, block={layout.block}, density={layout.density:.1%}"
        return ", ".join([size, *given, *(["gate=True"] if self.gate is not None else [])])
