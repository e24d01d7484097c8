"""Rotary position embedding (arXiv:2104.09864) with the scalings that config.json may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelError

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    Attributes:
        kind: "default", "linear", "dynamic" (NTK), "yarn" (arXiv:2309.00071) or "llama3".
        original_positions: the context the model was trained with, before scaling.
        attention_factor: what cos and sin are multiplied with (yarn).
    """

    kind: str
    head_dim: int
    theta: float
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @staticmethod
    def from_hf(config: Mapping[str, Any], where: str, head_dim: int, positions: int) -> RopeConfig:
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling`, of a parsed config.json.

        Raises:
            ModelError: an unknown kind of scaling, or one of its parameters missing.
        """
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise ModelError(f"{where}: rope scaling {given!r} is not an object; it needs rope_type and its parameters")
        kind = given.get("rope_type", given.get("type", "default"))
        theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
        if kind not in KINDS:
            raise ModelError(f"{where}: rope type {kind!r} is not supported; supported are {', '.join(KINDS)}")
        if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise ModelError(f"{where}: partial_rotary_factor is not supported; only whole heads are rotated")
        if not float(theta) > 0:
            raise ModelError(f"{where}: rope_theta is {theta}; it must be above 0")
        original = config.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
        factor = given.get("factor")
        if kind == "yarn" and factor is None and original:
            factor = positions / original
        needed = {"default": (), "llama3": ("low_freq_factor", "high_freq_factor")}.get(kind, ())
        missing = [key for key in needed if given.get(key) is None]
        if kind != "default" and factor is None:
            missing.insert(0, "factor")
        if missing:
            raise ModelError(f"{where}: rope scaling {kind!r} has no {missing[0]}")
        return RopeConfig(
            kind=kind,
            head_dim=head_dim,
            theta=float(theta),
            factor=float(factor or 1.0),
            # Dynamic scaling goes by the model's whole context, the others by the one it was trained with.
            original_positions=int(positions if kind == "dynamic" else original or positions),
            attention_factor=_attention_factor(given, float(factor or 1.0)) if kind == "yarn" else 1.0,
            beta_fast=float(given.get("beta_fast") or 32.0),
            beta_slow=float(given.get("beta_slow") or 1.0),
            truncate=bool(given.get("truncate", True)),
            low_freq_factor=float(given.get("low_freq_factor", 1.0)),
            high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        )


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(float(given["mscale"])) / mscale(float(given["mscale_all_dim"]))
    return mscale(1.0)


class Rope:
    """Cosines and sines for tokens at given positions."""

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self._frequencies = _inverse_frequencies(config)

    def __call__(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (cos, sin), each (tokens, head_dim / 2) float32.

        positions: (tokens,) int32. lengths: (tokens,) int32, for each token the length its sequence had when it was
        fed: its whole prompt's for a prompt's token, its own position + 1 for a generated one. Only dynamic scaling
        looks at it, so that the result does not depend on how a prompt is cut into chunks.
        """
        c = self.config
        frequencies = self._frequencies[None, :]
        if c.kind == "dynamic":
            frequencies = np.stack([_dynamic_frequencies(c, max(int(n), c.original_positions)) for n in lengths])
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
    return _plain_frequencies(c.theta * stretch ** (c.head_dim / (c.head_dim - 2)), c.head_dim)


def _inverse_frequencies(c: RopeConfig) -> np.ndarray:
    """Return (head_dim / 2,) float32 angles a position, before dynamic scaling."""
    plain = _plain_frequencies(c.theta, c.head_dim)
    if c.kind == "linear":
        return plain / np.float32(c.factor)
    if c.kind == "llama3":
        return _llama3_frequencies(c, plain)
    if c.kind == "yarn":
        return _yarn_frequencies(c, plain)
    return plain


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
        return c.head_dim * math.log(c.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(c.theta))

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(c.head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies: np.ndarray = plain / c.factor * ramp + plain * (1 - ramp)
    return frequencies.astype(np.float32)
