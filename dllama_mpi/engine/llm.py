"""The facade: `LLM`, built and called by every rank alike."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np

from ..errors import DllamaError, ModelError, RequestError
from ..kernels import runtime
from ..kernels.layout import BLOCK, ceil_to
from ..log import say
from ..model.buffers import Sizes
from ..model.build import load
from ..model.config import ModelConfig
from ..model.transformer import Rank, Transformer
from ..parallel.connection import Phase
from ..parallel.group import TensorParallelGroup, connect
from ..parallel.partition import AUTO, parse_split
from ..progress import chosen, progress, show_progress
from ..startup.finding import find_model
from ..startup.memory import Room, available_bytes, fitting
from ..startup.opening import RANDOM, ModelFiles, declared_stop_ids, load_tokenizer, open_model
from ..startup.options import Kept, Options
from ..startup.placement import Placement, Wanted, manifest_of
from ..startup.shares import MemoryPlan, shards_of, split_line, steady
from ..startup.speed import decode_rates
from ..startup.threads import place_threads
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer
from ..weights.cache import cache_of
from ..weights.slices import Manifest
from ..weights.source import WeightSource
from .completion import Completion, Generation
from .engine import Context, Engine
from .lookup import MOST_DRAFTS, Lookup
from .reading import steps
from .request import Request, SamplingParams, are_several, is_integer, is_list, shown, unit
from .runner import Runner
from .scheduler import Limits
from .stats import Stats
from .step import Command
from .worker import serve

Prompt = str | Sequence[int]
_DRAFTED = 4  # sequences for whose drafts there is room in a step


class LLM:
    """A model cut over all ranks. Building one, and each of its calls, is collective: every rank does the same.

    The root (rank 0) gets the results, the other ranks None. With one process no MPI is needed.

    Raises (all methods):
        DllamaError: a user's mistake, the same on every rank.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, group: TensorParallelGroup | None = None, **options: Any
    ) -> None:
        """Load the model; `options` are the fields of `Options`."""
        self.group = group or connect(options.get("timeout"))
        with self.group.together():
            self.options: Options = Options(model=os.fspath(model), **options)
        self.options = self.group.broadcast(self.options)
        o = self.options
        cores = self.group.allgather((self.group.host, runtime.usable_cores()))
        with self.group.together():
            o.check()
            self.group.watchdog.timeout = o.timeout
            self._tells = self.group.is_root and not o.quiet
            show_progress(chosen(o.progress) if self._tells else "off")
        self.folder = find_model(o.model, self.group, o.quiet)
        with self.group.together():
            opened = open_model(str(self.folder)) if self.group.is_root or o.model.startswith(RANDOM) else None
            if opened is not None and not o.quiet and (said := opened.told(o.weights)):
                say(said)
            self._tokenizer: Tokenizer | None = None
            if self.group.is_root:
                rows = None if opened is None else opened.config.vocab_size
                self._tokenizer = load_tokenizer(self.folder, o.tokenizer, rows)
        self.config: ModelConfig
        self.config, manifest = self._agree(opened)
        c, self.formats = self.config, manifest.formats
        with self.group.together():
            o.check_for(c)
            self.shares = parse_split(None if o.split == AUTO else o.split, self.group.size)
            self.shards = shards_of(c, self.shares)
            self.threads = place_threads(self.group, cores, o.nthreads, o.bind)
        if self._tells and runtime.is_cold():
            say(f"compiling kernels for {runtime.describe()}; this takes about 20 seconds and is done once")
        kept = Kept.of(self.formats, o.kv_type, o.buffer_float_type, o.sync)
        self.kv_type, self.weights = kept.kv_type, kept.weights(c)
        self.speculates = o.speculate == "lookup"
        drafts = MOST_DRAFTS * min(o.max_batch, _DRAFTED) * self.speculates
        tokens = o.prefill_chunk + o.max_batch + drafts
        kv_bytes = None if o.kv_memory is None else int(1e9 * o.kv_memory)
        self.memory = MemoryPlan(c, kept, tokens, o.max_batch, o.max_seq_len, kv_bytes)
        if o.split == AUTO and self.group.size > 1:
            self._share_out()
        rank = Rank(self.group, self.shards[self.group.rank], self.formats, self.threads)

        def build(source: WeightSource) -> Transformer:
            loading = partial(progress, what="loading", show=self._tells)
            weights = load(source, c, rank.shard, self.formats, loading)
            return Transformer(weights, c, rank)

        wanted = Wanted(self.folder, c, manifest, self.shards, o.split)
        with Placement(self.group, wanted, opened, cache_of(o.cache_dir, o.cache_limit), o.quiet) as placement:
            room = self._room(placement.origin.in_memory)
            self.max_seq_len, self.pages = room.positions, room.pages
            # Where there is as much room for windows as for all, pages are the same for every layer.
            self.window_pages = room.window_pages if room.window_pages < room.pages else 0
            self._model = placement.load(build)
            self.origins = placement.origins
        width = ceil_to(c.hidden_size, BLOCK)
        terms = self.group.prepare_all_reduce(tokens, width, kept.payload, o.sync)
        with self.group.together():
            sizes = Sizes(tokens, self.memory.slots, self.pages, self.kv_type, self.window_pages or None)
            self._model.allocate(terms, sizes)
        self._runner = Runner(self._model, self.group)
        slots = self.memory.slots if c.has_state else 0
        window = c.window if self.window_pages else 0
        limits = (o.max_batch, self.pages, o.prefill_chunk, drafts, slots, c.can_reuse, o.step_limit, o.responsive)
        self._limits = Limits(*limits, window=window, window_pages=self.window_pages)
        self.engine = self._new_engine()
        self._in_session = False
        self._active: list[int] = []  # the requests of the call that is being made
        self.group.watchdog.tell(Phase.IDLE)

    # ---- setting up

    def _new_engine(self) -> Engine:
        context = Context(self.config.vocab_size, self.max_seq_len, self.options.max_queue)
        return Engine(self._runner, self.group, context, self._limits, Lookup if self.speculates else None)

    def warm_up(self) -> None:
        """Make two small steps, so that what is compiled at its first use is there when somebody waits for it."""
        with self._call() as leads:
            if leads:
                self.engine.add(Request((0, 0), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)))
                while not self.engine.is_idle:
                    self.engine.step()
                self.engine = self._new_engine()

    def _share_out(self) -> None:
        """Replace equal shares by those that the ranks' measured speeds and free memory give."""
        group = self.group
        speeds = decode_rates(self.config, self.shards[group.rank], self.formats, group, self.threads)
        self.shares, bound = self.memory.shares(steady(speeds), group.allgather((group.host, available_bytes())))
        self.shards = shards_of(self.config, self.shares)
        if self._tells:
            say(split_line(group.hosts, speeds, self.shares, bound))

    def _agree(self, opened: ModelFiles | None) -> tuple[ModelConfig, Manifest]:
        """Return the root's config, and what slices of its model are made of, on every rank. Collective."""
        config: ModelConfig = self.group.broadcast(opened.config if opened is not None else None)
        with self.group.together():
            first = shards_of(config, [1.0])[0]
            own = manifest_of(opened, self.options.weights, first, self.group.size) if opened is not None else None
        manifest: Manifest = self.group.broadcast(own)
        return config, manifest

    def _room(self, more: int) -> Room:
        """Return what the KV cache can hold; this rank needs `more` bytes otherwise."""
        o, c, memory = self.options, self.config, self.memory
        each = self.group.allgather((self.group.host, available_bytes(), more))
        needs = memory.needs(self.shards, [(host, free) for host, free, _ in each])
        needs = [replace(need, fixed=need.fixed + extra) for need, (_, _, extra) in zip(needs, each, strict=True)]
        with self.group.together():
            room = fitting(needs, memory.wish)
        if room.positions < memory.wanted and self._tells:
            say(f"max-seq-len is {room.positions}: the model's {memory.wanted} positions do not fit in memory")
        if o.max_seq_len and o.max_seq_len > c.max_position_embeddings and self._tells:
            say(f"max-seq-len {o.max_seq_len} is beyond the model's {c.max_position_embeddings} positions")
        return room

    @property
    def is_root(self) -> bool:
        """Whether this process is rank 0."""
        return self.group.is_root

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, on the root.

        Raises:
            ModelError: the model directory has none.
        """
        if self._tokenizer is None:
            raise ModelError(f"{self.folder}: no tokenizer.json; give one with --tokenizer, or use token ids")
        return self._tokenizer

    # ---- calls

    @contextlib.contextmanager
    def _call(self) -> Iterator[bool]:
        """Open a call: True on the root; the other ranks serve it to its end and get False."""
        if not self.group.is_root:
            serve(self._runner, self.group)
            yield False
            return
        if self._in_session:
            yield True
            return
        self.group.reset_traffic()
        try:
            yield True
        except DllamaError as error:
            self.group.send_command(Command.FAILED, pickle.dumps(error))
            error.agreed = True
            raise
        except (GeneratorExit, KeyboardInterrupt):
            self.group.send_command(Command.DONE)
            raise
        self.group.send_command(Command.DONE)

    @contextlib.contextmanager
    def session(self) -> Iterator[bool]:
        """Keep the workers at the root's command over several calls: True on the root, which makes the calls alone;
        the other ranks serve until the root leaves the session, then get False.

        Within a session a wrong request raises on the root only.
        """
        with self._call() as leads:
            self._in_session = leads
            try:
                yield leads
            finally:
                self._in_session = False

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids, checked against the vocabulary and the context. Root only.

        Raises:
            RequestError: empty, too long, or ids out of range.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif is_list(prompt) and all(is_integer(i) for i in prompt):
            ids = [int(i) for i in prompt]
        else:
            raise RequestError(f"a prompt is a text or a list of token ids, not {shown(prompt)}")
        self.engine.check(ids)
        return ids

    def request(
        self, prompt: Prompt, params: SamplingParams, is_chat: bool = False
    ) -> tuple[Request, TextStream | None]:
        """Return a prompt as a request for the engine, and what makes text of its tokens. Root only.

        Raises:
            RequestError: see `encode`; stop strings without a tokenizer.
        """
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params is {shown(params)}; it must be a SamplingParams")
        if is_chat and isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=False)
        ids = self.encode(prompt)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the model directory has none")
        text = TextStream(self._tokenizer, () if is_chat else ids, params.stop) if self._tokenizer else None
        return Request(tuple(ids), params, self.stop_ids), text

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids that end a text. Root only."""
        if self._tokenizer is not None:
            return self._tokenizer.stop_ids
        return frozenset(declared_stop_ids(self.folder))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a prompt of text is a sequence of texts, too
        self, prompt: Prompt, params: SamplingParams | None = None, *, measure_links: bool = False
    ) -> Generation | None: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, *, measure_links: bool = False
    ) -> list[Generation] | None: ...
    def generate(self, prompt: Any, params: SamplingParams | None = None, *, measure_links: bool = False) -> Any:
        """Return the `Generation` of a prompt (text or token ids), or a list of them for a list of prompts.

        Up to `max_batch` prompts run at once. None on ranks other than the root. measure_links: whether to measure the
        links between hosts at the end, for the statistics.

        Raises:
            RequestError: a prompt or parameters that cannot be; the next call works.
        """
        with self._call() as leads:
            if not leads:
                return None
            params, stats = SamplingParams() if params is None else params, Stats()
            several = are_several(prompt)
            asked = [self.request(p, params) for p in (prompt if several else [prompt])]
            completions = self._add(asked, stats)
            for _ in self._run(completions, stats):
                pass
            self.engine.times(stats, measure_links)
            results = [each.generation(stats) for each in completions]
            return results if several else results[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        stats: Stats | None = None,
        is_chat: bool = False,
        *,
        measure_links: bool = False,
    ) -> Iterator[str]:
        """Yield the text of a generation piece by piece on the root; other ranks' iterators yield nothing.

        Every rank must iterate. A text prompt with `is_chat` is a rendered template: no BOS is added. stats: filled
        with the figures of the call. measure_links: see `generate`.
        """
        with self._call() as leads:
            if not leads:
                return
            stats = Stats() if stats is None else stats
            request = self.request(prompt, SamplingParams() if params is None else params, is_chat)
            for piece in self._run(self._add([request], stats), stats):
                if piece:
                    yield piece
            self.engine.times(stats, measure_links)

    def _add(self, asked: list[tuple[Request, TextStream | None]], stats: Stats) -> list[Completion]:
        completions = [Completion(self.engine.add(request), text) for request, text in asked]
        stats.prompt_tokens += sum(len(request.token_ids) for request, _ in asked)
        stats.speculates = stats.speculates or self.speculates
        return completions

    def _run(self, completions: list[Completion], stats: Stats) -> Iterator[str]:
        """Make steps until all requests are over; yield each one's text as it comes."""
        by_id, started = {each.id: each for each in completions}, time.perf_counter()
        self._active = list(by_id)
        try:
            for outputs in steps(self.engine, len(completions), self._tells):
                if self.engine.last_step is not None:
                    stats.take(self.engine.last_step)
                for output in outputs:
                    if (completion := by_id.get(output.id)) is None:
                        continue
                    if output.token_ids and stats.first_token_seconds is None:
                        stats.first_token_seconds = time.perf_counter() - started
                    before = completion.taken
                    piece = completion.take(output)
                    stats.output_tokens += completion.taken - before
                    if completion.finish_reason is not None and output.finish_reason is None:  # a stop string
                        self.engine.cancel(output.id)
                    yield piece
        finally:
            self._active = []
            if not self.engine.is_idle:  # left early
                self.engine.drop()

    def cancel(self) -> None:
        """Make what is being generated end before its next step, with finish_reason "abort". Not collective.

        May be called from a signal handler; without effect on ranks other than the root.
        """
        for request_id in self._active:
            self.engine.cancel(request_id)

    def embed(self, prompts: Sequence[Prompt], pooling: str = "mean") -> np.ndarray | None:
        """Return prompts' embeddings (n, hidden) float32 of length 1 on the root, None elsewhere.

        pooling: of which of a prompt's final hidden states, the "mean" of all or the "last".

        Raises:
            RequestError: a prompt or a pooling that cannot be; the next call works.
        """
        with self._call() as leads:
            if not leads:
                return None
            asked = [self.request(prompt, SamplingParams()) for prompt in prompts]
            completions = self._add([(replace(request, pooling=pooling), None) for request, _ in asked], Stats())
            for _ in self._run(completions, Stats()):
                pass
            found = [unit(each.hidden) for each in completions if each.hidden is not None]
            return np.stack(found) if found else np.zeros((0, self.config.hidden_size), np.float32)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray | None:
        """Return the logits (n, vocab) float32 after each of n tokens on the root, None elsewhere."""
        with self._call() as leads:
            return self.engine.logits(self.encode(token_ids)) if leads else None

    def log_probabilities(self, token_ids: Sequence[int], read: Callable[[int], object] = int) -> np.ndarray | None:
        """Return the natural log-probability (n - 1,) float64 of each of n tokens but the first on the root.

        read: called there after each step with the number of tokens that it fed.
        """
        with self._call() as leads:
            return self.engine.scores(self.encode(token_ids), read) if leads else None
