"""OpenAI's text completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from math import isnan, nan
from typing import Any

from starlette.responses import Response

from .chat import Head
from .errors import ApiError
from .generation import Ask, Piece, Running, Token
from .http import Call, answer_with, event
from .schema import CompletionBody
from .served import Served

DEFAULT_TOKENS = 16  # OpenAI's, where neither the request nor the server says


def prepare(served: Served, body: CompletionBody) -> tuple[list[Ask], list[str]]:
    """Return what the engine is asked, one a prompt, and each prompt's text if it is to be echoed.

    Raises:
        ApiError: naming the field that is wrong.
    """
    served.check_name(body.model)
    if body.suffix:
        raise ApiError(400, "suffix is not supported: the model continues a text at its end", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, f"best_of is {body.best_of}; it must be n, which is {body.n or 1}", param="best_of")
    limit = body.max_tokens
    if limit is None and served.defaults.max_tokens is None:
        limit = DEFAULT_TOKENS
    params, stops = served.params(body, limit, body.logprobs), served.stops(body)
    if body.echo:
        params = replace(params, prompt_logprobs=body.logprobs)
    asks, echoes = [], []
    for number, prompt in enumerate(body.prompts):
        ids = served.encode(prompt, "prompt" if len(body.prompts) == 1 else f"prompt.{number}")
        asks.append(Ask(tuple(ids), params, stops, body.n or 1, body.priority or 0))
        text = prompt if isinstance(prompt, str) else served.tokenizer.decode(ids)
        echoes.append(text if body.echo else "")
    return asks, echoes


async def completions(call: Call) -> Response:
    """Continue texts."""
    body: CompletionBody = call.body
    served, engine = call.context.state.ready()
    asks, echoes = await asyncio.to_thread(prepare, served, body)
    running = Running(served, engine, asks)
    pairs = zip(asks, echoes, strict=True)
    texts = [Text(served, ask, echo) for ask, echo in pairs for _ in range(body.n or 1)]
    head = Head("cmpl-" + secrets.token_hex(12), int(time.time()), body.model or served.names[0])
    return await answer_with(
        call, running.close, lambda: _chunks(running, texts, head, body), lambda: _whole(running, texts, head)
    )


class Text:
    """One choice of a completion."""

    def __init__(self, served: Served, ask: Ask, echo: str) -> None:
        self._served, self.echo = served, echo
        self.pieces = [echo]
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.awaits_prompt = ask.params.prompt_logprobs is not None  # whose log-probabilities go with the echo
        self._first, self._offset = ask.token_ids[0], 0 if self.awaits_prompt else len(echo)

    def take(self, piece: Piece) -> None:
        """Remember a piece."""
        self.pieces.append(piece.text)
        self.tokens += self.told(piece)
        self.finish_reason = piece.finish_reason

    def told(self, piece: Piece) -> list[Token]:
        """Return a piece's tokens, those of an echoed prompt before them; nothing is known of its first."""
        if piece.prompt is None:
            return list(piece.tokens)
        return [Token(self._first, nan, ()), *piece.prompt, *piece.tokens]

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens as text completions show them."""
        shown = [self._served.tokenizer.token_text(token.id) for token in tokens]
        offsets = []
        for text in shown:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": shown,
            "token_logprobs": [None if isnan(token.logprob) else max(token.logprob, -9999.0) for token in tokens],
            "top_logprobs": [
                None
                if isnan(token.logprob)
                else {self._served.tokenizer.token_text(id): max(value, -9999.0) for id, value in token.top}
                for token in tokens
            ],
            "text_offset": offsets,
        }


async def _whole(running: Running, texts: list[Text], head: Head) -> dict[str, Any]:
    async for piece in running:
        texts[piece.index].take(piece)
    choices = [
        {
            "index": index,
            "text": "".join(text.pieces),
            "logprobs": text.logprobs(text.tokens) if running.wants_tokens else None,
            "finish_reason": text.finish_reason,
        }
        for index, text in enumerate(texts)
    ]
    usage = running.usage
    return head.object("text_completion", choices) | {"usage": usage.openai(), "timings": usage.timings()}


async def _chunks(running: Running, texts: list[Text], head: Head, body: CompletionBody) -> AsyncIterator[str]:
    def chunk(index: int, text: str, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        made = head.object(
            "text_completion", [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}]
        )
        return made | {"usage": None} if body.shows_usage else made

    last: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        if text.echo and not text.awaits_prompt:
            yield event(chunk(index, text.echo))
    async for piece in running:
        text, told = texts[piece.index], texts[piece.index].told(piece)
        logprobs = text.logprobs(told) if running.wants_tokens and told else None
        shown = (text.echo if piece.prompt is not None else "") + piece.text
        if shown or logprobs:
            yield event(chunk(piece.index, shown, None, logprobs))
        if piece.finish_reason is not None:
            last.append(chunk(piece.index, "", piece.finish_reason))
            if len(last) < len(texts):
                yield event(last[-1])
    if last:
        yield event(last[-1] | {"timings": running.usage.timings()})
    if body.shows_usage:
        yield event(head.object("text_completion", []) | {"usage": running.usage.openai()})
    yield "data: [DONE]\n\n"
