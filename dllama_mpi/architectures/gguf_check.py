"""Whether the metadata of a GGUF file say what a model is: what is read from them, compared with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ..errors import ModelError
from ..model.config import ModelConfig
from ..model.rope import Rope, RopeConfig
from .gguf_keys import WITH_WINDOWS, gguf_architecture

# Of no effect on what is computed.
_NAMES = ("model_type", "published", "later_layers")
_TOLERANCE = 1e-5  # metadata have float32
_ANGLES = 2e-3


def check_config(config: ModelConfig, read: ModelConfig) -> str:
    """Compare a model with what its GGUF file says; return what is to be said to people, "" if nothing.

    Raises:
        ModelError: the file would be read as another model.
    """
    arch, found = gguf_architecture(config), list(_differences(config, read, ""))
    windows = [each for each in found if each[0].endswith(".window") and arch not in WITH_WINDOWS and not each[2]]
    wrong = next((each for each in found if each not in windows), None)
    if wrong is not None:
        name, ours, theirs = wrong
        raise ModelError(
            f"this model cannot be exported: GGUF's {arch} has no words for {name.lstrip('.')} {_shown(ours)}; it would"
            f" be read as {_shown(theirs)}"
        )
    window = min((ours for _, ours, _ in windows), default=0)
    if arch == "phi3":  # the file has it, and llama.cpp does not use it
        window = config.window
    if not 0 < window < config.max_position_embeddings:
        return ""
    return f"llama.cpp's {arch} has no windows: from position {window} on it will see more than this model was made for"


def _differences(ours: Any, theirs: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs: its name and both values."""
    if isinstance(ours, RopeConfig) and isinstance(theirs, RopeConfig):
        if not _same_angles(ours, theirs):
            yield name, f"of type {ours.kind} with its parameters", f"another one, of type {theirs.kind}"
    elif is_dataclass(ours) and type(ours) is type(theirs):
        for each in fields(ours):
            if each.name not in _NAMES:
                yield from _differences(getattr(ours, each.name), getattr(theirs, each.name), f"{name}.{each.name}")
    elif isinstance(ours, tuple) and isinstance(theirs, tuple) and len(ours) == len(theirs):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(one, other, f"{name}.{i}")
    elif isinstance(ours, float) and isinstance(theirs, int | float):
        if not math.isclose(ours, theirs, rel_tol=_TOLERANCE):
            yield name, ours, theirs
    elif ours != theirs:
        yield name, ours, theirs


def _same_angles(ours: RopeConfig, theirs: RopeConfig) -> bool:
    if ours.dim != theirs.dim:
        return False
    positions = np.array([1, 100, 1000], np.int32)
    for length in (1, 1 + max(ours.original_positions, theirs.original_positions)):
        lengths = np.full(len(positions), length, np.int32)
        found = [Rope(each)(positions, lengths) for each in (ours, theirs)]
        if any(np.abs(one - other).max() > _ANGLES for one, other in zip(*found, strict=True)):
            return False
    return True


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:80]
