"""Write a quantised model directory that loads at disk speed, at any number of ranks; or single ranks' slices of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import WEIGHTS, number, numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("source", metavar="SRC", help="model directory to read")
    parser.add_argument("destination", metavar="DST", help="directory to write; it must not exist yet")
    parser.add_argument("--weights", choices=WEIGHTS, default="q40", help="format to write (default: q40)")
    group = parser.add_argument_group(
        "slices", "for a host with little room: what one rank needs, instead of the whole model"
    )
    group.add_argument(
        "--only", type=numbers(0), metavar="R,...", help="write the slices of these ranks; rank 0 is the root"
    )
    group.add_argument("--ranks", type=number(int, 1), metavar="N", help="ranks that the model will run on")
    group.add_argument("--split", metavar="A,B,...", help="the --split that it will run with (default: equal shares)")


def run(args: argparse.Namespace) -> int:
    """Convert; every rank takes its share of the files."""
    from ..errors import UsageError
    from ..kernels.layout import FORMATS
    from ..model.config import ModelConfig
    from ..model.names import check_files, matrix_shapes, slice_parts, vector_shapes
    from ..parallel.group import connect
    from ..parallel.partition import parse_split, shards
    from ..startup.opening import model_folder
    from ..startup.placement import slice_owner
    from ..weights.checkpoint import Checkpoint
    from ..weights.convert import convert, convert_slices
    from ..weights.slices import Recipe

    group = connect()
    args = group.broadcast(args)
    destination, fmt = Path(args.destination).expanduser(), FORMATS[args.weights]
    with group.together():
        if (args.only is None) != (args.ranks is None) or (args.split is not None and args.only is None):
            raise UsageError("--only R and --ranks N belong together, and --split to them; give both or neither")
        folder = model_folder(args.source)
        config = ModelConfig.load(folder)
        source = Checkpoint(folder)
    if args.only is None:
        tied = config.tie_word_embeddings
        convert(source, destination, fmt, matrix_shapes(config), vector_shapes(config), tied, group, True)
        return 0
    with group.together():
        check_files(source, config)
        wrong = [rank for rank in args.only if rank >= args.ranks]
        if wrong:
            raise UsageError(f"--only {wrong[0]}: with --ranks {args.ranks} the ranks are 0 to {args.ranks - 1}")
        sizes = (config.num_heads, config.num_kv_heads, config.intermediate_size, config.vocab_size)
        parts = [slice_parts(config, shard) for shard in shards(*sizes, parse_split(args.split, args.ranks))]
        recipe = Recipe.of(source, fmt, vector_shapes(config))
        owners = {rank: slice_owner(rank, args.ranks, args.split) for rank in args.only}
        files = {
            f"slice-{rank}-of-{args.ranks}.safetensors": recipe.file(parts[rank], owners[rank]) for rank in args.only
        }
    convert_slices(source, destination, fmt, files, group, True)
    return 0
