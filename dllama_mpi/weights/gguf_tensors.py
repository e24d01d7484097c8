"""Tensors of files in GGUF's types as `MappedSource` takes them: mapped, under the files' own names."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..errors import ModelError
from ..kernels.layout import TileFormat
from .blocks import BlockTensor
from .checkpoint import name_of
from .gguf import GgufModel
from .mapped_file import MappedFile, TensorInfo
from .source import Tensor

_NUMPY = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}


class Container(Protocol):
    """A model's files, opened; path: the first."""

    path: Path

    @property
    def files(self) -> Sequence[MappedFile]:
        """All of them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of all files."""

    def fingerprint(self) -> str:
        """Return a digest of sizes, headers and samples of all tensors."""


C = TypeVar("C", bound=Container)


class FileTensors(Generic[C]):
    """All tensors of a model's files under the files' own names; what `MappedSource` reads from.

    Attributes:
        folder: the file. model: the container.
    """

    def __init__(self, model: C) -> None:
        """Take opened files."""
        self.model, self.folder = model, model.path
        self._fingerprint = ""

    def __contains__(self, name: str) -> bool:
        return name in self.model.tensors

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.model.tensors)

    def format_of(self, name: str) -> TileFormat | None:
        """Return the format that keeps a tensor best; None for plain numbers, or where there is none."""
        return self.model.tensors[name].type.format if name in self else None

    def __getitem__(self, name: str) -> Tensor:
        """Map a tensor.

        Raises:
            ModelError: no such tensor.
        """
        if name not in self.model.tensors:
            raise ModelError(f"{self.folder}: tensor {name} is missing; metadata and weights do not fit")
        info = self.model.tensors[name]
        file = self.model.files[info.file]
        data, release = file.bytes_of(info), functools.partial(file.release, info.start, info.size)
        if info.type.is_plain:
            return Tensor(
                name, info.type.name, np.frombuffer(data, _NUMPY[info.type.name]).reshape(info.shape), None, release
            )
        size = info.shape[-1] // info.type.columns * info.type.size
        blocks = data.reshape(*info.shape[:-1], size)
        if blocks.ndim not in (2, 3):
            raise ModelError(f"{self.folder}: tensor {name} of {info.type.name} has the shape {list(info.shape)}")
        return BlockTensor(name, info.type.name, blocks, None, release, type=info.type)

    def raw(self, name: str) -> tuple[np.ndarray, str]:
        """Return a tensor's elements, or the bytes of its blocks, and the name of their type."""
        tensor = self[name]
        return tensor.data, tensor.dtype

    def let_go(self) -> None:
        """Give back the memory of all pages that were read."""
        for file in self.model.files:
            file.release(file.header, file.data.size - file.header)

    def lineage(self, formats: Mapping[str, TileFormat]) -> str:
        """Return what the matrices have been made from; see `Checkpoint.lineage`."""
        self._fingerprint = self._fingerprint or self.model.fingerprint()
        return f"{self._fingerprint}>{name_of(formats)}"


GgufTensors = FileTensors[GgufModel]
