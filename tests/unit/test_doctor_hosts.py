"""The command doctor without a network: which hosts are asked, how they refuse, and the probe on this host."""

from __future__ import annotations

import ast
import json
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dllama_mpi.cli import main
from dllama_mpi.doctor import probe
from dllama_mpi.doctor.hostfile import Host, parse_hosts, read_hostfile
from dllama_mpi.doctor.reach import Way, refusal
from dllama_mpi.errors import UsageError

# ---- which hosts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pi0:4\npi1\n", [Host("pi0", 4), Host("pi1")]),
        ("# all\n\n pi0 slots=4  # the first\n#pi9\npi1 slots=2 max_slots=4\n", [Host("pi0", 4), Host("pi1", 2)]),
        ("pi0:1 binding=user\npi0:2\npi1\npi0\n", [Host("pi0", 4), Host("pi1")]),
        ("me@10.0.0.1:2\r\nfd00::1\n", [Host("me@10.0.0.1", 2), Host("fd00::1")]),
    ],
)
def test_a_hostfile(text: str, expected: list[Host], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    assert read_hostfile(str(tmp_path / "hosts")) == expected


def test_the_example_of_a_hostfile() -> None:
    path = Path(__file__).parents[2] / "hostfile.example"
    assert read_hostfile(str(path)) == [Host(f"pi{i}", 1) for i in range(4)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no host in it"),
        ("# pi0\n\n", "no host in it"),
        ("pi0\npi1:0\n", "line 2: '0' ranks on pi1"),
        ("pi0 slots=many", "'many' ranks on pi0"),
        ("pi0:", "'' ranks on pi0"),
        ("-oProxyCommand=x", "'-oProxyCommand=x' is no name of a host"),
        ("pi0 4", "line 1: '4' is not known"),
        ("\N{BLACK STAR}", "is no name of a host"),
    ],
)
def test_a_wrong_hostfile(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(said)):
        read_hostfile(str(tmp_path / "hosts"))


def test_a_list_of_hosts() -> None:
    assert parse_hosts("a,b:2, c") == [Host("a"), Host("b", 2), Host("c")]
    with pytest.raises(UsageError, match="'' is no name of a host"):
        parse_hosts("a,,b")


# ---- reaching

WAY = Way(["ssh"], "/env/bin/python", 5.0)


@pytest.mark.parametrize(
    ("code", "err", "problem", "remedy"),
    [
        (255, "No ED25519 host key is known for pi3 and ...", "unknown", "ssh-keyscan pi3"),
        (255, "@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", "another", "-R pi3"),
        (255, "me@pi3: Permission denied (publickey).", "permission denied", "ssh-copy-id me@pi3"),
        (255, "ssh: Could not resolve hostname pi3: Name or service not known", "no such name", "/etc/hosts"),
        (255, "ssh: connect to host pi3 port 22: Connection refused", "nothing listens", "openssh-server"),
        (255, "ssh: connect to host pi3 port 22: Connection timed out", "cannot be reached", "ping pi3"),
        (255, "ssh: connect to host pi3 port 22: No route to host", "No route to host", "ping pi3"),
        (255, "kex_exchange_identification: banner", "ssh failed: kex_exchange", "try ssh me@pi3 true"),
        (127, "sh: 1: exec: /env/bin/python: not found", "no Python at /env/bin/python", "--python"),
        (1, "fish: Unknown command: /env/bin/python: No such file", "no Python at /env/bin/python", "--python"),
        (1, "SyntaxError: invalid syntax", "failed there: SyntaxError", "3.10 is needed"),
        (3, "", "failed there: exit status 3", "--version"),
    ],
)  # fmt: skip
def test_refusals(code: int, err: str, problem: str, remedy: str) -> None:
    said, mend = refusal("me@pi3", WAY, code, err)
    assert problem in said
    assert remedy in mend


def program(path: Path, text: str) -> str:
    """Write a shell script and return its path."""
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_host_that_does_not_answer_is_given_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ssh = program(tmp_path / "ssh", "sleep 600\n")
    assert main(["doctor", "--hosts", "pi1,pi2", "--ssh", ssh, "--timeout", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": look")[0] for line in lines] == [f"error: pi{i}: no answer in 1 s" for i in (1, 2)]


def test_what_a_shell_prints_besides_is_no_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ssh would: a greeting, then the command by the shell."""
    ssh = program(tmp_path / "ssh", 'echo "Welcome {to} all"\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c "$1"\n')
    main(["doctor", "--hosts", "pi1", "--ssh", ssh, "--json"])
    (host,) = json.loads(capsys.readouterr().out)["hosts"]
    assert host["report"]["hostname"] == socket.gethostname().split(".")[0]
    assert host["report"]["skew"] == 0


def test_a_python_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "python")
    assert main(["doctor", "--hosts", "localhost", "--python", missing]) == 1
    assert capsys.readouterr().out.startswith(f"error: localhost: {missing} cannot be run here (No such file")


# ---- a user's mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give --hostfile FILE or --hosts A,B,C"),
        (["--hosts", "a", "--hostfile", "b"], "one of them"),
        (["--hostfile", "nowhere"], "--hostfile nowhere: No such file or directory"),
        (["--hostfile", "empty"], "--hostfile empty: no host in it"),
        (["--hosts", "pi1", "--ssh", "no-such-ssh -F x"], "no program no-such-ssh on the PATH to reach pi1 with"),
        (["--hosts", "pi1", "--ssh", "'"], "not a command"),
        (["--hosts", "pi1", "--ssh", ""], "--ssh is empty"),
    ],
)
def test_mistakes(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("# none\n")
    assert main(["doctor", *options]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not shown.out


# ---- the probe


def test_this_host_without_mpi_and_numba() -> None:
    code = (
        "import sys\nfrom dllama_mpi.cli import main\nmain(['doctor', '--hosts', 'localhost', '--json'])\n"
        "print(*{'mpi4py', 'numba', 'llvmlite'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (host,) = json.loads(done.stdout)["hosts"]
    assert not done.stderr.strip()
    about = host["report"]
    assert about["python"]["path"] == sys.executable
    assert Path(about["package"]["path"]) == Path(probe.__file__).parent.parent
    assert about["packages"]["numpy"]
    assert about["cores"] >= 1
    assert about["caches"]["weights"]["free"] > 0


def test_the_probe_is_a_script_for_python_3_8() -> None:
    source = Path(probe.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported | {name.partition(".")[0] for name in froms} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("HYDRA build details:\n    Version:                                 4.3.1\n", ("MPICH", "4.3.1")),
        ("mpiexec (OpenRTE) 4.1.4\n\nReport bugs to", ("Open MPI", "4.1.4")),
        ("mpirun (Open MPI) 5.0.8\n", ("Open MPI", "5.0.8")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240701\n", ("Intel MPI", "2021.13")),
        ("something else 1.0", (None, None)),
    ],
)
def test_which_mpi_a_launcher_is_of(said: str, expected: tuple[str | None, str | None]) -> None:
    assert probe.mpi_kind(said) == expected


def test_a_part_that_cannot_be_found_out_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("an odd file")

    monkeypatch.setattr(probe, "memory", broken)
    found = probe.collect({"root": "localhost", "hosts": ["localhost"], "source": "/nowhere"})
    assert found["memory"] is None
    assert found["packages"]["numpy"]
    assert found["resolves"] == {"localhost": found["resolves"]["localhost"]}
