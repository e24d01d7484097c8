"""Layers to try: activations with their twins, and buffers as a step finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dllama_mpi.kernels import activation
from dllama_mpi.kernels.layout import BLOCK, ROWS, ceil_to
from dllama_mpi.kernels.matrix import Activations, aligned_zeros
from dllama_mpi.model.experts import ExpertsScratch, Routing
from dllama_mpi.model.mlp import MLPScratch
from tests import naive_experts, naive_layers
from tests.naive_numbers import Floats
from tests.unit.kernel_inputs import NO_CODES

ACTIVATIONS: dict[str, tuple[Any, Callable[[Floats, Floats], Any], float]] = {
    "silu": (activation.Silu(), naive_layers.silu_mul, 4e-6),
    "gelu_tanh": (activation.GeluTanh(), naive_layers.gelu_tanh_mul, 4e-5),
    "clamped_swiglu": (
        activation.ClampedSwiGLU(7.0),
        lambda gate, up: naive_experts.clamped_swiglu(gate, up, 1.702, 7.0),
        2e-5,
    ),
    "clamped at 1": (
        activation.ClampedSwiGLU(1.0, 0.8),
        lambda gate, up: naive_experts.clamped_swiglu(gate, up, 0.8, 1.0),
        2e-5,
    ),
}  # with the relative error that exponents of rounded arguments have


def mlp_scratch(tokens: int, inner: int, quantised: bool) -> MLPScratch:
    """Return buffers as a step finds them: zeros where nothing is ever written, else anything."""
    width = ceil_to(inner, BLOCK)
    values, up = aligned_zeros((tokens, width)), aligned_zeros((tokens, width))
    codes = NO_CODES
    if quantised:
        codes = np.full((tokens, width), 99, np.int8), np.full((tokens, width // BLOCK), np.nan, np.float32), np.full(
            (tokens, width // BLOCK), 99, np.int32
        )  # fmt: skip
    for array in (values, up):
        array[:, : ceil_to(inner, ROWS)] = np.nan
    return MLPScratch(Activations(values, *codes), up)


def experts_scratch(
    routing: Routing, tokens: int, hidden: int, inner: int, quantised: tuple[bool, ...]
) -> ExpertsScratch:
    """Return buffers as a step finds them.

    quantised: whether the experts' gate, up and down take Q80 activations.
    """
    pairs, width, blocks = tokens * routing.chosen, ceil_to(hidden, BLOCK), ceil_to(hidden, BLOCK) // BLOCK
    codes = (
        np.full((pairs, width), 99, np.int8),
        np.full((pairs, blocks), np.nan, np.float32),
        np.full((pairs, blocks), 99, np.int32),
    )
    return ExpertsScratch(
        logits=np.full((tokens, ceil_to(routing.experts, ROWS)), np.nan, np.float32),
        scores=np.full((tokens, ceil_to(routing.experts, ROWS)), np.nan, np.float32),
        chosen=np.full((tokens, routing.chosen), -1, np.int32),
        weights=np.full((tokens, routing.chosen), np.nan, np.float32),
        starts=np.full(routing.experts + 1, -1, np.int64),
        tokens=np.full(pairs, -1, np.int32),
        places=np.full(pairs, -1, np.int32),
        gathered=Activations(
            np.full((0 if all(quantised[:2]) else pairs, width), np.nan, np.float32),
            *(codes if any(quantised[:2]) else NO_CODES),
        ),
        mlp=mlp_scratch(pairs, inner, quantised[2]),
        product=np.full((tokens, ceil_to(hidden, ROWS)), np.nan, np.float32),
        shared=mlp_scratch(tokens, inner, quantised[2]),
        shared_gates=np.full((tokens, ROWS), np.nan, np.float32),
    )


def routing_scratch(routing: Routing, tokens: int) -> ExpertsScratch:
    """Return buffers of which only those for routing are used."""
    return experts_scratch(routing, tokens, BLOCK, BLOCK, (False,) * 3)
