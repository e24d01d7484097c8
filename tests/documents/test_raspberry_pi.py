"""docs/raspberry-pi.md, followed: its commands on four hosts of a small network, as they are written."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.documents.commands import PI_PAGE, Command, blocks, commands
from tests.documents.pis import Pis, pis
from tests.documents.test_commands import may_run
from tests.end_to_end.sshd import find_sshd
from tests.mpi.launch import environment

pytestmark = [pytest.mark.long, pytest.mark.lan]

RUN = [command for command in commands(PI_PAGE) if may_run(command)]
SERVED = re.compile(r"curl .*|ExecStart=.*")


def as_here(text: str) -> str:
    """Return a command with the bundled model, not one that would be fetched; hosts share this machine's cores."""
    text = text.replace("--steps 60", "--steps 20 --nthreads 1").replace(" --nthreads 4", "")
    return text.replace("--model qwen3-8b", "--model demo --nthreads 1").replace("/home/pi", "~")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pis]:
    find_sshd()
    with pis(4, tmp_path_factory.mktemp("pis")) as found:
        yield found


@pytest.mark.parametrize(
    "command", [pytest.param(each, id=str(each.line)) for each in RUN if not SERVED.fullmatch(each.text)]
)
def test_command(command: Command, hosts: Pis) -> None:
    before = hosts.sent("wlan0")
    done = hosts.run(as_here(command.text), "Hello\n")
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\n{said}"
    assert "Traceback" not in said
    if "ssh $host hostname" in command.text:
        assert done.stdout.split() == ["pi0", "pi1", "pi2", "pi3"]
    if "--stats" in command.text:
        assert all(f"pi{i}" in said for i in range(4)), said
    if "UCX_NET_DEVICES=eth0" in command.text:
        assert hosts.sent("wlan0") - before < 50_000


def test_service(hosts: Pis) -> None:
    """What the unit starts answers under pi0's name, and ends well when it is told to."""
    (unit,) = (block.text for block in blocks(PI_PAGE) if block.language == "ini")
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    shell = hosts.shell(f"DLLAMA_MPI_API_KEY=x {as_here(line)} & trap 'kill $!' TERM; echo $! > pid; wait $!; wait $!")
    (curl,) = (each.text for each in RUN if SERVED.fullmatch(each.text))
    with subprocess.Popen(
        shell, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as served:
        end = time.monotonic() + 200
        while '{"status":"ok"}' not in (found := hosts.run(f"{curl} || true")).stdout:
            assert served.poll() is None, served.stdout and served.stdout.read()
            assert time.monotonic() < end, found.stdout + found.stderr
            time.sleep(0.5)
        assert hosts.run("kill $(cat pid)").returncode == 0
        said, _ = served.communicate(timeout=100)
    assert served.returncode == 0, said
    assert "Traceback" not in said
