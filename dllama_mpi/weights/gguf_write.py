"""Writing a GGUF file: the header by the package gguf, then the tensors' bytes as they come, in DST.partial."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UsageError
from .gguf import MAGIC, Metadata
from .gguf_types import BlockType
from .partial import partial_path, sync, sync_folder

NEEDS_GGUF = "files of GGUF are written with the package gguf: pip install 'dllama-mpi[gguf]'"
_ALIGNMENT = 32


@dataclass(frozen=True)
class Key:
    """A value of the metadata with ggml's number of its type; of: that of a list's elements."""

    value: Any
    kind: int
    of: int | None = None


@dataclass(frozen=True)
class Slot:
    """A tensor in the header; shape: rows before columns, experts before both."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    size: int


def keys_of(metadata: Metadata) -> dict[str, Key]:
    """Return the metadata of a GGUF file with their types."""
    found = {}
    for key in metadata:
        value, (kind, of) = metadata[key], metadata.kind(key)
        found[key] = Key(value.tolist() if isinstance(value, np.ndarray) else value, kind, of)
    return found


def write_header(path: Path, arch: str, keys: Mapping[str, Any], slots: Iterable[Slot]) -> None:
    """Write everything that stands before the tensors' bytes; what is in the file is lost.

    keys: without general.architecture. Values are `Key`s, or of Python's types: whole numbers become uint32 (in lists
    int32), floats float32.
    """
    import gguf

    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if isinstance(value, Key):
            if value.of is not None and not len(value.value):
                continue  # the package writes no empty lists
            writer.add_key_value(key, value.value, kinds(value.kind), None if value.of is None else kinds(value.of))
        elif isinstance(value, list | np.ndarray):
            writer.add_array(key, value if isinstance(value, list) else value.tolist())
        else:
            kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
            writer.add_key_value(key, value, kind)
    for slot in slots:
        kind = gguf.GGMLQuantizationType(slot.kind.number)
        writer.add_tensor_info(slot.name, slot.shape, np.dtype(np.float32), slot.size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


class GgufOut:
    """A GGUF file that is written as DST.partial and gets its name when it is whole.

    Attributes:
        path: DST.partial.
    """

    def __init__(self, destination: Path) -> None:
        self.destination, self.path = destination, partial_path(destination)
        self._file: IO[bytes] | None = None

    @contextlib.contextmanager
    def writing(self, size: int) -> Iterator[None]:
        """Hold DST.partial, which is removed if the block fails, and renamed if it does not.

        size: bytes that will be written, at least.

        Raises:
            UsageError: the destination is there already, another run is writing it, or the disk has not as many bytes.
        """
        self._check(size)
        with self.path.open("a+b") as self._file:
            self._lock()
            try:
                yield
                sync(self._file)
                self.path.rename(self.destination)
                sync_folder(self.destination.parent)
            except BaseException:
                self.path.unlink(missing_ok=True)
                raise

    def _check(self, size: int) -> None:
        if self.destination.exists() or self.destination.is_symlink():
            raise UsageError(f"{self.destination} exists; remove it or give another file")
        if self.path.is_symlink() or self.path.exists():
            with self.path.open("rb") if self.path.is_file() else contextlib.nullcontext() as file:
                if file is None or file.read(len(MAGIC)) not in (b"", MAGIC):
                    raise UsageError(
                        f"{self.path} is in the way and no export's leftover; remove it or give another file"
                    )
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.destination.parent).free
        if size > free:
            raise UsageError(
                f"{self.destination} needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in"
                f" {self.destination.parent}; free space, or give another folder or a smaller --type"
            )

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path} is being written by another export; wait for it or give another file"
            ) from None
        except OSError:  # some file systems have no locks
            pass

    def write(self, slots: Iterable[tuple[Slot, Iterable[np.ndarray]]]) -> Iterator[int]:
        """Write tensors, in the header's order, behind what is there; yield the bytes of each piece."""
        assert self._file is not None
        for slot, data in slots:
            self._file.write(bytes(-self._end() % _ALIGNMENT))
            size = 0
            for piece in data:
                self._file.write(piece.data)
                size += piece.size
                yield piece.size
            assert size == slot.size, f"{slot.name} has {size} of {slot.size} bytes"
        self._file.write(bytes(-self._end() % _ALIGNMENT))

    def _end(self) -> int:
        assert self._file is not None
        return self._file.seek(0, 2)

    @contextlib.contextmanager
    def grown(self, size: int) -> Iterator[None]:
        """Let the file have so many bytes more within a block: it can be read as if its tensors were there."""
        assert self._file is not None
        end = self._end()
        self._file.truncate(end + size)
        try:
            yield
        finally:
            self._file.truncate(end)
