"""A directory of safetensors files, mapped into memory.

A safetensors file is an 8-byte little-endian length, a JSON header of that length and raw row-major bytes
(huggingface.co/docs/safetensors). Mapping it by hand reads BF16 with numpy alone, costs no memory until a value is
touched, and lets ranks on one host share the page cache.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from ..kernels.layout import TileFormat

_DTYPES = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}
TILES_KEY = "dllama_mpi.weights"  # in a file's metadata: the tile format of its matrices
LAYOUT_KEY, LAYOUT = "dllama_mpi.layout", "1"
LINEAGE_KEY = "dllama_mpi.lineage"  # what the file was made from, see `Checkpoint.lineage`

_SAMPLE_BYTES = 4096  # of each tensor that go into a fingerprint: what is read at once from a disk anyway


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
        dtype: safetensors' name of it: F32, F16, BF16 (values), U8 (tiles).
        data: mapped array; F16 and BF16 appear as uint16 bits. Writing to it never reaches the file.
    """

    name: str
    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor, of which `data` may be a part."""
        return self.data.shape

    @property
    def is_tiles(self) -> bool:
        """Whether this is a matrix of tiles, see `kernels.layout`."""
        return self.dtype == "U8"

    def rows(self, start: int, stop: int, cols: tuple[int, int] | None = None) -> np.ndarray:
        """Return rows (and columns) of values as float32, a copy."""
        part = self.data[start:stop] if cols is None else self.data[start:stop, cols[0] : cols[1]]
        return as_float32(part, self.dtype)

    def make_tiles(self, rows: tuple[int, int], cols: tuple[int, int], fmt: TileFormat) -> np.ndarray | None:
        """Return rows and columns as tiles of a format if the tensor makes them itself; None: they are to be read."""
        return None


def as_float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return values of safetensors dtype F32, F16 or BF16 (the latter two as uint16 bits) as float32."""
    if dtype == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return data.view(np.float16).astype(np.float32)
    return data.astype(np.float32)


class Checkpoint:
    """All tensors of a model directory: one safetensors file, or shards with an index.

    Attributes:
        format_name: the tile format of a converted directory ("q40", ...), None for one as published.
        metadata: what the last file's header says beside the tensors.
    """

    def __init__(self, folder: Path, files: list[Path] | None = None) -> None:
        """Open every file, or only those given, and check its header.

        Raises:
            ModelError: no safetensors, a missing shard, or a truncated or corrupt file.
        """
        self.folder = folder
        self._tensors: dict[str, tuple[Path, dict[str, Any], int]] = {}
        self._maps: dict[Path, np.ndarray] = {}
        self._digest = hashlib.sha256()
        self._fingerprint = ""
        self.format_name: str | None = None
        self.metadata: dict[str, str] = {}
        for path in _files(folder) if files is None else files:
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy") as opened:  # the library checks lengths, offsets and coverage
                self.metadata = metadata = opened.metadata() or {}
        except FileNotFoundError:
            raise ModelError(f"{path}: the index names this file, but it is missing; download it again") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path}: truncated or corrupt ({error}); download it again") from None
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header_bytes = file.read(length)
        header = json.loads(header_bytes)
        self._digest.update(f"{path.name} {path.stat().st_size} ".encode() + header_bytes)
        if TILES_KEY in metadata:
            if metadata.get(LAYOUT_KEY) != LAYOUT:
                raise ModelError(
                    f"{path}: converted with layout {metadata.get(LAYOUT_KEY)}, this is {LAYOUT}; convert again"
                )
            self.format_name = metadata[TILES_KEY]
        for name, entry in header.items():
            if name != "__metadata__":
                self._tensors[name] = (path, entry, 8 + length)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        """Map a tensor.

        Raises:
            ModelError: no such tensor, or of a dtype that cannot be read.
        """
        if name not in self._tensors:
            raise ModelError(f"{self.folder}: tensor {name} is missing; config.json and the weights do not fit")
        path, entry, base = self._tensors[name]
        dtype = entry["dtype"]
        if dtype not in _DTYPES:
            raise ModelError(f"{path}: tensor {name} is {dtype}; only {', '.join(_DTYPES)} can be read")
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, mode="c")
        start, stop = entry["data_offsets"]
        data = np.frombuffer(self._maps[path][base + start : base + stop].data, _DTYPES[dtype])
        return Tensor(name, dtype, data.reshape(entry["shape"]))

    def release(self, name: str) -> None:
        """Give back the memory of a tensor's pages that were read; the file's contents stay where they are."""
        path, entry, base = self._tensors[name]
        mapped = getattr(self._maps.get(path), "_mmap", None)
        if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, stop = (base + offset for offset in entry["data_offsets"])
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with a neighbour stay
        length = stop // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            mapped.madvise(mmap.MADV_DONTNEED, start, length)

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and headers and of 4 KB from the middle of each tensor.

        A model that was trained on has other values in the same places: the headers alone would not tell.
        """
        if not self._fingerprint:
            places = sorted((path, base, *entry["data_offsets"]) for path, entry, base in self._tensors.values())
            for path, tensors in itertools.groupby(places, lambda place: place[0]):
                with path.open("rb", buffering=0) as file:
                    for _, base, start, stop in tensors:
                        size = min(_SAMPLE_BYTES, stop - start)
                        self._digest.update(os.pread(file.fileno(), size, base + (start + stop - size) // 2))
            self._fingerprint = self._digest.hexdigest()
        return self._fingerprint

    def lineage(self, fmt: TileFormat) -> str:
        """Return what the matrices have been made from and by which steps once they are tiles of a format.

        The fingerprint of a model's files as published, and each format that the values went through: where this is
        the same, so are the tiles. "7f83b1...>q40" stands for a published model loaded as q40, for its conversion to
        q40, and for a rank's slice of either.
        """
        line = self.metadata.get(LINEAGE_KEY)
        if line is None:
            line = self.fingerprint() + (f">{self.format_name}" if self.format_name else "")
        return line if self.format_name == fmt.name else f"{line}>{fmt.name}"


def _files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise ModelError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from None
        if not all(isinstance(name, str) for name in names):
            raise ModelError(f"{index}: not a safetensors index (weight_map names {names[0]!r}, not a file)")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".gguf", ".m", ".pth", ".safetensors"))
    found = f" (found {', '.join(others[:3])})" if others else ""
    raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json{found}")
