"""Run by mpiexec: a rank of a pool, which runs what it is told to and reports what came of it; see `pool`.

usage: pool_job.py SOCKET

What would differ from a process of its own is made alike: arguments, environment, working directory, standard streams,
and that MPI counts as started only once a case has joined the job.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any
from unittest.mock import patch

from dllama_mpi.errors import DllamaError
from dllama_mpi.parallel import group, launch
from dllama_mpi.parallel.watchdog import Watchdog


class Joined:
    """Stands in for `launch.world` and `launch._connected` while a case runs."""

    def __init__(self) -> None:
        self._has_joined = False
        self._world: Callable[[], Any] = launch.world
        self._connected: Callable[[], Any] = launch._connected

    def world(self) -> Any:
        """Join the job."""
        self._has_joined = True
        return self._world()

    def connected(self) -> Any:
        """Return the world communicator if the case has joined."""
        return self._connected() if self._has_joined else None


@contextlib.contextmanager
def streams(stdin: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Have files in place of this process's standard streams, below Python as well; yields those written to."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in range(3)]
    python = sys.stdin, sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(stdin.encode())
        files[0].seek(0)
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        try:
            yield files[1], files[2]
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdin, sys.stdout, sys.stderr = python
            for number, copy in enumerate(before):
                os.dup2(copy, number)
                os.close(copy)


@contextlib.contextmanager
def surroundings(case: dict[str, Any]) -> Iterator[None]:
    """Have a case's environment, working directory and view of the job."""
    joined, environ, argv, folder = Joined(), dict(os.environ), sys.argv, os.getcwd()
    os.environ.update(case["env"])
    os.chdir(case["folder"])
    try:
        with (
            patch.object(group, "world", joined.world),
            patch.object(launch, "_connected", joined.connected),
            patch.object(Watchdog, "goodbye", lambda watchdog: None),  # it would be this process's last
        ):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(folder)
        sys.argv = argv


def execute(args: list[str]) -> None:
    """Run what `python args` would."""
    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = args
        sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
        try:
            runpy.run_path(args[0], run_name="__main__")
        finally:
            sys.path.pop(0)


def status_of(args: list[str]) -> tuple[int, bool]:
    """Run a case; return its exit status and whether it crashed, of which the other ranks may not know."""
    try:
        execute(args)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None), False
    except DllamaError as error:
        return launch.leave(error), False
    except BaseException:
        traceback.print_exc()
        return 1, True
    return 0, False


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case and return what it reports."""
    with surroundings(case), streams(case["stdin"]) as (out, err):
        status, crashed = status_of(case["args"])
        gc.collect()  # models hold memory and threads
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {"status": status, "crashed": crashed, "out": texts[0], "err": texts[1]}


def main() -> None:
    """Serve until the other side closes the connection."""
    found = launch.launched()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        with connection.makefile("rw", encoding="utf-8") as lines:
            print(json.dumps({"rank": found[2] if found is not None else 0}), file=lines, flush=True)
            for line in lines:
                print(json.dumps(run(json.loads(line))), file=lines, flush=True)


if __name__ == "__main__":
    main()
