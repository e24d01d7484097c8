"""The container of GGUF files: what is read of good files, and that bad ones are refused in one line."""

from __future__ import annotations

import math
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.weights.gguf import GgufFile, GgufModel, gguf_in, split_set
from tests.gguf_edit import Value, build, number, numbers, parse, text
from tests.tiers import slow

WORDS = ["a", "", "Ġé", "日本", "x" * 300]


def write(path: Path, **more: object) -> Path:
    """Write a file with values of every kind and three tensors."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint32("llama.block_count", 3)
    w.add_float32("llama.number", 0.5)
    w.add_bool("llama.flag", True)
    w.add_int64("llama.large", -(2**40))
    w.add_string("llama.text", "é\n")
    w.add_array("llama.words", WORDS)
    w.add_array("llama.numbers", [1, 2, 3])
    w.add_array("llama.floats", [0.5, -1.0])
    for key, value in more.items():
        w.add_uint32(key, int(str(value)))
    rng = np.random.default_rng(0)
    w.add_tensor("one", rng.standard_normal(7).astype(np.float32))
    w.add_tensor("two", rng.standard_normal((3, 4)).astype(np.float16))
    values = rng.standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    w.add_tensor("three", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    return path


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    """Return the bytes of a good file."""
    return write(tmp_path / "good.gguf").read_bytes()


def test_metadata_and_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    file, other = GgufFile(path), gguf.GGUFReader(path)
    found = file.metadata
    assert found["llama.block_count"] == 3
    assert found["llama.number"] == 0.5
    assert found["llama.flag"] is True
    assert found["llama.large"] == -(2**40)
    assert found["llama.text"] == "é\n"
    assert found["llama.words"] == WORDS
    assert found["llama.numbers"].tolist() == [1, 2, 3]
    assert found["llama.floats"].tolist() == [0.5, -1.0]
    assert found.count("llama.words") == len(WORDS)
    for tensor in other.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.start, info.size, info.type.name) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name)
        assert file.bytes_of(info).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["a\0b", "c", "\0"], ["a\0b", "c", "\0"]),
        ([b"caf\xc3", b"\xa9 \xff", b""], ["caf\ufffd", "\ufffd \ufffd", ""]),
        ([b"\xf0\x9f", b"x"], ["\ufffd", "x"]),
    ],
)
def test_odd_strings(tmp_path: Path, words: list[str | bytes], read: list[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("words", words)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        step()
    assert GgufFile(tmp_path / "a.gguf").metadata["words"] == read


def test_metadata_alone(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").write_bytes(file.without_tensors())
    again = GgufFile(tmp_path / "b.gguf")
    assert {key: str(value) for key, value in again.metadata.items()} == {k: str(v) for k, v in file.metadata.items()}
    assert not again.tensors


def put(at: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Return what replaces a number."""
    return lambda data: data[:at] + struct.pack("<" + code, value) + data[at + struct.calcsize(code) :]


