"""Rotary position embedding (arXiv:2104.09864) with the scalings that models ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

KINDS = ("none", "default", "linear", "dynamic", "yarn", "llama3", "longrope", "divided")


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    Attributes:
        kind: "none" (positions turn nothing), "default", "linear", "dynamic" (NTK), "yarn" (arXiv:2309.00071),
            "llama3", "longrope" (arXiv:2402.13753) or "divided" (frequencies by `short_factors`, at any length).
        dim: dimensions of a head that are rotated, its first ones.
        original_positions: the context the model was trained with, before scaling.
        attention_factor: what cos and sin are multiplied with (yarn, longrope).
        short_factors, long_factors: (dim / 2,), what frequencies are divided by in sequences up to the original
            context, and beyond (longrope).
    """

    kind: str
    dim: int
    theta: float
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


class Rope:
    """Cosines and sines for tokens at given positions.

    Attributes:
        frequencies: (dim / 2,) float32 angles a position, before scaling by a sequence's length.
    """

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self.frequencies = _inverse_frequencies(config)

    def __call__(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (cos, sin), each (tokens, dim / 2) float32.

        positions: (tokens,) int32. lengths: (tokens,) int32, for each token the length its sequence had when it was
        fed: its whole prompt's for a prompt's token, its own position + 1 for a generated one. Only dynamic and
        longrope scaling look at it, so that the result does not depend on how a prompt is cut into chunks.
        """
        c = self.config
        frequencies = self.frequencies[None, :]
        if c.kind == "dynamic":
            frequencies = np.stack([_dynamic_frequencies(c, max(int(n), c.original_positions)) for n in lengths])
        elif c.kind == "longrope":
            short, long = (self.frequencies / np.array(f, np.float32) for f in (c.short_factors, c.long_factors))
            frequencies = np.where((lengths > c.original_positions)[:, None], long, short)
        angles = positions.astype(np.float32)[:, None] * frequencies
        scale = np.float32(c.attention_factor)
        return np.cos(angles) * scale, np.sin(angles) * scale


def _plain_frequencies(theta: float, dim: int) -> np.ndarray:
    # In float64 from float32 exponents, then rounded: numpy's float32 power is off by up to 2 units in the last place.
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    return np.float32(1.0) / np.power(theta, exponents).astype(np.float32)


def _dynamic_frequencies(c: RopeConfig, length: int) -> np.ndarray:
    """Return the NTK-scaled frequencies for a sequence of `length`, at least the original context."""
    stretch = c.factor * length / c.original_positions - (c.factor - 1)
    return _plain_frequencies(c.theta * stretch ** (c.dim / (c.dim - 2)), c.dim)


def _inverse_frequencies(c: RopeConfig) -> np.ndarray:
    """Return (dim / 2,) float32 angles a position, before scaling by a sequence's length."""
    if c.kind == "none":
        return np.zeros(c.dim // 2, np.float32)
    plain = _plain_frequencies(c.theta, c.dim)
    if c.kind == "linear":
        return plain / np.float32(c.factor)
    if c.kind == "llama3":
        return _llama3_frequencies(c, plain)
    if c.kind == "yarn":
        return _yarn_frequencies(c, plain)
    return plain / np.array(c.short_factors, np.float32) if c.kind == "divided" else plain


def _llama3_frequencies(c: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Scale long wavelengths by the factor, keep short ones, and blend between (Llama 3.1)."""
    wavelength = 2 * np.pi / plain.astype(np.float64)
    longest, shortest = c.original_positions / c.low_freq_factor, c.original_positions / c.high_freq_factor
    smooth = (c.original_positions / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    blended = (1 - smooth) * plain / c.factor + smooth * plain
    scaled = np.where(wavelength > longest, plain / c.factor, np.where(wavelength < shortest, plain, blended))
    return scaled.astype(np.float32)


def _yarn_frequencies(c: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Interpolate slow dimensions, keep fast ones, with a ramp between those that turn beta_slow..beta_fast times."""

    def dimension(rotations: float) -> float:
        return c.dim * math.log(c.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(c.theta))

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(c.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies: np.ndarray = plain / c.factor * ramp + plain * (1 - ramp)
    return frequencies.astype(np.float32)
