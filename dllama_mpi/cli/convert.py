"""Write a quantised model directory that loads at disk speed, at any number of ranks; or single ranks' slices of it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..log import say
from .options import add_progress_option, add_weights_option, number, numbers

if TYPE_CHECKING:
    from ..startup.opening import ModelFiles
    from ..weights.files import File


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("source", metavar="SRC", help="model to read: a directory, a .gguf or .m file, or its name")
    parser.add_argument("destination", metavar="DST", help="directory to write; it must not exist yet")
    add_weights_option(parser)
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="of a .gguf or .m file: the tokenizer to write with it (default: its own)"
    )
    add_progress_option(parser)
    group = parser.add_argument_group(
        "slices", "for a host with little room: what one rank needs, instead of the whole model"
    )
    group.add_argument(
        "--only", type=numbers(0), metavar="R,...", help="write the slices of these ranks; rank 0 is the root"
    )
    group.add_argument("--ranks", type=number(int, 1), metavar="N", help="ranks that the model will run on")
    group.add_argument("--split", metavar="A,B,...", help="the --split that it will run with (default: equal shares)")


def run(args: argparse.Namespace) -> int:
    """Convert; every rank takes its share of the files. The root ends with a line on stderr."""
    from ..parallel.group import connect

    group, started = connect(), time.perf_counter()
    from ..model.recipe import bits_per_weight, whole_parts
    from ..startup.finding import find_model
    from ..startup.model_files import METADATA
    from ..startup.opening import open_model
    from ..weights.convert import Conversion, convert, convert_slices

    args = group.broadcast(args)
    destination, files = Path(args.destination).expanduser(), {}
    with group.together():
        _check(args)
    folder = find_model(args.source, group)
    with group.together():
        opened = open_model(str(folder))
        config, source, formats = opened.config, opened.whole, opened.formats(args.weights)
        small = opened.small_files(args.tokenizer)
        if group.is_root and (said := opened.told(args.weights)):
            say(said)
        if group.is_root and opened.file is not None and not {"tokenizer.json", METADATA} & small.keys():
            say(f"{opened.folder} has no tokenizer beside it, and {destination} gets none; give one by --tokenizer")
        if args.only is not None:
            files = _slices(args, opened)
    if args.only is None:
        size = convert(Conversion(source, formats, whole_parts(config), True, small), destination, group)
    else:
        convert_slices(source, destination, files, group, True, small)
        size = sum(file.size for file in files.values())
    if group.is_root:
        bits, seconds = bits_per_weight(config, formats), time.perf_counter() - started
        told = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        say(f"{destination}: {told}, {bits:.2f} bits a weight, {seconds:.1f} s")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise a UsageError if options that belong together are not given together."""
    if (args.only is None) != (args.ranks is None) or (args.split is not None and args.only is None):
        raise UsageError("--only R and --ranks N belong together, and --split to them; give both or neither")


def _slices(args: argparse.Namespace, opened: ModelFiles) -> dict[str, File]:
    """Return the slice files that are asked for, by name."""
    from ..model.recipe import slice_parts
    from ..parallel.partition import parse_split
    from ..startup.placement import slice_owner
    from ..startup.shares import shards_of
    from ..weights.slices import Manifest

    wrong = [rank for rank in args.only if rank >= args.ranks]
    if wrong:
        raise UsageError(f"--only {wrong[0]}: with --ranks {args.ranks} the ranks are 0 to {args.ranks - 1}")
    shards = shards_of(opened.config, parse_split(args.split, args.ranks))
    parts = {rank: slice_parts(opened.config, shards[rank]) for rank in args.only}
    manifest = Manifest.of(opened.whole, opened.formats(args.weights), parts[args.only[0]])
    return {
        f"slice-{rank}-of-{args.ranks}.safetensors": manifest.file(
            parts[rank], slice_owner(rank, args.ranks, args.split)
        )
        for rank in args.only
    }
