"""What a tiny model is: its configuration, how its weights are stored, and what is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

Config = dict[str, Any]


class Stored(NamedTuple):
    """One tensor of a checkpoint: its name, its safetensors type, and its values (bfloat16 as uint16 bits)."""

    name: str
    dtype: str
    values: npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One tiny model: its configuration, how its weights are stored, and what is computed with it.

    Attributes:
        name: Name in snake case, also that of the reference file.
        config: Contents of ``config.json``.
        dtype: Stored type of the weights: ``"F32"``, ``"F16"`` or ``"BF16"``.
        seed: Seed of the weights.
        shards: Number of safetensors files; with more than one an index is written as well.
        length: Number of tokens of the reference sequence.
        prompt: Number of leading tokens of that sequence which the greedy generation starts from.
        generation: Contents of ``generation_config.json``; None takes the token ids of ``config``.
        checkpoint: Yields the tensors of the case; None draws those of ``tensor_specs``, all of type ``dtype``.
    """

    name: str
    config: Config
    dtype: str
    seed: int
    shards: int = 1
    length: int = 48
    prompt: int = 16
    generation: Config | None = None
    checkpoint: Callable[[Case], Iterator[Stored]] | None = None
