"""What a step should cost: arithmetic over a model's shape, the speeds of ranks and their network. Nothing is measured.

decode    a token takes the slowest rank's weights and KV cache at the rate of its matrix-vector products, what every
          layer and step costs besides, and two all-reduces a layer;
prefill   a chunk takes the slowest rank's multiply-adds at the rate of its matrix-matrix products, those of attention
          at theirs, what is not shared out, and two all-reduces of the whole chunk a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.layout import BLOCK, ROWS, TileFormat, ceil_div
from ..model.config import ModelConfig
from ..model.size import cache_bytes, weight_bytes
from ..parallel.network import Network, interpolate
from ..parallel.partition import Shard


@dataclass(frozen=True)
class Work:
    """What one rank's slice asks of it.

    Attributes:
        windows: for each layer, the positions a token sees, or 0 for all.
        weight_bytes: of the layers' matrices. head_bytes: of its part of the lm_head.
        macs: multiply-adds of the layers' matrices for one token.
        position_bytes: of the KV cache for one position, all layers.
        attention_macs: multiply-adds for one token and one position it sees, all layers.
    """

    windows: tuple[int, ...]
    weight_bytes: int
    head_bytes: int
    macs: int
    position_bytes: int
    attention_macs: int

    def seen(self, first: int, tokens: int) -> float:
        """Return how many positions tokens at first, first + 1, ... see, on the average of them and of layers."""
        lengths = np.arange(first + 1, first + tokens + 1)
        each = [np.minimum(lengths, w).mean() if w else lengths.mean() for w in set(self.windows)]
        counts = [self.windows.count(w) for w in set(self.windows)]
        return float(np.average(each, weights=counts))


def work_of(config: ModelConfig, shard: Shard, fmt: TileFormat, kv_type: str) -> Work:
    """Return the work of one rank's slice."""
    head = ceil_div(shard.vocab[1] - shard.vocab[0], ROWS) * ceil_div(config.hidden_size, BLOCK) * fmt.tile_bytes
    norms = 4 * config.hidden_size * (2 * config.num_layers + 1)
    layers = weight_bytes(config, shard, fmt) - head - norms
    heads = shard.heads[1] - shard.heads[0]
    return Work(
        windows=config.windows,
        weight_bytes=layers,
        head_bytes=head,
        macs=layers // fmt.tile_bytes * ROWS * BLOCK,
        position_bytes=cache_bytes(config, shard, kv_type),
        attention_macs=2 * heads * config.head_dim * config.num_layers,
    )


@dataclass(frozen=True)
class Speeds:
    """What one rank reaches.

    Attributes:
        decode: bytes of weights or KV cache a second, in matrix-vector products.
        prefill: multiply-adds a second in matrix-matrix products; None where it is not known.
        attention: multiply-adds a second of attention to many positions by many tokens; None: `prefill`.
        layer_seconds, step_seconds: of a decode step, for each layer and in all, that more ranks do not shorten.
        token_layer_seconds, token_seconds: the same for a token of a prompt.
    """

    decode: float
    prefill: float | None = None
    attention: float | None = None
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    token_layer_seconds: float = 0.0
    token_seconds: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Seconds of a step and what they go into."""

    weights: float
    attention: float
    overhead: float
    synchronisation: float = 0.0

    @property
    def compute(self) -> float:
        """Seconds of all but synchronisation."""
        return self.weights + self.attention + self.overhead

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.compute + self.synchronisation


@dataclass(frozen=True)
class AllReduces:
    """What an all-reduce costs at any number of ranks and bytes.

    What was measured at one number of ranks holds there; for other numbers the network's links say what the messages
    cost, and what the measured ones took beyond that is added.

    Attributes:
        measured_ranks: the number of ranks of what was measured. measured: (bytes of a payload, seconds), by size.
    """

    network: Network
    measured_ranks: int = 0
    measured: tuple[tuple[float, float], ...] = ()

    def seconds(self, ranks: int, size: int) -> float:
        """Return the seconds of one all-reduce of payloads of `size` bytes over the first `ranks` ranks."""
        if ranks < 2:
            return 0.0
        if not self.measured:
            return self.network.all_reduce_seconds(ranks, size)
        if ranks == self.measured_ranks:
            return interpolate(self.measured, size)
        beyond = tuple(
            (at, max(0.0, seconds - self.network.all_reduce_seconds(self.measured_ranks, int(at))))
            for at, seconds in self.measured
        )
        return self.network.all_reduce_seconds(ranks, size) + interpolate(beyond, size)


@dataclass(frozen=True)
class Host:
    """A computer of the cluster.

    Attributes:
        free: bytes of memory it can give. read: bytes a second that its ranks together read; None if not known.
    """

    name: str
    ranks: int
    cores: int
    instruction_set: str | None
    free: int
    read: float | None


@dataclass(frozen=True)
class Cluster:
    """What the cost model knows of a cluster.

    Attributes:
        hosts: in the order of their first ranks. threads: of each rank.
        speeds: for each number of ranks from 1 on, those of its ranks.
    """

    hosts: tuple[Host, ...]
    threads: tuple[int, ...]
    network: Network
    speeds: tuple[tuple[Speeds, ...], ...]
    all_reduces: AllReduces


def payload_bytes(config: ModelConfig, tokens: int, block_bytes: int) -> int:
    """Return the bytes of one all-reduce's payload; block_bytes: of 32 values on the wire."""
    return ceil_div(tokens * config.hidden_size, BLOCK) * block_bytes


