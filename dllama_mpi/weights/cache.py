"""Slices that a host keeps of what it received, so that the next start reads its own disk.

One file an entry, named after the model and the slice's key. It is written under another name and renamed when whole,
so that what has an entry's name is never half of one. Whoever reads or writes a file holds a lock on it, and only
files without are removed; the order of removal is that of last use, the file's time of modification.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import ModelError, UsageError
from .checkpoint import Checkpoint, name_of
from .files import Entry, File
from .partial import sync, sync_folder
from .slices import SliceCheckpoint

DEFAULT_LIMIT = 20_000_000_000
_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_SECONDS_YOUNG = 600.0
_MARGIN = 64 << 20  # bytes of the disk that are left free


def default_folder() -> Path:
    """Return where slices are kept unless told otherwise, beside the compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "dllama_mpi" / "weights"


def folder_of(given: str | None) -> Path | None:
    """Return the folder that --cache-dir means on this host: None for "none", the default one if not given."""
    if given == "none":
        return None
    return default_folder() if given is None else Path(given).expanduser().absolute()


@dataclass(frozen=True)
class Kept:
    """An entry of a cache.

    Attributes:
        model, weights, about: what it holds, for people; empty for one that is being written, or was left so.
        size: bytes. used: when last, seconds since 1970. in_use: by a job, now.
    """

    path: Path
    model: str
    weights: str
    about: str
    size: int
    used: float
    in_use: bool


class NoRoom(Exception):
    """The cache cannot take a slice; the message says why."""


class WeightCache:
    """The slices in one folder."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """Take a folder, which need not exist, and the most bytes to keep there.

        limit: None for 20 GB, or half of what the disk has free and the cache has taken if that is less.
        """
        self.folder, self._limit = folder, limit

    def _files(self) -> list[Path]:
        with contextlib.suppress(OSError):
            return sorted(p for p in self.folder.iterdir() if p.suffix in (_SUFFIX, _PARTIAL) and p.is_file())
        return []

    def find(self, key: str) -> SliceCheckpoint | None:
        """Return the slice of a key, held as in use as long as it lives; None if there is none.

        Raises:
            ModelError: there is one, and it was truncated or damaged; it has been removed.
        """
        for path in self._files():
            if path.name.endswith(f"-{key}{_SUFFIX}"):
                held = _lock_shared(path)
                try:
                    found = SliceCheckpoint(path)
                except ModelError:
                    remove(path)
                    raise
                if found.key == key:
                    with contextlib.suppress(OSError):
                        os.utime(path)
                    found.keep = held
                    return found
        return None

    def create(self, file: File, key: str, label: str) -> SliceWriter:
        """Begin a slice file, after making room for all of it.

        label: of the file, for people. Entries that were not used for the longest time are removed.

        Raises:
            NoRoom: the limit or the disk does not allow it, or the folder cannot be written.
        """
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", label)[:100] + f"-{key}{_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(self.folder):
                self._make_room(file.size)
                return SliceWriter(self.folder / name, file)
        except OSError as error:
            raise NoRoom(f"{self.folder}: {error.strerror or error}") from None

    def _make_room(self, size: int) -> None:
        entries = sorted(self.entries(), key=lambda entry: entry.used)
        free, taken = shutil.disk_usage(self.folder).free, sum(entry.size for entry in entries)
        limit = min(DEFAULT_LIMIT, (free + taken) // 2) if self._limit is None else self._limit
        over = max(taken + size - limit, size + _MARGIN - free)
        removable = [entry for entry in entries if not entry.in_use and not _is_young(entry)]
        if over > sum(entry.size for entry in removable):
            raise NoRoom(
                f"{self.folder}: {size / 1e9:.2f} GB needed, the limit is {limit / 1e9:.2f} GB,"
                f" {free / 1e9:.2f} GB of the disk are free"
            )
        for entry in removable:
            if over > 0 or entry.path.suffix == _PARTIAL:  # the latter are of no use to anybody
                remove(entry.path)
                over -= entry.size

    def entries(self) -> list[Kept]:
        """Return what is kept here; files that vanish meanwhile are left out."""
        found = []
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                said = _described(path) if path.suffix == _SUFFIX else ("", "", "")
                found.append(Kept(path, *said, stat.st_size, stat.st_mtime, _is_locked(path)))
        return found

    def clear(self) -> tuple[list[Kept], list[Kept]]:
        """Remove what is not in use; return what was removed and what was kept.

        Raises:
            UsageError: the folder cannot be written.
        """
        entries = self.entries()
        gone = [entry for entry in entries if not entry.in_use]
        try:
            for entry in gone:
                entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(f"--cache-dir {self.folder}: {error.strerror or error}; give one of your own") from None
        return gone, [entry for entry in entries if entry.in_use]


class SliceWriter:
    """A slice file that is being written: under another name, locked, all of its size taken from the disk."""

    def __init__(self, path: Path, file: File) -> None:
        self._path, self._size = path, file.size
        self._partial = path.with_name(f"{path.stem}.{secrets.token_hex(4)}{_PARTIAL}")
        self._out = self._partial.open("xb", buffering=1 << 20)
        try:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _allocate(self._out, file.size)
            self._out.write(file.header)
        except OSError:
            self.discard()
            raise

    def write(self, entry: Entry, start: int, data: np.ndarray) -> None:
        """Write the next bytes (n,) uint8 of an entry.

        Raises:
            ModelError: the disk refuses.
        """
        try:
            self._out.write(data.data)
        except OSError as error:
            raise _refused(self._path.parent, error) from None

    def finish(self) -> Checkpoint:
        """Wait until all is on the disk, give the file its name and return it opened.

        Raises:
            ModelError: the disk refuses.
        """
        try:
            sync(self._out)
            with contextlib.suppress(OSError):
                fcntl.flock(self._out, fcntl.LOCK_SH)
            self._partial.rename(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise _refused(self._path.parent, error) from None
        found = SliceCheckpoint(self._path)
        found.keep = _Held(self._out)  # and with it the lock
        return found

    def discard(self) -> None:
        """Remove what has been written, unless it is finished."""
        remove(self._partial)
        with contextlib.suppress(OSError):
            self._out.close()


def _allocate(out: IO[bytes], size: int) -> None:
    """Take disk for a whole file: a full disk is found now, not after most of the file has been sent."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(out.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot
                raise


