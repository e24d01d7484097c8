"""One large file of the hub, by HTTP: it goes on where it was cut, and is put in its place when its digest is right.

The hub's own library begins a file anew in every process; over a slow or shaky line a large one would never come.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .choice import RepoFile
from .local import PARTIAL
from .progress import Downloading
from .refusals import Refusal, retry_after

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds after failures in a row in which nothing came
PATIENCE = 60  # seconds that are waited when the hub asks for it; beyond, the user decides
_CHUNK = 1 << 20


def partial_of(file: RepoFile, blobs: Path) -> Path:
    """Return where a file is gathered until it is whole."""
    return blobs / f"{file.sha256}.dllama_mpi{PARTIAL}"


def missing_bytes(file: RepoFile, blobs: Path) -> int:
    """Return the bytes of a file that have still to come."""
    if file.sha256 is None or file.size is None:
        return file.size or 0
    try:
        return max(0, file.size - partial_of(file, blobs).stat().st_size)
    except OSError:
        return file.size


class _Sink:
    """The file that is being gathered, and the digest of what is in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self._digest = file, 0, hashlib.sha256()
        file.seek(0)
        while chunk := file.read(_CHUNK):
            self._count(chunk)

    def _count(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.size += len(chunk)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.size, self._digest = 0, hashlib.sha256()

    def sha256(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


@contextmanager
def _alone(file: IO[bytes], progress: Downloading) -> Iterator[None]:
    """Hold a file's lock; another job may be downloading the same."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.say("another program downloads the same file; waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file lets go of it


def fetch(url: str, headers: Mapping[str, str], file: RepoFile, blobs: Path, progress: Downloading) -> None:
    """Download a file whose size and sha256 are known to `blobs`, under its digest.

    Raises:
        Refusal: what came is not what the hub promised; it has been removed. Others: see `refusals.told`.
    """
    assert file.sha256 is not None
    assert file.size is not None
    blobs.mkdir(parents=True, exist_ok=True)
    target, partial = blobs / file.sha256, partial_of(file, blobs)
    with partial.open("ab+") as opened, _alone(opened, progress):
        if target.exists():  # another job has brought it meanwhile
            partial.unlink(missing_ok=True)
            return
        sink = _Sink(opened)
        if sink.size > file.size:
            sink.restart()
        _gather(url, headers, sink, file.size, progress)
        found = sink.sha256()
        if found != file.sha256:
            partial.unlink()
            raise Refusal(
                f"{file.path}: its sha256 is {found[:16]}..., the hub's is {file.sha256[:16]}...; what came has been"
                " removed, download it again"
            )
        partial.replace(target)


def _gather(url: str, headers: Mapping[str, str], sink: _Sink, size: int, progress: Downloading) -> None:
    """Fill the sink, in as many requests as it takes."""
    failures = 0
    while sink.size < size:
        before, error, pause = sink.size, None, None
        try:
            pause = _request(url, headers, sink, size, progress)
        except Exception as caught:
            if not _is_passing(caught):
                raise
            error = caught
        failures = 0 if sink.size > before else failures + 1
        if sink.size >= size:
            return
        if failures > len(PAUSES):
            what = "cut off" if pause is None else "told to wait (429)"
            kept = "what has come is kept, the same command goes on from there"
            raise error or Refusal(f"{what} {failures} times after {sink.size} of {size} bytes; {kept}")
        seconds = pause if pause is not None else PAUSES[max(0, failures - 1)]
        reason = "the hub asks to wait" if pause is not None else "cut off" if error is None else _named(error)
        progress.say(f"{reason}; going on in {seconds:g} s")
        time.sleep(seconds)


def _named(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _is_passing(error: Exception) -> bool:
    """Return whether the same request may go well a little later."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 408
    return isinstance(error, HfHubHTTPError.__mro__[1])  # of the HTTP client: no connection, a cut, a time-out


def _request(url: str, headers: Mapping[str, str], sink: _Sink, size: int, progress: Downloading) -> float | None:
    """Ask for the rest of a file and write what comes; return the seconds to wait where the hub asks for that."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    asked = {**headers, "Accept-Encoding": "identity"}
    if sink.size:
        asked["Range"] = f"bytes={sink.size}-"
    session: Any = get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with session.stream("GET", url, headers=asked, timeout=timeout, follow_redirects=True) as response:
        seconds = retry_after(response.headers)
        if response.status_code == 429 and seconds is not None and seconds <= PATIENCE:
            return float(seconds)
        if response.status_code == 416:  # no such range: begin anew
            progress.add(-sink.size)
            sink.restart()
            return 0.0
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        begins = f"bytes {sink.size}-"
        if sink.size and not (
            response.status_code == 206 and str(response.headers.get("content-range", "")).startswith(begins)
        ):
            progress.add(-sink.size)
            sink.restart()
        for chunk in response.iter_bytes(_CHUNK):
            if sink.size + len(chunk) > size:
                raise Refusal(f"{url.rsplit('/', 1)[-1]}: more comes than the {size} bytes that the hub tells")
            sink.write(chunk)
            progress.add(len(chunk))
    return None
