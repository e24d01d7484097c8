"""Start a command on all hosts: writes the mpiexec line of the MPI at hand, shows it and runs it.

dllama_mpi launch -n 4 -- chat --model DIR: four ranks here; --hosts a,b: one on each host. Whatever comes after -- is
what each rank runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..errors import UsageError
from ..log import say
from ..parallel import mpiexec
from ..parallel.hosts import listed_hosts, placed, read_hostfile
from ..parallel.launch import launched
from .options import number
from .serve import without_options

_FIRST_STEP_OF_ITS_OWN = 0xFFFFFFF0  # Slurm's numbers from here on: a batch script, an interactive shell
_RESTART = ("--restart", "--launch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "-n", dest="ranks", type=number(int, 1), metavar="N",
        help="ranks (default: as many as the hosts have room for)",
    )  # fmt: skip
    hosts = parser.add_mutually_exclusive_group()
    hosts.add_argument("--hosts", metavar="A,B", help="hosts; the first has rank 0; A:2 has room for two ranks")
    hosts.add_argument(
        "--hostfile", metavar="FILE", help="hosts, one a line, in MPICH's form (A:2) or Open MPI's (A slots=2)"
    )
    parser.add_argument(
        "--restart", type=number(int, 1), metavar="N",
        help="of serve: start the job again when it ends badly, as serve --restart does (default: not)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the line on stdout, and do not run it")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each rank runs, with its options"
    )


def run(args: argparse.Namespace) -> int:
    """Become the launcher; return only after --dry-run."""
    _refuse_inside_a_job()
    rest = _command(args.rest, args.commands)
    if args.restart is not None and rest[0] != "serve":
        raise UsageError(f"--restart {args.restart} is for serve; leave it out")
    room = None
    if args.hosts is not None:
        room = listed_hosts(args.hosts)
    elif args.hostfile is not None:
        room = read_hostfile(args.hostfile)
    if room is None and args.ranks is None:
        raise UsageError("how many ranks? give -n 2 for two here, --hosts a,b or --hostfile FILE")
    hosts = None if room is None else placed(room, args.ranks)
    program = [sys.executable, "-m", "dllama_mpi"]
    supervised = args.restart is not None
    line = _line([] if supervised else [*program, *rest], args.ranks if hosts is None else sum(hosts.values()), hosts)
    if supervised:
        line = [*program, "serve", "--restart", str(args.restart), "--launch", shlex.join(line), *rest[1:]]
    if not args.dry_run:
        say(shlex.join(line))
        _become(line)
    print(shlex.join(line))
    return 0


def _line(program: Sequence[str], ranks: int, hosts: dict[str, int] | None) -> list[str]:
    library = mpiexec.library()
    launcher = mpiexec.find(library)
    return mpiexec.line(library.family, launcher, program, ranks, hosts, os.getuid() == 0, os.environ)


def _become(line: list[str]) -> NoReturn:
    """Run a program in this process's place, whose terminal, signals and status are then its own.

    So there is nobody between the user and mpiexec who could miss a signal, or die and leave ranks behind.

    Raises:
        UsageError: it cannot be started.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for each in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what is ignored stays so
        signal.signal(each, signal.SIG_DFL)
    try:
        os.execv(line[0], line)
    except OSError as error:
        raise UsageError(f"{line[0]} cannot be started: {error.strerror}") from None


def _refuse_inside_a_job() -> None:
    found = launched()
    if found is None:
        return
    launcher, ranks, _ = found
    step = os.environ.get("SLURM_STEP_ID", "")
    if launcher == "srun" and ranks == 1 and (not step.isdecimal() or int(step) >= _FIRST_STEP_OF_ITS_OWN):
        return
    raise UsageError(
        f"launch under {launcher}: it starts the ranks itself; say, under nothing, python -m dllama_mpi launch "
        f"-n {ranks}, then the rest; or leave launch out"
    )


def _command(rest: Sequence[str], commands: Sequence[str]) -> list[str]:
    """Return the ranks' arguments.

    Raises:
        UsageError: there are none, or they begin with no command.
    """
    given = list(rest[1:] if rest and rest[0] == "--" else rest)
    if not given:
        raise UsageError("launch needs what the ranks are to run: launch -n 2 -- chat --model DIR")
    known = [each for each in commands if each != "launch"]
    if not given[0].startswith("-") and given[0] not in known:
        raise UsageError(f"{given[0]!r} is no command for ranks; give one of {', '.join(known)} after --")
    if given[0] == "serve" and without_options(given, _RESTART) != given:
        raise UsageError("serve --restart or --launch after --: give --restart N to launch, before --")
    return given
