"""Block-sparse layouts, products and layers; recurrent layers."""

from lowprec.sparse import patterns
from lowprec.sparse.growth import absent_scores, carry, grow, prune
from lowprec.sparse.layout import BlockLayout
from lowprec.sparse.ops import input_grad, matmul, weight_grad
from lowprec.sparse.recurrent import LSTM, MLSTM

__all__ = [
    "LSTM",
    "MLSTM",
    "BlockLayout",
    "absent_scores",
    "carry",
    "grow",
    "input_grad",
    "matmul",
    "patterns",
    "prune",
    "weight_grad",
]
