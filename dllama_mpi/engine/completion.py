"""One request's text, as the engine's tokens come."""

from __future__ import annotations

from ..text.stream import TextStream
from .request import Output, RequestStats, TokenLogprobs


class Completion:
    """Turns the outputs of one request into tokens and text, up to its end or a stop string.

    Attributes:
        id: of the request. token_ids: generated, the one that completes a stop string included. pieces: of the text.
        taken: their number, with a stop token.
        finish_reason: "stop" (a stop token or string), "length" or "abort", or None while it goes on.
        usage: once the engine is done with it. logprobs: of the tokens, if they were asked for.
    """

    def __init__(self, request_id: int, text: TextStream | None) -> None:
        self.id = request_id
        self.token_ids: list[int] = []
        self.taken = 0
        self.logprobs: list[TokenLogprobs] = []
        self.pieces: list[str] = []
        self.finish_reason: str | None = None
        self.usage: RequestStats | None = None
        self._text = text

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    def take(self, output: Output) -> str:
        """Take an output; return the text that it completes. At a stop string the rest of it is left out."""
        self.usage = output.usage or self.usage
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
