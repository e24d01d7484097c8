"""Read the metadata of a GGUF file with a check of every type: what is wrong is said in one line that names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllama_mpi.errors import ModelError

NONE_IDS = (-1, 0xFFFFFFFF)
"""What stands for "no token" where a key must have a number."""
REMEDY = "download the file again, or give a tokenizer by --tokenizer"


class Fields:
    """Metadata by key.

    Args:
        metadata: numbers, strings, booleans, and lists or arrays of these.
        origin: the file, for messages.
    """

    def __init__(self, metadata: Mapping[str, Any], origin: str) -> None:
        self._metadata, self.origin = metadata, origin

    def error(self, key: str, what: str, remedy: str = REMEDY) -> ModelError:
        """Return the error that `key` is not what it must be."""
        return ModelError(" ".join(f"{self.origin}: {key} {what}; {remedy}".split()))

    def keys_under(self, prefix: str) -> list[str]:
        """Return the keys that begin so."""
        return [key for key in self._metadata if key.startswith(prefix)]

    def text(self, key: str) -> str | None:
        """Return a string, or None if the key is not there."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"is {_described(value)}; it must be a string")
        if value is not None:
            self._check(key, value)
        return value

    def flag(self, key: str) -> bool | None:
        """Return a boolean, or None if the key is not there."""
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, (bool, np.bool_)):
            raise self.error(key, f"is {_described(value)}; it must be a boolean")
        return bool(value)

    def texts(self, key: str) -> list[str] | None:
        """Return a list of strings, or None if the key is not there."""
        value = self._metadata.get(key)
        if value is None:
            return None
        if not _is_list(value) or not set(map(type, value)) <= {str, np.str_}:
            raise self.error(key, f"is {_described(value)}; it must be a list of strings")
        self._check(key, "".join(value))
        return list(value)

    def _check(self, key: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # what a lenient reader leaves of bytes that are not UTF-8
            raise self.error(key, f"has {text[error.start]!a}, which is no character") from None

    def numbers(self, key: str, count: int, kinds: str) -> NDArray[Any] | None:
        """Return `count` numbers whose numpy dtype is of one of `kinds`, or None if the key is not there."""
        value = self._metadata.get(key)
        if value is None:
            return None
        try:
            found = np.asarray(value) if _is_list(value) else None
        except (ValueError, OverflowError):  # lists in lists
            found = None
        if found is None or found.ndim != 1 or (found.size and found.dtype.kind not in kinds):
            raise self.error(key, f"is {_described(value)}; it must be a list of numbers")
        if found.size != count:
            raise self.error(key, f"has {found.size} entries, but there are {count} tokens")
        return found

    def token_id(self, key: str, count: int) -> int | None:
        """Return a token's id, or None if the key is not there or says that there is none."""
        value = self._metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise self.error(key, f"is {_described(value)}; it must be a token's id")
        if value in NONE_IDS:
            return None
        if not 0 <= value < count:
            raise self.error(key, f"is {value}; it must be at most {count - 1}, the last token's id")
        return int(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))


def _described(value: Any) -> str:
    """Name a value of the wrong type, shortly."""
    if not _is_list(value):
        return f"{str(value)[:40]!r}"
    kinds = sorted({type(entry).__name__ for entry in value})
    return f"a list of {', '.join(kinds[:3])}" if kinds else "an empty list"
