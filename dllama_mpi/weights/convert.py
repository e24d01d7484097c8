"""Writing a model directory whose matrices are tiles, ready to be mapped and cut as they lie.

The new files hold Hugging Face's tensor names: matrices as U8 tiles (`kernels.layout`), the embedding table, norms
and biases as the source has them. A tied model also gets its lm_head as tiles, as rows of the table are looked up in
the file and products need tiles. Which tensor lies where depends on the model and the format alone, so the bytes are
the same at any number of ranks.

Everything is written into DST.partial and renamed to DST when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import numpy as np

from ..errors import ClusterError, ModelError, UsageError
from ..kernels import runtime
from ..kernels.layout import FORMATS, ROWS, TileFormat
from ..log import progress
from ..parallel.group import TensorParallelGroup
from .checkpoint import LAYOUT, LAYOUT_KEY, TILES_KEY, Checkpoint
from .tiles import check_shape, load_matrix

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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

_FILE_BYTES = 1 << 30  # a file is closed before it grows past this; one larger tensor makes a larger file
_PIECE_BYTES = 16 << 20  # float32 rows, or bytes of another tensor, that are handled at once
_ALIGNMENT = 64  # of tiles in a file: one AVX-512 register, one cache line
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_MARKER = ".converting"  # marks a DST.partial as ours and holds the token of the run that writes it
_SECONDS_TO_APPEAR = 3.0  # a shared folder may show other hosts a new file a little later


def convert(
    source: Checkpoint,
    destination: Path,
    fmt: TileFormat,
    matrices: Mapping[str, tuple[int, int]],
    vectors: Mapping[str, int],
    tied: bool,
    group: TensorParallelGroup,
    show_progress: bool,
) -> None:
    """Write `source` as the model directory `destination` with matrices in `fmt`. Collective.

    Each rank writes whole files in turn, some 16 MB at a time. A source that is converted already is converted
    again from the values it holds.

    Args:
        destination: must not exist, or be empty; folders above it are made. The same folder on every rank.
        matrices: (rows, cols) of the tensors that become tiles, the lm_head among them.
        vectors: sizes of the norms and biases.
        tied: whether the embedding table and the lm_head stand in for each other where one is missing.
        show_progress: draw a bar on the root's stderr, if that is a terminal.

    Raises:
        UsageError: the destination is in use, lies in the source, or cannot hold the files.
        ModelError: a tensor is missing, of another shape than `matrices` and `vectors` say, or cannot be read.
        ClusterError: a rank has another source, or does not see the destination.
    """
    destination = Path(os.path.realpath(destination))
    partial = _Partial(destination)
    with group.together(), _told(destination):
        _check_destination(Path(os.path.realpath(source.folder)), destination)
        files = plan(source, fmt, matrices, vectors, tied)
    _compare(source, files, group)
    _share_cores(group)
    with group.together(), _told(destination):
        if group.is_root:
            partial.create(sum(file.size for file in files))
    partial.token = group.broadcast(partial.token)
    try:
        with group.together():
            partial.check_visible()
        _write_all(source, fmt, files, partial, group, show_progress)
        with group.together(), _told(destination):
            if group.is_root:
                partial.finish(source.folder, files)
    except BaseException as error:
        agreed = getattr(error, "agreed", False)  # then no rank writes any more
        if group.is_root or not agreed:
            partial.remove(whole=agreed or group.size == 1)
        raise


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f" ({error.filename})"
        raise UsageError(
            f"converting to {folder} failed: {error.strerror or error}{where}; mend that, or give another folder"
        ) from None


def _check_destination(source: Path, destination: Path) -> None:
    """Raise a UsageError unless `destination` is free and apart from `source`; both real paths."""
    if destination == source:
        raise UsageError(f"{destination} is the source itself; give another folder to write")
    for path in (destination, _partial_path(destination)):
        if path.is_relative_to(source):
            raise UsageError(f"{path} would lie in the source {source}; give a folder outside of it")
    if destination.is_dir():
        if os.path.ismount(destination):
            raise UsageError(f"{destination} is a mount point; give a folder inside of it")
        if any(destination.iterdir()):
            raise UsageError(f"{destination} exists and is not empty; remove it or give another folder")
    elif destination.exists():
        raise UsageError(f"{destination} exists and is not a folder; remove it or give another")


def _compare(source: Checkpoint, files: list[File], group: TensorParallelGroup) -> None:
    """Raise a ClusterError on all ranks unless they read the same files and mean to write the same."""
    seen = group.allgather((source.fingerprint(), hashlib.sha256(b"".join(f.header for f in files)).hexdigest()))
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


@dataclass(frozen=True)
class Entry:
    """A tensor of a new file.

    Attributes:
        origin: its name in the source; "" for padding.
        dtype, shape: as in the file. matrix: the (rows, cols) of a matrix that becomes tiles.
    """

    name: str
    origin: str
    dtype: str
    shape: tuple[int, ...]
    matrix: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    def pieces(self) -> list[tuple[int, int]]:
        """Return the ranges it is written by: of rows for a matrix, of bytes for anything else."""
        end, step = self.size, _PIECE_BYTES
        if self.matrix is not None:
            end, step = self.matrix[0], max(1, _PIECE_BYTES // (4 * self.matrix[1]) // ROWS) * ROWS
        return [(start, min(start + step, end)) for start in range(0, end, step)]


@dataclass(frozen=True)
class File:
    """A safetensors file to write: its entries in the order of their bytes, and the header that says so."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


