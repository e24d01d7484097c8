"""The gated feed-forward layer (SwiGLU)."""

from __future__ import annotations

import numpy as np

from ..kernels import elementwise
from ..kernels.layout import BLOCK, ceil_to
from ..weights.checkpoint import Checkpoint
from .config import ModelConfig
from .context import Context
from .linear import Activations, ColumnParallelLinear, RowParallelLinear


class MLP:
    """down(silu(gate(x)) * up(x)): gate and up column-parallel, down row-parallel. One all-reduce."""

    def __init__(self, source: Checkpoint, layer: int, config: ModelConfig, context: Context) -> None:
        name, shape = f"model.layers.{layer}.mlp", (config.intermediate_size, config.hidden_size)
        part, fmt, bias = context.shard.intermediate, context.format, config.mlp_bias
        self.gate = ColumnParallelLinear(source, f"{name}.gate_proj", shape, part, fmt, bias)
        self.up = ColumnParallelLinear(source, f"{name}.up_proj", shape, part, fmt, bias)
        self.down = RowParallelLinear(source, f"{name}.down_proj", shape[::-1], part, fmt, bias)
        self.width = ceil_to(part[1] - part[0], BLOCK)

    def __call__(self, x: Activations, residual: np.ndarray, context: Context) -> None:
        """Add the MLP of normalised x to the residual (tokens, hidden)."""
        n, threads, inner = len(residual), context.threads, context.inner
        up = context.up[:n]
        self.gate(x, inner.values, n, threads)
        self.up(x, up, n, threads)
        elementwise.silu_mul(inner.values[:n], up, self.gate.bias, self.up.bias, *inner.quantised(n))
        self.down(inner, residual, context.partial[:n], context.group, threads)
