"""How much memory a rank's slice takes: arithmetic on a config, no weights read."""

from __future__ import annotations

from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_div, ceil_to
from ..parallel.partition import Shard
from .config import ModelConfig
from .kv_cache import bytes_per_position


def weight_bytes(config: ModelConfig, shard: Shard, fmt: TileFormat) -> int:
    """Return the bytes of a rank's weights, its part of the lm_head included, the mapped embedding table not."""
    c, dim = config, config.head_dim
    q = (shard.heads[1] - shard.heads[0]) * dim
    kv = (shard.kv_heads[1] - shard.kv_heads[0]) * dim
    inner, vocab = shard.intermediate[1] - shard.intermediate[0], shard.vocab[1] - shard.vocab[0]
    first, last = shard.heads[0] * dim // BLOCK * BLOCK, ceil_to(shard.heads[1] * dim, BLOCK)
    matrices = [(q, c.hidden_size), (kv, c.hidden_size), (kv, c.hidden_size), (c.hidden_size, last - first)]
    matrices += [(inner, c.hidden_size)] * 2 + [(c.hidden_size, inner)]
    tiles = c.num_layers * sum(ceil_div(r, ROWS) * ceil_div(k, BLOCK) for r, k in matrices)
    tiles += ceil_div(vocab, ROWS) * ceil_div(c.hidden_size, BLOCK)
    norms = 4 * c.hidden_size * (2 * c.num_layers + 1)
    return tiles * fmt.tile_bytes + norms


def buffer_bytes(config: ModelConfig, shard: Shard, tokens: int, ranks: int) -> int:
    """Return about how many bytes the scratch buffers of steps of up to `tokens` tokens take."""
    inner = shard.intermediate[1] - shard.intermediate[0]
    heads = (shard.heads[1] - shard.heads[0]) + 2 * (shard.kv_heads[1] - shard.kv_heads[0])
    reduce = 3 * config.hidden_size if ranks > 1 else 0
    floats = 3 * config.hidden_size + 3 * inner + 2 * heads * config.head_dim + reduce
    logits = 64 * (shard.vocab[1] - shard.vocab[0])
    return 4 * (tokens * floats + logits)


def cache_bytes(config: ModelConfig, shard: Shard, kv_type: str) -> int:
    """Return the KV cache's bytes for one position of one slot."""
    return bytes_per_position(config.num_layers, shard.kv_heads[1] - shard.kv_heads[0], config.head_dim, kv_type)