def plan(
    source: Checkpoint, fmt: TileFormat, matrices: Mapping[str, tuple[int, int]], vectors: Mapping[str, int], tied: bool
) -> list[File]:
    """Return the files to write; see `convert` for the arguments.

    Raises:
        ModelError: a tensor is missing, of another shape, or cannot be read.
    """
    groups: list[list[Entry]] = []
    room = 0
    for entry in _entries(source, fmt, matrices, vectors, tied):
        if not groups or entry.size > room:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(entry)
        room -= entry.size
    if len(groups) == 1:
        return [_file("model.safetensors", groups[0], fmt)]
    count = len(groups)
    return [_file(f"model-{i:05d}-of-{count:05d}.safetensors", group, fmt) for i, group in enumerate(groups, 1)]


def _entries(
    source: Checkpoint, fmt: TileFormat, matrices: Mapping[str, tuple[int, int]], vectors: Mapping[str, int], tied: bool
) -> Iterator[Entry]:
    """Yield every tensor to write: the table, the vectors, the matrices."""
    held = FORMATS.get(source.format_name or "")
    stand_in = {TABLE: HEAD, HEAD: TABLE} if tied else {}

    def origin(name: str) -> str:
        return name if name in source else stand_in.get(name, name)

    plain: dict[str, tuple[int, ...]] = {TABLE: matrices[HEAD], **{name: (size,) for name, size in vectors.items()}}
    for name, shape in plain.items():
        tensor = source[origin(name)]
        check_shape(tensor, shape, None)
        yield Entry(name, tensor.name, tensor.dtype, shape)
    for name, matrix in matrices.items():
        tensor = source[origin(name)]
        check_shape(tensor, matrix, held)
        yield Entry(name, tensor.name, "U8", fmt.shape(*matrix), matrix)


def _file(name: str, entries: Iterable[Entry], fmt: TileFormat) -> File:
    """Return a file of these entries in which each tensor of tiles begins at a multiple of 64 bytes.

    Tiles come first, and of them those of an even number, as a tile is a multiple of 32 bytes. A file may have no
    holes, so an odd number of tiles is followed by a tensor of padding. Wider numbers come before narrower ones,
    which aligns those too.
    """

    def order(entry: Entry) -> tuple[bool, int]:
        return entry.matrix is None, entry.size % _ALIGNMENT if entry.matrix else -_ITEM_BYTES[entry.dtype]

    laid: list[Entry] = []
    header: dict[str, object] = {"__metadata__": {TILES_KEY: fmt.name, LAYOUT_KEY: LAYOUT}}
    end = 0
    for entry in sorted(entries, key=order):
        parts = [entry]
        if entry.matrix is not None and end % _ALIGNMENT:
            parts = [Entry(f"padding.{len(laid)}", "", "U8", (-end % _ALIGNMENT,)), entry]
        for part in parts:
            offsets = [end, end + part.size]
            header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": offsets}
            laid.append(part)
            end += part.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return File(name, struct.pack("<Q", len(text)) + text, tuple(laid))


