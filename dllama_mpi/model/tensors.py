"""The table of tensors: what a model holds, of which shape, and how each is cut. Everything else folds over it.

Names are Hugging Face's of Llama, where it has them; an architecture says what a published file calls them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from ..kernels.layout import BLOCK, ROWS, ceil_to
from ..parallel.partition import Axis, Range, Shard
from .config import (
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    ShortConvConfig,
)

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Cut(Enum):
    """How a tensor is shared out."""

    WHOLE = "whole"  # every rank has all of it
    ROWS = "rows"  # of a matrix (column-parallel in Megatron's terms), or elements of a vector
    COLUMNS = "columns"  # of a matrix (row-parallel), in blocks of 32
    FIRST = "first"  # all of it on the first rank, zeros on the others: it is summed over ranks


class Kind(Enum):
    """What a tensor is kept as."""

    VECTOR = "vector"  # float32
    MATRIX = "matrix"  # tiles of a format
    TABLE = "table"  # looked up in the file, row by row


@dataclass(frozen=True)
class TensorSpec:
    """One tensor.

    Attributes:
        shape: (n,) of a vector; (rows, cols) of a matrix; (experts, rows, cols) or (experts, n) of all experts'.
        cut, axis: how it is shared out, and along what; axis None if it is not.
        role: what rules of formats call it: "q", "gate", "router", ...
        reads: share of it that one token reads: 1, or chosen / all experts, 0 for the table.
        published: the format of this program in which it is published; "" for none.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    cut: Cut = Cut.WHOLE
    axis: Axis | None = None
    role: str = ""
    reads: float = 1.0
    published: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def experts(self) -> int:
        """How many matrices it is: of all experts, or one."""
        return self.shape[0] if self.kind is Kind.MATRIX and len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Part:
    """A part of a tensor: the whole's shape, and along each axis where the part begins and ends."""

    shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    @classmethod
    def whole(cls, *shape: int) -> Part:
        """Return all of a tensor."""
        return cls(shape, tuple((0, size) for size in shape))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The part's own shape."""
        return tuple(stop - start for start, stop in self.ranges)

    def __str__(self) -> str:
        return " x ".join(f"{start}..{stop}" for start, stop in self.ranges)


def part(spec: TensorSpec, shard: Shard) -> Part:
    """Return what a rank holds of a tensor.

    Columns are cut at multiples of 32: a block that the axis is cut through is held by both ranks, each of which
    leaves the other's columns of its activations zero.
    """
    whole = Part.whole(*spec.shape)
    if spec.axis is None or spec.cut in (Cut.WHOLE, Cut.FIRST):
        return whole
    first, last = shard.elements(spec.axis)
    if spec.cut is Cut.COLUMNS:
        start = first // BLOCK * BLOCK
        stop = min(ceil_to(last, BLOCK), spec.shape[-1]) if first < last else start
        return Part(spec.shape, (*whole.ranges[:-1], (start, stop)))
    along = len(spec.shape) - (2 if spec.kind is Kind.MATRIX else 1)
    return Part(spec.shape, (*whole.ranges[:along], (first, last), *whole.ranges[along + 1 :]))


# ---- axes


def heads_axis(c: AttentionConfig) -> Axis:
    """Return the axis of query heads; every rank has at least one."""
    total = c.num_heads * c.head_dim
    return Axis("heads", c.num_heads, c.head_dim, total, least=1, limit="num_attention_heads")


def kv_axis(c: AttentionConfig) -> Axis:
    """Return the axis of KV heads, which follow the query heads that read them."""
    return Axis(
        "kv_heads", c.num_kv_heads, c.head_dim, c.num_kv_heads * c.head_dim, group=c.num_heads // c.num_kv_heads
    )


def value_axis(c: DeltaNetConfig, size: int) -> Axis:
    """Return the axis of value heads, for tensors with `size` elements a head."""
    total = c.num_value_heads * size
    return Axis("value_heads", c.num_value_heads, size, total, least=1, limit="linear_num_value_heads")


def key_axis(c: DeltaNetConfig, size: int) -> Axis:
    """Return the axis of key heads, which follow the value heads that read them."""
    group = c.num_value_heads // c.num_key_heads
    return Axis("key_heads", c.num_key_heads, size, c.num_key_heads * size, group=group)


def inner_axis(c: MLPConfig, name: str = "inner") -> Axis:
    """Return the axis of a feed-forward layer's inner columns, in blocks of 32."""
    return Axis.of(name, c.intermediate_size, BLOCK)


def vocab_axis(c: ModelConfig) -> Axis:
    """Return the axis of the vocabulary, in tiles of 16 rows."""
    return Axis.of("vocab", c.vocab_size, ROWS)


