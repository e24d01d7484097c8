"""Naive twins of the weights' formats: quantisation of blocks of 32 weights, and tiles of 16 rows of them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.naive_numbers import Bytes, F, Floats, Ints, half

ROWS, BLOCK = 16, 32
TILE_BYTES = {"q40": 288, "q4m": 288, "iq4nl": 288, "mxfp4": 288, "q80": 544, "f16": 1024, "f32": 2048}

# --------------------------------------------------------------------------------------------------------------------
# Blocks of 32 weights
# --------------------------------------------------------------------------------------------------------------------

IQ4NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
TABLES = {"iq4nl": IQ4NL, "mxfp4": (2 * E2M1).astype(int)}


class Blocks(NamedTuple):
    """Quantised rows: codes (rows, blocks, 32); float16 scales (rows, blocks), or the bytes s and m; scales (rows,)."""

    codes: Ints
    heads: tuple[npt.NDArray[Any], ...]
    row_scales: Floats


def finite_reciprocal(values: Floats) -> Floats:
    """Return 1 / values as float32, 0 where that would be infinite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = (F(1) / values).astype(np.float32)
    return np.where(np.isfinite(inverse), inverse, F(0))


def row_scales(matrix: Floats, fmt: str) -> Floats:
    """Return the float32 scale of each row of a matrix (rows, cols); ones for formats without."""
    blocks = padded(matrix, 1, BLOCK).reshape(len(matrix), -1, BLOCK)
    if fmt == "q4m":
        low = np.minimum(blocks.min(axis=2), F(0))
        scales = np.maximum((blocks.max(axis=2) - low) / F(3825), -low / F(2040)).max(axis=1, initial=F(0))
        return np.where(scales < 2.0**-126, F(0), scales)
    if fmt == "mxfp4":
        largest = np.abs(matrix).max(axis=1, initial=F(0))
        exponents = [max(math.frexp(v)[1] - 1 - 2 - 1 - 15, -126) for v in largest.tolist()]
        return np.where(largest > 0, np.ldexp(F(1), exponents), F(0)).astype(np.float32)
    return np.ones(len(matrix), np.float32)


def q40_quantise(blocks: Floats) -> tuple[npt.NDArray[np.float16], Ints]:
    """Quantise blocks (n, 32) as ggml's Q4_0; return scales (n,) and codes (n, 32) from 0 to 15."""
    signed = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)]  # the first of the largest in size
    scales = (signed / F(-8)).astype(np.float32)
    codes = np.trunc(blocks * finite_reciprocal(scales)[:, None] + F(8.5))
    return half(scales), np.minimum(15, codes.astype(np.int64))


def q80_quantise(blocks: Floats) -> tuple[npt.NDArray[np.float16], Ints]:
    """Quantise blocks (n, 32) as ggml's Q8_0; return scales (n,) and codes (n, 32) from -127 to 127."""
    scales = np.abs(blocks).max(axis=1) / F(127)
    values = blocks * finite_reciprocal(scales)[:, None]
    return half(scales), np.trunc(values + np.copysign(F(0.5), values)).astype(np.int64)


def added(terms: Floats) -> Floats:
    """Return sums over the last axis, from the first to the last, in float32."""
    total = np.zeros(terms.shape[:-1], np.float32)
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def iq4nl_quantise(blocks: Floats) -> tuple[npt.NDArray[np.float16], Ints]:
    """Quantise blocks (n, 32): of several scales, the one whose codes explain most of the squares."""
    middles = ((IQ4NL[1:] + IQ4NL[:-1]) / 2).astype(np.float32)
    inverse = finite_reciprocal(blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)])
    best, scales = np.zeros(len(blocks), np.float32), np.zeros(len(blocks), np.float32)
    for target in [-127 * f / 100 for f in range(82, 111, 5)] + [113 * f / 100 for f in range(90, 121, 6)]:
        values = IQ4NL[np.searchsorted(middles, blocks * (inverse * F(target))[:, None])].astype(np.float32)
        product = added(blocks * values)
        fit = product / added(values * values)
        gain = product * fit
        scales, best = np.where(gain > best, fit, scales), np.maximum(gain, best)
    stored = half(scales)
    return stored, np.searchsorted(middles, blocks * finite_reciprocal(stored.astype(np.float32))[:, None])


