"""Running the probe on each host: over ssh, or here; all hosts at the same time, none for longer than agreed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import probe
from .hostfile import Host

_MOST_AT_ONCE = 64
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Way:
    """How hosts are reached: the ssh command and its options, the Python to run there, seconds for a host."""

    ssh: Sequence[str]
    python: str
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What came of asking a host.

    Attributes:
        report: see `probe.collect`, with `skew` (least seconds that its clock is ahead or, below 0, behind) in place
            of `clock`; None without one.
        problem, remedy: then what is wrong, and what mends it.
    """

    host: Host
    report: dict[str, Any] | None = None
    problem: str = ""
    remedy: str = ""


def is_here(name: str) -> bool:
    """Return whether a name means this host."""
    own = socket.gethostname()
    return name.lower() in {"localhost", "127.0.0.1", "::1", own.lower(), own.split(".")[0].lower()}


def ask(hosts: Sequence[Host], way: Way) -> list[Answer]:
    """Return each host's answer, in order.

    Raises:
        UsageError: a host is to be reached, and there is no ssh program.
    """
    away = [host.name for host in hosts if not is_here(host.name)]
    if away and shutil.which(way.ssh[0]) is None:
        raise UsageError(
            f"no program {way.ssh[0]} on the PATH to reach {away[0]} with; install it (sudo apt install openssh-client)"
            " or name one with --ssh"
        )
    names = [socket.gethostname() if is_here(host.name) else host.name.rpartition("@")[2] for host in hosts]
    asked = {"root": names[0], "hosts": list(dict.fromkeys(names)), "source": str(_PACKAGE.parent)}
    script = Path(probe.__file__).read_text(encoding="utf-8") + f"\nmain({json.dumps(asked)!r})\n"
    with ThreadPoolExecutor(min(len(hosts), _MOST_AT_ONCE)) as pool:
        return list(pool.map(lambda host: _ask(host, way, script.encode()), hosts))


def _ask(host: Host, way: Way, script: bytes) -> Answer:
    here = is_here(host.name)
    connect = max(1, int(way.seconds / 2))
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={connect}"]
    command = [way.python, "-"] if here else [*way.ssh, *options, host.name, f"exec {shlex.quote(way.python)} -"]
    started = time.time()
    try:
        status, out, err = _run(command, script, way.seconds)
    except subprocess.TimeoutExpired:
        return Answer(
            host,
            problem=f"no answer in {way.seconds:g} s",
            remedy="look whether it is up and not overloaded, or give it more time with --timeout",
        )
    except OSError as error:
        return Answer(host, None, *_unstartable(way, here, error))
    report = _report(out)
    if report is None:
        return Answer(host, None, *refusal(host.name, way, status, err))
    clock, seconds = report.pop("clock"), report.pop("seconds")
    earliest, latest = started + seconds, time.time()
    report["skew"] = max(0.0, clock - latest) or min(0.0, clock - earliest)
    return Answer(host, report)


def _unstartable(way: Way, here: bool, error: OSError) -> tuple[str, str]:
    if here:
        return f"{way.python} cannot be run here ({error.strerror})", "name another with --python PATH"
    return f"{way.ssh[0]} cannot be run ({error.strerror})", "name another with --ssh COMMAND"


def _run(command: Sequence[str], script: bytes, seconds: float) -> tuple[int, bytes, str]:
    """Run a command to its end, in a session of its own so that what it has started can be ended with it."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with process:
        try:
            out, err = process.communicate(script, seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, out, err.decode(errors="replace")


def _report(out: bytes) -> dict[str, Any] | None:
    for line in out.decode(errors="replace").splitlines():
        if line.startswith(probe.MARK):
            with contextlib.suppress(ValueError):
                found = json.loads(line[len(probe.MARK) :])
                return found if isinstance(found, dict) else None
    return None


# What ssh or a shell says, what it means, and what mends it.
_REFUSALS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is another than the one known",
        "if it was set up anew, run ssh-keygen -R {address}, then ssh {name} once and compare the key",
    ),
    (
        r"Host key verification failed|No \S+ host key is known",
        "its host key is unknown",
        "run ssh {name} once and accept its key, or ssh-keyscan {address} >> ~/.ssh/known_hosts",
    ),
    (r"Permission denied", "ssh is refused: permission denied", "run ssh-copy-id {name}"),
    (
        r"Could not resolve hostname",
        "no such name",
        "correct it, or add a line ADDRESS {address} to /etc/hosts on every host",
    ),
    (
        r"Connection refused",
        "nothing listens for ssh",
        "on {name} run sudo apt install openssh-server && sudo systemctl enable --now ssh",
    ),
    (
        r"timed out|No route to host|Network is unreachable",
        "it cannot be reached ({said})",
        "look whether it is switched on and in this network: ping {address}",
    ),
)
_NO_PYTHON = r"not found|No such file|cannot execute|Exec format error"


def refusal(name: str, way: Way, status: int, err: str) -> tuple[str, str]:
    """Return what is wrong and what mends it, where a host gave no report: by the exit status and what ssh said."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit status {status}"
    if status == 255:
        for pattern, problem, remedy in _REFUSALS:
            found = next((line for line in lines if re.search(pattern, line)), None)
            if found is not None:
                words = {"name": name, "address": name.rpartition("@")[2], "said": found}
                return problem.format(**words), remedy.format(**words)
        return f"ssh failed: {said}", f"try ssh {name} true"
    if status in (126, 127) or (lines and way.python in said and re.search(_NO_PYTHON, said)):
        return (
            f"no Python at {way.python}",
            "install the program there at the same path as here (python3 -m venv), or name another with --python PATH",
        )
    return f"{way.python} failed there: {said}", f"try ssh {name} {shlex.quote(way.python)} --version; 3.10 is needed"
