"""What a model needs and how fast it should be at 1..n ranks of a cluster, from the cost model; nothing is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ClusterError
from ..kernels.layout import FORMATS
from ..model.config import ModelConfig
from ..model.recipe import WeightRecipe, bits_per_weight
from ..parallel.partition import AUTO, Shard, parse_split
from ..startup.memory import fitting
from ..startup.options import Kept
from ..startup.shares import MemoryPlan, most_ranks, shards_of
from .costs import (
    Cluster,
    Cost,
    chunks,
    decode_cost,
    payload_bytes,
    prefill_cost,
    work_of,
)

_BUSY = 0.1  # of a host's processors, from which others disturb what is measured
_UNEVEN = 4.0  # times the best latency that the median may be
_WORTH = 1.05  # by how much another split must be faster to be advised


@dataclass(frozen=True)
class Question:
    """What is planned: a model, how it is kept, sent and shared out, and the lengths that speed is told for.

    Attributes:
        max_seq_len: positions of the context; None: the model's, or what fits. split: as `--split`.
        prompt, generated: tokens. depth: tokens in the KV cache before.
        hidden: part of a prompt's synchronisation that passes while ranks compute, 0 to 1.
    """

    config: ModelConfig
    kept: Kept
    chunk: int = 256
    max_seq_len: int | None = None
    split: str | None = None
    prompt: int = 512
    generated: int = 128
    depth: int = 0
    hidden: float = 0.0

    @property
    def memory(self) -> MemoryPlan:
        """What decides about memory."""
        return MemoryPlan(self.config, self.kept, self.chunk + 1, 1, self.max_seq_len)


def plan(question: Question, cluster: Cluster) -> dict[str, Any]:
    """Return the answer, JSON-ready, units in the keys.

    Raises:
        UsageError: the split does not fit the number of ranks.
    """
    most = min(len(cluster.network.hosts), most_ranks(question.config))
    counts = [_at(question, cluster, count) for count in range(1, most + 1)]
    fitting = [c for c in counts if c["problem"] is None]

    def best(phase: str) -> int | None:
        rated = [c for c in fitting if c[phase] is not None]
        return max(rated, key=lambda c: c[phase]["tokens_per_second"])["ranks"] if rated else None

    return {
        "hosts": [
            {
                "name": host.name,
                "ranks": host.ranks,
                "cores": host.cores,
                "instruction_set": host.instruction_set,
                "free_bytes": host.free,
                "read_gb_per_s": None if host.read is None else host.read / 1e9,
                "other_load": host.other_load,
                "stolen": host.stolen,
            }
            for host in cluster.hosts
        ],
        "links": [
            {
                "hosts": list(pair),
                "latency_us": 1e6 * link.latency,
                "best_latency_us": None if link.best is None else 1e6 * link.best,
                "mbit_per_s": 8e-6 * link.bytes_per_second,
            }
            for pair, link in cluster.network.links.items()
        ],
        "ranks": [
            {
                "rank": rank,
                "host": cluster.network.hosts[rank],
                "threads": cluster.threads[rank],
                "decode_gb_per_s": speeds.decode / 1e9,
                "prefill_gmac_per_s": None if speeds.prefill is None else speeds.prefill / 1e9,
                "layer_us": 1e6 * speeds.layer_seconds,
            }
            for rank, speeds in enumerate(cluster.speeds[-1])
        ],
        "counts": counts,
        "best_ranks": {"decode": best("decode"), "prefill": best("prefill")},
        "advice": list(dict.fromkeys(_advice(question, cluster, counts))),
        "disturbances": list(_disturbances(cluster)),
    }


def _shares(question: Question, cluster: Cluster, count: int) -> list[float]:
    """Return the shares of the first `count` ranks."""
    if question.split == AUTO:
        speeds = [s.decode for s in cluster.speeds[count - 1]]
        shares, _ = question.memory.shares(speeds, _free(cluster)[:count])
    else:
        given = parse_split(question.split, len(cluster.network.hosts))[:count]
        shares = [share / sum(given) for share in given]
    return shares


def _free(cluster: Cluster) -> list[tuple[str, int]]:
    """Return each rank's host and the bytes that host has free."""
    free = {host.name: host.free for host in cluster.hosts}
    return [(name, free[name]) for name in cluster.network.hosts]


def _at(question: Question, cluster: Cluster, count: int) -> dict[str, Any]:
    """Return the answer for the first `count` ranks."""
    shares = _shares(question, cluster, count)
    parts = shards_of(question.config, shares)
    positions, problem = _positions(question, cluster, parts)
    decode, prefill = _costs(question, cluster, parts)
    return {
        "ranks": count,
        "shares": shares,
        "max_seq_len": positions,
        "problem": problem,
        "memory": _memory(question, cluster, parts, positions or question.max_seq_len or 0),
        "decode": _told(decode, 1),
        "prefill": None if prefill is None else _told(prefill, question.prompt),
    }


