"""What a consumer asks of the engine, and what it gets: tokens only, no text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np

from ..errors import RequestError

MOST_LOGPROBS = 100
POOLINGS = ("mean", "last")


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
        logprobs: how many of the best tokens' log-probabilities are told with each token, besides its own; None: none.
            They are exact: of the whole vocabulary, after biases and penalties, before temperature and filters.
        logit_bias: what is added to the logits of tokens.
        prompt_logprobs: like logprobs, of the prompt's tokens but the first, without biases and penalties. All of the
            prompt is computed then.
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
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            RequestError: naming the parameter, its value and its limits.
        """
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, good, limit in self._limits():
            value = getattr(self, name)
            if not good(value):
                raise RequestError(
                    f"{name} is {list(value) if isinstance(value, tuple) else value}; it must be {limit}"
                )

    @staticmethod
    def _limits() -> tuple[tuple[str, Callable[[Any], bool], str], ...]:
        def real(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
            return lambda v: isinstance(v, Real) and not isinstance(v, bool) and test(v)

        def whole(test: Callable[[Any], bool], optional: bool = False) -> Callable[[Any], bool]:
            return lambda v: (optional and v is None) or (is_integer(v) and test(v))

        def bias(v: Any) -> bool:
            return isinstance(v, Mapping) and all(
                is_integer(k) and real(lambda x: isfinite(x) and abs(x) <= 100)(x) for k, x in v.items()
            )

        return (
            ("temperature", real(lambda v: 0 <= v <= 100), "0 (greedy) to 100"),
            ("top_k", whole(lambda v: v >= 0), "0 (all tokens) or more"),
            ("top_p", real(lambda v: 0 < v <= 1), "above 0, to 1"),
            ("min_p", real(lambda v: 0 <= v <= 1), "0 to 1"),
            ("repeat_penalty", real(lambda v: 0 < v < 100), "above 0, below 100 (1 is none)"),
            ("presence_penalty", real(lambda v: abs(v) <= 100), "-100 to 100 (0 is none)"),
            ("frequency_penalty", real(lambda v: abs(v) <= 100), "-100 to 100 (0 is none)"),
            ("max_tokens", whole(lambda v: v >= 0, True), "0 or more"),
            ("seed", whole(lambda v: v >= 0, True), "0 or more"),
            ("logprobs", whole(lambda v: 0 <= v <= MOST_LOGPROBS, True), f"0 to {MOST_LOGPROBS}"),
            ("prompt_logprobs", whole(lambda v: 0 <= v <= MOST_LOGPROBS, True), f"0 to {MOST_LOGPROBS}"),
            ("logit_bias", bias, "a mapping of token ids to numbers from -100 to 100"),
            ("stop", _are_texts, "strings that are not empty"),
            ("ignore_eos", lambda v: isinstance(v, bool), "True or False"),
        )


def is_integer(value: Any) -> bool:
    """Return whether a value is a whole number, numpy's included, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def are_several(prompt: Any) -> bool:
    """Return whether these are prompts, not the ids of one.

    Raises:
        RequestError: neither.
    """
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, (str, list, tuple)):
        raise RequestError(f"a prompt is a text or a list of token ids, not {shown(prompt)}")
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], (str, list, tuple, np.ndarray))


def is_list(prompt: Any) -> bool:
    """Return whether a prompt is a list of some kind, not bytes."""
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 0
    return isinstance(prompt, Seq) and not isinstance(prompt, (bytes, bytearray, memoryview))


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(s, str) and s for s in value)


class Constraint(Protocol):
    """What the tokens of one request must keep to, such as a grammar. Used by the thread that makes steps."""

    def mask(self) -> np.ndarray:
        """Return which tokens may come next: (words,) uint32, a bit a token, the lowest first."""

    def accept(self, token: int) -> None:
        """Take the token that came."""


@dataclass(frozen=True)
class Request:
    """What a consumer asks for.

    Attributes:
        constraint: what its tokens must keep to; of this request alone. It is not speculated then.
        token_ids: the prompt. stop_ids: tokens that end the text, unless `params.ignore_eos`.
        priority: those with a higher one go first.
        pooling: "mean" or "last": no tokens are wanted, but the prompt's final hidden states, their mean or the last.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    constraint: Constraint | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one token: its own, and the best tokens', best first, as (id, value)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestStats:
    """What one request came to.

    Attributes:
        cached_tokens: of the prompt, that need not be computed, since others had done so.
        output_tokens: generated, a final stop token included. drafted, accepted: see `lookup`.
        preempted: how many times it gave up its memory to others.
        queued, first_token, last_token: when it came and when these were chosen; time.perf_counter, seconds.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    drafted: int
    accepted: int
    preempted: int
    queued: float
    first_token: float | None
    last_token: float | None


@dataclass(frozen=True)
class Output:
    """What a step gave one request.

    Attributes:
        token_ids: new tokens. logprobs: one for each of them, if the request asked for any.
        finish_reason: "stop" (a stop token), "length" or "abort"; None while it goes on.
        stop_id: the stop token that ended it, which is not among the tokens. usage: with the last output.
        prompt_logprobs: of each token of the prompt but the first, if they were asked for; once.
        hidden: (hidden,) float32, what pooling gave, with the last output.
    """

    id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_id: int | None = None
    usage: RequestStats | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    hidden: np.ndarray | None = None


def unit(vector: np.ndarray) -> np.ndarray:
    """Return a vector (n,) float32 with length 1; nothing but zeros stays so."""
    length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    scaled: np.ndarray = (vector / (length or 1.0)).astype(np.float32)
    return scaled
