"""Measuring an `LLM`: tokens a second of prompts and of generation, beside what the memory would allow."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engine.llm import LLM
from ..engine.request import Request, SamplingParams
from ..engine.stats import Stats, StepStats, each_token
from ..errors import UsageError
from ..kernels import runtime
from ..kernels.probe import ReadProbe
from ..model.config import ModelConfig
from ..model.recipe import bits_per_weight, parameters, weight_bytes
from ..parallel.group import TensorParallelGroup
from ..startup.memory import available_bytes
from .costs import work_of

_READ_BYTES = 1 << 30  # that a host's ranks read together at a time: more than any processor's caches
_READINGS = 4  # of the memory's rate before each repetition, and after the last
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
    """One repetition: seconds from the request to its last token, and the steps of which it consisted.

    Attributes:
        joules: that the metered hosts used; None if there are none.
    """

    seconds: float
    steps: list[StepStats]
    joules: float | None = None
    metered_hosts: int = 0

    @property
    def sync_seconds(self) -> float:
        """How long the root waited for other ranks, its messages included."""
        return sum(step.sync_seconds for step in self.steps)


@dataclass(frozen=True)
class Result:
    """A test's repetitions.

    Attributes:
        started: when, in UTC. weight_bytes: read in a decode step by all ranks together; of a batch's experts as many
            as are expected, see `costs.expected_experts`.
        kv_bytes: of KV caches and states, read by all ranks and steps of one repetition.
        readings: bytes a second that memory gave before, between and after the repetitions; none if a prompt is fed.
    """

    test: Test
    samples: list[Sample]
    started: str
    weight_bytes: int
    kv_bytes: int
    readings: list[float]

    @property
    def tokens(self) -> int:
        """Tokens of all repetitions."""
        return self.test.tokens * len(self.samples)

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
    def step_seconds(self) -> float:
        """The median time of a step."""
        return statistics.median(step.seconds for s in self.samples for step in s.steps)

    @property
    def median_rate(self) -> float | None:
        """Bytes of weights and KV cache that the median decode step read a second; None if a prompt is fed.

        A step is about as long as a reading of the memory's rate: other programs disturb both medians alike.
        """
        if self.test.prompt:
            return None
        return (self.weight_bytes + self.kv_bytes / self.test.generated) / self.step_seconds

    @property
    def read_limit(self) -> float | None:
        """The median of the readings; None if there are none."""
        return statistics.median(self.readings) if self.readings else None

    @property
    def share_of_limit(self) -> float | None:
        """What `median_rate` is of `read_limit`."""
        rate, limit = self.median_rate, self.read_limit
        return None if rate is None or limit is None else rate / limit

    @property
    def joules(self) -> float | None:
        """Energy of all repetitions, of the hosts that can tell; None if none can."""
        told = [s.joules for s in self.samples if s.joules is not None]
        return sum(told) if told else None

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
            "median_step_ns": round(1e9 * self.step_seconds),
            "weights_read_gb_per_s": _giga(self.weight_rate),
            "kv_read_gb_per_s": _giga(self.kv_rate),
            "median_read_gb_per_s": _giga(self.median_rate),
            "read_limit_gb_per_s": _giga(self.read_limit),
            "best_reading_gb_per_s": _giga(max(self.readings, default=None)),
            "share_of_limit": self.share_of_limit,
            "sync_share": self.sync_share,
            "joules": self.joules,
            "joules_per_token": each_token(self.joules, self.tokens),
            "metered_hosts": max(s.metered_hosts for s in self.samples),
            "sent_bytes_per_token": sum(step.sent for s in self.samples for step in s.steps) / self.tokens,
        }


def deviation(values: Iterable[float]) -> float:
    """Return the standard deviation of a sample; 0 of a single value."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def combine(
    prompts: Iterable[int],
    generated: Iterable[int],
    both: Iterable[tuple[int, int]],
    depths: Iterable[int],
    batches: Iterable[int],
) -> list[Test]:
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


