"""Tiny random models of dense families beside Llama's, in the manner of ``tests.tiny_models``."""

from tests.tiny_dense import tensors as tensors  # enters the families' tensors
from tests.tiny_dense.cases import DENSE_ABLATIONS, DENSE_CASES

__all__ = ["DENSE_ABLATIONS", "DENSE_CASES"]
