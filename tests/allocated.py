"""Bytes that a rank has really allocated, for comparison with what was predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from dllama_mpi.model.build import RankWeights
from dllama_mpi.model.transformer import Transformer
from dllama_mpi.parallel.group import TensorParallelGroup


def arrays(held: Any) -> Iterator[np.ndarray]:
    """Yield the arrays in lists, tuples, mappings and dataclasses of any depth."""
    if isinstance(held, np.ndarray):
        yield held
    elif isinstance(held, dict):
        yield from arrays(list(held.values()))
    elif isinstance(held, (list, tuple)):
        for each in held:
            yield from arrays(each)
    elif is_dataclass(held):
        yield from arrays([getattr(held, field.name) for field in fields(held)])


def transformer_bytes(model: Transformer) -> int:
    """Return the bytes of a model's weights, buffers, KV caches and states, and of the terms of its all-reduces.

    The table of embeddings lies in its file. What several segments share is counted once.
    """
    held = dict(vars(model))
    weights = held.pop("_weights")
    assert isinstance(weights, RankWeights)
    for name in ("config", "rank", "_ropes"):
        del held[name]
    found = {(array.ctypes.data, array.nbytes): array.nbytes for array in arrays(held) if array.nbytes}
    return weights.nbytes + sum(found.values())


def group_bytes(group: TensorParallelGroup) -> int:
    """Return the bytes of a group's all-reduce besides the terms; of its host's shared memory this rank's part."""
    if group._reduce is None:
        return 0
    buffers = group._reduce.transport.buffers
    private = sum(array.nbytes for name, array in buffers.allocated.items() if name != "values")
    shared = 0 if buffers.shared is None else buffers.shared.nbytes // len(group.local_ranks) - buffers.values.nbytes
    return private + shared
