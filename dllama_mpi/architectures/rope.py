"""Reading what a config.json says of rotary embeddings, in both generations of its keys."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import log, sqrt
from typing import Any

import numpy as np

from ..errors import ModelError
from ..model.rope import KINDS, Rope, RopeConfig
from .keys import FULL, LIMITS, SLIDING, Json, Keys, short

_ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
              "beta_fast", "beta_slow", "truncate", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
              "short_factor", "long_factor", "partial_rotary_factor", "finetuned", "mrope_section", "mrope_interleaved",
              "llama_4_scaling_beta", "max_position_embeddings", "factors")  # fmt: skip


def scaling_of(keys: Keys) -> Json:
    """Return `rope_scaling` or, where that is none, `rope_parameters`; an empty object where both are.

    Raises:
        ModelError: it is no object.
    """
    scaling, parameters = keys.get("rope_scaling"), keys.get("rope_parameters")
    given = scaling or parameters or {}
    if not isinstance(given, Mapping):
        raise ModelError(
            f"{keys.where}: rope scaling {short(given)} is not an object; it needs rope_type and its parameters"
        )
    return given


def rope_kind(given: Json) -> Any:
    """Return the kind of scaling that rope parameters name."""
    return given.get("rope_type", given.get("type", "default"))


def read_rope(
    keys: Keys, head_dim: int, given: Json | None = None, theta: float = 10000.0, partial: float = 1.0
) -> RopeConfig:
    """Read `rope_parameters`, or `rope_theta` and `rope_scaling`, of a config.

    given: the parameters, where they stand elsewhere. theta, partial: base, and part of a head that is rotated, where
    the file names none.

    Raises:
        ModelError: an unknown kind of scaling, or one of its parameters missing or impossible.
    """
    base = {key: keys.get(key) for key in ("rope_theta", "partial_rotary_factor") if key in keys}
    own = {key: keys.get(key) for key in ("original_max_position_embeddings",) if key in keys}
    given, where = scaling_of(keys) if given is None else given, f"{keys.where}: rope scaling"
    unknown = next((key for key in given if key not in _ROPE_KEYS), None)
    if unknown is not None:
        raise ModelError(f"{where} has {unknown!r}, which is not known; known are {', '.join(_ROPE_KEYS)}")
    kind = rope_kind(given)
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in KINDS[1:]:
        raise ModelError(f"{where} {short(kind)} is not supported; supported are {', '.join(KINDS[1:])}")
    # What stands beside the parameters fills gaps, but for the original context, which transformers takes from there.
    r = Keys({**base, **given, **own}, f"{where} {kind!r}")
    positions = keys.count("max_position_embeddings", 2048)
    dim = int(head_dim * r.number("partial_rotary_factor", partial, above=0.0))
    if dim > head_dim or dim % 2 or dim < 2:
        raise ModelError(
            f"{where}: {dim} of the {head_dim} dimensions of a head are rotated; it must be an even number"
        )
    values: dict[str, Any] = {"kind": kind, "dim": dim, "theta": r.number("rope_theta", theta, above=1.0)}
    original = r.count("original_max_position_embeddings", positions, most=LIMITS["max_position_embeddings"])
    # Dynamic scaling goes by the model's whole context, the others by the one it was trained with.
    values["original_positions"] = positions if kind == "dynamic" else original
    has_original = "original_max_position_embeddings" in r
    if "factor" not in r and (kind == "longrope" or (kind == "yarn" and has_original)):
        values["factor"] = positions / original
    elif kind not in ("default", "divided"):
        if "factor" not in r:
            raise ModelError(f"{where} {kind!r} has no factor")
        values["factor"] = r.number("factor", above=0.0)
    return _checked(RopeConfig(**values, **_SCALINGS.get(kind, _nothing)(r, values)), positions, where)


def whole_rope(keys: Keys, head_dim: int, given: Json | None = None) -> RopeConfig:
    """Read a rope like `read_rope`, of a model that rotates whole heads.

    Raises:
        ModelError: as there, or the file says otherwise.
    """
    rope = read_rope(keys, head_dim, given)
    if rope.dim != head_dim:
        raise ModelError(f"{keys.where}: partial_rotary_factor is not 1; {keys.kind} rotates whole heads")
    return rope


def _checked(rope: RopeConfig, positions: int, where: str) -> RopeConfig:
    """Return a rope whose cosines are numbers.

    Raises:
        ModelError: they are not.
    """
    try:
        with np.errstate(all="ignore", over="raise"):
            cos, _ = Rope(rope)(np.array([1, positions], np.int32), np.array([2, positions + 1], np.int32))
        good = bool(np.isfinite(cos).all())
    except (ArithmeticError, ValueError):
        good = False
    if not good:
        raise ModelError(f"{where} {rope.kind!r} with theta {rope.theta:g} and factor {rope.factor:g} gives no angles")
    return rope


def ropes_by_type(keys: Keys, head_dim: int, sliding: Json) -> dict[str, RopeConfig]:
    """Return the ropes of full and of sliding layers, by type.

    Newer files nest `rope_parameters` by type. In older ones `rope_theta` and `rope_scaling` are those of full layers.
    sliding: what those of sliding layers are where the file does not say.

    Raises:
        ModelError: as `read_rope`, or another type of layer.
    """
    nested = keys.get("rope_parameters") or {}
    if (
        not isinstance(nested, Mapping)
        or set(nested) - {FULL, SLIDING}
        or not all(isinstance(each or {}, Mapping) for each in nested.values())
    ):
        raise ModelError(f"{keys.where}: rope_parameters {short(nested)} must be objects by {FULL} and {SLIDING}")
    full = nested.get(FULL) or {} if nested else scaling_of(keys)
    given = {FULL: full, SLIDING: {**sliding, **(nested.get(SLIDING) or {})}}
    return {kind: whole_rope(keys, head_dim, each) for kind, each in given.items()}


def _nothing(r: Keys, values: Json) -> dict[str, Any]:
    return {}


def _yarn(r: Keys, values: Json) -> dict[str, Any]:
    def mscale(weight: float) -> float:
        return 0.1 * weight * log(values["factor"]) + 1.0 if values["factor"] > 1 else 1.0

    attention = mscale(1.0)
    if "attention_factor" in r:
        attention = r.number("attention_factor")
    elif r.get("mscale") and r.get("mscale_all_dim"):
        attention = mscale(r.number("mscale")) / mscale(r.number("mscale_all_dim"))
    return {
        "attention_factor": attention,
        "beta_fast": r.number("beta_fast", 32.0, above=0.0),
        "beta_slow": r.number("beta_slow", 1.0, above=0.0),
        "truncate": r.flag("truncate", True),
    }


def _llama3(r: Keys, values: Json) -> dict[str, Any]:
    low, high = r.number("low_freq_factor", above=0.0), r.number("high_freq_factor", above=0.0)
    if not high > low:
        raise ModelError(f"{r.where}: high_freq_factor is {high:g}; it must be above low_freq_factor, {low:g}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value <= sys.float_info.max


def _factors(r: Keys, name: str, values: Json) -> tuple[float, ...]:
    given, half = r.get(name), values["dim"] // 2
    if not isinstance(given, list) or len(given) != half or not all(_positive(factor) for factor in given):
        raise ModelError(f"{r.where}: {name} must be a list of {half} numbers above 0, half the rotated dimensions")
    return tuple(float(f) for f in given)


def _divided(r: Keys, values: Json) -> dict[str, Any]:
    return {"short_factors": _factors(r, "factors", values)}


def _longrope(r: Keys, values: Json) -> dict[str, Any]:
    factors = {f"{name}s": _factors(r, name, values) for name in ("short_factor", "long_factor")}
    factor, original = values["factor"], values["original_positions"]
    attention = sqrt(1 + log(factor) / log(max(original, 2))) if factor > 1 else 1.0
    return {**factors, "attention_factor": r.number("attention_factor", attention)}


_SCALINGS = {"yarn": _yarn, "llama3": _llama3, "longrope": _longrope, "divided": _divided}
