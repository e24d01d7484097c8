"""The blocks of GGUF files (ggml-quants) as float32, in the order of ggml's own arithmetic.

A row of a matrix is one block after another, each of 32 or 256 columns. Bytes are read as they lie: little-endian.
"""

from __future__ import annotations

import numba
import numpy as np

from .compiled import entry, inner
from .ggml_vectors import write_codes, write_octets
from .layout import E2M1_TABLE, IQ4NL_TABLE
from .parallel import run_parallel
from .simd import address, bf16_to_f32, bits_of, widen

# What the compiled code calls the types of blocks: ggml's numbers of them.
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = 0, 1, 2, 3, 6, 7, 8
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, BF16, MXFP4 = 10, 11, 12, 13, 14, 20, 23, 30, 39

_IQ4NL = np.array(IQ4NL_TABLE, np.float32)
_E2M1 = np.array(E2M1_TABLE, np.float32)  # the doubles
_FEW = 1 << 14  # values that one thread is done with before others would begin


@inner
def half(raw, at):
    """Return the float16 at a place as float32."""
    return widen(np.uint16(np.uint16(raw[at]) | np.uint16(raw[at + 1]) << 8))


@inner
def signed(byte):
    """Return a byte as the int8 that it is."""
    return np.int32(byte) - np.int32(256) * np.int32(byte > 127)


@inner
def step_and_minimum(raw, at, j):
    """Return the 6-bit step and minimum of part j, 0 to 7, whose packed twelve bytes begin at a place (Q4_K, Q5_K)."""
    if j < 4:
        return np.float32(raw[at + j] & 63), np.float32(raw[at + j + 4] & 63)
    low, high = raw[at + j + 4], at + j
    return np.float32((low & 15) | (raw[high - 4] >> 6) << 4), np.float32((low >> 4) | (raw[high] >> 6) << 4)


