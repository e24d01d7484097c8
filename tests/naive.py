"""Slow, obviously right numpy twins of every kernel, of the sampler and of the whole forward pass.

Nothing here shares code with the package but the layout's two numbers, 16 rows and 32 columns a tile. What the program
computes in a fixed order is computed bit for bit the same (quantisation, payloads, matrix products); the rest in
float64, rounded to float32 where the program stores it.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

ROWS, BLOCK = 16, 32
TILE_BYTES = {"q40": 288, "q4m": 288, "iq4nl": 288, "mxfp4": 288, "q80": 544, "f16": 1024, "f32": 2048}
F = np.float32

# --------------------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------------------


def fma(x: npt.ArrayLike, y: npt.ArrayLike, z: npt.ArrayLike) -> Floats:
    """Return x * y + z of float32 values, rounded once.

    The product is exact in float64; the sum is rounded to odd there, so that rounding it again to float32 is right.
    """
    product = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    z = np.broadcast_to(np.asarray(z, np.float64), product.shape)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)
    inexact = (error != 0) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def half(values: npt.ArrayLike) -> npt.NDArray[np.float16]:
    """Round to float16, beyond its range to infinity."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32).astype(np.float16)


def reciprocal(values: Floats, numerator: float = 1.0) -> Floats:
    """Return numerator / values as float32, 0 where a value is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(values == 0, F(0), F(numerator) / values).astype(np.float32)


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


# --------------------------------------------------------------------------------------------------------------------
# Activations and matrix products
# --------------------------------------------------------------------------------------------------------------------


def quantise_activations(x: Floats) -> tuple[Ints, Floats, Ints]:
    """Quantise activations (tokens, cols) to Q80: codes like x, scales and -8 * sums of codes (tokens, cols/32)."""
    blocks = x.reshape(len(x), -1, BLOCK)
    largest = np.abs(blocks).max(axis=2)
    codes = np.rint(blocks * reciprocal(largest, 127)[:, :, None]).astype(np.int64)
    return codes.reshape(x.shape), largest * F(1 / 127), -8 * codes.sum(axis=2)


def quantised_matmul(matrix: Floats, fmt: str, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows) with the matrix in a format of codes and x (tokens, cols) in Q80.

    Block after block: the dot product of the codes, exact, times the product of the scales, added to the sum so far. Of
    q4m: s * dot - 8 * m * (sum of x), rounded once, times the scale of x. In the end times the row's scale.
    """
    blocks = quantised(matrix, fmt)
    numbers = meaning(blocks, fmt)
    x_codes, x_scales, _ = quantise_activations(padded(x, 1, BLOCK))
    x_codes = x_codes.reshape(len(x), -1, BLOCK)
    y = np.zeros((len(x), len(matrix)), np.float32)
    for block in range(numbers.shape[1]):
        dots = (x_codes[:, block] @ numbers[:, block].T).astype(np.float32)
        scale = x_scales[:, block, None]
        if fmt != "q4m":
            scale = scale * blocks.heads[0][:, block].astype(np.float32)
        y = fma(dots, scale, y)
    return y * blocks.row_scales


def float_matmul(matrix: Floats, fmt: str, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows) with the matrix in f16 or f32, column after column."""
    stored = as_stored(matrix, fmt)
    y = np.zeros((len(x), len(matrix)), np.float32)
    for col in range(stored.shape[1]):
        y = fma(x[:, col, None], stored[:, col], y)
    return y


def matmul(matrix: Floats, fmt: str, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows) as the program computes it with weights of a tile format."""
    return quantised_matmul(matrix, fmt, x) if fmt in QUANTISED else float_matmul(matrix, fmt, x)


# --------------------------------------------------------------------------------------------------------------------
# Between the matrix products
# --------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    exact = x.astype(np.float64)
    exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True) + eps)
    return (exact * weight).astype(np.float32)


def rms_norm_in_order(row: Floats, weight: Floats, eps: float) -> Floats:
    """Return the RMSNorm of a row as the program computes it where every rank must get the same bits.

    Squares are summed in 32 lanes by fused multiply-adds, then lanes i and i + 16, i and i + 8, and so on.
    """
    lanes = np.zeros(BLOCK, np.float32)
    for block in padded(row[None], 1, BLOCK).reshape(-1, BLOCK):
        lanes = fma(block, block, lanes)
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    scale = F(1) / np.sqrt(lanes[0] / F(len(row)) + F(eps))
    return row * scale * weight


