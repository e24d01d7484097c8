"""From the engine's tokens to the text of each choice: stop strings, log-probabilities, usage, times."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..engine.request import Output, Request, RequestStats, SamplingParams
from ..errors import QueueFull, RequestError
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer
from .errors import ApiError, unavailable
from .grammar import MakeConstraint
from .outbox import EngineLoop
from .parsing import Style, ThoughtCounter
from .served import Served


@dataclass(frozen=True)
class Token:
    """A token with its natural log-probability, NaN if it is not known, and the best alternatives' ids and theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What is new of one choice.

    Attributes:
        index: of the choice. text: whole characters, nothing of a stop string. tokens: those that text is made of, when
            log-probabilities were asked for. finish_reason: "stop", "length", "abort", or None while it goes on.
        stopped_by: the stop string that ended it. prompt: of the prompt's tokens but the first, if that was asked for.
    """

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    stopped_by: str | None = None
    prompt: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class Ask:
    """A prompt and how it is to be continued.

    Attributes:
        shown: special tokens that are part of the text. is_chat: the prompt is a rendered template, so that the answer
            is a text of its own. constraint: makes what each choice must keep to. style: how answers are read, for
            counting the tokens of reasoning.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    stops: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    shown: frozenset[int] = frozenset()
    is_chat: bool = False
    constraint: MakeConstraint | None = None
    style: Style | None = None


@dataclass
class Usage:
    """What the choices of a call have come to."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    stats: list[RequestStats] = field(default_factory=list)

    def add(self, output: Output) -> None:
        """Count an output."""
        self.completion_tokens += len(output.token_ids)
        if output.usage is not None:
            self.stats.append(output.usage)
            self.cached_tokens += output.usage.cached_tokens

    def openai(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": min(self.cached_tokens, self.prompt_tokens)},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def timings(self) -> dict[str, Any] | None:
        """Return llama.cpp's `timings`, of the first choice that has finished."""
        if not self.stats:
            return None
        s = self.stats[0]
        fed, told = s.prompt_tokens - s.cached_tokens, s.output_tokens
        first = s.first_token if s.first_token is not None else s.queued
        prompt = 1e3 * (first - s.queued)
        decode = 1e3 * ((s.last_token if s.last_token is not None else first) - first)
        return {
            "cache_n": s.cached_tokens,
            "prompt_n": fed,
            "prompt_ms": prompt,
            "prompt_per_token_ms": prompt / fed if fed else 0.0,
            "prompt_per_second": 1e3 * fed / prompt if prompt else 0.0,
            "predicted_n": told,
            "predicted_ms": decode,
            # The first token comes with the prompt.
            "predicted_per_token_ms": decode / (told - 1) if told > 1 else 0.0,
            "predicted_per_second": 1e3 * (told - 1) / decode if decode else 0.0,
            "draft_n": s.drafted,
            "draft_n_accepted": s.accepted,
        }


