"""Turning weights into tiles and back; a format's code is compiled once, when it is first needed."""

from __future__ import annotations

import functools

import numba
import numpy as np
from numba import cfunc, types
from numba.extending import intrinsic

from .compiled import entry, inner
from .layout import BLOCK, MXFP4, Q4M, ROWS, UNIT, TileFormat, ceil_div
from .matrix import call_kernel
from .parallel import run_parallel
from .rounding import emit_row
from .simd import EmitterHere, address, bf16_to_f32, bits_of, widen

BF16_BITS, PLAIN = 1, 0
NO_SCALES = np.zeros(0, np.float32)


@inner
def _widen_share(raw, kind, out, bad, thread, threads):
    wrong, exponent = 0, np.uint32(0x7F800000)
    for r in range(raw.shape[0] * thread // threads, raw.shape[0] * (thread + 1) // threads):
        for c in range(raw.shape[1]):
            value = bf16_to_f32(np.uint16(raw[r, c])) if kind == BF16_BITS else widen(raw[r, c])
            wrong += np.int64((bits_of(value) & exponent) == exponent)
            out[r, c] = value
    bad[thread] = wrong


@entry
def _widen_rows(raw, kind, out, bad):
    run_parallel(_widen_share, (raw, kind, out, bad), np.int64(bad.size))


def widen_rows(raw: np.ndarray, kind: int, out: np.ndarray) -> int:
    """Copy raw (rows, cols), float32 or the bits of float16 or bfloat16 (`kind`), into the corner of float32 `out`.

    Returns how many of the values are NaN or infinite.
    """
    bad = np.zeros(numba.get_num_threads(), np.int64)
    _widen_rows(raw, kind, out, bad)
    return int(bad.sum())


@intrinsic(prefer_literal=True)
def _row(typingctx, name, packing, x, stride, tiles, count, row_scales):
    def codegen(context, builder, signature, args):
        emit_row(EmitterHere(builder), name.literal_value, bool(packing.literal_value), args[2:])
        return context.get_dummy_value()

    return types.void(name, packing, *[types.int64] * 5), codegen


@functools.cache
def packer(name: str, packing: int):
    """Return the compiled code that packs (1) or unpacks (0) a row of tiles, see `rounding.emit_row`."""

    def row(x, stride, tiles, count, row_scales):
        _row(name, packing, x, stride, tiles, count, row_scales)

    return cfunc(types.void(*[types.int64] * 5), cache=True, nopython=True)(row)


@inner
def _rows_share(function, x, tiles, row_scales, thread, threads):
    rows = tiles.shape[0]
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        scales = address(row_scales) + 4 * ROWS * row if row_scales.size > 0 else np.int64(0)
        call_kernel(function, (address(x[ROWS * row :]), x.strides[0], address(tiles[row:]), tiles.shape[1], scales))


@entry
def _rows(function, x, tiles, row_scales, threads):
    run_parallel(_rows_share, (function, x, tiles, row_scales), threads)


def _convert(fmt: TileFormat, packing: bool, x: np.ndarray, tiles: np.ndarray, row_scales: np.ndarray) -> None:
    if x.shape != (ROWS * tiles.shape[0], BLOCK * tiles.shape[1]) or tiles.shape[2] != fmt.tile_bytes:
        raise ValueError(f"values {x.shape} do not go with {fmt.name} tiles {tiles.shape}")
    if row_scales.shape != (len(x) if fmt.has_row_scales else 0,):
        raise ValueError(f"{row_scales.size} row scales do not go with {fmt.name} tiles {tiles.shape}")
    if tiles.size:
        _rows(packer(fmt.name, int(packing)).address, x, tiles, row_scales, numba.get_num_threads())


def pack_tiles(fmt: TileFormat, x: np.ndarray, tiles: np.ndarray, row_scales: np.ndarray = NO_SCALES) -> None:
    """Write float32 rows x (tile rows * 16, tiles * 32) as tiles (tile rows, tiles, tile_bytes) uint8.

    Values of a row and tiles of a row must be contiguous. row_scales: (tile rows * 16,) float32 from
    `update_row_scales` of whole rows, where the format has them, else empty.

    Raises:
        ValueError: the shapes do not go together.
    """
    _convert(fmt, True, x, tiles, row_scales)


def unpack_tiles(fmt: TileFormat, tiles: np.ndarray, row_scales: np.ndarray, x: np.ndarray) -> None:
    """Write tiles as float32 rows; arguments and errors are those of `pack_tiles`."""
    _convert(fmt, False, x, tiles, row_scales)


# --------------------------------------------------------------------------------------------------------------------
# Row scales
# --------------------------------------------------------------------------------------------------------------------

_SMALLEST = np.float32(2.0**-126)  # a normal float32, whose inverse is finite


@inner(fastmath={"nnan", "nsz"})
def q4m_scale(row):
    """Return a row's D: as small as lets s reach its blocks' ranges with 15 steps, and m what lies below zero."""
    scale = np.float32(0)
    for start in range(0, row.size, BLOCK):
        low, high = np.float32(0), row[start]
        for i in range(start, min(start + BLOCK, row.size)):
            low, high = min(low, row[i]), max(high, row[i])
        scale = max(scale, (high - low) / np.float32(15 * 255), -low / np.float32(UNIT * 255))
    return scale if scale >= _SMALLEST else np.float32(0)


@inner(fastmath={"nnan", "nsz"})
def largest_in_size(row):
    """Return the size of the largest of some float32."""
    largest = np.float32(0)
    for i in range(row.size):
        largest = max(largest, abs(row[i]))
    return largest


@inner
def _row_scales_share(is_q4m, x, out, thread, threads):
    for r in range(x.shape[0] * thread // threads, x.shape[0] * (thread + 1) // threads):
        out[r] = max(out[r], q4m_scale(x[r]) if is_q4m else largest_in_size(x[r]))


@entry
def _row_scales(is_q4m, x, out, threads):
    run_parallel(_row_scales_share, (is_q4m, x, out), threads)


def update_row_scales(fmt: TileFormat, x: np.ndarray, out: np.ndarray) -> None:
    """Raise row scales, which begin as zeros, to what columns of a matrix need; afterwards they do for whole rows.

    x: (rows, cols) float32, columns from a multiple of 32 on, values of a row contiguous. out: (>= rows,) float32. What
    comes out does not depend on how the columns are divided into calls.
    """
    if fmt is MXFP4:
        largest = np.zeros(len(x), np.float32)
        _row_scales(False, x, largest, numba.get_num_threads())
        np.maximum(out[: len(x)], _mxfp4_scales(np.frexp(largest)[1] - 3, largest > 0), out=out[: len(x)])
    elif fmt is Q4M:
        _row_scales(True, x, out, numba.get_num_threads())


def _mxfp4_scales(exponents: np.ndarray, is_used: np.ndarray) -> np.ndarray:
    """Return row scales, powers of two, for the largest of the rows' block exponents; 0 for unused rows.

    A block's scale is stored relative to its row's, 2**-24 to 2**15 in float16: exact unless it is less than 2**-39 of
    the row's largest.
    """
    # A block's scale of 2**exponent is half of that for the doubles in the table.
    powers = np.clip(exponents - 1 - 15, -126, 127)
    return np.where(is_used, np.ldexp(np.float32(1), powers), np.float32(0)).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------
# Codes that are given
# --------------------------------------------------------------------------------------------------------------------


@inner
def _codes_share(packed, apart, tiles, thread, threads):
    for row in range(tiles.shape[0] * thread // threads, tiles.shape[0] * (thread + 1) // threads):
        for block in range(tiles.shape[1]):
            codes = tiles[row, block, 2 * ROWS :]
            for r in range(ROWS):
                if ROWS * row + r >= packed.shape[0]:
                    for k in range(16):
                        codes[64 * (k // 4) + 4 * r + k % 4] = 0
                    continue
                given = packed[ROWS * row + r, block]
                for k in range(16):
                    byte = given[k]
                    if apart == 1:
                        shift = 4 * (k % 2)
                        byte = (given[k // 2] >> shift & 15) | (given[8 + k // 2] >> shift & 15) << 4
                    codes[64 * (k // 4) + 4 * r + k % 4] = byte


@entry
def _codes(packed, apart, tiles, threads):
    run_parallel(_codes_share, (packed, apart, tiles), threads)


def pack_codes(packed: np.ndarray, heads: tuple[np.ndarray, ...], tiles: np.ndarray, apart: int = 16) -> None:
    """Write blocks of 32 weights with the 4-bit codes that they have.

    packed: (rows, blocks, 16) uint8, two codes a byte. apart: 16 if byte k holds the codes of columns k, low, and
    k + 16 (GGUF's Q4_0, IQ4_NL, MXFP4), 1 if those of columns 2 * k and 2 * k + 1 (OCP's MXFP4 as in safetensors).
    heads: float16 scales (rows, blocks), or s and m of q4m, uint8 each. tiles: (ceil(rows/16), blocks, 288) uint8.
    """
    _codes(packed, apart, tiles, numba.get_num_threads())
    start = 0
    for values in heads:
        whole = np.zeros((ROWS * len(tiles), values.shape[1]), values.dtype)
        whole[: len(values)] = values
        turned = np.ascontiguousarray(whole.reshape(len(tiles), ROWS, -1).transpose(0, 2, 1)).view(np.uint8)
        tiles[:, :, start : start + turned.shape[2]] = turned
        start += turned.shape[2]


def pack_mxfp4(
    packed: np.ndarray,
    exponents: np.ndarray,
    cols: tuple[int, int],
    tiles: np.ndarray,
    row_scales: np.ndarray,
    apart: int = 1,
) -> None:
    """Write MXFP4 blocks with the codes that they have, see `pack_codes`.

    packed: (rows, all blocks, 16) uint8. exponents: (rows, all blocks) integers, E8M0 without its bias of 127. cols:
    which columns go into the tiles. row_scales: (16 * rows of tiles,) float32, written, the same for any cols. A block
    whose scale is less than 2**-39 of its row's largest becomes zero.
    """
    rows, blocks = len(packed), slice(cols[0] // BLOCK, ceil_div(cols[1], BLOCK))
    is_used = (packed.view(np.uint64) & np.uint64(0x7777777777777777)).any(axis=2)
    largest = np.where(is_used, exponents, -1000).max(axis=1, initial=-1000)
    row_scales[:] = 0
    row_scales[:rows] = _mxfp4_scales(largest, is_used.any(axis=1))
    relative = np.where(is_used, exponents - np.frexp(row_scales[:rows, None])[1], -1000)[:, blocks]
    scales = np.ldexp(np.float32(1), np.clip(relative, -30, 15)).astype(np.float16)
    pack_codes(packed[:, blocks], (scales,), tiles, apart)
