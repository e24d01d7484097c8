"""Small safetensors files for tests, and reading matrices back from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dllama_mpi.kernels.layout import FORMATS
from dllama_mpi.weights.checkpoint import LAYOUT, LAYOUT_KEY, SCALES, TILES_KEY, Checkpoint
from dllama_mpi.weights.source import Range
from dllama_mpi.weights.tiles import TileMatrix, load_matrix
from tests import naive_formats, naive_numbers
from tests.naive_numbers import Floats
from tests.tiny_models.tensors import from_bfloat16, to_bfloat16

DTYPES = ("F32", "F16", "BF16")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_format = pytest.mark.parametrize("fmt", FORMATS)
SHAPE = (51, 96)


def write(path: Path, values: Mapping[str, tuple[str, np.ndarray]], offset: int = 8, **metadata: str) -> Path:
    """Write tensors, each with safetensors' name of its type, and return the file's folder.

    offset: where the data begin, modulo 32.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, (dtype, data) in values.items():
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [start, start + data.nbytes]}
        start += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * ((offset - 8 - len(text)) % 32)
    content = len(text).to_bytes(8, "little") + text + b"".join(data.tobytes() for _, data in values.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path.parent


def random(seed: int, *shape: int) -> Floats:
    """Return normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(values: Floats, dtype: str) -> tuple[str, np.ndarray]:
    """Return values as a type of safetensors, ready for `write`."""
    stored: dict[str, np.ndarray] = {
        "F32": values,
        "F16": naive_numbers.half(values).view(np.uint16),
        "BF16": to_bfloat16(values),
    }
    return dtype, stored[dtype]


def read_back(values: Floats, dtype: str) -> Floats:
    """Return float32 values as they come back from a type of safetensors."""
    if dtype == "BF16":
        return from_bfloat16(to_bfloat16(values))
    return naive_numbers.half(values).astype(np.float32) if dtype == "F16" else values


def scales_of(matrix: Floats, fmt: str) -> Floats:
    """Return the row scales (rows to 16s,) that lie beside a matrix in a format; (0,) of formats without."""
    return (
        naive_formats.row_scales(naive_formats.padded(matrix, 16, 32), fmt)
        if FORMATS[fmt].has_row_scales
        else np.zeros(0, "f4")
    )


def tile_folder(folder: Path, matrix: Floats, fmt: str) -> Checkpoint:
    """Return a checkpoint with one matrix "w" converted to tiles."""
    entries: dict[str, tuple[str, np.ndarray]] = {"w": ("U8", naive_formats.pack(matrix, fmt))}
    if FORMATS[fmt].has_row_scales:
        entries["w" + SCALES] = ("F32", scales_of(matrix, fmt))
    return Checkpoint(write(folder / "model.safetensors", entries, 32, **{TILES_KEY: fmt, LAYOUT_KEY: LAYOUT}))


def load(
    source: Checkpoint, shape: tuple[int, ...] = SHAPE, rows: Range = (0, 16), cols: Range = (0, 32), fmt: str = "q40"
) -> TileMatrix:
    """Return a part of the matrix "w" in a format."""
    return load_matrix(source["w"], shape, (rows, cols), FORMATS[fmt])
