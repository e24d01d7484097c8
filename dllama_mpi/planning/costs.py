"""What a step should cost: arithmetic over a model's shape, the speeds of ranks and their network. Nothing is measured.

decode    a token takes what the slowest rank reads, its weights of chosen experts alone, KV cache and states, at the
          rate of its matrix-vector products, what every layer and step costs besides, and the layers' all-reduces;
prefill   a chunk takes the slowest rank's multiply-adds at the rate of its matrix-matrix products, but no less than
          reading their matrices once, those of attention at theirs, what is not shared out, and all-reduces of the
          whole chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..kernels.layout import BLOCK, TileFormat, ceil_div
from ..model.buffers import memory_bytes
from ..model.config import AttentionConfig, DeltaNetConfig, ModelConfig
from ..model.recipe import tensor_bytes
from ..model.tensors import HEAD, Kind, heads_axis, part, tensors, value_axis
from ..parallel.collective.table import block_bytes
from ..parallel.network import Network, interpolate
from ..parallel.partition import Shard

_STATE_MACS = 3  # for an element of a delta net's state: what it predicts, how it changes, what it answers


def expected_experts(experts: int, chosen: int, tokens: int) -> float:
    """Return how many different experts of a layer tokens are expected to choose, `chosen` each.

    Were every choice equally likely and tokens independent, one token would leave out an expert with probability
    1 - chosen / experts, all n tokens with the n-th power of that; the expectation of a sum is that of its terms, so
    experts * (1 - (1 - chosen / experts) ** n) are read. Tokens of one text choose more alike: they read fewer.
    """
    return experts * (1 - (1 - chosen / experts) ** tokens)


@dataclass(frozen=True)
class ExpertsWork:
    """What layers of experts of one kind ask of a rank.

    Attributes:
        experts, chosen: of a layer: in all, and by a token. size: bytes of all experts of these layers.
        macs: multiply-adds of one token.
    """

    experts: int
    chosen: int
    size: int
    macs: int

    def read(self, tokens: int) -> float:
        """Return the bytes that a step with so many tokens reads: no expert more than once."""
        return self.size * expected_experts(self.experts, self.chosen, tokens) / self.experts


@dataclass(frozen=True)
class AttentionWork:
    """What attention layers with one window ask of a rank.

    Attributes:
        window: positions a token sees, or 0 for all. size: bytes of one position's keys and values.
        macs: multiply-adds for one token and one position it sees.
    """

    window: int
    size: int
    macs: int

    def seen(self, first: int, tokens: int) -> float:
        """Return how many positions tokens at first, first + 1, ... see, on the average of them."""
        lengths = np.arange(first + 1, first + tokens + 1)
        return float(np.minimum(lengths, self.window).mean() if self.window else lengths.mean())


@dataclass(frozen=True)
class Work:
    """What one rank's slice asks of it.

    Attributes:
        layers: their number. all_reduces: of a step.
        size: bytes of the layers' weights that every token reads. head_size: of its part of the lm_head.
        macs: multiply-adds of these weights, without the lm_head, and of states, for one token.
        state_size: bytes of one sequence's states.
    """

    layers: int
    all_reduces: int
    size: int
    head_size: int
    macs: int
    state_size: int = 0
    experts: tuple[ExpertsWork, ...] = ()
    attentions: tuple[AttentionWork, ...] = ()

    def read(self, tokens: int = 1) -> float:
        """Return the bytes of weights that a step with so many tokens reads, without the lm_head."""
        return self.size + sum(each.read(tokens) for each in self.experts)

    @property
    def token_macs(self) -> int:
        """Multiply-adds for one token, without those of attention and the lm_head."""
        return self.macs + sum(each.macs for each in self.experts)

    def cache_read(self, first: int, tokens: int) -> float:
        """Return the mean bytes of keys and values that tokens at first, first + 1, ... read, one a step."""
        return sum(each.size * each.seen(first, tokens) for each in self.attentions)

    def attention_macs(self, first: int, tokens: int) -> float:
        """Return the multiply-adds of attention for all tokens at first, first + 1, ..."""
        return sum(tokens * each.macs * each.seen(first, tokens) for each in self.attentions)


def work_of(config: ModelConfig, shard: Shard, formats: Mapping[str, TileFormat], kv_type: str) -> Work:
    """Return the work of one rank's slice."""
    size = head = macs = 0
    experts: dict[tuple[int, int], list[int]] = {}
    for spec in tensors(config):
        held = tensor_bytes(spec, shard, formats)
        products = int(np.prod(part(spec, shard).sizes, dtype=np.int64)) if spec.kind is Kind.MATRIX else 0
        if spec.name == HEAD:
            head = held
        elif 0 < spec.reads < 1:
            own = experts.setdefault((spec.shape[0], round(spec.reads * spec.shape[0])), [0, 0])
            own[0], own[1] = own[0] + held, own[1] + round(spec.reads * products)
        else:
            size, macs = size + held, macs + products
    attentions: dict[int, list[int]] = {}
    for layer, count in Counter(config.layers).items():
        if isinstance(layer.mixer, AttentionConfig):
            own = attentions.setdefault(layer.mixer.window, [0, 0])
            first, last = shard.units(heads_axis(layer.mixer))
            own[0] += count * memory_bytes(replace(config, layers=(layer,)), shard, kv_type)[1]
            own[1] += count * 2 * (last - first) * layer.mixer.head_dim
        elif isinstance(layer.mixer, DeltaNetConfig):  # what short convolutions do is nothing beside matrices
            first, last = shard.units(value_axis(layer.mixer, 1))
            macs += count * _STATE_MACS * (last - first) * layer.mixer.key_dim * layer.mixer.value_dim
    return Work(
        layers=config.num_layers,
        all_reduces=all_reduces(config),
        size=size,
        head_size=head,
        macs=macs,
        state_size=memory_bytes(config, shard, kv_type)[0],
        experts=tuple(ExpertsWork(*kind, *own) for kind, own in experts.items()),
        attentions=tuple(AttentionWork(window, *own) for window, own in attentions.items()),
    )


