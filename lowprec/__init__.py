"""lowprec: low-precision numerics and quantization for PyTorch.

How few bits does a model need, and where? Custom float formats with the same bits everywhere, and a precision policy
for any model. This page is the public API.
"""

from lowprec import distributed, fused, optim
from lowprec.accumulate import dot, matmul, sum
from lowprec.accumulator import Accumulator, Level
from lowprec.bias import Cast
from lowprec.block import Packed, load_packed, save_packed
from lowprec.cast import decode, encode, quantize
from lowprec.formats import BlockFormat, FloatFormat, format
from lowprec.measure import Statistics, measure
from lowprec.policy import Policy, recipes
from lowprec.report import report
from lowprec.rounding import Rounding
from lowprec.suggest import suggest
from lowprec.wrap import unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "BlockFormat",
    "Cast",
    "FloatFormat",
    "Level",
    "Packed",
    "Policy",
    "Rounding",
    "Statistics",
    "decode",
    "distributed",
    "dot",
    "encode",
    "format",
    "fused",
    "load_packed",
    "matmul",
    "measure",
    "optim",
    "quantize",
    "recipes",
    "report",
    "save_packed",
    "suggest",
    "sum",
    "unwrap",
    "wrap",
]
