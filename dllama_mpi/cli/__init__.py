"""The command line: one module a command. Arguments are read before MPI starts, so that --help needs none."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import DllamaError, UsageError
from ..parallel.launch import INTERRUPTED, abandon, is_root_process, leave
from ..progress import chosen, show_progress
from . import (
    batch,
    bench,
    cache,
    chat,
    convert,
    doctor,
    download,
    export,
    generate,
    info,
    launch,
    perplexity,
    plan,
    remove,
    serve,
)
from .interrupt import ending_at_interrupt

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

COMMANDS: dict[str, Any] = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "launch": launch,
    "batch": batch,
    "convert": convert,
    "export": export,
    "download": download,
    "remove": remove,
    "perplexity": perplexity,
    "bench": bench,
    "info": info,
    "plan": plan,
    "doctor": doctor,
    "cache": cache,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, printed once for all ranks."""

    def error(self, message: str) -> NoReturn:
        if is_root_process():
            print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def print_help(self, file: Any = None) -> None:
        if is_root_process():
            super().print_help(file)


def parser() -> Parser:
    """Return the parser of all commands."""
    top = Parser(
        prog="dllama_mpi",
        description="Large language models on the computers you already have: tensor-parallel inference over MPI.",
        epilog="Without a command, generate is meant: dllama_mpi --model DIR --prompt TEXT.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"dllama_mpi {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser, required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__.strip().splitlines()[0]
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as the README lists them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in (*COMMANDS, "-h", "--help", "--version"):
        given.insert(0, "generate")
    args = parser().parse_args(given)
    args.given, args.commands = given, tuple(COMMANDS)
    with ending_at_interrupt():
        try:
            mode = chosen(getattr(args, "progress", "off"))
            show_progress(mode if is_root_process() else "off")
            return int(args.run(args) or 0)
        except DllamaError as error:
            return leave(error)
        except KeyboardInterrupt:  # before there was anything to interrupt: while loading, say
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            # Python itself may end by the signal at its exit; launchers would say more about that than a line.
            os._exit(abandon(INTERRUPTED))
        except BrokenPipeError:  # the reader of our output has gone
            sys.stderr.close()
            return 1
        except OSError as error:
            if error.errno not in _FULL:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try again at its exit
            return leave(UsageError(f"output cannot be written: {error.strerror}"))