def all_reduces(config: ModelConfig) -> int:
    """Return the all-reduces of a step: two a layer, and one of norms over all heads, which others hold in part."""
    return 2 * config.num_layers + sum(attention.qk_norm == "whole" for attention in config.attentions)


@dataclass(frozen=True)
class Speeds:
    """What one rank reaches.

    Attributes:
        decode: bytes of weights, KV cache or states a second, in matrix-vector products.
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
        other_load, stolen: the parts of its processors, 0 to 1, that other programs and other virtual machines took
            while it was measured; None if it was not.
    """

    name: str
    ranks: int
    cores: int
    instruction_set: str | None
    free: int
    read: float | None
    other_load: float | None = None
    stolen: float | None = None


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


def payload_bytes(config: ModelConfig, tokens: int, payload: str) -> int:
    """Return the bytes of one all-reduce's payload; its name: see `parallel.collective.table`."""
    return ceil_div(tokens * config.hidden_size, BLOCK) * block_bytes(payload, tokens)


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
        cache = work.cache_read(*positions) + 2 * work.state_size  # a state is written back
        costs.append(
            Cost(
                weights=(work.read() + work.head_size) / speed.decode,
                attention=cache / speed.decode,
                overhead=work.layers * speed.layer_seconds + speed.step_seconds,
            )
        )
    return slowest(costs, works[0].all_reduces * all_reduce)


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
            each = work.layers * speed.token_layer_seconds + speed.token_seconds
            costs.append(
                Cost(
                    weights=_matrices_seconds(work, speed.prefill, speed.decode, tokens),
                    attention=work.attention_macs(first, tokens) / (speed.attention or speed.prefill),
                    overhead=tokens * each + speed.step_seconds,
                )
            )
        c = slowest(costs, works[0].all_reduces * all_reduce(tokens) * (1 - hidden))
        totals += (c.weights, c.attention, c.overhead, c.synchronisation)
    return Cost(*totals.tolist())


def _matrices_seconds(work: Work, macs_rate: float, read_rate: float, tokens: int) -> float:
    """Return the seconds of a chunk's products: the longer of computing and reading, of each kind of weights."""
    kinds = [(work.macs, float(work.size)), *((each.macs, each.read(tokens)) for each in work.experts)]
    seconds = sum(max(tokens * macs / macs_rate, size / read_rate) for macs, size in kinds)
    return seconds + work.head_size / read_rate
