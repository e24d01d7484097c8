"""Write a quantised model directory that loads at disk speed, at any number of ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import WEIGHTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("source", metavar="SRC", help="model directory to read")
    parser.add_argument("destination", metavar="DST", help="directory to write; it must not exist yet")
    parser.add_argument("--weights", choices=WEIGHTS, default="q40", help="format to write (default: q40)")


def run(args: argparse.Namespace) -> int:
    """Convert; every rank takes its share of the files."""
    from ..engine.llm import model_folder
    from ..kernels.layout import FORMATS
    from ..model.config import ModelConfig
    from ..model.names import matrix_shapes, vector_shapes
    from ..parallel.group import connect
    from ..weights.checkpoint import Checkpoint
    from ..weights.convert import convert

    group = connect()
    args = group.broadcast(args)
    with group.together():
        folder = model_folder(args.source)
        config = ModelConfig.load(folder)
        source = Checkpoint(folder)
    convert(
        source,
        Path(args.destination).expanduser(),
        FORMATS[args.weights],
        matrix_shapes(config),
        vector_shapes(config),
        config.tie_word_embeddings,
        group,
        True,
    )
    return 0
