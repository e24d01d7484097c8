"""Keys and values of past positions, for each sequence slot and this rank's KV heads."""

from __future__ import annotations

import numpy as np

KV_TYPES = {"f16": np.uint16, "f32": np.float32}


class KVCache:
    """One slot for each sequence that runs at once.

    Memory is taken from the system as positions are written, not when the cache is made.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int, kv_type: str) -> None:
        shape = (layers, slots, kv_heads, positions, head_dim)
        self.slots, self.positions = slots, positions
        self._keys = np.empty(shape, KV_TYPES[kv_type])
        self._values = np.empty(shape, KV_TYPES[kv_type])

    def layer(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a layer's keys and values, each (slots, kv_heads, positions, head_dim) float32 or float16 bits."""
        return self._keys[index], self._values[index]


def bytes_per_position(layers: int, kv_heads: int, head_dim: int, kv_type: str) -> int:
    """Return the bytes that one position of one slot takes."""
    return 2 * layers * kv_heads * head_dim * np.dtype(KV_TYPES[kv_type]).itemsize
