"""Errors as clients get them: a status, and an object in the dialect of the route."""

from __future__ import annotations

import reprlib
from typing import Any

from pydantic import ValidationError

# The word that each status has in OpenAI's and in Anthropic's error objects.
_TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    431: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable_error", "overloaded_error"),
}
LONGEST_SHOWN = 80  # characters of a client's value that an error repeats
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 2 * LONGEST_SHOWN


class ApiError(Exception):
    """What a request is refused with.

    Attributes:
        status: of HTTP. param: the field that is wrong. code: a word for programs. headers: beside the body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def openai(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _TYPES.get(self.status, ("server_error", ""))[0]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        """Return Anthropic's error object."""
        kind = _TYPES.get(self.status, ("", "api_error"))[1]
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def body(self, path: str) -> dict[str, Any]:
        """Return the error object in the dialect of a route."""
        return self.anthropic() if path.startswith("/v1/messages") else self.openai()


def unavailable(message: str, seconds: int = 1) -> ApiError:
    """Return the error of a server that cannot take a request now, but may in some seconds."""
    return ApiError(503, message, headers={"Retry-After": str(seconds)})


def invalid(error: ValidationError, fields: frozenset[str]) -> ApiError:
    """Return the error of a body that does not have the shape it should; `fields` are all names that bodies have."""
    # Of a union each member has complained: what found the right type was meant, or else got deepest into the value.
    first = max(
        error.errors(include_url=False), key=lambda e: (not e["type"].endswith("_type"), len(_path(e["loc"], fields)))
    )
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    path = _path(first["loc"], fields)
    where = ".".join(map(str, path))
    said = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("missing", "value_error") else f" (it is {_shown(first['input'])})"
    return ApiError(400, f"{where or 'the body'}: {said[:1].lower()}{said[1:]}{given}", param=where or None)


def _path(location: tuple[int | str, ...], fields: frozenset[str]) -> list[int | str]:
    """Return a place in a body without the names of types that stand between its parts."""
    return [part for part in location if isinstance(part, int) or part in fields]


def _shown(value: Any) -> str:
    text = _BRIEF.repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
