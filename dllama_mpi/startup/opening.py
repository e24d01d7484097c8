"""Finding and opening a model: `open_model`, whatever it lies in."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..architectures.base import held_formats
from ..architectures.quantisation import read_scheme
from ..architectures.registry import architecture_of, read_config, read_model_config
from ..errors import ModelError, UsageError
from ..kernels.layout import TileFormat
from ..model.build import check_files
from ..model.config import ModelConfig
from ..model.recipe import DEFAULT, WeightRecipe, bits_per_weight, described
from ..model.shapes import shape_config
from ..model.tensors import HEAD, TABLE, Kind, tensors
from ..text.files import read_json
from ..text.gguf_tokenizer import gguf_templates, gguf_tokenizer, has_vocabulary
from ..text.tokenizer import Tokenizer, declared_ids
from ..weights.checkpoint import Checkpoint
from ..weights.mapped import MappedSource
from ..weights.quantised import QuantisedTensors
from ..weights.random import RandomSource
from ..weights.slices import SliceCheckpoint, slices_in
from ..weights.source import WeightSource
from .model_files import ModelFile, file_in, gguf_metadata, gguf_stop_ids, read_tokenizer

RANDOM = "random:"  # begins the name of a model that is a shape, and on no disk
SUFFIXES = (".safetensors", ".gguf", ".m")  # of files that hold weights
DEMO = Path(__file__).resolve().parent.parent / "demo"


@dataclass(frozen=True)
class ModelFiles:
    """A model that has been opened.

    Attributes:
        folder: where its small files lie. config: its shape. source: the whole model's tensors; None if the folder has
            slices alone, or nothing that was opened. slices: those. file: the file that is the whole model, if one is.
        quantised: how the files' matrices are, as published, for people; "" where they are plain, or this program's.
    """

    folder: Path
    config: ModelConfig
    source: WeightSource | None
    slices: Sequence[SliceCheckpoint] = ()
    file: ModelFile | None = None
    quantised: str = ""

    def formats(self, weights: str | None) -> dict[str, TileFormat]:
        """Return the format of every matrix: what `--weights` says, else what the files hold, else the default.

        Raises:
            UsageError: no such format or rule. ModelError: slices alone, and they are of other formats.
        """
        held: Mapping[str, TileFormat] = {}
        if self.source is not None:
            held = self.source.formats
        elif self.slices:
            held = self.slices[0].formats
        wanted = WeightRecipe.parse(weights or DEFAULT).formats(self.config, held)
        if weights is None:
            return {**wanted, **held}
        if self.slices and self.source is None and wanted != {name: held[name] for name in wanted}:
            path = self.slices[0].path
            raise ModelError(f"{path} holds other weights than {weights}; leave out --weights, or give the whole model")
        return wanted

    def small_files(self, tokenizer: str | None = None) -> dict[str, bytes]:
        """Return what a converted model needs besides tensors and the folder has no file of: all of a file that is one.

        tokenizer: the path of one that is to be the converted model's.

        Raises:
            UsageError: the model is a folder, whose tokenizer is copied. ModelError: the tokenizer cannot be read.
        """
        if self.file is None:
            if tokenizer is not None:
                raise UsageError(f"--tokenizer {tokenizer}: {self.folder} is a folder, whose own tokenizer is copied")
            return {}
        if tokenizer is None:
            return self.file.small_files(None)
        return self.file.small_files(read_tokenizer(Path(tokenizer), self.folder, self.config.vocab_size))

    def told(self, weights: str | None) -> str:
        """Return what is to be said of a quantised model: how it is kept, or requantised by `--weights`; "" if nothing.

        What a model's single file holds is no surprise: of one that stays as it is nothing is said.
        """
        if not self.quantised or self.source is None or not self.source.formats:
            return ""
        held, wanted = self.formats(None), self.formats(weights)
        if held == wanted:
            kept = described(self.config, held)
            return "" if self.file is not None else f"{self.folder.name}: {self.quantised}: kept as {kept}"
        bits = [bits_per_weight(self.config, formats) for formats in (held, wanted)]
        return (
            f"--weights {weights}: {self.folder.name} is quantised already and is requantised, from {bits[0]:.2f} to"
            f" {bits[1]:.2f} bits a weight; without --weights it stays as it is"
        )

    @property
    def whole(self) -> WeightSource:
        """The whole model's tensors.

        Raises:
            ModelError: there are slices alone.
        """
        if self.source is None:
            raise ModelError(f"{self.folder} holds slices of a model; give the whole model")
        return self.source


def model_folder(model: str) -> Path:
    """Return the directory of a model given by path, or of the bundled one for "demo"."""
    return DEMO if model == "demo" and not Path(model).is_dir() else Path(model).expanduser()


def model_config(model: str) -> ModelConfig:
    """Return the config of a model given by path, "demo" or "random:SHAPE"; its weights need not be there.

    Raises:
        UsageError: no such shape. ModelError: the folder or its config.json is missing, or not to be read.
    """
    if model.startswith(RANDOM):
        return read_model_config(shape_config(model.removeprefix(RANDOM)), model)
    folder = model_folder(model)
    if (file := file_in(folder)) is not None:
        return file.config()
    return read_model_config(read_config(folder), str(folder / "config.json"))


def open_model(model: str, check: bool = True) -> ModelFiles:
    """Open a model given by path, "demo" or "random:SHAPE"; check: that its tensors are those of its config.

    Raises:
        UsageError: no such shape. ModelError: files that are missing, damaged or do not fit the config.
    """
    if model.startswith(RANDOM):
        config = model_config(model)
        return ModelFiles(Path(model), config, random_source(model, config))
    folder = model_folder(model)
    found = open_folder(folder, None)
    if check and found.source is not None:
        check_files(found.source, found.config)
    return found


def open_shape(model: str) -> ModelFiles:
    """Open a model like `open_model`, but be content with its config.json: before weights are downloaded, say.

    Raises:
        UsageError: no such shape. ModelError: files that are there, but cannot be read.
    """
    folder = model_folder(model)
    if model.startswith(RANDOM) or has_weights(folder):
        return open_model(model, check=False)
    return ModelFiles(folder, model_config(model), None)


def has_weights(folder: Path) -> bool:
    """Return whether a path names a file of weights, or a folder that has some."""
    return folder.is_file() or any(any(folder.glob(f"*{suffix}")) for suffix in SUFFIXES)


def open_folder(folder: Path, config: ModelConfig | None) -> ModelFiles:
    """Open a model directory, a whole model's files or slices of one, or a file that is a model.

    config: where another rank has read it already; None: what the files say.

    Raises:
        ModelError: there is none, or a file is damaged.
    """
    if (file := file_in(folder)) is not None:
        config = config or file.config()
        return ModelFiles(file.path, config, file.source(config), file=file, quantised=file.kind)
    config = config or read_model_config(read_config(folder), str(folder / "config.json"))
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        slices = slices_in(folder)
        if slices:
            return ModelFiles(folder, config, None, slices)
    checkpoint = Checkpoint(folder)
    if checkpoint.is_converted:
        return ModelFiles(folder, config, checkpoint)
    return _published(folder, config, checkpoint)


def _published(folder: Path, config: ModelConfig, checkpoint: Checkpoint) -> ModelFiles:
    """Return a model of safetensors files as published, maybe quantised."""
    parsed, where = read_config(folder), str(folder / "config.json")
    architecture, scheme = architecture_of(parsed, where), read_scheme(parsed, where)
    quantised = None if scheme is None else QuantisedTensors(checkpoint, scheme)
    if quantised is None or not quantised.is_quantised:
        places = architecture.places(config, checkpoint.names())
        return ModelFiles(folder, config, MappedSource(checkpoint, places, architecture.unused(config)))
    places = architecture.places(config, quantised.names())
    for name in places[TABLE].names:
        if quantised.format_of(name) is not None:
            raise ModelError(f"tensor {name} is quantised, but a table of embeddings must be plain; get another model")
    formats = held_formats(config, places, quantised.format_of)
    source = MappedSource(quantised, places, architecture.unused(config), formats)
    return ModelFiles(folder, config, source, quantised=quantised.scheme.about)


def random_source(name: str, config: ModelConfig) -> RandomSource:
    """Return random weights of a model's shape; a tied lm_head is the table of embeddings."""
    shapes = {spec.name: spec.shape for spec in tensors(config)}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return RandomSource(name, shapes, next(spec.name for spec in tensors(config) if spec.kind is Kind.TABLE) or TABLE)


