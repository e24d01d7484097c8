"""DST.partial: where a directory that is being written lies until it is whole and gets its name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import IO

from ..errors import ClusterError, ModelError, UsageError

CONFIG = "config.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    "LICENSE*",
)

_MARKER = ".converting"  # marks a DST.partial as ours and holds the token of the run that writes it
_SECONDS_TO_APPEAR = 3.0  # a shared folder may show other hosts a new file a little later


@contextlib.contextmanager
def told(path: Path, doing: str = "converting", what: str = "folder") -> Iterator[None]:
    """Turn what the operating system refuses into one line; doing: what is done to the path, which is a `what`.

    Raises:
        UsageError: that line.
    """
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        raise UsageError(
            f"{doing} to {path} failed: {error.strerror or error}{where}; mend that, or give another {what}"
        ) from None


def check_destination(source: Path, destination: Path) -> None:
    """Raise a UsageError unless `destination` is free and apart from `source`; both real paths."""
    if destination == source:
        raise UsageError(f"{destination} is the source itself; give another folder to write")
    for path in (destination, partial_path(destination)):
        if path.is_relative_to(source):
            raise UsageError(f"{path} would lie in the source {source}; give a folder outside of it")
    if destination.is_dir():
        if os.path.ismount(destination):
            raise UsageError(f"{destination} is a mount point; give a folder inside of it")
        if any(destination.iterdir()):
            raise UsageError(f"{destination} exists and is not empty; remove it or give another folder")
    elif destination.exists():
        raise UsageError(f"{destination} exists and is not a folder; remove it or give another")


def sync(file: IO[bytes]) -> None:
    """Wait until a file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where the file system offers that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def partial_path(destination: Path) -> Path:
    """Return where a directory lies while it is written."""
    return destination.with_name(f"{destination.name}.partial")


class Partial:
    """DST.partial, where a conversion lies until it is whole.

    Attributes:
        token: what the run's marker file holds; a rank that reads it there sees the root's folder.
    """

    def __init__(self, destination: Path) -> None:
        self.destination, self.path = destination, partial_path(destination)
        self.marker = self.path / _MARKER
        self.token = ""
        self._lock: BufferedWriter | None = None

    def create(self, size: int) -> None:
        """Make the folder, after removing what an earlier run left. Root only.

        Raises:
            UsageError: the disk has less than `size` bytes free, or the folder is not one to remove.
        """
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink() or self.path.exists():
            self._remove_leftover()
        free = shutil.disk_usage(self.destination.parent).free
        if size > free:
            raise UsageError(
                f"{self.destination} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in"
                f" {self.destination.parent}; free space, or give another folder or smaller --weights"
            )
        self.path.mkdir()
        self.token = secrets.token_hex(8)
        self._lock = self.marker.open("xb")
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock.write(self.token.encode())
        sync(self._lock)

    def _remove_leftover(self) -> None:
        ours = self.path.is_dir() and not self.path.is_symlink()
        if not ours or not (self.marker.is_file() or not any(self.path.iterdir())):
            raise UsageError(
                f"{self.path} is in the way and no conversion's leftover; remove it or give another folder"
            )
        if self.marker.is_file():
            with self.marker.open("r+b") as marker:
                try:
                    fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UsageError(
                        f"{self.path} is being written by another conversion; wait for it or give another folder"
                    ) from None
                except OSError:  # no locks here
                    pass
        self._delete()

    def check_visible(self) -> None:
        """Raise a ClusterError unless this rank sees the root's folder."""
        deadline = time.monotonic() + _SECONDS_TO_APPEAR
        while not self._is_ours():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{self.path}, made by rank 0, is not to be seen; give a folder that all hosts share, or convert"
                    " with one rank"
                )
            with contextlib.suppress(OSError):  # makes a network file system look anew
                os.listdir(self.path.parent)
            time.sleep(0.05)

    def _is_ours(self) -> bool:
        try:
            return self.token != "" and self.marker.read_text(encoding="utf-8") == self.token
        except OSError:
            return False

    def finish(self, source: Path, sizes: Mapping[str, int], more: Mapping[str, bytes]) -> None:
        """Add the small files, config.json last, and give the folder its name. Root only.

        Args:
            source: the model directory they are copied from.
            sizes: bytes of the files that were written. more: contents of further files, in place of the source's
                where both have one.

        Raises:
            ClusterError: what the other ranks wrote is not here.
        """
        for name, expected in sizes.items():
            path = self.path / name
            size = path.stat().st_size if path.is_file() else 0
            if size != expected or not self._is_ours():
                raise ClusterError(f"{path} has {size} of {expected} bytes; let one conversion at a time write there")
        for pattern in COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if path.is_file() and path.name not in more:
                    self._add(path.name, path.read_bytes())
        config = source / CONFIG
        if CONFIG not in more and not config.is_file():
            raise ModelError(f"{source}: no config.json; give a model directory as Hugging Face lays it out")
        last = {CONFIG: more[CONFIG] if CONFIG in more else config.read_bytes()}
        for name, content in {**{name: more[name] for name in more if name != CONFIG}, **last}.items():
            self._add(name, content)
        sync_folder(self.path)
        self.path.rename(self.destination)
        with contextlib.suppress(OSError):  # the model is whole; the marker does no harm
            (self.destination / _MARKER).unlink()
        sync_folder(self.destination)
        sync_folder(self.destination.parent)
        self._unlock()

    def _add(self, name: str, content: bytes) -> None:
        with (self.path / name).open("xb") as out:
            out.write(content)
            sync(out)

    def remove(self, whole: bool) -> None:
        """Remove this run's files as far as the file system lets it, and with `whole` the folder.

        Without, the folder stays with its marker for the next run to remove: other ranks may still put files there.
        """
        if self._is_ours():
            with contextlib.suppress(OSError):
                self._delete(whole)
        self._unlock()

    def _delete(self, whole: bool = True) -> None:
        """Remove the folder's files and, with `whole`, the marker and the folder."""
        for path in self.path.iterdir():
            if path != self.marker:
                path.unlink(missing_ok=True)
        if whole:
            self.marker.unlink(missing_ok=True)
            self.path.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
