"""The byte model: embedding -> MLSTM -> output layer, several seeds stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lowprec.sparse.recurrent import MLSTM, State


class ByteModel(nn.Module):
    """Predicts the next symbol; R models of different seeds at once, by batched products.

    x = the symbol's embedding row, of norm 1, times its gain; h = MLSTM(x); logits = (h · W_y, its columns of norm 1)
    times a gain plus a bias. Embedding and output layer stay in full precision; the MLSTM follows its policy.
    The embedding begins orthogonal, W_y normal with deviation 0.02, gains at 1, biases at 0.

    Args:
        symbols: size of the alphabet V.
        hidden: features H of the MLSTM.
        steps: its internal steps.
        embedding: features of the embedding.
        seeds: one for each replica; a seed gives the same weights whatever its company.
        options: of the MLSTM: policy, container, compile.

    Source: the 2017 slides "Small World Network Architectures".
    """

    def __init__(
        self, symbols: int, hidden: int, steps: int, embedding: int, seeds: Sequence[int], **options: Any
    ) -> None:
        super().__init__()
        rows, columns = zip(*(_draw(seed, symbols, hidden, embedding) for seed in seeds), strict=True)
        self.embedding, self.output = nn.Parameter(torch.stack(rows)), nn.Parameter(torch.stack(columns))
        self.embedding_gain = nn.Parameter(torch.ones(len(seeds), symbols, 1))
        self.output_gain = nn.Parameter(torch.ones(len(seeds), 1, symbols))
        self.output_bias = nn.Parameter(torch.zeros(len(seeds), 1, symbols))
        self.mlstm = MLSTM(embedding, hidden, steps, replicas=len(seeds), **options)

    def forward(self, text: Tensor, state: State) -> tuple[Tensor, State]:
        """Score a chunk.

        Args:
            text: int64 [R, T + 1, N]: T symbols to read, and the T that follow them.
            state: h and c [R, N, H].

        Returns:
            -ln of the probability of each symbol, float32 [R, T, N], and the state after the chunk.
        """
        table = normalize(self.embedding, dim=-1) * self.embedding_gain
        # Rows are looked up by a product: its gradient is one too, and adds up in a fixed order on every device.
        symbols = torch.arange(table.shape[1], device=text.device)
        x = torch.bmm((text[:, :-1, :, None] == symbols).to(table.dtype).flatten(1, 2), table)
        shape = text[:, 1:].shape
        hs, state = self.mlstm(x.view(*shape, -1), state)
        logits = torch.bmm(hs.flatten(1, 2), normalize(self.output, dim=1)) * self.output_gain + self.output_bias
        nats = cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
        return nats.view(shape), state


def _draw(seed: int, symbols: int, hidden: int, embedding: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = nn.init.orthogonal_(torch.empty(symbols, embedding), generator=generator)
    return rows, torch.empty(hidden, symbols).normal_(0, 0.02, generator=generator)
