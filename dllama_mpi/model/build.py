"""A rank's weights as compiled code takes them: loaded by the table, then stacked layer upon layer for each segment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError
from ..kernels.activation import ACTIVATIONS
from ..kernels.attention import Heads
from ..kernels.delta_net import DeltaNetShape
from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_to
from ..kernels.matrix import Matrix
from ..parallel.partition import Shard
from ..weights.slices import origin
from ..weights.source import Tensor, WeightSource
from ..weights.tiles import TileMatrix, check_shape, load_matrix, load_vector
from .attention import Attention
from .config import AttentionConfig, DeltaNetConfig, ExpertsConfig, MLPConfig, ModelConfig, ShortConvConfig
from .experts import SIGMOID, SOFTMAX, Experts, NoMLP, Routing
from .forward import Norms, Segment
from .linear import NoMatrix, SideBySide
from .mlp import GatedMLP
from .segments import Run
from .state import DeltaNets, ShortConvs
from .tensors import TABLE, Cut, Kind, heads_axis, part, tensors, value_axis


@dataclass
class RankWeights:
    """What a rank holds: matrices and vectors by name, and the table of embeddings."""

    held: dict[str, TileMatrix | np.ndarray]
    table: Tensor

    def matrix(self, name: str) -> TileMatrix:
        """Return a matrix."""
        found = self.held[name]
        assert isinstance(found, TileMatrix)
        return found

    def vector(self, name: str) -> np.ndarray:
        """Return a vector."""
        found = self.held[name]
        assert isinstance(found, np.ndarray)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(each.nbytes for each in self.held.values())


def check_files(source: WeightSource, config: ModelConfig) -> None:
    """Check that every tensor is there, of the shape that the config implies, and that there are no others.

    Raises:
        ModelError: the first tensor that is missing or of another shape, or those that the table does not name.
    """
    names = [spec.name for spec in tensors(config)]
    for spec in tensors(config):
        found = origin(source, spec.name) if config.tie_word_embeddings else spec.name
        check_shape(source[found], spec.shape)
    unknown = source.unknown([*names])
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ModelError(
            f"{source.folder}: {config.model_type} has no use for tensor{'s' * (len(unknown) > 1)}"
            f" {', '.join(each[:80] for each in unknown[:3])}{more};"
            " the result would be wrong without knowing what they are for"
        )


def load(
    source: WeightSource,
    config: ModelConfig,
    shard: Shard,
    formats: Mapping[str, TileFormat],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> RankWeights:
    """Load a rank's part of every tensor; `progress` wraps the iteration over tensors.

    Raises:
        ModelError: a tensor is missing, does not fit the config, or has values that are no numbers.
    """
    held: dict[str, TileMatrix | np.ndarray] = {}
    layer = ""
    for spec in progress(tensors(config)):
        own = part(spec, shard)
        name = origin(source, spec.name) if config.tie_word_embeddings else spec.name
        if spec.kind is Kind.MATRIX:
            held[spec.name] = load_matrix(source[name], spec.shape, own.ranges, formats[spec.name])
        elif spec.kind is Kind.VECTOR:
            values = load_vector(source[name], spec.shape, own.ranges)
            held[spec.name] = np.zeros_like(values) if spec.cut is Cut.FIRST and shard.rank > 0 else values
        if spec.name.split(".")[:3] != layer:
            source.let_go()
            layer = spec.name.split(".")[:3]
    table = source[origin(source, TABLE) if config.tie_word_embeddings else TABLE]
    return RankWeights(held, table)


# ---- stacking


def padded(values: np.ndarray) -> np.ndarray:
    """Return a vector with zeros added, to a multiple of 32."""
    return np.pad(values, (0, ceil_to(len(values), BLOCK) - len(values)))


class Stacker:
    """Puts what a segment's layers have on top of each other."""

    def __init__(self, weights: RankWeights, run: Run) -> None:
        self._weights, self._run = weights, run

    def _names(self, suffix: str) -> list[str]:
        return [f"model.layers.{i}.{suffix}" for i in self._run.layers]

    def has(self, suffix: str) -> bool:
        """Return whether the layers have such a tensor."""
        return self._names(suffix)[0] in self._weights.held

    def matrix(self, suffix: str) -> Any:
        """Return a matrix of all layers for compiled code; `NoMatrix` if they have none."""
        if not self.has(suffix):
            return NoMatrix()
        found = [self._weights.matrix(name) for name in self._names(suffix)]
        return Matrix(np.stack([matrix.fields() for matrix in found]))

    def columns(self, suffix: str) -> int:
        """Return the columns that a matrix's output takes in a `SideBySide`; 0 if there is none."""
        return ROWS * self._weights.matrix(self._names(suffix)[0]).tiles.shape[1] if self.has(suffix) else 0

    def vector(self, suffix: str, transform: Callable[[np.ndarray], np.ndarray] = lambda v: v) -> np.ndarray:
        """Return a vector of all layers (layers, n); (layers, 0) if they have none."""
        if not self.has(suffix):
            return np.zeros((len(self._run.layers), 0), np.float32)
        return np.ascontiguousarray(np.stack([transform(self._weights.vector(name)) for name in self._names(suffix)]))

    def joined(self, suffixes: Iterable[tuple[str, str]], rows: int = 1) -> np.ndarray:
        """Return vectors (layers, rows * n) side by side, each padded to its matrix's columns; without any, n is 0.

        suffixes: of vectors and of their matrices. rows: how many values there are for each column, row by row.
        """
        present = [(vector, matrix) for vector, matrix in suffixes if self.has(matrix)]
        if not any(self.has(vector) for vector, _ in present):
            return np.zeros((len(self._run.layers), 0), np.float32)
        parts = []
        for vector, matrix in present:
            values = self.vector(vector).reshape(len(self._run.layers), -1, rows).swapaxes(1, 2)
            out = np.zeros((len(self._run.layers), rows, self.columns(matrix)), np.float32)
            out[:, :, : values.shape[2]] = values
            parts.append(out)
        return np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(len(self._run.layers), -1))


