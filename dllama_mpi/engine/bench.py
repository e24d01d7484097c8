"""Measuring an `LLM`: tokens a second of prompts and of generation, beside what the memory would allow."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UsageError
from ..kernels import runtime
from ..kernels.probe import ReadProbe
from ..model.config import ModelConfig
from ..model.size import cache_bytes, weight_bytes
from ..parallel.group import TensorParallelGroup
from .llm import LLM
from .memory import available_bytes
from .sequence import SamplingParams, Sequence
from .stats import Stats, StepStats

_READ_BYTES = 1 << 30  # that a host's ranks read together at a time: more than any processor's caches
_READINGS = 12
_WARM_UP_TOKENS = 8  # generated before a test is measured


@dataclass(frozen=True)
class Test:
    """One thing to measure, after llama.cpp's llama-bench.

    Attributes:
        prompt: prompt tokens fed. generated: decode steps after them. Either may be 0, not both.
        depth: tokens in the KV cache before, not measured. batch: sequences at once, each of these lengths.
    """

    __test__ = False  # nothing for pytest to collect

    prompt: int
    generated: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """llama-bench's name: pp512, tg128, pp512+tg128; with x8 for a batch and @ d4000 for a depth."""
        parts = [f"pp{self.prompt}"] * (self.prompt > 0) + [f"tg{self.generated}"] * (self.generated > 0)
        batch, depth = f" x{self.batch}" * (self.batch > 1), f" @ d{self.depth}" * (self.depth > 0)
        return "+".join(parts) + batch + depth

    @property
    def tokens(self) -> int:
        """Tokens that one repetition feeds."""
        return self.batch * (self.prompt + self.generated)

    @property
    def positions(self) -> int:
        """Positions of the KV cache that a sequence needs."""
        return self.depth + self.prompt + self.generated + 1


@dataclass(frozen=True)
class Sample:
    """One repetition: seconds from the request to its last token, and the steps of which it consisted."""

    seconds: float
    steps: list[StepStats]

    @property
    def sync_seconds(self) -> float:
        """How long the root waited for other ranks, its messages included."""
        return sum(step.sync_seconds for step in self.steps)


@dataclass(frozen=True)
class Result:
    """A test's repetitions.

    Attributes:
        started: when, in UTC. weight_bytes: read in a step by all ranks together.
        kv_bytes: read by all ranks and steps of one repetition.
    """

    test: Test
    samples: list[Sample]
    started: str
    weight_bytes: int
    kv_bytes: int

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each repetition, all sequences together."""
        return [self.test.tokens / s.seconds for s in self.samples]

    def _rate(self, size: float) -> float | None:
        """Return bytes read a second over all repetitions; None unless all steps are decode steps."""
        return None if self.test.prompt else size * len(self.samples) / sum(s.seconds for s in self.samples)

    @property
    def weight_rate(self) -> float | None:
        """Bytes of weights read a second in decode; None for a test that feeds a prompt."""
        return self._rate(self.weight_bytes * self.test.generated)

    @property
    def kv_rate(self) -> float | None:
        """Bytes of the KV cache read a second in decode; None for a test that feeds a prompt."""
        return self._rate(self.kv_bytes)

    @property
    def sync_share(self) -> float:
        """Part of the time that went into synchronisation, 0 to 1."""
        return sum(s.sync_seconds for s in self.samples) / sum(s.seconds for s in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values under llama-bench's keys where it has them; further ones say their units."""
        nanoseconds = [round(1e9 * s.seconds) for s in self.samples]
        return {
            "test": self.test.name,
            "n_prompt": self.test.prompt,
            "n_gen": self.test.generated,
            "n_depth": self.test.depth,
            "n_batch": self.test.batch,
            "test_time": self.started,
            "avg_ns": round(statistics.fmean(nanoseconds)),
            "stddev_ns": round(deviation(nanoseconds)),
            "avg_ts": statistics.fmean(self.speeds),
            "stddev_ts": deviation(self.speeds),
            "samples_ns": nanoseconds,
            "samples_ts": self.speeds,
            "weights_read_gb_per_s": _giga(self.weight_rate),
            "kv_read_gb_per_s": _giga(self.kv_rate),
            "sync_share": self.sync_share,
        }


