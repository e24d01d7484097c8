"""Which tensors a config implies, under Hugging Face's names, and whether a model's files hold them."""

from __future__ import annotations

from ..kernels.layout import BLOCK, FORMATS, ceil_to
from ..parallel.partition import Shard
from ..weights.checkpoint import Checkpoint
from ..weights.files import Part
from ..weights.tiles import check_shape
from .config import ModelConfig


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the (rows, cols) of every matrix that is kept as tiles, layer by layer, `lm_head.weight` last.

    The lm_head is listed for a tied model too; its values are then the embedding table's. The table itself,
    `model.embed_tokens.weight`, has the lm_head's shape and is not listed: its rows are looked up, not multiplied.
    """
    linears = _layer_linears(config)
    shapes = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(config.num_layers)
        for name, (shape, _) in linears.items()
    }
    return {**shapes, "lm_head.weight": (config.vocab_size, config.hidden_size)}


def vector_shapes(config: ModelConfig) -> dict[str, int]:
    """Return the size of every norm and bias, layer by layer, the final norm last."""
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    layer_sizes = dict.fromkeys(names, config.hidden_size)
    if config.qk_norm:
        layer_sizes |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), config.head_dim)
    layer_sizes |= {f"{name}.bias": shape[0] for name, (shape, bias) in _layer_linears(config).items() if bias}
    sizes = {
        f"model.layers.{layer}.{name}": size for layer in range(config.num_layers) for name, size in layer_sizes.items()
    }
    return {**sizes, "model.norm.weight": config.hidden_size}


def check_files(source: Checkpoint, config: ModelConfig) -> None:
    """Check that every tensor is there, and of the shape that the config implies, without reading one.

    Raises:
        ModelError: the first tensor that is missing or of another shape.
    """
    held = FORMATS.get(source.format_name or "")
    for name, shape in {**matrix_shapes(config), **{n: (size,) for n, size in vector_shapes(config).items()}}.items():
        if name == "lm_head.weight" and config.tie_word_embeddings and name not in source:
            continue
        check_shape(source[name], shape, held)


def _layer_linears(c: ModelConfig) -> dict[str, tuple[tuple[int, int], bool]]:
    """Return ((rows, cols), whether it has a bias) of each linear layer of one decoder layer."""
    queries, keys, hidden, inner = (
        c.num_heads * c.head_dim,
        c.num_kv_heads * c.head_dim,
        c.hidden_size,
        c.intermediate_size,
    )
    return {
        "self_attn.q_proj": ((queries, hidden), c.qkv_bias),
        "self_attn.k_proj": ((keys, hidden), c.qkv_bias),
        "self_attn.v_proj": ((keys, hidden), c.qkv_bias),
        "self_attn.o_proj": ((hidden, queries), c.o_bias),
        "mlp.gate_proj": ((inner, hidden), c.mlp_bias),
        "mlp.up_proj": ((inner, hidden), c.mlp_bias),
        "mlp.down_proj": ((hidden, inner), c.mlp_bias),
    }


def slice_parts(config: ModelConfig, shard: Shard) -> dict[str, Part]:
    """Return which parts of its matrices and vectors a rank loads, in the order of `matrix_shapes`, vectors last.

    What `Attention`, `MLP` and `ParallelLMHead` ask a checkpoint for: a slice file holds these.
    """
    dim = config.head_dim
    queries, keys = _times(shard.heads, dim), _times(shard.kv_heads, dim)
    blocks = (queries[0] // BLOCK * BLOCK, min(ceil_to(queries[1], BLOCK), config.num_heads * dim))
    rows = {"q": queries, "k": keys, "v": keys, "gate": shard.intermediate, "up": shard.intermediate}
    cols = {"o": blocks, "down": shard.intermediate}

    def part(name: str, shape: tuple[int, ...]) -> Part:
        kind = name.split(".")[-2].removesuffix("_proj")
        ranges = [(0, size) for size in shape]
        if kind == "lm_head":
            ranges[0] = shard.vocab
        elif kind in rows:
            ranges[0] = rows[kind]
        elif kind in cols and len(shape) == 2:  # the bias of a layer cut by columns is added whole
            ranges[1] = cols[kind]
        return Part(shape, tuple(ranges))

    shapes: dict[str, tuple[int, ...]] = {**matrix_shapes(config)}
    shapes |= {name: (size,) for name, size in vector_shapes(config).items()}
    return {name: part(name, shape) for name, shape in shapes.items()}


def _times(heads: tuple[int, int], dim: int) -> tuple[int, int]:
    return heads[0] * dim, heads[1] * dim
