"""Where models are: a directory, the one that comes with the package, or random weights of a known shape."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from ..model.config import ModelConfig
from ..model.names import check_files, matrix_shapes, vector_shapes
from ..model.shapes import shape_config
from ..weights.checkpoint import Checkpoint
from ..weights.random import RandomCheckpoint
from ..weights.slices import SliceCheckpoint
from .placement import open_folder

RANDOM = "random:"  # before a shape's name: its weights are random, and on no disk
DEMO = Path(__file__).resolve().parent.parent / "demo"


def model_folder(model: str) -> Path:
    """Return the directory of a model given by path, or of the bundled one for "demo"."""
    return DEMO if model == "demo" and not Path(model).is_dir() else Path(model).expanduser()


def open_model(model: str) -> tuple[Path, ModelConfig, Checkpoint | list[SliceCheckpoint]]:
    """Return the folder, config and weights, or slices of them, of a model given by path, "demo" or "random:SHAPE".

    A random one, of a shape in `SHAPES`, has no folder, no tokenizer and no files.

    Raises:
        UsageError: no such shape. ModelError: files that are missing, damaged or do not fit the config.
    """
    if model.startswith(RANDOM):
        config = ModelConfig.from_hf(shape_config(model.removeprefix(RANDOM)), model)
        matrices, table = matrix_shapes(config), (config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            del matrices["lm_head.weight"]
        return Path(model), config, RandomCheckpoint(model, matrices, vector_shapes(config), table)
    folder = model_folder(model)
    config, opened = ModelConfig.load(folder), open_folder(folder)
    if isinstance(opened, Checkpoint):
        check_files(opened, config)
    return folder, config, opened


def declared_stop_ids(folder: Path) -> list[int]:
    """Return the stop tokens that generation_config.json and config.json name; for models without a tokenizer."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(OSError, ValueError):
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(ids)
