"""Measuring a cluster for the cost model: hosts, links, and what each rank reaches at each number of ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..engine.rank_report import Stopwatch, reports
from ..kernels import runtime
from ..kernels.probe import ReadProbe
from ..model.tensors import axes
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
    watch = Stopwatch(1 / group.size)
    watch.start()
    hosts, network, thin, (sample, decode, prefill, attention), fewer = [stage() for stage in progress(stages)]
    hosts = _disturbed(group, watch, hosts)
    c, sent = job.config, job.kept.payload
    points = (
        (float(payload_bytes(c, 1, sent)), _each(decode.waiting - thin.root_step, sample.work)),
        (float(payload_bytes(c, job.chunk, sent)), _each(prefill.waiting - thin.root_chunk, sample.prompt_work)),
    )
    measured = AllReduces(network, group.size, points) if group.size > 1 else AllReduces(network)
    own = thin.speeds(sample, decode.compute[group.rank], prefill.compute[group.rank], attention)
    alone = {count: thin.speeds(sample, *seconds, attention) for count, seconds in fewer.items()}
    everybody = group.allgather((own, alone))
    speeds = []
    for count in range(1, group.size + 1):
        here = {host: group.hosts[:count].count(host) for host in group.hosts}
        speeds.append(tuple(everybody[r][1].get(here[group.hosts[r]], everybody[r][0]) for r in range(count)))
    return Cluster(hosts, tuple(group.allgather(job.threads)), network, tuple(speeds), measured)


def _disturbed(group: TensorParallelGroup, watch: Stopwatch, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    """Return the hosts with what others took of their processors since the watch began. Collective."""
    found = {each.host: each for each in reports(group.hosts, group.allgather(watch.report()), None)}
    return tuple(
        replace(host, other_load=found[host.name].other_load, stolen=found[host.name].stolen) for host in hosts
    )


def _each(seconds: float, work: Work) -> float:
    """Return the part of one all-reduce."""
    return max(0.0, seconds) / work.all_reduces


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
    """What steps cost where hardly any weights are to be read, on this rank and, besides computing, on the root.

    Attributes:
        work, prompt_work: of all layers, and of those that a prompt is timed in. decode, prefill_few, prefill_all:
            seconds of a token, and of a chunk through those layers and through all.
    """

    chunk: int
    work: Work
    prompt_work: Work
    decode: float
    prefill_few: float
    prefill_all: float
    root_step: float
    root_chunk: float

    def speeds(self, sample: Sample, decode: float, prefill: float, attention: float) -> Speeds:
        """Return the speeds that explain what a sample's steps took.

        decode: seconds of a token through all layers. prefill: of a chunk through a few. attention: by how much that
        chunk took longer at DEPTH.
        """
        work, few, tokens = sample.work, sample.prompt_work, self.chunk
        read = work.read() + work.head_size - self.work.read() - self.work.head_size
        rate = read / max(decode - self.decode, _LEAST_PART * decode)
        near, deep = few.attention_macs(0, tokens), few.attention_macs(DEPTH, tokens)
        attention_rate = (deep - near) / attention if attention > 0 and deep > near else None
        seen = near / attention_rate if attention_rate else 0.0
        head = (work.head_size - self.work.head_size) / rate
        macs = tokens * (few.token_macs - self.prompt_work.token_macs)
        matrix_rate = macs / max(prefill - self.prefill_few - seen - head, _LEAST_PART * prefill)
        matrices = tokens * self.work.token_macs / matrix_rate  # that the thin slice itself holds
        layers = self.work.layers
        if layers > few.layers:
            all_layers = (self.prefill_all - self.prefill_few) * layers / (layers - few.layers)
        else:
            all_layers = self.prefill_all
        return Speeds(
            decode=rate,
            prefill=matrix_rate,
            attention=attention_rate,
            layer_seconds=self.decode / layers,
            step_seconds=self.root_step,
            token_layer_seconds=max(0.0, all_layers - matrices) / layers / tokens,
            token_seconds=(max(0.0, self.prefill_all - all_layers) + self.root_chunk) / tokens,
        )


def _thin(group: TensorParallelGroup, job: Job) -> _Thin:
    """Measure steps of the least that a rank can hold, on every rank by itself but at the same time."""
    alone, least = TensorParallelGroup(None), Shard(0, {axis: (0, 1) for axis, _ in axes(job.config)})
    sample = Sample(job, least, 0, alone)
    group.allgather(None)
    decode, short, long = sample.decode(), sample.prefill(), sample.whole_prefill()
    root_step, root_chunk = group.broadcast((decode.waiting, short.waiting))
    return _Thin(
        job.chunk,
        sample.work,
        sample.prompt_work,
        decode.compute[0],
        short.compute[0],
        long.compute[0],
        root_step,
        root_chunk,
    )


def _together(group: TensorParallelGroup, job: Job) -> tuple[Sample, Timing, Timing, float]:
    """Measure steps of equal slices, all ranks in one step as in use; return also what deep attention adds."""
    shard = shards_of(job.config, [1.0] * group.size)[group.rank]
    sample = Sample(job, shard, sample_bytes(len(group.local_ranks)), group)
    return sample, sample.decode(), sample.prefill(), sample.attention()


def _fewer(group: TensorParallelGroup, job: Job) -> dict[int, tuple[float, float]]:
    """Measure this rank's steps with 1, 2, ... of its host's ranks at work, but not all; seconds of decode, prefill."""
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
            found[count] = sample.decode().compute[0], sample.prefill().compute[0]
        wait_asleep(group.comm)
    return found
