"""From the blocks of GGUF files to tiles: code for code where a format keeps them, else by way of float32.

Codes stay what they are for Q4_0 (q40), Q5_0 and Q8_0 (q80), IQ4_NL (iq4nl), all exactly, for IQ4_XS (iq4nl; the
product of its two scales is rounded to float16), Q4_1 and Q4_K (q4m; steps and minima become multiples of the row's D).
"""

from __future__ import annotations

import numba
import numpy as np

from .compiled import entry, inner
from .ggml import (
    IQ4_NL,
    IQ4_XS,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q8_0,
    count_bad,
    dequantise,
    half,
    step_and_minimum,
    step_of_iq4_xs,
)
from .ggml_vectors import join_nibbles, pack_q80_row, put_word, word_at
from .layout import BLOCK, Q4M, Q80, ROWS, UNIT, TileFormat, ceil_div, ceil_to
from .matrix import call_kernel
from .parallel import run_parallel
from .quantize import largest_in_size, packer, q4m_scale
from .simd import address, narrow

KEPT = {"q40": (Q4_0,), "q80": (Q5_0, Q8_0), "iq4nl": (IQ4_NL, IQ4_XS), "q4m": (Q4_1, Q4_K)}
"""The types whose codes a format keeps."""


# ---- one scale a block


@inner
def _store_half(bits, tile, r):
    tile[2 * r] = np.uint8(bits & 255)
    tile[2 * r + 1] = np.uint8(bits >> 8)


@inner
def _copy_words(raw, at, tile, r, words):
    """Move codes, four at a time, to their places in row r of a tile."""
    source, target = address(raw) + at, address(tile) + 2 * ROWS + 4 * r
    for j in range(words):
        put_word(word_at(source + 4 * j), target + 64 * j)


@inner
def _copy_fives(raw, at, tile, r):
    """Write the 32 codes of Q5_0 as int8, -16 to 15: where the fifth bit is not set, the upper four are."""
    source, target = address(raw) + at, address(tile) + 2 * ROWS + 4 * r
    fifths = word_at(source + 2)
    for half_word in range(2):
        for j in range(4):
            codes = word_at(source + 6 + 4 * j) >> np.uint32(4 * half_word) & np.uint32(0x0F0F0F0F)
            bits = ~fifths >> np.uint32(16 * half_word + 4 * j) & np.uint32(15)
            unset = bits * np.uint32(0x00204081) & np.uint32(0x01010101)
            put_word(np.uint32(codes | unset * np.uint32(0xF0)), target + 64 * (4 * half_word + j))


