"""A Slurm cluster on one machine: a controller and nodes, each in namespaces of its own, that share the file system.

Every host has its own network address, host name, processes, /dev/shm, /run and `Cluster.local`, as a node has its own
disk; munged and slurmctld or slurmd run there. A host's first process takes all others with it when it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.mpi import guard
from tests.mpi.launch import ROOT, Done, environment, run_mark

SCRIPTS = ROOT / "slurm"
PATIENCE = 300.0
CONTROLLER = "ctl"
_NET = "10.77.0"
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "mungekey", "unshare", "nsenter", "ip")

_CONF = """\
ClusterName=dllama
SlurmctldHost={controller}({net}.254)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TmpFS=/run
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdTimeout=10
KillWait=5
ReturnToService=2
MailProg=/bin/true
NodeName={names} CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# $1: the host's name. $2: the cluster's folder. The machine's own /proc tells the process id outside.
_INIT = f"""\
set -eu
read -r pid _ </proc/self/stat
hostname "$1"
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -m 755 /run/munge
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/local-$1" "$2/local"
ip link set lo up
echo "$pid" >"$2/$1.pid.new"
mv "$2/$1.pid.new" "$2/$1.pid"
until ip -4 -o addr show | grep -q " {_NET}[.]"; do sleep 0.02; done
munged --force --key-file="$2/munge.key" --log-file="$2/munged-$1.log" --seed-file="$2/munge-$1.seed"
if [ "$1" = {CONTROLLER} ]; then slurmctld -D & else slurmd -D -N "$1" & fi
while :; do wait || true; sleep 3600 & done
"""


