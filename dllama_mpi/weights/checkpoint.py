"""A directory of safetensors files, mapped into memory.

A safetensors file is an 8-byte little-endian length, a JSON header of that length and raw row-major bytes
(huggingface.co/docs/safetensors). Mapping it by hand reads BF16 with numpy alone, costs no memory until a value is
touched, and lets ranks on one host share the page cache.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import ModelError
from ..kernels.layout import FORMATS, TileFormat
from .blocks import BlockTensor
from .gguf_types import BY_NAME
from .source import Tensor, TileTensor

_DTYPES = {
    "F32": np.float32, "F16": np.uint16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8, "I64": np.int64,
    "I32": np.int32, "I8": np.int8, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8,
}  # fmt: skip
TILES_KEY = "dllama_mpi.weights"  # in a file's metadata: the tile format of its matrices
FORMATS_KEY = "dllama_mpi.formats"  # the same of matrices that have another one, as JSON
SCALES = ".row_scales"  # ends the name of the tensor beside a matrix of tiles that holds its row scales
TABLE_KEY = "dllama_mpi.table"  # the type of the embedding table if it is in blocks of GGUF: (rows, bytes) U8
LAYOUT_KEY, LAYOUT = "dllama_mpi.layout", "1"
LINEAGE_KEY = "dllama_mpi.lineage"  # what the file was made from, see `Checkpoint.lineage`

PADDING = "padding."  # begins the names of tensors that hold nothing
_SAMPLE_BYTES = 4096  # of each tensor that go into a fingerprint: what is read at once from a disk anyway


class Checkpoint:
    """All tensors of a model directory under the files' own names: one safetensors file, or shards with an index.

    Attributes:
        formats: of the matrices that are tiles; none in a directory as published.
        metadata: what the last file's header says beside the tensors.
    """

    is_whole = True

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
        self._formats: dict[str, TileFormat] = {}
        self.formats: Mapping[str, TileFormat] = self._formats
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
        if TILES_KEY in metadata and metadata.get(LAYOUT_KEY) != LAYOUT:
            raise ModelError(
                f"{path}: converted with layout {metadata.get(LAYOUT_KEY)}, this is {LAYOUT}; convert again"
            )
        special = json.loads(metadata.get(FORMATS_KEY, "{}"))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            self._tensors[name] = (path, entry, 8 + length)
            if entry["dtype"] == "U8" and len(entry["shape"]) > 2 and TILES_KEY in metadata:
                held = special.get(name, metadata[TILES_KEY])
                if held not in FORMATS:
                    raise ModelError(f"{path}: tensor {name} is in format {held!r}; known are {', '.join(FORMATS)}")
                self._formats[name] = FORMATS[held]

    @property
    def is_converted(self) -> bool:
        """Whether its names are those of `model.tensors`, not the publisher's."""
        return LAYOUT_KEY in self.metadata

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return safetensors' name of a tensor's type, and its shape."""
        entry = self._tensors[name][1]
        return entry["dtype"], tuple(entry["shape"])

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the tensors that none of these names stands for."""
        wanted = set(names)
        wanted |= {name + SCALES for name in wanted}
        return [name for name in self._tensors if name not in wanted and not name.startswith(PADDING)]

    def __getitem__(self, name: str) -> Tensor:
        """Map a tensor.

        Raises:
            ModelError: no such tensor, or of a dtype that cannot be read.
        """
        data, dtype = self.raw(name)
        release = functools.partial(self.release, name)
        if dtype == "U8" and data.ndim == 2 and self.metadata.get(TABLE_KEY) in BY_NAME:
            return block_table(name, self.metadata[TABLE_KEY], data)
        if name not in self.formats:
            return Tensor(name, dtype, data, release=release)
        held, scales = self.formats[name], None
        if held.has_row_scales:
            scales, _ = self.raw(name + SCALES)
        return TileTensor(name, dtype, data, release=release, format=held, row_scales=scales)

    def raw(self, name: str) -> tuple[np.ndarray, str]:
        """Return a tensor's elements as they lie in the file, mapped, and safetensors' name of their type."""
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
        return data.reshape(entry["shape"]), dtype

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

    def let_go(self) -> None:
        """Give back the memory of all pages that were read; the files' contents stay where they are."""
        for mapped in (getattr(array, "_mmap", None) for array in self._maps.values()):
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

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

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return what the matrices have been made from, and by which steps, once they are tiles of these formats.

        The fingerprint of a model's files as published, and the formats that the values went through: where this is
        the same, so are the tiles. "7f83b1...>q40" stands for a published model loaded as q40, for its conversion to
        q40, and for a rank's slice of either.
        """
        line, held = self.metadata.get(LINEAGE_KEY), name_of(self.formats)
        if line is None:
            line = self.fingerprint() + (f">{held}" if held else "")
        wanted = name_of(formats)
        return line if held == wanted else f"{line}>{wanted}"


def block_table(name: str, kind: str, data: np.ndarray) -> Tensor:
    """Return a table of embeddings in blocks; data: (rows, bytes) uint8.

    Raises:
        ModelError: a row is no whole number of blocks.
    """
    block = BY_NAME[kind]
    if data.shape[1] % block.size:
        raise ModelError(f"tensor {name} has rows of {data.shape[1]} bytes, and {kind} blocks of {block.size}")
    return BlockTensor(name, kind, data, type=block)


def name_of(formats: Mapping[str, TileFormat]) -> str:
    """Return a name of the formats of all matrices: that of the most frequent one, and a digest if there are others."""
    names = [fmt.name for fmt in formats.values()]
    if not names:
        return ""
    most = max(sorted(set(names)), key=names.count)
    others = sorted((name, fmt.name) for name, fmt in formats.items() if fmt.name != most)
    return most + (f"+{hashlib.sha256(json.dumps(others).encode()).hexdigest()[:12]}" if others else "")


def format_metadata(formats: Mapping[str, TileFormat]) -> dict[str, str]:
    """Return the metadata that says in which formats a file's matrices are."""
    names = [fmt.name for fmt in formats.values()]
    most = max(sorted(set(names)), key=names.count, default="f32")
    others = {name: fmt.name for name, fmt in formats.items() if fmt.name != most}
    return {TILES_KEY: most, **({FORMATS_KEY: json.dumps(others)} if others else {})}


def _files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
            raise ModelError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from None
        if not all(isinstance(name, str) for name in names):
            raise ModelError(f"{index}: not a safetensors index (weight_map names {names[0]!r}, not a file)")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".gguf", ".m", ".pth", ".safetensors"))
    found = f" (found {', '.join(others[:3])})" if others else ""
    raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json{found}")
