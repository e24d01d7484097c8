"""Real steps on a sample of weights, timed.

A sample is a model of the real width and depth whose layers of one kind take turns on a few layers' memory: enough to
be read from memory and not from caches, little enough to be made in a moment. Routers alone are each layer's own, so
that layers choose different experts. Its steps are ordered by a real engine, so what they cost besides the weights
(norms, threads, Python, waiting for each other) is in the figures.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..engine.engine import Context, Engine
from ..engine.request import Request, SamplingParams
from ..engine.runner import Runner
from ..engine.scheduler import Limits
from ..engine.step import Command
from ..engine.worker import serve
from ..kernels.layout import BLOCK, PAGE, TileFormat, ceil_div, ceil_to
from ..model.batch import Batch
from ..model.buffers import Sizes
from ..model.build import RankWeights, load
from ..model.config import LayerConfig, ModelConfig
from ..model.recipe import tensor_bytes, weight_bytes
from ..model.tensors import HEAD, part, tensors, vocab_axis
from ..model.transformer import Rank, Transformer
from ..parallel.group import TensorParallelGroup
from ..parallel.partition import Shard
from ..startup.opening import random_source
from ..startup.options import Kept
from ..weights.tiles import load_matrix
from .costs import Work, work_of

DEPTH = 2048  # positions that attention is timed over
_PROMPT_LAYERS = 2  # of the most frequent kind, that a prompt is timed in
_MOST_PROMPT_LAYERS = 6  # in all, unless there are more kinds
T = TypeVar("T")
_WINDOW_SECONDS, _WINDOWS, _LEAST_WINDOWS = 0.2, 5, 3


# ---- models whose layers share memory


def _kinds(config: ModelConfig) -> dict[LayerConfig, list[int]]:
    """Return the numbers of the layers of each kind."""
    found: dict[LayerConfig, list[int]] = {}
    for number, layer in enumerate(config.layers):
        found.setdefault(layer, []).append(number)
    return found


def some_layers(config: ModelConfig) -> list[int]:
    """Return the numbers of a few layers that stand for all: of each kind about its part of them, at least one."""
    kinds = _kinds(config)
    rarest = min(len(numbers) for numbers in kinds.values())
    wanted = min(max(_PROMPT_LAYERS, config.num_layers // rarest), _MOST_PROMPT_LAYERS)
    counts = {kind: max(1, round(wanted * len(n) / config.num_layers)) for kind, n in kinds.items()}
    return sorted(number for kind, numbers in kinds.items() for number in numbers[: counts[kind]])


def _cut(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Return the model of these layers alone."""
    return replace(config, layers=tuple(config.layers[number] for number in layers))


def _renamed(held: Mapping[str, T], layers: Sequence[int]) -> dict[str, T]:
    """Return what tensors have, by name, for the model whose layer i is layer layers[i] of this one."""
    found = {name: each for name, each in held.items() if not name.startswith("model.layers.")}
    for new, old in enumerate(layers):
        start = f"model.layers.{old}."
        own = {name: each for name, each in held.items() if name.startswith(start)}
        found |= {name.replace(start, f"model.layers.{new}."): each for name, each in own.items()}
    return found


def shared_weights(config: ModelConfig, shard: Shard, formats: Mapping[str, TileFormat], size: int) -> RankWeights:
    """Return random weights of a rank's slice; its layers share the memory of some, of at least `size` bytes.

    Of each kind about the same part of the layers has memory of its own.
    """
    layers = weight_bytes(config, shard, formats) - tensor_bytes(tensors(config)[-1], shard, formats)
    held, turns = [], {}
    for kind, numbers in _kinds(config).items():
        own = numbers[: math.ceil(min(1.0, max(size, 1) / layers) * len(numbers))]
        turns[kind] = own
        held += own
    held.sort()
    made = _cut(config, held)
    weights = load(random_source("sample", made), made, shard, _renamed(formats, held))
    counters = {kind: itertools.cycle(held.index(number) for number in own) for kind, own in turns.items()}
    found = _renamed(weights.held, [next(counters[layer]) for layer in config.layers])
    source = random_source("sample", config)
    for spec in tensors(config):
        if spec.role == "router":
            ranges = part(spec, shard).ranges
            found[spec.name] = load_matrix(source[spec.name], spec.shape, ranges, formats[spec.name])
    return RankWeights(found, weights.table)


# ---- timing


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
    kept: Kept
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


class _Runs:
    """A model that runs, and its engine."""

    def __init__(self, model: _Clocked, rank: Rank, chunk: int, positions: int) -> None:
        config = model.config
        self.model, self.runner = model, Runner(model, rank.group)
        limits = Limits(1, ceil_div(positions, PAGE), chunk, slots=int(config.has_state), shares=False)
        self.engine = Engine(self.runner, rank.group, Context(config.vocab_size, positions), limits)


