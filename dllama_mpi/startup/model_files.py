"""Files that are whole models, tokenizer and all: GGUF's and Distributed Llama's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..architectures.dllama import DllamaTensors, dllama_config, dllama_json, dllama_source
from ..architectures.gguf import gguf_config, gguf_json, gguf_source
from ..errors import ModelError
from ..model.config import ModelConfig
from ..text.dllama_tokenizer import dllama_tokenizer, tokenizer_files
from ..text.dllama_vocabulary import DllamaVocabulary, dllama_tokenizer_in
from ..text.gguf_tokenizer import gguf_tokenizer, has_vocabulary
from ..text.tokenizer import Tokenizer
from ..weights.dllama import DllamaFile, dllama_in
from ..weights.gguf import GgufFile, GgufModel, Metadata, gguf_in, split_set
from ..weights.gguf_tensors import Container, GgufTensors
from ..weights.source import WeightSource

METADATA = "metadata.gguf"  # in a folder that was converted from a GGUF file: what that said beside its tensors
_LONGEST = 60  # characters of a token that is shown


@dataclass(frozen=True)
class About:
    """What a model's file says of itself, for people.

    Attributes:
        said: what it says beside its tensors, each value short. special: the special tokens by name, their id and text.
        template: the chat template, if there is one.
    """

    said: Mapping[str, Any]
    special: Mapping[str, str]
    template: str | None


class ModelFile(Protocol):
    """A file that is a model.

    Attributes:
        kind: of file, for people. path: the file, or the first of a set. container: where its tensors lie.
    """

    kind: str
    path: Path

    @property
    def container(self) -> Container:
        """See above."""

    def config(self) -> ModelConfig:
        """Return the model's shape.

        Raises:
            ModelError: it is of an architecture that is not known, or says what cannot be.
        """

    def source(self, config: ModelConfig) -> WeightSource:
        """Return its tensors."""

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that comes with it; None if there is none.

        Raises:
            ModelError: it cannot be read.
        """

    def stop_ids(self) -> list[int]:
        """Return the ids that end a text, where there is no tokenizer."""

    def small_files(self, tokenizer: Tokenizer | None) -> dict[str, bytes]:
        """Return what a converted model needs besides tensors: its config.json, and the given or its own tokenizer."""

    def about(self, tokenizer: Path | None = None) -> About:
        """Return what it says of itself; tokenizer: another one than its own."""