def mxfp4_quantise(blocks: Floats, scales: Floats) -> tuple[npt.NDArray[np.float16], Ints]:
    """Quantise blocks (n, 32) of rows with given scales (n,) as the OCP Microscaling specification tells (6.3)."""
    largest = np.abs(blocks).max(axis=1)
    shared = np.where(largest >= 2.0**-126, np.frexp(largest)[1] - 1, -127) - 2
    row = np.where(scales > 0, np.frexp(scales)[1] - 1, -127)
    stored = np.ldexp(1.0, np.clip(shared - 1 - row, -24, 15)).astype(np.float16)
    values = blocks * finite_reciprocal(stored.astype(np.float32) * scales)[:, None] / F(2)
    distances = np.abs(np.abs(values)[:, :, None] - E2M1[:8])
    nearest = distances.min(axis=2, keepdims=True) == distances
    even_first = np.where(nearest, np.array([0, 2, 4, 6, 1, 3, 5, 7]).argsort(), 9)
    return stored, even_first.argmin(axis=2) + 8 * (values < 0)


def q4m_quantise(blocks: Floats, scales: Floats) -> tuple[Ints, Ints, Ints]:
    """Quantise blocks (n, 32) of rows with given scales (n,); return s, m (n,) and codes (n, 32) from 0 to 15."""
    u = blocks * finite_reciprocal(scales)[:, None]
    low, high, total = np.minimum(u.min(axis=1), F(0)), u.max(axis=1), added(u)
    widest = (high - low) * F(1 / 15)
    best = (np.full(len(u), np.inf, np.float32), np.ones(len(u), np.float32), np.zeros(len(u), np.float32))

    def codes_of(step: Floats, base: Floats) -> Floats:
        inverse = F(1) / step
        return np.rint(np.clip(u * inverse[:, None] + ((F(0) - base) * inverse)[:, None], F(0), F(15)))

    def sums(codes: Floats) -> tuple[Floats, Floats, Floats]:
        return added(codes), added(codes * codes), added(codes * u)

    def fitted(step: Floats, codes: Floats, squares: Floats, products: Floats) -> tuple[Floats, Floats]:
        spread, slope = F(32) * squares - codes * codes, F(32) * products - total * codes
        step = np.where(spread > 0, slope / np.where(spread > 0, spread, F(1)), step)
        base = (total - step * codes) * F(1 / 32)
        return np.clip(np.rint(step), F(1), F(255)), np.clip(np.rint(base * F(-1 / 8)), F(0), F(255))

    def better(s: Floats, m: Floats, codes: Floats, squares: Floats, products: Floats) -> tuple[Floats, Floats, Floats]:
        error = s * ((s * squares - F(16) * m * codes) - F(2) * products) + m * (F(2048) * m + F(16) * total)
        found = (np.where(error < best[0], new, old) for new, old in zip((error, s, m), best, strict=True))
        return next(found), next(found), next(found)

    for factor in (0.86, 0.98, 1.1):
        for phase in (-0.25, 0, 0.25, 0.5):
            step = np.maximum(widest * F(factor), F(0.5))
            found = sums(codes_of(step, low + step * F(phase)))
            best = better(*fitted(step, *found), *found)
    found = sums(codes_of(best[1], best[2] * F(-8)))
    _, s0, m0 = best = better(*fitted(best[1], *found), *found)
    for ds, dm in [(ds, dm) for ds in (-1, 0, 1) for dm in (-1, 0, 1) if ds or dm]:
        s, m = np.clip(s0 + F(ds), F(1), F(255)), np.clip(m0 + F(dm), F(0), F(255))
        best = better(s, m, *sums(codes_of(s, m * F(-8))))
    _, s, m = best
    return s.astype(np.int64), m.astype(np.int64), codes_of(s, m * F(-8)).astype(np.int64)


QUANTISED = ("q40", "q4m", "iq4nl", "mxfp4", "q80")


def quantised(matrix: Floats, fmt: str) -> Blocks:
    """Quantise a matrix (rows, cols), whose columns are filled up with zeros; what was done already is remembered."""
    return _quantised(np.ascontiguousarray(matrix, np.float32).tobytes(), matrix.shape, fmt)