class Sample:
    """A model whose layers share memory, and one of a few of its layers. Methods are collective over its group.

    Attributes:
        work: of the whole model's layers on this rank, and of what is held of the lm_head. prompt_work: the same of the
            few layers.
    """

    def __init__(self, job: Job, shard: Shard, size: int, group: TensorParallelGroup) -> None:
        """Make at least `size` bytes of layers, if the model has as many, and at most that of the lm_head."""
        c, formats, kv_type = job.config, job.kept.formats, job.kept.kv_type
        axis, row_bytes = vocab_axis(c), ceil_div(c.hidden_size, BLOCK) * formats[HEAD].tile_bytes
        first, last = shard.units(axis)
        units = min(max(1, last - first), max(1, size // row_bytes))
        shard = replace(shard, ranges={**shard.ranges, axis: (0, units)})
        self.chunk, self._group = job.chunk, group
        weights = shared_weights(c, shard, formats, size)
        positions = DEPTH + job.chunk + 1
        terms = group.prepare_all_reduce(job.chunk + 1, ceil_to(c.hidden_size, BLOCK), job.kept.payload, job.sync)

        def running(layers: Sequence[int]) -> tuple[_Runs, Work]:
            config, own = _cut(c, layers), _renamed(formats, layers)
            rank = Rank(group, shard, own, job.threads)
            model = _Clocked(RankWeights(_renamed(weights.held, layers), weights.table), config, rank)
            model.allocate(
                terms, Sizes(job.chunk + 1, 1, ceil_div(positions, PAGE), kv_type)
            )  # memory is taken as it is used
            return _Runs(model, rank, job.chunk, positions), work_of(config, shard, own, kv_type)

        self._whole, self.work = running(range(c.num_layers))
        self._few, self.prompt_work = running(some_layers(c))

    def decode(self) -> Timing:
        """Return the timing of a decode step near the beginning."""
        return self._timed(self._whole, 1)

    def prefill(self) -> Timing:
        """Return the timing of a prompt's first chunk through a few layers."""
        return self._timed(self._few, self.chunk)

    def whole_prefill(self) -> Timing:
        """Return the timing of a prompt's first chunk through all layers."""
        return self._timed(self._whole, self.chunk)

    def attention(self) -> float:
        """Return the seconds by which a chunk through a few layers takes longer when it sees DEPTH more positions."""
        shallow, deep = self._chunk_at(0), self._chunk_at(DEPTH)
        self._forward(deep)
        return statistics.median(self._forward(deep) - self._forward(shallow) for _ in range(_WINDOWS))

    def _chunk_at(self, first: int) -> Batch:
        zeros, positions = np.zeros(self.chunk, np.int32), np.arange(first, first + self.chunk, dtype=np.int32)
        columns = (zeros, positions, zeros, zeros + first + self.chunk)
        return Batch.of(columns, [], {0: range(ceil_div(first + self.chunk, PAGE))})

    def _forward(self, batch: Batch) -> float:
        self._group.reset_traffic()
        started = time.perf_counter()
        self._few.model.forward(batch)
        return time.perf_counter() - started - self._group.traffic.seconds

    def _timed(self, runs: _Runs, tokens: int) -> Timing:
        """Time steps of so many tokens: decode steps of one sequence, or prompts of one step."""
        self._window(runs, tokens, 1)
        longest = max(self._group.allgather(self._window(runs, tokens, 1)[0]))
        steps = int(np.clip(np.ceil(_WINDOW_SECONDS / longest), 1, DEPTH))
        windows = [self._window(runs, tokens, steps) for _ in range(_WINDOWS if steps > 1 else _LEAST_WINDOWS)]
        everybody = self._group.allgather(windows)
        compute = [statistics.median(own for _, own in each) for each in everybody]
        waiting = [everybody[0][i][0] - max(each[i][1] for each in everybody) for i in range(len(windows))]
        return Timing(compute, statistics.median(waiting))

    def _window(self, runs: _Runs, tokens: int, steps: int) -> tuple[float, float]:
        """Run steps; return the mean seconds of a step: all included, and this rank's without synchronisation."""
        self._group.allgather(None)  # begin together
        self._group.reset_traffic()
        runs.model.seconds = 0.0
        started = time.perf_counter()
        if self._group.is_root:
            for turn in range(1 if tokens == 1 else steps):
                self._generate(runs, tokens, steps if tokens == 1 else 1, turn)
            self._group.send_command(Command.DONE)
        else:
            serve(runs.runner, self._group)
        whole = time.perf_counter() - started
        return whole / steps, (runs.model.seconds - self._group.traffic.seconds) / steps

    def _generate(self, runs: _Runs, prompt: int, output: int, seed: int) -> None:
        """Feed random tokens, which choose different experts, and generate."""
        params, rng = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True), np.random.default_rng(seed)
        tokens = rng.integers(runs.model.config.vocab_size, size=prompt).tolist()
        runs.engine.add(Request(tuple(tokens), params))
        while not runs.engine.is_idle:
            runs.engine.step()
