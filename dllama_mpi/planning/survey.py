"""Measuring a cluster for the cost model: hosts, links, and what each rank reaches at each number of ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..kernels import runtime
from ..kernels.probe import ReadProbe
from ..parallel.collective.all_reduce import PAYLOADS
from ..parallel.group import TensorParallelGroup
from ..parallel.network import Network, measure_links, wait_asleep
from ..parallel.partition import Shard
from ..startup.memory import available_bytes
from ..startup.shares import shards_of
from ..startup.speed import sample_bytes
from .costs import (
    AllReduces,
    Cluster,
    Host,
    Speeds,
    Work,
    payload_bytes,
)
from .sample import DEPTH, Job, Sample, Timing

_THIN = Shard(heads=(0, 1), kv_heads=(0, 1), intermediate=(0, 32), vocab=(0, 16))  # the least that a rank can hold
_PROMPT_LAYERS = 2  # that a prompt is timed in
_LEAST_PART = 0.05  # of a step that its weights take, where a tiny model's noise would say less
_READ_BYTES, _READINGS = 1 << 29, 5

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def survey(group: TensorParallelGroup, job: Job, progress: Progress = iter) -> Cluster:
    """Measure the cluster that the ranks of a job are on; the same result on every rank. Collective.

    progress: wraps an iteration over the stages.
    """
    stages: list[Callable[[], Any]] = [
        lambda: _hosts(group, job.threads),
        lambda: Network(tuple(group.hosts), measure_links(group.comm, group.hosts)),
        lambda: _thin(group, job),
        lambda: _together(group, job),
        lambda: _fewer(group, job),
    ]
    hosts, network, thin, (sample, decode, prefill, attention), fewer = [stage() for stage in progress(stages)]
    c, layers = job.config, min(_PROMPT_LAYERS, job.config.num_layers)
    width = PAYLOADS[job.payload]
    points = (
        (float(payload_bytes(c, 1, width)), _each(decode.waiting - thin.root_step, c.num_layers)),
        (float(payload_bytes(c, job.chunk, width)), _each(prefill.waiting - thin.root_chunk, layers)),
    )
    measured = AllReduces(network, group.size, points) if group.size > 1 else AllReduces(network)
    own = thin.speeds(sample.work, decode.compute[group.rank], prefill.compute[group.rank], attention, layers)
    alone = {count: thin.speeds(sample.work, *seconds, attention, layers) for count, seconds in fewer.items()}
    everybody = group.allgather((own, alone))
    speeds = []
    for count in range(1, group.size + 1):
        here = {host: group.hosts[:count].count(host) for host in group.hosts}
        speeds.append(tuple(everybody[r][1].get(here[group.hosts[r]], everybody[r][0]) for r in range(count)))
    return Cluster(hosts, tuple(group.allgather(job.threads)), network, tuple(speeds), measured)


def _each(seconds: float, layers: int) -> float:
    """Return the part of one of the two all-reduces a layer."""
    return max(0.0, seconds) / (2 * layers)


def _hosts(group: TensorParallelGroup, threads: int) -> tuple[Host, ...]:
    """Describe all hosts; ranks of one host read its memory at the same time."""
    size = min(_READ_BYTES, available_bytes() // 8) // len(group.local_ranks)
    probe, rates = ReadProbe(size, threads), []
    for _ in range(_READINGS):
        group.allgather(None)  # begin together
        rates.append(probe.size / probe.seconds())
    about = (len(runtime.usable_cores()), runtime.ISA, available_bytes(), statistics.median(rates))
    seen, hosts = group.allgather(about), []
    for name in dict.fromkeys(group.hosts):
        ranks = [seen[r] for r, host in enumerate(group.hosts) if host == name]
        cores, isa, _, _ = ranks[0]
        hosts.append(Host(name, len(ranks), cores, isa, min(r[2] for r in ranks), sum(r[3] for r in ranks)))
    return tuple(hosts)


@dataclass(frozen=True)
class _Thin:
    """What steps cost where hardly any weights are to be read, on this rank and, besides computing, on the root."""

    layers: int
    chunk: int
    work: Work
    decode: float
    prefill_few: float
    prefill_all: float
    root_step: float
    root_chunk: float

    def speeds(self, work: Work, decode: float, prefill: float, attention: float, layers: int) -> Speeds:
        """Return the speeds that explain what a sample's steps took.

        work: the sample's. decode: seconds of a token through all layers. prefill: of a chunk through `layers` layers.
        attention: by how much that chunk took longer at DEPTH.
        """
        read = work.weight_bytes + work.head_bytes - self.work.weight_bytes - self.work.head_bytes
        rate = read / max(decode - self.decode, _LEAST_PART * decode)
        part, tokens = layers / self.layers, self.chunk
        attention_macs = part * tokens * work.attention_macs
        attention_rate = attention_macs * DEPTH / attention if attention > 0 else None
        seen = attention_macs * (tokens + 1) / 2 / attention_rate if attention_rate else 0.0
        head = (work.head_bytes - self.work.head_bytes) / rate
        macs = part * tokens * (work.macs - self.work.macs)
        matrix_rate = macs / max(prefill - self.prefill_few - seen - head, _LEAST_PART * prefill)
        matrices = tokens * self.work.macs / matrix_rate  # that the thin slice itself holds
        if self.layers > layers:
            all_layers = (self.prefill_all - self.prefill_few) * self.layers / (self.layers - layers)
        else:
            all_layers = self.prefill_all
        return Speeds(
            decode=rate,
            prefill=matrix_rate,
            attention=attention_rate,
            layer_seconds=self.decode / self.layers,
            step_seconds=self.root_step,
            token_layer_seconds=max(0.0, all_layers - matrices) / self.layers / tokens,
            token_seconds=(max(0.0, self.prefill_all - all_layers) + self.root_chunk) / tokens,
        )


def _thin(group: TensorParallelGroup, job: Job) -> _Thin:
    """Measure steps of the thinnest slice, on every rank by itself but at the same time."""
    alone = TensorParallelGroup(None)
    sample = Sample(job, _THIN, 0, alone)
    group.allgather(None)
    few = min(_PROMPT_LAYERS, job.config.num_layers)
    decode, short, long = sample.decode(), sample.prefill(few), sample.prefill(job.config.num_layers)
    root_step, root_chunk = group.broadcast((decode.waiting, short.waiting))
    return _Thin(
        job.config.num_layers, job.chunk, sample.work, decode.compute[0], short.compute[0], long.compute[0],
        root_step, root_chunk,
    )  # fmt: skip


def _together(group: TensorParallelGroup, job: Job) -> tuple[Sample, Timing, Timing, float]:
    """Measure steps of equal slices, all ranks in one step as in use; return also what deep attention adds."""
    layers = min(_PROMPT_LAYERS, job.config.num_layers)
    shard = shards_of(job.config, [1.0] * group.size)[group.rank]
    sample = Sample(job, shard, sample_bytes(len(group.local_ranks)), group)
    return sample, sample.decode(), sample.prefill(layers), sample.attention(layers)


def _fewer(group: TensorParallelGroup, job: Job) -> dict[int, tuple[float, float]]:
    """Measure this rank's steps with 1, 2, ... of its host's ranks at work, but not all; seconds of decode, prefill."""
    layers = min(_PROMPT_LAYERS, job.config.num_layers)
    most = max(group.hosts.count(host) for host in group.hosts)
    here, place = len(group.local_ranks), group.local_ranks.index(group.rank)
    found: dict[int, tuple[float, float]] = {}
    sample = None
    if place < here - 1:
        shard = shards_of(job.config, [1.0] * group.size)[group.rank]
        sample = Sample(job, shard, sample_bytes(here), TensorParallelGroup(None))
    for count in range(1, most):
        wait_asleep(group.comm)
        if sample is not None and place < count < here:
            found[count] = sample.decode().compute[0], sample.prefill(layers).compute[0]
        wait_asleep(group.comm)
    return found
