"""Remove a downloaded model from this disk."""

from __future__ import annotations

import argparse

from . import download


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "remove", metavar="NAME", help="as download --list-local shows it: ORG/NAME all of it, ORG/NAME:Q4_K_M one file"
    )
    parser.set_defaults(name=None, list_local=False, json=False, ranks=None, memory=None)


def run(args: argparse.Namespace) -> int:
    """Remove it on rank 0's host."""
    return download.run(args)
