"""One request on its way: its tokens, its sampling parameters, where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import RequestError
from ..text.stream import TextStream
from .lookup import Lookup


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Filters apply in the order top_k, top_p, min_p, after temperature.

    Attributes:
        temperature: 0 for greedy; else logits are divided by it.
        top_k: keep this many best tokens; 0 for all. top_p: keep the best tokens that together reach this
            probability; 1 for all. min_p: keep tokens at least this share as probable as the best; 0 for all.
        repeat_penalty: logits of tokens that occurred in prompt or output are divided by it if positive, multiplied
            if negative (arXiv:1909.05858); 1 for none.
        presence_penalty, frequency_penalty: subtracted from the logits of output tokens once, or per occurrence.
        max_tokens: most tokens to generate; None for as many as the context holds.
        stop: strings that end the text; they are not part of it.
        seed: of the random numbers; None for one that differs each time.
        ignore_eos: whether to go on after the model's stop tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    stop: Seq[str] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RequestError: naming the parameter, its value and its limits.
        """
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        limits: list[tuple[str, Any, bool, str]] = [
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "0 (greedy) to 100"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, to 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("repeat_penalty", self.repeat_penalty, 0 < self.repeat_penalty < 100, "above 0, below 100 (1 is none)"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 100, "-100 to 100 (0 is none)"),
            (
                "frequency_penalty",
                self.frequency_penalty,
                abs(self.frequency_penalty) <= 100,
                "-100 to 100 (0 is none)",
            ),
            ("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 0, "0 or more"),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
            ("stop", list(self.stop), all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
        ]
        for name, value, good, limit in limits:
            if not good:
                raise RequestError(f"{name} is {value}; it must be {limit}")


@dataclass
class Sequence:
    """A request's state on the root.

    Attributes:
        tokens: the prompt's ids, then the generated ones.
        computed: how many of them are in the KV cache.
        finish_reason: "stop" (a stop token or string), "length", "abort", or None while it runs.
        lookup: what drafts its next tokens; None for no speculation.
    """

    tokens: list[int]
    params: SamplingParams
    limit: int  # most tokens, prompt included
    text: TextStream | None
    rng: np.random.Generator
    stop_ids: frozenset[int]
    prompt_length: int = field(init=False)
    computed: int = 0
    slot: int = -1
    finish_reason: str | None = None
    pieces: list[str] = field(default_factory=list)
    lookup: Lookup | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        if self.prompt_length >= self.limit:
            self.finish_reason = "length"

    @property
    def output_ids(self) -> list[int]:
        """The generated token ids."""
        return self.tokens[self.prompt_length :]

    def append(self, token: int) -> str:
        """Take a generated token; return the text that it completes, and set `finish_reason` if it is the last."""
        piece = ""
        if token in self.stop_ids and not self.params.ignore_eos:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)
            if self.text is not None:
                piece = self.text.push(token)
                if self.text.stopped:
                    self.finish_reason = "stop"
            if self.finish_reason is None and len(self.tokens) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason is not None and self.text is not None:
            piece += self.text.finish()
        self.pieces.append(piece)
        return piece


class QueueFullError(RequestError):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Request:
    """What a consumer asks for; tokens only."""

    token_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    priority: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability, and the best alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestStats:
    """A request's own figures."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    drafted: int
    accepted: int
    queued: float
    first_token: float | None
    last_token: float | None


@dataclass(frozen=True)
class Output:
    """What a step has given a request."""

    id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_id: int | None = None
    usage: RequestStats | None = None
