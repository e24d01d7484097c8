"""Every buffer of a rank besides its weights: one function gives the sizes to allocation and to prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.layout import BLOCK, PAGE, ROWS, TileFormat, ceil_div, ceil_to
from ..kernels.matrix import Activations
from ..parallel.partition import Shard
from .attention import AttentionScratch
from .config import AttentionConfig, DeltaNetConfig, LayerConfig, MLPConfig, ModelConfig
from .experts import ExpertsScratch
from .forward import KVMemory, Scratch
from .mlp import MLPScratch
from .recipe import DEFAULT, WeightRecipe
from .segments import Run, runs
from .state import DeltaNetMemory, ShortConvMemory, StateScratch
from .tensors import TensorSpec, kv_axis, part, vocab_axis

KV_TYPES = {"f16": np.uint16, "f32": np.float32, "q80": np.int8}
HEAD_ROWS = 64  # rows of logits computed at once


class Maker:
    """Makes arrays of given shapes; a subclass only counts their bytes."""

    def array(self, *shape: int, dtype: Any = np.float32) -> Any:
        """Return zeros on a 64-byte boundary."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.zeros(size + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + size].view(dtype).reshape(shape)

    def lazy(self, *shape: int, dtype: Any = np.float32) -> Any:
        """Return zeros whose memory is taken from the system as it is written."""
        return self.array(*shape, dtype=dtype)  # large ones are, as numpy makes them

    def activations(self, tokens: int, cols: int, quantised: bool, values: bool = True) -> Activations:
        """Return a buffer for the input of matrices: values, and their Q80 form where some matrix wants that."""
        cols, rows = ceil_to(cols, BLOCK), tokens if quantised else 0
        return Activations(
            self.array(tokens if values else 0, cols),
            self.array(rows, cols, dtype=np.int8),
            self.array(rows, cols // BLOCK),
            self.array(rows, cols // BLOCK, dtype=np.int32),
        )


class Counter(Maker):
    """Counts the bytes of what would be made."""

    def __init__(self) -> None:
        self.bytes = 0

    def array(self, *shape: int, dtype: Any = np.float32) -> Any:
        """Count an array."""
        size = np.dtype(dtype).itemsize
        for length in shape:
            size *= length
        self.bytes += size
        return np.zeros(0, dtype)

    lazy = array


def tile_columns(spec: TensorSpec, shard: Shard) -> int:
    """Return the columns that a column-parallel matrix's output takes."""
    rows = part(spec, shard).ranges[-2]
    return ceil_to(rows[1] - rows[0], ROWS)


def input_columns(spec: TensorSpec, shard: Shard) -> int:
    """Return the columns of a row-parallel matrix's input."""
    cols = part(spec, shard).ranges[-1]
    return cols[1] - cols[0]


@dataclass(frozen=True)
class Sizes:
    """What decides about buffers besides the model.

    Attributes:
        tokens: most in a step. slots: sequences at once, and checkpoints of states. pages: of the KV cache.
        window_pages: of layers with a window; None: they have no pages of their own, but as many as all others.
    """

    tokens: int
    slots: int
    pages: int
    kv_type: str
    window_pages: int | None = None


class Buffers:
    """The buffers of a rank's share of a model."""

    def __init__(self, config: ModelConfig, shard: Shard, formats: Mapping[str, TileFormat], sizes: Sizes) -> None:
        self.config, self.shard, self.sizes = config, shard, sizes
        self.runs = runs(config, formats)
        self._head_quantised = formats["lm_head.weight"].quantised_activations

    # ---- scratch

    def residual(self, make: Maker) -> Any:
        """Return the residual (tokens, hidden to 32s) float32."""
        return make.array(self.sizes.tokens, ceil_to(self.config.hidden_size, BLOCK))

    def hidden(self, make: Maker) -> Activations:
        """Return the buffer for normalised inputs, which also serves the lm_head."""
        formats = [fmt for run in self.runs for fmt in run.formats.values()]
        quantised = self._head_quantised or any(fmt.quantised_activations for fmt in formats)
        return make.activations(max(self.sizes.tokens, HEAD_ROWS), self.config.hidden_size, quantised)

    def logits(self, make: Maker) -> Any:
        """Return (HEAD_ROWS, the rank's part of the vocabulary to 16s) float32."""
        first, last = self.shard.elements(vocab_axis(self.config))
        return make.array(HEAD_ROWS, ceil_to(last - first, ROWS))

    def scratch(self, run: Run, hidden: Activations, make: Maker) -> Scratch:
        """Return the buffers of a segment."""
        return Scratch(hidden, self._mixer(run, make), self._feed(run, make))

    def _specs(self, run: Run) -> dict[str, TensorSpec]:
        return run.specs(self.config.hidden_size)

    def _mixer(self, run: Run, make: Maker) -> Any:
        tokens, specs, mixer = self.sizes.tokens, self._specs(run), run.layer.mixer
        kind: Any = StateScratch
        if isinstance(mixer, AttentionConfig):
            names = [f"self_attn.{which}_proj.weight" for which in ("q", "k", "v", "gate")]
            out, kind = "self_attn.o_proj.weight", AttentionScratch
        elif isinstance(mixer, DeltaNetConfig):
            names = [f"linear_attn.{which}_proj.weight" for which in "qkvzba"]
            out = "linear_attn.out_proj.weight"
        else:
            names = [f"conv.{which}_proj.weight" for which in "bcx"]
            out = "conv.out_proj.weight"
        width = sum(tile_columns(specs[name], self.shard) for name in names if name in specs)
        cols = ceil_to(input_columns(specs[out], self.shard), BLOCK)
        projected = make.array(tokens, width)
        return kind(projected, make.activations(tokens, cols, run.formats[out].quantised_activations))

    def _feed(self, run: Run, make: Maker) -> Any:
        tokens, feed = self.sizes.tokens, run.layer.feed
        if isinstance(feed, MLPConfig):
            return self._mlp(run, "mlp", tokens, make)
        pairs, experts = tokens * feed.top_k, ceil_to(feed.num_experts, ROWS)
        gate = run.formats["mlp.experts.gate_proj.weight"].quantised_activations
        up = run.formats["mlp.experts.up_proj.weight"].quantised_activations
        hidden = self.config.hidden_size
        shared = self._mlp(run, "mlp.shared", tokens if feed.shared is not None else 0, make)
        return ExpertsScratch(
            logits=make.array(tokens, experts),
            scores=make.array(tokens, experts),
            chosen=make.array(tokens, feed.top_k, dtype=np.int32),
            weights=make.array(tokens, feed.top_k),
            starts=make.array(feed.num_experts + 1, dtype=np.int64),
            tokens=make.array(pairs, dtype=np.int32),
            places=make.array(pairs, dtype=np.int32),
            gathered=make.activations(pairs, hidden, gate or up, not (gate and up)),
            mlp=self._mlp(run, "mlp.experts", pairs, make),
            product=make.array(tokens, ceil_to(hidden, BLOCK)),
            shared=shared,
            shared_gates=make.array(tokens if feed.shared_gate else 0, ROWS),
        )

    def _mlp(self, run: Run, name: str, rows: int, make: Maker) -> MLPScratch:
        down = f"{name}.down_proj.weight"
        cols, quantised = BLOCK, False
        if rows:
            cols = ceil_to(input_columns(self._specs(run)[down], self.shard), BLOCK)
            quantised = run.formats[down].quantised_activations
        return MLPScratch(make.activations(rows, cols, quantised), make.array(rows, cols))

    # ---- what is remembered of past positions

    def memory(self, run: Run, make: Maker) -> Any:
        """Return the KV cache or the states of a segment."""
        mixer, layers, slots = run.layer.mixer, len(run.layers), self.sizes.slots
        if isinstance(mixer, AttentionConfig):
            mixers = [self.config.layers[i].mixer for i in run.layers]
            return self._kv(mixer, [isinstance(m, AttentionConfig) and m.window > 0 for m in mixers], make)
        specs, shard = self._specs(run), self.shard
        if isinstance(mixer, DeltaNetConfig):
            names = [f"linear_attn.{which}_proj.weight" for which in "qkv"]
            width = sum(tile_columns(specs[name], shard) for name in names)
            heads = part(specs["linear_attn.A_log"], shard).sizes[0]
            blocks = ceil_div(mixer.value_dim, ROWS)
            conv = make.lazy(layers, slots, mixer.kernel - 1, width)
            return DeltaNetMemory(conv, make.lazy(layers, slots, heads, blocks, mixer.key_dim, ROWS))
        width = tile_columns(specs["conv.b_proj.weight"], shard)
        return ShortConvMemory(make.lazy(layers, slots, mixer.kernel - 1, width))

    def _kv(self, mixer: AttentionConfig, windowed: list[bool], make: Maker) -> KVMemory:
        # Zeros: what is not written yet is multiplied by zero, and must be a number.
        dim, kv_type, quantised = mixer.head_dim, self.sizes.kv_type, self.sizes.kv_type == "q80"
        heads = self.shard.units(kv_axis(mixer))
        rows, width, sizes = PAGE, ceil_to(dim, BLOCK), self.sizes
        near = sizes.pages if sizes.window_pages is None else sizes.window_pages
        pages = sum(near if each else sizes.pages for each in windowed)
        every, element = (pages, heads[1] - heads[0]), KV_TYPES[kv_type]
        return KVMemory(
            marker=np.empty(0, np.uint16 if kv_type == "f16" else np.float32),
            keys=make.lazy(*every, rows // ROWS, width, ROWS, dtype=element),
            key_scales=make.lazy(*every, rows // ROWS, width // BLOCK, ROWS * quantised, dtype=np.uint16),
            values=make.lazy(*every, ceil_div(dim, ROWS), rows, ROWS, dtype=element),
            value_scales=make.lazy(*every, width // BLOCK, rows * quantised, dtype=np.uint16),
            pages=sizes.pages,
            window_pages=near,
        )

    def token_ids(self, make: Maker) -> Any:
        """Return the ids (pages, PAGE) int32 of the tokens that stand in each page."""
        return make.lazy(self.sizes.pages, PAGE, dtype=np.int32)

    # ---- counting

    def scratch_bytes(self) -> int:
        """Return the bytes of all scratch buffers."""
        make = Counter()
        self.residual(make)
        hidden = self.hidden(make)
        self.logits(make)
        for run in self.distinct():
            self.scratch(run, hidden, make)
        return make.bytes

    def memory_bytes(self) -> int:
        """Return the bytes of KV caches and states when they are full."""
        make = Counter()
        for run in self.runs:
            self.memory(run, make)
        return make.bytes

    def distinct(self) -> Iterator[Run]:
        """Yield one segment of each kind: those of one kind share their scratch buffers."""
        seen = set()
        for run in self.runs:
            if self.kind(run) not in seen:
                seen.add(self.kind(run))
                yield run

    def kind(self, run: Run) -> tuple[LayerConfig, tuple[tuple[str, str], ...]]:
        """Return what the segments that share scratch buffers have in common."""
        return run.layer, tuple((name, fmt.name) for name, fmt in run.formats.items())


def memory_bytes(config: ModelConfig, shard: Shard, kv_type: str) -> tuple[int, int]:
    """Return the bytes that one sequence takes whatever its length, and those of each position of the KV cache."""
    buffers = _of(config, shard, Sizes(1, 0, 0, kv_type))

    def total(slots: int, pages: int) -> int:
        buffers.sizes = Sizes(1, slots, pages, kv_type)
        return buffers.memory_bytes()

    return total(1, 0), total(0, 1) // PAGE


def position_bytes(config: ModelConfig, shard: Shard, kv_type: str) -> tuple[int, int]:
    """Return the bytes that a position takes in layers that see all, its token's id included, and in the others."""
    make = Counter()
    far, near = (_of(config, shard, Sizes(1, 0, pages, kv_type, 1 - pages)) for pages in (1, 0))
    far.token_ids(make)
    return (far.memory_bytes() + make.bytes) // PAGE, near.memory_bytes() // PAGE


def _of(config: ModelConfig, shard: Shard, sizes: Sizes) -> Buffers:
    return Buffers(config, shard, WeightRecipe.parse(DEFAULT).formats(config), sizes)  # formats do not matter