def _attention(c: AttentionConfig, s: Stacker, config: ModelConfig, shard: Shard, run: Run) -> Attention:
    names = [f"self_attn.{which}_proj" for which in ("q", "k", "v", "gate")]
    starts = np.cumsum([0, *(s.columns(f"{name}.weight") for name in names)]).tolist()
    first, last = shard.units(heads_axis(c))
    group = c.num_heads // c.num_kv_heads
    attentions = [config.layers[i].mixer for i in run.layers]
    return Attention(
        qkv=SideBySide(*(s.matrix(f"{name}.weight") for name in names)),
        o=s.matrix("self_attn.o_proj.weight"),
        heads=Heads(c.head_dim, first, last, group, first * c.head_dim % BLOCK, float(c.scale), float(c.softcap)),
        bias=s.joined([(f"{name}.bias", f"{name}.weight") for name in names]),
        q_norm=s.vector("self_attn.q_norm.weight"),
        k_norm=s.vector("self_attn.k_norm.weight"),
        whole=int(c.qk_norm == "whole"),
        norm_last=int(c.norm_last),
        clip=float(c.clip),
        eps=float(config.norm_eps),
        q_size=c.num_heads * c.head_dim,
        k_size=c.num_kv_heads * c.head_dim,
        k_first=int(first % group != 0),  # else another rank has that head, too, and counts it
        k_start=starts[1],
        v_start=starts[2],
        gate_start=starts[3] if c.gate else 0,
        sinks=s.vector("self_attn.sinks"),
        windows=np.array([a.window for a in attentions if isinstance(a, AttentionConfig)], np.int64),
        ropes=np.array([config.ropes.index(a.rope) for a in attentions if isinstance(a, AttentionConfig)], np.int64),
    )


