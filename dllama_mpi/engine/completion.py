"""One request's text, as the engine's tokens come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..text.stream import TextStream
from .request import Output, RequestStats, TokenLogprobs
from .stats import Stats


@dataclass(frozen=True)
class Generation:
    """What a call generated.

    Attributes:
        token_ids: generated tokens, a final stop token left out. text: their text, cut at a stop string.
        finish_reason: "stop", "length" or "abort". stats: figures of the whole call. usage: of this request.
        logprobs: of each token, and prompt_logprobs: of each of the prompt's but the first, if the parameters ask for
            them.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    stats: Stats
    usage: RequestStats
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class Completion:
    """Turns the outputs of one request into tokens and text, up to its end or a stop string.

    Attributes:
        id: of the request. token_ids: generated, the one that completes a stop string included. pieces: of the text.
        taken: their number, with a stop token.
        finish_reason: "stop" (a stop token or string), "length" or "abort", or None while it goes on.
        usage: once the engine is done with it. logprobs: of the tokens, if they were asked for.
        prompt_logprobs, hidden: see `Output`.
    """

    def __init__(self, request_id: int, text: TextStream | None) -> None:
        self.id = request_id
        self.token_ids: list[int] = []
        self.taken = 0
        self.logprobs: list[TokenLogprobs] = []
        self.pieces: list[str] = []
        self.finish_reason: str | None = None
        self.usage: RequestStats | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.hidden: np.ndarray | None = None
        self._text = text

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    def take(self, output: Output) -> str:
        """Take an output; return the text that it completes. At a stop string the rest of it is left out."""
        self.usage = output.usage or self.usage
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = list(output.prompt_logprobs)
        if output.hidden is not None:
            self.hidden = output.hidden
        if self.finish_reason is not None:
            return ""
        first = len(self.pieces)
        for i, token in enumerate(output.token_ids):
            self.token_ids.append(token)
            self.taken += 1
            self.logprobs += (output.logprobs or ())[i : i + 1]
            if self._text is not None:
                self.pieces.append(self._text.push(token))
                if self._text.stopped:
                    self.finish_reason = "stop"
                    return "".join(self.pieces[first:])
        self.taken += output.stop_id is not None
        self.finish_reason = output.finish_reason
        if self.finish_reason is not None and self._text is not None:
            self.pieces.append(self._text.finish())
        return "".join(self.pieces[first:])

    def generation(self, stats: Stats) -> Generation:
        """Return what came of it, once the engine is done with it."""
        assert self.usage is not None
        return Generation(
            self.token_ids,
            self.text,
            self.finish_reason or "abort",
            stats,
            self.usage,
            self.logprobs or None,
            self.prompt_logprobs,
        )