def _positions(question: Question, cluster: Cluster, parts: list[Shard]) -> tuple[int | None, str | None]:
    """Return the positions that fit, or what is in their way."""
    memory = question.memory
    needs = memory.needs(parts, _free(cluster)[: len(parts)])
    try:
        return fitting(needs, memory.wish).positions, None
    except ClusterError as error:
        return None, str(error)


def _memory(question: Question, cluster: Cluster, parts: list[Shard], positions: int) -> list[dict[str, Any]]:
    """Return what each rank needs."""
    hosts = _free(cluster)[: len(parts)]
    names = [host for host, _ in hosts]
    return [
        {"rank": rank, "host": host, **memory_told(question.memory.parts(part, names, positions)), "free_bytes": free}
        for rank, (part, (host, free)) in enumerate(zip(parts, hosts, strict=True))
    ]


def memory_told(held: dict[str, int]) -> dict[str, int]:
    """Return what `MemoryPlan.parts` says as JSON-ready values, with their sum."""
    return {f"{name}_bytes": size for name, size in held.items()} | {"total_bytes": sum(held.values())}


def _costs(question: Question, cluster: Cluster, parts: list[Shard]) -> tuple[Cost, Cost | None]:
    """Return what a generated token and the whole prompt should take."""
    q, count, reduces = question, len(parts), cluster.all_reduces
    works = [work_of(q.config, part, q.kept.formats, q.kept.kv_type) for part in parts]
    speeds = cluster.speeds[count - 1]

    def all_reduce(tokens: int) -> float:
        return reduces.seconds(count, payload_bytes(q.config, tokens, q.kept.payload))

    decode = decode_cost(works, speeds, (q.depth, q.generated), all_reduce(1))
    return decode, prefill_cost(works, speeds, chunks(q.depth, q.prompt, q.chunk), all_reduce, q.hidden)


def _told(cost: Cost, tokens: int) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens / cost.total,
        "ms": 1e3 * cost.total,
        "weights_ms": 1e3 * cost.weights,
        "attention_ms": 1e3 * cost.attention,
        "synchronisation_ms": 1e3 * cost.synchronisation,
        "overhead_ms": 1e3 * cost.overhead,
    }


# ---- what to believe


def _disturbances(cluster: Cluster) -> Iterator[str]:
    """Yield what disturbed the measuring: others at work on a host, or messages that took far longer than they need."""
    for host in cluster.hosts:
        for part, who in ((host.other_load, "other programs"), (host.stolen, "other virtual machines")):
            if part is not None and part > _BUSY:
                yield f"{who} took {part:.0%} of {host.name}'s processors"
    for (first, second), link in cluster.network.links.items():
        if link.best is not None and link.latency > _UNEVEN * link.best:
            where = f"within {first}" if first == second else f"between {first} and {second}"
            yield f"messages {where} took {1e6 * link.latency:,.1f} us, at best {1e6 * link.best:,.1f} us"


# ---- what to change


def _advice(question: Question, cluster: Cluster, counts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield lines for people: what does not fit and what would, and whether another split is faster."""
    last = counts[-1]
    if last["problem"] is not None:
        yield f"{_ranks(last['ranks'])}: {last['problem']}"
        yield from _fitting(question, cluster, last["ranks"])
    elif last["max_seq_len"] < question.memory.wanted:
        yield f"{_ranks(last['ranks'])}: max-seq-len {last['max_seq_len']} of the model's {question.memory.wanted} fits"
    if question.split is None and last["ranks"] > 1:
        auto = _at(replace(question, split=AUTO), cluster, last["ranks"])
        before, after = last["decode"]["tokens_per_second"], auto["decode"]["tokens_per_second"]
        if auto["problem"] is None and (last["problem"] is not None or after > _WORTH * before):
            yield f"{_ranks(last['ranks'])}: --split auto should decode {after:.1f} tokens/s, equal shares {before:.1f}"


def _fitting(question: Question, cluster: Cluster, count: int) -> Iterator[str]:
    """Yield the changes of options that make a model fit, each by itself."""
    kept, changes, bits = question.kept, [], bits_per_weight(question.config, question.kept.formats)
    for name in {fmt.tile_bytes: fmt.name for fmt in reversed(FORMATS.values())}.values():
        formats = WeightRecipe.parse(name).formats(question.config)
        if bits_per_weight(question.config, formats) < bits:
            changes.append((f"--weights {name}", replace(kept, formats=formats)))
    if kept.kv_type != "q80":
        changes.append(("--kv-type q80", replace(kept, kv_type="q80")))
    for option, changed in changes:
        if _at(replace(question, kept=changed), cluster, count)["problem"] is None:
            yield f"{_ranks(count)}: {option} fits"


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