@functools.lru_cache(1024)
def _quantised(content: bytes, shape: tuple[int, int], fmt: str) -> Blocks:
    matrix, rows = np.frombuffer(content, np.float32).reshape(shape), shape[0]
    blocks = padded(matrix, 1, BLOCK).reshape(-1, BLOCK)
    scales = row_scales(matrix, fmt)
    each = np.repeat(scales, len(blocks) // max(rows, 1))
    heads: tuple[npt.NDArray[Any], ...]
    if fmt == "q4m":
        s, m, codes = q4m_quantise(blocks, each)
        heads = (s.astype(np.uint8), m.astype(np.uint8))
    elif fmt == "mxfp4":
        one, codes = mxfp4_quantise(blocks, each)
        heads = (one,)
    else:
        one, codes = {"q40": q40_quantise, "q80": q80_quantise, "iq4nl": iq4nl_quantise}[fmt](blocks)
        heads = (one,)
    return Blocks(codes.reshape(rows, -1, BLOCK), tuple(head.reshape(rows, -1) for head in heads), scales)


def meaning(blocks: Blocks, fmt: str) -> Ints:
    """Return the whole numbers (rows, blocks, 32) that codes stand for, before any scale; of q4m s * code - 8 * m."""
    if fmt == "q4m":
        s, m = (head.astype(np.int64)[:, :, None] for head in blocks.heads)
        return s * blocks.codes - 8 * m
    return TABLES[fmt][blocks.codes] if fmt in TABLES else blocks.codes - (8 if fmt == "q40" else 0)


def as_stored(matrix: Floats, fmt: str) -> Floats:
    """Return what a matrix (rows, cols) becomes by being stored in a tile format, float32."""
    if fmt in ("f16", "f32"):
        return half(matrix).astype(np.float32) if fmt == "f16" else matrix
    blocks = quantised(matrix, fmt)
    values, scale = meaning(blocks, fmt).astype(np.float32), blocks.row_scales[:, None]
    if fmt != "q4m":
        scale = blocks.heads[0].astype(np.float32) * scale
    return (values * scale[:, :, None]).reshape(len(matrix), -1)[:, : matrix.shape[1]]


def padded(matrix: Floats, rows: int, cols: int) -> Floats:
    """Return a matrix with zeros added, so that its sizes are multiples of `rows` and `cols`."""
    return np.pad(matrix, ((0, -matrix.shape[0] % rows), (0, -matrix.shape[1] % cols)))


# --------------------------------------------------------------------------------------------------------------------
# Tiles
# --------------------------------------------------------------------------------------------------------------------


def pack(matrix: Floats, fmt: str) -> Bytes:
    """Return a matrix (rows, cols) as tiles (ceil(rows/16), ceil(cols/32), tile_bytes), byte by byte."""
    whole = padded(matrix, ROWS, BLOCK)
    tiles = np.zeros((len(whole) // ROWS, whole.shape[1] // BLOCK, TILE_BYTES[fmt]), np.uint8)
    if fmt in QUANTISED:
        blocks = quantised(whole, fmt)
    for i in range(tiles.shape[0]):
        for j in range(tiles.shape[1]):
            rows = slice(i * ROWS, (i + 1) * ROWS)
            if fmt in QUANTISED:
                _pack_codes(tiles[i, j], [head[rows, j] for head in blocks.heads], blocks.codes[rows, j], fmt)
            else:  # column after column
                values = whole[rows, j * BLOCK : (j + 1) * BLOCK]
                stored = half(values) if fmt == "f16" else values
                tiles[i, j] = np.frombuffer(stored.T.tobytes(), np.uint8)
    return tiles


def _pack_codes(tile: Bytes, heads: list[npt.NDArray[Any]], codes: Ints, fmt: str) -> None:
    tile[: 2 * ROWS] = np.frombuffer(b"".join(head.tobytes() for head in heads), np.uint8)
    for r in range(ROWS):
        if fmt != "q80":
            for j in range(4):
                for c in range(4):
                    low, high = codes[r, 4 * j + c], codes[r, 16 + 4 * j + c]
                    tile[32 + 64 * j + 4 * r + c] = low + 16 * high
        else:
            for j in range(8):
                for c in range(4):
                    tile[32 + 64 * j + 4 * r + c] = codes[r, 4 * j + c] % 256
