"""An ssh server of its own, with keys of its own: nothing of the user's or the system's ssh is read or written."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.mpi.launch import start

_PATHS = "/usr/sbin:/sbin:/usr/local/sbin"
_SECONDS = 20.0  # for a server to listen


def find_sshd() -> str:
    """Return the server's path; skip the test without one."""
    found = shutil.which("sshd") or shutil.which("sshd", path=_PATHS)
    if found is None or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("needs OpenSSH's sshd, ssh and ssh-keygen")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # which sshd wants as root
    return found


def make_key(path: Path) -> str:
    """Write a key without a passphrase and return its public half."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path.with_suffix(".pub").read_text().strip()


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(folder: Path, address: str, port: int, inside: Sequence[str] = ()) -> Iterator[None]:
    """Serve ssh with the folder's keys: `host` is the server's, `user.pub` may come in.

    inside: a command before the server's, which takes it into a network namespace.
    """
    text = _SERVER.format(folder=folder, address=address, port=port)
    (folder / f"sshd-{address}").write_text(text)
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    (folder / "authorized").chmod(0o600)
    log = folder / f"log-{address}"
    with log.open("wb") as out:
        command = [*inside, find_sshd(), "-D", "-e", "-f", str(folder / f"sshd-{address}")]
        server = start(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + _SECONDS
        while "Server listening" not in (said := log.read_text(errors="replace")):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"sshd does not start here: {said.strip()[-300:]}")
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.wait()


_SERVER = """\
ListenAddress {address}
Port {port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
"""
