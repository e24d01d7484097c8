"""The gated feed-forward layer (SwiGLU)."""

from __future__ import annotations

import numpy as np

from ..kernels.layout import BLOCK, ceil_to
from ..weights.checkpoint import Checkpoint
from .config import ModelConfig
from .context import Context
from .linear import ColumnParallelLinear, RowParallelLinear, described


class MLP:
    """down(silu(gate(x)) * up(x)): gate and up column-parallel, down row-parallel. One all-reduce."""

    def __init__(self, source: Checkpoint, layer: int, config: ModelConfig, context: Context) -> None:
        name, shape = f"model.layers.{layer}.mlp", (config.intermediate_size, config.hidden_size)
        part, fmt, bias = context.shard.intermediate, context.format, config.mlp_bias
        self.gate = ColumnParallelLinear(source, f"{name}.gate_proj", shape, part, fmt, bias)
        self.up = ColumnParallelLinear(source, f"{name}.up_proj", shape, part, fmt, bias)
        self.down = RowParallelLinear(source, f"{name}.down_proj", shape[::-1], part, fmt, bias)
        self.width = ceil_to(part[1] - part[0], BLOCK)
        self.matrices = described(self.gate.matrix, self.up.matrix, self.down.matrix)
        self.biases = np.stack([self.gate.bias, self.up.bias])  # (2, 0) for none