# ---- writing


def _write_all(
    source: Checkpoint,
    fmt: TileFormat,
    files: list[File],
    partial: _Partial,
    group: TensorParallelGroup,
    show_progress: bool,
) -> None:
    """Write the files, one a rank and turn; after each turn the ranks agree on whether to go on."""

    def work() -> Iterator[None]:
        for turn in range(0, len(files), group.size):
            with group.together(), _told(partial.destination):
                for file in files[turn + group.rank : turn + group.size : group.size]:
                    yield from _write(source, fmt, file, partial.path)

    total = sum(len(entry.pieces()) for file in files[group.rank :: group.size] for entry in file.entries)
    for _ in progress(work(), "converting", show_progress and group.is_root, total):
        pass


def _write(source: Checkpoint, fmt: TileFormat, file: File, folder: Path) -> Iterator[None]:
    """Write one file to the disk, yielding after each piece.

    Plainly, not through a map: a disk that fills up is then an error, not a signal that kills the process.
    """
    with (folder / file.name).open("xb") as out:
        out.write(file.header)
        for entry in file.entries:
            for part in entry.pieces():
                out.write(_bytes(source, fmt, entry, part))
                yield
        _sync(out)


def _bytes(source: Checkpoint, fmt: TileFormat, entry: Entry, part: tuple[int, int]) -> memoryview:
    """Return one of an entry's `pieces`."""
    if not entry.origin:
        return memoryview(bytes(part[1] - part[0]))
    if entry.matrix is None:
        return source[entry.origin].data.reshape(-1).view(np.uint8)[part[0] : part[1]].data
    return load_matrix(source, entry.origin, entry.matrix, part, (0, entry.matrix[1]), fmt).tiles.data


def _sync(file: BufferedWriter) -> None:
    """Wait until a file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where the file system offers that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _partial_path(destination: Path) -> Path:
    return destination.with_name(f"{destination.name}.partial")


class _Partial:
    """DST.partial, where a conversion lies until it is whole.

    Attributes:
        token: what the run's marker file holds; a rank that reads it there sees the root's folder.
    """

    def __init__(self, destination: Path) -> None:
        self.destination, self.path = destination, _partial_path(destination)
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
        _sync(self._lock)

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

    def finish(self, source: Path, files: list[File]) -> None:
        """Add the small files, config.json last, and give the folder its name. Root only.

        Raises:
            ClusterError: what the other ranks wrote is not here.
        """
        for file in files:
            path = self.path / file.name
            size = path.stat().st_size if path.is_file() else 0
            if size != file.size or not self._is_ours():
                raise ClusterError(f"{path} has {size} of {file.size} bytes; let one conversion at a time write there")
        for pattern in COMPANIONS:
            for path in sorted(source.glob(pattern)):
                if path.is_file():
                    self._add(path.name, path.read_bytes())
        if len(files) > 1:
            names = {entry.name: file.name for file in files for entry in file.entries}
            index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": names}
            self._add("model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())
        config = source / "config.json"
        if not config.is_file():
            raise ModelError(f"{source}: no config.json; give a model directory as Hugging Face lays it out")
        self._add("config.json", config.read_bytes())
        _sync_folder(self.path)
        self.path.rename(self.destination)
        with contextlib.suppress(OSError):  # the model is whole; the marker does no harm
            (self.destination / _MARKER).unlink()
        _sync_folder(self.destination)
        _sync_folder(self.destination.parent)
        self._unlock()

    def _add(self, name: str, content: bytes) -> None:
        with (self.path / name).open("xb") as out:
            out.write(content)
            _sync(out)

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
