"""Keys and values of past positions, for each sequence slot and this rank's KV heads."""

from __future__ import annotations

import numpy as np

from ..kernels.layout import BLOCK, ROWS, ceil_div, ceil_to

KV_TYPES = {"f16": np.uint16, "f32": np.float32}


class KVCache:
    """One slot for each sequence that runs at once, laid out as `kernels.attention` says.

    Memory is taken from the system as positions are written, not when the cache is made.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int, kv_type: str) -> None:
        rows, width = ceil_to(positions, BLOCK), ceil_to(head_dim, BLOCK)
        self.kv_type = kv_type
        # Zeros: what is not written yet is multiplied by zero, and must be a number.
        self._keys = np.zeros((layers, slots, kv_heads, rows // ROWS, width, ROWS), KV_TYPES[kv_type])
        self._values = np.zeros((layers, slots, kv_heads, ceil_div(head_dim, ROWS), rows, ROWS), KV_TYPES[kv_type])

    def layer(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's keys and values."""
        return self._keys[index], self._values[index]


def bytes_per_position(layers: int, kv_heads: int, head_dim: int, kv_type: str) -> int:
    """Return the bytes that one position of one slot takes."""
    width = ceil_to(head_dim, BLOCK) + ceil_to(head_dim, ROWS)
    return layers * kv_heads * width * np.dtype(KV_TYPES[kv_type]).itemsize
