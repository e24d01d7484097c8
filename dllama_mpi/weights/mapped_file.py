"""A file with tensors in it, mapped: their bytes, a digest of them, and giving back the memory of what was read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from .gguf_types import BlockType

_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Attributes:
        shape: rows before columns, experts before both. start: of its bytes in the file. file: which of a split set.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    size: int
    file: int = 0


class MappedFile:
    """One file.

    Attributes:
        data: all of it, mapped, (n,) uint8. tensors: in the order of the file. header: bytes before the tensors' data.
    """

    tensors: Mapping[str, TensorInfo]
    header: int

    def __init__(self, path: Path) -> None:
        """Map a file.

        Raises:
            ModelError: it cannot be read.
        """
        self.path = path
        try:
            size = path.stat().st_size
            self.map = np.memmap(path, np.uint8, mode="c") if size else np.zeros(0, np.uint8)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read: {error}") from None
        self.data: np.ndarray = np.frombuffer(self.map.data, np.uint8)

    def bytes_of(self, info: TensorInfo) -> np.ndarray:
        """Return a tensor's bytes, (n,) uint8, mapped."""
        return self.data[info.start : info.start + info.size]

    def sample(self, digest: Any) -> None:
        """Put size, header and 4 KB from the middle of each tensor into a digest."""
        digest.update(f"{self.path.name} {self.data.size} ".encode() + self.data[: self.header].tobytes())
        with self.path.open("rb", buffering=0) as file:
            for info in self.tensors.values():
                size = min(_SAMPLE_BYTES, info.size)
                digest.update(os.pread(file.fileno(), size, info.start + (info.size - size) // 2))

    def release(self, start: int, size: int) -> None:
        """Give back the memory of pages that were read; what they share with neighbours stays."""
        mapped = getattr(self.map, "_mmap", None)
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED") and length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, first, length)
