"""Writing a model that has been opened as a GGUF file, for llama.cpp and others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..architectures.gguf import gguf_config
from ..architectures.gguf_check import check_config
from ..architectures.gguf_keys import gguf_architecture, gguf_keys, rope_factors
from ..architectures.gguf_layout import GgufTensor, bits_of, layout, pieces, types_of
from ..errors import ModelError
from ..kernels.layout import FORMATS, TileFormat
from ..log import say
from ..model.config import ModelConfig
from ..model.recipe import WeightRecipe
from ..model.tensors import TABLE, Kind, tensors
from ..progress import progress_bytes
from ..text.gguf_tokenizer import MODEL
from ..text.gguf_vocabulary import vocabulary_keys
from ..weights.blocks import BlockTensor
from ..weights.files import model_name
from ..weights.gguf import GgufModel
from ..weights.gguf_pack import FORMAT_OF
from ..weights.gguf_tensors import GgufTensors
from ..weights.gguf_types import BY_NAME, BlockType
from ..weights.gguf_write import NEEDS_GGUF, GgufOut, Slot, keys_of, write_header
from .model_files import gguf_metadata
from .opening import ModelFiles, load_tokenizer

TYPES = {"q4_0": "q40", "q8_0": "q80", "f16": "f16"}
"""The format of this program that each type of file is made of."""
# llama.cpp's numbers of the types of files.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "IQ4_NL": 25, "MXFP4": 38}
# Of metadata that are copied: what tells of the old file alone.
_OLD = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
_OLD_GROUPS = ("split.", "quantize.")


@dataclass(frozen=True)
class Export:
    """What is written: a model, each matrix in a type that holds it, and its tokenizer.

    Attributes:
        opened: the whole model. type: a key of `TYPES`; None: what fits each matrix. with_tokenizer: that, too.
    """

    opened: ModelFiles
    type: str | None = None
    with_tokenizer: bool = True

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.opened.config

    @cached_property
    def formats(self) -> dict[str, TileFormat]:
        """The format of each matrix in the file: what it has, where GGUF has that; else the nearest that loses less."""
        held = self.opened.whole.formats
        wanted = WeightRecipe.parse(TYPES[self.type or "f16"]).formats(self.config, held)
        if self.type is None:
            wanted |= {
                name: fmt if fmt.name in FORMAT_OF.values() else _nearest(fmt) for name, fmt in self._held.items()
            }
        return wanted

    @cached_property
    def _held(self) -> dict[str, TileFormat]:
        """The formats that the source holds matrices in, without those of which GGUF's types round what is there."""
        found = dict(self.opened.whole.formats)
        for name in found:
            kind = self._block_type(name)
            if kind is not None and kind.name not in FORMAT_OF:
                found[name] = FORMATS["q4m"]
        return found

    @cached_property
    def written(self) -> list[GgufTensor]:
        """The tensors of the file.

        Raises:
            ModelError: the package gguf is not installed, or GGUF has no place for one.
        """
        try:
            return layout(self.config, gguf_architecture(self.config), self.formats, self._table())
        except ImportError:
            raise ModelError(NEEDS_GGUF) from None

    def _table(self) -> BlockType:
        """Return the type of the table of embeddings: 8 bits in a file of fewer than 16, as llama.cpp has it."""
        names = [fmt.name for fmt in self.formats.values()]
        quantised = max(sorted(set(names)), key=names.count) in FORMAT_OF.values()
        return BY_NAME["Q8_0" if quantised else "F16"]

    @property
    def bits(self) -> float:
        """Mean bits of the matrices' weights in the file."""
        return bits_of(self.written)

    def requantised(self) -> str:
        """Return what is to be said of matrices whose format GGUF has not; "" if there are none."""
        formats = self.formats
        changed = {
            name: fmt for name, fmt in self._held.items() if formats[name] is not fmt and fmt.quantised_activations
        }
        if self.type is not None or not changed:
            return ""
        kinds = ", ".join(sorted({self._called(name) for name in changed}))
        sizes = {spec.name: spec.size for spec in tensors(self.config) if spec.kind is Kind.MATRIX}
        before = sum(size * self._bits(name) for name, size in sizes.items()) / sum(sizes.values())
        return (
            f"{kinds}: no type that is written here has these codes; Q8_0 holds their values, from {before:.2f} to"
            f" {self.bits:.2f} bits a weight; --type q4_0 makes it smaller and rounds them anew"
        )

    def _block_type(self, name: str) -> BlockType | None:
        """Return the type of a matrix that is in blocks of GGUF."""
        tensor = self.opened.whole[name if name in self.opened.whole else TABLE]
        return tensor.type if isinstance(tensor, BlockTensor) else None

    def _called(self, name: str) -> str:
        kind = self._block_type(name)
        return self._held[name].name if kind is None else kind.name

    def _bits(self, name: str) -> float:
        kind = self._block_type(name)
        return self.opened.whole.formats.get(name, FORMATS["f16"]).bits if kind is None else kind.bits

    # ---- metadata

    def _copied(self) -> dict[str, Any] | None:
        """Return the metadata of the GGUF file that the model is, or was converted from; None of another model."""
        metadata = gguf_metadata(self.opened.folder)
        if metadata is None:
            return None
        found: dict[str, Any] = {**keys_of(metadata)}
        return {key: value for key, value in found.items() if key not in _OLD and not key.startswith(_OLD_GROUPS)}

    def keys(self) -> tuple[dict[str, Any], list[str]]:
        """Return the metadata without the architecture, and lines for people.

        Raises:
            ModelError: GGUF has no words for what the model or its tokenizer is.
        """
        arch, said = gguf_architecture(self.config), []
        own = {f"{arch}.{key}": value for key, value in gguf_keys(self.config).items()}
        keys = self._copied()
        if keys is None:
            keys = {"general.type": "model", "general.name": model_name(self.opened.folder), **own}
            if self.with_tokenizer:
                tokenizer = load_tokenizer(self.opened.folder)
                if tokenizer is not None:
                    found, line = vocabulary_keys(tokenizer, self.config.vocab_size, arch)
                    keys |= found
                    said += [line] if line else []
        else:  # layers that predict further tokens are not written
            keys |= {f"{arch}.{name}": own[f"{arch}.{name}"] for name in ("block_count", "vocab_size")}
            keys.pop(f"{arch}.nextn_predict_layers", None)
        if not self.with_tokenizer:
            keys = {key: value for key, value in keys.items() if not key.startswith("tokenizer.")}
        keys.setdefault(MODEL, "none")
        names: dict[str, int] = {}
        for kind, size in types_of(self.written):
            names[kind.name] = names.get(kind.name, 0) + size
        keys["general.file_type"] = _FILE_TYPES[max(sorted(names), key=lambda name: names[name])]
        if any(name in FORMAT_OF for name in names):
            keys["general.quantization_version"] = 2
        return keys, said

    # ---- writing

    def write(self, destination: Path, show_progress: bool) -> int:
        """Write the file; return its bytes. Lines for people go to stderr.

        Raises:
            UsageError: the destination is there already, or the disk cannot hold it.
            ModelError: the model cannot be said in GGUF, or a tensor cannot be read.
        """
        out = GgufOut(Path(os.path.realpath(destination.parent)) / destination.name)
        factors = rope_factors(self.config)
        first = [(Slot(name, values.shape, BY_NAME["F32"], values.nbytes), values) for name, values in factors.items()]
        slots = [Slot(each.name, each.shape, each.kind, each.size) for each in self.written]
        total = sum(slot.size for slot in slots)
        with out.writing(total):
            keys, said = self.keys()
            write_header(out.path, gguf_architecture(self.config), keys, [*(slot for slot, _ in first), *slots])
            for _ in out.write([(slot, [values.view(np.uint8)]) for slot, values in first]):
                pass
            with out.grown(total + 64 * len(slots)):
                line = check_config(self.config, gguf_config(GgufTensors(GgufModel(out.path))))
            for each in [*said, *([line] if line else [])]:
                say(each)
            work = out.write((slot, self._data(each)) for slot, each in zip(slots, self.written, strict=True))
            for _ in progress_bytes(work, "exporting", show_progress, total):
                pass
        return out.destination.stat().st_size

    def _data(self, tensor: GgufTensor) -> Iterator[np.ndarray]:
        return pieces(self.opened.whole, tensor)


def _nearest(fmt: TileFormat) -> TileFormat:
    return FORMATS["q80"] if fmt.quantised_activations else FORMATS["f16"]
