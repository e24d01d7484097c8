"""Test hosts on one machine: network namespaces joined by a bridge, with links of any rate, and jobs of ranks on them.

Each host has a name, an address and one core of this machine. Needs Linux, root, iproute2 and MPICH's mpiexec. MPI
crosses TCP: ranks on different hosts share no memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dllama_mpi.errors import ClusterError
from dllama_mpi.kernels.runtime import usable_cores
from dllama_mpi.parallel.mpiexec import MPICH, find, library

NETWORK = "dllama-lan-"  # before the process id in a namespace's name
FRAME, HEADERS = 1514, 66  # bytes of a full Ethernet frame as the kernel counts it, and of its headers for TCP
GOODPUT = 1 - HEADERS / FRAME  # part of a link's rate that is left for TCP's bytes


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Lan:
    """Hosts of the network.

    Attributes:
        name: before each namespace's name. size: number of hosts. wrapper: what mpiexec calls in place of ssh.
        launcher: mpiexec.
    """

    name: str
    size: int
    wrapper: Path
    launcher: str

    def address(self, host: int) -> str:
        """Return a host's address; no other machine need be reachable."""
        return f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}.{host + 1}"

    def shape(self, mbit: int | None) -> None:
        """Give every host's link a rate in Mbit/s each way; None: no limit.

        A packet waits until those before it have been sent at that rate, but for a bucket of one or two: as much as the
        kernel's timers, which are 10 to 50 us late, would lose.
        """
        for host in range(self.size):
            space, device = f"{self.name}{host}", f"e{host}"
            tc = ["ip", "netns", "exec", space, "tc", "qdisc"]
            subprocess.run([*tc, "del", "dev", device, "root"], check=False, capture_output=True)
            if mbit is not None:
                bucket = max(FRAME + 86, mbit * 6)  # bytes: 48 us
                limits = ["rate", f"{mbit}mbit", "burst", str(bucket), "latency", "50ms"]
                subprocess.run([*tc, "add", "dev", device, "root", "tbf", *limits], check=True, capture_output=True)

    def run(self, ranks: int, args: list[str]) -> str:
        """Run `python args` on this many ranks, one a host in turn; return what it prints.

        Raises:
            ClusterError: its status is not 0.
        """
        hosts = ",".join(self.address(host) for host in range(min(ranks, self.size)))
        env = ["env", "UCX_TLS=tcp,self", "FI_PROVIDER=tcp", "MPIR_CVAR_NOLOCAL=1"]
        start = [self.launcher, "-launcher", "ssh", "-launcher-exec", str(self.wrapper), "-hosts", hosts]
        line = [str(self.wrapper), self.address(0), *env, *start, "-n", str(ranks), sys.executable, *args]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"{' '.join(args)} on {ranks} test hosts ended with status {done.returncode}")
        return done.stdout


@contextlib.contextmanager
def lan(size: int) -> Iterator[Lan]:
    """Make a network of so many hosts, and remove it in the end.

    Raises:
        ClusterError: this machine or user cannot, or MPICH is missing.
    """
    if not sys.platform.startswith("linux") or os.getuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        raise ClusterError("test hosts are network namespaces, which need Linux, root and iproute2 (ip and tc)")
    mpi = library()
    if mpi.family != MPICH:
        raise ClusterError(
            f"test hosts need MPICH's mpiexec, and mpi4py loads {mpi.name}; pip install 'dllama-mpi[mpich]'"
        )
    remove_old()
    name = f"{NETWORK}{os.getpid()}-"
    with tempfile.TemporaryDirectory() as folder:
        made = Lan(name, size, Path(folder) / "launch", find(mpi))
        cores = usable_cores()
        cases = "".join(f"{host}) core={cores[host % len(cores)]} ;; " for host in range(size))
        made.wrapper.write_text(_WRAPPER.format(name=name, cases=cases), encoding="utf-8")
        made.wrapper.chmod(0o755)
        try:
            _make(made)
            yield made
        except subprocess.CalledProcessError as error:
            raise ClusterError(f"{' '.join(error.cmd)}: {str(error.stderr).strip()}") from None
        finally:
            for host in [*range(size), "s"]:
                subprocess.run(["ip", "netns", "del", f"{name}{host}"], check=False, capture_output=True)


def remove_old() -> None:
    """Remove the hosts of runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for found in re.finditer(rf"^({NETWORK}(\d+)-\S+)", listed, re.MULTILINE):
        if not Path(f"/proc/{found[2]}").exists():
            subprocess.run(["ip", "netns", "del", found[1]], check=False, capture_output=True)


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
case $host in {cases}esac
exec ip netns exec "{name}$host" unshare --uts taskset -c "$core" sh -c 'hostname "h$0"; exec sh -c "$1"' "$host" "$*"
"""