def slowest(costs: Sequence[Cost], exchanges: float) -> Cost:
    """Return the cost of the rank that computes longest, with seconds of synchronisation: all others wait for it."""
    c = max(costs, key=lambda cost: cost.compute)
    return Cost(c.weights, c.attention, c.overhead, exchanges)


def decode_cost(works: Sequence[Work], speeds: Sequence[Speeds], positions: tuple[int, int], all_reduce: float) -> Cost:
    """Return the mean cost of a decode step.

    works, speeds: of each rank. positions: (first, number) of the generated tokens. all_reduce: seconds of one.
    """
    costs = []
    for work, speed in zip(works, speeds, strict=True):
        layers, seen = len(work.windows), work.seen(*positions)
        costs.append(
            Cost(
                weights=(work.weight_bytes + work.head_bytes) / speed.decode,
                attention=work.position_bytes * seen / speed.decode,
                overhead=layers * speed.layer_seconds + speed.step_seconds,
            )
        )
    return slowest(costs, 2 * len(works[0].windows) * all_reduce)


def chunks(first: int, tokens: int, chunk: int) -> list[tuple[int, int]]:
    """Return (first position, tokens) of the steps that feed a prompt."""
    return [(start, min(chunk, first + tokens - start)) for start in range(first, first + tokens, chunk)]


def prefill_cost(
    works: Sequence[Work],
    speeds: Sequence[Speeds],
    steps: Sequence[tuple[int, int]],
    all_reduce: Callable[[int], float],
    hidden: float = 0.0,
) -> Cost | None:
    """Return the cost of feeding a prompt; None if the prefill rate of a rank is not known.

    works, speeds: of each rank. steps: from `chunks`. all_reduce: seconds of one for so many tokens. hidden: part of
    synchronisation that passes while the ranks compute, 0 to 1.
    """
    totals = np.zeros(4)
    for first, tokens in steps:
        costs = []
        for work, speed in zip(works, speeds, strict=True):
            if speed.prefill is None:
                return None
            seen = work.seen(first, tokens)
            each = len(work.windows) * speed.token_layer_seconds + speed.token_seconds
            costs.append(
                Cost(
                    weights=tokens * work.macs / speed.prefill + work.head_bytes / speed.decode,
                    attention=tokens * seen * work.attention_macs / (speed.attention or speed.prefill),
                    overhead=tokens * each + speed.step_seconds,
                )
            )
        c = slowest(costs, 2 * len(works[0].windows) * all_reduce(tokens) * (1 - hidden))
        totals += (c.weights, c.attention, c.overhead, c.synchronisation)
    return Cost(*totals.tolist())
