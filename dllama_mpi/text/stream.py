"""Tokens in, text out: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from dllama_mpi.errors import RequestError

from .tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # bytes of UTF-8


class TextStream:
    """Turn one sequence's tokens into text as they come, at a cost that does not grow with the text.

    All that `push` and `finish` return, joined, equals the decoded continuation cut at its first stop string,
    however the text was split into tokens. "First" is the stop string that is complete first; of two that
    end at the same character, the longer.

    Args:
        tokenizer: knows each token's bytes, and which tokens are special and hence not shown.
        prompt_ids: the tokens before the continuation. After visible text the continuation keeps its leading
            space ("Once upon" + "▁a" is "Once upon a"); with no prompt given, the continuation is a text of
            its own and the space a sentencepiece tokenizer puts before a text is dropped, as for a chat's answer.
        stop: the stop strings; none may be empty.
        shown: special tokens that are part of the text all the same, such as one that opens a tool call.

    Attributes:
        stopped: a stop string was met; `push` and `finish` return "" from then on. stopped_by: that string, or None.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        shown: Collection[int] = (),
    ) -> None:
        if "" in stop:
            raise RequestError("a stop string is empty; a stop string has at least one character; leave it out")
        self.stopped = False
        self.stopped_by: str | None = None
        self._shown = frozenset(shown)
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""  # complete text that may be the start of a stop string
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tail = _last_bytes(tokenizer, prompt_ids)
        self._utf8.decode(tail)  # a prompt of raw tokens may end within a character
        self._spaces_to_drop = 0 if tail else tokenizer.leading_spaces

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain."""
        if self.stopped:
            return ""
        of = self._tokenizer.token_bytes if token_id in self._shown else self._tokenizer.visible_bytes
        return self._release(self._utf8.decode(of(token_id)))

    def finish(self) -> str:
        """Return what was held back: the start of a stop string, and U+FFFD for a broken-off character."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        """Add whole characters to what is held; return all but a stop string or its possible start."""
        if self._spaces_to_drop and text:
            spaces = min(self._spaces_to_drop, len(text) - len(text.lstrip(" ")))
            text = text[spaces:]
            self._spaces_to_drop = 0 if text else self._spaces_to_drop - spaces
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.stopped, self.stopped_by, self._held = True, text[start:end], ""
            return text[:start]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop` (never all of it)."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _last_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """Return the last bytes of a text, enough to hold an unfinished character; b"" if nothing of it is visible."""
    tail = b""
    for token_id in reversed(ids):
        tail = tokenizer.visible_bytes(token_id) + tail
        if len(tail) >= LONGEST_CHARACTER:
            break
    return tail
