"""Write a model as a GGUF file, which llama.cpp and what is built on it load."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from ..errors import UsageError
from ..log import say
from .options import add_progress_option

TYPES = ("q4_0", "q8_0", "f16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("source", metavar="SRC", help="model to read: a directory, a GGUF file, or a name on the hub")
    parser.add_argument("destination", metavar="DST.gguf", help="file to write; it must not exist yet")
    parser.add_argument(
        "--type",
        choices=TYPES,
        help="type of the matrices (default: the codes that they have, where GGUF has them; other quantised ones Q8_0,"
        " values F16)",
    )
    add_progress_option(parser)
    parser.add_argument(
        "--without-tokenizer", action="store_true", help="leave the tokenizer out; token ids alone can be used then"
    )


def run(args: argparse.Namespace) -> int:
    """Export; the root writes alone, other ranks wait. It ends with a line on stderr."""
    from ..parallel.group import connect

    group, started = connect(), time.perf_counter()
    from ..parallel.stream import together_at_rest
    from ..startup.exporting import Export
    from ..startup.finding import find_model
    from ..startup.opening import open_model
    from ..weights.partial import told

    args = group.broadcast(args)
    destination = Path(args.destination).expanduser()
    with group.together():
        _check(destination)
    folder = find_model(args.source, group)
    with together_at_rest(group), told(destination, "exporting", "file"):
        if group.is_root:
            export = Export(open_model(str(folder)), args.type, not args.without_tokenizer)
            if said := export.requantised():
                say(said)
            size = export.write(destination, True)
            seconds = time.perf_counter() - started
            shown = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
            say(f"{destination}: {shown}, {export.bits:.2f} bits a weight, {seconds:.1f} s")
    return 0


def _check(destination: Path) -> None:
    if destination.suffix != ".gguf":
        raise UsageError(f"{destination} does not end with .gguf; give the name of the file to write")
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists; remove it or give another file")