def channels_axis(hidden: int, size: int = 1) -> Axis:
    """Return the axis of a convolution's channels, in blocks of 32, for tensors with `size` elements a channel."""
    return Axis.of("channels", hidden * size, BLOCK * size)


def head_axis(axis: Axis) -> Axis:
    """Return an axis of heads for tensors with one element a head."""
    return replace(axis, size=1, total=axis.units)


@functools.lru_cache(maxsize=64)
def axes(config: ModelConfig) -> tuple[tuple[Axis, Axis | None], ...]:
    """Return every axis of a model with the one that it follows, leaders first; see `partition.shards`."""
    found: dict[Axis, Axis | None] = {}
    for layer in dict.fromkeys(config.layers):
        mixer = layer.mixer
        if isinstance(mixer, AttentionConfig):
            heads, kv = heads_axis(mixer), kv_axis(mixer)
            found |= {heads: None, kv: heads, head_axis(heads): None}
        elif isinstance(mixer, DeltaNetConfig):
            value = value_axis(mixer, mixer.value_dim)
            found |= {value: None, value_axis(mixer, 1): None}
            found |= {value_axis(mixer, mixer.value_dim * mixer.kernel): None}
            for size in (mixer.key_dim, mixer.key_dim * mixer.kernel):
                found[key_axis(mixer, size)] = value
        else:
            found |= {channels_axis(config.hidden_size, size): None for size in (1, mixer.kernel)}
        feeds = layer.feed
        if isinstance(feeds, ExpertsConfig):
            found[inner_axis(feeds.expert, "expert_inner")] = None
            if feeds.shared is not None:
                found[inner_axis(feeds.shared, "shared_inner")] = None
        else:
            found[inner_axis(feeds)] = None
    found[vocab_axis(config)] = None
    return tuple(found.items())


# ---- the table


@functools.lru_cache(maxsize=64)
def tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return every tensor, layer by layer: the table of embeddings first, the lm_head last.

    The lm_head is listed for a tied model too; its values are then the table's.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    found = [TensorSpec(TABLE, (vocab, hidden), Kind.TABLE, role="embedding", reads=0.0)]
    for i, layer in enumerate(config.layers):
        found += layer_tensors(layer, f"model.layers.{i}", hidden)
    found.append(_vector("model.norm.weight", hidden))
    found.append(TensorSpec(HEAD, (vocab, hidden), Kind.MATRIX, Cut.ROWS, vocab_axis(config), "lm_head"))
    return tuple(found)


def layer_tensors(layer: LayerConfig, name: str, hidden: int) -> Iterator[TensorSpec]:
    """Yield the tensors of one layer, whose names begin with `name`."""
    if layer.norm_before:
        yield _vector(f"{name}.input_layernorm.weight", hidden)
        yield _vector(f"{name}.post_attention_layernorm.weight", hidden)
    if layer.norm_after:
        yield _vector(f"{name}.mixer_output_norm.weight", hidden)
        yield _vector(f"{name}.mlp_output_norm.weight", hidden)
    if isinstance(layer.mixer, AttentionConfig):
        yield from _attention(layer.mixer, f"{name}.self_attn", hidden)
    elif isinstance(layer.mixer, DeltaNetConfig):
        yield from _delta_net(layer.mixer, f"{name}.linear_attn", hidden)
    else:
        yield from _short_conv(layer.mixer, f"{name}.conv", hidden)
    if isinstance(layer.feed, ExpertsConfig):
        yield from _experts(layer.feed, f"{name}.mlp", hidden)
    else:
        yield from _mlp(layer.feed, f"{name}.mlp", hidden, inner_axis(layer.feed))


def _vector(name: str, size: int, cut: Cut = Cut.WHOLE, axis: Axis | None = None) -> TensorSpec:
    return TensorSpec(name, (size,), Kind.VECTOR, cut, axis)


def _rows(name: str, axis: Axis, cols: int, role: str, bias: bool = False) -> Iterator[TensorSpec]:
    """Yield a column-parallel matrix, Y_r = X A_r^T + b_r, and its bias. No communication."""
    yield TensorSpec(f"{name}.weight", (axis.total, cols), Kind.MATRIX, Cut.ROWS, axis, role)
    if bias:
        yield _vector(f"{name}.bias", axis.total, Cut.ROWS, axis)


def _columns(name: str, rows: int, axis: Axis, role: str, bias: bool = False) -> Iterator[TensorSpec]:
    """Yield a row-parallel matrix, Y = sum over ranks of X_r A_r^T, + b, and its bias. One all-reduce."""
    yield TensorSpec(f"{name}.weight", (rows, axis.total), Kind.MATRIX, Cut.COLUMNS, axis, role)
    if bias:
        yield _vector(f"{name}.bias", rows)


