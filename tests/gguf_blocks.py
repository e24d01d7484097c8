"""Random blocks of every type of GGUF tensors, and what the package `gguf` makes of them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from dllama_mpi.weights.gguf import GgufModel
from dllama_mpi.weights.gguf_tensors import GgufTensors
from dllama_mpi.weights.source import Tensor

Bytes = npt.NDArray[np.uint8]
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (),
    "IQ1_M": (), "NVFP4": (),
}  # fmt: skip
"""Where in a block of a type its float16 numbers are."""
BOUNDS = {
    "Q4_0": "exact", "Q5_0": "exact", "Q8_0": "exact", "IQ4_NL": "exact", "MXFP4": "exact", "IQ4_XS": "float16",
    "Q4_1": "steps", "Q4_K": "steps", "Q5_1": "q80", "Q5_K": "q80", "Q6_K": "q80", "NVFP4": "q80", "Q2_K": "q4m",
    "Q3_K": "q4m", "IQ3_S": "q4m", "IQ3_XXS": "q4m", "IQ2_XXS": "q4m", "IQ2_XS": "q4m", "IQ2_S": "q4m", "IQ1_S": "q4m",
    "IQ1_M": "q4m", "TQ1_0": "q4m", "TQ2_0": "q4m",
}  # fmt: skip
"""How far a type's values may be from the file's where they are kept:

exact: not at all. float16: the product of two scales is rounded to it. steps: codes stay, steps and minima are rounded
to the row's 8 bits. q80, q4m: requantised in blocks of 32, to 8 bits and a float16, or to 4 and a minimum.
"""
MINIMUM = {"Q4_1": 2}
"""Where a block has a least value, which is below 0 wherever a quantiser writes it."""


def blocks(kind: str, rows: int, columns: int, seed: int = 0, negative: bool = False) -> Bytes:
    """Return random rows of blocks (rows, bytes); negative: some of the scales are below 0, others are 0."""
    rng = np.random.default_rng(seed)
    width, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    found = rng.integers(0, 256, (rows, columns // width, size), dtype=np.uint8)
    for at in HALVES[kind]:
        values = np.abs(rng.standard_normal(found.shape[:2])) * 0.05
        if at == MINIMUM.get(kind):
            values = -values
        if negative:
            values *= rng.choice([-1, 0, 1], values.shape)
        found[:, :, at : at + 2] = values.astype("<f2")[:, :, None].view(np.uint8)
    if kind == "MXFP4":
        found[:, :, 0] = rng.integers(110, 130, found.shape[:2])
    elif kind == "NVFP4":  # four scales in unsigned E4M3; more than 448 would not be one
        found[:, :, :4] = rng.integers(0 if negative else 24, 72, (*found.shape[:2], 4))
    elif kind == "IQ1_M":  # a float16, its fours of bits at the upper ends of four words
        values = np.abs(rng.standard_normal(found.shape[:2])) * 0.05
        bits = (values * rng.choice([-1, 0, 1], values.shape) if negative else values).astype("<f2").view("<u2")
        for i in range(4):
            high = (bits >> (4 * i) & 15).astype(np.uint8)
            found[:, :, 49 + 2 * i] = found[:, :, 49 + 2 * i] & 15 | high << 4
    return found.reshape(rows, -1)


def like(values: npt.NDArray[np.float32], kind: str) -> Bytes:
    """Return blocks in the shape of a matrix, or one of each expert: its values, or random ones of their size."""
    which = gguf.GGMLQuantizationType[kind]
    try:
        found: Bytes = gguf.quants.quantize(values, which)
        return found
    except NotImplementedError:  # the package reads it only
        raw = blocks(kind, values.size // values.shape[-1], values.shape[-1], values.size)
    ratio = values.std() / values_of(kind, raw).std()
    each = raw.reshape(-1, gguf.GGML_QUANT_SIZES[which][1])
    for at in HALVES[kind]:
        halves = each[:, at : at + 2].copy().view("<f2") * np.float16(ratio)
        each[:, at : at + 2] = halves.astype("<f2").view(np.uint8)
    return each.reshape(*values.shape[:-1], -1)


def values_of(kind: str, raw: Bytes) -> npt.NDArray[np.float32]:
    """Return what the package makes of blocks."""
    found: npt.NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return found


def written(path: Path, kind: str, raw: Bytes) -> Tensor:
    """Write rows of blocks, or of each expert, into a file; return the tensor as it is read from there."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_tensor("t", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    for step in (w.write_header_to_file, w.write_kv_data_to_file, w.write_tensors_to_file, w.close):
        step()
    return GgufTensors(GgufModel(path))["t"]
