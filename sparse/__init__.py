"""Block-sparse layouts, products and layers; recurrent layers."""

from lowprec.sparse.recurrent import LSTM, MLSTM

__all__ = ["LSTM", "MLSTM"]
