"""Figures for Prometheus: what requests have come to, and what the engine is doing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..engine.request import Output

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


@dataclass(frozen=True)
class RankSeconds:
    """The seconds that a rank spent computing and waiting for others, within steps."""

    rank: int
    host: str
    compute: float
    wait: float


class Metrics:
    """Counts finished requests and their tokens. Used by the HTTP loop's thread alone."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        make = {"registry": self.registry, "namespace": "dllama"}
        self._prompt = Counter("prompt_tokens", "Tokens of prompts", **make)  # type: ignore[arg-type]
        self._cached = Counter("cached_tokens", "Tokens of prompts that were in the cache", **make)  # type: ignore[arg-type]
        self._output = Counter("output_tokens", "Generated tokens", **make)  # type: ignore[arg-type]
        self._drafted = Counter("drafted_tokens", "Drafted tokens", **make)  # type: ignore[arg-type]
        self._accepted = Counter("accepted_tokens", "Drafted tokens that were right", **make)  # type: ignore[arg-type]
        self._finished = Counter("requests", "Finished requests", ["finish_reason"], **make)  # type: ignore[arg-type]
        self._answers = Counter("http_responses", "HTTP responses", ["status"], **make)  # type: ignore[arg-type]
        self._first = Histogram(
            "time_to_first_token_seconds", "From a request to its first token", buckets=_FIRST_TOKEN, **make  # type: ignore[arg-type]
        )  # fmt: skip
        self._gap = Histogram(
            "inter_token_seconds", "From a token of a request to the next", buckets=_GAP, **make  # type: ignore[arg-type]
        )  # fmt: skip

    def observe(self, output: Output, seconds: float | None) -> None:
        """Count an output; seconds: since the request's last one."""
        if seconds is not None and output.token_ids:
            for _ in output.token_ids:  # several come at once where drafts were right
                self._gap.observe(seconds / len(output.token_ids))
        usage = output.usage
        if output.finish_reason is None or usage is None:
            return
        self._finished.labels(output.finish_reason).inc()
        for counter, value in (
            (self._prompt, usage.prompt_tokens),
            (self._cached, usage.cached_tokens),
            (self._output, usage.output_tokens),
            (self._drafted, usage.drafted),
            (self._accepted, usage.accepted),
        ):
            counter.inc(value)
        if usage.first_token is not None:
            self._first.observe(usage.first_token - usage.queued)

    def answered(self, status: int) -> None:
        """Count an HTTP response."""
        self._answers.labels(str(status)).inc()

    def text(self, snapshot: Any, ranks: Sequence[RankSeconds] = ()) -> bytes:
        """Return all figures in Prometheus' text format, with those of the engine and the ranks if they are there."""
        return generate_latest(self.registry) + generate_latest(_Once([*gauges(snapshot), *rank_counters(ranks)]))


class _Once(CollectorRegistry):
    """A registry that holds metrics made a moment ago."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        super().__init__()
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        return iter(self._metrics)


def plain(snapshot: Any) -> dict[str, Any]:
    """Return what the engine is doing as JSON-ready values."""
    if snapshot is None:
        return {}
    if is_dataclass(snapshot) and not isinstance(snapshot, type):
        return {f.name: _value(getattr(snapshot, f.name)) for f in fields(snapshot)}
    return {name: _value(value) for name, value in dict(snapshot).items()}


def _value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_value(each) for each in value]
    return plain(value) if is_dataclass(value) and not isinstance(value, type) else value


def gauges(snapshot: Any) -> Iterator[Metric]:
    """Yield the numbers of the engine's snapshot as gauges."""
    for name, value in plain(snapshot).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield GaugeMetricFamily(f"dllama_engine_{name}", f"The engine's {name.replace('_', ' ')}", value=value)


def rank_counters(ranks: Sequence[RankSeconds]) -> Iterator[Metric]:
    """Yield what ranks did as counters."""
    for name, said in (("compute", "computed"), ("wait", "waited for other ranks")):
        family = CounterMetricFamily(
            f"dllama_rank_{name}_seconds", f"How long a rank {said}, in steps", labels=["rank", "host"]
        )
        for each in ranks:
            family.add_metric([str(each.rank), each.host], getattr(each, name))
        if ranks:
            yield family