class Choice:
    """One continuation on its way from tokens to text."""

    def __init__(self, index: int, tokenizer: Tokenizer, ask: Ask) -> None:
        self.index, self._ends = index, False
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, () if ask.is_chat else ask.token_ids, ask.stops, ask.shown)
        self._wants_tokens = ask.params.logprobs is not None
        self._prompt = ask.token_ids
        self._shown = ask.shown
        self._thought = ThoughtCounter(ask.style) if ask.style is not None else None
        self._pending: list[tuple[int, Token]] = []  # tokens whose text is held, and the byte at which it begins
        self._seen = self._released = 0  # bytes

    @property
    def reasoning_tokens(self) -> int:
        """How many of its tokens were reasoning."""
        return self._thought.count if self._thought is not None else 0

    def end(self) -> None:
        """Take nothing more."""
        self._ends = True

    def take(self, output: Output) -> Piece | None:
        """Take an output; return what it adds, or None after the end."""
        if self._ends:
            return None
        pieces = []
        for i, token_id in enumerate(output.token_ids):
            if self._wants_tokens:
                self._keep(token_id, output, i)
            if self._thought is not None:
                is_shown = token_id in self._shown
                of = self._tokenizer.token_bytes if is_shown else self._tokenizer.visible_bytes
                self._thought.take(of(token_id))
            pieces.append(self._text.push(token_id))
            if self._text.stopped:
                break
        stopped, reason = self._text.stopped, output.finish_reason
        if reason is not None and not stopped:
            pieces.append(self._text.finish())
            stopped = self._text.stopped
        self._ends = stopped or reason is not None
        text = "".join(pieces)
        self._released += len(text.encode("utf-8", "replace"))
        tokens = self._let_go(self._ends and not stopped)
        prompt = None
        if output.prompt_logprobs is not None:
            scored = zip(self._prompt[1:], output.prompt_logprobs, strict=True)
            prompt = tuple(Token(token_id, found.logprob, found.top) for token_id, found in scored)
        return Piece(self.index, text, tokens, "stop" if stopped else reason, self._text.stopped_by, prompt)

    def _keep(self, token_id: int, output: Output, i: int) -> None:
        if output.logprobs is not None:
            found = output.logprobs[i]
            self._pending.append((self._seen, Token(token_id, found.logprob, tuple(found.top))))
        self._seen += len(self._tokenizer.visible_bytes(token_id))

    def _let_go(self, everything: bool) -> tuple[Token, ...]:
        """Return the tokens whose text has begun to be released: those of a stop string never are."""
        count = sum(1 for start, _ in self._pending if everything or start < self._released)
        tokens = tuple(token for _, token in self._pending[:count])
        del self._pending[:count]
        return tokens


class Running:
    """Prompts that are being continued: an iterator of their choices' pieces; `usage` is whole after the last.

    Choices are numbered through all prompts: those of the first prompt, then those of the second.

    Raises:
        ApiError: the engine does not take the requests, or, while iterating, the reader was too slow.
    """

    def __init__(self, served: Served, engine: EngineLoop, asks: Sequence[Ask]) -> None:
        self.served, self._engine = served, engine
        self.usage = Usage(sum(len(ask.token_ids) for ask in asks))
        numbered = [(ask, number) for ask in asks for number in range(ask.n)]
        self.wants_tokens = any(ask.params.logprobs is not None for ask in asks)
        self._choices = [Choice(i, served.tokenizer, ask) for i, (ask, _) in enumerate(numbered)]
        try:
            self._outbox = engine.submit([self._request(ask, number) for ask, number in numbered])
        except RequestError as error:
            raise _refused(error) from None

    def _request(self, ask: Ask, number: int) -> Request:
        params = ask.params
        if params.seed is not None and number:
            params = replace(params, seed=(params.seed + number) % 2**63)
        stop_ids = frozenset() if params.ignore_eos else self.served.tokenizer.stop_ids
        constraint = ask.constraint() if ask.constraint is not None else None
        return Request(ask.token_ids, params, stop_ids, ask.priority, constraint)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for index, output in self._outbox:
            choice = self._choices[index]
            before = choice.reasoning_tokens
            piece = choice.take(output)
            self.usage.reasoning_tokens += choice.reasoning_tokens - before
            if piece is None:  # what comes after its end
                self.usage.add(replace(output, token_ids=()))
                continue
            self.usage.add(output)
            if piece.finish_reason == "abort":
                raise unavailable("the request was ended: the server is shutting down")
            if piece.finish_reason == "stop" and output.finish_reason is None:
                self._outbox.stop(index)
            yield piece

    def end(self, index: int) -> None:
        """End a choice here, whatever its request goes on to say."""
        self._choices[index].end()
        self._outbox.stop(index)

    def close(self) -> None:
        """Cancel what has not finished."""
        self._engine.release(self._outbox)


def _refused(error: RequestError) -> ApiError:
    """Return the engine's refusal as clients get it."""
    if isinstance(error, QueueFull):
        return unavailable(str(error))
    return ApiError(400, str(error))


def special_ids(tokenizer: Tokenizer, texts: Collection[str]) -> frozenset[int]:
    """Return the ids of those of these texts that are special tokens."""
    return frozenset(tokenizer.added_tokens[text] for text in texts if text in tokenizer.added_tokens)
