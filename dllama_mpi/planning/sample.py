"""Real steps on a sample of weights, timed.

A sample is a model of the real width and depth whose layers take turns on a few layers' memory: enough to be read from
memory and not from caches, little enough to be made in a moment. Its steps are ordered by a real engine, so what they
cost besides the weights (norms, threads, Python, waiting for each other) is in the figures.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass

import numpy as np

from ..engine.engine import Engine
from ..engine.request import SamplingParams, Sequence
from ..engine.runner import Runner
from ..engine.stats import Stats
from ..engine.step import Command
from ..engine.worker import serve
from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_div, ceil_to
from ..model.batch import Batch
from ..model.config import ModelConfig
from ..model.context import Context
from ..model.names import matrix_shapes, vector_shapes
from ..model.transformer import Transformer
from ..parallel.group import TensorParallelGroup
from ..parallel.partition import Shard
from ..weights.random import RandomCheckpoint
from .costs import Work, work_of

DEPTH = 2048  # positions that attention is timed over
_WINDOW_SECONDS, _WINDOWS, _LEAST_WINDOWS = 0.2, 5, 3


class _Clocked(Transformer):
    """A transformer that counts the seconds spent in it, synchronisation included."""

    seconds = 0.0

    def forward(self, batch: Batch) -> np.ndarray:
        started = time.perf_counter()
        rows = super().forward(batch)
        self.seconds += time.perf_counter() - started
        return rows

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        logits = super().logits(hidden)
        self.seconds += time.perf_counter() - started
        return logits


@dataclass(frozen=True)
class Job:
    """What is measured for: a model, how it is kept and sent, this rank's threads, and tokens in a prompt's step."""

    config: ModelConfig
    format: TileFormat
    kv_type: str
    payload: str
    sync: str
    threads: int
    chunk: int


@dataclass(frozen=True)
class Timing:
    """Medians of a step's seconds.

    Attributes:
        compute: of each rank, without synchronisation. waiting: what the root's whole step took beyond the slowest
            rank's computing.
    """

    compute: list[float]
    waiting: float


class Sample:
    """A model whose layers share memory. Methods are collective over its group.

    Attributes:
        layers: of the whole model. work: of the whole model's layers on this rank, and of what is held of the lm_head.
    """

    def __init__(self, job: Job, shard: Shard, size: int, group: TensorParallelGroup) -> None:
        """Make at least `size` bytes of layers, if the model has as many, and at most that of the lm_head."""
        c, fmt = job.config, job.format
        row_bytes = ceil_div(c.hidden_size, BLOCK) * fmt.tile_bytes
        rows = min(max(ROWS, shard.vocab[1] - shard.vocab[0]), max(1, size // row_bytes) * ROWS, c.vocab_size)
        shard = dataclasses.replace(shard, vocab=(0, rows))
        self.layers, self.chunk, self._group = c.num_layers, job.chunk, group
        self.work: Work = work_of(c, shard, fmt, job.kv_type)
        held = min(c.num_layers, max(1, -(-size * c.num_layers // max(1, self.work.weight_bytes))))
        config = dataclasses.replace(c, num_layers=held, windows=c.windows[:held])
        source = RandomCheckpoint("sample", matrix_shapes(config), vector_shapes(config), (c.vocab_size, c.hidden_size))
        self._model = _Clocked(source, config, Context(group, shard, fmt, job.threads))
        self._held = self._model.layers
        tokens, positions = job.chunk + 1, DEPTH + job.chunk + 1
        partial = group.prepare_all_reduce(tokens, ceil_to(c.hidden_size, BLOCK), job.payload, job.sync)
        self._model.config = c  # a KV cache for all layers: it takes memory as it is used
        self._model.allocate(partial, 1, positions, job.kv_type)
        self._runner = Runner(self._model, group, 1, positions)
        self._engine = Engine(self._runner, group, c.vocab_size, 1, job.chunk)

    def decode(self) -> Timing:
        """Return the timing of a decode step near the beginning."""
        self._take_turns(self.layers)
        return self._timed(1)

    def prefill(self, layers: int) -> Timing:
        """Return the timing of a prompt's first chunk through so many layers."""
        self._take_turns(layers)
        return self._timed(self.chunk)

    def attention(self, layers: int) -> float:
        """Return the seconds by which a chunk through so many layers takes longer when it sees DEPTH more positions."""
        self._take_turns(layers)
        shallow, deep = self._chunk_at(0), self._chunk_at(DEPTH)
        self._forward(deep)
        return statistics.median(self._forward(deep) - self._forward(shallow) for _ in range(_WINDOWS))

    def _take_turns(self, layers: int) -> None:
        self._model.layers = [self._held[i % len(self._held)] for i in range(layers)]
        self._model.stack()

    def _chunk_at(self, first: int) -> Batch:
        zeros, positions = np.zeros(self.chunk, np.int32), np.arange(first, first + self.chunk, dtype=np.int32)
        return Batch(zeros, positions, zeros, zeros + first + self.chunk, zeros[:0])

    def _forward(self, batch: Batch) -> float:
        self._group.reset_traffic()
        started = time.perf_counter()
        self._model.forward(batch)
        return time.perf_counter() - started - self._group.traffic.seconds

    def _timed(self, tokens: int) -> Timing:
        """Time steps of so many tokens: decode steps of one sequence, or prompts of one step."""
        self._window(tokens, 1)
        longest = max(self._group.allgather(self._window(tokens, 1)[0]))
        steps = int(np.clip(np.ceil(_WINDOW_SECONDS / longest), 1, DEPTH))
        windows = [self._window(tokens, steps) for _ in range(_WINDOWS if steps > 1 else _LEAST_WINDOWS)]
        everybody = self._group.allgather(windows)
        compute = [statistics.median(own for _, own in each) for each in everybody]
        waiting = [everybody[0][i][0] - max(each[i][1] for each in everybody) for i in range(len(windows))]
        return Timing(compute, statistics.median(waiting))

    def _window(self, tokens: int, steps: int) -> tuple[float, float]:
        """Run steps; return the mean seconds of a step: all included, and this rank's without synchronisation."""
        self._group.allgather(None)  # begin together
        self._group.reset_traffic()
        self._model.seconds = 0.0
        started = time.perf_counter()
        if self._group.is_root:
            for _ in range(1 if tokens == 1 else steps):
                self._generate(tokens, steps if tokens == 1 else 1)
            self._group.send_command(Command.DONE)
        else:
            serve(self._runner, self._group)
        whole = time.perf_counter() - started
        return whole / steps, (self._model.seconds - self._group.traffic.seconds) / steps

    def _generate(self, prompt: int, output: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        tokens = [0] * prompt
        sequence = Sequence(tokens, params, prompt + output, None, np.random.default_rng(0), frozenset())
        for _ in self._engine.run([sequence], Stats()):
            pass