def silu_mul(gate: Floats, up: Floats) -> Floats:
    """Return silu(gate) * up."""
    g = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        return (g / (1 + np.exp(-g)) * up).astype(np.float32)


def gelu_tanh_mul(gate: Floats, up: Floats) -> Floats:
    """Return the tanh approximation of GELU (arXiv:1606.08415) of gate, times up."""
    g = gate.astype(np.float64)
    # 1 + tanh(u) as 2 / (1 + exp(-2 u)), which keeps its digits where it is small.
    with np.errstate(over="ignore"):
        return (g / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * up).astype(np.float32)


def rotate(heads: Floats, angles: Doubles, factor: float = 1.0) -> Floats:
    """Rotate heads (tokens, n, head_dim) by angles (tokens, dims / 2): element i turns with i + dims / 2.

    Elements from `dims` on stay as they are.
    """
    dims = 2 * angles.shape[1]
    cos, sin = factor * np.cos(angles)[:, None], factor * np.sin(angles)[:, None]
    first, second = np.split(heads[:, :, :dims].astype(np.float64), 2, axis=2)
    turned: list[npt.NDArray[Any]] = [first * cos - second * sin, second * cos + first * sin, heads[:, :, dims:]]
    return np.concatenate(turned, axis=2).astype(np.float32)


class Scores(NamedTuple):
    """How scores of attention become weights.

    Attributes:
        scale: of the scores; None: 1 / sqrt(head_dim). softcap: s: scores become s * tanh(score / s); 0 for none.
        sinks: (heads,) logits that take part in the softmax and have no value, or None.
    """

    scale: float | None = None
    softcap: float = 0.0
    sinks: Floats | None = None


PLAIN_SCORES = Scores()


