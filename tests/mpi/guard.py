"""What ends the jobs of a test run that was killed: run as a program, it waits for that run's end and clears up.

usage: guard.py MARK, started by the run, with the other end of a pipe on standard input that is closed, by the kernel
if need be, when the run is over.

Every process of a run has MARK in its environment, or MARK/MORE, a job of the run. Launchers put ranks into sessions of
their own, and a killed run cannot tell anybody what it has started: the environment is what all of them keep.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIABLE = "DLLAMA_MPI_TEST_RUN"
NETWORK = "dllama-test-"  # before the process id of the run in a network namespace's name
FOLDER = "dllama-test-"  # and in that of a folder in the system's temporary one
SHARED_MEMORY = Path("/dev/shm")
_SEGMENT = re.compile(r"(mpich_shm_|sm_segment\.|vader_segment\.|dllama_mpi-)")  # MPICH's, Open MPI 5's and 4's, ours
_ROUNDS = 50  # of looking for processes that are still being started


def marked(mark: str) -> list[int]:
    """Return the ids of living processes, but for this one, that belong to a run or to a job of it."""
    if Path("/proc/self/environ").exists():
        found = _marked_by_proc(mark)
    else:  # macOS
        command = ["ps", "-axEww", "-o", "pid=,command="]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        entry = re.compile(rf" {VARIABLE}={re.escape(mark)}(/| |$)")
        found = [int(line.split()[0]) for line in lines if entry.search(line)]
    return [pid for pid in found if pid != os.getpid()]


def _marked_by_proc(mark: str) -> list[int]:
    found, entry = [], re.compile(rf"(^|\0){VARIABLE}={re.escape(mark)}(/|\0|$)".encode())
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is another user's; a zombie's is empty
                if entry.search((folder / "environ").read_bytes()):
                    found.append(int(folder.name))
    return found


def end_marked(mark: str) -> None:
    """Kill all processes of a run."""
    for _ in range(_ROUNDS):
        left = marked(mark)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def networks() -> dict[str, int]:
    """Return the network namespaces that runs have made: name and the run's process id."""
    if not shutil.which("ip"):
        return {}
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    found = (re.match(rf"{NETWORK}(\d+)-\S+", line) for line in listed.splitlines())
    return {match[0]: int(match[1]) for match in found if match}


def remove_networks(over: int | None = None) -> None:
    """Remove the network namespaces of runs that are no more, or over: a process remains until its parent looks."""
    for name, pid in networks().items():
        if pid == over or not is_alive(pid):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def folder_prefix() -> str:
    """Return what the name of this process's folders in the temporary one begins with."""
    return f"{FOLDER}{os.getpid()}-"


def remove_folders(over: int) -> None:
    """Remove the temporary folders of the run that is over and of those that are no more."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        match = re.match(rf"{FOLDER}(\d+)-", path.name)
        if match and (int(match[1]) == over or not is_alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def segments(since: float) -> set[Path]:
    """Return the segments of shared memory, made since a time, that ranks have left: no process has them open.

    A rank that is killed cannot remove its own. On Linux alone they have names in a folder.
    """
    found = set()
    for path in SHARED_MEMORY.glob("*_*"):
        with contextlib.suppress(OSError):  # it has gone
            if _SEGMENT.match(path.name) and path.stat().st_uid == os.getuid() and path.stat().st_ctime >= since:
                found.add(path)
    for folder in Path("/proc").glob("[0-9]*") if found else ():
        # In this order: a file is mapped before it is closed.
        with contextlib.suppress(OSError):  # the process has ended, or is another user's
            for file in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    found.discard(Path(os.readlink(file)))
        with contextlib.suppress(OSError):
            lines = (folder / "maps").read_text(errors="replace").splitlines()
            found -= {Path(line.split(None, 5)[5]) for line in lines if f" {SHARED_MEMORY}/" in line}
    return found


def main() -> None:
    """Wait for the end of the run, then clear up."""
    begun, run = time.time(), os.getppid()
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
    end_marked(sys.argv[1])
    remove_networks(run)
    remove_folders(run)
    for path in segments(begun):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
