"""Grouped-query attention of one rank's heads."""

from __future__ import annotations

import math

import numpy as np

from ..kernels.layout import BLOCK, ceil_to
from ..weights.checkpoint import Checkpoint
from ..weights.tiles import load_vector
from .config import ModelConfig
from .context import Context
from .linear import EMPTY, ColumnParallelLinear, RowParallelLinear, described


class Attention:
    """q, k and v column-parallel by heads, o row-parallel over the same heads. One all-reduce."""

    def __init__(self, source: Checkpoint, layer: int, config: ModelConfig, context: Context) -> None:
        c, shard, fmt = config, context.shard, context.format
        name, dim = f"model.layers.{layer}.self_attn", c.head_dim
        self.heads, kv_heads = shard.heads, shard.kv_heads
        q_rows, kv_rows = (self.heads[0] * dim, self.heads[1] * dim), (kv_heads[0] * dim, kv_heads[1] * dim)
        kv_shape = (c.num_kv_heads * dim, c.hidden_size)
        q_shape = (c.num_heads * dim, c.hidden_size)
        self.q = ColumnParallelLinear(source, f"{name}.q_proj", q_shape, q_rows, fmt, c.qkv_bias)
        self.k = ColumnParallelLinear(source, f"{name}.k_proj", kv_shape, kv_rows, fmt, c.qkv_bias)
        self.v = ColumnParallelLinear(source, f"{name}.v_proj", kv_shape, kv_rows, fmt, c.qkv_bias)
        # Blocks of 32 columns that a cut between heads goes through are held by both ranks; each leaves the other's
        # columns of its activations zero.
        cols = (q_rows[0] // BLOCK * BLOCK, min(ceil_to(q_rows[1], BLOCK), q_shape[0]))
        self.o = RowParallelLinear(source, f"{name}.o_proj", (c.hidden_size, q_shape[0]), cols, fmt, c.o_bias)
        self.out_start = q_rows[0] - cols[0]
        self.q_norm = load_vector(source, f"{name}.q_norm.weight", dim) if c.qk_norm else EMPTY
        self.k_norm = load_vector(source, f"{name}.k_norm.weight", dim) if c.qk_norm else EMPTY
        self.bias = self._joined_bias() if c.qkv_bias else EMPTY
        self.matrices = described(self.q.matrix, self.k.matrix, self.v.matrix, self.o.matrix)
        self.scale = np.float32(1 / math.sqrt(dim))

    @property
    def width(self) -> int:
        """Columns of the buffer for q, k and v together."""
        return self.q.width + self.k.width + self.v.width

    @property
    def out_cols(self) -> int:
        """Columns of the o projection's input."""
        return self.o.matrix.cols

    def _joined_bias(self) -> np.ndarray:
        bias = np.zeros(self.width, np.float32)
        start = 0
        for linear in (self.q, self.k, self.v):
            bias[start : start + linear.bias.size] = linear.bias
            start += linear.width
        return bias
