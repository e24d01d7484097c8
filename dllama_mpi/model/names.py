"""Which tensors a config implies, under Hugging Face's names, and whether a model's files hold them."""

from __future__ import annotations

from ..kernels.layout import FORMATS
from ..weights.checkpoint import Checkpoint
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