@inner
def step_of_iq4_xs(raw, at, j):
    """Return the scale of part j, 0 to 7, of a block of IQ4_XS that begins at a place."""
    high = np.int32(raw[at + 2]) | np.int32(raw[at + 3]) << 8
    bits = (np.int32(raw[at + 4 + j // 2]) >> (4 * (j % 2)) & 15) | (high >> (2 * j) & 3) << 4
    return half(raw, at) * np.float32(np.int32(bits) - np.int32(32))


@inner
def e8m0(exponent):
    """Return half of 2 ** (exponent - 127)."""
    return np.float32(2.0) ** np.float32(np.int32(exponent) - np.int32(128))


@inner
def _listed(raw, at, d, table, out, to):
    for k in range(16):
        out[to + k] = d * table[raw[at + k] & 15]
        out[to + 16 + k] = d * table[raw[at + k] >> 4]


@inner
def _fives(raw, at, high, d, offset, m, out, to):
    """Write d * (code - offset) + m of codes whose fifth bits are a word's (Q5_0, Q5_1)."""
    bits = np.uint32(raw[high]) | np.uint32(raw[high + 1]) << 8
    bits |= np.uint32(raw[high + 2]) << 16 | np.uint32(raw[high + 3]) << 24
    for k in range(16):
        low = np.int32((raw[at + k] & 15) | (bits >> k & 1) << 4)
        above = np.int32((raw[at + k] >> 4) | (bits >> (k + 16) & 1) << 4)
        out[to + k] = d * np.float32(low - offset) + m
        out[to + 16 + k] = d * np.float32(above - offset) + m


@inner
def _write(raw, at, shift, mask, step, minimum, out, to):
    """Write step * code - minimum of 16 codes that are in one byte each, with others."""
    low = address(raw) + at
    write_codes(address(out) + 4 * to, (low, shift, mask), (low, 0, 0, 0), 0, step, minimum)


@inner
def _q2_k(raw, at, out, to):
    d, least = half(raw, at + 80), half(raw, at + 82)
    for j in range(16):
        scale = raw[at + j]
        step, minimum = d * np.float32(scale & 15), least * np.float32(scale >> 4)
        start, shift = at + 16 + 32 * (j // 8) + 16 * (j % 2), 2 * (j % 8 // 2)
        _write(raw, start, shift, 3, step, minimum, out, to + 16 * j)


@inner
def _q3_k(raw, at, out, to):
    d, base = half(raw, at + 108), address(raw) + at
    for j in range(16):
        low = raw[at + 96 + j % 8] >> (4 * (j // 8)) & 15
        high = raw[at + 104 + j % 4] >> (2 * (j // 4)) & 3
        step = d * np.float32(np.int32(low | high << 4) - np.int32(32))
        codes = (base + 32 + 32 * (j // 8) + 16 * (j % 2), 2 * (j % 8 // 2), 3)
        above = (base + 16 * (j % 2), j // 2, 1, 2)
        write_codes(address(out) + 4 * (to + 16 * j), codes, above, 4, step, np.float32(0))


@inner
def _q4_k(raw, at, out, to):
    d, least = half(raw, at), half(raw, at + 2)
    for j in range(8):
        step, minimum = step_and_minimum(raw, at + 4, j)
        step, minimum = d * step, least * minimum
        for k in range(0, 32, 16):
            _write(raw, at + 16 + 32 * (j // 2) + k, 4 * (j % 2), 15, step, minimum, out, to + 32 * j + k)


@inner
def _q5_k(raw, at, out, to):
    d, least, base = half(raw, at), half(raw, at + 2), address(raw) + at
    for j in range(8):
        step, minimum = step_and_minimum(raw, at + 4, j)
        step, minimum = d * step, least * minimum
        for k in range(0, 32, 16):
            codes = (base + 48 + 32 * (j // 2) + k, 4 * (j % 2), 15)
            write_codes(address(out) + 4 * (to + 32 * j + k), codes, (base + 16 + k, j, 1, 4), 0, step, minimum)


@inner
def _q6_k(raw, at, out, to):
    d, base = half(raw, at + 208), address(raw) + at
    for j in range(16):
        step = d * np.float32(signed(raw[at + 192 + j]))
        codes = (base + 64 * (j // 8) + 32 * (j // 2 % 2) + 16 * (j % 2), 4 * (j % 8 // 4), 15)
        above = (base + 128 + 32 * (j // 8) + 16 * (j % 2), 2 * (j % 8 // 2), 3, 4)
        write_codes(address(out) + 4 * (to + 16 * j), codes, above, 32, step, np.float32(0))


@inner
def _iq4_xs(raw, at, out, to):
    for j in range(8):
        _listed(raw, at + 8 + 16 * j, step_of_iq4_xs(raw, at, j), _IQ4NL, out, to + 32 * j)


@inner
def _plain(kind, raw, at, out, to):
    if kind == F32:
        word = np.uint32(raw[at]) | np.uint32(raw[at + 1]) << 8
        word |= np.uint32(raw[at + 2]) << 16 | np.uint32(raw[at + 3]) << 24
        out[to] = np.uint32(word).view(np.float32)
    elif kind == F16:
        out[to] = half(raw, at)
    else:
        out[to] = bf16_to_f32(np.uint16(np.uint16(raw[at]) | np.uint16(raw[at + 1]) << 8))


@inner
def _legacy(kind, raw, at, out, to):
    """Write the 32 values of one block of a type without superblocks."""
    zero = np.float32(0)
    if kind in (Q4_0, Q4_1):
        is_q4_0 = kind == Q4_0
        d, minimum = half(raw, at), zero if is_q4_0 else -half(raw, at + 2)
        low = address(raw) + at + (2 if is_q4_0 else 4)
        for shift in range(0, 8, 4):
            place = address(out) + 4 * (to + 4 * shift)
            write_codes(place, (low, shift, 15), (low, 0, 0, 0), 8 if is_q4_0 else 0, d, minimum)
    elif kind == Q5_0:
        _fives(raw, at + 6, at + 2, half(raw, at), np.int32(16), zero, out, to)
    elif kind == Q5_1:
        _fives(raw, at + 8, at + 4, half(raw, at), np.int32(0), half(raw, at + 2), out, to)
    elif kind == Q8_0:
        d = half(raw, at)
        for k in range(0, 32, 16):
            write_octets(address(out) + 4 * (to + k), address(raw) + at + 2 + k, d)
    elif kind == IQ4_NL:
        _listed(raw, at + 2, half(raw, at), _IQ4NL, out, to)
    else:
        d = e8m0(raw[at]) if raw[at] < 255 else np.float32(np.nan)  # says the standard
        _listed(raw, at + 1, d, _E2M1, out, to)


@inner
def dequantise(kind, raw, out, columns, size):
    """Write the values of whole blocks, `columns` in `size` bytes each: raw (bytes,) uint8, out float32."""
    for i in range(raw.size // size):
        at, to = size * i, columns * i
        if columns == 1:
            _plain(kind, raw, at, out, to)
        elif columns == 32:
            _legacy(kind, raw, at, out, to)
        elif kind == Q2_K:
            _q2_k(raw, at, out, to)
        elif kind == Q3_K:
            _q3_k(raw, at, out, to)
        elif kind == Q4_K:
            _q4_k(raw, at, out, to)
        elif kind == Q5_K:
            _q5_k(raw, at, out, to)
        elif kind == Q6_K:
            _q6_k(raw, at, out, to)
        else:
            _iq4_xs(raw, at, out, to)


@inner
def count_bad(values):
    """Return how many of the float32 values are NaN or infinite."""
    wrong, exponent = np.int64(0), np.uint32(0x7F800000)
    for value in values:
        wrong += np.int64((bits_of(value) & exponent) == exponent)
    return wrong


@inner
def _rows_share(kind, raw, index, columns, size, out, bad, thread, threads):
    wrong = np.int64(0)
    for i in range(index.size * thread // threads, index.size * (thread + 1) // threads):
        dequantise(kind, raw[index[i]], out[i], columns, size)
        wrong += count_bad(out[i])
    bad[thread] = wrong


@entry
def _rows(kind, raw, index, columns, size, out, bad):
    run_parallel(_rows_share, (kind, raw, index, columns, size, out, bad), np.int64(bad.size))


def dequantise_rows(kind: int, raw: np.ndarray, index: np.ndarray, block: tuple[int, int], out: np.ndarray) -> int:
    """Write rows of whole blocks as float32; return how many of the values are NaN or infinite.

    raw: (rows, bytes) uint8, bytes of a row contiguous. index: (n,) int64, which rows. block: its columns and bytes.
    out: (n, columns) float32, contiguous.
    """
    bad = np.zeros(numba.get_num_threads() if out.size > _FEW else 1, np.int64)
    _rows(kind, raw, index, *block, out, bad)
    return int(bad.sum())
