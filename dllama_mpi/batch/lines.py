"""The requests of a batch, a line each: OpenAI's format (platform.openai.com/docs/guides/batch), or bodies alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages")
# What a body without a url has, and the route that takes it.
_KINDS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
_LONGEST_ID = 512


class BadLine(Exception):
    """A line that asks nothing that can be answered; code: one word for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: from 1. offset, size: of its bytes. custom_id: its own, or "line-NUMBER". id: of its answer; the same
            in every run, and no other line's. is_repeated: whether an earlier line has the same custom_id.
    """

    number: int
    offset: int
    size: int
    custom_id: str
    id: str
    is_repeated: bool = False


@dataclass(frozen=True)
class Ask:
    """What a line asks: a body for a route."""

    url: str
    body: bytes


class Requests:
    """The lines of a file.

    Attributes:
        lines: all that are not empty, of the shard.
    """

    def __init__(self, path: Path, shard: tuple[int, int] = (0, 1)) -> None:
        """Find the lines; shard: which of how many parts of the file, its line i being in part i modulo so many.

        Raises:
            UsageError: the file cannot be read, or has no line.
        """
        self._path = path
        try:
            self.lines = list(self._find(shard))
        except OSError as error:
            raise UsageError(f"--input {path}: {error.strerror or error}") from None
        if not self.lines and shard[1] == 1:
            raise UsageError(f"--input {path} has no line; write one request a line, as JSON")

    def _find(self, shard: tuple[int, int]) -> Iterator[Line]:
        copies: Counter[bytes] = Counter()
        ids: set[str] = set()
        with self._path.open("rb") as file:
            offset = 0
            for number, data in enumerate(file, 1):
                start, offset = offset, offset + len(data)
                if not data.strip():
                    continue
                digest = hashlib.sha256(data.strip()).digest()
                custom_id = _custom_id(data) or f"line-{number}"
                repeated, copy = custom_id in ids, copies[digest]
                ids.add(custom_id)
                copies[digest] += 1
                if (number - 1) % shard[1] == shard[0]:
                    id = f"batch_req_{digest.hex()[:32]}" + (f"-{copy}" if copy else "")
                    yield Line(number, start, len(data), custom_id, id, repeated)

    def read(self, line: Line) -> bytes:
        """Return a line's bytes."""
        with self._path.open("rb") as file:
            file.seek(line.offset)
            return file.read(line.size)


def _custom_id(data: bytes) -> str:
    """Return a line's own custom_id; "" if it has none that can be used."""
    try:
        found = _object(data).get("custom_id")
    except BadLine:
        return ""
    return found if isinstance(found, str) and len(found) <= _LONGEST_ID and _is_text(found) else ""


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except UnicodeDecodeError:
        raise BadLine("invalid_json_line", "the line is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadLine("invalid_json_line", f"the line is not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise BadLine("invalid_request", f"the line is {type(found).__name__}, not a JSON object")
    return found


def parse(data: bytes, is_repeated: bool = False) -> Ask:
    """Return what a line asks.

    Raises:
        BadLine: it asks nothing that can be answered.
    """
    found = _object(data)
    custom_id = found.pop("custom_id", None)
    if custom_id is not None and not _custom_id(data):
        raise BadLine("invalid_custom_id", f"custom_id must be a text of 1 to {_LONGEST_ID} characters")
    if is_repeated:
        raise BadLine("duplicate_custom_id", f"custom_id {custom_id!r} is an earlier line's, too; each must be unique")
    if "url" in found or "body" in found:
        url, body, method = found.get("url"), found.get("body"), found.get("method", "POST")
        if method != "POST":
            raise BadLine("invalid_method", f"method is {str(method)[:40]!r}; it must be POST")
        if url not in URLS:
            raise BadLine("invalid_url", f"url is {str(url)[:200]!r}; it must be one of {', '.join(URLS)}")
        if not isinstance(body, dict):
            raise BadLine("invalid_request", "body must be a JSON object")
    else:
        kind = next((kind for kind in _KINDS if kind in found), None)
        if kind is None:
            raise BadLine("invalid_request", f"the line has no url and body, and none of {', '.join(_KINDS)}")
        url, body = _KINDS[kind], found
    if body.get("stream"):
        raise BadLine("invalid_request", "stream must be false: answers are whole here")
    return Ask(str(url), json.dumps(body).encode())
