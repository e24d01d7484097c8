"""Keys and values of past positions, for each sequence slot and this rank's KV heads."""

from __future__ import annotations

import numpy as np

from ..kernels.layout import BLOCK, FORMATS, ROWS, ceil_div, ceil_to

KV_TYPES = {"f16": np.uint16, "f32": np.float32, "q80": np.int8}


class KVCache:
    """One slot for each sequence that runs at once, laid out as `kernels.attention` says.

    Memory is taken from the system as positions are written, not when the cache is made.

    Attributes:
        marker: what kernels take as the cache's format.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int, kv_type: str) -> None:
        rows, width = ceil_to(positions, BLOCK), ceil_to(head_dim, BLOCK)
        self.marker = FORMATS["f32" if kv_type == "q80" else kv_type].marker
        # Zeros: what is not written yet is multiplied by zero, and must be a number.
        every, blocks = (layers, slots, kv_heads), width // BLOCK
        self._keys = np.zeros((*every, rows // ROWS, width, ROWS), KV_TYPES[kv_type])
        self._values = np.zeros((*every, ceil_div(head_dim, ROWS), rows, ROWS), KV_TYPES[kv_type])
        quantised = kv_type == "q80"
        self._key_scales = np.zeros((*every, rows // ROWS, blocks, ROWS if quantised else 0), np.uint16)
        self._value_scales = np.zeros((*every, blocks, rows if quantised else 0), np.uint16)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return keys, their scales, values and their scales; the first axis is of layers."""
        return self._keys, self._key_scales, self._values, self._value_scales

    def layer(self, index: int) -> tuple[np.ndarray, ...]:
        """Return a layer's keys, their scales, values and their scales."""
        return tuple(array[index] for array in self.arrays())


def bytes_per_position(layers: int, kv_heads: int, head_dim: int, kv_type: str) -> int:
    """Return the bytes that one position of one slot takes."""
    width, blocks = ceil_to(head_dim, BLOCK) + ceil_to(head_dim, ROWS), ceil_div(head_dim, BLOCK)
    scales = 2 * 2 * blocks if kv_type == "q80" else 0
    return layers * kv_heads * (width * np.dtype(KV_TYPES[kv_type]).itemsize + scales)