def _refused(folder: Path, error: OSError) -> ModelError:
    return ModelError(
        f"{folder}: {error.strerror or error} while a slice was written; free space, give another --cache-dir,"
        " or --cache-dir none to keep weights in memory alone"
    )


def remove(path: Path) -> None:
    """Remove a file if it can be; whoever has it mapped keeps its contents."""
    with contextlib.suppress(OSError):
        path.unlink()


def _described(path: Path) -> tuple[str, str, str]:
    """Return the model, the format and the owner of a slice file, empty if it is damaged."""
    try:
        found = SliceCheckpoint(path)
    except ModelError:
        return "", "", ""
    return found.model, name_of(found.formats), found.about


class _Held:
    """An open file, and its lock, for as long as somebody keeps this."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __del__(self) -> None:
        self._file.close()


def _lock_shared(path: Path) -> _Held:
    """Open a file and lock it against removal, or without a lock where that is not to be had."""
    file = path.open("rb")
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return _Held(file)


def _is_young(entry: Kept) -> bool:
    """Return whether a file may be one that is being written where there are no locks."""
    return entry.path.suffix == _PARTIAL and time.time() - entry.used < _SECONDS_YOUNG


def _is_locked(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from making room at the same time; for a few seconds at most."""
    with (folder / ".lock").open("wb") as handle:
        for _ in range(100):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # no locks here
                break
        yield


def cache_of(given: str | None, limit: float | None) -> WeightCache | None:
    """Return the cache that --cache-dir and --cache-limit, in GB, mean on this host; None for "none"."""
    folder = folder_of(given)
    return None if folder is None else WeightCache(folder, None if limit is None else int(1e9 * limit))