class MemoryProbe:
    """Reads the memories of all hosts, with all ranks' threads at the same time."""

    def __init__(self, group: TensorParallelGroup, threads: int) -> None:
        """Take the memory to be read: a part of what is free. threads: this rank's."""
        self._group = group
        self._probe = ReadProbe(min(_READ_BYTES, available_bytes() // 8) // len(group.local_ranks), threads)

    def rate(self) -> float:
        """Return the bytes a second of one reading, the hosts' rates added up. Collective.

        Ranks of one host count as done when the last one is.
        """
        self._group.allgather(None)  # begin together
        slowest: dict[str, float] = {}
        sizes: dict[str, int] = {}
        for host, size, seconds in self._group.allgather((self._group.host, self._probe.size, self._probe.seconds())):
            slowest[host] = max(slowest.get(host, 0.0), seconds)
            sizes[host] = sizes.get(host, 0) + size
        return sum(sizes[host] / slowest[host] for host in sizes)


class Bench:
    """Runs tests on an `LLM`, which holds enough slots and positions for them. Made on every rank.

    Memory that is shared with other programs or other virtual machines gives now more, now less. So its rate is
    measured in turns with the repetitions of each test, and medians of both are compared.
    """

    def __init__(self, llm: LLM, seed: int = 0) -> None:
        """Collect what all ranks hold. seed: of the token ids."""
        self.llm, self.seed = llm, seed
        c, formats = llm.config, llm.formats
        self.weight_bytes = sum(weight_bytes(c, part, formats) for part in llm.shards)
        self._works = [work_of(c, part, formats, llm.kv_type) for part in llm.shards]
        self._memory: MemoryProbe | None = None
        self._runs = 0

    def run(
        self,
        test: Test,
        repetitions: int,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
        warm_up: bool = True,
        readings: int = _READINGS,
    ) -> Result | None:
        """Measure one test, after one warm-up run unless told otherwise; the result is the root's. Collective.

        The KV cache is filled to the depth first, by a prompt of random tokens that is not measured; states, which
        cannot go back, before each repetition.
        readings: of the memory's rate, before each repetition of decode steps alone and after the last.
        """
        readings = 0 if test.prompt else readings  # they would take a short prompt's weights out of the caches
        if not self.llm.config.has_state:
            self._fill(test)
        started = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        if warm_up:
            short = Test(test.prompt, min(test.generated, _WARM_UP_TOKENS), test.depth, test.batch)
            self._measured(short)
        rates = self._read(readings)
        samples = []
        for _ in progress(range(repetitions)):
            samples += self._measured(test)
            rates += self._read(readings)
        if not self.llm.is_root:
            return None
        return Result(test, samples, started, self.step_bytes(test.batch), self._kv_bytes(test), rates)

    def step_bytes(self, sequences: int) -> int:
        """Return the bytes of weights that all ranks read in a decode step of so many sequences."""
        return round(sum(work.read(sequences) + work.head_size for work in self._works))

    def _fill(self, test: Test) -> None:
        """Fill the cache to a test's depth, if it has one. Collective."""
        if test.depth:
            self._lead(lambda: self._feed(test, 0, 1))

    def _measured(self, test: Test) -> list[Sample]:
        """Return the repetition of a test whose cache is filled, on the root. Collective."""
        if self.llm.config.has_state:
            self._fill(test)
        return self._lead(lambda: self._sample(test))

    def _lead(self, call: Callable[[], Sample]) -> list[Sample]:
        """Make a call on the root while the other ranks serve it; return its result, or nothing on those."""
        with self.llm.session() as leads:
            if not leads:
                return []
            return [call()]

    def _read(self, times: int) -> list[float]:
        """Return the memory's rate, read so many times. Collective."""
        if times and self._memory is None:
            self._memory = MemoryProbe(self.llm.group, self.llm.threads)
        return [self._memory.rate() for _ in range(times)] if self._memory is not None else []

    def _sample(self, test: Test) -> Sample:
        # Without a prompt the last token of the past is fed in the first decode step; else the last one is not fed.
        lengths = (test.prompt, test.generated + 1) if test.prompt else (1, test.generated)
        energy = Stats()
        self.llm.engine.times(energy)  # begin counting anew
        sample = self._feed(test, *lengths)
        self.llm.engine.times(energy)
        phases = [joules for joules in (energy.prefill_joules, energy.decode_joules) if joules is not None]
        return replace(sample, joules=sum(phases) if phases else None, metered_hosts=energy.metered_hosts)

    def _feed(self, test: Test, prompt: int, output: int) -> Sample:
        """Feed prompts of the depth and `prompt` more tokens, of which the cache holds the depth's; generate."""
        self._runs += 1
        vocabulary = self.llm.config.vocab_size
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        engine, requests = self.llm.engine, []
        for i in range(test.batch):
            past = np.random.default_rng((self.seed, i, test.depth)).integers(vocabulary, size=test.depth).tolist()
            rng = np.random.default_rng((self.seed, i, test.depth, self._runs))
            new = rng.integers(vocabulary, size=prompt).tolist()
            if prompt:
                new[0] = self._runs % vocabulary  # no run begins like the one before: the cache must not serve it
            requests.append(Request((*past, *new), params))
        steps, started = [], time.perf_counter()
        for request in requests:
            engine.add(request)
        while not engine.is_idle:
            engine.step()
            if engine.last_step is not None:
                steps.append(engine.last_step)
        return Sample(time.perf_counter() - started, steps)

    def _kv_bytes(self, test: Test) -> int:
        """Return the bytes of keys and values that the decode steps of one repetition read."""
        first = test.depth + test.prompt
        each = sum(work.cache_read(first, max(1, test.generated)) + work.state_size for work in self._works)
        return round(each * test.generated * test.batch)

    def about(self) -> dict[str, Any]:
        """Return what holds for all tests, JSON-ready, under llama-bench's keys where it has them."""
        llm, options = self.llm, self.llm.options
        return {
            "model_filename": options.model,
            "model_type": describe(llm.config),
            "model_size": self.weight_bytes,
            "model_n_params": parameters(llm.config),
            "n_layers": llm.config.num_layers,
            "n_ranks": llm.group.size,
            "n_threads": llm.threads,
            "hosts": sorted(set(llm.group.hosts)),
            "instruction_set": runtime.ISA,
            "weights": llm.weights,
            "bits_per_weight": bits_per_weight(llm.config, llm.formats),
            "bytes_per_token": self.step_bytes(1),
            "type_k": llm.kv_type,
            "type_v": llm.kv_type,
            "buffer_float_type": llm.group.payload,
            "sync": [choice.to_dict() for choice in llm.group.choices],
            "prefill_chunk": options.prefill_chunk,
            "split": options.split,
            "shares": llm.shares,
        }

    def record(self, result: Result) -> dict[str, Any]:
        """Return a result with what it was measured on, JSON-ready; share_of_limit counts weights and KV cache."""
        return {**self.about(), **result.to_dict()}


def describe(config: ModelConfig) -> str:
    """Return an architecture and its size, such as "llama 1.24 B"."""
    return f"{config.model_type} {parameters(config) / 1e9:.2f} B"
