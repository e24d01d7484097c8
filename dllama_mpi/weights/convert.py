"""Writing a model directory whose matrices are tiles, ready to be mapped and cut as they lie.

The new files hold the names of `model.tensors`: matrices as U8 tiles (`kernels.layout`), each in a format of its own,
norms and biases as float32, the embedding table as the source has it. A tied model also gets its lm_head as tiles, as
rows of the table are looked up in the file and products need tiles. Which tensor lies where depends on the model and
the formats alone, so the bytes are the same at any number of ranks.

Everything is written into DST.partial and renamed to DST when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ClusterError, DllamaError, UsageError
from ..kernels import runtime
from ..kernels.layout import TileFormat
from ..parallel.group import TensorParallelGroup
from ..parallel.stream import together_at_rest
from ..progress import progress_bytes
from .checkpoint import LAYOUT, LAYOUT_KEY, LINEAGE_KEY, format_metadata
from .files import (
    PIECE_BYTES,
    Entry,
    File,
    aligned,
    lay_out,
    matrix_entries,
    read_piece,
    table_entry,
    table_metadata,
    vector_entry,
)
from .partial import Partial, check_destination, sync, told
from .slices import Parts, SliceReader, origin
from .source import WeightSource
from .tiles import check_shape

_FILE_BYTES = 1 << 30  # a file is closed before it grows past this; one larger tensor makes a larger file


@dataclass(frozen=True)
class Conversion:
    """What is written.

    Attributes:
        source: must hold the whole model. formats: of every matrix. parts: every tensor, whole.
        show_progress: tell on the root how far it is.
        more: small files that the source does not have as files.
    """

    source: WeightSource
    formats: Mapping[str, TileFormat]
    parts: Parts
    show_progress: bool
    more: Mapping[str, bytes] = field(default_factory=dict)


def convert(conversion: Conversion, destination: Path, group: TensorParallelGroup) -> int:
    """Write a model directory whose matrices are tiles; return its bytes. Collective.

    Each rank writes whole files in turn, some 16 MB at a time. A source that is converted already is converted
    again from the values it holds.

    destination: must not exist, or be empty; folders above it are made. The same folder on every rank.

    Raises:
        UsageError: the destination is in use, lies in the source, or cannot hold the files.
        ModelError: a tensor is missing, of another shape than it should be, or cannot be read.
        ClusterError: a rank has another source, or does not see the destination.
    """
    source, show_progress = conversion.source, conversion.show_progress
    destination = Path(os.path.realpath(destination))
    partial = Partial(destination)
    with group.together(), told(destination):
        check_destination(Path(os.path.realpath(source.folder)), destination)
        files = plan(conversion)
    _compare(conversion, files, group)
    _share_cores(group)
    with group.together(), told(destination):
        if group.is_root:
            partial.create(sum(file.size for file in files))
    partial.token = group.broadcast(partial.token)
    try:
        with group.together():
            partial.check_visible()
        _write_all(source, files, partial, group, show_progress)
        with group.together(), told(destination):
            if group.is_root:
                partial.finish(
                    source.folder, {file.name: file.size for file in files}, {**_index(files), **conversion.more}
                )
    except BaseException as error:
        agreed = isinstance(error, DllamaError) and error.agreed  # then no rank writes any more
        if group.is_root or not agreed:
            partial.remove(whole=agreed or group.size == 1)
        raise
    return sum(file.size for file in files)


def convert_slices(
    source: WeightSource,
    destination: Path,
    files: Mapping[str, File],
    group: TensorParallelGroup,
    show_progress: bool,
    more: Mapping[str, bytes],
) -> None:
    """Write slices of `source` into the model directory `destination`, on the root alone. Collective.

    Args:
        destination: must not exist, or be empty; folders above it are made.
        files: what is to be written, by name; see `slices.Manifest.file`. more: see `Conversion`.

    Raises:
        UsageError: the destination is in use, lies in the source, or cannot hold the files.
        ModelError: a tensor cannot be read.
    """
    destination = Path(os.path.realpath(destination))
    partial = Partial(destination)
    with together_at_rest(group), told(destination):
        if not group.is_root:
            return
        check_destination(Path(os.path.realpath(source.folder)), destination)
        partial.create(sum(file.size for file in files.values()))
        try:
            _write_slices(source, files, partial.path, show_progress)
            partial.finish(source.folder, {name: file.size for name, file in files.items()}, more)
        except BaseException:
            partial.remove(whole=True)
            raise


def _write_slices(source: WeightSource, files: Mapping[str, File], folder: Path, show_progress: bool) -> None:
    def work() -> Iterator[int]:
        for name, file in files.items():
            reader = SliceReader(source, file)
            with (folder / name).open("xb") as out:
                out.write(file.header)
                for index in range(len(file.entries)):
                    for _, _, data in reader.read(index):
                        out.write(data.data)
                        yield len(data)
                sync(out)

    total = sum(file.size - len(file.header) for file in files.values())
    for _ in progress_bytes(work(), "writing slices", show_progress, total):
        pass


def _index(files: list[File]) -> dict[str, bytes]:
    """Return the index that several files need, by its name."""
    if len(files) == 1:
        return {}
    names = {entry.name: file.name for file in files for entry in file.entries}
    index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": names}
    return {"model.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode()}


def _compare(conversion: Conversion, files: list[File], group: TensorParallelGroup) -> None:
    """Raise a ClusterError on all ranks unless they read the same files and mean to write the same."""
    source = conversion.source
    seen = group.allgather(
        (source.lineage(conversion.formats), hashlib.sha256(b"".join(f.header for f in files)).hexdigest())
    )
    for rank, other in enumerate(seen):
        if other != seen[0]:
            error = ClusterError(
                f"rank {rank} on {group.hosts[rank]} sees other model files than rank 0 on {group.hosts[0]} under"
                f" {source.folder}; copy the same files to every host, or convert with one rank"
            )
            group.agree(error)


def _share_cores(group: TensorParallelGroup) -> None:
    """Let ranks that may run on the same cores divide them."""
    cores = runtime.usable_cores()
    everybody = group.allgather((group.host, cores))
    if group.size > 1:
        with contextlib.suppress(UsageError):  # the environment allows fewer: then those work
            runtime.set_threads(max(1, len(cores) // everybody.count((group.host, cores))))


# ---- what lies where


def plan(conversion: Conversion) -> list[File]:
    """Return the files to write.

    Raises:
        ModelError: a tensor is missing, of another shape, or cannot be read.
    """
    groups: list[list[Entry]] = []
    room = 0
    for entry in _entries(conversion):
        if not groups or entry.size > room:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(entry)
        room -= entry.size
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    formats = conversion.formats
    metadata = {**format_metadata(formats), LAYOUT_KEY: LAYOUT, LINEAGE_KEY: conversion.source.lineage(formats)}
    for name, part in conversion.parts.items():
        if part.kind == "table":
            metadata |= table_metadata(conversion.source[origin(conversion.source, name)].dtype)
    return [lay_out(name, aligned(group), metadata) for name, group in zip(names, groups, strict=True)]


def _entries(conversion: Conversion) -> Iterator[Entry]:
    """Yield every tensor to write, with its origin in the source."""
    source = conversion.source
    for name, part in conversion.parts.items():
        tensor = source[origin(source, name)]
        check_shape(tensor, part.shape)
        if part.kind == "table":
            entries = [table_entry(name, tensor.dtype, part.shape)]
        elif part.kind == "matrix":
            entries = [*matrix_entries(name, part.shape, part.ranges, conversion.formats[name])]
        else:
            entries = [vector_entry(name, part.shape, part.ranges)]
        for entry in entries:
            yield replace(entry, origin=origin(source, name))


# ---- writing


def _write_all(
    source: WeightSource,
    files: list[File],
    partial: Partial,
    group: TensorParallelGroup,
    show_progress: bool,
) -> None:
    """Write the files, one a rank and turn; after each turn the ranks agree on whether to go on."""

    def work() -> Iterator[int]:
        for turn in range(0, len(files), group.size):
            with group.together(), told(partial.destination):
                for file in files[turn + group.rank : turn + group.size : group.size]:
                    yield from _write(source, file, partial.path)

    total = sum(file.size - len(file.header) for file in files[group.rank :: group.size])
    for _ in progress_bytes(work(), "converting", show_progress and group.is_root, total):
        pass


def _write(source: WeightSource, file: File, folder: Path) -> Iterator[int]:
    """Write one file to the disk, yielding the bytes of each piece.

    Plainly, not through a map: a disk that fills up is then an error, not a signal that kills the process.
    """
    with (folder / file.name).open("xb") as out:
        out.write(file.header)
        for entry in file.entries:
            for piece in entry.pieces(PIECE_BYTES):
                yield out.write(read_piece(source, entry, piece).data)
        sync(out)
