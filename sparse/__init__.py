"""Block-sparse layouts, patterns, products and layers; recurrent layers."""

from lowprec.sparse import patterns
from lowprec.sparse.convolution import Conv2d, from_cn, to_cn
from lowprec.sparse.growth import absent_scores, carry, grow, prune
from lowprec.sparse.layout import BlockLayout
from lowprec.sparse.linear import Linear
from lowprec.sparse.norms import BatchNorm, LayerNorm, weight_norm
from lowprec.sparse.ops import input_grad, matmul, weight_grad
from lowprec.sparse.recurrent import LSTM, MLSTM
from lowprec.sparse.rewiring import Rewired, Rewiring
from lowprec.sparse.sparsify import ChannelsLast, SparsityReport, report, sparsify

__all__ = [
    "LSTM",
    "MLSTM",
    "BatchNorm",
    "BlockLayout",
    "ChannelsLast",
    "Conv2d",
    "LayerNorm",
    "Linear",
    "Rewired",
    "Rewiring",
    "SparsityReport",
    "absent_scores",
    "carry",
    "from_cn",
    "grow",
    "input_grad",
    "matmul",
    "patterns",
    "prune",
    "report",
    "sparsify",
    "to_cn",
    "weight_grad",
    "weight_norm",
]