def attention(q: Floats, k: Floats, v: Floats, positions: Ints, window: int, how: Scores = PLAIN_SCORES) -> Floats:
    """Return the attention (tokens, heads, head_dim) of one sequence.

    q: (tokens, heads, head_dim); k, v: (kv_heads, positions, head_dim), each KV head read by heads / kv_heads query
    heads in turn; positions: (tokens,); window: positions a token sees, itself included, or 0 for all before it.
    """
    tokens, heads, dim = q.shape
    group = heads // len(k)
    out = np.zeros((tokens, heads, dim), np.float32)
    for t in range(tokens):
        stop = int(positions[t]) + 1
        start = max(0, stop - window) if window else 0
        for h in range(heads):
            keys, values = (a[h // group, start:stop].astype(np.float64) for a in (k, v))
            scores = keys @ q[t, h].astype(np.float64) * (dim**-0.5 if how.scale is None else how.scale)
            if how.softcap:
                scores = how.softcap * np.tanh(scores / how.softcap)
            sink = -np.inf if how.sinks is None else float(how.sinks[h])
            top = max(scores.max(), sink)
            weights = np.exp(scores - top)
            out[t, h] = weights @ values / (weights.sum() + np.exp(sink - top))
    return out


def top_k(logits: Floats, k: int) -> tuple[list[int], list[float]]:
    """Return the k largest logits' indices and values, best first, ties by lower index."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
    return order, [float(logits[i]) for i in order]


# --------------------------------------------------------------------------------------------------------------------
# Payloads of an all-reduce
# --------------------------------------------------------------------------------------------------------------------


def encode(x: Floats, payload: str) -> Bytes:
    """Return values (blocks, 32) as a payload (blocks, 34, 64 or 128): Q80 with its float16 scale, f16 or f32."""
    if payload != "q80":
        stored = half(x) if payload == "f16" else x
        return np.frombuffer(stored.tobytes(), np.uint8).reshape(len(x), -1)
    scales = half(np.abs(x).max(axis=1) / F(127))  # rounded before the codes are found: they make up for it
    codes = np.clip(np.rint(x * reciprocal(scales.astype(np.float32))[:, None]), -127, 127).astype(np.int8)
    return np.concatenate([scales.view(np.uint8).reshape(-1, 2), codes.view(np.uint8)], axis=1)


def decode(payload: Bytes) -> Floats:
    """Return the values (blocks, 32) of a payload (blocks, 34, 64 or 128)."""
    width = payload.shape[1]
    if width == 34:
        scales = np.ascontiguousarray(payload[:, :2]).view(np.float16).astype(np.float32)
        return scales * payload[:, 2:].view(np.int8).astype(np.float32)
    stored = np.ascontiguousarray(payload).view(np.float16 if width == 64 else np.float32)
    return stored.astype(np.float32)


def decode_sum(payloads: Bytes) -> Floats:
    """Return the sum (blocks, 32) over ranks, in rank order, of payloads (ranks, blocks, bytes)."""
    total = np.zeros((payloads.shape[1], BLOCK), np.float32)
    for payload in payloads:
        total = total + decode(payload)
    return total


def all_reduce(values: list[Floats], algorithm: str, payload: str, homes: list[str]) -> Floats:
    """Return the sum (blocks, 32) of the ranks' values as an algorithm computes it, roundings included.

    homes: the host of each rank.
    """
    if algorithm == "shared":
        return decode_sum(np.stack([encode(v, "f32") for v in values]))
    if algorithm == "two-level":
        leaders = sorted({homes.index(home) for home in homes})
        sums = []
        for leader in leaders:
            total = values[leader]
            for rank in range(leader + 1, len(values)):
                if homes[rank] == homes[leader]:
                    total = total + values[rank]
            sums.append(total)
        if len(sums) == 1:
            return sums[0]
        size = encode(sums[0], payload).size
        direct = len(sums) == 2 or size * (len(sums) - 1) <= 8192
        return all_reduce(sums, "direct" if direct else "scatter", payload, homes)
    if algorithm == "doubling":
        return _doubled(values, payload)
    total = decode_sum(np.stack([encode(v, payload) for v in values]))
    return total if algorithm == "direct" else decode(encode(total, payload))


def _doubled(values: list[Floats], payload: str) -> Floats:
    power = 1 << (len(values).bit_length() - 1)
    sums = list(values[:power])
    for rank in range(power, len(values)):
        sums[rank - power] = decode_sum(np.stack([encode(sums[rank - power], payload), encode(values[rank], payload)]))
    distance = 1
    while distance < power:
        sent = [encode(v, payload) for v in sums]
        sums = [decode_sum(np.stack([sent[min(r, r ^ distance)], sent[max(r, r ^ distance)]])) for r in range(power)]
        distance *= 2
    return sums[0]


# --------------------------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------------------------


def penalised(
    logits: Floats, history: list[int], prompt: int, repeat: float, presence: float, frequency: float
) -> Doubles:
    """Return logits (vocab,) after the penalties for the tokens of a history whose first `prompt` are the prompt's."""
    out = logits.astype(np.float64)
    for token in set(history):
        out[token] = out[token] / repeat if out[token] > 0 else out[token] * repeat
    for token in set(history[prompt:]):
        out[token] -= presence + frequency * history[prompt:].count(token)
    return out


def distribution(
    logits: Floats, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[tuple[int, float]]:
    """Return the tokens that may be chosen with their probabilities, best first, ties by lower id."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return [(order[0], 1.0)]
    order = order[:top_k] if top_k else order
    weights = [math.exp((float(logits[i]) - float(logits[order[0]])) / temperature) for i in order]
    probabilities = [w / math.fsum(weights) for w in weights]
    kept, reached = [], 0.0
    for token, p in zip(order, probabilities, strict=True):
        if (top_p < 1 and reached >= top_p) or p < min_p * probabilities[0]:
            break
        kept.append((token, p))
        reached += p
    mass = math.fsum(p for _, p in kept)
    return [(token, p / mass) for token, p in kept]


def choose(choices: list[tuple[int, float]], value: float) -> int:
    """Return the token at which the sum of a distribution's probabilities passes a value from [0, 1)."""
    reached = 0.0
    for token, p in choices:
        reached += p
        if reached > value:
            return token
    return choices[-1][0]


# --------------------------------------------------------------------------------------------------------------------
# The whole forward pass
# --------------------------------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, Floats]:
    """Return every tensor of a model directory as float32."""
    found: dict[str, Floats] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}[entry["dtype"]]
            values = np.frombuffer(content[start:stop], kind).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            found[name] = values.astype(np.float32)
    return found


def rope_angles(config: dict[str, Any], dim: int, positions: Ints, length: int) -> tuple[Doubles, float]:
    """Return the angles (tokens, dim / 2) of positions in a sequence of `length`, and what cos and sin are scaled by.

    After transformers' modeling_rope_utils.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta, factor = given.get("rope_theta", config.get("rope_theta", 10000.0)), given.get("factor", 1.0)
    trained: Any = given.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    scale, exponents = 1.0, np.arange(0, dim, 2) / dim
    if kind == "dynamic":
        longest = max(length, config["max_position_embeddings"])
        theta *= (factor * longest / config["max_position_embeddings"] - (factor - 1)) ** (dim / (dim - 2))
    turns = float(theta) ** -exponents  # radians a position
    if kind == "linear":
        turns = turns / factor
    elif kind == "llama3":
        wavelengths = 2 * math.pi / turns
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        kept = np.clip((trained / wavelengths - low) / (high - low), 0, 1)
        turns = (1 - kept) * turns / factor + kept * turns
    elif kind == "yarn":
        turns, scale = _yarn(given, float(theta), turns, trained, dim)
    return positions[:, None] * turns, scale


def _yarn(given: dict[str, Any], theta: float, turns: Doubles, trained: int, dim: int) -> tuple[Doubles, float]:
    factor = given["factor"]

    def dimension(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    low, high = dimension(given.get("beta_fast", 32)), dimension(given.get("beta_slow", 1))
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    scale = given.get("attention_factor")
    if scale is None:
        scale = mscale(1)
        if given.get("mscale") and given.get("mscale_all_dim"):
            scale = mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return slow * turns / factor + (1 - slow) * turns, float(scale)


class Model:
    """A dense decoder from a Hugging Face directory, computed token by token, head by head.

    weights: "q40", "q80", "f16" or "f32"; activations are quantised to Q80 for the first two. The embedding, norms
    and biases stay float32; keys and values are float16 unless the weights are f32.
    """

    def __init__(self, folder: Path, weights: str) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors, self.weights = read_tensors(folder), weights
        c = self.config
        self.heads = c["num_attention_heads"]
        self.kv_heads = c.get("num_key_value_heads", self.heads)
        self.dim = self.tensors["model.layers.0.self_attn.q_proj.weight"].shape[0] // self.heads

    def logits(self, tokens: Ints) -> Floats:
        """Return the logits (n, vocab) of one forward pass over n tokens."""
        residual = self.tensors["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            residual = residual + self._attention(self._norm(residual, f"{prefix}.input_layernorm"), layer)
            residual = residual + self._mlp(self._norm(residual, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp")
        head = "lm_head.weight" if "lm_head.weight" in self.tensors else "model.embed_tokens.weight"
        return matmul(self.tensors[head], self.weights, self._norm(residual, "model.norm"))

    def _norm(self, x: Floats, name: str) -> Floats:
        return rms_norm(x, self.tensors[f"{name}.weight"], self.config["rms_norm_eps"])

    def _linear(self, x: Floats, name: str) -> Floats:
        y = matmul(self.tensors[f"{name}.weight"], self.weights, x)
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def _mlp(self, x: Floats, name: str) -> Floats:
        inner = silu_mul(self._linear(x, f"{name}.gate_proj"), self._linear(x, f"{name}.up_proj"))
        return self._linear(inner, f"{name}.down_proj")

    def _attention(self, x: Floats, layer: int) -> Floats:
        n, name = len(x), f"model.layers.{layer}.self_attn"
        positions = np.arange(n)
        angles, factor = rope_angles(self.config, self.dim, positions, n)
        q = self._linear(x, f"{name}.q_proj").reshape(n, self.heads, self.dim)
        k, v = (self._linear(x, f"{name}.{part}_proj").reshape(n, self.kv_heads, self.dim) for part in "kv")
        if f"{name}.q_norm.weight" in self.tensors:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        q, k = rotate(q, angles, factor), rotate(k, angles, factor)
        if self.weights != "f32":
            k, v = half(k).astype(np.float32), half(v).astype(np.float32)
        heads = attention(q, k.swapaxes(0, 1), v.swapaxes(0, 1), positions, self._window(layer))
        return self._linear(heads.reshape(n, -1), f"{name}.o_proj")

    def _window(self, layer: int) -> int:
        c = self.config
        window = c.get("sliding_window") or 0
        if c["model_type"].startswith("qwen"):
            return window if c.get("use_sliding_window") and layer >= c["max_window_layers"] else 0
        return window if c["model_type"] == "mistral" else 0