def after(what: bytes, skip: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Return what replaces a number that comes so many bytes after some text."""
    return lambda data: put(data.index(what) + len(what) + skip, code, value)(data)


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a GGUF file"),
    "another magic": (lambda data: b"GGML" + data[4:], "not a GGUF file"),
    "version 1": (put(4, "I", 1), "GGUF version 1"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
    "tensors": (put(8, "Q", 2**63), "tells of 9223372036854775808 tensors"),
    "keys": (put(16, "Q", 2**63), "tells of 9223372036854775808 keys"),
    "a key of 4 GB": (put(24, "Q", 1 << 32), "a key has 4294967296 bytes"),
    "a text of 4 GB": (after(b"llama.text", 4, "Q", 1 << 32), "metadata llama.text has 4294967296 bytes"),
    "strings": (after(b"llama.words", 8, "Q", 2**63), "metadata llama.words has 9223372036854775808 strings"),
    "a string": (after(b"llama.words", 16, "Q", 2**64 - 1), "llama.words has a string that goes beyond"),
    "numbers": (after(b"llama.numbers", 8, "Q", 2**61), "metadata llama.numbers has 2305843009213693952 numbers"),
    "a type of value": (after(b"llama.flag", 0, "I", 13), "metadata llama.flag is of an unknown type, 13"),
    "lists of lists": (after(b"llama.words", 4, "I", 9), "llama.words is a list of an unknown type, 9"),
    "a key twice": (lambda data: data.replace(b"llama.large", b"llama.words"), "metadata llama.words is there twice"),
    "dimensions": (after(b"three", 0, "I", 5), "tensor three has 5 dimensions"),
    "a shape": (after(b"three", 4, "Q", 2**63), r"tensor three has the shape \[4, 9223372036854775808\]"),
    "no rows": (after(b"three", 12, "Q", 0), r"tensor three has the shape \[0, 64\]"),
    "half a block": (after(b"three", 4, "Q", 48), "tensor three has 48 columns, and Q8_0 blocks of 32"),
    "a type": (after(b"three", 20, "I", 99), "tensor three is of type 99, which is not known; known are F32"),
    "an offset": (after(b"three", 24, "Q", 1), "tensor three begins at 1, not a multiple of 32"),
    "overlap": (after(b"three", 24, "Q", 32), "tensors two and three overlap"),
    "beyond": (after(b"three", 24, "Q", 1 << 40), "tensor three ends at byte"),
    "truncated": (lambda data: data[:-100], "tensor three ends at byte"),
    "half a header": (lambda data: data[:200], "truncated, corrupt or no GGUF file"),
    "a name twice": (lambda data: data.replace(b"one", b"two"), "tensor two is there twice"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_in_one_line(what: str, good: bytes, tmp_path: Path) -> None:
    change, message = BAD[what]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(good))
    with pytest.raises(ModelError, match=message) as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("alignment", [0, 3, 1 << 30])
def test_alignment_that_cannot_be(alignment: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", **{"llama.alignment_x": alignment})
    path.write_bytes(path.read_bytes().replace(b"llama.alignment_x", b"general.alignment"))
    with pytest.raises(ModelError, match=r"general\.alignment is"):
        GgufFile(path)


EXTREMES = (0, 1, 7, 8, 9, 31, 33, 2**16, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**63, 2**64 - 1)


def mutated(data: bytes, rng: random.Random, places: list[tuple[int, str]]) -> bytes:
    """Return bytes with some changed, taken out, put in, swapped, or cut off, in the header most of all.

    places: of numbers, which become extreme ones, with struct's codes.
    """
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(len(found), 900 if rng.random() < 0.7 else len(found))))
        extreme = rng.choice([*EXTREMES, rng.randrange(2**64), len(data)])
        kind = rng.randrange(8)
        if kind == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            found[at : at + 8] = struct.pack("<Q", extreme)
        elif kind == 2:
            del found[at : at + rng.randint(1, 40)]
        elif kind == 3:
            found[at:at] = rng.randbytes(rng.randint(1, 40))
        elif kind == 4:
            found[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in found[at : at + 1])
        elif kind == 5:
            size, other = rng.randint(1, 40), rng.randrange(max(1, len(found)))
            first, second = sorted((at, other))
            if second - first >= size and second + size <= len(found):
                one, two = found[first : first + size], found[second : second + size]
                found[first : first + size], found[second : second + size] = two, one
        elif kind == 6 and rng.random() < 0.3:
            del found[rng.randrange(len(found) + 1) :]
        else:
            place, code = rng.choice(places)
            size = struct.calcsize("<" + code)
            found[place : place + size] = (extreme % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(found)


@pytest.mark.parametrize(("count", "seed"), [(2000, 0), slow(10_000, 1)])
def test_mutations_are_read_or_refused(count: int, seed: int, good: bytes, tmp_path: Path) -> None:
    """Nothing but a ModelError comes of a damaged file, and what it takes is not beyond what its bytes may need."""
    rng, path, refused, read = random.Random(seed), tmp_path / "mutated.gguf", list[str](), 0
    places = parse(good).places
    dict(GgufModel(write(path)).metadata)  # compiles
    tracemalloc.start()
    try:
        for _ in range(count):
            path.write_bytes(mutated(good, rng, places))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                model = GgufModel(path)
                for key in model.metadata:
                    model.metadata[key]
                for info in model.tensors.values():
                    assert model.files[0].bytes_of(info).size == info.size
                read += 1
            except ModelError as error:
                refused.append(str(error))
            assert tracemalloc.get_traced_memory()[1] - before < 64_000  # a file of 1.2 kB has some 12 kB of objects
    finally:
        tracemalloc.stop()
    assert min(read, len(refused)) > count // 50
    assert all(each.isprintable() and len(each) < 600 for each in refused)


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
@pytest.mark.parametrize("value", [text("x"), numbers("U32", [0, 1]), number("F32", math.nan), number("BOOL", True)])
def test_split_keys_of_another_type(key: str, value: Value, good: bytes, tmp_path: Path) -> None:
    document = parse(good)
    document.keys[key.encode()] = value
    path = tmp_path / "a.gguf"
    path.write_bytes(build(document))
    with pytest.raises(ModelError, match=r"get (it again|the whole set)"):
        GgufModel(path)


def test_split_sets(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for i, path in enumerate(paths):
        w = gguf.GGUFWriter(path, "llama")
        w.add_uint16("split.no", i)
        w.add_uint16("split.count", 2)
        w.add_int32("split.tensors.count", 2)
        w.add_tensor(f"t{i}", np.full(4, i, np.float32))
        for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
            step()
    assert split_set(paths[1]) == paths
    assert gguf_in(tmp_path) == paths[0]
    model = GgufModel(paths[0])
    assert {name: info.file for name, info in model.tensors.items()} == {"t0": 0, "t1": 1}
    renamed = tmp_path / "alone.gguf"
    renamed.write_bytes(paths[1].read_bytes())
    with pytest.raises(ModelError, match="file 1 of 2"):
        GgufModel(renamed)
    with pytest.raises(ModelError, match="holds 2 GGUF models"):
        gguf_in(tmp_path)
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-00002\.gguf is missing"):
        GgufModel(paths[0])
