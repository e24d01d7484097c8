"""A slice file gives what the whole model gives, of the parts it holds; damage is found; another part is refused."""

from __future__ import annotations

import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dllama_mpi.errors import ModelError
from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.model.build import RankWeights, load
from dllama_mpi.model.recipe import WeightRecipe, slice_parts, whole_parts
from dllama_mpi.model.tensors import TABLE
from dllama_mpi.startup.opening import open_model
from dllama_mpi.startup.shares import shards_of
from dllama_mpi.weights import slices as module
from dllama_mpi.weights.checkpoint import SCALES, Checkpoint
from dllama_mpi.weights.files import Entry, File
from dllama_mpi.weights.slice_tensors import DamagedSlice, SlicePart
from dllama_mpi.weights.slices import (
    CHECKSUMS,
    Manifest,
    Parts,
    SliceCheckpoint,
    SliceInMemory,
    SliceReader,
    slices_in,
)
from dllama_mpi.weights.source import WeightSource
from dllama_mpi.weights.tiles import TileMatrix, load_matrix, load_vector
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model
from tests.unit.conversions import convert_folder

SPLITS = ((1.0,), (1.0, 5.0, 2.0))
SHARES = (1.0, 5.0, 2.0)


def write(source: WeightSource, file: File, path: Path) -> SliceCheckpoint:
    """Write a slice file and open it."""
    reader = SliceReader(source, file)
    with path.open("wb") as out:
        out.write(file.header)
        for index in range(len(file.entries)):
            for _, _, data in reader.read(index):
                out.write(data.tobytes())
    assert path.stat().st_size == file.size
    return SliceCheckpoint(path)


def receive(source: WeightSource, file: File, manifest: Manifest, parts: Parts) -> WeightSource:
    """Return a slice in memory."""
    sink, reader = SliceInMemory(file, manifest, parts), SliceReader(source, file)
    for index in range(len(file.entries)):
        for entry, start, data in reader.read(index):
            sink.write(entry, start, data)
    return sink.finish()


def held(weights: RankWeights) -> dict[str, np.ndarray]:
    """Return every array of a rank's weights by name, row scales beside their matrices."""
    found: dict[str, np.ndarray] = {}
    for name, value in weights.held.items():
        if isinstance(value, TileMatrix):
            found |= {name: value.tiles, name + SCALES: value.row_scales}
        else:
            found[name] = value
    return found


