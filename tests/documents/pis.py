"""Hosts as in docs/raspberry-pi.md: namespaces with names, an sshd and two interfaces each, and one home folder's path.

Built on `lan`: needs root, Linux, iproute2 and OpenSSH. Files other than home and its .cache are shared.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.sshd import make_key, serving
from tests.mpi import guard
from tests.mpi.lan import Lan, lan
from tests.mpi.launch import ROOT, Done, launcher, run, run_mark


@dataclass(frozen=True)
class Pis:
    """Hosts pi0, pi1, ...; home: of the user on each, with an environment in `dllama`."""

    net: Lan
    home: Path

    def shell(self, command: str) -> list[str]:
        """Return what runs a command on pi0, by ssh, where a user of pi0 is."""
        before = f"export {guard.VARIABLE}={run_mark()}; . ~/dllama/bin/activate; cd ~"
        ssh = ["ssh", "-F", str(self.home / "outside"), self.net.address(0), f"{before}; {command}"]
        return ["ip", "netns", "exec", f"{self.net.name}0", *ssh]

    def run(self, command: str, stdin: str = "") -> Done:
        """Run a command on pi0."""
        return run(self.shell(command), 300, stdin=stdin)

    def sent(self, device: str) -> int:
        """Return the bytes that pi0 has sent by an interface."""
        path = f"/sys/class/net/{device}/statistics/tx_bytes"
        inside = ["ip", "netns", "exec", f"{self.net.name}0", "cat", path]
        return int(subprocess.run(inside, check=True, capture_output=True, text=True).stdout)


@contextlib.contextmanager
def pis(count: int, folder: Path) -> Iterator[Pis]:
    """Start so many hosts; skip the test where that cannot be had."""
    with lan(count, folder) as net, contextlib.ExitStack() as stack:
        host = make_key(folder / "host")
        make_key(folder / "user")
        home = folder / "home"
        _make_home(home, folder, [f"pi{i}" for i in range(count)], host)
        for i in range(count):
            _wire(net, i)
            stack.enter_context(serving(folder, net.address(i), 22, _inside(net, i, folder)))
            stack.callback(_end, f"{net.name}{i}")
        config = f"User root\nIdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile /dev/null\n"
        (home / "outside").write_text(
            config + "GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking no\nLogLevel ERROR\n"
        )
        yield Pis(net, home)


def _make_home(home: Path, folder: Path, names: list[str], host: str) -> None:
    """Make the home folder: keys, the hosts that ssh knows, and an environment that has this one's packages."""
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".cache").mkdir()
    for name, source in (("id_ed25519", "user"), ("id_ed25519.pub", "user.pub")):
        (home / ".ssh" / name).write_bytes((folder / source).read_bytes())
        (home / ".ssh" / name).chmod(0o600)
    (home / ".ssh" / "known_hosts").write_text("".join(f"{name} {host}\n" for name in names))
    venv.create(home / "dllama", symlinks=True)
    packages = next((home / "dllama").glob("lib/python*/site-packages"))
    (packages / "tests.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    for program in Path(launcher()).parent.iterdir():
        if program.name.startswith(("mpi", "hydra")):
            (home / "dllama" / "bin" / program.name).symlink_to(program)
    for entry in Path(sys.prefix, "lib").iterdir():  # MPI's library, where it came as a wheel
        if not entry.name.startswith("python"):
            (home / "dllama" / "lib" / entry.name).symlink_to(entry)
    passwd = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    (folder / "passwd").write_text("\n".join([f"root:x:0:0:root:{home}:/bin/bash", *passwd, ""]))


def _wire(net: Lan, i: int) -> None:
    """Name a host's interface as a Pi's is, and give it a slow one, of 40 Mbit/s."""
    space, switch = f"{net.name}{i}", f"{net.name}s"
    steps = [
        f"ip -n {space} link set e{i} down",
        f"ip -n {space} link set e{i} name eth0",
        f"ip -n {space} link set eth0 up",
        f"ip link add wlan0 netns {space} type veth peer name w{i} netns {switch}",
        f"ip -n {switch} link set w{i} master b1",
        f"ip -n {switch} link set w{i} up",
        f"ip -n {space} addr add 172.30.{os.getpid() % 256}.{i + 1}/24 dev wlan0",
        f"ip -n {space} link set wlan0 up",
        f"ip netns exec {space} tc qdisc add dev wlan0 root tbf rate 40mbit burst 32k latency 50ms",
    ]
    if i == 0:
        steps = [f"ip -n {switch} link add b1 type bridge", f"ip -n {switch} link set b1 up", *steps]
    for step in steps:
        subprocess.run(step.split(), check=True, capture_output=True)


def _inside(net: Lan, i: int, folder: Path) -> list[str]:
    """Return what starts a host's sshd: names, home and memory of its own."""
    known = "".join(f"{net.address(at)} pi{at}\n" for at in range(net.size))
    (folder / f"hosts{i}").write_text(f"127.0.0.1 localhost\n127.0.1.1 pi{i}\n{known}")  # as Debian writes it
    cache = folder / f"cache{i}"
    (cache / "dllama_mpi").mkdir(parents=True)
    for kernels in (Path.home() / ".cache" / "dllama_mpi").glob("kernels-*"):  # or each would compile its own
        (cache / "dllama_mpi" / kernels.name).symlink_to(kernels)
    steps = [
        f"hostname pi{i}",
        f"mount --bind {folder}/hosts{i} /etc/hosts",
        f"mount --bind {folder}/passwd /etc/passwd",
        f"mount --bind {cache} {folder}/home/.cache",
        "mount -t tmpfs shm /dev/shm",
    ]
    unshare = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    script = " && ".join([*(shlex.join(shlex.split(step)) for step in steps), 'exec "$@"'])
    return ["ip", "netns", "exec", f"{net.name}{i}", *unshare, "sh", "-c", script, "-"]


def _end(space: str) -> None:
    """Kill what runs on a host: what has started its sshd does not pass on signals."""
    listed = subprocess.run(["ip", "netns", "pids", space], check=True, capture_output=True, text=True).stdout
    for pid in listed.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
