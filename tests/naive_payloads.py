"""Naive twins of an all-reduce: its payloads, and the sums of its algorithms."""

from __future__ import annotations

import math

import numpy as np

from tests.naive_formats import BLOCK
from tests.naive_numbers import Bytes, F, Floats, half, reciprocal

_ROOT = F(1 / math.sqrt(32))


def encode(x: Floats, payload: str) -> Bytes:
    """Return values (blocks, 32) as a payload (blocks, 18, 34, 64 or 128): Q40, Q80, f16 or f32."""
    if payload == "q40":
        return _nibbles(x)
    if payload != "q80":
        stored = half(x) if payload == "f16" else x
        return np.frombuffer(stored.tobytes(), np.uint8).reshape(len(x), -1)
    scales = half(np.abs(x).max(axis=1) / F(127))  # rounded before the codes are found: they make up for it
    codes = np.clip(np.rint(x * reciprocal(scales.astype(np.float32))[:, None]), -127, 127).astype(np.int8)
    return np.concatenate([scales.view(np.uint8).reshape(-1, 2), codes.view(np.uint8)], axis=1)


def decode(payload: Bytes) -> Floats:
    """Return the values (blocks, 32) of a payload (blocks, 18, 34, 64 or 128)."""
    width = payload.shape[1]
    if width == 18:
        scales = np.ascontiguousarray(payload[:, :2]).view(np.float16).astype(np.float32) * _ROOT
        codes = np.concatenate([payload[:, 2:] & 15, payload[:, 2:] >> 4], axis=1).astype(np.float32) - F(8)
        return _transformed(codes * scales)
    if width == 34:
        scales = np.ascontiguousarray(payload[:, :2]).view(np.float16).astype(np.float32)
        return scales * payload[:, 2:].view(np.int8).astype(np.float32)
    stored = np.ascontiguousarray(payload).view(np.float16 if width == 64 else np.float32)
    return stored.astype(np.float32)


def _transformed(x: Floats) -> Floats:
    """Return the Walsh-Hadamard transform of blocks (blocks, 32), times the root of 32."""
    for distance in (16, 8, 4, 2, 1):
        pairs = x.reshape(len(x), -1, 2, distance)
        x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(len(x), 32)
    return x


def _nibbles(x: Floats) -> Bytes:
    x = _transformed(x) * _ROOT
    most, least = x.max(axis=1), x.min(axis=1)
    scales = half(np.where(-least > most, least, most) * F(-0.125))
    codes = np.clip(np.rint(x * reciprocal(scales.astype(np.float32))[:, None]), -8, 7).astype(np.int8) + 8
    both = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([scales.view(np.uint8).reshape(-1, 2), both.view(np.uint8)], axis=1)


def decode_sum(payloads: Bytes) -> Floats:
    """Return the sum (blocks, 32) over ranks, in rank order, of payloads (ranks, blocks, bytes)."""
    total = np.zeros((payloads.shape[1], BLOCK), np.float32)
    for payload in payloads:
        total = total + decode(payload)
    return total


def _sent(x: Floats, payload: str, rest: Floats | None) -> Bytes:
    """Return x + rest as a payload; rest becomes what that leaves out."""
    if rest is None:
        return encode(x, payload)
    whole = x + rest
    found = encode(whole, payload)
    rest[:] = whole - decode(found)
    return found


def all_reduce(
    values: list[Floats], algorithm: str, payload: str, homes: list[str], rests: list[Floats] | None = None
) -> Floats:
    """Return the sum (blocks, 32) of the ranks' values as an algorithm computes it, roundings included.

    homes: the host of each rank. rests: what each rank has left out before; changed.
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
        theirs = None if rests is None else [rests[leader] for leader in leaders]
        return all_reduce(sums, "direct" if direct else "scatter", payload, homes, theirs)
    if algorithm == "doubling":
        return _doubled(values, payload)
    kept: list[Floats | None] = [*rests] if rests is not None else [None] * len(values)
    total = decode_sum(np.stack([_sent(v, payload, rest) for v, rest in zip(values, kept, strict=True)]))
    if algorithm == "direct":
        return total
    again, count = decode(encode(total, payload)), len(values)
    for rank, rest in enumerate(rests or []):  # who sums a piece keeps what is left out of the sum
        piece = slice(len(total) * rank // count, len(total) * (rank + 1) // count)
        rest[piece] += total[piece] - again[piece]
    return again


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
