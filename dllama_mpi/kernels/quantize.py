"""Turning weights into tiles and back."""

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from .layout import BLOCK, ROWS
from .simd import F16, F32, bf16_to_f32, widen

BF16_BITS, PLAIN = 1, 0


def _memory_intrinsics(element):
    """Return (load, store) intrinsics of float32 values kept as `element`s in a byte array, at any alignment."""

    def pointer(context, builder, ty, array, index):
        data = context.make_array(ty)(context, builder, array).data
        return builder.gep(builder.bitcast(data, element.as_pointer()), [index])

    @intrinsic
    def load(typingctx, array, index):
        def codegen(context, builder, signature, args):
            value = builder.load(pointer(context, builder, signature.args[0], *args), align=1)
            return value if element == F32 else builder.fpext(value, F32)

        return types.float32(array, types.int64), codegen

    @intrinsic
    def store(typingctx, array, index, value):
        def codegen(context, builder, signature, args):
            value = args[2] if element == F32 else builder.fptrunc(args[2], element)
            builder.store(value, pointer(context, builder, signature.args[0], *args[:2]), align=1)
            return context.get_dummy_value()

        return types.void(array, types.int64, types.float32), codegen

    return load, store


_load_half, _store_half = _memory_intrinsics(F16)
_load_single, _store_single = _memory_intrinsics(F32)


@njit(cache=True, nogil=True, parallel=True)
def widen_rows(raw, kind, out):
    """Copy raw (rows, cols), float32 or the bits of float16 or bfloat16 (`kind`), into the corner of float32 `out`."""
    for r in prange(raw.shape[0]):
        for c in range(raw.shape[1]):
            out[r, c] = bf16_to_f32(np.uint16(raw[r, c])) if kind == BF16_BITS else widen(raw[r, c])


@njit(cache=True, nogil=True, inline="never")
def _q40_block(x, tile, r):
    """Quantise 32 weights of row r of a tile: the largest in size becomes code 0 (ggml's Q4_0)."""
    largest, signed = np.float32(0), np.float32(0)
    for i in range(BLOCK):
        if abs(x[i]) > largest:
            largest, signed = abs(x[i]), x[i]
    scale = signed / np.float32(-8)
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    _store_half(tile, r, scale)
    for j in range(4):
        for c in range(4):
            low = min(np.int32(15), np.int32(x[4 * j + c] * inverse + np.float32(8.5)))
            high = min(np.int32(15), np.int32(x[16 + 4 * j + c] * inverse + np.float32(8.5)))
            tile[2 * ROWS + 64 * j + 4 * r + c] = np.uint8(low | (high << 4))


@njit(cache=True, nogil=True, inline="never")
def _q80_block(x, tile, r):
    """Quantise 32 weights of row r of a tile to int8 (ggml's Q8_0: rounding halves away from zero)."""
    largest = np.float32(0)
    for i in range(BLOCK):
        largest = max(largest, abs(x[i]))
    scale = largest / np.float32(127)
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    _store_half(tile, r, scale)
    for i in range(BLOCK):
        value = x[i] * inverse
        code = np.int32(value + np.float32(0.5)) if value >= 0 else np.int32(value - np.float32(0.5))
        tile[2 * ROWS + 64 * (i // 4) + 4 * r + i % 4] = np.uint8(code & 255)


@njit(cache=True, nogil=True, parallel=True)
def pack_tiles(x, tiles):
    """Write float32 rows x (tile_rows*16, blocks*32) as tiles (tile_rows, blocks, tile_bytes) uint8, by their size."""
    kind = tiles.shape[2]
    for row in prange(tiles.shape[0]):
        for block in range(tiles.shape[1]):
            tile = tiles[row, block]
            for r in range(ROWS):
                values = x[row * ROWS + r, block * BLOCK : (block + 1) * BLOCK]
                if kind == 288:
                    _q40_block(values, tile, r)
                elif kind == 544:
                    _q80_block(values, tile, r)
                elif kind == 1024:
                    for i in range(BLOCK):
                        _store_half(tile, i * ROWS + r, values[i])
                else:
                    for i in range(BLOCK):
                        _store_single(tile, i * ROWS + r, values[i])


@njit(cache=True, nogil=True, parallel=True)
def unpack_tiles(tiles, x):
    """Write tiles (tile_rows, blocks, tile_bytes) uint8 as float32 rows x (tile_rows*16, blocks*32)."""
    kind = tiles.shape[2]
    for row in prange(tiles.shape[0]):
        for block in range(tiles.shape[1]):
            tile = tiles[row, block]
            for r in range(ROWS):
                values = x[row * ROWS + r, block * BLOCK : (block + 1) * BLOCK]
                for i in range(BLOCK):
                    if kind == 288:
                        byte = tile[2 * ROWS + 64 * (i % 16 // 4) + 4 * r + i % 4]
                        code = np.int32(byte >> 4 if i >= 16 else byte & 15) - 8
                        values[i] = _load_half(tile, r) * np.float32(code)
                    elif kind == 544:
                        code = np.int32(np.int8(tile[2 * ROWS + 64 * (i // 4) + 4 * r + i % 4]))
                        values[i] = _load_half(tile, r) * np.float32(code)
                    elif kind == 1024:
                        values[i] = _load_half(tile, i * ROWS + r)
                    else:
                        values[i] = _load_single(tile, i * ROWS + r)
