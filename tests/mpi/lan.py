"""A small Ethernet on one machine: hosts that are network namespaces, joined by a bridge, each with a name of its own.

Needs root, Linux and iproute2. MPI between the hosts crosses TCP; shared memory between them is switched off. What runs
that were killed have left is removed, at the latest when the next network is made.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mpi import guard
from tests.mpi.launch import Done, has_open_mpi, launcher, run


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Lan:
    """Hosts of the network.

    Attributes:
        name: before each namespace's name. size: number of hosts. wrapper: what mpiexec calls in place of ssh.
    """

    name: str
    size: int
    wrapper: Path

    def address(self, host: int) -> str:
        """Return a host's address; no other machine need be reachable."""
        return f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}.{host + 1}"

    def link(self, host: int, state: str) -> None:
        """Set a host's link "up" or "down"."""
        _ip("-n", f"{self.name}{host}", "link", "set", f"e{host}", state)

    def mpiexec(self, ranks: int, args: list[str], timeout: float = 600) -> Done:
        """Run `python args` on this many ranks, one a host in turn, started on host 0."""
        hosts = ",".join(self.address(host) for host in range(self.size))
        inside = ["ip", "netns", "exec", f"{self.name}0", "unshare", "--uts", "sh", "-c", 'hostname h0; exec "$@"', "-"]
        env = ["env", "UCX_TLS=tcp,self", "FI_PROVIDER=tcp", "MPIR_CVAR_NOLOCAL=1"]
        start = [launcher(), "-launcher", "ssh", "-launcher-exec", str(self.wrapper), "-hosts", hosts]
        return run([*inside, *env, *start, "-n", str(ranks), sys.executable, *args], timeout)


def no_lan() -> str | None:
    """Return why there can be no network here, or None."""
    if has_open_mpi():
        return "the hosts are started by MPICH's mpiexec"
    if not sys.platform.startswith("linux") or os.getuid() != 0 or not shutil.which("ip"):
        return "network namespaces need Linux, root and iproute2"
    return None


@contextlib.contextmanager
def lan(size: int, folder: Path) -> Iterator[Lan]:
    """Make a network of so many hosts, and remove it in the end; skip the test where that cannot be had."""
    if against := no_lan():
        pytest.skip(against)
    guard.remove_networks()
    name = f"{guard.NETWORK}{os.getpid()}-"
    made = Lan(name, size, folder / "launch")
    made.wrapper.write_text(_WRAPPER.format(name=name))
    made.wrapper.chmod(0o755)
    try:
        try:
            _make(made)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield made
    finally:
        for host in [*range(size), "s"]:
            subprocess.run(["ip", "netns", "del", f"{name}{host}"], check=False, capture_output=True)


def _make(made: Lan) -> None:
    switch = f"{made.name}s"
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "add", "b0", "type", "bridge")
    _ip("-n", switch, "link", "set", "b0", "up")
    for host in range(made.size):
        space = f"{made.name}{host}"
        _ip("netns", "add", space)
        _ip("link", "add", f"e{host}", "netns", space, "type", "veth", "peer", "name", f"p{host}", "netns", switch)
        _ip("-n", switch, "link", "set", f"p{host}", "master", "b0")
        _ip("-n", switch, "link", "set", f"p{host}", "up")
        _ip("-n", space, "addr", "add", f"{made.address(host)}/24", "dev", f"e{host}")
        _ip("-n", space, "link", "set", f"e{host}", "up")
        _ip("-n", space, "link", "set", "lo", "up")


_WRAPPER = """#!/bin/sh
# Called like ssh: [options] ADDRESS COMMAND...
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$((${{1##*.}} - 1)); shift
exec ip netns exec "{name}$host" unshare --uts sh -c 'hostname "h$0"; exec sh -c "$1"' "$host" "$*"
"""