def _delta_net(c: DeltaNetConfig, s: Stacker, config: ModelConfig, shard: Shard) -> DeltaNets:
    names = {which: f"linear_attn.{which}_proj.weight" for which in "qkvzba"}
    starts = np.cumsum([0, *(s.columns(name) for name in names.values())]).tolist()
    first = shard.units(value_axis(c, 1))[0]
    taps = s.joined([(f"linear_attn.conv_{which}", names[which]) for which in "qkv"], c.kernel)
    taps = taps.reshape(len(taps), c.kernel, -1)
    return DeltaNets(
        projections=SideBySide(*(s.matrix(name) for name in names.values())),
        o=s.matrix("linear_attn.out_proj.weight"),
        shape=DeltaNetShape(c.key_dim, c.value_dim, c.num_value_heads // c.num_key_heads, first, *starts[1:6]),
        taps=taps,
        bias=np.zeros((len(taps), taps.shape[2]), np.float32),
        rate=s.vector("linear_attn.A_log", lambda v: -np.exp(v)),
        dt_bias=s.vector("linear_attn.dt_bias"),
        norm=s.vector("linear_attn.norm.weight"),
        eps=float(config.norm_eps),
        out_start=first * c.value_dim % BLOCK,
    )


def _short_conv(c: ShortConvConfig, s: Stacker) -> ShortConvs:
    names = [f"conv.{which}_proj" for which in "bcx"]
    first = f"{names[0]}.weight"
    taps = s.joined([("conv.taps", first)], c.kernel)
    bias = s.joined([("conv.bias", first)])
    return ShortConvs(
        projections=SideBySide(*(s.matrix(f"{name}.weight") for name in names)),
        o=s.matrix("conv.out_proj.weight"),
        in_bias=s.joined([(f"{name}.bias", f"{name}.weight") for name in names]),
        taps=taps.reshape(len(taps), c.kernel, -1),
        bias=bias if bias.size else np.zeros((len(taps), s.columns(first)), np.float32),
    )


def _gated_mlp(c: MLPConfig, s: Stacker, name: str) -> GatedMLP:
    biases = [s.vector(f"{name}.{which}_proj.bias") for which in ("gate", "up")]
    return GatedMLP(
        gate=s.matrix(f"{name}.gate_proj.weight"),
        up=s.matrix(f"{name}.up_proj.weight"),
        down=s.matrix(f"{name}.down_proj.weight"),
        biases=np.ascontiguousarray(np.stack(biases, axis=1)),
        activation=ACTIVATIONS[c.activation](float(c.limit), float(c.alpha)),
    )


def _experts(c: ExpertsConfig, s: Stacker) -> Experts:
    name, none = "mlp.experts", np.zeros((1, 1, 2, 0), np.float32)
    biases = [s.vector(f"{name}.{which}_proj.bias") for which in ("gate", "up")]
    down_bias = s.vector(f"{name}.down_proj.bias")
    scoring = {"softmax": SOFTMAX, "sigmoid": SIGMOID}[c.scoring]
    return Experts(
        router=s.matrix("mlp.router.weight"),
        router_bias=s.vector("mlp.router.bias"),
        correction=s.vector("mlp.router.correction"),
        gate=s.matrix(f"{name}.gate_proj.weight"),
        up=s.matrix(f"{name}.up_proj.weight"),
        down=s.matrix(f"{name}.down_proj.weight"),
        biases=np.ascontiguousarray(np.stack(biases, axis=2)) if biases[0].size else none,
        down_bias=down_bias if down_bias.size else none[:, :, 0],
        activation=ACTIVATIONS[c.expert.activation](float(c.expert.limit), float(c.expert.alpha)),
        routing=Routing(c.num_experts, c.top_k, scoring, int(c.normalised), float(c.scale), c.groups, c.best_groups),
        shared=_gated_mlp(c.shared, s, "mlp.shared") if c.shared is not None else NoMLP(),
        shared_gate=s.matrix("mlp.shared_gate.weight"),
    )


def build_segment(weights: RankWeights, run: Run, config: ModelConfig, shard: Shard, memory: Any) -> Segment:
    """Return a segment's weights; memory: its KV cache or states."""
    s, layer = Stacker(weights, run), run.layer
    mixer: Any
    if isinstance(layer.mixer, AttentionConfig):
        mixer, out = _attention(layer.mixer, s, config, shard, run), "self_attn.o_proj.bias"
    elif isinstance(layer.mixer, DeltaNetConfig):
        mixer, out = _delta_net(layer.mixer, s, config, shard), "linear_attn.out_proj.bias"
    else:
        mixer, out = _short_conv(layer.mixer, s), "conv.out_proj.bias"
    feed: Any = _experts(layer.feed, s) if isinstance(layer.feed, ExpertsConfig) else _gated_mlp(layer.feed, s, "mlp")
    scale = float(layer.residual_scale)

    def norms(before: str, after: str, bias: str) -> Norms:
        found = [s.vector(name, padded) for name in (f"{before}.weight", f"{after}.weight", bias)]
        return Norms(found[0], found[1], found[2], scale)

    return Segment(
        mixer=mixer,
        feed=feed,
        memory=memory,
        mixer_norms=norms("input_layernorm", "mixer_output_norm", out),
        feed_norms=norms("post_attention_layernorm", "mlp_output_norm", "mlp.down_proj.bias"),
        layers=len(run.layers),
        hidden=config.hidden_size,
        eps=float(config.norm_eps),
        ends=run.layers[-1] == config.num_layers - 1,
        mixer_sums=isinstance(layer.mixer, AttentionConfig) and layer.mixer.qk_norm == "whole",
    )