def load_tokenizer(folder: Path, given: str | None = None, rows: int | None = None) -> Tokenizer | None:
    """Return the tokenizer of a model, or the given one; None where there is none: token ids alone need none.

    rows: of the model's table of embeddings.

    Raises:
        ModelError: it cannot be read.
    """
    has_own = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    metadata = None if has_own else gguf_metadata(folder)
    if given is None and metadata is not None:
        return gguf_tokenizer(metadata, str(folder)) if has_vocabulary(metadata) else None
    if given is not None:
        tokenizer: Tokenizer | None = read_tokenizer(Path(given), folder, rows)
    elif has_own:
        tokenizer = Tokenizer.load(folder)
    else:
        file = file_in(folder)
        tokenizer = None if file is None else file.tokenizer()
    if tokenizer is not None and metadata is not None and not tokenizer.templates:
        tokenizer.templates = gguf_templates(metadata, str(folder))
    return tokenizer


def declared_stop_ids(folder: Path) -> list[int]:
    """Return the stop tokens that generation_config.json and config.json name; for models without a tokenizer."""
    metadata = gguf_metadata(folder)
    ids = set() if metadata is None else set(gguf_stop_ids(metadata))
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(ModelError):
            ids.update(declared_ids(read_json(folder / name), "eos_token_id"))
    return sorted(ids)
