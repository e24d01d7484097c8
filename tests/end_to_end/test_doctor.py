"""doctor over real ssh: hosts that answer, hosts that refuse, and three hosts of a small network."""

from __future__ import annotations

import getpass
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.sshd import find_sshd, free_port, make_key, serving
from tests.mpi.lan import lan
from tests.mpi.launch import ROOT, Done, run


@dataclass(frozen=True)
class Server:
    """A server on this host's loopback. folder: its keys, and `config` for ssh."""

    folder: Path

    def doctor(self, hosts: str, *options: str) -> Done:
        """Look over hosts."""
        ssh = f"ssh -F {shlex.quote(str(self.folder / 'config'))}"
        return run([sys.executable, "-m", "dllama_mpi", "doctor", "--hosts", hosts, "--ssh", ssh, *options], 120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve ssh under several names, of which some are refused."""
    find_sshd()
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    host, other = make_key(folder / "host"), make_key(folder / "other")
    make_key(folder / "user")
    (folder / "known").write_text(f"pi {host}\n")
    (folder / "changed").write_text(f"pi {other}\n")
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(folder, "127.0.0.1", port):
        words = {"folder": folder, "port": port, "silent": silent.getsockname()[1], "closed": free_port()}
        (folder / "config").write_text(_CONFIG.format(**words, user=getpass.getuser()))
        yield Server(folder)


# The first value that fits a name counts, but of keys all do. 127.0.0.2 is this host, too, by a name that needs ssh.
_CONFIG = """\
Host stranger
  UserKnownHostsFile /dev/null
Host changed
  UserKnownHostsFile {folder}/changed
Host denied
  IdentityFile {folder}/other
Host closed
  Port {closed}
Host silent
  Port {silent}
Host nowhere
  HostName nowhere.invalid
Host * !denied
  IdentityFile {folder}/user
Host *
  HostName 127.0.0.1
  HostKeyAlias pi
  Port {port}
  User {user}
  IdentitiesOnly yes
  IdentityAgent none
  GlobalKnownHostsFile /dev/null
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking yes
"""


def lines(done: Done) -> list[str]:
    """Return the lines about what to mend that are errors."""
    return [line for line in done.stdout.splitlines() if line.startswith("error: ")]


def test_a_host_reached_by_ssh_fits_this_one(server: Server) -> None:
    done = server.doctor("localhost,127.0.0.2", "--json")
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["errors"] == 0, report["findings"]
    here, there = (host["report"] for host in report["hosts"])
    assert here["package"] == there["package"]
    assert here["packages"] == there["packages"]
    assert there["python"]["path"] == sys.executable
    assert abs(there["skew"]) < 2
    assert {"advice"} == {each["level"] for each in report["findings"] if "same machine" in each["what"]}
    assert done.returncode == 0


def test_refusals_are_told_with_what_mends_them(server: Server) -> None:
    names = ["stranger", "changed", "denied", "closed", "silent", "nowhere"]
    done = server.doctor(",".join(["localhost", *names]), "--timeout", "6")
    assert done.returncode == 1
    expected = [
        ("its host key is unknown", "ssh-keyscan stranger"),
        ("its host key is another", "ssh-keygen -R changed"),
        ("permission denied", "ssh-copy-id denied"),
        ("nothing listens for ssh", "openssh-server"),
        ("it cannot be reached", "ping silent"),
        ("no such name", "/etc/hosts"),
    ]
    for name, line, (problem, remedy) in zip(names, lines(done), expected, strict=True):
        assert line.startswith(f"error: {name}: "), line
        assert problem in line
        assert remedy in line
    assert not done.stderr


def test_no_python_at_that_path(server: Server) -> None:
    (line,) = lines(server.doctor("127.0.0.2", "--python", "/no where/python"))
    assert line.startswith("error: 127.0.0.2: no Python at /no where/python: install the program there")


def test_another_environment_lacks_what_this_one_has(server: Server, tmp_path: Path) -> None:
    """A Python of its own without any library, as on a host where nothing was installed."""
    made = subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=False)
    if made.returncode:
        pytest.skip("no venv can be made with this Python")
    python = tmp_path / "bin" / "python"
    said = lines(server.doctor("127.0.0.2", "--python", str(python)))
    assert f"error: 127.0.0.2: numpy is missing: on 127.0.0.2 run {python} -m pip install 'numpy>=" in "\n".join(said)


@pytest.mark.lan
def test_hosts_of_a_network(tmp_path: Path) -> None:
    """Three hosts with names and interfaces of their own, asked from the first; one is cut off."""
    find_sshd()
    with lan(3, tmp_path) as net:
        host = make_key(tmp_path / "host")
        make_key(tmp_path / "user")
        addresses = [net.address(at) for at in range(3)]
        (tmp_path / "known").write_text("".join(f"{address} {host}\n" for address in addresses))
        options = _LAN.format(folder=tmp_path, user=getpass.getuser())
        (tmp_path / "config").write_text(options)

        def inside(at: int) -> Sequence[str]:
            name = ["unshare", "--uts", "sh", "-c", f'hostname h{at}; exec "$@"', "-"]
            return ["ip", "netns", "exec", f"{net.name}{at}", *name]

        def doctor(*more: str) -> Done:
            ssh = f"ssh -F {tmp_path / 'config'}"
            asked = ["doctor", "--hosts", ",".join(addresses), "--ssh", ssh, *more]
            return run([*inside(0), "env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "dllama_mpi", *asked], 120)

        with (
            serving(tmp_path, addresses[0], 22, inside(0)),
            serving(tmp_path, addresses[1], 22, inside(1)),
            serving(tmp_path, addresses[2], 22, inside(2)),
        ):
            report = json.loads(doctor("--json").stdout)
            assert report["errors"] == 0, report["findings"]
            about = [each["report"] for each in report["hosts"]]
            assert [each["hostname"] for each in about] == ["h0", "h1", "h2"]
            assert [each["link"]["interface"] for each in about] == ["e0", "e1", "e2"]
            assert not [each for each in report["findings"] if "same machine" in each["what"]]
            net.link(2, "down")
            done = doctor("--timeout", "4")
    assert done.returncode == 1
    (line,) = lines(done)
    assert line.startswith(f"error: {addresses[2]}: it cannot be reached")


_LAN = """\
Host *
  User {user}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  IdentityAgent none
  GlobalKnownHostsFile /dev/null
  UserKnownHostsFile {folder}/known
  StrictHostKeyChecking yes
"""
