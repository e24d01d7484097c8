"""From the packed codes of quantised safetensors to tiles, code for code, or to float32.

Codes of 4 or 8 bits lie in lines of bytes, in one of the layouts below; a group of columns shares a step and a zero.
They are read by blocks of 16 rows x 32 columns, as words of a row's neighbouring columns, the first one lowest: eight
codes of 4 bits, or four of 8.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from .compiled import entry, inner
from .ggml import count_bad
from .ggml_vectors import pack_q80_row, put_word, word_at
from .layout import BLOCK, Q4M, ROWS, UNIT, TileFormat, ceil_div
from .parallel import run_parallel
from .simd import address

# A line holds words of one row's columns; words of the same columns of all rows; or those of one column, eight rows a
# word.
BY_ROW, BY_COLUMNS, INTERLEAVED = 0, 1, 2
NIBBLE_OF = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.uint32)
"""Which nibble of an interleaved word has each of its eight rows."""
_STRIP = 8  # rows of tiles whose codes lie side by side, which are read before the next columns


class Layout(NamedTuple):
    """How codes lie.

    Attributes:
        kind: see above. bits: 4 or 8. flip: what is xored with a word of 8-bit codes to make them int8.
    """

    kind: int
    bits: int
    flip: int = 0


@inner
def _word_of_row(raw, row, at):
    """Return four bytes of a line; those beyond its end are 0."""
    if at + 4 <= raw.shape[1]:
        return word_at(address(raw) + row * raw.strides[0] + at)
    word = np.uint32(0)
    for i in range(max(0, raw.shape[1] - at)):
        word |= np.uint32(raw[row, at + i]) << np.uint32(8 * i)
    return word


@inner
def _are_neighbours(rows, first):
    """Return whether eight rows are those of a word."""
    if rows.size < first + 8 or rows[first] % 8 != 0:
        return False
    apart = np.int64(0)
    for i in range(8):
        apart |= rows[first + i] - rows[first] - i
    return apart == 0


@inner
def _exchanged(low, high, shift, mask):
    """Return two words between which parts have been exchanged: what `mask` leaves of the first, and of the second."""
    return (low & mask) | (high & mask) << shift, (low >> shift & mask) | (high & ~mask)


@inner
def _transpose(line, stride, out):
    """Write the words of eight rows from those of eight columns: a matrix of 8 x 8 codes is transposed."""
    a0, a1, a2, a3 = word_at(line), word_at(line + stride), word_at(line + 2 * stride), word_at(line + 3 * stride)
    line += 4 * stride
    a4, a5, a6, a7 = word_at(line), word_at(line + stride), word_at(line + 2 * stride), word_at(line + 3 * stride)
    shift, mask = np.uint32(16), np.uint32(0x0000FFFF)
    a0, a4 = _exchanged(a0, a4, shift, mask)
    a1, a5 = _exchanged(a1, a5, shift, mask)
    a2, a6 = _exchanged(a2, a6, shift, mask)
    a3, a7 = _exchanged(a3, a7, shift, mask)
    shift, mask = np.uint32(8), np.uint32(0x00FF00FF)
    a0, a2 = _exchanged(a0, a2, shift, mask)
    a1, a3 = _exchanged(a1, a3, shift, mask)
    a4, a6 = _exchanged(a4, a6, shift, mask)
    a5, a7 = _exchanged(a5, a7, shift, mask)
    shift, mask = np.uint32(4), np.uint32(0x0F0F0F0F)
    a0, a1 = _exchanged(a0, a1, shift, mask)
    a2, a3 = _exchanged(a2, a3, shift, mask)
    a4, a5 = _exchanged(a4, a5, shift, mask)
    a6, a7 = _exchanged(a6, a7, shift, mask)
    out[0], out[2], out[4], out[6], out[1], out[3], out[5], out[7] = a0, a1, a2, a3, a4, a5, a6, a7


@inner
def _gather_interleaved(raw, rows, block, words):
    words[:, :] = 0
    stride, columns = raw.strides[0], min(BLOCK, raw.shape[0] - BLOCK * block)
    line = address(raw) + BLOCK * block * stride
    for first in range(0, ROWS, 8):
        if columns == BLOCK and _are_neighbours(rows, first):
            for k in range(4):
                _transpose(line + 8 * k * stride + 4 * (rows[first] // 8), stride, words[k, first : first + 8])
            continue
        for r in range(first, min(first + 8, rows.size)):
            place, shift = line + 4 * (rows[r] // 8), np.uint32(4 * NIBBLE_OF[rows[r] % 8])
            for c in range(columns):
                code = word_at(place + c * stride) >> shift & np.uint32(15)
                words[c // 8, r] |= code << np.uint32(4 * (c % 8))


@inner
def _gather(kind, bits, raw, rows, block, words):
    """Write the words of a block of 32 columns, words (bits, 16) uint32; rows: int64, up to 16, the others are zero."""
    if rows.size < ROWS:
        words[:, :] = 0
    if kind == BY_ROW:
        for r in range(rows.size):
            for k in range(bits):
                words[k, r] = _word_of_row(raw, rows[r], 4 * (bits * block + k))
    elif kind == BY_COLUMNS:
        for k in range(bits):
            line = bits * block + k
            for r in range(rows.size):
                words[k, r] = word_at(address(raw) + line * raw.strides[0] + 4 * rows[r]) if line < raw.shape[0] else 0
    else:
        _gather_interleaved(raw, rows, block, words)


@inner
def _spread(halfword):
    """Return four codes of 4 bits as a byte each."""
    apart = (halfword | halfword << np.uint32(8)) & np.uint32(0x00FF00FF)
    return (apart | apart << np.uint32(4)) & np.uint32(0x0F0F0F0F)


@inner
def _put(bits, flip, words, tile):
    """Write a block's codes into a tile."""
    target = address(tile) + 2 * ROWS
    for r in range(ROWS):
        for j in range(bits):
            if bits == 8:
                word = words[j, r] ^ flip
            else:
                shift = np.uint32(16 * (j % 2))
                low, high = words[j // 2, r] >> shift, words[2 + j // 2, r] >> shift
                word = _spread(low & np.uint32(0xFFFF)) | _spread(high & np.uint32(0xFFFF)) << np.uint32(4)
            put_word(np.uint32(word), target + 64 * j + 4 * r)


@inner
def _keep_share(layout, raw, index, first, per, heads, tiles, buffer, thread, threads):
    kind, bits, flip = layout
    count, words = tiles.shape[0], buffer[thread]
    begin, end = count * thread // threads, count * (thread + 1) // threads
    for strip in range(begin, end, _STRIP):
        for block in range(tiles.shape[1]):
            group = (first + block) // per
            for t in range(strip, min(strip + _STRIP, end)):
                tile, rows = tiles[t, block], index[ROWS * t : ROWS * t + ROWS]
                _gather(kind, bits, raw, rows, first + block, words)
                _put(bits, np.uint32(flip), words, tile)
                for i in range(2 * ROWS):
                    tile[i] = heads[t, group, i]


@entry
def _keep(layout, raw, index, first, per, heads, tiles, buffer):
    run_parallel(_keep_share, (layout, raw, index, first, per, heads, tiles, buffer), np.int64(buffer.shape[0]))


def keep_codes(
    layout: Layout, raw: np.ndarray, index: np.ndarray, first: int, per: int, heads: np.ndarray, tiles: np.ndarray
) -> None:
    """Write tiles with the codes that are there.

    raw: (lines, bytes) uint8, bytes of a line contiguous. index: (n,) int64, which rows. first: the first block of 32
    columns. per: blocks that share a step. heads: (rows of tiles, groups, 32) uint8, what a tile begins with; zero for
    rows of padding. tiles: (ceil(n / 16), blocks, tile_bytes) uint8.
    """
    buffer = np.empty((numba.get_num_threads(), layout.bits, ROWS), np.uint32)
    if tiles.size:
        _keep(tuple(layout), raw, index, first, per, heads, tiles, buffer)


def heads_of(fmt: TileFormat, steps: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what tiles begin with, (rows of tiles, groups, 32) uint8, and row scales (rows to 16s,), or (0,).

    steps, zeros: (rows, groups) float32, not negative for q4m; a weight is step * (code - zero).
    """
    count, groups = steps.shape
    whole = ceil_div(count, ROWS)

    def turned(values: np.ndarray) -> np.ndarray:
        padded = np.zeros((ROWS * whole, groups), values.dtype)
        padded[:count] = values
        return np.ascontiguousarray(padded.reshape(whole, ROWS, groups).transpose(0, 2, 1)).view(np.uint8)

    if fmt is not Q4M:
        with np.errstate(over="ignore"):  # what is beyond float16 is for the caller to find
            return turned(steps.astype(np.float16)), np.zeros(0, np.float32)
    minima = steps * (zeros / np.float32(UNIT))
    scale = np.maximum(steps.max(axis=1, initial=0), minima.max(axis=1, initial=0)) / np.float32(255)
    scale[scale < np.float32(2.0**-126)] = 0
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)[:, None]
    parts = [turned(np.minimum(np.rint(each * inverse), 255).astype(np.uint8)) for each in (steps, minima)]
    row_scales = np.zeros(ROWS * whole, np.float32)
    row_scales[:count] = scale
    return np.concatenate(parts, axis=2), row_scales


@inner
def _decode(bits, words, r, groups, zeros, steps, table, values):
    """Write 32 columns of a row as float32; groups: each column's, or one for all of them."""
    for k in range(bits):
        word = words[k, r]
        if bits == 8:
            for i in range(4):
                values[4 * k + i] = table[word >> np.uint32(8 * i) & np.uint32(255)]
        else:
            for i in range(8):
                values[8 * k + i] = table[word >> np.uint32(4 * i) & np.uint32(15)]
    if groups.size == 1:
        zero, step = zeros[groups[0]], steps[groups[0]]
        for c in range(BLOCK):
            values[c] = (values[c] - zero) * step
    else:
        for c in range(BLOCK):
            values[c] = (values[c] - zeros[groups[c]]) * steps[groups[c]]


@inner
def _groups_of(groups, block):
    """Return the groups of a block's columns: one, where that is all of them."""
    found = groups[BLOCK * block : BLOCK * block + BLOCK]
    for group in found:
        if group != found[0]:
            return found
    return found[:1]


class Values(NamedTuple):
    """What codes stand for: step * (table[code] - zero).

    Attributes:
        groups: (columns,) int32, each column's. steps, zeros: (n, groups) float32, of the rows that are read. table:
            float32.
    """

    groups: np.ndarray
    steps: np.ndarray
    zeros: np.ndarray
    table: np.ndarray


class _Codes(NamedTuple):
    """Rows of codes, from a block of columns on; see `Layout` and `keep_codes`."""

    kind: int
    bits: int
    raw: np.ndarray
    index: np.ndarray
    first: int


@inner
def _values_share(codes, given, width, out, tiles, buffers, bad, thread, threads):
    index, groups, bits = codes.index, given.groups, codes.bits
    words, values, wrong = buffers[0][thread], buffers[1][thread], np.int64(0)
    count = -(-index.size // ROWS)
    begin, end = count * thread // threads, count * (thread + 1) // threads
    for strip in range(begin, end, _STRIP):
        for block in range(groups.size // BLOCK):
            theirs, most = _groups_of(groups, block), min(BLOCK, width - BLOCK * block)
            for t in range(strip, min(strip + _STRIP, end)):
                rows = index[ROWS * t : ROWS * t + ROWS]
                _gather(codes.kind, bits, codes.raw, rows, codes.first + block, words)
                for r in range(rows.size):
                    row = ROWS * t + r
                    _decode(bits, words, r, theirs, given.zeros[row], given.steps[row], given.table, values)
                    if tiles.size > 0:
                        values[most:] = 0
                        wrong += count_bad(values)
                        pack_q80_row(address(values), address(tiles[t, block]), np.int64(r))
                    else:
                        wrong += count_bad(values[:most])
                        out[row, BLOCK * block : BLOCK * block + most] = values[:most]
    bad[thread] = wrong


@entry
def _values(codes, given, width, out, tiles, buffers, bad):
    run_parallel(_values_share, (codes, given, width, out, tiles, buffers, bad), np.int64(bad.size))


_NO_ROWS, _NO_TILES = np.zeros((0, 0), np.float32), np.zeros((0, 0, 0), np.uint8)


def write_values(layout: Layout, raw: np.ndarray, index: np.ndarray, first: int, given: Values, out: np.ndarray) -> int:
    """Write rows as float32; return how many of the values are NaN or infinite.

    raw, index, first: see `keep_codes`. out: (n, columns) float32, values of a row contiguous.
    """
    return _write(layout, raw, index, first, given, out, _NO_TILES)


def pack_q80(layout: Layout, raw: np.ndarray, index: np.ndarray, first: int, given: Values, tiles: np.ndarray) -> int:
    """Write rows as q80 tiles, by way of float32, to the bits that `pack_tiles` gives; else the same.

    tiles: (ceil(n / 16), columns / 32, 544) uint8.
    """
    if len(index) % ROWS and tiles.size:
        tiles[-1] = 0
    return _write(layout, raw, index, first, given, _NO_ROWS, tiles)


def _write(
    layout: Layout,
    raw: np.ndarray,
    index: np.ndarray,
    first: int,
    given: Values,
    out: np.ndarray,
    tiles: np.ndarray,
) -> int:
    bad = np.zeros(numba.get_num_threads(), np.int64)
    buffers = np.empty((bad.size, layout.bits, ROWS), np.uint32), np.empty((bad.size, BLOCK), np.float32)
    if out.size or tiles.size:
        width = np.int64(len(given.groups))
        groups = np.pad(given.groups, (0, -len(given.groups) % BLOCK), mode="edge" if width else "constant")
        codes = _Codes(layout.kind, layout.bits, raw, index, first)
        _values(codes, given._replace(groups=groups), width, out, tiles, buffers, bad)
    return int(bad.sum())
