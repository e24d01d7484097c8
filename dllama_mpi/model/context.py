"""What every layer of one rank works with: its shard, its group, the KV cache and shared scratch buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..kernels.layout import BLOCK, TileFormat, ceil_to
from ..parallel.group import TensorParallelGroup
from ..parallel.partition import Shard
from ..weights.tiles import aligned_empty
from .config import ModelConfig
from .kv_cache import KVCache
from .linear import Activations


@dataclass
class Context:
    """One rank's surroundings of the layers. Buffers are made by `allocate`, once the layers' widths are known.

    Attributes:
        hidden: normalised input of a layer. qkv: (tokens, n) float32. attended: input of o. inner: input of down.
        up: (tokens, n) float32. partial: (2, tokens, hidden to 32s) float32, this rank's terms of the all-reduces of
            attention and MLP, where the group wants them.
    """

    group: TensorParallelGroup
    shard: Shard
    format: TileFormat
    threads: int
    hidden: Activations = field(init=False)
    attended: Activations = field(init=False)
    inner: Activations = field(init=False)
    qkv: np.ndarray = field(init=False)
    up: np.ndarray = field(init=False)
    partial: np.ndarray = field(init=False)
    cache: KVCache = field(init=False)

    def allocate(
        self,
        config: ModelConfig,
        tokens: int,
        slots: int,
        positions: int,
        kv_type: str,
        qkv: int,
        attended: int,
        inner: int,
        partial: np.ndarray,
    ) -> None:
        """Make buffers for steps of up to `tokens` tokens and a KV cache of `slots` x `positions`.

        qkv, attended, inner: widths of those buffers. partial: see `TensorParallelGroup.prepare_all_reduce`.
        """
        hidden = ceil_to(config.hidden_size, BLOCK)
        self.hidden = Activations(tokens, hidden, self.format)
        self.attended = Activations(tokens, attended, self.format)
        self.inner = Activations(tokens, inner, self.format)
        self.qkv = aligned_empty((tokens, qkv), np.float32)
        self.up = aligned_empty((tokens, ceil_to(inner, BLOCK)), np.float32)
        self.partial = partial
        for array in (self.qkv, self.up):
            array[:] = 0  # padding that no product writes takes part in sums
        kv_heads = self.shard.kv_heads[1] - self.shard.kv_heads[0]
        self.cache = KVCache(config.num_layers, slots, kv_heads, positions, config.head_dim, kv_type)
