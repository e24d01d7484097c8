"""The forward pass of one rank's slice of a dense decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ..kernels.layout import ROWS, ceil_to
from ..weights.checkpoint import Checkpoint
from ..weights.tiles import aligned_empty, check_shape, load_matrix, load_vector
from .attention import Attention
from .batch import Batch
from .config import ModelConfig
from .context import Context
from .forward import add_and_normalise, decoder_layers
from .linear import EMPTY, Activations, multiply
from .mlp import MLP
from .rope import Rope

HEAD_ROWS = 64  # rows of logits computed at once
NOTHING_TO_ADD = np.zeros(4, np.int64)


class Embedding:
    """Token vectors, looked up in the mapped file: only the pages of rows that are used take memory."""

    def __init__(self, source: Checkpoint, config: ModelConfig) -> None:
        name = "model.embed_tokens.weight"
        if config.tie_word_embeddings and name not in source:
            name = "lm_head.weight"
        self._table = source[name]
        check_shape(self._table, (config.vocab_size, config.hidden_size), None)

    def __call__(self, token_ids: np.ndarray, out: np.ndarray) -> None:
        """Write the vectors of token_ids (tokens,) into out (tokens, >= hidden) float32."""
        for row, token in zip(out, token_ids, strict=True):
            row[: self._table.data.shape[1]] = self._table.rows(int(token), int(token) + 1)[0]


class ParallelLMHead:
    """Logits of the rank's part of the vocabulary: rows of the lm_head, or of the embedding if tied."""

    def __init__(self, source: Checkpoint, config: ModelConfig, context: Context) -> None:
        name = "lm_head.weight"
        if config.tie_word_embeddings and name not in source:
            name = "model.embed_tokens.weight"
        shape, rows = (config.vocab_size, config.hidden_size), context.shard.vocab
        self.matrix = load_matrix(source, name, shape, rows, (0, shape[1]), context.format)

    def __call__(self, x: Activations, tokens: int, threads: int) -> np.ndarray:
        """Return logits (tokens, the rank's rows) float32 of normalised x."""
        out = aligned_empty((tokens, ceil_to(self.matrix.rows, ROWS)), np.float32)
        multiply(self.matrix, x, out, tokens, threads)
        return out[:, : self.matrix.rows]


class Layer:
    """The weights of one decoder layer: attention and MLP, each after an RMSNorm, each added to the residual."""

    def __init__(self, source: Checkpoint, index: int, config: ModelConfig, context: Context) -> None:
        name = f"model.layers.{index}"
        self.attention_norm = load_vector(source, f"{name}.input_layernorm.weight", config.hidden_size)
        self.attention = Attention(source, index, config, context)
        self.mlp_norm = load_vector(source, f"{name}.post_attention_layernorm.weight", config.hidden_size)
        self.mlp = MLP(source, index, config, context)


class Transformer:
    """One rank's slice of the model: two all-reduces a layer, logits for its part of the vocabulary."""

    def __init__(
        self,
        source: Checkpoint,
        config: ModelConfig,
        context: Context,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Load the rank's slice; `progress` wraps the iteration over layers.

        Raises:
            ModelError: a tensor is missing or does not fit the config.
        """
        self.config, self.context = config, context
        self.eps = np.float32(config.rms_norm_eps)
        self.embedding = Embedding(source, config)
        self.layers = [Layer(source, i, config, context) for i in progress(range(config.num_layers))]
        self.norm = load_vector(source, "model.norm.weight", config.hidden_size)
        self.lm_head = ParallelLMHead(source, config, context)
        self.rope = Rope(config.rope)
        self.stack()

    def allocate(self, partial: np.ndarray, slots: int, positions: int, kv_type: str) -> None:
        """Make buffers for steps of as many tokens as `partial` has rows, and a KV cache of `slots` x `positions`.

        partial: see `TensorParallelGroup.prepare_all_reduce`.
        """
        attention, mlp, tokens = self.layers[0].attention, self.layers[0].mlp, max(partial.shape[1], HEAD_ROWS)
        widths = (attention.width, attention.out_cols, mlp.width)
        self.context.allocate(self.config, tokens, slots, positions, kv_type, *widths, partial)
        self._residual = np.zeros(partial.shape[1:], np.float32)

    def stack(self) -> None:
        """Put what the layers have next to each other, as the compiled loop over layers takes it; matrices stay."""
        attention, mlp = [layer.attention for layer in self.layers], [layer.mlp for layer in self.layers]
        pairs = zip(attention, mlp, strict=True)
        self._matrices = np.stack([np.concatenate([a.matrices, m.matrices]) for a, m in pairs])
        self._norms = np.stack([[layer.attention_norm, layer.mlp_norm] for layer in self.layers])
        self._qkv_bias = np.stack([a.bias for a in attention])
        self._q_norms, self._k_norms = np.stack([a.q_norm for a in attention]), np.stack([a.k_norm for a in attention])
        self._o_bias, self._down_bias = np.stack([a.o.bias for a in attention]), np.stack([m.down.bias for m in mlp])
        self._gate_up_bias = np.stack([m.biases for m in mlp])
        self._windows = np.array(self.config.windows[: len(self.layers)], np.int64)

    def forward(self, batch: Batch) -> np.ndarray:
        """Feed a batch; return the final hidden states (logit rows, padded hidden) float32, the same on every rank.

        The KV cache holds the batch's tokens afterwards.
        """
        c, context, first = self.config, self.context, self.layers[0].attention
        residual = self._residual[: batch.tokens]
        self.embedding(batch.token_ids, residual)
        cos, sin = self.rope(batch.positions, batch.lengths)
        parts = context.group.parts(batch.tokens)
        with context.group.exchanging(parts):
            decoder_layers(
                context.format.marker, context.cache.marker, self._matrices, self._norms, self.eps, residual,
                *context.hidden.arrays(), context.qkv, self._qkv_bias, self._q_norms, self._k_norms, cos, sin,
                c.head_dim, *first.heads, c.num_heads // c.num_kv_heads, *context.cache.arrays(), batch.slots,
                batch.positions, self._windows, first.scale, *context.attended.arrays(), first.out_start, self._o_bias,
                self._gate_up_bias, *context.inner.arrays(), context.up, self._down_bias, context.partial,
                context.group.link, parts, context.threads,
            )  # fmt: skip
        rows: np.ndarray = residual[batch.logit_rows]
        return rows

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Return the rank's logits (rows, its part of the vocabulary) float32 of up to 64 hidden states."""
        x, n = self.context.hidden, len(hidden)
        add_and_normalise(hidden, NOTHING_TO_ADD, EMPTY, self.norm, self.eps, *x.arrays())
        return self.lm_head(x, n, self.context.threads)
