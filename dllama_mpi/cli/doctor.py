"""Look over the hosts of a cluster before a job is started on them, and say what to mend; needs ssh, no MPI."""

from __future__ import annotations

import argparse
import json
import shlex
import sys

from ..errors import UsageError, printable
from .options import number, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    group = parser.add_argument_group("doctor", "status: 0 when nothing is an error, 1 when something is")
    group.add_argument("--hostfile", metavar="FILE", help="hosts, as MPICH (pi0:4) or Open MPI (pi0 slots=4) take them")
    group.add_argument("--hosts", metavar="A,B,C", help="hosts, instead of --hostfile; the first runs rank 0")
    group.add_argument(
        "--python",
        metavar="PATH",
        default=sys.executable,
        help="the Python that runs the program on each host (default: this one's path)",
    )
    group.add_argument(
        "--ssh", metavar="COMMAND", default="ssh", help="how hosts are reached, with options (default: ssh)"
    )
    group.add_argument(
        "--timeout",
        type=number(float, 1, 3600),
        metavar="SECONDS",
        default=20.0,
        help="longest to wait for a host (default: 20)",
    )
    group.add_argument("--json", action="store_true", help="print all that was found out as JSON")


def run(args: argparse.Namespace) -> int:
    """Print tables and what to mend on stdout; return 1 if something is an error."""
    from ..doctor.compare import findings, status, tables, told
    from ..doctor.hostfile import parse_hosts, read_hostfile
    from ..doctor.reach import Way, ask
    from ..parallel.launch import is_root_process

    if not is_root_process():
        return 0
    if (args.hostfile is None) == (args.hosts is None):
        raise UsageError("doctor needs the cluster's hosts: give --hostfile FILE or --hosts A,B,C, one of them")
    hosts = read_hostfile(args.hostfile) if args.hosts is None else parse_hosts(args.hosts)
    answers = ask(hosts, Way(_words(args.ssh), args.python, args.timeout))
    found = findings(answers)
    if args.json:
        print(json.dumps(told(answers, found), indent=2), flush=True)
        return status(found)
    for head, rows in tables(answers):
        print(table(head, rows), end="\n\n")
    for each in found:
        print(printable(str(each)))
    if not found:
        print("nothing to mend")
    sys.stdout.flush()
    return status(found)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--ssh {command}: not a command ({error})") from None
    if not words:
        raise UsageError("--ssh is empty; give a command such as ssh -p 2222")
    return words
