"""States of the casts of a policy: each tensor that a module rounds has one, found by the order of its occurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.adapt import CALLS, SHIFT, new_state
from lowprec.bias import Rule, first_seed
from lowprec.formats import BlockFormat

ROWS = 32
"""States that are made at a time. A table never moves or grows, as a CUDA graph may write to it: others follow it."""

_FAR = 1 << 20  # between the seeds of two roles, more than a module rounds tensors


class Slots:
    """The states of one role in one module.

    Args:
        text: the role's rule.
        place: a number that is this role's alone in the model. Slot k of role n draws with the seed of the rule
            + 2^20 · n + k; a rule without a seed gets one here, from torch's default CPU generator.
        device: where the states are at first; they follow the operands.
    """

    def __init__(self, text: str, place: int, device: torch.device) -> None:
        rule = Rule.parse(text)
        self.past = rule.past
        self.is_measured = rule.is_measured
        self.emax = 0 if isinstance(rule.fmt, BlockFormat) else rule.fmt.emax
        self.seed = first_seed(rule) + _FAR * place if rule.draws else None
        self.taken = 0
        self.tables: list[Tensor] = []
        self._grow(device)

    def take(self, device: torch.device) -> Tensor:
        """The state of the next tensor of this forward pass.

        Raises:
            ValueError: where a table is needed that cannot be made: in compiled code, or in a CUDA graph.
        """
        slot = self.taken
        self.taken = slot + 1
        if self.tables[0].device != device:
            self._move(device)
        if slot // ROWS == len(self.tables):
            if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                raise ValueError(
                    f"more than {slot} tensors of one role in a module: run the model once uncompiled first"
                )
            self._grow(device)
        return self.tables[slot // ROWS][slot % ROWS]

    def read(self) -> Tensor:
        """The states of all slots that have been called, on the CPU: int64 [slots, numbers]."""
        rows = torch.cat([table.cpu() for table in self.tables])
        called = rows[:, CALLS].nonzero()
        return rows[: int(called.max()) + 1].clone() if len(called) else rows[:0]

    def load(self, rows: Tensor) -> None:
        """Take states that were read, and none beyond them.

        Raises:
            ValueError: for states of another kind of cast.
        """
        width = self.tables[0].shape[1]
        if rows.dim() != 2 or rows.shape[1] != width or rows.dtype != torch.int64:
            raise ValueError(
                f"expected int64 states of {width} numbers each, got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        while len(self.tables) * ROWS < len(rows):
            self._grow(self.tables[0].device)
        for n, table in enumerate(self.tables):
            table.copy_(self._fresh(n))
            part = rows[n * ROWS : (n + 1) * ROWS]
            table[: len(part)].copy_(part)

    def emaxes(self) -> tuple[int, ...]:
        """The exponent of the largest value of every cast with a measured bias that has been called.

        Waits for the device.
        """
        return tuple(self.emax + int(row[SHIFT]) for row in self.read() if row[CALLS])

    def _fresh(self, n: int) -> Tensor:
        if self.seed is None:
            return new_state([0] * ROWS, self.past)
        first = self.seed + n * ROWS
        return new_state([(first + k + 2**63) % 2**64 - 2**63 for k in range(ROWS)], self.past)

    def _grow(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tables.append(_static(self._fresh(len(self.tables)).to(device)))

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tables = [_static(table.to(device)) for table in self.tables]


def _static(table: Tensor) -> Tensor:
    # What `torch._dynamo.mark_static_address` sets, without importing the compiler.
    table._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return table
