"""The answers of a batch: a file to which whole lines are appended, and which is on the disk before they count."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..log import say

_PIECE = 1 << 20


class Answers:
    """A file of answers, this process's alone.

    Attributes:
        done: the answers that it held when it was opened, custom_id by id. errors: how many of them are errors.
    """

    def __init__(self, path: Path) -> None:
        """Open it, or make it; take back a line that was not written to its end.

        Raises:
            UsageError: it cannot be written, another process writes to it, or it holds something else.
        """
        self.path = path
        self.done: dict[str, str] = {}
        self.errors = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"--output {path}: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
            if is_new:
                _sync_folder(path.parent)
        except BlockingIOError:
            os.close(self._file)
            raise UsageError(
                f"--output {path}: another batch writes to it; wait for its end, or give another file"
            ) from None
        except OSError as error:
            os.close(self._file)
            raise UsageError(f"--output {path}: {error.strerror or error}") from None
        except BaseException:
            os.close(self._file)
            raise

    def _read(self) -> None:
        end = number = 0
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # it was cut
                self._take(line, number)
                end += len(line)
        if end < os.fstat(self._file).st_size:
            say(f"{self.path}: line {number} was cut short; it is taken back and asked again")
            os.ftruncate(self._file, end)
            os.fsync(self._file)

    def _take(self, line: bytes, number: int) -> None:
        try:
            found = json.loads(line)
            id, custom_id = found["id"], found["custom_id"]
            is_error = found["error"] is not None or found["response"]["status_code"] != 200
            if not isinstance(id, str) or not isinstance(custom_id, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"--output {self.path}: line {number} is no answer of a batch; give another file"
            ) from None
        self.done[id] = custom_id
        self.errors += is_error

    def append(self, lines: Sequence[bytes]) -> None:
        """Write lines and wait until they are on the disk.

        Raises:
            UsageError: they cannot be written.
        """
        data = memoryview(b"".join(line + b"\n" for line in lines))
        try:
            while data:
                data = data[os.write(self._file, data[:_PIECE]) :]
            os.fsync(self._file)
        except OSError as error:
            raise UsageError(
                f"--output {self.path}: {error.strerror or error}; make room and give the same command again"
            ) from None

    def close(self) -> None:
        """Let others write to it."""
        os.close(self._file)


def _sync_folder(folder: Path) -> None:
    """Have a folder's new entry on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def answer(id: str, custom_id: str, status: int, body: Any) -> bytes:
    """Return the line of a request that was answered, with an error, too."""
    response = {"status_code": status, "request_id": id, "body": body}
    return _line({"id": id, "custom_id": custom_id, "response": response, "error": None})


def failure(id: str, custom_id: str, code: str, message: str) -> bytes:
    """Return the line of a request that could not be asked."""
    error = {"code": code, "message": message}
    return _line({"id": id, "custom_id": custom_id, "response": None, "error": error})


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