@dataclass
class Cluster:
    """Hosts that run.

    Attributes:
        folder: of its files. size: number of nodes. env: of the commands that are run on hosts.
    """

    folder: Path
    size: int
    env: dict[str, str]
    _started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def local(self) -> Path:
        """Each host's own folder, at the same path on all of them."""
        return self.folder / "local"

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes."""
        return [f"node{i}" for i in range(self.size)]

    def own(self, host: str) -> Path:
        """Return where `local` of a host lies for those outside of it."""
        return self.folder / f"local-{host}"

    def pid(self, host: str) -> int:
        """Return the process id of a host's first process."""
        return int((self.folder / f"{host}.pid").read_text())

    def run(self, command: Sequence[str], host: str = CONTROLLER, cwd: Path | None = None, check: bool = True) -> Done:
        """Run a command on a host."""
        inside = ["nsenter", "-t", str(self.pid(host)), "-m", "-u", "-i", "-n", "-p", "--"]
        place = ["env", "-C", str(cwd or self.folder)]
        done = subprocess.run(
            [*inside, *place, *command], env=self.env, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if check and done.returncode != 0:
            pytest.fail(f"{command} on {host} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def submit(self, cwd: Path, *command: str) -> Job:
        """Give a batch script to Slurm from a folder, with options before it and arguments behind."""
        done = self.run(["sbatch", "--parsable", *command], cwd=cwd)
        return Job(self, int(done.stdout.strip().split(";")[0]), cwd)

    def start(self, host: str) -> None:
        """Switch a host on."""
        (self.folder / f"{host}.pid").unlink(missing_ok=True)
        spaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL"]
        with (self.folder / f"{host}.out").open("ab") as out:
            self._started[host] = subprocess.Popen(
                [*spaces, "sh", "-c", _INIT, "sh", host, str(self.folder)],
                env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        wait_until(
            lambda: (self.folder / f"{host}.pid").exists() or self._started[host].poll() is not None, f"{host} to start"
        )
        if self._started[host].poll() is not None:
            raise OSError((self.folder / f"{host}.out").read_text())
        net = ["nsenter", "-t", str(self.pid(CONTROLLER)), "-n", "ip"]
        own = ["nsenter", "-t", str(self.pid(host)), "-n", "ip"]
        if host == CONTROLLER:
            _call(*net, "link", "add", "switch", "type", "bridge")
            _call(*net, "addr", "add", f"{_NET}.254/24", "dev", "switch")
            _call(*net, "link", "set", "switch", "up")
        else:
            peer = ["peer", "name", "eth0", "netns", str(self.pid(host))]
            _call(*net, "link", "add", host, "type", "veth", *peer)
            _call(*net, "link", "set", host, "master", "switch", "up")
            _call(*own, "addr", "add", f"{_NET}.{self.nodes.index(host) + 1}/24", "dev", "eth0")
            _call(*own, "link", "set", "eth0", "up")

    def kill(self, host: str) -> None:
        """Cut a host's power: all its processes end at once."""
        os.kill(self.pid(host), 9)
        self._started[host].wait(PATIENCE)

    def states(self) -> dict[str, str]:
        """Return the nodes' states, as sinfo tells them."""
        done = self.run(["sinfo", "-h", "-N", "-o", "%N %T"], check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def is_up(self) -> bool:
        """Return whether every node waits for work, or works."""
        states = self.states()
        return len(states) == self.size and all(state in ("idle", "mixed", "allocated") for state in states.values())

    def close(self) -> None:
        """End all hosts."""
        for host, process in self._started.items():
            if process.poll() is None:
                with contextlib.suppress(OSError, ValueError):
                    os.kill(self.pid(host), 9)
                process.kill()
                process.wait(PATIENCE)


@dataclass(frozen=True)
class Job:
    """A job that was given to Slurm from a folder."""

    cluster: Cluster
    id: int
    cwd: Path

    def show(self) -> dict[str, str]:
        """Return what `scontrol show job` says of it."""
        words = self.cluster.run(["scontrol", "-o", "show", "job", str(self.id)]).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def log(self) -> str:
        """What it has said; "" before it runs."""
        found = list(self.cwd.glob(f"*-{self.id}.out"))
        return found[0].read_text(errors="replace") if found else ""

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Wait until something is true of it; not longer than it lives."""
        wait_until(lambda: true() or self.has_ended(), what, self.describe)
        assert true(), f"{what}\n{self.describe()}"

    def has_ended(self) -> bool:
        """Return whether it is neither waiting nor running."""
        return self.show()["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

    def wait(self, status: int = 0) -> str:
        """Wait for its end, and for nothing else on the way; return its log. Its exit status must be `status`."""

        def over() -> bool:
            found = self.show()
            # Slurm holds a requeued job for two minutes, in which the last of its processes end.
            if found["JobState"] == "PENDING" and found["Restarts"] != "0" and not self.processes():
                self.cluster.run(["scontrol", "update", f"jobid={self.id}", "starttime=now"], check=False)
            return self.has_ended()

        wait_until(over, f"job {self.id} to end", self.describe)
        assert self.show()["ExitCode"] == f"{status}:0", self.describe()
        return self.log

    def processes(self) -> dict[int, list[str]]:
        """Return the command lines of its processes, those of Slurm for it included, by process id."""
        found = {}
        for pid in guard.marked(self.cluster.env[guard.VARIABLE]):
            with contextlib.suppress(OSError):  # it has ended
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={self.id}".encode() in environment or f"slurmstepd: [{self.id}." in words[0]:
                    found[pid] = words
        return found

    def describe(self) -> str:
        """Return its state and log."""
        return f"{self.show()}\n{self.log}"


def wait_until(true: Callable[[], bool], what: str, more: Callable[[], str] = str) -> None:
    """Wait until something is true, or fail."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"waited in vain for {what}\n{more()}")
        time.sleep(0.2)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def reason_against() -> str | None:
    """Return why there can be no cluster here, or None."""
    if not sys.platform.startswith("linux") or os.getuid() != 0:
        return "a Slurm cluster of namespaces needs Linux and root"
    missing = [name for name in _PROGRAMS if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge libpmix-dev iproute2"
    return None


@contextlib.contextmanager
def cluster(size: int, folder: Path) -> Iterator[Cluster]:
    """Make a cluster of so many nodes, and end it; skip the test where that cannot be had."""
    against = reason_against()
    if against is not None:
        pytest.skip(against)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": programs, guard.VARIABLE: f"{run_mark()}/slurm"}
    made = Cluster(folder, size, environment(own))
    hosts = [CONTROLLER, *made.nodes]
    for host in hosts:
        made.own(host).mkdir(parents=True)
    for name in ("local", "state"):
        (folder / name).mkdir()
    names = f"node[0-{size - 1}]"
    values = {"controller": CONTROLLER, "net": _NET, "folder": folder, "names": names, "cpus": os.cpu_count()}
    (folder / "slurm.conf").write_text(_CONF.format(**values))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    addresses = [f"127.0.0.1 localhost\n{_NET}.254 {CONTROLLER}\n"]
    addresses += [f"{_NET}.{i + 1} {node}\n" for i, node in enumerate(made.nodes)]
    (folder / "hosts").write_text("".join(addresses))
    _call("mungekey", "-c", "-k", str(folder / "munge.key"))
    try:
        try:
            for host in hosts:
                made.start(host)
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            pytest.skip(f"namespaces cannot be made here: {said.strip()}")
        wait_until(made.is_up, "the nodes", lambda: str(made.states()))
        yield made
    finally:
        made.close()
        guard.end_marked(made.env[guard.VARIABLE])