@inner
def _keep_block(kind, raw, block, tile, r):
    """Write 32 columns into row r of a tile; return whether their scale is a number."""
    if kind == IQ4_XS:
        at, part = 136 * (block // 8), block % 8
        bits = narrow(step_of_iq4_xs(raw, at, part))
        _copy_words(raw, at + 8 + 16 * part, tile, r, 4)
    else:
        at = block * (34 if kind == Q8_0 else 22 if kind == Q5_0 else 18)
        bits = np.uint16(np.uint16(raw[at]) | np.uint16(raw[at + 1]) << 8)
        if kind == Q8_0:
            _copy_words(raw, at + 2, tile, r, 8)
        elif kind == Q5_0:
            _copy_fives(raw, at, tile, r)
        else:
            _copy_words(raw, at + 2, tile, r, 4)
    _store_half(bits, tile, r)
    return bits & 0x7C00 != 0x7C00


# ---- a step and a minimum a block


@inner
def _read_steps(kind, raw, steps, minima):
    """Write the step and the minimum, what is subtracted, of each block of a row as float32."""
    if kind == Q4_1:
        for block in range(steps.size):
            steps[block], minima[block] = half(raw, 20 * block), -half(raw, 20 * block + 2)
        return
    for whole in range(steps.size // 8):
        d, least = half(raw, 144 * whole), half(raw, 144 * whole + 2)
        for j in range(8):
            step, minimum = step_and_minimum(raw, 144 * whole + 4, j)
            steps[8 * whole + j], minima[8 * whole + j] = d * step, least * minimum


@inner
def _row_scale(steps, minima):
    """Return a row's D; -1 where a step or a minimum is negative, NaN where one is no number."""
    if count_bad(steps) + count_bad(minima) > 0:
        return np.float32(np.nan)
    if lowest(steps) < 0 or lowest(minima) < 0:
        return np.float32(-1)
    scale = max(largest_in_size(steps) / np.float32(255), largest_in_size(minima) / np.float32(UNIT * 255))
    return scale if scale >= np.float32(2.0**-126) else np.float32(0)


@inner(fastmath={"nnan", "nsz"})
def lowest(values):
    """Return the least of some float32 and 0."""
    found = np.float32(0)
    for value in values:
        found = min(found, value)
    return found


@inner
def _rounded(value):
    return np.uint8(min(np.float32(255), value + np.float32(0.5)))


@inner
def _keep_nibbles(kind, raw, block, tile, r):
    """Write the codes of 32 columns into row r of a tile."""
    if kind == Q4_1:
        _copy_words(raw, 20 * block + 4, tile, r, 4)
        return
    source = address(raw) + 144 * (block // 8) + 16 + 32 * (block % 8 // 2)
    join_nibbles(source, 4 * (block % 2), address(tile) + 2 * ROWS + 4 * r)


# ---- rows of tiles


@inner
def _pad(tile, r, is_q4m):
    """Write a row of padding."""
    first = r if is_q4m else 2 * r
    tile[first] = 0
    tile[first + (ROWS if is_q4m else 1)] = 0
    for j in range((tile.size - 2 * ROWS) // 64):
        for c in range(4):
            tile[2 * ROWS + 64 * j + 4 * r + c] = 0


@inner
def _keep_row(kind, row, first, tiles, row_scales, r, buffer):
    """Write row r of a row of tiles, from block `first` on; return how many of its scales are no numbers."""
    wrong = np.int64(0)
    if row_scales.size == 0:
        for block in range(tiles.shape[0]):
            wrong += np.int64(not _keep_block(kind, row, first + block, tiles[block], r))
        return wrong
    steps, minima = buffer[0], buffer[1]
    _read_steps(kind, row, steps, minima)
    scale = _row_scale(steps, minima)
    row_scales[r] = scale
    if scale >= 0:
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for block in range(tiles.shape[0]):
            tiles[block, r] = _rounded(steps[first + block] * inverse)
            tiles[block, ROWS + r] = _rounded(minima[first + block] * (inverse / np.float32(UNIT)))
            _keep_nibbles(kind, row, first + block, tiles[block], r)
    return np.int64(np.isnan(scale))


@inner
def _keep_share(kind, raw, index, first, tiles, row_scales, buffer, bad, thread, threads):
    wrong = np.int64(0)
    for t in range(tiles.shape[0] * thread // threads, tiles.shape[0] * (thread + 1) // threads):
        scales = row_scales[ROWS * t : ROWS * t + ROWS]
        for r in range(ROWS):
            if ROWS * t + r < index.size:
                wrong += _keep_row(kind, raw[index[ROWS * t + r]], first, tiles[t], scales, r, buffer[thread])
            else:
                for block in range(tiles.shape[1]):
                    _pad(tiles[t, block], r, row_scales.size > 0)
    bad[thread] = wrong


@entry
def _keep(kind, raw, index, first, tiles, row_scales, buffer, bad):
    run_parallel(_keep_share, (kind, raw, index, first, tiles, row_scales, buffer, bad), np.int64(bad.size))


@inner
def _pack_share(function, kind, raw, index, block, first, tiles, row_scales, buffer, bad, thread, threads):
    wrong, values, is_q80 = np.int64(0), buffer[thread], function == 0
    for t in range(tiles.shape[0] * thread // threads, tiles.shape[0] * (thread + 1) // threads):
        scales = np.int64(0)
        for r in range(ROWS):
            i = ROWS * t + r
            if i < index.size:
                dequantise(kind, raw[index[i]], values[r], block[0], block[1])
                wrong += count_bad(values[r])
            else:
                values[r, :] = 0
            if is_q80:
                for j in range(tiles.shape[1]):
                    pack_q80_row(address(values[r]) + 4 * (first + BLOCK * j), address(tiles[t, j]), np.int64(r))
            if row_scales.size > 0:
                row_scales[i] = q4m_scale(values[r])
        if is_q80:
            continue
        if row_scales.size > 0:
            scales = address(row_scales[ROWS * t :])
        x = address(values) + 4 * first
        call_kernel(function, (x, values.strides[0], address(tiles[t:]), tiles.shape[1], scales))
    bad[thread] = wrong


@entry
def _pack(function, kind, raw, index, block, first, tiles, row_scales, buffer, bad):
    run_parallel(
        _pack_share,
        (function, kind, raw, index, block, first, tiles, row_scales, buffer, bad),
        np.int64(bad.size),
    )


def repack(
    kind: int,
    raw: np.ndarray,
    index: np.ndarray,
    block: tuple[int, int],
    first: int,
    fmt: TileFormat,
    tiles: np.ndarray,
    row_scales: np.ndarray,
) -> int:
    """Write rows of blocks as tiles; return how many of their scales or values are NaN or infinite.

    raw: (rows, bytes) uint8, bytes of a row contiguous. index: (n,) int64, which rows. block: its columns and bytes.
    first: the first column, a multiple of 32. fmt: any but mxfp4. tiles: (ceil(n / 16), ceil(columns / 32),
    tile_bytes) uint8. row_scales: (16 * rows of tiles,) float32, or empty for formats without. Both are written, and no
    row depends on another, nor on the columns.
    """
    if not tiles.size:
        return 0
    if kind not in KEPT.get(fmt.name, ()):
        return _by_values(kind, raw, index, block, first, fmt, tiles, row_scales)
    bad = np.zeros(numba.get_num_threads(), np.int64)
    buffer = np.empty((bad.size, 2, raw.shape[1] // block[1] * block[0] // BLOCK), np.float32)
    _keep(kind, raw, index, first // BLOCK, tiles, row_scales, buffer, bad)
    if fmt is Q4M:
        _replace(kind, raw, index, block, first, tiles, row_scales)
    return int(bad.sum())


def _by_values(
    kind: int,
    raw: np.ndarray,
    index: np.ndarray,
    block: tuple[int, int],
    first: int,
    fmt: TileFormat,
    tiles: np.ndarray,
    row_scales: np.ndarray,
) -> int:
    """Write rows of blocks as tiles by way of float32; read no other blocks than the format needs."""
    bad = np.zeros(numba.get_num_threads(), np.int64)
    start, stop = 0, raw.shape[1] // block[1]
    if not fmt.has_row_scales:
        start, stop = first // block[0], min(stop, ceil_div(first + BLOCK * tiles.shape[1], block[0]))
    part = raw[:, start * block[1] : stop * block[1]]
    width = ceil_to((stop - start) * block[0], BLOCK)
    buffer = np.zeros((bad.size, ROWS, width), np.float32)
    function = 0 if fmt is Q80 else packer(fmt.name, 1).address  # q80 is packed row by row: twice as fast
    _pack(function, kind, part, index, block, first - start * block[0], tiles, row_scales, buffer, bad)
    return int(bad.sum())


def _replace(
    kind: int,
    raw: np.ndarray,
    index: np.ndarray,
    block: tuple[int, int],
    first: int,
    tiles: np.ndarray,
    row_scales: np.ndarray,
) -> None:
    """Quantise the rows that have a negative step or minimum, for which q4m has no code: quantisers write none."""
    for t in np.flatnonzero((row_scales < 0).reshape(-1, ROWS).any(axis=1)):
        rows = slice(ROWS * t, ROWS * t + ROWS)
        wanted = np.flatnonzero(row_scales[rows] < 0)
        made, scales = np.empty_like(tiles[t : t + 1]), np.zeros(ROWS, np.float32)
        _by_values(kind, raw, index[rows], block, first, Q4M, made, scales)
        row_scales[rows][wanted] = scales[wanted]
        at = 0
        for width in Q4M.pieces:
            piece = slice(at, at + ROWS * width)
            to = tiles[t, :, piece].reshape(-1, ROWS, width)
            to[:, wanted] = made[0, :, piece].reshape(-1, ROWS, width)[:, wanted]
            tiles[t, :, piece] = to.reshape(len(to), -1)
            at += ROWS * width