class GgufModelFile:
    """A GGUF file, or a split set."""

    kind = "GGUF"

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            ModelError: it cannot be read.
        """
        self.path, self.container = path, GgufModel(path)
        self._tensors = GgufTensors(self.container)

    def config(self) -> ModelConfig:
        """Return the model's shape."""
        return gguf_config(self._tensors)

    def source(self, config: ModelConfig) -> WeightSource:
        """Return its tensors."""
        return gguf_source(self._tensors, config)

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that its metadata hold."""
        metadata = self.container.metadata
        return gguf_tokenizer(metadata, str(self.path)) if has_vocabulary(metadata) else None

    def stop_ids(self) -> list[int]:
        """Return the ids that end a text."""
        return gguf_stop_ids(self.container.metadata)

    def small_files(self, tokenizer: Tokenizer | None) -> dict[str, bytes]:
        """Return config.json, the metadata, and the given tokenizer."""
        files = {} if tokenizer is None else tokenizer_files(tokenizer)
        kept = self.container.files[0].without_tensors()
        return {"config.json": _json(gguf_json(self._tensors)), METADATA: kept, **files}

    def about(self, tokenizer: Path | None = None) -> About:
        """Return the metadata; those of the tokenizer are its own."""
        metadata = self.container.metadata
        shown = [key for key in metadata if not key.endswith(".chat_template")]
        counts = {key: metadata.count(key) for key in shown}
        said = {key: metadata[key] if counts[key] is None else f"{counts[key]} values" for key in shown}
        ids = {key: metadata[key] for key in metadata if key.startswith("tokenizer.ggml.") and key.endswith("_id")}
        texts = metadata["tokenizer.ggml.tokens"] if ids and metadata.count("tokenizer.ggml.tokens") else []
        special = {
            key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): _token(number, texts)
            for key, number in ids.items()
        }
        template = metadata.get("tokenizer.chat_template")
        return About(said, special, None if template is None else str(template))


class DllamaModelFile:
    """A .m file of Distributed Llama, with the .t file or the tokenizer.json beside it."""

    kind = "Distributed Llama"

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            ModelError: it cannot be read.
        """
        self.path, self.container = path, DllamaFile(path)

    def config(self) -> ModelConfig:
        """Return the model's shape."""
        return dllama_config(self.container)

    def source(self, config: ModelConfig) -> WeightSource:
        """Return its tensors."""
        return dllama_source(DllamaTensors(self.container), config)

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer beside it."""
        found = dllama_tokenizer_in(self.path.parent)
        if found is not None:
            return _dllama_tokenizer(found, self.container.get("vocab_size"))
        return Tokenizer.load(self.path) if (self.path.parent / "tokenizer.json").is_file() else None

    def stop_ids(self) -> list[int]:
        """Return none: the tokenizer alone knows them."""
        return []

    def small_files(self, tokenizer: Tokenizer | None) -> dict[str, bytes]:
        """Return config.json, and a tokenizer as a folder of Hugging Face has it."""
        tokenizer = tokenizer or self.tokenizer()
        files = {} if tokenizer is None else tokenizer_files(tokenizer)
        return {"config.json": _json(dllama_json(self.container)), **files}

    def about(self, tokenizer: Path | None = None) -> About:
        """Return the header, and what the tokenizer says."""
        said: dict[str, Any] = dict(self.container.said)
        if "arch_type" in said:
            said["arch_type"] = f"{said['arch_type']:#x} ({self.container.architecture})"
        found = dllama_tokenizer_in(tokenizer or self.path.parent)
        if found is None:
            return About(said, {}, None)
        v = DllamaVocabulary(found)
        texts = [token.decode("utf-8", "replace") for token in v.tokens]
        said |= {"tokenizer": found.name, "tokenizer.vocab_size": len(texts), "tokenizer.add_bos": v.add_bos}
        special = {} if v.bos_id is None else {"bos": _token(v.bos_id, texts)}
        special |= {f"eos{n or ''}": _token(token_id, texts) for n, token_id in enumerate(v.eos_ids)}
        return About(said, special, v.template or None)


def file_in(path: Path) -> ModelFile | None:
    """Open the file that is a model at a path: itself, or the only one in a folder; None if there is none.

    Raises:
        ModelError: there are several, or it cannot be read.
    """
    if (found := gguf_in(path)) is not None:
        return GgufModelFile(found)
    if (found := dllama_in(path)) is not None:
        return DllamaModelFile(found)
    return None


def gguf_metadata(folder: Path) -> Metadata | None:
    """Return the metadata of the GGUF file that a model is, or was converted from; None of another model.

    Raises:
        ModelError: the file cannot be read.
    """
    kept = folder / METADATA
    found = kept if kept.is_file() else gguf_in(folder)
    return None if found is None else GgufFile(split_set(found)[0]).metadata


def gguf_stop_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a text."""
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return sorted({each for each in named if type(each) is int})


def read_tokenizer(given: Path, folder: Path, rows: int | None) -> Tokenizer:
    """Read a tokenizer given by path: a .t file, a tokenizer.json, or a folder with one.

    folder: the model's. rows: of its table of embeddings, which a .t file does not know of.

    Raises:
        ModelError: it cannot be read, or has more tokens than there are rows.
    """
    if not (given / "tokenizer.json").is_file() and (found := dllama_tokenizer_in(given)) is not None:
        return _dllama_tokenizer(found, rows)
    return Tokenizer.load(folder, given)


def _dllama_tokenizer(path: Path, rows: int | None) -> Tokenizer:
    tokenizer = dllama_tokenizer(path)
    if rows is not None and tokenizer.vocab_size > rows:
        raise ModelError(
            f"{path} has {tokenizer.vocab_size} tokens, and the model {rows}; give the tokenizer that belongs to it by"
            " --tokenizer"
        )
    return tokenizer


def _token(number: Any, texts: Sequence[str]) -> str:
    """Return a token's id and text."""
    known = isinstance(number, int) and 0 <= number < len(texts) and isinstance(texts[number], str)
    return f"{number} {texts[number][:_LONGEST]!r}" if known else str(number)[:_LONGEST]


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
