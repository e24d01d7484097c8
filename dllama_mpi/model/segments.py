"""Runs of equal layers: which layers of a model are computed in one compiled call."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..kernels.layout import TileFormat
from .config import AttentionConfig, LayerConfig, ModelConfig
from .tensors import Kind, TensorSpec, layer_tensors


@dataclass(frozen=True)
class Run:
    """A segment's layers.

    Attributes:
        layers: their numbers in the model. layer: what they all are, but for windows and ropes.
        formats: of their matrices, by the names' ends.
    """

    layers: range
    layer: LayerConfig
    formats: Mapping[str, TileFormat]

    def specs(self, hidden: int) -> dict[str, TensorSpec]:
        """Return the tensors of one of these layers by the names' ends."""
        return {spec.name[1:]: spec for spec in layer_tensors(self.layer, "", hidden)}


def layer_formats(config: ModelConfig, index: int, formats: Mapping[str, TileFormat]) -> dict[str, TileFormat]:
    """Return the formats of a layer's matrices by the names' ends."""
    name = f"model.layers.{index}"
    specs = layer_tensors(config.layers[index], name, config.hidden_size)
    return {spec.name[len(name) + 1 :]: formats[spec.name] for spec in specs if spec.kind is Kind.MATRIX}


def runs(config: ModelConfig, formats: Mapping[str, TileFormat]) -> list[Run]:
    """Return the segments of a model, in order. Layers that differ in windows and ropes alone are equal."""
    ropes = config.ropes

    def kind(index: int) -> tuple[Any, ...]:
        layer = config.layers[index]
        if isinstance(layer.mixer, AttentionConfig):
            layer = replace(layer, mixer=replace(layer.mixer, window=0, rope=ropes[0]))
        return layer, tuple((name, fmt.name) for name, fmt in layer_formats(config, index, formats).items())

    found = []
    for (layer, _), group in itertools.groupby(range(config.num_layers), kind):
        numbers = list(group)
        held = layer_formats(config, numbers[0], formats)
        found.append(Run(range(numbers[0], numbers[-1] + 1), layer, held))
    return found
