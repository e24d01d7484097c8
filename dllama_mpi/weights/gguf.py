"""The container of GGUF files: metadata and tensors, mapped, every number in it checked before it is used.

The format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3. It is read by hand: rows are cut where they lie,
and a file may come from anyone. Lists are decoded when they are asked for: a vocabulary has some 300,000 strings.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from ..kernels.strings import join_strings, skip_strings
from .gguf_types import TYPES
from .mapped_file import MappedFile, TensorInfo

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_KEYS, _MOST_TENSORS, _MOST_NAME, _MOST_DIMS = 1 << 16, 1 << 17, 1 << 16, 4
_MOST_STRINGS = 1 << 22  # in one list: the largest vocabularies have a sixteenth of that
_LEAST_KEY, _LEAST_TENSOR = 13, 32  # bytes that one takes
_ALIGNMENT, _MOST_ALIGNMENT = 32, 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _LIST = 8, 9
_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class _List:
    """A list in a file that nobody has asked for yet; kind: of its elements. start, end: of those in the file."""

    kind: int
    count: int
    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """What a file says beside its tensors: numbers, truth values, strings; lists as numpy arrays, or of strings.

    A string that is no UTF-8 has marks of replacement where it is none.
    """

    def __init__(self, data: np.ndarray) -> None:
        self._data = data
        self._found: dict[str, Any] = {}
        self._kinds: dict[str, int] = {}

    def put(self, key: str, value: Any, kind: int) -> None:
        """Take a value, or where a list lies, and the number of its type."""
        self._found[key], self._kinds[key] = value, kind

    def kind(self, key: str) -> tuple[int, int | None]:
        """Return the number of a value's type, and of a list that of its elements' type."""
        value = self._found[key]
        return self._kinds[key], value.kind if isinstance(value, _List) else None

    def __getitem__(self, key: str) -> Any:
        value = self._found[key]
        if not isinstance(value, _List):
            return value
        if value.kind == _STRING:
            return self._strings(value)
        kind = np.dtype("bool" if value.kind == 7 else "<" + _SCALARS[value.kind])
        return np.frombuffer(self._data, kind, value.count, value.start).copy()

    def _strings(self, where: _List) -> list[str]:
        joined = np.empty(where.end - where.start, np.uint8)  # a zero for each length of 8 bytes
        size = int(join_strings(self._data, where.start, where.count, joined))
        if size >= 0:
            return joined[:size].tobytes().decode("utf-8", "replace").split("\0")[:-1]
        found, view, at = [], self._data.data, where.start
        for _ in range(where.count):
            (length,) = struct.unpack_from("<Q", view, at)
            found.append(str(view[at + 8 : at + 8 + length], "utf-8", "replace"))
            at += 8 + length
        return found

    def count(self, key: str) -> int | None:
        """Return how many elements a list has; None where there is no such list."""
        value = self._found.get(key)
        return value.count if isinstance(value, _List) else None

    def whole(self, key: str, default: int) -> int:
        """Return a whole number, the default where there is none; -1 for a value of another type."""
        value = self._found.get(key, default)
        return value if type(value) is int else -1

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class _Reader:
    """Reads one number after another, none beyond the end."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data, 0

    def error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}; truncated, corrupt or no GGUF file: get it again")

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if self.at + size > self.data.size:
            raise self.error(f"ends within its header, at byte {self.data.size}")
        (value,) = struct.unpack_from("<" + code, self.data.data, self.at)
        self.at += size
        return value

    def text(self, what: str, most: int | None = None) -> str:
        length = self.number("Q")
        if length > (self.data.size - self.at if most is None else most) or length > self.data.size - self.at:
            raise self.error(f"{what} has {length} bytes")
        value = self.data[self.at : self.at + length].tobytes().decode("utf-8", "replace")
        self.at += length
        return value

    def name(self, what: str) -> str:
        """Return a text that messages may have in their one line."""
        found = self.text(what, _MOST_NAME)
        if not found.isprintable():
            raise self.error(f"{what} is {ascii(found)[:80]}")
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(f"metadata {key}")
        if kind == _LIST:
            return self._list(key)
        if kind not in _SCALARS:
            raise self.error(f"metadata {key} is of an unknown type, {kind}")
        return self.number(_SCALARS[kind])

    def _list(self, key: str) -> _List:
        kind, count, rest = self.number("I"), self.number("Q"), self.data.size - self.at
        if kind == _STRING:
            if count > min(_MOST_STRINGS, rest // 8):
                raise self.error(f"metadata {key} has {count} strings")
            end = int(skip_strings(self.data, self.at, count))
            if end < 0:
                raise self.error(f"metadata {key} has a string that goes beyond the file's end")
        elif kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            if count > rest // size:
                raise self.error(f"metadata {key} has {count} numbers")
            end = self.at + size * count
        else:
            raise self.error(f"metadata {key} is a list of an unknown type, {kind}")
        found, self.at = _List(kind, count, self.at, end), end
        return found


class GgufFile(MappedFile):
    """One file.

    Attributes:
        metadata: what it says beside its tensors.
    """

    def __init__(self, path: Path, number: int = 0) -> None:
        """Map a file and check what it says; number: which of a split set.

        Raises:
            ModelError: it cannot be read, or something in it cannot be.
        """
        super().__init__(path)
        self._number = number
        self.metadata = Metadata(self.data)
        reader = _Reader(path, self.data)
        tensors, keys = self._read_start(reader)
        self._read_metadata(reader, keys)
        self._end_of_keys = reader.at
        self.tensors = self._read_tensors(reader, tensors)

    def _read_start(self, reader: _Reader) -> tuple[int, int]:
        """Return the numbers of tensors and of keys."""
        if self.data[:4].tobytes() != MAGIC:
            raise ModelError(f"{self.path}: not a GGUF file (it does not begin with GGUF)")
        reader.at = 4
        version = reader.number("I")
        if version & 0xFFFF == 0:
            raise ModelError(f"{self.path}: a GGUF file for big-endian machines; get the little-endian one")
        if version not in _VERSIONS:
            raise ModelError(
                f"{self.path}: GGUF version {version}; versions {_VERSIONS[0]} and {_VERSIONS[1]} can be read"
            )
        tensors, keys = reader.number("Q"), reader.number("Q")
        rest = self.data.size - reader.at
        if tensors > min(_MOST_TENSORS, rest // _LEAST_TENSOR):
            raise reader.error(f"tells of {tensors} tensors")
        if keys > min(_MOST_KEYS, rest // _LEAST_KEY):
            raise reader.error(f"tells of {keys} keys")
        return tensors, keys

    def _read_metadata(self, reader: _Reader, count: int) -> None:
        for _ in range(count):
            key = reader.name("a key")
            if key in self.metadata:
                raise reader.error(f"metadata {key[:80]} is there twice")
            kind = reader.number("I")
            self.metadata.put(key, reader.value(kind, key[:80]), kind)

    def _alignment(self, reader: _Reader) -> int:
        value = self.metadata.get("general.alignment", _ALIGNMENT)
        good = isinstance(value, int) and not isinstance(value, bool) and 8 <= value <= _MOST_ALIGNMENT
        if not good or value & (value - 1):
            raise reader.error(
                f"general.alignment is {str(value)[:40]}, not a power of two from 8 to {_MOST_ALIGNMENT}"
            )
        return int(value)

    def _read_tensors(self, reader: _Reader, count: int) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for _ in range(count):
            info = self._read_tensor(reader)
            if info.name in found:
                raise reader.error(f"tensor {info.name} is there twice")
            found[info.name] = info
        alignment = self._alignment(reader)
        self.header = min(-(-reader.at // alignment) * alignment, self.data.size)
        room, end, before = self.data.size - self.header, 0, ""
        for info in sorted(found.values(), key=lambda each: each.start):
            if info.start % alignment:
                raise reader.error(f"tensor {info.name} begins at {info.start}, not a multiple of {alignment}")
            if info.start < end:
                raise reader.error(f"tensors {before} and {info.name} overlap")
            end, before = info.start + info.size, info.name
            if end > room:
                raise reader.error(f"tensor {info.name} ends at byte {self.header + end} of {self.data.size}")
        return {
            name: TensorInfo(name, info.type, info.shape, self.header + info.start, info.size, self._number)
            for name, info in found.items()
        }

    def _read_tensor(self, reader: _Reader) -> TensorInfo:
        """Return a tensor whose start is still that in the data."""
        name = reader.name("a tensor's name")
        shown, dims = name[:80], reader.number("I")
        if not 1 <= dims <= _MOST_DIMS:
            raise reader.error(f"tensor {shown} has {dims} dimensions")
        shape = tuple(reversed([reader.number("Q") for _ in range(dims)]))
        number, start = reader.number("I"), reader.number("Q")
        if number not in TYPES:
            known = ", ".join(kind.name for kind in TYPES.values())
            raise ModelError(f"{self.path}: tensor {shown} is of type {number}, which is not known; known are {known}")
        kind, elements = TYPES[number], 1
        for size in shape:
            elements *= size
            if not size or elements > 8 * self.data.size:  # no type has less than a bit
                raise reader.error(f"tensor {shown} has the shape {list(shape)}")
        if shape[-1] % kind.columns:
            raise reader.error(f"tensor {shown} has {shape[-1]} columns, and {kind.name} blocks of {kind.columns}")
        return TensorInfo(name, kind, shape, start, elements // kind.columns * kind.size)

    def without_tensors(self) -> bytes:
        """Return a GGUF file of the metadata alone."""
        return self.data[:8].tobytes() + bytes(8) + self.data[16 : self._end_of_keys].tobytes()


class GgufModel:
    """A model's files: one, or all of a split set.

    Attributes:
        path: the first. metadata: the first's. tensors: of all.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, and those that belong to it.

        Raises:
            ModelError: one is missing, cannot be read, or does not belong to the others.
        """
        paths = split_set(path)
        self.path = paths[0]
        self.files = [GgufFile(each, number) for number, each in enumerate(paths)]
        self.metadata = self.files[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for number, file in enumerate(self.files):
            said = file.metadata.whole("split.no", 0), file.metadata.whole("split.count", 1) or 1
            if said != (number, len(self.files)):
                raise ModelError(
                    f"{file.path}: says that it is file {said[0]} of {said[1]}, counted from 0, and"
                    f" lies as {number} of {len(self.files)}; get the whole set, under its own names"
                )
            twice = next((name for name in file.tensors if name in self.tensors), None)
            if twice is not None:
                raise ModelError(f"{file.path}: tensor {twice[:80]} is in two files of the set; get it again")
            self.tensors |= file.tensors
        wanted = self.metadata.whole("split.tensors.count", len(self.tensors))
        if wanted != len(self.tensors):
            raise ModelError(f"{self.path}: the set has {len(self.tensors)} tensors and says {wanted}; get it again")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.data.size for file in self.files)

    def fingerprint(self) -> str:
        """Return a digest of sizes, headers and samples of all tensors."""
        digest = hashlib.sha256()
        for file in self.files:
            file.sample(digest)
        return digest.hexdigest()


def split_set(path: Path) -> list[Path]:
    """Return the files of the set that a file belongs to, by its name; the file alone if it belongs to none."""
    named = _SPLIT.match(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    found = [path.with_name(f"{named['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = next((each for each in found if not each.is_file()), None)
    if missing is not None or not found:
        raise ModelError(f"{path}: one of {count} files, and {(missing or path).name} is missing beside it")
    return found


def gguf_in(path: Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only one, or only set, in a folder; None if there is none.

    Raises:
        ModelError: there are several.
    """
    if path.is_file():
        try:
            with path.open("rb") as file:
                return path if path.suffix == ".gguf" or file.read(4) == MAGIC else None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error}") from None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(each for each in path.glob("*.gguf") if not each.name.startswith("mmproj"))  # of images
    sets = {(named["stem"] if (named := _SPLIT.match(each.name)) else each.name): each for each in reversed(files)}
    if len(sets) > 1:
        raise ModelError(
            f"{path} holds {len(sets)} GGUF models; name one: {', '.join(sorted(e.name for e in sets.values())[:3])}"
        )
    return next(iter(sets.values()), None)
