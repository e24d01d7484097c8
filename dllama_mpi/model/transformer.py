"""One rank's slice of a model: embedding, segments of layers, the lm_head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.layout import PAGE, TileFormat, ceil_div
from ..kernels.matrix import Matrix
from ..parallel.group import TensorParallelGroup
from ..parallel.partition import Shard
from .batch import Batch
from .buffers import HEAD_ROWS, Buffers, Maker, Sizes
from .build import RankWeights, build_segment, padded
from .config import ModelConfig
from .forward import KVMemory, Residual, Scratch, Segment, Step, Sum, add_and_normalise, decoder_layers
from .linear import multiply
from .rope import Rope

NOTHING = Sum(np.zeros(4, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32), 1.0)


@dataclass(frozen=True)
class Rank:
    """Where a slice of a model runs: its group, the rank's shard, the formats of its matrices, its threads."""

    group: TensorParallelGroup
    shard: Shard
    formats: Mapping[str, TileFormat]
    threads: int


class Transformer:
    """One rank's slice of the model: two all-reduces a layer, logits for its part of the vocabulary."""

    def __init__(self, weights: RankWeights, config: ModelConfig, rank: Rank) -> None:
        """Take the weights that `build.load` loaded for this rank's shard."""
        self.config, self.rank, self._weights = config, rank, weights
        self._turn = 0  # which half of the terms of all-reduces is next
        self._ropes = [Rope(rope) for rope in config.ropes]
        self._norm = padded(weights.vector("model.norm.weight"))
        head = weights.matrix("lm_head.weight")
        self._head = Matrix(head.fields()[None])
        self._head_rows = head.rows

    def allocate(self, terms: np.ndarray, sizes: Sizes) -> None:
        """Make buffers, KV caches and states.

        terms: (2, tokens, hidden to 32s) float32, see `TensorParallelGroup.prepare_all_reduce`.
        """
        buffers, make = Buffers(self.config, self.rank.shard, self.rank.formats, sizes), Maker()
        self._terms, self._residual, self._hidden = terms, buffers.residual(make), buffers.hidden(make)
        self._logits = buffers.logits(make)
        shared = {buffers.kind(run): buffers.scratch(run, self._hidden, make) for run in buffers.distinct()}
        self._segments: list[tuple[Segment, Scratch]] = []
        for run in buffers.runs:
            memory = buffers.memory(run, make)
            segment = build_segment(self._weights, run, self.config, self.rank.shard, memory)
            self._segments.append((segment, shared[buffers.kind(run)]))
        self._token_ids = buffers.token_ids(make)

    def _copy(self, batch: Batch) -> None:
        """Copy pages and states as the batch says."""
        for segment, _ in self._segments:
            memory: Any = segment.memory
            if isinstance(memory, KVMemory):
                _copy_pages(memory, segment, batch)
                continue
            for source, target in batch.state_copies.tolist():
                for array in memory:
                    array[:, target] = array[:, source]
        for source, target in batch.page_copies.tolist():
            self._token_ids[target] = self._token_ids[source]

    def history(self, batch: Batch, token: int) -> np.ndarray:
        """Return the ids (n,) int32 of the sequence of one of a batch's tokens, up to that, once it has been fed."""
        pages, length = batch.pages_of(int(batch.slots[token])), int(batch.positions[token]) + 1
        ids: np.ndarray = self._token_ids[pages[: ceil_div(length, PAGE)]].reshape(-1)[:length]
        return ids

    def forward(self, batch: Batch) -> np.ndarray:
        """Feed a batch; return the final hidden states (logit rows, padded hidden) float32, the same on every rank.

        KV caches and states hold the batch's tokens afterwards.
        """
        residual = self._residual[: batch.tokens]
        self._copy(batch)
        self._embed(batch.token_ids, residual)
        step, group = self._step(batch), self.rank.group
        self._token_ids[step.tables[0, batch.slots, batch.positions // PAGE], batch.positions % PAGE] = batch.token_ids
        parts, turn = group.parts(batch.tokens), self._turn
        with group.exchanging(parts):
            for segment, scratch in self._segments:
                turn = decoder_layers(
                    segment, step, residual, scratch, self._terms, group.link, parts, turn, self.rank.threads
                )
        self._turn = turn  # the next step begins with the other half: a slower rank may still read this one
        rows: np.ndarray = residual[batch.logit_rows]
        return rows

    def _embed(self, token_ids: np.ndarray, out: np.ndarray) -> None:
        """Write the vectors of tokens, looked up in the mapped file: only pages of rows that are used take memory."""
        table, hidden = self._weights.table, self.config.hidden_size
        for row, token in zip(out, token_ids, strict=True):
            row[:hidden] = table.values(((int(token), int(token) + 1), (0, hidden)))[0]
        if self.config.embedding_scale != 1:
            out *= np.float32(self.config.embedding_scale)

    def _step(self, batch: Batch) -> Step:
        c, turns = self.config, [rope(batch.positions, batch.lengths) for rope in self._ropes]
        cos, sin = (
            np.ascontiguousarray(np.stack(each)) if turns else np.zeros((0, batch.tokens, 0), np.float32)
            for each in (zip(*turns, strict=True) if turns else ((), ()))
        )
        scales = np.ones(batch.tokens, np.float32)
        if c.query_scaling is not None:
            beta, original = c.query_scaling
            scales = (1 + beta * np.log1p(batch.positions // original)).astype(np.float32)
        return Step(batch.slots, batch.positions, batch.tables(), scales, cos, sin, 0)

    def normalised(self, hidden: np.ndarray) -> np.ndarray:
        """Return final hidden states (rows, hidden) float32 behind the last norm, of what `forward` gives."""
        c, size = self.config, len(self._hidden.values)
        out = np.empty((len(hidden), c.hidden_size), np.float32)
        for i in range(0, len(hidden), size):
            part = np.ascontiguousarray(hidden[i : i + size])
            rows = Residual(part, c.hidden_size, float(c.norm_eps))
            add_and_normalise(rows, NOTHING, self._norm, self._hidden, 0, self.rank.threads)
            out[i : i + size] = self._hidden.values[: len(part), : c.hidden_size]
        return out

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Return the rank's logits (rows, its part of the vocabulary) float32 of up to 64 hidden states."""
        c, n, threads = self.config, len(hidden), self.rank.threads
        rows = Residual(hidden, c.hidden_size, float(c.norm_eps))
        add_and_normalise(rows, NOTHING, self._norm, self._hidden, 0, threads)
        out = self._logits[:n] if n <= HEAD_ROWS else np.empty((n, self._logits.shape[1]), np.float32)
        multiply(self._head, 0, self._hidden, out, n, threads)
        logits = out[:, : self._head_rows].copy()
        if c.logit_scale != 1:
            logits *= np.float32(c.logit_scale)
        if c.logit_softcap:
            np.tanh(logits / np.float32(c.logit_softcap), out=logits)
            logits *= np.float32(c.logit_softcap)
        return logits


def _copy_pages(memory: KVMemory, segment: Segment, batch: Batch) -> None:
    """Copy pages of the KV cache of a segment's layers."""
    if not len(batch.page_copies) and not len(batch.window_copies):
        return
    mixer: Any = segment.mixer
    first = 0
    for window in mixer.windows.tolist():
        near = window > 0 and batch.has_windows
        for source, target in (batch.window_copies if near else batch.page_copies).tolist():
            for array in (memory.keys, memory.key_scales, memory.values, memory.value_scales):
                array[first + target] = array[first + source]
        first += memory.window_pages if window > 0 else memory.pages
