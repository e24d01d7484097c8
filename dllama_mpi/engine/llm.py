"""The facade: `LLM`, built and called by every rank alike."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..errors import DllamaError, ModelError, RequestError
from ..kernels import runtime
from ..kernels.layout import BLOCK, ceil_to
from ..log import progress, say
from ..model.batch import Batch
from ..model.buffers import Sizes
from ..model.build import load
from ..model.config import ModelConfig
from ..model.transformer import Rank, Transformer
from ..parallel.connection import Phase
from ..parallel.group import TensorParallelGroup, connect
from ..parallel.partition import AUTO, parse_split
from ..startup.memory import available_bytes, fitting_positions
from ..startup.opening import RANDOM, ModelFiles, declared_stop_ids, model_folder, open_model
from ..startup.options import Kept, Options
from ..startup.placement import Placement, Wanted, manifest_of
from ..startup.shares import MemoryPlan, shards_of, split_line, steady
from ..startup.speed import decode_rates
from ..startup.threads import place_threads
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer
from ..weights.cache import WeightCache, folder_of
from ..weights.slices import Manifest
from ..weights.source import WeightSource
from .engine import Engine
from .lookup import MOST_DRAFTS, Lookup
from .request import SamplingParams
from .request import Sequence as Request
from .runner import Runner
from .scheduler import Plan, Scheduler
from .stats import Stats
from .step import Command
from .worker import serve

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Generation:
    """What a call generated.

    Attributes:
        token_ids: generated tokens, a final stop token left out. text: their text, cut at a stop string.
        finish_reason: "stop", "length" or "abort". stats: figures of the whole call.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    stats: Stats


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
        self.group = group or connect()
        with self.group.together():
            self.options: Options = Options(model=os.fspath(model), **options)
        self.options = self.group.broadcast(self.options)
        o = self.options
        cores = self.group.allgather((self.group.host, runtime.usable_cores()))
        self.folder = model_folder(o.model)
        with self.group.together():
            o.check()
            self.group.watchdog.timeout = o.timeout
            opened = self._open() if self.group.is_root or o.model.startswith(RANDOM) else None
            self._tokenizer: Tokenizer | None = self._load_tokenizer() if self.group.is_root else None
        self.config: ModelConfig
        self.config, manifest = self._agree(opened)
        c, self.formats = self.config, manifest.formats
        with self.group.together():
            o.check_for(c)
            self.shares = parse_split(None if o.split == AUTO else o.split, self.group.size)
            self.shards = shards_of(c, self.shares)
            self.threads = place_threads(self.group, cores, o.nthreads, o.bind)
        if self.group.is_root and not o.quiet and runtime.is_cold():
            say(f"compiling kernels for {runtime.describe()}; this takes about 20 seconds and is done once")
        kept = Kept.of(self.formats, o.kv_type, o.buffer_float_type, o.sync)
        self.kv_type, self.weights = kept.kv_type, kept.weights(c)
        self.speculates = o.speculate == "lookup"
        tokens = o.prefill_chunk + o.max_batch * (1 + MOST_DRAFTS * self.speculates)
        self.memory = MemoryPlan(c, kept, tokens, o.max_batch, o.max_seq_len)
        if o.split == AUTO and self.group.size > 1:
            self._share_out()
        rank = Rank(self.group, self.shards[self.group.rank], self.formats, self.threads)
        show = self.group.is_root and not o.quiet

        def build(source: WeightSource) -> Transformer:
            weights = load(source, c, rank.shard, self.formats, lambda each: progress(each, "loading", show))
            return Transformer(weights, c, rank)

        wanted = Wanted(self.folder, c, manifest, self.shards, o.split)
        with Placement(self.group, wanted, opened, self._weight_cache(), o.quiet) as placement:
            self.max_seq_len = self._positions(placement.origin.in_memory)
            self._model = placement.load(build)
            self.origins = placement.origins
        width = ceil_to(c.hidden_size, BLOCK)
        partial = self.group.prepare_all_reduce(tokens, width, kept.payload, o.sync)
        with self.group.together():
            self._model.allocate(partial, Sizes(tokens, o.max_batch, self.max_seq_len, self.kv_type))
        self._runner = Runner(self._model, self.group, o.max_batch, self.max_seq_len)
        scheduler = Scheduler(o.max_batch, o.prefill_chunk, rewinds=not c.has_state)
        self.engine = Engine(self._runner, self.group, c.vocab_size, scheduler)
        self._in_session = False
        self.group.watchdog.tell(Phase.IDLE)

    # ---- setting up

    def _share_out(self) -> None:
        """Replace equal shares by those that the ranks' measured speeds and free memory give."""
        o, group = self.options, self.group
        speeds = decode_rates(self.config, self.shards[group.rank], self.formats, group, self.threads)
        self.shares, bound = self.memory.shares(steady(speeds), group.allgather((group.host, available_bytes())))
        self.shards = shards_of(self.config, self.shares)
        if group.is_root and not o.quiet:
            say(split_line(group.hosts, speeds, self.shares, bound))

    def _load_tokenizer(self) -> Tokenizer | None:
        given = self.options.tokenizer
        if given is None and not any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            return None  # token ids alone need none
        return Tokenizer.load(self.folder, Path(given) if given is not None else None)

    def _open(self) -> ModelFiles:
        """Return what has been opened."""
        return open_model(self.options.model)

    def _agree(self, opened: ModelFiles | None) -> tuple[ModelConfig, Manifest]:
        """Return the root's config, and what slices of its model are made of, on every rank. Collective."""
        config: ModelConfig = self.group.broadcast(opened.config if opened is not None else None)
        with self.group.together():
            first = shards_of(config, [1.0])[0]
            own = manifest_of(opened, self.options.weights, first, self.group.size) if opened is not None else None
        manifest: Manifest = self.group.broadcast(own)
        return config, manifest

    def _weight_cache(self) -> WeightCache | None:
        folder, limit = folder_of(self.options.cache_dir), self.options.cache_limit
        return None if folder is None else WeightCache(folder, None if limit is None else int(1e9 * limit))

    def _positions(self, more: int) -> int:
        """Return the positions of the KV cache for which there is memory; this rank needs `more` bytes otherwise."""
        o, c, memory = self.options, self.config, self.memory
        each = self.group.allgather((self.group.host, available_bytes(), more))
        needs = memory.needs(self.shards, [(host, free) for host, free, _ in each])
        needs = [replace(need, fixed=need.fixed + extra) for need, (_, _, extra) in zip(needs, each, strict=True)]
        with self.group.together():
            positions = fitting_positions(needs, memory.wanted, o.max_seq_len is not None)
        if positions < memory.wanted and self.group.is_root and not o.quiet:
            say(f"max-seq-len is {positions}: the model's {memory.wanted} positions do not fit in memory")
        if o.max_seq_len and o.max_seq_len > c.max_position_embeddings and self.group.is_root and not o.quiet:
            say(f"max-seq-len {o.max_seq_len} is beyond the model's {c.max_position_embeddings} positions")
        return positions

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

        Within a session a wrong request raises on the root only, and the KV cache of a finished sequence serves the
        next prompt that begins with the same tokens.
        """
        with self._call() as leads:
            self._in_session = leads
            self.engine.scheduler.reuse = leads and self.config.can_reuse
            try:
                yield leads
            finally:
                self._in_session = self.engine.scheduler.reuse = False

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids, checked against the vocabulary and the context. Root only.

        Raises:
            RequestError: empty, too long, or ids out of range.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids:
            raise RequestError("the prompt has no tokens; give at least one")
        wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if wrong:
            raise RequestError(
                f"token id {wrong[0]} is out of range; the vocabulary has ids 0 to {self.config.vocab_size - 1}"
            )
        if len(ids) > self.max_seq_len:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; the context holds {self.max_seq_len};"
                " shorten it or raise --max-seq-len"
            )
        return ids

    def request(self, prompt: Prompt, params: SamplingParams, is_chat: bool = False) -> Request:
        """Return a prompt as a sequence for the engine. Root only; see `encode` for what it raises."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=False) if is_chat and isinstance(prompt, str) else prompt
        ids = self.encode(ids)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the model directory has none")
        text = TextStream(self._tokenizer, () if is_chat else ids, params.stop) if self._tokenizer else None
        limit = self.max_seq_len if params.max_tokens is None else min(self.max_seq_len, len(ids) + params.max_tokens)
        rng = np.random.default_rng(secrets.randbits(64) if params.seed is None else params.seed)
        lookup = Lookup() if self.speculates else None
        return Request(ids, params, limit, text, rng, self.stop_ids, lookup=lookup)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The token ids that end a text. Root only."""
        if self._tokenizer is not None:
            return self._tokenizer.stop_ids
        return frozenset(declared_stop_ids(self.folder))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a prompt of text is a sequence of texts, too
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generation | None: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], params: SamplingParams | None = None) -> list[Generation] | None: ...
    def generate(self, prompt: Any, params: SamplingParams | None = None) -> Any:
        """Return the `Generation` of a prompt (text or token ids), or a list of them for a list of prompts.

        Up to `max_batch` prompts run at once. None on ranks other than the root.
        """
        with self._call() as leads:
            if not leads:
                return None
            params, stats = params or SamplingParams(), Stats()
            several = not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], (int, np.integer))
            requests = [self.request(p, params) for p in (prompt if several else [prompt])]
            for _ in self.engine.run(requests, stats):
                pass
            self.engine.times(stats)
            results = [Generation(r.output_ids, "".join(r.pieces), r.finish_reason or "abort", stats) for r in requests]
            return results if several else results[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, stats: Stats | None = None, is_chat: bool = False
    ) -> Iterator[str]:
        """Yield the text of a generation piece by piece on the root; other ranks' iterators yield nothing.

        Every rank must iterate. A text prompt with `is_chat` is a rendered template: no BOS is added.
        """
        with self._call() as leads:
            if not leads:
                return
            stats = stats if stats is not None else Stats()
            request = self.request(prompt, params or SamplingParams(), is_chat)
            for _, _, piece in self.engine.run([request], stats):
                if piece:
                    yield piece
            if request.finish_reason == "abort" and request.text is not None and (rest := request.text.finish()):
                yield rest
            self.engine.times(stats)

    def cancel(self) -> None:
        """Make what is being generated end before its next step, with finish_reason "abort". Not collective.

        May be called from a signal handler; without effect on ranks other than the root.
        """
        self.engine.scheduler.cancel()

    def logits(self, token_ids: Sequence[int]) -> np.ndarray | None:
        """Return the logits (n, vocab) float32 after each of n tokens on the root, None elsewhere."""
        with self._call() as leads:
            if not leads:
                return None
            return np.concatenate([self.engine.logits(plan) for plan in self._plans(self.encode(token_ids))])

    def log_probabilities(self, token_ids: Sequence[int]) -> np.ndarray | None:
        """Return the natural log-probability (n - 1,) float64 of each of n tokens but the first on the root."""
        with self._call() as leads:
            if not leads:
                return None
            ids = np.array(self.encode(token_ids), np.int32)
            parts = [np.zeros(0)]
            for plan in self._plans(ids[:-1].tolist()):
                parts.append(self.engine.scores(plan, ids[plan.batch.positions + 1]))
            return np.concatenate(parts)

    def _plans(self, ids: list[int]) -> Iterator[Plan]:
        """Yield the prefill of one sequence in slot 0, all rows wanted."""
        self.engine.scheduler.forget(0)
        for start in range(0, len(ids), self.options.prefill_chunk):
            part = np.array(ids[start : start + self.options.prefill_chunk], np.int32)
            positions = np.arange(start, start + len(part), dtype=np.int32)
            zeros, every = np.zeros(len(part), np.int32), np.arange(len(part), dtype=np.int32)
            yield Plan(Batch(part, positions, zeros, zeros + len(ids), every), [], True)