def _attention(c: AttentionConfig, name: str, hidden: int) -> Iterator[TensorSpec]:
    heads, kv = heads_axis(c), kv_axis(c)
    yield from _rows(f"{name}.q_proj", heads, hidden, "q", c.qkv_bias)
    yield from _rows(f"{name}.k_proj", kv, hidden, "k", c.qkv_bias)
    yield from _rows(f"{name}.v_proj", kv, hidden, "v", c.qkv_bias)
    if c.gate:
        yield from _rows(f"{name}.gate_proj", heads, hidden, "attention_gate", c.qkv_bias)
    yield from _columns(f"{name}.o_proj", hidden, heads, "o", c.o_bias)
    if c.qk_norm:
        for axis, which in ((heads, "q"), (kv, "k")):
            whole = c.qk_norm == "whole"
            size, cut = (axis.total, Cut.ROWS) if whole else (c.head_dim, Cut.WHOLE)
            yield _vector(f"{name}.{which}_norm.weight", size, cut, axis if whole else None)
    if c.sinks:
        yield _vector(f"{name}.sinks", c.num_heads, Cut.ROWS, head_axis(heads))


def _delta_net(c: DeltaNetConfig, name: str, hidden: int) -> Iterator[TensorSpec]:
    value, key, each = value_axis(c, c.value_dim), key_axis(c, c.key_dim), value_axis(c, 1)
    for which, axis in (("q", key), ("k", key), ("v", value), ("z", value), ("b", each), ("a", each)):
        yield from _rows(f"{name}.{which}_proj", axis, hidden, f"delta_{which}")
    for which, size in (("q", c.key_dim), ("k", c.key_dim), ("v", c.value_dim)):  # taps of a channel side by side
        axis = value_axis(c, size * c.kernel) if which == "v" else key_axis(c, size * c.kernel)
        yield _vector(f"{name}.conv_{which}", axis.total, Cut.ROWS, axis)
    yield _vector(f"{name}.A_log", each.total, Cut.ROWS, each)
    yield _vector(f"{name}.dt_bias", each.total, Cut.ROWS, each)
    yield _vector(f"{name}.norm.weight", c.value_dim)
    yield from _columns(f"{name}.out_proj", hidden, value, "o")


def _short_conv(c: ShortConvConfig, name: str, hidden: int) -> Iterator[TensorSpec]:
    channels, taps = channels_axis(hidden), channels_axis(hidden, c.kernel)
    for which in "bcx":
        yield from _rows(f"{name}.{which}_proj", channels, hidden, f"conv_{which}", c.bias)
    yield _vector(f"{name}.taps", taps.total, Cut.ROWS, taps)
    if c.bias:
        yield _vector(f"{name}.bias", hidden, Cut.ROWS, channels)
    yield from _columns(f"{name}.out_proj", hidden, channels, "o", c.bias)


def _mlp(c: MLPConfig, name: str, hidden: int, axis: Axis, prefix: str = "") -> Iterator[TensorSpec]:
    gate = "shared_gate_proj" if prefix == "shared_" else f"{prefix}gate"  # "shared_gate" is the gate of its output
    yield from _rows(f"{name}.gate_proj", axis, hidden, gate, c.bias)
    yield from _rows(f"{name}.up_proj", axis, hidden, f"{prefix}up", c.bias)
    yield from _columns(f"{name}.down_proj", hidden, axis, f"{prefix}down", c.bias)


def _experts(c: ExpertsConfig, name: str, hidden: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.router.weight", (c.num_experts, hidden), Kind.MATRIX, role="router")
    if c.router_bias:
        yield _vector(f"{name}.router.bias", c.num_experts)
    if c.correction:
        yield _vector(f"{name}.router.correction", c.num_experts)
    share = c.top_k / c.num_experts
    for spec in _mlp(c.expert, f"{name}.experts", hidden, inner_axis(c.expert, "expert_inner"), "expert_"):
        stacked = replace(spec, shape=(c.num_experts, *spec.shape), reads=share, published=c.published)
        yield replace(stacked, cut=Cut.FIRST) if spec.name.endswith("down_proj.bias") else stacked
    if c.shared is not None:
        yield from _mlp(c.shared, f"{name}.shared", hidden, inner_axis(c.shared, "shared_inner"), "shared_")
    if c.shared_gate:
        yield TensorSpec(f"{name}.shared_gate.weight", (1, hidden), Kind.MATRIX, role="shared_gate")
