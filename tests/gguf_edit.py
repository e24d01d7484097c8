"""GGUF files taken apart and put together again, so that tests can write what no writer would."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

STRING, LIST = 8, 9
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = {
    "U8": 0, "I8": 1, "U16": 2, "I16": 3, "U32": 4, "I32": 5, "F32": 6, "BOOL": 7, "U64": 10, "I64": 11, "F64": 12,
}  # fmt: skip


@dataclass
class Value:
    """A value of a key.

    Attributes:
        value: a number, bytes, or a list of either. element: a list's type. count: the length to write, if another.
    """

    kind: int
    value: Any
    element: int = 0
    count: int | None = None


@dataclass
class Entry:
    """A tensor: dims as the file has them, columns first. start: where it says that its data begin; None: rightly."""

    name: bytes
    dims: list[int]
    kind: int
    data: bytes
    start: int | None = None


@dataclass
class Document:
    """A file's parts, in its order; places: where, in what was read, numbers lie: (byte, struct's code)."""

    keys: dict[bytes, Value] = field(default_factory=dict)
    tensors: list[Entry] = field(default_factory=list)
    places: list[tuple[int, str]] = field(default_factory=list)
    alignment: int = 32

    def tensor(self, name: str) -> Entry:
        """Return a tensor."""
        return next(each for each in self.tensors if each.name == name.encode())


def number(kind: str, value: Any) -> Value:
    """Return a number of a type."""
    return Value(NUMBERS[kind], value)


def text(value: str | bytes) -> Value:
    """Return a string."""
    return Value(STRING, value if isinstance(value, bytes) else value.encode())


def numbers(kind: str, values: Any) -> Value:
    """Return a list of numbers."""
    return Value(LIST, list(values), NUMBERS[kind])


def texts(values: Any) -> Value:
    """Return a list of strings."""
    return Value(LIST, [each if isinstance(each, bytes) else each.encode() for each in values], STRING)


class _Parser:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.places = data, 0, list[tuple[int, str]]()

    def number(self, code: str, keep: bool = True) -> Any:
        if keep:
            self.places.append((self.at, code))
        (found,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return found

    def text(self) -> bytes:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at]

    def value(self, kind: int) -> Value:
        if kind == STRING:
            return Value(kind, self.text())
        if kind != LIST:
            return Value(kind, self.number(CODES[kind]))
        element, count = self.number("I"), self.number("Q")
        if element == STRING:
            return Value(kind, [self.text() for _ in range(count)], element)
        return Value(kind, [self.number(CODES[element], False) for _ in range(count)], element)


def parse(data: bytes) -> Document:
    """Take a good file apart."""
    p = _Parser(data)
    p.at = 4
    p.number("I")
    tensors, keys = p.number("Q"), p.number("Q")
    document = Document(places=p.places)
    for _ in range(keys):
        key = p.text()
        document.keys[key] = p.value(p.number("I"))
    entries: list[tuple[bytes, list[int], int, int]] = []
    for _ in range(tensors):
        name, dims = p.text(), p.number("I")
        entries.append((name, [p.number("Q") for _ in range(dims)], p.number("I"), p.number("Q")))
    start = -(-p.at // document.alignment) * document.alignment
    for name, shape, kind, at in entries:
        columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        end = start + at + math.prod(shape) // columns * size
        document.tensors.append(Entry(name, shape, kind, data[start + at : end]))
    return document


def _string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _value(v: Value) -> bytes:
    if v.kind == STRING:
        return _string(v.value)
    if v.kind != LIST:
        return struct.pack("<" + CODES.get(v.kind, "I"), v.value)
    start = struct.pack("<IQ", v.element, len(v.value) if v.count is None else v.count)
    if v.element == STRING:
        return start + b"".join(map(_string, v.value))
    return start + struct.pack(f"<{len(v.value)}{CODES[v.element]}", *v.value)


def build(document: Document) -> bytes:
    """Return the bytes of a file."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(document.tensors), len(document.keys))]
    parts += [_string(key) + struct.pack("<I", v.kind) + _value(v) for key, v in document.keys.items()]
    at, alignment = 0, document.alignment
    for each in document.tensors:
        start = at if each.start is None else each.start
        at += -(-len(each.data) // alignment) * alignment
        shape = struct.pack(f"<I{len(each.dims)}Q", len(each.dims), *each.dims)
        parts.append(_string(each.name) + shape + struct.pack("<IQ", each.kind, start))
    header = b"".join(parts)
    padded = [header, *(each.data for each in document.tensors)]
    return b"".join(part + bytes(-len(part) % alignment) for part in padded)


def edit(path: Path, **keys: Value | None) -> Document:
    """Return a file taken apart, with keys put in, or left out where they are None; __ stands for a dot."""
    document = parse(path.read_bytes())
    for name, value in keys.items():
        document.keys.pop(name.replace("__", ".").encode(), None)
        if value is not None:
            document.keys[name.replace("__", ".").encode()] = value
    return document
