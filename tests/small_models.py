"""Configs of small models, made by hand: dense, with experts, and with states; for what needs shapes alone."""

from __future__ import annotations

from dataclasses import replace

from dllama_mpi.model.config import (
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    ShortConvConfig,
)
from dllama_mpi.model.rope import RopeConfig

ROPE = RopeConfig("default", 32, 1e4)
ATTENTION = AttentionConfig(8, 4, 32, ROPE, 32**-0.5)
EXPERTS = ExpertsConfig(MLPConfig(256), 16, 4, shared=MLPConfig(256), shared_gate=True)


def model(hidden: int, vocab: int, *layers: LayerConfig) -> ModelConfig:
    """Return a model of these layers."""
    return ModelConfig("llama", vocab, hidden, 2048, 1e-6, False, layers)


DENSE = model(256, 2048, *[LayerConfig(ATTENTION, MLPConfig(768))] * 4)
SPARSE = model(256, 2048, LayerConfig(ATTENTION, MLPConfig(768)), *[LayerConfig(ATTENTION, EXPERTS)] * 3)
_NEAR = replace(ATTENTION, window=40)
WINDOWS = model(256, 2048, *[LayerConfig(_NEAR, MLPConfig(768)), LayerConfig(ATTENTION, MLPConfig(768))] * 2)
_GATED = AttentionConfig(4, 2, 32, ROPE, 32**-0.5, gate=True)
_DELTA = DeltaNetConfig(2, 4, 32, 32, 4)
HYBRID = model(64, 160, *[LayerConfig(_DELTA, MLPConfig(96))] * 3, LayerConfig(_GATED, MLPConfig(96)))
_EIGHT = DeltaNetConfig(8, 8, 32, 32, 4)
STATE = model(
    256,
    2048,
    *[LayerConfig(_EIGHT, EXPERTS)] * 2,
    LayerConfig(ShortConvConfig(3), MLPConfig(768)),
    LayerConfig(ATTENTION, MLPConfig(768)),
)