def deviation(values: Iterable[float]) -> float:
    """Return the standard deviation of a sample; 0 of a single value."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def combine(
    prompts: Iterable[int], generated: Iterable[int], both: Iterable[tuple[int, int]], depths: Iterable[int],
    batches: Iterable[int],
) -> list[Test]:  # fmt: skip
    """Return the tests of all depths and batches: prompts alone, generation alone, and pairs of both.

    Raises:
        UsageError: all lengths are 0.
    """
    pairs = [*((p, 0) for p in prompts), *((0, n) for n in generated), *both]
    pairs = [pair for pair in pairs if pair != (0, 0)]
    if not pairs:
        raise UsageError("nothing to measure: every -p, -n and -pg is 0; give one that is not")
    batches = list(batches)
    return list(dict.fromkeys(Test(p, n, depth, batch) for depth in depths for batch in batches for p, n in pairs))


def read_rate(group: TensorParallelGroup, threads: int) -> float:
    """Return the bytes a second that all ranks' threads together read from their memories. Collective.

    The best of several times. Ranks of one host read at the same time and count as done when the last one is.
    """
    size = min(_READ_BYTES, available_bytes() // 8) // len(group.local_ranks)
    probe, best = ReadProbe(size, threads), 0.0
    for _ in range(_READINGS):
        group.allgather(None)  # begin together
        seen = group.allgather((group.host, probe.size, probe.seconds()))
        hosts = {host: [(size, seconds) for name, size, seconds in seen if name == host] for host, _, _ in seen}
        rates = (sum(size for size, _ in each) / max(seconds for _, seconds in each) for each in hosts.values())
        best = max(best, sum(rates))
    return best


@dataclass
class Bench:
    """Runs tests on an `LLM`, which holds enough slots and positions for them. Made on every rank, run on the root.

    Attributes:
        seed: of the token ids. read_rate: bytes a second, see the function of that name; 0 if not measured.
    """

    llm: LLM
    seed: int = 0
    read_rate: float = 0.0
    _runs: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Collect what all ranks hold. Collective."""
        c, group = self.llm.config, self.llm.group
        self.weight_bytes = sum(weight_bytes(c, part, self.llm.format) for part in self.llm.shards)
        self.position_bytes = sum(cache_bytes(c, part, self.llm.kv_type) for part in self.llm.shards)
        self.threads: list[int] = group.allgather(self.llm.threads)

    def measure_memory(self) -> None:
        """Measure `read_rate`; a second time the better one counts. Collective, and not within a session."""
        self.read_rate = max(self.read_rate, read_rate(self.llm.group, self.llm.threads))

    def run(
        self,
        test: Test,
        repetitions: int,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
        warm_up: bool = True,
    ) -> Result:
        """Measure one test, after one warm-up run unless told otherwise. Root only, within a session.

        The KV cache is filled to the depth first, by a prompt of random tokens that is not measured.
        """
        self.llm.engine.scheduler.reuse = True  # what stands in the cache up to the depth
        if test.depth:
            self._feed(test, 0, 1)
        started = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        if warm_up:
            self._sample(Test(test.prompt, min(test.generated, _WARM_UP_TOKENS), test.depth, test.batch))
        samples = [self._sample(test) for _ in progress(range(repetitions))]
        return Result(test, samples, started, self.weight_bytes, self._kv_bytes(test))

    def _sample(self, test: Test) -> Sample:
        if not test.prompt:  # the last token of the past is fed in the first decode step
            return self._feed(test, 1, test.generated)
        return self._feed(test, test.prompt, test.generated + 1)  # the last of these tokens is not fed

    def _feed(self, test: Test, prompt: int, output: int) -> Sample:
        """Feed prompts of the depth and `prompt` more tokens, of which the cache holds the depth's; generate."""
        self._runs += 1
        vocabulary = self.llm.config.vocab_size
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        sequences = []
        for i in range(test.batch):
            past = np.random.default_rng((self.seed, i, test.depth)).integers(vocabulary, size=test.depth).tolist()
            rng = np.random.default_rng((self.seed, i, test.depth, self._runs))
            new = rng.integers(vocabulary, size=prompt).tolist()
            if prompt:
                new[0] = self._runs % vocabulary  # no run begins like the one before: the cache must not serve it
            tokens = [*past, *new]
            sequences.append(Sequence(tokens, params, len(tokens) + output, None, rng, frozenset()))
        stats, started = Stats(), time.perf_counter()
        for _ in self.llm.engine.run(sequences, stats):
            pass
        return Sample(time.perf_counter() - started, [*stats.prefill, *stats.decode])

    def _kv_bytes(self, test: Test) -> int:
        """Return the bytes of keys and values that the decode steps of one repetition read."""
        layer = self.position_bytes / self.llm.config.num_layers
        first = test.depth + test.prompt + 1
        lengths = np.arange(first, first + test.generated)
        seen = sum(int(np.minimum(lengths, w).sum()) if w else int(lengths.sum()) for w in self.llm.config.windows)
        return round(layer * seen * test.batch)

    def about(self) -> dict[str, Any]:
        """Return what holds for all tests, JSON-ready, under llama-bench's keys where it has them."""
        llm, options = self.llm, self.llm.options
        return {
            "model_filename": options.model,
            "model_type": describe(llm.config),
            "model_size": self.weight_bytes,
            "model_n_params": llm.config.parameters,
            "n_ranks": llm.group.size,
            "n_threads": llm.threads,
            "hosts": sorted(set(llm.group.hosts)),
            "instruction_set": runtime.ISA,
            "weights": llm.format.name,
            "type_k": llm.kv_type,
            "type_v": llm.kv_type,
            "buffer_float_type": options.buffer_float_type,
            "prefill_chunk": options.prefill_chunk,
            "split": options.split,
            "shares": llm.shares,
        }

    def record(self, result: Result) -> dict[str, Any]:
        """Return a result with what it was measured on, JSON-ready; share_of_limit counts weights and KV cache."""
        rate = None if result.weight_rate is None else result.weight_rate + (result.kv_rate or 0.0)
        return {
            **self.about(),
            **result.to_dict(),
            "read_limit_gb_per_s": self.read_rate / 1e9 if self.read_rate else None,
            "share_of_limit": rate / self.read_rate if rate is not None and self.read_rate else None,
        }


def describe(config: ModelConfig) -> str:
    """Return an architecture and its size, such as "llama 1.24 B"."""
    return f"{config.model_type} {config.parameters / 1e9:.2f} B"
