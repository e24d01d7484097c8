"""Memory for weights: aligned, apart from each other, given back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from dllama_mpi.weights.arena import Arena


def test_what_is_given_is_aligned_and_apart() -> None:
    arena, rng = Arena(), np.random.default_rng(0)
    shapes = [(3,), (0, 288), (5, 7, 288), (1 << 20,), (300 << 20,), (2, 64), (200 << 20,), (100 << 20,), (1,)]
    made = [arena.empty(shape) for shape in shapes]
    values = rng.integers(1, 255, len(made), np.uint8)
    for array, shape, value in zip(made, shapes, values, strict=True):
        assert array.shape == shape
        assert array.ctypes.data % 64 == 0
        array[:1] = value
        array[-1:] = value
    for array, value in zip(made, values, strict=True):
        assert (array[:1] == value).all()
        assert (array[-1:] == value).all()


def test_a_region_in_which_nothing_lies_is_given_back() -> None:
    arena = Arena()
    first = arena.empty((200 << 20,))
    region = weakref.ref(first.base)
    arena.empty((200 << 20,))
    assert region() is not None
    del first
    gc.collect()
    assert region() is None


def test_too_little_memory() -> None:
    with pytest.raises(MemoryError, match="bytes of memory for weights"):
        Arena().empty((1 << 62,))
