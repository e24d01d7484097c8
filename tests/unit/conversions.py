"""Conversions on one rank, for the tests of what they write and of how they fail."""

from __future__ import annotations

from pathlib import Path

from dllama_mpi.model.recipe import WeightRecipe, whole_parts
from dllama_mpi.parallel.group import TensorParallelGroup
from dllama_mpi.startup.opening import open_model
from dllama_mpi.weights.convert import Conversion, convert
from tests.tiny_models.cases import CASES
from tests.tiny_models.files import write_model

Files = dict[str, bytes]


def convert_folder(source: Path, destination: Path, weights: str) -> None:
    """Convert on one rank."""
    opened = open_model(str(source), check=False)
    formats = WeightRecipe.parse(weights).formats(opened.config)
    conversion = Conversion(opened.whole, formats, whole_parts(opened.config), show_progress=True)
    convert(conversion, destination, TensorParallelGroup(None))


def run(source: Path, destination: Path, weights: str) -> Path:
    """Convert on one rank and return the new directory."""
    convert_folder(source, destination, weights)
    return destination


def contents(folder: Path) -> Files:
    """Return the bytes of every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_source(folder: Path) -> Path:
    """Write a model with sizes that are no multiples of a tile's, an odd number of tiles, and the files beside it."""
    write_model(CASES["llama_heads6"], folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "LICENSE-MODEL.txt"):
        (folder / name).write_text(f"contents of {name}\n")
    (folder / "pytorch_model.bin").write_bytes(b"of no use here")
    return folder
