"""Reading the metadata of a GGUF file: the keys of its architecture, each of its type."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ModelError
from ..weights.gguf_tensors import GgufTensors

_MOST_FACTORS = 1 << 12


class Fields:
    """The metadata of one architecture, and the names of the tensors beside them."""

    def __init__(self, source: GgufTensors) -> None:
        self.source, self.metadata, self.where = source, source.model.metadata, str(source.folder)
        self.kind = self.metadata.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands, a list as a list; the default where there is none."""
        value = self.metadata.get(f"{self.kind}.{key}")
        if isinstance(value, np.ndarray):
            value = value.tolist()
        return default if value is None else value

    def each(self, key: str, layers: int) -> list[int]:
        """Return a whole number of each layer, where a file may have one for all."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) < layers or not all(type(each) is int for each in values):
            raise ModelError(
                f"{self.where}: {self.kind}.{key} is {str(value)[:60]}; it must be {layers} numbers, or one"
            )
        return values[:layers]

    def one(self, key: str, default: Any = None) -> Any:
        """Return a value that is the same for all layers, None where there is none.

        Raises:
            ModelError: layers differ in it.
        """
        value = self.get(key, default)
        if isinstance(value, list):
            if len({str(each) for each in value}) != 1:
                raise ModelError(f"{self.where}: {self.kind}.{key} differs from layer to layer, which is not supported")
            return value[0]
        return value

    def need(self, key: str) -> Any:
        """Return a number that is the same for all layers.

        Raises:
            ModelError: there is none.
        """
        value = self.one(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            said = "missing" if value is None else str(value)[:60]
            raise ModelError(f"{self.where}: {self.kind}.{key} is {said}; it must be a number")
        return value

    def has(self, name: str) -> bool:
        """Return whether there is such a tensor."""
        return name in self.source

    def factors(self, name: str) -> list[float]:
        """Return what a tensor divides the rotations by."""
        info = self.source.model.tensors[name]
        if not info.type.is_plain or len(info.shape) != 1 or info.shape[0] > _MOST_FACTORS:
            raise ModelError(f"{self.where}: tensor {name} is no list of up to {_MOST_FACTORS} numbers")
        found: list[float] = self.source[name].values(((0, info.shape[0]),)).tolist()
        if not all(0 < each < float("inf") for each in found):
            raise ModelError(f"{self.where}: tensor {name} has factors that are not above 0")
        return found
