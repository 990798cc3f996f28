"""lowprec: low-precision numerics and quantization for PyTorch.

How few bits does a model need, and where? Custom float formats with the same bits everywhere, and a precision policy
for any model. This page is the public API.
"""

from lowprec.cast import decode, encode, quantize
from lowprec.formats import FloatFormat, format
from lowprec.rounding import Rounding

__version__ = "0.1.0"

__all__ = ["FloatFormat", "Rounding", "decode", "encode", "format", "quantize"]
