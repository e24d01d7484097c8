"""A request on its way: its tokens, where it stands, what it holds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from .lookup import Lookup
from .pages import ROOT
from .request import Output, Request, RequestStats, SamplingParams, TokenLogprobs


@dataclass
class Near:
    """A text's pages of layers with a window: those from its page `first` on, as far as it has any."""

    first: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The page behind the last."""
        return self.first + len(self.pages)


@dataclass(eq=False)
class Sequence:
    """A request's state on the root.

    Attributes:
        limit: most tokens, prompt included. rng: of its random numbers.
        lookup: what drafts its next tokens; None for no speculation.
        tokens: the prompt's ids, then the generated ones.
        computed: how many of them are in the KV cache. recorded: how many of those its pages are known to hold.
        slot, pages, near: what it has while it runs. keys: of its first 0, 1, 2 ... pages, see `pages`.
        saves: positions at which its state is worth keeping. turn: pages that others had computed before.
        joined: prompt tokens the scheduler had fed when it began.
        told: tokens of the prompt of which the request has what it wants to know, see `wanted_of`.
        finish_reason: see `Output`, or None while it runs.
    """

    id: int
    request: Request
    limit: int
    rng: np.random.Generator
    lookup: Lookup | None = None
    tokens: list[int] = field(init=False)
    told_end: int = 0
    computed: int = 0
    recorded: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    near: Near = field(default_factory=Near)
    keys: list[bytes] = field(default_factory=lambda: [ROOT])
    saves: frozenset[int] = frozenset()
    turn: int = 0
    joined: int = 0
    told: int = 0
    finish_reason: str | None = None
    stop_id: int | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    queued: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    _new: list[int] = field(default_factory=list)
    _logprobs: list[TokenLogprobs] = field(default_factory=list)
    _prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _are_told: bool = False
    _pooled: np.ndarray | None = None  # float64, the sum of hidden states

    def __post_init__(self) -> None:
        self.tokens = list(self.request.token_ids)
        if self.params.prompt_logprobs is not None:
            self.told_end = self.prompt_length - 1
        elif self.request.pooling is not None:
            self.told_end = self.prompt_length
            self.told = self.prompt_length - 1 if self.request.pooling == "last" else 0
        if not self.generates and self.told == self.told_end:
            self.finish_reason = "length"

    @property
    def params(self) -> SamplingParams:
        """How its tokens are chosen."""
        return self.request.params

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def generates(self) -> bool:
        """Whether tokens are wanted."""
        return self.request.pooling is None and self.prompt_length < self.limit

    @property
    def reads_all(self) -> bool:
        """Whether it must be fed tokens that others have computed, too: more than the last is to be told of."""
        return self.told < min(self.told_end, self.prompt_length - 1)

    @property
    def rank(self) -> tuple[int, int]:
        """Its place among others: by priority, then by age."""
        return -self.request.priority, self.id

    @property
    def runs(self) -> bool:
        """Whether it has been admitted."""
        return self.slot >= 0

    @property
    def left(self) -> int:
        """Tokens that are not in the KV cache."""
        return len(self.tokens) - self.computed

    @property
    def is_reading(self) -> bool:
        """Whether there is more to feed than the last generated token."""
        return self.left > 1 or self.computed < self.prompt_length

    def append(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take a generated token; set `finish_reason` if it is the last."""
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        if self.request.constraint is not None:
            self.request.constraint.accept(token)
        if token in self.request.stop_ids and not self.params.ignore_eos:
            self.finish_reason, self.stop_id = "stop", token
            return
        self.tokens.append(token)
        self._new.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if len(self.tokens) >= self.limit:
            self.finish_reason = "length"

    def wanted_of(self, positions: range) -> range:
        """Return those of these positions at which the request wants to know something of the prompt."""
        return range(max(positions.start, self.told), max(self.told, min(positions.stop, self.told_end)))

    def tell(self, logprobs: TokenLogprobs) -> None:
        """Take the log-probabilities of the prompt's next token."""
        self._prompt_logprobs.append(logprobs)
        self.told += 1

    def pool(self, hidden: np.ndarray) -> None:
        """Take the next of the prompt's hidden states (hidden,) float32."""
        self._pooled = hidden.astype(np.float64) if self._pooled is None else self._pooled + hidden
        self.told += 1

    def finish_reading(self) -> None:
        """Set `finish_reason` if the prompt has been read and was all."""
        if not self.generates and self.finish_reason is None and self.computed >= self.prompt_length:
            self.finish_reason = "length" if self.request.pooling is None else "stop"

    def take_output(self) -> Output | None:
        """Return what there is to tell since the last time, or None."""
        if not self._new and self.finish_reason is None:
            return None
        logprobs = None if self.params.logprobs is None else tuple(self._logprobs)
        usage = None if self.finish_reason is None else self.usage()
        output = Output(
            self.id,
            tuple(self._new),
            logprobs,
            self.finish_reason,
            self.stop_id,
            usage,
            self._take_prompt_logprobs(),
            self._hidden() if usage is not None else None,
        )
        self._new, self._logprobs = [], []
        return output

    def _take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        if self.params.prompt_logprobs is None or self._are_told or self.told < self.told_end:
            return None
        self._are_told = True
        return tuple(self._prompt_logprobs)

    def _hidden(self) -> np.ndarray | None:
        if self._pooled is None or self.told < self.told_end:
            return None
        count = self.prompt_length if self.request.pooling == "mean" else 1
        return (self._pooled / count).astype(np.float32)

    def usage(self) -> RequestStats:
        """Return what it came to so far."""
        return RequestStats(
            prompt_tokens=self.prompt_length,
            cached_tokens=self.cached,
            output_tokens=len(self.tokens) - self.prompt_length + (self.stop_id is not None),
            drafted=self.drafted,
            accepted=self.accepted,
            preempted=self.preempted,
            queued=self.queued,
            first_token=self.first_token,
            last_token=self.last_token,
        )