class Made:
    """A model and slices of it: 3 ranks, the second one's."""

    def __init__(self, folder: Path, case: str = "llama3_gqa", weights: str = "q40") -> None:
        write_model(CASES[case], folder / "model")
        opened = open_model(str(folder / "model"))
        self.config, self.source = opened.config, opened.whole
        self.formats = WeightRecipe.parse(weights).formats(self.config)
        self.parts = slice_parts(self.config, shards_of(self.config, SHARES)[1])
        self.manifest = Manifest.of(self.source, self.formats, self.parts)
        self.file = self.manifest.file(self.parts, "rank 1 of 3")
        self.path = folder / "slice.safetensors"

    def write(self) -> SliceCheckpoint:
        """Write the file and open it."""
        return write(self.source, self.file, self.path)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Return a small model."""
    return Made(tmp_path)


# ---- what is held


RECIPES = ("f16", "f32", "q80", "q4m", "mxfp4", "q4m,lm_head=q80", "q80,down=q4m,attention=f16")


@pytest.mark.parametrize(
    ("case", "weights"),
    [*((case, "q40") for case in CASES), *(("qwen2", each) for each in RECIPES), ("llama_heads6", "q4m")],
)
def test_a_model_loads_the_same_from_its_slice(case: str, weights: str, tmp_path: Path) -> None:
    """The slice holds exactly what the layers ask for, whatever the architecture, the recipe and the split."""
    opened = open_model(str(write_model(CASES[case], tmp_path)))
    source, config = opened.whole, opened.config
    formats = WeightRecipe.parse(weights).formats(config)
    for split in SPLITS:
        for rank, shard in enumerate(shards_of(config, split)):
            loaded, parts = load(source, config, shard, formats), slice_parts(config, shard)
            expected = held(loaded)
            assert parts.keys() - {TABLE} == loaded.held.keys()
            assert len(expected) > 7 * len(config.layers)
            manifest = Manifest.of(source, formats, parts)
            file = manifest.file(parts, f"rank {rank}")
            on_disk, in_memory = write(source, file, tmp_path / "slice"), receive(source, file, manifest, parts)
            for found in (on_disk, in_memory):
                model = load(found, config, shard, formats)
                arrays = held(model)
                assert arrays.keys() == expected.keys()
                for name, array in expected.items():
                    assert (array.dtype, array.shape) == (arrays[name].dtype, arrays[name].shape), name
                    np.testing.assert_array_equal(array, arrays[name], name)
                everything = ((0, config.vocab_size), (0, config.hidden_size))
                np.testing.assert_array_equal(loaded.table.values(everything), model.table.values(everything))


def test_row_scales_are_those_of_whole_rows(tmp_path: Path) -> None:
    """Ranks that hold other columns of the same rows hold the same row scales, which no column of theirs may tell."""
    made = Made(tmp_path, "llama_heads6", "q4m")
    name, found = "model.layers.0.mlp.down_proj.weight", []
    whole = tuple((0, size) for size in made.parts[name].shape)
    expected = load_matrix(made.source[name], made.parts[name].shape, whole, FORMATS["q4m"]).row_scales
    for shard in shards_of(made.config, SHARES):
        parts = slice_parts(made.config, shard)
        file = made.manifest.file(parts, "a rank")
        (entry,) = (each for each in file.entries if each.name == name + SCALES)
        assert (entry.dtype, entry.format) == ("F32", FORMATS["q4m"])
        found.append(write(made.source, file, tmp_path / "each").raw(name + SCALES)[0].copy())
        assert parts[name].ranges[1] != whole[1]
    assert np.unique(expected).size > 1
    for scales in found:
        np.testing.assert_array_equal(scales, expected[0])


@pytest.mark.parametrize("case", ["llama3_gqa", "llama_heads6"])
@pytest.mark.parametrize("weights", ["q40", "q4m", "q4m,lm_head=q80"])
def test_a_slice_of_a_conversion_is_the_same_file(case: str, weights: str, tmp_path: Path) -> None:
    made = Made(tmp_path, case, weights)
    made.write()
    expected = made.path.read_bytes()
    convert_folder(tmp_path / "model", tmp_path / "converted" / "model", weights)
    converted = open_model(str(tmp_path / "converted" / "model")).whole
    manifest = Manifest.of(converted, made.formats, made.parts)
    assert manifest == made.manifest
    write(converted, manifest.file(made.parts, "rank 1 of 3"), made.path)
    assert made.path.read_bytes() == expected


@pytest.mark.parametrize("weights", ["q40", "q4m,lm_head=q80"])
def test_pieces_make_the_same_file(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path, weights=weights)
    made.write()
    whole = made.path.read_bytes()
    monkeypatch.setattr(module, "STREAM_BYTES", 3000)
    many = [len(entry.pieces(3000)) for entry in made.file.entries if entry.name != CHECKSUMS]
    assert max(many) > 3
    made.write()
    assert made.path.read_bytes() == whole


def test_a_slice_is_a_good_safetensors_file(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama_heads6", "q4m,lm_head=q80")  # F32, which the library's numpy can read
    made.write()
    found = load_file(made.path)
    assert sorted(found) == sorted(entry.name for entry in made.file.entries)
    np.testing.assert_array_equal(found[TABLE], made.source[TABLE].data)
    for entry in made.file.entries:
        assert found[entry.name].shape == entry.shape
    assert made.path.stat().st_size < (made.source.folder / "model.safetensors").stat().st_size


def test_little_memory_is_taken_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path, "llama3_gqa", "f32")
    monkeypatch.setattr(module, "STREAM_BYTES", 1 << 14)
    reader, largest = SliceReader(made.source, made.file), 0
    list(reader.read(0))
    tracemalloc.start()
    try:
        for index in range(1, len(made.file.entries)):
            for _, _, data in reader.read(index):
                largest = max(largest, len(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest <= 1 << 15
    assert peak < made.file.size / 2


# ---- keys


def test_key_names_source_formats_and_parts(made: Made, tmp_path: Path) -> None:
    other = Made(tmp_path / "other", "llama31")
    of_formats = [WeightRecipe.parse(text).formats(made.config) for text in ("q80", "q4m", "q40,lm_head=q80")]
    keys = {
        made.manifest.key(made.parts),
        made.manifest.key(slice_parts(made.config, shards_of(made.config, (1.0, 1.0))[1])),
        *(replace(made.manifest, formats=formats).key(made.parts) for formats in of_formats),
        replace(made.manifest, lineage=other.manifest.lineage).key(made.parts),
    }
    assert len(keys) == 6
    assert made.write().key == made.manifest.key(made.parts)
    same = replace(made.manifest, model="another name")
    assert same.key(made.parts) == made.manifest.key(made.parts)


def test_equal_parts_have_one_key_however_they_were_cut(made: Made) -> None:
    halves = [slice_parts(made.config, shards_of(made.config, split)[1]) for split in ((1.0, 1.0), (2.0, 2.0))]
    assert made.manifest.key(halves[0]) == made.manifest.key(halves[1])


def test_lineage(made: Made) -> None:
    fingerprint = Checkpoint(made.source.folder).fingerprint()
    q40, q80 = (WeightRecipe.parse(text).formats(made.config) for text in ("q40", "q80"))
    assert made.source.lineage(q40) == made.manifest.lineage == f"{fingerprint}>q40"
    found = made.write()
    assert found.lineage(q40) == f"{fingerprint}>q40"
    assert found.lineage(q80) == f"{fingerprint}>q40>q80"


# ---- what is refused


@pytest.mark.parametrize("weights", ["q40", "q4m"])
@pytest.mark.parametrize("where", ["on disk", "in memory"])
def test_other_parts_are_refused(weights: str, where: str, tmp_path: Path) -> None:
    made, fmt = Made(tmp_path, weights=weights), FORMATS[weights]
    found: WeightSource = made.write()
    named = str(made.path)
    if where == "in memory":
        found, named = receive(made.source, made.file, made.manifest, made.parts), "the received slice"
    name = "model.layers.0.self_attn.q_proj.weight"
    part = made.parts[name]
    shape, (rows, cols) = part.shape, part.ranges
    assert rows[0] > 0
    assert load_matrix(found[name], shape, (rows, cols), fmt).rows == rows[1] - rows[0]
    with pytest.raises(ModelError) as caught:
        load_matrix(found[name], shape, ((0, rows[1]), cols), fmt)
    assert str(caught.value) == (
        f"{named} holds {rows[0]}..{rows[1]} x 0..{cols[1]} of {name}, and 0..{rows[1]} x 0..{cols[1]} is needed;"
        " give a slice made for this number of ranks and this --split, or the whole model"
    )
    with pytest.raises(ModelError, match=f"holds {name} in another format than q80"):
        load_matrix(found[name], shape, (rows, cols), FORMATS["q80"])
    with pytest.raises(ModelError, match=r"config\.json implies"):
        load_matrix(found[name], (shape[0] + 16, shape[1]), (rows, cols), fmt)
    norm = "model.norm.weight"
    (size,) = made.parts[norm].shape
    assert load_vector(found[norm], (size,), ((0, size),)).shape == (size,)
    with pytest.raises(ModelError, match=rf"holds 0\.\.{size} of {norm}, and 1\.\.{size} is needed"):
        load_vector(found[norm], (size,), ((1, size),))
    with pytest.raises(ModelError, match=r"config\.json implies"):
        load_vector(found[norm], (size + 1,), ((0, size),))


@pytest.mark.parametrize("where", ["matrix", "row scales", "vector", "table", "checksums", "header", "end"])
def test_damage_is_found(where: str, tmp_path: Path) -> None:
    made = Made(tmp_path, weights="q4m,lm_head=q80")
    made.write()
    data = bytearray(made.path.read_bytes())
    matrix = "model.layers.1.mlp.down_proj.weight"
    entries = {"matrix": matrix, "row scales": matrix + SCALES, "vector": "model.norm.weight", "table": TABLE}
    name = entries.get(where, CHECKSUMS)
    start = len(made.file.header)
    for entry in made.file.entries:
        if entry.name == name:
            break
        start += entry.size
    at = {"header": data.index(b"rank 1 of 3"), "checksums": start, "end": 0}.get(where, start + 37)
    data[at] ^= where != "end"
    made.path.write_bytes(data[:-1] if where == "end" else data)
    if where in ("checksums", "header", "end"):
        with pytest.raises(DamagedSlice, match=r"damaged in its header|truncated or corrupt"):
            SliceCheckpoint(made.path)
        return
    found = SliceCheckpoint(made.path)
    name = name.removesuffix(SCALES)
    with pytest.raises(DamagedSlice, match=f"is damaged in {name}"):
        take(found, made, name)
    other = "model.layers.0.input_layernorm.weight"
    np.testing.assert_array_equal(take(found, made, other), take(made.source, made, other))  # the rest can be read
    np.testing.assert_array_equal(row(found, made, 20), row(made.source, made, 20))


def row(source: WeightSource, made: Made, index: int) -> np.ndarray:
    """Return a row of the table."""
    return source[TABLE].values(((index, index + 1), (0, made.config.hidden_size)))


def take(source: WeightSource, made: Made, name: str) -> np.ndarray:
    """Return what a rank loads of a tensor; of the table one row."""
    part = made.parts[name]
    if part.kind == "table":
        return row(source, made, 0)
    if part.kind == "matrix":
        return load_matrix(source[name], part.shape, part.ranges, made.formats[name]).tiles
    return load_vector(source[name], part.shape, part.ranges)


@pytest.mark.parametrize("weights", ["q40", "q4m,lm_head=q80"])
def test_every_bit_of_a_slice_is_under_a_checksum(weights: str, tmp_path: Path) -> None:
    """CRC-32 finds any single wrong bit; here, that no byte of the file is left out."""
    made = Made(tmp_path, weights=weights)
    found = made.write()
    data, sums = made.path.read_bytes(), [zlib.crc32(made.file.header)]
    start = len(made.file.header)
    for entry in made.file.entries[:-1]:
        unit = entry.unit or max(entry.size, 1)
        ends = range(start, start + max(entry.size, 1), unit)
        sums += [zlib.crc32(data[first : min(first + unit, start + entry.size)]) for first in ends]
        start += entry.size
    np.testing.assert_array_equal(sums, found._sums)


def test_files_that_are_no_slices(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no slice of a model; write one with convert --only"):
        SliceCheckpoint(made.source.folder / "model.safetensors")
    assert slices_in(tmp_path) == []
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def test_parts_say_what_they_are(made: Made) -> None:
    assert str(SlicePart((64, 96), ((16, 32), (0, 96)), "matrix")) == "16..32 x 0..96"
    whole = whole_parts(made.config)
    assert whole.keys() == made.parts.keys()
    for name, part in whole.items():
        assert part.shape == made.parts[name].shape
        assert part.ranges == tuple((0, size) for size in part.shape)
    assert Entry("a", "a", "U8", (0, 3, 288), (64, 96), ((5, 5), (0, 96)), FORMATS["q40"]).pieces(1000) == []
